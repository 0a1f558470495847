"""How long a ticket will take, and whether that is too long: the model and the rule behind ticket priorities.

Belongs here: labels as far as they are known (judged, resolved or still open), the Boosters that learn from them,
scores, figures. Does not: the index and its ranking (``models.policies.priority``), reading tables, features.

Rows carry the outcome columns ``missed`` (NULL until judged), ``handling_hours`` (NULL until resolved) and, where the
source tells, ``open_hours`` (so long without being resolved) and ``effort_hours`` (hands-on time).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from models.booster import (
    Because,
    Encoding,
    booster_bytes,
    by_rounds,
    chosen,
    digest,
    gains,
    head,
    named,
    predict,
    read_booster,
    top_contributions,
    train,
    without,
)
from models.evaluation.conformal import LEAST_OF_PART, Bands, Sets, coarser, coverage, halves
from models.learners.base import Comparison, Kind, ModelSettings, Range, Small, numbers, squares_apart
from models.policies.priority import coverage_curve

if TYPE_CHECKING:
    import lightgbm
    from matplotlib.figure import Figure

Array = np.ndarray
FOLDS = 2
QUANTILES = np.linspace(0.0, 1.0, 201)
LONGEST = np.log1p(20 * 365 * 24.0)  # where a quantile of "never" is cut
SHARPEST = 1e-4
RESOLVED = 0.9  # share of a day's rows whose handling time must be known for the day to say how long things take


class DurationModel(ModelSettings):
    """The model section of a workflow whose entities take time and may take too long."""

    kind: Literal["duration"]
    group: str = Field(
        default="priority", description="Feature that sets the service level: how a handling time counts depends on it"
    )
    rule_by: tuple[str, ...] = Field(
        default=("priority", "category"), description="Features whose frequencies the rule uses, the coarsest first"
    )
    delay_hours: float = Field(default=24.0, gt=0, description="p_miss_later supposes a start so many hours later")
    effort_hours: float = Field(
        default=1.0, gt=0, description="Hands-on time of a ticket where the source does not record it"
    )
    half_life_days: float | None = Field(
        default=30.0, gt=0, description="A row so many days old weighs half as much; null weighs all alike"
    )
    confidence: float = Field(
        default=0.9,
        ge=0.5,
        lt=1,
        description="What a prediction set and an interval of hours hold at least, on days exchangeable with those learned from",
    )
    calibrate_by: str | None = Field(
        default=None,
        description="Feature of which every value with rows enough has prediction sets of its own, so that they hold what they "
        "state within each; null: one measure for all",
    )
    members: int = Field(default=1, ge=1, le=20, description="Boosters averaged for p_miss, each with its own seed")
    rounds: int = Field(default=150, gt=0, description="Trees of a Booster")
    num_leaves: int = Field(default=15, gt=1, description="Leaves of a tree")
    learning_rate: float = Field(default=0.04, gt=0, le=1, description="Shrinkage of a tree")
    min_data_in_leaf: int = Field(default=40, gt=0, description="Rows that a leaf needs")
    min_category_count: int = Field(default=15, gt=0, description="A rarer category counts as unknown")
    max_categories: int = Field(default=400, gt=0, description="The commonest categories that are kept")


# --- labels -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labels:
    """What the rows say of missing the service level and of time, as far as it is known.

    missed: expected value of the label in [0, 1], 0 or 1 where judged. log_hours: log(1 + handling hours), expected
    where still open.
    """

    missed: Array
    log_hours: Array


def settle(rows: pa.Table, group: str) -> Labels:
    """Labels that do not favour what is known early.

    Judged rows keep their label. For resolved rows P(missed | handling time) is the monotone (isotonic) fit to the
    judged rows. For rows still open it is the mean of that over the handling times that remain possible, by the
    Kaplan-Meier estimate with late entry (1958; after Efron 1967, the mass of a censored row moves to later times).
    Each value of ``group`` has its own fit where 50 of its entities are judged and resolved, and time counts as a
    share of ``allowed_hours`` where that is known. An entity counts once, by its first row.
    Raises ValueError where no row has been judged.
    """
    missed, hours, open_hours = (_floats(rows, name) for name in ("missed", "handling_hours", "open_hours"))
    allowed = _floats(rows, "allowed_hours")
    judged, resolved = ~np.isnan(missed), ~np.isnan(hours)
    if not judged.any():
        raise ValueError("no outcome has been judged yet: there is nothing to learn a missed service level from")
    spent = np.maximum(np.where(resolved, hours, np.nan_to_num(open_hours)), 0.0)
    scale = np.where(np.isnan(allowed), 1.0, np.maximum(allowed, 1e-3))
    age = np.nan_to_num(_floats(rows, "age_hours"))
    # what is described within its first day is there whatever becomes of it; older rows only as they were not resolved
    share, entry = spent / scale, np.where(age < 24, -1.0, age) / scale
    once = np.zeros(len(missed))
    once[np.unique(_texts(rows, "entity_id"), return_index=True)[1]] = 1.0
    labels = Labels(np.where(judged, missed, np.nan), np.log1p(spent))
    _, code = np.unique(np.char.add(_texts(rows, group), np.where(np.isnan(allowed), " ?", " !")), return_inverse=True)
    for one in range(code.max() + 1):
        mine = code == one
        enough = (mine & judged & resolved & (once > 0)).sum() >= 50
        _settle(labels, mine, np.where(mine, once, 0.0) if enough else once, missed, resolved, entry, share, spent)
    return labels


def _settle(
    labels: Labels, mine: Array, weight: Array, missed: Array, resolved: Array, entry: Array, share: Array, spent: Array
) -> None:
    """Fills in the labels of the rows ``mine`` that are not known, from the rows that have a ``weight``."""
    from sklearn.isotonic import IsotonicRegression

    judged = ~np.isnan(missed)
    base = np.where(judged, weight, 0.0)
    rate = float(np.average(missed[judged], weights=base[judged] if base.any() else None))
    learned = judged & resolved & (weight > 0)
    late = _constant(rate)
    if learned.any():
        fit = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip")
        late = fit.fit(share[learned], missed[learned], sample_weight=weight[learned]).predict
    waits = mine & resolved & ~judged
    if waits.any():
        labels.missed[waits] = late(share[waits])
    still = mine & ~resolved
    if not still.any():
        return
    ended = resolved & (weight > 0)
    if not ended.any():
        labels.missed[still & ~judged] = rate
        return
    times, place = np.unique(share[ended], return_inverse=True)
    deaths = np.bincount(place, weight[ended])
    # at risk: not yet ended, and already seen (a row first seen when it was old says nothing of those that ended young)
    at_risk = _weight_from(share, weight, times) - _weight_from(np.minimum(entry, share * (1 - 1e-12)), weight, times)
    alive = np.cumprod(1.0 - np.minimum(deaths / np.maximum(at_risk, deaths), 1.0))
    # whatever outlives every resolved row is late, and takes as long as the longest of them
    mass = np.append(np.concatenate([[1.0], alive[:-1]]) - alive, alive[-1])
    logs = np.bincount(place, weight[ended] * np.log1p(spent[ended])) / deaths
    after = np.searchsorted(times, share[still], side="right")
    remains = np.cumsum(mass[::-1])[::-1][after]

    def mean_after(values: Array, last: float) -> Array:
        total = np.cumsum((mass * np.append(values, last))[::-1])[::-1][after]
        return np.where(remains > 1e-12, total / np.maximum(remains, 1e-12), last)

    labels.missed[still] = np.where(judged[still], missed[still], np.clip(mean_after(late(times), 1.0), 0.0, 1.0))
    labels.log_hours[still] = np.maximum(mean_after(logs, float(logs.max())), np.log1p(spent[still]))


def _weight_from(value: Array, weight: Array, times: Array) -> Array:
    """The weight of the rows whose value is at least each of ``times``."""
    order = np.argsort(value, kind="stable")
    above = np.append(np.cumsum(weight[order][::-1])[::-1], 0.0)
    return np.asarray(above[np.searchsorted(value[order], times, side="left")])


def _constant(value: float) -> Callable[[Array], Array]:
    return lambda x: np.full(len(x), value)


def _floats(table: pa.Table, name: str) -> Array:
    """A column as float64 with NaN for NULL; all NaN where the table has no such column."""
    if name not in table.column_names:
        return np.full(table.num_rows, np.nan)
    column = table.column(name)
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    return np.array(column.cast(pa.float64()).to_numpy(zero_copy_only=False), dtype=np.float64)


def _texts(table: pa.Table, name: str) -> Array:
    if name not in table.column_names:
        return np.full(table.num_rows, "", dtype="U1")
    return np.asarray(pc.fill_null(table.column(name).cast(pa.string()), "").to_numpy(zero_copy_only=False), dtype="U")


def _settings(spec: Mapping[str, Any]) -> DurationModel:
    """The model section of a spec that also has the feature lists."""
    return DurationModel.model_validate({k: v for k, v in spec.items() if k in DurationModel.model_fields})


def _keys(features: pa.Table) -> dict[str, pa.ChunkedArray]:
    return {name: features.column(name) for name in ("entity_id", "moment") if name in features.column_names}


# --- times ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """Quantiles of what lies around an expected log(1 + hours), one row for each level of it.

    edges: the levels' inner bounds, ascending. residuals: (levels, quantiles), ascending along a row.
    """

    edges: Array
    residuals: Array

    @classmethod
    def learn(cls, expected: Array, actual: Array, levels: int = 5) -> Spread:
        """From predictions for rows that their model had not seen. Few rows make one level."""
        wanted = levels if len(expected) >= 200 * levels else 1
        edges = np.unique(np.quantile(expected, np.linspace(0, 1, wanted + 1)[1:-1])) if wanted > 1 else np.zeros(0)
        level = np.searchsorted(edges, expected, side="right")
        rest = actual - expected
        rows = [np.quantile(rest[level == i] if (level == i).any() else rest, QUANTILES) for i in range(len(edges) + 1)]
        # strictly ascending, so that a probability has one time and a time one probability
        return cls(edges, np.array(rows) + SHARPEST * QUANTILES)

    def late(self, expected: Array, hours: Array) -> Array:
        """P(time > hours), for each row."""
        out = np.empty(len(expected))
        level = np.searchsorted(self.edges, expected, side="right")
        rest = np.log1p(np.maximum(hours, 0.0)) - expected
        for i, residuals in enumerate(self.residuals):
            mine = level == i
            out[mine] = 1.0 - np.interp(rest[mine], residuals, QUANTILES)
        return np.where(hours < 0, 1.0, out)

    def quantile(self, expected: Array, share: Array) -> Array:
        """The hours that a row exceeds with probability 1 - share."""
        out = np.empty(len(expected))
        level = np.searchsorted(self.edges, expected, side="right")
        for i, residuals in enumerate(self.residuals):
            mine = level == i
            out[mine] = np.interp(share[mine], QUANTILES, residuals)
        return np.asarray(np.expm1(np.minimum(out + expected, LONGEST)))

    def mean(self, expected: Array) -> Array:
        """Expected hours."""
        level = np.searchsorted(self.edges, expected, side="right")
        middle = self.residuals[:, 1:] / 2 + self.residuals[:, :-1] / 2
        factor = np.exp(np.minimum(middle, LONGEST)).mean(axis=1)
        return np.asarray(np.maximum(np.exp(np.minimum(expected, LONGEST)) * factor[level] - 1.0, 0.0))

    def to_dict(self) -> dict[str, Any]:
        return {"edges": self.edges.tolist(), "residuals": self.residuals.tolist()}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Spread:
        return cls(np.array(raw["edges"], np.float64), np.array(raw["residuals"], np.float64))


def _scored(
    features: pa.Table,
    p_miss: Array,
    expected: Array,
    spread: Spread,
    effort: Array,
    effort_spread: Spread | None,
    delay: float,
    sets: Sets | None = None,
    hours: Bands | None = None,
    calibrated_by: str | None = None,
) -> pa.Table:
    """The score table. A known due time is compared with the hands-on time (with the handling time where that is not
    recorded); an unknown one is the time by which handling as usual is over with probability 1 - p_miss."""
    to_due = _floats(features, "hours_to_due")
    unknown = np.isnan(to_due)
    implied = spread.quantile(expected, 1.0 - p_miss)
    if effort_spread is None:
        now, later = spread.late(expected, to_due), spread.late(expected, to_due - delay)
    else:
        level = np.log1p(effort)
        now, later = effort_spread.late(level, to_due), effort_spread.late(level, to_due - delay)
    now = np.where(unknown, p_miss, now)
    later = np.where(unknown, np.maximum(spread.late(expected, implied - delay), p_miss), later)
    part = None if calibrated_by is None else _texts(features, calibrated_by)
    return pa.table(
        {
            **_keys(features),
            "p_miss": p_miss,
            "p_miss_now": now,
            "p_miss_later": np.maximum(later, now),
            "effort_hours": effort if effort_spread is None else effort_spread.mean(np.log1p(effort)),
            "uncertainty": 2.0 * np.minimum(p_miss, 1.0 - p_miss),
            **_confident(_texts(features, "moment"), part, p_miss, expected, sets, hours),
        }
    )


def _confident(
    moment: Array, part: Array | None, p_miss: Array, expected: Array, sets: Sets | None, hours: Bands | None
) -> dict[str, Any]:
    """Score columns: which outcomes are possible, the remaining hours from and to, and how sure that is; else null."""
    n = len(p_miss)
    out: dict[str, Any] = {name: pa.nulls(n, pa.bool_()) for name in ("may_miss", "may_hit")}
    out |= {name: pa.nulls(n, pa.float64()) for name in ("hours_low", "hours_high", "confidence")}
    if sets is not None:
        miss, hit, known = sets.of(p_miss, moment, part)
        out |= {"may_miss": pa.array(miss, mask=~known), "may_hit": pa.array(hit, mask=~known)}
        out["confidence"] = pa.array(np.full(n, sets.confidence), mask=~known)
    if hours is not None:
        low, high = (np.expm1(np.clip(expected + side, 0.0, LONGEST)) for side in hours.around(expected))
        out |= {"hours_low": pa.array(low, from_pandas=True), "hours_high": pa.array(high, from_pandas=True)}
    return out


# --- figures ----------------------------------------------------------------------------------------------------------


def figures(missed: Array, p_miss: Array) -> dict[str, float]:
    """How good probabilities are for judged rows: ROC AUC, average precision, Brier score, log loss, the expected
    calibration error over ten equally filled bins, the base rate and the number of rows. NaN where it is undefined."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    both = 0 < missed.sum() < len(missed)
    safe = np.clip(p_miss, 1e-12, 1 - 1e-12)
    return {
        "roc_auc": float(roc_auc_score(missed, p_miss)) if both else float("nan"),
        "average_precision": float(average_precision_score(missed, p_miss)) if both else float("nan"),
        "brier": float(np.mean((p_miss - missed) ** 2)) if len(missed) else float("nan"),
        "log_loss": float(-np.mean(np.log(np.where(missed > 0, safe, 1 - safe)))) if len(missed) else float("nan"),
        "calibration_error": float(sum(abs(p - m) * n for p, m, n in _bins(missed, p_miss)) / max(len(missed), 1)),
        "base_rate": float(np.mean(missed)) if len(missed) else float("nan"),
        "rows": float(len(missed)),
    }


