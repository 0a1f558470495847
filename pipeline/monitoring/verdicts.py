"""Whether what acts now does harm: observations of the arms from lake and ledger, the verdict on them, and what a verdict asks for.

Belongs here: which version is compared with what since when, the tables that the statistics read, the ledger's verdicts.
Does not: the statistics (``data_checks.regression``), taking anything back (``pipeline.dispatch``), or what starts it
(``orchestration.automation``).

What counts for which arm. A decision of day D acts from the deadline of D on, that is on D+1: the day of an observation
is the day on which it was *acted on*, and its arm is the one that its unit was drawn into for the decision before. So no
outcome counts for an arm that did not act on it yet. All outcomes of a unit count, whether a decision changed the entity
or not: what was chosen to be changed differs between the arms, what a unit holds does not.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from common import duckdb_session
from common.errors import SignalboxError
from data_checks import effects, regression
from delivery.ledger import BatchRow, Ledger
from models.booster import is_number
from models.policies import arms
from pipeline.decisions import in_effect
from pipeline.lake import Lake
from pipeline.lifecycle import promotion, rule_override, state
from pipeline.point_in_time import StageSqlError
from pipeline.workflow import Regression, Workflow

if TYPE_CHECKING:
    from delivery.ledger import Event

VERDICT = "verdict"
"""Kind of the ledger event in which the regression guard has spoken of a version."""
AGAINST_HOLDOUT, AGAINST_CHAMPION = "champion vs holdout", "challenger vs champion"
_PLACES = frozenset({"promoted", "canary", "shadow", "rolled back", "dropped", "refused"})
"""Actions that give a version its place; the others leave it where it is: an alias that was put back, and a lift. What was
rolled back must be promoted again after it; a champion that had left its days to the rule decides again."""
_GONE = frozenset({"rolled back", "dropped", "refused"})
"""Those after which a version acts no more."""
_AGAIN = frozenset({"promoted", "canary", "lifted"})
"""Actions after which an older verdict on a version counts no more: somebody, or its gate, has let it act since."""


@dataclass(frozen=True)
class Comparison:
    """Two arms, and since when what is judged has acted in the first of them."""

    name: str
    treated: str
    control: str
    version: int | None
    """None: the rule, where no model acts."""
    since: date
    """The first day that it decided; it acts from the day after on."""

    @property
    def start(self) -> date:
        """The first day on which it acted."""
        return self.since + timedelta(days=1)

    @property
    def who(self) -> str:
        """What is judged, in words."""
        return f"version {self.version}" if self.version is not None else "the rule"

    def seed(self, workflow: str) -> int:
        """The same for every look at it, so that a sequence does not change from one day to the next."""
        said = f"{workflow}\0{self.name}\0{self.version}\0{self.since}".encode()
        return int.from_bytes(hashlib.sha256(said).digest()[:4], "big")


@dataclass(frozen=True)
class Judged:
    """A comparison at a day's cut-off, and the verdict on it."""

    comparison: Comparison
    day: date
    judgement: regression.Judgement

    @property
    def verdict(self) -> str:
        """ROLLBACK, PROMOTE, CONTINUE, INCONCLUSIVE or NO_DATA."""
        return str(self.judgement.verdict)

    @property
    def text(self) -> str:
        """For a check, a log, and as the reason of a rollback."""
        told = "; ".join(self.judgement.reasons) or "nothing more is to be said"
        return (
            f"{self.verdict}: {self.comparison.who}, {self.comparison.name} since {self.comparison.start} "
            f"(by the cut-off of {self.day}): {told}"
        )


def guarded(workflow: Workflow) -> bool:
    """Whether what acts is compared with anything: the workflow sends decisions, and says what counts as harm."""
    return workflow.delivery is not None and workflow.regression is not None


# --- who acts, and since when


