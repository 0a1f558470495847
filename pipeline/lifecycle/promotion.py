"""What becomes of a version: from the gate to shadow, canary, champion, and back; the ledger is the truth, aliases follow it.

Belongs here: the steps of a version's life, and bringing the registry's aliases in line with the ledger. Does not: reading
which version holds which place (``pipeline.lifecycle.state``), judging (``pipeline.lifecycle.candidate_evaluation``, ``data_checks.regression``), MLflow's own
calls (``models.registry``), what a shadow is measured by (``pipeline.lifecycle.shadow``), or what starts a step
(``orchestration.automation``).

Every move is written to the ledger first and to the registry then. A process that is killed between the two leaves aliases
behind the ledger; the next admit, advance, rollback or reconcile brings them after. What tells that from an alias which a
person moved is what the registry remembers of the last time that aliases followed (``Standing.followed``).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import date, datetime, timedelta
from typing import Any, Literal

import pyarrow.compute as pc

from common import errors
from common.errors import SignalboxError
from delivery.ledger import Busy, Ledger
from models.evaluation.gate import Verdict
from models.registry import (
    CHALLENGER,
    CHAMPION,
    PREVIOUS,
    ModelBlocked,
    ModelMissing,
    ModelUnreadable,
    Registry,
    Standing,
    Version,
)
from pipeline.decisions import in_effect
from pipeline.lake import Lake
from pipeline.lifecycle import hold, rule_override
from pipeline.lifecycle import state as lifecycle
from pipeline.workflow import Workflow

REQUEST, BEHIND = "request", "registry behind"
"""Kinds of ledger events: an alias moved by a person, with the answer; a move that the registry could not be told of."""
UNKNOWN = "unknown"
WAITED = "its gate held it for a person, and one asks for it"
_PATIENCE_S = 60.0
"""How long one move waits for another of the same workflow; each takes well under a second."""


Judge = Callable[[Version, Version | None], Verdict]
"""Judges a version beside the champion."""


# --- moves ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _alone(ledger: Ledger, name: str) -> Iterator[None]:
    """One mover of a workflow's versions at a time; raises Busy after a minute."""
    until = time.monotonic() + _PATIENCE_S
    while True:
        try:
            lease = ledger.lease(f"versions of {name}", ttl_s=_PATIENCE_S)
            break
        except Busy:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)
    try:
        yield
    finally:
        ledger.release(lease)


def _begin(registry: Registry, ledger: Ledger, name: str) -> Standing:
    """What the registry says before a move; raises MLflow's error where it is down, before anything is changed.

    A ledger that knows no version takes over who holds the alias, and a registry that was never followed is told where
    its aliases belong by now, so that what the move leaves behind is not taken for somebody's.
    """
    stands = registry.standing(name)
    _adopt(ledger, name, stands)
    if stands.versions and stands.followed is None:
        stands = replace(stands, followed=lifecycle.aliases(lifecycle.live(ledger, name)))
        registry.remember(name, stands.followed or {})
    return stands


def _follow(registry: Registry, name: str, state: Mapping[str, Any], stands: Standing) -> None:
    """Bring aliases and blocks after the ledger, except an alias that somebody else has moved: that is a request."""
    wanted = lifecycle.aliases(state)
    for number in state["blocked"]:
        if number in stands.versions and not stands.versions[number].blocked:
            registry.block(name, number, "rolled back (see the ledger)")
    for number in state["lifted"]:
        if number in stands.versions and stands.versions[number].blocked:
            registry.lift(name, number)
    moves = {
        alias: number
        for alias, number in wanted.items()
        if stands.aliases.get(alias) != number
        and (number is None or number in stands.versions)
        and alias not in _moved(wanted, stands)
    }
    registry.follow(name, moves)
    if stands.versions and stands.followed != wanted:
        registry.remember(name, wanted)


def _moved(wanted: Mapping[str, int | None], stands: Standing) -> dict[str, int | None]:
    """Aliases that stand neither where the ledger wants them nor where they were put last: somebody moved them.

    An alias that is gone together with its version was moved by nobody: deleting a version takes its aliases away.
    """
    followed = stands.followed or {}
    found = {}
    for alias in wanted:
        now = stands.aliases.get(alias)
        last = followed.get(alias)
        if now == wanted[alias] or (stands.followed is not None and now == last):
            continue
        if now is None and (stands.followed is None or last not in stands.versions):
            continue
        found[alias] = now
    return found


