"""The declarative REST connector: a YAML says how a system is read and written, and this does it.

Belongs here: the calls that a YAML describes (``rest_spec``) and what their answers say. Does not: any one system by name
(``examples/`` has some), retries, or judging what came back (``delivery.push``). Ids and answers are data of others: never
part of a path, a header or a text as they are.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from delivery.connectors.base import (
    Capabilities,
    Change,
    EntityState,
    Misconfigured,
    Outcome,
    Reading,
    Unavailable,
    Write,
    Writes,
    Written,
    meaning,
)
from delivery.connectors.http import Answer, BadAnswer, NotSent, outcome_of, retry_after
from delivery.connectors.rest_calls import MorePages, RestCalls, Singly
from delivery.connectors.rest_spec import (
    History,
    ReadMany,
    ReadOne,
    RestSettings,
    RestSystem,
    WriteMany,
    WriteOne,
    load,
    used_in,
)
from delivery.connectors.rest_version import another
from delivery.connectors.template import ABSENT, Unfit, at, fill

__all__ = ["EXAMPLES", "SETTINGS", "RestConnector", "RestSettings", "connect", "load", "mapping", "writer", "writes"]

EXAMPLES = Path(__file__).parent / "examples"
"""Worked examples, to be copied into a workflow's folder and changed there."""
LONGEST_ID = 200


