"""Search: a better spec within its budget, the same one each time, and on after a kill."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pydantic import ValidationError

from models import catalog
from models.learners.base import Range
from models.learners.duration import DurationModel
from models.learners.response import ResponseModel
from models.training import search
from models.training.search import EarlyStopping, Progress, Search, Tuned
from tests.support.searched import LATER, ROWS, SPEC, Known


@pytest.fixture(autouse=True)
def _forget() -> None:
    Known.fitted.clear()
    Known.rows.clear()


def run(folder: Path | None = None, **changed: Any) -> Tuned:
    said: dict[str, Any] = {
        "budget": Search(trials=14), "metric": "mae", "better": "lower", "seed": 3, "device": "cpu", "threads": 1,
    }  # fmt: skip
    given = {"spec": SPEC, **changed}
    return search.search(Known, ROWS, LATER, given.pop("spec"), folder=folder, **{**said, **given})


def told(found: Tuned) -> list[dict[str, Any]]:
    """The trials but for how long they took."""
    return found.trials.drop_columns(["seconds"]).sort_by("trial").to_pylist()


def test_a_search_finds_a_better_spec_on_the_rows_given_and_no_others() -> None:
    found = run()
    rows = found.trials.to_pylist()
    given = next(row for row in rows if row["by"] == "given")
    assert rows[0]["chosen"] and rows[0]["value"] < given["value"]
    assert found.spec == {**SPEC, **json.loads(rows[0]["changed"])}
    assert len(rows) == 15 and {r["by"] for r in rows} == {"given", "search"}
    assert all(learned is ROWS and judged is LATER for learned, judged in Known.rows)
    assert "14 trials" in found.note and found.card.count("\n") == 18 and "(chosen)" in found.card


def test_the_best_trial_beats_blind_drawing() -> None:
    # 14 trials of which 10 are drawn blindly: TPE must have learned something by 40
    found = run(budget=Search(trials=40))
    late = [r["value"] for r in found.trials.to_pylist() if r["trial"] > 25 and r["value"]]
    early = [r["value"] for r in found.trials.to_pylist() if 0 < r["trial"] <= 10 and r["value"]]
    assert sum(late) / len(late) < sum(early) / len(early)


def test_the_same_seed_gives_the_same_trials_and_another_seed_others() -> None:
    first, again, other = run(), run(), run(seed=4)
    assert told(first) == told(again) and first.spec == again.spec
    assert told(first) != told(other)


def test_a_spec_that_cannot_be_improved_stays() -> None:
    best = {**SPEC, "learning_rate": 0.05, "leaves": 12, "rounds": 200}
    found = run(spec=best)
    assert found.spec == best and found.trials["by"][0].as_py() == "given" and "nothing better" in found.note


def test_higher_can_be_better() -> None:
    found = run(better="higher")
    values = [v for v in found.trials["value"].to_pylist() if v is not None]
    assert found.trials["chosen"][0].as_py() and values[0] == max(values)


@pytest.mark.slow
def test_a_killed_search_goes_on_where_it_stopped_and_ends_as_if_it_had_not_been(tmp_path: Path, caplog: Any) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "tests.support.searched", str(tmp_path / "kept"), "13"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as child:  # fmt: skip
        assert child.stdout is not None
        assert [child.stdout.readline().strip() for _ in range(13)][-1] == "13"
        child.kill()
    assert child.returncode == -signal.SIGKILL
    with caplog.at_level(logging.INFO):
        resumed = run(tmp_path / "kept")
    assert "goes on after 12 trials" in caplog.text and "was killed" in caplog.text
    assert len(Known.fitted) == 3, "the trial that was killed and the two that were left"
    assert told(resumed) == told(run())
    Known.fitted.clear()
    assert told(run(tmp_path / "kept")) == told(resumed) and not Known.fitted, "and once done it is read"


def test_another_question_in_the_same_folder_is_another_search(tmp_path: Path) -> None:
    first = run(tmp_path, budget=Search(trials=3))
    assert told(run(tmp_path, budget=Search(trials=3), spec={**SPEC, "leaves": 9})) != told(first)
    Known.fitted.clear()
    run(tmp_path, budget=Search(trials=3))
    assert not Known.fitted
    search.search(
        Known, pa.concat_tables([ROWS, ROWS]), LATER, SPEC, budget=Search(trials=3), metric="mae", better="lower",
        seed=3, device="cpu", threads=1, folder=tmp_path,
    )  # fmt: skip
    assert len(Known.fitted) == 4, "other rows: nothing that was found for these counts"


def test_the_seconds_end_it_and_those_spent_before_a_kill_count(tmp_path: Path) -> None:
    def clock() -> float:
        return 10.0 * len(Known.rows)  # what a trial takes

    assert run(tmp_path, budget=Search(seconds=35), clock=clock).trials.num_rows == 4
    assert run(tmp_path, budget=Search(seconds=55), clock=clock).trials.num_rows == 6, (
        "20 seconds more: two trials more"
    )
    Known.rows.clear()
    assert run(tmp_path, budget=Search(seconds=55), clock=clock).trials.num_rows == 6 and not Known.rows


def test_progress_says_the_trial_the_best_so_far_and_what_is_left() -> None:
    seen: list[Progress] = []
    found = run(budget=Search(trials=5, seconds=600), progress=seen.append)
    assert [p.trial for p in seen] == [1, 2, 3, 4, 5, 6]
    assert [p.trials_left for p in seen] == [5, 4, 3, 2, 1, 0]
    assert all(0 < (p.seconds_left or 0) <= 600 for p in seen)
    assert [p.best for p in seen] == sorted((p.best for p in seen), reverse=True)
    assert seen[-1].best == found.trials["value"][0].as_py()
    assert "trial 6" in str(seen[-1]) and "best" in str(seen[-1]) and "0 trials" in str(seen[-1])


def test_a_trial_that_the_learner_refuses_is_kept_with_its_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    space = {**catalog.KINDS["response"].space, "leaves": Range(30, 31, whole=True)}
    monkeypatch.setitem(catalog.KINDS, "response", replace(catalog.KINDS["response"], space=space))
    faults = [r for r in run().trials.to_pylist() if r["fault"]]
    assert faults and all("31 leaves are refused" in r["fault"] and r["value"] is None for r in faults)
    assert not any(r["chosen"] for r in faults)


def test_a_section_that_cannot_be_judged_as_it_stands_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing is nan"):
        run(metric="nothing")
    with pytest.raises(ValueError, match="31 leaves"):
        run(spec={**SPEC, "leaves": 31})
    with pytest.raises(KeyError, match="no search space is declared for models of kind 'other'"):
        run(spec={**SPEC, "kind": "other"})


def test_a_search_without_an_end_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"needs `seconds` or `trials`"):
        Search.model_validate({"validation_days": 3})


@pytest.mark.parametrize(("kind", "section"), [("duration", DurationModel), ("response", ResponseModel)])
@pytest.mark.parametrize("end", ["low", "high"])
def test_every_value_of_a_space_is_one_that_the_section_takes(kind: str, section: Any, end: str) -> None:
    values = {field: getattr(one, end) for field, one in catalog.KINDS[kind].space.items()}
    whole = {field: int(v) if catalog.KINDS[kind].space[field].whole else v for field, v in values.items()}
    made = section.model_validate({"kind": kind, **whole})
    assert {field: getattr(made, field) for field in whole} == whole


def stop(**changed: Any) -> Tuned:
    said: dict[str, Any] = {
        "stop": EarlyStopping(), "metric": "mae", "better": "lower", "seed": 3, "device": "cpu", "threads": 1,
    }  # fmt: skip
    return search.stop_early(Known, ROWS, LATER, SPEC, **{**said, **changed})


def test_early_stopping_finds_the_rounds_and_stops_after_its_patience() -> None:
    found = stop(stop=EarlyStopping(growth=1.2, patience=3))
    tried = [spec["rounds"] for spec in Known.fitted]
    assert 180 <= found.spec["rounds"] <= 220 and {**found.spec, "rounds": 150} == SPEC
    assert tried == sorted(tried) and tried[-4] == found.spec["rounds"], "three sizes after the best"
    assert "early stopping on 1 rows of later days" in found.note


def test_early_stopping_ends_at_the_most_rounds() -> None:
    found = stop(stop=EarlyStopping(most_rounds=100))
    assert 71 < found.spec["rounds"] <= 100 and max(spec["rounds"] for spec in Known.fitted) <= 100


def test_rounds_found_for_a_real_learner_are_those_of_the_least_error(ads: Any) -> None:
    from pipeline import point_in_time
    from pipeline.decisions import scoring

    rows = point_in_time.training_set(ads.workflow, ads.lake, ads.last)
    cut = rows.num_rows * 2 // 3
    before, later = rows.slice(0, cut), rows.slice(cut)
    spec = {**scoring.learner_spec(ads.workflow), "learning_rate": 0.2}
    learner = catalog.learner("response")
    how: dict[str, Any] = {"seed": 3, "device": "cpu", "threads": 1}
    found = search.stop_early(
        learner,
        before,
        later,
        spec,
        stop=EarlyStopping(patience=1, most_rounds=60),
        metric="mae",
        better="lower",
        **how,
    )
    chosen = next(r for r in found.trials.to_pylist() if r["chosen"])
    assert chosen["value"] == learner.fit(before, found.spec, **how).evaluate(later)["mae"]
    assert chosen["value"] == min(r["value"] for r in found.trials.to_pylist())
