"""Daily budgets of advertising campaigns over Google's official client and its offline document ``searchads360`` v23.

Belongs here: reading budgets by search, setting them by ``campaignBudgets.mutate``, the change history, and what each of
Google's errors says of a write. Does not: retries, or judging what came back (``delivery.push``).

The API has no conditional write and no idempotency key (no field of the document carries either), so only absolute amounts
are written. Its change history names who changed what, up to three minutes late.

The client builds every call; it does not check bodies, so they are checked against its document's schemas first. Its own
transport (httplib2) may not be shared by threads, follows redirects with the token, and waits for ever on a server that
drips, so the calls go through ``delivery.connectors.http`` instead.

Real use needs: an OAuth token for the scope https://www.googleapis.com/auth/doubleclicksearch in the environment, either
short-lived (``token_env``) or as a refresh token with its client (``refresh_token_env``, ``client_id_env``,
``client_secret_env``); ``login_customer_id`` where the account hangs below a manager account; ``developer_token_env`` where
the endpoint asks for one; and that Google has allowed the account to change things over this API (else it answers
SEARCH_ADS360_MUTATE_ALLOWLIST_DENIED). ``user_email`` must be an account that no person uses.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from common.errors import SignalboxError
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
from delivery.connectors.discovery import Document
from delivery.connectors.http import Answer, BadAnswer, Http, NoAnswer, NotSent, clean, retry_after, strict_json

OFFICIAL = "https://searchads360.googleapis.com/"
SCOPE = "https://www.googleapis.com/auth/doubleclicksearch"
MOST_OPERATIONS = 5_000
MOST_FILTER_VALUES = 10_000
MOST_PAGES = 1_000
HISTORY_ROWS = 10_000  # the most that a query of change_event may ask for
HISTORY_DAYS = 28  # the API keeps 30 and refuses to look further back; the rest is for its clock
WIDEST_ZONE = timedelta(hours=15)  # no clock of an account is further from UTC
# An own account's change that came by one of these was made by a person at a screen, or by a rule that a person set.
BY_HAND = frozenset(
    {
        "GOOGLE_ADS_WEB_CLIENT",
        "GOOGLE_ADS_AUTOMATED_RULE",
        "GOOGLE_ADS_SCRIPTS",
        "GOOGLE_ADS_BULK_UPLOAD",
        "GOOGLE_ADS_EDITOR",
        "GOOGLE_ADS_MOBILE_APP",
        "GOOGLE_ADS_RECOMMENDATIONS",
        "GOOGLE_ADS_RECOMMENDATIONS_SUBSCRIPTION",
    }
)
T = TypeVar("T")
BUDGET_FIELDS = ("resource_name", "id", "name", "amount_micros", "status", "period", "reference_count")


class GoogleAdsSettings(BaseModel):
    """The downstream system of a workflow with kind ``google_ads``: one account's campaign budgets, in micros."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["google_ads"] = "google_ads"
    customer_id: str = Field(description="The account, ten digits; dashes may stand in it")
    login_customer_id: str | None = Field(default=None, description="The manager account through which it is reached")
    endpoint: str = Field(default=OFFICIAL, description="Where the API is; plain http only on this machine")
    token_env: str = Field(
        default="SIGNALBOX_GOOGLE_ADS_TOKEN", description="Environment variable with an OAuth access token"
    )
    refresh_token_env: str | None = Field(
        default=None, description="Environment variable with an OAuth refresh token; set: `token_env` is not read"
    )
    client_id_env: str = Field(
        default="SIGNALBOX_GOOGLE_ADS_CLIENT_ID", description="Environment variable with the OAuth client's id"
    )
    client_secret_env: str = Field(
        default="SIGNALBOX_GOOGLE_ADS_CLIENT_SECRET", description="Environment variable with the OAuth client's secret"
    )
    token_uri: str = Field(default="https://oauth2.googleapis.com/token", description="Where tokens are refreshed")
    developer_token_env: str | None = Field(
        default=None, description="Environment variable with a developer token, where the endpoint asks for one"
    )
    entity: Literal["budget", "campaign"] = Field(
        default="budget",
        description="What an entity of the workflow names. Campaigns may share a budget; it is then written once",
    )
    match: Literal["name", "id"] = Field(default="name", description="Whether entities are names or ids of these")
    unit_micros: int = Field(
        default=10_000, gt=0, description="Smallest amount of the account's currency (a cent); others are refused"
    )
    user_email: str | None = Field(
        default=None,
        description="The token's account, as the change history shows it; used by no person. Null: no change history",
    )
    history_delay_s: float = Field(
        default=180.0, ge=0, description="How late a change may appear in the change history (Google: up to 3 minutes)"
    )
    stale_reads_s: float = Field(
        default=10.0, ge=0, description="For how long a search may still show what stood before a write"
    )
    timeout_s: float = Field(default=30.0, gt=0, le=600, description="Longest wait; a whole call takes twice that")
    bulk_read: int = Field(default=1_000, ge=1, le=MOST_FILTER_VALUES, description="Most entities in one search")
    bulk_write: int = Field(default=200, ge=1, le=MOST_OPERATIONS, description="Most budgets in one mutate")
    page_size: int | None = Field(
        default=None, ge=1, le=10_000, description="Rows of a page; null: what the API gives (10,000)"
    )

    @field_validator("customer_id", "login_customer_id")
    @classmethod
    def _digits(cls, value: str | None) -> str | None:
        if value is None:
            return None
        plain = value.replace("-", "")
        if not re.fullmatch(r"[0-9]{1,20}", plain):
            raise ValueError("an account is a number such as 123-456-7890")
        return plain

    @model_validator(mode="after")
    def _one_email(self) -> GoogleAdsSettings:
        if self.user_email is not None and not re.fullmatch(r"[^@\s]+@[^@\s]+", self.user_email):
            raise ValueError("user_email is no e-mail address")
        return self


