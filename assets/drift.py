"""The stage ``drift``: how far a day's features and scores lie from a named reference, as a report for people and figures for a sensor.

Belongs here: choosing the windows, what is recorded of them, and the asset. Does not: the distances (``data_checks.drift``) or
the decision to retrain (``pipeline.lifecycle.retraining``, which reads what is stored here).
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Any

import dagster as dg
import pyarrow as pa
import pyarrow.compute as pc

from assets.common import days, folded, stage, unjudged
from assets.resources import ClockResource, LakeResource, LedgerResource, RegistryResource, ReportsResource
from common.errors import SignalboxError
from common.progress import each
from delivery.ledger import Ledger
from models.booster import is_number
from models.registry import ModelMissing, ModelUnreadable, Registry, Version
from pipeline.decisions import in_effect, scoring, tables
from pipeline.lake import Lake
from pipeline.lifecycle import state
from pipeline.workflow import Workflow

LEAST_SCORED_DAYS = 8
"""Days scored by one version before its scores are judged: a window of two beside six."""
SCHEMA = pa.schema(
    {
        "day": pa.date32(),
        "judged": pa.bool_(),
        "drifted": pa.bool_(),
        "spoke": pa.bool_(),
        "scores_drifted": pa.bool_(),
        "scores_spoke": pa.bool_(),
        "share": pa.float64(),
        "importance_share": pa.float64(),
        "volume": pa.float64(),
        "volume_spoke": pa.bool_(),
        "volume_drifted": pa.bool_(),
        "columns": pa.string(),
        "scores": pa.string(),
        "reference": pa.string(),
        "page": pa.string(),
        "text": pa.string(),
    }
)


class ReferenceMissing(SignalboxError, LookupError):
    """The reference that a workflow asks for is not there yet; the message says what it waits for."""


@dataclass(frozen=True)
class Reference:
    """The days that a window is compared with, and everything that names them for the record (JSON-ready)."""

    days: tuple[date, ...]
    said: dict[str, Any]


def windows(workflow: Workflow, day: date) -> tuple[list[date], list[date]]:
    """The days judged together at ``day``, and the days before them that `trailing` compares with."""
    spec = workflow.drift
    window = [day - timedelta(days=n) for n in range(spec.window_days)]
    return window, [window[-1] - timedelta(days=n) for n in range(1, spec.reference_days + 1)]


def reference(workflow: Workflow, lake: Lake, champion: Version | None, day: date, version: int | None) -> Reference:
    """The reference that ``drift.reference`` names for ``day``, without the days of its window.

    ``version``: the features' Delta version that both windows are read at. Raises ReferenceMissing for `training` without
    a champion or without the days that it was trained on.
    """
    spec = workflow.drift
    window, trailing = windows(workflow, day)
    said: dict[str, Any] = {"name": spec.reference, "features_version": version}
    if spec.reference == "pinned":
        assert spec.pinned_from is not None and spec.pinned_to is not None, "the spec refuses that"
        chosen = [spec.pinned_from + timedelta(days=n) for n in range((spec.pinned_to - spec.pinned_from).days + 1)]
    elif spec.reference == "training":
        table = workflow.table("training_set")
        if champion is None or not lake.exists(table):
            raise ReferenceMissing(f"no champion for {day} whose training days could be the reference")
        at = lake.version(table)
        rows = lake.read(table, version=at, where=pc.field("as_of") == pa.scalar(champion.trained_day), columns=["day"])
        chosen = pc.unique(rows["day"]).to_pylist()
        if not chosen:
            raise ReferenceMissing(
                f"training set of {champion.trained_day} (version {champion.number}) is not in the lake"
            )
        said |= {"model_version": champion.number, "trained_day": str(champion.trained_day), "training_set_version": at}
    else:
        chosen = trailing
    kept = tuple(sorted(set(chosen) - set(window)))
    if not kept:
        raise ReferenceMissing(f"every day of the reference {spec.reference!r} lies in the window that is judged")
    said |= {"first_day": str(kept[0]), "last_day": str(kept[-1]), "days": len(kept)}
    return Reference(kept, said)


def importances(
    workflow: Workflow, registry: Registry, ledger: Ledger, day: date
) -> tuple[Version | None, dict[str, float] | None, str]:
    """The champion of ``day``, the share of its gain in each feature, and a sentence where that is not known.

    By the ledger (``pipeline.lifecycle.state.lineup``): an alias that somebody moved changes nothing before it is answered.
    """
    from lightgbm.basic import LightGBMError
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    champion: Version | None = None
    try:
        line = state.lineup(registry, ledger, workflow.name, day).versions
        champion = next((version for _, version, _ in line if version is not None), None)
        if champion is None:
            return None, None, f"columns weigh alike: no champion for {day}"
        return champion, scoring.read_model(workflow, registry, champion).gains(), ""
    except (
        ModelMissing,
        ModelUnreadable,
        MlflowException,
        SQLAlchemyError,
        LightGBMError,
        OSError,
        ValueError,
    ) as error:
        why = type(error).__name__
        which = f"version {champion.number}" if champion else "the registry"
        return champion, None, f"columns weigh alike: {which} cannot be read ({why})"


def _earlier(
    lake: Lake, table: str, day: date, m: int, fresh: Mapping[date, Mapping[str, Any]], what: str
) -> list[bool]:
    """What the m − 1 days before said of themselves, oldest first; a day that was not judged said nothing."""
    before = [day - timedelta(days=n) for n in range(m - 1, 0, -1)]
    stored: dict[date, Any] = {}
    asked = [d for d in before if d not in fresh]
    if asked and lake.exists(table):
        rows = lake.read(table, days=asked)
        if what in rows.schema.names:
            stored = dict(zip(rows["day"].to_pylist(), rows[what].to_pylist(), strict=True))
    return [bool(fresh[d][what] if d in fresh else stored.get(d)) for d in before]


def _scored_days(
    workflow: Workflow, lake: Lake, day: date, others: Collection[date] = ()
) -> tuple[list[date], list[date], str]:
    """Days scored by the day's own version, as window and reference (both empty with the reason why).

    ``others``: days whose stored scores are not of the version that acted (``acting.scored_by_others``).
    """
    scoring, spec = workflow.table("scoring"), workflow.drift
    if not lake.exists(scoring) or not lake.exists(workflow.table("scores")):
        return [], [], "no day has been scored"
    far = [day - timedelta(days=n) for n in range(spec.window_days + spec.reference_days)]
    rows = lake.read(scoring, days=far, columns=["day", "model_version", "model_digest"])
    by_day = {r["day"]: (r["model_version"], r["model_digest"]) for r in rows.to_pylist() if r["day"] not in others}
    if day in others:
        return [], [], f"the stored scores of {day} are not of the version that acted"
    mine = by_day.get(day)
    if mine is None or mine[1] is None:
        return [], [], f"no model scored {day}"
    same = [d for d in far if by_day.get(d) == mine]
    if len(same) < LEAST_SCORED_DAYS:
        return [], [], f"version {mine[0]} has scored {len(same)} days, {LEAST_SCORED_DAYS} are needed"
    length = min(spec.window_days, len(same) // 4)
    return same[:length], same[length:], f"version {mine[0]}"


@dataclass(frozen=True)
class _Scores:
    """What became of the scores' judgement; ``spoke`` None: not judged."""

    spoke: bool | None
    grave: bool
    found: str
    page: str
    text: str


