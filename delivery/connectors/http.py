"""One careful HTTP client for the connectors: bounded in time, size and place, and exact about what may have been sent.

Belongs here: one request and its answer, ``Retry-After``, what a status means by default, and texts without secrets.
Does not: any one system's paths, retries, or what an answer's body means.
"""

from __future__ import annotations

import json
import logging
import math
import re
import ssl
import threading
import time
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus, unquote, urlencode, urlsplit

import httpcore

from common.errors import SignalboxError
from delivery.connectors.base import Misconfigured, Outcome

# At DEBUG it writes the headers of answers as they came, and a server may echo a token in one.
logging.getLogger("httpcore").setLevel(logging.INFO)

LOCAL = frozenset({"127.0.0.1", "localhost", "::1"})
LONGEST_RETRY_AFTER_S = 3600.0
PIECE = 1 << 16


class NotSent(SignalboxError, RuntimeError):
    """Nothing of the request left this machine (refused connection, unknown name, no connection in time): not applied."""


class NoAnswer(SignalboxError, RuntimeError):
    """The request was sent, at least in part, and no usable answer came: it may have been applied.

    ``status``: what the first line said, where one came before it broke.
    """

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class BadAnswer(SignalboxError, RuntimeError):
    """The body is not what it should be: not JSON, a key twice, not a number, nested without end."""


@dataclass(frozen=True)
class Answer:
    """One answer, read to its end."""

    status: int
    headers: Mapping[str, str]
    """By lower-case name; a header that came several times is joined by commas."""
    body: bytes

    def json(self) -> Any:
        """The body as JSON. Raises BadAnswer, also for what is read differently by different readers (a key twice, NaN)."""
        return strict_json(self.body)


def strict_json(body: bytes) -> Any:
    """JSON in which no key stands twice and every number is one. Raises BadAnswer."""
    try:
        return json.loads(
            body.decode("utf-8-sig"), object_pairs_hook=_once, parse_constant=_no_constant, parse_float=_finite
        )
    except BadAnswer:
        raise
    except UnicodeDecodeError:
        raise BadAnswer("the body is not UTF-8") from None
    except RecursionError:
        raise BadAnswer("the body is nested too deeply") from None
    except ValueError as error:
        raise BadAnswer(f"the body is not JSON: {str(error)[:120]}" if body else "the body is empty") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise BadAnswer(f"the key {twice[:60]!r} stands twice in one object of the body")
    return found


