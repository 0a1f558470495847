"""Run a job in this process, against the instance whose history the Dagster UI shows.

Belongs here: the bridge between a command and a Dagster run. Does not: printing (``orchestration.cli.command``).
"""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import dagster as dg

from assets.resources import resources
from models.registry import Registry
from orchestration.assembly import build
from orchestration.jobs import DECIDE
from pipeline.settings import home
from pipeline.workflow import Workflow

_CONFIGURATIONS = Path(__file__).parent / "instance"


_QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
"""The events are in the UI."""


def _asked(workflow: Workflow) -> dict[str, Any]:
    """The configuration by which the assets that decide a day decide it anew."""
    return {"ops": {f"{workflow.name}__{stage}": {"config": {"again": True}} for stage in DECIDE}}


def prepare_home() -> Path:
    """Make the state folder with Dagster's instance configuration; returns it.

    ``SIGNALBOX_DAGSTER_CONFIG=postgres`` takes the PostgreSQL configuration. A configuration that stands is left alone.
    """
    at = home()
    dagster_home = Path(os.environ.setdefault("DAGSTER_HOME", str(at / "dagster")))
    for folder in (dagster_home, at / "landing", at / "lake", at / "reports"):
        folder.mkdir(parents=True, exist_ok=True)
    target = dagster_home / "dagster.yaml"
    if not target.exists():
        wanted = "dagster.postgres.yaml" if os.environ.get("SIGNALBOX_DAGSTER_CONFIG") == "postgres" else "dagster.yaml"
        shutil.copyfile(_CONFIGURATIONS / wanted, target)
    return at


def registry() -> Registry:
    """The registry as the environment names it."""
    found: Registry = resources()["registry"].registry
    return found


def run(
    workflow: Workflow,
    job: str,
    first: date,
    last: date,
    *,
    now: str | None = None,
    instance: dg.DagsterInstance | None = None,
    tags: dict[str, str] | None = None,
    given: dict[str, Any] | None = None,
    again: bool = False,
) -> dg.ExecuteInProcessResult:
    """Execute ``<workflow>_<job>`` for the days ``first``…``last`` in one run of this process.

    ``again``: days that were sent and whose effect lasts are decided anew (jobs that decide). The run, its
    materialisations and checks land in the instance at DAGSTER_HOME (or ``instance``). A failed step makes
    ``result.success`` false; it does not raise.
    """
    # The heavy libraries make thousands of classes while they load; looking for garbage among them costs a sixth of a day's run.
    gc.set_threshold(200_000, 50, 50)
    if instance is None:
        prepare_home()
    definitions = build([workflow], now)
    repository = definitions.get_repository_def()
    wanted = repository.get_job(f"{workflow.name}_{job}")
    marks = dict(tags or {})
    if first == last:
        selection: dict[str, Any] = {"partition_key": first.isoformat()}
    else:
        selection = {}
        marks |= {
            "dagster/asset_partition_range_start": first.isoformat(),
            "dagster/asset_partition_range_end": last.isoformat(),
        }
    with _instance(instance) as at:
        return wanted.execute_in_process(
            instance=at,
            resources=given or resources(now),
            run_config={**_QUIET, **(_asked(workflow) if again else {})},
            tags=marks,
            raise_on_error=False,
            **selection,
        )


def run_op(
    workflow: Workflow,
    job: str,
    request: dg.RunRequest,
    *,
    now: str | None = None,
    instance: dg.DagsterInstance | None = None,
) -> dg.ExecuteInProcessResult:
    """Execute ``<workflow>_<job>``, a job without partitions, with the configuration of a request, in this process."""
    wanted = build([workflow], now).get_repository_def().get_job(f"{workflow.name}_{job}")
    with _instance(instance) as at:
        return wanted.execute_in_process(
            instance=at,
            resources=resources(now),
            run_config={**request.run_config, **_QUIET},
            tags=dict(request.tags),
            raise_on_error=False,
        )


class _instance:
    """The given instance as it is, or the one at DAGSTER_HOME closed after use."""

    def __init__(self, given: dg.DagsterInstance | None) -> None:
        self._given = given
        self._opened: dg.DagsterInstance | None = None

    def __enter__(self) -> dg.DagsterInstance:
        if self._given is not None:
            return self._given
        self._opened = dg.DagsterInstance.get()
        return self._opened

    def __exit__(self, *_: object) -> None:
        if self._opened is not None:
            self._opened.dispose()


def check_rows(result: dg.ExecuteInProcessResult) -> list[dict[str, Any]]:
    """The asset checks of a run: asset, check, result and what it says."""
    return [
        {
            "asset": e.asset_key.to_user_string(),
            "check": e.check_name,
            "result": "passed" if e.passed else e.severity.value,
            "says": (e.description or "").split("\n")[0],
        }
        for e in result.get_asset_check_evaluations()
    ]


def failed_steps(result: dg.ExecuteInProcessResult) -> Sequence[str]:
    """The steps of a run that failed, with their errors' first lines."""
    found = []
    for event in result.filter_events(lambda e: e.is_step_failure):
        error = event.step_failure_data.error
        cause = error.cause if error and error.cause else error
        found.append(f"{event.step_key}: {cause.message.strip() if cause else 'failed'}")
    return found
