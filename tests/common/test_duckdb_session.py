"""The DuckDB in which a workflow's SQL runs: locked, blind to all but its tables, and its author's mistakes have a place."""

from __future__ import annotations

import re
from datetime import date, datetime
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest

from common import duckdb_session
from common.duckdb_session import StageSqlError, Text
from pipeline.ingest import row_rules
from pipeline.ingest.files import FileRefused
from pipeline.workflow import FOLDER, RowRule, load, load_all

EVENTS = pa.schema([("line_id", pa.string()), ("day", pa.date32()), ("cost", pa.float64())])
GIVEN = {"day": date(2026, 4, 3), "cutoff": datetime(2026, 4, 4, 3)}


def refused(sql: str) -> str:
    with pytest.raises(StageSqlError) as caught:
        duckdb_session.bind(Text(sql, "ads/features.sql"), {"events": EVENTS}, GIVEN)
    return str(caught.value)


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM read_csv('{file}')", "SELECT * FROM '{file}'", "SELECT * FROM read_text('{file}')",
        "SELECT * FROM read_blob('{file}')", "SELECT * FROM glob('{file}')", "SELECT * FROM sniff_csv('{file}')",
        "COPY events TO '{file}.out'", "COPY events FROM '{file}'", "EXPORT DATABASE '{file}.out'", "ATTACH '{file}.db'",
        "INSTALL httpfs", "LOAD httpfs", "SET threads = 4", "RESET threads", "PRAGMA version", "CALL pragma_version()",
        "SELECT * FROM read_csv('https://example.org/x.csv')", "CREATE TABLE t AS SELECT 1", "DROP TABLE events",
        "DELETE FROM events", "INSERT INTO events VALUES ('x', NULL, 1)", "EXPLAIN SELECT 1", "USE memory", "VACUUM",
        "WITH w AS (INSERT INTO events VALUES ('x', NULL, 1) RETURNING *) SELECT * FROM w",
        "SELECT * FROM (WITH w AS (DELETE FROM events RETURNING *) SELECT * FROM w)",
        "SELECT * FROM query('SELECT 1')", "SELECT * FROM query_table('events')",
        "SELECT * FROM python_map_function(1)", "SELECT * FROM duckdb_tables()", "SELECT * FROM duckdb_settings()",
        "SELECT * FROM information_schema.tables", "SELECT * FROM pg_catalog.pg_tables", "SELECT * FROM sqlite_master",
        "SELECT * FROM duckdb_columns", "DESCRIBE events", "SHOW TABLES", "SUMMARIZE events", "SELECT 1; SELECT 2", "",
        "-- nothing", "SELECT 1; DROP TABLE events", "PIVOT events ON line_id USING sum(cost)",
        "SELECT now()", "SELECT current_date", "SELECT random()", "SELECT uuid()", "SELECT getvariable('x')",
        "SELECT nextval('s')", "SELECT current_setting('home_directory')", "SELECT $other", "SELECT * FROM local_table",
        "SELECT * FROM events USING SAMPLE 2", "SELECT * FROM events TABLESAMPLE 10%",
    ],
)  # fmt: skip
def test_what_is_no_plain_select_over_the_events_is_refused_with_its_place(sql: str, tmp_path: Path) -> None:
    local_table = pa.table({"secret": [1]})
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    before = sorted(tmp_path.iterdir())
    said = refused(sql.replace("{file}", str(tmp_path / "x.csv")))
    assert said.startswith("ads/features.sql") and local_table.num_rows == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "called",
    [
        "current_localtimestamp()", "current_localtime()", "pg_postmaster_start_time()", "pg_conf_load_time()",
        "ago(INTERVAL 1 DAY)", "version()", "age(seen)", "main.age(seen)", "system.age(seen)", "seen.age()",
        "e.seen.age()", "list_transform([seen], lambda t: age(t))", "AGE (seen)", "main.ago('1 day')",
    ],
)  # fmt: skip
def test_no_function_that_reads_the_clock_or_the_build_gets_by_under_another_name(called: str) -> None:
    with pytest.raises(StageSqlError, match="answers differently") as caught:
        duckdb_session.check(Text(f"SELECT 1,\n  {called}\nFROM events e", "f.sql"), {"events"})
    assert str(caught.value).startswith("f.sql:2: ")