def comparisons(workflow: Workflow, ledger: Ledger, day: date) -> tuple[Comparison, ...]:
    """What there is to judge with what was known at the cut-off of ``day``: the champion beside the holdout since its
    version began to act, and the challenger beside the champion since its canary began.

    The ledger's deliveries say what acted (``pipeline.decisions.in_effect``), of the days before ``day``. A day that a lower step decided
    interrupts nothing. Where no model acts the rule is judged, and so it is from the first day that it decided because the
    champion does worse than it (``pipeline.lifecycle.rule_override``); when that version acts again, its comparison starts anew.
    """
    known = workflow.cutoff_of(day)
    shares = arms.normalised(workflow.arms.shares)
    moved = [p for p in ledger.promotions(workflow.name) if p.at <= known]
    last = {p.version: p.action for p in moved if p.action in _PLACES}
    acted = _acted(workflow, ledger, day, known)
    found = []
    if {"champion", "holdout"} <= shares.keys():
        begun = _champion(acted, moved, last, _left_to_the_rule(ledger, workflow, acted))
        if begun is not None:
            found.append(Comparison(AGAINST_HOLDOUT, "champion", "holdout", *begun))
    if {"challenger", "champion"} <= shares.keys() and acted:
        version = _number(acted[-1], "challenger_version")
        if version is not None and last.get(version) == "canary":
            since = _since(
                acted,
                "challenger_version",
                version,
                max(p.at for p in moved if p.version == version and p.action == "canary"),
            )
            if since is not None:
                found.append(Comparison(AGAINST_CHAMPION, "challenger", "champion", version, since))
    return tuple(found)


def _acted(workflow: Workflow, ledger: Ledger, day: date, known: datetime) -> list[BatchRow]:
    """The batches that acted by a cut-off, oldest first: of each day the newest of them."""
    batches = ledger.batches(workflow.name, kind="decision")
    return list(in_effect.newest(b for b in batches if b.day < day and b.recorded_at <= known).values())


def _number(batch: BatchRow, key: str) -> int | None:
    value = batch.record.get(key)
    return None if value is None else int(value)


def _left_to_the_rule(ledger: Ledger, workflow: Workflow, acted: Sequence[BatchRow]) -> frozenset[date]:
    """The days that the rule decided while the champion of that hour was behind it."""
    noted = ledger.events(rule_override.KIND, workflow.name)
    ruled = [b for b in acted if b.step == "rule" and noted and b.decided_at >= noted[0].at]
    return frozenset(b.day for b in ruled if state.behind(ledger, workflow.name, b.decided_at) is not None)


def _champion(
    acted: Sequence[BatchRow], moved: Sequence[Any], last: Mapping[int | None, str], left: frozenset[date]
) -> tuple[int | None, date] | None:
    """The version that decides as champion (None: the rule) and the first day of it; None where nothing acts.

    ``left``: days that a champion left to the rule. They end its run, as days of another version do.
    """
    leading = [b for b in acted if b.step == "champion" or b.day in left]
    if leading and leading[-1].day in left:
        run = itertools.takewhile(lambda b: b.day in left, reversed(leading))
        return None, min(b.day for b in run)
    version = _number(leading[-1], "model_version") if leading else None
    if version is not None and last.get(version) not in _GONE:
        begun = [p.at for p in moved if p.version == version and p.action == "promoted"]
        since = _since(leading, "model_version", version, max(begun) if begun else datetime.min)
        return None if since is None else (version, since)
    # No model stands: the rule has decided since the last one did, unless a guard took that back already.
    after = leading[-1].day if leading else date.min
    ruled = [b for b in acted if b.step == "rule" and b.day > after]
    return (None, ruled[0].day) if ruled else None


def _since(batches: Sequence[BatchRow], key: str, version: int, begun: datetime) -> date | None:
    """The first day of the last unbroken run of batches that carry the version, none recorded before ``begun``.

    Days of another version between two runs (it was restored after a rollback) would count against the wrong one.
    """
    since = None
    for batch in reversed(batches):
        if _number(batch, key) != version or batch.recorded_at < begun:
            break
        since = batch.day
    return since


# --- what was observed