def mapping(settings: GoogleAdsSettings, folder: Path) -> str:
    """What gives a value its meaning (``base.meaning``)."""
    return meaning(**settings.model_dump(mode="json", include={"kind", "customer_id", "entity", "match"}))


def writes(settings: GoogleAdsSettings, folder: Path) -> Writes:
    """The budgets of which account."""
    return Writes(f"google_ads:{settings.customer_id}", "campaign_budget.amount_micros")


def connect(
    settings: GoogleAdsSettings, *, environ: Mapping[str, str], folder: Path, clock: Callable[[], datetime]
) -> GoogleAds:
    """Open the account. Raises Misconfigured naming the variable that is missing. Nothing is sent yet."""
    return GoogleAds(settings, environ=environ, clock=clock)


@dataclass(frozen=True)
class Fault:
    """One error of Google's, as far as it says."""

    kind: str
    """Such as campaignBudgetError; empty where the answer names none."""
    reason: str
    message: str
    operation: int | None
    """Which operation of the call it is about; None: not said."""
    retry_after: float | None

    @property
    def says(self) -> str:
        code = f"{self.kind} {self.reason}".strip()
        return f"{code}: {self.message}" if code and self.message else code or self.message

    @property
    def outcome(self) -> Outcome:
        """What it says of the write that it is about."""
        if self.kind == "quotaError" and self.reason != "ACCESS_PROHIBITED":
            return "not_applied"
        if self.kind == "internalError":
            return "unknown"
        if (self.kind, self.reason) == ("databaseError", "CONCURRENT_MODIFICATION"):
            return "conflict"  # somebody wrote at the same moment: read again before writing again
        return "refused"


class Failed(SignalboxError, RuntimeError):
    """A call that was answered, and not with success."""

    def __init__(self, status: int, faults: Sequence[Fault], message: str, wait: float | None, *, google: bool) -> None:
        super().__init__(message)
        self.status, self.faults, self.retry_after = status, tuple(faults), wait
        self.google = google
        """The answer is shaped as Google's are; else something stands between."""

    @property
    def hopeless(self) -> bool:
        """No call can succeed: the token, the account or the address is wrong."""
        return (
            self.status in (401, 403, 407, 501) or 300 <= self.status < 400 or (self.status == 404 and not self.google)
        )

    @property
    def again(self) -> bool:
        """The same call may succeed later."""
        return (
            self.status in (408, 409, 425, 429)
            or self.status >= 500
            or any(f.outcome != "refused" for f in self.faults)
        )

    @property
    def outcome(self) -> Outcome:
        """What the answer says of a write that none of its faults is about."""
        if self.status in (425, 429):
            return "not_applied"
        if self.status == 408 or self.status >= 500 or self.status < 200:
            return "unknown"
        outcomes = {f.outcome for f in self.faults if f.operation is None}
        for outcome in ("unknown", "not_applied", "conflict"):
            if outcome in outcomes:
                return outcome  # type: ignore[return-value]
        if self.status == 409:
            return "conflict"
        if not outcomes and self.faults:
            return "not_applied"  # other operations of the call were at fault; the call as a whole did nothing
        return "refused"


