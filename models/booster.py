"""LightGBM Boosters as this project uses them: categories as integers, deterministic training, files read by digest.

Belongs here: the encoding of a table, training with its checkpoints, prediction, the text file and its digest, devices.
Does not: what a model means (``models/learners``), the registry, choosing features, anything pickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from common.errors import SignalboxError

if TYPE_CHECKING:
    import lightgbm

log = logging.getLogger(__name__)

NUMBERS = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_decimal)
DEVICES = ("auto", "cpu", "gpu", "cuda")
# A GPU adds in an order of its own: in single precision runs differ visibly, in double hardly ever (LightGBM's FAQ).
_OPENCL = {"gpu_use_dp": True}


class DeviceMissing(SignalboxError, RuntimeError):
    """The device asked for cannot train here."""


class WrongDigest(SignalboxError, ValueError):
    """A model file is not the one that was registered."""


def is_number(kind: pa.DataType) -> bool:
    """Whether a column of this type counts as numeric; booleans do."""
    return any(is_kind(kind) for is_kind in NUMBERS)


@dataclass(frozen=True)
class Encoding:
    """How a table becomes a matrix: numeric columns as they are, categories as their place in a learned list.

    numeric: names of numeric or boolean columns, in the order of the matrix.
    categorical: name -> known categories; code i stands for the i-th. These columns follow the numeric ones.
    nulls: the numeric columns that had missing values in training; None: not known (an encoding from before it was kept).
    """

    numeric: tuple[str, ...]
    categorical: dict[str, tuple[str, ...]]
    nulls: tuple[str, ...] | None = None

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
            column = _number(table, name)
            if pa.types.is_boolean(column.type):
                column = column.cast(pa.int8())
            out[:, i] = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        for i, name in enumerate(self.categorical, start=len(self.numeric)):
            out[:, i] = self._codes(table, name).cast(pa.float64()).to_numpy(zero_copy_only=False)
        return out

    def arrow(self, table: pa.Table) -> pa.Table:
        """What ``matrix`` holds, as an Arrow table that ``train`` takes in its place without a second copy of the rows.

        Numeric columns are the table's own memory, a category is an int32 code; NULL stands for NaN. The Booster is the
        same to the bit. Raises as ``matrix`` does.
        """
        columns = []
        for name in self.numeric:
            column = _number(table, name)
            plain = pa.types.is_integer(column.type) or column.type in (pa.float32(), pa.float64())
            if pa.types.is_boolean(column.type):
                column = column.cast(pa.int8())
            elif not plain:
                column = column.cast(pa.float64(), safe=False)
            columns.append(column)
        columns += [self._codes(table, name) for name in self.categorical]
        return pa.table(columns, names=self.names)

    def _codes(self, table: pa.Table, name: str) -> pa.ChunkedArray:
        known = pa.array(self.categorical[name], pa.string())
        return pc.index_in(_column(table, name).cast(pa.string()), value_set=known)

    def trained_on(self, x: pa.Table) -> Encoding:
        """The same encoding, which knows where ``x`` (of ``arrow``, as it is trained on) had missing values."""
        return replace(self, nulls=tuple(n for n in self.numeric if _missing(x.column(n)).any()))

    def unread(self, table: pa.Table) -> dict[str, np.ndarray]:
        """Columns that had no missing value in training and have one here, each with the rows (bool) in which it has.

        LightGBM would read such a value as 0 and say nothing.
        """
        found = {}
        for name in self.numeric if self.nulls is not None else ():
            if name not in self.nulls:  # type: ignore[operator]
                missing = _missing(_number(table, name))
                if missing.any():
                    found[name] = missing
        return found

    def to_json(self) -> str:
        said: dict[str, Any] = {"numeric": self.numeric, "categorical": self.categorical}
        if self.nulls is not None:  # what was written before it was kept stays the same text
            said["nulls"] = self.nulls
        return json.dumps(said, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> Encoding:
        raw = json.loads(text)
        nulls = raw.get("nulls")
        return cls(
            tuple(raw["numeric"]),
            {name: tuple(known) for name, known in raw["categorical"].items()},
            None if nulls is None else tuple(nulls),
        )


def _missing(column: pa.ChunkedArray) -> np.ndarray:
    """Where a column has no number: NULL or NaN."""
    nothing = pc.is_null(column, nan_is_null=pa.types.is_floating(column.type))
    return np.asarray(nothing.to_numpy(zero_copy_only=False) if isinstance(nothing, pa.Array) else nothing.to_numpy())


def without(
    scores: pa.Table, unread: Mapping[str, np.ndarray], keys: Sequence[str] = ("entity_id", "moment")
) -> pa.Table:
    """Scores that are null, but for their keys, in the rows that ``Encoding.unread`` found."""
    if not unread:
        return scores
    place = pa.array(np.arange(scores.num_rows), mask=np.logical_or.reduce(list(unread.values())))
    names = scores.schema.names
    return pa.table({n: scores[n] if n in keys else scores[n].take(place) for n in names}, schema=scores.schema)


def named(unread: Mapping[str, np.ndarray], table: pa.Table) -> dict[str, list[str]]:
    """The entities of the rows that ``Encoding.unread`` found, by column."""
    names = table.column("entity_id")
    return {column: names.filter(pa.array(rows)).to_pylist() for column, rows in unread.items()}


def _column(table: pa.Table, name: str) -> pa.ChunkedArray:
    if name not in table.column_names:
        raise KeyError(f"column {name!r} is missing: the model needs it, the table has {', '.join(table.column_names)}")
    return table.column(name)


def _number(table: pa.Table, name: str) -> pa.ChunkedArray:
    column = _column(table, name)
    if not (is_number(column.type) or pa.types.is_null(column.type)):
        raise TypeError(f"column {name!r} is {column.type} and listed under `numeric`: list it under `categorical`")
    return column


def train(  # noqa: PLR0913 - given by name
    x: np.ndarray | pa.Table,
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
    checkpoint: Path | None = None,
    every: int | None = None,
) -> lightgbm.Booster:
    """Trains a Booster on `x` (rows, columns of `encoding`) and `y`: the same input and device give the same bytes.

    x: ``encoding.matrix(table)``, or ``encoding.arrow(table)``, which is not copied.
    params: LightGBM parameters (objective, num_leaves, ...); seeds, threads and determinism are set here.
    valid: (x, y) watched for `early_stopping` rounds; the rounds after the best one are dropped.
    checkpoint: a file that is written after `every` rounds (None: at the end only); the same call after a kill goes on
    from it and gives the bytes of a call that was not killed. Each `every` rounds draw their rows and columns anew, so
    another `every` gives another Booster. A file of other data or settings is not used, and the log says so. Within
    ``resumable`` every call has one.
    Returns the Booster as read back from its own text, so that what is evaluated is what is stored.
    Raises DeviceMissing where the device cannot train, ValueError for a checkpoint together with early stopping.
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
    if settings["device_type"] == "gpu":
        settings = {**_OPENCL, **settings}
    if checkpoint is not None and early_stopping is not None:
        raise ValueError("a checkpoint and early stopping do not go together: leave one out")
    folder = _resumable.get() if early_stopping is None else None
    kept = None
    if checkpoint is not None or folder is not None:
        every = every if checkpoint is not None or folder is None else folder[1]
        said = {"settings": settings, "rounds": rounds, "every": every, "encoding": encoding.to_json()}
        content = _content([x, y, weight, init_score], said)
        kept = _Kept(checkpoint or Path(folder[0] if folder else ".", f"{content[:32]}.booster"), content)
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
    if kept is not None:
        return _in_steps(kept, data, x, init_score, settings, rounds, every or rounds)
    watched = [] if valid is None else [lgb.Dataset(*valid, reference=data)]
    calls: list[Any] = [lgb.early_stopping(early_stopping, verbose=False)] if watched and early_stopping else []
    booster = lgb.train(settings, data, num_boost_round=rounds, valid_sets=watched, callbacks=calls)
    return lgb.Booster(model_str=booster.model_to_string())