def _mend(ledger: Ledger, name: str, stands: Standing) -> list[str]:
    """Versions that the ledger has live and that were deleted from the registry leave the line. Returns what was done.

    A registry without any version of the model is taken for another registry, or a lost one: nothing is concluded.
    """
    done = []
    while stands.versions:
        state = lifecycle.live(ledger, name)
        places = {
            "champion": state["champion"], "previous_champion": state["previous"],
            "challenger": state["challenger"][0] if state["challenger"] else None,
        }  # fmt: skip
        for place, number in places.items():
            version = stands.versions.get(number or -1)
            wanted = state["digests"].get(number)
            if number is None or (version is not None and (wanted is None or wanted == version.digest)):
                continue
            why = "deleted from the registry" if version is None else "replaced in the registry: its digest differs"
            ledger.promotion(name, number, "dropped", UNKNOWN, {"reason": why, "was": place})
            done.append(f"version {number} ({place}) was {why}")
            if place == "champion":
                _record_heir(ledger, name, number, why)
            break
        else:
            return done
    return done


def _record_heir(ledger: Ledger, name: str, of: int, why: str) -> None:
    """Say who stands in for a champion that is out, where the line has somebody."""
    heir = lifecycle.live(ledger, name)["champion"]
    if heir is not None:
        ledger.promotion(name, heir, "promoted", "signalbox", {"heir of": of, "reason": why})


def _adopt(ledger: Ledger, name: str, stands: Standing) -> None:
    """A ledger that knows no version of the workflow takes over who holds the alias, if it passed its gate at training."""
    held = stands.versions.get(stands.aliases.get(CHAMPION, -1))
    if ledger.promotions(name) or held is None or not held.passed or held.blocked:
        return
    before = stands.versions.get(stands.aliases.get(PREVIOUS, -1))
    why = {"reason": "held its alias before the ledger knew of the workflow"}
    for version in (before, held):
        if version is not None and version.passed and not version.blocked:
            ledger.promotion(name, version.number, "promoted", UNKNOWN, {**why, "digest": version.digest})


def admit(
    workflow: Workflow,
    registry: Registry,
    ledger: Ledger,
    version: Version,
    *,
    evidence: Mapping[str, Any],
    actor: str,
    held: bool = False,
) -> str:
    """A version has been judged by its gate: give it its first place, and record that. Returns the place.

    ``refused`` (it did not pass), ``held`` (nothing refuses it, and a person must look: who promotes it moves the alias
    ``champion``), ``none`` (a backfill: older than the champion, it takes no alias), ``champion``,
    ``shadow`` or ``canary``. The first version that passes is champion at once: there is nobody to compare it with.
    Rerunnable. Raises ModelBlocked for a version that was rolled back.
    """
    name, told = workflow.name, {**evidence, "digest": version.digest}
    with _alone(ledger, name):
        stands = _begin(registry, ledger, name)
        _mend(ledger, name, stands)
        known = lifecycle.LifecycleState.read(ledger, name)
        state = known.live()
        if not version.passed:
            action = "held" if held else "refused"
            if not any(p.version == version.number and p.action == action for p in known.moves):
                ledger.promotion(name, version.number, action, actor, told)
            if held:
                registry.held(name, version.number)
            return action
        if version.blocked or version.number in state["blocked"]:
            raise ModelBlocked(
                f"model {name!r} version {version.number} was rolled back ({version.blocked or 'see the ledger'}) and is "
                f"not promoted again: signalbox lift {name} {version.number}"
            )
        place = _first_place(workflow, state, stands, version)
        if place in ("shadow", "canary") and (state["challenger"] or (None,))[0] != version.number:
            _drop_challenger(ledger, name, state, actor, f"version {version.number} takes its place")
            ledger.promotion(name, version.number, place, actor, told)
        elif place == "champion" and state["champion"] != version.number:
            ledger.promotion(name, version.number, "promoted", actor, told)
            _drop_challenger(
                ledger, name, lifecycle.live(ledger, name), actor, f"version {version.number} became champion"
            )
        _follow(registry, name, lifecycle.live(ledger, name), registry.standing(name))
    return place


def _first_place(workflow: Workflow, state: Mapping[str, Any], stands: Standing, version: Version) -> str:
    champion = stands.versions.get(state["champion"] or -1)
    if state["champion"] == version.number or champion is None:
        return "champion"
    if champion.trained_day > version.trained_day and champion.trained_day != date.max:
        return "none"
    spec = workflow.promotion
    return "shadow" if spec.shadow_days else "canary" if spec.canary_days else "champion"


