"""``signalbox real``: both workflows over public data sets, through Dagster as on any other day, measured afterwards.

Belongs here: which days, and the figures of docs/real_data.md, taken from the tables that the pipeline wrote. Does not:
anything that the product does (``orchestration.runner`` and the rooms below). The data are never part of the project.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import shutil
import time
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table

from assets.resources import resources
from common import duckdb_session
from models.learners.duration import calibration_plot, figures
from models.learners.response import ResponseRule
from models.registry import CHAMPION, Registry
from orchestration import runner
from pipeline import point_in_time
from pipeline.decisions import scoring
from pipeline.lake import Lake
from pipeline.lifecycle import promotion
from pipeline.settings import home
from pipeline.workflow import FOLDER, Workflow, load

_OWN = (
    "LAKE", "LANDING", "MLFLOW_URI", "MLFLOW_ARTIFACTS", "LEDGER_URL", "REPORTS", "EVIDENTLY_WORKSPACE", "DAGSTER_CONFIG",
)  # fmt: skip
Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Plan:
    """A file of the data sets and the days to run: history from ``start``, decisions from ``decide_from`` to ``last``."""

    source: str
    file: str
    start: date
    decide_from: date
    last: date


PLANS = {
    # Tickets opened on 1 May before 03:00 are first described at the cut-off of 30 April, and a first event that came
    # in the small hours of 1 June at the cut-off of 31 May.
    "ticket_priority": Plan(
        "uci498", "uci498/incident_event_log.zip", date(2016, 2, 29), date(2016, 4, 30), date(2016, 5, 31)
    ),
    "ad_budget": Plan(
        "april_may", "online_advertising/april_may.csv.gz", date(2020, 4, 1), date(2020, 5, 1), date(2020, 5, 31)
    ),
}
TICKETS_OPENED = (date(2016, 5, 1), date(2016, 5, 31))
ADS_JUDGED = (date(2020, 5, 15), date(2020, 5, 31))


@dataclass(frozen=True)
class Figure:
    """A measured figure, with the bar that it has to reach where there is one."""

    value: float
    at_least: float | None = None
    at_most: float | None = None

    @property
    def met(self) -> bool:
        """Whether the bar is reached; true without one, false for NaN."""
        above = self.at_least is None or self.value >= self.at_least
        return above and (self.at_most is None or self.value <= self.at_most)


@dataclass(frozen=True)
class Measured:
    """What one workflow made of its file. ``batches``: by (step, status, what the guardrails object to)."""

    workflow: str
    in_file: int
    accepted: int
    quarantined: dict[str, int]
    figures: dict[str, Figure]
    batches: dict[tuple[str, str, str], int]
    versions: int
    champions: int
    held: int
    """Of the champions, those that their gate held for a person, and the person of ``_promote_held`` promoted."""
    seconds: dict[str, float]

    @property
    def lost(self) -> int:
        """Rows of the file that are neither events nor in quarantine."""
        return self.in_file - self.accepted - sum(self.quarantined.values())

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        batches = [
            {"step": step, "status": status, "objections": objections, "batches": n}
            for (step, status, objections), n in self.batches.items()
        ]
        return asdict(self) | {"batches": batches, "lost": self.lost}


def run(console: Console, data: Path, only: str | None = None) -> dict[str, Measured]:
    """Run and measure both workflows, or one, in ``<state>/real``, which is made anew.

    Raises SystemExit where a file is absent, a run fails, or a row of a file is neither accepted nor in quarantine.
    """
    chosen = {name: plan for name, plan in PLANS.items() if only in (None, name)}
    absent = [str(data / plan.file) for plan in chosen.values() if not (data / plan.file).is_file()]
    if absent or not chosen:
        raise SystemExit(
            f"absent: {', '.join(absent)}; docs/real_data.md says where the files come from"
            if absent
            else f"{only!r} has no real data; there are {', '.join(PLANS)}"
        )
    measured = {}
    with _state_of_its_own() as state:
        for name, plan in chosen.items():
            measured[name] = _through(console, name, plan, data / plan.file)
            _show(console, measured[name])
    console.print(
        f"Look at it with [bold]SIGNALBOX_HOME={state} SIGNALBOX_WORKFLOWS={state / 'workflows'} make serve[/bold]; "
        f"reports lie in {state / 'reports'}"
    )
    lost = {name: m.lost for name, m in measured.items() if m.lost}
    if lost:
        raise SystemExit(f"rows lost: {lost}")
    return measured


@contextmanager
def _state_of_its_own() -> Iterator[Path]:
    """An empty ``<state>/real`` as the state folder; no other setting leads out of it (a lake in production, say)."""
    state = home() / "real"
    shutil.rmtree(state, ignore_errors=True)
    before = dict(os.environ)
    for name in _OWN:
        os.environ.pop(f"SIGNALBOX_{name}", None)
    os.environ.update(SIGNALBOX_HOME=str(state), DAGSTER_HOME=str(state / "dagster"))
    # OpenMP's threads burn a busy machine's cores while they wait for one another: 38 s instead of 2 s for one training.
    try:
        yield runner.prepare_home()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _through(console: Console, name: str, plan: Plan, file: Path) -> Measured:
    """Land the file, prepare every day in one run, then retrain before each week and decide its days."""
    workflow = _dated(name, plan.start)
    given = resources()
    lake, registry = given["lake"].lake, given["registry"].registry
    place = home() / "landing" / name / Path(workflow.sources[plan.source].files).parent
    place.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, place / file.name)
    seconds: defaultdict[str, float] = defaultdict(float)
    held = 0

    def must(job: str, first: date, last: date) -> None:
        clock = time.monotonic()
        with console.status(f"{name}: {job} {first} – {last}"):
            result = runner.run(workflow, job, first, last, instance=instance, given=given)
        seconds[job] += time.monotonic() - clock
        if not result.success:
            failures = [f"{r['check']}: {r['says']}" for r in runner.check_rows(result) if r["result"] == "ERROR"]
            raise SystemExit(
                f"{name} {job} {first} – {last} failed: {'; '.join(failures or runner.failed_steps(result))}"
            )

    with dg.DagsterInstance.get() as instance:
        must("prepare", plan.start, plan.last)
        week = plan.decide_from
        while week <= plan.last:
            must("retrain", week - timedelta(days=1), week - timedelta(days=1))
            held += _promote_held(workflow, lake, registry, given, week - timedelta(days=1))
            must("decide", week, min(week + timedelta(days=6), plan.last))
            week += timedelta(days=7)
    clock = time.monotonic()
    measure = _tickets if name == "ticket_priority" else _ads
    quality = measure(workflow, lake, registry)
    seconds["measure"] = time.monotonic() - clock
    batches = lake.read(workflow.table("batches"), columns=["step", "status", "findings"]).to_pylist()
    versions = registry.versions(name)
    return Measured(
        workflow=name,
        in_file=_rows(file),
        accepted=lake.read(workflow.table("events"), columns=["source_row"]).num_rows,
        quarantined=dict(Counter(lake.read(workflow.table("quarantine"), columns=["rule"])["rule"].to_pylist())),
        figures=quality,
        batches=dict(Counter((b["step"], b["status"], _objections(b["findings"])) for b in batches)),
        versions=len(versions),
        champions=sum(v.passed for v in versions),
        held=held,
        seconds=dict(seconds),
    )


def _promote_held(workflow: Workflow, lake: Lake, registry: Registry, given: Mapping[str, Any], day: date) -> int:
    """Whether the version trained for ``day`` was held; it is then promoted, as a person would who trusts the newest labels.

    Nobody is there to ask in a measurement, and these labels are final: what moved a version is the world, not a fault.
    """
    with given["ledger"].open(given["clock"].now) as book:
        promotions = book.promotions(workflow.name)
        if not promotions or promotions[-1].action != "held":
            return 0
        registry.client.set_registered_model_alias(workflow.name, CHAMPION, str(promotions[-1].version))
        (answer,) = promotion.reconcile(
            workflow, registry, book, lake, workflow.cutoff_of(day), actor_of=lambda *_: "signalbox real"
        )
    if answer.answer != "recorded":
        raise SystemExit(
            f"{workflow.name}: version {answer.to} of {day} was held and could not be promoted: {answer.reason}"
        )
    return 1


def _dated(name: str, start: date, shadow: bool = False) -> Workflow:
    """The shipped workflow from a copy of its folder in the state folder, with the data's own first day.

    Weeks are decided after the fact here, so a version that passed its gate has no days to spend in shadow.
    """
    folder = home() / "workflows" / name
    shutil.copytree(FOLDER / name, folder)
    file = folder / "workflow.yaml"
    text = re.sub(r"(?m)^start: .*$", f"start: {start}", file.read_text(encoding="utf-8"))
    if not shadow:
        text = re.sub(r"(?m)^  shadow_days: .*$", "  shadow_days: 0", text)
    file.write_text(text, encoding="utf-8")
    return load(folder)


def _objections(findings: str) -> str:
    return ", ".join(sorted({f["name"] for f in json.loads(findings)}))


def _rows(file: Path) -> int:
    """Rows below the header of a packed CSV file, counted by Python's own reader rather than by the one under test."""
    if file.suffix == ".zip":
        with zipfile.ZipFile(file) as archive:
            text = archive.read(archive.namelist()[0]).decode()
    else:
        text = gzip.decompress(file.read_bytes()).decode()
    return sum(1 for _ in csv.reader(io.StringIO(text, newline=""))) - 1


