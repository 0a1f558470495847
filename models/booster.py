"""LightGBM Boosters as this project uses them: categories as integers, deterministic training, files read by digest.

Belongs here: the encoding of a table as a matrix, training, prediction, the text file and its digest, devices.
Does not: what a model means (``models/learners``), the registry, choosing features, anything pickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

if TYPE_CHECKING:
    import lightgbm

log = logging.getLogger(__name__)

NUMBERS = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_null, pa.types.is_decimal)
DEVICES = ("auto", "cpu", "gpu", "cuda")


class DeviceMissing(RuntimeError):
    """The device asked for cannot train here."""


class WrongDigest(ValueError):
    """A model file is not the one that was registered."""


@dataclass(frozen=True)
class Encoding:
    """How a table becomes a matrix: numeric columns as they are, categories as their place in a learned list.

    numeric: names of numeric or boolean columns, in the order of the matrix.
    categorical: name -> known categories; code i stands for the i-th. These columns follow the numeric ones.
    """

    numeric: tuple[str, ...]
    categorical: dict[str, tuple[str, ...]]

    @classmethod
    def learn(
        cls,
        table: pa.Table,
        numeric: Sequence[str],
        categorical: Sequence[str],
        *,
        max_categories: int = 400,
        min_count: int = 5,
    ) -> Encoding:
        """Learns the categories that occur at least `min_count` times, the `max_categories` commonest of each column.

        Ties are broken by name, so the same rows in any order give the same encoding.
        """
        known = {}
        for name in categorical:
            counts = pc.value_counts(_column(table, name).cast(pa.string())).to_pylist()
            pairs = [
                (-row["counts"], row["values"])
                for row in counts
                if row["values"] is not None and row["counts"] >= min_count
            ]
            known[name] = tuple(value for _, value in sorted(pairs)[:max_categories])
        return cls(tuple(numeric), known)

    @property
    def names(self) -> list[str]:
        """The columns of the matrix, in order."""
        return [*self.numeric, *self.categorical]

    def matrix(self, table: pa.Table) -> np.ndarray:
        """The table as float64 of shape (rows, columns). NULL, NaN and a category never seen are NaN.

        Raises KeyError for a missing column and TypeError for a numeric column of another type, naming it.
        """
        out = np.empty((table.num_rows, len(self.names)), dtype=np.float64)
        for i, name in enumerate(self.numeric):
            column = _column(table, name)
            kind = column.type
            if not any(is_kind(kind) for is_kind in NUMBERS):
                raise TypeError(f"column {name!r} is {kind} and listed under `numeric`: list it under `categorical`")
            if pa.types.is_boolean(kind):
                column = column.cast(pa.int8())
            out[:, i] = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        for i, (name, known) in enumerate(self.categorical.items(), start=len(self.numeric)):
            codes = pc.index_in(_column(table, name).cast(pa.string()), value_set=pa.array(known, pa.string()))
            out[:, i] = codes.cast(pa.float64()).to_numpy(zero_copy_only=False)
        return out

    def to_json(self) -> str:
        return json.dumps({"numeric": self.numeric, "categorical": self.categorical}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> Encoding:
        raw = json.loads(text)
        return cls(tuple(raw["numeric"]), {name: tuple(known) for name, known in raw["categorical"].items()})


def _column(table: pa.Table, name: str) -> pa.ChunkedArray:
    if name not in table.column_names:
        raise KeyError(f"column {name!r} is missing: the model needs it, the table has {', '.join(table.column_names)}")
    return table.column(name)


def train(
    x: np.ndarray,
    y: np.ndarray,
    *,
    encoding: Encoding,
    params: Mapping[str, Any],
    rounds: int,
    seed: int,
    device: str = "auto",
    threads: int = 1,
    weight: np.ndarray | None = None,
    init_score: np.ndarray | None = None,
    valid: tuple[np.ndarray, np.ndarray] | None = None,
    early_stopping: int | None = None,
) -> lightgbm.Booster:
    """Trains a Booster on `x` (rows, columns of `encoding`) and `y`: the same input and device give the same bytes.

    params: LightGBM parameters (objective, num_leaves, ...); seeds, threads and determinism are set here.
    valid: (x, y) watched for `early_stopping` rounds; the rounds after the best one are dropped.
    Returns the Booster as read back from its own text, so that what is evaluated is what is stored.
    Raises DeviceMissing where the device cannot train.
    """
    import lightgbm as lgb

    if len(x) == 0:
        raise ValueError("no rows to train on: widen the training window or wait for outcomes to mature")
    settings = {
        "verbosity": -1,
        **params,
        "seed": seed,
        "deterministic": True,
        "force_row_wise": True,
        "num_threads": threads,
        "device_type": resolve_device(device),
    }
    categories = list(range(len(encoding.numeric), len(encoding.names)))
    data = lgb.Dataset(
        x,
        y,
        weight=weight,
        init_score=init_score,
        feature_name=encoding.names,
        categorical_feature=categories,
        params=settings,
    )
    watched = [] if valid is None else [lgb.Dataset(*valid, reference=data)]
    calls: list[Any] = [lgb.early_stopping(early_stopping, verbose=False)] if watched and early_stopping else []
    booster = lgb.train(settings, data, num_boost_round=rounds, valid_sets=watched, callbacks=calls)
    return lgb.Booster(model_str=booster.model_to_string())


def predict(
    booster: lightgbm.Booster, x: np.ndarray, *, threads: int = 1, raw: bool = False, contributions: bool = False
) -> np.ndarray:
    """Predictions of shape (rows,), each the same to the bit whatever else is in the batch and however many threads.

    raw: before the link function. contributions: SHAP values instead (Lundberg et al. 2020, TreeSHAP), of shape
    (rows, columns + 1); a row sums to its raw prediction and the last value is the expectation.
    """
    if len(x) == 0:
        return np.zeros((0, booster.num_feature() + 1) if contributions else 0)
    return np.asarray(booster.predict(x, num_threads=threads, raw_score=raw, pred_contrib=contributions))


def top_contributions(
    booster: lightgbm.Booster, encoding: Encoding, table: pa.Table, *, top: int = 3, threads: int = 1
) -> pa.Table:
    """For each row the `top` columns that moved its raw score most, as lists `features` (names) and `effects`."""
    x = encoding.matrix(table)
    effects = predict(booster, x, threads=threads, contributions=True)[:, :-1]
    order = np.argsort(-np.abs(effects), axis=1, kind="stable")[:, :top]
    width = order.shape[1]
    names = np.array(encoding.names, dtype=object)[order]
    moved = np.take_along_axis(effects, order, axis=1)
    offsets = np.arange(len(x) + 1, dtype=np.int32) * width
    return pa.table(
        {
            "features": pa.ListArray.from_arrays(offsets, pa.array(names.ravel(), pa.string())),
            "effects": pa.ListArray.from_arrays(offsets, pa.array(moved.ravel(), pa.float64())),
        }
    )


@dataclass(frozen=True)
class Head:
    """What one quantity of one row's score is made of: ``baseline`` and the ``effects`` of the columns add up to
    ``score`` (SHAP values, Lundberg et al. 2020), all in ``unit``."""

    name: str
    quantity: str
    unit: str
    rests: str
    """What of the decision rests on it."""
    decides: bool
    """Whether the policy's choice for this row rests on it; else it only judges whether to act at all."""
    baseline: float
    score: float
    effects: dict[str, float]
    """By column, the largest first."""
    values: dict[str, Any]
    """What the columns said."""


