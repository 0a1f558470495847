"""Files that appear whole or not at all, and two that swap their places in one step.

Belongs here: what the filesystem promises, the time and digest of a file. Does not: what a file holds (``table_files``), which one is
put where (``file_drop``).
"""

from __future__ import annotations

import calendar
import ctypes
import hashlib
import os
import threading
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def reason(error: OSError) -> str:
    return f"{error.strerror or type(error).__name__}: {error.filename or 'the file'}"


def ns(moment: datetime) -> int:
    return calendar.timegm(moment.timetuple()) * 1_000_000_000 + moment.microsecond * 1000


def moment(at_ns: int) -> datetime:
    """Naive UTC, to the microsecond."""
    return datetime.fromtimestamp(at_ns // 1_000_000_000, UTC).replace(
        tzinfo=None, microsecond=at_ns // 1000 % 1_000_000
    )


def sync(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def exchange(one: Path, other: Path) -> None:
    """Swap two files in one step (Linux, renameat2 with RENAME_EXCHANGE); neither name is ever without a file."""
    rename = ctypes.CDLL(None, use_errno=True).renameat2
    here = -100  # AT_FDCWD
    if rename(here, os.fsencode(one), here, os.fsencode(other), 2) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(other))


def can_exchange(folder: Path) -> bool:
    """Whether this system and this filesystem can; tried with two empty files."""
    names = [folder / f".exchange-{os.getpid()}-{threading.get_ident()}-{n}" for n in (1, 2)]
    try:
        for name in names:
            name.touch()
        exchange(*names)
    except (OSError, AttributeError):
        return False
    finally:
        for name in names:
            with suppress(OSError):
                name.unlink()
    return True