def _drop_challenger(ledger: Ledger, name: str, state: Mapping[str, Any], actor: str, why: str) -> None:
    if state["challenger"] is not None:
        ledger.promotion(name, state["challenger"][0], "dropped", actor, {"reason": why, "was": state["challenger"][1]})


def due(
    workflow: Workflow, ledger: Ledger, lake: Lake, day: date, *, verdict: Mapping[str, Any] | None = None
) -> tuple[str, str, dict[str, Any]]:
    """What the challenger's next move is before ``day`` is scored, why, and the evidence; computes and moves nothing.

    The move: ``none`` (no challenger), ``waits``, ``canary``, ``champion`` or ``blocked``. ``verdict``: the guard's on the
    canary; left out, the newest in the ledger counts.
    """
    state, spec = lifecycle.live(ledger, workflow), workflow.promotion
    if state["challenger"] is None:
        return "none", "there is no challenger", {}
    number, stage = state["challenger"]
    seen = _measured(workflow, lake, number, stage, day)
    shown = f"version {number} in {stage}: {len(seen)} days scored"
    evidence: dict[str, Any] = {"from": stage, "days": [str(d) for d in sorted(seen)]}
    if stage == "shadow":
        if len(seen) < spec.shadow_days:
            return "waits", f"{shown} of {spec.shadow_days}", {}
        share = sum(seen.values()) / len(seen) if seen else 0.0
        evidence["decided differently"] = share
        if spec.max_disagreement is not None and share > spec.max_disagreement:
            limit = f"promotion.max_disagreement is {spec.max_disagreement:.1%}"
            return "waits", f"{shown}, {share:.1%} decided differently, {limit}: a person must look", {}
        return ("canary" if spec.canary_days else "champion"), f"{shown}, {share:.1%} decided differently", evidence
    said = verdict or _verdict(ledger, workflow.name, number, state["since"]["challenger"])
    word = str(said["verdict"]) if said else "NO_DATA"
    evidence["verdict"] = dict(said) if said else {}
    if word == "ROLLBACK":
        return "blocked", f"{shown}: the guard says ROLLBACK", evidence
    if len(seen) < spec.canary_days:
        return "waits", f"{shown} of {spec.canary_days}", {}
    if word == "PROMOTE" or (word == "INCONCLUSIVE" and spec.inconclusive == "promote"):
        return "champion", f"{shown}: the guard says {word}", evidence
    return "waits", f"{shown}: the guard says {word}", {}


def _measured(workflow: Workflow, lake: Lake, number: int, stage: str, before: date) -> dict[date, float]:
    """The days that a challenger scored in a stage, with the share of entities that it decided differently."""
    table = workflow.table("shadow")
    if not lake.exists(table):
        return {}
    mine = (pc.field("version") == number) & (pc.field("stage") == stage) & pc.field("scored")
    rows = lake.read(table, where=mine, columns=["day", "share_different"]).to_pylist()
    return {r["day"]: r["share_different"] or 0.0 for r in rows if r["day"] < before}


def _verdict(ledger: Ledger, name: str, number: int, since: datetime) -> Mapping[str, Any] | None:
    said = [
        e.body
        for e in ledger.events("verdict", name)
        if e.body.get("comparison") == "challenger vs champion" and e.body.get("version") == number and e.at >= since
    ]
    return said[-1] if said else None


def reason_of(verdict: Mapping[str, Any]) -> str:
    """Why a verdict of the regression guard (the body of its event) takes something back, in a sentence."""
    return f"{verdict['comparison']}, {verdict['day']}: {'; '.join(verdict['reasons'])}"


def advance(
    workflow: Workflow,
    registry: Registry,
    ledger: Ledger,
    lake: Lake,
    day: date,
    now: datetime,
    *,
    verdict: Mapping[str, Any] | None = None,
) -> str:
    """Move the challenger on before ``day`` is scored, when it is due: see ``due`` for what is returned.

    Idempotent, and it brings aliases after the ledger that an earlier move left behind. A day whose effect is past (a
    backfill) and a workflow that is stopped move nothing: ``waits``. Raises MLflow's error where the registry is down.
    """
    name = workflow.name
    if now >= in_effect.over(day) or ledger.stopped(name) is not None:
        return "waits"
    if not ledger.promotions(name):
        return "none"  # the registry alone says who decides
    with _alone(ledger, name):
        stands = _begin(registry, ledger, name)
        _mend(ledger, name, stands)
        move, why, evidence = due(workflow, ledger, lake, day, verdict=verdict)
        state = lifecycle.live(ledger, name)
        if move in ("canary", "champion", "blocked"):
            number = state["challenger"][0]
            action = {"canary": "canary", "champion": "promoted", "blocked": "rolled back"}[move]
            told = {**evidence, "reason": why, "day": str(day), "digest": stands.versions[number].digest}
            if move == "blocked":
                # as the guard's rollback of its batches says it: the two are one incident, whichever comes first
                said = evidence["verdict"]
                told |= {"reason": reason_of(said) if said.get("reasons") else why, "trigger": "guard"}
            ledger.promotion(name, number, action, "signalbox", told)
        _follow(registry, name, lifecycle.live(ledger, name), stands)
    return move


