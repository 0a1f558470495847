"""The regression guard: does an arm do harm, judged every day beside another arm, with a known chance of a false alarm.

Belongs here: the verdict and what it rests on, the sample-ratio check. Does not: the estimators (``data_checks.regression.effects``), the
power calculator (``data_checks.regression.power``), reading tables, drawing arms, rolling back.

Harm is signed so that positive is worse. Judging a day reads no row after it and recomputes every look up to it: the same
rows give the same looks, so a ROLLBACK that was reached stays reached. A mismatch of the arms, too few clusters, or no data
is no verdict.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_checks.regression.effects import (
    Bools,
    Design,
    Floats,
    Ints,
    Metric,
    Path,
    RegressionSpec,
    adjusting,
    assembled,
    codes_of,
    days_of,
    floats_of,
    measured,
    moments,
    randomised,
    require,
    sequence,
    standardised,
    values_of,
    weekday_level,
)

Verdict = Literal["ROLLBACK", "HOLD", "PROMOTE", "CONTINUE", "INCONCLUSIVE", "NO_DATA"]
"""HOLD comes of a replay alone (``data_checks.regression.matched_test``): an alert and no finding."""


LOOKS = pa.schema(
    {
        "metric": pa.string(),
        "day": pa.date32(),
        "n_treated": pa.int64(),
        "n_control": pa.int64(),
        "estimate": pa.float64(),
        "low": pa.float64(),
        "high": pa.float64(),
        "statistic": pa.float64(),
        "bound": pa.float64(),
        "alpha_spent": pa.float64(),
        "level": pa.float64(),
        "margin": pa.float64(),
        "verdict": pa.string(),
    }
)
"""One row a metric and look. estimate, low, high: harm in the metric's unit, each bound one-sided (low at the metric's part of
α, high at the whole α); statistic crosses bound when harm beyond the margin is proven; level: the control's; margin: in the
metric's unit; verdict: what this look says alone. A figure that cannot be given yet is null."""


@dataclass(frozen=True)
class Judgement:
    """What a day's judging came to.

    ``reasons``: sentences for people. ``looks``: as LOOKS, by metric and day. ``figures``: JSON-able, by metric under
    "metrics". ``sample_ratio``: {drawn: {arm: count}, expected: {arm: count}, p, ok}.
    """

    verdict: Verdict
    reasons: tuple[str, ...]
    looks: pa.Table
    figures: dict[str, Any]
    sample_ratio: dict[str, Any]


# ---- arms as drawn


def _tally(drawn: pa.Table, start: date) -> list[tuple[int, str, str, float | None, int]]:
    """Units drawn as (first day, epoch, arm, recorded probability, units); the first day of `drawn_on`, else of the epoch."""
    n = drawn.num_rows
    columns = {
        "since": pa.array([0] * n, pa.int64()),
        "epoch": pa.array([""] * n, pa.string()),
        "arm": drawn["arm"],
        "probability": pa.nulls(n, pa.float64()),
    }
    if "epoch" in drawn.schema.names:
        columns["epoch"] = drawn["epoch"].cast(pa.string())
    if "arm_probability" in drawn.schema.names:
        columns["probability"] = drawn["arm_probability"]
    if "drawn_on" in drawn.schema.names:
        columns["since"] = pa.array(days_of(drawn.select(["drawn_on"]).rename_columns(["day"]), start))
    elif "day" in drawn.schema.names:
        columns["since"] = pa.array(days_of(drawn, start))
    counted = pa.table(columns).group_by(["since", "epoch", "arm"])
    rows = counted.aggregate([("probability", "min"), ([], "count_all")]).to_pylist()
    return sorted((r["since"], r["epoch"], r["arm"], r["probability_min"], r["count_all"]) for r in rows)


