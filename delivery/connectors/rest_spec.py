"""What the YAML of a REST system may say: every key typed and described, a wrong one refused with its place.

Belongs here: the models, reading them, and the guidance in their errors. Does not: any call (``rest``).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import unquote

from pydantic import Field, ValidationError, model_validator

from common import yaml_config
from delivery.connectors.base import Misconfigured, Outcome
from delivery.connectors.http import check_headers, origin_of
from delivery.connectors.template import ABSENT, Pointer, at, placeholders, same, texts
from delivery.connectors.value_codec import Strict, Values

Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class Bearer(Strict):
    """``Authorization: Bearer …``."""

    kind: Literal["bearer"] = Field(description="Sends `Authorization: Bearer TOKEN`")
    token_env: Name = Field(description="Environment variable that holds the token")


class Basic(Strict):
    """``Authorization: Basic …``."""

    kind: Literal["basic"] = Field(description="Sends `Authorization: Basic` with user and password")
    user_env: Name = Field(description="Environment variable that holds the user")
    password_env: Name = Field(description="Environment variable that holds the password or API token")


class KeyHeader(Strict):
    """A header of the system's own."""

    kind: Literal["header"] = Field(description="Sends a key in a header of the system's own")
    name: str = Field(pattern=r"^[A-Za-z0-9-]+$", description="The header's name, such as X-Redmine-API-Key")
    value_env: Name = Field(description="Environment variable that holds the key")
    prefix: str = Field(default="", description="Stands before the key, such as `token ` (with its space)")


class OAuth(Strict):
    """``Authorization: Bearer …`` with a token that is asked for when it is needed (OAuth 2)."""

    kind: Literal["oauth"] = Field(
        description="Asks for an access token, and again when it runs out: with a refresh token if there is one, else as the "
        "client itself (client_credentials)"
    )
    token_url: str = Field(description="Where tokens are given; https, or this machine")
    client_id_env: Name = Field(description="Environment variable that holds the client's id")
    client_secret_env: Name = Field(description="Environment variable that holds the client's secret")
    refresh_token_env: Name | None = Field(
        default=None,
        description="Environment variable that holds a refresh token, one that stays the same when it is used",
    )
    form: dict[str, str] = Field(
        default={}, description="What else is asked with: scope, audience, resource; never a secret"
    )

    @model_validator(mode="after")
    def _a_place_for_tokens(self) -> OAuth:
        try:
            origin_of(self.token_url)
        except Misconfigured as error:
            raise ValueError(f"token_url: {error}") from None
        return self


class NoAuth(Strict):
    """No secret at all."""

    kind: Literal["none"] = Field(description="Sends no secret (a system inside the house)")


Auth = Annotated[Bearer | Basic | KeyHeader | OAuth | NoAuth, Field(discriminator="kind")]


class Test(Strict):
    """One question to a JSON document."""

    __test__ = False
    at: Pointer = Field(description="Where to look, from the item (or from the whole answer under `errors`)")
    present: bool | None = Field(default=None, description="true: something stands there; false: nothing does")
    not_empty: Literal[True] | None = Field(
        default=None, description="Something stands there and is not null, false, 0, empty text or an empty list"
    )
    one_of: tuple[str | int | bool | None, ...] | None = Field(default=None, description="It is one of these")
    none_of: tuple[str | int | bool | None, ...] | None = Field(default=None, description="It is none of these")
    matches: str | None = Field(
        default=None, description="A regular expression is found in the text there, or in one of the texts within"
    )

    @model_validator(mode="after")
    def _one_question(self) -> Test:
        asked = [n for n in ("present", "not_empty", "one_of", "none_of", "matches") if getattr(self, n) is not None]
        if len(asked) != 1:
            raise ValueError("asks exactly one of present, not_empty, one_of, none_of, matches")
        if self.matches is not None:
            try:
                re.compile(self.matches)
            except re.error as error:
                raise ValueError(f"matches is no regular expression: {error}") from None
        return self

    def holds(self, document: Any, other: Any = ABSENT) -> bool:
        """Whether the answer is yes; what is absent is looked for in ``other``."""
        found = at(document, self.at)
        if found is ABSENT:
            found = at(other, self.at)
        if self.present is not None:
            return (found is not ABSENT) == self.present
        if self.not_empty:
            return found is not ABSENT and bool(found)
        if self.one_of is not None:
            return any(same(found, value) for value in self.one_of)
        if self.none_of is not None:
            return not any(same(found, value) for value in self.none_of)
        return any(re.search(self.matches or "", text[:10_000]) is not None for text in texts(found))


