"""Keyed digests that stand for names: what the ledger holds instead of identifiers of people.

Belongs here: the digest, which columns and keys hold which kind of name, finding a name in words. Does not: the table of
names (``delivery.ledger``).
Without the key a digest cannot be guessed back, and without its row in ``names`` not even the key's owner can read it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

Kind = Literal["entity", "target", "person", "text"]
"""entity: decided on; target: what holds its value downstream; person: who acted; text: somebody's free words."""

PEOPLE: dict[str, Kind] = {"actor": "person", "approver": "person", "person": "person", "entity": "entity"}
"""Keys of an event's body whose value is a name: it is stored as a digest, and read back as the name."""
LISTS: dict[str, Kind] = {"examples": "entity", "entities": "entity"}
"""Keys, however deep, whose value is a list of names, in findings and evidence as in events."""
MARK = "digest:"
"""What a digest begins with below a body's own keys, so that it is told from a name that an older ledger kept there."""
ERASED = "(erased)"
"""What is read in the place of a name that was forgotten."""
_MARKED = re.compile(f"{MARK}[0-9a-f]{{32}}")


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
        mapping: list[tuple[str, str, str]] = []
        out = {
            key: self._noted(PEOPLE[key], value, mapping)
            if key in PEOPLE and isinstance(value, str)
            else self._below(key, value, mapping)
            for key, value in body.items()
        }
        return out, mapping

    def _noted(self, kind: Kind, name: str, mapping: list[tuple[str, str, str]]) -> str:
        digest = self.digest(kind, name)
        mapping.append((digest, kind, name))
        return digest

    def _below(self, key: str, value: Any, mapping: list[tuple[str, str, str]]) -> Any:
        """What stands under a key, with marked digests for the names in it."""
        if isinstance(value, Mapping):
            return {
                k: MARK + self._noted(PEOPLE[k], v, mapping)
                if k in PEOPLE and _is_name(v)
                else self._below(k, v, mapping)
                for k, v in value.items()
            }
        if not isinstance(value, list | tuple):
            return value
        kind = LISTS.get(key)
        return [
            MARK + self._noted(kind, one, mapping)
            if kind is not None and _is_name(one)
            else self._below("", one, mapping)
            for one in value
        ]


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != ERASED and not _MARKED.fullmatch(value)


def digests_in(value: Any) -> Iterator[str]:
    """The marked digests in a sealed value, however deep."""
    if isinstance(value, str):
        if _MARKED.fullmatch(value):
            yield value.removeprefix(MARK)
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from digests_in(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from digests_in(one)


def unsealed(value: Any, known: Mapping[str | None, str]) -> Any:
    """A sealed value with names for its marked digests, ``ERASED`` for those that ``known`` lacks."""
    if isinstance(value, str):
        return known.get(value.removeprefix(MARK), ERASED) if _MARKED.fullmatch(value) else value
    if isinstance(value, Mapping):
        return {key: unsealed(one, known) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [unsealed(one, known) for one in value]
    return value


def eraser(names: Iterable[str]) -> Callable[[str], str]:
    """What puts ``ERASED`` in the place of these names in a text, where they stand as words of their own."""
    parts = [
        ("(?<!\\w)" if name[0].isalnum() else "") + re.escape(name) + ("(?!\\w)" if name[-1].isalnum() else "")
        for name in sorted(set(names), key=len, reverse=True)
        if name
    ]
    pattern = re.compile("|".join(parts) or "(?!)", re.IGNORECASE)
    return lambda words: pattern.sub(ERASED, words)


def in_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A value of JSON with every text in it changed, keys left as they are."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: in_texts(one, change) for key, one in value.items()}
    if isinstance(value, list):
        return [in_texts(one, change) for one in value]
    return value
