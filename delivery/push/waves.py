"""Waves: items go through the workers in groups, with the ledger written before and after each.

Belongs here: the queue, what is about to be tried, what came of it. Does not: what a worker does (``delivery.push.worker``).
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import CancelledError
from functools import partial

from delivery.ledger import OPEN, Attempt, Result, State
from delivery.push import evidence, worker
from delivery.push.reconciliation import Item
from delivery.push.run import Done, Mode, Run, chunks
from delivery.push.sending import idempotency_key
from delivery.push.types import Progress


def run_waves(run: Run, items: Sequence[Item], mode: Mode) -> list[Item]:
    """Take the items through as many waves as they need; returns those that ``free`` hands back."""
    order = itertools.count()
    queue = [(item.due, next(order), item) for item in items if not item.open_end]
    heapq.heapify(queue)
    free: list[Item] = []
    while queue:
        run.why = run.why or run.must_stop()
        if run.why:
            break
        now = run.monotonic()
        blocked = run.blocked(sending=mode == "send")
        if blocked > 0 and now + blocked - run.moved > run.settings.patience_s:
            run.why = f"{run.system} has not answered for {now - run.moved:.0f} s: run it again later"
            break
        if blocked > 0 or queue[0][0] > now:
            run.nap(max(blocked, queue[0][0] - now))
            continue
        probing = run.read_breaker.half_open or (mode == "send" and run.write_breaker.half_open)
        bulk = run.settings.concurrency * run.can.bulk_write if run.can.bulk_write > 1 else 0
        size = 1 if probing else max(run.settings.wave, bulk)
        wave: list[Item] = []
        while queue and len(wave) < size and queue[0][0] <= now:
            wave.append(heapq.heappop(queue)[2])
        for done in run_wave(run, wave, mode):
            item = done.item
            if done.free:
                free.append(item)
            elif done.final is None:
                since = item.since if item.since is not None else now
                if not done.window and done.until - since > run.settings.patience_s:
                    item.left = True
                else:
                    heapq.heappush(queue, (done.until, next(order), item))
    for _, _, item in queue:
        item.left = True
    return free


def run_wave(run: Run, wave: Sequence[Item], mode: Mode) -> list[Done]:
    """Write down what is about to be tried, try it, write down what came of it."""
    now = run.monotonic()
    ready = [i for i in wave if mode == "send" and i.clear_at <= now and evidence.patient(run, i, now)]
    begin(run, ready)
    steps = [(chunk, True) for chunk in chunks(ready, run.can.bulk_write)]
    begun = {id(i) for i in ready}
    steps += [(chunk, False) for chunk in chunks([i for i in wave if id(i) not in begun], run.can.bulk_read)]
    futures = run.parallel([partial(worker.step, run, chunk, may, mode) for chunk, may in steps])
    dones: list[Done] = []
    wrong: BaseException | None = None
    for future, (chunk, _) in zip(futures, steps, strict=True):
        error = CancelledError() if future.cancelled() else future.exception()
        if error is None:
            dones += future.result()
            continue
        if not isinstance(error, Exception):
            raise error
        wrong = wrong or error
        dones += [Done(i, until=now, says=f"not finished: {type(error).__name__}") for i in chunk]
    stop_if_none_there(run, dones)
    settle(run, dones, begun)
    if wrong is not None:
        raise wrong
    return dones


def stop_if_none_there(run: Run, dones: Sequence[Done]) -> None:
    """Where a whole wave is missing it is more likely the address than the entities: stop, and leave them open."""
    gone = [done for done in dones if done.missing and not done.item.alone]
    if any(done.missing is False for done in dones):
        for done in gone:
            done.item.alone = True
    elif len(gone) > 1 and not all(done.window for done in gone):
        run.why = run.why or run.all_missing(len(gone))
        for done in gone:
            done.final, done.until, done.window, done.says = None, float("inf"), False, run.why


def begin(run: Run, items: Sequence[Item]) -> None:
    """In the ledger before anything is sent."""
    at = run.clock()
    for batch_id, own in by_batch(items):
        run.timed(run.ledger.begin, run.held.lease, batch_id, [
            Attempt(d.n, i.value, i.expected, idempotency_key(batch_id, i.key, i.value), at)
            for i in own for d in i.deliveries
        ])  # fmt: skip
    for item in items:
        run.count(item, "IN_FLIGHT")
        if item.first_sent_at is None:
            item.first_sent_at = at


def settle(run: Run, dones: Sequence[Done], begun: Collection[int] = ()) -> None:
    """In the ledger, in one transaction for each batch: the ends, and how far those are that were begun."""
    of = {id(done.item): done for done in dones}
    now = run.clock()
    for batch_id, items in by_batch([done.item for done in dones]):
        results = []
        for item in items:
            done = of[id(item)]
            if done.final is None and id(item) not in begun:
                continue
            state: State = done.final.state if done.final else "UNKNOWN" if item.maybe else "PENDING"
            run.count(item, state)
            final = done.final
            theirs = final is not None and state in ("CONFLICT", "OVERWRITTEN")
            # a write that the system refused, and took or made something of all the same, is ours to take back
            taken = (
                item.offered and state in ("ACKED", "REJECTED") and final is not None and final.observed != item.prior
            )
            results += [
                Result(
                    d.n, state, target=item.target or None, expected=item.expected, prior=item.prior,
                    sent=item.value if item.sent or taken else None,
                    observed=None if final is None else final.found if theirs else final.observed,
                    verified_at=done.verified_at if final is not None else None,
                    says=(final.says if final else done.says) or None, window_ms=done.window_ms, outcome=done.outcome,
                    ended_at=now, repeat=done.repeats + item.repeats,
                )
                for d in item.deliveries
            ]  # fmt: skip
        if results:
            run.timed(run.ledger.settle, run.held.lease, batch_id, results)
            for item in items:
                if of[id(item)].final is not None or id(item) in begun:
                    run.repeats += item.repeats
                    item.repeats = 0
    for done in dones:
        run.repeats += done.repeats
        if done.window_ms is not None:
            run.windows.append(done.window_ms)
        if done.final is not None:
            done.item.done = True
        if done.final is not None or done.outcome == "accepted":
            run.moved = run.monotonic()
    if run.progress is not None and dones:
        over = sum(count for state, count in run.counts.items() if state not in OPEN)
        run.progress(Progress(run.batch.batch_id, over, run.total, dict(+run.counts)))


def by_batch(items: Iterable[Item]) -> list[tuple[str, list[Item]]]:
    of: dict[str, list[Item]] = {}
    for item in items:
        of.setdefault(item.batch_id, []).append(item)
    return list(of.items())
