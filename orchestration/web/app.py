"""The server: which address shows which page, and what protects the forms.

Belongs here: routes, sessions, error pages. Does not: what a page shows (``orchestration.web.pages``) or an act does
(``orchestration.web.acts``).

A page can be read by whoever reaches 127.0.0.1. Whoever acts gives the name and the secret of an approver each time
(``delivery.approvals``, which locks a name after wrong ones), in a form that this server made for the same browser less than
``FORM_LIVES`` ago: the token is signed for the session of the cookie (OWASP's signed double-submit cookie).
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import uvicorn
from itsdangerous import BadSignature, SignatureExpired, URLSafeTimedSerializer
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from common.clock import utc_now
from common.errors import SignalboxError
from common.page import Part, Text, page
from orchestration.web import acts, pages
from orchestration.web.site import Site

COOKIE = "signalbox_session"
FORM_LIVES = timedelta(minutes=30)
LARGEST_FORM = 64 * 1024
"""Bytes."""


@dataclass(frozen=True)
class Guard:
    """Tokens that tie a form to the browser for which it was made."""

    signer: URLSafeTimedSerializer = field(
        default_factory=lambda: URLSafeTimedSerializer(secrets.token_bytes(32), salt="signalbox.form")
    )
    lives: timedelta = FORM_LIVES

    def token(self, session: str) -> str:
        """For a form that is shown to ``session`` now."""
        return str(self.signer.dumps(session))

    def refusal(self, session: str | None, token: str | None) -> str | None:
        """Why a form is not taken; None: it is."""
        try:
            made_for = self.signer.loads(token or "", max_age=int(self.lives.total_seconds()))
        except SignatureExpired:
            return f"This form is older than {self.lives.total_seconds() / 60:.0f} minutes: load its page again."
        except BadSignature:
            return "This form was not made by this server as it runs now: load its page again."
        if session is None or not secrets.compare_digest(made_for, session):
            return "This form was made for another browser: load its page again."
        return None


def build(site: Site, guard: Guard | None = None) -> Starlette:
    """The application on what ``site`` opens. Stages' pages lie below the same address as files."""
    guard = guard or Guard()

    def shown(request: Request, title: str, *parts: Part, status: int = 200) -> Response:
        return _respond(page(title, *parts, nav=pages.NAV), status)

    def view(make: Callable[[Site, Mapping[str, str], str], tuple[str, list[Part]]]) -> Callable[[Request], Any]:
        """A page. It is made in a thread: it reads the ledger and the lake."""

        async def show(request: Request) -> Response:
            session = request.cookies.get(COOKIE) or secrets.token_urlsafe(32)
            given = {**request.query_params, **{name: str(value) for name, value in request.path_params.items()}}
            title, parts = await run_in_threadpool(make, site, given, guard.token(session))
            answer = shown(request, title, *parts)
            answer.set_cookie(COOKIE, session, httponly=True, samesite="strict")
            return answer

        return show

    def act(do: Callable[[Site, Mapping[str, str]], tuple[str, list[Part]]]) -> Callable[[Request], Any]:
        """What a form asks for. Its answer is a page of its own: what was done, or why not."""

        async def run(request: Request) -> Response:
            body = b""
            async for chunk in request.stream():
                body += chunk
                if len(body) > LARGEST_FORM:
                    return shown(request, "Refused", Text(["This form is too large."]), status=413)
            form = dict(parse_qsl(body.decode("utf-8", "replace"), keep_blank_values=True))
            if refusal := guard.refusal(request.cookies.get(COOKIE), form.pop("token", None)):
                return shown(request, "Nothing was done", Text([refusal]), status=403)
            title, parts = await run_in_threadpool(do, site, form)
            return shown(request, title, *parts)

        return run

    async def refused(request: Request, error: Exception) -> Response:
        return shown(request, "That cannot be shown or done", Text([str(error)]), status=400)

    async def missing(request: Request, error: Exception) -> Response:
        text = f"There is no page {request.url.path}."
        return shown(request, "No such page", Text([text]), status=404)

    async def find(request: Request) -> Response:
        where = await run_in_threadpool(pages.find, site, request.query_params.get("q", ""))
        if isinstance(where, str):
            return RedirectResponse(where, 303)
        title, parts = where
        return shown(request, title, *parts)

    reports = Path(site.reports)
    reports.mkdir(parents=True, exist_ok=True)
    return Starlette(
        routes=[
            Route("/", view(pages.today)),
            Route("/find", find),
            Route("/batch/{batch}", view(pages.batch)),
            Route("/batch/{batch}/rollback", view(pages.rollback)),
            Route("/decision/{decision}", view(pages.decision)),
            *(Route(f"/act/{name}", act(do), methods=["POST"]) for name, do in acts.ACTS.items()),
            Route("/{workflow}/", view(pages.days)),
            Route("/{workflow}/{day}/", view(pages.day)),
            Mount("/", StaticFiles(directory=reports)),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])],
        exception_handlers={SignalboxError: refused, 404: missing},
    )


def _respond(text: str, status: int) -> HTMLResponse:
    headers = {
        "Cache-Control": "no-store",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer",
    }
    return HTMLResponse(text, status, headers)


def serve(host: str, port: int, *, clock: Callable[[], datetime] = utc_now) -> None:
    """Serve until the process is ended. Raises OSError where the port is taken."""
    uvicorn.run(build(Site.of_settings(clock)), host=host, port=port, log_level="warning", server_header=False)
