"""Contracts: what breaks a promise is found with counts and examples, and what could not be judged never passes."""

import json
import os
import socket
import tempfile
from datetime import date, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from pydantic import ValidationError

from data_checks.contract import (
    ContractInvalid,
    ContractResult,
    ExpectationSpec,
    expectation_names,
    implied,
    sentence,
    sentences,
    validate,
)

ROWS = 200


@pytest.fixture(scope="module")
def table() -> pa.Table:
    n = range(ROWS)
    return pa.table(
        {
            "id": [f"t{i}" for i in n],
            "team": [None if i % 10 == 0 else f"team {i % 4}" for i in n],
            "priority": pa.array([None if i % 5 == 0 else 9 if i % 50 == 1 else 1 + i % 5 for i in n], pa.int64()),
            "cost": [float(i) for i in n],
            "big": pa.array([None if i == 0 else 2**60 + i for i in n], pa.int64()),
            "empty": pa.nulls(ROWS, pa.float64()),
            "opened_at": pa.array([datetime(2016, 5, 1) + timedelta(hours=i) for i in n], pa.timestamp("us")),
            "opened_on": pa.array([date(2016, 5, 1) + timedelta(days=i % 28) for i in n], pa.date32()),
        }
    )


def judge(table: pa.Table, *expectations: Any) -> ContractResult:
    return validate(table, expectations, name="tickets events 2016-05-01")


def test_failing_values_are_counted_and_shown(table: pa.Table) -> None:
    result = judge(
        table, {"type": "expect_column_values_to_be_between", "column": "priority", "min_value": 1, "max_value": 5}
    )
    (found,) = result.results
    assert not result.success and result.blocking_failed
    assert (found["unexpected_count"], found["examples"]) == (4, [9])
    assert found["unexpected_percent"] == pytest.approx(100 * 4 / 160)
    assert type(found["examples"][0]) is int, "a nullable whole number must not be shown as 9.0"
    assert "4 values (2.5%), such as 9" in sentence(found)
    assert "priority" in result.html and ">9<" in result.html and "FAILED" in result.html


def test_a_warning_does_not_block_but_is_no_success(table: pa.Table) -> None:
    result = judge(table, {"type": "expect_column_values_to_not_be_null", "column": "team", "severity": "warn"})
    assert not result.success and not result.blocking_failed
    assert result.results[0]["unexpected_count"] == 20 and "warning" in result.html


def test_results_stand_in_the_order_given_with_what_was_observed(table: pa.Table) -> None:
    result = judge(
        table,
        {"type": "expect_table_row_count_to_be_between", "min_value": 1, "max_value": 500},
        {"type": "expect_column_values_to_be_in_set", "column": "team", "value_set": ["team 1", "team 2", "team 3"]},
        {"type": "expect_column_mean_to_be_between", "column": "cost", "max_value": 50},
        {"type": "expect_column_values_to_be_unique", "column": "id"},
        {"type": "expect_compound_columns_to_be_unique", "column_list": ["team", "priority"]},
        {"type": "expect_column_to_exist", "column": "gone"},
    )
    assert [r["expectation"].split("_to_")[0] for r in result.results] == [
        "expect_table_row_count", "expect_column_values", "expect_column_mean", "expect_column_values",
        "expect_compound_columns", "expect_column",
    ]  # fmt: skip
    assert [r["success"] for r in result.results] == [True, False, False, True, False, False]
    assert [r["observed"] for r in result.results][::2] == [ROWS, 99.5, None]
    assert result.results[1]["examples"] == ["team 0"]
    assert json.loads(json.dumps(result.results)) == result.results


def test_a_missing_column_fails_with_its_name(table: pa.Table) -> None:
    result = judge(table, {"type": "expect_column_values_to_be_between", "column": "costs", "min_value": 0})
    assert result.blocking_failed and "'costs' is missing" in result.results[0]["reason"]


