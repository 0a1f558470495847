"""The access token, and what Google's client sends through.

Belongs here: one request, once, bounded, never redirected; a token that is refreshed when it runs out. Does not: which calls are
made (``google_ads``), what an error says (``google_ads_errors``).
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from delivery.connectors.base import Misconfigured
from delivery.connectors.google_ads_errors import failed
from delivery.connectors.google_ads_settings import GoogleAdsSettings
from delivery.connectors.http import Http, NoAnswer, NotSent, clean

SCOPE = "https://www.googleapis.com/auth/doubleclicksearch"


class Access:
    """The access token: as it stands in the environment, or refreshed when it runs out. Thread-safe."""

    def __init__(self, settings: GoogleAdsSettings, environ: Mapping[str, str]) -> None:
        from google.oauth2.credentials import Credentials

        self._lock = threading.Lock()
        self._tokens: Http | None = None
        if settings.refresh_token_env is None:
            self.secrets = [secret_of(environ, settings.token_env)]
            self._credentials = Credentials(token=self.secrets[0])
            return
        refresh, secret = secret_of(environ, settings.refresh_token_env), secret_of(environ, settings.client_secret_env)
        self.secrets = [refresh, secret]
        self._credentials = Credentials(
            token=None,
            refresh_token=refresh,
            client_id=secret_of(environ, settings.client_id_env),
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


class Transport:
    """What the client sends through in the place of httplib2: one request, once, bounded, never redirected."""

    def __init__(self, http: Http, access: Access, clock: Callable[[], datetime]) -> None:
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
            raise failed(answer, self._clock(), self._access.secrets)
        answer.json()
        return Response({"status": str(answer.status)}), answer.body

    def close(self) -> None:
        """The client closes what it was given; the pool is closed by its owner."""


def secret_of(environ: Mapping[str, str], name: str) -> str:
    value = environ.get(name, "").strip()
    if not value:
        raise Misconfigured(
            f"the environment variable {name} is not set; put the secret there, never into the workflow"
        )
    if not re.fullmatch(r"[\x21-\x7e]+", value):
        raise Misconfigured(f"the environment variable {name} holds a space or a character that no token has")
    return value