def _reached(registry: Registry, ledger: Ledger, name: str) -> tuple[Standing | None, str]:
    """How the registry stands, or None and what its server said: who takes harm back does not wait for it."""
    try:
        return _begin(registry, ledger, name), ""
    except errors.unreachable() as lost:
        return None, errors.first_line(lost)[:300]


def step_back(
    name: str, registry: Registry, ledger: Ledger, number: int, *, actor: str, reason: str, trigger: str
) -> int | None:
    """Take a version out for harm: blocked, and the version before it is live again; returns that one's number.

    Rerunnable. None where no version that may decide is left: the days after are decided by the rule. A registry that is
    down holds nothing up: the ledger is the truth, an event ``registry behind`` says so, and the aliases follow later.
    Raises ModelMissing where neither registry nor ledger knows the version.
    """
    with _alone(ledger, name):
        stands, error = _reached(registry, ledger, name)
        known = lifecycle.LifecycleState.read(ledger, name)
        if (stands is None or number not in stands.versions) and not any(p.version == number for p in known.moves):
            raise ModelMissing(
                f"model {name!r} has no version {number}{f', as far as the ledger knows: {error}' if error else ''}"
            )
        state = known.live()
        if number not in state["blocked"]:
            ledger.promotion(name, number, "rolled back", actor, {"reason": reason, "trigger": trigger})
        if state["champion"] in (number, None):  # None: a run before this one was killed before it named an heir
            if lifecycle.live(ledger, name)["champion"] is None and stands is not None:
                _find_heir(ledger, name, stands, number)
            else:
                _record_heir(ledger, name, number, reason)
        heir = lifecycle.live(ledger, name)["champion"]
        if stands is not None:
            if number in stands.versions:
                registry.block(name, number, reason)
            _follow(registry, name, lifecycle.live(ledger, name), registry.standing(name))
        else:
            ledger.note(BEHIND, {"workflow": name, "version": number, "reason": error})
    return int(heir) if heir is not None else None


def _find_heir(ledger: Ledger, name: str, stands: Standing, of: int) -> None:
    """Where the ledger's line is at its end, the newest version that passed its gate before the harmful one stands in."""
    state = lifecycle.live(ledger, name)
    harmful = stands.versions.get(of)
    heirs = [
        v
        for v in stands.versions.values()
        if v.passed and v.number != of and not lifecycle.unusable(v, state)
        and (harmful is None or v.trained_day <= harmful.trained_day)
    ]  # fmt: skip
    if heirs:
        heir = max(heirs, key=lambda v: (v.trained_day, v.number))
        why = {"heir of": of, "reason": "it had passed its gate", "digest": heir.digest}
        ledger.promotion(name, heir.number, "promoted", "signalbox", why)


class NotBlocked(SignalboxError, LookupError):
    """A version that was not rolled back is to be lifted."""


def lift(name: str, registry: Registry, ledger: Ledger, number: int, *, actor: str, reason: str) -> str:
    """Take the block off a version that was rolled back: it may be promoted again, and is not by this alone. A version that
    left its days to the rule (``pipeline.lifecycle.rule_override``) decides again, and one on hold
    (``pipeline.lifecycle.hold``) is sent again.

    Rerunnable; what is lifted already is recorded once. A registry that is down holds nothing up, as in ``step_back``:
    returns what its server said (empty where it was told), and the next reconcile takes the block off there.
    Raises ModelMissing where the version is gone or never was, and NotBlocked.
    """
    with _alone(ledger, name):
        stands, error = _reached(registry, ledger, name)
        state = lifecycle.live(ledger, name)
        if stands is not None and number not in stands.versions:
            raise ModelMissing(f"model {name!r} has no version {number}")
        tagged = stands is not None and stands.versions[number].blocked
        blocked = number in state["blocked"] or (tagged and number not in state["lifted"])
        held = number in hold.standing(ledger, name)
        if blocked or held or rule_override.in_force(ledger, name, number, ledger.clock()):
            ledger.promotion(name, number, "lifted", actor, {"reason": reason})
        elif number not in state["lifted"]:
            where = f" as far as the ledger knows, and MLflow does not answer: {error}" if error else ""
            raise NotBlocked(
                f"model {name!r} version {number} is not blocked, nor on hold{where}; there is nothing to lift"
            )
        if stands is not None:
            try:
                _follow(registry, name, lifecycle.live(ledger, name), stands)
            except errors.unreachable() as lost:
                error = errors.first_line(lost)[:300]
        if error:
            ledger.note(BEHIND, {"workflow": name, "version": number, "reason": error})
    return error


