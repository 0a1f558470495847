"""Hashes that make the ledger tamper-evident: the chain over events and the Merkle tree over rows. Pure functions.

Belongs here: canonical text, leaf and node hashing, roots and proofs. Does not: reading or writing a database, and what the
events mean (``delivery.ledger.events``, ``delivery.ledger.verify``). Canonical JSON is RFC 8785, the tree is that of RFC 6962, section 2.1.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from datetime import date, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import rfc8785

NOTHING = "0" * 64
"""What the first event names as its predecessor."""
_SAFE = 2**53 - 1


def canonical(value: Any) -> str:
    """The one JSON text of a value (RFC 8785). Dates become ISO text.

    JSON has no integers above 2**53 - 1 and no NaN that every reader keeps: those become text too.
    """
    return rfc8785.dumps(_plain(value)).decode()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(v) for v in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if isinstance(value, datetime):
        return instant(value)
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return value
    if isinstance(value, int):
        return value if -_SAFE <= value <= _SAFE else str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if hasattr(value, "item"):  # a NumPy scalar
        return _plain(value.item())
    raise TypeError(
        f"a ledger event cannot hold a {type(value).__name__}; use text, numbers, dates, lists and mappings"
    )


def instant(at: datetime) -> str:
    """A naive UTC datetime as text, always with microseconds."""
    return at.isoformat(timespec="microseconds")


def event_hash(previous: str, seq: int, at: datetime, kind: str, body: str) -> str:
    """SHA-256, as hex, over the predecessor's hash and the canonical event; ``body`` is canonical JSON text."""
    own = canonical({"seq": seq, "at": instant(at), "kind": kind, "body": body})
    return hashlib.sha256(bytes.fromhex(previous) + own.encode()).hexdigest()


def encode_rows(table: pa.Table) -> list[bytes]:
    """Every row as bytes from which all its cells can be told: no two different rows encode alike.

    Text is preceded by its length in bytes, floats stand as their IEEE 754 bits read as an integer, null is ``-``. Times
    are microseconds since 1970. Columns count in the table's order; their names do not.
    """
    parts: list[Any] = []
    for column in table.columns:
        chunk = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        if pa.types.is_string(chunk.type):
            parts += [pc.fill_null(pc.cast(pc.binary_length(chunk), pa.string()), "-"), pc.fill_null(chunk, "")]
            continue
        if pa.types.is_floating(chunk.type):
            chunk = pc.cast(chunk, pa.float64()).view(pa.int64())
        elif not pa.types.is_integer(chunk.type):
            chunk = pc.cast(chunk, pa.int64())
        parts.append(pc.fill_null(pc.cast(chunk, pa.string()), "-"))
    if not table.num_rows:
        return []
    joined: list[bytes] = pc.cast(pc.binary_join_element_wise(*parts, ":"), pa.large_binary()).to_pylist()
    return joined


def leaf_hashes(table: pa.Table, *, chunk: int = 100_000) -> list[bytes]:
    """A Merkle leaf for every row; ``chunk`` bounds the memory."""
    sha = hashlib.sha256
    return [
        sha(b"\x00" + row).digest()
        for start in range(0, table.num_rows, chunk)
        for row in encode_rows(table.slice(start, chunk))
    ]


def merkle_root(leaves: Sequence[bytes]) -> str:
    """Root over leaf hashes, as hex; of none, the hash of nothing (RFC 6962)."""
    return _levels(leaves)[-1][0].hex() if leaves else hashlib.sha256(b"").hexdigest()


def _levels(leaves: Sequence[bytes]) -> list[list[bytes]]:
    # Pairing from below and lifting a lone last node gives the tree that RFC 6962 splits from above.
    sha = hashlib.sha256
    levels = [list(leaves)]
    while len(levels[-1]) > 1:
        level = levels[-1]
        above = [sha(b"\x01" + a + b).digest() for a, b in zip(level[::2], level[1::2], strict=False)]
        if len(level) % 2:
            above.append(level[-1])
        levels.append(above)
    return levels