class ErrorRule(Test):
    """An error that a system tells inside an answer that looks like success."""

    outcome: Literal["conflict", "refused", "not_applied", "unknown"] = Field(
        default="unknown",
        description="What it means: conflict, refused (for ever), not_applied (may be tried again), unknown (read it)",
    )
    says: Pointer | None = Field(default=None, description="Where the system's own words stand")


class Call(Strict):
    """One HTTP request."""

    method: str = Field(default="GET", description="The HTTP method")
    path: str = Field(description="Path below base_url; placeholders are quoted")
    query: dict[str, str | int | bool] = Field(default={}, description="Query parameters; `{rows}` repeats one")
    headers: dict[str, str] = Field(default={}, description="More headers, such as `If-Match: '{token}'`")
    body: Any = Field(default=None, description="JSON body; a placeholder that stands alone keeps its type")

    @model_validator(mode="after")
    def _below_the_base(self) -> Call:
        if not self.path.startswith("/") or self.path.startswith("//") or re.search(r"[?#\\\s]", self.path):
            raise ValueError(f"path {self.path!r} must begin with one / and hold no ?, #, \\ or space (see `query`)")
        if any(unquote(part) in (".", "..") for part in self.path.split("/")):
            raise ValueError(f"path {self.path!r} climbs")
        if self.method == "GET" and self.body is not None:
            raise ValueError("a GET has no body")
        check_names = {name: "" for name in self.headers}
        try:
            check_headers(check_names)
        except Misconfigured as error:
            raise ValueError(str(error)) from None
        return self


class _Pages(Strict):
    at_most: int = Field(default=20, ge=1, le=1000, description="Pages that one listing may have; more is an error")


class NumberedPages(_Pages):
    """page=1, page=2, …"""

    kind: Literal["page"] = Field(description="Numbered pages")
    param: str = Field(default="page", description="Query parameter with the page's number")
    first: int = Field(default=1, description="Number of the first page")
    size_param: str | None = Field(default=None, description="Query parameter with the page's size")
    size: int = Field(default=100, ge=1, description="Items that a page is asked to hold")
    last: Pointer | None = Field(default=None, description="Where the number of the last page stands")


class OffsetPages(_Pages):
    """offset=0, offset=100, …"""

    kind: Literal["offset"] = Field(description="So many items skipped")
    param: str = Field(default="offset", description="Query parameter with the number of items to skip")
    size_param: str | None = Field(default="limit", description="Query parameter with the page's size")
    size: int = Field(default=100, ge=1, description="Items that a page is asked to hold")
    total: Pointer | None = Field(default=None, description="Where the number of all items stands")


class CursorPages(_Pages):
    """A cursor of the answer goes with the next question."""

    kind: Literal["cursor"] = Field(description="The answer holds a cursor for the next page")
    param: str = Field(description="Query parameter that takes the cursor")
    next: Pointer = Field(description="Where the cursor stands; absent, null or empty ends the listing")


class UrlPages(_Pages):
    """The answer holds the next page's URL."""

    kind: Literal["next_url"] = Field(description="The answer holds the next page's URL (same host only)")
    next: Pointer = Field(description="Where the URL stands; absent, null or empty ends the listing")


class LinkPages(_Pages):
    """``Link: <…>; rel="next"``."""

    kind: Literal["link"] = Field(description='The header `Link` with rel="next" (same host only)')


Pages = Annotated[NumberedPages | OffsetPages | CursorPages | UrlPages | LinkPages, Field(discriminator="kind")]


class ReadOne(Call):
    """How one entity is read."""

    method: Literal["GET", "POST"] = Field(default="GET", description="The HTTP method; POST only for a search")
    item: Pointer = Field(default="", description="Where the entity stands in the answer; an empty list is `missing`")


