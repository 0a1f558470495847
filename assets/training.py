"""The stages ``training_set`` and ``model``: matured outcomes → a registered version, which takes its first place when it passes its gate.

Belongs here: the two assets. Does not: learning (``models.learners``), judging (``models.evaluation.gate``), MLflow (``models.registry``).
"""

from dataclasses import replace
from datetime import timedelta

import dagster as dg
import pyarrow as pa
import pyarrow.compute as pc

from assets.common import days, stage
from assets.resources import ClockResource, LakeResource, LedgerResource, RegistryResource, preview
from models import catalog
from models.evaluation import gate
from models.registry import Dataset
from models.training import fit
from pipeline import point_in_time, provenance
from pipeline.lake import content_digest
from pipeline.lifecycle import candidate_evaluation, promotion, registration, tuning
from pipeline.workflow import Workflow

GPU_POOL = "gpu"


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


def build_model(workflow: Workflow) -> dg.AssetsDefinition:
    """The asset [workflow, model]; it takes a slot of the pool ``gpu``."""
    training = workflow.training

    @stage(
        workflow,
        "model",
        deps=["training_set"],
        description="A LightGBM model registered in MLflow with its card; it takes its first place when it passes its gate.",
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
        dataset = Dataset(
            name=table, digest=content_digest(rows), path=lake.lake.uri(table), version=version, schema=rows.schema,
            tags={"as_of": day.isoformat(), "rows": str(rows.num_rows)},
        )  # fmt: skip
        held = candidate_evaluation.held_out(workflow, lake.lake, day, rows)
        with ledger.open(clock.now) as book:
            against = candidate_evaluation.champion_of(workflow, registry.registry, book, day)
        champion, note = candidate_evaluation.opponent(workflow, lake.lake, registry.registry, against, held.split)
        tuned = tuning.tune(workflow, lake.lake, held.split, device=device, say=context.log.info)
        learn = point_in_time.chosen(workflow, rows, "training.train_on")
        fitted = tuning.resumable(workflow)(fit.fit_and_judge)(
            learn,
            held.early,
            held.rows,
            learner=catalog.learner(workflow.model.kind),
            champion=champion,
            newest=held.newest,
            spec=tuned.spec,
            day=day,
            decided=held.decided,
            **candidate_evaluation.asked(workflow, device),
        )
        note += fitted.note
        verdict = fitted.verdict.told(**candidate_evaluation.live(workflow, lake.lake, against, day))
        fitted = replace(fitted, verdict=verdict)
        facts = {
            "matured rows": fitted.rows,
            "held-out rows": held.rows.num_rows,
            "held-out days": f"{held.split + timedelta(days=1)} to {held.mature}",
            "training set": f"{table} version {version}",
            "workflow digest": workflow.digest,
            "code commit": provenance.commit(),
            "code digest": provenance.digest(workflow.name),
            "device": device,
            "champion": note.strip() or "none yet",
            "Dagster run": context.run_id,
            **({"search": tuned.note} if tuned.note else {}),
        }
        text = gate.card(
            name=workflow.name,
            description=workflow.description,
            trained_day=day,
            verdict=verdict,
            metrics=fitted.metrics,
            facts=facts,
        )
        text += f"\n## Search\n\n{tuned.card}\n" if tuned.card else ""
        made = registration.register(
            workflow,
            registry.registry,
            fitted,
            learn,
            held,
            spec=tuned.spec,
            day=day,
            device=device,
            passed=verdict.passed,
            facts=facts,
            card=text,
            dataset=dataset,
        )
        evidence = {
            "verdict": list(verdict.reasons), "figures": verdict.figures, "compared": note.strip(), "run": context.run_id,
            "day": str(day),
        }  # fmt: skip
        with ledger.open(clock.now) as book:
            place = promotion.admit(
                workflow,
                registry.registry,
                book,
                made,
                evidence=evidence,
                actor=f"run {context.run_id}",
                held=verdict.held,
            )
            student = tuning.student(
                workflow, registry.registry, book, lake.lake, held, learn, made, day=day, device=device, run=context.run_id,
                dataset=dataset,
            )  # fmt: skip
        return dg.MaterializeResult(
            metadata={
                "version": made.number,
                "registry": dg.MetadataValue.url(registry.version_url(workflow.name, made.number)),
                "place": place,
                **({"student": student} if student else {}),
                "model card": dg.MetadataValue.md(text),
                **{f"{who} {training.metric}": one[training.metric] for who, one in fitted.metrics.items()},
            },
            check_results=[
                dg.AssetCheckResult(
                    check_name="gate",
                    passed=verdict.passed,
                    severity=dg.AssetCheckSeverity.WARN,
                    description="; ".join(verdict.reasons) + note,
                )
            ],
        )

    return model