def _judge_scores(workflow: Workflow, lake: Lake, day: date, others: Collection[date] = ()) -> _Scores:
    from data_checks import drift

    window, before, why = _scored_days(workflow, lake, day, others)
    if not window:
        return _Scores(None, False, "{}", "", f"scores not judged: {why}")
    table = workflow.table("scores")
    version = lake.version(table)
    schema = lake.read(table, version=version, days=[]).schema
    numeric = [f.name for f in schema if is_number(f.type)]
    skipped = [f.name for f in schema if f.name not in (*numeric, "day", "entity_id", "moment", "scoring_id")]
    left_out = f"; not judged: {', '.join(skipped)} (no plain numbers)" if skipped else ""
    columns = ["day", *numeric]
    rows = _judged_rows(workflow)
    current, past = (
        tables.recorded_scores(workflow, lake, d, where=rows, columns=columns).select(columns) for d in (window, before)
    )
    if not numeric or min(current.num_rows, past.num_rows) < workflow.drift.min_rows:
        return _Scores(
            None, False, "{}", "", f"scores not judged: {current.num_rows} rows beside {past.num_rows}{left_out}"
        )
    said = {
        "name": f"days scored by {why}", "scores_version": version, "first_day": str(min(before)),
        "last_day": str(max(before)), "days": len(before),
    }  # fmt: skip
    baseline = drift.Baseline(
        past, numeric=numeric, categorical=(), block=len(window), said=said, winsorise=workflow.drift.winsorise
    )
    try:
        report = drift.drift(
            current,
            baseline,
            numeric=numeric,
            categorical=(),
            spec=workflow.drift,
            title="Drift of the scores",
            plots=False,
        )
    except drift.DriftImpossible as error:
        return _Scores(None, False, "{}", "", f"scores not judged: {error}{left_out}")
    text = f"scores beside {said['name']}: {drift.sentence(report)}{left_out}"
    return _Scores(report.drifted, bool(report.grave), json.dumps(report.json, sort_keys=True), report.html, text)


