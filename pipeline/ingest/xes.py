"""Landing XES: the event logs of process mining (IEEE 1849), one row an event.

Belongs here: how a log's XML becomes rows. Does not: columns and types (``pipeline.ingest.readers``), the contract.

- A column is an attribute's key as it stands (``concept:name``, ``time:timestamp``); those of the case around it have the
  prefix ``case:``. An event outside of a trace has none of them; a trace without events is no row.
- Values are texts as they stand, whatever type they are written with.
- An attribute of an attribute is a column of its own, ``outer/inner``. Lists are JSON: ``[{"key": …, "value": …}, …]``.
- What an event does not say is null. A ``global`` declares what should be there and with which value to create it; it does not
  say that it was so. Classifiers, extensions and the attributes of the log itself name no events and are not read.
- An event with a key twice, without key or value, or with an element that is no attribute is malformed, alone; so are all
  events of a case whose own attributes are.
- A document type is refused whole: an event log has none, and entities can grow without bound. So is an event in a place where
  none belongs. The file declares its own encoding; the source's ``encoding`` is not asked.

There is no library for it: the field's own (pm4py) is under the AGPL and wants ten others.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.parsers import expat

from pipeline.ingest.files import BLOCK, FileRefused, Snapshot

_TYPES = {"string", "date", "int", "float", "boolean", "id", "list", "container"}
_DEEPEST = 8


@dataclass
class Event:
    """An event: its values by column, the columns written as ``float``, its place in the file, and why it is malformed."""

    values: dict[str, str]
    floats: set[str]
    why: str
    line: int
    content: Path
    start: int
    end: int = 0

    def text(self) -> str:
        """The event as it stands in the file."""
        with self.content.open("rb") as file:
            file.seek(self.start)
            return file.read(self.end - self.start).decode("utf-8", "replace")


@dataclass
class _Attributes:
    """The attributes of an event or a case, as far as they were read."""

    prefix: str = ""
    values: dict[str, str] = field(default_factory=dict)
    floats: set[str] = field(default_factory=set)
    why: str = ""

    def put(self, key: str, kind: str, value: str) -> None:
        if key in self.values:
            self.fail(f"key {key[len(self.prefix) :]!r} stands twice")
        self.values[key] = value
        if kind == "float":
            self.floats.add(key)

    def fail(self, why: str) -> None:
        self.why = self.why or why


@dataclass
class _Open:
    """An attribute whose end has not come: its key with those around it, and the values of a list."""

    key: str
    items: list[dict[str, Any]] | None = None
    within: list[dict[str, Any]] | None = None
    column: bool = True


class _Log:
    """Expat's callbacks; ``ready`` holds the events that are whole."""

    def __init__(self, snap: Snapshot) -> None:
        self.snap, self.ready = snap, list[Event]()
        self.path: list[str] = []
        self.case: _Attributes | None = None
        self.waiting: list[tuple[Event, _Attributes]] = []
        self.event: _Attributes | None = None
        self.begun: Event | None = None
        self.open: list[_Open] = []
        self.skipped = 0
        self.parser = expat.ParserCreate(namespace_separator=" ")
        self.parser.StartElementHandler = self.start
        self.parser.EndElementHandler = self.end
        self.parser.StartDoctypeDeclHandler = self.refuse_doctype

    def refuse(self, why: str) -> FileRefused:
        return FileRefused(f"{self.snap.name}: line {self.parser.CurrentLineNumber}: {why}")

    def refuse_doctype(self, *_: Any) -> None:
        raise self.refuse("declares a document type, which an event log has not; take it out")

    def start(self, name: str, said: dict[str, str]) -> None:
        tag = name.rpartition(" ")[2]
        around = self.path[-1] if self.path else ""
        self.path.append(tag)
        due = {"trace": ("log",), "event": ("log", "trace")}.get(tag, (around,))
        if around and around not in due and self.event is None:
            raise self.refuse(f"a <{tag}> stands in <{around}>, where none belongs; nothing of the file is read")
        if self.skipped:
            self.skipped += 1
        elif not around:
            if tag != "log":
                raise self.refuse(f"is no event log: it starts with <{tag}> where <log> is due")
        elif around == "log" and tag == "trace":
            self.case = _Attributes("case:")
        elif tag == "event" and around in ("log", "trace"):
            self.event = _Attributes()
            at = self.parser
            self.begun = Event({}, set(), "", at.CurrentLineNumber, self.snap.content, at.CurrentByteIndex)
        elif self.event is not None or self.case is not None:
            self.attribute(tag, said)
        else:
            self.skipped = 1

    def attribute(self, tag: str, said: dict[str, str]) -> None:
        owner = self.event if self.event is not None else self.case
        assert owner is not None
        outer = self.open[-1] if self.open else None
        if tag == "values" and outer is not None and outer.items is not None:
            self.open.append(_Open(outer.key, outer.items, None, column=False))
            return
        if tag not in _TYPES or "key" not in said or len(self.open) >= _DEEPEST:
            deep = f"attributes stand more than {_DEEPEST} deep"
            odd = f"<{tag}> is no attribute" if tag not in _TYPES else f"<{tag}> has no key"
            owner.fail(deep if len(self.open) >= _DEEPEST else odd)
            self.skipped = 1
            return
        many = tag in ("list", "container")
        if not many and "value" not in said:
            owner.fail(f"{said['key']!r} has no value")
        items: list[dict[str, Any]] | None = [] if many else None
        if outer is not None and outer.items is not None:
            entry: dict[str, Any] = {"key": said["key"], "value": items if many else said.get("value")}
            outer.items.append(entry)
            self.open.append(_Open(said["key"], items, None, column=False))
            return
        key = f"{outer.key}/{said['key']}" if outer is not None and outer.column else owner.prefix + said["key"]
        if not many:
            owner.put(key, tag, said.get("value", ""))
        self.open.append(_Open(key, items))

    def end(self, name: str) -> None:
        tag = self.path.pop()
        if self.skipped:
            self.skipped -= 1
        elif tag == "event" and self.begun is not None and not self.open:
            assert self.event is not None
            self.begun.end = self.parser.CurrentByteIndex + len(b"</event>")
            self.waiting.append((self.begun, self.event))
            self.event = self.begun = None
            if self.case is None:
                self.hand_on()
        elif tag == "trace" and not self.open:
            self.hand_on()
            self.case = None
        elif self.open:
            done = self.open.pop()
            owner = self.event if self.event is not None else self.case
            if done.items is not None and done.column and owner is not None:
                owner.put(done.key, "list", json.dumps(done.items, ensure_ascii=False))

    def hand_on(self) -> None:
        case = self.case or _Attributes("case:")
        for event, own in self.waiting:
            both = sorted(own.values.keys() & case.values.keys())
            event.why = own.why or (f"the case: {case.why}" if case.why else "")
            if both:
                event.why = event.why or f"key {both[0]!r} stands twice: the case has it, too"
            event.values, event.floats = {**case.values, **own.values}, case.floats | own.floats
            self.ready.append(event)
        self.waiting = []


def events(snap: Snapshot) -> Iterator[Event]:
    """The events of a log in the file's order.

    Raises FileRefused where the file is not well-formed XML, has a document type, or is no event log.
    """
    log = _Log(snap)
    with snap.content.open("rb") as file:
        while True:
            block = file.read(BLOCK)
            try:
                log.parser.Parse(block, not block)
            except expat.ExpatError as error:
                said = f"{snap.name}: line {error.lineno}: is not whole XML ({expat.ErrorString(error.code)}); send it again"
                raise FileRefused(said) from error
            yield from log.ready
            log.ready = []
            if not block:
                return
