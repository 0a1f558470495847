"""What Google's errors say of a call and of each write in it.

Belongs here: the shapes of an error answer, however deep its details lie. Does not: sending (``google_ads_transport``), what follows from
an error for a decision (``google_ads``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from common.errors import SignalboxError
from delivery.connectors.base import Outcome
from delivery.connectors.http import Answer, BadAnswer, clean, retry_after, strict_json


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


def failed(answer: Answer, now: datetime, secrets: Sequence[str]) -> Failed:
    """What an answer that is no success says, however it is shaped, without the secrets that it may repeat."""
    wait = retry_after(answer.headers, now)
    try:
        body = strict_json(answer.body)
    except BadAnswer:
        body = None
    status = body.get("error") if isinstance(body, dict) else None
    google = isinstance(status, dict) and isinstance(status.get("message"), str)
    faults = [replace(f, message=clean(f.message, secrets)) for f in faults_of(status)] if google else []
    if google and isinstance(status, dict):
        text = f"{status.get('status', '')} {status['message']}".strip()
        for detail in dicts(status.get("details")):
            wait = longest([wait, _seconds(detail.get("retryDelay"))])
    else:
        text = answer.body[:2_000].decode("utf-8", "replace") or "no body"
    return Failed(answer.status, faults, clean(text, secrets), longest([wait, *faults]), google=google)


def faults_of(status: Any) -> Iterator[Fault]:
    """The errors in a google.rpc.Status; its own message where its details hold none."""
    found = False
    for detail in dicts(status.get("details") if isinstance(status, dict) else None):
        for error in dicts(detail.get("errors")):
            found = True
            codes = [(k, v) for k, v in part(error, "errorCode").items() if isinstance(v, str)]
            kind, reason = codes[0] if codes else ("", "")
            place = dicts(part(error, "location").get("fieldPathElements"))
            index = place[0].get("index") if place and place[0].get("fieldName") == "operations" else None
            about = index if isinstance(index, int) and not isinstance(index, bool) else None
            quota = part(part(error, "details"), "quotaErrorDetails")
            message = error.get("message")
            yield Fault(str(kind), reason, str(message or ""), about, _seconds(quota.get("retryDelay")))
        for violation in dicts(detail.get("fieldViolations")):
            found = True
            yield Fault("", str(violation.get("field", "")), str(violation.get("description", "")), None, None)
    if not found:
        yield Fault("", "", str(status.get("message", "")) if isinstance(status, dict) else "no message", None, None)


def by_operation(faults: Sequence[Fault]) -> dict[int, list[Fault]]:
    out: dict[int, list[Fault]] = {}
    for fault in faults:
        if fault.operation is not None:
            out.setdefault(fault.operation, []).append(fault)
    return out


def worst(faults: Sequence[Fault]) -> Outcome:
    """The most careful reading of several errors about one write."""
    outcomes = {fault.outcome for fault in faults}
    order: tuple[Outcome, ...] = ("unknown", "refused", "conflict", "not_applied")
    return next(outcome for outcome in order if outcome in outcomes)


def longest(waits: Iterable[float | Fault | Failed | None]) -> float | None:
    found = [w.retry_after if isinstance(w, Fault | Failed) else w for w in waits]
    return max((w for w in found if w is not None), default=None)


def _seconds(duration: Any) -> float | None:
    """Seconds of a duration as Google writes it (``30s``), at most an hour."""
    if not isinstance(duration, str) or not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?s", duration):
        return None
    return min(float(duration[:-1]), 3600.0)


def whole(value: Any) -> int | None:
    """An int64 as the API writes it, a string; anything else is none."""
    return int(value) if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,19}", value) else None


def part(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = row.get(name)
    return found if isinstance(found, dict) else {}


def dicts(value: Any) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []
