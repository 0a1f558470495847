"""Rows as pandas become what the lake has again, and the signature takes them whether nulls are there or not."""

from __future__ import annotations

from datetime import date, datetime
from decimal import Decimal
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

from models import registry, serving
from models.learners.response import SPEND_SHIFTS

COLUMNS = pa.schema(
    {
        "text": pa.string(),
        "whole": pa.int64(),
        "number": pa.float64(),
        "mark": pa.bool_(),
        "day": pa.date32(),
        "moment": pa.timestamp("us"),
        "money": pa.decimal128(38, 2),
    }
)
ROW: dict[str, Any] = {
    "text": "a", "whole": 3, "number": 0.1, "mark": True, "day": date(2026, 3, 2), "moment": datetime(2026, 3, 2, 4, 5, 6),
    "money": Decimal("12.50"),
}  # fmt: skip
FULL = pa.Table.from_pylist([ROW, {**ROW, "whole": 4, "mark": False}], COLUMNS)
HOLED = pa.Table.from_pylist([ROW, dict.fromkeys(ROW)], COLUMNS)
EMPTY = pa.Table.from_pylist([dict.fromkeys(ROW)], COLUMNS)


def served(nulls: pa.Table) -> serving.Served:
    """Of a model that was trained on rows like these."""
    columns = pa.schema([pa.field(f.name, f.type, nullable=False) for f in COLUMNS])
    holes = frozenset(name for name in COLUMNS.names if nulls[name].null_count)
    return serving.Served(columns, holes, FULL, pa.table({"score": [1.0], "values": [[1, 2]]}))


@pytest.mark.parametrize("rows", [FULL, HOLED, EMPTY], ids=["full", "holed", "empty"])
def test_pandas_and_back_is_the_same_table(rows: pa.Table) -> None:
    assert serving.rows_of(rows.to_pandas(), COLUMNS).equals(rows)


def test_rows_of_json_are_the_same_table() -> None:
    """Dates and decimals are texts there, and whole numbers beside a null are floats."""
    said = [
        {k: v if isinstance(v, str | int | float | None) else str(v) for k, v in row.items()}
        for row in HOLED.to_pylist()
    ]
    assert serving.rows_of(pd.DataFrame(said), COLUMNS).equals(HOLED)


@pytest.mark.parametrize("rows", [FULL, HOLED], ids=["full", "holed"])
@pytest.mark.parametrize("trained", [FULL, HOLED], ids=["trained full", "trained holed"])
def test_the_signature_takes_what_training_saw_with_nulls_and_without(rows: pa.Table, trained: pa.Table) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.models.utils import _enforce_schema

    takes = registry._signature(served(trained)).inputs
    if trained is FULL and rows is HOLED:
        with pytest.raises(MlflowException, match=r"column whole.*missing values"):
            _enforce_schema(rows.to_pandas(), takes)
        return
    assert serving.rows_of(_enforce_schema(rows.to_pandas(), takes), COLUMNS).equals(rows)


def test_types_are_named_as_mlflow_names_them() -> None:
    full, holed = (
        {one.name: str(one.type) for one in registry._signature(served(rows)).inputs} for rows in (FULL, HOLED)
    )
    assert full == {
        "text": "DataType.string", "whole": "DataType.long", "number": "DataType.double", "mark": "DataType.boolean",
        "day": "DataType.datetime", "moment": "DataType.datetime", "money": "Any",
    }  # fmt: skip
    assert {name for name in full if full[name] != holed[name]} == {"whole", "mark"} and holed["whole"] == "Any"
    gives = registry._signature(served(FULL)).outputs.to_dict()
    assert gives[1] == {"type": "array", "items": {"type": "long"}, "name": "values", "required": True}


@pytest.mark.parametrize(
    ("column", "value"), [("whole", 1.5), ("whole", "many"), ("day", "soon"), ("mark", "perhaps"), ("number", object())]
)
def test_a_value_of_another_type_is_refused_with_its_column(column: str, value: Any) -> None:
    frame = pd.DataFrame([{**ROW, column: value}])
    with pytest.raises(ValueError, match=column):
        serving.rows_of(frame, COLUMNS)


def test_what_a_learner_reads_is_all_that_it_needs(ads: Any, queue: Any) -> None:
    from pipeline import point_in_time

    for bench in (ads, queue):
        model = bench.fit(bench.last)
        rows = point_in_time.training_set(bench.workflow, bench.lake, bench.last)
        told = serving.describe(bench.workflow.model.kind, model, rows)
        assert not set(told.columns.names) & set(SPEND_SHIFTS)
        read = rows.select(told.columns.names)
        assert model.score(read).equals(model.score(rows))
        for name in told.columns.names:
            if name in model.encoding.names:
                with pytest.raises(KeyError, match=name):
                    model.score(read.drop_columns([name]))


def test_the_example_says_nothing_that_the_files_do_not(queue: Any) -> None:
    from pipeline import point_in_time

    model = queue.fit(queue.last)
    rows = point_in_time.training_set(queue.workflow, queue.lake, queue.last)
    rare = rows.set_column(
        rows.schema.get_field_index("opened_by"), "opened_by", pa.array(["J. Doe"] * rows.num_rows, pa.string())
    )
    told = serving.describe("duration", model, rare)
    assert told.example["opened_by"].null_count == told.example.num_rows == serving.EXAMPLES
    assert not set(told.example["entity_id"].to_pylist()) & set(rows["entity_id"].to_pylist())
    assert told.scores.num_rows == serving.EXAMPLES
