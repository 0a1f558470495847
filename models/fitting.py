"""Fit a candidate, judge it on held-out days beside the rule and the champion, then fit it on everything.

Belongs here: who is fitted on which rows, and who stands in for whom. Does not: the learners themselves, measuring them
(``models.examining``), the registry, I/O.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any, Literal

import pyarrow as pa

from models import examining, gate, students
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
    note: str = ""
    """A sentence about the champion where its twin could not be fitted."""
    judged: Learner | None = None
    """The candidate's twin, where there were held-out days to judge it on."""


def stand_in(
    learner: type[Learner], early: pa.Table, recipe: Mapping[str, Any], how: Mapping[str, Any]
) -> tuple[Learner | None, str]:
    """A champion's recipe fitted on ``early``; None and a sentence where the recipe does not fit the rows any more."""
    try:
        return students.of(learner).fit(early, recipe, **how), ""
    except (KeyError, TypeError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        return None, f" Its recipe cannot be fitted any more, so it is not compared: {type(error).__name__}: {first}."


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
    terms: examining.Terms | None = None,
    decided: pa.Table | None = None,
) -> Fitted:
    """Fit the candidate on ``learn``; judge its twin, fitted on ``early``, on ``held_out``.

    All tables hold features with outcomes, sorted by day and key. ``early`` is what was known when the first held-out day
    began: labels that became known later would look ahead. ``champion`` is judged as it is; where it has learned from the
    held-out days, give its recipe as ``twin`` instead: fitted on ``early`` it stands in, since nobody is judged on lessons
    it was taught. ``terms``, ``decided``: see ``examining.examine``. Raises TooFewRows.
    """
    if learn.num_rows < min_rows:
        raise TooFewRows(
            f"{learn.num_rows} matured rows up to {day}, {min_rows} are needed (training.min_rows); "
            "materialise earlier features and outcomes, or train later"
        )
    how: dict[str, Any] = {"seed": seed, "device": device, "threads": threads}
    metrics: dict[str, dict[str, float]] = {}
    note = ""
    candidate: Learner | None = None
    if held_out.num_rows and early.num_rows:
        candidate = learner.fit(early, spec, **how)
        other: Scorer | None = champion
        if other is None and twin is not None:
            same = dict(twin) == dict(spec)  # the same recipe on the same rows is the same model
            other, note = (candidate, "") if same else stand_in(learner, early, twin, how)
        verdict, metrics = examining.examine(
            candidate,
            rule.fit(early, spec, **how),
            other,
            held_out,
            metric=metric,
            better=better,
            margin=margin,
            terms=terms,
            decided=decided,
        )
    else:
        verdict = gate.judge(metric=metric, better=better, margin=margin, candidate={}, rule={}, champion=None, rows=0)
    return Fitted(learner.fit(learn, spec, **how), verdict, metrics, learn.num_rows, note, candidate)
