"""Which queued run begins first, and what never waits for what: Dagster's own queue under the configuration that is shipped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
import yaml
from dagster._core.remote_origin import RegisteredCodeLocationOrigin, RemoteJobOrigin, RemoteRepositoryOrigin
from dagster._daemon.run_coordinator.queued_run_coordinator_daemon import QueuedRunCoordinatorDaemon

from orchestration import assembly, jobs
from pipeline.workflow import FOLDER, Workflow, load

SHIPPED = Path(jobs.__file__).parent / "instance"
HERE = RemoteRepositoryOrigin(RegisteredCodeLocationOrigin("here"), "__repository__")


@pytest.fixture(scope="module")
def workflows() -> list[Workflow]:
    return [load(FOLDER / name) for name in ("ad_budget", "ticket_priority")]


class Queue:
    """Runs of the workflows' jobs as they stand in the queue, or go on, and which of them Dagster would begin now."""

    def __init__(self, instance: dg.DagsterInstance, workflows: list[Workflow]) -> None:
        self.instance = instance
        self.repository = assembly.build(workflows).get_repository_def()

    def put(self, job: str, status: str = "QUEUED") -> None:
        wanted = self.repository.get_job(job)
        workflow, _, kind = job.rpartition("_")
        take_back = {"ops": {f"{workflow}_take_back": {"config": {"reason": "it does harm", "batch": "b1"}}}}
        self.instance.create_run_for_job(
            wanted,
            run_config=take_back if kind == "rollback" else None,
            status=dg.DagsterRunStatus[status],
            tags=dict(wanted.run_tags),
            remote_job_origin=RemoteJobOrigin(HERE, job),
        )

    def next(self) -> list[str]:
        daemon = QueuedRunCoordinatorDaemon(interval_seconds=1)
        runs = daemon._get_runs_to_dequeue(self.instance, self.instance.get_concurrency_config(), None)
        return [run.job_name for run in runs]


@pytest.fixture
def queue(workflows: list[Workflow]) -> Iterator[Queue]:
    shipped = yaml.safe_load((SHIPPED / "dagster.yaml").read_text())
    with dg.instance_for_test(overrides={"concurrency": shipped["concurrency"]}) as instance:
        yield Queue(instance, workflows)


def test_a_rollback_begins_before_all_that_was_queued_earlier(queue: Queue) -> None:
    for job in ("retrain", "prepare", "daily", "decide", "deliver", "reconcile", "rollback"):
        queue.put(f"ad_budget_{job}")
    order = [job.removeprefix("ad_budget_") for job in queue.next()]
    assert order == ["rollback", "reconcile", "deliver", "decide", "daily", "prepare"], "two places a lane"


def test_within_a_lane_the_one_that_was_queued_first_begins_first(queue: Queue) -> None:
    for job in ("ad_budget_daily", "ticket_priority_daily", "ad_budget_daily"):
        queue.put(job)
    assert queue.next() == ["ad_budget_daily", "ticket_priority_daily"]


def test_a_rollback_does_not_wait_for_long_runs_nor_for_pushes(queue: Queue) -> None:
    for job in ("ad_budget_daily", "ticket_priority_retrain", "ad_budget_deliver", "ticket_priority_deliver"):
        queue.put(job, "STARTED")
    for job in ("ad_budget_daily", "ad_budget_decide", "ad_budget_rollback"):
        queue.put(job)
    assert queue.next() == ["ad_budget_rollback"], "the others' lanes are full"


def test_a_day_that_is_due_does_not_wait_for_long_runs(queue: Queue) -> None:
    for _ in range(2):
        queue.put("ad_budget_prepare", "STARTED")
    for job in ("ad_budget_daily", "ad_budget_decide"):
        queue.put(job)
    assert queue.next() == ["ad_budget_decide"]


def test_every_job_has_a_place_in_the_order(workflows: list[Workflow]) -> None:
    found = {job.name.removeprefix(f"{w.name}_") for w in workflows for job in jobs.jobs_of(w)}
    assert found == set(jobs.PRIORITIES)


def test_both_configurations_share_the_queue() -> None:
    first, second = (yaml.safe_load((SHIPPED / n).read_text()) for n in ("dagster.yaml", "dagster.postgres.yaml"))
    assert first["concurrency"] == second["concurrency"]
