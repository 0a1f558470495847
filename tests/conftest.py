"""Small prepared worlds and registries that tests copy: made once a session, since both take seconds to make."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, time, timedelta
from pathlib import Path
from time import monotonic
from typing import Any

import pyarrow as pa
import pytest

from delivery.sandbox.worlds import advertising, tickets
from models import catalog
from models.registry import Registry, Version
from pipeline import ingest, point_in_time
from pipeline.decisions import decide as deciding
from pipeline.decisions import scoring
from pipeline.lake import Lake
from pipeline.workflow import FOLDER, Workflow, load
from tests.support import postgres as postgres_server
from tests.support import properties
from tests.support.aliases import promote
from tests.support.moving import readdressed

HERE = Path(__file__).parent
HEAVY = frozenset(
    {"ads", "queue", "bench", "registry", "empty_registry", "empty_registry_folder", "_two_versions", "postgres"}
)
"""A test that uses one of these fixtures is slow: each takes seconds to make, once for every worker. They go by name: a file's own
fixture of such a name makes its tests slow, too."""
SLOW = (
    "pipeline/decisions/test_in_effect.py",
    "pipeline/decisions/test_days_properties.py",
    "pipeline/decisions/test_decide.py",
    "pipeline/test_dispatch.py",
    "pipeline/test_desk_story.py",
    "assets/test_drift.py",
    "pipeline/explain/test_trace.py",
    "pipeline/decisions/test_recomputation.py",
    "pipeline/lifecycle/test_rule_override.py",
    "pipeline/lifecycle/test_candidate_evaluation.py",
    "pipeline/monitoring/test_verdicts.py",
    "pipeline/monitoring/test_queue_replay.py",
    "pipeline/monitoring/test_loop_health.py",
    "assets/test_ingest.py",
    "pipeline/test_lake.py",
    "pipeline/ingest/test_landing.py",
    "pipeline/ingest/test_landing_moves.py",
    "pipeline/monitoring/test_labels.py",
    "pipeline/lifecycle/test_promotion.py",
    "pipeline/ingest/test_readers.py",
    "pipeline/lifecycle/test_registration.py",
    "pipeline/ingest/test_remap.py",
    "pipeline/test_shipped_sql.py",
    "pipeline/lifecycle/test_tuning.py",
    "pipeline/test_workflow_validation.py",
    "data_checks/drift/test_drift.py",
    "data_checks/drift/test_drift_calibration.py",
    "data_checks/regression/test_regression_simulations.py",
    "delivery/push/test_between_batches.py",
    "delivery/connectors/test_helpdesk.py",
    "delivery/ledger/test_ledger.py",
    "delivery/ledger/test_ledger_properties.py",
    "delivery/ledger/test_ledger_tampering.py",
    "delivery/connectors/test_liars.py",
    "delivery/connectors/test_peers.py",
    "delivery/push/test_push.py",
    "delivery/push/test_push_properties.py",
    "delivery/connectors/test_rest_examples.py",
    "delivery/rollback/test_rollback.py",
    "delivery/rollback/test_rollback_properties.py",
    "delivery/sandbox/test_sandbox_advertising.py",
    "delivery/sandbox/test_sandbox_helpdesk.py",
    "delivery/connectors/test_sql_table.py",
    "delivery/sandbox/test_systems.py",
    "delivery/sandbox/test_world_advertising.py",
    "delivery/sandbox/test_world_tickets.py",
    "models/evaluation/test_conformal.py",
    "models/learners/test_contributions.py",
    "models/evaluation/test_evaluate.py",
    "models/test_gpu.py",
    "models/learners/test_missing_values.py",
    "models/test_registry.py",
    "models/training/test_distillation.py",
    "orchestration/test_assembly.py",
    "orchestration/test_automation.py",
    "orchestration/test_delivery_automation.py",
    "orchestration/test_guarding.py",
    "orchestration/web/",
    "orchestration/cli/test_operations.py",
    "common/test_progress.py",
    "orchestration/test_promoting_automation.py",
    "orchestration/test_queue.py",
    "orchestration/cli/test_status.py",
    "system/",
)
"""Folders and files that as a whole take too long for ``make check``: they run Dagster, servers, kills, months or simulations.

