"""A value that is missing where none was in training is no zero: it is named, and its row has no score."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from models.booster import Encoding, predict, train
from models.learners.duration import DurationLearner
from models.learners.response import ResponseLearner
from tests.models.learners import test_duration, test_response


def blanked(table: pa.Table, name: str, rows: int) -> pa.Table:
    """The table with the first values of a column gone."""
    values = table[name].combine_chunks()
    empty = pc.if_else(pa.array(np.arange(len(values)) < rows), pa.scalar(None, values.type), values)
    return table.set_column(table.schema.get_field_index(name), name, empty)


@pytest.fixture(scope="module")
def learned() -> dict[str, tuple[Any, pa.Table, str]]:
    """Learners, the rows of their last day, and a column without a missing value in training."""
    queue, _ = test_duration.tickets(n=600)
    lines = test_response.rows(lines=20, days=12)
    how: dict[str, Any] = {"seed": 1, "device": "cpu", "threads": 1}
    return {
        "duration": (
            DurationLearner.fit(queue, {**test_duration.SPEC, "rounds": 5}, **how),
            queue.slice(550),
            "priority",
        ),
        "response": (
            ResponseLearner.fit(lines, {**test_response.SPEC, "rounds": 5}, **how),
            lines.slice(220),
            "shift_1",
        ),
    }


def test_lightgbm_itself_reads_such_a_value_as_a_zero() -> None:
    """Why this is needed at all."""
    x = np.random.default_rng(1).normal(size=(400, 1))
    table = pa.table({"a": x[:, 0]})
    encoding = Encoding.learn(table, ["a"], [])
    booster = train(
        encoding.matrix(table), 10 * x[:, 0], encoding=encoding, params={"objective": "regression"}, rounds=20, seed=1, device="cpu"
    )  # fmt: skip
    assert predict(booster, np.array([[np.nan]])) == predict(booster, np.array([[0.0]]))


@pytest.mark.parametrize("kind", ["duration", "response"])
def test_its_row_has_no_score_and_is_named_and_no_other_is_touched(
    learned: dict[str, tuple[Any, pa.Table, str]], kind: str
) -> None:
    model, rows, column = learned[kind]
    whole = model.score(rows)
    assert model.unread(rows) == {}
    broken = blanked(rows, column, 3)
    scores = model.score(broken)
    assert model.unread(broken) == {column: rows["entity_id"].to_pylist()[:3]}
    assert scores.schema == whole.schema and scores.slice(3).equals(whole.slice(3))
    keys = [k for k in ("entity_id", "moment") if k in scores.schema.names]
    assert scores.select(keys).equals(whole.select(keys))
    assert all(scores[c].slice(0, 3).null_count == 3 for c in scores.schema.names if c not in keys)
    # as NaN it is the same
    if pa.types.is_floating(rows.schema.field(column).type):
        place = rows.schema.get_field_index(column)
        nan = rows.set_column(place, column, pa.array(pc.fill_null(broken[column], float("nan")).to_numpy()))
        assert model.unread(nan) == model.unread(broken)


@pytest.mark.parametrize("kind", ["duration", "response"])
def test_a_column_with_missing_values_in_training_is_scored_as_it_was(kind: str) -> None:
    how: dict[str, Any] = {"seed": 1, "device": "cpu", "threads": 1}
    if kind == "duration":
        rows = blanked(test_duration.tickets(n=600)[0], "priority", 40)
        model: Any = DurationLearner.fit(rows, {**test_duration.SPEC, "rounds": 5}, **how)
        column = "priority"
    else:
        rows, column = blanked(test_response.rows(lines=20, days=12), "shift_1", 40), "shift_1"
        model = ResponseLearner.fit(rows, {**test_response.SPEC, "rounds": 5}, **how)
    last = blanked(rows.slice(rows.num_rows - 50), column, 5)
    assert model.unread(last) == {}
    assert all(model.score(last)[c].null_count == 0 for c in ("p_miss", "level") if c in model.score(last).schema.names)


@pytest.mark.parametrize("kind", ["duration", "response"])
def test_a_model_from_before_it_was_kept_scores_as_it_did(
    learned: dict[str, tuple[Any, pa.Table, str]], kind: str
) -> None:
    model, rows, column = learned[kind]
    files = model.files()
    meta = json.loads(files["meta.json"])
    assert column not in meta["encoding"].pop("nulls")
    dumped: Callable[[Any], bytes] = lambda m: (  # noqa: E731
        json.dumps(m, ensure_ascii=False, **({"indent": 1} if kind == "duration" else {"sort_keys": True})).encode()
    )
    old = type(model).from_files({**files, "meta.json": dumped(meta)})
    broken = blanked(rows, column, 3)
    assert old.unread(broken) == {} and old.score(broken).slice(3).equals(model.score(broken).slice(3))
    assert old.score(broken)["entity_id"].equals(broken["entity_id"])
    assert old.files()["meta.json"] == dumped(meta), "and keeps its digest"
    again = type(model).from_files(files)
    assert again.files() == files and again.unread(broken) == model.unread(broken)
