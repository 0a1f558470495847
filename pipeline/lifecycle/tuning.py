"""What may stand before and after a training: the search for its parameters, and a student of its champion.

Belongs here: which rows a search may see, the folder in which work outlives a kill, and registering a student. Does not: searching
(``models.training.search``), distilling (``models.training.distillation``), judging (``models.training.fit``), what becomes of a version
(``pipeline.lifecycle.promotion``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from delivery.ledger import Ledger
from models import booster, catalog
from models.evaluation import gate
from models.registry import Dataset, ModelMissing, ModelUnreadable, Registry, Version
from models.training import distillation, fit, search
from pipeline import point_in_time
from pipeline.decisions import scoring
from pipeline.lake import Lake
from pipeline.lifecycle import candidate_evaluation, promotion, registration, state
from pipeline.settings import home
from pipeline.workflow import Workflow

STUDENT_OF = "signalbox.student_of"


def folder(workflow: Workflow) -> Path:
    """Where a workflow's searches and unfinished trainings are kept on this machine; it may be deleted at any time."""
    return home() / "training" / workflow.name


@contextmanager
def resumable(workflow: Workflow) -> Iterator[None]:
    """Within, what is trained outlives a kill where ``training.checkpoint_rounds`` says so."""
    every = workflow.training.checkpoint_rounds
    with nullcontext() if every is None else booster.resumable(folder(workflow) / "unfinished", every):
        yield


def tune(
    workflow: Workflow, lake: Lake, split: date, *, device: str, say: Callable[[str], Any], kept: Path | None = None
) -> search.Tuned:
    """What the learner is given: the model section, with what ``training.search`` or ``training.early_stopping`` found.

    The gate's held-out days begin after ``split`` and nothing here sees them: the days that judge a trial end with what
    had matured by ``split``, and it is fitted on what was known at the cut-off of the day before these begin.
    """
    training, spec = workflow.training, scoring.learner_spec(workflow)
    asked = training.search or training.early_stopping
    if asked is None:
        return search.untuned(spec, "")
    mature = split - timedelta(days=training.maturity_days)
    inner = mature - timedelta(days=asked.validation_days + training.maturity_days)
    first = mature - timedelta(days=asked.validation_days)
    before = point_in_time.chosen(workflow, point_in_time.training_set(workflow, lake, inner), "training.train_on")
    known = point_in_time.training_set(workflow, lake, split)
    late = known.filter((pc.field("day") > pc.scalar(first)) & (pc.field("day") <= pc.scalar(mature)))
    later = point_in_time.chosen(workflow, late, "training.evaluate_on")
    if before.num_rows < training.min_rows or not later.num_rows:
        note = (
            f"Nothing was searched: {before.num_rows} rows were known by {inner} ({training.min_rows} are needed, "
            f"training.min_rows) and {later.num_rows} matured between {first + timedelta(days=1)} and {mature}."
        )
        say(note)
        return search.untuned(spec, note)
    how: dict[str, Any] = {
        "metric": training.metric, "better": training.better, "seed": scoring.SEED, "device": device,
        "threads": candidate_evaluation.THREADS, "progress": lambda p: say(f"search: {p}"),
    }  # fmt: skip
    learner = catalog.learner(workflow.model.kind)
    if training.search is not None:
        place = folder(workflow) if kept is None else kept
        return search.search(learner, before, later, spec, budget=training.search, folder=place, **how)
    assert training.early_stopping is not None
    return search.stop_early(learner, before, later, spec, stop=training.early_stopping, **how)


