"""Fit a candidate, judge its twin on held-out days beside the rule and the champion, then fit it on everything.

Belongs here: who is fitted on which rows, and who stands in for whom. Does not: the learners themselves, measuring them
(``models.evaluation.evaluate``), the registry, I/O.

A twin is a recipe fitted as long before the held-out days as the model itself is old: the candidate's on what was known when
they began, the champion's on what was known as long before that as the champion is older than the candidate. So neither has
seen the days that judge it, and what age costs a model counts as it will when it decides.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any, Literal

import pyarrow as pa

from common.errors import SignalboxError
from models.evaluation import evaluate, gate, paired
from models.learners.base import Learner, Scorer
from models.training import distillation


class TooFewRows(SignalboxError, ValueError):
    """Not enough matured rows to learn from; the message says how many there are and what to do."""


@dataclass(frozen=True)
class Champion:
    """Whom a candidate is compared with."""

    name: str
    """``version 3``."""
    model: Scorer
    """As it is registered."""
    clean: bool
    """It was trained before the held-out days."""
    recipe: Mapping[str, Any] | None = None
    """What its twin is given; None: it has none, and ``why`` says why."""
    aged: pa.Table | None = None
    """What its twin learns from."""
    aged_day: date | None = None
    """At whose cut-off that was known."""
    why: str = ""


@dataclass(frozen=True)
class Newest:
    """Features alone of the newest days, whose labels only the registered models have seen; and of the days that were as new
    to the candidate's twin."""

    registered: pa.Table
    twins: pa.Table


@dataclass(frozen=True)
class Fitted:
    """A candidate fitted on every matured row, with the verdict on its twin that had not seen the held-out days."""

    model: Learner
    verdict: gate.Verdict
    metrics: dict[str, dict[str, float]]
    rows: int
    note: str = ""
    """How it was compared with the champion, or why not; empty where there is none."""
    judged: Learner | None = None
    """The candidate's twin, where there were held-out days to judge it on."""


def fit_twin(
    learner: type[Learner], rows: pa.Table, recipe: Mapping[str, Any], how: Mapping[str, Any]
) -> tuple[Learner | None, str]:
    """A recorded recipe fitted on ``rows``; None and a clause where it does not fit them any more."""
    try:
        return distillation.of(learner).fit(rows, recipe, **how), ""
    except (KeyError, TypeError, ValueError) as error:
        return None, f"its recipe cannot be fitted any more: {_first(error)}"


