"""The declarative REST connector: a YAML says how a system is read and written, and this does it.

Belongs here: the calls that a YAML describes (``rest_spec``) and what their answers say. Does not: any one system by name
(``examples/`` has some), retries, or judging what came back (``delivery.push``). Ids and answers are data of others: never
part of a path, a header or a text as they are.
"""

from __future__ import annotations

import base64
import functools
import json
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime, parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

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
from delivery.connectors.http import Answer, BadAnswer, Http, NoAnswer, NotSent, check_headers, outcome_of, retry_after
from delivery.connectors.oauth import Tokens
from delivery.connectors.rest_spec import (
    Basic,
    Bearer,
    Call,
    CursorPages,
    History,
    KeyHeader,
    LinkPages,
    NumberedPages,
    OAuth,
    OffsetPages,
    Pages,
    ReadMany,
    ReadOne,
    RestSettings,
    RestSystem,
    Test,
    UrlPages,
    WriteMany,
    WriteOne,
    load,
    used_in,
)
from delivery.connectors.template import ABSENT, Unfit, as_text, at, fill, fill_path, whole, words

__all__ = ["EXAMPLES", "SETTINGS", "RestConnector", "RestSettings", "connect", "load", "mapping", "writer", "writes"]

EXAMPLES = Path(__file__).parent / "examples"
"""Worked examples, to be copied into a workflow's folder and changed there."""
LONGEST_ID = 200


class _Singly(Exception):
    """A call for many was turned away as a whole; each by itself may do better."""

    def __init__(self, says: str) -> None:
        super().__init__(says)
        self.says = says


