"""Planted candidates before the gate: how often the present gate, and the one before it, let each pass.

Belongs here: worlds with a champion of a week, candidates whose true loss is known, and the table of docs/benchmarks.md. Does
not: the gate (``models.evaluation.gate``, ``models.training.fit``), the worlds (``delivery.sandbox.worlds``), or the data (``../shared/data``).

Run: ``python -m benchmarks.gate [--trials 6] [--days 3] [--data ../shared/data]``; exits with 1 where a bad recipe passes the present gate.

A trial is a world of its own: 80 days of history as the product lands and describes them, a champion trained for the day a
week before the last, a candidate trained for the last. On UCI 498, where the data are there, a trial is another last day, a
week later; these share most of their rows. **Worse by x%** is planted in the recipe: what the model says is multiplied by
(probabilities: its log odds are shifted by) noise of its own for each row, as much as makes the registered candidate x% worse
than the registered champion on the days after the last, which nobody has seen. **Better**: the champion's recipe has the noise.
**Equal**: the candidate has the champion's own recipe. **Bad recipe**: one that learns its rows by heart. **Spoilt labels**: the
champion's recipe, and of what upstream said since the held-out days began the newest is wrong: of the last three days of
advertising three times the value, of the last twelve days of tickets that every one was missed.

The gate before (commit 8a02981): a champion trained after the held-out days began is its recipe, fitted on the candidate's own
early rows; with the candidate's own recipe it is the candidate, which ties.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from datetime import time as clock
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from delivery.sandbox.worlds import advertising, tickets
from models import catalog
from models.evaluation import evaluate, paired
from models.training import fit as fitting
from pipeline import ingest, point_in_time
from pipeline.decisions import scoring
from pipeline.lake import Lake, content_digest
from pipeline.lifecycle import candidate_evaluation
from pipeline.workflow import FOLDER, Workflow, load

FIRST_SEED = 9001
HISTORY, AFTER, OLDER = 80, 7, 7
"""Days before the candidate, days on which truth is measured, and by how many days the champion is older."""
PLANTED = ("better by 5%", "equal", "worse by 2%", "worse by 5%", "worse by 10%", "bad recipe", "spoilt labels")
_SHARE = {"worse by 2%": 0.02, "worse by 5%": 0.05, "worse by 10%": 0.10}
_BAD: dict[str, dict[str, Any]] = {
    "response": {"rounds": 150, "learning_rate": 0.5, "leaves": 31, "rows_in_leaf": 1, "l2": 0.0},
    "duration": {"rounds": 150, "learning_rate": 0.5, "num_leaves": 63, "min_data_in_leaf": 1},
}
NOISE = "noise"
"""The key of a recipe under which its planted noise stands."""


# --- places -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A workflow whose days are landed and described, and the last days that candidates are trained for."""

    workflow: Workflow
    lake: Lake
    days: tuple[date, ...]
    until: date
    """The day at whose cut-off the outcomes of the days after are looked up."""


def _smaller(name: str, start: date | None = None) -> Workflow:
    """The shipped workflow without slices, whose columns few rows fill."""
    said = load(FOLDER / name)
    least = {"draws": 2000, "slices": (), "attributes": ()}
    training = said.training.model_copy(update={"gate": said.training.gate.model_copy(update=least)})
    return said.model_copy(update={"training": training, "start": start or said.start})


def _described(workflow: Workflow, root: Path, days: Sequence[date]) -> Lake:
    lake = Lake(str(root / "lake"))
    ingest.ingest(workflow, lake, root / "landing", now=datetime.combine(days[-1] + timedelta(days=1), clock(4)))
    for stage, made in (("features", point_in_time.features), ("outcomes", point_in_time.outcomes)):
        tables = [table for _, table in made(workflow, lake, days)]
        lake.replace_days(workflow.table(stage), pa.concat_tables(tables, promote_options="default"), list(days))
    return lake