def sample_ratio(
    tally: Sequence[tuple[int, str, str, float | None, int]],
    shares: Mapping[str, float],
    *,
    alpha: float,
    seed: int,
    constant: bool = False,
) -> dict[str, Any]:
    """Did the arms come out as their probabilities say: chi-square over the units drawn.

    Args:
        tally: As `_tally` gives it. A recorded probability counts before ``shares``.
        constant: Whether a probability that changed between epochs is itself a mismatch (entities are compared over
            all days together, so days with other shares would pass for an effect).

    Returns:
        drawn and expected counts by arm, p, ok. Where an arm expects fewer than 5 units, p comes from 20,000 multinomial
        draws instead of the chi-square distribution.
    """
    from scipy.special import chdtrc

    total = math.fsum(shares.values())
    arms = sorted(a for a, s in shares.items() if s > 0)
    found = dict.fromkeys(arms, 0)
    expected = dict.fromkeys(arms, 0.0)
    groups: list[tuple[int, Floats]] = []
    for epoch in sorted({t[1] for t in tally}):
        mine = [t for t in tally if t[1] == epoch]
        units = sum(t[4] for t in mine)
        here = {a: shares[a] / total for a in arms}
        known = {t[2]: t[3] for t in mine if t[3] is not None and t[2] in here}
        if known and math.fsum(known.values()) <= 1 + 1e-9:
            rest = math.fsum(here[a] for a in arms if a not in known)
            scale = max(1 - math.fsum(known.values()), 0.0) / rest if rest else 0.0
            here = {a: known.get(a, here[a] * scale) for a in arms}
        for t in mine:
            found[t[2]] = found.get(t[2], 0) + t[4]
        for arm in arms:
            expected[arm] += here[arm] * units
        probabilities = np.array([here[a] for a in arms])
        groups.append((units, probabilities / probabilities.sum()))
    answer: dict[str, Any] = {"drawn": found, "expected": {a: round(e, 6) for a, e in expected.items()}}
    said = {(t[2], round(t[3], 9)) for t in tally if t[3] is not None}
    if constant and len(said) > len({arm for arm, _ in said}):
        answer["changed"] = sorted({arm for arm, _ in said if sum(a == arm for a, _ in said) > 1})
    if not groups:
        return {**answer, "p": None, "ok": True}
    want = np.array([expected[a] for a in arms])

    def distance(counts: Floats) -> Floats:
        return np.asarray(((counts - want) ** 2 / want).sum(-1))

    seen = distance(np.array([found[a] for a in arms], dtype=np.float64))
    if set(found) - set(arms):
        p = 0.0
    elif len(arms) < 2:
        p = 1.0
    elif want.min() >= 5:
        p = float(chdtrc(len(arms) - 1, seen))
    else:
        rng = np.random.default_rng([seed, 17])
        draws = np.zeros((20_000, len(arms)))
        for units, probabilities in groups:
            draws += rng.multinomial(units, probabilities, len(draws))
        p = float((1 + (distance(draws) >= seen - 1e-9).sum()) / (1 + len(draws)))
    return {**answer, "p": p, "ok": p >= alpha and "changed" not in answer}


# ---- judging