def observations(workflow: Workflow, lake: Lake, first: date, last: date, *, known: date) -> pa.Table:
    """The outcomes acted on from ``first`` to ``last``, summed by day and unit, with what was known at the cut-off of ``known``.

    Columns: day (acted on), unit, arm (null: the unit was not drawn), epoch, washout, n, and the columns that the
    workflow's metrics name. An outcome of the join ``entity_day`` was acted on the day after its for_day; n is 1, a
    unit's day, however many of its entities are left in it, and a unit without a row on a day that others have one of
    counts with zero there: what was switched off earns nothing. One of the join ``entity`` counts once (n: how many; 0 on
    a day that landed without one), with what was known of it last: on the day by whose deadline it settled
    (``regression.settles_at``), else on the day when it became known. An entity's unit is the one that its newest
    features row says at the decision that acted, else the first row thereafter (it came and was decided within a day).
    Raises StageSqlError naming the column and the file where the outcomes lack a column.
    """
    spec = _spec(workflow)
    columns = effects.measured(spec)
    by_day = workflow.outcomes.join == "entity_day"
    outcomes, features, drawn = (workflow.table(t) for t in ("outcomes", "features", "arms"))
    schema = _observed(columns)
    if not lake.exists(outcomes) or not lake.exists(features) or first > last:
        return schema.empty_table()
    cutoff = workflow.cutoff_of(known)
    reach = 1 if by_day else workflow.outcomes.lookback_days
    needed = [*columns, *([spec.settles_at] if spec.settles_at else [])]
    _needed(workflow, lake.read(outcomes, days=[]), needed)
    told = lake.read(
        outcomes, columns=list(dict.fromkeys(["entity_id", "for_day", "known_at", "day", *needed])),
        where=_days(first - timedelta(days=reach), known) & (pc.field("known_at") <= _instant(cutoff)),
    )  # fmt: skip
    unit = workflow.arms.unit
    described = _described(
        workflow, lake, first - timedelta(days=1 if by_day else 1 + workflow.features.lookback_days), known
    )
    given = {
        "first": first, "last": last, "cutoff": cutoff, "start": workflow.start, "epoch": workflow.arms.epoch,
        "washout": workflow.arms.washout, "early": timedelta(hours=workflow.deadline.hour, minutes=workflow.deadline.minute),
    }  # fmt: skip
    read = ", ".join(f'CAST("{c}" AS DOUBLE) AS "{c}"' for c in columns)
    some = " OR ".join(f'"{c}" IS NOT NULL' for c in columns)
    settles = f'"{spec.settles_at}"' if spec.settles_at else "NULL::TIMESTAMP"
    if by_day:
        told_once = f"""
            SELECT entity_id, for_day + 1 AS day, {read} FROM told AS t
            WHERE for_day BETWEEN $first - 1 AND $last - 1
            QUALIFY row_number() OVER (PARTITION BY entity_id, for_day ORDER BY known_at DESC, t.day DESC) = 1"""
    else:
        told_once = f"""
            SELECT * FROM (
                SELECT entity_id,
                    CAST(coalesce({settles}, min(known_at) OVER (PARTITION BY entity_id)) - $early AS DATE) AS day, {read}
                FROM told AS t WHERE ({some})
                QUALIFY row_number() OVER (PARTITION BY entity_id ORDER BY known_at DESC, t.day DESC) = 1
            ) WHERE day BETWEEN $first AND $last"""
    summed = ", ".join(f'sum("{c}") AS "{c}"' for c in columns)
    # What a cohort switched off leaves no row: its units count with zero on every day of which there are rows. A team to
    # which nothing came due has no rows either: its day is told from one that never landed.
    zero = ", ".join(f'0.0 AS "{c}"' for c in columns)
    counted = "1" if by_day else "count(*)"
    everyone = (
        f"(SELECT DISTINCT day FROM acted) AS s JOIN drawn AS u ON u.epoch = {_epoch('s.day - 1')}"
        if by_day
        else "(SELECT DISTINCT day FROM told AS t WHERE t.day BETWEEN $first AND $last) AS s "
        "CROSS JOIN (SELECT DISTINCT unit FROM acted) AS u"
    )
    connection = duckdb_session.engine()
    try:
        connection.register("told", told)
        connection.register("described", described)
        connection.register("drawn", _drawn(lake, drawn, known))
        query = f"""
        WITH once AS MATERIALIZED (SELECT * FROM ({told_once}) ORDER BY entity_id, day),
        units AS (
            SELECT entity_id, day, max_by(coalesce(CAST("{unit}" AS VARCHAR), '(none)'), moment) AS unit
            FROM described GROUP BY entity_id, day
        ),
        placed AS (
            SELECT o.*, coalesce(was.unit, came.unit) AS unit
            FROM once AS o
            ASOF LEFT JOIN units AS was ON was.entity_id = o.entity_id AND o.day - 1 >= was.day
            ASOF LEFT JOIN units AS came ON came.entity_id = o.entity_id AND o.day - 1 < came.day
        ),
        acted AS MATERIALIZED (
            SELECT day, unit, {counted} AS n, {summed}
            FROM (SELECT * FROM placed ORDER BY entity_id, day) WHERE unit IS NOT NULL GROUP BY day, unit
        ),
        whole AS (
            SELECT * FROM acted
            UNION ALL BY NAME
            SELECT s.day, u.unit, {1 if by_day else 0} AS n, {zero} FROM {everyone}
            ANTI JOIN acted AS a ON a.day = s.day AND a.unit = u.unit
        )
        SELECT w.day, w.unit, a.arm, CAST(a.epoch AS VARCHAR) AS epoch, {_washout("w.day - 1")} AS washout, CAST(w.n AS BIGINT) AS n,
            {", ".join(f'w."{c}"' for c in columns)}
        FROM whole AS w LEFT JOIN drawn AS a ON a.unit = w.unit AND a.epoch = {_epoch("w.day - 1")}
        ORDER BY w.day, w.unit"""
        used = {name: value for name, value in given.items() if f"${name}" in query}
        return connection.sql(query, params=used).to_arrow_table().cast(schema)
    finally:
        connection.close()