def confidence_figures(
    rows: pa.Table, missed: Array, scores: pa.Table, calibrated_by: str | None = None
) -> dict[str, float]:
    """How often sets and intervals held on judged rows, each day counting alike, and how wide they were.

    coverage: the set held the outcome; coverage_least, coverage_most: the same in the part (a value of ``calibrated_by`` with
    LEAST_OF_PART judged rows) where it held least and most; width: outcomes in a set, 0 to 2; unsure: share of sets with both;
    hours_coverage, hours_width: of resolved rows, the remaining hours lay within the interval, and its median width.
    Empty where nothing was calibrated.
    """
    day = _days(rows) if "day" in rows.column_names else np.zeros(rows.num_rows)
    miss, hit = _floats(scores, "may_miss"), _floats(scores, "may_hit")
    out: dict[str, float] = {}
    known = ~np.isnan(miss)
    if known.any():
        held = np.where(missed > 0, miss, hit)[known]
        out["coverage"] = coverage(held, day[known])
        if calibrated_by is not None:
            part = _texts(rows, calibrated_by)[known]
            parts = [part == name for name in np.unique(part)]
            by_part = [coverage(held[one], day[known][one]) for one in parts if one.sum() >= LEAST_OF_PART]
            out |= {"coverage_least": min(by_part), "coverage_most": max(by_part)} if by_part else {}
        out["width"] = float((miss + hit)[known].mean())
        out["unsure"] = float((miss * hit)[known].mean())
    low, high = _floats(scores, "hours_low"), _floats(scores, "hours_high")
    left = np.maximum(_floats(rows, "handling_hours") - np.nan_to_num(_floats(rows, "age_hours")), 0.0)
    known = ~np.isnan(low) & ~np.isnan(left)
    if known.any():
        out["hours_coverage"] = coverage(((low <= left) & (left <= high))[known], day[known])
        out["hours_width"] = float(np.median((high - low)[known]))
    return out


