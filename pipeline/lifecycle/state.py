"""Which version of a workflow's model holds which place, by the ledger: live, blocked, waiting, and who decides a day.

Belongs here: reading the state of the versions. Does not: changing it (``pipeline.lifecycle.promotion``), judging a version
(``pipeline.lifecycle.candidate_evaluation``), or MLflow's own calls (``models.registry``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any, Literal, Self

from delivery.ledger import Event, Ledger, Promotion
from models.registry import CHALLENGER, CHAMPION, PREVIOUS, Registry, Version
from pipeline.lifecycle import rule_override
from pipeline.workflow import Workflow

Stage = Literal["shadow", "canary"]


@dataclass(frozen=True)
class LifecycleState:
    """All that happened to the versions of a workflow, read from the ledger once and handed on within an operation.

    It is as of when it was read: who has written to the ledger since reads it anew.
    """

    moves: tuple[Promotion, ...]
    """In the order in which they happened."""

    @classmethod
    def read(cls, ledger: Ledger, workflow: Workflow | str) -> Self:
        """One read of the ledger's promotions."""
        return cls(tuple(ledger.promotions(workflow if isinstance(workflow, str) else workflow.name)))

    def live(self, until: datetime | None = None) -> dict[str, Any]:
        """Which versions are live; with ``until`` (naive UTC) as it stood then.

        ``champion``: number or None. ``previous``: the champion before it, or None. ``challenger``: (number, "shadow" or
        "canary") or None. ``blocked``: the numbers that were rolled back and not lifted. ``lifted``: those that a person let
        be promoted again. ``digests``: by number, the digest
        of the files that were given their place. ``since``: when champion and challenger got their places (naive UTC).
        """
        champions: list[int] = []
        challenger: tuple[int, Stage] | None = None
        blocked: set[int] = set()
        lifted: set[int] = set()
        digests: dict[int, str] = {}
        since: dict[str, datetime] = {}
        for one in self.moves:
            number, was = one.version, champions[-1:]
            if number is None or (until is not None and one.at > until):
                continue
            if one.evidence.get("digest"):
                digests[number] = str(one.evidence["digest"])
            is_challenger = challenger is not None and challenger[0] == number
            if one.action == "promoted":
                champions = [*(n for n in champions if n != number), number]
                challenger = None if is_challenger else challenger
            elif one.action in ("shadow", "canary"):
                challenger = (number, "shadow" if one.action == "shadow" else "canary")
                since["challenger"] = one.at
            elif one.action == "dropped" and is_challenger:
                challenger = None
            elif one.action in ("dropped", "rolled back"):
                # out of the line for good: a lifted version must be promoted again to decide again
                champions = [n for n in champions if n != number]
                challenger = None if is_challenger else challenger
            if one.action == "rolled back":
                blocked.add(number)
                lifted.discard(number)
            elif one.action == "lifted":
                blocked.discard(number)
                lifted.add(number)
            if champions[-1:] != was:
                since["champion"] = one.at
        if challenger is None:
            since.pop("challenger", None)
        return {
            "champion": champions[-1] if champions else None,
            "previous": champions[-2] if len(champions) > 1 else None,
            "challenger": challenger,
            "blocked": sorted(blocked),
            "lifted": sorted(lifted),
            "digests": digests,
            "since": since,
        }

    def waiting(self, until: datetime | None = None) -> dict[int, str | None]:
        """The digest of every version of which the last word is that its gate held it."""
        last = {
            p.version: p
            for p in self.moves
            if p.version is not None and p.action != "put back" and (until is None or p.at <= until)
        }
        return {number: p.evidence.get("digest") for number, p in last.items() if p.action == "held"}

    def held(self, until: datetime | None = None) -> list[int]:
        """The versions that wait for a person since their gate held them, as of ``until`` (naive UTC); those that are older
        than the champion wait for nobody any more."""
        champion = self.live(until)["champion"]
        return sorted(n for n in self.waiting(until) if champion is None or n > champion)

    def behind(self, ledger: Ledger, name: str, until: datetime) -> Event | None:
        """The event by which the rule decides in place of the champion (``pipeline.lifecycle.rule_override``), as both stood at
        ``until`` (naive UTC); None where the champion decides, or there is none."""
        if not ledger.events(rule_override.KIND, name):
            return None
        champion = self.live(until)["champion"]
        return None if champion is None else rule_override.standing(ledger, name, champion, until)


def live(ledger: Ledger, workflow: Workflow | str, until: datetime | None = None) -> dict[str, Any]:
    """``LifecycleState.live``, for who asks nothing else."""
    return LifecycleState.read(ledger, workflow).live(until)


def aliases(state: Mapping[str, Any]) -> dict[str, int | None]:
    """Where the registry's aliases belong, by what ``live`` says."""
    challenger = state["challenger"]
    return {
        CHAMPION: state["champion"], PREVIOUS: state["previous"], CHALLENGER: challenger[0] if challenger else None,
    }  # fmt: skip


def behind(ledger: Ledger, name: str, until: datetime) -> Event | None:
    """``LifecycleState.behind``, for who asks nothing else."""
    return LifecycleState.read(ledger, name).behind(ledger, name, until)


# --- who decides a day --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lineup:
    """Who may score a day: the steps of the ladder that have a version, best first, and the challenger beside them."""

    versions: tuple[tuple[str, Version | None, str], ...]
    """(step, version, why it has none): champion, previous_champion."""
    challenger: tuple[Version, Stage] | None = None
    moved: str = ""
    """An alias stands elsewhere than the ledger says: whose request it waits for; empty where all is in line."""


def lineup(registry: Registry, ledger: Ledger | None, name: str, day: date) -> Lineup:
    """The versions that count for ``day``, by the ledger: an alias that somebody moved decides nothing by itself.

    A day before the champion was trained (a backfill) is scored by the newest versions that had passed their gate by
    then. Without a ledger, or one that knows no version of the workflow, the registry alone says (``Registry.as_of``).
    Raises MLflow's error where the registry is down.
    """
    known_of = None if ledger is None else LifecycleState.read(ledger, name)
    if known_of is None or not known_of.moves:
        return Lineup(_ranked(registry.as_of(name, day)))
    state, stands = known_of.live(), registry.standing(name)
    held = stands.versions.get(state["champion"] or -1)
    if held is not None and held.trained_day > day:
        known = [v for v in stands.versions.values() if v.passed and v.trained_day <= day]
        usable = [v for v in known if not unusable(v, state)]
        return Lineup(_ranked(sorted(usable, key=lambda v: (v.trained_day, v.number), reverse=True)))
    found: list[tuple[str, Version | None, str]] = []
    for step, number in ((CHAMPION, state["champion"]), (PREVIOUS, state["previous"])):
        version = stands.versions.get(number or -1)
        why = unusable(version, state, number) if number is not None else "the ledger says that no version is live"
        if not why and version is not None and version.trained_day > day:
            why = f"version {number} was trained after {day}"
        if number is not None or step == CHAMPION:
            found.append((step, None if why else version, f"{step}: {why}"))
    beside = None
    if state["challenger"] is not None:
        version = stands.versions.get(state["challenger"][0])
        if version is not None and not unusable(version, state) and version.trained_day <= day:
            beside = (version, state["challenger"][1])
    wanted = aliases(state)
    moved = [
        f"the alias {alias} stands at {stands.aliases.get(alias, 'no version')}, the ledger says {wanted[alias] or 'none'}"
        for alias in wanted
        if stands.aliases.get(alias) != wanted[alias]
    ]
    return Lineup(tuple(found), beside, "; ".join(moved))


def _ranked(versions: Sequence[Version]) -> tuple[tuple[str, Version | None, str], ...]:
    return tuple((step, version, "") for step, version in zip((CHAMPION, PREVIOUS), versions, strict=False))


def unusable(version: Version | None, state: Mapping[str, Any], number: int | None = None) -> str:
    """Why a version may not decide; empty where it may."""
    if version is None:
        return f"version {number} is gone from the registry"
    if version.blocked or version.number in state["blocked"]:
        return f"version {version.number} was rolled back and is blocked ({version.blocked or 'by the ledger'})"
    wanted = state["digests"].get(version.number)
    if wanted is not None and wanted != version.digest:
        return (
            f"version {version.number} is not the one that was given its place (digest {version.digest[:12] or 'none'}, "
            f"recorded {wanted[:12]})"
        )
    return ""


def waits(ledger: Ledger, name: str, version: Version) -> bool:
    """Whether a version waits for a person since its gate held it, with the files that it had then."""
    waiting = LifecycleState.read(ledger, name).waiting()
    return version.number in waiting and waiting[version.number] == version.digest
