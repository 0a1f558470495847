"""Files of the local systems that hold tokens and passwords: for their owner alone, from the first byte on.

Belongs here: making them so. Does not: what stands in them.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def folder(path: Path) -> Path:
    """Make a folder that nobody else may look into; one that stands is closed too."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.chmod(0o700)
    return path


def database(path: Path) -> Path:
    """Make an empty SQLite file that nobody else may read, or close one that stands, with the files beside it.

    SQLite gives the files that it makes beside it the same mode.
    """
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    for file in (path, path.with_name(f"{path.name}-wal"), path.with_name(f"{path.name}-shm")):
        with contextlib.suppress(FileNotFoundError):
            file.chmod(0o600)
    return path
