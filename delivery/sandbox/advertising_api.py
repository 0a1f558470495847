"""The advertising API on this machine: the official contract, with the simulated world behind it.

Belongs here: what Google's document ``searchads360`` v23 allows is taken and the rest refused in Google's words; searches, the change
history, faults on request. Does not: what stands in the account (``advertising_account``), HTTP (``advertising_server``), or the
connector. The contract and the client are official, this server is ours: it was written from the document and Google's public
guides, and has never been compared with the real one.
"""

from __future__ import annotations

import json
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit
from zoneinfo import ZoneInfo

from common.clock import utc_now
from delivery.connectors.discovery import Document
from delivery.sandbox.advertising_account import UNIT, Account, Budget, micros
from delivery.sandbox.advertising_errors import BAD_REQUEST, FAILURE, STATUS, ApiError, Refused
from delivery.sandbox.advertising_query import Language, Query, QueryError, camel
from delivery.sandbox.worlds import advertising

LARGEST_AMOUNT = 10**15
MOST_OPERATIONS = 5_000
LARGEST_PAGE = 10_000
LARGEST_BODY = 8 << 20
PREFIX = "GoogleAdsSearchads360V23"
MUTABLE = {"amountMicros", "name", "explicitlyShared", "totalAmountMicros"}


@dataclass
class Trouble:
    """A fault that the next ``times`` calls meet."""

    on: str = "any"
    """mutate, search or any."""
    times: int = 1
    status: int | None = None
    """Answer with this instead."""
    retry_after_s: float | None = None
    delay_s: float = 0.0
    """Wait before doing anything."""
    applied: bool = False
    """Do what was asked before failing: the answer lies about it."""
    close: bool = False
    """Close the connection instead of answering."""


@dataclass
class Refusal:
    """The next ``times`` updates of this budget are refused with this error."""

    line: str
    kind: str = "campaignBudgetError"
    reason: str = "MONEY_AMOUNT_TOO_LARGE"
    times: int = 1_000_000


