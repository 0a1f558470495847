"""Every kind of model and of policy is complete: what some kinds can do each can, or declares why not, and that is said where
it would have been used."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pytest

from data_checks import performance
from models import catalog
from models.evaluation import evaluate, gate, off_policy
from models.learners.base import Kind
from models.training import distillation, search
from pipeline.decisions import scoring
from pipeline.explain import counterfactual
from pipeline.lifecycle import candidate_evaluation, shadow, tuning
from pipeline.monitoring import labels
from pipeline.workflow import ModelSpec, PolicySpec
from tests.conftest import WorkflowHarness

MODELS: Mapping[str, Callable[[Kind], bool]] = {
    "comparison": lambda kind: kind.comparison is not None,
    "search": lambda kind: kind.space is not None,
    "distillation": lambda kind: kind.student is not None,
    "held-out baseline": lambda kind: "held-out baseline" not in kind.absent,
}
"""What a kind of model can do: whether it is there."""
POLICIES = {"off-policy value", "loss beside moving nothing", "counterfactual", "shadow"}


def kinds_of(union: Any) -> set[str]:
    """The kinds that a workflow.yaml may name."""
    return {get_args(one.model_fields["kind"].annotation)[0] for one in get_args(get_args(union)[0])}


def test_every_kind_that_a_workflow_may_name_is_in_the_catalog_and_no_other() -> None:
    assert kinds_of(ModelSpec) == set(catalog.KINDS) and len(catalog.KINDS) == len(catalog.LEARNER_MODULES)
    assert kinds_of(PolicySpec) == set(catalog.POLICIES) == {kind.policy for kind in catalog.KINDS.values()}
    for kind in catalog.KINDS.values():
        assert kind.scores in get_args(performance.Kind) and kind.answer in kind.outcomes


def test_every_ability_of_a_kind_of_model_is_there_or_declared_absent_with_a_reason() -> None:
    for name, kind in catalog.KINDS.items():
        assert set(kind.absent) <= set(MODELS), f"{name}: no such ability"
        for ability, there in MODELS.items():
            assert there(kind) != (ability in kind.absent), f"{name}: {ability}"
        assert all(len(why) > 20 for why in kind.absent.values())


def test_a_policy_declares_absent_with_a_reason_only_what_there_is(
    ads: WorkflowHarness, queue: WorkflowHarness
) -> None:
    for name, policy in catalog.POLICIES.items():
        assert set(policy.absent) <= POLICIES, f"{name}: no such ability"
        assert all(len(why) > 20 for why in policy.absent.values())
    for bench in (ads, queue):
        spec, policy = bench.workflow.policy, catalog.policy(bench.workflow.policy.kind)
        row = bench.lake.read(bench.workflow.table("features"), days=[bench.last]).slice(0, 1)
        assert list(policy.limits(spec, row, "champion")), "no limit: nothing could have changed a decision"


def test_every_metric_has_a_loss_of_each_row_or_a_reason_why_not() -> None:
    for kind, said in catalog.KINDS.items():
        how = said.comparison
        assert how is not None and how.losses, f"no metric of {kind} is compared row by row"
        assert not how.losses.keys() & how.whole.keys()
        assert how.losses.keys() | how.whole.keys() == said.metrics.keys(), kind


def test_every_space_searches_fields_that_the_kind_has() -> None:
    for kind in catalog.KINDS.values():
        assert set(kind.space or ()) <= set(kind.settings.model_fields)


# --- what is declared absent is said where it would have been used


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch, bench: WorkflowHarness) -> Any:
    """Take an ability from the bench's kind of model or policy, with a reason."""

    def take(ability: str, part: str | None = None, *, policy: bool = False) -> None:
        reason = {ability: f"of this {ability} nobody has thought"}
        if policy:
            one: Any = copy.copy(catalog.POLICIES[bench.workflow.policy.kind])
            one.absent = {**one.absent, **reason}
            monkeypatch.setitem(catalog.POLICIES, bench.workflow.policy.kind, one)
        else:
            kind = catalog.KINDS[bench.workflow.model.kind]
            fewer: dict[str, Any] = {part: None} if part else {}
            monkeypatch.setitem(
                catalog.KINDS, bench.workflow.model.kind, replace(kind, absent={**kind.absent, **reason}, **fewer)
            )

    return take


def test_the_gate_says_why_a_kind_has_no_comparison(bench: WorkflowHarness, absent: Any) -> None:
    absent("comparison", "comparison")
    spec = bench.workflow
    terms = evaluate.Terms(spec.model.kind, gate.GateSpec(), spec.policy, (), ())
    verdict, _ = evaluate.examine(
        None, None, None, pa.table({}), metric="m", better="lower", margin=0.0, terms=terms
    )  # fmt: skip
    assert not verdict.passed and "of this comparison nobody has thought" in verdict.reasons[0]