def test_an_error_inside_great_expectations_fails_with_its_reason(table: pa.Table) -> None:
    result = judge(
        table,
        {"type": "expect_column_mean_to_be_between", "column": "team", "min_value": 0},
        {"type": "expect_column_values_to_match_regex", "column": "team", "regex": "("},
        {"type": "expect_column_values_to_be_between", "column": "cost", "min_value": 0},
    )
    assert [r["success"] for r in result.results] == [False, False, True]
    assert all("could not judge" in r["reason"] for r in result.results[:2])


def test_a_column_without_any_value_fails_unless_it_may_be_empty(table: pa.Table) -> None:
    entry = {"type": "expect_column_values_to_be_between", "column": "empty", "min_value": 0}
    assert "all 200 values of 'empty' are null" in judge(table, entry).results[0]["reason"]
    allowed = judge(table, {**entry, "may_be_empty": True}).results[0]
    assert allowed["success"] and "no value to judge" in allowed["reason"]
    assert not judge(
        table, {"type": "expect_column_values_to_not_be_null", "column": "empty", "may_be_empty": True}
    ).success


def test_whole_numbers_beyond_2_to_the_53_keep_their_digits(table: pa.Table) -> None:
    assert judge(table, {"type": "expect_column_values_to_be_unique", "column": "big"}).success
    found = judge(
        table, {"type": "expect_column_values_to_be_between", "column": "big", "max_value": float(2**60)}
    ).results[0]
    assert found["examples"][0] == 2**60 + 1


@pytest.mark.parametrize("bound", [date(2016, 5, 3), "2016-05-03", datetime(2016, 5, 3), "2016-05-03T00:00:00"])
def test_a_midnight_bounds_a_column_of_timestamps(table: pa.Table, bound: object) -> None:
    later = judge(
        table, {"type": "expect_column_values_to_be_between", "column": "opened_at", "max_value": bound}
    ).results[0]
    assert (later["unexpected_count"], later["reason"]) == (ROWS - 49, None)
    at = judge(
        table,
        {"type": "expect_column_values_to_be_between", "column": "opened_at", "max_value": bound, "strict_max": True},
    )
    assert at.results[0]["unexpected_count"] == ROWS - 48
    before = judge(
        table, {"type": "expect_column_min_to_be_between", "column": "opened_at", "min_value": bound}
    ).results[0]
    assert not before["success"] and before["observed"] == "2016-05-01T00:00:00"
    days = judge(
        table, {"type": "expect_column_values_to_be_between", "column": "opened_on", "min_value": bound}
    ).results[0]
    assert days["unexpected_count"] == sum(i % 28 < 2 for i in range(ROWS))


def test_an_unknown_expectation_is_refused_with_near_matches_when_the_file_is_read() -> None:
    with pytest.raises(ValidationError, match=r"did you mean .*'expect_column_mean_to_be_between'"):
        ExpectationSpec(type="expect_column_means_to_be_between")
    with pytest.raises(ContractInvalid, match=r"events.expectations\[0\]\.type: unknown expectation 'no_such_thing'"):
        validate(pa.table({"a": [1]}), [{"type": "no_such_thing"}], name="x", where="events.expectations")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"column": "cost", "min_valu": 1},
            r"expectations\[0\]\.min_valu: unknown argument .*did you mean 'min_value'",
        ),
        (
            {"column": "cost", "min_value": 1, "catch_exceptions": False},
            r"expectations\[0\]\.catch_exceptions: unknown argument",
        ),
        ({"column": "cost"}, r"expectations\[0\]: .*would judge nothing"),
        ({"min_value": 1}, r"expectations\[0\]\.column: field required"),
        ({"column": "cost", "min_value": "many"}, r"expectations\[0\]\.min_value: value is not a valid float"),
        ({"column": "cost", "min_value": 1, "severity": "fatal"}, r"expectations\[0\]\.severity: .*'error' or 'warn'"),
    ],
)
def test_wrong_arguments_are_refused_with_their_place(table: pa.Table, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ContractInvalid, match=message):
        # What columns imply stands before the file's own entries and must not move their numbers.
        validate(table, [*implied(promise()), {"type": "expect_column_mean_to_be_between", **arguments}], name="x")
    good = {"type": "expect_column_to_exist", "column": "cost"}
    with pytest.raises(ContractInvalid, match=message.replace("[0", "[2")):
        judge(table, good, good, {"type": "expect_column_mean_to_be_between", **arguments})