class ReadMany(Call):
    """How many entities are read by one call."""

    method: Literal["GET", "POST"] = Field(default="GET", description="The HTTP method; POST only for a search")
    at_most: int = Field(ge=1, le=10_000, description="Entities that one call may ask for")
    join: str = Field(default=",", min_length=1, description="Stands between the ids in `{entities}`")
    row: Any = Field(default="{entity}", description="What `{rows}` holds for each entity")
    items: Pointer = Field(description="Where the list of entities stands in the answer")
    pages: Pages | None = Field(default=None, description="How a long answer goes on; left out: it does not")


class Token(Strict):
    """The version that a conditional write depends on."""

    header: str | None = Field(default=None, description="Answer header of `read.one` that holds it, such as ETag")
    at: Pointer | None = Field(default=None, description="Where it stands in the item (lock version, modified time)")
    exact: bool = Field(
        default=True,
        description="false for a time in whole seconds: two changes in one second look the same, so nothing is promised for it",
    )

    @model_validator(mode="after")
    def _one_place(self) -> Token:
        if (self.header is None) == (self.at is None):
            raise ValueError("stands either in a `header` or `at` a place of the item")
        if self.exact and self.header and self.header.lower() == "last-modified":
            raise ValueError("Last-Modified is a time in whole seconds; say `exact: false`")
        return self


class Read(Strict):
    """How the system shows what stands."""

    one: ReadOne | None = Field(default=None, description="How one entity is read")
    many: ReadMany | None = Field(default=None, description="How many are read by one call")
    key: Pointer | None = Field(
        default=None, description="Where the entity's id stands in an item; checked, and needed by `many`"
    )
    target: Pointer | None = Field(
        default=None, description="Where the id stands that writes need, if it is another (`{target}`)"
    )
    value: Pointer = Field(description="Where the value stands in an item")
    token: Token | None = Field(default=None, description="The version for a conditional write")
    watch: tuple[Pointer, ...] = Field(
        default=(),
        description="Places of an item that a write must leave alone; what changes there with it is reported",
    )
    closed: tuple[Test, ...] = Field(
        default=(), description="Any of these holding means: it cannot be changed any more"
    )
    missing: tuple[Test, ...] = Field(
        default=(), description="Any of these holding means: it is not there (archived, deleted)"
    )
    errors: tuple[Test, ...] = Field(
        default=(), description="Any of these holding for the whole answer means: not usable, ask again"
    )
    statuses: dict[int, Literal["missing", "unavailable", "misconfigured"]] = Field(
        default={}, description="What a status means where it is not the usual (404 and 410: missing)"
    )

    @model_validator(mode="after")
    def _complete(self) -> Read:
        if self.one is None and self.many is None:
            raise ValueError("needs `one` or `many`")
        if self.many is not None and self.key is None:
            raise ValueError("`many` needs `key`: where an item says which entity it is")
        if self.token and self.token.header and (self.many is not None or self.one is None):
            raise ValueError("a token in a header comes only with `one`; leave out `many`")
        return self


class WriteOne(Call):
    """How one value is written."""

    method: Literal["POST", "PUT", "PATCH"] = Field(description="The HTTP method")
    item: Pointer | None = Field(
        default=None,
        description="Where the entity stands in the answer, if it does: its new version is taken from there",
    )


class Rows(Strict):
    """Rows of a bulk answer."""

    rows: Pointer = Field(description="Where the list stands")
    key: Pointer | None = Field(
        default=None, description="Where a row names its entity or entities; left out: rows are in the order sent"
    )
    errors: tuple[ErrorRule, ...] = Field(default=(), description="What makes a row an error; left out: nothing does")


class Failures(Strict):
    """Rows of a bulk answer that failed."""

    rows: Pointer = Field(description="Where the list stands")
    key: Pointer = Field(description="Where a row names its entity or entities")
    outcome: Literal["conflict", "refused", "not_applied", "unknown"] = Field(
        default="refused", description="What standing in this list means"
    )
    says: Pointer | None = Field(default=None, description="Where the system's own words stand")


class WriteMany(Call):
    """How many values are written by one call."""

    method: Literal["POST", "PUT", "PATCH"] = Field(description="The HTTP method")
    at_most: int = Field(ge=2, le=10_000, description="Writes that one call may hold")
    row: Any = Field(description="What `{rows}` in the body holds for each write")
    results: Rows | None = Field(default=None, description="The rows of the answer, each for one write")
    failures: Failures | None = Field(default=None, description="The rows of the answer that failed")
    unnamed: Literal["accepted", "unknown"] = Field(
        default="unknown", description="What a write is that neither `results` nor `failures` names"
    )