def _epoch(decided: str) -> str:
    """SQL: the epoch (its first day, as text) of a decision's day; see ``models.policies.arms.epoch_of``."""
    return f"CAST($start + CAST(({decided} - $start) // $epoch * $epoch AS INTEGER) AS VARCHAR)"


def _washout(decided: str) -> str:
    """SQL: whether a decision's day lies in the wash-out of its epoch."""
    return f"({decided} - $start >= $epoch AND ({decided} - $start) % $epoch < $washout)"


def _observed(columns: Sequence[str]) -> pa.Schema:
    return pa.schema(
        {
            "day": pa.date32(), "unit": pa.string(), "arm": pa.string(), "epoch": pa.string(), "washout": pa.bool_(),
            "n": pa.int64(), **dict.fromkeys(columns, pa.float64()),
        }
    )  # fmt: skip


def _spec(workflow: Workflow) -> Regression:
    assert workflow.regression is not None, "asked for workflows that have a section regression"
    return workflow.regression


def _needed(workflow: Workflow, told: pa.Table, columns: Sequence[str]) -> None:
    lacking = [c for c in columns if c not in told.schema.names]
    if lacking:
        own = [c for c in told.schema.names if c not in {"entity_id", "for_day", "known_at", "day"}]
        raise StageSqlError(
            f"{workflow.folder / workflow.outcomes.sql}: yields no {', '.join(lacking)}, which the section regression of "
            f"{workflow.folder / 'workflow.yaml'} names; it yields {', '.join(own)}"
        )
    for column in columns:
        kind = told.schema.field(column).type
        wanted = pa.types.is_timestamp(kind) if column == _spec(workflow).settles_at else is_number(kind)
        if not wanted:
            raise StageSqlError(
                f"{workflow.folder / workflow.outcomes.sql}: {column} is {kind}, which the section regression of "
                f"{workflow.folder / 'workflow.yaml'} cannot use: a metric is a number, settles_at a TIMESTAMP"
            )


def _days(first: date, last: date) -> pc.Expression:
    return (pc.field("day") >= pa.scalar(first, pa.date32())) & (pc.field("day") <= pa.scalar(last, pa.date32()))


def _instant(at: datetime) -> pa.Scalar:
    return pa.scalar(at, pa.timestamp("us")).cast(pa.timestamp("us", tz="UTC"))