def _tickets(workflow: Workflow, lake: Lake, registry: Registry) -> dict[str, Figure]:
    """How good P(missed) at the first event was, over tickets opened in May, judged by what came of them in the end."""
    del registry  # the scores stand in the lake
    con = duckdb_session.engine()
    con.register("events", lake.read(workflow.table("events"), columns=["ticket_id", "opened_at", "missed"]))
    con.register("scores", lake.read(workflow.table("scores"), where=pc.field("moment") == "intake"))
    con.register("scoring", lake.read(workflow.table("scoring"), columns=["day", "step"]))
    first, last = TICKETS_OPENED
    judged = con.sql(
        "SELECT bool_or(missed)::DOUBLE AS missed, any_value(p_miss) AS p_miss, any_value(step) AS step "
        "FROM events LEFT JOIN scores ON entity_id = ticket_id LEFT JOIN scoring USING (day) "
        "GROUP BY ticket_id HAVING min(opened_at)::DATE BETWEEN $first AND $last ORDER BY ticket_id",
        params={"first": first, "last": last},
    ).to_arrow_table()
    scored = judged.drop_null()
    missed, p_miss = scored["missed"].to_numpy(), scored["p_miss"].to_numpy()
    plot = calibration_plot(missed, p_miss, "UCI 498, tickets opened in May 2016")
    path = home() / "reports" / workflow.name / "calibration.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    plot.savefig(path, dpi=100)
    found = figures(missed, p_miss)
    bars = {"roc_auc": {"at_least": 0.82}, "brier": {"at_most": 0.140}}
    return {
        "tickets opened": Figure(judged.num_rows),
        "tickets judged": Figure(scored.num_rows),
        "by the champion": Figure(int(pc.sum(pc.equal(scored["step"], "champion")).as_py())),
        **{name: Figure(value, **bars.get(name, {})) for name, value in found.items() if name != "rows"},
    }