_resumable: ContextVar[tuple[Path, int | None] | None] = ContextVar("resumable", default=None)


@contextmanager
def resumable(folder: Path, every: int | None = None) -> Iterator[None]:
    """Within, each training keeps its checkpoint in ``folder``, so that after a kill the same work goes on where it
    stopped: Boosters that were finished are read, the one that was not continues. The files go when all is done.

    every: rounds between two checkpoints of one Booster; None keeps finished Boosters only and changes no byte.
    """
    folder.mkdir(parents=True, exist_ok=True)
    token = _resumable.set((folder, every))
    try:
        yield
    finally:
        _resumable.reset(token)
    for file in folder.glob("*.booster*"):
        file.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Kept:
    """A checkpoint: a line of JSON (what it is of, how many rounds are done, the text's digest), then the Booster's text."""

    path: Path
    content: str
    """Digest of the data and the settings that it must be of."""

    def read(self) -> tuple[int, str]:
        """Rounds done and the Booster's text; (0, "") where there is none that can be used, which is logged."""
        try:
            head, _, text = self.path.read_bytes().partition(b"\n")
            said = json.loads(head)
            if said["content"] != self.content:
                log.warning("%s is of other data or settings: training begins anew", self.path)
            elif said["sha256"] != digest(text):
                log.warning("%s is damaged: training begins anew", self.path)
            else:
                log.info("training goes on after %d rounds (%s)", said["rounds"], self.path)
                return int(said["rounds"]), text.decode()
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError):
            log.warning("%s is no checkpoint: training begins anew", self.path)
        return 0, ""

    def write(self, rounds: int, text: str) -> None:
        """Replaces the file in one step: whoever is killed leaves the old one or the new one."""
        head = {"content": self.content, "rounds": rounds, "sha256": digest(text.encode())}
        fresh = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        with fresh.open("wb") as file:
            file.write(json.dumps(head).encode() + b"\n" + text.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, self.path)


