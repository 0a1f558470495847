"""What a reading means, with the change history and with what other workflows have set.

Belongs here: judgements that ask the system or the push. Does not: the pure part (``delivery.push.reconciliation``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta

from delivery.connectors.base import Change, Reading
from delivery.push import reconciliation
from delivery.push.reconciliation import Final, Item, Judgement, Send, Third
from delivery.push.run import Run
from delivery.push.sending import CONFLICTS_IN_A_ROW

SKEW = timedelta(hours=1)
"""How far a downstream system's clock may be off where its change history is asked for."""


def judge(run: Run, item: Item, reading: Reading, at: float | None = None) -> Judgement:
    return reconciliation.judge(item, reading, at=run.monotonic() if at is None else at, stale_s=run.can.stale_reads_s)


def history(run: Run, judged: Sequence[tuple[Item, Reading, Judgement]]) -> dict[str, list[Change]] | None:
    """The changes of those whose judgement needs them; None where the system keeps none."""
    if not run.can.change_history:
        return None
    asked = [
        item for item, _, judgement in judged
        if isinstance(judgement, Third)
        or (isinstance(judgement, Send) and item.maybe)
        or (isinstance(judgement, Final) and item.sent and not run.can.conditional_write)
    ]  # fmt: skip
    if not asked:
        return {}
    since = min(item.first_sent_at or run.clock() for item in asked) - SKEW
    run.bucket.take()
    found: dict[str, list[Change]] = {item.key: [] for item in asked}
    for change in run.connector.history([item.key for item in asked], since):
        found.setdefault(change.key, []).append(change)
    return found


def with_evidence(
    run: Run, item: Item, reading: Reading, judgement: Judgement, changes: Mapping[str, Sequence[Change]] | None
) -> Judgement:
    """The judgement, where the change history or another workflow's record has a say in it."""
    theirs = run.foreign.get(item.key)
    if isinstance(judgement, Final) and judgement.state == "CONFLICT" and theirs and theirs[0] == judgement.found:
        return replace(judgement, says=f"{judgement.says}; the workflow {theirs[1]} has set it")
    own = None if changes is None else changes.get(item.key)
    if isinstance(judgement, Third):
        judgement = reconciliation.third(item, reading, own)
    if own is None:
        return judgement
    if isinstance(judgement, Send) and item.maybe and reconciliation.set_back(item, own):
        judgement = reconciliation.conflict(
            item, reading.value, f"{reconciliation.shown(reading)} was set again after our write"
        )
    if isinstance(judgement, Final) and not run.can.conditional_write:
        return reconciliation.with_lost(item, judgement, own)
    return judgement


def spent(run: Run, item: Item, reading: Reading) -> Judgement:
    """Whether another write of the same value is worth it."""
    if item.conflicts >= CONFLICTS_IN_A_ROW * run.settings.attempts:
        says = f"shows {reconciliation.shown(reading)}, and the system says at every write that it was changed"
        return reconciliation.conflict(item, reading.value, says)
    if item.tries >= run.settings.attempts:
        if item.accepted:
            return reconciliation.ignored(item, reading, run.can.stale_reads_s)
        if run.accepted > item.started_before:
            # Others are taken, this one never gets an answer: it is this one and not the system.
            says = f"no answer to {item.tries} writes while others got one, still shows {reconciliation.shown(reading)}"
            return Final("REJECTED", f"{says} ({item.answered})" if item.answered else says, reading.value)
    return Send(reading)


def patient(run: Run, item: Item, now: float) -> bool:
    """Whether an unanswered write is worth another one; reading it goes on."""
    return not item.maybe or item.since is None or now - item.since <= run.settings.patience_s
