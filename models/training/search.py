"""Which hyper-parameters: the best rounds and the best of a declared space, judged on whole days later than the rows learned from.

Belongs here: the spaces, early stopping over a learner's rounds, the search with its budget, progress and file.
Does not: choosing the rows (the caller keeps the gate's held-out days out of both tables), learners, registering.

Optuna's TPE (Bergstra, Bardenet, Bengio, Kégl 2011; Akiba et al. 2019) proposes; each trial has a seed of its own, so
that trial n depends on the trials before it alone and a search that was killed goes on as if it had not been.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, model_validator

from models import catalog
from models.learners.base import Range, Scorer

log = logging.getLogger(__name__)


class EarlyStopping(BaseModel):
    """How the number of trees is found: more of them until later days are predicted no better."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    validation_days: int = Field(
        default=7, gt=0, description="Whole days before the gate's held-out days that judge; training ends before them"
    )
    patience: int = Field(default=2, gt=0, description="Sizes tried without an improvement before it stops")
    growth: float = Field(default=1.4, gt=1, description="Each size tried is so many times the one before")
    most_rounds: int = Field(default=2000, gt=0, description="No more trees than this are tried")


class Search(BaseModel):
    """A search over the model's parameters before each training."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seconds: float | None = Field(
        default=None, gt=0, description="No trial begins after so many seconds; null: no limit"
    )
    trials: int | None = Field(
        default=None,
        gt=0,
        description="No more trials than this; with null the seconds decide, and how many that is differs",
    )
    validation_days: int = Field(
        default=7, gt=0, description="Whole days before the gate's held-out days that judge; training ends before them"
    )

    @model_validator(mode="after")
    def _ends(self) -> Search:
        if self.seconds is None and self.trials is None:
            raise ValueError("needs `seconds` or `trials`, or it would never end")
        return self


TRIALS = pa.schema(
    [
        ("trial", pa.int64()),
        ("by", pa.string()),
        ("changed", pa.string()),
        ("value", pa.float64()),
        ("seconds", pa.float64()),
        ("seed", pa.int64()),
        ("fault", pa.string()),
        ("chosen", pa.bool_()),
    ]
)
"""One row a trial: by (``given``, ``search`` or ``rounds``), changed (JSON: fields against the section given), value of
the metric (NULL with a fault), seed of the proposal."""


@dataclass(frozen=True)
class Progress:
    """Where a search stands."""

    trial: int
    """Trials done, the section as it was given among them."""
    value: float | None
    best: float
    changed: Mapping[str, Any]
    """What the best one changes."""
    seconds_left: float | None
    trials_left: int | None

    def __str__(self) -> str:
        left = [f"{self.seconds_left:.0f} s"] if self.seconds_left is not None else []
        left += [f"{self.trials_left} trials"] if self.trials_left is not None else []
        now = "failed" if self.value is None else f"{self.value:.6g}"
        return f"trial {self.trial}: {now}, best {self.best:.6g} {json.dumps(dict(self.changed))}, left {', '.join(left) or '-'}"


@dataclass(frozen=True)
class Tuned:
    """The spec that was chosen, every trial, and a sentence about it."""

    spec: dict[str, Any]
    trials: pa.Table
    note: str

    @property
    def card(self) -> str:
        """The first fifteen trials as Markdown for the model's card; empty where nothing was tried."""
        if not self.trials.num_rows:
            return ""
        lines = ["| trial | by | changed | value | seconds |", "|---|---|---|---|---|"]
        for row in self.trials.slice(0, 15).to_pylist():
            value = row["fault"] or f"{row['value']:.6g}"
            mark = " (chosen)" if row["chosen"] else ""
            lines.append(
                f"| {row['trial']}{mark} | {row['by']} | `{row['changed']}` | {value} | {row['seconds']:.1f} |"
            )
        more = self.trials.num_rows - 15
        return "\n".join([self.note, "", *lines, *([f"\n{more} more trials were worse."] if more > 0 else [])])


def untuned(spec: Mapping[str, Any], note: str) -> Tuned:
    """The spec as it was given, and why."""
    return Tuned(dict(spec), TRIALS.empty_table(), note)


