"""Is this table what was promised: Great Expectations suites built from ``contract.yaml``.

Belongs here: what an expectation may say, running a suite over a table, the results and a page of them. Does not: row
rules and quarantine (``pipeline.ingest``), or reading the contract (``pipeline.workflow``).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from common.collector import without_collection
from common.errors import SignalboxError
from common.page import State, Table, Text, page, shown

EXAMPLES = 10
# What a contract may not set: this module does, or it has no meaning here.
_INTERNAL = {"id", "batch_id", "meta", "severity", "result_format", "catch_exceptions", "rendered_content", "windows"}
# These judge nulls, types or presence: a column without values is an answer to them.
_JUDGES_EMPTY = {
    "expect_column_to_exist",
    "expect_column_values_to_be_null",
    "expect_column_values_to_not_be_null",
    "expect_column_proportion_of_non_null_values_to_be_between",
    "expect_column_values_to_be_of_type",
    "expect_column_values_to_be_in_type_list",
    "expect_column_type_to_be",
}


class ContractInvalid(SignalboxError, ValueError):
    """An expectation that cannot be built; the message names its place in the file and what is allowed."""


@cache
def expectation_names() -> tuple[str, ...]:
    """Names of the expectations that the installed Great Expectations ships, without the seconds of its import."""
    spec = find_spec("great_expectations")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("great_expectations is not installed; contracts need it (make install)")
    return tuple(sorted(p.stem for p in (Path(spec.origin).parent / "expectations" / "core").glob("expect_*.py")))


class ExpectationSpec(BaseModel):
    """One entry of ``expectations``: a Great Expectations expectation; every other key is an argument of it."""

    model_config = ConfigDict(extra="allow", frozen=True)

    type: str = Field(description="Snake-case name, e.g. expect_column_mean_to_be_between")
    severity: Literal["error", "warn"] = Field(
        default="error", description="error stops what depends on the table; warn is only shown"
    )
    may_be_empty: bool = Field(
        default=False, description="A column without any value passes; otherwise it fails, because nothing was judged"
    )

    @field_validator("type")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in expectation_names():
            near = " or ".join(map(repr, difflib.get_close_matches(value, expectation_names(), 3)))
            raise ValueError(f"unknown expectation {value!r}" + (f"; did you mean {near}?" if near else ""))
        return value

    @property
    def arguments(self) -> dict[str, Any]:
        """What goes to the expectation itself."""
        return dict(self.model_extra or {})


class Implied(ExpectationSpec):
    """An expectation that follows from ``columns``; it stands at no place of its own in the file."""


@dataclass(frozen=True)
class ContractResult:
    """What a suite found.

    ``results``: one mapping an expectation, in the order given, JSON-ready: expectation, column, severity, success,
    arguments, observed, unexpected_count, unexpected_percent (of the values that are not null), examples (distinct
    failing values, at most 10), reason (why it could not be judged, else None).
    """

    name: str
    success: bool
    blocking_failed: bool
    results: list[dict[str, Any]]
    html: str
    rows: int


def implied(events: Any) -> list[ExpectationSpec]:
    """What the declared columns promise, as expectations.

    ``events``: ``columns`` (name → required, min, max, allowed) and ``unique`` (columns), as in contract.yaml.
    """
    found: list[ExpectationSpec] = []

    def add(kind: str, **arguments: Any) -> None:
        found.append(Implied.model_validate({"type": kind, **arguments}))

    add("expect_table_columns_to_match_set", column_set=list(events.columns), exact_match=False)
    for name, column in events.columns.items():
        common = {"column": name, "may_be_empty": not column.required}
        if column.required:
            add("expect_column_values_to_not_be_null", column=name)
        if column.min is not None or column.max is not None:
            add("expect_column_values_to_be_between", min_value=column.min, max_value=column.max, **common)
        if column.allowed is not None:
            add("expect_column_values_to_be_in_set", value_set=list(column.allowed), **common)
    if len(events.unique) == 1:
        add("expect_column_values_to_be_unique", column=events.unique[0])
    elif events.unique:
        add("expect_compound_columns_to_be_unique", column_list=list(events.unique))
    return found


def _specs(
    expectations: Sequence[ExpectationSpec | Mapping[str, Any]], where: str
) -> list[tuple[str, ExpectationSpec]]:
    """Each expectation with its place in the file (those implied are not counted)."""
    placed: list[tuple[str, ExpectationSpec]] = []
    declared = 0
    for entry in expectations:
        if isinstance(entry, Implied):
            placed.append((f"columns ({entry.type})", entry))
            continue
        path = f"{where}[{declared}]"
        declared += 1
        if not isinstance(entry, ExpectationSpec):
            try:
                entry = ExpectationSpec.model_validate(entry)
            except ValidationError as error:
                lines = [
                    f"{path}.{'.'.join(map(str, p['loc']))}: {p['msg'].removeprefix('Value error, ')}"
                    for p in error.errors()
                ]
                raise ContractInvalid("\n".join(lines)) from None
        placed.append((path, entry))
    return placed


def _at_midnight(value: Any) -> datetime | None:
    """The moment that a date or a text means, where it is a midnight."""
    try:
        moment = datetime.fromisoformat(value if isinstance(value, str) else value.isoformat())
    except (AttributeError, ValueError):
        return None
    return moment if moment == datetime.combine(moment.date(), datetime.min.time()) else None


def _moments(arguments: dict[str, Any], kind: pa.DataType) -> dict[str, Any]:
    """Bounds of a column of dates or timestamps, as Great Expectations can compare them.

    It reads a midnight as a date and then cannot compare it with timestamps. They hold microseconds, so
    ``t <= midnight`` is written as ``t < midnight + 1 microsecond``, and the like.
    """
    tick = timedelta(microseconds=1)
    for end, step in (("min", -tick), ("max", tick)):
        moment = _at_midnight(arguments.get(f"{end}_value"))
        if moment is not None and pa.types.is_date(kind):
            arguments[f"{end}_value"] = moment.date()
        elif moment is not None and pa.types.is_timestamp(kind):
            strict = bool(arguments.get(f"strict_{end}"))
            arguments |= {f"{end}_value": moment - step if strict else moment + step, f"strict_{end}": not strict}
    return arguments


def _built(spec: ExpectationSpec, path: str, index: int, schema: pa.Schema) -> Any:
    """The Great Expectations object, or ContractInvalid with the argument's place."""
    from great_expectations.expectations import registry

    if spec.type not in registry.list_registered_expectation_implementations():
        raise ContractInvalid(f"{path}.type: {spec.type!r} cannot be used in this version of Great Expectations")
    kind = registry.get_expectation_impl(spec.type)
    allowed = sorted(set(kind.__fields__) - _INTERNAL)
    given = spec.arguments
    problems = []
    for key in given:
        if key not in allowed:
            near = difflib.get_close_matches(key, allowed, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            problems.append(f"{path}.{key}: unknown argument of {spec.type}{hint} (allowed: {', '.join(allowed)})")
    if {"min_value", "max_value"} <= set(allowed) and given.get("min_value") is None and given.get("max_value") is None:
        problems.append(f"{path}: {spec.type} is given neither min_value nor max_value and would judge nothing")
    if problems:
        raise ContractInvalid("\n".join(problems))
    if given.get("column") in schema.names:
        given = _moments(given, schema.field(given["column"]).type)
    try:
        return kind(**given, meta={"index": index}, severity="critical" if spec.severity == "error" else "warning")
    except ValueError as error:
        found = error.errors() if hasattr(error, "errors") else [{"loc": (), "msg": str(error)}]
        lines = {".".join([path, *map(str, e["loc"])]): e["msg"] for e in reversed(found)}
        raise ContractInvalid("\n".join(f"{place}: {text} ({spec.type})" for place, text in lines.items())) from None


def _frame(table: pa.Table) -> Any:
    """The table for Great Expectations.

    Whole numbers beside nulls become float64, which its metrics understand best; where that would lose digits the
    column stays an exact nullable integer.
    """
    import pandas as pd

    frame = table.to_pandas()
    for name, column in zip(table.schema.names, table.columns, strict=True):
        if pa.types.is_integer(column.type) and 0 < column.null_count < len(column):
            ends = pc.min_max(column).as_py()
            if max(abs(ends["min"]), abs(ends["max"])) > 2**53:
                frame[name] = pd.array(column.to_pylist(), dtype="Int64")
    return frame


def _plain(value: Any) -> Any:
    """A value as JSON can hold it; whole floats that came from nullable integers stay figures."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(v) for v in value]
    if isinstance(value, datetime | date):
        return value.isoformat()
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and value != value:
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _columns_of(arguments: Mapping[str, Any]) -> list[str]:
    named = [arguments[k] for k in ("column", "column_A", "column_B") if k in arguments]
    return named + list(arguments.get("column_list", ()))


def _unjudged(spec: ExpectationSpec, frame: Any) -> tuple[bool, str] | None:
    """(passed, reason) where Great Expectations has nothing to judge, else None."""
    columns = _columns_of(spec.arguments)
    missing = [c for c in columns if c not in frame.columns]
    if missing and spec.type != "expect_column_to_exist":
        has = ", ".join(map(str, frame.columns))
        return False, f"column {', '.join(map(repr, missing))} is missing; the table has {has}"
    if len(columns) == 1 and spec.type not in _JUDGES_EMPTY and len(frame) and frame[columns[0]].isna().all():
        if spec.may_be_empty:
            return True, f"no value to judge: all {len(frame)} are null"
        values = f"all {len(frame)} values of {columns[0]!r}"
        return False, f"nothing could be judged: {values} are null (may_be_empty: true allows that)"
    return None


def _result(
    spec: ExpectationSpec, success: bool, found: Mapping[str, Any], reason: str | None, integers: set[str]
) -> dict[str, Any]:
    columns = _columns_of(spec.arguments)
    details = found.get("details") or {}
    observed = _plain(found.get("observed_value"))
    examples: list[Any] = []
    for value in _plain(found.get("partial_unexpected_list") or []):
        if len(columns) == 1 and columns[0] in integers and isinstance(value, float):
            value = int(value)
        if value not in examples and len(examples) < EXAMPLES:
            examples.append(value)
    if spec.type == "expect_table_columns_to_match_set" and not success:
        examples = _plain(details.get("mismatched", {}).get("missing", []))
        reason = reason or (f"missing: {', '.join(examples)}" if examples else None)
    elif spec.type == "expect_table_row_count_to_be_between" and not success:
        ends = {"at least": spec.arguments.get("min_value"), "at most": spec.arguments.get("max_value")}
        asked = ", ".join(f"{word} {end}" for word, end in ends.items() if end is not None)
        reason = reason or f"{observed} rows, {asked} must be there"
    elif observed is None and "observed_partition" in details:
        observed = _plain(details["observed_partition"])
    return {
        "expectation": spec.type,
        "column": ", ".join(map(str, columns)) or None,
        "severity": spec.severity,
        "success": success,
        "arguments": _plain({k: v for k, v in spec.arguments.items() if k != "column"}),
        "observed": observed,
        "unexpected_count": _plain(found.get("unexpected_count")),
        "unexpected_percent": _plain(found.get("unexpected_percent")),
        "examples": examples,
        "reason": reason,
    }


def _raised(info: Mapping[str, Any]) -> str | None:
    """The message of what was raised inside Great Expectations (it files one a metric), or None."""
    entries = [info] if "raised_exception" in info else list(info.values())
    messages = [str(e["exception_message"]).strip().split("\n")[0] for e in entries if e.get("raised_exception")]
    return f"Great Expectations could not judge it: {messages[0]}" if messages else None


def unbuildable(expectations: Sequence[ExpectationSpec], schema: pa.Schema, where: str) -> list[str]:
    """What Great Expectations would refuse of expectations on a table of this schema, a line each with its place."""
    wrong = []
    for n, (path, spec) in enumerate(_specs(expectations, where)):
        try:
            _built(spec, path, n, schema)
        except ContractInvalid as error:
            wrong += str(error).splitlines()
    return wrong


def validate(
    table: pa.Table,
    expectations: Sequence[ExpectationSpec | Mapping[str, Any]],
    *,
    name: str,
    where: str = "expectations",
) -> ContractResult:
    """Judge a table by expectations.

    ``name`` stands on the page; ``where`` is the path of ``expectations`` in its file, for messages. A column that is
    missing, that has no value at all (unless ``may_be_empty``) or that Great Expectations cannot judge is a failed
    result with the reason. Writes no file and asks nothing of the network. Raises ContractInvalid.
    """
    placed = _specs(expectations, where)
    outcome: dict[int, dict[str, Any]] = {}
    if placed:
        with without_collection():
            import great_expectations as gx
            from great_expectations.data_context.types import base

        built = [_built(spec, path, i, table.schema) for i, (path, spec) in enumerate(placed)]
        frame = _frame(table)
        integers = {f.name for f in table.schema if pa.types.is_integer(f.type)}
        asked = []
        for i, (_, spec) in enumerate(placed):
            judged = _unjudged(spec, frame)
            if judged is None:
                asked.append(built[i])
            else:
                outcome[i] = _result(spec, judged[0], {}, judged[1], integers)
        if asked:
            # Without a docs site, for which a temporary folder would be made each time.
            stores = base.InMemoryStoreBackendDefaults(init_temp_docs_sites=False)
            quiet = base.ProgressBarsConfig(globally=False)
            settings = base.DataContextConfig(store_backend_defaults=stores, progress_bars=quiet)
            context = gx.get_context(mode="ephemeral", project_config=settings)
            asset = context.data_sources.add_pandas("table").add_dataframe_asset("table")
            batch = asset.add_batch_definition_whole_dataframe("table").get_batch({"dataframe": frame})
            suite = gx.ExpectationSuite(name=name, expectations=asked)
            shape = {"result_format": "BASIC", "partial_unexpected_count": 200}
            for found in batch.validate(suite, result_format=shape).results:
                # Results come in another order than the suite.
                i = found.expectation_config.meta["index"]
                reason = _raised(found.exception_info)
                passed = bool(found.success) and reason is None
                outcome[i] = _result(placed[i][1], passed, found.result, reason, integers)
            lost = ", ".join(path for i, (path, _) in enumerate(placed) if i not in outcome)
            if lost:
                raise RuntimeError(f"{name}: Great Expectations gave no result for {lost}; report this as a bug")
    results = [outcome[i] for i in range(len(placed))]
    success = all(r["success"] for r in results)
    blocking = any(not r["success"] and r["severity"] == "error" for r in results)
    return ContractResult(name, success, blocking, results, _page(name, table.num_rows, results), table.num_rows)


def sentences(result: ContractResult, nothing: str) -> list[str]:
    """What a check says of a table: a sentence for each expectation that is not met.

    ``nothing`` is said of a table without a row, and nothing else: what sums, means and shares of no rows are tells nobody
    anything.
    """
    if result.rows == 0:
        return [nothing if not result.success else f"{nothing}, which the contract allows"]
    return [sentence(r) for r in result.results if not r["success"]]


def sentence(result: Mapping[str, Any]) -> str:
    """One result as a sentence for a check's description."""
    about = result["expectation"].removeprefix("expect_").replace("_", " ") + (
        f" ({shown(result['arguments'])})" if result["arguments"] else ""
    )
    text = f"{result['column']}: {about}" if result["column"] else about
    if result["success"] and not result["reason"]:
        return f"{text}: met"
    parts = [result["reason"]] if result["reason"] else []
    if result["unexpected_count"]:
        percent = result["unexpected_percent"]
        parts.append(f"{result['unexpected_count']} values" + (f" ({percent:.3g}%)" if percent is not None else ""))
    if result["examples"] and not result["reason"]:
        parts.append(f"such as {shown(result['examples'][:5])}")
    elif result["observed"] is not None and not result["reason"]:
        parts.append(f"found {shown(result['observed'])}")
    return f"{text}: {', '.join(parts) or 'not met'}"


def _page(name: str, rows: int, results: Sequence[Mapping[str, Any]]) -> str:
    def state(result: Mapping[str, Any]) -> tuple[State, str]:
        if result["success"]:
            return "good", "met"
        return ("bad", "FAILED") if result["severity"] == "error" else ("warn", "warning")

    failed = [r for r in results if not r["success"]]
    ordered = sorted(results, key=lambda r: (r["success"], r["severity"] != "error"))
    return page(
        f"Contract: {name}",
        Text([
            f"{rows} rows, {len(results)} expectations, {len(failed)} not met"
            f" ({sum(r['severity'] == 'error' for r in failed)} of them block what depends on this table).",
            "Judged by Great Expectations. Percentages are of the values that are not null.",
        ]),
        Table(["", "column", "expectation", "arguments", "observed", "failing values", "%", "examples", "remark"],
        [
            (
                state(r)[0],
                [state(r)[1], r["column"], r["expectation"], r["arguments"], r["observed"], r["unexpected_count"],
                 r["unexpected_percent"], r["examples"], r["reason"]],
            )
            for r in ordered
        ]),
    )  # fmt: skip
