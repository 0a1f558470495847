"""How long the budget policy takes, beside a general solver (SLSQP) on the same lines.

Belongs here: timing of `models.policies.budget`. Does not: whether its plans are right (tests/models/policies/test_budget.py).
Run: ``python -m benchmarks.budget_policy [lines ...]``
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads of the linear algebra slow SLSQP down on a busy machine

import numpy as np
import pyarrow as pa

from models.policies.allocation import MICROS, allocate
from models.policies.arms import Explore
from models.policies.budget import decide

POINTS = 9
LIMIT = {"cap": 2**60, "largest_change": 0.3}


def instance(n: int, shape: str, seed: int = 0) -> tuple[Any, Any, Any, Callable[[Any], Any]]:
    """Lines around their budgets: spends, values, budgets (micros), and the smooth curves that the points lie on."""
    rng = np.random.default_rng(seed)
    before = np.maximum(rng.lognormal(18, 1, n), 1e6).astype(np.int64)
    spends = (before[:, None] * np.linspace(0.5, 1.5, POINTS)).astype(np.int64)
    level, bent = (before / MICROS * rng.lognormal(1, 0.5, n))[:, None], rng.uniform(0.1, 0.95, (n, 1))

    def curve(x: Any) -> Any:
        ratio = x / before[:, None]
        return level * (ratio**bent if shape == "concave" else ratio**6 / (ratio**6 + bent))

    return spends, curve(spends), before, curve


def ours(n: int, shape: str) -> tuple[float, float, Any]:
    """Processor seconds and seconds of one allocation, and its plan."""
    spends, values, before, _ = instance(n, shape)
    rest: dict[str, Any] = {
        "floor": np.zeros(n, dtype=np.int64),
        "cap": np.full(n, LIMIT["cap"]),
        "largest_change": LIMIT["largest_change"],
    }
    start, busy = time.perf_counter(), time.process_time()
    plan = allocate(spends, values, total=int(before.sum()), before=before, **rest)
    return time.perf_counter() - start, time.process_time() - busy, plan


def slsqp(n: int) -> tuple[float, Any]:
    """Seconds of scipy's SLSQP on the smooth concave curves of the same lines, and its result."""
    from scipy.optimize import minimize

    _, _, before, curve = instance(n, "concave")
    scale = before / MICROS
    start = time.perf_counter()
    found = minimize(
        lambda r: -float(curve((r * before)[:, None]).sum()) / scale.sum(),
        np.ones(n),
        method="SLSQP",
        jac=lambda r: (
            -(curve((r * before * (1 + 1e-6))[:, None]) - curve((r * before)[:, None]))[:, 0] / 1e-6 / r / scale.sum()
        ),
        bounds=[(0.7, 1.3)] * n,
        constraints={
            "type": "eq",
            "fun": lambda r: (r @ scale - scale.sum()) / scale.sum(),
            "jac": lambda r: scale / scale.sum(),
        },
        options={"maxiter": 20, "ftol": 1e-7},
    )
    return time.perf_counter() - start, (-found.fun * scale.sum(), found.nit, found.message)


def a_day(n: int) -> float:
    """Seconds of `decide` with arms, curves and reasons for n lines."""
    spends, values, before, _ = instance(n, "concave")
    ids = [f"line-{i:07d}" for i in range(n)]
    offsets = pa.array(np.arange(n + 1, dtype=np.int32) * POINTS)
    scores = pa.table(
        {
            "entity_id": ids,
            "spends": pa.ListArray.from_arrays(offsets, pa.array(spends.ravel())),
            "values": pa.ListArray.from_arrays(offsets, pa.array(values.ravel())),
        }
    )
    features = pa.table({"entity_id": ids, "budget_micros": before, "explore_multiplier_today": np.ones(n)})
    arm = np.random.default_rng(1).choice(["holdout", "champion", "explore"], n, p=[0.1, 0.7, 0.2])
    arms = pa.table({"entity_id": ids, "unit": ids, "arm": arm, "arm_probability": np.full(n, 0.5)})
    start = time.perf_counter()
    decide(features, scores, arms, {"largest_daily_change": 0.3}, explore=Explore(step=0.1), key="benchmark")
    return time.perf_counter() - start


def main(lines: Sequence[int]) -> None:
    print(f"{'solver':<34}{'lines':>10}{'seconds':>10}{'processor':>11}{'value':>18}{'relative gap':>14}  method")
    for shape in ("concave", "s_shaped"):
        for n in lines:
            seconds, busy, plan = min((ours(n, shape) for _ in range(3)), key=lambda r: r[0])
            row = f"{f'allocate, {shape}, best of 3':<34}{n:>10,}{seconds:>10.3f}{busy:>11.3f}{plan.value:>18,.2f}"
            print(f"{row}{plan.gap / plan.value:>14.1e}  {plan.method}", flush=True)
    for n in lines[-2:]:
        print(f"{'decide, with arms and reasons':<34}{n:>10,}{a_day(n):>10.3f}", flush=True)
    seconds, (value, rounds, message) = slsqp(1_000)
    row = f"{'SLSQP, concave (smooth curves)':<34}{1_000:>10,}{seconds:>10.3f}{'':>11}{value:>18,.2f}"
    print(f"{row}{'none':>14}  {rounds} rounds: {message}")


if __name__ == "__main__":
    main([int(a) for a in sys.argv[1:]] or [1_000, 100_000, 1_000_000])
