"""When a retraining is asked for: the order of evidence, what holds a trigger back, and its record in the ledger.

Belongs here: pure functions over what the assets stored, and the ledger's events of kind ``trigger``. Does not: measuring
(``data_checks``), starting a run or looking at one (``orchestration.automation``), training (``assets.training``).

A trigger is the evidence of one judged day. It comes to exactly one of four ends, and the ledger keeps each with its
evidence: ``asked``; ``cooling`` (too soon after a training); ``over budget``; ``merged`` into a training that runs or that
had seen the same days. One that was merged into a run which turns out to have seen less is asked for after it, and one whose
version the gate refused is asked for again after the cooldown, when more outcomes are known: its reason still stands. A
training that a person starts is held back by nothing, and recorded when it is seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from delivery.ledger import Ledger
    from pipeline.lake import Lake
    from pipeline.workflow import Retraining, Workflow

Cause = Literal["rule", "realised", "estimated", "scores", "features", "calendar", "person"]
"""The order of evidence, the strongest first; a calendar and a person ask without any."""
Action = Literal["asked", "merged", "cooling", "over budget"]
ORDER: tuple[Cause, ...] = get_args(Cause)
KIND = "trigger"


@dataclass(frozen=True)
class Evidence:
    """Why a model should be trained anew, as one judged day has it. ``first``: the first day that it speaks of."""

    cause: Cause
    first: date
    text: str
    figures: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """As the ledger keeps it."""
        return {"first": self.first.isoformat(), "text": self.text, "figures": dict(self.figures)}


@dataclass(frozen=True)
class Runs:
    """What is known of a workflow's retrainings, by the day for whose cut-off each was or is trained.

    trained: came to their end. running: unfinished or waiting to start. failed: ended without a model, and no other run
    of the same day did better. refused: trained, and their version was refused by its gate.
    """

    trained: frozenset[date] = frozenset()
    running: frozenset[date] = frozenset()
    failed: frozenset[date] = frozenset()
    refused: frozenset[date] = frozenset()

    @property
    def newest(self) -> date | None:
        """The newest day that a training has seen."""
        return max(self.trained, default=None)


@dataclass(frozen=True)
class Trigger:
    """One trigger with its end. ``window``: the first day that its cause speaks of, and the judged day."""

    workflow: str
    day: date
    cause: Cause
    evidence: tuple[Evidence, ...]
    action: Action
    window: tuple[date, date]
    reason: str
    attempt: int = 1
    at: datetime | None = None

    @property
    def run_key(self) -> str:
        """A run key is remembered for ever: it carries the window and the attempt."""
        return f"{self.workflow}:retrain:{self.cause}:{self.window[0]}:{self.window[1]}:{self.attempt}"

    @property
    def text(self) -> str:
        """The cause in a sentence."""
        said = next((e.text for e in self.evidence if e.cause == self.cause), self.cause)
        return f"{_NAMED[self.cause]} on {self.day}: {said}"

    def body(self) -> dict[str, Any]:
        """The ledger's event."""
        return {
            "workflow": self.workflow,
            "day": self.day.isoformat(),
            "cause": self.cause,
            "evidence": {e.cause: e.as_dict() for e in self.evidence},
            "action": self.action,
            "window": [d.isoformat() for d in self.window],
            "reason": self.reason,
            "attempt": self.attempt,
            "run_key": self.run_key,
            "at": self.at.isoformat() if self.at else None,
        }

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> Trigger:
        """From the ledger's event."""
        first, last = (date.fromisoformat(d) for d in body["window"])
        found = tuple(
            Evidence(cause, date.fromisoformat(e["first"]), e["text"], e["figures"])
            for cause in ORDER
            if (e := body["evidence"].get(cause)) is not None
        )
        return cls(
            body["workflow"], date.fromisoformat(body["day"]), body["cause"], found, body["action"], (first, last),
            body["reason"], body["attempt"], datetime.fromisoformat(body["at"]) if body["at"] else None,
        )  # fmt: skip


_NAMED: dict[Cause, str] = {
    "rule": "it does worse than the rule",
    "realised": "the realised metric fell",
    "estimated": "the estimated performance fell",
    "scores": "the scores drifted",
    "features": "drift",
    "calendar": "the calendar",
    "person": "a person asked",
}


# --- evidence ---------------------------------------------------------------------------------------------------------