def _no_constant(text: str) -> Any:
    raise BadAnswer(f"the body holds {text}, which is no number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise BadAnswer(f"the body holds {text[:40]}, which is too large a number")
    return value


class Http:
    """A pool of connections to one host; several threads use it at once.

    Redirects are answers, never followed; no cookies, proxies or .netrc. Takes https, or plain http on this machine;
    elsewhere plain http only with ``allow_plain_http``, since it shows the token to the network.
    ``timeout_s`` bounds each wait, and twice that the whole request, however slowly the other side drips.
    ``largest_body``: bytes of the answer after decompression. ``secrets`` never stand in any text that leaves here.
    """

    def __init__(
        self,
        base_url: str,
        *,
        headers: Mapping[str, str],
        timeout_s: float = 10.0,
        largest_body: int = 16 << 20,
        secrets: Sequence[str] = (),
        pool: int = 16,
        allow_plain_http: bool = False,
        ca_file: Path | None = None,
    ) -> None:
        self._secrets = tuple(secrets)
        self._origin = origin_of(base_url, allow_plain_http=allow_plain_http)
        self._base = base_url.rstrip("/")
        self._headers = {
            "accept": "application/json",
            "user-agent": "signalbox",
            "accept-encoding": "gzip",
            **{name.lower(): value for name, value in headers.items()},
        }
        check_headers(self._headers)
        self._timeout_s = timeout_s
        self._largest = largest_body
        # What the request of the current thread may still take, and whether any of it has left
        self._now = threading.local()
        self._context = _certificates(ca_file) if self._origin[0] == "https" else None
        self._free, self._idle = threading.BoundedSemaphore(pool), deque[httpcore.HTTPConnection]()
        self._closed = False

    def __repr__(self) -> str:
        return f"Http({self._base!r})"

    def hide(self, secret: str) -> None:
        """One more text that never stands in any text that leaves here."""
        self._secrets = (*self._secrets, secret)

    def clean(self, text: str, limit: int = 300) -> str:
        """``clean`` with this client's secrets."""
        return clean(text, self._secrets, limit)

    def url(self, path_or_url: str, params: Mapping[str, str] | Iterable[tuple[str, str]] | None = None) -> str:
        """The whole URL of a path below the base, or of an absolute URL on the same host.

        Raises Misconfigured where it leads elsewhere: another host never sees the token.
        """
        if urlsplit(path_or_url).scheme:
            whole = path_or_url
            try:
                there = origin_of(whole, allow_plain_http=True, any_path=True)
            except Misconfigured:
                there = ("", "", 0)
            if there != self._origin:
                raise Misconfigured(
                    f"{self.clean(path_or_url, 120)!r} leads away from {self._base}; the token is not sent there"
                )
        else:
            whole = f"{self._base}/{path_or_url.lstrip('/')}"
        if re.search(r"[^\x21-\x7e]|[\\#]", whole):
            raise Misconfigured(f"{self.clean(whole, 120)!r} holds a character that may not stand in a URL")
        if any(unquote(unquote(part)) in (".", "..") for part in whole.split("?")[0].split("/")):
            raise Misconfigured(f"{self.clean(whole, 120)!r} climbs out of its path")
        if params:
            more = urlencode(list(params.items() if isinstance(params, Mapping) else params), quote_via=quote, safe="")
            whole += ("&" if "?" in whole else "?") + more
        return whole

    def request(
        self,
        method: str,
        path_or_url: str,
        *,
        params: Mapping[str, str] | Iterable[tuple[str, str]] | None = None,
        json: Any = None,
        content: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """Send one request, once, and read its answer to the end.

        ``path_or_url``: a path below the base URL, or an absolute URL on the same host (a next page).
        Raises NotSent, NoAnswer, and Misconfigured for a URL or header that may not be sent. Any status is an Answer.
        """
        url = self.url(path_or_url, params)
        more = {name.lower(): value for name, value in (headers or {}).items()}
        if json is not None:
            content = _dump(json)
            more.setdefault("content-type", "application/json")
        check_headers(more)
        sent_headers = {**self._headers, **more}
        if content is None and method in ("POST", "PUT", "PATCH"):
            sent_headers["content-length"] = "0"
        now = self._now
        now.deadline, now.sent = time.monotonic() + 2 * self._timeout_s, False
        status: int | None = None
        waits = {name: self._timeout_s for name in ("connect", "read", "write")}
        try:
            with (
                self._connection() as connection,
                connection.stream(
                    method,
                    url,
                    headers=[(name.encode(), value.encode("latin-1")) for name, value in sent_headers.items()],
                    content=content,
                    extensions={"timeout": waits},
                ) as response,
            ):
                status = response.status
                found = _headers(response.headers)
                return Answer(status, found, b"" if method == "HEAD" else self._body(response, found))
        except NoAnswer as error:
            error.status = status
            raise
        # None of the library's errors goes on as a cause: some of their texts hold headers
        except (httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError, OSError) as error:
            said = self.clean(str(error), 200) or "no reason given"
            what = f"{type(error).__name__}: {said}"
            sent = bool(now.sent)
        if sent:
            raise NoAnswer(f"{method} to {self._base}: no usable answer ({what})", status=status) from None
        raise NotSent(f"{method} to {self._base}: nothing was sent ({what})") from None

    def _body(self, response: httpcore.Response, headers: Mapping[str, str]) -> bytes:
        if headers.get("content-length", "").isdigit() and int(headers["content-length"]) > self._largest:
            raise NoAnswer(f"the answer is larger than {self._largest:,} bytes")
        encoding = headers.get("content-encoding", "identity").strip().lower()
        if encoding not in ("", "identity", "gzip", "x-gzip"):
            raise NoAnswer(f"the answer is encoded as {encoding[:40]!r}, which nobody asked for")
        unzip = zlib.decompressobj(16 + zlib.MAX_WBITS) if encoding.endswith("gzip") else None
        pieces: list[bytes] = []
        size, raw = 0, False
        for piece in response.iter_stream():
            while piece:
                raw = True
                if unzip is None:
                    out, piece = piece, b""
                else:
                    try:
                        # A few bytes may unfold to gigabytes: never more at once than is wanted
                        out = unzip.decompress(piece, PIECE)
                    except zlib.error:
                        raise NoAnswer("the answer is not the gzip that it says it is") from None
                    piece = unzip.unconsumed_tail
                    if unzip.unused_data:
                        raise NoAnswer("the answer goes on after its gzip has ended")
                size += len(out)
                if size > self._largest:
                    raise NoAnswer(f"the answer is larger than {self._largest:,} bytes")
                pieces.append(out)
            if time.monotonic() > self._now.deadline:
                raise NoAnswer(f"the answer was not complete after {2 * self._timeout_s:g} s")
        if unzip is not None and raw and not unzip.eof:
            raise NoAnswer("the answer's gzip ends in the middle")
        return b"".join(pieces)

    @contextmanager
    def _connection(self) -> Iterator[httpcore.HTTPConnection]:
        """A connection for this thread alone, kept open for the next if it is still good.

        Not the library's own pool: that one may close a connection that another thread has just been given (1.0.9: it looks
        whether an idle one can be read, while its request is being answered), and with the descriptor used again by
        then an answer could reach the wrong request.
        """
        if not self._free.acquire(timeout=self._timeout_s):
            raise NotSent(f"no connection to {self._base} became free within {self._timeout_s:g} s")
        try:
            connection = self._kept() or httpcore.HTTPConnection(
                httpcore.Origin(self._origin[0].encode(), self._origin[1].encode(), self._origin[2]),
                ssl_context=self._context,
                # Shorter than the servers' usual 5 s, so that a request seldom meets a connection that is just closing
                keepalive_expiry=2.0,
                network_backend=_Backend(self._now),
            )
            try:
                yield connection
            finally:
                if connection.is_idle() and not connection.is_closed() and not self._closed:
                    self._idle.append(connection)
                else:
                    connection.close()
        finally:
            self._free.release()

    def _kept(self) -> httpcore.HTTPConnection | None:
        while True:
            try:
                connection = self._idle.pop()
            except IndexError:
                return None
            if not connection.has_expired() and connection.is_available():
                return connection
            connection.close()

    def close(self) -> None:
        """Close every connection that is not in use, and those in use after their request."""
        self._closed = True
        while (connection := self._kept()) is not None:
            connection.close()


class _Stream(httpcore.NetworkStream):
    """A connection that knows how long the request may still take and remembers that something was sent on it."""

    def __init__(self, stream: httpcore.NetworkStream, now: threading.local) -> None:
        self._stream, self._now = stream, now

    def _left(self, timeout: float | None, error: type[httpcore.TimeoutException]) -> float | None:
        deadline: float | None = getattr(self._now, "deadline", None)
        if deadline is None:
            return timeout
        left = deadline - time.monotonic()
        if left <= 0:
            raise error("the request took longer than it may in all")
        return left if timeout is None else min(left, timeout)

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, self._left(timeout, httpcore.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        # In pieces, so that a server that takes in a byte at a time cannot hold us for ever
        for start in range(0, len(buffer), PIECE):
            left = self._left(timeout, httpcore.WriteTimeout)
            self._now.sent = True
            self._stream.write(buffer[start : start + PIECE], left)

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        left = self._left(timeout, httpcore.ConnectTimeout)
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, left), self._now)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class _Backend(httpcore.NetworkBackend):
    def __init__(self, now: threading.local) -> None:
        self._backend, self._now = httpcore.SyncBackend(), now

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        return _Stream(
            self._backend.connect_tcp(host, port, timeout, local_address, socket_options=socket_options), self._now
        )

    def sleep(self, seconds: float) -> None:
        self._backend.sleep(seconds)


@lru_cache(maxsize=8)
def _certificates(ca_file: Path | None) -> ssl.SSLContext:
    # Reading them takes a tenth of a second
    return httpcore.default_ssl_context() if ca_file is None else ssl.create_default_context(cafile=str(ca_file))


def origin_of(url: str, *, allow_plain_http: bool = False, any_path: bool = False) -> tuple[str, str, int]:
    """Scheme, host and port of a URL that a token may be sent to. Raises Misconfigured, never showing a password in it."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise Misconfigured("the base URL is no URL; write it like https://host/path") from None
    host = (parts.hostname or "").lower()
    if "@" in parts.netloc:
        raise Misconfigured(f"the URL of {host!r} holds a user or password; name environment variables instead")
    if parts.scheme not in ("http", "https") or not re.fullmatch(r"[a-z0-9._:-]+", host):
        raise Misconfigured(f"{url[:120]!r} is no http(s) URL; write it like https://host/path")
    if (parts.query or parts.fragment) and not any_path:
        raise Misconfigured(f"the base URL of {host!r} may not hold a query or a fragment")
    if parts.scheme == "http" and host not in LOCAL and not allow_plain_http:
        raise Misconfigured(
            f"http://{host} would show the token to the network; use https, or say `allow_plain_http: true`"
        )
    return parts.scheme, host, port or (443 if parts.scheme == "https" else 80)


def check_headers(headers: Mapping[str, str]) -> None:
    """Refuse what could end a header and begin another. Raises Misconfigured naming the header, never its value."""
    for name, value in headers.items():
        if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name):
            raise Misconfigured(f"{name[:60]!r} is no name of a header")
        if not re.fullmatch(r"[\x20-\x7e\xa1-\xff]*", value) or value != value.strip():
            raise Misconfigured(f"the header {name} holds a line break or a character that may not stand in one")


def _headers(raw: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name_bytes, value_bytes in raw:
        name, value = name_bytes.decode("latin-1").lower(), value_bytes.decode("latin-1")
        found[name] = f"{found[name]}, {value}" if name in found else value
    return found


def _dump(body: Any) -> bytes:
    return json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def retry_after(headers: Mapping[str, str], now: datetime) -> float | None:
    """Seconds until the server wants to be asked again: of seconds or an HTTP date against ``now`` (naive UTC).

    At most an hour, never negative; None where it says nothing that can be read.
    """
    said = headers.get("retry-after", "").strip()
    if not said:
        return None
    if re.fullmatch(r"[+-]?\d{1,18}(\.\d{1,18})?", said):
        seconds = float(said)
    else:
        try:
            moment = parsedate_to_datetime(said)
            # An HTTP date is in GMT; one that names no zone is taken so
            moment = moment.astimezone(UTC).replace(tzinfo=None) if moment.tzinfo else moment
            seconds = (moment - now).total_seconds()
        except (ValueError, TypeError, OverflowError):
            return None
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER_S)


def clean(text: str, secrets: Sequence[str] = (), limit: int = 300) -> str:
    """Text of another system as one short line: every secret (also as written in a URL) becomes …, control characters go."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    shapes = {
        shape for s in secrets if s for shape in (s, quote(s, safe=""), quote_plus(s), quote(s), json.dumps(s)[1:-1])
    }
    for shape in sorted(shapes, key=len, reverse=True):
        line = line.replace(shape, "…")
    return line if len(line) <= limit else line[: limit - 1] + "…"


def outcome_of(status: int) -> Outcome:
    """What a status says of a write where the system is not known to mean something else by it."""
    if 200 <= status < 300:
        return "accepted"
    if status in (409, 412, 428):
        return "conflict"
    if status in (425, 429):
        return "not_applied"
    # 408: a proxy may say so after it has passed the request on
    if status == 408 or status >= 500 or status < 200:
        return "unknown"
    return "refused"