def _in_steps(
    kept: _Kept,
    data: lightgbm.Dataset,
    x: np.ndarray | pa.Table,
    init_score: np.ndarray | None,
    settings: dict[str, Any],
    rounds: int,
    every: int,
) -> lightgbm.Booster:
    """Trains ``every`` rounds at a time, each time on the raw scores of the text so far, and keeps that text."""
    import lightgbm as lgb
    from lightgbm.basic import _LIB, _safe_call

    done, text = kept.read()
    while done < rounds:
        now = dict(settings)
        if done:
            before = lgb.Booster(model_str=text)
            raw = predict(before, x, threads=settings["num_threads"], raw=True)
            data.construct().set_init_score(raw if init_score is None else raw + init_score)
            # with the same seeds every step would draw the rows and columns of the first
            now |= {f"{what}_seed": settings["seed"] + done for what in ("bagging", "feature_fraction", "extra")}
        step = lgb.train(now, data, num_boost_round=min(every, rounds - done))
        if done:
            # what LightGBM itself does for `init_model`, which would put the caller's init_score aside
            _safe_call(_LIB.LGBM_BoosterMerge(step._handle, before._handle))
        done, text = min(done + every, rounds), step.model_to_string()
        kept.write(done, text)
    return lgb.Booster(model_str=text)


def _content(parts: Sequence[np.ndarray | pa.Table | None], said: Mapping[str, Any]) -> str:
    """SHA-256 over data and settings and the version of LightGBM."""
    import lightgbm as lgb

    whole = hashlib.sha256(json.dumps({**said, "lightgbm": lgb.__version__}, sort_keys=True, default=str).encode())
    for part in parts:
        if isinstance(part, pa.Table):
            for chunk in (chunk for column in part.columns for chunk in column.chunks):
                floats = chunk.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
                whole.update(np.ascontiguousarray(floats).data)
        elif part is not None:
            whole.update(np.ascontiguousarray(part).data)
        whole.update(b"|")
    return whole.hexdigest()


def chosen(x: pa.Table, these: np.ndarray) -> pa.Table:
    """The rows of ``encoding.arrow(table)`` where ``these`` (bool) holds; the table itself where that is all of them."""
    return x if these.all() else x.filter(pa.array(these))


def predict(
    booster: lightgbm.Booster,
    x: np.ndarray | pa.Table,
    *,
    threads: int = 1,
    raw: bool = False,
    contributions: bool = False,
) -> np.ndarray:
    """Predictions of shape (rows,), each the same to the bit whatever else is in the batch and however many threads.

    raw: before the link function. contributions: SHAP values instead (Lundberg et al. 2020, TreeSHAP), of shape
    (rows, columns + 1); a row sums to its raw prediction and the last value is the expectation.
    """
    if len(x) == 0:
        return np.zeros((0, booster.num_feature() + 1) if contributions else 0)
    return np.asarray(booster.predict(x, num_threads=threads, raw_score=raw, pred_contrib=contributions))


def by_rounds(booster: lightgbm.Booster, x: np.ndarray, *, points: int = 20) -> Iterator[tuple[int, np.ndarray]]:
    """Raw predictions after ever more rounds, at ``points`` numbers of them: what a curve over rounds is drawn from.

    It costs one prediction and no training; the last is that of the whole Booster but for the order in which trees are added.
    """
    rounds, raw, done = booster.current_iteration(), np.zeros(len(x)), 0
    for until in np.unique(np.linspace(1, rounds, min(points, rounds)).round().astype(int)).tolist() if len(x) else []:
        raw = raw + np.asarray(
            booster.predict(x, start_iteration=done, num_iteration=until - done, raw_score=True, num_threads=1)
        )
        done = until
        yield until, raw


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


def gains(boosters: Sequence[lightgbm.Booster], encoding: Encoding) -> dict[str, float]:
    """Each column's share of the gain in its Booster, the mean over the Boosters; they add up to 1 where any has a tree.

    By the encoding's names: LightGBM keeps another spelling of those with a blank in them.
    """
    summed = np.zeros(len(encoding.names))
    grown = 0
    for one in boosters:
        gain = np.asarray(one.feature_importance("gain"), dtype=np.float64)
        if gain.sum() > 0:
            summed += gain / gain.sum()
            grown += 1
    return dict(zip(encoding.names, (summed / max(grown, 1)).tolist(), strict=True))


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

    # few distinct values: OpenCL compiles its kernels by the number of bins, and the small ones take seconds less
    x = np.arange(64, dtype=np.float64).reshape(-1, 1) % 8
    settings = {"device_type": device, "verbosity": -2, "min_data_in_leaf": 1, "num_threads": 1, "objective": "binary"}
    settings |= _OPENCL if device == "gpu" else {}
    try:
        with _silent_stderr():
            lgb.train(settings, lgb.Dataset(x, x[:, 0] > 3, params=settings), num_boost_round=1)
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