def test_the_age_between_two_times_and_columns_named_like_a_clock_may_be_read() -> None:
    engine = duckdb_session.engine()
    engine.execute("CREATE TABLE events AS SELECT TIMESTAMP '2026-04-03' AS seen, 2 AS version, 3 AS age, 4 AS ago")
    sql = "SELECT datepart('day', age(seen, TIMESTAMP '2026-04-01')) AS days, version, age, ago, list_sum([1, 2]) AS s FROM events"
    found = duckdb_session.select(engine, Text(sql, "f.sql"), {"events"}).to_pylist()
    assert found == [{"days": 2, "version": 2, "age": 3, "ago": 4, "s": 3}]


@pytest.mark.parametrize("table", ["duckdb_settings", "sqlite_master", "pg_tables", "SQLite_Master", "beside"])
@pytest.mark.parametrize(
    "sql",
    [
        "SELECT *\nFROM (WITH {t} AS (SELECT 1 AS a) SELECT * FROM {t}) AS x,\n  (SELECT * FROM {t}) AS y",
        "SELECT (WITH {t} AS (SELECT 1 AS a) SELECT count(*) FROM {t}),\n  y.*\nFROM {t} AS y",
        "WITH w AS (WITH {t} AS (SELECT 1 AS a)\n  SELECT * FROM {t})\nSELECT * FROM w, {t}",
        "WITH w AS (\n\n  SELECT * FROM {t}), {t} AS (SELECT 1 AS a) SELECT * FROM w",
        "WITH {t} AS (\n\n  SELECT * FROM {t}) SELECT * FROM {t}",
        "WITH RECURSIVE {t} AS (\n\n  SELECT * FROM {t} UNION ALL SELECT * FROM {t}) SELECT * FROM {t}",
        "(WITH {t} AS (SELECT 1 AS a)\nSELECT a FROM {t})\nUNION ALL SELECT 1 FROM {t}",
        "SELECT 1\nFROM events WHERE EXISTS (WITH {t} AS (SELECT 1) FROM {t})\n  AND EXISTS (FROM {t})",
    ],
)
def test_a_cte_lends_its_name_to_nothing_outside_its_own_select(sql: str, table: str) -> None:
    engine = duckdb_session.engine()
    engine.execute("CREATE TABLE events AS SELECT 1 AS x")
    engine.execute("CREATE TABLE beside AS SELECT 2 AS x")
    with pytest.raises(StageSqlError, match=f"there is no table '{table}' here; this SQL sees events") as caught:
        duckdb_session.select(engine, Text(sql.format(t=table), "f.sql"), {"events"})
    assert str(caught.value).startswith("f.sql:3: ")


@pytest.mark.parametrize(
    "sql",
    [
        "WITH pg_tables AS (SELECT 1 AS x) SELECT x FROM (SELECT x FROM pg_tables)",
        "WITH a AS (SELECT 1 AS x), b AS MATERIALIZED (SELECT * FROM A) SELECT x FROM b WHERE EXISTS (FROM a)",
        "WITH a AS (SELECT 1 AS x) SELECT (WITH b AS (SELECT * FROM a) SELECT max(x) FROM b) AS x",
        "WITH a AS (SELECT 1 AS x) (SELECT * FROM a UNION SELECT * FROM a)",
        "WITH RECURSIVE a(x) AS (SELECT 3 UNION ALL SELECT x - 1 FROM (WITH b AS (FROM a) FROM b) WHERE x > 1) SELECT min(x) AS x FROM a",
        "WITH a AS (SELECT 1 AS x) SELECT x FROM a ORDER BY (SELECT max(x) FROM a) LIMIT 1",
        "WITH a AS (SELECT 1 AS x) SELECT x FROM events JOIN LATERAL (SELECT a.x FROM a WHERE a.x = events.x) USING (x)",
    ],
)
def test_a_cte_is_seen_wherever_sql_lets_it_be_seen(sql: str) -> None:
    engine = duckdb_session.engine()
    engine.execute("CREATE TABLE events AS SELECT 1 AS x")
    assert duckdb_session.select(engine, Text(sql, "f.sql"), {"events"}).to_pylist() == [{"x": 1}]


