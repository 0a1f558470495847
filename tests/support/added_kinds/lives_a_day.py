"""A day with the added kinds, in a copy of the product in which the catalog has a line more for each: printed as JSON.

Belongs here: what a day asks of a kind, from validation to explaining. Does not: asserting (``tests/pipeline/test_added_kinds.py``).
"""

from __future__ import annotations

import json
import sys
from datetime import date
from pathlib import Path

from models import catalog
from models.evaluation import evaluate
from models.registry import CHAMPION, Registry
from pipeline import workflow_validation
from pipeline.decisions import scoring
from pipeline.decisions.batch_review import teller
from pipeline.explain import counterfactual
from pipeline.lifecycle import candidate_evaluation, shadow
from pipeline.monitoring import labels
from pipeline.workflow import load
from tests.conftest import WorkflowHarness


def lived(folder: Path, root: Path, day: date) -> dict[str, object]:
    workflow = load(folder)
    found: dict[str, object] = {"wrong": workflow_validation.problems(workflow)}
    bench = WorkflowHarness(workflow, root, [day], lambda _, to: to)
    lake, registry = bench.lake, Registry(f"sqlite:///{root}/added.db", (root / "added").as_uri())
    held = candidate_evaluation.held_out(workflow, lake, day, candidate_evaluation._known(workflow, lake, day))
    spec, how = scoring.learner_spec(workflow), {"seed": 1, "device": "cpu", "threads": 1}
    model, rule = (of("mean").fit(held.early, spec, **how) for of in (catalog.learner, catalog.rule))
    verdict, _ = evaluate.examine(
        model, rule, None, held.rows, metric="mae", better="lower", margin=0.02,
        terms=candidate_evaluation.terms(workflow), decided=held.decided,
    )  # fmt: skip
    found["gate"] = [verdict.passed, "; ".join(verdict.reasons)]
    registry.client.set_registered_model_alias(workflow.name, CHAMPION, str(bench.register(registry, day).number))
    batch = bench.decide(registry, day)
    found["step"], found["changed"] = batch.step, batch.changed
    features, scores, drawn, decisions = (
        lake.read(workflow.table(name), **({} if name == "arms" else {"days": [day]}))
        for name in ("features", "scores", "arms", "decisions")
    )
    found["shadow"] = shadow.disagreement(workflow, day, features, scores, scores, drawn).different
    row = next(one for one in decisions.to_pylist() if one["changed"])
    inputs = counterfactual.Inputs(row, workflow, day, features, scores, drawn, batch.step, model)
    found["limits"] = counterfactual.search(inputs, model.because(features.slice(0, 1))).limits_tried
    found["written"] = teller(workflow)(1_230_000)
    found["performance"] = labels.scored(workflow, lake, day).num_rows
    return found


if __name__ == "__main__":
    print(json.dumps(lived(Path(sys.argv[1]), Path(sys.argv[2]), date.fromisoformat(sys.argv[3]))))