def stop_early(  # noqa: PLR0913 - given by name
    learner: type[Scorer],
    before: pa.Table,
    validation: pa.Table,
    spec: Mapping[str, Any],
    *,
    stop: EarlyStopping,
    metric: str,
    better: Literal["lower", "higher"],
    seed: int,
    device: str,
    threads: int,
    progress: Callable[[Progress], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Tuned:
    """The spec with the ``rounds`` that predict ``validation`` best, when the learner is fitted on ``before``.

    Sizes grow from 20 by ``stop.growth``; after ``stop.patience`` sizes without an improvement, or above
    ``stop.most_rounds``, it ends. Fewer rounds of the same seed are the beginning of more, so this is early stopping on
    the workflow's own metric. Rows are features with outcomes, those of ``validation`` on later days.
    """
    how: dict[str, Any] = {"seed": seed, "device": device, "threads": threads}
    rows: list[dict[str, Any]] = []
    size, worse = 20.0, 0
    while (worse < stop.patience and round(size) <= stop.most_rounds) or not rows:
        changed, begun = {"rounds": min(round(size), stop.most_rounds)}, clock()
        value, fault = _judged(learner, before, validation, {**spec, **changed}, metric, how)
        known = [r["value"] for r in rows if r["value"] is not None]
        worse = 0 if value is not None and (not known or _better(value, _best(known, better), better)) else worse + 1
        rows.append(_row(len(rows), "rounds", changed, value, clock() - begun, seed, fault))
        if progress is not None:
            best = _chosen(rows, better)
            if best is not None:
                progress(Progress(len(rows), value, best["value"], json.loads(best["changed"]), None, None))
        size *= stop.growth
    return _tuned(spec, rows, better, f"early stopping on {validation.num_rows} rows of later days, {metric}")


def search(  # noqa: PLR0913 - given by name
    learner: type[Scorer],
    before: pa.Table,
    validation: pa.Table,
    spec: Mapping[str, Any],
    *,
    budget: Search,
    metric: str,
    better: Literal["lower", "higher"],
    seed: int,
    device: str,
    threads: int,
    folder: Path | None = None,
    progress: Callable[[Progress], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Tuned:
    """The spec of the space of its kind that predicts ``validation`` best, when the learner is fitted on ``before``.

    The spec as given is tried first and wins a tie. A trial whose learner refuses it is kept with its fault. With
    ``folder`` every trial is kept in ``search.db`` there (SQLite): the same search goes on after a kill, with what was
    left of its seconds, and gives what it would have given; with the same number of trials the result is the same.
    Rows are features with outcomes, those of ``validation`` on later days. Raises KeyError for a kind without a space.
    """
    import optuna

    kind = spec["kind"]
    known = catalog.KINDS.get(kind)
    space = known.space if known else None
    if space is None:
        raise KeyError(f"no search space is declared for models of kind {kind!r}: {catalog.why_not(kind, 'search')}")
    how = {"seed": seed, "device": device, "threads": threads}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    what = [learner.__name__, dict(spec), metric, better, how, {f: vars(r) for f, r in space.items()}]
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        study_name=_digest(what, before, validation),
        storage=None if folder is None else f"sqlite:///{folder / 'search.db'}",
        direction="minimize" if better == "lower" else "maximize",
        load_if_exists=True,
    )
    for left in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        row = left.user_attrs.get("row")
        if row is not None and row["value"] is not None:  # killed between its figure and its end
            study.tell(left.number, row["value"])
            continue
        log.info("trial %d of the search was killed: it is tried again", left.number)
        study.tell(left.number, state=optuna.trial.TrialState.FAIL)

    began = clock()
    if "given" not in study.user_attrs:
        value, fault = _judged(learner, before, validation, spec, metric, how)
        if value is None:
            raise ValueError(
                f"the model section as it stands cannot be judged, so there is nothing to improve: {fault}"
            )
        study.set_user_attr("given", _row(0, "given", {}, value, clock() - began, seed, None))
    rows = [study.user_attrs["given"]]
    rows += [t.user_attrs["row"] for t in study.get_trials(deepcopy=False) if "row" in t.user_attrs]
    earlier = sum(row["seconds"] for row in rows) - (clock() - began)  # what was spent before a kill counts
    if len(rows) > 1:
        log.info("the search goes on after %d trials", len(rows))

    def seconds_left() -> float | None:
        return None if budget.seconds is None else budget.seconds - earlier - (clock() - began)

    def tell(value: float | None) -> None:
        best, most = _chosen(rows, better), budget.trials
        if progress is not None and best is not None:
            changed, left = json.loads(best["changed"]), None if most is None else max(most + 1 - len(rows), 0)
            progress(Progress(len(rows), value, best["value"], changed, seconds_left(), left))

    tell(rows[-1]["value"])
    while budget.trials is None or len(rows) <= budget.trials:
        left_s = seconds_left()
        if left_s is not None and left_s <= 0:
            break
        # seeded anew for each trial: the state of one generator would be lost with a killed process
        study.sampler = optuna.samplers.TPESampler(seed=seed + len(rows))
        trial, begun = study.ask(), clock()
        changed = {field: _proposed(trial, field, one) for field, one in space.items()}
        value, fault = _judged(learner, before, validation, {**spec, **changed}, metric, how)
        row = _row(len(rows), "search", changed, value, clock() - begun, seed + len(rows), fault)
        trial.set_user_attr("row", row)
        if value is None:
            log.warning("trial %d of the search failed: %s", row["trial"], fault)
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(trial, value)
        rows.append(row)
        tell(value)
    return _tuned(
        spec, rows, better, f"a search of {len(rows) - 1} trials on {validation.num_rows} rows of later days, {metric}"
    )


def _proposed(trial: Any, field: str, one: Range) -> float | int:
    if one.whole:
        return int(trial.suggest_int(field, int(one.low), int(one.high), log=one.log))
    # four digits: what stands in the recipe can be read, and written by hand
    return float(f"{trial.suggest_float(field, one.low, one.high, log=one.log):.4g}")


def _judged(
    learner: type[Scorer],
    before: pa.Table,
    validation: pa.Table,
    spec: Mapping[str, Any],
    metric: str,
    how: Mapping[str, Any],
) -> tuple[float | None, str | None]:
    """The metric of one spec, or why there is none."""
    from lightgbm.basic import LightGBMError

    try:
        value = float(learner.fit(before, spec, **how).evaluate(validation)[metric])
    except (ValueError, LightGBMError) as fault:
        return None, f"{type(fault).__name__}: {fault}".splitlines()[0][:300]
    return (value, None) if np.isfinite(value) else (None, f"{metric} is {value}")


def _better(value: float, than: float, better: str) -> bool:
    return value < than if better == "lower" else value > than


def _best(values: list[float], better: str) -> float:
    return min(values) if better == "lower" else max(values)


def _row(
    trial: int, by: str, changed: Mapping[str, Any], value: float | None, seconds: float, seed: int, fault: str | None
) -> dict[str, Any]:
    return {
        "trial": trial, "by": by, "changed": json.dumps(changed, sort_keys=True), "value": value,
        "seconds": round(seconds, 3), "seed": seed, "fault": fault, "chosen": False,
    }  # fmt: skip


def _chosen(rows: list[dict[str, Any]], better: str) -> dict[str, Any] | None:
    """The best row, the earliest of equal ones; None where none has a value."""
    known = [row for row in rows if row["value"] is not None]
    return min(known, key=lambda r: (r["value"] if better == "lower" else -r["value"], r["trial"])) if known else None


def _tuned(spec: Mapping[str, Any], rows: list[dict[str, Any]], better: str, what: str) -> Tuned:
    best = _chosen(rows, better)
    if best is None:
        raise ValueError(f"{what}: no trial could be judged; the first said: {rows[0]['fault']}")
    changed = json.loads(best["changed"])
    sign = 1 if better == "lower" else -1
    ordered = sorted(
        ({**row, "chosen": row["trial"] == best["trial"]} for row in rows),
        key=lambda r: (r["value"] is None, sign * (r["value"] or 0.0), r["trial"]),
    )
    said = (
        ", ".join(f"{field} {value}" for field, value in changed.items()) or "nothing better than the section as given"
    )
    note = f"By {what}: {said} ({best['value']:.6g})."
    return Tuned({**spec, **changed}, pa.Table.from_pylist(ordered, TRIALS), note)


class _Hash:
    """A file that keeps the digest of what is written and nothing else."""

    closed = False

    def __init__(self) -> None:
        self.sha = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha.update(data)
        return len(data)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def _digest(what: Any, *tables: pa.Table) -> str:
    """SHA-256 over some settings and the rows of some tables."""
    file = _Hash()
    file.write(json.dumps(what, sort_keys=True, default=str).encode())
    for table in tables:
        with pa.ipc.new_stream(pa.PythonFile(file, "w"), table.schema) as stream:
            # chunks of one size: the same rows give the same digest however they were read
            stream.write_table(table.combine_chunks(), max_chunksize=65_536)
    return file.sha.hexdigest()