def world(name: str, seed: int, root: Path, size: int) -> Place:
    """A world of its own; ``size``: lines or teams."""
    workflow = _smaller(name)
    more = AFTER + 1 + workflow.training.maturity_days
    days = [workflow.start + timedelta(days=n) for n in range(HISTORY + more)]
    folder = (root / "landing" / name / workflow.sources["export"].files).parent
    if name == "ad_budget":
        rows = advertising.history(
            advertising.World(seed, "easy", size, origin=workflow.start), workflow.start, len(days) + 3
        )
        for day in days:
            advertising.export_day(rows, folder, day)
    else:
        queue = tickets.World(seed, load=0.9, teams=size)
        for day in days:
            tickets.export_day(queue.step(day), folder, day)
    return Place(workflow, _described(workflow, root, days), (days[HISTORY - 1],), days[-1])


def uci498(data: Path, root: Path, lasts: int) -> Place:
    """The public incident log; candidates are trained for ``lasts`` days, a week apart."""
    first = date(2016, 2, 29)
    workflow = _smaller("ticket_priority", first)
    place = root / "landing" / "ticket_priority" / "uci498"
    place.mkdir(parents=True)
    (place / "incident_event_log.zip").write_bytes((data / "uci498" / "incident_event_log.zip").read_bytes())
    ends = [date(2016, 5, 9) + timedelta(days=7 * n) for n in range(lasts)]
    until = ends[-1] + timedelta(days=AFTER + 1 + workflow.training.maturity_days)
    days = [first + timedelta(days=n) for n in range((until - first).days + 1)]
    return Place(workflow, _described(workflow, root, days), tuple(ends), until)


# --- planting ---------------------------------------------------------------------------------------------------------


def _normal(rows: pa.Table) -> np.ndarray[Any, Any]:
    """A standard normal number for each row's entity and day, the same whoever asks."""
    import pandas as pd
    from scipy.special import ndtri

    key = pc.binary_join_element_wise(rows["entity_id"].cast(pa.string()), rows["day"].cast(pa.string()), "|")
    drawn = pd.util.hash_array(np.asarray(key.to_pylist(), dtype=object)).astype(np.float64) / 2.0**64
    return np.asarray(ndtri(np.clip(drawn, 1e-9, 1 - 1e-9)))


def noisy(model: Any, noise: float) -> Any:
    """The model with noise in what it says; itself without any."""
    if noise == 0:
        return model
    kind = type(model)

    class Noisy(kind):  # type: ignore[misc,valid-type]
        def level(self, features: pa.Table, spend: Any) -> Any:
            return super().level(features, spend) * np.exp(noise * _normal(features) - noise**2 / 2)

        def p_miss(self, features: pa.Table) -> Any:
            p = np.clip(super().p_miss(features), 1e-6, 1 - 1e-6)
            return 1 / (1 + np.exp(-(np.log(p / (1 - p)) + noise * _normal(features))))

        def files(self) -> dict[str, bytes]:
            return {**super().files(), "noise.json": str(noise).encode()}

    other = copy.copy(model)
    other.__class__ = Noisy
    return other


def planted(base: type[Any]) -> type[Any]:
    """The learner or rule, whose recipe may have noise; what was fitted once is fitted no more."""
    kept: dict[str, Any] = {}

    class Planted:
        @classmethod
        def fit(cls, rows: pa.Table, spec: Mapping[str, Any], **how: Any) -> Any:
            recipe = {k: v for k, v in spec.items() if k != NOISE}
            key = f"{content_digest(rows)} {sorted(recipe.items(), key=str)}"
            if key not in kept:
                kept[key] = base.fit(rows, recipe, **how)
            return noisy(kept[key], spec.get(NOISE, 0.0) if hasattr(kept[key], "plots") else 0.0)

    return Planted


def noise_for(loss: Callable[[float], float], target: float) -> float:
    """The noise with which a loss reaches ``target``; 0 where it is there without."""
    low, high = 0.0, 4.0
    if loss(low) >= target:
        return 0.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if loss(middle) < target else (low, middle)
    return high


