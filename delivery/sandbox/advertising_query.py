"""The part of Google's query language that connectors use: one SELECT over one resource, conditions joined by AND.

Belongs here: parsing a query against the official document's fields, and selecting rows by it. Does not: where the rows
come from (``advertising_api``), metrics and segments, LIKE, REGEXP_MATCH, DURING, CONTAINS: they are refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from delivery.connectors.discovery import Document

TOKEN = re.compile(
    r"\s*(?:(?P<string>'[^'\\\n]*'|\"[^\"\\\n]*\")|(?P<number>-?[0-9]+(?:\.[0-9]+)?)(?![\w.])"
    r"|(?P<word>[A-Za-z_][A-Za-z0-9_.]*)|(?P<sign>!=|>=|<=|[=<>(),]))"
)
UNSUPPORTED = {"LIKE", "REGEXP_MATCH", "DURING", "CONTAINS"}
MOST_VALUES = 20_000


class QueryError(ValueError):
    """A query that the API would refuse; ``reason`` is its queryError."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Condition:
    field: str
    operator: str
    """= != < <= > >= IN, NOT IN, BETWEEN, IS NULL, IS NOT NULL."""
    values: tuple[str, ...]


@dataclass(frozen=True)
class Query:
    fields: tuple[str, ...]
    resource: str
    where: tuple[Condition, ...]
    order: tuple[tuple[str, bool], ...]
    """Field and whether it descends."""
    limit: int | None

    def asked(self, field: str) -> tuple[str, ...] | None:
        """The values that this field must be one of, where the query says so: an index can answer it."""
        for condition in self.where:
            if condition.field == field and condition.operator in ("=", "IN"):
                return condition.values
        return None


