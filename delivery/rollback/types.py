"""Which batches are meant, and what became of them: selections, errors, results.

Belongs here: values only. Does not: doing anything (``delivery.rollback``, which also exports them).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import date
from typing import Any

from common.errors import SignalboxError


class RollbackError(SignalboxError, RuntimeError):
    """A rollback that cannot begin; says why and the way out."""


@dataclass(frozen=True)
class Batch:
    """This batch."""

    batch_id: str


@dataclass(frozen=True)
class Since:
    """Every batch that decided ``day`` or a later one, of one workflow or of all."""

    day: date
    workflow: str | None = None


@dataclass(frozen=True)
class Model:
    """Every batch that was decided with this version of a workflow's model, whole or in the arm challenger: a batch is
    taken back whole."""

    workflow: str
    version: int


Selection = Batch | Since | Model


@dataclass(frozen=True)
class Left:
    """A delivery that was not taken back, and why, in words."""

    entity: str
    state: str
    says: str


@dataclass(frozen=True)
class RolledBack:
    """What became of one batch: each of its deliveries is counted once, or stands in one list.

    ``already``: an earlier run had completed it, and nothing was done. ``closed``: a person ended it with what was left.
    ``never_sent``: deliveries that still waited and now never go out. ``untouched``: nothing of them stands (refused, never
    arrived, stood there already). ``restored``: deliveries proven by read-back to hold the value from before.
    ``conflicts``: changed by a person, or by another workflow, since; left. ``not_reversible``: closed, the name erased, no
    value stood there before, or given up by a person. ``left``: changed since by a newer batch that stands, refused by the
    system, or without money in the pool. ``partly``: restored as far as the pool had money. ``open``: not there, or not
    known yet: run it again. Beside these, ``beside``: watched fields that a write of the batch, or of its rollback, changed
    with the value; they are not restored. ``push``: the last push of it, as ``Report.as_dict``.
    """

    batch_id: str
    rollback_id: str
    complete: bool
    already: bool
    never_sent: int
    restored: int
    conflicts: tuple[Left, ...] = ()
    not_reversible: tuple[Left, ...] = ()
    left: tuple[Left, ...] = ()
    partly: tuple[Left, ...] = ()
    open: tuple[Left, ...] = ()
    push: dict[str, Any] | None = None
    untouched: int = 0
    beside: tuple[Left, ...] = ()
    closed: bool = False


@dataclass(frozen=True)
class RollbackReport:
    """All batches that were chosen, newest first. ``waiting``: not begun, since a newer one is not complete yet.

    ``newer``: batches of the same workflows that are newer than a chosen one, were not chosen and stay as they are.
    ``retired``: chosen, but the retention policy removed what was delivered: what they changed stays as it is.
    """

    batches: tuple[RolledBack, ...]
    waiting: tuple[str, ...] = ()
    newer: tuple[str, ...] = ()
    retired: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether nothing is left that running it again could bring back."""
        return not self.waiting and all(one.complete for one in self.batches)

    def as_dict(self) -> dict[str, Any]:
        """For a command's --json and for metadata."""
        return asdict(self) | {"complete": self.complete}
