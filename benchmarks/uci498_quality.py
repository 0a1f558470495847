"""Quality of ``ticket_priority`` on real tickets: UCI 498, incidents opened in May 2016, scored at their first event.

    python benchmarks/uci498_quality.py ../shared/data/uci498/incident_event_log.zip --out .signalbox/uci498

Lands the file in a lake of its own, builds features and outcomes for every day, trains every seventh day on the labels
as known at that day's cut-off, and scores each day with the newest model trained before its cut-off. Judged on the
final labels. Prints a table, writes calibration.png, and checks on drawn tickets that nothing later than their first
event was used. Belongs here: this measurement. Does not: anything that the product needs.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from assets import landing, point_in_time
from assets.deciding import SEED, learner_spec
from assets.lake import Lake
from assets.workflow import FOLDER, Workflow, load
from models.learners.duration import DurationLearner, DurationRule, calibration_plot, figures

START, MAY, JUNE = date(2016, 2, 29), date(2016, 5, 1), date(2016, 6, 1)
# As measured by the maintainers of the copy of the data, on first-event features without the state of the queue.
REFERENCE = {
    "LightGBM, labels as known, trained once on 1 May (reference)": (0.782, None, 0.143),
    "LightGBM, labels as known, retrained weekly (reference)": (0.794, None, 0.142),
    "LightGBM, all labels whenever known (reference)": (0.811, 0.551, 0.142),
}


def prepare(workflow: Workflow, data: Path, home: Path) -> Lake:
    """A lake with events, features and outcomes of every day from the first to the last of May."""
    shutil.rmtree(home / "lake", ignore_errors=True)
    zone = home / "landing" / workflow.name
    (zone / "uci498").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(data, zone / "uci498" / data.name)
    lake = Lake(str(home / "lake"), None)
    done = landing.ingest(workflow, lake, home / "landing", now=datetime.now(UTC).replace(tzinfo=None))
    print(f"rows accepted {done.accepted}, quarantined {done.quarantined} {done.rules}, refused {done.refused}")
    days = [START + timedelta(days=i) for i in range((JUNE - START).days + 1)]
    for stage, build in (("features", point_in_time.features), ("outcomes", point_in_time.outcomes)):
        begun = time.perf_counter()
        tables = [table for _, table in build(workflow, lake, days)]
        lake.replace_days(workflow.table(stage), pa.concat_tables(tables, promote_options="default"), days)
        print(f"{stage}: {len(days)} days in {time.perf_counter() - begun:.0f} s")
    return lake


def final_labels(workflow: Workflow, lake: Lake) -> pa.Table:
    """entity_id, opened_at and whether the service level was missed in the end, of tickets opened in May."""
    con = point_in_time.connect()
    con.register("events", lake.read(workflow.table("events")))
    return con.sql(
        "SELECT ticket_id AS entity_id, bool_or(missed) AS final FROM events GROUP BY ticket_id "
        f"HAVING min(opened_at) >= '{MAY}' AND min(opened_at) < '{JUNE}'"
    ).to_arrow_table()


def backtest(workflow: Workflow, lake: Lake, rows: pa.Table, every: int) -> dict[str, np.ndarray]:
    """p_miss of each row by the model and the rule, from the newest training before the cut-off of the row's day."""
    day = np.array(rows["day"].to_pylist())
    found = {"DurationLearner": np.full(rows.num_rows, np.nan), "DurationRule": np.full(rows.num_rows, np.nan)}
    # tickets opened on 1 May before 03:00 are known at the cut-off of 30 April
    trained = [MAY - timedelta(days=2) + timedelta(days=i) for i in range(0, 34, every)]
    for when, following in zip(trained, [*trained[1:], date.max], strict=True):
        mine = (day > when) & (day <= following)
        if not mine.any():
            continue
        known = point_in_time.training_set(workflow, lake, when)
        known = point_in_time.rows_where(known, workflow.training.train_on)
        for learner in (DurationLearner, DurationRule):
            model = learner.fit(known, learner_spec(workflow), seed=SEED, device="cpu", threads=1)
            found[learner.__name__][mine] = model.score(rows.filter(pa.array(mine)))["p_miss"].to_numpy()
    return found


