"""What one reading of a downstream system means for one delivery: the state machine's pure part.

Belongs here: what is known of a target while it is pushed, and the judgement of a reading or of a change history. Does not:
calls, waiting, the ledger (``delivery.push``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import TYPE_CHECKING

from delivery.connectors.base import Change, Reading

if TYPE_CHECKING:
    from delivery.ledger import Delivery, State


@dataclass
class Item:
    """One target of a batch, and all that this push knows of it; one thread at a time has it."""

    batch_id: str
    deliveries: tuple[Delivery, ...]
    """One, or several whose entities share the target and agree on the value; the first one's entity is asked for."""
    key: str
    after: int
    """What was decided."""
    value: int
    """What is to be written: ``after``, or less where the pool has no money for all of it."""
    expected: int | None
    """What must stand there for us to write: the last value that we proved, else the one decided from."""
    rollback: bool = False
    target: str = ""
    prior: int | None = None
    """What stood there just before our first write."""

    sent: bool = False
    """A write has gone out at some time."""
    maybe: bool = False
    """A write has gone out and is neither proven nor ruled out."""
    accepted: bool = False
    """The last one was answered with yes."""
    refused: str | None = None
    """The system's words, where it said that it will never take it."""
    offered: bool = False
    """A write has left this machine, whatever was made of it."""
    first_sent_at: datetime | None = None
    tries: int = 0
    """Writes of this push that were answered with yes or not at all."""
    failures: int = 0
    """Tries in a row that came to nothing, for the backoff."""
    conflicts: int = 0
    repeats: int = 0
    clear_at: float = 0.0
    """Monotonic: from then on a read shows the last write if it was ever applied."""
    confirm_at: float | None = None
    token_before: str | None = None
    """The version that the last write was based on, and the one that its answer named."""
    token_after: str | None = None
    beside: Mapping[str, str] = field(default_factory=dict)
    """The watched fields as they were when the last write was sent."""
    due: float = 0.0
    since: float | None = None
    """Monotonic: when this push first tried it."""
    answered: str = ""
    """What the system last said."""
    alone: bool = False
    """It was missing where others were there: it is this one, and not the address."""
    started_before: int = 0
    """``accepted`` count of the whole push when this item was first sent."""
    arms: tuple[str, ...] = ()
    gain: float | None = None
    state: State = "PENDING"
    done: bool = False
    """Over."""
    left: bool = False
    """Not over, and not tried again by this push."""

    @property
    def open_end(self) -> bool:
        """Nothing more is done about it in this push."""
        return self.done or self.left

    def hold(self, at: float, stale_s: float) -> float | None:
        """Until when (monotonic) a reading may be older than what it must be judged for; None: judge it now."""
        if self.maybe:
            return self.clear_at if at < self.clear_at else None
        if stale_s <= 0:
            return None
        if self.confirm_at is None:
            self.confirm_at = at + stale_s
        return self.confirm_at if at < self.confirm_at else None


@dataclass(frozen=True)
class Final:
    """The end of a delivery. ``observed``: the value last read; ``found``: somebody else's value."""

    state: State
    says: str
    observed: int | None
    found: int | None = None


@dataclass(frozen=True)
class Wait:
    """Not known yet; read again at ``until`` (monotonic)."""

    until: float


@dataclass(frozen=True)
class Send:
    """It shows what we expect: write, on condition of this reading."""

    reading: Reading


@dataclass(frozen=True)
class Third:
    """Neither what was expected nor what we sent; ``third`` decides whose it is."""

    reading: Reading


@dataclass(frozen=True)
class Gone:
    """What a batch had proven to be there is not there now: no end, since a wrong address says the same."""

    says: str


Judgement = Final | Wait | Send | Third | Gone

GONE = "is not there downstream"
"""Begins what is said of an entity that the system does not know."""
CLOSED = "is closed downstream and cannot be changed"
"""Begins what is said of an entity that takes no value any more."""
STOOD = "stood there already, nothing was sent"
"""Said of a value that was to be set and stands there without our doing."""
STORED = "stored "
"""Begins what is said of a value that the system made of ours."""


def shown(reading: Reading) -> str:
    """What a reading shows, for people."""
    if reading.value is not None:
        return str(reading.value)
    return f"“{reading.says}”" if reading.says else "no value"


def judge(item: Item, reading: Reading, *, at: float, stale_s: float) -> Judgement:
    """What this reading means now; ``at`` is monotonic, ``stale_s`` how old a reading of this system may be."""
    if reading.value is not None and reading.value == item.value:
        if item.sent:
            return Final("ACKED", "", reading.value)
        if (until := item.hold(at, stale_s)) is not None:
            return Wait(until)
        return Final("ACKED", f"stands there, though {_refusal(item)}" if item.offered else STOOD, reading.value)
    until = item.hold(at, stale_s)
    if reading.state != "open":
        if until is not None:
            return Wait(until)
        gone = reading.state == "missing"
        words = GONE if gone else CLOSED
        says = f"{words}{f' ({reading.says})' if reading.says else ''}"
        if gone and item.rollback:
            return Gone(f"{says}, where a batch had set it: is the address right, and the account?")
        return Final("NOT_REVERSIBLE" if item.rollback else "REJECTED" if gone else "SKIPPED", says, reading.value)
    if item.refused is not None and until is None:
        return Final("REJECTED", item.refused, reading.value)
    if reading.value != item.expected:
        if until is not None:
            return Wait(until)
        if item.maybe:
            return Third(reading)
        return conflict(item, reading.value, f"shows {shown(reading)} where {_value(item.expected)} was expected")
    if item.maybe:
        if until is not None:
            return Wait(until)
        if item.token_before is not None and reading.token is not None and reading.token != item.token_before:
            return conflict(
                item, reading.value, f"shows {shown(reading)} again, in a version that is newer than our write"
            )
    return Send(reading)


