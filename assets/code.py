"""Which code made a decision: the commit, and a digest of the source that decides.

Belongs here: naming the code. Does not: anything about data.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from functools import cache
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
_DECIDES = ("assets", "models", "data_checks", "delivery")


@cache
def digest() -> str:
    """SHA-256 over the Python and SQL that decide, by relative path: says whether two decisions came from one code."""
    whole = hashlib.sha256()
    for package in _DECIDES:
        for file in sorted((_ROOT / package).rglob("*.py")):
            whole.update(file.relative_to(_ROOT).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
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