class GoogleAds:
    """One account's budgets. Thread-safe: calls share a pool of connections, nothing else."""

    def __init__(
        self, settings: GoogleAdsSettings, *, environ: Mapping[str, str], clock: Callable[[], datetime]
    ) -> None:
        from googleapiclient.discovery import build_from_document

        self.settings = settings
        self.mapping = mapping(settings, Path())
        self.system = f"google_ads:{settings.customer_id}"
        self.unit_micros = settings.unit_micros
        self.history_delay_s = settings.history_delay_s
        self._clock = clock
        self._access = _Access(settings, environ)
        headers = {}
        if settings.login_customer_id:
            headers["login-customer-id"] = settings.login_customer_id
        if settings.developer_token_env:
            headers["developer-token"] = _secret(environ, settings.developer_token_env)
            self._access.secrets.append(headers["developer-token"])
        self._http = Http(
            settings.endpoint, headers=headers, timeout_s=settings.timeout_s, secrets=self._access.secrets
        )
        self._transport = _Transport(self._http, self._access, clock)
        self._document = Document.shipped("searchads360", "v23")
        mutate, search = ("customers", "campaignBudgets", "mutate"), ("customers", "searchAds360", "search")
        customers = build_from_document(
            self._document.excerpt(mutate, search),
            http=self._transport,
            client_options={"api_endpoint": settings.endpoint},
        ).customers()
        self._budgets, self._searches = customers.campaignBudgets(), customers.searchAds360()
        self._mutate_schema = self._document.body_of(*mutate)
        self._search_schema = self._document.body_of(*search)
        self._targets: dict[str, str] = {}
        """Where a key's budget was found last; only ``history`` relies on it."""

    def __repr__(self) -> str:
        return f"GoogleAds({self.system!r})"

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            bulk_read=self.settings.bulk_read,
            bulk_write=self.settings.bulk_write,
            validate_only=True,
            change_history=self.settings.user_email is not None,
            stale_reads_s=self.settings.stale_reads_s,
        )

    def close(self) -> None:
        """Let go of connections."""
        self._http.close()
        self._access.close()

    # --- reading

    def read(self, keys: Sequence[str]) -> dict[str, Reading]:
        """Every key's budget as a search shows it. A key that may not stand in a query comes back as ``missing``."""
        found: dict[str, Reading] = {}
        askable = []
        for key in dict.fromkeys(keys):
            wrong = self._unaskable(key)
            if wrong:
                found[key] = Reading(key, "", None, state="missing", says=wrong)
            else:
                askable.append(key)
        for chunk in _chunks(askable, self.settings.bulk_read):
            found.update(self._read(chunk))
        return {key: found[key] for key in keys}

    def _unaskable(self, key: str) -> str:
        if self.settings.match == "id":
            return "" if re.fullmatch(r"[1-9][0-9]{0,18}", key) else f"{key[:60]!r} is no id: ids are whole numbers"
        if re.search(r"[\"'\\`]", key) or not key.isprintable():
            return (
                "a name with a quote, a backslash or a control character is not put into a query; decide by id instead"
            )
        if not key.strip() or key != key.strip() or len(key.encode()) > 255:
            return f"{key[:60]!r} is no name: 1 to 255 bytes, no space around it"
        return ""

    def _read(self, keys: Sequence[str]) -> dict[str, Reading]:
        entity, match = self.settings.entity, self.settings.match
        resource = "campaign_budget" if entity == "budget" else "campaign"
        fields = [f"campaign_budget.{name}" for name in BUDGET_FIELDS]
        if entity == "campaign":
            own = ("resource_name", "id", "name", "status", "serving_status", "campaign_budget")
            fields = [f"campaign.{name}" for name in own] + fields
        values = ", ".join(keys if match == "id" else [f"'{key}'" for key in keys])
        query = f"SELECT {', '.join(fields)} FROM {resource} WHERE {resource}.{match} IN ({values})"
        wanted, seen = set(keys), set()
        at: dict[str, list[Reading]] = {}
        for row in self._search(query):
            budget = _part(row, "campaignBudget")
            named = budget if entity == "budget" else _part(row, "campaign")
            key = named.get(match)
            # Asked for by name, the API compares loosely; only the very same name is this entity
            if not isinstance(key, str) or key not in wanted:
                continue
            mark = (str(named.get("resourceName")), str(budget.get("resourceName")))
            if mark not in seen:  # pages may overlap where rows move
                seen.add(mark)
                at.setdefault(key, []).append(self._reading(key, budget, named if entity == "campaign" else None))
        out = {}
        for key in keys:
            rows = at.get(key, [])
            standing = [row for row in rows if row.state == "open"] or rows
            if not standing:
                out[key] = Reading(key, "", None, state="missing", says=f"the account has no {entity} of this {match}")
            elif len({row.target for row in standing}) > 1 and standing[0].state == "open":
                says = f"{len(standing)} {entity}s have this {match}; decide by id instead"
                out[key] = Reading(key, standing[0].target, None, says=says)
            else:
                out[key] = standing[0]
            if out[key].target:
                self._targets[key] = out[key].target
        return out

    def _reading(self, key: str, budget: Mapping[str, Any], campaign: Mapping[str, Any] | None) -> Reading:
        target = budget.get("resourceName")
        if campaign is not None and not budget:
            return Reading(key, "", None, state=_campaign_state(campaign), says="the campaign has no budget of its own")
        if not isinstance(target, str) or not self._own(target):
            raise Misconfigured(
                f"{self.system}: a search answered a budget without its resource name; is this the API?"
            )
        says, state = "", _campaign_state(campaign) if campaign is not None else "open"
        if state == "closed":
            says = "the campaign has ended or was removed"
        if budget.get("status") == "REMOVED":
            says, state = "the budget was removed", "closed"
        elif budget.get("status") not in ("ENABLED", "REMOVED"):
            says = f"the budget's status is {self._clean(str(budget.get('status')))!r}"
        value = _whole(budget.get("amountMicros"))
        if budget.get("period", "DAILY") != "DAILY":
            value, says = None, says or "this budget is a total over its whole period, not an amount a day"
        elif value is None:
            says = says or f"the budget holds no daily amount but {self._clean(repr(budget.get('amountMicros')), 60)}"
        elif says and state == "open":
            value = None
        shared = _whole(budget.get("referenceCount")) or 0
        if campaign is not None and shared > 1 and not says:
            says = f"{shared} campaigns share this budget"
        return Reading(key, target, value, state=state, says=says)

    def _own(self, target: str) -> bool:
        return re.fullmatch(rf"customers/{self.settings.customer_id}/campaignBudgets/[0-9]{{1,20}}", target) is not None

    def _search(self, query: str) -> Iterator[dict[str, Any]]:
        """All rows of a query, page by page. Raises Unavailable or Misconfigured."""
        token, tokens = "", set()
        for _ in range(MOST_PAGES):
            body: dict[str, Any] = {"query": query}
            if self.settings.page_size is not None:
                body["pageSize"] = self.settings.page_size
            if token:
                body["pageToken"] = token
            self._check(self._search_schema, body)
            call = self._searches.search(customerId=self.settings.customer_id, body=body)
            answer = self._ask(call)
            rows = answer.get("results", [])
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                raise Unavailable(f"{self.system}: the results of a search are no list of rows")
            # A real answer says which fields it shows, also when no row matched; anything may answer {}
            if not rows and not isinstance(answer.get("fieldMask"), str):
                raise Unavailable(f"{self.system}: an answer without results that is no answer to a search")
            yield from rows
            token = answer.get("nextPageToken") or ""
            if not token:
                return
            if not isinstance(token, str) or token in tokens:
                raise Unavailable(f"{self.system}: a search's pages do not end")
            tokens.add(token)
        raise Unavailable(f"{self.system}: a search has more than {MOST_PAGES} pages")

    def _ask(self, call: Any) -> dict[str, Any]:
        try:
            answer = call.execute(num_retries=0)
        except Failed as failed:
            says = self._told(failed)
            if failed.hopeless or not failed.again:
                raise Misconfigured(f"{says}{self._way_out(failed)}") from None
            raise Unavailable(says, retry_after=failed.retry_after) from None
        except (NotSent, NoAnswer, BadAnswer) as error:
            raise Unavailable(f"{self.system}: {self._clean(str(error))}") from None
        if not isinstance(answer, dict) or "error" in answer:
            raise Unavailable(f"{self.system}: the answer to a search is none, though its status says success")
        return answer

    # --- writing

    def apply(self, writes: Sequence[Write], *, validate_only: bool = False) -> list[Written]:
        """Set each budget once; several entities of one budget are one operation."""
        out: dict[int, Written] = {}
        together: dict[str, list[int]] = {}
        for n, write in enumerate(writes):
            wrong = self._unwritable(write)
            if wrong:
                out[n] = Written(write.key, "refused", wrong)
            else:
                together.setdefault(write.target, []).append(n)
        for target, members in list(together.items()):
            if len({writes[n].value for n in members}) > 1:
                names = ", ".join(f"{writes[n].key} {writes[n].value}" for n in members)
                for n in members:
                    out[n] = Written(writes[n].key, "refused", f"one budget, several values: {names}; nothing was sent")
                del together[target]
        sent = False
        for chunk in _chunks(list(together.values()), self.settings.bulk_write):
            try:
                answered = self._mutate([writes[members[0]] for members in chunk], chunk, writes, validate_only)
            except Misconfigured as error:
                if not sent:
                    raise
                # What the calls before it did must still be told
                answered = [Written(writes[m[0]].key, "not_applied", str(error)) for m in chunk]
            sent = True
            for members, written in zip(chunk, answered, strict=True):
                for n in members:
                    out[n] = Written(writes[n].key, written.outcome, written.says, written.retry_after)
        return [out[n] for n in range(len(writes))]

    def _unwritable(self, write: Write) -> str:
        if not self._own(write.target):
            return f"{self._clean(write.target, 80)!r} is no budget of account {self.settings.customer_id}; nothing was sent"
        if not 0 <= write.value < 2**63:
            return f"{write.value} is no amount that the API can hold; nothing was sent"
        if write.value % self.unit_micros:
            return (
                f"{write.value} micros is no multiple of {self.unit_micros} (unit_micros), which the API refuses as "
                "NON_MULTIPLE_OF_MINIMUM_CURRENCY_UNIT; nothing was sent"
            )
        return ""

    def _mutate(
        self, heads: Sequence[Write], chunk: Sequence[Sequence[int]], writes: Sequence[Write], validate_only: bool
    ) -> list[Written]:
        body = {
            "operations": [
                {"update": {"resourceName": w.target, "amountMicros": str(w.value)}, "updateMask": "amountMicros"}
                for w in heads
            ],
            "partialFailure": True,
            "validateOnly": validate_only,
        }
        self._check(self._mutate_schema, body)
        call = self._budgets.mutate(customerId=self.settings.customer_id, body=body)
        call.headers.update(_marks([writes[n] for members in chunk for n in members]))
        try:
            answer = call.execute(num_retries=0)
        except Failed as failed:
            if failed.hopeless:
                raise Misconfigured(f"{self._told(failed)}{self._way_out(failed)}") from None
            return self._all_failed(heads, failed)
        except NotSent as error:
            return [Written(w.key, "not_applied", self._clean(str(error))) for w in heads]
        except (NoAnswer, BadAnswer) as error:
            return [Written(w.key, "unknown", self._clean(str(error))) for w in heads]
        return self._judged(heads, answer, validate_only)

    def _all_failed(self, heads: Sequence[Write], failed: Failed) -> list[Written]:
        """The call was refused as a whole; an error that names its operation is that one's alone."""
        about = _by_operation(failed.faults)
        out = []
        for n, write in enumerate(heads):
            own = about.get(n, [])
            if own and failed.status < 500:
                outcome = _worst(own)
                out.append(Written(write.key, outcome, self._says(own), _longest([*own, failed])))
            else:
                wait = failed.retry_after
                out.append(Written(write.key, failed.outcome, self._told(failed), wait))
        return out

    def _judged(self, heads: Sequence[Write], answer: Any, validate_only: bool) -> list[Written]:
        """The outcome of each operation, from the results and the partial failures; where they do not fit: unknown."""
        if not isinstance(answer, dict) or "error" in answer:
            says = "the answer is none of this API's, though its status says success"
            return [Written(w.key, "unknown", says) for w in heads]
        status = answer.get("partialFailureError")
        faults = list(_faults(status)) if status else []
        about, general = _by_operation(faults), [f for f in faults if f.operation is None]
        results = answer.get("results", [])
        out = []
        for n, write in enumerate(heads):
            result = results[n] if isinstance(results, list) and n < len(results) else None
            name = result.get("resourceName") if isinstance(result, dict) else None
            own = about.get(n, [])
            if own and name is None:
                out.append(Written(write.key, _worst(own), self._says(own), _longest(own)))
            elif own:
                out.append(Written(write.key, "unknown", f"answered a success and a failure: {self._says(own)}"))
            elif name is not None and name != write.target:
                says = f"the answer is about {self._clean(str(name), 80)!r}, another budget"
                out.append(Written(write.key, "unknown", says))
            elif name is not None or (validate_only and not status):
                out.append(Written(write.key, "accepted"))
            elif general:
                out.append(Written(write.key, _worst(general), self._says(general), _longest(general)))
            elif validate_only and faults:
                out.append(Written(write.key, "accepted"))
            else:
                out.append(Written(write.key, "unknown", "the answer says nothing of this budget"))
        return out

    # --- history

    def history(self, keys: Sequence[str], since: datetime) -> list[Change]:
        """Changes of the keys' amounts since then, oldest first; a change may appear ``history_delay_s`` late.

        Raises Misconfigured for a time of which the API keeps no history any more.
        """
        if self.settings.user_email is None or not keys:
            return []
        now = self._clock()
        if since < now - timedelta(days=HISTORY_DAYS):
            raise Misconfigured(
                f"{self.system}: the change history reaches back {HISTORY_DAYS} days, and {since:%Y-%m-%d} was asked for; "
                "what happened before can only be seen in the account itself"
            )
        unknown = [key for key in keys if key not in self._targets]
        if unknown:
            self.read(unknown)
        of: dict[str, list[str]] = {}
        for key in dict.fromkeys(keys):
            if key in self._targets:
                of.setdefault(self._targets[key], []).append(key)
        found: dict[str, tuple[datetime, Mapping[str, Any]]] = {}
        for targets in _chunks(sorted(of), self.settings.bulk_read):
            for name, at, event in self._events(targets, since, now):
                found[name] = (at, event)
        changes = []
        for name in sorted(found, key=lambda n: (found[n][0], n)):
            at, event = found[name]
            value, told = _new_amount(event)
            if told and at >= since:
                actor = self._clean(str(event.get("userEmail") or "unknown"), 120)
                ours = actor.lower() == self.settings.user_email.lower() and str(event.get("clientType")) not in BY_HAND
                changes += [Change(key, value, at, actor, ours) for key in of.get(str(event["changeResourceName"]), [])]
        return changes

    def _events(
        self, targets: Sequence[str], since: datetime, now: datetime
    ) -> Iterator[tuple[str, datetime, Mapping[str, Any]]]:
        """Events of these budgets. The query's times are on the account's clock, so it asks for wider; an event's name
        holds its moment in UTC."""
        names = ", ".join(f"'{target}'" for target in targets)
        start, end = since - WIDEST_ZONE, now + WIDEST_ZONE
        fields = (
            "resource_name change_date_time change_resource_name resource_change_operation changed_fields client_type"
        )
        fields += " user_email new_resource"
        select = ", ".join(f"change_event.{name}" for name in fields.split())
        first = f"{start:%Y-%m-%d %H:%M:%S.%f}"
        while True:
            rows = list(
                self._search(
                    f"SELECT {select} FROM change_event WHERE change_event.change_date_time >= '{first}' "
                    f"AND change_event.change_date_time <= '{end:%Y-%m-%d %H:%M:%S.%f}' "
                    "AND change_event.change_resource_type = 'CAMPAIGN_BUDGET' "
                    f"AND change_event.change_resource_name IN ({names}) "
                    f"ORDER BY change_event.change_date_time ASC LIMIT {HISTORY_ROWS}"
                )
            )
            last = first
            for row in rows:
                event = _part(row, "changeEvent")
                name = str(event.get("resourceName"))
                micros = re.fullmatch(r"customers/[0-9]+/changeEvents/([0-9]{1,17})~[0-9]+~[0-9]+", name)
                if micros is None or not isinstance(event.get("changeResourceName"), str):
                    raise Misconfigured(f"{self.system}: a change event without its name; is this the API?")
                at = datetime.fromtimestamp(0, UTC) + timedelta(microseconds=int(micros[1]))
                last = max(last, str(event.get("changeDateTime") or first))
                yield name, at.replace(tzinfo=None), event
            if len(rows) < HISTORY_ROWS:
                return
            if last == first or not re.fullmatch(r"[0-9: .-]{10,30}", last):
                raise Unavailable(
                    f"{self.system}: more than {HISTORY_ROWS} changes at one moment of the change history"
                )
            first = last

    # --- words

    def _check(self, schema: str, body: Mapping[str, Any]) -> None:
        problems = self._document.problems(schema, body)
        if problems:
            raise Misconfigured(f"a body does not fit the API's schema, nothing was sent: {'; '.join(problems[:3])}")

    def _clean(self, text: str, limit: int = 300) -> str:
        return clean(text, self._access.secrets, limit)

    def _says(self, faults: Iterable[Fault]) -> str:
        return self._clean("; ".join(fault.says for fault in faults))

    def _told(self, failed: Failed) -> str:
        said = "; ".join(f.says for f in failed.faults) or str(failed)
        return self._clean(f"{self.system} answered {failed.status}: {said}")

    def _way_out(self, failed: Failed) -> str:
        if failed.status == 401:
            name = self.settings.refresh_token_env or self.settings.token_env
            return f". Put a token that is valid for {SCOPE} into {name}"
        if failed.status == 403:
            return (
                f". Give the token's account access to {self.settings.customer_id} (behind a manager account: "
                "login_customer_id), and ask Google to allow changes over this API"
            )
        if 300 <= failed.status < 400 or failed.status == 404:
            return f". Is {self.settings.endpoint} the API? Redirects are not followed"
        return ""


