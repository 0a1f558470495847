"""JSON pointers and templates with placeholders, safe for values that come out of data.

Belongs here: finding a place or a text in a JSON document, filling a body, a text or a path, what is a whole number. Does not:
HTTP, and what the pieces mean (``rest_spec``, ``rest``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from decimal import Context, Decimal
from functools import lru_cache
from typing import Annotated, Any
from urllib.parse import quote, unquote

from pydantic import AfterValidator

from common.errors import SignalboxError

INT64 = (-(2**63), 2**63 - 1)
_EXACT = Context(prec=60)


class _Absent:
    def __repr__(self) -> str:
        return "nothing"


ABSENT = _Absent()


@lru_cache(maxsize=1024)
def _steps(pointer: str) -> tuple[str, ...]:
    return tuple(p.replace("~1", "/").replace("~0", "~") for p in pointer.split("/")[1:])


def at(document: Any, pointer: str) -> Any:
    """What stands at a JSON pointer (RFC 6901), or ABSENT."""
    for step in _steps(pointer):
        if isinstance(document, Mapping):
            document = document.get(step, ABSENT)
        elif isinstance(document, list) and re.fullmatch(r"0|[1-9]\d{0,8}", step) and int(step) < len(document):
            document = document[int(step)]
        else:
            return ABSENT
    return document


def _pointer(text: str) -> str:
    if text.startswith("/") or not text:
        if re.search(r"~(?![01])", text):
            raise ValueError("in a JSON pointer ~ is written ~0 and / is written ~1")
        return text
    if not re.fullmatch(r"[\w-]+(\.[\w-]+)*", text):
        raise ValueError("must be a JSON pointer such as /ticket/priority, or names with dots such as ticket.priority")
    return "/" + text.replace(".", "/")


Pointer = Annotated[str, AfterValidator(_pointer)]

_PLACE = re.compile(r"\{\{|\}\}|\{([a-z_]+)(?::(integer|text))?\}|[{}]")


class Unfit(SignalboxError, ValueError):
    """A value of the data cannot be sent as the YAML wants; names it, says why."""


def placeholders(template: Any) -> set[str]:
    """Names of the placeholders in a template. Raises ValueError for a brace that is none."""
    if isinstance(template, str):
        found = set()
        for match in _PLACE.finditer(template):
            if match[0] in ("{", "}"):
                raise ValueError(f"{template!r}: a brace that is no placeholder is written {{{{ or }}}}")
            if match[1]:
                found.add(match[1])
        return found
    if isinstance(template, Mapping):
        return set().union(*(placeholders(k) | placeholders(v) for k, v in template.items()))
    if isinstance(template, list | tuple):
        return set().union(*(placeholders(v) for v in template))
    return set()


def fill(template: Any, values: Mapping[str, Any]) -> Any:
    """A template with its placeholders filled in; one that stands alone keeps its type. Raises Unfit."""
    if isinstance(template, str):
        alone = _PLACE.fullmatch(template)
        if alone and alone[1]:
            return _typed(alone[1], alone[2], values[alone[1]])
        return _PLACE.sub(lambda m: as_text(m[1], values[m[1]]) if m[1] else m[0][0], template)
    if isinstance(template, Mapping):
        return {fill(k, values): fill(v, values) for k, v in template.items()}
    if isinstance(template, list | tuple):
        return [fill(v, values) for v in template]
    return template


def _typed(name: str, as_: str | None, value: Any) -> Any:
    if as_ is None:
        return value
    text = as_text(name, value)
    if as_ == "text":
        return text
    if not re.fullmatch(r"-?(0|[1-9]\d{0,18})", text):
        raise Unfit(f"{name} {text[:60]!r} is no whole number")
    return int(text)


def as_text(name: str, value: Any) -> str:
    if value is None or isinstance(value, list | Mapping):
        raise Unfit(f"{name} is empty or a list, which cannot stand in a text")
    return str(value)


def fill_path(template: str, values: Mapping[str, Any]) -> str:
    """A path with its placeholders as whole, quoted pieces of it: no id can add a part or climb. Raises Unfit."""

    def one(match: re.Match[str]) -> str:
        if not match[1]:
            return quote(match[0][0])
        text = as_text(match[1], values[match[1]])
        bare = unquote(unquote(text))
        if not bare or any(part in ("", ".", "..") for part in re.split(r"[/\\]", bare)) or not bare.isprintable():
            raise Unfit(f"{match[1]} {text[:60]!r} cannot stand in a path")
        return quote(text, safe="")

    return _PLACE.sub(one, template)


def whole(found: Any) -> int | None:
    """A whole number within 64 bits out of JSON: a number, or its exact text. None for everything else."""
    if isinstance(found, bool):
        return None
    if isinstance(found, str) and re.fullmatch(r"-?(0|[1-9]\d{0,18})", found):
        found = int(found)
    if isinstance(found, float) and found.is_integer() and abs(found) <= 2**53:
        found = int(found)
    return found if isinstance(found, int) and INT64[0] <= found <= INT64[1] else None


def scaled(found: Any, decimals: int) -> int | None:
    """``found`` × 10^``decimals`` where that is whole and within 64 bits: of a number, or of its exact text ("70", "70.50").

    None for everything else, also for a number with more digits than JSON's readers keep.
    """
    if isinstance(found, bool) or not isinstance(found, int | float | str):
        return None
    if isinstance(found, str) and not re.fullmatch(r"-?(0|[1-9]\d{0,18})(\.\d{1,18})?", found, re.ASCII):
        return None
    number = _EXACT.scaleb(Decimal(str(found)), decimals)  # str: 0.1 as people see it, and not the float's last digits
    if isinstance(found, float) and abs(number) > 2**53:
        return None
    return int(number) if number == number.to_integral_value() and INT64[0] <= number <= INT64[1] else None


_SAID = (
    "message",
    "error_message",
    "errorMessage",
    "ErrorMessage",
    "description",
    "error_description",
    "detail",
    "title",
    "msg",
)


def texts(found: Any, depth: int = 6) -> Iterator[str]:
    """The texts in a piece of JSON, however it nests them: a list of messages, or messages by the field they are about."""
    if isinstance(found, str) and found.strip():
        yield found
    elif isinstance(found, list | Mapping) and depth:
        for one in found.values() if isinstance(found, Mapping) else found:
            yield from texts(one, depth - 1)


def words(found: Any, depth: int = 6) -> str:
    """What a piece of JSON says to people: only its texts count, each with the field that it is about; "" where there is none."""
    if isinstance(found, str):
        return found.strip()
    if not depth or not isinstance(found, list | Mapping):
        return ""
    if isinstance(found, list):
        return "; ".join(dict.fromkeys(w for one in found[:20] if (w := words(one, depth - 1))))
    for name in _SAID:
        if said := words(found.get(name), depth - 1):
            about = found.get("field")
            return f"{about}: {said}" if isinstance(about, str) and about else said
    return "; ".join(f"{name}: {w}" for name, one in list(found.items())[:20] if (w := words(one, depth - 1)))


def same(found: Any, wanted: Any) -> bool:
    return isinstance(found, bool) == isinstance(wanted, bool) and bool(found == wanted)