def _judged_rows(workflow: Workflow) -> pc.Expression | None:
    return None if workflow.drift.moment is None else pc.field("moment") == workflow.drift.moment


def build(workflow: Workflow) -> dg.AssetsDefinition:
    """The asset [workflow, drift]."""
    spec = workflow.drift
    against = {
        "trailing": f"those of the {spec.reference_days} days before",
        "training": "those that the champion was trained on",
        "pinned": f"those of {spec.pinned_from} to {spec.pinned_to}",
    }[spec.reference]

    @stage(
        workflow,
        "drift",
        deps=["features", "scores"],
        description=f"The features of the last {spec.window_days} days beside {against}, and the scores beside the same "
        f"version's before; found when {spec.k} of {spec.m} days alert, or at once when it cannot wait.",
        kinds={"evidently"},
        checks={
            "stable": (False, "No drift has been found: neither of the features nor of the scores"),
            "volume": (False, "As many rows come as the reference's days have, a collapse and a surge alike"),
            "judged": (False, f"The features could be judged within the last {spec.unjudged_days} days"),
        },
    )
    def drift(
        context: dg.AssetExecutionContext,
        lake: LakeResource,
        ledger: LedgerResource,
        registry: RegistryResource,
        clock: ClockResource,
        reports: ReportsResource,
    ) -> dg.MaterializeResult:
        from data_checks import drift as drifts

        judged: dict[date, tuple[bool, str]] = {}
        volumes: dict[date, tuple[bool, str]] = {}
        whys: dict[date, str] = {}
        stored: dict[date, dict[str, Any]] = {}
        links: dict[str, Any] = {}
        span = days(context)
        table, verdicts = workflow.table("features"), workflow.table("drift")
        numeric, categorical = workflow.drift_columns
        columns = ["day", *numeric, *categorical]
        version = lake.lake.version(table)
        known: dict[tuple[date, ...], drifts.Baseline] = {}
        with ledger.open(clock.now) as book:
            champions = {day: importances(workflow, registry.registry, book, day) for day in span}
            others = in_effect.scored_by_others(book, workflow, lake.lake)
        for day in each("drift", span, len(span)):
            champion, gains, unknown = champions[day]
            scores = _judge_scores(workflow, lake.lake, day, others)
            scores_page = reports.write(workflow.name, day, "drift_scores.html", scores.page)[1] if scores.page else ""
            scores_drifted = None
            if scores.spoke is not None:
                spoke = _earlier(lake.lake, verdicts, day, spec.m, stored, "scores_spoke")
                scores_drifted = drifts.settled([*spoke, scores.spoke], scores.grave, spec)
            row: dict[str, Any] = {
                "day": day, "judged": False, "drifted": False, "spoke": False, "scores_drifted": scores_drifted,
                "scores_spoke": scores.spoke, "share": None, "importance_share": None, "volume": None, "columns": "{}",
                "scores": scores.found, "reference": "{}", "page": "", "volume_spoke": None, "volume_drifted": None,
            }  # fmt: skip
            stored[day] = row
            volumes[day] = (True, "not judged: no reference whose days vary")
            window, _ = windows(workflow, day)
            try:
                beside = reference(workflow, lake.lake, champion, day, version)
            except ReferenceMissing as error:
                whys[day] = str(error)
                row["text"] = f"not judged: {error}; {scores.text}"
                judged[day] = (not scores_drifted, row["text"])
                continue
            row["reference"] = json.dumps(beside.said, sort_keys=True)
            rows = _judged_rows(workflow)
            current = lake.lake.read(table, version=version, days=window, where=rows, columns=columns)
            if beside.days not in known:
                past = lake.lake.read(table, version=version, days=beside.days, where=rows, columns=columns)
                known.clear()  # a trailing reference is never met again
                if past.num_rows:
                    known[beside.days] = drifts.Baseline(
                        past, numeric=numeric, categorical=categorical, block=spec.window_days, said=beside.said,
                        winsorise=spec.winsorise,
                    )  # fmt: skip
            baseline = known.get(beside.days)
            past_rows = baseline.rows if baseline else 0
            arrived = drifts.volume(current.num_rows, baseline, spec) if baseline is not None else None
            if arrived is not None:
                told = [*_earlier(lake.lake, verdicts, day, spec.m, stored, "volume_spoke"), arrived.unlike]
                unlike = drifts.settled(told, False, spec)
                row |= {"volume": arrived.ratio, "volume_spoke": arrived.unlike, "volume_drifted": unlike}
                volumes[day] = (not unlike, arrived.text)
            if baseline is None or min(current.num_rows, past_rows) < spec.min_rows:
                few = f"{current.num_rows} rows beside {past_rows}, {spec.min_rows} of each are needed"
            elif baseline.days < spec.least_days:
                few = f"{baseline.days} days of reference have rows, {spec.least_days} are needed to know how days vary"
            else:
                few = ""
            if few or baseline is None:
                whys[day] = few
                row["text"] = f"not judged: {few}; {scores.text}"
                judged[day] = (not scores_drifted, row["text"])
                continue
            report = drifts.drift(
                current, baseline, numeric=numeric, categorical=categorical, spec=spec, importances=gains
            )
            spoke = [*_earlier(lake.lake, verdicts, day, spec.m, stored, "spoke"), report.drifted]
            drifted = drifts.settled(spoke, bool(report.grave), spec)
            _, page = reports.write(workflow.name, day, "drift.html", report.html)
            reports.write(workflow.name, day, "drift.json", json.dumps(report.json, sort_keys=True, indent=1))
            project, snapshot = drifts.save(
                reports.evidently_workspace,
                workflow.name,
                report,
                timestamp=datetime.combine(day, datetime.min.time()),
                tags=[f"day:{day}"],
            )
            row |= {
                "judged": True, "drifted": drifted, "spoke": report.drifted, "share": report.share_drifted,
                "importance_share": report.importance_share, "volume": report.volume, "page": page,
                "columns": json.dumps(report.columns, sort_keys=True),
                "text": _said(drifts.sentence(report), report.drifted, drifted, spoke, unknown, scores),
            }  # fmt: skip
            judged[day] = (not drifted and not scores_drifted, row["text"])
            links = {
                "report": dg.MetadataValue.url(page),
                **({"report of the scores": dg.MetadataValue.url(scores_page)} if scores_page else {}),
                "in Evidently": dg.MetadataValue.url(f"{reports.evidently_ui}/projects/{project}/reports/{snapshot}"),
                "columns": dg.MetadataValue.json(report.columns),
                "reference": dg.MetadataValue.json(beside.said),
            }
            context.add_asset_metadata(
                {
                    "share drifted": report.share_drifted,
                    "importance drifted": report.importance_share,
                    "volume": report.volume,
                    "report": dg.MetadataValue.url(page),
                },
                partition_key=day.isoformat(),
            )
        lake.lake.replace_days(verdicts, pa.Table.from_pylist(list(stored.values()), schema=SCHEMA), span)
        return dg.MaterializeResult(
            metadata={"days judged": sum(s["judged"] is True for s in stored.values()), **links},
            check_results=[
                folded("stable", judged, warn=True),
                folded("volume", volumes, warn=True),
                folded("judged", _unjudged(workflow, lake.lake, span, whys), warn=True),
            ],
        )

    return drift


def _unjudged(
    workflow: Workflow, lake: Lake, span: Sequence[date], whys: Mapping[date, str]
) -> dict[date, tuple[bool, str]]:
    """Whether the features were judged lately, for each day; ``whys``: why a day could not be."""
    spec = workflow.drift
    near = (pc.field("day") > pc.scalar(span[0] - timedelta(days=spec.unjudged_days))) & pc.field("judged")
    known = lake.read(workflow.table("drift"), where=near & (pc.field("day") <= pc.scalar(span[-1])), columns=["day"])
    since = workflow.start + timedelta(days=spec.window_days + spec.least_days)
    done = set(known["day"].to_pylist())
    return {day: unjudged(day, done, since, spec.unjudged_days, whys.get(day, "")) for day in span}


def _said(text: str, own: bool, drifted: bool, spoke: Sequence[bool], unknown: str, scores: _Scores) -> str:
    """The day in a few clauses: what it says, how many days say so, and what could not be known."""
    parts = [text]
    if own and not drifted:
        parts.append(f"not yet found: {sum(spoke)} of the last {len(spoke)} days alerted")
    return "; ".join([*parts, *([unknown] if unknown else []), scores.text])
