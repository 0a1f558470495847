"""Measures what calibrated sets and intervals hold on days that nobody had seen, how many tickets they leave to people,
how many lines they hold, and what they add to a fit.

Belongs here: both generated worlds through the workflows' own SQL. Does not: the proof that the quantile covers
(tests/models/evaluation/test_conformal.py), the method (``models/evaluation/conformal.py``).

Run: ``python -m benchmarks.conformal [--days 56] [--teams 8] [--lines 120]`` (about six minutes on two idle cores).

Each workflow is landed and built for so many days. Models are fitted on what was known at the cut-off of a day, as in
training; the ten days after it are judged by what is known at the end. Tickets: only those that the policy decides on.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from datetime import date, datetime, timedelta
from datetime import time as clock
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from delivery.sandbox.worlds import advertising, tickets
from models.learners import duration, response
from pipeline import ingest, point_in_time
from pipeline.decisions import scoring
from pipeline.lake import Lake
from pipeline.workflow import FOLDER, Workflow, load

JUDGED = 10
LEVELS = (0.9, 0.85, 0.8)
DOUBTS = (1.0, 2.0, 4.0)


def built(name: str, root: Path, days: int, write: Callable[[date, Path], Path]) -> tuple[Workflow, Lake, list[date]]:
    """A workflow's events, features and outcomes of so many days."""
    workflow, lake = load(FOLDER / name), Lake(str(root / "lake"))
    span = [workflow.start + timedelta(days=n) for n in range(days)]
    folder = (root / "landing" / name / workflow.sources["export"].files).parent
    for day in span:
        write(day, folder)
    ingest.ingest(workflow, lake, root / "landing", now=datetime.combine(span[-1] + timedelta(days=1), clock(4)))
    for stage, made in (("features", point_in_time.features), ("outcomes", point_in_time.outcomes)):
        tables = [table for _, table in made(workflow, lake, span)]
        lake.replace_days(workflow.table(stage), pa.concat_tables(tables, promote_options="default"), span)
    return workflow, lake, span


def judged_days(workflow: Workflow, lake: Lake, span: list[date], day: date) -> tuple[pa.Table, pa.Table]:
    """(the training rows of ``day``, the rows of the days after it as known at the end)."""
    learn = point_in_time.rows_where(point_in_time.training_set(workflow, lake, day), workflow.training.train_on)
    later = (pc.field("day") > pc.scalar(day)) & (pc.field("day") <= pc.scalar(day + timedelta(days=JUDGED)))
    return learn, point_in_time.training_set(workflow, lake, span[-1]).filter(later)


def fitted(learner: Any, rows: pa.Table, spec: dict[str, Any]) -> Any:
    """As training does it, in one thread so that processor time is comparable."""
    return learner.fit(rows, spec, seed=scoring.SEED, device="cpu", threads=1)


def added(learner: Any, module: Any, rows: pa.Table, spec: dict[str, Any], repeats: int = 3) -> str:
    """Processor time of a fit with and without the twins."""
    halves, spent = module.halves, {True: [0.0] * 0, False: [0.0] * 0}
    try:
        for _ in range(repeats):
            for calibrated in (True, False):
                module.halves = halves if calibrated else (lambda *_: iter(()))
                began = time.process_time()
                fitted(learner, rows, spec)
                spent[calibrated].append(time.process_time() - began)
    finally:
        module.halves = halves
    with_, without = min(spent[True]), min(spent[False])
    return f"fit {without:.2f} s of processor time, {with_ / without - 1:+.0%} with sets and intervals"


def measure_tickets(root: Path, days: int, teams: int) -> None:
    """Prints coverage, width and the share for people at several levels."""
    start = load(FOLDER / "ticket_priority").start
    world = tickets.World(7, load=0.9, teams=teams)
    events = {start + timedelta(days=n): world.step(start + timedelta(days=n)) for n in range(days)}
    workflow, lake, span = built(
        "ticket_priority", root, days, lambda day, folder: tickets.export_day(events[day], folder, day)
    )
    spec = scoring.learner_spec(workflow)
    for day in (span[-2 * JUDGED - 1], span[-JUDGED - 1]):
        learn, later = judged_days(workflow, lake, span, day)
        later = point_in_time.rows_where(later, workflow.policy.decide_on)
        print(
            f"tickets, fitted on {day}: {learn.num_rows} rows; {later.num_rows} decided on in the {JUDGED} days after"
        )
        print("  " + added(duration.DurationLearner, duration, learn, spec, 1))
        for level in LEVELS:
            model = fitted(duration.DurationLearner, learn, {**spec, "confidence": level})
            found, uncertain = model.evaluate(later), model.score(later)["uncertainty"].to_numpy()
            told = ", ".join(f"{k} {found[k]:.3f}" for k in ("coverage", "width", "unsure", "hours_coverage"))
            print(f"  {level:.0%}: {told}; more uncertain than 0.8: {np.mean(uncertain > 0.8):.3f}")


def measure_lines(root: Path, days: int, lines: int) -> None:
    """Prints coverage, width and the share of lines that ``largest_doubt`` would hold."""
    start = load(FOLDER / "ad_budget").start
    rows = advertising.history(advertising.World(7, "easy", lines, origin=start), start, days)
    workflow, lake, span = built("ad_budget", root, days, lambda day, folder: advertising.export_day(rows, folder, day))
    spec = scoring.learner_spec(workflow)
    for day in (span[-2 * JUDGED - 1], span[-JUDGED - 1]):
        learn, later = judged_days(workflow, lake, span, day)
        print(f"lines, fitted on {day}: {learn.num_rows} rows; {later.num_rows} in the {JUDGED} days after")
        print("  " + added(response.ResponseLearner, response, learn, spec))
        for level in LEVELS:
            model = fitted(response.ResponseLearner, learn, {**spec, "confidence": level})
            found, scores = model.evaluate(later), model.score(later)
            low, at, high = (scores[c].to_numpy() for c in ("value_low", "level", "value_high"))
            held = ", ".join(f"{d:g}: {np.mean(high - low > d * at):.2f}" for d in DOUBTS)
            print(
                f"  {level:.0%}: coverage {found['coverage']:.3f}, width {found['width']:.2f}; held by a largest_doubt of {held}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--days", type=int, default=56, help="days of each world, at least 45 (default 56)")
    parser.add_argument("--teams", type=int, default=8)
    parser.add_argument("--lines", type=int, default=120)
    said = parser.parse_args()
    if said.days < 45:
        parser.error("--days must be at least 45: the calibration needs 19 days, and two times ten are judged")
    with tempfile.TemporaryDirectory() as folder:
        measure_lines(Path(folder) / "lines", said.days, said.lines)
        measure_tickets(Path(folder) / "tickets", said.days, said.teams)


if __name__ == "__main__":
    main()