def judge(  # noqa: PLR0913 - given by name
    observed: pa.Table,
    before: pa.Table | None,
    *,
    spec: RegressionSpec,
    design: Design,
    treated: str,
    control: str,
    shares: Mapping[str, float],
    drawn: pa.Table | None,
    start: date,
    day: date,
    seed: int,
    alpha: float | None = None,
    judged: date | None = None,
) -> Judgement:
    """The verdict on ``treated`` beside ``control`` as of ``day``, with every look up to it.

    Args:
        observed: One row a day and unit: day date32, unit, arm, epoch string, washout bool, n int64 (rows it stands for), the
            metrics' columns summed; optionally stratum string. Design ``entity``: one row an entity (the unit), optionally
            ``covariate`` float, known before the arm was drawn.
        before: The same columns for the pre-period (arm, epoch, washout are not read); rows from ``start`` on are left out.
        shares: Weight of every arm of the draw.
        drawn: unit, arm and where known epoch, arm_probability, drawn_on: what was drawn, for every arm. None: the units
            of ``observed``.
        start: First day of the comparison; ``day``: the last day that is read.
        seed: Of the permutations; a rerun with the same rows and seed gives the same looks.
        alpha: What this comparison may spend on ROLLBACK (`sequential.left`); None: all that the spec says.
        judged: The last day on which this comparison was judged before. ROLLBACK then takes a look after it, or the newest:
            outcomes that are told anew move the looks before, and asking these again every day would spend α again.

    Raises:
        ValueError: a missing column, an unknown arm or design, a unit in two arms of one epoch, an entity twice.
    """
    if design not in ("entity", "cohort", "switchback"):
        raise ValueError(f"design: {design!r} is unknown (allowed here: entity, cohort, switchback)")
    for arm in (treated, control):
        if not shares.get(arm):
            raise ValueError(f"shares: the arm {arm!r} has none, so nothing was drawn to compare; found {dict(shares)}")
    clustered = design != "entity"
    needed = ["day", "unit", "arm", *measured(spec), *(["epoch", "washout", "n"] if clustered else [])]
    require(observed, "observed", needed)
    since = days_of(observed, start)
    within = pa.array((since >= 0) & (since <= (day - start).days))
    observed = observed.filter(within)
    table = observed.filter(pc.is_in(observed["arm"], value_set=pa.array([treated, control])))
    if "washout" in table.schema.names:
        table = table.filter(pc.invert(pc.fill_null(table["washout"], False)))
    if before is not None:
        require(before, "before", ["day", "unit", *measured(spec), *(["n"] if clustered else [])])
        early = days_of(before, start)
        before = before.filter(pa.array((early < 0) & (early >= -spec.pre_days)))

    since = days_of(table, start)
    last = min((day - start).days, spec.horizon_days - 1)
    table, since = table.filter(pa.array(since <= last)), since[since <= last]
    seen = np.unique(since)
    looks = seen[seen >= spec.burn_in_days]
    empty = [arm for arm in (treated, control) if not pc.any(pc.equal(table["arm"], arm)).as_py()]

    if drawn is None:
        keys = ["unit", "epoch", "arm"] if clustered else ["unit", "arm"]
        first = observed.filter(pc.is_in(observed["arm"], value_set=pa.array([treated, control])))
        drawn = first.group_by(keys).aggregate([("day", "min")]).rename_columns([*keys, "day"])
        tally = _tally(drawn, start)
        weights = {arm: shares[arm] for arm in (treated, control)}
    else:
        require(drawn, "drawn", ["unit", "arm"])
        tally, weights = _tally(drawn, start), dict(shares)
    ratios: dict[tuple[Any, ...], dict[str, Any]] = {}

    def ratio_at(when: int) -> dict[str, Any]:
        known = tuple(t for t in tally if t[0] <= when)
        if known not in ratios:
            ratios[known] = sample_ratio(known, weights, alpha=spec.srm_alpha, seed=seed, constant=not clustered)
        return ratios[known]

    ratio = ratio_at((day - start).days)
    missing = [str(start + timedelta(days=int(d))) for d in range(last + 1) if d not in set(seen.tolist())]
    if design != "entity" and "washout" in observed.schema.names:
        washed = observed.filter(pc.fill_null(observed["washout"], False))
        missing = [d for d in missing if date.fromisoformat(d) not in set(pc.unique(washed["day"]).to_pylist())]
    figures: dict[str, Any] = {
        "design": design, "treated": treated, "control": control, "start": str(start), "day": str(day),
        "looks": len(looks), "missing_days": missing, "alpha": spec.alpha if alpha is None else alpha, "metrics": {},
    }  # fmt: skip
    if empty:
        reason = f"the arm {' and the arm '.join(empty)} has no outcomes from {start} to {day}: no data is no verdict"
        return Judgement("NO_DATA", (reason,), LOOKS.empty_table(), figures, ratio)

    paths: list[Path] = []
    for number, metric in enumerate(spec.metrics):
        if clustered:
            path = _judged_clusters(table, before, since, looks, metric, spec, treated, start, [seed, number], figures)
        else:
            path = _judged_entities(table, before, since, looks, metric, spec, treated, start, figures)
        paths.append(path)
    bare = [name for name, said in figures["metrics"].items() if not all(said["values"].values())]
    if len(bare) == len(paths):
        reason = f"no value of {', '.join(bare)} in both arms from {start} to {day}: no data is no verdict"
        return Judgement("NO_DATA", (reason,), LOOKS.empty_table(), figures, ratio)
    fresh = [judged is None or d == looks[-1] or start + timedelta(days=int(d)) > judged for d in looks]
    ratio_ok = [bool(ratio_at(int(d))["ok"]) for d in looks]
    return _concluded(paths, looks, spec, design, start, day, figures, ratio, ratio_ok, np.array(fresh, dtype=bool))


