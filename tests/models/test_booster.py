"""What a Booster promises: the same bytes from the same input, the same scores from its file, clear refusals."""

import logging
import signal
import subprocess
import sys
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


# --- Arrow, checkpoints -----------------------------------------------------------------------------------------------


def test_a_booster_from_an_arrow_table_is_the_one_from_the_matrix_to_the_bit(table, encoding, target):
    from decimal import Decimal

    rng = np.random.default_rng(2)
    more = {
        "whole": pa.array(rng.integers(-9, 9, table.num_rows), pa.int16()),
        "thin": pa.array(np.where(rng.random(table.num_rows) < 0.95, 0.0, 1.5), pa.float32()),
        "money": pa.array([None if i % 9 == 0 else Decimal(i % 13) / 4 for i in range(table.num_rows)]),
        "never": pa.nulls(table.num_rows),
    }
    wide = table
    for name, column in more.items():
        wide = wide.append_column(name, column)
    wide = pa.concat_tables([wide.slice(0, 700), wide.slice(700)])  # in chunks, as the lake gives it
    known = Encoding(("size", "count", "flag", *more), encoding.categorical)
    how: dict[str, Any] = {"encoding": known, "params": {"objective": "binary", "bagging_fraction": 0.6}}
    how |= {"rounds": 20, "seed": 3, "device": "cpu", "weight": 1 + rng.random(table.num_rows)}
    dense = booster.train(known.matrix(wide), target, **how)
    assert booster.booster_bytes(booster.train(known.arrow(wide), target, **how)) == booster.booster_bytes(dense)
    scores = booster.predict(dense, known.matrix(wide))
    assert booster.predict(dense, known.arrow(wide)).tobytes() == scores.tobytes()


def test_an_arrow_table_is_the_memory_of_the_rows_and_refuses_as_the_matrix_does(table, encoding):
    given = encoding.arrow(table)
    assert given["size"].chunk(0).buffers()[1].address == table["size"].chunk(0).buffers()[1].address
    with pytest.raises(KeyError, match="'count' is missing"):
        encoding.arrow(table.drop_columns(["count"]))
    with pytest.raises(TypeError, match=r"'kind'.*categorical"):
        Encoding(("kind",), {}).arrow(table)


@pytest.mark.parametrize("started", [None, 1.0], ids=["plain", "init_score"])
def test_a_checkpoint_at_the_end_only_changes_no_byte(table, encoding, target, tmp_path, started):
    init = None if started is None else np.full(table.num_rows, started)
    plain = train(table, encoding, target, init_score=init)
    kept = train(table, encoding, target, init_score=init, checkpoint=tmp_path / "c")
    assert booster.booster_bytes(kept) == booster.booster_bytes(plain)


def test_steps_learn_as_well_as_one_go_and_do_not_draw_the_same_rows_again(table, encoding, target, tmp_path):
    x, init = encoding.matrix(table), np.full(table.num_rows, 0.3)
    params = {"objective": "regression", "bagging_fraction": 0.5, "bagging_freq": 1, "feature_fraction": 0.6}
    one = train(table, encoding, target, params=params, init_score=init, rounds=60)
    steps = train(
        table, encoding, target, params=params, init_score=init, rounds=60, checkpoint=tmp_path / "c", every=7
    )
    assert steps.num_trees() == 60
    errors = [float(np.mean((0.3 + booster.predict(b, x, raw=True) - target) ** 2)) for b in (one, steps)]
    assert errors[1] < 1.2 * errors[0]
    # without new seeds the eighth tree would split on the columns that the first was allowed
    trees = steps.dump_model()["tree_info"]
    columns = [{f for f in _splits(tree["tree_structure"])} for tree in trees]
    assert columns[0:7] != columns[7:14]


def _splits(node: dict[str, Any]) -> list[int]:
    if "split_feature" not in node:
        return []
    return [node["split_feature"], *_splits(node["left_child"]), *_splits(node["right_child"])]


CHILD = """
import sys
from pathlib import Path
import numpy as np
from models import booster
rng = np.random.default_rng(0)
x = rng.normal(size=(3000, 6)); y = x[:, 0] * x[:, 1] + rng.normal(size=3000)
real = booster._Kept.write
def write(self, rounds, text):
    real(self, rounds, text)
    print(rounds, flush=True)
    if rounds == int(sys.argv[2]):
        sys.stdin.read()  # until the kill
booster._Kept.write = write
booster.train(x, y, encoding=booster.Encoding(tuple("abcdef"), {}), rounds=40, seed=3, device="cpu",
    params={"objective": "regression", "bagging_fraction": 0.5, "bagging_freq": 1, "feature_fraction": 0.5},
    init_score=np.ones(3000), checkpoint=Path(sys.argv[1]), every=10)
"""


