"""Whether a candidate may become champion, and the card that says why.

Belongs here: what follows from figures measured on the same rows, and writing them down. Does not: measuring them
(``models.learners``, ``models.evaluation.evaluate``) or moving an alias (``models.registry``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from models.evaluation.bootstrap import LEAST_DRAWS, Interval
from models.evaluation.paired import SAME, Group, Slice
from models.policies.base import Value

MEGABYTE = 1_000_000
_SAME_ROWS = "that of the champion's recipe on the same rows,"


class GateSpec(BaseModel):
    """`training.gate` of a workflow.yaml: what a candidate must hold beyond the metric and its margin."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    evidence: Literal["point", "interval"] = Field(
        default="point",
        description="What must lie within the margin: the measured difference, or the upper end of its interval too "
        "(then a candidate must prove that it is not worse, which a week of held-out days seldom allows)",
    )
    confidence: float = Field(default=0.95, gt=0.5, lt=1, description="Of every interval, two-sided")
    draws: int = Field(default=4000, ge=LEAST_DRAWS, description="Bootstrap draws of the held-out days")
    value_margin: float = Field(
        default=0.02,
        ge=0,
        description="Refused when the policy is worth less than the champion's by more than this share, and the "
        "interval says that it is no noise",
    )
    value_days: int = Field(
        default=42,
        gt=0,
        description="Days of randomised decisions, held out or not, on which the policy's value is measured as well",
    )
    calibration: float | None = Field(
        default=0.15,
        gt=0,
        description="Largest calibration error (probabilities) or bias as a share of the mean (values); beyond it a "
        "candidate is refused unless the champion is as far off; null: no limit",
    )
    slices: tuple[str, ...] = Field(default=(), description="Feature columns whose every value is compared by itself")
    slice_min_rows: int = Field(default=100, gt=0, description="Held-out rows below which a slice or group is left out")
    slice_margin: float = Field(
        default=0.1,
        ge=0,
        description="Refused when a slice is worse than the champion by more than this share of the metric, and "
        "Benjamini-Hochberg over all slices says that it is no noise",
    )
    attributes: tuple[str, ...] = Field(
        default=(),
        description="Feature columns for whose groups the card says how often they are decided for and against",
    )
    max_disparity: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Largest difference between two groups of an attribute in the share decided against; null: told, "
        "not judged",
    )
    disagreement: float | None = Field(
        default=5.0,
        gt=0,
        description="Held for a person when candidate and champion disagree on the newest rows by more than so many times "
        "what their twins do: spoilt newest labels read 9.6, all else 0.4 to 3.2; null: no limit",
    )
    max_megabytes: float = Field(default=200, gt=0, description="Largest size of a model's files together")
    min_rows_per_s: float = Field(
        default=50, ge=0, description="Fewest rows scored a second, measured on the held-out rows"
    )


@dataclass(frozen=True)
class Disagreement:
    """How far candidate and champion lie apart as they are registered, beside their twins (``paired.disagreement``).

    The twins have not seen the newest labels. Where these are spoilt, only what has learned from them moves.
    """

    newest: float
    """Candidate and champion, on the newest days' rows."""
    twins: float
    """Their twins, on the rows that were as new to them."""
    rows: int
    """Newest rows that both score."""

    @property
    def ratio(self) -> float:
        """How many times what the twins do."""
        return self.newest / self.twins

    def as_dict(self) -> dict[str, Any]:
        """For JSON; six digits, since the last ones are the threads'."""
        told = {"newest": self.newest, "twins": self.twins, "ratio": self.ratio}
        return {**{k: float(f"{v:.6g}") for k, v in told.items()}, "rows": self.rows}


@dataclass(frozen=True)
class Evidence:
    """What was measured of a candidate beside the champion, or beside the rule where there is no champion."""

    against: Literal["champion", "rule"]
    harm: Interval | None
    """By how much it is worse on the metric, as a share of the other's; None where the metric is no mean over rows."""
    recomputed: Mapping[str, float]
    """The metric as the mean over the rows, by who."""
    values: Mapping[str, Value | str]
    """The policy's value by the days it was measured on; a sentence where it could not be."""
    slices: tuple[Slice, ...]
    groups: tuple[Group, ...]
    calibration: tuple[str, float, float]
    """What it is, the candidate's, the other's."""
    megabytes: float
    rows_per_s: float
    disagreement: Disagreement | str | None = None
    """A sentence where it could not be measured; None where there is nobody to disagree with."""
    no_interval: str = ""
    """Why there is no ``harm``."""