class _Access:
    """The access token: as it stands in the environment, or refreshed when it runs out. Thread-safe."""

    def __init__(self, settings: GoogleAdsSettings, environ: Mapping[str, str]) -> None:
        from google.oauth2.credentials import Credentials

        self._lock = threading.Lock()
        self._tokens: Http | None = None
        if settings.refresh_token_env is None:
            self.secrets = [_secret(environ, settings.token_env)]
            self._credentials = Credentials(token=self.secrets[0])
            return
        refresh, secret = _secret(environ, settings.refresh_token_env), _secret(environ, settings.client_secret_env)
        self.secrets = [refresh, secret]
        self._credentials = Credentials(
            token=None,
            refresh_token=refresh,
            client_id=_secret(environ, settings.client_id_env),
            client_secret=secret,
            token_uri=settings.token_uri,
        )
        self._tokens = Http(
            settings.token_uri, headers={}, timeout_s=min(settings.timeout_s, 10.0), secrets=self.secrets
        )

    def token(self) -> str:
        """A token that has not run out. Raises Misconfigured or NotSent."""
        with self._lock:
            if self._tokens is not None and not self._credentials.valid:
                from google.auth.exceptions import GoogleAuthError, TransportError

                try:
                    self._credentials.refresh(self._fetch)
                except TransportError as error:
                    raise NotSent(f"no access token: {clean(str(error), self.secrets)}") from None
                except GoogleAuthError as error:
                    again = bool(getattr(error, "retryable", False))
                    says = f"the refresh token was not taken: {clean(str(error), self.secrets)}"
                    raise (NotSent(says) if again else Misconfigured(f"{says}. Grant access anew")) from None
                self.secrets.append(str(self._credentials.token))
            return str(self._credentials.token)

    def _fetch(
        self, url: str, method: str = "GET", body: Any = None, headers: Mapping[str, str] | None = None, **_: Any
    ) -> Any:
        from google.auth.exceptions import TransportError

        assert self._tokens is not None
        content = body.encode() if isinstance(body, str) else body
        try:
            answer = self._tokens.request(method, url, content=content, headers=headers)
        except (NotSent, NoAnswer) as error:
            raise TransportError(str(error)) from None
        return _Fetched(answer.status, answer.headers, answer.body)

    def close(self) -> None:
        if self._tokens is not None:
            self._tokens.close()


