"""State that stores its own address: making a copy of it name the copy.

Belongs here: addresses in SQLite databases. Does not: which ones are to be changed.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path


def readdressed(database: Path, old: str, new: str) -> None:
    """Put ``new`` in the place of ``old`` in every text of a SQLite database. MLflow keeps absolute paths in its own."""
    with closing(sqlite3.connect(database)) as opened:
        tables = [t for (t,) in opened.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for table in tables:
            for _, column, kind, *_ in opened.execute(f'PRAGMA table_info("{table}")').fetchall():
                if kind.upper().startswith(("VARCHAR", "TEXT")):
                    opened.execute(
                        f'UPDATE "{table}" SET "{column}" = replace("{column}", ?, ?) WHERE instr("{column}", ?)',
                        (old, new, old),
                    )
        opened.commit()