@dataclass(frozen=True)
class Verdict:
    """The gate's answer with its reasons, one sentence each with the figures; ``figures`` are the same for machines.

    ``held``: nothing refuses it, and it is not promoted unasked; a person decides.
    """

    passed: bool
    reasons: tuple[str, ...]
    figures: dict[str, Any] = field(default_factory=dict)
    held: bool = False

    @property
    def word(self) -> str:
        """``passed``, ``held`` or ``refused``."""
        return "passed" if self.passed else "held" if self.held else "refused"

    def told(self, *reasons: str, **figures: Any) -> Verdict:
        """The same answer with more said of it."""
        return replace(self, reasons=(*self.reasons, *reasons), figures={**self.figures, **figures})


def judge(
    *,
    metric: str,
    better: Literal["lower", "higher"],
    margin: float,
    candidate: Mapping[str, float],
    rule: Mapping[str, float],
    champion: Mapping[str, float] | None,
    rows: int,
    evidence: Evidence | None = None,
    spec: GateSpec | None = None,
    same_rows: float | None = None,
) -> Verdict:
    """Compare a candidate with the rule and with the champion on the same ``rows`` held-out rows.

    It passes when it beats the rule, is not worse than the champion by more than ``margin`` (a share of the champion's
    figure), and ``evidence`` shows nothing that ``spec`` forbids. No held-out rows, a missing figure, NaN or infinity
    never pass. What would pass, and disagrees with the champion more than its twin does, is held.

    ``same_rows``: the figure of the champion's recipe fitted on the candidate's own rows (the candidate's, where it has that
    recipe); None where it is not known. Where it is, recipe and rows are judged each by what tells it best. The recipe by
    this figure, which must lie within the margin too: newer rows do not excuse a worse recipe. What the newer rows are
    worth differs by chance from week to week, so a difference from the champion beyond the margin then refuses only where
    its interval lies above 0: chance must not keep a champion that grows older every day.
    """
    if rows == 0:
        return Verdict(False, ("no matured rows were held out: nothing to judge the candidate on",))

    judged = {"candidate": candidate, "rule": rule, **({"champion": champion} if champion is not None else {})}
    lacking = tuple(
        f"the {who} has no usable figure {metric!r} ({one.get(metric)}); its figures are {', '.join(one) or 'none'}"
        for who, one in judged.items()
        if not math.isfinite(one.get(metric, math.nan))
    )
    if same_rows is not None and not math.isfinite(same_rows):
        lacking += (f"the champion's recipe on the same rows has no usable figure {metric!r} ({same_rows})",)
    if lacking:
        return Verdict(False, lacking)

    def worse(mine: float, other: float, slack: float) -> bool:
        bound = other + abs(other) * slack if better == "lower" else other - abs(other) * slack
        return mine > bound if better == "lower" else mine < bound

    reasons, passed = [], True
    mine = candidate[metric]
    bars = [("the rule's", rule[metric], 0.0, True)]
    if champion is not None:
        bars.append(("the champion's", champion[metric], margin, False))
        if same_rows is not None and same_rows != mine:
            bars.append((_SAME_ROWS, same_rows, margin, False))
    harm = None if evidence is None or evidence.against != "champion" else evidence.harm
    for whose, theirs, slack, strictly in bars:
        fails = worse(mine, theirs, slack) or (strictly and mine == theirs)
        chance = (
            fails
            and whose == "the champion's"
            and same_rows is not None
            and harm is not None
            and harm.low is not None
            and not harm.proven
        )
        passed = passed and (not fails or chance)
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
        reasons.append(f"{metric} {mine:.6g} {relation} {whose} {theirs:.6g}{allowed} on {rows} held-out rows")
        if chance:
            reasons.append(
                f"a difference of {harm} may be chance: what newer rows are worth refuses when its interval lies above 0"
            )
    if champion is None:
        reasons.append("there is no champion yet")
    elif same_rows == mine:
        reasons.append(f"the champion's recipe on the same rows has the same {metric}")
    figures: dict[str, Any] = {
        "metric": metric, "better": better, "margin": margin, "rows": rows,
        **{who: one[metric] for who, one in judged.items()},
        **({} if same_rows is None else {"champion's recipe": same_rows}),
    }  # fmt: skip
    if evidence is not None:
        spec = spec or GateSpec()
        for fails, reason in _weighed(evidence, spec, metric, margin, judged):
            passed = passed and not fails
            reasons.append(reason)
        figures |= _figures(evidence, spec)
        holds, reason = _holds(_measured(evidence.disagreement), spec.disagreement)
        reasons += [reason] if reason else []
        return Verdict(passed and not holds, tuple(reasons), figures, held=passed and holds)
    return Verdict(passed, tuple(reasons), figures)


