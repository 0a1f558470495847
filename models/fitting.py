"""Fit a candidate, judge it on held-out days beside the rule and the champion, then fit it on everything.

Belongs here: the split, and who is compared with whom on which rows. Does not: the learners themselves, the registry, I/O.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any, Literal

import pyarrow as pa

from models import gate
from models.catalog import Learner, Scorer


class TooFewRows(ValueError):
    """Not enough matured rows to learn from; the message says how many there are and what to do."""


@dataclass(frozen=True)
class Fitted:
    """A candidate fitted on every matured row, with the verdict on its twin that had not seen the held-out days."""

    model: Learner
    verdict: gate.Verdict
    metrics: dict[str, dict[str, float]]
    rows: int


def fit_and_judge(
    learn: pa.Table,
    early: pa.Table,
    held_out: pa.Table,
    *,
    learner: type[Learner],
    rule: type[Scorer],
    champion: Scorer | None,
    twin: Mapping[str, Any] | None = None,
    spec: Mapping[str, Any],
    day: date,
    min_rows: int,
    metric: str,
    better: Literal["lower", "higher"],
    margin: float,
    seed: int,
    device: str,
    threads: int,
) -> Fitted:
    """Fit the candidate on ``learn``; judge its twin, fitted on ``early``, on ``held_out``.

    All tables hold features with outcomes, sorted by day and key. ``early`` is what was known when the first held-out day
    began: labels that became known later would look ahead. ``champion`` is judged as it is; where it has learned from the
    held-out days, give its recipe as ``twin`` instead: fitted on ``early`` it stands in, since nobody is judged on lessons
    it was taught. Raises TooFewRows.
    """
    if learn.num_rows < min_rows:
        raise TooFewRows(
            f"{learn.num_rows} matured rows up to {day}, {min_rows} are needed (training.min_rows); "
            "materialise earlier features and outcomes, or train later"
        )
    how: dict[str, Any] = {"seed": seed, "device": device, "threads": threads}
    metrics: dict[str, dict[str, float]] = {}
    if held_out.num_rows and early.num_rows:
        metrics["candidate"] = learner.fit(early, spec, **how).evaluate(held_out)
        metrics["rule"] = rule.fit(early, spec, **how).evaluate(held_out)
        if champion is not None:
            metrics["champion"] = champion.evaluate(held_out)
        elif twin is not None:
            same = dict(twin) == dict(spec)  # the same recipe on the same rows is the same model
            metrics["champion"] = metrics["candidate"] if same else learner.fit(early, twin, **how).evaluate(held_out)
        verdict = gate.judge(
            metric=metric,
            better=better,
            margin=margin,
            candidate=metrics["candidate"],
            rule=metrics["rule"],
            champion=metrics.get("champion"),
            rows=held_out.num_rows,
        )
    else:
        verdict = gate.judge(metric=metric, better=better, margin=margin, candidate={}, rule={}, champion=None, rows=0)
    return Fitted(learner.fit(learn, spec, **how), verdict, metrics, learn.num_rows)