@dataclass(frozen=True)
class Because:
    """Why a model scored one row as it did."""

    heads: tuple[Head, ...]
    parts: dict[str, Any]
    """Further figures that made the score, by what they are."""
    reads: tuple[str, ...]
    """Feature columns that go into the score beside the Boosters."""
    says: str
    """Which of it the policy rests on, in a sentence."""


def head(
    boosters: Sequence[lightgbm.Booster], encoding: Encoding, row: pa.Table, *, threads: int = 1, **said: Any
) -> Head:
    """The Head of one row; several Boosters are averaged, as their raw scores are. ``said``: the fields that are words.

    Raises ValueError unless ``row`` is one row.
    """
    if row.num_rows != 1:
        raise ValueError(f"a score is explained one row at a time, {row.num_rows} were given")
    x = encoding.matrix(row)
    shares = np.mean([predict(one, x, threads=threads, contributions=True)[0] for one in boosters], axis=0)
    raw = float(np.mean([predict(one, x, threads=threads, raw=True)[0] for one in boosters]))
    order = np.argsort(-np.abs(shares[:-1]), kind="stable")
    names = [encoding.names[i] for i in order]
    values = {name: row.column(name)[0].as_py() for name in names}
    effects = {name: float(shares[i]) for name, i in zip(names, order, strict=True)}
    return Head(**said, baseline=float(shares[-1]), score=raw, effects=effects, values=values)


def booster_bytes(booster: lightgbm.Booster) -> bytes:
    """The Booster's text file."""
    return str(booster.model_to_string()).encode()


def digest(text: bytes) -> str:
    """SHA-256 in hex, the name under which a model file is known."""
    return hashlib.sha256(text).hexdigest()


def read_booster(text: bytes, sha256: str) -> lightgbm.Booster:
    """Reads a Booster from its text file, after checking that it is the file with this digest. Runs no code from it.

    Raises WrongDigest otherwise.
    """
    import lightgbm as lgb

    found = digest(text)
    if found != sha256:
        raise WrongDigest(
            f"model file has SHA-256 {found}, {sha256} was registered: "
            "it was changed or is another version's; register it anew or restore the artifact"
        )
    return lgb.Booster(model_str=text.decode())


def resolve_device(device: str) -> str:
    """The LightGBM device that stands for `device`: one of auto, cpu, gpu (OpenCL), cuda.

    `auto` takes the first of cuda, gpu, cpu that can train and logs which; any other that cannot is DeviceMissing.
    """
    if device not in DEVICES:
        raise ValueError(f"device {device!r} is not one of {', '.join(DEVICES)}")
    if device == "cpu":
        return "cpu"
    if device == "auto":
        found = next((name for name in ("cuda", "gpu") if _fault(name) is None), "cpu")
        log.info("device auto: training on %s", found)
        return found
    fault = _fault(device)
    if fault is not None:
        need = {"gpu": "an OpenCL driver and device", "cuda": "a LightGBM built with USE_CUDA and an NVIDIA driver"}
        raise DeviceMissing(
            f"device {device!r} was asked for and cannot train here ({fault}): it needs {need[device]}; "
            "set `device: auto` or `device: cpu` to train without it"
        )
    return device


@cache
def _fault(device: str) -> str | None:
    """Why a tiny training on the device fails, or None where it works: only trying tells."""
    import lightgbm as lgb

    x = np.arange(64, dtype=np.float64).reshape(-1, 1)
    settings = {"device_type": device, "verbosity": -2, "min_data_in_leaf": 1, "num_threads": 1}
    try:
        with _silent_stderr():
            lgb.train(settings, lgb.Dataset(x, x[:, 0], params=settings), num_boost_round=1)
    except lgb.basic.LightGBMError as fault:
        return str(fault).splitlines()[0]
    return None


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """LightGBM writes a fatal error to the process's stderr before it raises it; here the raised one is the answer."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