@dataclass(frozen=True)
class _Fetched:
    status: int
    headers: Mapping[str, str]
    data: bytes


class _Transport:
    """What the client sends through in the place of httplib2: one request, once, bounded, never redirected."""

    def __init__(self, http: Http, access: _Access, clock: Callable[[], datetime]) -> None:
        self._http, self._access, self._clock = http, access, clock

    def request(
        self, uri: str, method: str = "GET", body: Any = None, headers: Mapping[str, str] | None = None, **_: Any
    ) -> tuple[Any, bytes]:
        """Raises Failed for every status but 2xx, BadAnswer for what is no JSON, NotSent and NoAnswer."""
        from httplib2 import Response

        # The client asks for deflate too and counts the body itself; Http does both better
        sent = {k: v for k, v in (headers or {}).items() if k.lower() not in ("accept-encoding", "content-length")}
        sent["user-agent"] = "signalbox google-api-python-client"
        sent["authorization"] = f"Bearer {self._access.token()}"
        content = body.encode() if isinstance(body, str) else body
        answer = self._http.request(method, uri, content=content, headers=sent)
        if not 200 <= answer.status < 300:
            raise _failed(answer, self._clock(), self._access.secrets)
        answer.json()
        return Response({"status": str(answer.status)}), answer.body

    def close(self) -> None:
        """The client closes what it was given; the pool is closed by its owner."""