def evidence(
    spec: Retraining,
    metric: str,
    performance: Sequence[Mapping[str, Any]],
    drift: Mapping[str, Any] | None,
    *,
    back: int = 1,
) -> tuple[Evidence, ...]:
    """What one judged day says for a retraining, the strongest first.

    performance: that day's rows of the table ``performance``. drift: its row of ``drift``, or None; ``scores_drifted`` may
    be missing. back: how many days a drift window has. A realised fall counts only against the version that scores now,
    which is whom the table's windows speak of; beside the rule that is the newest version that scored.
    """
    found = []
    # worse than the rule by whatever: there is something better at hand
    for cause, limit in (("rule", 0.0), ("realised", spec.realised_limit), ("estimated", spec.estimated_limit)):
        for row in performance:
            fell = row["kind"] == cause and row["metric"] == metric and row["first"] != row["last"]
            if fell and row["worse_low"] is not None and row["worse_low"] > limit:
                kept = (
                    "metric",
                    "value",
                    "low",
                    "high",
                    "baseline",
                    "baseline_is",
                    "worse",
                    "worse_low",
                    "n",
                    "version",
                )
                text = f"{row['text']}, with its interval by more than {row['worse_low']:.1%}; the limit is {limit:.1%}"
                found.append(Evidence(cause, row["first"], text, {k: row[k] for k in kept}))  # type: ignore[arg-type]
    if drift is not None:
        first = drift["day"] - timedelta(days=back - 1)
        figures = {k: drift[k] for k in ("share", "importance_share", "reference") if drift.get(k) is not None}
        for cause, column in (("scores", "scores_drifted"), ("features", "drifted")):
            if drift.get(column):
                found.append(Evidence(cause, first, drift["text"], figures))  # type: ignore[arg-type]
    return tuple(sorted(found, key=lambda e: ORDER.index(e.cause)))


def calendar(day: date, days: int = 7) -> Evidence:
    """The regular retraining: nothing is wrong, time has passed."""
    return Evidence("calendar", day - timedelta(days=days - 1), "the regular retraining")


# --- the decision -----------------------------------------------------------------------------------------------------


def decide(
    workflow: str,
    spec: Retraining,
    found: Mapping[date, Sequence[Evidence]],
    *,
    judged: date,
    past: Sequence[Trigger],
    runs: Runs,
    now: datetime,
) -> list[Trigger]:
    """The triggers that come to an end now, at most one of them ``asked``; empty where nothing is new. A pure function.

    found: evidence by judged day (``evidence``). judged: the newest judged day; evidence more than a window older says
    nothing of now. past: what the ledger has, oldest first. runs: what trains and has trained.
    In turn: what fired and is not yet recorded; what was merged into a run that is over and had seen less; what was asked
    for, and did not come about within ``retry_hours``; what was trained, and refused a cooldown ago.
    """
    made: list[Trigger] = []
    recent = judged - timedelta(days=spec.window_days)
    known = _latest(past)
    for day in sorted((d for d, e in found.items() if e and recent < d <= judged), reverse=True):
        told = tuple(sorted(found[day], key=lambda one: ORDER.index(one.cause)))
        strongest, before = told[0], known.get(day)
        # what was held back comes up again only with stronger evidence of the same day
        if before is not None and (
            before.action in ("asked", "merged") or ORDER.index(before.cause) <= ORDER.index(strongest.cause)
        ):
            continue
        new = Trigger(workflow, day, strongest.cause, told, "asked", (strongest.first, day), "", at=now)
        ended = _held(spec, new, runs, [*past, *made])
        if ended.action == "asked" and made:  # of several days found at once the newest speaks for all
            end: Action = "merged" if made[0].action in ("asked", "merged") else made[0].action
            ended = replace(ended, action=end, reason=f"{made[0].day} speaks for it: {made[0].reason}")
        made.append(ended)
    made.reverse()
    if not any(t.action == "asked" for t in made) and not runs.running:
        again = _again(spec, [*past, *made], runs, now) or _refused(spec, [*past, *made], runs, judged, now)
        if again is not None:
            made.append(again)
    return made


def _latest(past: Sequence[Trigger]) -> dict[date, Trigger]:
    """The last record of each judged day."""
    return {t.day: t for t in past}


