"""The jobs of a workflow: which assets run together, and in which process.

Belongs here: selections and executors. Does not: when a job starts (``orchestration.automation``).
"""

from __future__ import annotations

from collections.abc import Sequence

import dagster as dg

from assets.stages import decisions, drift, features, ingest, outcomes, scoring, training
from assets.stages.common import key, partitions
from assets.workflow import Workflow

PREPARE = ("events", "features", "outcomes")
DAILY = (*PREPARE, "scores", "decisions", "drift")
DECIDE = ("scores", "decisions")
RETRAIN = ("training_set", "model")


def assets_of(workflow: Workflow) -> list[dg.AssetsDefinition]:
    """Every asset of a workflow, in the order in which the data flows."""
    return [
        ingest.build(workflow),
        features.build(workflow),
        outcomes.build(workflow),
        training.build_training_set(workflow),
        training.build_model(workflow),
        scoring.build(workflow),
        decisions.build(workflow),
        drift.build(workflow),
    ]


def _job(workflow: Workflow, name: str, stages: Sequence[str], description: str) -> dg.UnresolvedAssetJobDefinition:
    return dg.define_asset_job(
        f"{workflow.name}_{name}",
        selection=dg.AssetSelection.assets(*(key(workflow, s) for s in stages)),
        partitions_def=partitions(workflow),
        # One process: every step of Dagster's multiprocess executor would pay the heavy imports again.
        executor_def=dg.in_process_executor,
        description=description,
        tags={"workflow": workflow.name},
    )


def jobs_of(workflow: Workflow) -> list[dg.UnresolvedAssetJobDefinition]:
    """The jobs of a workflow."""
    return [
        _job(workflow, "daily", DAILY, "One day (or a range of days) from landed files to decisions and drift"),
        _job(workflow, "prepare", PREPARE, "Events, features and outcomes alone: history before the first model"),
        _job(workflow, "retrain", RETRAIN, "A candidate from the matured outcomes; champion when it passes its gate"),
        _job(workflow, "decide", DECIDE, "Scores and decisions of a day whose deadline has come, with what is there"),
    ]