def _secret(environ: Mapping[str, str], name: str) -> str:
    value = environ.get(name, "").strip()
    if not value:
        raise Misconfigured(
            f"the environment variable {name} is not set; put the secret there, never into the workflow"
        )
    if not re.fullmatch(r"[\x21-\x7e]+", value):
        raise Misconfigured(f"the environment variable {name} holds a space or a character that no token has")
    return value


def _marks(writes: Sequence[Write]) -> dict[str, str]:
    """Which batch, run and decisions a call belongs to, as headers; as many decisions as fit."""

    def plain(ids: Iterable[str]) -> list[str]:
        return [quote(i[:200], safe=":/@+~ ").strip() for i in dict.fromkeys(ids)]

    decisions, length = [], 0
    everyone = plain(w.decision_id for w in writes)
    for one in everyone:
        length += len(one) + 1
        if length > 4_000:
            break
        decisions.append(one)
    if len(decisions) < len(everyone):
        decisions.append(f"+{len(everyone) - len(decisions)}")
    return {
        "x-signalbox-batch": ",".join(plain(w.batch_id for w in writes))[:1_000],
        "x-signalbox-run": ",".join(plain(w.run_id for w in writes))[:1_000],
        "x-signalbox-decisions": ",".join(decisions),
    }


def _failed(answer: Answer, now: datetime, secrets: Sequence[str]) -> Failed:
    """What an answer that is no success says, however it is shaped, without the secrets that it may repeat."""
    wait = retry_after(answer.headers, now)
    try:
        body = strict_json(answer.body)
    except BadAnswer:
        body = None
    status = body.get("error") if isinstance(body, dict) else None
    google = isinstance(status, dict) and isinstance(status.get("message"), str)
    faults = [replace(f, message=clean(f.message, secrets)) for f in _faults(status)] if google else []
    if google and isinstance(status, dict):
        text = f"{status.get('status', '')} {status['message']}".strip()
        for detail in _dicts(status.get("details")):
            wait = _longest([wait, _seconds(detail.get("retryDelay"))])
    else:
        text = answer.body[:2_000].decode("utf-8", "replace") or "no body"
    return Failed(answer.status, faults, clean(text, secrets), _longest([wait, *faults]), google=google)