def _measured(found: Disagreement | str | None) -> Disagreement | str | None:
    """What was found; a sentence in the place of figures that are none: no limit tells anything of them."""
    if isinstance(found, Disagreement) and not math.isfinite(found.ratio):
        return f"not measured: {found.newest:g} beside the twins' {found.twins:g} is no figure"
    return found


def _holds(found: Disagreement | str | None, limit: float | None) -> tuple[bool, str]:
    """Whether the newest labels look spoilt, and the sentence."""
    if found is None or isinstance(found, str):
        return False, "" if found is None else f"disagreement on the newest rows: {found}"
    says = f"on the {found.rows} newest rows candidate and champion disagree {found.ratio:.3g} times as much as their twins"
    if limit is None or not found.ratio > limit:
        return False, says + ("" if limit is None else f", {limit:g} are allowed")
    return True, (
        f"{says}, {limit:g} are allowed: what the twins have not seen, the newest labels, has moved it, and the held-out days "
        "cannot tell whether it is right; it is held for a person, who promotes it by moving the alias champion"
    )


def _harm(found: Evidence, spec: GateSpec, metric: str, margin: float) -> list[tuple[bool, str]]:
    """What the interval of the metric's difference says."""
    asked = spec.evidence == "interval" and found.against == "champion"
    if found.harm is None:
        judged_by = "and an interval is asked for (gate.evidence)" if asked else "the figure alone is judged"
        says = f"{metric} has no interval and no slices, {judged_by}: {found.no_interval}"
        return [(asked, says)] if found.no_interval else []
    says = f"{metric} differs from the {found.against}'s by {found.harm} (positive is worse, {spec.confidence:.0%} interval over {found.harm.days} days)"
    if found.harm.low == found.harm.high == 0:
        says += ": no row tells them apart, so the metric says nothing of which is better"
    fails = asked and (found.harm.high is None or not found.harm.high <= margin)
    if asked:
        says += f": it is {'not ' if fails else ''}proven to be within the margin of {margin:.1%}"
    return [(fails, says)]


def _value(found: Evidence, spec: GateSpec) -> list[tuple[bool, str]]:
    """What the policy is worth with the candidate's scores, by the days on which that was measured."""
    them = f"the {found.against}"
    out: list[tuple[bool, str]] = []
    for where, value in found.values.items():
        if isinstance(value, str):
            out.append((False, f"policy's value on the {where}: {value}"))
            continue
        fails = value.harm.proven and value.harm.point > spec.value_margin
        out.append((fails, (
            f"policy's value on the {where}: {value.mine:.2%} beside {them}'s {value.theirs:.2%} of {value.of}, "
            f"{'worse by more than ' + format(spec.value_margin, '.1%') + ': ' if fails else ''}a loss of {value.harm}"
        )))  # fmt: skip
        if value.loss is not None and value.loss.proven and value.loss.point > spec.value_margin:
            # a champion that does harm itself is no bar
            says = f"policy's value on the {where}: it loses {value.loss} beside moving nothing, whatever {them} does"
            out.append((True, says))
        elif value.no_loss:
            out.append((False, f"policy's value on the {where}: not measured beside moving nothing: {value.no_loss}"))
    return out


