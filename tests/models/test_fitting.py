"""Fitting: who learns from which rows, and who is judged on which."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import pyarrow as pa
import pytest

from models.fitting import Fitted, TooFewRows, fit_and_judge


class Model:
    """Remembers the rows that it learned from and was judged on; its figure is given."""

    figure: ClassVar[float] = 1.0
    fitted: ClassVar[list[tuple[str, list[int]]]] = []
    judged: ClassVar[list[tuple[str, list[int]]]] = []

    def __init__(self, name: str, learned: list[int] | None = None) -> None:
        self.name, self.learned = name, learned

    @classmethod
    def fit(cls, rows: pa.Table, spec: Mapping[str, Any], *, seed: int, device: str, threads: int) -> Self:
        assert (seed, device, threads) == (7, "cpu", 1) and spec in ({"a": 1}, {"a": 2})
        learned = rows["n"].to_pylist()
        Model.fitted.append((cls.__name__, learned))
        return cls(cls.__name__ if spec == {"a": 1} else "Twin", learned)

    def evaluate(self, rows: pa.Table) -> dict[str, float]:
        Model.judged.append((self.name, rows["n"].to_pylist()))
        return {"mae": self.figure}


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


def test_the_judged_twin_and_the_rule_have_not_seen_the_held_out_rows() -> None:
    fitted = run(table(1, 2, 3, 4), table(1, 2), table(3, 4))
    assert Model.fitted == [("Learner", [1, 2]), ("Rule", [1, 2]), ("Learner", [1, 2, 3, 4])]
    assert fitted.model.learned == [1, 2, 3, 4]  # type: ignore[attr-defined]
    assert fitted.rows == 4 and fitted.verdict.passed


def test_candidate_rule_and_champion_are_judged_on_the_same_rows() -> None:
    fitted = run(table(1, 2, 3, 4), table(1, 2), table(3, 4), champion=Champion("champion"))
    assert Model.judged == [("Learner", [3, 4]), ("Rule", [3, 4]), ("champion", [3, 4])]
    assert fitted.metrics == {"candidate": {"mae": 1.0}, "rule": {"mae": 2.0}, "champion": {"mae": 3.0}}


def test_a_champion_that_knows_the_held_out_days_is_stood_in_for_by_its_recipe() -> None:
    fitted = run(table(1, 2, 3, 4), table(1, 2), table(3, 4), twin={"a": 2})
    assert Model.judged == [("Learner", [3, 4]), ("Rule", [3, 4]), ("Twin", [3, 4])]
    assert ("Learner", [1, 2]) in Model.fitted and fitted.metrics["champion"] == {"mae": 1.0}


def test_the_same_recipe_ties_without_being_fitted_again() -> None:
    fitted = run(table(1, 2, 3, 4), table(1, 2), table(3, 4), twin={"a": 1})
    assert Model.judged == [("Learner", [3, 4]), ("Rule", [3, 4])]
    assert fitted.metrics["champion"] == fitted.metrics["candidate"] and fitted.verdict.passed


def test_a_recipe_that_does_not_fit_any_more_is_not_compared_and_that_is_said() -> None:
    def refuse(rows: pa.Table, spec: Mapping[str, Any], **how: Any) -> Learner:
        if spec == {"a": 3}:
            raise KeyError("column 'gone'")
        return Learner("Learner", rows["n"].to_pylist())

    broken = type("Broken", (Learner,), {"fit": staticmethod(refuse)})
    fitted = run(table(1, 2, 3, 4), table(1, 2), table(3, 4), learner=broken, twin={"a": 3})
    assert "champion" not in fitted.metrics and fitted.verdict.passed
    assert "cannot be fitted any more, so it is not compared: KeyError" in fitted.note


@pytest.mark.parametrize(("champion", "passes"), [(0.9, False), (1.0, True), (1.1, True)])
def test_the_champion_is_part_of_the_verdict(champion: float, passes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Champion, "figure", champion)
    assert run(table(1, 2), table(1), table(2), champion=Champion("champion")).verdict.passed is passes


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
