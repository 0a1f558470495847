"""An exact test that knows where a replay expects harm, and the two alerts that rest on it: ROLLBACK and HOLD.

Belongs here: the checks before a replay may speak, the matched exact test, both rules. Does not: the replay
(``data_checks/regression/replay.py``), boundaries (``data_checks/regression/sequential.py``), the guard's own test of the raw outcome.

Nothing here promotes: under interference a test on (actual - base) sees a benefit that is not there. HOLD is an alert and no finding:
where every unit changes its habits it is often false, for its key has no control of this month.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from data_checks.regression import sequential
from data_checks.regression.replay import Difference, Floats, Ints, Replayed, difference

Alert = Literal["ROLLBACK", "HOLD", "CONTINUE", "INCONCLUSIVE"]


@dataclass(frozen=True)
class MatchedSpec:
    """When a replay may speak, and how sure it must be."""

    alpha: float = 0.05
    """Chance of a false ROLLBACK over all looks together, at most."""
    margin: float = 0.02
    """Harm up to this share of the rows is tolerated."""
    horizon: float = 28.0
    permutations: int = 1999
    min_clusters: int = 8
    """Units in epochs; with fewer the test says nothing."""
    least_weight: float = 0.02
    """Weight of a unit in which the replay expects no harm."""
    largest_unit: float = 2.0
    """A cluster counts at most as much as so many average ones."""
    effort_z: float = 2.5
    """Efforts that fell by more than so many errors in the treated arm: the replay is blind."""
    effort_errors: float = 1.5
    """A ROLLBACK must stand with the treated arm's efforts made longer by what they fell and so many errors more ..."""
    effort_p: float = 0.05
    """... at this p, looked at once."""
    moved_z: float = 2.5
    hold_p: float = 0.20
    hold_hours: float = 0.96


DOUBTED = "the exact test found a harm that does not stand if efforts were logged shorter in the treated arm, as they may have been"
Again = Callable[[int, float], Replayed]
"""The replay of the look of that number anew, with the logs of the treated arm's efforts less this shift."""


@dataclass(frozen=True)
class Look:
    """What one look says; figures as they stood then."""

    day: float
    alert: Alert
    reasons: tuple[str, ...]
    effect: Difference
    effort: float
    """z of the effort check; NaN: nothing to tell."""
    statistic: float
    bound: float
    p: float
    """Of (actual - base) under permuted arms, one-sided; NaN where it was not asked for."""


def contrast(values: Floats, treated: Floats, epoch: Ints) -> float:
    """z of treated - control within epochs, each cluster counted once; NaN where an arm is empty or nothing varies."""
    effect, error = _within(values, treated, epoch)
    return effect / error if error > 0 else math.nan


def _within(values: Floats, treated: Floats, epoch: Ints) -> tuple[float, float]:
    """treated - control within epochs and its error, of the pooled spread within arm and epoch; NaN as ``contrast`` says."""
    good = np.isfinite(values)
    values, t, epoch = values[good], treated[good].astype(bool), epoch[good]
    effect = room = squares = 0.0
    freedom = 0
    for e in np.unique(epoch):
        a, b = values[(epoch == e) & t], values[(epoch == e) & ~t]
        if not len(a) or not len(b):
            continue
        weight = len(a) * len(b) / (len(a) + len(b))
        effect, room = effect + weight * float(a.mean() - b.mean()), room + weight
        squares += float(((a - a.mean()) ** 2).sum() + ((b - b.mean()) ** 2).sum())
        freedom += len(a) + len(b) - 2
    if not room or freedom < 1 or squares <= 1e-18:
        return math.nan, math.nan
    return effect / room, math.sqrt(squares / freedom / room)


def permuted_arms(unit: Ints, epoch: Ints, treated: Floats, permutations: int, seed: Sequence[int]) -> Floats:
    """Each epoch's draw permuted over its units; shape (1 + permutations, m), row 0 as drawn.

    An epoch has a generator of its own, so that later ones change no earlier look.
    """
    out = np.empty((permutations + 1, len(treated)))
    out[0] = treated
    for e in np.unique(epoch):
        here = np.flatnonzero(epoch == e)
        here = here[np.argsort(unit[here], kind="stable")]
        keys = np.random.default_rng([*seed, int(e)]).random((permutations, len(here)))
        out[1:, here] = treated[here].astype(np.float64)[np.argsort(keys, axis=1)]
    return out


def statistics(found: Replayed, arms: Floats, *, matched: bool, spec: MatchedSpec) -> Floats:
    """t of the treatment under each row of ``arms``, in (actual - base)/n beside the own pre-period, centred within epochs.

    matched: The treatment is the arm × w, beside w itself, with w = max(pol - base, 0)/n + ``least_weight``; else the arm alone.
    Returns shape (rows of arms,), NaN where it cannot be told.
    """
    n = found.n
    at = np.flatnonzero(n > 0)
    if not len(at):
        return np.full(len(arms), np.nan)
    n, epoch = n[at], found.epoch[at]
    root = np.sqrt(np.minimum(n, spec.largest_unit * n.mean()))
    w = np.maximum(found.pol - found.base, 0)[at] / n + spec.least_weight if matched else np.ones(len(at))
    columns = [*(epoch[:, None] == np.unique(epoch)).T.astype(np.float64), found.own[at], *([w] if matched else [])]
    basis, singular, _ = np.linalg.svd(np.stack(columns, axis=1) * root[:, None], full_matrices=False)
    basis = basis[:, singular > 1e-9 * singular[0]]
    freedom = len(at) - basis.shape[1] - 1
    if freedom < 1:
        return np.full(len(arms), np.nan)
    y = (found.actual - found.base)[at] / n * root
    y = y - basis @ (basis.T @ y)
    x = arms[:, at] * (w * root)
    x = x - (x @ basis) @ basis.T
    room = (x * x).sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        tau = x @ y / room
        left = np.maximum(float(y @ y) - tau**2 * room, 0.0)
        t = tau / np.sqrt(left / freedom / room)
    return np.where((room > 1e-12) & (left > 1e-18), t, np.nan)