def _bins(missed: Array, p_miss: Array, bins: int = 10) -> list[tuple[float, float, int]]:
    """(mean prediction, share missed, rows) of equally filled bins."""
    order = np.argsort(p_miss, kind="stable")
    return [
        (float(p_miss[part].mean()), float(missed[part].mean()), len(part))
        for part in np.array_split(order, bins)
        if len(part)
    ]


def calibration_plot(missed: Array, p_miss: Array, title: str) -> Figure:
    """Predicted against realised share of missed service levels, by tenths of the rows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1, label="perfect")
    if len(missed):
        predicted, realised, _ = zip(*_bins(missed, p_miss), strict=True)
        axes.plot(predicted, realised, marker="o", label=f"{len(missed)} rows, tenths")
    axes.set(xlabel="predicted P(missed)", ylabel="share missed", title=title, xlim=(0, 1), ylim=(0, 1))
    axes.legend()
    return figure


def _judged(rows: pa.Table) -> tuple[pa.Table, Array]:
    """The rows that have been judged, and how."""
    known = rows.filter(pc.is_valid(rows.column("missed")))
    return known, _floats(known, "missed")


# --- the model --------------------------------------------------------------------------------------------------------


@dataclass
class DurationLearner:
    """Boosters for P(missed), for log(1 + remaining hours) and, where recorded, for log(1 + hands-on hours)."""

    learns: ClassVar[bool] = True

    encoding: Encoding
    miss: list[lightgbm.Booster]
    duration: lightgbm.Booster
    effort: lightgbm.Booster | None
    calibration: dict[str, tuple[float, float]]
    spread: Spread
    effort_spread: Spread | None
    spec: dict[str, Any]
    threads: int = 1
    sets: Sets | None = None
    hours: Bands | None = None

    @classmethod
    def fit(cls, rows: pa.Table, spec: Mapping[str, Any], *, seed: int, device: str, threads: int) -> Self:
        """Learns from feature rows with what is known of their outcomes, sorted by (day, key).

        spec: the fields of DurationModel with ``numeric`` and ``categorical``, the feature columns.
        The last calibration and the spread of times come from predictions for entities that a twin had not seen; sets and
        intervals (``models.evaluation.conformal``) from those of a coarser twin that had seen neither the entity nor the day.
        """
        settings = _settings(spec)
        encoding = Encoding.learn(
            rows,
            spec["numeric"],
            spec["categorical"],
            max_categories=settings.max_categories,
            min_count=settings.min_category_count,
        )
        x = encoding.arrow(rows)
        encoding = encoding.trained_on(x)
        labels = settle(rows, settings.group)
        weight = _recency(rows, settings.half_life_days)
        age = np.nan_to_num(_floats(rows, "age_hours"))
        left = np.log1p(np.maximum(np.expm1(labels.log_hours) - age, 0.0))
        effort = np.log1p(np.maximum(_floats(rows, "effort_hours"), 0.0))
        fold = np.unique(_texts(rows, "entity_id"), return_inverse=True)[1] % FOLDS
        shape = {
            "num_leaves": settings.num_leaves,
            "min_data_in_leaf": settings.min_data_in_leaf,
            "feature_fraction": 0.5,
            "bagging_fraction": 0.7,
            "bagging_freq": 1,
            "lambda_l2": 5.0,
            "cat_smooth": 30.0,
            "cat_l2": 20.0,
            "max_cat_threshold": 16,
        }

        def learn(objective: str, y: Array, these: Array, seed: int, **other: Any) -> lightgbm.Booster:
            more = {"rounds": settings.rounds, "learning_rate": settings.learning_rate, **other}
            return train(
                chosen(x, these),
                y[these],
                encoding=encoding,
                params={**shape, "objective": objective, "learning_rate": more["learning_rate"]},
                rounds=more["rounds"],
                seed=seed,
                device=device,
                threads=threads,
                weight=weight[these],
            )

        def unseen(objective: str, y: Array, these: Array) -> Array:
            """Predictions for each chosen row by a twin trained without its entity."""
            out = np.full(len(y), np.nan)
            for k in range(FOLDS):
                others, mine = these & (fold != k), these & (fold == k)
                if others.any() and mine.any():
                    out[mine] = predict(learn(objective, y, others, seed), chosen(x, mine), threads=threads)
            return np.asarray(out[these])

        every, moment = np.ones(len(x), bool), _texts(rows, "moment")
        guess = np.nan_to_num(unseen("cross_entropy", labels.missed, every), nan=0.5)
        spread = Spread.learn(np.nan_to_num(unseen("regression", left, every), nan=float(left.mean())), left)
        calibration = {
            str(one): _platt(guess[moment == one], labels.missed[moment == one], weight[moment == one])
            for one in np.unique(moment)
        }
        sets, hours = None, None
        if "day" in rows.column_names:
            day = _days(rows)
            p, later = np.full(len(x), np.nan), np.full(len(x), np.nan)
            rough = coarser(settings.rounds, settings.learning_rate)
            for others, mine in halves(day, _texts(rows, "entity_id")):
                p[mine] = predict(
                    learn("cross_entropy", labels.missed, others, seed, **rough), chosen(x, mine), threads=threads
                )
                later[mine] = predict(
                    learn("regression", left, others, seed, **rough), chosen(x, mine), threads=threads
                )
            told = ~np.isnan(p)
            known = _calibrated(_logit(p[told]), moment[told], calibration)
            part = None if settings.calibrate_by is None else _texts(rows, settings.calibrate_by)[told]
            sets = Sets.learn(known, labels.missed[told], day[told], moment[told], settings.confidence, part)
            settled = told & _mostly(~np.isnan(_floats(rows, "handling_hours")), day, RESOLVED)
            hours = Bands.learn(later[settled], (left - later)[settled], day[settled], settings.confidence)
        timed = ~np.isnan(effort)
        recorded = timed.sum() >= 10 * settings.min_data_in_leaf
        return cls(
            encoding=encoding,
            miss=[learn("cross_entropy", labels.missed, every, seed + i) for i in range(settings.members)],
            duration=learn("regression", left, every, seed),
            effort=learn("regression", effort, timed, seed) if recorded else None,
            calibration=calibration,
            spread=spread,
            effort_spread=Spread.learn(unseen("regression", effort, timed), effort[timed]) if recorded else None,
            spec=dict(spec),
            threads=threads,
            sets=sets,
            hours=hours,
        )

    def p_miss(self, features: pa.Table) -> Array:
        """P(missed) of each row, calibrated for its moment."""
        x = self.encoding.matrix(features)
        raw = np.mean([_logit(predict(one, x, threads=self.threads)) for one in self.miss], axis=0)
        return _calibrated(raw, _texts(features, "moment"), self.calibration)

    def score(self, features: pa.Table) -> pa.Table:
        """Key columns with p_miss, p_miss_now, p_miss_later, effort_hours and uncertainty, in the given order; then what
        holds with the probability ``confidence``: may_miss and may_hit (the outcomes that are possible), and hours_low to
        hours_high (until it is resolved). Null where too few days calibrated it; all null in a row with a missing value that
        the model never met (``unread``)."""
        x = self.encoding.matrix(features)
        settings = _settings(self.spec)
        effort = (
            np.full(len(x), settings.effort_hours)
            if self.effort is None
            else np.expm1(np.maximum(predict(self.effort, x, threads=self.threads), 0.0))
        )
        scores = _scored(
            features,
            self.p_miss(features),
            predict(self.duration, x, threads=self.threads),
            self.spread,
            effort,
            self.effort_spread,
            settings.delay_hours,
            self.sets,
            self.hours,
            settings.calibrate_by,
        )
        return without(scores, self.encoding.unread(features))

    def unread(self, features: pa.Table) -> dict[str, list[str]]:
        """Columns that are missing in some rows and never were in training, with the entities of those rows."""
        return named(self.encoding.unread(features), features)

    def contributions(self, features: pa.Table) -> pa.Table:
        """Key columns with the three ``features`` that moved P(missed) most, and their ``effects`` in log odds."""
        top = top_contributions(self.miss[0], self.encoding, features, threads=self.threads)
        return pa.table({**_keys(features), **{name: top.column(name) for name in top.column_names}})

    def gains(self) -> dict[str, float]:
        """Each column's share of the Boosters' gain."""
        return gains([*self.miss, self.duration, *([] if self.effort is None else [self.effort])], self.encoding)

    def because(self, row: pa.Table) -> Because:
        """Why one ticket's score is what it is, and which heads its index rests on.

        The index is cost x [P(miss | later) - P(miss | now)] / E[effort]. With a known due time both probabilities come
        from the hands-on time (from the handling time where none is recorded), else from P(miss) and handling time.
        """
        due, timed = not np.isnan(_floats(row, "hours_to_due")[0]), self.effort is not None
        uses = {"effort"} if timed else set()
        uses |= set() if timed and due else {"duration"}
        uses |= set() if due else {"miss"}
        kinds: list[tuple[str, list[lightgbm.Booster], str, str]] = [
            ("miss", self.miss, "chance of missing the service level, before its calibration", "log odds"),
            ("duration", [self.duration], "remaining handling time", "log(1 + hours)"),
        ]
        if self.effort is not None:
            kinds.append(("effort", [self.effort], "hands-on time", "log(1 + hours)"))
        heads = []
        for name, members, quantity, unit in kinds:
            rests = ["the index"] if name in uses else []
            rests += ["the review line (uncertainty)"] if name == "miss" else []
            if rests:
                heads.append(
                    head(members, self.encoding, row, threads=self.threads, name=name, quantity=quantity, unit=unit,
                         rests=" and ".join(rests), decides=name in uses)
                )  # fmt: skip
        parts = {c: v[0] for c, v in self.score(row).to_pydict().items() if c not in ("entity_id", "moment")}
        if due:
            parts["hours_to_due"] = float(_floats(row, "hours_to_due")[0])
        if not timed:
            parts["effort_hours is"] = "the same for every ticket: the source records no hands-on time"
        how = "its due time is known" if due else "it has no due time"
        named = " and ".join(f"'{one.name}' ({one.quantity})" for one in heads if one.decides)
        says = f"The index rests on {named}, since {how}" + (", and on the hours left to it." if due else ".")
        return Because(tuple(heads), parts, ("hours_to_due",) if due else (), says)

    def evaluate(self, rows: pa.Table) -> dict[str, float]:
        """``figures`` of p_miss on the judged rows; ``confidence_figures`` where sets and intervals were calibrated; and
        not_judged, the rows whose outcome is not known yet, of which none of this speaks."""
        known, missed = _judged(rows)
        scores = self.score(known)
        confident = confidence_figures(known, missed, scores, _settings(self.spec).calibrate_by)
        return {**figures(missed, _floats(scores, "p_miss")), **confident, "not_judged": float(len(rows) - len(known))}

    def plots(self, rows: pa.Table) -> dict[str, Figure]:
        """Calibration and the review line on the judged rows, and the features by their gain."""
        from matplotlib.figure import Figure

        known, missed = _judged(rows)
        gains = np.mean([one.feature_importance("gain") for one in self.miss], axis=0)
        top = np.argsort(gains, kind="stable")[-25:]
        figure = Figure(figsize=(7, 7), layout="constrained")
        axes = figure.subplots()
        axes.barh([self.encoding.names[i] for i in top], gains[top])
        axes.set(xlabel="gain", title="What P(missed) depends on")
        calibration = calibration_plot(missed, self.p_miss(known), "Calibration")
        return {
            "calibration": calibration,
            "feature_importance": figure,
            "review_line": self._review_plot(known, missed),
        }

    def _review_plot(self, known: pa.Table, missed: Array) -> Figure:
        """What share is decided, and how rightly, at each review limit: says where ``review_above`` should lie."""
        from matplotlib.figure import Figure

        scores = self.score(known)
        curve = coverage_curve(_floats(scores, "uncertainty"), _floats(scores, "p_miss"), missed.astype(bool))
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot(curve["coverage"].to_numpy(), curve["accuracy"].to_numpy())
        axes.set(
            xlabel="share of tickets decided, the surest first", ylabel="share judged rightly", title="Review line"
        )
        return figure

    def reads(self) -> dict[str, bool]:
        """The features of the Boosters, the moment and the part by which P(missed) and sets are calibrated, the hours left."""
        part = _settings(self.spec).calibrate_by
        more = ["moment", "hours_to_due", *([] if part is None else [part])]
        return {"entity_id": False, **dict.fromkeys([*self.encoding.names, *more], True)}

    def losses(self, rows: pa.Table) -> dict[str, dict[int, float]]:
        """log_loss: of P(missed) on the judged rows, before its calibration. hours_error, effort_error: mean absolute error of
        log(1 + remaining hours) and of log(1 + hands-on hours) where they are known."""
        missed, hours = _floats(rows, "missed"), _floats(rows, "handling_hours")
        left = np.log1p(np.maximum(hours - np.nan_to_num(_floats(rows, "age_hours")), 0.0))
        effort = np.log1p(np.maximum(_floats(rows, "effort_hours"), 0.0))
        x = self.encoding.matrix(rows)
        judged = ~np.isnan(missed)
        members = [dict(by_rounds(one, x[judged])) for one in self.miss]
        odds = {n: np.mean([one[n] for one in members], axis=0) for n in members[0]}
        out = {
            "log_loss": {n: float(np.logaddexp(0, np.where(missed[judged] > 0, -z, z)).mean()) for n, z in odds.items()}
        }
        for name, booster, actual in (("hours_error", self.duration, left), ("effort_error", self.effort, effort)):
            if booster is not None:
                known = ~np.isnan(actual)
                out[name] = {n: float(np.abs(raw - actual[known]).mean()) for n, raw in by_rounds(booster, x[known])}
        return {name: losses for name, losses in out.items() if losses}

    def files(self) -> dict[str, bytes]:
        """Booster texts, and meta.json with their digests and all else."""
        boosters = {f"miss_{i}.txt": booster_bytes(one) for i, one in enumerate(self.miss)}
        boosters["duration.txt"] = booster_bytes(self.duration)
        if self.effort is not None:
            boosters["effort.txt"] = booster_bytes(self.effort)
        meta = {
            "kind": "duration",
            "boosters": {name: digest(text) for name, text in boosters.items()},
            "encoding": json.loads(self.encoding.to_json()),
            "calibration": self.calibration,
            "spread": self.spread.to_dict(),
            "effort_spread": None if self.effort_spread is None else self.effort_spread.to_dict(),
            "spec": self.spec,
            "threads": self.threads,
            "sets": None if self.sets is None else self.sets.to_dict(),
            "hours": None if self.hours is None else self.hours.to_dict(),
        }
        return {**boosters, "meta.json": json.dumps(meta, ensure_ascii=False, indent=1).encode()}

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> Self:
        """The model that ``files()`` described; raises WrongDigest for a Booster that meta.json does not name so."""
        meta = json.loads(files["meta.json"])
        boosters = {name: read_booster(files[name], sha256) for name, sha256 in meta["boosters"].items()}
        return cls(
            encoding=Encoding.from_json(json.dumps(meta["encoding"])),
            miss=[boosters[name] for name in boosters if name.startswith("miss_")],
            duration=boosters["duration.txt"],
            effort=boosters.get("effort.txt"),
            calibration={name: (a, b) for name, (a, b) in meta["calibration"].items()},
            spread=Spread.from_dict(meta["spread"]),
            effort_spread=None if meta["effort_spread"] is None else Spread.from_dict(meta["effort_spread"]),
            spec=meta["spec"],
            threads=meta["threads"],
            # a model registered before it had them scores as it did, with nulls in their columns
            sets=None if meta.get("sets") is None else Sets.from_dict(meta["sets"]),
            hours=None if meta.get("hours") is None else Bands.from_dict(meta["hours"]),
        )


def _days(rows: pa.Table) -> Array:
    return np.asarray(rows.column("day").cast(pa.date32()).cast(pa.int32()).to_numpy(zero_copy_only=False))


def _mostly(mark: Array, day: Array, share: float) -> Array:
    """The rows of the days on which at least ``share`` of the rows are marked."""
    _, code = np.unique(day, return_inverse=True)
    return np.asarray((np.bincount(code, mark) >= share * np.bincount(code))[code])


def _recency(rows: pa.Table, half_life_days: float | None) -> Array:
    """Weights that halve every ``half_life_days`` before the newest row."""
    if half_life_days is None or "day" not in rows.column_names:
        return np.ones(rows.num_rows)
    day = np.asarray(rows.column("day").cast(pa.date32()).cast(pa.int32()).to_numpy(zero_copy_only=False), np.float64)
    return np.asarray(0.5 ** ((day.max() - day) / half_life_days))


def _logit(p: Array) -> Array:
    p = np.clip(p, 1e-9, 1 - 1e-9)
    return np.asarray(np.log(p) - np.log1p(-p))


def _calibrated(raw: Array, moment: Array, calibration: Mapping[str, tuple[float, float]]) -> Array:
    """P(missed) from log odds, by the calibration of each row's moment; one never seen takes the last known one's."""
    known = list(calibration.values())
    which = [np.asarray(moment == one) for one in calibration]
    slope = np.select(which, [a for a, _ in known], known[-1][0])
    shift = np.select(which, [b for _, b in known], known[-1][1])
    return np.asarray(1.0 / (1.0 + np.exp(-(slope * raw + shift))))


def _platt(p: Array, target: Array, weight: Array) -> tuple[float, float]:
    """Slope and shift on the log odds that fit ``target`` best (Platt 1999), by Newton's method."""
    z, beta = _logit(p), np.array([1.0, 0.0])
    design = np.column_stack([z, np.ones_like(z)])
    for _ in range(30):
        q = 1.0 / (1.0 + np.exp(-design @ beta))
        gradient = design.T @ (weight * (target - q)) - 1e-3 * (beta - [1.0, 0.0])
        hessian = (design * (weight * q * (1 - q))[:, None]).T @ design + 1e-3 * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        beta = beta + np.clip(step, -1.0, 1.0)
        if np.abs(step).max() < 1e-10:
            break
    return float(max(beta[0], 0.0)), float(beta[1])


