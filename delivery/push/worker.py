"""What a worker does with some items: read, judge, write, read back.

Belongs here: one step, in a thread that calls the system and never touches the ledger. Does not: which items, and when
(``delivery.push.waves``), one write (``delivery.push.sending``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from delivery.connectors.base import Reading, Unavailable
from delivery.push import evidence, reconciliation, sending
from delivery.push.reconciliation import Final, Gone, Item, Judgement, Send, Wait
from delivery.push.run import SHORTEST_POLL_S, Done, Mode, Run
from delivery.push.sending import later


@dataclass(frozen=True)
class _Look:
    """What one reading of some items showed; without those that could not be read, or wait for another one."""

    judged: Sequence[tuple[Item, Reading, Judgement]] = ()
    at: float = 0.0
    """Monotonic, after the reading."""
    verified_at: datetime | None = None


def step(run: Run, items: Sequence[Item], may_send: bool, mode: Mode) -> list[Done]:
    """Read, judge, write, read back; never waits for long: what needs time is handed back with when to look again."""
    dones = {id(i): Done(i) for i in items}
    sent: set[int] = set()
    now = run.monotonic()
    for item in items:
        item.since = now if item.since is None else item.since
    open_ = list(items)
    while open_:
        started = run.monotonic()
        if run.halt.is_set() or (blocked := run.blocked(sending=False)) > 0:
            later(run, open_, dones, started if run.halt.is_set() else started + blocked, "")
            break
        seen = look(run, open_, dones)
        sends: list[tuple[Item, Reading]] = []
        for item, reading, judgement in seen.judged:
            done = dones[id(item)]
            if conclude(run, done, reading, judgement, seen, mode):
                continue
            if not may_send:
                done.window = evidence.patient(run, item, seen.at)
                done.until = max(seen.at, item.clear_at) if done.window else float("inf")
            elif id(item) in sent:
                later(run, [item], dones, None, f"answered, and still shows {reconciliation.shown(reading)}")
            else:
                sends.append((item, reading))
        if not sends:
            break
        blocked = run.blocked(sending=True)
        if run.halt.is_set() or not run.held.sure or blocked > 0:
            waits = run.monotonic() + blocked
            later(run, [i for i, _ in sends], dones, waits, "not sent: the system is left alone")
            break
        open_ = sending.send(run, sends, dones, sent, started)
    return list(dones.values())


def look(run: Run, open_: Sequence[Item], dones: Mapping[int, Done]) -> _Look:
    """Read items and judge what they show."""
    try:
        readings = run.read([i.key for i in open_])
    except Unavailable as error:
        later(run, open_, dones, None, str(error), error.retry_after)
        return _Look()
    at, verified_at = run.monotonic(), run.clock()
    judged: list[tuple[Item, Reading, Judgement]] = []
    for item in open_:
        reading = readings.get(item.key)
        if reading is None:
            later(run, [item], dones, None, "the system left it out of its answer")
        elif (blocker := claim(run, item, reading)) is not None:
            wait_for_shared(run, item, blocker, dones)
        else:
            item.target = reading.target
            dones[id(item)].missing = reading.state == "missing"
            judged.append((item, reading, evidence.judge(run, item, reading, at)))
    try:
        changes = evidence.history(run, judged)
    except Unavailable as error:
        later(run, [i for i, _, _ in judged], dones, None, f"its change history: {error}", error.retry_after)
        return _Look()
    return _Look([(i, r, evidence.with_evidence(run, i, r, j, changes)) for i, r, j in judged], at, verified_at)


def conclude(run: Run, done: Done, reading: Reading, judgement: Judgement, seen: _Look, mode: Mode) -> bool:
    """What follows from a judgement without a write; False where the item is to be written to."""
    item = done.item
    if isinstance(judgement, Send):
        judgement = evidence.spent(run, item, reading)
    if isinstance(judgement, Final):
        done.final, done.verified_at = reconciliation.with_beside(item, judgement, reading), seen.verified_at
    elif isinstance(judgement, Gone):
        done.until, done.window, done.says = float("inf"), False, judgement.says
    elif isinstance(judgement, Wait):
        done.until = min(judgement.until, seen.at + max(SHORTEST_POLL_S, run.window_s / 10))
        done.window, done.says = True, "waits for a reading that is new enough"
    elif mode == "free":
        done.free = True
    elif mode == "resolve":
        done.final = Final("SKIPPED", f"{run.by}; what may have been sent is not there", reading.value)
    else:
        return False
    return True


def claim(run: Run, item: Item, reading: Reading) -> Item | None:
    """The other item of this batch that has the same target; None where this one may go on."""
    if reading.state == "missing":
        return None
    with run.lock:
        return run.owners.claim(item, f"{item.batch_id}\0{reading.target}")


def wait_for_shared(run: Run, item: Item, other: Item, dones: Mapping[int, Done]) -> None:
    """A target that was found to be shared while it is being sent: never both at once, never against each other."""
    done = dones[id(item)]
    if other.after != item.after:
        words = f"shares {other.target} with {other.key}, for which {other.after} was decided and not {item.after}"
        done.final = Final("REJECTED", words, None)
    elif other.done:
        with run.lock:
            run.owners.items[f"{item.batch_id}\0{other.target}"] = item
        done.until, done.window = run.monotonic(), True
    else:
        done.until, done.window = run.monotonic() + SHORTEST_POLL_S, True
        if other.left:
            done.until, done.window = float("inf"), False
