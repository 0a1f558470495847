"""Fitting: who learns from which rows, and who is judged on which."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from typing import Any, ClassVar, Self

import pyarrow as pa
import pytest

from models.evaluation import gate
from models.training import fit as fitting
from models.training.fit import Fitted, TooFewRows, fit_and_judge


class Model:
    """Remembers the rows that it learned from and was judged on; its figure is given. It says what it learned from."""

    figure: ClassVar[float] = 1.0
    fitted: ClassVar[list[tuple[str, list[int]]]] = []
    judged: ClassVar[list[tuple[str, list[int]]]] = []

    def __init__(self, name: str, learned: list[int] | None = None) -> None:
        self.name, self.learned = name, learned

    @classmethod
    def fit(cls, rows: pa.Table, spec: Mapping[str, Any], *, seed: int, device: str, threads: int) -> Self:
        assert (seed, device, threads) == (7, "cpu", 1) and spec in ({"a": 1}, {"a": 2})
        name = cls.__name__ if spec == {"a": 1} else "Other"
        learned = rows["n"].to_pylist()
        Model.fitted.append((name, learned))
        return cls(name, learned)

    def evaluate(self, rows: pa.Table) -> dict[str, float]:
        Model.judged.append((self.name, rows["n"].to_pylist()))
        return {"mae": self.figure}

    def score(self, rows: pa.Table) -> pa.Table:
        return pa.table({"score": [str(self.learned)] * rows.num_rows})

    def files(self) -> dict[str, bytes]:
        return {"model.txt": f"{self.name} {self.learned}".encode()}


class Learner(Model):
    pass


class Rule(Model):
    figure = 2.0


class Champion(Model):
    figure = 3.0


def table(*n: int) -> pa.Table:
    return pa.table({"n": pa.array(n, pa.int64())})


@pytest.fixture(autouse=True)
def _forget() -> None:
    Model.fitted.clear()
    Model.judged.clear()


def run(learn: pa.Table, early: pa.Table, held_out: pa.Table, **changed: Any) -> Fitted:
    said: dict[str, Any] = {
        "learner": Learner, "rule": Rule, "champion": None, "spec": {"a": 1}, "day": "2026-03-09", "min_rows": 2,
        "metric": "mae", "better": "lower", "margin": 0.0, "seed": 7, "device": "cpu", "threads": 1,
    }  # fmt: skip
    return fit_and_judge(learn, early, held_out, **{**said, **changed})


LEARN, EARLY, HELD, AGED = table(1, 2, 3, 4), table(1, 2), table(3, 4), table(1)


def champion(**changed: Any) -> fitting.Champion:
    said: dict[str, Any] = {"name": "version 3", "model": Champion("champion", [0]), "clean": False}
    return fitting.Champion(**{**said, **changed})


def aged(recipe: Mapping[str, Any], **changed: Any) -> fitting.Champion:
    return champion(recipe=recipe, aged=AGED, aged_day=date(2026, 3, 1), **changed)


def judged() -> set[str]:
    return {name for name, rows in Model.judged if rows == [3, 4]}


def test_the_judged_twin_and_the_rule_have_not_seen_the_held_out_rows() -> None:
    fitted = run(LEARN, EARLY, HELD)
    assert sorted(Model.fitted) == [("Learner", [1, 2]), ("Learner", [1, 2, 3, 4]), ("Rule", [1, 2])]
    assert fitted.model.learned == [1, 2, 3, 4]  # type: ignore[attr-defined]
    assert fitted.rows == 4 and fitted.verdict.passed and fitted.note == ""


def test_candidate_rule_and_a_champion_of_earlier_days_are_judged_on_the_same_rows() -> None:
    fitted = run(LEARN, EARLY, HELD, champion=champion(clean=True))
    assert judged() == {"Learner", "Rule", "champion"} and all(rows == [3, 4] for _, rows in Model.judged)
    assert fitted.metrics == {"candidate": {"mae": 1.0}, "rule": {"mae": 2.0}, "champion": {"mae": 3.0}}
    assert fitted.note == " Compared with version 3 as it is."


@pytest.mark.parametrize("recipe", [{"a": 2}, {"a": 1}], ids=["another recipe", "the candidate's own"])
def test_a_champion_that_knows_the_held_out_days_is_stood_in_for_by_a_twin_that_is_as_much_older(recipe: Any) -> None:
    fitted = run(LEARN, EARLY, HELD, champion=aged(recipe))
    assert ("Other" if recipe == {"a": 2} else "Learner", [1]) in Model.fitted
    assert fitted.metrics["champion"] == {"mae": 1.0} and fitted.verdict.passed
    assert "has learned from the held-out days: its twin, fitted on the 1 rows known by 2026-03-01" in fitted.note


def test_a_champion_that_the_candidates_twin_is_itself_is_told_from_it_by_its_own_twin() -> None:
    one = champion(model=Learner("Learner", [1, 2]), clean=True)
    refused = run(LEARN, EARLY, HELD, champion=one)
    assert not refused.verdict.passed and "are the same model" in refused.verdict.reasons[0]
    fitted = run(LEARN, EARLY, HELD, champion=aged({"a": 1}, model=one.model, clean=True))
    assert fitted.verdict.passed and "Version 3 is what the candidate's twin is: its twin" in fitted.note


@pytest.mark.parametrize("a", [1, 2])
def test_the_champions_recipe_is_judged_on_the_candidates_own_rows(a: int, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[float | None] = []
    examine = fitting.evaluate.examine
    monkeypatch.setattr(
        fitting.evaluate, "examine", lambda *args, **how: (told.append(how["same_rows"]), examine(*args, **how))[1]
    )
    run(LEARN, EARLY, HELD, champion=aged({"a": a}))
    assert told == [1.0]
    assert (("Other", [1, 2]) in Model.fitted) is (a == 2), "the same recipe on the same rows is the candidate's twin"


def test_without_a_recipe_or_rows_that_it_fits_the_recipe_is_not_judged() -> None:
    how = {"seed": 7, "device": "cpu", "threads": 1}
    twin = Learner("Learner", [1, 2])
    for learner, one in ((Learner, champion()), (Broken, aged({"a": 3}))):
        assert fitting.same_rows(twin, {"a": 1}, one, learner, EARLY, HELD, "mae", how) is None
    alike = aged({"a": ["x", 1.0], "b": 1})
    assert fitting.same_rows(twin, {"b": 1, "a": ("x", 1.0)}, alike, Broken, EARLY, HELD, "mae", how) == 1.0


def test_a_candidate_that_is_the_champion_is_refused_and_the_champion_is_named() -> None:
    fitted = run(LEARN, EARLY, HELD, champion=aged({"a": 1}, model=Learner("Learner", [1, 2, 3, 4])))
    assert not fitted.verdict.passed and fitted.model.learned == [1, 2, 3, 4]  # type: ignore[attr-defined]
    assert fitted.verdict.reasons == (
        "the candidate and the champion are the same model (version 3): of a model beside itself nothing can be told",
    )


@pytest.mark.parametrize("figure", [0.9, 1.1])
def test_without_a_twin_a_champion_that_knows_the_held_out_days_is_compared_as_it_is(
    figure: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Champion, "figure", figure)
    fitted = run(LEARN, EARLY, HELD, champion=champion(why="12 rows were known by 2026-03-01"))
    assert fitted.verdict.passed is (figure > 1), "who passes beside one that is flattered passes"
    assert "which flatters it: 12 rows were known by 2026-03-01." in fitted.note


class Broken(Learner):
    @classmethod
    def fit(cls, rows: pa.Table, spec: Mapping[str, Any], **how: Any) -> Any:
        if spec == {"a": 3}:
            raise KeyError("column 'gone'")
        return super().fit(rows, spec, **how)


def test_a_recipe_that_does_not_fit_any_more_has_no_twin_and_that_is_said() -> None:
    fitted = run(LEARN, EARLY, HELD, learner=Broken, champion=aged({"a": 3}))
    assert fitted.metrics["champion"] == {"mae": 3.0} and fitted.verdict.passed
    assert "its recipe cannot be fitted any more: KeyError" in fitted.note


class Blind(Champion):
    def score(self, rows: pa.Table) -> pa.Table:
        raise KeyError("column 'gone'")


def test_a_champion_that_cannot_score_the_rows_is_not_compared_and_that_is_said() -> None:
    fitted = run(LEARN, EARLY, HELD, champion=champion(model=Blind("blind"), clean=True))
    assert "champion" not in fitted.metrics and fitted.verdict.passed
    assert "Version 3 cannot score the held-out rows and is not compared: KeyError" in fitted.note
    fitted = run(LEARN, EARLY, HELD, champion=aged({"a": 2}, model=Blind("blind"), clean=True))
    assert fitted.metrics["champion"] == {"mae": 1.0}
    assert "cannot score the held-out rows (KeyError: \"column 'gone'\"): its twin" in fitted.note


@pytest.mark.parametrize(("figure", "passes"), [(0.9, False), (1.0, True), (1.1, True)])
def test_the_champion_is_part_of_the_verdict(figure: float, passes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Champion, "figure", figure)
    assert run(LEARN, EARLY, HELD, champion=champion(clean=True)).verdict.passed is passes


@pytest.mark.parametrize(("early", "held_out"), [(table(), table(2)), (table(1), table())])
def test_without_rows_to_learn_from_or_to_judge_on_nothing_passes(early: pa.Table, held_out: pa.Table) -> None:
    fitted = run(table(1, 2), early, held_out)
    assert not fitted.verdict.passed and not fitted.metrics
    assert fitted.model.learned == [1, 2], "a candidate is fitted all the same, for people to look at"  # type: ignore[attr-defined]


def test_too_few_rows_are_refused_with_how_many_there_are() -> None:
    assert run(table(1, 2), table(1), table(2), min_rows=2).rows == 2
    Model.fitted.clear()
    with pytest.raises(TooFewRows, match=r"2 matured rows .* 3 are needed \(training.min_rows\)"):
        run(table(1, 2), table(1), table(2), min_rows=3)
    assert not Model.fitted


class Levels:
    """Says one level of every row, and none of rows whose ``n`` is among those it does not know."""

    def __init__(self, level: float, *unknown: int) -> None:
        self.level, self.unknown = level, unknown

    def score(self, rows: pa.Table) -> pa.Table:
        said = [None if n in self.unknown else self.level for n in rows["n"].to_pylist()]
        return pa.table({"level": pa.array(said, pa.float64())})


@pytest.mark.parametrize("newest", [(), (1,), (1, 2, 3)])
def test_a_newest_row_without_a_score_is_not_compared_and_hides_no_other(newest: tuple[int, ...]) -> None:
    found = fitting.disagreement(
        "response", Levels(9.0, *newest), Levels(1.1), champion(model=Levels(1.0)), Levels(1.0), "",  # type: ignore[arg-type]
        fitting.Newest(table(1, 2, 3), table(1, 2, 3)),
    )  # fmt: skip
    if len(newest) == 3:
        assert found == "not measured: no feature row of the newest days is scored by both models"
        return
    assert isinstance(found, gate.Disagreement) and found.rows == 3 - len(newest) and found.ratio > 100