def _spoilt(rows: pa.Table, kind: str, day: date, maturity: int) -> pa.Table:
    """Of the newest days every outcome wrong."""
    newest = pc.greater(rows["day"], pa.scalar(day - timedelta(days=maturity or 3)))
    column = paired.comparison(kind).actual
    was = rows[column]
    wrong = pc.multiply(was, 3.0) if catalog.KINDS[kind].scores == "amount" else pc.if_else(pc.is_valid(was), True, was)
    return rows.set_column(rows.schema.get_field_index(column), column, pc.if_else(newest, wrong, was))


# --- trials -----------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What became of one kind of candidate."""

    old: list[bool] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    truth: list[float] = field(default_factory=list)
    read: list[float] = field(default_factory=list)
    ratio: list[float] = field(default_factory=list)
    rule: list[bool] = field(default_factory=list)
    """Whether the candidate's twin is no better than the rule, which refuses it whoever the champion is."""


def trial(place: Place, day: date, tallies: Mapping[str, Tally]) -> None:
    """Every kind of candidate trained for ``day``, before both gates."""
    workflow, lake = place.workflow, place.lake
    training, kind = workflow.training, workflow.model.kind
    learner, rule = planted(catalog.learner(kind)), planted(catalog.rule(kind))
    how: dict[str, Any] = {"seed": scoring.SEED, "device": "cpu", "threads": candidate_evaluation.THREADS}
    base = scoring.learner_spec(workflow)
    rows = point_in_time.ordered(point_in_time.training_set(workflow, lake, day), "day")
    held = candidate_evaluation.held_out(workflow, lake, day, rows)
    older = day - timedelta(days=OLDER)
    aged_day = candidate_evaluation.twin_day(workflow, older)
    aged, champions_rows = (
        candidate_evaluation._known(workflow, lake, aged_day),
        candidate_evaluation._known(workflow, lake, older),
    )
    later = point_in_time.training_set(workflow.model_copy(update={
        "training": training.model_copy(update={"history_days": (place.until - day).days})}), lake, place.until)  # fmt: skip
    ahead = (pc.field("day") > pc.scalar(day)) & (pc.field("day") <= pc.scalar(day + timedelta(days=AFTER)))
    test, actual = paired.known(kind, point_in_time.rows_where(later.filter(ahead), training.evaluate_on))

    def loss(model: Any) -> float:
        found = paired.losses(kind, training.metric, paired.comparison(kind).predict(model, test), actual)
        assert found is not None
        return float(found.mean())

    learn = point_in_time.rows_where(rows, training.train_on)
    model, champion = learner.fit(learn, base, **how), learner.fit(champions_rows, base, **how)
    mine, theirs = loss(model), loss(champion)
    for name in PLANTED:
        spec, its, learned, judged = dict(base), dict(base), learn, held.rows
        if name in _SHARE:
            spec[NOISE] = noise_for(lambda s: loss(noisy(model, s)), theirs * (1 + _SHARE[name]))
        elif name == "better by 5%":
            its[NOISE] = noise_for(lambda s: loss(noisy(champion, s)), mine / 0.95)
        elif name == "bad recipe":
            spec |= _BAD[kind]
        elif name == "spoilt labels":
            learned, judged = (_spoilt(one, kind, day, training.maturity_days) for one in (learn, held.rows))
        opponent = fitting.Champion(
            "version 1", learner.fit(champions_rows, its, **how), older <= held.split, its, aged, aged_day
        )
        fitted = fitting.fit_and_judge(
            learned, held.early, judged, learner=learner, champion=opponent, newest=held.newest, spec=spec, day=day,
            decided=held.decided, **candidate_evaluation.asked(workflow, "cpu") | {"rule": rule},
        )  # fmt: skip
        tally = tallies[name]
        tally.new.append(fitted.verdict.word)
        tally.truth.append(loss(fitted.model) / loss(opponent.model) - 1)
        if fitted.verdict.figures.get("harm"):
            tally.read.append(fitted.verdict.figures["harm"]["point"])
        if isinstance(fitted.verdict.figures.get("disagreement"), dict):
            tally.ratio.append(fitted.verdict.figures["disagreement"]["ratio"])
        figures = fitted.verdict.figures
        harm = figures.get("harm") or {}
        tally.rule.append("rule" in figures and not figures["candidate"] < figures["rule"])
        told = " ".join(f"{k} {harm[k]:+.1%}" for k in ("point", "low", "high") if harm.get(k) is not None)
        print(f"{day} {name}: truly {tally.truth[-1]:+.1%}, {told}: {fitted.verdict.word}", file=sys.stderr, flush=True)
        tally.old.append(_before(place, held, judged, learner, rule, spec, its, how, opponent))


