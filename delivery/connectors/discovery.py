"""Google's shipped discovery documents as JSON Schema: what a body must look like before it is sent or taken.

Belongs here: reading a document from the official client's package, offline, and checking bodies against its schemas;
the client itself does not. Does not: any one API's calls (``google_ads``) or what a server makes of a valid body.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonschema.protocols import Validator

INT64 = range(-(2**63), 2**63)
# What the formats of a discovery document look like on the wire; int64 is a string, since JSON's numbers lose digits.
PATTERNS = {
    "int64": r"^(0|-?[1-9][0-9]{0,18})\Z",
    "uint64": r"^(0|[1-9][0-9]{0,19})\Z",
    "google-fieldmask": r"^([a-zA-Z][a-zA-Z0-9_.]*(,[a-zA-Z][a-zA-Z0-9_.]*)*)?\Z",
    "google-duration": r"^-?[0-9]+(\.[0-9]{1,9})?s\Z",
}
NUMBERS = {"int32": (-(2**31), 2**31 - 1), "uint32": (0, 2**32 - 1)}


class Document:
    """One discovery document. Thread-safe once made."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.content = content
        self._validators: dict[str, Validator] = {}

    @classmethod
    def shipped(cls, api: str, version: str) -> Document:
        """The document in the installed client; the same object for the same arguments.

        Raises LookupError naming the package where it holds none.
        """
        return _shipped(api, version)

    def body_of(self, *path: str) -> str:
        """Name of the schema of a method's request body; the path is resources and last the method."""
        return str(self._method(path)["request"]["$ref"])

    def answer_of(self, *path: str) -> str:
        """Name of the schema of a method's answer."""
        return str(self._method(path)["response"]["$ref"])

    def _method(self, path: tuple[str, ...]) -> Mapping[str, Any]:
        here: Mapping[str, Any] = self.content
        for part in path[:-1]:
            here = here["resources"][part]
        found: Mapping[str, Any] = here["methods"][path[-1]]
        return found

    def excerpt(self, *paths: Sequence[str]) -> dict[str, Any]:
        """The document with these methods only, for ``googleapiclient.discovery.build_from_document``.

        The client writes out the documentation of every method that a document holds, answers included: of this size
        that takes it half a second for each connector. What the calls look like on the wire stays the same.
        """
        out = {**self.content, "resources": {}, "schemas": {}}
        for path in paths:
            here = out
            for part in path[:-1]:
                here = here.setdefault("resources", {}).setdefault(part, {})
            method = self._method(tuple(path))
            here.setdefault("methods", {})[path[-1]] = method
            for name in self.json_schema(method["request"]["$ref"])["$defs"]:
                out["schemas"][name] = self.content["schemas"][name]
            name = method["response"]["$ref"]
            out["schemas"].setdefault(name, {"id": name, "type": "object"})
        return out

    def properties(self, schema: str) -> Mapping[str, Any]:
        """Fields of a schema as the document describes them."""
        found: Mapping[str, Any] = self.content["schemas"][schema].get("properties", {})
        return found

    def json_schema(self, schema: str) -> dict[str, Any]:
        """The named schema and all that it refers to, as JSON Schema (2020-12) that refuses unknown fields."""
        wanted, definitions = [schema], {}
        while wanted:
            name = wanted.pop()
            if name not in definitions:
                definitions[name] = _translated(self.content["schemas"][name])
                wanted += re.findall(r'"\$ref": "#/\$defs/([^"]+)"', json.dumps(definitions[name]))
        return {"$ref": f"#/$defs/{schema}", "$defs": definitions}

    def problems(self, schema: str, body: Any, most: int = 20) -> list[str]:
        """What is wrong with a body, each with its place, in the order of places; empty: nothing.

        A place reads ``operations[3].update.amountMicros``.
        """
        validator = self._validators.get(schema)
        if validator is None:
            from jsonschema import Draft202012Validator, FormatChecker

            checker = FormatChecker(formats=())
            checker.checks("int64")(_in_range)
            validator = Draft202012Validator(self.json_schema(schema), format_checker=checker)
            self._validators[schema] = validator
        if validator.is_valid(body):
            return []
        found = []
        for error in validator.iter_errors(body):
            place = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in error.absolute_path).lstrip(".")
            found.append(f"{place or 'the body'}: {_words(error)}")
            if len(found) >= most:
                break
        return sorted(found)


@lru_cache
def _shipped(api: str, version: str) -> Document:
    from googleapiclient.discovery_cache import get_static_doc

    text = get_static_doc(api, version)
    if text is None:
        raise LookupError(f"the installed google-api-python-client ships no document {api} {version}: update it")
    return Document(json.loads(text))


def _translated(node: Mapping[str, Any]) -> dict[str, Any]:
    """One node of a discovery document in JSON Schema's words."""
    if "$ref" in node:
        return {"$ref": f"#/$defs/{node['$ref']}"}
    kind = node.get("type", "any")
    if kind == "any":
        return {}
    if kind == "array":
        return {"type": "array", "items": _translated(node["items"])}
    if kind == "object":
        fields = {name: _translated(field) for name, field in node.get("properties", {}).items()}
        more = node.get("additionalProperties")
        return {
            "type": "object",
            "properties": fields,
            "additionalProperties": _translated(more) if more is not None else False,
        }
    out: dict[str, Any] = {"type": kind}
    form = node.get("format")
    if form in PATTERNS:
        out["pattern"] = PATTERNS[form]
    if form == "int64":
        out["format"] = "int64"
    if form in NUMBERS:
        out["minimum"], out["maximum"] = NUMBERS[form]
    if "enum" in node:
        out["enum"] = list(node["enum"])
    return out


def _in_range(value: object) -> bool:
    return not isinstance(value, str) or not re.match(PATTERNS["int64"], value) or int(value) in INT64


def _words(error: Any) -> str:
    """A validation error in a sentence that shows what stands there, shortened."""
    text = str(error.message)
    if error.validator in ("pattern", "format"):
        form = next((name for name, pattern in PATTERNS.items() if pattern == error.schema.get("pattern")), "format")
        text = f"{error.instance!r} is no {form}"
    return text if len(text) <= 200 else text[:199] + "…"