# --- the rule ---------------------------------------------------------------------------------------------------------


@dataclass
class DurationRule:
    """Smoothed frequencies of missed service levels by a few features: the bar for the model, and its fall-back."""

    learns: ClassVar[bool] = True

    columns: tuple[str, ...]
    rates: dict[str, float]
    spread: Spread
    mean_log_hours: float
    spec: dict[str, Any]

    @classmethod
    def fit(cls, rows: pa.Table, spec: Mapping[str, Any], *, seed: int, device: str, threads: int) -> Self:
        """Counts expected misses by ever finer groups, each drawn towards the one above it by 20 rows' worth."""
        del seed, device, threads  # nothing is drawn and nothing is trained
        settings = _settings(spec)
        labels = settle(rows, settings.group)
        rates = {"[]": float(labels.missed.mean())}
        for depth in range(1, len(settings.rule_by) + 1):
            names, code = np.unique(_group(rows, settings.rule_by[:depth]), return_inverse=True)
            total, count = np.bincount(code, labels.missed), np.bincount(code)
            for name, missed, n in zip(names.tolist(), total.tolist(), count.tolist(), strict=True):
                above = rates[json.dumps(json.loads(name)[:-1])]
                rates[name] = (missed + 20 * above) / (n + 20)
        middle = float(labels.log_hours.mean())
        spread = Spread.learn(np.full(rows.num_rows, middle), labels.log_hours, levels=1)
        return cls(settings.rule_by, rates, spread, middle, dict(spec))

    def p_miss(self, features: pa.Table) -> Array:
        """P(missed) of the finest group of a row that is known."""
        out = np.full(features.num_rows, self.rates["[]"])
        for depth in range(1, len(self.columns) + 1):
            names, code = np.unique(_group(features, self.columns[:depth]), return_inverse=True)
            rate = np.array([self.rates.get(name, np.nan) for name in names.tolist()])[code]
            out = np.where(np.isnan(rate), out, rate)
        return out

    def score(self, features: pa.Table) -> pa.Table:
        """As DurationLearner.score, with one distribution of times for all."""
        settings = _settings(self.spec)
        effort = np.full(features.num_rows, settings.effort_hours)
        expected = np.full(features.num_rows, self.mean_log_hours)
        return _scored(features, self.p_miss(features), expected, self.spread, effort, None, settings.delay_hours)

    def evaluate(self, rows: pa.Table) -> dict[str, float]:
        """``figures`` of p_miss on the judged rows."""
        known, missed = _judged(rows)
        return figures(missed, self.p_miss(known))

    def because(self, row: pa.Table) -> Because:
        """The frequencies that made one ticket's score; there is no Booster."""
        parts = {c: v[0] for c, v in self.score(row).to_pydict().items() if c not in ("entity_id", "moment")}
        names = [f"{c} {_texts(row, c)[0] or '(none)'}" for c in self.columns]
        parts["misses counted by"] = ", ".join(names)
        due = not np.isnan(_floats(row, "hours_to_due")[0])
        if due:
            parts["hours_to_due"] = float(_floats(row, "hours_to_due")[0])
        says = (
            "No model scored this ticket: the rule counted how often tickets like it missed their service level, and "
            "took one distribution of times and one effort for all."
        )
        return Because((), parts, ("hours_to_due", *self.columns) if due else self.columns, says)

    def files(self) -> dict[str, bytes]:
        """rule.json."""
        raw = {
            "kind": "duration",
            "columns": self.columns,
            "rates": self.rates,
            "spread": self.spread.to_dict(),
            "mean_log_hours": self.mean_log_hours,
            "spec": self.spec,
        }
        return {"rule.json": json.dumps(raw, ensure_ascii=False, indent=1).encode()}

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> Self:
        raw = json.loads(files["rule.json"])
        return cls(
            tuple(raw["columns"]), raw["rates"], Spread.from_dict(raw["spread"]), raw["mean_log_hours"], raw["spec"]
        )


