"""How the loop itself is doing: what it promoted, retrained and took back, how fast, how often people had to step in, and
what is open now. All of it from the ledger.

Belongs here: the figures and their definitions, as one document, one table and one picture. Does not: how models or
decisions are doing (``pipeline.monitoring.labels``, ``pipeline.monitoring.verdicts``), or starting anything.

**Rollback**: what was asked for once. Batches and a version that are taken back for the same reason by the same trigger
within a day are one, and so is asking again for a batch of it. It is *automatic* where a guard triggered it. It *began to
do harm* when the first push of its first batch began (a version that only held a canary's arm: when the canary began). It was
*noticed* by the first verdict ROLLBACK over its version or guard over its batches, else when it was asked for. It was
*restored* when the rollback of its last batch was complete (a version without batches: when it was taken out).
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from typing import Any

import pyarrow as pa

from delivery import approvals
from delivery.abort_rules import TRIED
from delivery.ledger import BatchRow, Event, Ledger, Promotion
from pipeline import dispatch
from pipeline.decisions import in_effect
from pipeline.decisions.tables import STEPS
from pipeline.lifecycle import hold, state
from pipeline.monitoring import verdicts
from pipeline.workflow import Workflow

WINDOW_DAYS = 30
SAME = timedelta(days=1)
FALSE_WITHIN = timedelta(days=14)
"""A version that a person lets act again within this time of its rollback was taken back for nothing."""
OVERRIDES = ("CONFLICT", "OVERWRITTEN")
NOBODY = "somebody whose name was erased"

TABLE = pa.schema(
    {
        "day": pa.date32(),
        "window_days": pa.int64(),
        "promotions": pa.int64(),
        "refused": pa.int64(),
        "held_for_a_person": pa.int64(),
        "behind_the_rule": pa.int64(),
        "retrainings": pa.int64(),
        "triggers_held": pa.int64(),
        "rollbacks": pa.int64(),
        "automatic_rollbacks": pa.int64(),
        "automatic_share": pa.float64(),
        "hours_to_notice": pa.float64(),
        "hours_to_restore": pa.float64(),
        "hours_from_harm_to_restored": pa.float64(),
        "rollbacks_open": pa.int64(),
        "false_rollbacks": pa.int64(),
        "deliveries": pa.int64(),
        "overrides": pa.int64(),
        "override_share": pa.float64(),
        "rejected": pa.int64(),
        "days_decided": pa.int64(),
        "days_undecided": pa.int64(),
        "deadline_misses": pa.int64(),
        **{f"days_by_{step}": pa.int64() for step in STEPS},
    }
)
"""``<workflow>/health``: one row a day, over the ``window_days`` before it. Shares and hours are null where nothing happened."""


@dataclass
class Incident:
    """One rollback as the module defines it."""

    reason: str
    automatic: bool
    asked: datetime
    last: datetime
    batches: dict[str, datetime | None] = field(default_factory=dict)
    """When the rollback of each was complete; None: it is not."""
    versions: dict[int, datetime] = field(default_factory=dict)
    """When each was taken out."""
    began: datetime | None = None
    noticed: datetime | None = None
    lifted: bool = False
    """A person let its version act again within FALSE_WITHIN."""

    @property
    def restored(self) -> datetime | None:
        """When all of it was back; None: not yet."""
        ended = list(self.batches.values())
        if any(at is None for at in ended):
            return None
        return max([*(at for at in ended if at is not None), *self.versions.values()])

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        times = {name: _said(getattr(self, name)) for name in ("began", "noticed", "asked", "restored")}
        return {
            **times, "automatic": self.automatic, "reason": self.reason, "batches": len(self.batches),
            "versions": sorted(self.versions), "lifted": self.lifted,
        }  # fmt: skip


@dataclass(frozen=True)
class Health:
    """A workflow's loop at a moment: ``figures`` over the window (the columns of TABLE without the day), what is open
    ``now``, ``months`` and ``days`` for a picture, and every rollback of the window."""

    workflow: str
    until: datetime
    as_of: datetime
    """Where the window of the figures ends; what is open ``now`` is that of ``until``."""
    figures: dict[str, Any]
    causes: dict[str, int]
    now: dict[str, Any]
    months: tuple[dict[str, Any], ...]
    days: tuple[dict[str, Any], ...]
    rollbacks: tuple[Incident, ...]

    def as_dict(self) -> dict[str, Any]:
        """The document of ``signalbox status --json`` for one workflow: no NaN, times ISO 8601 UTC."""
        return {
            "workflow": self.workflow, "as_of": self.as_of.isoformat(), "figures": self.figures,
            "retrainings_by_cause": self.causes, "now": self.now, "months": list(self.months), "rollbacks": [one.as_dict() for one in self.rollbacks],
        }  # fmt: skip

    def row(self, day: date) -> dict[str, Any]:
        """Its row of TABLE."""
        return {"day": day, **self.figures}


def examine(ledger: Ledger, workflow: Workflow, *, until: datetime, window_days: int = WINDOW_DAYS) -> Health:
    """What the ledger says of a workflow's loop at ``until`` (naive UTC); reads it, changes nothing.

    Events after ``until`` do not count. What became of deliveries is as it stands in the ledger. A day is told by the batch that
    acted, else by the newest that was decided in time for it; what was decided afterwards and never sent changes nothing of
    what is told. Where nothing was decided for as long as the window is, the window ends with the last day that was: the figures
    of a loop that stands still are those from before it stopped, and what people did to it since. What is open is always that
    of ``until``.
    """
    name = workflow.name
    batches = [b for b in ledger.batches(name, kind="decision") if b.recorded_at <= until]
    told_by = in_effect.told(batches)
    last = in_effect.over(max(told_by)) if told_by else until
    as_of = last if last < until - timedelta(days=window_days) else until
    since = as_of - timedelta(days=window_days)
    events = [e for e in ledger.events(workflow=name) if e.at <= until]
    lifecycle = state.LifecycleState.read(ledger, name)
    moves = [p for p in lifecycle.moves if p.at <= until]
    promoted = [p for p in moves if p.action == "promoted" and "heir of" not in p.evidence]
    triggers = [e for e in events if e.kind == "trigger"]
    asked = [e for e in triggers if e.body["action"] == "asked"]
    told = _incidents(ledger, batches, events, moves, until)
    recent = tuple(one for one in told if one.asked > since)
    daily = _days(workflow, told_by, batches, as_of)
    mine = [d for d in daily if d["day"] > since.date() - timedelta(days=1)]
    tried, overrides, rejected = (sum(d[k] for d in mine) for k in ("deliveries", "overrides", "rejected"))
    decided = [d for d in mine if d["step"] is not None]
    automatic = sum(one.automatic for one in recent)
    steps = Counter(d["step"] for d in decided)
    figures = {
        "window_days": window_days,
        "promotions": sum(p.at > since for p in promoted),
        "refused": sum(p.at > since and p.action == "refused" for p in moves),
        "held_for_a_person": sum(p.at > since and p.action == "held" for p in moves),
        "behind_the_rule": int(lifecycle.behind(ledger, name, as_of) is not None),
        "retrainings": sum(e.at > since for e in asked),
        "triggers_held": sum(e.at > since for e in triggers) - sum(e.at > since for e in asked),
        "rollbacks": len(recent),
        "automatic_rollbacks": automatic,
        "automatic_share": _share(automatic, len(recent)),
        "hours_to_notice": _mean_hours((one.began, one.noticed) for one in recent),
        "hours_to_restore": _mean_hours((one.noticed, one.restored) for one in recent),
        "hours_from_harm_to_restored": _mean_hours((one.began, one.restored) for one in recent),
        "rollbacks_open": sum(one.restored is None for one in told),
        "false_rollbacks": sum(one.lifted for one in recent),
        "deliveries": tried,
        "overrides": overrides,
        "override_share": _share(overrides, tried),
        "rejected": rejected,
        "days_decided": len(decided),
        "days_undecided": len(mine) - len(decided),
        "deadline_misses": sum(d["late"] for d in mine),
        **{f"days_by_{step}": steps[step] for step in STEPS},
    }
    causes = Counter(str(e.body["cause"]) for e in asked if e.at > since)
    return Health(
        name, until, as_of, figures, dict(sorted(causes.items())), _now(ledger, workflow, lifecycle, batches, until),
        _months(promoted, asked, told, daily), tuple(daily), recent,
    )  # fmt: skip


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _mean_hours(pairs: Iterable[tuple[datetime | None, datetime | None]]) -> float | None:
    """Between the two times, averaged over those that have both."""
    known = [(b - a).total_seconds() / 3600 for a, b in pairs if a is not None and b is not None]
    return sum(known) / len(known) if known else None


def _said(at: datetime | date | None) -> str | None:
    return None if at is None else at.isoformat()


def _incidents(
    ledger: Ledger, batches: Sequence[BatchRow], events: Sequence[Event], moves: Sequence[Promotion], until: datetime
) -> list[Incident]:
    """Every rollback, oldest first."""
    ours = {b.batch_id for b in batches}
    rows: list[tuple[datetime, str, bool, str | None, int | None, bool]] = [
        (r.at, r.reason, r.trigger == "guard", r.batch_id, None, r.action in ("complete", "closed"))
        for r in ledger.rollbacks()
        if r.batch_id in ours and r.at <= until
    ]
    rows += [
        (p.at, str(p.evidence.get("reason", "")), p.evidence.get("trigger") == "guard", None, p.version, True)
        for p in moves
        if p.action == "rolled back"
    ]
    told: list[Incident] = []
    # the model goes before its batches: at the same instant, too
    for at, reason, automatic, batch, version, ended in sorted(rows, key=lambda r: (r[0], r[3] is not None)):
        known = next((one for one in reversed(told) if batch is not None and batch in one.batches), None) or next(
            (o for o in told if (o.reason, o.automatic) == (reason, automatic) and at - o.last <= SAME), None
        )
        if known is None:
            known = Incident(reason, automatic, at, at)
            told.append(known)
        known.last = at
        if batch is not None:
            known.batches[batch] = at if ended else known.batches.get(batch)
        elif version is not None:
            known.versions[version] = at
    began: dict[str, datetime] = {}
    for event in events:
        if event.kind == "push begun":
            began.setdefault(event.body["batch_id"], event.at)
    for one in told:
        acted = [began[b] for b in one.batches if b in began]
        acted = acted or [
            p.at for p in moves if p.action == "canary" and p.version in one.versions and p.at <= one.asked
        ]
        one.began = min(acted, default=None)
        seen = [e.at for e in events if e.at <= one.asked and _speaks(e, one)]
        one.noticed = min([at for at in seen if one.began is None or at >= one.began], default=one.asked)
        one.lifted = any(
            p.action == "lifted" and p.version in one.versions
            and timedelta(0) <= p.at - one.versions[p.version] <= FALSE_WITHIN
            for p in moves if p.version is not None
        )  # fmt: skip
    return told


def _speaks(event: Event, one: Incident) -> bool:
    """Whether an event says that what was taken back does harm."""
    if event.kind == dispatch.GUARD:
        return bool(event.body["rollback"]) and event.body["batch_id"] in one.batches
    return (
        event.kind == verdicts.VERDICT and event.body["verdict"] == "ROLLBACK" and event.body["version"] in one.versions
    )


def _days(
    workflow: Workflow, told_by: Mapping[date, BatchRow], batches: Sequence[BatchRow], until: datetime
) -> list[dict[str, Any]]:
    """Every day from the first decided one to the newest that should be: its step, whether it was late, its deliveries.

    A day has the step of the batch by which it is told; one that has none (a backfill is none) has no step, and is late once
    its deadline has passed. A batch is late where its scoring said so, or where it was decided after the deadline. Deliveries
    are those of all of the day's batches that met the downstream system.
    """
    if not told_by:
        return []
    sent: dict[date, Counter[str]] = {}
    for batch in batches:
        sent.setdefault(batch.day, Counter()).update(batch.counts)
    told, day = [], min(told_by)
    while day in told_by or day < max(told_by) or workflow.deadline_of(day) < until:
        b, states = told_by.get(day), sent.get(day, Counter())
        in_time = b is not None and not b.record.get("late") and b.decided_at <= workflow.deadline_of(day)
        told.append({
            "day": day, "step": b.step if b is not None else None, "late": not in_time,
            "deliveries": sum(states.get(s, 0) for s in TRIED), "overrides": sum(states.get(s, 0) for s in OVERRIDES),
            "rejected": states.get("REJECTED", 0),
        })  # fmt: skip
        day += timedelta(days=1)
    return told


def _months(
    promoted: Sequence[Promotion], asked: Sequence[Event], told: Sequence[Incident], daily: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, Any], ...]:
    """Counts by calendar month (UTC), oldest first; a month in which nothing happened between two others stands, too."""
    found: dict[str, Counter[str]] = {}
    for what, times in (
        ("promotions", [p.at for p in promoted]),
        ("retrainings", [e.at for e in asked]),
        ("rollbacks", [one.asked for one in told]),
        ("automatic_rollbacks", [one.asked for one in told if one.automatic]),
        ("deadline_misses", [d["day"] for d in daily if d["late"]]),
        ("days", [d["day"] for d in daily]),
    ):
        for at in times:
            found.setdefault(f"{at:%Y-%m}", Counter())[what] += 1
    names = ("promotions", "retrainings", "rollbacks", "automatic_rollbacks", "deadline_misses")
    return tuple({"month": month, **{name: found[month][name] for name in names}} for month in sorted(found))


def _now(
    ledger: Ledger, workflow: Workflow, lifecycle: state.LifecycleState, batches: Sequence[BatchRow], now: datetime
) -> dict[str, Any]:
    """Who is live at ``now``, and what is open by the newest that the ledger knows."""
    name = workflow.name
    stop, live = ledger.stopped(name), lifecycle.live(now)
    every = [b for b in ledger.batches(name) if b.recorded_at <= now]
    newest = {b.day: b for b in sorted(batches, key=lambda b: b.sequence)}
    delivered = (b.day for rows in in_effect.by_day(batches).values() for b in rows if b.delivery == "COMPLETE")
    four_eyes = workflow.delivery.approval.four_eyes if workflow.delivery is not None else False
    held = []
    for b in newest.values():
        if b.status == "HELD" and b.delivery == "NONE" and now < in_effect.over(b.day):
            stands = approvals.standing(ledger, b, now, four_eyes)
            if not stands.ok:
                held.append({"batch": b.batch_id, "day": _said(b.day), "approvals_missing": stands.missing,
                             "until": _said(in_effect.over(b.day)), "says": stands.text})  # fmt: skip
    condemned: list[dict[str, Any]] = [
        {"batch": batch, "version": None, "says": says} for batch, says in dispatch.condemned(ledger, workflow)
    ]
    condemned += [
        {"batch": batch, "version": one.version, "says": one.reason}
        for one in verdicts.condemned(ledger, workflow)
        for batch in one.batches or (None,)
        if batch not in {c["batch"] for c in condemned} or batch is None
    ]
    challenger, behind = live["challenger"], lifecycle.behind(ledger, name, now)
    return {
        "stopped": None if stop is None else {"by": stop.actor or NOBODY, "since": _said(stop.at), "reason": stop.reason},
        "held": held,
        "open_pushes": [
            {"batch": b.batch_id, "kind": b.kind, "day": _said(b.day), "states": dict(sorted(b.counts.items()))}
            for b in every if b.delivery == "OPEN"
        ],
        "condemned": condemned,
        "on_hold": [{"version": one.version, "says": one.text} for one in hold.standing(ledger, name).values()],
        "champion": live["champion"],
        "champion_since": _said(live["since"].get("champion")),
        "behind_the_rule": None if behind is None else {"since": _said(behind.at), "says": str(behind.body["text"])},
        "challenger": None if challenger is None else {"version": challenger[0], "stage": challenger[1]},
        "versions_held": lifecycle.held(now),
        "blocked": list(live.get("blocked", ())),
        "newest_day_decided": _said(max(in_effect.told(batches), default=None)),
        "newest_day_delivered": _said(max(delivered, default=None)),
    }  # fmt: skip


# --- for people -------------------------------------------------------------------------------------------------------


def lines(health: Health) -> list[str]:
    """A workflow's loop for a terminal."""
    f, now, days = health.figures, health.now, f"last {health.figures['window_days']} days"
    if not health.days and not health.months:
        told = [f"{health.workflow}: nothing yet, no day was decided"]
    else:
        told = [f"{health.workflow}: newest day decided {now['newest_day_decided'] or 'none'}, delivered "
                f"{now['newest_day_delivered'] or 'none'}"]  # fmt: skip
    if health.as_of < health.until:
        days = f"{f['window_days']} days to {health.as_of:%Y-%m-%d}"
        told.append("  STANDS STILL: no day was decided since")
    champion = f"version {now['champion']} since {(now['champion_since'] or '')[:16]}" if now["champion"] else "none"
    other = now["challenger"]
    told.append(f"  champion: {champion}" + (f"; version {other['version']} in {other['stage']}" if other else ""))
    if now["behind_the_rule"]:
        told.append(
            f"  THE RULE DECIDES since {now['behind_the_rule']['since'][:16]}: {now['behind_the_rule']['says']}"
        )
    if now["versions_held"]:
        told.append(f"  held by their gate for a person: version {', '.join(map(str, now['versions_held']))}")
    if now["stopped"]:
        told.append(
            f"  STOPPED by {now['stopped']['by']} since {now['stopped']['since'][:16]}: {now['stopped']['reason']}"
        )
    told += [f"  ON HOLD: {one['says']}" for one in now["on_hold"]]
    told += [f"  held: {one['says']}" for one in now["held"]]
    told += [f"  open push: {one['batch']} {one['states']}" for one in now["open_pushes"]]
    told += [
        f"  to be taken back: {one['batch'] or 'version ' + str(one['version'])}: {one['says']}"
        for one in now["condemned"]
    ]
    causes = ", ".join(f"{n} {cause}" for cause, n in health.causes.items())
    told.append(f"  {days}: {f['promotions']} promotions, {f['refused']} refused, "
                f"{f['held_for_a_person']} held for a person; {f['retrainings']} retrainings"
                f"{f' ({causes})' if causes else ''}, {f['triggers_held']} triggers held back")  # fmt: skip
    restored = _hours(f["hours_from_harm_to_restored"])
    told.append(
        f"  {f['rollbacks']} rollbacks, {f['automatic_rollbacks']} automatic, {f['false_rollbacks']} lifted again, "
        f"{f['rollbacks_open']} not complete; from harm to restored {restored}"
    )
    told.append(
        f"  {f['deliveries']} deliveries: {f['overrides']} overridden by people ({_percent(f['override_share'])}), "
        f"{f['rejected']} rejected"
    )
    bad = ", ".join(f"{f[f'days_by_{step}']} by {step}" for step in STEPS[1:] if f[f"days_by_{step}"])
    told.append(
        f"  {f['days_decided']} days decided{f' ({bad})' if bad else ''}, {f['days_undecided']} not; "
        f"{f['deadline_misses']} deadlines missed"
    )
    return told


