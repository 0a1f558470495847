"""``signalbox serve``: the pages of the product on the state folder, on 127.0.0.1 only, ended together.

Belongs here: starting and stopping servers. Does not: what they show.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from rich.console import Console

from assets.resources import resources
from orchestration import runner
from orchestration.cli import sandbox
from pipeline.settings import mlflow_artifacts, mlflow_uri

_ROOT = Path(__file__).resolve().parent.parent
HOST = "127.0.0.1"


def _commands() -> dict[str, tuple[str, list[str]]]:
    """What to start: name → (address, command)."""
    given = resources()
    registry, reports = given["registry"], given["reports"]
    bin_ = Path(sys.executable).parent

    def port(address: str) -> str:
        return str(urlsplit(address).port)

    auth = ["--app-name", "basic-auth"] if os.environ.get("SIGNALBOX_MLFLOW_AUTH") == "1" else []
    if auth:
        os.environ.setdefault("MLFLOW_AUTH_CONFIG_PATH", str(_ROOT / "mlflow" / "basic_auth.ini"))
    # where decisions of this state folder go, if it has a sandbox: otherwise a delivery from the pages would find nobody
    here = {"Downstream": ("http://127.0.0.1:8101", [str(bin_ / "signalbox"), "sandbox", "up"])}
    downstream = here if (sandbox.folder() / "setup.json").exists() else {}
    dagster_ui = os.environ.get("SIGNALBOX_DAGSTER_UI", "http://127.0.0.1:3000")
    workspace = str(_ROOT / "workspace.yaml")
    return downstream | {
        "Dagster": (dagster_ui, [str(bin_ / "dagster-webserver"), "-w", workspace, "-h", HOST, "-p", port(dagster_ui)]),
        "Dagster daemon": ("", [str(bin_ / "dagster-daemon"), "run", "-w", workspace]),
        "MLflow": (
            registry.ui,
            [str(bin_ / "mlflow"), "server", "--artifacts-destination", mlflow_artifacts(),
             "--host", HOST, "--port", port(registry.ui), "--workers", "1", *auth],
        ),
        "Evidently": (
            reports.evidently_ui,
            [str(bin_ / "evidently"), "ui", "--workspace", reports.evidently_workspace, "--host", HOST, "--port", port(reports.evidently_ui)],
        ),
        "Home": (reports.ui, [str(bin_ / "signalbox"), "web", "--port", port(reports.ui)]),
    }  # fmt: skip


def _answers(address: str) -> bool:
    parts = urlsplit(address)
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex((parts.hostname or HOST, parts.port or 80)) == 0


def serve(console: Console, ready: Callable[[dict[str, str]], None] | None = None) -> None:
    """Start every server and wait; Ctrl-C, or one of them ending, ends all. Logs lie in ``<home>/logs``.

    ``ready``: told the addresses once all answer.
    """
    at = runner.prepare_home()
    logs = at / "logs"
    logs.mkdir(exist_ok=True)
    commands = _commands()
    taken = [f"{name} ({address})" for name, (address, _) in commands.items() if address and _answers(address)]
    if taken:
        console.print(
            f"[red]Something already listens where these should: {', '.join(taken)}.[/red] "
            "End it, or set SIGNALBOX_DAGSTER_UI, SIGNALBOX_MLFLOW_UI, SIGNALBOX_EVIDENTLY_UI or SIGNALBOX_REPORTS_UI to other addresses."
        )
        raise SystemExit(1)
    started: dict[str, subprocess.Popen[bytes]] = {}
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a plain kill ends the servers too
    quiet = {
        "MLFLOW_BACKEND_STORE_URI": mlflow_uri(),  # not as an argument: a process list would show its password
        "DO_NOT_TRACK": "1",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    try:
        for name, (_, command) in commands.items():
            log = (logs / f"{name.lower().replace(' ', '-')}.log").open("ab")
            started[name] = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=_ROOT, start_new_session=True, env={**os.environ, **quiet}
            )
        waiting = {name: address for name, (address, _) in commands.items() if address}
        until = time.monotonic() + 120
        while waiting and time.monotonic() < until and all(p.poll() is None for p in started.values()):
            for name in [n for n, address in waiting.items() if _answers(address)]:
                console.print(f"{name:<10} {waiting.pop(name)}")
            time.sleep(0.3)
        if waiting:
            console.print(f"[red]Not up: {', '.join(waiting)}; see {logs}[/red]")
        else:
            console.print(f"State: {at}. Ctrl-C ends all.")
            if ready is not None:
                ready({name: address for name, (address, _) in commands.items() if address})
        while all(p.poll() is None for p in started.values()):
            time.sleep(0.5)
        ended = [name for name, p in started.items() if p.poll() is not None]
        console.print(f"[red]{', '.join(ended)} ended; see {logs}[/red]")
        raise SystemExit(1)
    except KeyboardInterrupt:
        console.print("Ending all servers")
    finally:
        for process in started.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        for process in started.values():
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