def _before(
    place: Place,
    held: candidate_evaluation.Held,
    judged: pa.Table,
    learner: Any,
    rule: Any,
    spec: Any,
    its: Any,
    how: Any,
    opponent: Any,
) -> bool:
    """The verdict of the gate before."""
    training = place.workflow.training
    twin, simple = learner.fit(held.early, spec, **how), rule.fit(held.early, spec, **how)
    other = opponent.model if opponent.clean else learner.fit(held.early, its, **how)
    if paired.same(twin, other, judged):
        figures = [one.evaluate(judged)[training.metric] for one in (twin, simple)]
        return bool(figures[0] < figures[1])
    verdict, _ = evaluate.examine(
        twin, simple, other, judged, metric=training.metric, better=training.better, margin=training.margin,
        terms=candidate_evaluation.terms(place.workflow), decided=held.decided,
    )  # fmt: skip
    return bool(verdict.passed)


# --- the table --------------------------------------------------------------------------------------------------------


def interval(hits: int, of: int) -> str:
    """A share with its 95% interval (Wilson 1927)."""
    z = 1.96
    middle, half = (hits + z * z / 2) / (of + z * z), z * np.sqrt(hits * (of - hits) / of + z * z / 4) / (of + z * z)
    return f"{hits} of {of} ({max(0.0, middle - half):.0%}–{min(1.0, middle + half):.0%})"


def table(tallies: Mapping[str, Tally]) -> str:
    """One row a kind of candidate."""
    lines = [
        "| planted | truly worse by | twins read | the gate before lets pass | this gate lets pass | holds | no better than the rule | "
        "disagreement |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, one in tallies.items():
        n = len(one.new)
        read = f"{np.mean(one.read):+.1%}" if one.read else "–"
        ratio = f"{min(one.ratio):.2g}–{max(one.ratio):.2g}" if one.ratio else "–"
        lines.append(
            f"| {name} | {np.mean(one.truth):+.1%} | {read} | {interval(sum(one.old), n)} | "
            f"{interval(one.new.count('passed'), n)} | {interval(one.new.count('held'), n)} | {sum(one.rule)} | {ratio} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Prints a table a place; 1 where a bad recipe passes the present gate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=6, help="worlds of each workflow")
    parser.add_argument("--days", type=int, default=3, help="last days on UCI 498, a week apart (at most 5)")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--only", default="", help="ad_budget, ticket_priority or uci498")
    said = parser.parse_args()
    passed = 0
    for name, size in (("ad_budget", 80), ("ticket_priority", 12), ("uci498", 0)):
        absent = name == "uci498" and not (said.data / "uci498").is_dir()
        if said.only not in ("", name) or absent:
            continue
        began, tallies = time.process_time(), defaultdict[str, Tally](Tally)
        for n in range(1 if name == "uci498" else said.trials):
            with tempfile.TemporaryDirectory() as folder:
                root = Path(folder)
                place = (
                    uci498(said.data, root, said.days) if name == "uci498" else world(name, FIRST_SEED + n, root, size)
                )
                for day in place.days:
                    trial(place, day, tallies)
            took = f"{name} {n + 1}: {time.process_time() - began:.0f} processor seconds"
            print(f"{took}\n{table(tallies)}", file=sys.stderr, flush=True)
        passed += tallies["bad recipe"].new.count("passed")
        print(f"\n{name}, {time.process_time() - began:.0f} processor seconds\n\n{table(tallies)}\n", flush=True)
    return int(passed > 0)


if __name__ == "__main__":
    sys.exit(main())