# --- what people move -------------------------------------------------------------------------------------------------


def pending(registry: Registry, ledger: Ledger, name: str) -> list[str]:
    """What ``reconcile`` would have to do, one sentence each; cheap, changes nothing. Raises MLflow's error where it is down."""
    stands = registry.standing(name)
    if not stands.versions:
        return []
    state = lifecycle.live(ledger, name)
    wanted = lifecycle.aliases(state)
    said = [
        f"alias {alias}: stands at {stands.aliases.get(alias)}, the ledger says {number}"
        for alias, number in wanted.items()
        if stands.aliases.get(alias) != number
    ]
    said += [
        f"version {n} is live and gone"
        for n in wanted.values()
        if n is not None and n not in stands.versions
    ]  # fmt: skip
    said += [
        f"version {n} is blocked and does not say so"
        for n in state["blocked"]
        if n in stands.versions and not stands.versions[n].blocked
    ]
    said += [
        f"version {n} was lifted and still says that it is blocked"
        for n in state["lifted"]
        if n in stands.versions and stands.versions[n].blocked
    ]
    return said


@dataclass(frozen=True)
class Answer:
    """What became of an alias that a person had moved."""

    alias: str
    was: int | None
    to: int | None
    actor: str
    answer: Literal["recorded", "put back"]
    reason: str
    figures: Mapping[str, Any] = field(default_factory=dict)


def reconcile(
    workflow: Workflow,
    registry: Registry,
    ledger: Ledger,
    lake: Lake,
    now: datetime,
    *,
    judge: Judge | None = None,
    actor_of: Callable[[str, str, int | None], str | None] | None = None,
) -> list[Answer]:
    """Answer what people did in MLflow, and bring the aliases in line with the ledger; afterwards they equal ``pipeline.lifecycle.state.live``.

    An alias that somebody moved is a request: the version is judged beside the champion (``judge``; left out,
    ``pipeline.lifecycle.candidate_evaluation.judge``), then either recorded in the ledger, or the alias goes back, with the reason as the version's
    tag ``signalbox.put_back`` and as a ledger event. ``actor_of`` (workflow, alias, number) says who moved it, if a log
    of the server knows. A version that was deleted leaves the line. Rerunnable; of two at once one answers.
    Raises MLflow's error where the registry is down, before anything is changed.
    """
    name = workflow.name
    judge = judge or _gate(workflow, registry, lake, now)
    with _alone(ledger, name):
        stands = _begin(registry, ledger, name)
        if not stands.versions:
            return []
        _mend(ledger, name, stands)
        _follow(registry, name, lifecycle.live(ledger, name), stands)
        asked = _requests(ledger, registry, name)
    answers = []
    for alias, (was, to) in asked.items():
        # judging takes its time, and is done while others may move: what was judged is looked at again before it counts
        answer = _judged(workflow, registry, ledger, alias, to, judge)
        with _alone(ledger, name):
            if _requests(ledger, registry, name).get(alias) != (was, to):
                continue  # moved again, or answered by another reconcile
            actor = (actor_of(name, alias, to) if actor_of is not None else None) or UNKNOWN
            answers.append(_settle(workflow, registry, ledger, Answer(alias, was, to, actor, *answer)))
    return answers


def _requests(ledger: Ledger, registry: Registry, name: str) -> dict[str, tuple[int | None, int | None]]:
    """Aliases that somebody moved: where each belongs, and where it stands."""
    wanted, stands = lifecycle.aliases(lifecycle.live(ledger, name)), registry.standing(name)
    return {alias: (wanted[alias], to) for alias, to in _moved(wanted, stands).items()}