class RestConnector:
    """A system that a YAML describes. Several threads use it at once; between calls it keeps connections, and whether the
    system was seen to heed conditions."""

    def __init__(
        self,
        spec: RestSystem,
        *,
        environ: Mapping[str, str],
        clock: Callable[[], datetime],
        ca_file: Path | None = None,
    ) -> None:
        self.system = spec.system
        self.mapping = _mapping(spec)
        self._spec, self._clock = spec, clock
        self._calls = RestCalls(spec, environ=environ, clock=clock, ca_file=ca_file)
        self._entity = re.compile(spec.entity)
        self._heeds = False
        read, write = spec.read, spec.write
        self._capabilities = Capabilities(
            conditional_write=read.token is not None and read.token.exact,
            idempotency_key=write.remembers_key,
            bulk_read=read.many.at_most if read.many else 1,
            bulk_write=write.many.at_most if write.many else 1,
            change_history=spec.history is not None,
            stale_reads_s=spec.stale_reads_s,
        )

    def __repr__(self) -> str:
        return f"RestConnector({self.system!r})"

    @property
    def capabilities(self) -> Capabilities:
        """As the YAML promises them, less a condition that the system was seen to ignore."""
        return self._capabilities

    def close(self) -> None:
        """Let go of connections."""
        self._calls.close()

    # ------------------------------------------------------------------ read

    def read(self, keys: Sequence[str]) -> dict[str, Reading]:
        """Every key as it stands now; what a listing leaves out is asked for once more before it counts as missing.

        Raises Unavailable and Misconfigured.
        """
        spec = self._spec.read
        found: dict[str, Reading] = {}
        wanted: list[str] = []
        for key in dict.fromkeys(keys):
            unfit = self._unfit(key)
            if unfit:
                found[key] = Reading(key=key, target=key, value=None, state="missing", says=unfit)
            else:
                wanted.append(key)
        if spec.many is not None and (len(wanted) > 1 or spec.one is None):
            listable = [key for key in wanted if self._listable(spec.many, key)]
            for start in range(0, len(listable), spec.many.at_most):
                chunk = listable[start : start + spec.many.at_most]
                try:
                    listed = self._read_many(spec.many, chunk)
                except Singly as turned_away:
                    if spec.one is None:
                        raise Misconfigured(f"{self.system}: read.many: {turned_away.says}") from None
                    listed = {}
                found.update(listed)
                # A page that shifted under reading, or a filter that is not quite one, must not make an entity vanish
                left = [key for key in chunk if key not in listed]
                if left and spec.one is None:
                    try:
                        found.update(self._read_many(spec.many, left))
                    except Singly as turned_away:
                        raise Misconfigured(f"{self.system}: read.many: {turned_away.says}") from None
        for key in wanted:
            if key not in found:
                found[key] = (
                    self._read_one(spec.one, key)
                    if spec.one is not None
                    else Reading(key=key, target=key, value=None, state="missing", says="no listing holds it")
                )
        return found

    def _unfit(self, key: str) -> str:
        if len(key) > LONGEST_ID or not self._entity.fullmatch(key):
            return f"{self._calls.clean(key, 60)!r} cannot be an id of this system (`entity`)"
        return ""

    @staticmethod
    def _listable(call: ReadMany, key: str) -> bool:
        """Whether an id can stand among others: none that holds what stands between them."""
        try:
            fill(call.row, {"entity": key})
        except Unfit:
            return False
        return call.join not in key or "entities" not in used_in(call)

    def _read_one(self, call: ReadOne, key: str) -> Reading:
        try:
            answer = self._calls.send(call, {"entity": key})
        except Unfit as unfit:
            return Reading(key=key, target=key, value=None, state="missing", says=str(unfit))
        try:
            if not self._calls.usable(answer, "read.one"):
                return Reading(
                    key=key,
                    target=key,
                    value=None,
                    state="missing",
                    says=f"answered {answer.status} {self._calls.words(answer)}",
                )
        except Singly as turned_away:
            raise Misconfigured(f"{self.system}: read.one: {turned_away.says}") from None
        item = at(self._calls.document(answer, self._spec.read.errors), call.item)
        if isinstance(item, list):
            if not item:
                return Reading(key=key, target=key, value=None, state="missing", says="the answer is an empty list")
            if len(item) > 1:
                raise Unavailable(f"{self.system}: read.one answered {len(item)} items for one entity")
            item = item[0]
        if not isinstance(item, Mapping):
            raise Unavailable(f"{self.system}: read.one: nothing that is an item stands at {call.item!r}")
        named = self._named(item)
        if self._spec.read.key is not None and named != key:
            raise Unavailable(f"{self.system}: read.one asked for one entity and was told of another")
        return self._reading(key, item, answer)

    def _read_many(self, call: ReadMany, keys: Sequence[str]) -> dict[str, Reading]:
        values = {
            "entities": call.join.join(keys),
            "rows": [fill(call.row, {"entity": key}) for key in keys],
        }
        found: dict[str, Reading] = {}
        doubtful: set[str] = set()
        wanted = set(keys)
        try:
            for page in self._calls.pages(call, values, call.pages, call.items, "read.many", self._spec.read.errors):
                for item in page.items:
                    key = self._named(item) if isinstance(item, Mapping) else None
                    if key is None or key not in wanted:
                        continue
                    reading = self._reading(key, item, page.answer)
                    if found.get(key, reading) != reading:
                        doubtful.add(key)
                    found[key] = reading
                if wanted <= found.keys():
                    break
        except MorePages as more:
            if self._spec.read.one is None:
                raise Unavailable(str(more)) from None
        if self._spec.read.one is not None:
            for key in doubtful:
                del found[key]
        return found

    def _named(self, item: Mapping[str, Any]) -> str | None:
        name = at(item, self._spec.read.key) if self._spec.read.key is not None else ABSENT
        return str(name) if isinstance(name, str | int) and not isinstance(name, bool) else None

    def _reading(self, key: str, item: Mapping[str, Any], answer: Answer) -> Reading:
        spec = self._spec.read
        target = at(item, spec.target) if spec.target is not None else key
        if not isinstance(target, str | int) or isinstance(target, bool):
            raise Unavailable(f"{self.system}: no id stands where read.target points")
        value, says = self._spec.values.read(at(item, spec.value))
        token: str | None = None
        if spec.token is not None and spec.token.at is not None:
            token = _version(at(item, spec.token.at))
        elif spec.token is not None:
            token = answer.headers.get(str(spec.token.header).lower())
        state: EntityState = "open"
        if any(test.holds(item) for test in spec.missing):
            state = "missing"
        elif any(test.holds(item) for test in spec.closed):
            state = "closed"
        return Reading(
            key=key,
            target=str(target),
            value=value,
            token=token,
            state=state,
            says=self._calls.clean(says),
            watched={place: repr(at(item, place)) for place in spec.watch},
        )

    # ------------------------------------------------------------------ write

    def apply(self, writes: Sequence[Write], *, validate_only: bool = False) -> list[Written]:
        """Try each write once. Raises Misconfigured when the token is refused and nothing of these was written."""
        if validate_only:
            raise Misconfigured(f"{self.system}: a REST system cannot check a write without writing")
        many = self._spec.write.many
        if many is None:
            return self._each(writes)
        size = many.at_most
        return self._until_denied([writes[n : n + size] for n in range(0, len(writes), size)], self._write_chunk)

    def _write_chunk(self, writes: Sequence[Write]) -> list[Written]:
        many = self._spec.write.many
        if many is None or (len(writes) == 1 and self._spec.write.one is not None):
            return [self._write_one(write) for write in writes]
        return self._write_many(many, writes)

    def _each(self, writes: Sequence[Write]) -> list[Written]:
        return self._until_denied([[write] for write in writes], self._write_chunk)

    def _until_denied(
        self, chunks: Sequence[Sequence[Write]], send: Callable[[Sequence[Write]], list[Written]]
    ) -> list[Written]:
        """Send chunk after chunk; a refused token ends it, but never hides what was written before."""
        done: list[Written] = []
        for n, chunk in enumerate(chunks):
            try:
                done += send(chunk)
            except Misconfigured as error:
                if not done:
                    raise
                # the chunk at which it was refused had left, those after it never will
                done += [
                    Written(w.key, "not_applied", str(error), sent=rest is chunk) for rest in chunks[n:] for w in rest
                ]
                break
        return done

    def _write_one(self, write: Write) -> Written:
        try:
            answer = self._calls.send(typing.cast(WriteOne, self._spec.write.one), self._values(write))
        except Unfit as unfit:
            return self._unsent(write, unfit)
        except Unavailable as failed:
            return self._failed(write, failed)
        outcome, says = self._judge(answer)
        token = self._token_after(answer) if outcome == "accepted" else None
        return Written(write.key, outcome, says, retry_after(answer.headers, self._clock()), token)

    def _token_after(self, answer: Answer) -> str | None:
        """The version that our write made, where the answer names it and versions are exact."""
        token, call = self._spec.read.token, typing.cast(WriteOne, self._spec.write.one)
        if token is None or not token.exact:
            return None
        if token.header is not None:
            return answer.headers.get(token.header.lower())
        if call.item is None or not answer.body:
            return None
        return _version(at(at(answer.json(), call.item), token.at or ""))

    def _write_many(self, call: WriteMany, writes: Sequence[Write]) -> list[Written]:
        done: dict[int, Written] = {}
        rows: dict[int, Any] = {}
        for n, write in enumerate(writes):
            try:
                rows[n] = fill(call.row, self._values(write))
            except Unfit as unfit:
                done[n] = self._unsent(write, unfit)
        if rows:
            first = writes[next(iter(rows))]
            values = {"rows": list(rows.values()), "batch_id": first.batch_id, "run_id": first.run_id}
            try:
                answer = self._calls.send(call, values)
            except Unfit as unfit:
                return [self._unsent(w, unfit) for w in writes]
            except Unavailable as failed:
                done |= {n: self._failed(writes[n], failed) for n in rows}
            else:
                outcome, says = self._judge(answer)
                wait = retry_after(answer.headers, self._clock())
                if outcome in ("refused", "conflict") and len(rows) > 1:
                    done |= self._turned_away({n: writes[n] for n in rows}, says, answer.status)
                elif outcome != "accepted":
                    done |= {n: Written(writes[n].key, outcome, says, retry_after=wait) for n in rows}
                else:
                    done |= self._row_answers(call, {n: writes[n] for n in rows}, answer)
        return [done[n] for n in range(len(writes))]

    def _turned_away(self, writes: Mapping[int, Write], says: str, status: int) -> dict[int, Written]:
        """What became of the rows of a call that was turned away as a whole, each by itself: one bad row takes no other along.

        Some may have been taken before the bad one was met. So they are read first: what stands there is not sent again.
        """
        if self._spec.stale_reads_s > 0:  # what is read now may be older than the call
            if status < 300:
                return {n: Written(w.key, "unknown", says) for n, w in writes.items()}
            return dict(zip(writes, self._each(list(writes.values())), strict=True))
        try:
            shown = self.read([w.key for w in writes.values()])
        except (Unavailable, Misconfigured) as error:
            unread = self._calls.clean(f"{says}; and then it could not be read: {error}")
            return {n: Written(w.key, "unknown", unread) for n, w in writes.items()}
        done: dict[int, Written] = {}
        again: dict[int, Write] = {}
        for n, write in writes.items():
            reading = shown[write.key]
            if reading.value == write.value and reading.state == "open":
                done[n] = Written(write.key, "accepted", says, token=reading.token)
            elif reading.value == write.expected and reading.state == "open":
                # not with what is read now: a condition is on what the decision to write was based on
                again[n] = write
            else:
                done[n] = Written(write.key, "unknown", says)
        try:
            return done | dict(zip(again, self._each(list(again.values())), strict=True))
        except Misconfigured as error:
            if not done:
                raise
            return done | {n: Written(w.key, "not_applied", str(error)) for n, w in again.items()}

    def _row_answers(self, call: WriteMany, writes: Mapping[int, Write], answer: Answer) -> dict[int, Written]:
        if call.results is None and call.failures is None:
            return {n: Written(w.key, "accepted") for n, w in writes.items()}
        document = answer.json() if answer.body else None
        by_name = {w.key: n for n, w in writes.items()} | {w.target: n for n, w in writes.items()}
        done: dict[int, Written] = {}
        if call.failures is not None:
            for row in _list(at(document, call.failures.rows)):
                for name in _names(at(row, call.failures.key)):
                    if name in by_name:
                        n = by_name[name]
                        says = self._calls.said(row, call.failures.says)
                        done[n] = Written(writes[n].key, call.failures.outcome, says)
        if call.results is not None:
            results = _list(at(document, call.results.rows))
            if call.results.key is None:
                # Without names only the order tells, and a list of another length tells nothing
                pairs = list(zip(writes, results, strict=True)) if len(results) == len(writes) else []
            else:
                pairs = [
                    (by_name[name], row)
                    for row in results
                    for name in _names(at(row, call.results.key))
                    if name in by_name
                ]
            for n, row in pairs:
                rule = next((rule for rule in call.results.errors if rule.holds(row)), None)
                if rule is not None:
                    done[n] = Written(writes[n].key, rule.outcome, self._calls.said(row, rule.says, rule.at))
                else:
                    done.setdefault(n, Written(writes[n].key, "accepted"))
        for n, write in writes.items():
            if n not in done:
                done[n] = Written(write.key, call.unnamed, "the answer says nothing of this row")
        return done

    def _values(self, write: Write) -> dict[str, Any]:
        """What the placeholders of one write stand for. Raises Unfit."""
        unfit = self._unfit(write.key)
        if unfit:
            raise Unfit(unfit)
        if self._spec.read.token is not None and not write.token:
            raise Unfit(
                "the system showed no version to depend on (`read.token`), so the write could not be conditional"
            )
        return {
            "entity": write.key,
            "target": write.target,
            "value": self._spec.values.write(write.value),
            "token": write.token,
            "idempotency_key": write.idempotency_key,
            "decision_id": write.decision_id,
            "batch_id": write.batch_id,
            "run_id": write.run_id,
        }

    def _judge(self, answer: Answer) -> tuple[Outcome, str]:
        """What an answer says of the whole call. Raises Misconfigured for a refused token."""
        spec = self._spec.write
        outcome = spec.statuses.get(answer.status, outcome_of(answer.status))
        if answer.status == 401 and 401 not in spec.statuses:
            raise Misconfigured(self._calls.denied(answer))
        if outcome != "accepted":
            return outcome, self._calls.clean(f"{answer.status} {self._calls.words(answer)}")
        if not answer.body:
            return outcome, ""
        try:
            document = answer.json()
        except BadAnswer as bad:
            return "unknown", self._calls.clean(f"answered {answer.status}, but {bad}")
        for rule in spec.errors:
            if rule.holds(document):
                return rule.outcome, self._calls.said(document, rule.says, rule.at)
        return outcome, ""

    def on_another_version(self, write: Write) -> Written | None:
        """See ``base.on_another_version``. An ETag that is shown is no proof that If-Match is looked at."""
        if not self._capabilities.conditional_write or not write.token or self._heeds:
            return None
        stale = replace(write, token=another(write.token))
        one, many = self._spec.write.one, self._spec.write.many
        told = [self._write_one(stale)] if one is not None else []
        if many is not None and (not told or told[0].outcome == "conflict"):
            told += self._write_many(many, [stale])
        self._heeds = all(answer.outcome == "conflict" for answer in told)
        if told[-1].outcome == "accepted":
            self._capabilities = replace(self._capabilities, conditional_write=False, condition_ignored=True)
        return told[-1]

    def _unsent(self, write: Write, unfit: Unfit) -> Written:
        return Written(write.key, "refused", self._calls.clean(f"{unfit}; nothing was sent"), sent=False)

    def _failed(self, write: Write, failed: Unavailable) -> Written:
        if isinstance(failed.__cause__, NotSent):
            return Written(write.key, "not_applied", str(failed), sent=False)
        return Written(write.key, "unknown", str(failed))

    # ------------------------------------------------------------------ history

    def history(self, keys: Sequence[str], since: datetime) -> list[Change]:
        """Changes of the values since then (naive UTC), oldest first.

        A system that tells whole seconds tells a change of the second of ``since`` too, since it may be later.
        Raises Unavailable, also for a history that is longer than its pages may be.
        """
        spec = self._spec.history
        if spec is None:
            return []
        fit = [key for key in dict.fromkeys(keys) if not self._unfit(key)]
        targets = {key: key for key in fit}
        if "target" in used_in(spec) and self._spec.read.target is not None:
            targets = {key: r.target for key, r in self.read(fit).items() if r.state != "missing"}
        found: list[Change] = []
        for key, target in targets.items():
            try:
                for page in self._calls.pages(
                    spec, {"entity": key, "target": target}, spec.pages, spec.items, "history", ()
                ):
                    changes = [c for item in page.items for c in self._changes(spec, key, item)]
                    found += [
                        c
                        for c in changes
                        if c.at >= since or (not c.at.microsecond and c.at >= since.replace(microsecond=0))
                    ]
                    if spec.newest_first and changes and min(c.at for c in changes) < since.replace(microsecond=0):
                        break
            except MorePages as more:
                raise Unavailable(str(more)) from None
            except Singly as turned_away:
                raise Unavailable(f"{self.system}: history: {turned_away.says}") from None
            except Unfit:
                continue
        # Stable: within one second the system's own order counts, in which an overwrite is found
        return sorted(reversed(found) if spec.newest_first else found, key=lambda c: c.at)

    def _changes(self, spec: History, key: str, item: Any) -> Iterator[Change]:
        details = [item] if spec.changes is None else _list(at(item, spec.changes))
        for detail in details:
            if not all(test.holds(detail, item) for test in spec.where):
                continue

            def look(pointer: str, detail: Any = detail) -> Any:
                here = at(detail, pointer)
                return at(item, pointer) if here is ABSENT else here

            moment = _moment(look(spec.time))
            if moment is None:
                raise Unavailable(f"{self.system}: history: no time that can be read stands at {spec.time}")
            actor = look(spec.actor)
            name = str(actor) if isinstance(actor, str | int) else ""
            value, _ = (spec.values or self._spec.values).read(look(spec.value))
            yield Change(
                key=key, value=value, at=moment, actor=self._calls.clean(name, 80), ours=name == spec.own_actor
            )