class Language:
    """The query language over a document's resources. Thread-safe.

    ``resources``: resource → (schema of its row's part, the other resources whose fields may be selected with it).
    """

    def __init__(self, document: Document, resources: Mapping[str, tuple[str, Sequence[str]]]) -> None:
        self._document, self._resources = document, resources
        self._known: dict[str, tuple[tuple[str, ...], str]] = {}

    def parse(self, text: str) -> Query:
        """Raises QueryError as the API would."""
        return _Parser(self, text).query()

    def path(self, field: str) -> tuple[tuple[str, ...], str]:
        """Where a field stands in a row, and its type: int64, number, boolean, string, message."""
        if field not in self._known:
            self._known[field] = self._find(field)
        return self._known[field]

    def _find(self, field: str) -> tuple[tuple[str, ...], str]:
        resource, *parts = field.split(".")
        if resource not in self._resources or not parts:
            raise QueryError("UNRECOGNIZED_FIELD", f"Unrecognized field in the query: '{field}'.")
        schema, path, kind = self._resources[resource][0], [camel(resource)], "message"
        for part in parts:
            node = self._document.properties(schema).get(camel(part)) if schema else None
            if node is None:
                raise QueryError("UNRECOGNIZED_FIELD", f"Unrecognized field in the query: '{field}'.")
            path.append(camel(part))
            schema = node.get("$ref", "")
            kind = "message" if schema else node.get("format", "") if node.get("format") == "int64" else node["type"]
        return tuple(path), kind

    def check(self, query: Query) -> None:
        """Raises QueryError for a field that does not go with the resource."""
        if query.resource not in self._resources:
            raise QueryError("BAD_RESOURCE_TYPE_IN_FROM_CLAUSE", f"The resource '{query.resource}' is not served here.")
        allowed = {query.resource, *self._resources[query.resource][1]}
        for place, fields in (
            ("SELECT", query.fields),
            ("WHERE", [c.field for c in query.where]),
            ("ORDER_BY", [f for f, _ in query.order]),
        ):
            for field in fields:
                path, kind = self.path(field)
                if field.split(".")[0] not in allowed:
                    says = f"Cannot use '{field}' with the resource '{query.resource}'."
                    raise QueryError(f"PROHIBITED_FIELD_IN_{place}_CLAUSE", says)
                whole = kind == "message" and path[-1] not in ("oldResource", "newResource")
                if whole or (kind == "message" and place != "SELECT"):
                    raise QueryError(
                        f"PROHIBITED_FIELD_IN_{place}_CLAUSE", f"'{field}' holds other fields; name those."
                    )
        for condition in query.where:
            if self.path(condition.field)[1] == "int64" and not all(
                re.fullmatch(r"-?\d+", v) for v in condition.values
            ):
                raise QueryError("BAD_NUMBER", f"'{condition.field}' is compared with what is no whole number.")
            if len(condition.values) > MOST_VALUES:
                raise QueryError(
                    "FILTER_HAS_TOO_MANY_VALUES", f"The filter of '{condition.field}' has too many values."
                )

    def select(self, query: Query, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The rows that the query keeps, in its order, with the fields that it names and the resource names."""
        tests = [self._test(condition) for condition in query.where]
        kept = [row for row in rows if all(test(row) for test in tests)]
        for field, descends in reversed(query.order):
            path, kind = self.path(field)
            kept.sort(key=lambda row, p=path, k=kind: _comparable(_at(row, p), k), reverse=descends)  # type: ignore[misc]
        paths = [self.path(field)[0] for field in query.fields]
        paths = list(dict.fromkeys([*paths, *((path[0], "resourceName") for path in paths)]))
        return [_only(row, paths) for row in kept[: query.limit]]

    def _test(self, condition: Condition) -> Callable[[Mapping[str, Any]], bool]:
        path, kind = self.path(condition.field)
        values = [_comparable(v, kind) for v in condition.values]
        members = set(values)
        operator = condition.operator

        def test(row: Mapping[str, Any]) -> bool:
            raw = _at(row, path)
            if operator in ("IS NULL", "IS NOT NULL"):
                return (raw is None) == (operator == "IS NULL")
            if raw is None:
                return False
            here = _comparable(raw, kind)
            match operator:
                case "=" | "IN":
                    return here in members
                case "!=" | "NOT IN":
                    return here not in members
                case "<":
                    return bool(here < values[0])
                case "<=":
                    return bool(here <= values[0])
                case ">":
                    return bool(here > values[0])
                case ">=":
                    return bool(here >= values[0])
                case _:
                    return bool(values[0] <= here <= values[1])

        return test


def camel(name: str) -> str:
    """amount_micros → amountMicros."""
    first, *rest = name.split("_")
    return first + "".join(part.capitalize() for part in rest)


def _at(row: Mapping[str, Any], path: Sequence[str]) -> Any:
    here: Any = row
    for part in path:
        here = here.get(part) if isinstance(here, dict) else None
    return here


def _comparable(value: Any, kind: str) -> Any:
    if kind == "int64":
        return int(value)
    if kind == "boolean":
        return str(value).lower()
    return str(value) if value is not None else ""


def _only(row: Mapping[str, Any], paths: Sequence[tuple[str, ...]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for path in paths:
        value = _at(row, path)
        if value is not None:
            here = out
            for part in path[:-1]:
                here = here.setdefault(part, {})
            here[path[-1]] = value
    return out


class _Parser:
    def __init__(self, language: Language, text: str) -> None:
        self._language = language
        self._tokens: list[tuple[str, str]] = []
        at = 0
        text = text.rstrip()
        while at < len(text):
            found = TOKEN.match(text, at)
            if found is None:
                rest = text[at:].lstrip()
                if rest[:1] in "'\"":
                    raise QueryError(
                        "STRING_NOT_TERMINATED", f"A string does not end, or holds a backslash: {rest[:40]}"
                    )
                raise QueryError("BAD_SYMBOL", f"Unexpected symbol: {rest[:40]}")
            kind = str(found.lastgroup)
            self._tokens.append((kind, found.group(kind)))
            at = found.end()
        self._at = 0

    def _peek(self) -> str:
        return self._tokens[self._at][1].upper() if self._at < len(self._tokens) else ""

    def _next(self, *kinds: str) -> str:
        if self._at >= len(self._tokens):
            raise QueryError("UNEXPECTED_END_OF_QUERY", "The query ends too early.")
        kind, text = self._tokens[self._at]
        if kinds and kind not in kinds:
            raise QueryError("UNEXPECTED_INPUT", f"Unexpected input: '{text[:40]}'.")
        self._at += 1
        return text

    def _word(self, wanted: str, reason: str) -> None:
        if self._peek() != wanted:
            raise QueryError(reason, f"Expected {wanted} at '{self._peek()[:40].lower() or 'the end of the query'}'.")
        self._at += 1

    def query(self) -> Query:
        self._word("SELECT", "EXPECTED_SELECT")
        fields = self._list()
        self._word("FROM", "EXPECTED_FROM")
        resource = self._next("word")
        where: list[Condition] = []
        if self._peek() == "WHERE":
            self._at += 1
            where.append(self._condition())
            while self._peek() == "AND":
                self._at += 1
                where.append(self._condition())
            if self._peek() == "OR":
                raise QueryError("EXPECTED_AND", "Conditions are joined by AND; there is no OR.")
        order: list[tuple[str, bool]] = []
        if self._peek() == "ORDER":
            self._at += 1
            self._word("BY", "EXPECTED_BY")
            while True:
                field = self._next("word")
                descends = self._peek() == "DESC"
                self._at += self._peek() in ("ASC", "DESC")
                order.append((field, descends))
                if self._peek() != ",":
                    break
                self._at += 1
        limit = None
        if self._peek() == "LIMIT":
            self._at += 1
            text = self._next()
            if not re.fullmatch(r"[1-9][0-9]{0,17}", text):
                raise QueryError("BAD_LIMIT_VALUE", f"LIMIT wants a positive whole number, not '{text[:40]}'.")
            limit = int(text)
        if self._at < len(self._tokens):
            raise QueryError("UNEXPECTED_INPUT", f"Unexpected input: '{self._peek()[:40].lower()}'.")
        made = Query(tuple(fields), resource, tuple(where), tuple(order), limit)
        self._language.check(made)
        return made

    def _list(self) -> list[str]:
        fields = [self._next("word")]
        while self._peek() == ",":
            self._at += 1
            fields.append(self._next("word"))
        return fields

    def _condition(self) -> Condition:
        field = self._next("word")
        operator = self._next("sign", "word").upper()
        if operator == "NOT":
            operator = f"NOT {self._next('word').upper()}"
        if operator == "IS":
            operator = "IS NULL"
            if self._peek() == "NOT":
                self._at += 1
                operator = "IS NOT NULL"
            self._word("NULL", "BAD_OPERATOR")
            return Condition(field, operator, ())
        if operator.removeprefix("NOT ") in UNSUPPORTED:
            raise QueryError("BAD_OPERATOR", f"The sandbox does not serve the operator {operator}.")
        if operator in ("IN", "NOT IN"):
            if self._next() != "(":
                raise QueryError("EXPECTED_LIST", f"{operator} wants a list in parentheses.")
            if self._peek() == ")":
                raise QueryError("PROHIBITED_EMPTY_LIST_IN_CONDITION", "A list in a condition may not be empty.")
            values = [self._value()]
            while self._peek() == ",":
                self._at += 1
                values.append(self._value())
            if self._next() != ")":
                raise QueryError("EXPECTED_LIST", f"The list after {operator} does not end.")
            return Condition(field, operator, tuple(values))
        if operator == "BETWEEN":
            low = self._value()
            self._word("AND", "EXPECTED_AND")
            return Condition(field, operator, (low, self._value()))
        if operator not in ("=", "!=", "<", "<=", ">", ">="):
            raise QueryError("BAD_OPERATOR", f"'{operator[:40]}' is no operator.")
        return Condition(field, operator, (self._value(),))

    def _value(self) -> str:
        text = self._next("string", "number", "word")
        return text[1:-1] if text[:1] in "'\"" else text
