"""Keyed digests that stand for names: what the ledger holds instead of identifiers of people.

Belongs here: the digest and which columns hold which kind of name. Does not: the table of names (``delivery.ledger``).
Without the key a digest cannot be guessed back, and without its row in ``names`` not even the key's owner can read it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, Literal

Kind = Literal["entity", "target", "person", "text"]
"""entity: decided on; target: what holds its value downstream; person: who acted; text: somebody's free words."""

PEOPLE: dict[str, Kind] = {"actor": "person", "approver": "person", "person": "person", "entity": "entity"}
"""Keys of an event's body whose value is a name: it is stored as a digest, and read back as the name."""


class People:
    """Makes digests with one secret key."""

    def __init__(self, key: bytes) -> None:
        if len(key) < 16:
            raise ValueError("the ledger's key is too short: 16 random bytes at least")
        # HMAC spelled out, so that the key's two blocks are hashed once and not for each of a million names.
        block = (hashlib.sha256(key).digest() if len(key) > 64 else key).ljust(64, b"\0")
        self._inner = hashlib.sha256(bytes(b ^ 0x36 for b in block))
        self._outer = hashlib.sha256(bytes(b ^ 0x5C for b in block))

    def __repr__(self) -> str:
        return "People(key=…)"

    def digest(self, kind: str, name: str) -> str:
        """The first 32 hex digits of HMAC-SHA256(key, kind, 0, name)."""
        return self.digests(kind, [name])[0]

    def digests(self, kind: str, names: Iterable[str]) -> list[str]:
        """The same for many."""
        start, inner_blank, outer_blank = f"{kind}\0".encode(), self._inner, self._outer
        out = []
        for name in names:
            inner, outer = inner_blank.copy(), outer_blank.copy()
            inner.update(start + name.encode())
            outer.update(inner.digest())
            out.append(outer.hexdigest()[:32])
        return out

    def text(self, words: str | None) -> str | None:
        """What stands in the chain for free words, which may name somebody."""
        return None if words is None else self.digest("text", words)

    def sealed(self, body: Mapping[str, Any]) -> tuple[dict[str, Any], list[tuple[str, str, str]]]:
        """A body with digests for its names, and the mapping as (digest, kind, name)."""
        out: dict[str, Any] = dict(body)
        mapping: list[tuple[str, str, str]] = []
        for key, kind in PEOPLE.items():
            if isinstance(out.get(key), str):
                name = out[key]
                out[key] = self.digest(kind, name)
                mapping.append((out[key], kind, name))
        return out, mapping
