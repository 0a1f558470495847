"""What a line earns at every spend: a Booster for the level, a hierarchical elasticity for the slope, and the rule
that both must beat.

Belongs here: the level (what comes of the money that is spent anyway), how level and slope make a curve, figures and
pictures of both. Does not: the elasticities themselves (`models.elasticity`), which spend to choose (`models.policies.budget`),
reading tables.

Two different questions, two answers. *What will a line earn tomorrow at what it spends?* is observed every day, so the
Booster learns it. *What would it earn at another spend?* is not: observed spend chases demand, and only the logged
random perturbations tell.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, field_validator

from models import booster as boosters
from models.booster import Because, Encoding
from models.elasticity import Elasticities, fit_elasticities, response
from models.evaluation.conformal import Bands, coarser, coverage, halves
from models.learners.base import Comparison, Kind, ModelSettings, Range, Small, numbers, squares_apart_by_size

if TYPE_CHECKING:
    import lightgbm
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

Floats = np.ndarray[Any, np.dtype[np.float64]]

MICROS = 1e6
WINDOWS = (1, 7, 28)
STEPS = 4  # the windows' shares are multiples of 1 / STEPS
BELIEVED_DAYS = (0.25, 1.0, 4.0, 16.0)  # how many days of a line's own money its campaign's return may count for
SHRINK_DAYS = 0.25  # the same for a window's next longer one
SPEND_SHIFTS = (
    "spend_shift_1",
    "spend_shift_7",
)  # the learner's own columns: the day's spend against the line's trailing ones, as logs
_MADE_FROM = {
    "spend_shift_1": ("budget_micros", "delivered_7", "cost_1"),
    "spend_shift_7": ("budget_micros", "delivered_7", "cost_7"),
}
_LEVEL_READS = (
    *(f"{what}_{w}" for w in WINDOWS for what in ("cost", "value")),
    *(f"active_days_{w}" for w in WINDOWS[1:]),
    f"campaign_ratio_{WINDOWS[-1]}",
    "delivered_7",
)  # features that the level reads beside its Booster
FARTHEST = 5.0  # a correction is held to [1 / FARTHEST, FARTHEST]; so are the ratios that it learns from


class ResponseModel(ModelSettings):
    """`model` section of a workflow.yaml: kind `response`."""

    kind: Literal["response"] = Field(
        description="A response curve for each line: level by a Booster, slope by logged perturbations"
    )
    rounds: int = Field(default=150, gt=0, description="Trees of the level's Booster")
    learning_rate: float = Field(default=0.02, gt=0, le=1, description="How much of each tree is taken")
    leaves: int = Field(default=8, ge=2, description="Leaves of a tree")
    rows_in_leaf: int = Field(default=40, gt=0, description="Fewest training rows in a leaf")
    confidence: float = Field(
        default=0.9,
        ge=0.5,
        lt=1,
        description="What the interval of a day's value holds at least, on days exchangeable with those learned from",
    )
    l2: float = Field(default=5.0, ge=0, description="L2 penalty on a leaf's value")
    column_share: float = Field(default=0.7, gt=0, le=1, description="Share of the columns that a tree may look at")
    row_share: float = Field(default=0.5, gt=0, le=1, description="Share of the rows that a tree sees")
    grid: tuple[float, ...] = Field(
        default=(0.5, 0.625, 0.75, 0.875, 1.0, 1.125, 1.25, 1.375, 1.5),
        description="Points of the curve, as multiples of the status quo, ascending; 1.0 must be one of them",
    )
    group: tuple[str, ...] = Field(
        default=("segment", "format"),
        min_length=1,
        description="Feature columns that together name the lines which resemble each other in slope",
    )
    prior_elasticity: float = Field(
        default=0.5, ge=0, le=1, description="Mean elasticity believed before any perturbation was logged"
    )
    prior_elasticity_sd: float = Field(default=0.29, gt=0, description="Its standard deviation")
    prior_source: str = Field(
        default="assumed: uniform on (0, 1), from spend without any effect to spend that never saturates",
        description="Where the prior comes from; shown wherever the prior is used",
    )

    @field_validator("grid")
    @classmethod
    def _ascending_through_one(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if 1.0 not in value or value[0] < 0 or any(a >= b for a, b in itertools.pairwise(value)):
            raise ValueError(f"must be ascending, not negative, and hold 1.0; found {list(value)}")
        return value


class ResponseLearner:
    """The level's Booster and the elasticities; see the module.

    The level at a spend s is base x s x correction. base is a mix of the line's trailing value / cost over 1, 7 and 28
    days, with shares learned by least absolute error; each is drawn towards the next longer one, the longest towards
    the campaign's, as far as least absolute error says. correction is the Booster's: trained on value / (base x s)
    with weight base x s under the absolute loss, so that the loss is the absolute error of the value itself. A row
    whose spend was perturbed by a logged multiplier m is read as level x m ** elasticity, the level being that of the
    spend without m.
    """

    learns: ClassVar[bool] = True

    def __init__(
        self,
        spec: ResponseModel,
        encoding: Encoding,
        booster: lightgbm.Booster,
        believed_days: float,
        shares: Sequence[float],
        overall_ratio: float,
        elasticities: Elasticities,
        notes: Sequence[str],
        threads: int = 1,
        bands: Bands | None = None,
    ) -> None:
        self.spec, self.encoding, self.booster, self.shares = spec, encoding, booster, tuple(shares)
        self.believed_days, self.bands = believed_days, bands
        self.overall_ratio, self.elasticities, self.notes, self.threads = (
            overall_ratio,
            elasticities,
            tuple(notes),
            threads,
        )

    @classmethod
    def fit(cls, rows: pa.Table, spec: Mapping[str, Any], *, seed: int, device: str, threads: int) -> Self:
        """Learn from matured rows: features plus the outcome columns cost, value, budget, explore_multiplier,
        explore_probability (of the day after). `spec` is the model section plus `numeric` and `categorical`.

        Raises ValueError where no row has both cost and a trailing return to correct; KeyError for a missing column,
        naming it.
        """
        said, numeric, categorical = _split(spec)
        cost, value, multiplier = _numbers(rows, "cost"), _numbers(rows, "value"), _multiplier(rows)
        total = cost.sum()
        overall = float(value.sum() / total) if total > 0 else 1.0
        undrawn = cost / multiplier

        elasticities, note = _slopes(rows, said)
        slope = elasticities.of(*_names(rows, said.group))[0]
        lift = _lift(multiplier, slope)
        believed, shares = _best_base(rows, overall, undrawn * lift, value)

        ratios = _ratios(rows, believed, overall)
        level = _weighted(ratios, shares) * undrawn * lift
        told = level > 0
        if not told.any():
            raise ValueError(
                f"none of {rows.num_rows} rows has a cost and a trailing return: nothing to learn the level from"
            )
        encoding = Encoding.learn(rows, [*numeric], categorical)
        encoding = Encoding((*encoding.numeric, *SPEND_SHIFTS), encoding.categorical)
        known = boosters.chosen(encoding.arrow(_with_shifts(rows, undrawn)), told)
        encoding = encoding.trained_on(known)
        weight = level[told] / level[told].mean()
        ratio = np.clip(value[told] / level[told], 0, FARTHEST)

        def learn(these: np.ndarray[Any, Any], rounds: int, learning_rate: float) -> lightgbm.Booster:
            return boosters.train(
                boosters.chosen(known, these),
                ratio[these],
                encoding=encoding,
                params={
                    "objective": "regression_l1",
                    "num_leaves": said.leaves,
                    "learning_rate": learning_rate,
                    "min_data_in_leaf": said.rows_in_leaf,
                    "lambda_l2": said.l2,
                    "feature_fraction": said.column_share,
                    "bagging_fraction": said.row_share,
                    "bagging_freq": 1,
                    "boost_from_average": False,
                },
                rounds=rounds,
                seed=seed,
                device=device,
                threads=threads,
                weight=weight[these],
                init_score=np.ones(these.sum()),
            )

        # as score() will see them: at the status quo, whatever was spent
        usual, day = _usual_spend(rows), _days(rows)
        asked = encoding.arrow(_with_shifts(rows, usual))
        base = _weighted(ratios, shares) * usual * _lift(_multiplier(rows, "explore_multiplier_today"), slope)
        expected = np.full(len(day), np.nan)
        for others, mine in halves(day):
            if others[told].any():
                twin = learn(others[told], **coarser(said.rounds, said.learning_rate))
                moved = boosters.predict(twin, boosters.chosen(asked, mine), threads=threads, raw=True)
                expected[mine] = base[mine] * _corrected(moved)
        bands = Bands.learn(expected, _shares_of(_at_status_quo(rows, slope), expected), day, said.confidence)
        return cls(
            said,
            encoding,
            learn(np.ones(len(ratio), bool), said.rounds, said.learning_rate),
            believed,
            shares.tolist(),
            overall,
            elasticities,
            [note],
            threads,
            bands,
        )

    def level(self, features: pa.Table, spend: Floats) -> Floats:
        """Expected value (n,) of each line at the `spend` (n,), currency, that comes about as spend usually does: no
        perturbation, no policy."""
        base = _weighted(_ratios(features, self.believed_days, self.overall_ratio), self.shares)
        moved = boosters.predict(
            self.booster, self.encoding.matrix(_with_shifts(features, spend)), threads=self.threads, raw=True
        )
        return np.asarray(base * spend * _corrected(moved))

    def score(self, features: pa.Table) -> pa.Table:
        """entity_id, spends LIST<BIGINT> (micros, the grid around budget_micros), values LIST<DOUBLE> (expected value
        at each, currency), level (at the status quo), elasticity and its sd; and value_low to value_high, which hold the
        day's value at the status quo with the probability confidence (null where too few days calibrated them). All null in
        a row with a missing value that the model never met (``unread``)."""
        level, mean, sd = self._level_of(features)
        scores = _curves(features, self.spec.grid, level, mean, sd, self.bands)
        return boosters.without(scores, self._unread(features))

    def unread(self, features: pa.Table) -> dict[str, list[str]]:
        """Columns that are missing in some rows and never were in training, with the entities of those rows."""
        return boosters.named(self._unread(features), features)

    def _unread(self, features: pa.Table) -> dict[str, np.ndarray[Any, Any]]:
        found = self.encoding.unread(_with_shifts(features, _usual_spend(features)))
        # of a line that spends nothing, or never did, a shift of 0 says what there is to say
        return {name: rows for name, rows in found.items() if name not in SPEND_SHIFTS}

    def _level_of(self, features: pa.Table) -> tuple[Floats, Floats, Floats]:
        """Expected value at the status quo, elasticity and its sd, each (n,)."""
        mean, sd = self.elasticities.of(*_names(features, self.spec.group))
        multiplier = _multiplier(features, "explore_multiplier_today")
        return self.level(features, _usual_spend(features)) * _lift(multiplier, mean), mean, sd

    def expect(self, rows: pa.Table) -> Floats:
        """Expected value (n,) of each row at its realised cost and logged multiplier."""
        multiplier = _multiplier(rows)
        slope = self.elasticities.of(*_names(rows, self.spec.group))[0]
        return np.asarray(self.level(rows, _numbers(rows, "cost") / multiplier) * _lift(multiplier, slope))

    def reads(self) -> dict[str, bool]:
        """The columns of the level and of the slope, the status quo, and those that the Booster corrects by."""
        own = [name for name in self.encoding.names if name not in SPEND_SHIFTS]
        status_quo = ("entity_id", "budget_micros", "explore_multiplier_today")
        return dict.fromkeys([*status_quo, *_LEVEL_READS, *self.spec.group, *own], True)

    def losses(self, rows: pa.Table) -> dict[str, dict[int, float]]:
        """mae: as ``evaluate`` has it, currency a line a day."""
        multiplier, value = _multiplier(rows), _numbers(rows, "value")
        lift = _lift(multiplier, self.elasticities.of(*_names(rows, self.spec.group))[0])
        spend = _numbers(rows, "cost") / multiplier
        base = _weighted(_ratios(rows, self.believed_days, self.overall_ratio), self.shares) * spend * lift
        x = self.encoding.matrix(_with_shifts(rows, spend))
        moved = boosters.by_rounds(self.booster, x)
        return {"mae": {n: float(np.abs(base * _corrected(raw) - value).mean()) for n, raw in moved}}

    def files(self) -> dict[str, bytes]:
        """level.txt (the Booster) and meta.json (all the rest, and the Booster's digest)."""
        level = boosters.booster_bytes(self.booster)
        meta = {
            "spec": self.spec.model_dump(mode="json"),
            "encoding": json.loads(self.encoding.to_json()),
            "believed_days": self.believed_days,
            "shares": self.shares,
            "overall_ratio": self.overall_ratio,
            "elasticities": json.loads(self.elasticities.to_json()),
            "notes": self.notes,
            "bands": None if self.bands is None else self.bands.to_dict(),
            "level_sha256": boosters.digest(level),
        }
        return {"level.txt": level, "meta.json": json.dumps(meta, sort_keys=True, ensure_ascii=False).encode()}

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> Self:
        """The learner that `files()` described; scores equal to the bit. Raises WrongDigest where the Booster is not
        the one meant."""
        meta = json.loads(files["meta.json"])
        return cls(
            ResponseModel.model_validate(meta["spec"]),
            Encoding.from_json(json.dumps(meta["encoding"])),
            boosters.read_booster(files["level.txt"], meta["level_sha256"]),
            meta["believed_days"],
            meta["shares"],
            meta["overall_ratio"],
            Elasticities.from_json(json.dumps(meta["elasticities"])),
            meta["notes"],
            # a model registered before it had them scores as it did, with nulls in their columns
            bands=None if meta.get("bands") is None else Bands.from_dict(meta["bands"]),
        )

    def evaluate(self, rows: pa.Table) -> dict[str, float]:
        """mae and bias of the value at realised cost, currency a line a day; rule_mae on the same rows,
        better_than_rule its share saved; the shares of the windows and the elasticities' overall mean and sd
        (elasticity_is_prior: 1 where nothing was perturbed). Where intervals were calibrated: coverage (share of rows whose
        value, brought back to the status quo by the line's elasticity, lay within; each day counts alike) and width
        (median share of the level)."""
        value = _numbers(rows, "value")
        figures = _errors(self.expect(rows), value)
        rule = _errors(ResponseRule(self.spec).expect(rows), value)["mae"]
        drawn = len(self.elasticities.lines) > 0
        return {
            **figures,
            "rule_mae": rule,
            "better_than_rule": 1 - figures["mae"] / rule if rule > 0 else 0.0,
            **{f"share_{w}": share for w, share in zip(WINDOWS, self.shares, strict=True)},
            "elasticity": self.elasticities.overall_mean,
            "elasticity_sd": self.elasticities.overall_sd,
            "elasticity_is_prior": 0.0 if drawn else 1.0,
            **self._confidence(rows),
        }

    def _confidence(self, rows: pa.Table) -> dict[str, float]:
        level, slope, _ = self._level_of(rows)
        if self.bands is None or not len(level):
            return {}
        low, high = self.bands.around(level)
        share = _shares_of(_at_status_quo(rows, slope), level)
        known = np.isfinite(share) & np.isfinite(low)
        if not known.any():
            return {}
        held = ((low <= share) & (share <= high))[known]
        return {"coverage": coverage(held, _days(rows)[known]), "width": float(np.median((high - low)[known]))}

    def plots(self, rows: pa.Table) -> dict[str, Figure]:
        """predicted_realised: value by value, logarithmic, with the error by day; importance: the Booster's gain by
        column; elasticity: lines' slopes."""
        from matplotlib.figure import Figure

        predicted, value = self.expect(rows), _numbers(rows, "value")
        rule = ResponseRule(self.spec).expect(rows)
        day = rows.column("day").to_numpy().astype("datetime64[D]")

        one = Figure(figsize=(10, 4.5), layout="constrained")
        left, right = one.subplots(1, 2)
        seen = (predicted > 0) & (value > 0)
        left.loglog(predicted[seen], value[seen], ".", markersize=3, alpha=0.4)
        ends = (
            [min(predicted[seen].min(), value[seen].min()), max(predicted[seen].max(), value[seen].max())]
            if seen.any()
            else [1, 10]
        )
        left.loglog(ends, ends, color="black", linewidth=1)
        left.set(
            xlabel="predicted value of a line's next day",
            ylabel="realised value",
            title=f"{len(value)} lines and days, {int((~seen).sum())} at zero not shown",
        )
        days, at = np.unique(day, return_inverse=True)
        for name, guess in (("model", predicted), ("trailing 7-day ratio", rule)):
            right.plot(days, np.bincount(at, np.abs(guess - value)) / np.bincount(at), marker=".", label=name)
        right.set(ylabel="mean absolute error", title="by day", ylim=(0, None))
        right.tick_params(axis="x", rotation=30)
        right.legend()

        two = Figure(figsize=(7, 4.5), layout="constrained")
        axes = two.subplots()
        gain = np.asarray(self.booster.feature_importance("gain"), dtype=float)
        order = np.argsort(gain, kind="stable")
        axes.barh(np.array(self.encoding.names, dtype=object)[order], gain[order] / max(gain.sum(), 1e-300))
        axes.set(xlabel="share of the loss taken away", title="what corrects the trailing return")

        three = Figure(figsize=(7, 4.5), layout="constrained")
        axes = three.subplots()
        mean = (
            self.elasticities.line_mean if len(self.elasticities.lines) else np.array([self.elasticities.overall_mean])
        )
        axes.hist(np.clip(mean, 0, 1), bins=np.linspace(0, 1, 21).tolist())
        axes.set(xlabel="elasticity of a line's value to its spend", ylabel="lines", title="\n".join(self.notes))
        axes.title.set_fontsize(8)
        return {"predicted_realised": one, "importance": two, "elasticity": three}

    def contributions(self, features: pa.Table) -> pa.Table:
        """entity_id and the columns that moved the correction of each line's level most: `features`, `effects` (in
        shares of the base)."""
        table = _with_shifts(features, _usual_spend(features))
        top = boosters.top_contributions(self.booster, self.encoding, table, threads=self.threads)
        return top.add_column(0, "entity_id", features.column("entity_id"))

    def gains(self) -> dict[str, float]:
        """Each feature's share of the Booster's gain; that of SPEND_SHIFTS is shared by what they are made from."""
        found = boosters.gains([self.booster], self.encoding)
        for name in SPEND_SHIFTS:
            share = found.pop(name, 0.0)
            for column in _MADE_FROM[name]:
                found[column] = found.get(column, 0.0) + share / len(_MADE_FROM[name])
        return found

    def because(self, row: pa.Table) -> Because:
        """Why one line's curve is what it is: base x spend x correction is its level, the elasticity its slope."""
        spend, multiplier = _usual_spend(row), _multiplier(row, "explore_multiplier_today")
        line, group = _names(row, self.spec.group)
        mean, sd = self.elasticities.of(line, group)
        ratios = _ratios(row, self.believed_days, self.overall_ratio)
        correction = boosters.head(
            [self.booster], self.encoding, _with_shifts(row, spend), threads=self.threads, name="level",
            quantity="correction of the trailing return, less 1", unit="share of the trailing return", decides=True,
            rests="how much the line is expected to earn for its money, and so its curve",
        )  # fmt: skip
        of = "the line's own" if line[0] in self.elasticities.lines else "that of its group"
        if of != "the line's own" and group[0] not in self.elasticities.groups:
            of = "that of all lines"
        parts = {
            "trailing return": float(_weighted(ratios, self.shares)[0]),
            **{f"return over {w} days": float(r) for w, r in zip(WINDOWS, ratios[0], strict=True)},
            "usual spend": float(spend[0]),
            "correction": float(np.clip(1 + correction.score, 1 / FARTHEST, FARTHEST)),
            "level": float((self.level(row, spend) * _lift(multiplier, mean))[0]),
            "elasticity": float(mean[0]),
            "elasticity_sd": float(sd[0]),
            "elasticity is": of,
            "notes": "; ".join(self.notes),
        }
        says = (
            "The curve rests on the head 'level' (trailing return x usual spend x correction) for its height and on "
            f"the elasticity {mean[0]:.3f} ({of}) for its slope."
        )
        return Because((correction,), parts, _LEVEL_READS, says)


class ResponseRule:
    """The bar and the fall-back: the trailing 7-day value / cost times the spend. Its curve takes the prior's
    elasticity around that level.

    A line that cost nothing within the 7 days has no ratio: its value is 0.
    """

    learns: ClassVar[bool] = False

    def __init__(self, spec: ResponseModel) -> None:
        self.spec = spec
        self.notes = (_prior_note(spec),)

    @classmethod
    def fit(cls, rows: pa.Table, spec: Mapping[str, Any], *, seed: int, device: str, threads: int) -> Self:
        """Nothing is learned: the ratio stands in the features."""
        return cls(_split(spec)[0])

    def score(self, features: pa.Table) -> pa.Table:
        """The columns that ResponseLearner.score gives."""
        level = _rule_ratio(features) * (_numbers(features, "budget_micros") / MICROS)
        one = np.ones(features.num_rows)
        return _curves(
            features, self.spec.grid, level, self.spec.prior_elasticity * one, self.spec.prior_elasticity_sd * one
        )

    def expect(self, rows: pa.Table) -> Floats:
        """ratio x realised cost (n,); a logged multiplier is part of the cost."""
        return np.asarray(_rule_ratio(rows) * _numbers(rows, "cost"))

    def files(self) -> dict[str, bytes]:
        """rule.json."""
        return {
            "rule.json": json.dumps(
                {"spec": self.spec.model_dump(mode="json")}, sort_keys=True, ensure_ascii=False
            ).encode()
        }

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> Self:
        """The rule that `files()` described."""
        return cls(ResponseModel.model_validate(json.loads(files["rule.json"])["spec"]))

    def evaluate(self, rows: pa.Table) -> dict[str, float]:
        """mae and bias of ratio x realised cost, currency a line a day."""
        return _errors(self.expect(rows), _numbers(rows, "value"))

    def because(self, row: pa.Table) -> Because:
        """The ratio and the prior that made one line's curve; there is no Booster."""
        ratio, budget = float(_rule_ratio(row)[0]), float(_numbers(row, "budget_micros")[0] / MICROS)
        parts = {"return over 7 days": ratio, "budget": budget, "level": ratio * budget,
                 "elasticity": self.spec.prior_elasticity, "notes": "; ".join(self.notes)}  # fmt: skip
        says = (
            "No model scored this line: the rule took its return over 7 days times its budget, and the prior's slope."
        )
        return Because((), parts, ("ratio_7",), says)


def _corrected(moved: Floats) -> Floats:
    """What a base is multiplied by, from a Booster's raw prediction."""
    return np.asarray(np.clip(1 + moved, 1 / FARTHEST, FARTHEST))


def _weighted(ratios: Floats, shares: Sequence[float] | Floats) -> Floats:
    """ratios (n, k) times shares (k,), summed in order: a matrix product's last digit depends on the other rows."""
    total = np.zeros(len(ratios))
    for column, share in zip(ratios.T, shares, strict=True):
        total += column * share
    return total


def _split(spec: Mapping[str, Any]) -> tuple[ResponseModel, Sequence[str], Sequence[str]]:
    """The model section and the feature lists that stand beside it."""
    section = {k: v for k, v in spec.items() if k not in ("numeric", "categorical")}
    return ResponseModel.model_validate(section), spec["numeric"], spec.get("categorical", ())


def _numbers(table: pa.Table, name: str) -> Floats:
    """A column as float64, NULL as NaN."""
    if name not in table.column_names:
        raise KeyError(
            f"column {name!r} is missing: the response model needs it; the table has {', '.join(table.column_names)}"
        )
    return np.asarray(table.column(name).cast(pa.float64(), safe=False).to_numpy(), dtype=np.float64)


def _multiplier(table: pa.Table, name: str = "explore_multiplier") -> Floats:
    """What was drawn: by default for the outcome's day. 1 where nothing is logged."""
    multiplier = np.nan_to_num(_numbers(table, name), nan=1.0)
    if (multiplier <= 0).any():
        raise ValueError(
            f"{name} of row {int(np.argmax(multiplier <= 0))} is not above 0: a multiplier scales a budget"
        )
    return multiplier


def _usual_spend(features: pa.Table) -> Floats:
    """What the status quo's budget will come to, currency: as much of it as the line has spent of late, and no
    perturbation in it."""
    delivered = np.nan_to_num(_numbers(features, "delivered_7"), nan=1.0)
    return np.asarray(
        _numbers(features, "budget_micros") / MICROS * delivered / _multiplier(features, "explore_multiplier_today")
    )


def _lift(multiplier: Floats, elasticity: Floats) -> Floats:
    return np.asarray(multiplier ** np.clip(elasticity, 0, 1))


def _names(table: pa.Table, group: Sequence[str]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Line names and group names; a missing part of a group's name reads `-`."""
    parts = [table.column(c).cast(pa.string()).fill_null("-").to_numpy().astype(str) for c in group]
    joined = parts[0]
    for part in parts[1:]:
        joined = np.char.add(np.char.add(joined, "|"), part)
    return table.column("entity_id").cast(pa.string()).to_numpy().astype(str), joined


def _ratios(table: pa.Table, believed_days: float, overall: float) -> Floats:
    """Trailing value / cost over WINDOWS, shape (n, windows). The longest is drawn towards the campaign's as if
    `believed_days` more days had earned that (towards `overall` where the campaign has none); each shorter one towards
    the next longer by SHRINK_DAYS."""
    found = _numbers(table, f"campaign_ratio_{WINDOWS[-1]}")
    longer = np.where(found > 0, found, overall)
    usual = _numbers(table, f"cost_{WINDOWS[-1]}") / np.maximum(_numbers(table, f"active_days_{WINDOWS[-1]}"), 1)
    out = np.empty((table.num_rows, len(WINDOWS)))
    for at in reversed(range(len(WINDOWS))):
        believed = usual * believed_days
        cost = _numbers(table, f"cost_{WINDOWS[at]}") + believed
        worth = _numbers(table, f"value_{WINDOWS[at]}") + believed * longer
        longer = np.divide(worth, cost, out=longer.copy(), where=cost > 0)
        out[:, at] = longer
        believed_days = SHRINK_DAYS
    return out


def _best_base(rows: pa.Table, overall: float, spend: Floats, value: Floats) -> tuple[float, Floats]:
    """How far lines are drawn towards their campaign, and the windows' shares (multiples of 1 / STEPS): those of least
    absolute error."""
    options = np.array([o for o in itertools.product(range(STEPS + 1), repeat=len(WINDOWS)) if sum(o) == STEPS]) / STEPS
    best, chosen = np.inf, (BELIEVED_DAYS[0], options[0])
    for believed in BELIEVED_DAYS:
        ratios = _ratios(rows, believed, overall)
        errors = [float(np.abs(value - (ratios @ option) * spend).sum()) for option in options]
        if min(errors) < best:
            best, chosen = min(errors), (believed, options[int(np.argmin(errors))])
    return chosen


def _with_shifts(table: pa.Table, spend: Floats) -> pa.Table:
    """The table with SPEND_SHIFTS beside it; NaN where the line has no trailing spend, or none now."""
    newest = _numbers(table, "cost_1") / _multiplier(table, "explore_multiplier_today")
    usual = (newest, _numbers(table, "cost_7") / np.maximum(_numbers(table, "active_days_7"), 1))
    for name, then in zip(SPEND_SHIFTS, usual, strict=True):
        both = (spend > 0) & (then > 0)
        shift = np.full(len(spend), np.nan)
        np.log(np.divide(spend, then, out=np.ones(len(spend)), where=both), out=shift, where=both)
        table = table.append_column(name, pa.array(shift))
    return table


def _prior_note(spec: ResponseModel) -> str:
    mean, sd = spec.prior_elasticity, spec.prior_elasticity_sd
    return f"elasticities are the prior, mean {mean:g}, sd {sd:g} ({spec.prior_source}): no perturbation was logged"


def _slopes(rows: pa.Table, spec: ResponseModel) -> tuple[Elasticities, str]:
    """Elasticities from the rows with a logged probability, and a sentence saying what they rest on."""
    drawn = np.isfinite(_numbers(rows, "explore_probability"))
    kept = rows.filter(pa.array(drawn))
    multiplier = _multiplier(kept)
    budget = _numbers(kept, "budget")
    line, group = _names(kept, spec.group)
    found = fit_elasticities(
        line,
        group,
        kept.column("day"),
        budget,
        _numbers(kept, "value"),
        multiplier,
        prior_mean=spec.prior_elasticity,
        prior_sd=spec.prior_elasticity_sd,
    )
    moved = int((multiplier != 1).sum())
    if not moved:
        note = _prior_note(spec)
        log.info("%s", note)
        return Elasticities(
            [],
            *(np.zeros(0),) * 2,
            [],
            *(np.zeros(0),) * 2,
            spec.prior_elasticity,
            spec.prior_elasticity_sd,
            found.spread_within,
            found.spread_between,
        ), note
    return (
        found,
        f"elasticities rest on {moved} perturbed of {len(multiplier)} drawn line-days of {len(found.lines)} lines",
    )


def _days(rows: pa.Table) -> np.ndarray[Any, Any]:
    return np.asarray(rows.column("day").cast(pa.date32()).cast(pa.int32()).to_numpy(zero_copy_only=False))


def _at_status_quo(rows: pa.Table, elasticity: Floats) -> Floats:
    """What the day's value would have been at the status quo's budget, by the line's own elasticity; NaN without one."""
    before, after = _numbers(rows, "budget_micros") / MICROS, _numbers(rows, "budget")
    both = (before > 0) & (after > 0)
    moved = np.divide(before, after, out=np.full(len(before), np.nan), where=both)
    return np.asarray(_numbers(rows, "value") * moved ** np.clip(elasticity, 0, 1))


def _shares_of(value: Floats, level: Floats) -> Floats:
    """value / level, NaN where there is no level."""
    return np.asarray(np.divide(value, level, out=np.full(len(level), np.nan), where=np.nan_to_num(level) > 0))


def _curves(
    features: pa.Table,
    grid: Sequence[float],
    level: Floats,
    elasticity: Floats,
    sd: Floats,
    bands: Bands | None = None,
) -> pa.Table:
    budget = _numbers(features, "budget_micros")
    spends = np.rint(budget[:, None] * np.array(grid)).astype(np.int64)
    values = response(level, budget, spends, elasticity)
    low = high = sure = np.full(len(budget), np.nan)
    if bands is not None:
        low, high = bands.around(level)
        sure = np.where(np.isnan(low), np.nan, bands.confidence)
    offsets = np.arange(len(budget) + 1, dtype=np.int32) * len(grid)
    return pa.table(
        {
            "entity_id": features.column("entity_id"),
            "spends": pa.ListArray.from_arrays(offsets, pa.array(spends.ravel())),
            "values": pa.ListArray.from_arrays(offsets, pa.array(values.ravel())),
            "level": level,
            "elasticity": elasticity,
            "elasticity_sd": sd,
            "value_low": pa.array(level * low, from_pandas=True),
            "value_high": pa.array(level * high, from_pandas=True),
            "confidence": pa.array(sure, from_pandas=True),
        }
    )


def _rule_ratio(table: pa.Table) -> Floats:
    return np.nan_to_num(_numbers(table, "ratio_7"), nan=0.0)


def _errors(predicted: Floats, value: Floats) -> dict[str, float]:
    if not len(value):
        return {"mae": float("nan"), "bias": float("nan"), "mean_value": float("nan"), "rows": 0.0}
    return {
        "mae": float(np.abs(predicted - value).mean()),
        "bias": float((predicted - value).mean()),
        "mean_value": float(value.mean()),
        "rows": float(len(value)),
    }


# --- what the rest of the product asks of the kind --------------------------------------------------------------------


def read(rows: pa.Table) -> dict[str, np.ndarray[Any, Any]]:
    """What the curve foresaw at the budget that came to stand (at the status quo until it is known), what was earned, and
    whether that lay within the interval, moved along the curve with the budget."""
    actual, budget, level = numbers(rows["value"]), numbers(rows["budget"]) * MICROS, numbers(rows["level"])
    n = rows.num_rows
    spends, values = (
        np.array(pc.list_flatten(rows[c]).to_numpy(zero_copy_only=False), dtype=np.float64).reshape(n, -1)
        for c in ("spends", "values")
    )
    # between the two points of each row's own curve around its budget; beyond the ends, at the end
    right = np.clip((spends <= budget[:, None]).sum(axis=1), 1, spends.shape[1] - 1)
    at = np.arange(n)
    low, high = spends[at, right - 1], spends[at, right]
    share = np.clip(np.divide(budget - low, high - low, out=np.zeros(n), where=high > low), 0, 1)
    along = values[at, right - 1] * (1 - share) + values[at, right] * share
    predicted = np.where(np.isnan(budget), level, along)
    found = {"predicted": predicted, "actual": actual}
    if "value_low" in rows.schema.names:
        moved = np.divide(predicted, level, out=np.ones(n), where=level > 0)
        least, most = numbers(rows["value_low"]) * moved, numbers(rows["value_high"]) * moved
        unknown = np.isnan(actual) | np.isnan(least) | np.isnan(most)
        inside = np.where(unknown, np.nan, ((least <= actual) & (actual <= most)).astype(np.float64))
        found |= {"promised": numbers(rows["confidence"]), "inside": inside}
    return found


def student(teacher: ResponseLearner, small_one: ResponseLearner, rows: pa.Table, small: Small, threads: int) -> None:
    """A Booster of the level that says what the teacher's says, at what is usually spent, as scoring asks, and at what was, as
    evaluation does."""
    spends = [_usual_spend(rows)]
    if "cost" in rows.column_names:
        spends.append(_numbers(rows, "cost") / _multiplier(rows))
    x = np.concatenate([teacher.encoding.matrix(_with_shifts(rows, spend)) for spend in spends])
    level = np.concatenate([teacher.level(rows, spend) for spend in spends])
    said_of = boosters.predict(teacher.booster, x, threads=threads, raw=True)
    told = level > 0
    if not told.any():
        raise ValueError(f"the teacher expects nothing of any of {rows.num_rows} rows: there is nothing to learn")
    # an error counts by the money that it moves, as it does for the teacher
    small_one.booster = small(x[told], said_of[told], "regression", level[told] / level[told].mean())


def _share_of_bias(figures: Mapping[str, float]) -> float:
    mean = abs(figures.get("mean_value", 0.0))
    return abs(figures.get("bias", float("nan"))) / mean if mean > 0 else float("nan")


KIND = Kind(
    settings=ResponseModel,
    learner=ResponseLearner,
    rule=ResponseRule,
    policy="budget_allocation",
    scores="amount",
    principal="level",
    answer="value",
    read_with=("budget",),
    blank="spends",
    read=read,
    features=(
        "budget_micros", "explore_multiplier_today", "delivered_7", "ratio_7", "campaign_ratio_28", "cost_1", "cost_7", "cost_28",
        "value_1", "value_7", "value_28", "active_days_7", "active_days_28",
    ),
    outcomes=("cost", "value", "budget", "explore_multiplier", "explore_probability"),
    metrics={"mae": "lower"},
    columns=lambda spec: {"group": tuple(spec.group)},
    adds=("spend_shift_1", "spend_shift_7"),
    comparison=Comparison(
        "value",
        lambda model, rows: np.asarray(model.expect(rows), dtype=np.float64),
        {"mae": lambda p, value: np.abs(p - value)},
        _share_of_bias,
        "bias as a share of the mean value",
        lambda model, rows: np.asarray(model.score(rows)["level"].to_numpy(), dtype=np.float64),
        squares_apart_by_size,
    ),
    space={
        "rounds": Range(30, 800, whole=True),
        "leaves": Range(3, 31, whole=True),
        "learning_rate": Range(0.005, 0.2),
        "rows_in_leaf": Range(10, 200, whole=True),
        "l2": Range(0.1, 50),
        "column_share": Range(0.3, 1, log=False),
        "row_share": Range(0.3, 1, log=False),
    },
    student=student,
    absent={
        "held-out baseline": "its gate knows what was really spent, a score does not: the two errors are not alike",
    },
)  # fmt: skip
