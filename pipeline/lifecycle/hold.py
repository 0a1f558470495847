"""Which versions send nothing more because of an alert, and what is drawn while one acts that had an alert.

Belongs here: reading verdicts HOLD and what ended them from the ledger. Does not: giving them (``pipeline.monitoring.verdicts``), sending
(``pipeline.dispatch``), drawing (``pipeline.decisions.decide``).

A HOLD is an alert and no finding. What was sent stays as it is; batches of the version are decided and recorded, and wait. It ends when a
person lifts it (``signalbox lift``), promotes the version anew, or when another version takes its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any

from delivery.ledger import BatchRow, Ledger

VERDICT = "verdict"
"""Kind of the ledger event in which the regression guard has spoken of a version."""
_ANSWERS = frozenset({"lifted", "promoted", "canary"})
"""Moves of a version by which somebody lets it go on."""
_ENDS = frozenset({"rolled back", "dropped"})
HELD_OUT = 0.5
"""Share that is held out from the epoch on that begins after a HOLD."""


@dataclass(frozen=True)
class Hold:
    """A version on hold, and why."""

    version: int
    day: date
    at: datetime
    reason: str
    seq: int
    """Number of the verdict's event."""

    @property
    def text(self) -> str:
        """For whoever wonders why nothing is sent."""
        return (
            f"version {self.version} is on hold since {self.at:%Y-%m-%d %H:%M} UTC, and nothing more of it is sent: {self.reason}; let it go on "
            "with: signalbox lift, or take it back with: signalbox rollback"
        )


def standing(ledger: Ledger, name: str) -> dict[int, Hold]:
    """The versions on hold now."""
    given = _given(ledger, name)
    return {v: one for v, one in given.items() if not _moved(ledger, one, name, _ANSWERS | _ENDS)} if given else {}


def of_batch(ledger: Ledger, batch: BatchRow) -> Hold | None:
    """The hold for which a batch is not sent: over its model's version or its challenger's."""
    held = standing(ledger, batch.workflow)
    versions = [batch.record.get(key) for key in ("model_version", "challenger_version")]
    return next((held[int(v)] for v in versions if v is not None and int(v) in held), None)


def shares(ledger: Ledger | None, name: str, given: Mapping[Any, float], epoch: str) -> dict[Any, float]:
    """The shares that an epoch (named by its first day) is drawn with: half held out where the champion had a HOLD by then."""
    total, held = sum(given.values()), given.get("holdout", 0.0)
    if ledger is None or not 0 < held < HELD_OUT * total:
        return dict(given)
    alerts = [one for one in _given(ledger, name).values() if one.day.isoformat() < epoch]
    champions = [p.version for p in ledger.promotions(name) if p.action == "promoted"] if alerts else []
    if not any(champions[-1:] == [one.version] and not _moved(ledger, one, name, _ENDS) for one in alerts):
        return dict(given)
    scale = HELD_OUT / (total - held)
    return {arm: HELD_OUT if arm == "holdout" else share * scale for arm, share in given.items()}


def _given(ledger: Ledger, name: str) -> dict[int, Hold]:
    """By version the newest HOLD."""
    found = {}
    for event in ledger.events(VERDICT, name):
        body = event.body
        if body["verdict"] == "HOLD" and body["version"] is not None:
            version, reason = int(body["version"]), "; ".join(body["reasons"])
            found[version] = Hold(version, date.fromisoformat(body["day"]), event.at, reason, event.seq)
    return found


def _moved(ledger: Ledger, one: Hold, name: str, actions: frozenset[str]) -> bool:
    """Whether the version was moved so since."""
    return any(
        e.body["version"] == one.version and e.body["action"] in actions and e.seq > one.seq
        for e in ledger.events("promotion", name)
    )
