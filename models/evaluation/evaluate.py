"""A candidate beside the rule and the champion on held-out rows: everything that the gate weighs, measured once.

Belongs here: who is measured on which rows, and the check of what a model reads. Does not: fitting (``models.training.fit``),
how a difference is measured (``models.evaluation.paired``, ``models.evaluation.off_policy``), the verdict (``models.evaluation.gate``).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from models import catalog
from models.booster import is_number
from models.evaluation import bootstrap, gate, off_policy, paired
from models.policies.base import PolicySettings, Value

_OWN_COLUMNS = ("spend_shift_1", "spend_shift_7")
"""Columns that a learner makes itself (``models.learners.response.SPEND_SHIFTS``)."""

SAME_MODEL = "the candidate and the champion are the same model"
"""A comparison of a model with itself shows no difference, whatever either is worth: such a verdict is refused."""
HELD_OUT, RANDOMISED = "held-out days", "randomised days"
"""Where the policy's value is measured; the latter includes days that both may have learned from."""


@dataclass(frozen=True)
class Terms:
    """What a workflow asks of a candidate beyond its metric. ``numeric``, ``categorical``: what its features give now."""

    kind: str
    spec: gate.GateSpec
    policy: PolicySettings
    numeric: tuple[str, ...]
    categorical: tuple[str, ...]
    seed: int = 0


def contract(model: Any, terms: Terms, rows: pa.Table, recorded: Mapping[str, Any] | None = None) -> tuple[str, ...]:
    """How what a model reads differs from what the features give, one sentence a column; empty where it does not.

    ``recorded``: the recipe that its run kept (``numeric``, ``categorical``), which must say the same.
    """
    encoding = getattr(model, "encoding", None)
    reads = None if encoding is None else (encoding.numeric, tuple(encoding.categorical))
    told = None if recorded is None else tuple(tuple(recorded.get(k, ())) for k in ("numeric", "categorical"))
    found: list[str] = []
    for who, lists in (("the model", reads), ("its recorded recipe", told if recorded else None)):
        if lists is None:
            continue
        theirs = _types(*lists)
        ours = _types(terms.numeric, terms.categorical)
        for column in sorted((theirs.keys() | ours.keys()) - set(_OWN_COLUMNS)):
            mine, now = theirs.get(column), ours.get(column)
            if mine == now:
                continue
            if now is None:
                found.append(f"{who} reads column {column!r} as {mine}; the workflow's features do not name it")
            elif mine is None:
                found.append(f"{who} does not read column {column!r}, which the workflow's features name as {now}")
            else:
                found.append(f"{who} reads column {column!r} as {mine}; the workflow's features name it as {now}")
    for column in terms.numeric:
        if column not in rows.column_names:
            found.append(f"the features have no column {column!r}")
        elif not is_number(rows.schema.field(column).type):
            found.append(f"column {column!r} is {rows.schema.field(column).type} in the features and read as numeric")
    found += [
        f"the features have no column {column!r}" for column in terms.categorical if column not in rows.column_names
    ]
    return tuple(found)


def _types(numeric: Sequence[str], categorical: Sequence[str]) -> dict[str, str]:
    return {**dict.fromkeys(numeric, "numeric"), **dict.fromkeys(categorical, "categorical")}


def examine(  # noqa: PLR0913 - given by name
    candidate: Any,
    rule: Any,
    champion: Any | None,
    held_out: pa.Table,
    *,
    metric: str,
    better: Literal["lower", "higher"],
    margin: float,
    terms: Terms | None = None,
    decided: pa.Table | None = None,
    recorded: Mapping[str, Any] | None = None,
    apart: gate.Disagreement | str | None = None,
    same_rows: float | None = None,
) -> tuple[gate.Verdict, dict[str, dict[str, float]]]:
    """The verdict, and the figures of everybody on the held-out rows.

    A champion that is the candidate itself is refused: of a model beside itself nothing can be told. So is a kind of model
    that has no comparison. Without ``terms`` the figures alone are compared.
    ``decided``: the rows that the policy decides on, with ``unit`` and outcomes; those of days before the held-out ones
    count for the policy's value only. ``recorded``: see ``contract``. ``apart``: see ``training.fit.disagreement``.
    ``same_rows``: see ``gate.judge``.
    """
    if terms is not None and not paired.comparable(terms.kind):
        known = ", ".join(sorted(filter(paired.comparable, catalog.KINDS)))
        return gate.refused(
            f"models of kind {terms.kind!r} have no comparison (there is one for {known}): nothing says whether this one is "
            "worse; declare how its rows are compared in its KIND; " + catalog.why_not(terms.kind, "comparison")
        ), {}
    if terms is not None:
        differs = contract(candidate, terms, held_out, recorded)
        if differs:
            return gate.Verdict(False, differs, {"contract": list(differs)}), {}
    if champion is not None and held_out.num_rows and paired.same(candidate, champion, held_out):
        return gate.refused(f"{SAME_MODEL}: of a model beside itself nothing can be told"), {}
    metrics = {"candidate": candidate.evaluate(held_out), "rule": rule.evaluate(held_out)}
    if champion is not None:
        metrics["champion"] = champion.evaluate(held_out)
    evidence = None
    if terms is not None and held_out.num_rows:
        evidence = _gather(candidate, rule, champion, held_out, decided, metric, better, terms, metrics, apart)
        if evidence is None:
            return gate.refused(f"none of {held_out.num_rows} held-out rows has a known outcome"), metrics
    verdict = gate.judge(
        metric=metric,
        better=better,
        margin=margin,
        candidate=metrics["candidate"],
        rule=metrics["rule"],
        champion=metrics.get("champion"),
        rows=held_out.num_rows,
        evidence=evidence,
        spec=None if terms is None else terms.spec,
        same_rows=same_rows,
    )
    return verdict, metrics


