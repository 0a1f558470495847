"""The jobs of a workflow: which assets run together, and in which process.

Belongs here: selections and executors. Does not: when a job starts (``orchestration.automation``).
"""

import time
from collections.abc import Sequence
from datetime import date

import dagster as dg

from assets import (
    decisions,
    delivery,
    drift,
    features,
    health,
    ingest,
    outcomes,
    performance,
    regression,
    scoring,
    training,
)
from assets.common import key, partitions
from assets.resources import ClockResource, LakeResource, LedgerResource, RegistryResource
from orchestration import alias_log
from pipeline import dispatch
from pipeline.lifecycle import promotion, state
from pipeline.monitoring import verdicts
from pipeline.workflow import Workflow

PREPARE = ("events", "features", "outcomes")
DAILY = (*PREPARE, "scores", "decisions", "drift", "performance")
DECIDE = ("scores", "decisions")
RETRAIN = ("training_set", "model")
DELIVER = ("delivery",)
REVIEW = ("decision_outcomes", "health")
GUARD = ("regression",)


PRIORITIES = {
    "rollback": 100,
    "reconcile": 90,
    "deliver": 50,
    "decide": 20,
    "daily": 10,
    "prepare": -10,
    "retrain": -20,
}
"""Which queued run begins first: what takes back or answers a person, what is sent, what is due, and the rest."""
LANES = {"rollback": "answers", "reconcile": "answers", "deliver": "due", "decide": "due"}
"""Lanes of the queue, each with places of its own (``dagster.yaml``), so that long runs never hold up an answer."""


def _tags(workflow: Workflow, name: str) -> dict[str, str]:
    return {
        "workflow": workflow.name, "dagster/priority": str(PRIORITIES[name]), "signalbox/lane": LANES.get(name, "long"),
    }  # fmt: skip


def assets_of(workflow: Workflow) -> list[dg.AssetsDefinition]:
    """Every asset of a workflow, in the order in which the data flows."""
    sends = (delivery.build, delivery.build_outcomes, health.build) if workflow.delivery is not None else ()
    sent = [build(workflow) for build in sends]
    if verdicts.guarded(workflow):
        sent.append(regression.build(workflow))
    return [
        ingest.build(workflow),
        features.build(workflow),
        outcomes.build(workflow),
        training.build_training_set(workflow),
        training.build_model(workflow),
        scoring.build(workflow),
        decisions.build(workflow),
        *sent,
        drift.build(workflow),
        performance.build(workflow),
    ]


def _job(workflow: Workflow, name: str, stages: Sequence[str], description: str) -> "dg.UnresolvedAssetJobDefinition":
    return dg.define_asset_job(
        f"{workflow.name}_{name}",
        selection=dg.AssetSelection.assets(*(key(workflow, s) for s in stages)),
        partitions_def=partitions(workflow),
        # One process: every step of Dagster's multiprocess executor would pay the heavy imports again.
        executor_def=dg.in_process_executor,
        description=description,
        tags=_tags(workflow, name),
    )


def jobs_of(workflow: Workflow) -> "list[dg.UnresolvedAssetJobDefinition | dg.JobDefinition]":
    """The jobs of a workflow; one that sends nothing has neither ``deliver`` nor ``rollback``."""
    sends = workflow.delivery is not None
    daily = (*DAILY, *REVIEW) if sends else DAILY
    if verdicts.guarded(workflow):
        daily = (*daily, *GUARD)
    found: list[dg.UnresolvedAssetJobDefinition | dg.JobDefinition] = [
        _job(
            workflow,
            "daily",
            daily,
            "One day (or a range of days) from landed files to decisions, and what is seen of them",
        ),
        _job(workflow, "prepare", PREPARE, "Events, features and outcomes alone: history before the first model"),
        _job(
            workflow,
            "retrain",
            RETRAIN,
            "A candidate from the matured outcomes; past its gate it goes into shadow or canary, or is champion",
        ),
        _job(workflow, "decide", DECIDE, "Scores and decisions of a day whose deadline has come, with what is there"),
    ]
    if sends:
        found.append(
            _job(workflow, "deliver", DELIVER, "The day's batch sent downstream and read back; run again to go on")
        )
        found.append(_rollback_job(workflow))
    found.append(_reconcile_job(workflow))
    return found


class RollbackConfig(dg.Config):
    """What to take back. One of batch, since and model; the name is as given, Dagster's runs are not authenticated."""

    reason: str
    batch: str | None = None
    since: str | None = None
    model: int | None = None
    actor: str = "unknown"
    trigger: str = "person"


def _of_one(workflow: Workflow, name: str, op: dg.OpDefinition, description: str) -> dg.JobDefinition:
    @dg.job(
        name=f"{workflow.name}_{name}",
        executor_def=dg.in_process_executor,
        description=description,
        tags=_tags(workflow, name),
    )
    def job() -> None:
        op()

    return job


def _reconcile_job(workflow: Workflow) -> dg.JobDefinition:
    @dg.op(
        name=f"{workflow.name}_answer",
        description="Judge what people moved in MLflow, record it or put it back; afterwards the aliases follow the ledger.",
    )
    def answer(
        context: dg.OpExecutionContext,
        lake: LakeResource,
        ledger: LedgerResource,
        registry: RegistryResource,
        clock: ClockResource,
    ) -> None:
        with ledger.open(clock.now) as book:
            answers = promotion.reconcile(
                workflow, registry.registry, book, lake.lake, clock.now(), actor_of=alias_log.actor
            )
            stands = state.live(book, workflow)
        told = [
            f"{a.alias}: {a.was} → {a.to} by {a.actor}: {a.answer}: {a.reason}" for a in answers
        ]  # fmt: skip
        for line in told or ["nothing was asked; the aliases follow the ledger"]:
            context.log.info(line)
        places = {alias: number or 0 for alias, number in state.aliases(stands).items()}
        context.add_output_metadata({"answers": dg.MetadataValue.json(told), **places})

    return _of_one(
        workflow, "reconcile", answer, "Aliases moved or deleted in MLflow are judged, recorded or put back; rerunnable"
    )


def _rollback_job(workflow: Workflow) -> dg.JobDefinition:
    @dg.op(
        name=f"{workflow.name}_take_back",
        description="Push the prior values, newest batch first; see the command `signalbox rollback`.",
    )
    def take_back(
        context: dg.OpExecutionContext,
        config: RollbackConfig,
        ledger: LedgerResource,
        registry: RegistryResource,
        clock: ClockResource,
    ) -> None:
        book = ledger.open(clock.now)
        try:
            which = dispatch.selection(
                book, batch=config.batch, workflow=workflow.name if config.batch is None else None,
                since=date.fromisoformat(config.since) if config.since else None, model=config.model,
            )  # fmt: skip
            report = dispatch.roll_back(
                book, registry.registry, which, actor=f"dagster:{config.actor}", reason=config.reason,
                trigger="guard" if config.trigger == "guard" else "person", run_id=context.run_id, clock=clock.now, sleep=time.sleep,
            )  # fmt: skip
        finally:
            book.close()
        context.add_output_metadata({"report": dg.MetadataValue.json(report.as_dict())})
        for line in dispatch.lines(report):
            context.log.info(line)
        if not report.complete:
            raise dg.Failure("the rollback is not at its end; run it again with the same configuration")

    return _of_one(
        workflow, "rollback", take_back,
        "Take batches back: the prior values under the rules of any push; rerunnable until complete",
    )  # fmt: skip