def _ads(workflow: Workflow, lake: Lake, registry: Registry) -> dict[str, Figure]:
    """Absolute error of a line's value, at what it cost in the end, by the model that scored each day and by the rule.

    A line without features (28 days of silence, or new) is foreseen as 0 by both; its rows count.
    """
    first, last = (day - timedelta(days=1) for day in ADS_JUDGED)
    span = (pc.field("day") >= pa.scalar(first)) & (pc.field("day") <= pa.scalar(last))
    rows = point_in_time.training_set(workflow, lake, ADS_JUDGED[1]).filter(span)
    answers = lake.read(workflow.table("outcomes"), columns=["for_day", "value"])
    answers = answers.filter((pc.field("for_day") >= pa.scalar(first)) & (pc.field("for_day") <= pa.scalar(last)))
    bar = ResponseRule.fit(rows, scoring.learner_spec(workflow), seed=0, device="cpu", threads=1).expect(rows)
    ours = np.full(rows.num_rows, np.nan)
    day = np.array(rows["day"].to_pylist())
    by_champion = 0
    for made in lake.read(workflow.table("scoring"), where=span).to_pylist():
        mine = day == made["day"]
        by_champion += int(mine.sum()) if made["step"] == "champion" else 0
        if made["step"] == "rule":
            ours[mine] = bar[mine]
            continue
        model = scoring.read_model(workflow, registry, registry.by_number(workflow.name, made["model_version"]))
        ours[mine] = model.expect(rows.filter(pa.array(mine)))
    value = rows["value"].to_numpy()
    by_rule, by_ours = np.abs(bar - value), np.abs(ours - value)
    unseen = pc.sum(answers["value"]).as_py() - value.sum()
    count = answers.num_rows
    of_rule, of_ours = (float((errors.sum() + unseen) / count) for errors in (by_rule, by_ours))
    low, high = _saved_interval(day, by_rule, by_ours)
    days = np.unique(day)
    return {
        "line-days": Figure(count),
        "foreseen": Figure(rows.num_rows),
        "by the champion": Figure(by_champion),
        "mean value": Figure(pc.mean(answers["value"]).as_py()),
        "mae of the rule": Figure(of_rule),
        "mae": Figure(of_ours, at_most=0.95 * of_rule),
        "saved": Figure(1 - of_ours / of_rule, at_least=0.05),
        "saved, low end of 95% by days": Figure(low),
        "saved, high end": Figure(high),
        "days better than the rule": Figure(sum(bool(by_ours[day == d].sum() < by_rule[day == d].sum()) for d in days)),
        "days": Figure(len(days)),
    }