def _faults(status: Any) -> Iterator[Fault]:
    """The errors in a google.rpc.Status; its own message where its details hold none."""
    found = False
    for detail in _dicts(status.get("details") if isinstance(status, dict) else None):
        for error in _dicts(detail.get("errors")):
            found = True
            codes = [(k, v) for k, v in _part(error, "errorCode").items() if isinstance(v, str)]
            kind, reason = codes[0] if codes else ("", "")
            place = _dicts(_part(error, "location").get("fieldPathElements"))
            index = place[0].get("index") if place and place[0].get("fieldName") == "operations" else None
            about = index if isinstance(index, int) and not isinstance(index, bool) else None
            quota = _part(_part(error, "details"), "quotaErrorDetails")
            message = error.get("message")
            yield Fault(str(kind), reason, str(message or ""), about, _seconds(quota.get("retryDelay")))
        for violation in _dicts(detail.get("fieldViolations")):
            found = True
            yield Fault("", str(violation.get("field", "")), str(violation.get("description", "")), None, None)
    if not found:
        yield Fault("", "", str(status.get("message", "")) if isinstance(status, dict) else "no message", None, None)


def _by_operation(faults: Sequence[Fault]) -> dict[int, list[Fault]]:
    out: dict[int, list[Fault]] = {}
    for fault in faults:
        if fault.operation is not None:
            out.setdefault(fault.operation, []).append(fault)
    return out