class WriteSpec(Strict):
    """How the system is changed."""

    one: WriteOne | None = Field(default=None, description="How one value is written")
    many: WriteMany | None = Field(default=None, description="How many are written by one call")
    errors: tuple[ErrorRule, ...] = Field(
        default=(), description="Errors inside an answer that looks like success; the first that holds counts"
    )
    statuses: dict[int, Outcome] = Field(
        default={}, description="What a status means where it is not the usual, such as 503: not_applied"
    )
    says: Pointer | None = Field(
        default=None, description="Where an error's words stand; left out: looked for where most systems have them"
    )
    remembers_key: bool = Field(
        default=False,
        description="The system applies a repeated `{idempotency_key}` once. Promise only what its documentation does",
    )

    @model_validator(mode="after")
    def _complete(self) -> WriteSpec:
        if self.one is None and self.many is None:
            raise ValueError("needs `one` or `many`")
        return self


class History(Call):
    """The system's own record of who changed the value when."""

    method: Literal["GET"] = Field(default="GET", description="The HTTP method")
    items: Pointer = Field(description="Where the list of changes stands")
    changes: Pointer | None = Field(
        default=None, description="Where an item lists the fields that it changed, if it holds several"
    )
    where: tuple[Test, ...] = Field(default=(), description="All must hold: which changes are about the value")
    value: Pointer = Field(description="Where the new value stands")
    values: Values | None = Field(
        default=None,
        description="How the values stand in the history, where that is not as in `values` (ids, not names)",
    )
    time: Pointer = Field(description="Where the time stands: ISO 8601 (without zone: UTC), or seconds since 1970")
    actor: Pointer = Field(description="Where it says who did it")
    own_actor: str = Field(description="What stands there for this connector's own account")
    newest_first: bool = Field(default=False, description="The newest stand first, so that reading may stop early")
    pages: Pages | None = Field(default=None, description="How a long answer goes on; left out: it does not")


PER_WRITE = frozenset({"entity", "target", "value", "token", "idempotency_key", "decision_id", "batch_id", "run_id"})


