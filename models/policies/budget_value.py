"""What an allocation of budgets is worth, from the lines that exploring moved at random.

Belongs here: the off-policy value of budgets. Does not: when it is asked for (``models.evaluation.off_policy``), the plan.

A line-day of the arm ``explore`` was moved up or down by a fair coin, so value x sign / (2 x probability)
estimates without bias what one step up changes (inverse-probability weighting; Horvitz and Thompson 1952). A level that was
known before the draw is taken off first, which takes noise away and no bias in (doubly robust; Dudik, Langford and Li 2011).
A plan is worth what comes of moving each of these lines by the drawn step in the plan's direction; money it adds or takes on
the whole is charged at the average of what such money earned, so that no plan wins by spending more.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from models.evaluation.bootstrap import Days
from models.policies.allocation import MICROS
from models.policies.base import Decided, Floats, Value, numbers

ASSUMES = (
    "moved by one drawn step in the direction of the plan, each line answers as it did to the logged coin, and lines do "
    "not compete with one another"
)


def value(rows: pa.Table, mine: Decided, theirs: Decided, how: dict[str, Any]) -> Value | str:
    """What the candidate's plan is worth beside the other's; a sentence where that cannot be measured."""
    absent = {"explore_multiplier", "explore_probability", "budget", "value"} - set(rows.column_names)
    if absent:
        return f"not measured: the outcomes have no {', '.join(sorted(absent))}"
    multiplier, chance = numbers(rows, "explore_multiplier", 1.0), numbers(rows, "explore_probability", np.nan)
    kept = (chance > 0) & (chance < 1) & (multiplier > 0) & (multiplier != 1) & (numbers(rows, "budget", 0.0) > 0)
    if not kept.any():
        return "not measured: no line of the held-out days was perturbed at random"
    spent, earned = numbers(rows, "budget")[kept], numbers(rows, "value", 0.0)[kept]
    sign, step = np.sign(multiplier[kept] - 1), np.abs(spent - spent / multiplier[kept])
    # what was known before the draw; the other model's, so that a candidate cannot blur its own figure
    level = np.nan_to_num(numbers(theirs.scores, "level", 0.0)[kept], posinf=0.0, neginf=0.0)
    gain = sign * (earned - level) / (2 * chance[kept])
    days = Days.of(rows.filter(pa.array(kept)), **how)

    def sums(one: Decided) -> tuple[Floats, Floats]:
        way = np.clip(one.move[kept] / MICROS / step, -1.0, 1.0)
        return days.sums(way * gain), days.sums(way * step)

    def worth(earns: Floats, costs: Floats, gains: Floats, steps: Floats, total: Floats) -> Floats:
        return np.asarray((earns - costs * gains / steps) / total)

    common = days.sums(gain), days.sums(step), days.sums(earned)
    ours, others = sums(mine), sums(theirs)
    flat = [float(worth(*[x.sum() for x in (*one, *common)])) for one in (ours, others)]
    if not np.isfinite(flat).all():
        return "not measured: the lines that were perturbed at random earned nothing"
    worse = days.interval(worth, others[0] - ours[0], others[1] - ours[1], *common)
    lost = days.interval(worth, -ours[0], -ours[1], *common)
    of = f"what {int(kept.sum())} randomly perturbed line-days earned"
    return Value(flat[0], flat[1], worse, of, ASSUMES, lost)