@dataclass(frozen=True)
class _Page:
    answer: Answer
    document: Any
    items: list[Any]


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
        headers, secrets, self._in_bodies = _credentials(spec, environ)
        self._http = Http(
            spec.base_url,
            headers={**spec.headers, **headers},
            timeout_s=spec.timeout_s,
            largest_body=spec.largest_body,
            secrets=secrets,
            allow_plain_http=spec.allow_plain_http,
            ca_file=ca_file,
        )
        self._tokens = _tokens(spec, environ, self._http.hide, ca_file)
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
        self._http.close()
        if self._tokens is not None:
            self._tokens.close()

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
                except _Singly as turned_away:
                    if spec.one is None:
                        raise Misconfigured(f"{self.system}: read.many: {turned_away.says}") from None
                    listed = {}
                found.update(listed)
                # A page that shifted under reading, or a filter that is not quite one, must not make an entity vanish
                left = [key for key in chunk if key not in listed]
                if left and spec.one is None:
                    try:
                        found.update(self._read_many(spec.many, left))
                    except _Singly as turned_away:
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
            return f"{self._http.clean(key, 60)!r} cannot be an id of this system (`entity`)"
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
            answer = self._send(call, {"entity": key})
        except Unfit as unfit:
            return Reading(key=key, target=key, value=None, state="missing", says=str(unfit))
        try:
            if not self._usable(answer, "read.one"):
                return Reading(
                    key=key,
                    target=key,
                    value=None,
                    state="missing",
                    says=f"answered {answer.status} {self._words(answer)}",
                )
        except _Singly as turned_away:
            raise Misconfigured(f"{self.system}: read.one: {turned_away.says}") from None
        item = at(self._document(answer, self._spec.read.errors), call.item)
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
            for page in self._pages(call, values, call.pages, call.items, "read.many", self._spec.read.errors):
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
        except _MorePages as more:
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
            says=self._http.clean(says),
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
            answer = self._send(typing.cast(WriteOne, self._spec.write.one), self._values(write))
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
                answer = self._send(call, values)
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
            unread = self._http.clean(f"{says}; and then it could not be read: {error}")
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
                        says = self._said(row, call.failures.says)
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
                    done[n] = Written(writes[n].key, rule.outcome, self._said(row, rule.says, rule.at))
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
            raise Misconfigured(self._denied(answer))
        if outcome != "accepted":
            return outcome, self._http.clean(f"{answer.status} {self._words(answer)}")
        if not answer.body:
            return outcome, ""
        try:
            document = answer.json()
        except BadAnswer as bad:
            return "unknown", self._http.clean(f"answered {answer.status}, but {bad}")
        for rule in spec.errors:
            if rule.holds(document):
                return rule.outcome, self._said(document, rule.says, rule.at)
        return outcome, ""

    def on_another_version(self, write: Write) -> Written | None:
        """See ``base.on_another_version``. An ETag that is shown is no proof that If-Match is looked at."""
        if not self._capabilities.conditional_write or not write.token or self._heeds:
            return None
        stale = replace(write, token=_another(write.token))
        one, many = self._spec.write.one, self._spec.write.many
        told = [self._write_one(stale)] if one is not None else []
        if many is not None and (not told or told[0].outcome == "conflict"):
            told += self._write_many(many, [stale])
        self._heeds = all(answer.outcome == "conflict" for answer in told)
        if told[-1].outcome == "accepted":
            self._capabilities = replace(self._capabilities, conditional_write=False, condition_ignored=True)
        return told[-1]

    def _unsent(self, write: Write, unfit: Unfit) -> Written:
        return Written(write.key, "refused", self._http.clean(f"{unfit}; nothing was sent"), sent=False)

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
                for page in self._pages(spec, {"entity": key, "target": target}, spec.pages, spec.items, "history", ()):
                    changes = [c for item in page.items for c in self._changes(spec, key, item)]
                    found += [
                        c
                        for c in changes
                        if c.at >= since or (not c.at.microsecond and c.at >= since.replace(microsecond=0))
                    ]
                    if spec.newest_first and changes and min(c.at for c in changes) < since.replace(microsecond=0):
                        break
            except _MorePages as more:
                raise Unavailable(str(more)) from None
            except _Singly as turned_away:
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
            yield Change(key=key, value=value, at=moment, actor=self._http.clean(name, 80), ours=name == spec.own_actor)

    # ------------------------------------------------------------------ calls

    def _send(
        self, call: Call, values: Mapping[str, Any], more: Mapping[str, str] | None = None, url: str | None = None
    ) -> Answer:
        """One request. Raises Unfit, Misconfigured, and Unavailable caused by NotSent or NoAnswer."""
        params: list[tuple[str, str]] = []
        for name, template in call.query.items():
            filled = fill(template, values)
            for each in filled if isinstance(filled, list) else [filled]:
                params.append((name, str(each).lower() if isinstance(each, bool) else as_text(name, each)))
        params += list((more or {}).items())
        headers = {name: as_text(name, fill(template, values)) for name, template in call.headers.items()}
        try:
            check_headers(headers)
        except Misconfigured as error:
            raise Unfit(str(error)) from None
        where = fill_path(call.path, values) if url is None else url
        body = fill(call.body, {**self._in_bodies, **values}) if call.body is not None else None

        def once(proof: Mapping[str, str]) -> Answer:
            return self._http.request(
                call.method, where, params=params if url is None else None, json=body, headers={**headers, **proof}
            )

        try:
            if self._tokens is None:
                return once({})
            token = self._tokens.token()
            answer = once({"authorization": f"Bearer {token}"})
            if answer.status != 401:
                return answer
            # It has run out before its time, or was taken back: nothing was done with the call
            return once({"authorization": f"Bearer {self._tokens.token(refused=token)}"})
        except (NotSent, NoAnswer) as error:
            raise Unavailable(f"{self.system}: {self._http.clean(str(error))}") from error

    def _pages(
        self,
        call: Call,
        values: Mapping[str, Any],
        pages: Pages | None,
        items: str,
        where: str,
        errors: Sequence[Test],
    ) -> Iterator[_Page]:
        """The pages of a listing. Raises _MorePages after the last that is allowed, _Singly for a call turned away."""
        more, url = _first_page(pages), None
        asked: set[str] = set()
        skipped, number = 0, pages.first if isinstance(pages, NumberedPages) else 0
        for _ in range(pages.at_most if pages is not None else 1):
            answer = self._send(call, values, more, url)
            if not self._usable(answer, where):
                return
            document = self._document(answer, errors)
            listed = at(document, items)
            if not isinstance(listed, list):
                raise Unavailable(f"{self.system}: {where}: no list stands at {items!r}")
            yield _Page(answer, document, listed)
            skipped, number = skipped + len(listed), number + 1
            step = _next_page(pages, answer, document, listed, skipped, number)
            if step is None:
                return
            more = step[0]
            if step[1] is not None:
                # A relative link is meant from where this page stood
                url = urljoin(self._http.url(fill_path(call.path, values)) if url is None else url, step[1])
            mark = repr(step)
            if mark in asked:
                raise Unavailable(f"{self.system}: {where}: the pages go round in a circle")
            asked.add(mark)
        if pages is not None:
            raise _MorePages(f"{self.system}: {where}: more than {pages.at_most} pages (`pages.at_most`)")

    def _usable(self, answer: Answer, where: str) -> bool:
        """True: an answer to a read; False: it says that there is nothing. Raises otherwise."""
        status = answer.status
        means = self._spec.read.statuses.get(status)
        if means is None and 200 <= status < 300:
            return True
        if means == "missing" or (means is None and status in (404, 410)):
            return False
        says = f"{self.system}: {where}: answered {status} {self._words(answer)}"
        if means == "unavailable" or (means is None and (status in (408, 425, 429) or status >= 500)):
            raise Unavailable(self._http.clean(says), retry_after=retry_after(answer.headers, self._clock()))
        if means is None and status in (401, 403):
            raise Misconfigured(self._denied(answer))
        if means is None and 400 <= status < 500:
            raise _Singly(self._http.clean(f"answered {status} {self._words(answer)}"))
        raise Misconfigured(self._http.clean(says))

    def _denied(self, answer: Answer) -> str:
        spec = self._spec
        names = [str(v) for k, v in spec.auth if k.endswith("_env")]
        names += [*spec.secret_headers.values(), *spec.body_secrets.values()]
        way_out = f"set {' and '.join(names)} to what is valid" if names else "`auth` sends no secret"
        return self._http.clean(f"{self.system}: answered {answer.status} {self._words(answer)}; {way_out}")

    def _document(self, answer: Answer, errors: Sequence[Test]) -> Any:
        try:
            document = answer.json()
        except BadAnswer as bad:
            raise Unavailable(self._http.clean(f"{self.system}: answered {answer.status}, but {bad}")) from None
        for test in errors:
            if test.holds(document):
                raise Unavailable(
                    self._http.clean(
                        f"{self.system}: answered {answer.status} with an error: {self._said(document, test.at)}"
                    )
                )
        return document

    def _words(self, answer: Answer) -> str:
        """The system's own words in an answer that is an error."""
        if 300 <= answer.status < 400:
            host = urlsplit(answer.headers.get("location", "")).hostname
            return f"(redirects{f' to {host}' if host else ''}; redirects are not followed)"
        try:
            document = answer.json()
        except BadAnswer:
            return self._http.clean(answer.body[:1000].decode("utf-8", "replace"), 200)
        return self._said(document, self._spec.write.says)

    def _said(self, document: Any, *pointers: str | None) -> str:
        """The words at the first of these places that holds any, else where most systems have them, else the whole as it is.

        Only text counts: ``true`` or a number in the place of a message says nothing to anybody.
        """
        for pointer in (*pointers, *_USUAL):
            if pointer and (said := words(at(document, pointer))):
                details = words(at(document, "/errors"))
                return self._http.clean(said if details in said else f"{said} ({details})", 250)
        return self._http.clean(words(document) or json.dumps(document, ensure_ascii=False), 200)