def _judged_entities(
    table: pa.Table, before: pa.Table | None, since: Ints, looks: Ints, metric: Metric, spec: RegressionSpec, treated: str,
    start: date, figures: dict[str, Any],
) -> Path:  # fmt: skip
    if pc.count_distinct(table["unit"]).as_py() != table.num_rows:
        counts = table.group_by("unit").aggregate([([], "count_all")])
        twice = counts.filter(pc.greater(counts["count_all"], 1))["unit"][0].as_py()
        raise ValueError(
            f"observed: the entity {twice!r} stands more than once; the design 'entity' takes one row an entity, "
            "and the design 'cohort' what lasts"
        )
    numerator, denominator, good = values_of(table, metric)
    arm = pc.equal(table["arm"], treated).to_numpy(zero_copy_only=False)
    _note_missing(figures, metric, good, arm)
    scaled = [np.ones(len(since))]
    if "covariate" in table.schema.names:
        # standardised by the rows of the first look, so that a later day changes nothing of an earlier look
        values = floats_of(table, "covariate")
        known = np.isfinite(values) & good & (since <= (looks[0] if len(looks) else since.max()))
        scaled.append(standardised(values, values[known]))
    if before is not None and before.num_rows:
        level = weekday_level(before, metric, start)
        scaled.append(standardised(level, level[np.isfinite(level)])[(start.weekday() + since) % 7])
    scaled = [values for values in scaled if values.any()]
    x = np.stack([*scaled, numerator, denominator], axis=1)[good]
    days = int(since.max()) + 1
    group = since[good] * 2 + np.where(arm[good], 0, 1)
    sums = moments(x, group, days * 2).reshape(days, 2, x.shape[1], x.shape[1]).cumsum(0)[looks]
    return sequence(sums, looks + 1, metric=metric, spec=spec, alpha=figures["alpha"])


def _note_missing(figures: dict[str, Any], metric: Metric, good: Bools, arm: Bools) -> None:
    said = figures["metrics"].setdefault(metric.name, {})
    said["values"] = {"treated": int((good & arm).sum()), "control": int((good & ~arm).sum())}
    said["missing_values"] = {"treated": int((~good & arm).sum()), "control": int((~good & ~arm).sum())}