def _first(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def champions_twin(
    champion: Champion | None, learner: type[Learner], how: Mapping[str, Any]
) -> tuple[Learner | None, str]:
    """The champion's twin; None and a clause where it can have none."""
    if champion is None or champion.recipe is None or champion.aged is None:
        return None, "" if champion is None else champion.why
    return fit_twin(learner, champion.aged, champion.recipe, how)


def opponent(
    candidate: Scorer, champion: Champion | None, twin: Learner | None, why: str, held_out: pa.Table
) -> tuple[Scorer | None, str]:
    """Who stands for the champion beside ``candidate``, which has not seen ``held_out``; and a sentence about it.

    The champion as it is where it was trained before these days, unless the candidate is that very model: then its ``twin``
    is told from it. Else its twin; where it can have none (``why``) the champion as it is, which flatters it, so that a
    candidate passes only where that does not matter. One that cannot score the rows is not compared: it could not decide
    either.
    """
    if champion is None:
        return None, ""
    name, stands_in = champion.name[:1].upper() + champion.name[1:], ""
    if twin is not None and champion.aged is not None:
        stands_in = (
            f"its twin, fitted on the {champion.aged.num_rows} rows known by {champion.aged_day}, stands in for it"
        )
    try:
        if twin is not None and paired.same(candidate, twin, held_out):
            twin, why = None, "its twin is the candidate's"
        if twin is not None and not champion.clean:
            return twin, f" {name} has learned from the held-out days: {stands_in}."
        its_own = paired.same(candidate, champion.model, held_out)
        champion.model.evaluate(held_out)
    except (KeyError, TypeError, ValueError) as error:
        cannot = f" {name} cannot score the held-out rows"
        return (twin, f"{cannot} ({_first(error)}): {stands_in}.") if twin is not None else (
            None, f"{cannot} and is not compared: {_first(error)}.",
        )  # fmt: skip
    if its_own and twin is not None:
        return twin, f" {name} is what the candidate's twin is: {stands_in}."
    how = (
        "as it is"
        if champion.clean
        else f"as it is, though it has learned from the held-out days, which flatters it: {why}"
    )
    return champion.model, f" Compared with {champion.name} {how}."


def disagreement(
    kind: str, model: Scorer, twin: Scorer, champion: Champion, its_twin: Scorer | None, why: str, newest: Newest | None
) -> gate.Disagreement | str:
    """How far candidate and champion lie apart on the newest rows, beside their twins; a sentence where that cannot be told."""
    if its_twin is None or newest is None:
        return f"not measured, {champion.name} has no twin: {why or 'no rows are given'}"
    if not newest.registered.num_rows or not newest.twins.num_rows:
        return "not measured: there are no feature rows of the newest days"
    try:
        far, rows = paired.disagreement(kind, model, champion.model, newest.registered)
        twins, twin_rows = paired.disagreement(kind, twin, its_twin, newest.twins)
    except (KeyError, TypeError, ValueError) as error:
        return f"not measured: {_first(error)}"
    for compared, who in ((rows, "models"), (twin_rows, "twins")):
        if not compared:
            return f"not measured: no feature row of the newest days is scored by both {who}"
    if not (math.isfinite(far) and math.isfinite(twins)):
        return f"not measured: {far:g} beside the twins' {twins:g} is no figure"
    return gate.Disagreement(far, twins, rows) if twins > 0 else "not measured: the twins agree in every row"


def fit_and_judge(  # noqa: PLR0913 - given by name
    learn: pa.Table,
    early: pa.Table,
    held_out: pa.Table,
    *,
    learner: type[Learner],
    rule: type[Scorer],
    champion: Champion | None,
    newest: Newest | None = None,
    spec: Mapping[str, Any],
    day: date,
    min_rows: int,
    metric: str,
    better: Literal["lower", "higher"],
    margin: float,
    seed: int,
    device: str,
    threads: int,
    terms: evaluate.Terms | None = None,
    decided: pa.Table | None = None,
) -> Fitted:
    """Fit the candidate on ``learn``; judge its twin, fitted on ``early``, on ``held_out``.

    All tables hold features with outcomes, sorted by day and key. ``early`` is what was known when the first held-out day
    began: labels that became known later would look ahead. ``champion``: see ``opponent``. ``newest``: what the two as they
    are registered are compared on. ``terms``, ``decided``: see ``evaluate.examine``. Raises TooFewRows.
    """
    if learn.num_rows < min_rows:
        raise TooFewRows(
            f"{learn.num_rows} matured rows up to {day}, {min_rows} are needed (training.min_rows); "
            "materialise earlier features and outcomes, or train later"
        )
    how: dict[str, Any] = {"seed": seed, "device": device, "threads": threads}
    model: Learner = learner.fit(learn, spec, **how)
    if not held_out.num_rows or not early.num_rows:
        verdict = gate.judge(metric=metric, better=better, margin=margin, candidate={}, rule={}, champion=None, rows=0)
        return Fitted(model, verdict, {}, learn.num_rows)
    if champion is not None and is_champion(model, champion, held_out):
        verdict = gate.refused(f"{evaluate.SAME_MODEL} ({champion.name}): of a model beside itself nothing can be told")
        return Fitted(model, verdict, {}, learn.num_rows)
    twin = learner.fit(early, spec, **how)
    its_twin, why = champions_twin(champion, learner, how)
    other, note = opponent(twin, champion, its_twin, why, held_out)
    apart = None
    if champion is not None and terms is not None and paired.comparable(terms.kind):
        apart = disagreement(terms.kind, model, twin, champion, its_twin, why, newest)
    verdict, metrics = evaluate.examine(
        twin,
        rule.fit(early, spec, **how),
        other,
        held_out,
        metric=metric,
        better=better,
        margin=margin,
        terms=terms,
        decided=decided,
        apart=apart,
        same_rows=None
        if champion is None or other is None
        else same_rows(twin, spec, champion, learner, early, held_out, metric, how),
    )
    return Fitted(model, verdict, metrics, learn.num_rows, note, twin)


def same_rows(
    twin: Scorer,
    spec: Mapping[str, Any],
    champion: Champion,
    learner: type[Learner],
    rows: pa.Table,
    held_out: pa.Table,
    metric: str,
    how: Mapping[str, Any],
) -> float | None:
    """What the champion's recipe, fitted on the ``rows`` of the candidate's ``twin``, scores on ``held_out``; None where there
    is no recipe or it does not fit these rows. The twin's own figure where the recipes are the same.

    Beside the twin it tells the recipes apart and nothing else, with far less chance in it than two twins of two ages.
    """  # fmt: skip
    if champion.recipe is None:
        return None
    # as they are recorded: in JSON a tuple is a list
    if json.loads(json.dumps(spec)) == json.loads(json.dumps(champion.recipe)):
        return twin.evaluate(held_out).get(metric)
    other, _ = fit_twin(learner, rows, champion.recipe, how)
    try:
        return None if other is None else other.evaluate(held_out).get(metric)
    except (KeyError, TypeError, ValueError):
        return None  # whether the champion itself can score these rows is told by ``opponent``


def is_champion(model: Scorer, champion: Champion, rows: pa.Table) -> bool:
    """Whether a registered model is the champion's: the same files, or the same scores of every row."""
    try:
        return paired.same(model, champion.model, rows)
    except (KeyError, TypeError, ValueError):
        return False  # it cannot score these rows; the model can
