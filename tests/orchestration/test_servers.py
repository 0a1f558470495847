"""Whom the pages of ``signalbox serve``, and the local systems, are shown to."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from typer.testing import CliRunner

from orchestration import servers
from orchestration.cli import command
from tests.test_rooms import ALLOWED, ROOT, modules

EVERYWHERE = ("0.0.0.0", "[::]")


def test_every_page_is_served_to_this_machine_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIGNALBOX_HOME", str(tmp_path))
    for variable in ("DAGSTER", "MLFLOW", "EVIDENTLY", "REPORTS"):
        monkeypatch.delenv(f"SIGNALBOX_{variable}_UI", raising=False)
    pages = {name: said for name, said in servers._commands().items() if said[0]}
    assert pages.keys() == {"Dagster", "MLflow", "Evidently", "Home"}
    served: list[tuple[str, int]] = []
    monkeypatch.setattr("orchestration.web.app.serve", lambda host, port: served.append((host, port)))
    _, (_, *words) = pages.pop("Home")
    assert CliRunner().invoke(command.app, words).exit_code == 0
    assert served == [("127.0.0.1", 8001)], "the home page takes no host: there is but one"
    for name, (address, started) in pages.items():
        hosts = [after for word, after in pairwise(started) if word in ("-h", "--host", "--bind")]
        assert hosts == [urlsplit(address).hostname] == ["127.0.0.1"], name


def test_no_room_names_an_address_of_every_network() -> None:
    named = [
        str(f.relative_to(ROOT)) for room in ALLOWED for f in modules(room) for a in EVERYWHERE if a in f.read_text()
    ]
    assert not named, named