def _described(workflow: Workflow, lake: Lake, first: date, known: date) -> pa.Table:
    """entity_id, day, the unit's column and moment of the features rows that may name a unit.

    Where a day has several rows of an entity the last moment by name counts.
    """
    table, unit = workflow.table("features"), workflow.arms.unit
    names = lake.read(table, days=[]).schema.names
    if unit not in names:
        raise StageSqlError(
            f"{workflow.folder / workflow.features.sql}: yields no {unit}, which arms.unit in "
            f"{workflow.folder / 'workflow.yaml'} names"
        )
    wanted = list(dict.fromkeys(["entity_id", "day", unit, *(["moment"] if "moment" in names else [])]))
    found = lake.read(table, where=_days(first, known), columns=wanted)
    return found if "moment" in names else found.append_column("moment", pa.array([""] * found.num_rows, pa.string()))


def _drawn(lake: Lake, table: str, known: date) -> pa.Table:
    """unit, arm, arm_probability, epoch, drawn_on of the units drawn by then."""
    columns = ["unit", "arm", "arm_probability", "epoch", "drawn_on"]
    if not lake.exists(table):
        kinds = [pa.string(), pa.string(), pa.float64(), pa.string(), pa.date32()]
        return pa.schema(list(zip(columns, kinds, strict=True))).empty_table()
    by_then = pc.field("drawn_on") <= pa.scalar(known, pa.date32())
    return lake.read(table, where=by_then, columns=columns).sort_by([("epoch", "ascending"), ("unit", "ascending")])


def entities(workflow: Workflow, lake: Lake, since: date, *, known: date, until: date | None = None) -> pa.Table:
    """For the design ``entity``: one row an entity that was decided on from ``since`` on (and before ``until``, where
    given) and whose outcome was known by then.

    As ``observations``, with the entity as its unit and the arm of its decision; day: when its outcome became known.
    """
    columns = effects.measured(_spec(workflow))
    table, schema = workflow.table("decision_outcomes"), _observed(columns)
    if not lake.exists(table):
        return schema.empty_table()
    cutoff = workflow.cutoff_of(known)
    told = lake.read(table, where=_days(since, known) & (pc.field("known_at") <= _instant(cutoff)))
    _needed(workflow, told, columns)
    read = ", ".join(f'CAST("{c}" AS DOUBLE) AS "{c}"' for c in columns)
    some = " OR ".join(f'"{c}" IS NOT NULL' for c in columns)
    connection = duckdb_session.engine()
    try:
        connection.register("told", told)
        query = f"""
        SELECT CAST(min(known_at) OVER (PARTITION BY entity_id) - $early AS DATE) AS day, entity_id AS unit, arm,
            {_epoch("decided_day")} AS epoch, false AS washout, CAST(1 AS BIGINT) AS n, {read}
        FROM told AS t WHERE decided_day >= $since AND decided_day < $until AND ({some})
        QUALIFY row_number() OVER (PARTITION BY entity_id ORDER BY known_at DESC, t.day DESC) = 1
        ORDER BY 1, 2"""
        early = timedelta(hours=workflow.deadline.hour, minutes=workflow.deadline.minute)
        given = {
            "since": since, "until": until or date.max, "start": workflow.start, "epoch": workflow.arms.epoch, "early": early,
        }  # fmt: skip
        return connection.sql(query, params=given).to_arrow_table().cast(schema)
    finally:
        connection.close()


# --- the verdict


def judge_day(workflow: Workflow, lake: Lake, ledger: Ledger, day: date) -> tuple[Judged, ...]:
    """Judge every comparison with what was known at the cut-off of ``day``, and record each verdict, the same once.

    Empty where nothing has acted yet. Raises StageSqlError as ``observations`` does.
    """
    found = tuple(judge(workflow, lake, one, day) for one in comparisons(workflow, ledger, day))
    for judged in found:
        _note(workflow, ledger, judged)
    return found