def student(  # noqa: PLR0913 - given by name
    workflow: Workflow,
    registry: Registry,
    ledger: Ledger,
    lake: Lake,
    held: candidate_evaluation.Held,
    learn: pa.Table,
    made: Version,
    *,
    day: date,
    device: str,
    run: str,
    dataset: Dataset | None = None,
) -> str:
    """Train, judge and register a student where ``training.distill`` asks for one; a sentence about it, "" where not.

    Its teacher is the champion; where that is a student itself, the version just ``made``, if it passed. On the held-out
    days its twin is judged, taught by a teacher that had not seen them. With ``promote`` it is admitted like any
    candidate, unless another version is being tried; else it is registered as refused, so that nothing lets it decide
    unasked, with its verdict beside it.
    """
    training = workflow.training
    if training.distill is None:
        return ""
    if catalog.KINDS[workflow.model.kind].student is None:
        return f"No student was trained: {catalog.why_not(workflow.model.kind, 'distillation')}."
    champion = candidate_evaluation.champion_of(workflow, registry, ledger, day)
    teacher_version = champion
    try:
        if champion is None or distillation.RECIPE in registry.recipe(champion):
            teacher_version = made if made.passed else None
        if teacher_version is None:
            return "No student was trained: there is no champion to learn from."
        teacher, recipe = scoring.read_model(workflow, registry, teacher_version), registry.recipe(teacher_version)
    except (ModelMissing, ModelUnreadable) as error:
        return f"No student was trained: its teacher cannot be read: {error}."
    recipe[distillation.RECIPE] = training.distill.model_dump(mode="json", exclude={"promote"})
    clean = teacher_version.trained_day <= held.split
    base = catalog.learner(workflow.model.kind)
    other, note = candidate_evaluation.opponent(workflow, lake, registry, champion, held.split)
    fitted = fit.fit_and_judge(
        learn,
        held.early,
        held.rows,
        learner=distillation.of(base, lambda rows: teacher if clean or rows is learn else None),
        champion=other,
        newest=held.newest,
        spec=recipe,
        day=day,
        decided=held.decided,
        **candidate_evaluation.asked(workflow, device)
        | {"rule": distillation.unaware(catalog.rule(workflow.model.kind))},
    )
    agrees = distillation.agreement(teacher, fitted.model, held.rows if held.rows.num_rows else learn)
    facts = {
        "student of": f"version {teacher_version.number}",
        "rank correlation with its teacher": f"{agrees['agreement_rank']:.4f}",
        "mean difference": f"{agrees['agreement_mae_share']:.1%} of the scores' spread",
        "size": f"{agrees['size_share']:.0%} of its teacher's files",
        "champion": (note + fitted.note).strip() or "none yet",
        "Dagster run": run,
    }
    text = gate.card(
        name=f"{workflow.name} (student)",
        description=f"A small model that says what version {teacher_version.number} says, for fast scoring.",
        trained_day=day,
        verdict=fitted.verdict,
        metrics=fitted.metrics,
        facts=facts,
    )
    tried = state.live(ledger, workflow)["challenger"]
    admitted = fitted.verdict.passed and training.distill.promote and tried is None
    version = registration.register(
        workflow,
        registry,
        fitted,
        learn,
        held,
        spec=recipe,
        day=day,
        device=device,
        passed=admitted,
        facts=facts,
        card=text,
        dataset=dataset,
        agrees=agrees,
    )
    registry.tag(workflow.name, version.number, {STUDENT_OF: str(teacher_version.number)})
    verdict = "passed" if fitted.verdict.passed else f"did not pass ({'; '.join(fitted.verdict.reasons)})"
    place = "registered only (training.distill.promote is false)"
    if training.distill.promote and tried is not None:
        place = f"registered only, since version {tried[0]} is being tried"
    elif training.distill.promote:
        evidence: dict[str, Any] = {"verdict": list(fitted.verdict.reasons), "figures": fitted.verdict.figures}
        evidence |= {"run": run, "student_of": teacher_version.number}
        place = promotion.admit(
            workflow, registry, ledger, version, evidence=evidence, actor=f"run {run}", held=fitted.verdict.held
        )
    return (
        f"Version {version.number} is a student of version {teacher_version.number}: rank correlation "
        f"{agrees['agreement_rank']:.3f}, {agrees['size_share']:.0%} of its size; its gate: {verdict}; {place}."
    )
