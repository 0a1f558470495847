"""Which code made a decision: the commit, and a digest of the source that decides.

Belongs here: naming the code. Does not: anything about data.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from pipeline import workflow as workflows

_ROOT = Path(__file__).resolve().parent.parent
_DECIDES = ("assets", "pipeline", "models", "data_checks", "delivery", "common")
_DECIDES_NOTHING = ("delivery/sandbox",)
"""Stand-ins for systems."""


def digest(workflow: str) -> str:
    """SHA-256 over the Python of this product and the SQL of one workflow, by relative path: says whether two decisions came from
    one code. Comments in it count, comments in the sandbox or in another workflow's SQL do not."""
    folder = workflows.FOLDER / workflow
    return hashlib.sha256(f"{_python()}\n{_over(folder, folder.rglob('*.sql'))}".encode()).hexdigest()


@cache
def _python() -> str:
    """Kept, since a process goes on with the code that it has loaded; SQL is read anew for every day."""
    files = (file for package in _DECIDES for file in (_ROOT / package).rglob("*.py"))
    nothing = [_ROOT / folder for folder in _DECIDES_NOTHING]
    return _over(_ROOT, (file for file in files if not any(file.is_relative_to(folder) for folder in nothing)))


def _over(root: Path, files: Iterable[Path]) -> str:
    whole = hashlib.sha256()
    for name, file in sorted((file.relative_to(root).as_posix(), file) for file in files):
        whole.update(name.encode() + b"\0" + file.read_bytes() + b"\0")
    return whole.hexdigest()


@cache
def commit() -> str:
    """The commit of the checkout: ``SIGNALBOX_COMMIT`` where the code is deployed without git, else git's answer, else ``unknown``."""
    if given := os.environ.get("SIGNALBOX_COMMIT"):
        return given
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=_ROOT, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"  # not a checkout: the digest still tells the code apart
    return found.stdout.strip()
