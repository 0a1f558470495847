"""Who moved an alias in MLflow: MLflow keeps no such record, so its server writes one down with each change.

Belongs here: the function that the server authenticates requests with (``mlflow/basic_auth.ini`` names it), and reading
what it wrote. Does not: what follows from a moved alias (``pipeline.lifecycle.promotion``).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from common import clock
from pipeline.settings import home

_ALIAS = "/mlflow/registered-models/alias"


def path() -> Path:
    """The log: ``SIGNALBOX_MLFLOW_ALIAS_LOG``, else ``logs/mlflow-aliases.jsonl`` in the state folder."""
    given = os.environ.get("SIGNALBOX_MLFLOW_ALIAS_LOG")
    return Path(given) if given else home() / "logs" / "mlflow-aliases.jsonl"


def authenticate() -> Any:
    """MLflow's own basic authentication; a change of an alias that the server then carried out is written to the log.

    MLflow calls it in Flask's request, more than once a request.
    """
    from flask import after_this_request, g, request
    from mlflow.server.auth import authenticate_request_basic_auth

    found = authenticate_request_basic_auth()
    name = getattr(found, "username", None)
    asked = request.method in ("POST", "DELETE") and request.path.endswith(_ALIAS)
    if asked and name and not g.get("signalbox_logs_alias"):
        g.signalbox_logs_alias = True
        said = {**request.args.to_dict(), **(request.get_json(silent=True) or {})}

        def write(response: Any) -> Any:
            if response.status_code == 200:
                version = said.get("version") if request.method == "POST" else None
                note(name, str(said.get("name")), str(said.get("alias")), version)
            return response

        after_this_request(write)
    return found


def note(user: str, model: str, alias: str, version: int | str | None) -> None:
    """Add a line: who gave ``alias`` to which version (None: took it away)."""
    line = {
        "at": clock.now().isoformat(), "user": user, "model": model, "alias": alias,
        "version": None if version is None else int(version),
    }  # fmt: skip
    file = path()
    file.parent.mkdir(parents=True, exist_ok=True)
    # one write of one line: lines of several workers do not mix
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab", buffering=0) as log:
        log.write(json.dumps(line).encode() + b"\n")


def actor(model: str, alias: str, version: int | None) -> str | None:
    """Who put the alias where it stands: the last change in the log, if it is the one that stands; else None."""
    try:
        lines = path().read_text(encoding="utf-8").splitlines()
    except OSError:
        return None  # no authenticated server here: nobody can tell
    for line in reversed(lines):
        try:
            said = json.loads(line)
            if (said["model"], said["alias"]) == (model, alias):
                return f"mlflow:{said['user']}" if said["version"] == version else None
        except (ValueError, KeyError, TypeError):
            continue  # a line cut short by a full disk
    return None