def _held(spec: Retraining, trigger: Trigger, runs: Runs, past: Sequence[Trigger]) -> Trigger:
    """The trigger with its end: asked, or what holds it back."""

    def ends(action: Action, reason: str) -> Trigger:
        return replace(trigger, action=action, reason=reason)

    day, newest = trigger.day, runs.newest
    if newest is not None and newest >= day:
        return ends("merged", f"the training for {newest} had seen it")
    if runs.running:
        return ends("merged", f"a training for {max(runs.running)} runs; what it has not seen is asked for after it")
    waiting = [t for t in past if t.action == "asked" and t.day >= day and t.day not in runs.trained | runs.failed]
    if waiting:
        return ends("merged", f"a training for {waiting[-1].day} was asked for")
    cooldown = spec.cooldown_days
    if trigger.cause in ("rule", "realised") and spec.realised_cooldown_days is not None:
        cooldown = spec.realised_cooldown_days
    if newest is not None and (day - newest).days < cooldown:
        return ends("cooling", f"a model was trained for {newest}: cooldown is {cooldown} days")
    return _within_budget(spec, trigger, runs, past)


def _within_budget(spec: Retraining, trigger: Trigger, runs: Runs, past: Sequence[Trigger]) -> Trigger:
    """Asked, unless the days that were trained or asked for within ``budget_days`` have used the budget."""
    since = trigger.day - timedelta(days=spec.budget_days)
    asked = {t.day for t in past if t.action == "asked"} - runs.failed
    used = {d for d in asked | runs.trained if since < d <= trigger.day}
    if len(used) >= spec.budget:
        reason = f"{len(used)} trainings since {since + timedelta(days=1)}: the budget is {spec.budget} in {spec.budget_days} days"
        return replace(trigger, action="over budget", reason=f"{reason}; a person may start one")
    return replace(trigger, action="asked", reason=trigger.reason or "nothing held it back")


def _again(spec: Retraining, past: Sequence[Trigger], runs: Runs, now: datetime) -> Trigger | None:
    """What was merged into a run that had seen less, or was asked for and did not come about; the newest day speaks for all.

    The cooldown does not hold it back: it fired before the training that would start it was done.
    """
    known = sorted(_latest(past).values(), key=lambda t: t.day)
    for old in reversed(known):
        if runs.newest is not None and runs.newest >= old.day:
            return None  # answered, and so is everything before it
        if old.action == "over budget":
            return None
        if old.cause == "person":
            continue  # people start their own again
        if old.action == "merged":
            reason = "the training that it was merged into had not seen it"
            return _within_budget(spec, replace(old, at=now, reason=reason), runs, past)
        if old.action == "asked":
            due = old.at is None or now >= old.at + timedelta(hours=spec.retry_hours)
            if not due or old.attempt >= spec.attempts:
                return None
            what = "failed" if old.day in runs.failed else "did not come about"
            return replace(old, attempt=old.attempt + 1, at=now, reason=f"attempt {old.attempt} {what}")
    return None


def _refused(spec: Retraining, past: Sequence[Trigger], runs: Runs, judged: date, now: datetime) -> Trigger | None:
    """The newest training, where its gate refused what came of it and the cooldown is over: asked for with what is known now."""
    asked = [t for t in past if t.action == "asked" and t.day == runs.newest and t.cause not in ("calendar", "person")]
    if (
        not asked
        or asked[-1].day not in runs.refused
        or any(t.day > asked[-1].day and t.action == "over budget" for t in past)
    ):
        return None
    old = asked[-1]
    if (judged - old.day).days < max(spec.cooldown_days, 1) or old.attempt >= spec.attempts:
        return None
    told = tuple(e if _SAID in e.text else replace(e, text=f"{e.text}{_SAID} {old.day})") for e in old.evidence)
    reason = f"the version trained for {old.day} was refused by its gate, and its reason stands"
    new = replace(
        old, day=judged, evidence=told, window=(old.window[0], judged), attempt=old.attempt + 1, at=now, reason=reason
    )  # fmt: skip
    return _within_budget(spec, new, runs, past)


_SAID = " (said on"


# --- what is stored ---------------------------------------------------------------------------------------------------


def read(workflow: Workflow, lake: Lake) -> tuple[date | None, dict[date, tuple[Evidence, ...]]]:
    """The newest judged day, and the evidence of every judged day within a window of it; (None, {}) where nothing is judged."""
    from pipeline.lake import TableMissing
    from pipeline.monitoring.labels import metric_of

    tables: dict[str, list[dict[str, Any]]] = {}
    for name in ("drift", "performance"):
        try:
            days = lake.read(workflow.table(name), columns=["day"])["day"].to_pylist()
        except TableMissing:
            days = []
        newest = max(days, default=None)
        tables[name] = []
        if newest is not None:
            near = [newest - timedelta(days=n) for n in range(workflow.retraining.window_days)]
            tables[name] = lake.read(workflow.table(name), days=near).to_pylist()
    judged = max((r["day"] for rows in tables.values() for r in rows), default=None)
    metric = metric_of(workflow)
    found = {}
    for day in sorted({r["day"] for rows in tables.values() for r in rows}):
        drift = next((r for r in tables["drift"] if r["day"] == day), None)
        rows = [r for r in tables["performance"] if r["day"] == day]
        said = evidence(workflow.retraining, metric, rows, drift, back=workflow.drift.window_days)
        if said:
            found[day] = said
    return judged, found


