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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from delivery.connectors.base import (
    Capabilities,
    Change,
    EntityState,
    Misconfigured,
    Reading,
    Unavailable,
    Write,
    Writes,
    Written,
    meaning,
)
from delivery.connectors.discovery import Document
from delivery.connectors.google_ads_errors import Failed, Fault, by_operation, faults_of, longest, part, whole, worst
from delivery.connectors.google_ads_settings import GoogleAdsSettings
from delivery.connectors.google_ads_transport import SCOPE, Access, Transport, secret_of
from delivery.connectors.http import BadAnswer, Http, NoAnswer, NotSent, clean

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


SETTINGS = GoogleAdsSettings


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
        self._access = Access(settings, environ)
        headers = {}
        if settings.login_customer_id:
            headers["login-customer-id"] = settings.login_customer_id
        if settings.developer_token_env:
            headers["developer-token"] = secret_of(environ, settings.developer_token_env)
            self._access.secrets.append(headers["developer-token"])
        self._http = Http(
            settings.endpoint, headers=headers, timeout_s=settings.timeout_s, secrets=self._access.secrets
        )
        self._transport = Transport(self._http, self._access, clock)
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
            budget = part(row, "campaignBudget")
            named = budget if entity == "budget" else part(row, "campaign")
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
        value = whole(budget.get("amountMicros"))
        if budget.get("period", "DAILY") != "DAILY":
            value, says = None, says or "this budget is a total over its whole period, not an amount a day"
        elif value is None:
            says = says or f"the budget holds no daily amount but {self._clean(repr(budget.get('amountMicros')), 60)}"
        elif says and state == "open":
            value = None
        shared = whole(budget.get("referenceCount")) or 0
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
        about = by_operation(failed.faults)
        out = []
        for n, write in enumerate(heads):
            own = about.get(n, [])
            if own and failed.status < 500:
                outcome = worst(own)
                out.append(Written(write.key, outcome, self._says(own), longest([*own, failed])))
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
        faults = list(faults_of(status)) if status else []
        about, general = by_operation(faults), [f for f in faults if f.operation is None]
        results = answer.get("results", [])
        out = []
        for n, write in enumerate(heads):
            result = results[n] if isinstance(results, list) and n < len(results) else None
            name = result.get("resourceName") if isinstance(result, dict) else None
            own = about.get(n, [])
            if own and name is None:
                out.append(Written(write.key, worst(own), self._says(own), longest(own)))
            elif own:
                out.append(Written(write.key, "unknown", f"answered a success and a failure: {self._says(own)}"))
            elif name is not None and name != write.target:
                says = f"the answer is about {self._clean(str(name), 80)!r}, another budget"
                out.append(Written(write.key, "unknown", says))
            elif name is not None or (validate_only and not status):
                out.append(Written(write.key, "accepted"))
            elif general:
                out.append(Written(write.key, worst(general), self._says(general), longest(general)))
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
                event = part(row, "changeEvent")
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


def _campaign_state(campaign: Mapping[str, Any]) -> EntityState:
    over = campaign.get("status") == "REMOVED" or campaign.get("servingStatus") == "ENDED"
    return "closed" if over else "open"


def _new_amount(event: Mapping[str, Any]) -> tuple[int | None, bool]:
    """The amount after an event, and whether the event changed it at all (a new name is no change of the value)."""
    if event.get("resourceChangeOperation") == "REMOVE":
        return None, True
    value = whole(part(part(event, "newResource"), "campaignBudget").get("amountMicros"))
    fields = str(event.get("changedFields", ""))
    return value, value is not None or "amount" in fields


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