_USUAL = (
    "/error/message", "/message", "/description", "/detail", "/errorMessages", "/errors", "/error", "/error_description",
)  # fmt: skip


class _MorePages(Exception):
    """A listing is longer than it may be."""


def _first_page(pages: Pages | None) -> dict[str, str]:
    if isinstance(pages, NumberedPages):
        return {pages.param: str(pages.first), **({pages.size_param: str(pages.size)} if pages.size_param else {})}
    if isinstance(pages, OffsetPages):
        return {pages.param: "0", **({pages.size_param: str(pages.size)} if pages.size_param else {})}
    return {}


def _next_page(
    pages: Pages | None, answer: Answer, document: Any, listed: list[Any], skipped: int, number: int
) -> tuple[dict[str, str], str | None] | None:
    """Parameters and URL of the next page; None at the end.

    A page that is shorter than asked for is no end: servers hold fewer than they are asked for. An empty one is.
    """
    if pages is None:
        return None
    if isinstance(pages, LinkPages):
        url = _next_link(answer.headers.get("link", ""))
        return ({}, url) if url else None
    if isinstance(pages, CursorPages | UrlPages):
        found = at(document, pages.next)
        if found is ABSENT or not found or not isinstance(found, str | int):
            return None
        return ({pages.param: str(found)}, None) if isinstance(pages, CursorPages) else ({}, str(found))
    if not listed:
        return None
    if isinstance(pages, OffsetPages):
        total = whole(at(document, pages.total)) if pages.total is not None else None
        if total is not None and skipped >= total:
            return None
        return {**_first_page(pages), pages.param: str(skipped)}, None
    last = whole(at(document, pages.last)) if pages.last is not None else None
    if last is not None and number > last:
        return None
    return {**_first_page(pages), pages.param: str(number)}, None


def _next_link(header: str) -> str | None:
    for match in re.finditer(
        r"<([^<>]*)>((?:\s*;\s*[\w!#$&+.^`|~-]+\*?\s*=\s*(?:\"[^\"]*\"|[^\s;,\"]*))*)", header[:20_000]
    ):
        if re.search(r";\s*rel\s*=\s*\"?(?:[^\";]*\s)?next(?:\s[^\";]*)?\"?\s*(?:;|$)", match[2], re.IGNORECASE):
            return match[1]
    return None