class AdvertisingSandbox(Account):
    """The account with the API before it. Thread-safe.

    Args:
        folder: Holds ``advertising.sqlite``; made if it is not there. What stands in it wins over the other arguments.
        world: What the budgets earn. A folder goes with one world; another one is refused (ValueError).
        next_day: The first day that has not happened yet.
        token: The only access token that is taken.
        budgets: Micros by line to begin with, whole cents; lines that are not named get the incumbent's of ``next_day``.
        user_email: Who the token belongs to, in the change history.
        time_zone: The account's clock; only the change history shows it.
        clock: Now, naive UTC.
        history_delay_s: How late a change appears in the change history.
    """

    def __init__(
        self,
        folder: Path,
        world: advertising.World,
        *,
        next_day: date,
        token: str,
        budgets: Mapping[str, int] | None = None,
        customer_id: str = "1234567890",
        user_email: str = "signalbox@example.com",
        time_zone: str = "Europe/Berlin",
        clock: Callable[[], datetime] = utc_now,
        history_delay_s: float = 0.0,
    ) -> None:
        self.token = token
        self.customer_id, self.user_email, self.history_delay_s = customer_id, user_email, history_delay_s
        self.zone = ZoneInfo(time_zone)
        self.troubles: list[Trouble] = []
        self.refusals: list[Refusal] = []
        self.calls: dict[str, int] = {"mutate": 0, "search": 0}
        self.document = Document.shipped("searchads360", "v23")
        self._mutate_schema = self.document.body_of("customers", "campaignBudgets", "mutate")
        self._search_schema = self.document.body_of("customers", "searchAds360", "search")
        self._words = self.document.properties(f"{PREFIX}Errors__ErrorCode")
        resources = {
            "campaign_budget": (f"{PREFIX}Resources__CampaignBudget", ("customer",)),
            "campaign": (f"{PREFIX}Resources__Campaign", ("campaign_budget", "customer")),
            "change_event": (f"{PREFIX}Resources__ChangeEvent", ("customer",)),
            "customer": (f"{PREFIX}Resources__Customer", ()),
        }
        self._language = Language(self.document, resources)
        self._pages: OrderedDict[str, tuple[str, list[dict[str, Any]], str]] = OrderedDict()
        self._requests = 0
        super().__init__(folder, world, next_day=next_day, budgets=budgets, clock=clock)

    def state(self) -> dict[str, Any]:
        """Everything that stands, for tests and for people."""
        with self._lock:
            return {
                "next_day": self.next_day.isoformat(),
                "customer_id": self.customer_id,
                "budgets": [asdict(b) for b in self.budgets.values()],
                "campaigns": [asdict(c) for c in self.campaigns.values()],
                "applications": sum(b.applications for b in self.budgets.values()),
                "calls": dict(self.calls),
                "samples": self.sampled(),
            }

    def trouble(self, trouble: Trouble) -> None:
        """The next calls meet this fault."""
        with self._lock:
            self.troubles.append(trouble)

    def refuse(self, refusal: Refusal) -> None:
        """Updates of this budget are refused from now on."""
        self._named(refusal.line)
        with self._lock:
            self.refusals.append(refusal)

    # --- the API

    def mutate(self, body: Any, marks: Mapping[str, str]) -> dict[str, Any]:
        """``campaignBudgets.mutate``. Raises Refused."""
        self._valid(self._mutate_schema, body)
        operations = body.get("operations") or []
        if not operations:
            raise Refused(400, [ApiError("fieldError", "REQUIRED", path=("operations",))])
        if len(operations) > MOST_OPERATIONS:
            raise Refused(400, [ApiError("requestError", "TOO_MANY_MUTATE_OPERATIONS")])
        for n, operation in enumerate(operations):
            if len({"create", "update", "remove"} & operation.keys()) > 1:
                says = "Invalid value (oneof), oneof field 'operation' is already set. Cannot set another."
                raise Refused(400, message=says, violations=[(f"operations[{n}]", says)])
        partial, only_validate = body.get("partialFailure", False), body.get("validateOnly", False)
        errors: list[ApiError] = []
        results: list[dict[str, Any]] = []
        seen: set[str] = set()
        with self._lock:
            planned: list[tuple[Budget, dict[str, Any]] | None] = []
            for n, operation in enumerate(operations):
                try:
                    planned.append(self._planned(n, operation, seen))
                except Refused as refused:
                    errors += refused.errors
                    planned.append(None)
            if errors and not partial:
                raise Refused(400, errors)
            if not only_validate:
                with self._transaction():
                    for one in planned:
                        if one is None:
                            results.append({})
                            continue
                        budget, changes = one
                        self._set(budget, changes, self.user_email, "GOOGLE_ADS_API", marks)
                        result: dict[str, Any] = {"resourceName": self._name(budget)}
                        if body.get("responseContentType") == "MUTABLE_RESOURCE":
                            result["campaignBudget"] = self._budget_row(budget)
                        results.append(result)
        answer: dict[str, Any] = {"results": results} if results else {}
        if errors:
            answer["partialFailureError"] = self._status(3, errors)
        return answer

    def _planned(self, n: int, operation: Mapping[str, Any], seen: set[str]) -> tuple[Budget, dict[str, Any]]:
        def wrong(kind: str, reason: str, *path: str, trigger: str | None = None) -> Refused:
            return Refused(400, [ApiError(kind, reason, n, path, trigger)])

        if "create" in operation:
            raise wrong("operationAccessDeniedError", "CREATE_OPERATION_NOT_PERMITTED", "create")
        if not operation or ("update" not in operation and "remove" not in operation):
            raise wrong("requestError", "OPERATION_REQUIRED")
        verb = "update" if "update" in operation else "remove"
        name = operation["remove"] if verb == "remove" else operation["update"].get("resourceName", "")
        at = (verb,) if verb == "remove" else (verb, "resource_name")
        if not name:
            raise wrong("requestError", "RESOURCE_NAME_MISSING", *at)
        found = re.fullmatch(r"customers/([0-9]+)/campaignBudgets/([0-9]{1,18})", name)
        if found is None:
            raise wrong("requestError", "RESOURCE_NAME_MALFORMED", *at, trigger=name)
        budget = self.budgets.get(int(found[2]))
        if found[1] != self.customer_id or budget is None:
            raise wrong("mutateError", "RESOURCE_NOT_FOUND", *at, trigger=name)
        if name in seen:
            raise wrong("mutateError", "ID_EXISTS_IN_MULTIPLE_MUTATES", *at, trigger=name)
        seen.add(name)
        if budget.status == "REMOVED":
            raise wrong("campaignBudgetError", "CAMPAIGN_BUDGET_REMOVED", *at, trigger=name)
        for refusal in self.refusals:
            if refusal.line == budget.line and refusal.times > 0:
                refusal.times -= 1
                raise wrong(refusal.kind, refusal.reason, verb, "amount_micros")
        if verb == "remove":
            if operation.get("updateMask"):
                raise wrong("fieldMaskError", "FIELD_MASK_NOT_ALLOWED", "update_mask")
            if any(c.budget == budget.id and c.status != "REMOVED" for c in self.campaigns.values()):
                raise wrong("campaignBudgetError", "CAMPAIGN_BUDGET_IN_USE", *at)
            return budget, {"status": "REMOVED"}
        return budget, self._updated(n, operation, wrong)

    def _updated(self, n: int, operation: Mapping[str, Any], wrong: Callable[..., Refused]) -> dict[str, Any]:
        update, mask = operation["update"], operation.get("updateMask", "")
        if not mask:
            raise wrong("fieldMaskError", "FIELD_MASK_MISSING", "update_mask")
        changes: dict[str, Any] = {}
        for part in mask.split(","):
            name = camel(part)
            known = self.document.properties(f"{PREFIX}Resources__CampaignBudget")
            if name not in known:
                raise wrong("fieldMaskError", "FIELD_NOT_FOUND", "update_mask", trigger=part)
            if name not in MUTABLE:
                raise wrong("fieldError", "IMMUTABLE_FIELD", "update", part)
            if name == "totalAmountMicros":
                reason = "TOTAL_BUDGET_AMOUNT_MUST_BE_UNSET_FOR_BUDGET_PERIOD_DAILY"
                raise wrong("campaignBudgetError", reason, "update", "total_amount_micros")
            if name not in update:
                raise wrong("fieldError", "FIELD_CANNOT_BE_CLEARED", "update", part)
            if name == "amountMicros":
                amount = int(update[name])
                for bad, kind, reason in (
                    (amount < 0, "campaignBudgetError", "NEGATIVE_MONEY_AMOUNT"),
                    (amount % UNIT != 0, "campaignBudgetError", "NON_MULTIPLE_OF_MINIMUM_CURRENCY_UNIT"),
                    (amount < UNIT, "campaignBudgetError", "BUDGET_BELOW_PER_DAY_MINIMUM"),
                    (amount > LARGEST_AMOUNT, "campaignBudgetError", "MONEY_AMOUNT_TOO_LARGE"),
                ):
                    if bad:
                        raise wrong(kind, reason, "update", "amount_micros", trigger=str(amount))
                changes["amount"] = amount
            elif name == "name":
                if not 1 <= len(update[name].strip().encode()) <= 255:
                    raise wrong("fieldError", "INVALID_VALUE", "update", "name")
                if any(b.name == update[name] and b.status == "ENABLED" for b in self.budgets.values()):
                    raise wrong("campaignBudgetError", "DUPLICATE_NAME", "update", "name", trigger=update[name])
                changes["name"] = update[name]
            elif name == "explicitlyShared":
                changes["shared"] = bool(update[name])
        return changes

    def search(self, body: Any) -> dict[str, Any]:
        """``searchAds360.search``. Raises Refused."""
        self._valid(self._search_schema, body)
        text = body.get("query", "")
        if not text:
            raise Refused(400, [ApiError("requestError", "REQUIRED_FIELD_MISSING", path=("query",))])
        size = body.get("pageSize", 0) or LARGEST_PAGE
        if not 1 <= size <= LARGEST_PAGE:
            raise Refused(400, [ApiError("requestError", "INVALID_PAGE_SIZE", path=("page_size",))])
        token = body.get("pageToken", "")
        try:
            query = self._language.parse(text)
        except QueryError as error:
            raise Refused(400, [ApiError("queryError", error.reason, message=str(error))]) from None
        if body.get("validateOnly"):
            return {}
        mask = ",".join(".".join(self._language.path(name)[0]) for name in query.fields)
        with self._lock:
            if token:
                asked, rows, mask = self._pages.get(token.split(".")[0], ("", [], ""))
                start = int(token.split(".")[1]) if re.fullmatch(r"[0-9]+\.[0-9]{1,9}", token) else 0
                if asked != text or not start:
                    raise Refused(400, [ApiError("requestError", "INVALID_PAGE_TOKEN", path=("page_token",))])
                mark = token.split(".")[0]
            else:
                rows, start = self._language.select(query, self._candidates(query)), 0
                mark = str(self._requests)
        answer: dict[str, Any] = {"results": rows[start : start + size]} if rows[start:] else {}
        answer["fieldMask"] = mask
        if (body.get("searchSettings") or {}).get("returnTotalResultsCount"):
            answer["totalResultsCount"] = str(len(rows))
        if start + size < len(rows):
            with self._lock:  # the pages of one search show one moment
                self._pages[mark] = (text, rows, mask)
                while len(self._pages) > 64:
                    self._pages.popitem(last=False)
            answer["nextPageToken"] = f"{mark}.{start + size}"
        return answer

    def _candidates(self, query: Query) -> list[dict[str, Any]]:
        """The rows that the query can be about, found by name or number where it asks for some."""
        customer = {
            "resourceName": f"customers/{self.customer_id}",
            "id": self.customer_id,
            "descriptiveName": "Signalbox sandbox",
            "currencyCode": "EUR",
            "timeZone": str(self.zone),
            "status": "ENABLED",
            "testAccount": True,
        }
        if query.resource == "customer":
            return [{"customer": customer}]
        if query.resource == "change_event":
            return [{"changeEvent": event, "customer": customer} for event in self._events(query)]
        by_name, users = self._index()
        if query.resource == "campaign_budget":
            budgets = list(self.budgets.values())
            asked = {name: query.asked(f"campaign_budget.{name}") for name in ("id", "name", "resource_name")}
            if asked["id"] is not None:
                budgets = [self.budgets[int(i)] for i in dict.fromkeys(asked["id"]) if int(i) in self.budgets]
            elif asked["name"] is not None:
                budgets = [b for name in dict.fromkeys(asked["name"]) for b in by_name.get(name, [])]
            return [{"campaignBudget": self._budget_row(b, users), "customer": customer} for b in budgets]
        rows = []
        names = query.asked("campaign.name")
        wanted = set(names) if names is not None else None
        for campaign in self.campaigns.values():
            if wanted is None or campaign.line in wanted:
                budget = self.budgets[campaign.budget]
                row = {
                    "resourceName": f"customers/{self.customer_id}/campaigns/{campaign.id}",
                    "id": str(campaign.id),
                    "name": campaign.line,
                    "status": campaign.status,
                    "servingStatus": "SERVING" if campaign.status == "ENABLED" else "ENDED",
                    "campaignBudget": self._name(budget),
                }
                rows.append({"campaign": row, "campaignBudget": self._budget_row(budget, users), "customer": customer})
        return rows

    def _name(self, budget: Budget) -> str:
        return f"customers/{self.customer_id}/campaignBudgets/{budget.id}"

    def _budget_row(self, budget: Budget, users: Mapping[int, int] | None = None) -> dict[str, Any]:
        row = {
            "resourceName": self._name(budget),
            "id": str(budget.id),
            "name": budget.name,
            "amountMicros": str(budget.amount),
            "status": budget.status,
            "period": "DAILY",
            "type": "STANDARD",
            "deliveryMethod": "STANDARD",
            "explicitlyShared": budget.shared,
        }
        if users is not None:
            row["referenceCount"] = str(users.get(budget.id, 0))
        return row

    def _events(self, query: Query) -> list[dict[str, Any]]:
        """Changes within the time that the query must name, as the change history shows them."""
        now = self._clock()
        when = [c for c in query.where if c.field == "change_event.change_date_time"]
        starts = [c.values[0] for c in when if c.operator in (">", ">=", "BETWEEN", "=")]
        ends = [c.values[-1] for c in when if c.operator in ("<", "<=", "BETWEEN", "=")]
        if not starts or not ends:
            raise Refused(400, [ApiError("changeEventError", "CHANGE_DATE_RANGE_INFINITE")])
        if query.limit is None:
            raise Refused(400, [ApiError("changeEventError", "LIMIT_NOT_SPECIFIED")])
        if query.limit > 10_000:
            raise Refused(400, [ApiError("changeEventError", "INVALID_LIMIT_CLAUSE")])
        try:
            first, last = (datetime.fromisoformat(t).replace(tzinfo=self.zone) for t in (max(starts), min(ends)))
        except ValueError:
            raise Refused(400, [ApiError("queryError", "INVALID_DATE_FORMAT")]) from None
        if first.astimezone(UTC).replace(tzinfo=None) < now - timedelta(days=30):
            raise Refused(400, [ApiError("changeEventError", "START_DATE_TOO_OLD")])
        if last < first:
            raise Refused(400, [ApiError("changeEventError", "CHANGE_DATE_RANGE_NEGATIVE")])
        names = query.asked("change_event.change_resource_name")
        ids = None if names is None else {int(n.rsplit("/", 1)[-1]) for n in names if n.rsplit("/", 1)[-1].isdigit()}
        # Two changes of one moment are told apart by a microsecond, so without a delay the last may lie just ahead
        late = timedelta(seconds=self.history_delay_s)
        shown = micros(now - late) if late else 2**62
        found = self._db.execute(
            "SELECT micros, budget, field, operation, before, after, actor, client FROM changes "
            "WHERE micros BETWEEN ? AND ? ORDER BY micros",
            (int(first.timestamp() * 1e6), min(int(last.timestamp() * 1e6) + 1, shown)),
        )
        return [self._event(*row) for row in found if ids is None or row[1] in ids]

    def _event(
        self, micros: int, budget: int, name: str, operation: str, before: str, after: str, actor: str, client: str
    ) -> dict[str, Any]:
        local = datetime.fromtimestamp(micros // 1_000_000, self.zone).replace(
            tzinfo=None, microsecond=micros % 1_000_000
        )
        shown = {"amount": "amountMicros", "name": "name", "status": "status", "shared": "explicitlyShared"}[name]
        resource = f"customers/{self.customer_id}/campaignBudgets/{budget}"

        def part(value: str) -> dict[str, Any]:
            told: Any = value == "True" if name == "shared" else value
            return {"campaignBudget": {"resourceName": resource, shown: told}}

        return {
            "resourceName": f"customers/{self.customer_id}/changeEvents/{micros}~0~0",
            "changeDateTime": f"{local:%Y-%m-%d %H:%M:%S.%f}",
            "changeResourceType": "CAMPAIGN_BUDGET",
            "changeResourceName": resource,
            "resourceChangeOperation": operation,
            "changedFields": shown,
            "clientType": client,
            "userEmail": actor,
            "oldResource": part(before),
            "newResource": part(after),
        }

    # --- errors, as Google writes them

    def _valid(self, schema: str, body: Any) -> None:
        problems = self.document.problems(schema, body)
        if problems:
            violations = [tuple(problem.split(": ", 1)) for problem in problems]
            says = "; ".join(f"Invalid JSON payload received. {words} at '{place}'" for place, words in violations)
            raise Refused(400, message=says[:2_000], violations=[(place, words) for place, words in violations])

    def _error(self, error: ApiError) -> dict[str, Any]:
        node = self._words[error.kind]
        says = error.message or node["enumDescriptions"][node["enum"].index(error.reason)]
        out: dict[str, Any] = {"errorCode": {error.kind: error.reason}, "message": says}
        if error.trigger is not None:
            out["trigger"] = {"stringValue": error.trigger}
        place: list[dict[str, Any]] = [{"fieldName": part} for part in error.path]
        if error.operation is not None:
            place = [{"fieldName": "operations", "index": error.operation}, *place]
        if place:
            out["location"] = {"fieldPathElements": place}
        if error.retry_delay_s is not None:
            quota = {
                "rateScope": "ACCOUNT",
                "rateName": "Requests per account",
                "retryDelay": f"{error.retry_delay_s:g}s",
            }
            out["details"] = {"quotaErrorDetails": quota}
        return out

    def _status(self, code: int, errors: Sequence[ApiError], message: str = "") -> dict[str, Any]:
        listed = [self._error(e) for e in errors]
        if not message:
            first = listed[0]["message"]
            place = ".".join(
                f"{p['fieldName']}[{p['index']}]" if "index" in p else p["fieldName"]
                for p in listed[0].get("location", {}).get("fieldPathElements", [])
            )
            message = f"{first}{f', at {place}' if place else ''}"
            if len(listed) > 1:
                message = f"Multiple errors in ‘details’. First error: {message}"
        detail = {"@type": FAILURE, "errors": listed, "requestId": f"sandbox-{self._requests}"}
        return {"code": code, "message": message, "details": [detail]}

    def refused(self, refused: Refused) -> dict[str, Any]:
        """The body of an error answer."""
        name, words, _ = STATUS[refused.status]
        error: dict[str, Any] = {"code": refused.status, "message": refused.message or words, "status": name}
        if refused.errors:
            error["details"] = self._status(3, refused.errors, "-")["details"]
        elif refused.violations:
            listed = [{"field": place, "description": words} for place, words in refused.violations]
            error["details"] = [{"@type": BAD_REQUEST, "fieldViolations": listed}]
        return {"error": error}

    # --- one request

    def authorise(self, headers: Mapping[str, str]) -> None:
        """Raises Refused unless the token is the one."""
        if headers.get("authorization") != f"Bearer {self.token}":
            raise Refused(401, [ApiError("authenticationError", "OAUTH_TOKEN_INVALID")])

    def answer(
        self, method: str, target: str, headers: Mapping[str, str], content: bytes
    ) -> tuple[int, dict[str, Any]]:
        """Status and body for one request; ``headers`` by lower-case name. Never raises for what a client sends."""
        with self._lock:
            self._requests += 1
        try:
            parts = urlsplit(target)
            path = unquote(parts.path)
            self.authorise(headers)
            if path.startswith("/sandbox/"):
                return 200, self._control(method, path.removeprefix("/sandbox/"), content)
            unknown = [name for name, _ in parse_qsl(parts.query) if name not in self.document.content["parameters"]]
            if unknown:
                says = f'Invalid JSON payload received. Unknown name "{unknown[0]}": Cannot bind query parameter.'
                raise Refused(400, message=says, violations=[(unknown[0], says)])
            return 200, self._served(method, path, headers, content)
        except Refused as refused:
            return refused.status, self.refused(refused)

    def _served(self, method: str, path: str, headers: Mapping[str, str], content: bytes) -> dict[str, Any]:
        if (method, path) == ("GET", "/v23/customers:listAccessibleCustomers"):
            return {"resourceNames": [f"customers/{self.customer_id}"]}
        found = re.fullmatch(r"/v23/customers/([^/]+)/(campaignBudgets:mutate|searchAds360:search)", path)
        if found is None or method != "POST":
            raise Refused(404, message="Method not found.")
        if not found[1].isdigit():
            raise Refused(400, [ApiError("requestError", "INVALID_CUSTOMER_ID")])
        if found[1] != self.customer_id:
            raise Refused(403, [ApiError("authorizationError", "USER_PERMISSION_DENIED")])
        try:
            body = json.loads(content)
        except (ValueError, RecursionError):
            raise Refused(400, message="Invalid JSON payload received. Unexpected token.") from None
        kind = "mutate" if "mutate" in found[2] else "search"
        trouble = None
        with self._lock:
            self.calls[kind] += 1
            trouble = next((t for t in self.troubles if t.times > 0 and t.on in (kind, "any")), None)
            if trouble is not None:
                trouble.times -= 1
        if trouble is None:
            return self._call(kind, body, headers)
        time.sleep(trouble.delay_s)
        result = self._call(kind, body, headers) if trouble.applied or not (trouble.status or trouble.close) else {}
        if trouble.close:
            raise ConnectionAbortedError
        if trouble.status is None:
            return result
        fault = STATUS[trouble.status][2]
        errors = [ApiError(*fault, retry_delay_s=trouble.retry_after_s)] if fault else []
        raise Refused(trouble.status, errors)

    def _call(self, kind: str, body: Any, headers: Mapping[str, str]) -> dict[str, Any]:
        return self.mutate(body, headers) if kind == "mutate" else self.search(body)

    def _control(self, method: str, what: str, content: bytes) -> dict[str, Any]:
        """What a person or a test asks of the sandbox itself."""
        try:
            given = json.loads(content) if content else {}
            match method, what:
                case "GET", "state":
                    return self.state()
                case "GET", "samples":
                    return self.sampled()
                case "GET", "changes":
                    return {"changes": self.changes()}
                case "POST", "samples":
                    self.group(given["groups"]) if "groups" in given else self.reset_samples()
                case "POST", "set":
                    self.by_hand(given["line"], given["amount"], given.get("actor", "person@example.com"))
                case "POST", "remove":
                    self.remove(given["line"], given.get("actor", "person@example.com"))
                case "POST", "share":
                    self.share(given["line"], given["with"], given.get("actor", "person@example.com"))
                case "POST", "trouble":
                    if given.get("status") not in (None, *STATUS):
                        raise ValueError(f"status is one of {sorted(STATUS)}")
                    self.trouble(Trouble(**given))
                case "POST", "refuse":
                    refusal = Refusal(**given)
                    if refusal.reason not in self._words[refusal.kind]["enum"]:
                        raise ValueError(f"{refusal.kind} has no {refusal.reason}")
                    self.refuse(refusal)
                case "POST", "advance":
                    landing = Path(given["landing"]) if given.get("landing") else None
                    multipliers = {line: (m, p) for line, (m, p) in (given.get("multipliers") or {}).items()}
                    rows = self.advance(landing, multipliers=multipliers)
                    day = rows.column("date")[0].as_py().isoformat()
                    return {"day": day, "rows": rows.num_rows, "next_day": self.next_day.isoformat()}
                case _:
                    raise Refused(404, message=f"The sandbox has no {method} {what}.")
        except (KeyError, TypeError, ValueError) as error:
            raise Refused(400, message=f"{type(error).__name__}: {error}") from None
        return {}