A single slow test in a quick file is marked ``@pytest.mark.slow`` where it stands.
"""

properties.load_profile()  # before any test module is imported: what ``@settings`` does not say, it takes from here
_BEGAN = monotonic()


def _is_slow(path: Path) -> bool:
    return path.is_relative_to(HERE) and path.relative_to(HERE).as_posix().startswith(SLOW)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Where only quick tests are asked for, a slow file is not even imported: that alone takes seconds."""
    quick = config.getoption("markexpr") == "not slow"
    return True if quick and collection_path.suffix == ".py" and _is_slow(collection_path) else None


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is slow. The real data take minutes in one file: begun first, they do not keep everybody waiting at the end."""
    for item in items:
        if _is_slow(item.path) or HEAVY & set(getattr(item, "fixturenames", ())):
            item.add_marker("slow")
    items.sort(key=lambda item: "test_real_data" not in item.nodeid)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if properties.SOAK and monotonic() - _BEGAN > properties.MINUTES * 60:
        pytest.skip(f"the soak's {properties.MINUTES:g} minutes are over (SIGNALBOX_SOAK_MINUTES)")


@dataclass(frozen=True)
class WorkflowHarness:
    """A workflow, its landing zone and lake below ``root``; ``days`` are landed and built, ``write`` exports a day."""

    workflow: Workflow
    root: Path
    days: Sequence[date]
    write: Callable[[date, Path], Path]

    @property
    def lake(self) -> Lake:
        return Lake(str(self.root / "lake"))

    @property
    def last(self) -> date:
        return self.days[-1]

    def morning(self, day: date, hour: int = 4) -> datetime:
        """When ``day`` is usually decided: after its cut-off, before its deadline."""
        return datetime.combine(day + timedelta(days=1), time()) + timedelta(hours=hour)

    def copy(self, to: Path) -> WorkflowHarness:
        return replace(self, root=Path(shutil.copytree(self.root, to)))

    def folder(self) -> Path:
        return (self.root / "landing" / self.workflow.name / self.workflow.sources["export"].files).parent

    def land(self, days: Sequence[date], now: datetime | None = None) -> None:
        for day in days:
            self.write(day, self.folder())
        ingest.ingest(self.workflow, self.lake, self.root / "landing", now=now or self.morning(max(days)))

    def build(self, days: Sequence[date]) -> None:
        """Features and outcomes of the days, as the stages write them."""
        for stage, made in (("features", point_in_time.features), ("outcomes", point_in_time.outcomes)):
            tables = [table for _, table in made(self.workflow, self.lake, days)]
            self.lake.replace_days(
                self.workflow.table(stage), pa.concat_tables(tables, promote_options="default"), list(days)
            )

    def fit(self, day: date) -> Any:
        """A model from what was known at the cut-off of ``day``."""
        rows = point_in_time.training_set(self.workflow, self.lake, day)
        chosen = point_in_time.rows_where(rows, self.workflow.training.train_on)
        learner = catalog.learner(self.workflow.model.kind)
        return learner.fit(chosen, scoring.learner_spec(self.workflow), seed=scoring.SEED, device="cpu", threads=1)

    def register(
        self, registry: Registry, day: date, *, passed: bool = True, files: Any = None, served: Any = None
    ) -> Version:
        return registry.register(
            self.workflow.name, files or self.fit(day).files(), trained_day=day, passed=passed, params={},
            metrics={"m": 1.0}, tags={}, plots={}, card="card", seed=1, served=served,
        )  # fmt: skip

    def decide(self, registry: Registry, day: date, now: datetime | None = None) -> deciding.Batch:
        """Score and decide a day as the stages do."""
        now = now or self.morning(day)
        scored = scoring.score_day(self.workflow, self.lake, registry, day, now=now)
        scoring.write_scores(self.workflow, self.lake, day, scored)
        batch = deciding.decide_day(self.workflow, self.lake, day)
        deciding.write_batch(self.workflow, self.lake, day, batch, decided_at=now, run_id="test")
        return batch

    def decided(self, day: date) -> list[dict[str, Any]]:
        return self.lake.read(self.workflow.table("decisions"), days=[day]).sort_by("entity_id").to_pylist()


def _bench(name: str, root: Path, days: int, write: Callable[[date, Path], Path]) -> WorkflowHarness:
    said = load(FOLDER / name)
    small = said.model_copy(
        update={
            "model": said.model.model_copy(update={"rounds": 8}),
            "training": said.training.model_copy(update={"min_rows": 50}),
            # a dozen days calibrate no set worth the name: nearly every ticket would go to people
            "policy": said.policy.model_copy(update={"review": "uncertainty"} if name == "ticket_priority" else {}),
            # a small world's first plan moves more than a large one's, and would be held
            "guardrails": said.guardrails.model_copy(update={"max_total_change": None}),
        }
    )
    bench = WorkflowHarness(small, root, [said.start + timedelta(days=n) for n in range(days)], write)
    bench.land(bench.days)
    bench.build(bench.days)
    return bench


@pytest.fixture(scope="session")
def ads(tmp_path_factory: pytest.TempPathFactory) -> WorkflowHarness:
    """``ad_budget``: 24 lines, 21 days. Shared: copy it before writing."""
    start = load(FOLDER / "ad_budget").start
    rows = advertising.history(advertising.World(7, "easy", 24, origin=start), start, 24)
    return _bench(
        "ad_budget",
        tmp_path_factory.mktemp("ads"),
        21,
        lambda day, folder: advertising.export_day(rows, folder, day),
    )


@pytest.fixture(scope="session")
def queue(tmp_path_factory: pytest.TempPathFactory) -> WorkflowHarness:
    """``ticket_priority``: 4 teams, 12 days. Shared: copy it before writing."""
    start = load(FOLDER / "ticket_priority").start
    world = tickets.World(7, load=0.9, teams=4)
    events = {start + timedelta(days=n): world.step(start + timedelta(days=n)) for n in range(15)}
    return _bench(
        "ticket_priority",
        tmp_path_factory.mktemp("queue"),
        12,
        lambda day, folder: tickets.export_day(events[day], folder, day),
    )


@pytest.fixture(params=["ads", "queue"])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> WorkflowHarness:
    """Each shipped workflow in turn, to write to."""
    shared: WorkflowHarness = request.getfixturevalue(request.param)
    return shared.copy(tmp_path / "bench")


def at(folder: Path) -> Registry:
    """The registry in a folder."""
    return Registry(f"sqlite:///{folder / 'mlflow.db'}", (folder / "artifacts").as_uri())


def moved(old: Path, new: Path) -> Registry:
    """A copy of a registry. MLflow keeps absolute paths in its database: they are made to name the copy."""
    shutil.copytree(old, new)
    readdressed(new / "mlflow.db", str(old), str(new))
    return at(new)


@pytest.fixture(scope="session")
def empty_registry_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``mlflow.db``, migrated and empty: migrating takes seconds, copying does not."""
    folder = tmp_path_factory.mktemp("registry")
    at(folder).client.search_registered_models()
    return folder


