"""One write to the downstream system: what it carries, and what its answer means for what comes next.

Belongs here: sending, retry after 429, the wait before the next try. Does not: whether to write (``delivery.push.worker``), how
the system is called (``delivery.connectors``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

from delivery.connectors.base import Misconfigured, Reading, Write, Written
from delivery.push.reconciliation import Item
from delivery.push.run import Done, Run

CONFLICTS_IN_A_ROW = 3
"""Conditional writes tried at once, each on a fresh reading, while an entity changes around its value."""


def send(
    run: Run, sends: Sequence[tuple[Item, Reading]], dones: Mapping[int, Done], sent: set[int], started: float
) -> list[Item]:
    """Write each once and take in the answers; returns those to be read (again)."""
    run.bucket.take()
    if run.halt.is_set() or not run.held.sure:
        # the wait for the rate limit may have been long: who slept through its lease writes nothing
        later(run, [i for i, _ in sends], dones, run.monotonic(), "not sent: the lease may have run out meanwhile")
        return []
    try:
        answers = run.connector.apply([write_of(run, item, reading) for item, reading in sends])
    except Misconfigured:
        raise
    except BaseException:
        # Not what a connector may do; whatever it did before is found by reading.
        for item, _ in sends:
            item.sent = item.maybe = True
        raise
    now = run.monotonic()
    window_ms = (now - started) * 1000
    by_key = {answer.key: answer for answer in answers}
    again: list[Item] = []
    for item, reading in sends:
        done = dones[id(item)]
        answer = by_key.get(item.key) or Written(item.key, "unknown", "the system's answer does not mention it")
        done.outcome, done.says, item.answered = answer.outcome, answer.says, answer.says
        if answer.sent:
            done.window_ms, item.offered = window_ms, True
            item.prior = reading.value if item.prior is None else item.prior
        with run.lock:
            run.sends += answer.sent
            run.accepted += answer.outcome == "accepted"
        heed_retry_after(run, item.key, answer)
        if answer.outcome == "not_applied":
            later(run, [item], dones, None, answer.says, answer.retry_after)
            continue
        if answer.outcome == "refused":
            item.refused = answer.says or "refused, without a word"
            sent.add(id(item))
        elif answer.outcome == "conflict":
            item.conflicts += 1
            if item.conflicts % CONFLICTS_IN_A_ROW == 0:
                sent.add(id(item))
        else:
            note_sent(run, item, reading, answer, done, now)
            sent.add(id(item))
        again.append(item)
    return again


def heed_retry_after(run: Run, key: str, answer: Written) -> None:
    """Retry after 429: nothing is sent for as long as the system asks; a write without an answer counts for the breaker."""
    if answer.outcome not in ("unknown", "not_applied"):
        run.write_breaker.succeeded()
        return
    if answer.outcome == "unknown" or answer.retry_after is None:
        run.write_breaker.failed(key)
    if answer.retry_after is not None:
        run.pause.ask(answer.retry_after)


def note_sent(run: Run, item: Item, reading: Reading, answer: Written, done: Done, now: float) -> None:
    """A write that was taken, or may have arrived: from when on a reading tells which."""
    if item.sent and not run.once:
        done.repeats += 1
    if not item.tries:
        item.started_before = run.accepted
    item.sent = item.maybe = True
    item.accepted = answer.outcome == "accepted"
    item.tries += 1
    window_s = run.can.stale_reads_s if item.accepted else run.window_s
    item.clear_at = now + (max(window_s, run.backoff.wait(item.tries)) if window_s > 0 else 0.0)
    item.token_before, item.token_after = reading.token, answer.token
    item.beside = reading.watched
    if item.accepted:
        item.since = now


def write_of(run: Run, item: Item, reading: Reading) -> Write:
    return Write(
        key=item.key, target=reading.target, value=item.value, expected=reading.value, token=reading.token,
        idempotency_key=idempotency_key(item.batch_id, item.key, item.value),
        decision_id=item.deliveries[0].decision_id, batch_id=item.batch_id, run_id=run.run_id,
    )  # fmt: skip


def later(
    run: Run,
    items: Iterable[Item],
    dones: Mapping[int, Done],
    until: float | None,
    says: str,
    retry_after: float | None = None,
) -> None:
    """Hand back, to be looked at again at ``until`` or after a random wait that grows with each failure."""
    now = run.monotonic()
    for item in items:
        done = dones[id(item)]
        if until is None:
            item.failures += 1
            done.until = now + max(run.backoff.wait(item.failures), retry_after or 0.0)
        else:
            done.until = until
        done.says = says or done.says


def idempotency_key(batch_id: str, entity: str, value: int) -> str:
    """The same for every try of one value for one entity in one batch, on any machine."""
    return hashlib.sha256(f"{batch_id}\0{entity}\0{value}".encode()).hexdigest()[:32]
