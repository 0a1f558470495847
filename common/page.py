"""The one base of every page that a stage writes: parts go in, one HTML file that opens offline comes out.

Belongs here: the parts (their template is ``page.html.j2``) and how a value reads. Does not: what a page says (the check or the
stage that has the figures).
"""

from __future__ import annotations

import base64
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import jinja2

State = Literal["", "good", "warn", "bad"]
"""How a row of a table is marked, in its first cell."""


@dataclass(frozen=True)
class Link:
    """A link, as a cell or a line. ``href`` is made by us: what comes from the data is quoted before it gets there."""

    text: str
    href: str


@dataclass(frozen=True)
class Text:
    """Paragraphs, or a list. Without a line its title is left out, too."""

    kind: ClassVar = "text"
    lines: Sequence[str | Link]
    bullets: bool = False
    title: str = ""


@dataclass(frozen=True)
class Table:
    """A table. One with a title is left out where it has no row."""

    kind: ClassVar = "table"
    columns: Sequence[str]
    rows: Sequence[tuple[State, Sequence[Any]]]
    title: str = ""
    note: str = ""
    digits: int = 6
    """Significant figures of a number with a fraction."""


@dataclass(frozen=True)
class Picture:
    """A plot: a PNG's bytes, or an SVG's text from ``<svg`` on. An SVG is not escaped: it must be one that we drew."""

    kind: ClassVar = "picture"
    alt: str
    image: bytes | str


@dataclass(frozen=True)
class Field:
    """One input of a form."""

    name: str
    label: str
    type: Literal["text", "password", "search", "date"] = "text"
    value: str = ""


@dataclass(frozen=True)
class Form:
    """What a person fills in and sends to the server that made the page."""

    kind: ClassVar = "form"
    action: str
    button: str
    fields: Sequence[Field] = ()
    hidden: Mapping[str, str] = field(default_factory=dict)
    note: str = ""
    method: Literal["get", "post"] = "post"


Part = Text | Table | Picture | Form


def page(title: str, *parts: Part, nav: Sequence[Link] = ()) -> str:
    """One HTML page: links to other pages, its title and its parts, one below the other.

    It asks nothing of the network and runs no script, and every value is escaped, so values from the data can do nothing; the
    same input gives the same bytes.
    """
    return _template().render(title=title, parts=parts, nav=nav)


def shown(value: Any, digits: int = 6) -> str:
    """A value as a person reads it: figures short (``digits`` significant ones), nothing as a dash."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {shown(v, digits)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(shown(v, digits) for v in value)
    return str(value)


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"shown": shown, "base64": lambda data: base64.b64encode(data).decode()}
    environment.tests["link"] = lambda value: isinstance(value, Link)
    return environment.from_string(Path(__file__).with_suffix(".html.j2").read_text(encoding="utf-8"))
