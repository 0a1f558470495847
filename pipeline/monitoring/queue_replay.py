"""What a queue would have come to under the status quo and under what was asked for, from the lake and the ledger.

Belongs here: reading a replay's inputs, saying which of them is missing, the looks of a comparison. Does not: serving the queue
(``data_checks.regression.queue_replay``), the test and the alerts (``data_checks.regression.matched_test``), what follows from them
(``pipeline.monitoring.verdicts``).

Where the inputs come from. Tickets, and who worked on them when: SQL of the workflow's folder over its events. The status quo's order:
the ledger's decisions name what stood before each; what a push set counts as nobody's, until somebody changes it. The order asked for:
each day that acted is decided anew for every unit, from its recorded features and scores, on the values that such decisions would have
left; so held-out units have one, too, and both arms' come about in one way. Decisions are made by the policy as the folder has it now.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from common import duckdb_session
from data_checks.regression import matched_test
from data_checks.regression.queue_replay import QueueReplay, Shifts, TeamWeek
from data_checks.regression.replay import Floats, Ints
from delivery.ledger import Ledger
from models.policies import arms
from pipeline import point_in_time
from pipeline.decisions import decide, in_effect, scoring, tables
from pipeline.lake import Lake, TableMissing
from pipeline.monitoring.observations import drawn_units
from pipeline.workflow import Replay, Workflow

EARLIER_DAYS = 28
"""How long before the pre-period events are read: the tickets that were open when it began."""
_DAY, _HOUR = 24.0, np.timedelta64(3_600_000_000, "us")
_DATES = np.dtype("datetime64[D]")

TICKETS = pa.schema(
    {
        "entity_id": pa.string(), "unit": pa.string(), "arrived_at": pa.timestamp("us"), "due_at": pa.timestamp("us"),
        "resolved_at": pa.timestamp("us"), "effort_hours": pa.float64(), "category": pa.string(), "priority": pa.int64(),
        "moved": pa.bool_(),
    }
)  # fmt: skip
"""What ``regression.replay.tickets`` yields: one row a ticket. arrived_at: when it came to the unit that had it last; resolved_at and
effort_hours null while it is open; priority: as people gave it; moved: it came from another unit."""
WORK = pa.schema(
    {
        "entity_id": pa.string(), "unit": pa.string(), "worker": pa.string(), "begun_at": pa.timestamp("us"),
        "laid_at": pa.timestamp("us"),
    }
)  # fmt: skip
"""What ``regression.replay.work`` yields: one row a stretch of work; laid_at null while it goes on."""


@dataclass(frozen=True)
class Told:
    """What the replay says of a comparison by a day's cut-off."""

    looks: tuple[matched_test.Look, ...] = ()
    why_none: str = ""
    """Why there is no replay at all; empty where there is one."""
    answered: bool = False
    """Whether a person has answered an alert: then there is none any more, and the exact test goes on."""

    @property
    def found(self) -> matched_test.Look | None:
        """The first look that found harm: once reached it stays reached."""
        return next((look for look in self.looks if look.alert == "ROLLBACK"), None)

    @property
    def alarm(self) -> matched_test.Look | None:
        """The first look with an alert; None where a person has answered it."""
        return None if self.answered else next((look for look in self.looks if look.alert == "HOLD"), None)

    @property
    def verdict(self) -> matched_test.Alert:
        """ROLLBACK, HOLD, CONTINUE, or INCONCLUSIVE where the replay may not speak."""
        if self.found is not None:
            return "ROLLBACK"
        if self.alarm is not None:
            return "HOLD"
        last = self.looks[-1].alert if self.looks else "INCONCLUSIVE"
        return "CONTINUE" if last == "HOLD" else last

    @property
    def reasons(self) -> tuple[str, ...]:
        """What people are told of it."""
        look = self.found or self.alarm or (self.looks[-1] if self.looks else None)
        said = look.reasons if look is not None else ()
        return (self.why_none,) if self.why_none else said

    def figures(self) -> dict[str, Any]:
        """For the verdict's figures: the newest look, and why it says no more."""
        told: dict[str, Any] = {"verdict": self.verdict, "reasons": list(self.reasons)}
        if self.looks:
            last = self.looks[-1]
            e = last.effect
            told |= {
                "d": e.d, "se_d": e.se_d, "o": e.o, "se_o": e.se_o, "effort_z": last.effort, "statistic": last.statistic,
                "bound": last.bound,
            }  # fmt: skip
        return told


