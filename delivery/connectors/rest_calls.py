"""The calls to a REST system: one request, the pages of a listing, and what an answer says.

Belongs here: filling a call of the YAML, sending it once, following pages, an error's words. Does not: what is read or written
(``rest``), what a YAML may say (``rest_spec``). Ids and answers are data of others: never part of a path, a header or a text as they
are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

from common.errors import SignalboxError
from delivery.connectors.base import Misconfigured, Unavailable
from delivery.connectors.http import Answer, BadAnswer, Http, NoAnswer, NotSent, check_headers, retry_after
from delivery.connectors.rest_auth import credentials, tokens_of
from delivery.connectors.rest_spec import (
    Call,
    CursorPages,
    LinkPages,
    NumberedPages,
    OffsetPages,
    Pages,
    RestSystem,
    Test,
    UrlPages,
)
from delivery.connectors.template import ABSENT, Unfit, as_text, at, fill, fill_path, whole, words


class Singly(SignalboxError):
    """A call for many was turned away as a whole; each by itself may do better."""

    def __init__(self, says: str) -> None:
        super().__init__(says)
        self.says = says


@dataclass(frozen=True)
class Page:
    answer: Answer
    document: Any
    items: list[Any]


_USUAL = (
    "/error/message", "/message", "/description", "/detail", "/errorMessages", "/errors", "/error", "/error_description",
)  # fmt: skip


class MorePages(SignalboxError):
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


class RestCalls:
    """Sends the calls of one system's YAML. Several threads use it at once; between calls it keeps connections."""

    def __init__(
        self, spec: RestSystem, *, environ: Mapping[str, str], clock: Callable[[], datetime], ca_file: Path | None
    ) -> None:
        self.system = spec.system
        self._spec, self._clock = spec, clock
        headers, secrets, self._in_bodies = credentials(spec, environ)
        self._http = Http(
            spec.base_url,
            headers={**spec.headers, **headers},
            timeout_s=spec.timeout_s,
            largest_body=spec.largest_body,
            secrets=secrets,
            allow_plain_http=spec.allow_plain_http,
            ca_file=ca_file,
        )
        self._tokens = tokens_of(spec, environ, self._http.hide, ca_file)

    def close(self) -> None:
        """Let go of connections."""
        self._http.close()
        if self._tokens is not None:
            self._tokens.close()

    def clean(self, text: str, limit: int = 300) -> str:
        """A text as it may be shown: short, on one line, no secret in it."""
        return self._http.clean(text, limit)

    def send(
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

    def pages(
        self,
        call: Call,
        values: Mapping[str, Any],
        pages: Pages | None,
        items: str,
        where: str,
        errors: Sequence[Test],
    ) -> Iterator[Page]:
        """The pages of a listing. Raises MorePages after the last that is allowed, Singly for a call turned away."""
        more, url = _first_page(pages), None
        asked: set[str] = set()
        skipped, number = 0, pages.first if isinstance(pages, NumberedPages) else 0
        for _ in range(pages.at_most if pages is not None else 1):
            answer = self.send(call, values, more, url)
            if not self.usable(answer, where):
                return
            document = self.document(answer, errors)
            listed = at(document, items)
            if not isinstance(listed, list):
                raise Unavailable(f"{self.system}: {where}: no list stands at {items!r}")
            yield Page(answer, document, listed)
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
            raise MorePages(f"{self.system}: {where}: more than {pages.at_most} pages (`pages.at_most`)")

    def usable(self, answer: Answer, where: str) -> bool:
        """True: an answer to a read; False: it says that there is nothing. Raises otherwise."""
        status = answer.status
        means = self._spec.read.statuses.get(status)
        if means is None and 200 <= status < 300:
            return True
        if means == "missing" or (means is None and status in (404, 410)):
            return False
        says = f"{self.system}: {where}: answered {status} {self.words(answer)}"
        if means == "unavailable" or (means is None and (status in (408, 425, 429) or status >= 500)):
            raise Unavailable(self._http.clean(says), retry_after=retry_after(answer.headers, self._clock()))
        if means is None and status in (401, 403):
            raise Misconfigured(self.denied(answer))
        if means is None and 400 <= status < 500:
            raise Singly(self._http.clean(f"answered {status} {self.words(answer)}"))
        raise Misconfigured(self._http.clean(says))

    def denied(self, answer: Answer) -> str:
        spec = self._spec
        names = [str(v) for k, v in spec.auth if k.endswith("_env")]
        names += [*spec.secret_headers.values(), *spec.body_secrets.values()]
        way_out = f"set {' and '.join(names)} to what is valid" if names else "`auth` sends no secret"
        return self._http.clean(f"{self.system}: answered {answer.status} {self.words(answer)}; {way_out}")

    def document(self, answer: Answer, errors: Sequence[Test]) -> Any:
        try:
            document = answer.json()
        except BadAnswer as bad:
            raise Unavailable(self._http.clean(f"{self.system}: answered {answer.status}, but {bad}")) from None
        for test in errors:
            if test.holds(document):
                raise Unavailable(
                    self._http.clean(
                        f"{self.system}: answered {answer.status} with an error: {self.said(document, test.at)}"
                    )
                )
        return document

    def words(self, answer: Answer) -> str:
        """The system's own words in an answer that is an error."""
        if 300 <= answer.status < 400:
            host = urlsplit(answer.headers.get("location", "")).hostname
            return f"(redirects{f' to {host}' if host else ''}; redirects are not followed)"
        try:
            document = answer.json()
        except BadAnswer:
            return self._http.clean(answer.body[:1000].decode("utf-8", "replace"), 200)
        return self.said(document, self._spec.write.says)

    def said(self, document: Any, *pointers: str | None) -> str:
        """The words at the first of these places that holds any, else where most systems have them, else the whole as it is.

        Only text counts: ``true`` or a number in the place of a message says nothing to anybody.
        """
        for pointer in (*pointers, *_USUAL):
            if pointer and (said := words(at(document, pointer))):
                details = words(at(document, "/errors"))
                return self._http.clean(said if details in said else f"{said} ({details})", 250)
        return self._http.clean(words(document) or json.dumps(document, ensure_ascii=False), 200)
