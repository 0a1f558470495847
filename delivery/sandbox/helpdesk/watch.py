"""What the sandbox adds around django-helpdesk's own answers: counting writes, making faults on request, the controls.

Belongs here: middleware and the view of the controls. Does not: the tickets and the clock (``desk``), starting (``server``).
Used in the sandbox's own process alone; django-helpdesk itself is not touched.
"""

from __future__ import annotations

import hmac
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from delivery.sandbox.helpdesk.desk import Desk

KINDS = ("delay_before", "delay_after", "error_before", "error_after", "too_many")
_TICKET = re.compile(r"^/helpdesk/api/tickets/(?:(\d+)/)?$")

Answerer = Callable[[Any], Any]


@dataclass
class Fault:
    """Something to go wrong with the next ``times`` requests that match; None matches all.

    delay_before, delay_after: the answer comes ``seconds`` late, the waiting before or after the request is carried out;
    error_before, error_after: status 500, nothing done or all done; too_many: 429, ``seconds`` as Retry-After unless 0.
    """

    kind: str
    times: int = 1
    method: str | None = None
    ticket: int | None = None
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r}: is not one of {', '.join(KINDS)}")


class Watch:
    """What the server has seen and what it shall do wrong; shared by the threads of the process."""

    def __init__(self, desk: Desk, token: str) -> None:
        self.desk, self.token = desk, token
        self.lock = threading.Lock()
        self.faults: list[Fault] = []
        self.applications: list[dict[str, Any]] = []

    def fault_of(self, method: str, ticket: int | None) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method in (None, method) and fault.ticket in (None, ticket):
                    fault.times -= 1
                    return fault
        return None


watch: Watch | None = None
"""Set once, before the first request."""


def _watch() -> Watch:
    assert watch is not None
    return watch


def faults(get_response: Answerer) -> Answerer:
    """Middleware: the faults asked for, on requests to the tickets of the API."""
    from django.http import HttpResponse

    def answer(request: Any) -> Any:
        found = _TICKET.match(request.path)
        fault = _watch().fault_of(request.method, int(found[1]) if found[1] else None) if found else None
        if fault is None:
            return get_response(request)
        if fault.kind == "too_many":
            headers = {"Retry-After": f"{fault.seconds:g}"} if fault.seconds else {}
            return HttpResponse('{"detail": "Request was throttled."}', "application/json", 429, headers=headers)
        if fault.kind == "error_before":
            return HttpResponse("the sandbox was told to fail", status=500)
        if fault.kind == "delay_before":
            time.sleep(fault.seconds)
        response = get_response(request)
        if fault.kind == "delay_after":
            time.sleep(fault.seconds)
        return HttpResponse("the sandbox was told to fail", status=500) if fault.kind == "error_after" else response

    return answer


def applications(get_response: Answerer) -> Answerer:
    """Middleware: every write of a priority over the API that the help desk carried out, in their order.

    One write at a time and none while a day goes by: django-helpdesk reads a whole ticket and then saves all of it.
    """

    def answer(request: Any) -> Any:
        found = _TICKET.match(request.path)
        if not found or not found[1] or request.method not in ("PATCH", "PUT"):
            return get_response(request)
        body, seen = request.body, _watch()
        with seen.desk.lock:
            response = get_response(request)
            if response.status_code == 200 and b'"priority"' in body:
                value, by = response.data["priority"], request.user.get_username()
                with seen.lock:
                    seen.applications.append({"ticket": int(found[1]), "value": value, "by": by})
        return response

    return answer


def controls(request: Any, what: str) -> Any:
    """The view below sandbox/; the same token as for the API."""
    from django.http import JsonResponse

    seen = _watch()
    if not hmac.compare_digest(request.headers.get("Authorization", "").encode(), f"Token {seen.token}".encode()):
        return JsonResponse({"error": "the token is missing or wrong"}, status=401)
    try:
        asked = json.loads(request.body or b"{}")
        if request.method == "POST":
            return JsonResponse(_do(seen, what, asked))
        return JsonResponse(_look(seen, what))
    except (OSError, TypeError, ValueError) as error:
        return JsonResponse({"error": str(error)}, status=400)


controls.csrf_exempt = True  # type: ignore[attr-defined]  # the token is no cookie


def _look(seen: Watch, what: str) -> dict[str, Any]:
    if what == "state":
        return seen.desk.state()
    if what == "tickets":
        return seen.desk.tickets()
    if what == "applications":
        with seen.lock:
            return {"applications": [{**a, "ticket": seen.desk.name(a["ticket"])} for a in seen.applications]}
    raise ValueError(f"sandbox/{what}: GET knows state, tickets and applications")


def _do(seen: Watch, what: str, asked: dict[str, Any]) -> dict[str, Any]:
    if what == "advance":
        return seen.desk.advance(**asked)
    if what == "export":
        return seen.desk.export(**asked)
    if what == "person":
        return seen.desk.person(**asked)
    if what == "fault":
        ticket = asked.pop("ticket", None)
        fault = Fault(**asked, ticket=None if ticket is None else seen.desk.number(ticket))
        with seen.lock:
            seen.faults.append(fault)
        return {}
    if what == "reset":
        with seen.lock:
            seen.faults.clear()
            seen.applications.clear()
        return {}
    raise ValueError(f"sandbox/{what}: POST knows advance, export, person, fault and reset")
