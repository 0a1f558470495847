"""An access token by OAuth 2, for a client that is no person: asked for when it is needed, and again when it runs out.

Belongs here: the grants ``client_credentials`` and ``refresh_token``. Does not: what the token is used for (``rest``).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import urlencode

from delivery.connectors.base import Misconfigured
from delivery.connectors.http import BadAnswer, Http, NoAnswer, NotSent
from delivery.connectors.template import words

EARLY_S = 30.0
"""So long before its end a token is not used any more."""


class Tokens:
    """The access token of one client. Thread-safe; a token stands nowhere but in memory.

    ``form``: what is asked with besides the secrets. ``secrets``: form field → (environment variable, its value).
    ``hide`` is told every token, so that no text shows it.
    """

    def __init__(
        self,
        url: str,
        form: Mapping[str, str],
        secrets: Mapping[str, tuple[str, str]],
        *,
        hide: Callable[[str], None],
        timeout_s: float,
        ca_file: Path | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._form, self._secrets, self._hide, self._monotonic = dict(form), dict(secrets), hide, monotonic
        hidden = [value for _, value in secrets.values()]
        self._http = Http(url, headers={}, timeout_s=timeout_s, secrets=hidden, ca_file=ca_file)
        self._url = url
        self._lock = threading.Lock()
        self._token, self._end = "", 0.0

    def token(self, refused: str = "") -> str:
        """A token that should be good; ``refused``: one that was not. Raises NotSent and Misconfigured."""
        with self._lock:
            if not self._token or self._token == refused or self._monotonic() >= self._end:
                self._token, seconds = self._asked()
                self._end = self._monotonic() + max(seconds - EARLY_S, seconds / 2)
            return self._token

    def _asked(self) -> tuple[str, float]:
        form = self._form | {field: value for field, (_, value) in self._secrets.items()}
        try:
            answer = self._http.request(
                "POST",
                self._url,
                content=urlencode(form).encode(),
                headers={"content-type": "application/x-www-form-urlencoded"},
            )
        except (NotSent, NoAnswer) as error:
            raise NotSent(f"nothing was sent, since no token could be had: {error}") from None
        if answer.status in (408, 425, 429) or answer.status >= 500:
            raise NotSent(f"nothing was sent, since no token could be had: {self._url} answered {answer.status}")
        try:
            said = answer.json()
        except BadAnswer as bad:
            said = str(bad)
        token = said.get("access_token") if isinstance(said, dict) else None
        if answer.status >= 300 or not isinstance(token, str) or not token.isascii() or not token.isprintable():
            names = " and ".join(name for name, _ in self._secrets.values())
            why = self._http.clean(words(said), 200)
            raise Misconfigured(
                f"{self._url} gave no token, it answered {answer.status} {why}; set {names} to what is valid"
            )
        self._hide(token)
        lasts = said.get("expires_in")
        return token, float(lasts) if isinstance(lasts, int | float) and lasts > 0 else 3600.0

    def close(self) -> None:
        """Let go of connections."""
        self._http.close()
