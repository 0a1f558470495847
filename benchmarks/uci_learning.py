"""The loop on UCI 498, day by day from March to May 2016: retrained by triggers, beside trained once and trained every day.

Belongs here: living the days through the product's own assets, and the table and the plot of docs/real_data.md. Does not: the
triggers (``pipeline.lifecycle.retraining``), drift, figures or gates (``data_checks``, ``models``), or the data (``../shared/data``).

Run: ``python -m benchmarks.uci_learning [--data ../shared/data] [--state FOLDER] [--plot FILE]``; about half an hour on two
cores. A state folder that stands is gone on with: what was prepared and trained for ``every day`` is kept there by day.

Every day D from 1 April on is scored, its drift and performance are judged, and a retraining runs where one is asked for, with
what was known at D's cut-off; a version passes its gate and its days in shadow as in production. Judged are the tickets opened
from 1 April to 31 May, at their first event, by what became of them in the end. ``once`` is the model trained for 31 March, with
which the others begin; ``triggers and Mondays`` is with the weekly schedule, too; ``every day`` is trained for every day's cut-off
and scores the next day, with no gate.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

FIRST_TRAINING, LAST = date(2016, 3, 31), date(2016, 5, 31)
JUDGED_FROM = date(2016, 4, 1)


def _prepare(data: Path) -> Any:
    """The workflow with events, features and outcomes of every day, made once."""
    from orchestration import runner
    from orchestration.demo import real_data
    from pipeline.settings import home
    from pipeline.workflow import load

    plan = real_data.PLANS["ticket_priority"]
    folder = home() / "workflows" / "ticket_priority"
    if (home() / "prepared").exists():
        return load(folder)
    shutil.rmtree(home(), ignore_errors=True)
    runner.prepare_home()
    workflow = real_data._dated("ticket_priority", plan.start, shadow=True)
    place = home() / "landing" / "ticket_priority" / "uci498"
    place.mkdir(parents=True)
    shutil.copyfile(data / plan.file, place / Path(plan.file).name)
    done = runner.run(workflow, "prepare", plan.start, plan.last)
    if not done.success:
        raise SystemExit(f"preparing failed: {'; '.join(runner.failed_steps(done))}")
    (home() / "prepared").touch()
    return workflow


def _materialise(assets: list[Any], day: date, now: str, instance: Any) -> None:
    import dagster as dg

    from assets.resources import resources

    done = dg.materialize(
        assets, partition_key=day.isoformat(), resources=resources(now), instance=instance, raise_on_error=True,
        run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
    )  # fmt: skip
    assert done.success, f"{day} failed"


_LIVED = (
    "scores", "scoring", "drift", "performance", "training_set", "shadow", "shadow_scores", "decisions", "batches", "arms",
)  # fmt: skip


def live(workflow: Any, *, calendar: bool) -> tuple[list[dict[str, Any]], pa.Table]:
    """Every day under the triggers, from nothing but the prepared tables; ``calendar``: with the Mondays, too.

    Returns the triggers of the ledger, and P(missed) of every ticket at its first event.
    """
    import dagster as dg

    from assets import decisions, drift, performance, scoring, training
    from assets.resources import resources
    from orchestration.automation import retrain_request
    from pipeline.lifecycle import retraining
    from pipeline.settings import home

    # a state of its own for each way: MLflow keeps its database open for as long as the process lives
    own = Path(tempfile.mkdtemp(prefix="lived-", dir=home()))
    os.environ["SIGNALBOX_MLFLOW_URI"] = f"sqlite:///{own / 'mlflow.db'}"
    os.environ["SIGNALBOX_MLFLOW_ARTIFACTS"] = (own / "artifacts").as_uri()
    os.environ["SIGNALBOX_LEDGER_URL"] = f"sqlite:///{own / 'ledger.db'}"
    for name in _LIVED:
        shutil.rmtree(home() / "lake" / workflow.name / name, ignore_errors=True)
    lake = resources()["lake"].lake
    train = [training.build_training_set(workflow), training.build_model(workflow)]
    daily = [stage.build(workflow) for stage in (scoring, decisions, drift, performance)]
    with dg.DagsterInstance.ephemeral() as instance:
        _materialise(train, FIRST_TRAINING, f"{FIRST_TRAINING + timedelta(days=1)}T05:00:00", instance)
        day = FIRST_TRAINING + timedelta(days=1)
        while day <= LAST:
            began = time.monotonic()
            now = f"{day + timedelta(days=1)}T04:00:00"
            _materialise(daily, day, now, instance)
            later = resources(now)
            clock = later["clock"].now
            monday = {day: retraining.calendar(day)} if calendar and day.weekday() == 6 else None
            with later["ledger"].open(clock) as book:
                request = retrain_request(workflow, lake, book, clock(), retraining.Runs(), monday)
            said = ""
            if isinstance(request, dg.RunRequest):
                at = date.fromisoformat(str(request.partition_key))
                _materialise(train, at, f"{day + timedelta(days=1)}T05:00:00", instance)
                said = request.tags["signalbox/cause"]
            print(f"{day} {time.monotonic() - began:5.1f} s {said}", flush=True)
            day += timedelta(days=1)
    with resources()["ledger"].open(clock) as book:
        triggers = [dict(e.body) for e in book.events("trigger", workflow.name)]
        for p in book.promotions(workflow.name):
            print(f"version {p.version} {p.action} {p.at}")
    scores = lake.read(workflow.table("scores"), columns=["day", "entity_id", "moment", "p_miss"])
    return triggers, scores.filter(pc.field("moment") == "intake")


def every_day(workflow: Any, kept: Path) -> dict[date, Any]:
    """A model for the cut-off of every day; files that stand are read back."""
    from assets.resources import resources
    from models import catalog
    from pipeline import point_in_time
    from pipeline.decisions import scoring

    lake = resources()["lake"].lake
    learner = catalog.learner(workflow.model.kind)
    found, day = {}, FIRST_TRAINING
    while day < LAST:
        folder = kept / day.isoformat()
        if not (folder / "done").exists():
            rows = point_in_time.training_set(workflow, lake, day)
            chosen = point_in_time.rows_where(rows, workflow.training.train_on)
            model = learner.fit(chosen, scoring.learner_spec(workflow), seed=scoring.SEED, device="cpu", threads=2)
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in model.files().items():
                (folder / name).write_bytes(content)
            (folder / "done").touch()
        found[day] = learner.from_files({p.name: p.read_bytes() for p in folder.iterdir() if p.name != "done"})
        day += timedelta(days=1)
    return found


def foreseen(workflow: Any, models: dict[date, Any], lived: dict[str, pa.Table]) -> pa.Table:
    """P(missed) of every ticket at its first event by each way of training, with what became of it; one row a ticket."""
    from assets.resources import resources
    from common import duckdb_session

    lake = resources()["lake"].lake
    parts = []
    day = JUDGED_FROM
    while day <= LAST:
        rows = lake.read(workflow.table("features"), days=[day]).filter(pc.field("moment") == "intake")
        by_way = {}
        for way, scores in lived.items():
            mine = scores.filter(pc.field("day") == pc.scalar(day))
            place = pc.index_in(rows["entity_id"], value_set=mine["entity_id"].combine_chunks())
            by_way[way] = mine["p_miss"].take(place).combine_chunks()
        parts.append(
            pa.table({
                "day": pa.array([day] * rows.num_rows, pa.date32()),
                "entity_id": rows["entity_id"],
                "once": models[FIRST_TRAINING].p_miss(rows),
                **by_way,
                "every day": models[day - timedelta(days=1)].p_miss(rows),
            })
        )  # fmt: skip
        day += timedelta(days=1)
    con = duckdb_session.engine()
    con.register("scored", pa.concat_tables(parts))
    con.register("events", lake.read(workflow.table("events"), columns=["ticket_id", "opened_at", "missed"]))
    return con.sql(
        "WITH ended AS (SELECT ticket_id, min(opened_at) AS opened_at, bool_or(missed)::DOUBLE AS missed FROM events GROUP BY ticket_id) "
        "SELECT s.*, missed FROM scored s JOIN ended ON entity_id = ticket_id WHERE missed IS NOT NULL "
        "AND opened_at >= $first ORDER BY day, entity_id",
        params={"first": JUDGED_FROM},
    ).to_arrow_table()


WAYS = ("once", "triggers", "triggers and Mondays", "every day")


def measured(rows: pa.Table) -> dict[str, dict[str, float]]:
    """Figures of each way over all days and as means over the days, with the paired by-day interval against ``once``."""
    from models.learners.duration import figures

    missed = rows["missed"].to_numpy()
    day = rows["day"].to_numpy().astype("datetime64[D]")
    days = np.unique(day)
    told, by_day = {}, {}
    for way in WAYS:
        p = rows[way].to_numpy()
        whole = figures(missed, p)
        each = [figures(missed[day == d], p[day == d]) for d in days]
        by_day[way] = np.array([[one["roc_auc"], one["brier"], one["calibration_error"]] for one in each])
        told[way] = {k: whole[k] for k in ("roc_auc", "brier", "log_loss", "calibration_error")}
        for k, name in enumerate(("roc_auc", "brier", "calibration_error")):
            told[way][f"mean of days: {name}"] = float(np.nanmean(by_day[way][:, k]))
    drawn = np.random.default_rng(0).integers(0, len(days), (4000, len(days)))
    for way in WAYS[1:]:
        for k, name in enumerate(("roc_auc", "brier")):
            gain = by_day[way][:, k] - by_day["once"][:, k]
            means = np.nanmean(gain[drawn], axis=1)
            told[way][f"{name} beside once, low"], told[way][f"{name} beside once, high"] = (
                float(q) for q in np.quantile(means, [0.025, 0.975])
            )
    return told


def plot(rows: pa.Table, asked: list[dict[str, Any]], file: Path) -> None:
    """ROC AUC and Brier score by the week in which tickets were opened, with the days of retraining."""
    from matplotlib.figure import Figure

    from models.learners.duration import figures

    missed = rows["missed"].to_numpy()
    week = ((rows["day"].to_numpy().astype("datetime64[D]") - np.datetime64(JUDGED_FROM)).astype(int)) // 7
    weeks = np.unique(week)
    at = np.datetime64(JUDGED_FROM) + weeks * 7 + 3
    figure = Figure(figsize=(9, 6), layout="constrained")
    for axis, name in zip(figure.subplots(2, 1, sharex=True), ("roc_auc", "brier"), strict=True):
        for way, colour in zip(WAYS, ("#999999", "#c0392b", "#e0a030", "#2c3e50"), strict=True):
            values = [figures(missed[week == w], rows[way].to_numpy()[week == w])[name] for w in weeks]
            axis.plot(at, values, marker="o", label=way, color=colour, linewidth=2 if way == "triggers" else 1)
        for one in asked:
            axis.axvline(np.datetime64(one["day"]), color="#c0392b", linewidth=0.8, linestyle=":")
        axis.set_ylabel("ROC AUC" if name == "roc_auc" else "Brier score")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.suptitle("UCI 498, tickets by the week they were opened; dotted: retrainings that triggers asked for")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100, metadata={"Software": None})


def main() -> int:
    """Prints the table; 1 where triggers do not beat training once, or need as many trainings as every day."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--state", type=Path, default=None)
    parser.add_argument("--plot", type=Path, default=None)
    said = parser.parse_args()
    data = said.data.resolve()
    if not (data / "uci498").is_dir():
        print(f"{data / 'uci498'} is absent; docs/real_data.md says where the file comes from")
        return 2
    state = (said.state or Path(tempfile.mkdtemp())).resolve()
    os.environ["SIGNALBOX_HOME"] = str(state / "home")
    os.environ["DAGSTER_HOME"] = str(state / "home" / "dagster")
    workflow = _prepare(data)
    models = every_day(workflow, state / "every_day")
    lived, asked, triggers = {}, {}, {}
    for way, calendar in (("triggers", False), ("triggers and Mondays", True)):
        triggers[way], lived[way] = live(workflow, calendar=calendar)
        asked[way] = [t for t in triggers[way] if t["action"] == "asked"]
    rows = foreseen(workflow, models, lived)
    told = measured(rows)
    days = {way: len({t["day"] for t in found} | {str(FIRST_TRAINING)}) for way, found in asked.items()}
    trainings = {"once": 1, **days, "every day": len(models)}
    print(f"\n{rows.num_rows} tickets opened {JUDGED_FROM} to {LAST}")
    names = list(told["once"])
    print("| trained | trainings | " + " | ".join(names) + " |")
    print("|---|---:|" + "---:|" * len(names))
    for way in WAYS:
        print(f"| {way} | {trainings[way]} | " + " | ".join(f"{told[way][n]:.4f}" for n in names) + " |")
    for way in WAYS[1:]:
        ends = [[told[way][f"{n} beside once, {e}"] for e in ("low", "high")] for n in ("roc_auc", "brier")]
        print(
            f"{way} beside once, by day: ROC AUC {ends[0][0]:+.4f} to {ends[0][1]:+.4f}, Brier {ends[1][0]:+.4f} to {ends[1][1]:+.4f}"
        )
    for way, found in triggers.items():
        print(f"\n{way}")
        for t in found:
            text = next((e["text"] for c, e in t["evidence"].items() if c == t["cause"]), "")
            print(f"{t['day']} {t['cause']}: {t['action']} ({t['reason']}); {text[:160]}")
    if said.plot:
        plot(rows, asked["triggers"], said.plot)
    better = told["triggers"]["roc_auc"] > told["once"]["roc_auc"] and told["triggers"]["brier"] < told["once"]["brier"]
    return int(not better or trainings["triggers"] >= trainings["every day"] / 3)


if __name__ == "__main__":
    sys.exit(main())