def third(item: Item, reading: Reading, changes: Sequence[Change] | None) -> Final:
    """Judge a value that is neither expected nor ours, after a write of ours that may have been applied.

    The version tells it where the system named one for our write, else its history (None: it has none).
    """
    what = f"shows {shown(reading)} after {item.value} {'was' if item.tries else 'may have been'} sent"
    if item.token_after is not None and reading.token is not None:
        if reading.token != item.token_after:
            return conflict(item, reading.value, f"{what}: somebody else wrote after us")
        return Final("REJECTED", f"{STORED}{shown(reading)} instead of {item.value}{_words(item)}", reading.value)
    if changes:
        last = changes[-1]
        if not last.ours:
            return conflict(item, reading.value, f"{what}: {last.actor or 'somebody else'} wrote after us")
        return Final("REJECTED", f"{STORED}{shown(reading)} instead of {item.value}{_words(item)}", reading.value)
    if item.accepted:
        return Final("REJECTED", f"{STORED}{shown(reading)} instead of {item.value}{_words(item)}", reading.value)
    return conflict(item, reading.value, f"{what}, which was not answered")


def ignored(item: Item, reading: Reading, stale_s: float) -> Final:
    """The system said yes, again and again, and nothing changed."""
    later = f" {stale_s:g} s later" if stale_s > 0 else ""
    return Final(
        "REJECTED",
        f"answered yes {item.tries} times and{later} still shows {shown(reading)}{_words(item)}",
        reading.value,
    )


def conflict(item: Item, found: int | None, says: str) -> Final:
    """Somebody else's value stands there; it is left."""
    return Final("CONFLICT", says, found, found)


def with_lost(item: Item, final: Final, changes: Sequence[Change]) -> Final:
    """A judgement after a write of ours, with what the change history says was lost by it.

    By the order of the history, not by clocks: the change just before our write must be the value that we had read; another
    one came between our reading and our write.
    """
    at = _ours(item, changes)
    if at is None:
        if final.state != "ACKED":
            return final
        foreign = [c for c in changes if not c.ours and c.value not in (item.expected, item.value)]
        return (
            _lost(final, foreign[-1]) if foreign else replace(final, says="the change history does not show our write")
        )
    while at > 0 and changes[at - 1].ours and changes[at - 1].value == changes[at].value:
        at -= 1
    before = changes[at - 1] if at > 0 else None
    if before is None or before.ours or before.value == item.expected:
        return final
    return _lost(final, before)


BESIDE = "beside the value there changed"
"""Begins what is said of a value that stands as intended while other watched fields do not."""


def with_beside(item: Item, final: Final, reading: Reading) -> Final:
    """A proven write, with the watched fields that are not what they were before it: the value is right, the entity may not be."""
    if final.state != "ACKED" or not item.sent or not item.beside:
        return final
    changed = sorted(name for name, was in item.beside.items() if reading.watched.get(name, was) != was)
    if not changed:
        return final
    words = f"{BESIDE}: {', '.join(changed)}"
    return replace(final, says=f"{final.says}; {words}" if final.says else words)


def _ours(item: Item, changes: Sequence[Change]) -> int | None:
    """Where the history shows our write; one that was stored as another value is newer than what we had read."""
    exact = [i for i, change in enumerate(changes) if change.ours and change.value == item.value]
    if exact:
        return exact[-1]
    read = max((i for i, change in enumerate(changes) if change.value == item.expected), default=-1)
    other = [i for i, change in enumerate(changes) if change.ours and i > read]
    return other[-1] if other and read >= 0 else None


def set_back(item: Item, changes: Sequence[Change]) -> bool:
    """Whether the history shows our write and then somebody else's: the expected value is theirs and not the old one."""
    ours = [i for i, change in enumerate(changes) if change.ours and change.value == item.value]
    return bool(ours) and any(not change.ours for change in changes[ours[-1] + 1 :])


@dataclass
class Owners:
    """Which item a target belongs to in this push, so that two entities never write one target against each other."""

    items: dict[str, Item] = field(default_factory=dict)

    def claim(self, item: Item, target: str) -> Item | None:
        """Take a target; the other item where it is taken already."""
        first = self.items.setdefault(target, item)
        return None if first is item else first


def _lost(final: Final, change: Change) -> Final:
    what = f"{change.actor or 'somebody else'} set {_value(change.value)} between our reading and our write"
    if final.state == "ACKED":
        return Final("OVERWRITTEN", what, final.observed, change.value)
    return replace(final, says=f"{final.says}; before that, {what}, which replaced it")


def _value(value: int | None) -> str:
    return "no value" if value is None else str(value)


def _refusal(item: Item) -> str:
    if item.refused is not None:
        return f"the system refused our write ({item.refused})"
    return f"the system turned our write away, since it had been changed{_words(item)}"


def _words(item: Item) -> str:
    return f" (it said: {item.answered})" if item.answered else ""
