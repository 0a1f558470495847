"""Whether a candidate may become champion, and the card that says why.

Belongs here: comparing figures measured on the same rows, and writing them down. Does not: measuring them
(``models.learners``) or moving an alias (``models.registry``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any, Literal


@dataclass(frozen=True)
class Verdict:
    """The gate's answer with its reasons, one sentence each with the figures."""

    passed: bool
    reasons: tuple[str, ...]


def judge(
    *,
    metric: str,
    better: Literal["lower", "higher"],
    margin: float,
    candidate: Mapping[str, float],
    rule: Mapping[str, float],
    champion: Mapping[str, float] | None,
    rows: int,
) -> Verdict:
    """Compare a candidate with the rule and with the champion on the same ``rows`` held-out rows.

    It passes when it beats the rule and is not worse than the champion by more than ``margin`` (a share of the
    champion's figure). No held-out rows, a missing figure, NaN or infinity never pass.
    """
    if rows == 0:
        return Verdict(False, ("no matured rows were held out: nothing to judge the candidate on",))

    judged = {"candidate": candidate, "rule": rule, **({"champion": champion} if champion is not None else {})}
    lacking = tuple(
        f"the {who} has no usable figure {metric!r} ({one.get(metric)}); its figures are {', '.join(one) or 'none'}"
        for who, one in judged.items()
        if not math.isfinite(one.get(metric, math.nan))
    )
    if lacking:
        return Verdict(False, lacking)

    def worse(mine: float, other: float, slack: float) -> bool:
        bound = other + abs(other) * slack if better == "lower" else other - abs(other) * slack
        return mine > bound if better == "lower" else mine < bound

    reasons, passed = [], True
    mine = candidate[metric]
    bars = [("the rule", rule[metric], 0.0, True)]
    if champion is not None:
        bars.append(("the champion", champion[metric], margin, False))
    for who, theirs, slack, strictly in bars:
        fails = worse(mine, theirs, slack) or (strictly and mine == theirs)
        passed = passed and not fails
        allowed = f" by more than {slack:.1%}" if slack else ""
        relation = (
            "does not beat"
            if strictly and fails
            else "beats"
            if strictly
            else "is worse than"
            if fails
            else "is not worse than"
        )
        reasons.append(f"{metric} {mine:.6g} {relation} {who}'s {theirs:.6g}{allowed} on {rows} held-out rows")
    if champion is None:
        reasons.append("there is no champion yet")
    return Verdict(passed, tuple(reasons))


def card(
    *,
    name: str,
    description: str,
    trained_day: date,
    verdict: Verdict,
    metrics: Mapping[str, Mapping[str, float]],
    facts: Mapping[str, Any],
) -> str:
    """A model card in Markdown (after Mitchell et al., Model Cards for Model Reporting, 2019).

    ``metrics`` maps who (candidate, rule, champion) to their figures on the held-out rows; ``facts`` are lines such as
    data versions, rows, device and code.
    """
    figures = sorted({m for one in metrics.values() for m in one})
    lines = [
        f"# {name}",
        "",
        description,
        "",
        f"Trained on what was known at the cut-off of **{trained_day}**. Gate: **{'passed' if verdict.passed else 'refused'}**.",
        "",
        *[f"- {reason}" for reason in verdict.reasons],
        "",
        "## On the held-out days",
        "",
        "| figure | " + " | ".join(metrics) + " |",
        "|---|" + "---:|" * len(metrics),
        *[
            f"| {figure} | "
            + " | ".join(f"{one[figure]:.6g}" if figure in one else "–" for one in metrics.values())
            + " |"
            for figure in figures
        ],
        "",
        "## Made from",
        "",
        *[f"- {key}: {value}" for key, value in facts.items()],
        "",
        "## Use",
        "",
        "Scores feed this workflow's policy only. Where the model is missing or unreadable the batch falls back to the "
        "previous champion, then to the rule, then to no change. A person may move the alias `champion` in the registry.",
    ]
    return "\n".join(lines) + "\n"