def judge(
    workflow: Workflow, lake: Lake, ledger: Ledger, *, treated: str, control: str, since: date, day: date, alpha: float,
    seed: int, answered: bool = False,
) -> Told:  # fmt: skip
    """Every look at a comparison with the status quo, up to ``day`` and with what was known at its cut-off.

    Args:
        treated, control: Arms; ``control`` is left at the status quo.
        since: The first day whose decisions are compared; they act from the day after on.
        alpha: Chance of a false ROLLBACK over all looks, at most.
        seed: Of the permutations.
        answered: Whether a person has let the version go on: alerts count no more.

    Raises StageSqlError where SQL of the folder fails or lacks a column.
    """
    spec, regression = _spec(workflow), workflow.regression
    assert regression is not None, "a replay is a part of the section regression"
    start = since + timedelta(days=1)
    if control != "holdout":
        return Told(why_none="a replay compares with the status quo, and here both arms are decided by a model")
    if spec.work is None:
        return Told(why_none="no roster: regression.replay.work names no SQL that tells who worked when")
    length = (day - start).days + regression.pre_days + EARLIER_DAYS
    tickets, work = _read(workflow, lake, spec.tickets, spec.work, day, length)
    first = start - timedelta(days=regression.pre_days)
    decided = in_effect.decided(ledger, workflow.name, first - timedelta(days=EARLIER_DAYS), day - timedelta(days=1))
    acted = sorted(d for d in set(decided["decided_day"].to_pylist()) if d >= since)
    drawn = drawn_units(lake, workflow.table("arms"), day)
    drawn = drawn.filter(pc.is_in(drawn["arm"], value_set=pa.array([treated, control])))
    if not acted or not drawn.num_rows:
        return Told(why_none="nothing of what is compared has acted yet")
    usual = _usual(decided)
    asked, lacking = _asked(workflow, lake, usual, acted)
    if lacking:
        return Told(why_none=lacking)
    queue = _Queue(workflow, tickets, work, usual, asked, first, start, day)
    if not np.isfinite(queue.means).all():
        return Told(
            why_none="no effort was logged before the comparison began: regression.replay.tickets, effort_hours"
        )
    weeks = queue.live(acted, drawn, treated)
    replayed = QueueReplay(weeks, queue.before(sorted(set(drawn["unit"].to_pylist()))), queue.means)
    last = min((day - start).days, regression.horizon_days - 1)
    ends = [float(k + 1) for k in range(regression.burn_in_days, last + 1)]
    instants = [queue.hours(start) + day_ * _DAY for day_ in ends]
    looks = [(day_, replayed.at(now)) for day_, now in zip(ends, instants, strict=True)]
    terms = matched_test.MatchedSpec(
        alpha=alpha, margin=spec.margin, horizon=float(regression.horizon_days), permutations=regression.permutations,
        min_clusters=regression.min_clusters,
    )  # fmt: skip
    told = matched_test.judge(
        looks, spec=terms, seed=seed, again=lambda k, shift: replayed.shifted(shift).at(instants[k])
    )
    return Told(tuple(told), answered=answered)


def _spec(workflow: Workflow) -> Replay:
    assert workflow.regression is not None and workflow.regression.replay is not None, (
        "asked where a replay is declared"
    )
    return workflow.regression.replay


def _read(workflow: Workflow, lake: Lake, tickets: str, work: str, day: date, length: int) -> tuple[pa.Table, pa.Table]:
    found = point_in_time.selected(workflow, lake, [tickets, work], day, length)
    made = []
    for table, schema, path in zip(found, (TICKETS, WORK), (tickets, work), strict=True):
        lacking = [c for c in schema.names if c not in table.schema.names]
        if lacking:
            raise duckdb_session.StageSqlError(
                f"{workflow.folder / path}: yields no {', '.join(lacking)}, which regression.replay in "
                f"{workflow.folder / 'workflow.yaml'} needs; it yields {', '.join(table.schema.names)}"
            )
        made.append(table.select(schema.names).cast(schema))
    return made[0], made[1]


# --- two orders -------------------------------------------------------------------------------------------------------


