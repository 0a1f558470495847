"""Stages 4 and 5, ``training_set`` and ``model``: matured outcomes → a registered version, promoted when it passes its gate.

Belongs here: the two assets. Does not: learning (``models.learners``), judging (``models.gate``), MLflow (``models.registry``).
"""

import json
from datetime import date, timedelta
from typing import Any

import dagster as dg
import pyarrow as pa
import pyarrow.compute as pc

from assets import code, deciding, point_in_time, promoting
from assets.lake import content_digest
from assets.resources import ClockResource, LakeResource, LedgerResource, RegistryResource, preview
from assets.stages.common import days, stage
from assets.workflow import Workflow
from models import catalog, fitting, gate
from models.registry import CHAMPION, ModelUnreadable, Registry

GPU_POOL = "gpu"
THREADS = 2
"""Fixed: sums over another number of threads differ in their last bits, and a run repeated must give the same bytes."""
_MLFLOW_TYPE = {"numeric": "double", "categorical": "string"}


def build_training_set(workflow: Workflow) -> dg.AssetsDefinition:
    """The asset [workflow, training_set]."""

    @stage(
        workflow,
        "training_set",
        deps=["features", "outcomes"],
        description="Feature rows whose outcomes were known by the cut-off of the (last) day asked for.",
        kinds={"deltalake", "duckdb"},
    )
    def training_set(context: dg.AssetExecutionContext, lake: LakeResource) -> dg.MaterializeResult:
        day = days(context)[-1]
        versions = {f"{t}_version": lake.lake.version(workflow.table(t)) for t in ("features", "outcomes")}
        rows = point_in_time.training_set(workflow, lake.lake, day, **versions)
        stamped = rows.append_column("as_of", pa.array([day] * rows.num_rows, pa.date32()))
        written = lake.lake.replace(
            workflow.table("training_set"), stamped, predicate=f"as_of = '{day}'", partition_by=["as_of"]
        )
        return dg.MaterializeResult(
            metadata={
                "matured rows": rows.num_rows,
                "first rows": preview(rows.slice(0, 5)),
                "digest": content_digest(rows),
                "table version": written,
                **versions,
            }
        )

    return training_set


def _champion(
    workflow: Workflow, registry: Registry, split: date
) -> tuple[catalog.Scorer | None, dict[str, Any] | None, str]:
    """Whom the candidate is compared with: the champion as it is, or its recipe where it has learned from the held-out
    days; and a sentence about it."""
    held = registry.by_alias(workflow.name, CHAMPION)
    if held is None:
        return None, None, ""
    try:
        if held.trained_day <= split:
            return (
                deciding.read_model(workflow, registry, held),
                None,
                f" Compared with version {held.number} as it is.",
            )
        recipe = registry.recipe(held)
    except ModelUnreadable as error:
        return None, None, f" Version {held.number} could not be compared: {error}."
    stands_in = "its recipe, fitted before them, stands in for it"
    return None, recipe, f" Version {held.number} has learned from the held-out days: {stands_in}."


def build_model(workflow: Workflow) -> dg.AssetsDefinition:
    """The asset [workflow, model]; it takes a slot of the pool ``gpu``."""
    training = workflow.training

    @stage(
        workflow,
        "model",
        deps=["training_set"],
        description="A LightGBM model registered in MLflow with its card; it becomes champion when it passes its gate.",
        kinds={"lightgbm", "mlflow"},
        checks={"gate": (False, "Beats the rule, and is not worse than the champion by more than the margin")},
        pool=GPU_POOL,
    )
    def model(
        context: dg.AssetExecutionContext,
        lake: LakeResource,
        registry: RegistryResource,
        ledger: LedgerResource,
        clock: ClockResource,
    ) -> dg.MaterializeResult:
        from models.booster import resolve_device

        day = days(context)[-1]
        table = workflow.table("training_set")
        version = lake.lake.version(table)
        rows = lake.lake.read(table, version=version, where=pc.field("as_of") == pa.scalar(day))
        rows = point_in_time.ordered(rows, "day")
        device = resolve_device(training.device)
        split = day - timedelta(days=training.holdout_days + training.maturity_days)
        mature = day - timedelta(days=training.maturity_days)
        judged = rows.filter((pc.field("day") > pc.scalar(split)) & (pc.field("day") <= pc.scalar(mature)))
        held_out = point_in_time.rows_where(judged, training.evaluate_on)
        early = point_in_time.training_set(workflow, lake.lake, split)
        learner = catalog.learner(workflow.model.kind)
        known = point_in_time.rows_where(early, training.train_on)
        champion, twin, note = _champion(workflow, registry.registry, split)
        fitted = fitting.fit_and_judge(
            point_in_time.rows_where(rows, training.train_on),
            known,
            held_out,
            learner=learner,
            rule=catalog.rule(workflow.model.kind),
            champion=champion,
            twin=twin,
            spec=deciding.learner_spec(workflow),
            day=day,
            min_rows=training.min_rows,
            metric=training.metric,
            better=training.better,
            margin=training.margin,
            seed=deciding.SEED,
            device=device,
            threads=THREADS,
        )
        facts = {
            "matured rows": fitted.rows,
            "held-out rows": held_out.num_rows,
            "held-out days": f"{split + timedelta(days=1)} to {mature}",
            "training set": f"{table} version {version}",
            "workflow digest": workflow.digest,
            "code commit": code.commit(),
            "code digest": code.digest(),
            "device": device,
            "champion": note.strip() or "none yet",
            "Dagster run": context.run_id,
        }
        text = gate.card(
            name=workflow.name,
            description=workflow.description,
            trained_day=day,
            verdict=fitted.verdict,
            metrics=fitted.metrics,
            facts=facts,
        )
        made = registry.registry.register(
            workflow.name,
            fitted.model.files(),
            trained_day=day,
            passed=fitted.verdict.passed,
            params={
                "recipe": json.dumps(deciding.learner_spec(workflow)),
                "device": device,
                "day": day.isoformat(),
                "threads": THREADS,
            },
            metrics={f"{who}_{name}": value for who, one in fitted.metrics.items() for name, value in one.items()},
            tags={f"signalbox.{k.replace(' ', '_')}": str(v) for k, v in facts.items()},
            plots=fitted.model.plots(held_out if held_out.num_rows else rows),
            card=text,
            inputs={c: kind for group, kind in _MLFLOW_TYPE.items() for c in getattr(workflow.features, group)},
            seed=deciding.SEED,
        )
        evidence = {"verdict": list(fitted.verdict.reasons), "run": context.run_id}
        with ledger.open(clock.now) as book:
            place = promoting.admit(
                workflow, registry.registry, book, made, evidence=evidence, actor=f"run {context.run_id}"
            )
        return dg.MaterializeResult(
            metadata={
                "version": made.number,
                "registry": dg.MetadataValue.url(registry.version_url(workflow.name, made.number)),
                "place": place,
                "model card": dg.MetadataValue.md(text),
                **{f"{who} {training.metric}": one[training.metric] for who, one in fitted.metrics.items()},
            },
            check_results=[
                dg.AssetCheckResult(
                    check_name="gate",
                    passed=fitted.verdict.passed,
                    severity=dg.AssetCheckSeverity.WARN,
                    description="; ".join(fitted.verdict.reasons) + note,
                )
            ],
        )

    return model