def test_a_search_says_why_a_kind_has_no_space(bench: WorkflowHarness, absent: Any, tmp_path: Path) -> None:
    absent("search", "space")
    with pytest.raises(KeyError, match="of this search nobody has thought"):
        search.search(
            catalog.learner(bench.workflow.model.kind), pa.table({}), pa.table({}), scoring.learner_spec(bench.workflow),
            budget=search.Search(trials=1), metric="m", better="lower", seed=1, device="cpu", threads=1, folder=tmp_path,
        )  # fmt: skip


def test_a_training_says_why_a_kind_has_no_student(bench: WorkflowHarness, absent: Any) -> None:
    absent("distillation", "student")
    asked = bench.workflow.training.model_copy(update={"distill": distillation.Distill()})
    workflow = bench.workflow.model_copy(update={"training": asked})
    nothing: Any = None
    said = tuning.student(
        workflow, nothing, nothing, bench.lake, nothing, pa.table({}), nothing, day=bench.last, device="cpu", run="r"
    )
    assert said == "No student was trained: of this distillation nobody has thought."


def test_the_gate_is_told_why_a_policy_has_no_value(bench: WorkflowHarness, absent: Any) -> None:
    absent("off-policy value", policy=True)
    nothing: Any = None
    found = off_policy.value(pa.table({}), nothing, nothing, bench.workflow.policy, draws=2000, seed=1, confidence=0.9)
    assert found == "not measured: of this off-policy value nobody has thought"


def test_an_explanation_says_why_nothing_was_searched(bench: WorkflowHarness, absent: Any) -> None:
    absent("counterfactual", policy=True)
    nothing = pa.table({})
    inputs = counterfactual.Inputs({}, bench.workflow, bench.last, nothing, nothing, nothing, "champion", None)
    assert "of this counterfactual nobody has thought" in counterfactual.search(inputs, None).says[0]


def test_a_shadow_says_why_it_is_not_compared(bench: WorkflowHarness, absent: Any) -> None:
    absent("shadow", policy=True)

    class Scored:
        """A lake in which a challenger has scored the day."""

        def read(self, table: str, **how: Any) -> pa.Table:
            made = {"challenger_version": 2, "challenger_digest": "d", "challenger_stage": "shadow", "model_version": 1}
            return pa.Table.from_pylist([{**made, "challenger_reason": None}])

        def replace_days(self, table: str, rows: pa.Table, days: list[date]) -> int:
            return 1

    lake: Any = Scored()
    told = shadow.report(bench.workflow, lake, bench.last, lambda page: "")
    assert told is not None and told[1] is None
    assert told[0]["text"] == "version 2 could not be compared: of this shadow nobody has thought"


def test_the_performance_says_why_the_gate_gives_no_baseline(ads: WorkflowHarness, queue: WorkflowHarness) -> None:
    assert "what was really spent" in labels.no_gate_baseline(ads.workflow)
    assert labels.no_gate_baseline(queue.workflow) == ""
    assert performance.Kind is not None and labels.kind_of(ads.workflow) == "amount"


def test_the_gate_says_what_it_cannot_measure_of_priorities_and_of_a_metric_over_all_rows(
    queue: WorkflowHarness,
) -> None:
    workflow, lake, day = queue.workflow, queue.lake, queue.last
    short = workflow.training.model_copy(update={"holdout_days": 3, "maturity_days": 2})
    workflow = workflow.model_copy(update={"training": short})
    learn = candidate_evaluation._known(workflow, lake, day)
    held = candidate_evaluation.held_out(workflow, lake, day, learn)
    model = catalog.learner(workflow.model.kind).fit(
        held.early, scoring.learner_spec(workflow), seed=1, device="cpu", threads=1
    )
    rule = catalog.rule(workflow.model.kind).fit(
        held.early, scoring.learner_spec(workflow), seed=1, device="cpu", threads=1
    )
    features = workflow.features
    terms = evaluate.Terms("duration", gate.GateSpec(), workflow.policy, features.numeric, features.categorical)
    verdict, _ = evaluate.examine(
        model, rule, None, held.rows, metric="roc_auc", better="higher", margin=0.0, terms=terms, decided=held.decided
    )
    said = "; ".join(verdict.reasons)
    assert "roc_auc has no interval and no slices, the figure alone is judged: it is told of pairs of rows" in said
    assert "not measured beside moving nothing: the priorities that stood are an order themselves" in said