def _judged(
    workflow: Workflow, registry: Registry, ledger: Ledger, alias: str, to: int | None, judge: Judge
) -> tuple[Literal["recorded", "put back"], str, Mapping[str, Any]]:
    """The answer to a request, with its reason and the gate's figures (none where it was not asked)."""
    name, state = workflow.name, lifecycle.live(ledger, workflow)
    if alias == PREVIOUS:
        return (
            "put back",
            "previous_champion names who decided before the champion; the ledger knows, nobody chooses it",
            {},
        )
    if to is None:
        if alias == CHALLENGER:
            return "recorded", "the challenger was taken out", {}
        how = f"signalbox rollback --workflow {name} --model N"
        return "put back", f"a champion is not taken out by its alias: {how}", {}
    stands = registry.standing(name)
    version = stands.versions.get(to)
    why = lifecycle.unusable(version, {**state, "digests": {}}, to)
    if version is None or why:
        lift = f"; only a named person unblocks it: signalbox lift {name} {to}" if version is not None else ""
        return "put back", why + lift, {}
    if alias == CHALLENGER and to == state["champion"]:
        return "put back", f"version {to} is the champion", {}
    if alias == CHALLENGER and not (workflow.promotion.shadow_days or workflow.promotion.canary_days):
        return "put back", "the workflow has neither shadow nor canary: set promotion.shadow_days or canary_days", {}
    try:
        registry.load(version)
        against = stands.versions.get(state["champion"] or -1)
        verdict = judge(version, against if against is not None and against.number != to else None)
    except (ModelMissing, ModelUnreadable) as error:
        return "put back", f"unreadable: {errors.first_line(error)}", {}
    said = "; ".join(verdict.reasons)
    if verdict.passed or verdict.held:  # what is held waits for a person, and here is one
        return "recorded", said or "passed its gate", verdict.figures
    if lifecycle.waits(ledger, name, version) and verdict.figures.get("has_seen_them") and "harm" in verdict.figures:
        # no days that it has not seen tell more yet than its gate knew when it held it
        return "recorded", f"{WAITED}; its files, on days that it has learned from: {said}", verdict.figures
    return "put back", f"refused by its gate: {said}", verdict.figures


def _gate(workflow: Workflow, registry: Registry, lake: Lake, now: datetime) -> Judge:
    """The workflow's gate as of the newest day whose cut-off has passed."""
    day = now.date() - timedelta(days=1)
    day = day if now >= workflow.cutoff_of(day) else day - timedelta(days=1)

    def judge(version: Version, against: Version | None) -> Verdict:
        from pipeline.lifecycle import (
            candidate_evaluation,  # at use: it loads pandas, which most who import this do without
        )

        return candidate_evaluation.judge(workflow, lake, registry, version, day, against=against)

    return judge


def _settle(workflow: Workflow, registry: Registry, ledger: Ledger, one: Answer) -> Answer:
    """Write an answer to the ledger, then bring the alias after it."""
    name = workflow.name
    state, stands = lifecycle.live(ledger, name), registry.standing(name)
    told = {"reason": one.reason, "alias": one.alias, "request": True, "figures": dict(one.figures)}
    if one.to is not None:
        told["digest"] = stands.versions[one.to].digest
    if one.answer == "recorded" and one.to is None:
        _drop_challenger(ledger, name, state, one.actor, one.reason)
    elif one.answer == "recorded" and one.alias == CHAMPION:
        ledger.promotion(name, one.to, "promoted", one.actor, told)
    elif one.answer == "recorded":
        _drop_challenger(ledger, name, state, one.actor, f"version {one.to} takes its place")
        stage = "shadow" if workflow.promotion.shadow_days else "canary"
        ledger.promotion(name, one.to, stage, one.actor, told)
    else:
        told.pop("digest", None)  # nothing of it is given a place
        ledger.promotion(name, one.to, "put back", one.actor, told)
    body = {
        "workflow": name, "alias": one.alias, "from": one.was, "to": one.to, "at": ledger.clock().isoformat(),
        "actor": one.actor, "answer": one.answer, "reason": one.reason,
    }  # fmt: skip
    ledger.note(REQUEST, body)
    if one.answer == "recorded" and one.to is not None:
        registry.passed(name, one.to)
    elif one.to is not None:
        registry.put_back(name, one.to, one.reason)
    state = lifecycle.live(ledger, name)
    wanted = lifecycle.aliases(state)
    registry.follow(name, {one.alias: wanted[one.alias]} if stands.aliases.get(one.alias) != wanted[one.alias] else {})
    _follow(registry, name, state, registry.standing(name))
    return one