def _group(table: pa.Table, columns: Sequence[str]) -> Array:
    """Each row's values of some columns as a JSON list."""
    # json.dumps of the distinct combinations only: rows are many, groups are few
    texts = np.column_stack([_texts(table, name) for name in columns])
    distinct, code = np.unique(texts, axis=0, return_inverse=True)
    return np.array([json.dumps(row) for row in distinct.tolist()], dtype="U")[code.ravel()]


# --- what the rest of the product asks of the kind --------------------------------------------------------------------


def read(rows: pa.Table) -> dict[str, np.ndarray]:
    """P(missed), whether it was (NaN until judged), and whether the set of possible outcomes held it."""
    missed = numbers(rows["missed"])
    found = {"predicted": numbers(rows["p_miss"]), "actual": missed}
    if "may_miss" in rows.schema.names:
        inside = np.where(missed > 0, numbers(rows["may_miss"]), numbers(rows["may_hit"]))
        found |= {"promised": numbers(rows["confidence"]), "inside": np.where(np.isnan(missed), np.nan, inside)}
    return found


def student(teacher: DurationLearner, small_one: DurationLearner, rows: pa.Table, small: Small, threads: int) -> None:
    """Boosters of P(missed), time and effort that say what the teacher's say."""
    x = teacher.encoding.matrix(rows)
    small_one.miss = [small(x, teacher.p_miss(rows), "cross_entropy", None)]
    small_one.calibration = dict.fromkeys(teacher.calibration, (1.0, 0.0))  # what it learned from is calibrated
    small_one.duration = small(x, predict(teacher.duration, x, threads=threads), "regression", None)
    if teacher.effort is not None:
        small_one.effort = small(x, predict(teacher.effort, x, threads=threads), "regression", None)