def _worst(faults: Sequence[Fault]) -> Outcome:
    """The most careful reading of several errors about one write."""
    outcomes = {fault.outcome for fault in faults}
    order: tuple[Outcome, ...] = ("unknown", "refused", "conflict", "not_applied")
    return next(outcome for outcome in order if outcome in outcomes)


def _longest(waits: Iterable[float | Fault | Failed | None]) -> float | None:
    found = [w.retry_after if isinstance(w, Fault | Failed) else w for w in waits]
    return max((w for w in found if w is not None), default=None)


def _seconds(duration: Any) -> float | None:
    """Seconds of a duration as Google writes it (``30s``), at most an hour."""
    if not isinstance(duration, str) or not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?s", duration):
        return None
    return min(float(duration[:-1]), 3600.0)


def _whole(value: Any) -> int | None:
    """An int64 as the API writes it, a string; anything else is none."""
    return int(value) if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,19}", value) else None


def _part(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = row.get(name)
    return found if isinstance(found, dict) else {}


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _campaign_state(campaign: Mapping[str, Any]) -> EntityState:
    over = campaign.get("status") == "REMOVED" or campaign.get("servingStatus") == "ENDED"
    return "closed" if over else "open"


def _new_amount(event: Mapping[str, Any]) -> tuple[int | None, bool]:
    """The amount after an event, and whether the event changed it at all (a new name is no change of the value)."""
    if event.get("resourceChangeOperation") == "REMOVE":
        return None, True
    value = _whole(_part(_part(event, "newResource"), "campaignBudget").get("amountMicros"))
    fields = str(event.get("changedFields", ""))
    return value, value is not None or "amount" in fields


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