def _weighed(
    found: Evidence, spec: GateSpec, metric: str, margin: float, judged: Mapping[str, Mapping[str, float]]
) -> list[tuple[bool, str]]:
    """Every further finding: whether it refuses, and the sentence that says so with its figures."""
    them, out = f"the {found.against}", []
    for who, again in found.recomputed.items():
        said = judged[who][metric]
        if not math.isclose(said, again, rel_tol=SAME, abs_tol=1e-12):
            out.append((True, f"the {who}'s {metric} {said:.6g} is not the mean of its rows, which is {again:.6g}"))
    out += _harm(found, spec, metric, margin)
    out += _value(found, spec)
    what, mine, theirs = found.calibration
    if spec.calibration is not None:
        # where everybody is off (the world has moved) the one that is less so may go on
        allowed = max(spec.calibration, theirs * (1 + margin) if math.isfinite(theirs) else 0.0)
        fails = not mine <= allowed
        out.append(
            (fails, f"{what} {mine:.3g} is {'above' if fails else 'within'} {allowed:.3g} ({them}'s is {theirs:.3g})")
        )
    worse = [s for s in found.slices if s.real and s.harm.proven and s.harm.point > spec.slice_margin]
    worse = worse if found.against == "champion" else []
    for one in worse:
        out.append((True, (
            f"slice {one.column} = {one.value}: {metric} {one.mine:.6g} is worse than {them}'s {one.theirs:.6g} by "
            f"{one.harm} on {one.harm.rows} rows, allowed is {spec.slice_margin:.1%}"
        )))  # fmt: skip
    if found.slices and not worse:
        columns = ", ".join(spec.slices)
        out.append(
            (
                False,
                f"none of {len(found.slices)} slices ({columns}) is worse by more than {spec.slice_margin:.1%} beyond noise",
            )
        )
    for attribute, gap, least, most in _disparities(found.groups):
        limit = spec.max_disparity
        fails = limit is not None and gap > limit
        out.append((fails, (
            f"decided against: {gap:.1%} apart between {attribute} {least} and {most}"
            + ("" if limit is None else f", {'above' if fails else 'within'} the limit of {limit:.1%}")
        )))  # fmt: skip
    if found.megabytes > spec.max_megabytes:
        out.append((True, f"its files take {found.megabytes:.1f} MB, allowed are {spec.max_megabytes:g}"))
    if not found.rows_per_s >= spec.min_rows_per_s:
        out.append((True, f"it scores {found.rows_per_s:.3g} rows a second, {spec.min_rows_per_s:g} are asked for"))
    return out


def _disparities(groups: tuple[Group, ...]) -> list[tuple[str, float, str, str]]:
    """Of each attribute: how far apart the shares decided against are, and between which groups."""
    found = []
    for attribute in dict.fromkeys(one.attribute for one in groups):
        mine = sorted((one.mine[1], one.value) for one in groups if one.attribute == attribute)
        if len(mine) > 1:
            found.append((attribute, mine[-1][0] - mine[0][0], mine[0][1], mine[-1][1]))
    return found