def _log_loss(p: Array, missed: Array) -> Array:
    safe = np.clip(p, 1e-12, 1 - 1e-12)
    return np.asarray(-np.log(np.where(missed > 0, safe, 1 - safe)))


def _p_miss(model: Any, rows: pa.Table) -> Array:
    return np.asarray(model.p_miss(rows), dtype=np.float64)


KIND = Kind(
    settings=DurationModel,
    learner=DurationLearner,
    rule=DurationRule,
    policy="priority_queue",
    scores="probability",
    principal="p_miss",
    answer="missed",
    read_with=(),
    blank=None,
    read=read,
    features=(),
    outcomes=("missed",),
    metrics={
        "brier": "lower", "log_loss": "lower", "calibration_error": "lower", "roc_auc": "higher", "average_precision": "higher",
    },
    columns=lambda spec: {
        "group": (spec.group,),
        "rule_by": spec.rule_by,
        **({} if spec.calibrate_by is None else {"calibrate_by": (spec.calibrate_by,)}),
    },
    comparison=Comparison(
        "missed",
        _p_miss,
        {"brier": lambda p, missed: (p - missed) ** 2, "log_loss": _log_loss},
        lambda found: found.get("calibration_error", float("nan")),
        "expected calibration error",
        _p_miss,
        squares_apart,
        {
            "calibration_error": "it is told of groups of rows with like probabilities",
            "roc_auc": "it is told of pairs of rows",
            "average_precision": "it is told of the order of all rows",
        },
    ),
    space={
        "rounds": Range(30, 800, whole=True),
        "num_leaves": Range(4, 63, whole=True),
        "learning_rate": Range(0.01, 0.2),
        "min_data_in_leaf": Range(10, 200, whole=True),
        "half_life_days": Range(7, 180),
    },
    student=student,
)  # fmt: skip