def judge(
    looks: Sequence[tuple[float, Replayed]], *, spec: MatchedSpec, seed: int, again: Again | None = None
) -> list[Look]:
    """Every look from the first on, with what it says alone.

    Args:
        looks: Days elapsed since the start of the comparison, ascending, with the replay as of then.
        seed: Of the permutations: the same rows and seed give the same looks.
        again: Where efforts may have been logged shorter in the treated arm, though too little for ``effort_z``, a ROLLBACK must
            stand with them as long as in the other arm, too; None: it need not.
    """
    days = np.array([day for day, _ in looks], dtype=np.float64)
    paths = np.full((spec.permutations + 1, len(looks)), np.nan)
    arms: list[Floats] = []
    for k, (_, found) in enumerate(looks):
        arms.append(
            permuted_arms(found.unit, found.epoch, found.treated.astype(np.float64), spec.permutations, [seed, 3])
        )
        if len(found.unit) >= spec.min_clusters and not found.reasons:
            paths[:, k] = statistics(found, arms[k], matched=True, spec=spec)
    bounds, above = sequential.permuted_bounds(paths, sequential.spent(days / spec.horizon, spec.alpha, "early"))
    crossed = np.logical_or.accumulate(above) if len(looks) else above
    made = []
    for k, (_, found) in enumerate(looks):
        test = float(paths[0, k]), float(bounds[k])
        one = _look(days[k], found, arms[k], bool(crossed[k]), test, spec)
        shift, error = _within(found.effort, found.treated.astype(np.float64), found.epoch)
        least = shift - spec.effort_errors * error
        if again is not None and one.alert == "ROLLBACK" and least < 0 and not _stands(again(k, least), arms[k], spec):
            one = _look(days[k], found, arms[k], False, test, spec)
            one = dataclasses.replace(one, reasons=(*one.reasons, DOUBTED))
        made.append(one)
    return made


def _stands(found: Replayed, arms: Floats, spec: MatchedSpec) -> bool:
    """Whether a harm stands by a replay with longer efforts in the treated arm, looked at once."""
    return _p(statistics(found, arms, matched=True, spec=spec)) <= spec.effort_p


def _p(paths: Floats) -> float:
    """Share of the permuted arms whose statistic is as large as the one drawn; NaN where that one cannot be told."""
    if not np.isfinite(paths[0]):
        return math.nan
    return float((np.nan_to_num(paths, nan=-np.inf) >= paths[0] - 1e-9).mean())


def refusals(found: Replayed, spec: MatchedSpec) -> tuple[list[str], float]:
    """Why the replay may not speak, and the z of the effort check."""
    t = found.treated.astype(np.float64)
    reasons = list(found.reasons)
    effort = contrast(found.effort, t, found.epoch)
    if effort <= -spec.effort_z:
        reasons.append(
            f"efforts fell in the treated arm (z = {effort:.1f}): the replay cannot tell, only the raw outcome can"
        )
    moved = contrast(found.moved, t, found.epoch)
    if abs(moved) > spec.moved_z:
        reasons.append(f"the share of rows moved between units differs by arm (z = {moved:.1f})")
    return reasons, effort


def _look(
    day: float, found: Replayed, arms: Floats, crossed: bool, test: tuple[float, float], spec: MatchedSpec
) -> Look:
    effect = difference(found)
    reasons, effort = refusals(found, spec)
    alert: Alert = "CONTINUE"
    p = math.nan
    expected = effect.d > spec.margin and effect.d_all > 3 * effect.se_all
    if reasons:
        alert = "INCONCLUSIVE"
    elif expected and crossed:
        alert = "ROLLBACK"
        reasons.append(
            f"harm: the order asked for should cost {effect.d:.1%} of the rows, and where it should cost most, most is lost"
        )
    elif expected and effect.o > effect.d / 2 and effect.o > 2 * effect.se_o and _hours(found) >= spec.hold_hours:
        p = _p(statistics(found, arms, matched=False, spec=spec))
        if p <= spec.hold_p:
            alert = "HOLD"
            reasons.append(
                f"alert, no finding: the order asked for should cost {effect.d:.1%} of the rows, {effect.o:.1%} were lost"
            )
    return Look(day, alert, tuple(reasons), effect, effort, *test, p)


def _hours(found: Replayed) -> float:
    """Hours worked in the treated units, as a share of the replay's at the units' own pace."""
    pace = np.ones(len(found.n)) if found.pace is None else found.pace
    done, replayed = (float(v[found.treated].sum()) for v in (found.hours, found.base_hours * pace))
    return done / replayed if replayed else math.nan


def told(looks: Sequence[Look]) -> dict[str, float | None]:
    """The first day of a ROLLBACK, and of an alert that holds (a ROLLBACK holds, too); None: never."""
    wanted = {"ROLLBACK": ("ROLLBACK",), "HOLD": ("HOLD", "ROLLBACK")}
    return {name: next((x.day for x in looks if x.alert in kinds), None) for name, kinds in wanted.items()}