def _usual(decided: pa.Table) -> pa.Table:
    """entity_id, decided_day, value: what people wanted of each ticket on each day that acted.

    What stood before a decision is people's, unless it is what we ourselves had left there: then what they wanted before that.
    """
    rows = decided.sort_by([("entity_id", "ascending"), ("decided_day", "ascending")])
    n = rows.num_rows
    entity = np.asarray(rows["entity_id"].combine_chunks().dictionary_encode().indices)
    before, stood = (np.asarray(rows[c].cast(pa.float64()).fill_null(float("nan"))) for c in ("before", "standing"))
    theirs = np.ones(n, dtype=bool)
    theirs[1:] = (entity[1:] != entity[:-1]) | (before[1:] != stood[:-1])
    at = np.maximum.accumulate(np.where(theirs, np.arange(n), 0)) if n else np.zeros(0, dtype=np.int64)
    return pa.table({"entity_id": rows["entity_id"], "decided_day": rows["decided_day"], "value": before[at]})


def _asked(workflow: Workflow, lake: Lake, usual: pa.Table, acted: Sequence[date]) -> tuple[pa.Table, str]:
    """As ``_usual``, what the policy would have set had every unit been treated; and what lacks for it."""
    column, made = scoring.status_quo(workflow), []
    previous: pa.Table | None = None
    for day in acted:
        stored = lake.read(workflow.table("scoring"), days=[day]).to_pylist()
        try:
            if not stored:
                raise TableMissing(f"{day} was never scored")
            features = decide.features_of(
                workflow, lake, day, stored[0]["features_version"], stored[0].get("standing_version")
            )
            scores = tables.scores_of(workflow, lake, day, stored[0])
        except TableMissing as gone:
            return usual.slice(0, 0), f"what was asked for on {day} cannot be decided anew: {gone}"
        today = usual.filter(pc.equal(usual["decided_day"], pa.scalar(day, pa.date32())))
        stands = _carried(today, previous)
        place = pc.index_in(features["entity_id"], value_set=today["entity_id"].combine_chunks())
        kind = features.schema.field(column).type
        value = pc.coalesce(pa.chunked_array([pa.array(stands)]).take(place).cast(kind), features[column])
        features = features.set_column(features.schema.get_field_index(column), column, value)
        units = pc.unique(decide.of_policy(workflow, features)["unit"])
        n = len(units)
        everyone = pa.table({"unit": units, "arm": ["champion"] * n, "arm_probability": [1.0] * n})
        decisions, _ = decide.decide(workflow, day, features, scores, everyone, stored[0]["step"])
        previous = pa.table(
            {
                "entity_id": decisions["entity_id"],
                "decided_day": pa.array([day] * decisions.num_rows, pa.date32()),
                "value": decisions["after"].cast(pa.float64()),
                "usual": pa.chunked_array([today["value"].combine_chunks()]).take(
                    pc.index_in(decisions["entity_id"], value_set=today["entity_id"].combine_chunks())
                ),
            }
        )
        made.append(previous.drop_columns(["usual"]))
    return pa.concat_tables(made), ""


def _carried(today: pa.Table, previous: pa.Table | None) -> Floats:
    """What would stand before a day's decisions: what the last one would have left, where people want the same as then."""
    value = np.asarray(today["value"])
    if previous is None or not previous.num_rows:
        return value
    place = pc.index_in(today["entity_id"], value_set=previous["entity_id"].combine_chunks())
    at = np.asarray(pc.fill_null(place, -1)).astype(np.int64)
    left, wanted = (np.asarray(previous[c].cast(pa.float64()).fill_null(float("nan"))) for c in ("value", "usual"))
    return np.where((at >= 0) & (wanted[at] == value), left[at], value)


def _by_day(names: pa.Array, orders: pa.Table, first: date, days: int, otherwise: Floats) -> Floats:
    """The value that holds for each ticket on each day, shape (days, tickets): a day's decision holds from the next day on."""
    n = len(names)
    out = np.full((days, n), np.nan)
    who = np.asarray(pc.fill_null(pc.index_in(orders["entity_id"], value_set=names), -1)).astype(np.int64)
    when = (np.asarray(orders["decided_day"]).astype(_DATES) - np.datetime64(first)).astype(np.int64) + 1
    fits = (who >= 0) & (when < days)
    order = np.argsort(when[fits], kind="stable")  # what was decided before the first day holds on it, the newest of it
    out[np.maximum(when[fits][order], 0), who[fits][order]] = np.asarray(orders["value"])[fits][order]
    at = np.maximum.accumulate(np.where(np.isfinite(out), np.arange(days)[:, None], -1), axis=0)
    held = np.take_along_axis(out, np.maximum(at, 0), axis=0)
    return np.where(at >= 0, held, otherwise)


# --- weeks ------------------------------------------------------------------------------------------------------------