def _figures(found: Evidence, spec: GateSpec) -> dict[str, Any]:
    what, mine, theirs = found.calibration
    return {
        "against": found.against,
        "confidence": spec.confidence,
        "harm": None if found.harm is None else found.harm.as_dict(),
        "policy_value": {k: v if isinstance(v, str) else v.as_dict() for k, v in found.values.items()},
        "calibration": {"is": what, "mine": _number(mine), "theirs": _number(theirs)},
        "slices": [one.as_dict() for one in found.slices],
        "groups": [one.as_dict() for one in found.groups],
        "disagreement": d.as_dict() if isinstance(d := _measured(found.disagreement), Disagreement) else d,
        "megabytes": round(found.megabytes, 3),
        "rows_per_s": float(f"{found.rows_per_s:.3g}"),
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def refused(reason: str) -> Verdict:
    """A verdict where nothing could be measured; the sentence says why."""
    return Verdict(False, (reason,))


def tags(verdict: Verdict) -> dict[str, str]:
    """What a version and its run carry of the verdict, beside ``signalbox.gate``: short texts for people, one JSON."""
    found = verdict.figures
    said = {"gate_reasons": "; ".join(verdict.reasons)[:4000]}
    if "harm" in found:
        said |= {
            "gate_against": found["against"],
            "gate_harm": _shown(found["harm"]) if found["harm"] else "no interval: the metric is no mean over rows",
            **{f"gate_value_{k.replace(' ', '_')}": v if isinstance(v, str) else _shown(v["harm"])
               for k, v in found["policy_value"].items()},
            "gate_calibration": _short(found["calibration"]["mine"]),
            "gate_slices": f"{len(found['slices'])} compared, "
            f"worst {max((s['harm']['point'] or 0.0 for s in found['slices']), default=0.0):+.1%}",
            "gate_fairness": json.dumps(
                {f"{g['attribute']}={g['value']}": [round(x, 3) for x in g["mine"]] for g in found["groups"][:40]},
                ensure_ascii=False,
            )[:4000],
            **_disagreement_tag(found["disagreement"]),
            "gate_megabytes": f"{found['megabytes']:g}",
            "gate_rows_per_s": f"{found['rows_per_s']:g}",
        }  # fmt: skip
    if "live" in found:
        said["gate_live"] = live_sentence(found["live"])
    said |= {"gate_held": "for a person: gate_reasons say why"} if verdict.held else {}
    return {f"signalbox.{name}": text for name, text in said.items()}


def _disagreement_tag(found: Mapping[str, Any] | str | None) -> dict[str, str]:
    if found is None:
        return {}
    return {"gate_disagreement": found if isinstance(found, str) else f"{found['ratio']:.3g} times the twins'"}


def live_sentence(found: Mapping[str, Any]) -> str:
    """What a champion really scored, from the figures of ``pipeline.lifecycle.candidate_evaluation.live``."""
    first, last = found["days"]
    return (
        f"live, version {found['version']}'s {found['metric']} was {found['value']:.6g} on {found['rows']} rows of "
        f"{first} to {last}{found['at']}"
    )


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _shown(interval: Mapping[str, Any]) -> str:
    point, low, high = (interval[k] for k in ("point", "low", "high"))
    if point is None:
        return "–"
    return f"{point:+.2%}" + ("" if low is None or high is None else f" [{low:+.2%}, {high:+.2%}]")


def _beside(found: Mapping[str, Any]) -> list[str]:
    """The card's sections on the comparison, the slices and the groups."""
    if "harm" not in found:
        return []
    them, sure = found["against"], f"{found['confidence']:.0%} interval"
    lines = ["", f"## Beside the {them}", "", f"Positive is worse; {sure}s, whole days drawn again, paired.", "",
             f"| on the same rows | candidate | {them} | worse by | days |", "|---|---:|---:|---:|---:|"]  # fmt: skip
    if found["harm"]:
        mine, theirs = found["candidate"], found[them]
        lines.append(
            f"| {found['metric']} | {mine:.6g} | {theirs:.6g} | {_shown(found['harm'])} | {found['harm']['days']} |"
        )
    notes = []
    for where, one in found["policy_value"].items():
        if isinstance(one, str):
            lines.append(f"| policy's value, {where} | {one} | | | |")
            continue
        lines.append(
            f"| policy's value, {where} | {one['mine']:.2%} | {one['theirs']:.2%} | {_shown(one['harm'])} | {one['harm']['days']} |"
        )
        notes += [f"Policy's value, {where}: as a share of {one['of']}; it supposes that {one['assumes']}.", ""]
    calibration = found["calibration"]
    shown = [_short(calibration[k]) for k in ("mine", "theirs")]
    lines.append(f"| {calibration['is']} | {shown[0]} | {shown[1]} | | |")
    apart = found["disagreement"]
    if apart is not None:
        shown = [apart, "", ""] if isinstance(apart, str) else [
            f"{apart['newest']:.4g}", f"{apart['twins']:.4g} (twins)", f"{apart['ratio']:.3g} times",
        ]  # fmt: skip
        lines.append(f"| disagreement on the newest rows | {shown[0]} | {shown[1]} | {shown[2]} | |")
    lines += ["", *notes]
    if "live" in found:
        lines += [f"Beside it: {live_sentence(found['live'])}.", ""]
    lines.append(f"Its files take {found['megabytes']:g} MB; it scored {found['rows_per_s']:g} rows a second here.")
    if found["slices"]:
        lines += ["", "## By slice", "", f"| slice | rows | candidate | {them} | worse by | more than noise |",
                  "|---|---:|---:|---:|---:|---|"]  # fmt: skip
        lines += [
            f"| {s['column']} = {s['value']} | {s['harm']['rows']} | {s['mine']:.6g} | {s['theirs']:.6g} | "
            f"{_shown(s['harm'])} | {'yes' if s['real'] else 'no'} |"
            for s in found["slices"]
        ]
    if found["groups"]:
        lines += ["", "## Who is decided for and against", "", "On the held-out days, as the policy would by these scores.",
                  "", f"| group | rows | for | against | {them}: for | {them}: against |",
                  "|---|---:|---:|---:|---:|---:|"]  # fmt: skip
        for g in found["groups"]:
            shares = [*g["mine"], *(g["theirs"] or ())]
            cells = [f"{x:.1%}" for x in shares] + ["–"] * (4 - len(shares))
            lines.append(f"| {g['attribute']} = {g['value']} | {g['rows']} | {' | '.join(cells)} |")
    return lines


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
        f"Trained on what was known at the cut-off of **{trained_day}**. Gate: **{verdict.word}**.",
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
        *_beside(verdict.figures),
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
