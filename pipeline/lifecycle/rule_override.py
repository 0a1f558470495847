"""Whether the rule decides in a version's place, because outcomes have shown that the version does worse.

Belongs here: the ledger's events that say so, and whether one still counts. Does not: the comparison
(``data_checks.performance``), the steps of a bad day (``pipeline.decisions.scoring``) or the retraining (``pipeline.lifecycle.retraining``).

A version is put behind the rule once. It stays there until another version is champion, or a person takes that back: with
``signalbox lift``, or by promoting the version anew. What a person took back is not done again.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date, datetime
from typing import Any

import pyarrow as pa

from data_checks import performance
from delivery.ledger import Event, Ledger

KIND = "worse than rule"
"""The kind of the ledger's events: workflow, day, version, text, figures."""


def worse(metric: str, found: pa.Table) -> Mapping[str, Any] | None:
    """The row of a day's ``performance`` that shows ``metric`` worse than the rule's, interval and all."""
    for row in found.to_pylist():
        if row["kind"] == performance.RULE and row["metric"] == metric and (row["worse_low"] or 0) > 0:
            return row  # type: ignore[no-any-return]
    return None


def note(ledger: Ledger, name: str, day: date, row: Mapping[str, Any]) -> str:
    """Put the version of ``row`` (``worse``) behind the rule; returns what was recorded, or "" where that was done before."""
    number = row["version"]
    if _noted(ledger, name, number):
        return ""
    kept = ("metric", "value", "low", "high", "baseline", "worse", "worse_low", "n")
    text = f"version {number} does worse than the rule: {row['text']}"
    figures = {k: row[k] for k in kept} | {"first": str(row["first"]), "last": str(row["last"])}
    ledger.note(KIND, {"workflow": name, "day": str(day), "version": number, "text": text, "figures": figures})
    return text


def in_force(ledger: Ledger, name: str, number: int, until: datetime) -> str:
    """Why the rule decides in place of a version, as it stood at ``until`` (naive UTC); empty where the version decides."""
    found = standing(ledger, name, number, until)
    return "" if found is None else str(found.body["text"])


def standing(ledger: Ledger, name: str, number: int, until: datetime) -> Event | None:
    """The event by which the rule decides in place of a version, as it stood at ``until`` (naive UTC); None where it does not."""
    noted = [e for e in _noted(ledger, name, number) if e.at <= until]
    if not noted:
        return None
    for one in ledger.promotions(name):
        by_person = one.action == "lifted" or (one.action == "promoted" and one.actor != "signalbox")
        if one.version == number and by_person and noted[-1].at < one.at <= until:
            return None
    return noted[-1]


def sentence(event: Event) -> str:
    """What such an event says as long as it stands."""
    return f"the rule has decided since {event.at:%Y-%m-%d %H:%M} UTC: {event.body['text']}"


def _noted(ledger: Ledger, name: str, number: int) -> list[Event]:
    return [e for e in ledger.events(KIND, name) if e.body["version"] == number]