@pytest.mark.parametrize("setting", ["threads", "enable_external_access", "TimeZone", "python_enable_replacements"])
def test_no_setting_of_the_engine_can_be_changed(setting: str) -> None:
    for connection in (engine := duckdb_session.engine(), engine.cursor()):
        with pytest.raises(duckdb.Error, match="locked"):
            connection.execute(f"SET {setting} = 'true'")


def test_what_the_check_would_miss_the_transaction_refuses() -> None:
    """Nothing is written even where the statement itself passed for a SELECT."""
    engine = duckdb_session.engine()
    engine.execute("CREATE TABLE events (a INTEGER)")
    with pytest.raises(StageSqlError, match="read-only"):
        duckdb_session._arrow(
            engine, Text("", "f.sql"), "WITH w AS (INSERT INTO events VALUES (1) RETURNING *) FROM w", {}
        )
    assert engine.execute("SELECT count(*) FROM events").fetchall() == [(0,)]


@pytest.mark.parametrize(
    ("sql", "line", "word"),
    [
        ("SELECT line_id,\n  nope\nFROM events", 2, "nope"),
        ("SELECT line_id,\n  'ü',\n  nope\nFROM events", 3, "nope"),
        ("SELECT line_id\nFROM events\nWHERE", 3, "syntax"),
        ("SELECT line_id,\n  -- sum of it\n  sum(line_id)\nFROM events GROUP BY 1", 3, "sum"),
        ("SELECT line_id,\n  cost\nFROM events\nGROUP BY line_id", 2, "cost"),
        ("SELECT line_id\nFROM landed", 2, "landed"),
        ("SELECT e.line_id\nFROM events e\nJOIN events f USING (ticket)", 3, "ticket"),
        ("SELECT\n  CAST('x' AS DATE)", 2, "date"),
        ("SELECT line_id\nFROM events\nWHERE day < $cutof", 3, r"\$cutof"),
        ("SELECT line_id;\nSELECT 2", 2, "2 statements"),
        ("WITH a AS (SELECT 1 AS x)\nSELECT x,\n  today()\nFROM a", 3, "today"),
    ],
)
def test_a_mistake_has_file_and_line(sql: str, line: int, word: str) -> None:
    said = refused(sql)
    assert said.startswith(f"ads/features.sql:{line}: ")
    assert re.search(word, said) and "\n" not in said and "Candidate functions" not in said


def test_a_fault_in_the_data_has_file_line_and_day() -> None:
    engine = duckdb_session.engine()
    engine.execute("CREATE TABLE events AS SELECT 'x' AS line_id")
    with pytest.raises(StageSqlError) as caught:
        duckdb_session.select(
            engine, Text("SELECT\n line_id::INT FROM events", "f.sql"), {"events"}, {}, "features of 2026-04-03"
        )
    assert str(caught.value).startswith(
        "f.sql:2: features of 2026-04-03: Conversion Error: Could not convert string 'x'"
    )
    assert engine.execute("SELECT count(*) FROM events").fetchall() == [(1,)], "the connection can be used again"


def test_setting_a_setting_is_not_offered_as_the_way_out() -> None:
    assert "SET " not in refused("SELECT 1 // 0")
    assert "SET " not in refused("SELECT (SELECT x FROM unnest([1, 2]) AS t(x))")