@pytest.fixture(scope="session")
def _two_versions(
    tmp_path_factory: pytest.TempPathFactory, empty_registry_folder: Path, ads: WorkflowHarness, queue: WorkflowHarness
) -> Path:
    folder = tmp_path_factory.mktemp("versions") / "registry"
    registry = moved(empty_registry_folder, folder)
    for one in (ads, queue):
        for days_ago in (4, 1):
            promote(registry, one.register(registry, one.last - timedelta(days=days_ago)))
    return folder


@pytest.fixture
def empty_registry(tmp_path: Path, empty_registry_folder: Path) -> Registry:
    """A registry without a model."""
    return moved(empty_registry_folder, tmp_path / "empty-registry")


@pytest.fixture
def registry(tmp_path: Path, _two_versions: Path) -> Registry:
    """Two versions of each shipped workflow's model, trained 4 and 1 days before the last: 2 is champion, 1 was it."""
    return moved(_two_versions, tmp_path / "registry")


@pytest.fixture(scope="session")
def postgres() -> Iterator[postgres_server.Server]:
    """A PostgreSQL server for the session, with the password where the driver looks for it."""
    with pytest.MonkeyPatch.context() as patch, postgres_server.started() as server:
        patch.setenv("PGPASSWORD", postgres_server.PASSWORD)
        yield server