def check_no_look_ahead(workflow: Workflow, lake: Lake, rows: pa.Table, tickets: int) -> None:
    """Recomputes drawn rows from the events known by each ticket's first event alone; they must be equal to the bit."""
    events = lake.read(workflow.table("events"))
    first = events.group_by("ticket_id").aggregate([("known_at", "min")])
    known = dict(zip(first["ticket_id"].to_pylist(), first["known_at_min"].to_pylist(), strict=True))
    text = workflow.sql(workflow.features.sql)
    for i in np.random.default_rng(0).choice(rows.num_rows, tickets, replace=False).tolist():
        row = rows.slice(i, 1).to_pylist()[0]
        at, earliest = known[row["entity_id"]], row["day"] - timedelta(days=workflow.features.lookback_days)
        cut = (pc.field("known_at") <= pc.scalar(at)) & (pc.field("day") >= pc.scalar(earliest))
        con = point_in_time.connect()
        order = [(name, "ascending") for name in point_in_time.SYSTEM_ORDER.split(", ")]
        con.register("events", events.filter(cut).sort_by(order))
        given = {"cutoff": at, "day": row["day"], "previous_cutoff": at - timedelta(days=1)}
        again = con.sql(text, params={k: v for k, v in given.items() if f"${k}" in text}).to_arrow_table()
        same = (pc.field("entity_id") == row["entity_id"]) & (pc.field("moment") == "intake")
        mine = again.filter(same).to_pylist()[0]
        differs = [name for name, value in mine.items() if row[name] != value]
        assert not differs, f"ticket {row['entity_id']}: {differs} change with what comes after {at}"
    print(f"no look-ahead: {tickets} drawn tickets recomputed from the events known by their first one, all equal")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="incident_event_log.zip")
    parser.add_argument("--out", type=Path, default=Path(".signalbox/uci498"), help="folder for the lake and the plot")
    parser.add_argument("--every", type=int, default=7, help="days between trainings")
    parser.add_argument("--check", type=int, default=20, help="tickets recomputed to find look-ahead")
    parser.add_argument("--reuse", action="store_true", help="take the lake of an earlier run")
    given = parser.parse_args(arguments)
    workflow = load(FOLDER / "ticket_priority")
    lake = Lake(str(given.out / "lake"), None) if given.reuse else prepare(workflow, given.data, given.out)
    con = point_in_time.connect()
    con.register("features", lake.read(workflow.table("features"), where=pc.field("moment") == "intake"))
    con.register("final", final_labels(workflow, lake))
    rows = con.sql("SELECT * FROM features JOIN final USING (entity_id) ORDER BY day, entity_id").to_arrow_table()
    missed = rows["final"].cast(pa.int8()).to_numpy().astype(float)
    print(f"{rows.num_rows} tickets opened in May 2016, {missed.mean():.1%} missed their service level\n")
    scores = backtest(workflow, lake, rows, given.every)
    print("| | ROC AUC | average precision | Brier | log loss | calibration error |\n|---|---|---|---|---|---|")
    for name, p_miss in scores.items():
        f = figures(missed, p_miss)
        print(
            f"| {name}, labels as known, every {given.every} days | {f['roc_auc']:.4f} | {f['average_precision']:.4f} "
            f"| {f['brier']:.4f} | {f['log_loss']:.4f} | {f['calibration_error']:.4f} |"
        )
    for name, (auc, precision, brier) in REFERENCE.items():
        print(f"| {name} | {auc} | {precision or ''} | {brier} | | |")
    title = f"UCI 498, opened in May 2016, trained every {given.every} days"
    plot = given.out / "calibration.png"
    calibration_plot(missed, scores["DurationLearner"], title).savefig(plot, dpi=120)
    print(f"\n{plot} written")
    check_no_look_ahead(workflow, lake, rows, given.check)


if __name__ == "__main__":
    main()