def _version(found: Any) -> str | None:
    return str(found) if isinstance(found, str | int) and not isinstance(found, bool) else None


def _list(found: Any) -> list[Any]:
    return found if isinstance(found, list) else []


def _names(found: Any) -> list[str]:
    return [
        str(n)
        for n in (found if isinstance(found, list) else [found])
        if isinstance(n, str | int) and not isinstance(n, bool)
    ]


def _moment(found: Any) -> datetime | None:
    """A time as naive UTC: ISO 8601, or seconds or milliseconds since 1970."""
    try:
        if isinstance(found, str):
            moment = datetime.fromisoformat(found)
            return moment.astimezone(UTC).replace(tzinfo=None) if moment.tzinfo else moment
        if isinstance(found, int | float) and not isinstance(found, bool):
            return datetime.fromtimestamp(found / 1000 if found > 1e11 else found, UTC).replace(tzinfo=None)
    except (ValueError, OverflowError, OSError):
        pass
    return None


SETTINGS = RestSettings


def mapping(settings: RestSettings, folder: Path) -> str:
    """What gives a value its meaning (``base.meaning``). Raises Misconfigured where the system's YAML cannot be read."""
    return _mapping(load(folder / settings.file))


def _mapping(spec: RestSystem) -> str:
    read = spec.read.model_dump(mode="json", include={"key", "target", "value"})
    write = spec.write.model_dump(
        mode="json",
        include={"one": {"method", "path", "query", "body"}, "many": {"method", "path", "query", "body", "row"}},
    )
    values = spec.values.model_dump(mode="json", exclude={"min", "max"})
    # What was added since means nothing while it is not set: batches that were decided before go on
    for name in ("decimals", "places", "ignore_case", "written"):
        if not values[name]:
            del values[name]
    return meaning(kind="rest", entity=spec.entity, read=read, write=write, values=values)


