"""django-helpdesk over its REST API: the priority of a ticket, 1 (first) to 5.

Belongs here: how django-helpdesk is read and written, and what it can promise. Does not: retries, or what is sent when.

What its source (2.6.1) does, and what follows:

- Every request, even for one ticket, first loads each ticket that its ``status`` filter lets through, with one query for
  each. So every request names the statuses that it is about: closed tickets cost nothing then. Many tickets are read by
  pages of the list, a few one by one, whichever asks for less.
- The filter ignores what it does not know. So nothing is concluded from it: a ticket's own fields say what it is, and
  what the list left out (it shifts while it is paged through) is read by itself, without a filter.
- The filter also holds for a write: a PATCH that names the status as it was read finds no ticket once somebody has closed
  or reopened it. That is a condition on the status; on the priority there is none, nor a version or a modified time.
- A PATCH loads the whole ticket and saves all of it: what somebody saves in those milliseconds is lost.
- A change made on the help desk's pages leaves a follow-up in the ticket, without saying over REST what was changed; one
  made over the API or the admin pages leaves nothing. A PATCH answers with the ticket's follow-ups, so that one which
  came between the read and the write is seen there, whatever the clocks say.
"""

from __future__ import annotations

import re
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeGuard
from urllib.parse import quote, urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator

from delivery.connectors.base import (
    Capabilities,
    Change,
    Misconfigured,
    Reading,
    Unavailable,
    Write,
    Writes,
    Written,
    meaning,
)
from delivery.connectors.http import Answer, BadAnswer, Http, NoAnswer, NotSent, outcome_of, retry_after

_ID = re.compile(r"\{id(?::0?(\d{1,2})d)?\}")
_LARGEST_ID = 2**31 - 1
REMEMBERED = 20
"""Changes of a ticket that ``history`` knows at most."""
_STATUS = {1: "open", 2: "reopened", 3: "resolved", 4: "closed", 5: "duplicate"}


class HelpdeskSettings(BaseModel):
    """A django-helpdesk and the user whose token acts in it (staff, with access to the queues)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["helpdesk"]
    url: str = Field(description="The API's root, like https://desk.example.org/helpdesk/api")
    token_env: str = Field(min_length=1, description="Name of the environment variable that holds the token")
    key: str = Field("{id}", description="How an entity is written; {id} is the ticket's number, {id:07d} with zeros")
    open_statuses: tuple[int, ...] = Field(
        (1, 2), min_length=1, description="Numbers of the statuses that are worked on"
    )
    page: int = Field(200, ge=1, le=1000, description="Tickets a page of the list")
    bulk_read: int = Field(500, ge=1, le=10000, description="Most tickets that are read at a time")
    timeout_s: float = Field(30.0, gt=0, le=600, description="Seconds; with many open tickets one request takes one")
    allow_plain_http: bool = Field(False, description="Send the token unencrypted to another machine")
    ca_file: str | None = Field(
        None, description="Certificates to trust instead of the public ones, in the workflow's folder"
    )

    @field_validator("key")
    @classmethod
    def _one_id(cls, key: str) -> str:
        if len(_ID.findall(key)) != 1 or re.search(r"[{}]", _ID.sub("", key)):
            raise ValueError(f"key {key!r}: must hold {{id}}, or {{id:07d}} for a number with zeros, exactly once")
        return key


SETTINGS = HelpdeskSettings


def mapping(settings: HelpdeskSettings, folder: Path) -> str:
    """What gives a value its meaning (``base.meaning``)."""
    return meaning(**settings.model_dump(mode="json", include={"kind", "key"}))


def writes(settings: HelpdeskSettings, folder: Path) -> Writes:
    """The priorities of which help desk."""
    parts = urlsplit(settings.url)
    return Writes(f"helpdesk:{parts.netloc}{parts.path.rstrip('/')}", "priority")


def connect(
    settings: HelpdeskSettings, *, environ: Mapping[str, str], folder: Path, clock: Callable[[], datetime]
) -> HelpdeskConnector:
    """Open it. Raises Misconfigured where the token's variable is not set, or the URL may not carry a token."""
    token = environ.get(settings.token_env, "").strip()
    if not token:
        raise Misconfigured(f"{settings.token_env}: is not set; it must hold the API token of the help desk's user")
    http = Http(
        settings.url,
        headers={"Authorization": f"Token {token}"},
        timeout_s=settings.timeout_s,
        secrets=[token],
        allow_plain_http=settings.allow_plain_http,
        ca_file=folder / settings.ca_file if settings.ca_file else None,
    )
    return HelpdeskConnector(settings, http, clock)


