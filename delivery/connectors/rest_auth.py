"""How a REST system is told who calls: headers, secrets in bodies, tokens, all out of the environment.

Belongs here: secrets by the names that a YAML gives. Does not: what a YAML may say (``rest_spec``), asking for tokens (``oauth``).
"""

from __future__ import annotations

import base64
import functools
from collections.abc import Callable, Mapping
from pathlib import Path

from delivery.connectors.base import Misconfigured
from delivery.connectors.oauth import Tokens
from delivery.connectors.rest_spec import Basic, Bearer, KeyHeader, OAuth, RestSystem


def _secret(spec: RestSystem, environ: Mapping[str, str], name: str, key: str, header: bool = True) -> str:
    value = environ.get(name, "").strip()
    if not value:
        raise Misconfigured(f"{spec.system}: the environment variable {name} is not set; `{key}` names it")
    if header and (not value.isascii() or not value.isprintable()):
        raise Misconfigured(f"{spec.system}: the environment variable {name} holds a character that no header may")
    return value


def credentials(spec: RestSystem, environ: Mapping[str, str]) -> tuple[dict[str, str], list[str], dict[str, str]]:
    """The headers that prove who we are, every text that must never be shown, and what stands for secrets in bodies."""

    secret = functools.partial(_secret, spec, environ)
    more = {header: secret(name, "secret_headers") for header, name in spec.secret_headers.items()}
    bodies = {f"secret_{n}": secret(name, "body_secrets", header=False) for n, name in spec.body_secrets.items()}
    hidden = [*more.values(), *bodies.values()]
    auth = spec.auth
    if isinstance(auth, Bearer):
        token = secret(auth.token_env, "auth")
        return {**more, "authorization": f"Bearer {token}"}, [token, *hidden], bodies
    if isinstance(auth, Basic):
        user, password = secret(auth.user_env, "auth"), secret(auth.password_env, "auth")
        both = base64.b64encode(f"{user}:{password}".encode()).decode()
        return {**more, "authorization": f"Basic {both}"}, [password, both, *hidden], bodies
    if isinstance(auth, KeyHeader):
        key = secret(auth.value_env, "auth")
        return {**more, auth.name: auth.prefix + key}, [key, *hidden], bodies
    return more, hidden, bodies


def tokens_of(
    spec: RestSystem, environ: Mapping[str, str], hide: Callable[[str], None], ca_file: Path | None
) -> Tokens | None:
    auth = spec.auth
    if not isinstance(auth, OAuth):
        return None
    names = {"client_id": auth.client_id_env, "client_secret": auth.client_secret_env}
    if auth.refresh_token_env is not None:
        names["refresh_token"] = auth.refresh_token_env
    secrets = {field: (name, _secret(spec, environ, name, "auth", header=False)) for field, name in names.items()}
    hide(secrets["client_secret"][1])
    grant = "client_credentials" if auth.refresh_token_env is None else "refresh_token"
    form = {**auth.form, "grant_type": grant}
    return Tokens(auth.token_url, form, secrets, hide=hide, timeout_s=spec.timeout_s, ca_file=ca_file)