def judge(workflow: Workflow, lake: Lake, comparison: Comparison, day: date) -> Judged:
    """One comparison at the cut-off of ``day``; its pre-period is the days before it began to act, and for the design
    ``entity`` what had been decided on in them.
    """
    spec, design = _spec(workflow), workflow.arms.design
    start = comparison.start
    before: pa.Table | None = None
    if design == "entity":
        observed = entities(workflow, lake, comparison.since, known=day)
        # what was known when the comparison began, so that a later day changes nothing of an earlier look
        early = comparison.since - timedelta(days=spec.pre_days)
        before = entities(workflow, lake, early, known=comparison.since, until=comparison.since)
    else:
        whole = observations(workflow, lake, start - timedelta(days=spec.pre_days), day, known=day)
        in_effect = pc.greater_equal(whole["day"], pa.scalar(start, pa.date32()))
        observed, before = whole.filter(in_effect), whole.filter(pc.invert(in_effect))
    drawn = _drawn(lake, workflow.table("arms"), day)
    epochs = pc.unique(observed["epoch"]).drop_null()
    drawn = drawn.filter(pc.is_in(drawn["epoch"], value_set=epochs))
    judgement = regression.judge(
        observed.filter(pc.is_valid(observed["arm"])), before, spec=spec, design=design, treated=comparison.treated,
        control=comparison.control, shares=arms.normalised(workflow.arms.shares), drawn=drawn, start=start, day=day,
        seed=comparison.seed(workflow.name),
    )  # fmt: skip
    return Judged(comparison, day, judgement)


def _note(workflow: Workflow, ledger: Ledger, judged: Judged) -> None:
    one = judged.comparison
    body = {
        "workflow": workflow.name, "comparison": one.name, "version": one.version, "since": one.since.isoformat(),
        "day": judged.day.isoformat(), "verdict": judged.verdict, "reasons": list(judged.judgement.reasons),
        "figures": plain(judged.judgement.figures), "design": workflow.arms.design,
    }  # fmt: skip
    if body not in [dict(e.body) for e in ledger.events(VERDICT, workflow.name)]:
        ledger.note(VERDICT, body)


def plain(value: Any) -> Any:
    """As JSON gives it back, so that a body read from the ledger equals the one that was written."""

    def finite(x: Any) -> Any:
        if isinstance(x, Mapping):
            return {str(k): finite(v) for k, v in x.items()}
        if isinstance(x, list | tuple):
            return [finite(v) for v in x]
        if hasattr(x, "item"):
            return finite(x.item())
        if isinstance(x, float):
            return x if math.isfinite(x) else None
        return x.isoformat() if isinstance(x, date) else x

    return json.loads(json.dumps(finite(value)))


# --- how soon a harm would be found


class NoHistory(SignalboxError, LookupError):
    """Nothing is there to tell from how soon a harm would be found; the message says what is missing, and the way to it."""


def power(
    workflow: Workflow, lake: Lake, day: date, harms: Sequence[float], *, runs: int = 300, wanted: float = 0.8
) -> list[regression.Power]:
    """How soon each harm (a share of the metric's level) would be found with these arms, from the days up to ``day``.

    By comparison that the shares allow, metric and harm. Raises NoHistory where the lake holds too little of it.
    """
    spec, shares = _spec(workflow), arms.normalised(workflow.arms.shares)
    history = _history(workflow, lake, day)
    pairs = [p for p in (("champion", "holdout"), ("challenger", "champion")) if set(p) <= shares.keys()]
    if not pairs:
        raise NoHistory(
            f"{workflow.name}: no two arms are compared; arms.shares in {workflow.folder / 'workflow.yaml'} needs a holdout "
            "beside the champion"
        )
    try:
        return [
            regression.power(
                history, spec=spec, design=workflow.arms.design, treated=treated, control=control, shares=shares,
                harm=harm, epoch_days=workflow.arms.epoch, washout_days=workflow.arms.washout, metric=metric.name,
                wanted=wanted, runs=runs, seed=Comparison("power", treated, control, None, workflow.start).seed(workflow.name),
            )
            for treated, control in pairs for metric in spec.metrics for harm in harms
        ]  # fmt: skip
    except ValueError as error:
        raise NoHistory(f"{workflow.name}: {error}; {_prepare(workflow)}") from None


