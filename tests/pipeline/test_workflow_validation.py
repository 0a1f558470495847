"""Mistakes that people make in a workflow's folder: ``signalbox validate`` finds each, and says file, place and way out."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from models import catalog
from pipeline import point_in_time, workflow_validation
from pipeline.decisions import in_effect, scoring
from pipeline.workflow import ENGINE_COLUMNS, FOLDER, WorkflowInvalid, load

Edit = Callable[[Path], None]


def put(path: str, value: Any, file: str = "workflow.yaml") -> Edit:
    """Set (or with ... remove) the value at a dotted path of a YAML file."""

    def edit(folder: Path) -> None:
        said = yaml.safe_load((folder / file).read_text())
        *above, last = path.split(".")
        place = said
        for part in above:
            place = place[int(part) if isinstance(place, list) else part]
        if value is ...:
            del place[last]
        else:
            place[int(last) if isinstance(place, list) else last] = value
        (folder / file).write_text(yaml.safe_dump(said, sort_keys=False))

    return edit


def contract(path: str, value: Any) -> Edit:
    return put(path, value, "contract.yaml")


def swap(file: str, old: str, new: str) -> Edit:
    """Replace a text that stands in a file."""

    def edit(folder: Path) -> None:
        text = (folder / file).read_text()
        assert old in text, f"{file} holds no {old!r}"
        (folder / file).write_text(text.replace(old, new, 1))

    return edit


def more(path: str, one: Any, file: str = "workflow.yaml") -> Edit:
    """Add an entry to a list of a YAML file."""

    def edit(folder: Path) -> None:
        said = place = yaml.safe_load((folder / file).read_text())
        for part in path.split("."):
            place = place[part]
        place.append(one)
        (folder / file).write_text(yaml.safe_dump(said, sort_keys=False))

    return edit


def both(*edits: Edit) -> Edit:
    def edit(folder: Path) -> None:
        for one in edits:
            one(folder)

    return edit


def written(file: str, text: str) -> Edit:
    return lambda folder: (folder / file).write_text(text) and None


@dataclass(frozen=True)
class Mistake:
    """An edit of a shipped workflow, and what the sentence about it must hold."""

    name: str
    workflow: str
    edit: Edit
    file: str
    says: tuple[str, ...]


def ads(name: str, edit: Edit, file: str, *says: str) -> Mistake:
    return Mistake(name, "ad_budget", edit, file, says)


def arms_of_entities(folder: Path) -> None:
    """The design entity over the arms of teams."""
    for key, value in (("design", "entity"), ("washout", 0)):
        put(f"arms.{key}", value)(folder)


def tickets(name: str, edit: Edit, file: str, *says: str) -> Mistake:
    return Mistake(name, "ticket_priority", edit, file, says)


TODAY = date(2026, 6, 1)
TEXT = {"type": "VARCHAR"}
REST = {"kind": "rest", "file": "system.yaml"}
W, C, F, OUT = "workflow.yaml", "contract.yaml", "features.sql", "outcomes.sql"
AGAIN = "UNION ALL BY NAME SELECT d.ticket_id AS entity_id, d.moment FROM described AS d"
COMMA = swap(F, "AS shift_1", 'AS "shift, 1 day"')
MISTAKES = [
    # --- the contract
    ads("a column named as the engine's", contract("events.columns.source", TEXT), C, "source", "engine"),
    ads("the same in other letters", contract("events.columns.Day", TEXT), C, "Day", "engine"),
    ads("superseded_at", contract("events.columns.superseded_at", TEXT), C, "superseded_at", "engine"),
    ads("source_file", contract("events.columns.source_file", TEXT), C, "source_file", "engine"),
    ads("a name with #", contract("events.columns.#mark", TEXT), C, "#mark", "engine"),
    ads("two columns that differ by case", contract("events.columns.COST", TEXT), C, "COST", "cost"),
    ads("event_at as text", contract("events.columns.event_at", TEXT), C, "event_at", "TIMESTAMP"),
    ads("min above max", contract("events.columns.cost.max", -1), C, "cost", "min", "max"),
    ads("min of a text", contract("events.columns.segment.min", 3), C, "segment", "min", "BIGINT"),
    ads("allowed values of another type", contract("events.columns.clicks.allowed", ["few"]), C, "clicks", "few", "BIGINT"),
    ads("unique names no column", contract("events.unique", ["line", "event_at"]), C, "unique", "line", "line_id"),
    ads("a rule over an unknown column", contract("events.rows.0.breaks_when", "conversion > clicks"), C, "conversion", "rows"),
    ads("a rule that sums", contract("events.rows.0.breaks_when", "sum(clicks) > 5"), C, "rows", "sum"),
    ads("a rule that is no condition", contract("events.rows.0.breaks_when", "segment"), C, "rows", "true or false"),
    ads("a rule named as the engine's", contract("events.rows.0.name", "duplicate"), C, "duplicate", "engine"),
    ads("two rules of one name", contract("events.rows.1.name", "conversions_exceed_clicks"), C, "conversions_exceed_clicks", "twice"),
    ads("an expectation of no column", contract("events.expectations.1.column", "campain"), C, "campain", "campaign", "expectations"),
    ads("the same of the features", contract("features.expectations.4.column", "ratio_8"), C, "ratio_8", "ratio_7", "features"),
    ads("an unknown argument of an expectation", contract("events.expectations.2.min_vale", 3), C, "min_vale", "min_value"),
    ads("an expectation's bounds the wrong way", contract("events.expectations.4.min_value", 9), C, "expectations", "min_value", "max_value"),
    # --- sources
    ads("a source reads an unknown column", swap("sources/export.sql", "line_id,", "line AS line_id,"), "sources/export.sql:", "line"),
    ads("a source without known_at", swap("sources/export.sql", "exported_at AS known_at,", ""), "sources/export.sql", "known_at"),
    ads("a source lacks a column", swap("sources/export.sql", "    budget,\n", ""), "sources/export.sql", "budget"),
    ads("a source yields one too many", swap("sources/export.sql", "    budget,\n", "    budget, clicks AS taps,\n"), "sources/export.sql", "taps"),
    ads("a source without source_row", swap("sources/export.sql", "source_row,", ""), "sources/export.sql", "source_row"),
    ads("a source drops rows", swap("sources/export.sql", "FROM raw", "FROM raw WHERE cost > '0'"), "sources/export.sql", "WHERE"),
    ads("a source repeats rows", swap("sources/export.sql", "FROM raw", "FROM raw, range(2)"), "sources/export.sql", "rows"),
    ads("a source that does not parse", swap("sources/export.sql", "FROM raw", "FORM raw"), "sources/export.sql:", "syntax"),
    ads("a source of two statements", swap("sources/export.sql", "FROM raw", "FROM raw; SELECT 1"), "sources/export.sql", "statements"),
    ads("a source that reads a file", swap("sources/export.sql", "FROM raw", "FROM 'x.csv'"), "sources/export.sql", "x.csv"),
    ads("known_at twice", put("sources.export.known_at", "landing"), "sources/export.sql", "known_at", "landing"),
    ads("sources that overlap", put("sources.april_may.files", "export/*.csv.gz"), W, "sources", "april_may", "export"),
    ads("a pattern that climbs out", put("sources.export.files", "../other/{day}.csv"), W, "sources.export.files", ".."),
    ads("a pattern from the root", put("sources.export.files", "/data/{day}.csv"), W, "sources.export.files", "below"),
    ads("another word for the day", put("sources.export.files", "export/{date}.csv"), W, "sources.export.files", "{date}", "{day}"),
    ads("a declared column twice", more("sources.export.columns", "COST"), W, "sources.export.columns", "COST"),
    ads("source_row declared", more("sources.export.columns", "source_row"), W, "sources.export.columns", "source_row"),
    # --- features
    ads("features without entity_id", swap(F, "line_id AS entity_id", "line_id AS line"), F, "entity_id"),
    ads("features of an unknown column", swap(F, "impressions, clicks, explore_multiplier,", "impressions, click, explore_multiplier,"), F + ":", "click"),
    ads("an unknown parameter", swap(F, "< 7) AS active_days_7", "< 7 AND $yesterday IS NOT NULL) AS active_days_7"), F, "$yesterday", "$day"),
    ads("a feature that the SQL does not yield", more("features.numeric", "shift_2"), W, "shift_2", "features.numeric"),
    ads("a text among the numbers", more("features.numeric", "format"), W, "format", "categorical"),
    ads("a feature in both lists", both(put("features.categorical", ["drawn_days"]), more("features.numeric", "drawn_days")), W, "drawn_days", "twice"),
    ads("a feature's name with a comma", both(COMMA, put("features.numeric.0", "shift, 1 day")), W, "shift, 1 day", "LightGBM"),
    ads("a feature's name with a blank", both(swap(F, "AS shift_1", 'AS "shift 1"'), put("features.numeric.0", "shift 1")), W, "shift 1", "LightGBM"),
    ads("features yield the engine's day", swap(F, "drawn_days\nFROM beside", "drawn_days, 1 AS day\nFROM beside"), F, "day", "engine"),
    ads("features yield a column twice", swap(F, "drawn_days\nFROM beside", "drawn_days, 1 AS COST_1\nFROM beside"), F, "COST_1", "cost_1"),
    ads("features yield the model's own column", swap(F, "drawn_days\nFROM beside", "drawn_days, 1 AS spend_shift_1\nFROM beside"), F, "spend_shift_1"),
    ads("an entity that is a number", swap(F, "line_id AS entity_id", "hash(line_id) AS entity_id"), F, "entity_id", "VARCHAR"),
    tickets("an entity that stands twice", swap(F, "ORDER BY entity_id, moment", AGAIN), F, "entity_id", "more than once"),
    ads("features without the spend column", swap(F, "    budget_micros, budget_age,\n", "    budget_age,\n"), F, "budget_micros", "policy.spend"),
    ads("money that is no whole number", swap(F, "    budget_micros,", "    budget_micros / 1e6 AS budget_micros,"), F, "budget_micros", "BIGINT"),
    ads("features without what the model reads", swap(F, "AS delivered_7", "AS delivered"), F, "delivered_7", "response"),
    ads("features from a table that is not there", swap(F, "FROM events", "FROM quarantine"), F, "quarantine", "events"),
    ads("lookback of nothing", put("features.lookback_days", 0), W, "lookback_days"),
    # --- outcomes
    ads("outcomes without known_at", swap(OUT, "    known_at,\n", ""), OUT, "known_at"),
    ads("outcomes without value", swap(OUT, "    value,\n", ""), OUT, "value", "response"),
    tickets("outcomes without missed", swap(OUT, "    missed,\n", ""), OUT, "missed", "duration"),
    ads("outcomes yield the engine's day", swap(OUT, "    value,\n", '    value, "day",\n'), OUT, "day", "engine"),
    ads("outcomes yield the training set's column", swap(OUT, "    value,\n", "    value, 1 AS outcome_known_at,\n"), OUT, "outcome_known_at", "engine"),
    ads("outcomes named as a feature", swap(OUT, "    value,\n", "    value, 1 AS Campaign,\n"), OUT, "Campaign", "features"),
    ads("outcomes named as a decision's column", swap(OUT, "    value,\n", "    value, 1 AS arm,\n"), OUT, "arm", "engine"),
    ads("outcomes known twice", swap(OUT, "QUALIFY", "-- QUALIFY"), OUT, "more than once", "QUALIFY"),
    ads("for_day as a time", swap(OUT, '"day" - 1 AS for_day', "event_at AS for_day"), OUT, "for_day", "DATE"),
    # --- model, training, policy
    tickets("rule_by names no feature", put("model.rule_by", ["priority", "kategory"]), W, "model.rule_by", "kategory", "category"),
    tickets("the model's group is no feature", put("model.group", "prio"), W, "model.group", "prio"),
    ads("a group that is no feature", put("model.group", ["segment", "formt"]), W, "model.group", "formt", "format"),
    tickets("arms.unit is no feature", put("arms.unit", "squad"), W, "arms.unit", "squad"),
    tickets("entities that share the arm of a team", arms_of_entities, W, "arms.unit", "team", "unit: entity_id", "switchback"),
    tickets("cost_by is no feature", put("policy.cost_by", "impakt"), W, "policy.cost_by", "impakt", "impact"),
    tickets("team is no feature", put("policy.team", "crew"), W, "policy.team", "crew"),
    tickets("the capacity's column is no feature", put("policy.capacity", "hours"), W, "policy.capacity", "hours"),
    ads("the budget's age is no feature", put("policy.spend_age", "age"), W, "policy.spend_age", "age", "budget_age"),
    ads("units that no batch has", put("guardrails.unit", 25000), W, "guardrails.unit", "25000", "policy.unit_micros"),
    ads("a floor that is no feature", put("policy.floor", "least"), W, "policy.floor", "least"),
    ads("a policy for another model", put("policy", {"kind": "priority_queue"}), W, "policy.kind", "budget_allocation"),
    ads("better the wrong way", put("training.better", "higher"), W, "training.better", "mae", "lower"),
    tickets("a metric the learner does not have", both(put("training.metric", "f1"), put("retraining.metric", "brier")), W, "training.metric", "f1", "brier"),
    ads("holdout longer than history", put("training.history_days", 6), W, "training.history_days", "holdout_days"),
    tickets("maturity and holdout eat the history", put("training.history_days", 19), W, "training.history_days", "maturity_days"),
    tickets("rest_level outside the levels", put("policy.rest_level", 7), W, "policy.rest_level", "guardrails.levels"),
    tickets("more cuts than levels", put("guardrails.levels", [1, 3]), W, "level_days", "guardrails.levels"),
    tickets("kept priorities outside the levels", put("policy.keep", [9]), W, "policy.keep", "guardrails.levels"),
    ads("an arm that there is not", put("guardrails.frozen_arms", ["hold_out"]), W, "guardrails.frozen_arms", "hold_out", "holdout"),
    ads("decide_on an unknown column", put("policy.decide_on", "budget > 0"), W, "policy.decide_on", "budget"),
    ads("decide_on that is no condition", put("policy.decide_on", "campaign"), W, "policy.decide_on", "true or false"),
    tickets("train_on an unknown column", put("training.train_on", "moments = 'intake'"), W, "training.train_on", "moments"),
    tickets("evaluate_on an outcome", put("training.evaluate_on", "handling_hours > 1"), W, "training.evaluate_on", "handling_hours"),
    ads("a slice that is no feature", put("training.gate.slices", ["segmnt"]), W, "training.gate.slices", "segmnt", "segment"),
    ads("an attribute that is no feature", put("training.gate.attributes", ["gender"]), W, "training.gate.attributes", "gender"),
    # --- monitoring, sending
    ads("drift of an unknown number", put("drift.numeric", ["ratio_77"]), W, "drift.numeric", "ratio_77", "ratio_7"),
    ads("drift of an unknown category", put("drift.categorical", ["placements"]), W, "drift.categorical", "placements"),
    ads("drift of a text as a number", put("drift.numeric", ["segment"]), W, "drift.numeric", "segment", "categorical"),
    ads("drift of a moment without moments", put("drift.moment", "intake"), W, "drift.moment", "moment"),
    ads("a metric of no outcome", put("regression.metrics.0.column", "revenue"), W, "regression.metrics", "revenue"),
    ads("a ratio by no outcome", put("regression.metrics.0.per", "klicks"), W, "regression.metrics", "klicks"),
    tickets("settles_at is no outcome", put("regression.settles_at", "due_at"), W, "regression.settles_at", "due_at"),
    tickets("settles_at is no time", put("regression.settles_at", "missed"), W, "regression.settles_at", "TIMESTAMP"),
    tickets("a replay of what is no queue", put("regression.replay.kind", "budgets"), W, "regression.replay.kind", "queue"),
    tickets("a replay's SQL is missing", put("regression.replay.tickets", "line.sql"), "line.sql", "is missing"),
    tickets("a replay without a holdout", put("arms.shares", {"champion": 1}), W, "regression.replay", "holdout"),
    tickets("a replay of cohorts", both(put("arms.design", "cohort"), put("arms.epoch", 14)), W, "regression.replay", "switchback"),
    tickets("a replay's ticket has no effort", swap("queue.sql", "AS effort_hours", "AS hours"), "queue.sql", "effort_hours"),
    tickets("a replay's priority is a text", swap("queue.sql", "arg_min(priority, n)", "arg_min(team, n)"), "queue.sql", "BIGINT"),
    tickets("a replay's work has no worker", swap("work.sql", "AS worker", "AS who"), "work.sql", "worker"),
    ads("a replay of money", both(put("regression.replay", {"kind": "queue", "tickets": "features.sql"})), W, "regression.replay.kind", "money"),
    ads("spend is no outcome", put("delivery.spend", "costs"), W, "delivery.spend", "costs", "cost"),
    ads("a guard without its column", put("delivery.spend", ...), W, "max_spend_over_pool", "delivery.spend"),
    ads("steps finer than the system takes", put("policy.unit_micros", 1000), W, "policy.unit_micros", "10000", "connector"),
    ads("replanned in steps it does not take", put("delivery.push.unit", 1), W, "delivery.push.unit", "10000"),
    ads("an owner that is nobody", put("owner", "growth"), W, "owner", "team:", "e-mail"),
    ads("a start in the far future", put("start", "2126-03-02"), W, "start", "2126-03-02", "future"),
    ads("a deadline before the cut-off", put("deadline", "02:00"), W, "deadline", "cutoff"),
    ads("a system's YAML that is missing", put("delivery.connector", REST), "system.yaml", "cannot be read"),
    ads("a system's YAML that says nonsense", both(put("delivery.connector", REST), written("system.yaml", "system: x\n")), "system.yaml", "base_url"),
    ads("a system's YAML out of the folder", put("delivery.connector", {**REST, "file": "../system.yaml"}), "../system.yaml", "outside"),
    tickets("certificates that are missing", put("delivery.connector.ca_file", "own.pem"), W, "delivery.connector.ca_file", "own.pem"),
    ads("an unknown key", put("training.marginn", 0.1), W, "marginn", "margin"),
]  # fmt: skip


def said(folder: Path) -> list[str]:
    try:
        return workflow_validation.problems(load(folder))
    except WorkflowInvalid as error:
        return str(error).splitlines()


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: m.name)
def test_a_mistake_is_found_with_its_place_and_the_way_out(tmp_path: Path, mistake: Mistake) -> None:
    folder = Path(shutil.copytree(FOLDER / mistake.workflow, tmp_path / mistake.workflow))
    mistake.edit(folder)
    found = said(folder)
    assert found, "nothing was found"
    told = [line for line in found if str(folder / mistake.file) in line and all(word in line for word in mistake.says)]
    assert told, "\n".join(found)
    assert not re.search(r"Traceback|0x[0-9a-f]{6}", "\n".join(found))


@pytest.mark.parametrize("name", ["ad_budget", "ticket_priority"])
def test_the_shipped_workflows_read_good(name: str) -> None:
    workflow = load(FOLDER / name)
    assert workflow_validation.problems(workflow) == []
    assert workflow_validation.notes(workflow) == []


DAYS_ROW = """SELECT line_id AS entity_id, campaign, segment, format, placement, CAST(cost * 1e6 AS BIGINT) AS budget_micros
FROM events
WHERE "day" = $day
"""


@pytest.mark.parametrize(
    ("unique", "sql", "told"),
    [
        (["line_id", "event_at"], DAYS_ROW, False),
        (["line_id", "event_at"], DAYS_ROW.replace("=", ">="), False),
        (["line_id", "event_at"], DAYS_ROW.replace("= $day", "<= $day"), True),
        (["line_id", "event_at", "known_at"], DAYS_ROW, True),
        (["line_id", "known_at"], DAYS_ROW, True),
        (["line_id", "event_at", "known_at"], DAYS_ROW + "QUALIFY row_number() OVER (PARTITION BY line_id ORDER BY known_at DESC) = 1", False),
        (["line_id"], DAYS_ROW, False),
    ],
)  # fmt: skip
def test_a_source_of_one_row_a_day_raises_no_alarm_of_two(
    tmp_path: Path, unique: list[str], sql: str, told: bool
) -> None:
    """Whether two events of one day can be told apart by their time depends on the source: event_at may always be midnight."""
    folder = Path(shutil.copytree(FOLDER / "ad_budget", tmp_path / "ad_budget"))
    contract("events.unique", unique)(folder)
    (folder / "features.sql").write_text(sql)
    found, notes = workflow_validation._repeated(load(folder), "features.sql", "features")
    assert (bool(found), notes) == (told, [])


def test_several_mistakes_are_told_together(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FOLDER / "ad_budget", tmp_path / "ad_budget"))
    for edit in (
        put("drift.numeric", ["ratio_77"]),
        put("delivery.spend", "costs"),
        put("policy.decide_on", "budget > 0"),
    ):
        edit(folder)
    assert len(said(folder)) == 3


def test_what_cannot_be_known_without_data_is_said(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FOLDER / "ad_budget", tmp_path / "ad_budget"))
    contract("events.unique", [])(folder)
    put("start", str(TODAY + timedelta(days=30)))(folder)
    put("sources.export.format", "parquet")(folder)
    swap("sources/export.sql", "parse_time(date, '%Y-%m-%d')", "date + INTERVAL 1 DAY")(folder)
    workflow = load(folder)
    assert workflow_validation.problems(workflow, today=TODAY) == []
    told = "\n".join(workflow_validation.notes(workflow, today=TODAY))
    assert (
        "no day can be run before" in told and "sources.export" in told and "stands twice shows with data only" in told
    )


def test_a_source_that_declares_no_columns_is_bound_by_those_that_it_reads(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FOLDER / "ad_budget", tmp_path / "ad_budget"))
    put("sources.export.columns", None)(folder)
    assert workflow_validation.problems(load(folder)) == []
    swap("sources/export.sql", "clicks,", "nosuch(clicks) AS clicks,")(folder)
    assert "nosuch" in workflow_validation.problems(load(folder))[0]


def test_a_priority_that_the_system_has_no_name_for_is_found(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FOLDER / "ticket_priority", tmp_path / "ticket_priority"))
    named = {
        "kind": "sql_table",
        "url_env": "D",
        "table": "t",
        "key": "k",
        "value": "v",
        "names": {1: "high", 2: "low"},
    }
    put("delivery.connector", named)(folder)
    found = workflow_validation.problems(load(folder))
    assert [line for line in found if "cannot write 3" in line and "guardrails.levels" in line], found


def test_what_the_response_model_is_said_to_need_it_refuses_to_be_without(ads: Any) -> None:
    kind, workflow = catalog.KINDS["response"], ads.workflow
    rows = point_in_time.training_set(workflow, ads.lake, ads.last)
    spec = {**scoring.learner_spec(workflow), "rounds": 2}
    needed = (*kind.features, *kind.outcomes)

    def used(table: Any) -> None:
        for one in (catalog.learner("response"), catalog.rule("response")):
            model = one.fit(table, spec, seed=1, device="cpu", threads=1)
            model.evaluate(table)
            model.score(table)

    used(
        rows.select(
            ["day", *point_in_time.keys_of(rows.schema.names), *workflow.features.numeric, *spec["group"], *needed]
        )
    )
    for name in needed:
        with pytest.raises(KeyError, match=name):
            used(rows.drop_columns([name]))


@pytest.mark.parametrize("name", ["ads", "queue"])
def test_what_a_candidate_may_be_judged_by_is_measured_of_model_and_rule(
    name: str, request: pytest.FixtureRequest
) -> None:
    bench = request.getfixturevalue(name)
    kind, workflow = bench.workflow.model.kind, bench.workflow
    rows = point_in_time.training_set(workflow, bench.lake, bench.last)
    spec = {**scoring.learner_spec(workflow), "rounds": 2}
    for one in (catalog.learner(kind), catalog.rule(kind)):
        measured = one.fit(rows, spec, seed=1, device="cpu", threads=1).evaluate(rows)
        assert set(catalog.KINDS[kind].metrics) <= set(measured)


@pytest.mark.parametrize("table", ["events", "features", "outcomes", "training_set"])
def test_the_names_that_are_reserved_are_those_that_the_engine_adds(ads: Any, table: str) -> None:
    workflow, lake = ads.workflow, ads.lake
    own = workflow_validation._events(workflow)
    if table == "events":
        written = set(lake.read(workflow.table("events"), days=[]).schema.names)
        assert written - set(workflow.contract.events.columns) == set(ENGINE_COLUMNS["events"])
        assert set(own.names) == written
        return
    wrong: list[str] = []
    features, outcomes = (
        workflow_validation._yields(workflow, path, own, wrong)
        for path in (workflow.features.sql, workflow.outcomes.sql)
    )
    assert features is not None and outcomes is not None and not wrong
    if table == "training_set":
        made = point_in_time.training_set(workflow, lake, ads.last).schema.names
        assert made == workflow_validation._training_set(workflow, features, outcomes)[0].names
        return
    mine = features if table == "features" else outcomes
    assert set(lake.read(workflow.table(table), days=[]).schema.names) - set(mine.names) <= set(ENGINE_COLUMNS[table])
    assert set(in_effect.DECIDED.names) - {"entity_id", "perturbation_probability", "decided_at"} <= set(
        ENGINE_COLUMNS["outcomes"]
    )
