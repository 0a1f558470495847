"""A workflow's morning through Dagster over a real downstream system: what the system tests of the delivery share.

Belongs here: the two sandboxes behind one face, and running a job at an hour of the story. Does not: what is expected.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg

from assets.resources import resources
from delivery.ledger import BatchRow, Ledger, utc_now
from delivery.sandbox import advertising_account, advertising_api, advertising_server
from delivery.sandbox.helpdesk import HelpdeskSandbox
from delivery.sandbox.worlds import advertising, tickets
from models.registry import Registry
from orchestration import runner
from pipeline import dispatch
from pipeline.workflow import Workflow
from tests.conftest import WorkflowHarness


class Account:
    """The advertising account in which the budgets of a bench's last export stand."""

    def __init__(self, folder: Path, bench: WorkflowHarness, token: str) -> None:
        start, days = bench.workflow.start, len(bench.days)
        world = advertising.World(7, "easy", 24, origin=start)
        self.now: datetime | None = bench.morning(bench.last, 5)
        """What its change history takes for now; None: the wall clock."""
        self.sandbox = advertising_api.AdvertisingSandbox(
            folder, world, next_day=bench.last + timedelta(days=1), token=token,
            budgets=advertising_account.budgets_of(advertising.history(world, start, days)), customer_id="1000000001",
            user_email="signalbox@example.org", clock=lambda: self.now or utc_now(),
        )  # fmt: skip
        self._port = 0
        self.up()
        self.environment = {
            "SIGNALBOX_ADS_TOKEN": token,
            "SIGNALBOX_ADS_ENDPOINT": f"http://127.0.0.1:{self._port}",
        }

    def values(self) -> dict[str, int]:
        return self.sandbox.amounts()

    def applied(self) -> int:
        """Writes of an amount over the API so far."""
        return int(self.sandbox.state()["applications"])

    def person(self, entity: str, value: int) -> None:
        self.sandbox.by_hand(entity, value)

    def refuse(self, entities: Collection[str]) -> None:
        for entity in entities:
            self.sandbox.refuse(advertising_api.Refusal(entity))

    def slow(self, seconds: float) -> None:
        """The next write takes so long."""
        self.sandbox.trouble(advertising_api.Trouble(on="mutate", delay_s=seconds))

    def down(self) -> None:
        self.server.close()

    def up(self) -> None:
        self.server = advertising_server.serve(self.sandbox, self._port)
        self._port = self.server.port

    def close(self) -> None:
        self.server.close()
        self.sandbox.close()


class Queue:
    """The help desk in which the tickets of a bench's last day stand."""

    def __init__(self, folder: Path, bench: WorkflowHarness, token: str, templates: Path) -> None:
        world = tickets.World(7, load=0.9, teams=4)
        for day in bench.days:
            world.advance(day)
        self.desk = HelpdeskSandbox(
            folder, world, next_day=bench.last + timedelta(days=1), token=token, templates=templates
        ).start()
        self.environment = {"SIGNALBOX_HELPDESK_TOKEN": token, "SIGNALBOX_HELPDESK_URL": self.desk.api_url}
        self._first = self.values()

    def values(self) -> dict[str, int]:
        return {name: ticket["priority"] for name, ticket in self.desk.tickets().items()}

    def applied(self) -> int:
        """Writes of a priority over the API so far."""
        return len(self.desk.applications())

    def person(self, entity: str, value: int) -> None:
        self.desk.person(entity, priority=value)

    def slow(self, seconds: float) -> None:
        """The next write takes so long."""
        self.desk.fault("delay_before", method="PATCH", seconds=seconds)

    def down(self) -> None:
        self.desk.stop()

    def up(self) -> None:
        self.desk.start()

    def as_it_was(self) -> None:
        """Every priority as at the start, no faults: for the next test."""
        if self.desk.process is None:
            self.desk.start()
        self.desk.reset()
        for name, value in self.values().items():
            if self._first[name] != value:
                self.desk.person(name, priority=self._first[name], how="api")

    def close(self) -> None:
        self.desk.stop()


@dataclass
class MorningHarness:
    """A state folder, a landed and built day of a workflow, and the system that its decisions go to."""

    bench: WorkflowHarness
    registry: Registry
    system: Any
    instance: dg.DagsterInstance

    @property
    def day(self) -> date:
        return self.bench.last

    @property
    def workflow(self) -> Workflow:
        return self.bench.workflow

    def saying(self, **changed: Any) -> Workflow:
        """The workflow with some fields of its guardrails, or of its delivery, otherwise."""
        said = self.workflow
        assert said.delivery is not None
        for section, fields in changed.items():
            if section == "guardrails":
                said = said.model_copy(update={section: said.guardrails.model_copy(update=fields)})
            else:
                assert said.delivery is not None
                part = getattr(said.delivery, section).model_copy(update=fields)
                said = said.model_copy(update={"delivery": said.delivery.model_copy(update={section: part})})
        return said

    def run(
        self, job: str, workflow: Workflow | None = None, *, first: date | None = None, day: date | None = None,
        hour: int = 5,
    ) -> dg.ExecuteInProcessResult:  # fmt: skip
        """A run of a job for ``day`` (or from ``first`` on), at an hour of the morning after it."""
        last = day or self.day
        now = self.bench.morning(max(last, self.day), hour).isoformat()
        return runner.run(
            workflow or self.workflow, job, first or last, last, now=now, instance=self.instance, given=resources(now)
        )

    @contextmanager
    def ledger(self, hour: int = 5) -> Iterator[Ledger]:
        book: Ledger = resources()["ledger"].open(lambda: self.bench.morning(self.day, hour))
        try:
            yield book
        finally:
            book.close()

    def batch(self, day: date | None = None) -> BatchRow:
        with self.ledger() as book:
            return dispatch.batch_of(book, self.workflow.name, day or self.day)

    def decided(self, column: str, day: date | None = None) -> dict[str, Any]:
        return {d["entity_id"]: d[column] for d in self.bench.decided(day or self.day)}

    def stands(self) -> dict[str, int]:
        """What stands downstream for the entities that were decided on."""
        values = self.system.values()
        return {entity: values[entity] for entity in self.decided("before")}


def environment(bench: WorkflowHarness, registry: Registry, home: Path, system: Any) -> dict[str, str]:
    """The variables under which every command and every run works on this folder."""
    return {
        "SIGNALBOX_HOME": str(home),
        "SIGNALBOX_LAKE": str(bench.root / "lake"),
        "SIGNALBOX_LANDING": str(bench.root / "landing"),
        "SIGNALBOX_MLFLOW_URI": registry.uri,
        "SIGNALBOX_MLFLOW_ARTIFACTS": registry.artifacts,
        **system.environment,
    }


def metadata(result: dg.ExecuteInProcessResult, stage: str) -> dict[str, Any]:
    """The metadata of the one materialisation of a stage in a run, as plain values."""
    (event,) = [e for e in result.get_asset_materialization_events() if e.asset_key.path[-1] == stage]  # type: ignore[union-attr]
    return {name: value.value for name, value in event.materialization.metadata.items()}


def checks(result: dg.ExecuteInProcessResult) -> dict[str, tuple[str, str]]:
    """By the check's name: passed, WARN or ERROR, and what it says."""
    return {row["check"]: (row["result"], row["says"]) for row in runner.check_rows(result)}