SENTENCE_HARMS = (0.05, 0.2)
"""Harms, as shares of the metric's level, of which the asset says how soon they would be found."""
_TOLD_FOR_DAYS = 28


def power_sentences(workflow: Workflow, lake: Lake, day: date) -> list[str]:
    """What the asset says of its own power: told anew every four weeks, or when arms or metrics are changed, and kept.

    Simulating takes seconds, so it waits until there is a pre-period and two weeks after it to simulate from.
    """
    spec, table = _spec(workflow), workflow.table("power")
    said = json.dumps([spec.model_dump(mode="json"), workflow.arms.model_dump(mode="json")], sort_keys=True)
    digest = hashlib.sha256(said.encode()).hexdigest()
    if lake.exists(table):
        mine = _days(day - timedelta(days=_TOLD_FOR_DAYS - 1), day) & (pc.field("digest") == digest)
        kept = lake.read(table, where=mine).sort_by([("day", "descending"), ("n", "ascending")]).to_pylist()
        if kept:
            return [row["says"] for row in kept if row["day"] == kept[0]["day"]]
    wanted = spec.pre_days + 14
    if (day - workflow.start).days + 1 < wanted:
        return [
            f"How soon a harm would be found is told once there are {wanted} days of history; signalbox power {workflow.name}"
        ]
    try:
        says = [found.sentence() for found in power(workflow, lake, day, SENTENCE_HARMS, runs=100)]
    except NoHistory as error:
        return [str(error)]
    rows = [{"day": day, "digest": digest, "n": n, "says": text} for n, text in enumerate(says)]
    kinds = {"day": pa.date32(), "digest": pa.string(), "n": pa.int64(), "says": pa.string()}
    lake.replace_days(table, pa.Table.from_pylist(rows, schema=pa.schema(kinds)), [day])
    return says


def _history(workflow: Workflow, lake: Lake, day: date) -> pa.Table:
    """As many days up to ``day`` as a pre-period, a horizon and four weeks to choose from take, as ``regression.power`` reads them."""
    spec = _spec(workflow)
    lacking = [t for t in ("outcomes", "features") if not lake.exists(workflow.table(t))]
    if lacking:
        raise NoHistory(f"{workflow.name}: the lake holds no {' and no '.join(lacking)} yet; {_prepare(workflow)}")
    first = max(workflow.start, day - timedelta(days=spec.pre_days + spec.horizon_days + 28))
    by_entity = workflow.arms.design == "entity"
    found = (_told_entities if by_entity else _told_units)(workflow, lake, first, day)
    if not found.num_rows:
        raise NoHistory(f"{workflow.name}: no outcome was known of the days {first} to {day}; {_prepare(workflow)}")
    return found


def _prepare(workflow: Workflow) -> str:
    return f"land past days below landing/{workflow.name} and run: signalbox run {workflow.name} prepare --since {workflow.start}"


def _told_units(workflow: Workflow, lake: Lake, first: date, last: date) -> pa.Table:
    return observations(workflow, lake, first, last, known=last)


def _told_entities(workflow: Workflow, lake: Lake, first: date, last: date) -> pa.Table:
    """For the design ``entity``: one row an outcome of the past, decided on or not, on the day when it became known."""
    columns = effects.measured(_spec(workflow))
    told = lake.read(
        workflow.table("outcomes"),
        where=_days(first, last) & (pc.field("known_at") <= _instant(workflow.cutoff_of(last))),
    )
    _needed(workflow, told, columns)
    some = " OR ".join(f'"{c}" IS NOT NULL' for c in columns)
    read = ", ".join(f'CAST("{c}" AS DOUBLE) AS "{c}"' for c in columns)
    connection = duckdb_session.engine()
    try:
        connection.register("told", told)
        return (
            connection.sql(
                f"""SELECT t.day, entity_id AS unit, NULL::VARCHAR AS arm, NULL::VARCHAR AS epoch, false AS washout,
                CAST(1 AS BIGINT) AS n, {read} FROM told AS t WHERE {some}
            QUALIFY row_number() OVER (PARTITION BY entity_id, for_day ORDER BY known_at DESC, t.day DESC) = 1
            ORDER BY t.day, entity_id"""
            )
            .to_arrow_table()
            .cast(_observed(columns))
        )
    finally:
        connection.close()


