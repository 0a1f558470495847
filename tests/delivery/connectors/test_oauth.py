"""A REST system whose tokens run out: they are asked for when needed, and shown to nobody but the system."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
import yaml

from delivery.connectors.base import Misconfigured, Unavailable
from delivery.connectors.oauth import Tokens
from delivery.connectors.rest import RestConnector, RestSettings, connect, load
from tests.delivery.connectors.test_rest import NOW, a_write, changed, written_to
from tests.support.rest_servers import Reply, Request, Scripted, serving

SECRET = "client-secret-77"
ENVIRON = {"O_ID": "the-client", "O_SECRET": SECRET, "O_REFRESH": "refresh-secret-88"}


class Firm:
    """A system and what gives its tokens; ``good`` is the only token that it takes."""

    def __init__(self) -> None:
        self.given: list[str] = []
        self.asked: list[dict[str, list[str]]] = []
        self.held = 3
        self.refuses: Reply | None = None
        self.lasts: Any = 3600
        self.lock = threading.Lock()

    @property
    def good(self) -> str:
        return self.given[-1] if self.given else ""

    def __call__(self, request: Request) -> Reply:
        if request.path == "/token":
            with self.lock:
                self.asked.append(request.body)
                if self.refuses is not None:
                    return self.refuses
                self.given.append(f"marked-token-{len(self.given)}")
                return 200, {"access_token": self.good, "expires_in": self.lasts, "token_type": "bearer"}, {}
        if request.headers.get("authorization") != f"Bearer {self.good}":
            return 401, {"message": f"bad {request.headers.get('authorization')}"}, {}
        if request.method == "PUT":
            self.held = request.body["v"]
        return 200, {"id": "1", "v": self.held}, {}


class Forms(Scripted):
    """Bodies of the token's call are forms."""

    @staticmethod
    def parse(raw: bytes) -> Any:
        return json.loads(raw) if raw.startswith(b"{") else parse_qs(raw.decode())


@contextmanager
def firm(folder: Path, **auth: Any) -> Iterator[tuple[Firm, RestConnector]]:
    made = Firm()
    with serving(Forms(made)) as url:
        said = {
            "kind": "oauth", "token_url": f"{url}/token", "client_id_env": "O_ID", "client_secret_env": "O_SECRET", **auth,
        }  # fmt: skip
        written_to(folder, changed(auth=said))
        which = RestSettings(kind="rest", file="system.yaml", base_url=url)
        connector = connect(which, environ=ENVIRON, folder=folder, clock=lambda: NOW)
        yield made, connector
        connector.close()


def test_a_token_is_asked_for_once_and_again_when_it_is_refused(tmp_path: Path) -> None:
    with firm(tmp_path, form={"scope": "tickets.write"}) as (system, connector):
        assert connector.read(["1"])["1"].value == 3
        assert connector.apply([a_write(value=5)])[0].outcome == "accepted"
        assert len(system.given) == 1
        [form] = system.asked
        assert form == {
            "grant_type": ["client_credentials"], "scope": ["tickets.write"], "client_id": ["the-client"], "client_secret": [SECRET],
        }  # fmt: skip
        system.given.append("taken-back")  # the token that we have is good no more
        assert connector.apply([a_write(value=7)])[0].outcome == "accepted"
        assert system.held == 7 and len(system.asked) == 2


def test_a_refresh_token_is_used_where_there_is_one(tmp_path: Path) -> None:
    with firm(tmp_path, refresh_token_env="O_REFRESH") as (system, connector):
        assert connector.read(["1"])["1"].value == 3
        assert system.asked[0]["grant_type"] == ["refresh_token"]
        assert system.asked[0]["refresh_token"] == ["refresh-secret-88"]


def test_many_threads_ask_for_one_token(tmp_path: Path) -> None:
    with firm(tmp_path) as (system, connector), ThreadPoolExecutor(8) as threads:
        assert {r["1"].value for r in threads.map(connector.read, [["1"]] * 32)} == {3}
        assert len(system.given) == 1


def test_a_token_is_renewed_before_it_runs_out() -> None:
    system, now = Firm(), [0.0]
    system.lasts = 100
    with serving(Forms(system)) as url:
        tokens = Tokens(
            f"{url}/token", {"grant_type": "client_credentials"}, {"client_secret": ("O_SECRET", SECRET)},
            hide=lambda _: None, timeout_s=5, monotonic=lambda: now[0],
        )  # fmt: skip
        assert [tokens.token(), tokens.token()] == ["marked-token-0"] * 2
        now[0] = 71
        assert tokens.token() == "marked-token-1"
        tokens.close()


def test_a_client_that_is_refused_is_told_so_and_shows_no_secret(tmp_path: Path) -> None:
    with firm(tmp_path) as (system, connector):
        says = {"error": "invalid_client", "error_description": f"{SECRET} is wrong"}
        for refuses in ((400, says, {}), (401, says, {}), (200, {"token": "x"}, {}), (200, {"access_token": 5}, {})):
            system.refuses = refuses
            for call in (lambda: connector.read(["1"]), lambda: connector.apply([a_write()])):
                with pytest.raises(
                    Misconfigured, match=r"gave no token.*set O_ID and O_SECRET to what is valid"
                ) as caught:
                    call()
                assert SECRET not in str(caught.value)
        system.refuses = (503, None, {})
        with pytest.raises(Unavailable, match="no token could be had"):
            connector.read(["1"])
        [written] = connector.apply([a_write()])
        assert written.outcome == "not_applied" and not written.sent and system.held == 3


def test_a_token_stands_in_no_text(tmp_path: Path) -> None:
    with firm(tmp_path) as (system, connector):
        connector.read(["1"])
        system.refuses = (200, {"access_token": "marked-token-0"}, {})
        system.given.append("another")  # what we are given is refused, and the system tells what it got
        with pytest.raises(Misconfigured, match="answered 401") as caught:
            connector.read(["1"])
        assert "marked-token" not in str(caught.value) + repr(connector)


def test_tokens_are_asked_for_over_https_only(tmp_path: Path) -> None:
    said = {"kind": "oauth", "token_url": "http://login.example/t", "client_id_env": "A", "client_secret_env": "B"}
    with pytest.raises(Misconfigured, match=r"token_url: http://login\.example would show the token to the network"):
        load(written_to(tmp_path, yaml.safe_dump(changed(auth=said))))