def _judged_clusters(
    table: pa.Table, before: pa.Table | None, since: Ints, looks: Ints, metric: Metric, spec: RegressionSpec, treated: str,
    start: date, seed: list[int], figures: dict[str, Any],
) -> Path:  # fmt: skip
    numerator, denominator, good = values_of(table, metric)
    arm = pc.equal(table["arm"], treated).to_numpy(zero_copy_only=False)
    _note_missing(figures, metric, good, arm)
    units, unit_names = codes_of(table, "unit")
    epochs, epoch_names = codes_of(table, "epoch")
    strata = codes_of(table, "stratum")[0] if "stratum" in table.schema.names else np.zeros_like(units)
    key, cluster = np.unique(units * len(epoch_names) + epochs, return_inverse=True)
    m, days = len(key), int(since.max()) + 1
    of_unit, of_epoch = key // len(epoch_names), key % len(epoch_names)
    is_treated, stratum = np.zeros(m, dtype=bool), np.zeros(m, dtype=np.int64)
    is_treated[cluster], stratum[cluster] = arm, of_epoch[cluster] * (strata.max() + 1) + strata
    if (is_treated[cluster] != arm).any():
        bad = cluster[np.flatnonzero(is_treated[cluster] != arm)[0]]
        raise ValueError(
            f"observed: the unit {unit_names[of_unit[bad]]!r} stands in two arms in the epoch {epoch_names[of_epoch[bad]]!r}; "
            "an arm stays drawn for an epoch"
        )

    place = since * m + cluster
    # summed in an order of the values, so that neither the order of rows nor names move the last bit
    order = np.lexsort((denominator, numerator, place))
    order = order[good[order]]

    def cumulated(values: Floats) -> Floats:
        out: Floats = np.bincount(place[order], values[order], days * m).reshape(days, m).cumsum(0)[looks]
        return out

    # days of an epoch so far: what a unit's own daily level of the pre-period is multiplied by
    there = np.zeros((days, len(epoch_names)))
    there[since, epochs] = 1.0
    level, weight, known = _own_level(before, metric, unit_names, start, spec.largest_unit)
    figures["metrics"][metric.name]["units_without_pre_period"] = int((~known[np.unique(of_unit)]).sum())
    expected = level[of_unit] * there.cumsum(0)[looks][:, of_epoch]
    clusters = assembled(
        cumulated(numerator), cumulated(denominator), expected, weight[of_unit], is_treated, stratum, sign=metric.sign
    )
    return randomised(clusters, looks + 1, metric=metric, spec=spec, seed=seed, alpha=figures["alpha"])


def _own_level(
    before: pa.Table | None, metric: Metric, names: list[str], start: date, largest: float | None
) -> tuple[Floats, Floats, Bools]:
    """By unit: how far its pre-period lay from the common level, a day; the weight it counts with; whether it had one."""
    level, weight, known = np.zeros(len(names)), np.ones(len(names)), np.zeros(len(names), dtype=bool)
    if before is None or not before.num_rows:
        return level, weight, known
    code, all_names = codes_of(before, "unit")
    numerator, denominator, good = values_of(before, metric)
    if not good.any():
        return level, weight, known
    days = len(np.unique(days_of(before, start)[good]))
    n, d = (np.bincount(code[good], v[good], len(all_names)) / days for v in (numerator, denominator))
    own, weights = adjusting(n, d, largest)
    place = pc.fill_null(pc.index_in(pa.array(names, pa.string()), value_set=pa.array(all_names, pa.string())), -1)
    at = place.to_numpy(zero_copy_only=False).astype(np.int64)
    known = at >= 0
    level[known], weight[known] = own[at[known]], weights[at[known]]
    return level, weight, known