# --- what a verdict asks for


@dataclass(frozen=True)
class Condemned:
    """What stands under a verdict ROLLBACK and is not wholly taken back. ``version`` None: the rule's batches since ``since``."""

    comparison: str
    version: int | None
    since: date
    day: date
    reason: str
    batches: tuple[str, ...]
    """Its batches that acted, or may still be sent, and that no rollback has ended."""
    attempt: int
    """Number of the verdict's event: another verdict asks anew."""


def condemned(ledger: Ledger, workflow: Workflow) -> list[Condemned]:
    """Versions over which a verdict ROLLBACK stands, oldest verdict first; what the sensor asks a rollback for.

    A verdict stands until its version is rolled back with all of its batches, and no longer than until the version is let
    act anew. A version that has been replaced meanwhile does nothing any more and is left.
    """
    events = ledger.events(VERDICT, workflow.name)
    if not any(e.body["verdict"] == "ROLLBACK" for e in events):
        return []
    acted, batches = _acted_or_may(ledger, workflow)
    done = {r.batch_id for r in ledger.rollbacks() if r.action in ("complete", "closed")}
    moves: dict[int | None, list[Event]] = {}
    for event in ledger.events("promotion", workflow.name):
        moves.setdefault(event.body["version"], []).append(event)
    act_now = _acting(ledger, workflow, acted)
    found: dict[tuple[str, int | None], Condemned] = {}
    for event in events:
        if event.body["verdict"] != "ROLLBACK":
            continue
        version, since, day = event.body["version"], *(date.fromisoformat(event.body[k]) for k in ("since", "day"))
        later = [m.body["action"] for m in moves.get(version, []) if m.seq > event.seq]
        if version is None:
            own = [b for b in batches if b.step == "rule" and since <= b.day <= day]
        else:
            # as delivery.rollback.Model chooses them: a batch is taken back whole
            keys = ("model_version", "challenger_version")
            own = [b for b in batches if version in {_number(b, k) for k in keys} and not b.retired]
        left = tuple(b.batch_id for b in own if b.batch_id not in done)
        begun = "rolled back" in later or (version is None and len(left) < len(own))
        wanted = bool(left) if begun else version in act_now
        if wanted and not _AGAIN.intersection(later):
            reason = promotion.reason_of(event.body)
            found[event.body["comparison"], version] = Condemned(
                event.body["comparison"], version, since, day, reason, left, event.seq
            )
    return sorted(found.values(), key=lambda c: c.attempt)


def _acted_or_may(ledger: Ledger, workflow: Workflow) -> tuple[list[BatchRow], list[BatchRow]]:
    """The batches that acted, oldest day first; and they with those that may still be sent, in the order of deciding."""
    every = ledger.batches(workflow.name, kind="decision")
    acted = [b for rows in in_effect.by_day(every).values() for b in rows]
    may = {
        b.day: b for b in every if b.status != "REFUSED" and not b.backfill and ledger.clock() < in_effect.over(b.day)
    }
    chosen = {b.batch_id for b in (*acted, *may.values())}
    return acted, [b for b in every if b.batch_id in chosen]


def _acting(ledger: Ledger, workflow: Workflow, acted: Sequence[BatchRow]) -> set[int | None]:
    """Who acts now: the champion (None: the rule, where no model does or the champion is behind it) and the challenger."""
    stands = state.live(ledger, workflow)
    found: set[int | None] = {stands["challenger"][0]} if stands["challenger"] else set()
    if state.behind(ledger, workflow.name, ledger.clock()) is not None:
        # a verdict over either counts: the rule decides, and what the champion decided before may still stand
        found.add(None)
    if stands["champion"] is not None or ledger.promotions(workflow.name):
        return found | {stands["champion"]}
    # A ledger that knows of no promotion: whoever acted last.
    newest = [b for b in acted if b.step in ("champion", "rule")][-1:]
    return found | {_number(b, "model_version") for b in newest}