_TIME = (
    r"(?P<iso>\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d)?)?)|(?P<http>[A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d)"
    r"|(?<!\d)(?P<bare>(19|20)\d\d(0[1-9]|1[0-2])[0-3]\d[T ]?[0-2]\d[0-5]\d([0-5]\d)?)(?!\d)"
)


def _another(token: str) -> str:
    """A version like this one, and not this one: of its own shape, so that it is turned away for what it says.

    Where the version is a time or a number it is an earlier one. A system may turn down only what is older than what stands
    (If-Unmodified-Since, `version >= current`): it keeps its promise, and a later version would be let through.
    """
    time = re.search(_TIME, token, re.ASCII)
    if time is not None and (earlier := _day_before(time)) is not None:
        return f"{token[: time.start()]}{earlier}{token[time.end() :]}"
    if re.fullmatch(r"[1-9][0-9]{0,18}", token):
        return str(int(token) - 1)
    if lowered := list(re.finditer(r"([1-9])(0*)(?![0-9])", token)):
        last, (digit, noughts) = lowered[-1], lowered[-1].groups()
        return f"{token[: last.start()]}{int(digit) - 1}{'9' * len(noughts)}{token[last.end() :]}"
    # nothing is before nought, and letters have no order that is known
    found = next(f for kind in (r"\d", "[A-Za-z]", ".") if (f := list(re.finditer(kind, token, re.ASCII))))
    at_, char = found[-1].start(), found[-1][0]
    other = "9" if char.isdigit() else "b" if char == "a" else "a"
    return f"{token[:at_]}{other}{token[at_ + 1 :]}"


def _day_before(time: re.Match[str]) -> str | None:
    """A time in a text a day earlier, in the same form; None where it is no time."""
    shown = time[0]
    try:
        if time["http"]:
            return format_datetime(parsedate_to_datetime(f"{shown} GMT") - timedelta(days=1), usegmt=True)[:-4]
        moment = datetime.fromisoformat(shown[:10] if time["iso"] else f"{shown[:4]}-{shown[4:6]}-{shown[6:8]}")
        before = (moment - timedelta(days=1)).date().isoformat()
        return before + shown[10:] if time["iso"] else before.replace("-", "") + shown[8:]
    except (ValueError, OverflowError):
        return None


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


def _secret(spec: RestSystem, environ: Mapping[str, str], name: str, key: str, header: bool = True) -> str:
    value = environ.get(name, "").strip()
    if not value:
        raise Misconfigured(f"{spec.system}: the environment variable {name} is not set; `{key}` names it")
    if header and (not value.isascii() or not value.isprintable()):
        raise Misconfigured(f"{spec.system}: the environment variable {name} holds a character that no header may")
    return value


def _credentials(spec: RestSystem, environ: Mapping[str, str]) -> tuple[dict[str, str], list[str], dict[str, str]]:
    """The headers that prove who we are, every text that must never be shown, and what stands for secrets in bodies."""

    secret = functools.partial(_secret, spec, environ)
    more = {header: secret(name, "secret_headers") for header, name in spec.secret_headers.items()}
    bodies = {f"secret_{n}": secret(name, "body_secrets", header=False) for n, name in spec.body_secrets.items()}
    hidden = [*more.values(), *bodies.values()]
    auth = spec.auth
    if isinstance(auth, Bearer):
        token = secret(auth.token_env, "auth")
        return {**more, "authorization": f"Bearer {token}"}, [token, *hidden], bodies
    if isinstance(auth, Basic):
        user, password = secret(auth.user_env, "auth"), secret(auth.password_env, "auth")
        both = base64.b64encode(f"{user}:{password}".encode()).decode()
        return {**more, "authorization": f"Basic {both}"}, [password, both, *hidden], bodies
    if isinstance(auth, KeyHeader):
        key = secret(auth.value_env, "auth")
        return {**more, auth.name: auth.prefix + key}, [key, *hidden], bodies
    return more, hidden, bodies


def _tokens(
    spec: RestSystem, environ: Mapping[str, str], hide: Callable[[str], None], ca_file: Path | None
) -> Tokens | None:
    auth = spec.auth
    if not isinstance(auth, OAuth):
        return None
    names = {"client_id": auth.client_id_env, "client_secret": auth.client_secret_env}
    if auth.refresh_token_env is not None:
        names["refresh_token"] = auth.refresh_token_env
    secrets = {field: (name, _secret(spec, environ, name, "auth", header=False)) for field, name in names.items()}
    hide(secrets["client_secret"][1])
    grant = "client_credentials" if auth.refresh_token_env is None else "refresh_token"
    form = {**auth.form, "grant_type": grant}
    return Tokens(auth.token_url, form, secrets, hide=hide, timeout_s=spec.timeout_s, ca_file=ca_file)


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