def _concluded(
    paths: list[Path], looks: Ints, spec: RegressionSpec, design: Design, start: date, day: date, figures: dict[str, Any],
    ratio: dict[str, Any], ratio_ok: list[bool], fresh: Bools,
) -> Judgement:  # fmt: skip
    """From the looks of all metrics to a verdict with its reasons."""
    on = np.array(ratio_ok, dtype=bool)
    rollback = np.array([p.harmful & on & fresh for p in paths]).reshape(len(paths), len(looks))
    promote = np.array([p.harmless & on for p in paths]).reshape(len(paths), len(looks))
    rows: dict[str, list[Any]] = {name: [] for name in LOOKS.names}
    dates = [start + timedelta(days=int(d)) for d in looks]
    reasons: list[str] = []
    for metric, path, bad, fine in zip(spec.metrics, paths, rollback, promote, strict=True):
        harm, margin = metric.sign * path.effect, metric.margin * np.abs(path.level)
        with np.errstate(invalid="ignore"):
            low, high = harm - path.bound * path.error, harm + path.promote * path.error
        said = np.where(bad, "ROLLBACK", np.where(fine, "PROMOTE", "CONTINUE"))
        rows["metric"] += [metric.name] * len(looks)
        rows["day"] += dates
        rows["n_treated"] += path.n_treated.tolist()
        rows["n_control"] += path.n_control.tolist()
        rows["verdict"] += said.tolist()
        for name, values in (
            ("estimate", harm), ("low", low), ("high", high), ("statistic", path.statistic), ("bound", path.bound),
            ("alpha_spent", path.spent), ("level", path.level), ("margin", margin),
        ):  # fmt: skip
            rows[name] += [float(v) if np.isfinite(v) else None for v in values]
        if len(looks):
            figures["metrics"][metric.name] |= {
                name: rows[name][-1]
                for name in (
                    "n_treated",
                    "n_control",
                    "estimate",
                    "low",
                    "high",
                    "statistic",
                    "bound",
                    "level",
                    "margin",
                )
            }
        if bad.any():
            k = int(bad.argmax())
            share = f" ({harm[k] / abs(path.level[k]):+.1%} of the control's level)" if path.level[k] else ""
            reasons.append(
                f"{metric.name}: harm of {harm[k]:.4g}{share} on {dates[k]}, at least {low[k]:.4g}, "
                f"beyond the margin of {margin[k]:.4g}"
            )
    table = pa.table({name: pa.array(rows[name], LOOKS.field(name).type) for name in LOOKS.names})
    verdict: Verdict
    ended = (day - start).days + 1 >= spec.horizon_days
    n = min((min(int(p.n_treated[-1]), int(p.n_control[-1])) for p in paths), default=0) if len(looks) else 0
    clusters = min((int(p.n_treated[-1] + p.n_control[-1]) for p in paths), default=0) if len(looks) else 0
    all_fine = promote.all(0) if len(looks) else np.zeros(0, dtype=bool)
    if rollback.any():
        verdict = "ROLLBACK"
        figures["since"] = str(dates[int(rollback.any(0).argmax())])
    elif not ratio["ok"]:
        verdict = "INCONCLUSIVE"
        if "changed" in ratio:
            reasons.append(
                f"the probability of {', '.join(ratio['changed'])} changed while it was judged; judge from the day of the change"
            )
        else:
            expected = {a: round(e, 1) for a, e in ratio["expected"].items()}
            reasons.append(
                f"the arms are not as drawn: found {ratio['drawn']}, expected {expected} (p = {ratio['p']:.2g}); "
                "nothing is concluded from them"
            )
    elif all_fine.any():
        verdict = "PROMOTE"
        figures["since"] = str(dates[int(all_fine.argmax())])
        reasons.append(f"harm beyond the margin is excluded for every metric since {figures['since']}")
    elif design != "entity" and len(looks) and (clusters < spec.min_clusters or n < 2):
        verdict = "INCONCLUSIVE"
        reasons.append(
            f"{clusters} clusters, {n} in the smaller arm: a verdict needs {spec.min_clusters}, and 2 in each arm"
        )
    elif ended:
        verdict = "INCONCLUSIVE"
        reasons.append(f"the horizon of {spec.horizon_days} days is over; neither harm nor its absence is proven")
    else:
        verdict = "CONTINUE"
        reasons.append(
            f"neither harm nor its absence is proven after {(day - start).days + 1} of {spec.horizon_days} days"
            if len(looks)
            else f"nothing is judged in the first {spec.burn_in_days} days"
        )
    for metric in spec.metrics:
        lost = figures["metrics"][metric.name]["missing_values"]
        if sum(lost.values()):
            reasons.append(
                f"{metric.name}: rows without a value left out: {lost['treated']} treated, {lost['control']} control"
            )
    if figures["alpha"] < spec.alpha:
        reasons.append(f"judged at α {figures['alpha']:.2%}: the versions before it have spent of the {spec.alpha:.0%}")
    if figures["missing_days"]:
        reasons.append(f"days without outcomes: {', '.join(figures['missing_days'])}")
    return Judgement(verdict, tuple(reasons), table, figures, ratio)