class _Queue:
    """Tickets, work and orders as arrays; times in hours since the midnight of the pre-period's first day."""

    def __init__(
        self, workflow: Workflow, tickets: pa.Table, work: pa.Table, usual: pa.Table, asked: pa.Table, first: date,
        start: date, day: date,
    ) -> None:  # fmt: skip
        self.workflow, self.first, self.start = workflow, first, start
        self.days = (day - first).days + workflow.arms.epoch + 1
        names = tickets["entity_id"].combine_chunks()
        self.unit = np.asarray(tickets["unit"].to_pylist(), dtype=object)
        self.arrived, self.due, self.resolved = (
            self._since(tickets[c]) for c in ("arrived_at", "due_at", "resolved_at")
        )
        self.due = np.where(np.isfinite(self.due), self.due, np.inf)
        self.effort = np.asarray(tickets["effort_hours"].fill_null(float("nan")))
        self.effort = np.where(self.effort > 0, self.effort, np.nan)
        self.category = np.asarray(tickets["category"].combine_chunks().dictionary_encode().indices).astype(np.int64)
        self.moved = np.asarray(tickets["moved"].fill_null(False))
        given = np.asarray(tickets["priority"].cast(pa.float64()).fill_null(float("inf")))
        self.usual = _by_day(names, usual, first, self.days, given)
        told = _by_day(names, asked, first, self.days, np.full(len(names), np.nan))
        self.asked = np.where(np.isfinite(told), told, self.usual)
        self.means = self._means()
        self.hands = _hands(work)
        self._stretches = self._work(names, work)

    def hours(self, day: date) -> float:
        """The midnight that a day begins with."""
        return (day - self.first).days * _DAY

    def _since(self, column: pa.ChunkedArray) -> Floats:
        at = np.asarray(column.cast(pa.timestamp("us"))).astype("datetime64[us]")
        return np.asarray((at - np.datetime64(datetime.combine(self.first, datetime.min.time()), "us")) / _HOUR)

    def _means(self) -> Floats:
        """Mean effort by category of what was resolved before the comparison began; of all categories where one has none."""
        known = np.isfinite(self.effort) & (self.resolved <= self.hours(self.start))
        size = int(self.category.max()) + 1 if len(self.category) else 1
        if not known.any():
            return np.full(size, np.nan)
        sums = np.bincount(self.category[known], self.effort[known], size)
        counts = np.bincount(self.category[known], minlength=size)
        return np.where(counts > 0, sums / np.maximum(counts, 1), float(self.effort[known].mean()))

    def _work(self, names: pa.Array, work: pa.Table) -> list[tuple[str, Ints, Floats, Floats]]:
        """By unit: the ticket of each stretch of work, and the unit's hours of service by which it was begun and laid down."""
        who = np.asarray(pc.fill_null(pc.index_in(work["entity_id"], value_set=names), -1)).astype(np.int64)
        unit = np.asarray(work["unit"].to_pylist(), dtype=object)
        begun, laid = self._since(work["begun_at"]), self._since(work["laid_at"])
        self._opened: dict[str, tuple[float, float]] = {}
        found = []
        for name in dict.fromkeys(unit.tolist()):
            mine = (unit == name) & (who >= 0)
            self._opened[name] = _opening(begun[mine], laid[mine])
            found.append((name, who[mine], *(self._served(name, at) for at in (begun[mine], laid[mine]))))
        return found

    def _served(self, unit: str, at: Floats) -> Floats:
        """Hours of a unit's service, on the days on which somebody was seen at work in it, up to each instant (NaN: to the end)."""
        opens, closes = self._opened[unit]
        seen = sorted((d - self.first).days for u, d in self.hands if u == unit)
        x = np.array([d * _DAY + h for d in seen for h in (opens, closes)])
        y = np.repeat(np.arange(len(seen)) * (closes - opens), 2) + np.tile([0.0, closes - opens], len(seen))
        return np.interp(np.where(np.isfinite(at), at, np.inf), x, y) if len(seen) else np.zeros(len(at))

    def _done(self, at: float) -> Floats:
        """Hours worked on each ticket before an instant."""
        done = np.zeros(len(self.unit))
        for unit, who, begun, laid in self._stretches:
            until = self._served(unit, np.array([at]))[0]
            done += np.bincount(who, np.maximum(np.minimum(laid, until) - begun, 0.0), len(done))
        return done

    def _shifts(self, unit: str, begins: date, ends: date) -> Shifts | None:
        """The hands that were seen, with those expected of a day from its last weekday before the week; None: nobody is known."""
        seen = {d: hands for (u, d), hands in self.hands.items() if u == unit}
        if not seen:
            return None
        opens, closes = self._opened[unit]
        usual: dict[int, float] = {}
        for d in sorted(d for d in seen if d < begins):
            usual[d.weekday()] = seen[d]
        week = [begins + timedelta(days=k) for k in range((ends - begins).days)]
        there = [d for d in week if d in seen or d.weekday() in usual]
        if not there:
            return None
        at = np.array([self.hours(d) for d in there])
        hands = np.array([seen.get(d, 0.0) for d in there])
        return Shifts(at + opens, at + closes, hands, np.array([usual.get(d.weekday(), 0.0) for d in there]))

    def _week(
        self, unit: str, number: int, treated: bool, begins: date, ends: date, done: Floats, washout: int
    ) -> TeamWeek:
        start, end = self.hours(begins), self.hours(ends)
        shifts = self._shifts(unit, begins, ends)
        mine = np.flatnonzero((self.unit == unit) & (self.arrived < end) & ~(self.resolved <= start))
        days = np.zeros(0, dtype=np.int64) if shifts is None else (shifts.opens // _DAY).astype(np.int64)
        return TeamWeek(
            team=0, week=number, treated=treated, start=start, end=end, opened=self.arrived[mine], due=self.due[mine],
            resolved=self.resolved[mine], effort=self.effort[mine], done=done[mine], category=self.category[mine],
            usual=self.usual[days][:, mine], asked=self.asked[days][:, mine], moved=self.moved[mine], shifts=shifts,
            counts_from=start + washout * _DAY, label=f"{unit} from {begins} on",
        )  # fmt: skip

    def live(self, acted: Collection[date], drawn: pa.Table, treated: str) -> list[TeamWeek]:
        """The weeks of the epochs in which something acted, of every unit that was drawn into one of the two arms."""
        spec = self.workflow.arms
        epochs = sorted({arms.epoch_of(d, self.workflow.start, spec.epoch, spec.washout)[0] for d in acted})
        teams = {name: k for k, name in enumerate(sorted(set(drawn["unit"].to_pylist())))}
        weeks = []
        for number, epoch in enumerate(epochs):
            begins = date.fromisoformat(epoch) + timedelta(days=1)
            ends, washed = begins + timedelta(days=spec.epoch), spec.washout if begins > self.start else 0
            begins = max(begins, self.start)
            done = self._done(self.hours(begins))
            for row in drawn.filter(pc.equal(drawn["epoch"], epoch)).to_pylist():
                one = self._week(row["unit"], number, row["arm"] == treated, begins, ends, done, washed)
                weeks.append(replace(one, team=teams[row["unit"]]))
        return weeks

    def before(self, units: Iterable[str]) -> list[TeamWeek]:
        """The pre-period's weeks."""
        weeks, step = [], self.workflow.arms.epoch
        names = list(units)
        for number in range((self.start - self.first).days // step):
            begins = self.first + timedelta(days=number * step)
            done = self._done(self.hours(begins))
            for k, unit in enumerate(names):
                one = self._week(unit, number, False, begins, begins + timedelta(days=step), done, 0)
                weeks.append(replace(one, team=k))
        return [one for one in weeks if one.shifts is not None]


def _opening(begun: Floats, laid: Floats) -> tuple[float, float]:
    """The hours of a day between which a unit begins and lays down work."""
    at, until = begun[np.isfinite(begun)] % _DAY, laid[np.isfinite(laid)] % _DAY
    return float(at.min()) if len(at) else 0.0, max(float(until.max()) if len(until) else _DAY, float(at.min()) + 0.5)


def _hands(work: pa.Table) -> dict[tuple[str, date], float]:
    """How many people were seen at work by unit and day: who began or laid down something, or worked on through a day on which
    somebody did."""
    with duckdb_session.engine() as connection:
        connection.register("work", work)
        rows = connection.sql(
            """
            WITH stretches AS (SELECT unit, worker, CAST(begun_at AS DATE) AS a, CAST(laid_at AS DATE) AS b FROM work),
            days AS (SELECT unit, a AS day FROM stretches UNION SELECT unit, b FROM stretches WHERE b IS NOT NULL)
            SELECT d.unit, d.day, CAST(count(DISTINCT s.worker) AS DOUBLE) AS hands
            FROM days AS d JOIN stretches AS s ON s.unit = d.unit AND s.a <= d.day AND coalesce(s.b >= d.day, true)
            GROUP BY d.unit, d.day"""
        ).fetchall()
    return {(unit, day): hands for unit, day, hands in rows}
