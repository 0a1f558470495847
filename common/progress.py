"""How far a run over many days has come: stages tell it, and whoever started the run in this process may listen.

Belongs here: the way from a stage to its listener. Does not: showing it (``orchestration.cli.command``). Nobody needs to listen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Step:
    """A stage is at the ``number``-th (from 1) of ``total`` days or files, which is ``at``."""

    stage: str
    number: int
    total: int
    at: str


Listener = Callable[[Step], None]
_listener: ContextVar[Listener | None] = ContextVar("progress", default=None)


@contextmanager
def heard_by(listener: Listener) -> Iterator[None]:
    """What stages tell within is told to ``listener``, in this thread."""
    before = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(before)


def each(stage: str, things: Iterable[T], total: int) -> Iterator[T]:
    """``things`` one by one, telling of each when its turn comes. A pair is named by its first part."""
    listener = _listener.get()
    for number, thing in enumerate(things, 1):
        if listener is not None:
            listener(Step(stage, number, total, str(thing[0] if isinstance(thing, tuple) else thing)))
        yield thing
