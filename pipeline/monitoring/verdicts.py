"""Whether what acts now does harm: what is compared since when, the verdict on it, and what a verdict asks for.

Belongs here: which version is compared with what since when, the ledger's verdicts. Does not: the tables that the statistics read
(``pipeline.monitoring.observations``), the statistics (``data_checks.regression``), taking anything back (``pipeline.dispatch``), or
what starts it (``orchestration.automation``).
"""

from __future__ import annotations

import dataclasses
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

from data_checks import regression
from delivery.ledger import BatchRow, Ledger
from models.policies import arms
from pipeline.decisions import in_effect
from pipeline.lake import Lake
from pipeline.lifecycle import hold, promotion, rule_override, state
from pipeline.monitoring import queue_replay
from pipeline.monitoring.observations import drawn_units, entities, observations, regression_of
from pipeline.workflow import Workflow

if TYPE_CHECKING:
    from delivery.ledger import Event

VERDICT = hold.VERDICT
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
    answered: bool = False
    """Whether a person has let the version go on: what was answered is not alerted again."""

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
    replay: queue_replay.Told | None = None
    """What serving the queue anew says; None where the workflow declares none."""

    @property
    def verdict(self) -> str:
        """ROLLBACK, HOLD, PROMOTE, CONTINUE, INCONCLUSIVE or NO_DATA."""
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
            mine = [p.action for p in moved if p.version == begun[0] and p.action in ("promoted", "lifted")]
            answered = mine[-1:] == ["lifted"]
            found.append(Comparison(AGAINST_HOLDOUT, "champion", "holdout", *begun, answered))
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


# --- the verdict


def judge_day(workflow: Workflow, lake: Lake, ledger: Ledger, day: date) -> tuple[Judged, ...]:
    """Judge every comparison with what was known at the cut-off of ``day``, and record each verdict, the same once.

    Empty where nothing has acted yet. Raises StageSqlError as ``observations`` does.
    """
    found = tuple(
        judge(
            workflow,
            lake,
            one,
            day,
            ledger=ledger,
            alpha=_alpha_left(workflow, ledger, one),
            judged=_judged(workflow, ledger, one, day),
        )
        for one in comparisons(workflow, ledger, day)
    )
    for judged in found:
        _note(workflow, ledger, judged)
    return found


def _alpha_left(workflow: Workflow, ledger: Ledger, comparison: Comparison) -> float:
    """What a comparison may spend of α, after those of the same arms that began before it."""
    spec = regression_of(workflow)
    earlier: dict[date, date] = {}
    for event in ledger.events(VERDICT, workflow.name):
        since, day = (date.fromisoformat(event.body[key]) for key in ("since", "day"))
        if event.body["comparison"] == comparison.name and since < comparison.since:
            earlier[since] = max(day, earlier.get(since, day))
    begun = [(since + timedelta(days=1), max(last, since + timedelta(days=1))) for since, last in earlier.items()]
    return regression.left(begun, comparison.start, spec.alpha, spec.horizon_days, spec.spending)


def _judged(workflow: Workflow, ledger: Ledger, comparison: Comparison, day: date) -> date | None:
    """The last day before ``day`` on which a comparison was judged; None where it was not, or was found to do harm."""
    mine = {"comparison": comparison.name, "version": comparison.version, "since": comparison.since.isoformat()}
    said = [
        e.body
        for e in ledger.events(VERDICT, workflow.name)
        if mine.items() <= e.body.items() and e.body["day"] < day.isoformat()
    ]
    if not said or any(body["verdict"] == "ROLLBACK" for body in said):
        return None
    return date.fromisoformat(max(body["day"] for body in said))


def judge(
    workflow: Workflow,
    lake: Lake,
    comparison: Comparison,
    day: date,
    *,
    ledger: Ledger | None = None,
    alpha: float | None = None,
    judged: date | None = None,
) -> Judged:
    """One comparison at the cut-off of ``day``; its pre-period is the days before it began to act, and for the design
    ``entity`` what had been decided on in them. ``ledger``: for a replay, where the workflow declares one. ``alpha``, ``judged``: as
    ``regression.judge`` takes them; a replay has its part of ``alpha``.
    """
    whole = regression_of(workflow)
    spec, design = whole.of_outcomes(comparison.control), workflow.arms.design
    left, share = whole.alpha if alpha is None else alpha, spec.alpha / whole.alpha
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
    drawn = drawn_units(lake, workflow.table("arms"), day)
    epochs = pc.unique(observed["epoch"]).drop_null()
    drawn = drawn.filter(pc.is_in(drawn["epoch"], value_set=epochs))
    judgement = regression.judge(
        observed.filter(pc.is_valid(observed["arm"])), before, spec=spec, design=design, treated=comparison.treated,
        control=comparison.control, shares=arms.normalised(workflow.arms.shares), drawn=drawn, start=start, day=day,
        seed=comparison.seed(workflow.name), alpha=left * share, judged=judged,
    )  # fmt: skip
    if spec.replay is None or ledger is None:
        return Judged(comparison, day, judgement)
    told = queue_replay.judge(
        workflow, lake, ledger, treated=comparison.treated, control=comparison.control, since=comparison.since, day=day,
        alpha=left * (1 - share), seed=comparison.seed(workflow.name), answered=comparison.answered,
    )  # fmt: skip
    return Judged(comparison, day, _with_replay(judgement, told, comparison), told)


def _with_replay(
    judgement: regression.Judgement, told: queue_replay.Told, comparison: Comparison
) -> regression.Judgement:
    """A judgement with what the replay adds to it: a harm that its exact test found, or an alert where nothing else is concluded.

    Arms that are not as drawn, and no outcomes, conclude nothing, whatever a replay says; nor does it promote. The rule is put on no
    hold: nobody could lift it, and ``signalbox stop`` stops it.
    """
    figures, verdict, reasons = {**judgement.figures, "replay": told.figures()}, judgement.verdict, judgement.reasons
    speaks = judgement.sample_ratio["ok"] and verdict != "NO_DATA"
    if speaks and told.verdict == "ROLLBACK" and verdict != "ROLLBACK":
        assert told.found is not None, "a ROLLBACK has its look"
        verdict, reasons = "ROLLBACK", told.reasons
        figures["since"] = str(comparison.start + timedelta(days=int(told.found.day) - 1))
    elif (
        speaks and told.verdict == "HOLD" and verdict in ("CONTINUE", "INCONCLUSIVE") and comparison.version is not None
    ):
        verdict, reasons = "HOLD", (*told.reasons, *reasons)
    elif told.reasons:
        reasons = (*reasons, *(f"replay of the queue: {text}" for text in told.reasons))
    return dataclasses.replace(judgement, verdict=verdict, reasons=reasons, figures=figures)


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
    lifecycle = state.LifecycleState.read(ledger, workflow)
    stands = lifecycle.live()
    found: set[int | None] = {stands["challenger"][0]} if stands["challenger"] else set()
    if lifecycle.behind(ledger, workflow.name, ledger.clock()) is not None:
        # a verdict over either counts: the rule decides, and what the champion decided before may still stand
        found.add(None)
    if stands["champion"] is not None or lifecycle.moves:
        return found | {stands["champion"]}
    # A ledger that knows of no promotion: whoever acted last.
    newest = [b for b in acted if b.step in ("champion", "rule")][-1:]
    return found | {_number(b, "model_version") for b in newest}