@pytest.mark.parametrize(
    ("predicate", "word"),
    [
        ("cost", "must be true or false"), ("cost >", "syntax"), ("true; DROP TABLE features", "syntax"),
        ("count(*) > 0", "must judge each row"), ("nope = 1", "nope"), ("", "must be true or false"),
        ("cost > 0) UNION ALL (SELECT true", "not one expression"), ("true) FROM features WHERE (true", "not one expression"),
        ("EXISTS (FROM sorted_events)", "no table"), ("day < now()", "now"), ("cost > $limit", "limit"),
        ("(SELECT * FROM read_csv('/etc/passwd')) = 1", "read_csv"),
    ],
)  # fmt: skip
def test_a_predicate_that_cannot_be_used_is_named_by_its_key(predicate: str, word: str) -> None:
    rows = pa.table({"line_id": ["a", "b"], "day": [date(2026, 4, 3)] * 2, "cost": [1.0, 2.0]})
    with pytest.raises(StageSqlError, match=word) as caught:
        duckdb_session.meets(Text(predicate, "ads/workflow.yaml", "policy.decide_on"), rows)
    assert str(caught.value).startswith("ads/workflow.yaml: policy.decide_on: ")


def test_a_predicate_chooses_rows_in_their_order_and_null_is_no() -> None:
    rows = pa.table({"x": pa.array([3, None, 1, 2], pa.int64())})
    assert duckdb_session.meets(Text("x > 1 -- enough", "f", "k"), rows, "rows").to_pylist() == [
        True,
        False,
        False,
        True,
    ]
    assert duckdb_session.meets(Text("NULL", "f", "k"), rows).to_pylist() == [False] * 4


def test_every_shipped_statement_and_predicate_binds_on_empty_tables() -> None:
    kinds: dict[str, Any] = {"VARCHAR": pa.string(), "BIGINT": pa.int64(), "DOUBLE": pa.float64(), "BOOLEAN": pa.bool_(),
                             "TIMESTAMP": pa.timestamp("us"), "DATE": pa.date32()}  # fmt: skip
    beside = [("day", pa.date32()), ("source", pa.string()), ("source_file", pa.string()), ("source_file_id", pa.string()),
              ("source_row", pa.int64()), ("superseded_at", pa.timestamp("us"))]  # fmt: skip
    given = {"day": date(2026, 4, 3), "cutoff": datetime(2026, 4, 4, 3), "previous_cutoff": datetime(2026, 4, 3, 3)}
    for workflow in load_all(FOLDER).workflows:
        columns = [(name, kinds[c.type]) for name, c in workflow.contract.events.columns.items()]
        events = pa.schema([*columns, *beside])
        for path in (workflow.features.sql, workflow.outcomes.sql):
            found = duckdb_session.bind(Text(workflow.sql(path), workflow.folder / path), {"events": events}, given)
            assert "entity_id" in found.names
        features = duckdb_session.bind(
            Text(workflow.sql(workflow.features.sql), "features.sql"), {"events": events}, given
        ).append(pa.field("day", pa.date32()))
        for predicate in (workflow.training.train_on, workflow.training.evaluate_on, workflow.policy.decide_on):
            duckdb_session.bind(Text(predicate, "workflow.yaml", "key"), {"features": features})


@pytest.mark.parametrize(
    ("predicate", "word"),
    [("nope > 1", "nope"), ("cost", "true or false"), ("cost > 1; DROP TABLE raw", "syntax"), ("known_at < now()", "now"),
     ("line_id IN (SELECT line_id FROM raw)", "no table 'raw'")],
)  # fmt: skip
def test_a_row_rule_that_cannot_be_used_is_named_by_its_place_in_the_contract(predicate: str, word: str) -> None:
    promised = load(FOLDER / "ad_budget").contract.events
    rules = promised.model_copy(update={"rows": (promised.rows[0], RowRule(name="wrong", breaks_when=predicate))})
    with pytest.raises(FileRefused, match=word) as caught:
        row_rules._rules(row_rules.event_columns(rules), [], rules)
    assert str(caught.value).startswith("contract.yaml: events.rows[1].breaks_when: ")