def _saved_interval(day: Any, rule: Floats, ours: Floats, draws: int = 4000) -> tuple[float, float]:
    """95% interval of the share of the rule's error that is saved, whole days resampled: lines of a day share its luck."""
    _, at = np.unique(day, return_inverse=True)
    by_rule, by_ours = np.bincount(at, rule), np.bincount(at, ours)
    drawn = np.random.default_rng(0).integers(0, len(by_rule), (draws, len(by_rule)))
    share = 1 - by_ours[drawn].sum(1) / by_rule[drawn].sum(1)
    return float(np.quantile(share, 0.025)), float(np.quantile(share, 0.975))


def _show(console: Console, found: Measured) -> None:
    console.print(
        f"\n[bold]{found.workflow}[/bold]: {found.in_file:,} rows in the file = {found.accepted:,} accepted + "
        f"{sum(found.quarantined.values()):,} in quarantine ({found.lost:,} lost)"
    )
    for rule, rows in sorted(found.quarantined.items()):
        console.print(f"  {rule}: {rows:,}")
    table = Table()
    for column in ("figure", "measured", "bar", ""):
        table.add_column(column)
    for name, one in found.figures.items():
        bar = f"≥ {one.at_least:g}" if one.at_least is not None else f"≤ {one.at_most:.4g}" if one.at_most else ""
        table.add_row(name, f"{one.value:.5g}", bar, ("met" if one.met else "[red]missed[/red]") if bar else "")
    console.print(table)
    console.print(
        f"{found.versions} versions trained, {found.champions} passed their gate, {found.held} of them held for a person and "
        "promoted as one. Batches:"
    )
    for (step, status, objections), days in sorted(found.batches.items()):
        console.print(f"  {days} {step}, {status}" + (f": {objections}" if objections else ""))
    console.print("Seconds: " + ", ".join(f"{job} {took:.0f}" for job, took in found.seconds.items()))
