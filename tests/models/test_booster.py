"""What a Booster promises: the same bytes from the same input, the same scores from its file, clear refusals."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from models import booster
from models.booster import DeviceMissing, Encoding, WrongDigest


@pytest.fixture(scope="module")
def table() -> pa.Table:
    rng = np.random.default_rng(7)
    n = 1500
    return pa.table(
        {
            "size": rng.normal(size=n),
            "count": pa.array([None if i % 7 == 0 else i % 5 for i in range(n)], pa.int64()),
            "flag": pa.array([i % 3 == 0 for i in range(n)]),
            "kind": pa.array([None if i % 50 == 0 else f"k{i}" for i in rng.integers(0, 12, n)]),
        }
    )


@pytest.fixture(scope="module")
def encoding(table: pa.Table) -> Encoding:
    return Encoding.learn(table, ["size", "count", "flag"], ["kind"])


@pytest.fixture(scope="module")
def target(table: pa.Table) -> np.ndarray:
    kind = np.array([k in ("k1", "k4") for k in table["kind"].to_pylist()])
    return (table["size"].to_numpy() + kind > 0.5).astype(float)


def train(table: pa.Table, encoding: Encoding, target: np.ndarray, **more: Any) -> Any:
    settings: dict[str, Any] = {"params": {"objective": "binary", "bagging_fraction": 0.5, "bagging_freq": 1}}
    settings |= {"rounds": 20, "seed": 3}
    settings |= {"device": "cpu", **more}
    return booster.train(encoding.matrix(table), target, encoding=encoding, **settings)


def test_the_same_input_gives_the_same_bytes_and_another_seed_others(table, encoding, target):
    first, again, other = (booster.booster_bytes(train(table, encoding, target, seed=s)) for s in (3, 3, 4))
    assert first == again
    assert first != other


def test_scores_are_equal_to_the_bit_after_saving_and_loading(table, encoding, target):
    model = train(table, encoding, target)
    text = booster.booster_bytes(model)
    loaded = booster.read_booster(text, booster.digest(text))
    x = encoding.matrix(table)
    assert booster.predict(loaded, x).tobytes() == booster.predict(model, x).tobytes()
    assert booster.booster_bytes(loaded) == text


def test_a_row_scores_the_same_alone_as_in_any_company(table, encoding, target):
    model, x = train(table, encoding, target), encoding.matrix(table)
    together = booster.predict(model, x)
    alone = np.concatenate([booster.predict(model, x[i : i + 1]) for i in range(50)])
    assert alone.tobytes() == together[:50].tobytes()
    assert booster.predict(model, x[::-1], threads=2)[::-1].tobytes() == together.tobytes()


def test_a_file_with_another_digest_is_refused(table, encoding, target):
    text = booster.booster_bytes(train(table, encoding, target))
    tampered = text.replace(b"leaf_value=", b"leaf_value=9", 1)
    assert tampered != text
    with pytest.raises(WrongDigest, match=booster.digest(text)):
        booster.read_booster(tampered, booster.digest(text))


def test_categories_are_known_by_their_text_whatever_the_order_of_rows(table, encoding):
    shuffled = table.take(np.random.default_rng(0).permutation(table.num_rows))
    assert Encoding.learn(shuffled, ["size", "count", "flag"], ["kind"]) == encoding
    codes = encoding.matrix(table)[:, 3]
    for kind, code in zip(table["kind"].to_pylist(), codes, strict=True):
        assert np.isnan(code) if kind is None else encoding.categorical["kind"][int(code)] == kind


def test_null_and_unseen_values_are_nan_and_still_score(table, encoding, target):
    strange = pa.table({"size": [float("nan")], "count": pa.array([None], pa.int64()), "flag": [True], "kind": ["new"]})
    row = encoding.matrix(strange)
    assert np.isnan(row[0]).tolist() == [True, True, False, True]
    assert np.isfinite(booster.predict(train(table, encoding, target), row)).all()


def test_rare_categories_and_those_beyond_the_limit_are_not_kept():
    table = pa.table({"kind": ["a"] * 9 + ["b"] * 6 + ["c"] * 6 + ["d"] * 2})
    assert Encoding.learn(table, [], ["kind"], min_count=3).categorical["kind"] == ("a", "b", "c")
    assert Encoding.learn(table, [], ["kind"], max_categories=2, min_count=1).categorical["kind"] == ("a", "b")


def test_a_missing_column_is_named(table, encoding):
    with pytest.raises(KeyError, match="'count' is missing"):
        encoding.matrix(table.drop_columns(["count"]))


def test_text_where_a_number_belongs_is_refused_with_the_way_out(table):
    with pytest.raises(TypeError, match=r"'kind'.*categorical"):
        Encoding(("kind",), {}).matrix(table)


def test_an_encoding_survives_json(encoding):
    assert Encoding.from_json(encoding.to_json()) == encoding


def test_early_stopping_keeps_the_rounds_up_to_the_best(table, encoding):
    noise = np.random.default_rng(1).random(table.num_rows).round()
    x = encoding.matrix(table)
    held = (x[1000:], noise[1000:])
    model = train(table.slice(0, 1000), encoding, noise[:1000], rounds=300, valid=held, early_stopping=5)
    assert 1 <= model.num_trees() < 300


def test_the_columns_that_moved_a_score_most_come_first(table, encoding, target):
    model = train(table, encoding, target)
    found = booster.top_contributions(model, encoding, table.slice(0, 40), top=2)
    effects = booster.predict(model, encoding.matrix(table.slice(0, 40)), contributions=True)
    raw = booster.predict(model, encoding.matrix(table.slice(0, 40)), raw=True)
    np.testing.assert_allclose(effects.sum(axis=1), raw, atol=1e-9)
    for row, values in zip(found.to_pylist(), effects[:, :-1], strict=True):
        assert row["features"][0] == encoding.names[int(np.argmax(np.abs(values)))]
        assert abs(row["effects"][0]) >= abs(row["effects"][1])


def test_a_device_that_cannot_train_is_an_error_and_auto_falls_back(monkeypatch, table, encoding, target):
    monkeypatch.setattr(booster, "_fault", lambda device: f"no {device} in this test")
    for device in ("gpu", "cuda"):
        with pytest.raises(DeviceMissing, match=rf"{device}.*no {device} in this test.*device: auto"):
            train(table, encoding, target, device=device)
    assert booster.resolve_device("auto") == "cpu"
    with pytest.raises(ValueError, match="auto, cpu, gpu, cuda"):
        booster.resolve_device("tpu")


def test_auto_takes_a_device_that_trains(monkeypatch):
    monkeypatch.setattr(booster, "_fault", lambda device: None if device == "gpu" else "missing")
    assert booster.resolve_device("auto") == "gpu"


def test_nothing_to_train_on_is_an_error(table, encoding):
    with pytest.raises(ValueError, match="no rows"):
        train(table.slice(0, 0), encoding, np.zeros(0))