def _hours(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f} h"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def plot(health: Health) -> bytes:
    """Months, rollbacks, overrides and steps as one PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.5), dpi=80, layout="constrained")
    if not health.days and not health.months:
        figure.text(0.5, 0.5, "Nothing yet", ha="center")
    else:
        (a, b), (c, d) = figure.subplots(2, 2)
        names = [m["month"] for m in health.months]
        for place, what in enumerate(("promotions", "retrainings", "rollbacks")):
            a.bar(
                [i + 0.27 * (place - 1) for i in range(len(names))], [m[what] for m in health.months], 0.25, label=what
            )
        a.set_xticks(range(len(names)), names)
        a.set_title("a month")
        a.legend(fontsize=7)
        ended = [one for one in health.rollbacks if one.began is not None and one.restored is not None]
        hours = [_mean_hours([(one.began, one.restored)]) or 0.0 for one in ended]
        b.bar(
            [f"{one.asked:%m-%d %H:%M}" for one in ended],
            hours,
            color=["C2" if one.automatic else "C1" for one in ended],
        )
        b.set_title("hours from harm to restored (green: automatic)")
        days = [one["day"] for one in health.days]
        share = [one["overrides"] / one["deliveries"] if one["deliveries"] else 0.0 for one in health.days]
        c.plot(days, share, marker=".")
        c.set_title("share overridden by people")
        order = (*STEPS, None)
        d.scatter(days, [order.index(one["step"]) for one in health.days],
                  c=["firebrick" if one["late"] else "C0" for one in health.days], s=12)  # fmt: skip
        d.set_yticks(range(len(order)), [step or "undecided" for step in order])
        d.set_title("step of each day (red: late)")
        for axes in (a, b, c, d):
            axes.title.set_fontsize(9)
            axes.tick_params(labelsize=7)
        for axes in (b, c, d):
            axes.tick_params(axis="x", rotation=30)
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()
