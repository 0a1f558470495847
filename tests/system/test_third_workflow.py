"""Adding a workflow is adding a folder and no Python: lead follow-up, from its YAML and SQL to decisions with reasons."""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Iterator
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pytest

from assets.resources import resources
from models.registry import CHAMPION
from orchestration import assembly, runner
from pipeline.decisions import replay
from pipeline.workflow import load_all

START = date(2026, 1, 5)
DAYS = 14
WORKFLOW = """
name: lead_followup
owner: team:sales
description: Which leads a sales desk calls first, so that none waits longer than it will.
start: 2026-01-05
cutoff: "02:00"
deadline: "05:00"
sources:
  crm:
    files: crm_{day}.csv
    format: csv
    delimiter: ";"
    columns: [lead, at, what, desk, value, promised, called]
    sql: sources/crm.sql
    known_at: mapped
features: {lookback_days: 30, numeric: [age_hours, hours_to_due, value], categorical: [desk, size]}
outcomes: {lookback_days: 30, join: entity}
model: {kind: duration, group: size, rule_by: [size, desk], delay_hours: 12, rounds: 8, min_data_in_leaf: 5}
training: {history_days: 30, holdout_days: 3, min_rows: 60, metric: brier, better: lower, margin: 0.05, device: cpu}
policy:
  kind: priority_queue
  decide_on: moment = 'open'
  priority: urgency
  team: desk
  cost_by: size
  cost: {small: 1, large: 5}
  review_above: 1
arms: {design: entity, unit: entity_id, epoch: 1, shares: {holdout: 0.1, champion: 0.9}}
guardrails: {levels: [1, 5], max_rows: 1000}
drift: {reference_days: 7}
"""
CONTRACT = """
events:
  columns:
    lead: {type: VARCHAR, required: true}
    event_at: {type: TIMESTAMP, required: true}
    known_at: {type: TIMESTAMP, required: true}
    what: {type: VARCHAR, required: true, allowed: [came, called]}
    desk: {type: VARCHAR, required: true}
    value: {type: DOUBLE, min: 0}
    promised: {type: TIMESTAMP}
    called: {type: TIMESTAMP}
  unique: [lead, what]
  max_quarantined_share: 0.05
  expectations: [{type: expect_column_values_to_not_be_null, column: value}]
"""
SOURCE = """
SELECT source_row, lead, parse_time("at", '%Y-%m-%d %H:%M') AS event_at,
    parse_time("at", '%Y-%m-%d %H:%M') AS known_at, what, desk, value,
    parse_time(promised, '%Y-%m-%d %H:%M') AS promised, nullif(called, '') AS called
FROM raw
"""
FEATURES = """
WITH leads AS (
    SELECT lead, desk, value, promised, event_at AS came, lead IN (SELECT lead FROM events WHERE what = 'called') AS done
    FROM events WHERE what = 'came'
)
SELECT lead AS entity_id, moment, desk, value, 3::BIGINT AS urgency, promised AS due_at,
    CASE WHEN value >= 500 THEN 'large' ELSE 'small' END AS size,
    date_diff('minute', came, clock) / 60.0 AS age_hours,
    date_diff('minute', clock, promised) / 60.0 AS hours_to_due,
    date_diff('minute', came, promised) / 60.0 AS allowed_hours
FROM (
    SELECT *, 'intake' AS moment, came AS clock FROM leads WHERE came > $cutoff::TIMESTAMP - INTERVAL 1 DAY
    UNION ALL
    SELECT *, 'open' AS moment, $cutoff::TIMESTAMP AS clock FROM leads WHERE NOT done
)
"""
OUTCOMES = """
SELECT c.lead AS entity_id, NULL::DATE AS for_day, c.known_at, c.event_at > c.promised AS missed,
    date_diff('minute', o.event_at, c.event_at) / 60.0 AS handling_hours, NULL::DOUBLE AS open_hours
FROM events AS c JOIN events AS o ON o.lead = c.lead AND o.what = 'came'
WHERE c.what = 'called' AND c.known_at > $previous_cutoff
"""