@pytest.mark.slow
def test_a_killed_training_goes_on_and_gives_the_bytes_of_one_that_was_not(tmp_path, caplog):
    kept = tmp_path / "kept.booster"
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(kept), "20"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert [child.stdout.readline().strip() for _ in range(2)] == ["10", "20"]
        child.kill()
    assert child.returncode == -signal.SIGKILL

    rng = np.random.default_rng(0)
    x = rng.normal(size=(3000, 6))
    y = x[:, 0] * x[:, 1] + rng.normal(size=3000)
    params = {"objective": "regression", "bagging_fraction": 0.5, "bagging_freq": 1, "feature_fraction": 0.5}
    how: dict[str, Any] = {"encoding": Encoding(tuple("abcdef"), {}), "params": params, "rounds": 40, "seed": 3}
    how |= {"device": "cpu", "init_score": np.ones(3000), "every": 10}
    with caplog.at_level(logging.INFO):
        resumed = booster.train(x, y, checkpoint=kept, **how)
    assert "goes on after 20 rounds" in caplog.text
    whole = booster.train(x, y, checkpoint=tmp_path / "other", **how)
    assert booster.booster_bytes(resumed) == booster.booster_bytes(whole) and whole.num_trees() == 40
    assert kept.read_bytes() == (tmp_path / "other").read_bytes()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        ({"seed": 4}, "other data or settings"),
        ({"params": {"objective": "binary", "num_leaves": 7}}, "other data or settings"),
        ({"weight": np.full(1500, 2.0)}, "other data or settings"),
        (b"nonsense", "no checkpoint"),
        (b"text", "damaged"),
    ],
    ids=["seed", "params", "data", "nonsense", "damaged"],
)
def test_a_checkpoint_of_something_else_is_not_used_and_the_log_says_so(
    table, encoding, target, tmp_path, caplog, spoil, says
):
    file = tmp_path / "c"
    train(table, encoding, target, checkpoint=file)
    more: dict[str, Any] = spoil if isinstance(spoil, dict) else {}
    if spoil == b"nonsense":
        file.write_bytes(b"nonsense")
    elif spoil == b"text":
        file.write_bytes(file.read_bytes().replace(b"leaf_value=", b"leaf_value=9", 1))
    with caplog.at_level(logging.WARNING):
        found = train(table, encoding, target, checkpoint=file, **more)
    assert says in caplog.text
    assert booster.booster_bytes(found) == booster.booster_bytes(train(table, encoding, target, **more))


def test_within_resumable_finished_trainings_are_read_and_the_files_go_when_all_is_done(
    table, encoding, target, tmp_path, monkeypatch
):
    import lightgbm as lgb

    trained: list[int] = []
    real = lgb.train
    monkeypatch.setattr(lgb, "train", lambda *a, **k: (trained.append(1), real(*a, **k))[1])
    folder = tmp_path / "kept"
    plain = [booster.booster_bytes(train(table, encoding, target, seed=s)) for s in (3, 4)]
    trained.clear()
    with pytest.raises(RuntimeError), booster.resumable(folder):
        train(table, encoding, target, seed=3)
        raise RuntimeError("the work was cut short")
    with booster.resumable(folder):
        again = [booster.booster_bytes(train(table, encoding, target, seed=s)) for s in (3, 4)]
    assert again == plain and len(trained) == 2, "the first was read, the second trained"
    assert not list(folder.iterdir())


def test_a_checkpoint_and_early_stopping_do_not_go_together(table, encoding, target, tmp_path):
    x = encoding.matrix(table)
    with pytest.raises(ValueError, match="do not go together"):
        train(table, encoding, target, checkpoint=tmp_path / "c", valid=(x, target), early_stopping=3)


def test_gains_go_by_the_names_of_the_table_whatever_lightgbm_makes_of_them() -> None:
    """LightGBM keeps `cost per click` as `cost_per_click`: under that name no column of the table would find its weight."""
    rng = np.random.default_rng(1)
    rows = pa.table({"cost per click": rng.normal(size=400), "other": rng.normal(size=400)})
    encoding = Encoding.learn(rows, ["cost per click", "other"], [])
    how: dict[str, Any] = {
        "encoding": encoding,
        "params": {"objective": "regression"},
        "rounds": 10,
        "seed": 1,
        "device": "cpu",
    }
    one = booster.train(encoding.matrix(rows), 10 * rows["cost per click"].to_numpy(), **how)
    flat = booster.train(encoding.matrix(rows), np.zeros(400), **how)
    found = booster.gains([one, flat], encoding)
    assert one.feature_name()[0] == "cost_per_click" and found["cost per click"] > 0.9
    assert sum(found.values()) == pytest.approx(1.0)
    assert booster.gains([flat], encoding) == {"cost per click": 0.0, "other": 0.0}