@dataclass(frozen=True)
class HelpdeskCapabilities(Capabilities):
    """As the others; the guarantee says what the help desk's history leaves out."""

    @property
    def guarantee(self) -> str:
        return (
            "only absolute values are written, a repeated equal write is counted; a closed ticket is never written to; "
            "an overwrite of a change that somebody makes on the help desk's pages is found by its follow-up, one made "
            "over its API or admin pages within the window between read and write leaves no trace there"
        )


@dataclass(frozen=True)
class _Tried:
    value: int
    newest: int | None
    """The newest follow-up in the reading that the write was based on; None: not known."""
    at: datetime


class HelpdeskConnector:
    """One django-helpdesk. Thread-safe."""

    def __init__(self, settings: HelpdeskSettings, http: Http, clock: Callable[[], datetime]) -> None:
        parts = urlsplit(settings.url)
        self.system = f"helpdesk:{parts.netloc}{parts.path.rstrip('/')}"
        self.mapping = mapping(settings, Path())
        self._said, self._http, self._clock = settings, http, clock
        self._open = ",".join(str(s) for s in settings.open_statuses)
        self._lock = threading.Lock()
        self._pages: dict[str, int] = {}
        # By ticket: the last write whose fate is open, and the last that the help desk was seen to have stored
        self._tried: dict[int, _Tried] = {}
        self._stored: dict[int, int] = {}
        self._changes: dict[str, deque[Change]] = defaultdict(lambda: deque(maxlen=REMEMBERED))

    @property
    def capabilities(self) -> Capabilities:
        return HelpdeskCapabilities(bulk_read=self._said.bulk_read, change_history=True)

    def read(self, keys: Sequence[str]) -> dict[str, Reading]:
        numbers = {key: self._number(key) for key in keys}
        wanted = {n for n in numbers.values() if n is not None}
        found = self._fetch(wanted, self._open)
        # Closed, or not there: only an answer to an unfiltered question can tell
        found |= self._fetch(wanted - found.keys(), "")
        return {key: self._reading(key, n, found.get(n) if n is not None else None) for key, n in numbers.items()}

    def apply(self, writes: Sequence[Write], *, validate_only: bool = False) -> list[Written]:
        if validate_only:
            return [
                Written(w.key, "not_applied", "the help desk cannot check a write without doing it") for w in writes
            ]
        return [self._apply(write) for write in writes]

    def history(self, keys: Sequence[str], since: datetime) -> list[Change]:
        """What we and others did to these tickets, as far as the answers to this connector's own calls showed it.

        No request is sent. ``value`` is None where a follow-up shows that somebody acted but not what was changed. ``at``
        is by this machine's clock and the latest that it can have been: for a follow-up found by a write, when that was
        sent; for a value that is no longer ours, when it was read. Forgotten with the process.
        """
        with self._lock:
            found = [change for key in set(keys) for change in self._changes.get(key, ()) if change.at >= since]
        return sorted(found, key=lambda change: change.at)

    def close(self) -> None:
        self._http.close()

    # Reading.

    def _number(self, key: str) -> int | None:
        """The ticket's number, or None where the key is not written as the settings say."""
        spec = _ID.search(self._said.key)
        assert spec is not None
        before, after = self._said.key[: spec.start()], self._said.key[spec.end() :]
        digits = key[len(before) : len(key) - len(after)]
        if not digits.isascii() or not digits.isdigit() or len(digits) > 20:
            return None
        number = int(digits)
        same = f"{before}{number:0{spec[1] or 1}d}{after}" == key
        return number if same and 0 < number <= _LARGEST_ID else None

    def _fetch(self, wanted: AbstractSet[int], statuses: str) -> dict[int, dict[str, Any]]:
        """Those of the tickets that have one of the statuses (empty: any), by the list or one by one."""
        found: dict[int, dict[str, Any]] = {}
        whole = False
        # Every request costs the server about the same, whatever it asks for
        if len(wanted) > self._pages.get(statuses, 1) + 1:
            found, whole = self._list(wanted, statuses)
        if not (whole and statuses):
            for n in sorted(wanted - found.keys()):
                found |= self._one(n, statuses)
        return found

    def _list(self, wanted: AbstractSet[int], statuses: str) -> tuple[dict[int, dict[str, Any]], bool]:
        """What the list shows of the tickets, and whether it was read to its end."""
        found: dict[int, dict[str, Any]] = {}
        page, pages = 1, 1
        while len(found) < len(wanted):
            asked = {"page": str(page), "page_size": str(self._said.page)} | ({"status": statuses} if statuses else {})
            answer = self._get("tickets/", asked)
            if answer.status == 404:
                if page == 1:
                    raise self._elsewhere()
                break  # it became shorter
            body = self._object(answer)
            rows = body.get("results")
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                raise Misconfigured(
                    f"{self._said.url}/tickets/ answers without a list of results; is `url` the API's root?"
                )
            if page == 1 and rows:
                count = body.get("count")
                pages = self._pages[statuses] = -(-count // len(rows)) if _whole(count) and count > 0 else 1
            # Read twice, the later one counts
            found |= {row["id"]: row for row in rows if _whole(row.get("id")) and row["id"] in wanted}
            if not rows or not body.get("next"):
                break
            # The rest costs less one by one, or the list does not end where it said
            if len(wanted) - len(found) <= pages - page or page > pages + 5:
                return found, False
            page += 1
        return found, True

    def _one(self, number: int, statuses: str) -> dict[int, dict[str, Any]]:
        answer = self._get(f"tickets/{number}/", {"status": statuses} if statuses else {})
        if answer.status == 404:
            if not _says_no_such_ticket(answer):
                raise self._elsewhere()
            return {}
        ticket = self._object(answer)
        if ticket.get("id") != number:
            raise Misconfigured(
                f"{self._said.url}/tickets/{number}/ answers with another ticket, {self._http.clean(repr(ticket.get('id')), 40)}"
            )
        return {number: ticket}

    def _get(self, path: str, params: Mapping[str, str]) -> Answer:
        """An answer 200 or 404. Raises Unavailable or Misconfigured for every other."""
        try:
            answer = self._http.request("GET", path, params=params)
        except (NotSent, NoAnswer) as error:
            raise Unavailable(f"the help desk does not answer: {error}") from None
        if answer.status in (200, 404):
            return answer
        self._check_access(answer)
        if answer.status in (408, 425, 429) or answer.status >= 500:
            wait = retry_after(answer.headers, self._clock())
            raise Unavailable(f"the help desk answers {answer.status}: {self._words(answer)}", retry_after=wait)
        raise Misconfigured(f"the help desk answers {answer.status} to a read: {self._words(answer)}")

    def _object(self, answer: Answer) -> dict[str, Any]:
        try:
            found = answer.json()
        except BadAnswer as error:
            raise Unavailable(f"the help desk answers unusably: {self._http.clean(str(error))}") from None
        if not isinstance(found, dict):
            raise Misconfigured(f"{self._said.url} answers with something else than tickets; is `url` the API's root?")
        return found

    def _reading(self, key: str, number: int | None, ticket: dict[str, Any] | None) -> Reading:
        if number is None:
            return Reading(key, key, None, state="missing", says=f"is not written like {self._said.key}")
        if ticket is None:
            return Reading(key, str(number), None, state="missing", says="no such ticket, or not in this user's queues")
        status, merged, priority = ticket.get("status"), ticket.get("merged_to"), ticket.get("priority")
        if not _whole(status) or "priority" not in ticket:
            raise Misconfigured(f"ticket {number}: is answered without status and priority; is this django-helpdesk?")
        value = priority if _whole(priority) else None
        says = "" if value is not None else f"priority {self._http.clean(repr(priority), 60)} is no whole number"
        self._take_in(key, number, ticket)
        token = f"{status}.{_newest_follow_up(ticket)}"
        if merged is not None or status not in self._said.open_statuses:
            how = f"merged into {self._http.clean(str(merged), 40)}" if merged is not None else _STATUS.get(status, "")
            return Reading(key, str(number), value, token, "closed", f"status {status} {how}".strip())
        return Reading(key, str(number), value, token, "open", says)

    # Writing.

    def _apply(self, write: Write) -> Written:
        number = self._number(write.key)
        if number is None:
            return Written(write.key, "refused", f"is not written like {self._said.key}")
        status, _, newest = (write.token or "").partition(".")
        about = {
            "X-Signalbox-Run": write.run_id,
            "X-Signalbox-Batch": write.batch_id,
            "X-Signalbox-Decision": write.decision_id,
        }
        with self._lock:
            self._tried[number] = _Tried(write.value, int(newest) if newest.isdigit() else None, self._clock())
        try:
            answer = self._http.request(
                "PATCH", f"tickets/{number}/", params={"status": status or self._open}, json={"priority": write.value},
                headers={name: quote(value, safe="") for name, value in about.items()},
            )  # fmt: skip
        except NotSent as error:
            written = Written(write.key, "not_applied", str(error))
        except NoAnswer as error:
            written = Written(write.key, "unknown", str(error))
        else:
            written = self._written(write, number, status or self._open, answer)
        if written.outcome not in ("accepted", "unknown"):
            with self._lock:
                self._tried.pop(number, None)
        return written

    def _written(self, write: Write, number: int, statuses: str, answer: Answer) -> Written:
        """What an answer to a write says of it."""
        self._check_access(answer)
        if answer.status == 404 and _says_no_such_ticket(answer):
            return Written(write.key, "conflict", f"is no longer of status {statuses}, or was deleted")
        if answer.status != 200:
            wait = retry_after(answer.headers, self._clock())
            says = f"answers {answer.status}: {self._words(answer)}"
            return Written(write.key, "unknown" if answer.status < 300 else outcome_of(answer.status), says, wait)
        try:
            ticket = answer.json()
        except BadAnswer as error:
            return Written(write.key, "unknown", f"answers 200, but {self._http.clean(str(error))}")
        if not isinstance(ticket, dict) or ticket.get("id") != number:
            return Written(write.key, "unknown", "answers 200, but with something else than the ticket")
        if ticket.get("priority") != write.value:
            shown = self._http.clean(repr(ticket.get("priority")), 60)
            return Written(write.key, "accepted", f"answers that it stored {shown}")
        self._take_in(write.key, number, ticket)
        return Written(write.key, "accepted")

    # What we and others did.

    def _take_in(self, key: str, number: int, ticket: dict[str, Any]) -> None:
        """Note what an answer shows of our last write, and of others since the reading that it was based on."""
        now, value = self._clock(), ticket.get("priority")
        with self._lock:
            tried = self._tried.get(number)
            if tried is not None and tried.value == value:
                del self._tried[number]
                self._stored[number] = tried.value
                for follow_up in ticket.get("followup_set") or ():
                    if tried.newest is not None and _id(follow_up) > tried.newest:
                        # Our writes leave no follow-up: whoever left this one, it was not this connector
                        user = follow_up.get("user")
                        actor = "the system, or the caller by e-mail" if user is None else f"user {user}"
                        self._changes[key].append(Change(key, None, tried.at, actor, ours=False))
                self._changes[key].append(Change(key, tried.value, now, "signalbox", ours=True))
            elif self._stored.get(number, value) != value:
                # It was stored, and now there is another: somebody wrote after us
                del self._stored[number]
                self._changes[key].append(Change(key, value if _whole(value) else None, now, "somebody", ours=False))

    # Words.

    def _elsewhere(self) -> Misconfigured:
        return Misconfigured(
            f"{self._said.url}/tickets/ is not there (404); `url` must be the API's root, like "
            "https://host/helpdesk/api, and the help desk needs HELPDESK_ACTIVATE_API_ENDPOINT"
        )

    def _check_access(self, answer: Answer) -> None:
        if answer.status == 401:
            raise Misconfigured(f"the help desk refuses the token in {self._said.token_env}: {self._words(answer)}")
        if answer.status == 403:
            raise Misconfigured(
                f"the user of the token in {self._said.token_env} may not use the API; it must be staff: {self._words(answer)}"
            )
        if 300 <= answer.status < 400:
            there = self._http.clean(answer.headers.get("location", "nowhere"), 120)
            raise Misconfigured(f"the help desk redirects to {there}; redirects are not followed: correct `url`")

    def _words(self, answer: Answer) -> str:
        """The system's own words."""
        try:
            found = answer.json()
        except BadAnswer:
            return "no words of its own"
        if isinstance(found, dict):
            parts = [(k, v if isinstance(v, list) else [v]) for k, v in found.items()]
            found = "; ".join((f"{k}: " if k != "detail" else "") + ", ".join(map(str, v)) for k, v in parts)
        return self._http.clean(str(found))


def _whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _newest_follow_up(ticket: dict[str, Any]) -> int:
    return max((_id(f) for f in ticket.get("followup_set") or ()), default=0)


def _id(follow_up: Any) -> int:
    found = follow_up.get("id") if isinstance(follow_up, dict) else None
    return found if _whole(found) else 0


def _says_no_such_ticket(answer: Answer) -> bool:
    """The API's own 404, not that of a wrong path: JSON with a detail."""
    try:
        found = answer.json()
    except BadAnswer:
        return False
    return isinstance(found, dict) and set(found) == {"detail"}