def _gather(
    candidate: Any,
    rule: Any,
    champion: Any | None,
    held_out: pa.Table,
    decided: pa.Table | None,
    metric: str,
    better: Literal["lower", "higher"],
    terms: Terms,
    metrics: Mapping[str, Mapping[str, float]],
    apart: gate.Disagreement | str | None,
) -> gate.Evidence | None:
    against: Literal["champion", "rule"] = "rule" if champion is None else "champion"
    other, spec, kind = (rule if champion is None else champion), terms.spec, paired.comparison(terms.kind)
    rows, actual = paired.known(terms.kind, held_out)
    if not rows.num_rows:
        return None
    again: dict[str, Any] = {"draws": spec.draws, "seed": terms.seed, "confidence": spec.confidence}
    days = bootstrap.Days.of(rows, **again)
    mine, theirs = (paired.losses(terms.kind, metric, kind.predict(one, rows), actual) for one in (candidate, other))
    harm, found, means = None, [], {}
    if mine is not None and theirs is not None and better == "lower":
        harm = paired.harm(days, mine, theirs)
        means = {"candidate": float(mine.mean()), against: float(theirs.mean())}
        found = paired.slices(
            rows, spec.slices, days, mine, theirs, min_rows=spec.slice_min_rows, alpha=1 - spec.confidence
        )
    undeclared = f"models.evaluation.paired declares no loss of a row for it in models of kind {terms.kind!r}"
    started = time.perf_counter()
    candidate.score(held_out)
    speed = held_out.num_rows / max(time.perf_counter() - started, 1e-9)
    values, groups = _decide(candidate, other, held_out, decided, terms, again)
    return gate.Evidence(
        against=against,
        harm=harm,
        recomputed=means,
        values=values,
        slices=tuple(found),
        groups=tuple(groups),
        calibration=(kind.calibration_is, kind.calibration(metrics["candidate"]), kind.calibration(metrics[against])),
        megabytes=sum(len(one) for one in candidate.files().values()) / gate.MEGABYTE,
        rows_per_s=speed,
        disagreement=apart,
        no_interval="" if harm is not None else kind.whole.get(metric, undeclared),
    )


def _decide(
    candidate: Any, other: Any, held_out: pa.Table, decided: pa.Table | None, terms: Terms, again: dict[str, Any]
) -> tuple[dict[str, Value | str], list[paired.Group]]:
    """The policy's value on the held-out days and, for what was randomised, on all days; and the groups."""
    if decided is None or not decided.num_rows:
        return {HELD_OUT: "not measured: the policy decides on none of their rows"}, []
    rows = off_policy.at_status_quo(decided, terms.policy)
    mine = off_policy.decisions(rows, candidate, terms.policy)
    theirs = off_policy.decisions(rows, other, terms.policy)
    late = np.asarray(pc.is_in(rows.column("day"), value_set=pc.unique(held_out.column("day"))))
    recent, ours, others = rows.filter(pa.array(late)), mine.where(late), theirs.where(late)
    values = {HELD_OUT: off_policy.value(recent, ours, others, terms.policy, **again)}
    if not late.all():
        values[RANDOMISED] = off_policy.value(rows, mine, theirs, terms.policy, **again)
    groups = paired.groups(
        recent, terms.spec.attributes, ours.favour, others.favour, min_rows=terms.spec.slice_min_rows
    )
    return values, groups