class RestSystem(Strict):
    """Everything that a YAML says of one system."""

    system: str = Field(
        pattern=r"^[a-z][a-z0-9_.-]{0,80}$",
        description="Names system and account; one writer at a time holds it, and the ledger knows it by this name",
    )
    base_url: str = Field(description="https://host/path; every call stays on this host")
    allow_plain_http: bool = Field(
        default=False, description="http to another machine shows the token to the network; true accepts that"
    )
    ca_file: str | None = Field(default=None, description="Certificates of a private authority (PEM file)")
    timeout_s: float = Field(
        default=10, gt=0, le=300, description="Seconds for each wait; a call takes at most twice that"
    )
    largest_body: int = Field(default=16 << 20, ge=1024, description="Bytes of an answer, unpacked; more is an error")
    auth: Auth = Field(description="How the connector proves who it is; secrets only by a variable's name")
    secret_headers: dict[str, Name] = Field(
        default={},
        description="Further headers that hold secrets: header → environment variable, such as App-Token: GLPI_APP_TOKEN",
    )
    body_secrets: dict[Annotated[str, Field(pattern=r"^[a-z_]+$")], Name] = Field(
        default={},
        description="Secrets that a system wants in the body: name → environment variable; `{secret_NAME}` stands for it "
        "there, and nowhere else",
    )
    headers: dict[str, str] = Field(default={}, description="Headers of every call, as they are; never a secret")
    entity: str = Field(
        default=r"[A-Za-z0-9][A-Za-z0-9._:@-]*",
        description="Regular expression that a whole id must match; others are never sent and count as missing",
    )
    read: Read = Field(description="How the system shows what stands")
    values: Values = Field(description="How the decision's whole numbers stand in the system")
    write: WriteSpec = Field(description="How the system is changed")
    history: History | None = Field(default=None, description="The system's own record of changes, if it has one")
    stale_reads_s: float = Field(
        default=0, ge=0, le=3600, description="Seconds for which a read may still show what was there before a write"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> RestSystem:
        try:
            re.compile(self.entity)
        except re.error as error:
            raise ValueError(f"entity is no regular expression: {error}") from None
        try:
            origin_of(self.base_url, allow_plain_http=self.allow_plain_http)
            check_headers({**self.headers, **dict.fromkeys(self.secret_headers, "")})
        except Misconfigured as error:
            raise ValueError(str(error)) from None
        secret = [
            n for n in self.headers if re.search("authorization|cookie|api-?key|secret|password", n, re.IGNORECASE)
        ]
        if secret:
            raise ValueError(
                f"headers: {secret[0]} holds a secret, which never stands in a file; use `auth` or `secret_headers`"
            )
        read, write = self.read, self.write
        hidden = {f"secret_{name}" for name in self.body_secrets}
        for where, call in (
            ("read.one", read.one),
            ("read.many", read.many),
            ("write.one", write.one),
            ("write.many", write.many),
        ):
            if call is not None and (shown := placeholders([call.path, call.query, call.headers]) & hidden):
                raise ValueError(
                    f"{where}: {{{min(shown)}}} stands in a body only: paths, queries and headers are logged"
                )
        _only(read.one, "read.one", {"entity"} | hidden)
        _only(read.many, "read.many", {"entities", "rows"} | hidden, {"entity"})
        _only(write.one, "write.one", PER_WRITE | hidden)
        _only(write.many, "write.many", {"rows", "batch_id", "run_id"} | hidden, PER_WRITE)
        _only(self.history, "history", {"entity", "target"})
        if read.one and "entity" not in used_in(read.one):
            raise ValueError("read.one: must hold {entity}, or every entity would read the same")
        if read.many and not used_in(read.many) & {"entities", "rows"}:
            raise ValueError("read.many: must hold {entities} or {rows}, or everything would be listed")
        ways = {"write.one": (write.one, used_in(write.one)), "write.many": (write.many, used_row(write.many))}
        for where, (call, used) in ways.items():
            if call is None:
                continue
            if "value" not in used or not used & {"entity", "target"}:
                raise ValueError(f"{where}: must hold {{value}} and {{entity}} or {{target}}")
            if ("token" in used) != (read.token is not None):
                raise ValueError(
                    f"{where}: {{token}} and read.token belong together: without one the other promises nothing"
                )
            if write.remembers_key and "idempotency_key" not in used:
                raise ValueError(f"{where}: write.remembers_key needs {{idempotency_key}} to be sent")
        if write.many and "rows" not in placeholders(write.many.body):
            raise ValueError("write.many: body must hold {rows}")
        return self


def used_in(call: Call | None) -> set[str]:
    return placeholders([call.path, call.query, call.headers, call.body]) if call else set()


def used_row(call: ReadMany | WriteMany | None) -> set[str]:
    return placeholders(call.row) if call else set()


def _only(
    call: Call | None, where: str, allowed: set[str] | frozenset[str], row: set[str] | frozenset[str] = frozenset()
) -> None:
    if call is None:
        return
    for place, used, may in (
        (where, used_in(call), allowed),
        (f"{where}.row", used_row(call) if isinstance(call, ReadMany | WriteMany) else set(), row),
    ):
        if used - may:
            raise ValueError(
                f"{place}: unknown placeholder {{{min(used - may)}}} (allowed here: "
                + ", ".join(f"{{{name}}}" for name in sorted(may))
                + ")"
            )
    if placeholders(call.path) & {"rows"}:
        raise ValueError(f"{where}: {{rows}} cannot stand in a path")


class RestSettings(Strict):
    """What a workflow says to use a REST system."""

    kind: Literal["rest"]
    file: str = Field(description="The system's YAML, a path below the workflow's folder")
    base_url: str | None = Field(default=None, description="In place of the YAML's (a test instance)")


def load(file: Path, base_url: str | None = None) -> RestSystem:
    """Read one system's YAML. Raises Misconfigured naming the file, the path in it and what is allowed there."""
    try:
        text = yaml_config.read(file)
    except OSError as error:
        raise Misconfigured(f"{file}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise Misconfigured(str(error)) from None
    if base_url is not None:
        text["base_url"] = base_url
    try:
        return RestSystem.model_validate(text)
    except ValidationError as error:
        raise Misconfigured(yaml_config.explain(file, error, RestSystem)) from None
