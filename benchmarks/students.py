"""Measures a student: how fast it scores, how large it is and how far it agrees, beside its teacher.

Belongs here: the rows, the timing, the table. Does not: anything that the product imports.

Run: ``python -m benchmarks.students [--rows 20000] [--score 200000] [--teacher 500] [--leaves 63]``.
"""

from __future__ import annotations

import argparse
import time
from datetime import date
from typing import Any

import numpy as np
import pyarrow as pa

from models.learners.duration import DurationLearner
from models.training import distillation


def rows(n: int, columns: int, seed: int) -> pa.Table:
    """Tickets with numeric features of which some and a category decide how they end."""
    rng = np.random.default_rng(seed)
    table: dict[str, Any] = {f"c{i}": rng.standard_normal(n) for i in range(columns - 1)}
    kind = rng.integers(0, 20, n)
    level = sum((0.7 - 0.08 * i) * table[f"c{i}"] for i in range(6)) + 0.5 * table["c6"] * table["c7"] + (kind % 5) / 3
    hours = np.exp(1.5 + 0.5 * level + 0.6 * rng.standard_normal(n))
    return pa.table(
        {
            "entity_id": [f"T{i:07d}" for i in range(n)], **table, "kind": [f"k{i}" for i in kind],
            "priority": rng.integers(1, 6, n), "day": [date(2026, 3, 1 + i % 28) for i in range(n)],
            "missed": hours > 12.0, "handling_hours": hours, "open_hours": hours,
        }
    )  # fmt: skip


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--rows", type=int, default=20_000)
    ask.add_argument("--score", type=int, default=200_000)
    ask.add_argument("--columns", type=int, default=50)
    ask.add_argument("--teacher", type=int, default=500, help="trees of the teacher")
    ask.add_argument("--leaves", type=int, default=63, help="leaves of the teacher")
    said = ask.parse_args()
    learn, other = rows(said.rows, said.columns, 1), rows(said.score, said.columns, 2)
    numeric = [c for c in learn.column_names if c.startswith("c")]
    spec = {
        "kind": "duration", "group": "priority", "rule_by": ["priority"], "rounds": said.teacher,
        "num_leaves": said.leaves, "learning_rate": 0.03, "half_life_days": None, "numeric": numeric, "categorical": ["kind"],
    }  # fmt: skip
    how: dict[str, Any] = {"seed": 1, "device": "cpu", "threads": 2}
    teacher: Any = DurationLearner.fit(learn, spec, **how)
    print(
        f"{said.columns} columns; the teacher: {said.teacher} trees x {said.leaves} leaves, learned from {said.rows:,} rows;"
    )
    print(f"scored: {said.score:,} rows that neither has seen, two threads\n")
    print(
        "| model | trained in | scores a second | against teacher | size | rank correlation | mean difference | Brier |"
    )
    print("|---|---|---|---|---|---|---|---|")
    base = 0.0
    for name, settings in (
        ("teacher", None),
        ("student 120×31", (120, 31)),
        ("student 60×15", (60, 15)),
        ("student 30×8", (30, 8)),
    ):
        begun = time.perf_counter()
        model = teacher
        if settings:
            model = distillation.distill(teacher, learn, {"rounds": settings[0], "leaves": settings[1]}, **how)
        trained = time.perf_counter() - begun
        begun = time.perf_counter()
        model.score(other)
        rate = said.score / (time.perf_counter() - begun)
        base = base or rate
        agrees = distillation.agreement(teacher, model, other)
        brier = model.evaluate(other)["brier"]
        print(
            f"| {name} | {f'{trained:.1f} s' if settings else ''} | {rate:,.0f} | {rate / base:.1f}× | {agrees['size_share']:.0%} "
            f"| {agrees['agreement_rank']:.4f} | {agrees['agreement_mae']:.4f} | {brier:.4f} |"
        )


if __name__ == "__main__":
    main()