def writes(settings: RestSettings, folder: Path) -> Writes:
    """Which field of which system: where it reads the value."""
    spec = load(folder / settings.file, settings.base_url)
    return Writes(spec.system, spec.read.value)


def connect(
    settings: RestSettings, *, environ: Mapping[str, str], folder: Path, clock: Callable[[], datetime]
) -> RestConnector:
    """The connector that a workflow's settings name. Raises Misconfigured naming the file, key or variable."""
    spec, ca_file = _found(settings, folder)
    return RestConnector(spec, environ=environ, clock=clock, ca_file=ca_file)


def writer(settings: RestSettings, folder: Path) -> Callable[[int], object]:
    """What is sent for a value. Raises Misconfigured naming the file that is missing or lies outside the folder."""
    return _found(settings, folder)[0].values.write


def _found(settings: RestSettings, folder: Path) -> tuple[RestSystem, Path | None]:
    """The system's YAML, and the certificates that it names."""
    file = folder / settings.file
    if not file.resolve().is_relative_to(folder.resolve()):
        raise Misconfigured(f"{file}: lies outside the workflow's folder; copy it into it")
    spec = load(file, settings.base_url)
    ca_file = None if spec.ca_file is None else folder / spec.ca_file
    if ca_file is not None and not ca_file.is_file():
        raise Misconfigured(f"{file}: ca_file: {ca_file} is missing")
    return spec, ca_file
