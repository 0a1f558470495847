"""One day of one workflow: through Dagster in one process, and by a plain script that calls the same functions.

Each is timed as a whole process, imports included, on a state folder of its own with four weeks of history and a champion.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

WORKFLOW = "ad_budget"
HISTORY, LINES = 28, 120
RUNS = 5


def prepare() -> None:
    """Four weeks of history, a first model, and the file of one more day in the landing zone."""
    import dagster as dg

    from delivery.sandbox.worlds import advertising
    from orchestration import runner
    from orchestration.demo import story
    from pipeline.settings import home
    from pipeline.workflow import FOLDER, load

    runner.prepare_home()
    workflow = load(FOLDER / WORKFLOW)
    last = workflow.start + timedelta(days=HISTORY - 1)
    world = advertising.World(story.SEED, "easy", LINES, origin=workflow.start)
    rows = advertising.history(world, workflow.start, HISTORY + 1)
    for n in range(HISTORY + 1):
        day = workflow.start + timedelta(days=n)
        story.stamp(advertising.export_day(rows, home() / "landing" / WORKFLOW / "export", day), day)
    with dg.DagsterInstance.get() as instance:
        for job, first in (("prepare", workflow.start), ("retrain", last)):
            result = runner.run(workflow, job, first, last, now=story.at(last, "04:00"), instance=instance)
            assert result.success, runner.failed_steps(result)


def with_dagster() -> None:
    """The day through the job, as ``signalbox run`` does it."""
    from orchestration import runner
    from pipeline.workflow import FOLDER, load

    workflow = load(FOLDER / WORKFLOW)
    day = workflow.start + timedelta(days=HISTORY)
    assert runner.run(workflow, "daily", day, day, now=f"{day + timedelta(days=1)}T04:00:00").success


def plain() -> None:
    """The same functions in the same order, without Dagster's run, events and checks."""
    import gc
    import json
    from datetime import datetime

    import pyarrow as pa
    import pyarrow.compute as pc

    from assets import drift as stage
    from assets.resources import resources
    from data_checks import contract, drift, performance
    from pipeline import dispatch, ingest, point_in_time
    from pipeline.decisions import decide, scoring
    from pipeline.monitoring import labels, loop_health, verdicts
    from pipeline.workflow import FOLDER, load

    gc.set_threshold(200_000, 50, 50)  # as the runner does
    workflow = load(FOLDER / WORKFLOW)
    day = workflow.start + timedelta(days=HISTORY)
    now = datetime.combine(day + timedelta(days=1), datetime.min.time()).replace(hour=4)
    given = resources(now.isoformat())
    lake, registry, reports = given["lake"].lake, given["registry"].registry, given["reports"]
    ingest.ingest(workflow, lake, given["landing"].root, now=now, days=[day])
    landed = lake.read(workflow.table("events"), days=[day])
    landed = landed.filter(pc.is_null(landed["superseded_at"]))
    promised = workflow.contract
    page = contract.validate(
        landed, contract.implied(promised.events) + list(promised.events.expectations), name="events"
    )
    reports.write(WORKFLOW, day, "events-contract.html", page.html)
    for table in ("features", "outcomes"):
        rows = pa.concat_tables(t for _, t in getattr(point_in_time, table)(workflow, lake, [day]))
        if table == "features":
            page = contract.validate(rows, list(promised.features.expectations), name="features")
            reports.write(WORKFLOW, day, "features-contract.html", page.html)
        lake.replace_days(workflow.table(table), rows, [day])
    with given["ledger"].open(given["clock"].now) as book:
        scored = scoring.score_day(workflow, lake, registry, day, now=now, ledger=book)
        assert scored.step == "champion", scored.reasons
        scoring.write_scores(workflow, lake, day, scored)
        batch = decide.decide_day(workflow, lake, day)
        decide.write_batch(workflow, lake, day, batch, decided_at=now, run_id="plain")
        dispatch.record(workflow, book, day, batch, decided_at=now, run_id="plain")

        spec, table = workflow.drift, workflow.table("features")
        numeric, categorical = workflow.drift_columns
        columns = ["day", *numeric, *categorical]
        champion, gains, _ = stage.importances(workflow, registry, book, day)
        beside = stage.reference(workflow, lake, champion, day, lake.version(table))
        current = lake.read(table, days=stage.windows(workflow, day)[0], columns=columns)
        baseline = drift.Baseline(
            lake.read(table, days=beside.days, columns=columns), numeric=numeric, categorical=categorical,
            block=spec.window_days, said=beside.said,
        )  # fmt: skip
        report = drift.drift(current, baseline, numeric=numeric, categorical=categorical, spec=spec, importances=gains)
        reports.write(WORKFLOW, day, "drift.html", report.html)
        reports.write(WORKFLOW, day, "drift.json", json.dumps(report.json, sort_keys=True, indent=1))
        drift.save(reports.evidently_workspace, WORKFLOW, report, timestamp=datetime.combine(day, datetime.min.time()))

        judged = labels.judge(workflow, lake, registry, day)
        lake.replace_days(workflow.table("performance"), judged, [day])
        if judged.num_rows:
            text = performance.report(WORKFLOW, judged, judged, labels.kind_of(workflow))
            reports.write(WORKFLOW, day, "performance.html", text)
        dispatch.outcomes_of_decisions(workflow, lake, book, day)
        verdicts.judge_day(workflow, lake, book, day)
        loop_health.plot(loop_health.examine(book, workflow, until=now))


def _timed(what: str, template: Path, folder: Path) -> float:
    at = folder / f"{what}-{time.monotonic_ns()}"
    shutil.copytree(template, at)
    environment = {**os.environ, "SIGNALBOX_HOME": str(at), "DAGSTER_HOME": str(at / "dagster")}
    # artifacts were registered under the template's path
    began = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "benchmarks.daily_run", what],
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    took = time.monotonic() - began
    shutil.rmtree(at)
    return took


def main() -> int:
    """Print both medians and their ratio; fails above 15 s or 1.3×."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        template = folder / "template"
        environment = {**os.environ, "SIGNALBOX_HOME": str(template), "DAGSTER_HOME": str(template / "dagster")}
        subprocess.run(
            [sys.executable, "-m", "benchmarks.daily_run", "prepare"],
            env=environment,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        pairs = [(_timed("with_dagster", template, folder), _timed("plain", template, folder)) for _ in range(RUNS)]
    dagster, script = (statistics.median(p[i] for p in pairs) for i in (0, 1))
    ratio = statistics.median(a / b for a, b in pairs)
    print(
        f"one day of {WORKFLOW}, whole process, median of {RUNS}: Dagster {dagster:.1f} s, plain script {script:.1f} s, ratio {ratio:.2f}"
    )
    print(
        f"range: Dagster {min(p[0] for p in pairs):.1f}–{max(p[0] for p in pairs):.1f} s, plain {min(p[1] for p in pairs):.1f}–{max(p[1] for p in pairs):.1f} s"
    )
    return int(dagster >= 15 or ratio > 1.3)


if __name__ == "__main__":
    steps = {"prepare": prepare, "with_dagster": with_dagster, "plain": plain}
    if len(sys.argv) > 1:
        steps[sys.argv[1]]()
    else:
        raise SystemExit(main())