def test_the_names_known_without_importing_are_those_of_the_registry() -> None:
    import great_expectations  # noqa: F401
    from great_expectations.expectations.registry import list_registered_expectation_implementations

    assert {n for n in list_registered_expectation_implementations() if n.startswith("expect_")} <= set(
        expectation_names()
    )


def promise(**columns: dict[str, Any]) -> Any:
    blank = {"required": False, "min": None, "max": None, "allowed": None}
    return SimpleNamespace(
        columns={name: SimpleNamespace(**{**blank, **said}) for name, said in columns.items()}, unique=()
    )


def test_columns_imply_presence_nulls_bounds_and_allowed_values(table: pa.Table) -> None:
    events = promise(
        id={"required": True},
        team={"required": True, "allowed": ("team 0", "team 1", "team 2")},
        priority={"min": 1, "max": 5},
        cost={"min": 0},
        empty={"max": 1},
        gone={},
    )
    events.unique = ("id",)
    result = validate(table, implied(events), name="x")
    failed = {(r["column"], r["expectation"]) for r in result.results if not r["success"]}
    assert failed == {
        (None, "expect_table_columns_to_match_set"),
        ("team", "expect_column_values_to_not_be_null"),
        ("team", "expect_column_values_to_be_in_set"),
        ("priority", "expect_column_values_to_be_between"),
    }
    assert result.results[0]["examples"] == ["gone"] and "missing: gone" in sentence(result.results[0])
    assert result.results[-1]["expectation"] == "expect_column_values_to_be_unique"


def test_duplicates_over_several_columns_are_implied_by_unique(table: pa.Table) -> None:
    events = promise(team={}, priority={})
    events.unique = ("team", "priority")
    assert [r["success"] for r in validate(table, implied(events), name="x").results] == [True, False]


def test_no_expectations_is_a_success_that_says_so(table: pa.Table) -> None:
    result = judge(table)
    assert result.success and result.results == [] and "0 expectations" in result.html


def test_the_page_is_the_same_each_time_needs_no_network_and_cannot_run_what_the_data_say() -> None:
    nasty = pa.table({"a": ["<script>alert(1)</script>", "b"]})
    entry = {"type": "expect_column_values_to_be_in_set", "column": "a", "value_set": ["b"]}
    pages = [validate(nasty, [entry], name="<b>x</b>").html for _ in range(2)]
    assert pages[0] == pages[1]
    assert "&lt;script&gt;alert(1)" in pages[0] and "<script" not in pages[0] and "<b>x" not in pages[0]
    assert "://" not in pages[0]


def test_judging_writes_no_file_and_calls_nobody(
    table: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("judging a contract must not use the network or the disk")

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(tempfile, "TemporaryDirectory", refuse)
    assert judge(table, {"type": "expect_table_row_count_to_be_between", "min_value": 1}).success
    assert os.listdir(tmp_path) == []


def test_of_a_table_without_a_row_one_sentence_is_said(table: pa.Table) -> None:
    rows = {"type": "expect_table_row_count_to_be_between", "min_value": 1}
    odd = [
        {"type": "expect_column_sum_to_be_between", "column": "cost", "min_value": 0, "strict_min": True},
        {"type": "expect_column_mean_to_be_between", "column": "priority", "min_value": 0},
        {"type": "expect_column_values_to_not_be_null", "column": "id"},
    ]
    nothing = judge(table.slice(0, 0), *odd, rows)
    assert nothing.blocking_failed and sentences(nothing, "no event has landed") == ["no event has landed"]
    assert "0 rows, at least 1 must be there" in sentence(nothing.results[-1])
    allowed = judge(table.slice(0, 0), odd[-1])
    assert sentences(allowed, "no event has landed") == ["no event has landed, which the contract allows"]
    few = judge(table.slice(0, 2), {**rows, "min_value": 5, "max_value": 9})
    assert sentences(few, "no event has landed") == [sentence(few.results[0])]
    assert "2 rows, at least 5, at most 9 must be there" in sentence(few.results[0])
    assert sentences(judge(table, rows), "no event has landed") == []