def _left_to_the_rule(
    workflow: Workflow, ledger: Ledger, judged: date, found: Mapping[date, tuple[Evidence, ...]], now: datetime
) -> dict[date, tuple[Evidence, ...]]:
    """The evidence of the judged days, with the cause ``rule`` on each at whose cut-off the rule decided in the champion's place.

    No figure says it any more once the days that the version scored have left the window, and it stands for as long as
    neither another version is promoted nor a person takes it back; from then on nothing is asked for any more.
    """
    from pipeline.lifecycle import rule_override, state

    added, stands = dict(found), state.behind(ledger, workflow.name, now)
    if stands is None:
        return added
    for n in range(workflow.retraining.window_days):
        day = judged - timedelta(days=n)
        event = state.behind(ledger, workflow.name, workflow.cutoff_of(day))
        told = added.get(day, ())
        if event is not None and event.seq == stands.seq and all(e.cause != "rule" for e in told):
            figures = {**event.body["figures"], "version": event.body["version"]}
            one = Evidence("rule", date.fromisoformat(event.body["day"]), rule_override.sentence(event), figures)
            added[day] = (one, *told)
    return added


def by_people(workflow: str, runs: Runs, past: Sequence[Trigger], now: datetime) -> list[Trigger]:
    """Trainings that no trigger asked for: somebody started them, in Dagster or with ``signalbox run``."""
    asked = {t.day for t in past if t.action == "asked"}
    text = "a training that no trigger had asked for"
    return [
        Trigger(
            workflow, day, "person", (Evidence("person", day, text),), "asked", (day, day), "a person is not held back", at=now
        )
        for day in sorted((runs.trained | runs.running) - asked)
    ]  # fmt: skip


def trained(workflow: Workflow, lake: Lake) -> frozenset[date]:
    """The days for whose cut-off a training set was made."""
    from pipeline.lake import TableMissing

    try:
        return frozenset(lake.read(workflow.table("training_set"), columns=["as_of"])["as_of"].to_pylist())
    except TableMissing:
        return frozenset()


def past(ledger: Ledger, workflow: str) -> list[Trigger]:
    """Every trigger that the ledger has, oldest first."""
    return [Trigger.read(e.body) for e in ledger.events(KIND, workflow)]


def record(ledger: Ledger, triggers: Iterable[Trigger]) -> None:
    """Put triggers into the ledger, each with its evidence and its end."""
    for trigger in triggers:
        ledger.note(KIND, trigger.body())


def _turned_away(ledger: Ledger, workflow: str) -> frozenset[date]:
    """The days for whose cut-off a version was trained that its gate refused or held, and none that passed."""
    away = ("refused", "held")
    said = [
        (p.action, p.evidence["day"])
        for p in ledger.promotions(workflow)
        if "figures" in p.evidence and "day" in p.evidence
    ]
    return frozenset(
        date.fromisoformat(day) for action, day in said if action in away and all(d != day for a, d in said if a not in away)
    )  # fmt: skip


def look(
    workflow: Workflow,
    lake: Lake,
    ledger: Ledger,
    *,
    runs: Runs,
    now: datetime,
    more: Mapping[date, Evidence] | None = None,
) -> list[Trigger]:
    """Decide from what is stored, and record what came of it. ``more``: evidence that no table holds (the calendar).

    ``runs.trained`` is completed by the training sets that stand in the lake, but for days whose run is known to have failed.
    """
    judged, found = read(workflow, lake)
    if judged is not None:
        found = _left_to_the_rule(workflow, ledger, judged, found, now)
    before = past(ledger, workflow.name)
    runs = replace(runs, refused=runs.refused | _turned_away(ledger, workflow.name))
    started = by_people(workflow.name, runs, before, now)
    record(ledger, started)
    before += started
    seen = replace(runs, trained=runs.trained | (trained(workflow, lake) - runs.failed - runs.running))
    for day, one in (more or {}).items():
        found[day] = (*found.get(day, ()), one)
        judged = day if judged is None else max(judged, day)
    if judged is None:
        return []
    made = decide(workflow.name, workflow.retraining, found, judged=judged, past=before, runs=seen, now=now)
    record(ledger, made)
    return made