def write_folder(folder: Path) -> None:
    for name, text in {
        "workflow.yaml": WORKFLOW,
        "contract.yaml": CONTRACT,
        "features.sql": FEATURES,
        "outcomes.sql": OUTCOMES,
        "sources/crm.sql": SOURCE,
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def land(folder: Path) -> int:
    """What the sales system exports, a file a day; large leads are called late. Returns how many rows there are."""
    rng = np.random.default_rng(5)
    rows: dict[date, list[list[Any]]] = {START + timedelta(days=n): [] for n in range(DAYS)}
    for n in range(30 * DAYS):
        came = datetime.combine(START, datetime.min.time()) + timedelta(minutes=int(rng.integers(0, DAYS * 1440)))
        value = int(rng.choice([100, 900]))
        called = came + timedelta(hours=float(rng.gamma(2, 4 if value == 100 else 14)))
        said = [f"lead-{n}", f"desk {n % 3}", value, came + timedelta(hours=16)]
        for at, what in ((came, "came"), (called, "called")):
            if at.date() in rows:
                lead, desk, worth, promised = said
                rows[at.date()].append(
                    [lead, f"{at:%Y-%m-%d %H:%M}", what, desk, worth, f"{promised:%Y-%m-%d %H:%M}", ""]
                )
    folder.mkdir(parents=True)
    for day, found in rows.items():
        path = folder / f"crm_{day}.csv"
        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter=";")
            writer.writerow(["lead", "at", "what", "desk", "value", "promised", "called"])
            writer.writerows(sorted(found, key=lambda r: (r[1], r[0])))
    return sum(len(found) for found in rows.values())


@pytest.fixture
def instance(
    tmp_path: Path, empty_registry_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dg.DagsterInstance]:
    for name in [n for n in os.environ if n.startswith("SIGNALBOX_")]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("SIGNALBOX_HOME", str(home))
    shutil.copyfile(empty_registry_folder / "mlflow.db", home / "mlflow.db")
    with dg.DagsterInstance.ephemeral() as one:
        yield one


@pytest.mark.system
def test_a_third_workflow_is_one_folder(tmp_path: Path, instance: dg.DagsterInstance) -> None:
    write_folder(tmp_path / "workflows" / "lead_followup")
    (workflow,) = load_all(tmp_path / "workflows").workflows
    rows = land(tmp_path / "home" / "landing" / "lead_followup")
    yesterday, last = START + timedelta(days=DAYS - 2), START + timedelta(days=DAYS - 1)

    def run(job: str, first: date, to: date, clock: str = "03:00") -> dg.ExecuteInProcessResult:
        result = runner.run(workflow, job, first, to, now=f"{to + timedelta(days=1)}T{clock}:00", instance=instance)
        assert result.success, runner.failed_steps(result)
        return result

    prepared = run("prepare", START, last)
    checks = {(c["asset"], c["check"]): c for c in runner.check_rows(prepared)}
    assert checks["lead_followup/events", "files"]["result"] == "passed"
    assert checks["lead_followup/features", "contract"]["result"] == "passed"
    retrained = run("retrain", yesterday, yesterday)
    assert any(c["check"] == "gate" for c in runner.check_rows(retrained))
    daily = run("daily", last, last)
    assert [c for c in runner.check_rows(daily) if c["result"] == "ERROR"] == []

    given = resources()
    lake, registry = given["lake"].lake, given["registry"].registry
    assert lake.read("lead_followup/events").num_rows == rows, "nothing is lost"
    (version,) = registry.versions("lead_followup")
    assert version.trained_day == yesterday and set(registry.load(version)) >= {"meta.json"}
    champion = registry.by_alias("lead_followup", CHAMPION)
    (batch,) = lake.read("lead_followup/batches", days=[last]).to_pylist()
    assert batch["step"] == ("champion" if champion else "rule") and batch["status"] == "READY"
    decisions = lake.read("lead_followup/decisions", days=[last]).to_pylist()
    open_now = lake.read("lead_followup/features", days=[last]).to_pylist()
    assert {d["entity_id"] for d in decisions} == {f["entity_id"] for f in open_now if f["moment"] == "open"}
    assert any(d["changed"] for d in decisions) and all(1 <= d["after"] <= 5 for d in decisions)
    assert all(d["reasons"] for d in decisions) and any("desk" in " ".join(d["reasons"]) for d in decisions)
    again = replay.replay("lead_followup", lake, registry, decisions[0]["decision_id"])
    assert again.equal and again.same_code

    materialised = instance.get_materialized_partitions(dg.AssetKey(["lead_followup", "features"]))
    assert len(materialised) == DAYS
    names = {j.name for j in assembly.build([workflow]).get_repository_def().get_all_jobs()}
    assert {f"lead_followup_{j}" for j in ("daily", "prepare", "retrain", "decide")} <= names
    assert batch["decided_at"] == datetime.combine(last + timedelta(days=1), datetime.min.time()) + timedelta(hours=3)
