"""Landing row rules: a source's SQL maps the rows of a file, the contract judges each.

Belongs here: typing, the rules in their order, duplicates. Does not: where rows are kept (``pipeline.ingest.manifest``).

A row is quarantined when it breaks a rule. Rules are tried in this order and the first broken one names the row:
``malformed``; then column by column of the contract ``type``, then likewise ``required``, ``not_finite``,
``below_min``, ``above_max``, ``not_allowed`` (each ``<rule>:<column>``); ``from_the_future``; the contract's named rows
in their order; ``duplicate`` last, so that only a row that stands can push out a later one. ``told_later`` is no fault of a
row: another of its file says the same thing as upstream told it later, and the landing has made their moments equal.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import duckdb
import pyarrow as pa

from common import duckdb_session
from pipeline.ingest.files import FileRefused
from pipeline.ingest.readers import Raw, some

if TYPE_CHECKING:
    from pipeline.workflow import Column, EventsContract, Source, Workflow

_INTEGER = r"\s*[+-]?[0-9]+(\.0*)?\s*"
_FLOAT = r"\s*[+-]?[0-9]*(\.[0-9]+([eE][+-]?[0-9]+)?|[eE][+-]?[0-9]+)\s*"
_NUMBER = r"\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\s*|\s*[+-]?(?i:nan|inf|infinity)\s*"

QUARANTINE = pa.schema(
    [("source", pa.string()), ("source_file", pa.string()), ("source_file_id", pa.string()), ("source_row", pa.int64())]
    + [(name, pa.string()) for name in ("rule", "detail", "raw")]
    + [("landed_at", pa.timestamp("us")), ("landed_day", pa.date32()), ("day", pa.date32())]
    + [("weight", pa.float64()), ("event", pa.string()), ("superseded_at", pa.timestamp("us"))]
)


def name_sql(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def text_sql(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _typed(name: str, wanted: str, found: str) -> str:
    """SQL of a column cast to its type without loss, NULL where it does not cast.

    DuckDB alone would round 1.5 to a BIGINT, read 1_000 as a number, drop a time's offset and read 1-2-16 as a day of
    the year 1; times outside 1900 to 2200 do not count as times.
    """
    x, text = name_sql(name), found == "VARCHAR"
    if wanted == "VARCHAR":
        return f"CAST({x} AS VARCHAR)"
    value = x if found == wanted else f"TRY_CAST({x} AS {wanted})"
    if text and wanted in ("BIGINT", "DOUBLE"):
        shape = _INTEGER if wanted == "BIGINT" else _NUMBER
        value = f"CASE WHEN regexp_full_match({x}, {text_sql(shape)}) THEN TRY_CAST(trim({x}) AS {wanted}) END"
    elif text and wanted in ("TIMESTAMP", "DATE"):
        moment = f"CAST(TRY_CAST({x} AS TIMESTAMPTZ) AS TIMESTAMP)"
        whole = f"CAST({moment} AS DATE)"
        value = moment if wanted == "TIMESTAMP" else f"CASE WHEN {whole} = {moment} THEN {whole} END"
    elif found != wanted and not text:
        value = f"CASE WHEN TRY_CAST({value} AS {found}) = {x} THEN {value} END"
    if wanted in ("TIMESTAMP", "DATE"):
        value = f"CASE WHEN {value} >= DATE '1900-01-01' AND {value} < DATE '2200-01-01' THEN {value} END"
    return value


def _verdict(rule: str, detail: str) -> str:
    return f"{{'rule': {text_sql(rule)}, 'detail': {detail}}}"


def _value(name: str) -> str:
    """SQL that shows a column and its value."""
    return f"{text_sql(name + ' = ')} || coalesce(left(CAST({name_sql(name)} AS VARCHAR), 100), 'NULL')"


def _literal(value: str | int | float | bool, kind: str) -> str:
    return f"CAST({text_sql(str(value).lower() if isinstance(value, bool) else str(value))} AS {kind})"


def _rules(
    columns: Mapping[str, Column], required: Sequence[str], contract: EventsContract
) -> list[tuple[str, str, str]]:
    """(rule, SQL predicate that breaks it, SQL of the detail) over the typed columns, in the order of trial."""
    rules = [(f"required:{c}", f"{name_sql(c)} IS NULL", text_sql(f"{c} is NULL")) for c in required]
    for name, column in columns.items():
        if column.type == "DOUBLE":
            rules.append((f"not_finite:{name}", f"NOT isfinite({name_sql(name)})", _value(name)))
    for name, column in columns.items():
        if column.min is not None:
            low = f"{_value(name)} || {text_sql(f' is below {column.min:g}')}"
            rules.append((f"below_min:{name}", f"{name_sql(name)} < {_literal(column.min, 'DOUBLE')}", low))
    for name, column in columns.items():
        if column.max is not None:
            high = f"{_value(name)} || {text_sql(f' is above {column.max:g}')}"
            rules.append((f"above_max:{name}", f"{name_sql(name)} > {_literal(column.max, 'DOUBLE')}", high))
    for name, column in columns.items():
        if column.allowed is not None:
            options = ", ".join(_literal(v, column.type) for v in column.allowed)
            other = f"{_value(name)} || ' is not allowed'"
            rules.append((f"not_allowed:{name}", f"{name_sql(name)} NOT IN ({options})", other))
    times = f"{_value('event_at')} || ' is later than ' || {_value('known_at')}"
    rules.append(("from_the_future", '"event_at" > "known_at"', times))
    for at, rule in enumerate(contract.rows):
        _usable(
            rule.breaks_when, f"events.rows[{at}].breaks_when", tuple((c, spec.type) for c, spec in columns.items())
        )
        named = [c for c in columns if re.search(rf"\b{re.escape(c)}\b", rule.breaks_when, re.IGNORECASE)]
        shown = " || ', ' || ".join(_value(c) for c in named) or "''"
        rules.append((rule.name, f"({rule.breaks_when})", f"{text_sql(rule.breaks_when + ': ')} || {shown}"))
    return rules


_ARROW = {"VARCHAR": pa.string(), "BIGINT": pa.int64(), "DOUBLE": pa.float64(), "BOOLEAN": pa.bool_(),
          "TIMESTAMP": pa.timestamp("us"), "DATE": pa.date32()}  # fmt: skip


@lru_cache(maxsize=256)
def _usable(predicate: str, key: str, columns: tuple[tuple[str, str], ...]) -> None:
    """Raise FileRefused, with contract.yaml and the key, unless a row rule is a predicate over the typed columns."""
    row = pa.schema([(name, _ARROW[kind]) for name, kind in columns])
    try:
        duckdb_session.bind(duckdb_session.Text(predicate, "contract.yaml", key), {"row": row})
    except duckdb_session.StageSqlError as error:
        raise FileRefused(str(error)) from error


@dataclass(frozen=True)
class Judged:
    """The rows of one file: accepted ones as events, the others as quarantine."""

    events: pa.Table
    quarantine: pa.Table


@dataclass(frozen=True)
class Landing:
    """Where rows come from and when they landed; ``restated`` when they replace an earlier content of the path.

    ``day`` is the day that the file's name stands for, if any.
    """

    source: str
    path: str
    file_id: str
    landed_at: datetime
    restated: bool = False
    day: date | None = None


def event_columns(contract: EventsContract) -> dict[str, Column]:
    """The contract's columns, and the two times that every event has."""
    from pipeline.workflow import Column

    moment = Column(type="TIMESTAMP", required=True)
    return {**contract.columns, **{c: moment for c in ("event_at", "known_at") if c not in contract.columns}}


def event_json(columns: Sequence[str], values: Mapping[str, str] | None = None) -> str:
    """SQL of a row's events columns as one JSON text; ``values`` is the SQL of those that are no plain column."""
    fields = ", ".join(f"{text_sql(c)}: {(values or {}).get(c, name_sql(c))}" for c in columns)
    return f"CAST(to_json({{{fields}}}) AS VARCHAR)"


def from_json(text: str, columns: Mapping[str, Column]) -> str:
    """SQL of the struct that ``event_json`` wrote, typed; NULL where it was written for other columns."""
    shape = json.dumps({name: column.type for name, column in columns.items()})
    same = f"list_sort(json_keys({text})) = {_list(sorted(columns))}"
    return f"CASE WHEN {same} THEN from_json({text}, {text_sql(shape)}) END"


def _list(texts: Sequence[str]) -> str:
    return f"[{', '.join(text_sql(t) for t in texts)}]"


def _weight(contract: EventsContract) -> str:
    """SQL of a row's weight: NULL where its column holds nothing, or nothing that the contract would take."""
    if contract.weight is None:
        return "CAST(NULL AS DOUBLE)"
    value, spec = f"CAST(j.{name_sql(contract.weight)} AS DOUBLE)", contract.columns[contract.weight]
    bounds = [f"isfinite({value})", f"{value} >= {_literal(max(0.0, spec.min or 0.0), 'DOUBLE')}"]
    bounds += [f"{value} <= {_literal(spec.max, 'DOUBLE')}"] if spec.max is not None else []
    return f"CASE WHEN {' AND '.join(bounds)} THEN {value} END"


def open_engine() -> duckdb.DuckDBPyConnection:
    """A database in memory that reads nothing but what it is handed, with the macro that every mapping may use."""
    con = duckdb_session.engine()
    # what does not parse stays visible with the format it missed, and never casts by accident
    con.execute(
        "CREATE MACRO parse_time(text, format) AS "
        "coalesce(strftime(try_strptime(text, format), '%Y-%m-%d %H:%M:%S.%f'), text || ' (not ' || format || ')')"
    )
    return con


def session(engine: duckdb.DuckDBPyConnection) -> duckdb.DuckDBPyConnection:
    """A connection with temporary tables of its own: opening one costs microseconds, an engine tens of milliseconds."""
    return engine.cursor()


def judge(
    raw: Raw,
    workflow: Workflow,
    source: Source,
    landing: Landing,
    keys: Callable[[Sequence[date]], pa.Table],
    engine: duckdb.DuckDBPyConnection | None = None,
) -> Judged:
    """Map a file's rows with the source's SQL and hold each against the contract.

    ``keys(days)`` gives the contract's unique columns of the rows of other files with ``source_file``, ``source_row`` and
    ``superseded_at``: a row is a duplicate of a live one, and is known from the end of those that left.

    Raises FileRefused when the SQL fails, or does not yield each row of ``raw`` exactly once.
    """
    trial = _Trial.of(raw, workflow, source, landing, session(engine or open_engine()))
    types = _map(trial)
    _cast(trial, types)
    _try_rules(trial, keys)
    events, rejected = _events(trial), _rejected(trial)
    trial.con.close()
    if events.num_rows + rejected.num_rows != raw.rows:
        raise FileRefused(
            f"{landing.path}: {raw.rows} rows in the file, but {events.num_rows} accepted and "
            f"{rejected.num_rows} quarantined; this is a fault of the program, and nothing of the file has landed"
        )
    constants: dict[str, Any] = {
        "source": landing.source,
        "source_file": landing.path,
        "source_file_id": landing.file_id,
        "landed_at": landing.landed_at,
        "landed_day": landing.landed_at.date(),
        "superseded_at": None,
    }
    quarantine = [
        pa.repeat(pa.scalar(constants[f.name], f.type), rejected.num_rows) if f.name in constants else rejected[f.name]
        for f in QUARANTINE
    ]
    return Judged(events, pa.table(quarantine, schema=QUARANTINE))


@dataclass(frozen=True)
class _Trial:
    """A file in the engine. Each step leaves a table for the next one: #file, #mapped, #typed, #judged."""

    raw: Raw
    source: Source
    landing: Landing
    contract: EventsContract
    columns: Mapping[str, Column]
    mapping: duckdb_session.Text
    con: duckdb.DuckDBPyConnection

    @classmethod
    def of(
        cls, raw: Raw, workflow: Workflow, source: Source, landing: Landing, con: duckdb.DuckDBPyConnection
    ) -> _Trial:
        contract = workflow.contract.events
        mapping = duckdb_session.Text(workflow.sql(source.sql), source.sql)
        return cls(raw, source, landing, contract, event_columns(contract), mapping, con)

    @property
    def place(self) -> str:
        return f"{self.landing.path}: {self.source.sql}"

    @property
    def names(self) -> list[str]:
        """The file's own columns."""
        return [c for c in self.raw.table.column_names if c != "source_row"]

    @property
    def supplied(self) -> set[str]:
        """Columns that the landing fills, and the SQL does not."""
        return {"known_at"} if self.source.known_at == "landing" else set[str]()

    @property
    def known_at(self) -> str:
        return f"TIMESTAMP '{self.landing.landed_at.isoformat(sep=' ')}'"

    def run(self, sql: str, what: str | None = None) -> duckdb.DuckDBPyConnection:
        try:
            return self.con.execute(sql)
        except duckdb.Error as error:
            if self.mapping.sql in sql:
                explained = duckdb_session.explained(self.mapping, error, before=1)
                raise FileRefused(f"{self.landing.path}: {explained}") from error
            raise FileRefused(f"{what or self.place}: {str(error).splitlines()[0]}") from error

    def table(self, sql: str) -> pa.Table:
        self.run(f'CREATE OR REPLACE TEMP TABLE "#out" AS {sql}')
        return self.con.sql('FROM "#out"').to_arrow_table()


def _map(trial: _Trial) -> dict[str, str]:
    """Run the source's SQL over the file; the types of its columns, which are those of the contract, row for row."""
    raw, source, columns, place = trial.raw, trial.source, trial.columns, trial.place
    try:
        trial.con.register("#file", raw.table)
    except duckdb.Error as error:
        raise FileRefused(
            f"{trial.landing.path}: a column's type cannot be read: {str(error).splitlines()[0]}"
        ) from error
    nulls = ", ".join(text_sql(text) for text in source.null)
    native = source.format == "parquet" or not nulls
    shown = [
        name_sql(n) if native else f"CASE WHEN {name_sql(n)} NOT IN ({nulls}) THEN {name_sql(n)} END AS {name_sql(n)}"
        for n in trial.names
    ]
    trial.run(f'CREATE TEMP VIEW raw AS SELECT {", ".join([*shown, "source_row"])} FROM "#file"')
    try:
        duckdb_session.check(trial.mapping, {"raw"})
    except duckdb_session.StageSqlError as error:
        raise FileRefused(f"{trial.landing.path}: {error}") from error
    trial.run(f'CREATE TEMP TABLE "#mapped" AS\n{trial.mapping.sql}')
    types = {row[0]: row[1] for row in trial.run('DESCRIBE "#mapped"').fetchall()}
    lacking = [c for c in ["source_row", *columns] if c not in types and c not in trial.supplied]
    beyond = [c for c in types if (c not in columns and c != "source_row") or c in trial.supplied]
    if lacking:
        raise FileRefused(f"{place}: yields no column {some(lacking)}, which the contract needs")
    if beyond:
        known = ", and known_at comes with the landing" if trial.supplied else ""
        raise FileRefused(f"{place}: yields column {some(beyond)}; contract.yaml does not name it{known}")
    kept = trial.run(
        "SELECT count(*), count(DISTINCT m.source_row), count(r.source_row) "
        'FROM "#mapped" m LEFT JOIN "#file" r USING (source_row)'
    ).fetchall()[0]
    if set(kept) != {raw.table.num_rows}:
        raise FileRefused(
            f"{place}: must yield each of the {raw.table.num_rows} rows of raw once with its source_row, yields "
            f"{kept[0]} rows; take out WHERE, DISTINCT, GROUP BY and joins that drop or repeat rows"
        )
    return types


def _cast(trial: _Trial, types: Mapping[str, str]) -> None:
    """Cast each column to its type, and mark the rows in which one does not cast."""
    columns, place, run, supplied = trial.columns, trial.place, trial.run, trial.supplied
    texts = [c for c, spec in columns.items() if spec.type == "VARCHAR"]
    floating = [c for c in texts if re.fullmatch(r"FLOAT|DOUBLE|DECIMAL\(\d+,(?!0\))\d+\)", types[c])]
    if floating:
        raise FileRefused(
            f"{place}: column {some(floating)} comes as {types[floating[0]]}, and contract.yaml calls it VARCHAR: a name "
            "kept as a number with a fraction reads 12345.0 or has lost digits; send text or whole numbers, or cast it in "
            f"the SQL: CAST(CAST({floating[0]} AS BIGINT) AS VARCHAR)"
        )
    written = _written_as_floats(run, [c for c in texts if types[c] == "VARCHAR"], sorted(trial.raw.floats))

    typed = {c: trial.known_at if c in supplied else _typed(c, spec.type, types[c]) for c, spec in columns.items()}
    misfits = "".join(
        f" WHEN {name_sql(c)} IS NOT NULL AND ({typed[c]}) IS NULL THEN "
        + _verdict(f"type:{c}", f"{_value(c)} || {text_sql(f' is not a {columns[c].type}')}")
        for c in columns
        if c not in supplied and columns[c].type != "VARCHAR"
    ) + "".join(
        f" WHEN regexp_full_match({name_sql(c)}, {text_sql(_FLOAT)}) THEN "
        + _verdict(
            f"type:{c}", f"{_value(c)} || ' is a number with a fraction or exponent, not a VARCHAR; send it as text'"
        )
        for c in written
    )
    misfit = f"CASE{misfits} END" if misfits else "NULL"
    run(
        f'CREATE TEMP TABLE "#typed" AS SELECT CAST(source_row AS BIGINT) AS source_row, '
        f'{", ".join(f"{sql} AS {name_sql(c)}" for c, sql in typed.items())}, {misfit} AS "#misfit" FROM "#mapped"'
    )


def _try_rules(trial: _Trial, keys: Callable[[Sequence[date]], pa.Table]) -> None:
    """Mark the rows that break a rule of the contract, and those that double another."""
    columns, contract, landing, run = trial.columns, trial.contract, trial.landing, trial.run
    required = [c for c, spec in columns.items() if spec.required or c in ("event_at", "known_at")]
    rules = _rules(columns, required, contract)
    tests = "".join(f" WHEN {test} THEN {_verdict(rule, detail)}" for rule, test, detail in rules)
    run(
        f'CREATE TEMP TABLE "#judged" AS SELECT *, known_at AS "#told", coalesce("#misfit", CASE{tests} END) AS "#broken" '
        'FROM "#typed"',
        f"{landing.path}: a rule of the contract",
    )
    if landing.restated:
        # a restated row cannot have been known before it landed: until then the earlier content of the path stands
        run(f'UPDATE "#judged" SET known_at = greatest(known_at, {trial.known_at})')
    if contract.unique:
        _mark_duplicates(trial, keys)


def _events(trial: _Trial) -> pa.Table:
    """The accepted rows."""
    landing = trial.landing
    return trial.table(
        f"SELECT {', '.join(name_sql(c) for c in trial.columns)}, "
        f"CAST(event_at AS DATE) AS day, {text_sql(landing.source)} AS source, {text_sql(landing.path)} AS source_file, "
        f"{text_sql(landing.file_id)} AS source_file_id, source_row, CAST(NULL AS TIMESTAMP) AS superseded_at "
        'FROM "#judged" WHERE "#broken" IS NULL ORDER BY source_row'
    )


def _rejected(trial: _Trial) -> pa.Table:
    """The rows that broke a rule, and those that were no rows at all, with why."""
    raw, columns, contract, landing = trial.raw, trial.columns, trial.contract, trial.landing
    fields = ", ".join(f"{text_sql(n)}: CAST(f.{name_sql(n)} AS VARCHAR)" for n in trial.names)
    # a file of a day comes on the next one; a time that cannot be is no day that anybody would look at
    day = landing.day or landing.landed_at.date() - timedelta(days=1)
    shown_as = {c: f"j.{name_sql(c)}" for c in columns}
    broken = trial.table(
        'SELECT j.source_row, j."#broken".rule AS rule, j."#broken".detail AS detail, '
        f"CAST(to_json({{{fields}}}) AS VARCHAR) AS raw, "
        f"coalesce(CASE WHEN j.\"#broken\".rule <> 'from_the_future' THEN CAST(j.event_at AS DATE) END, DATE '{day}') AS day, "
        f"{_weight(contract)} AS weight, "
        f"CASE WHEN j.\"#broken\".rule = 'duplicate' THEN {event_json(list(columns), shown_as)} END AS event "
        'FROM "#judged" j JOIN "#file" f USING (source_row) '
        'WHERE j."#broken" IS NOT NULL ORDER BY 1'
    )
    malformed = pa.table(
        {
            "source_row": pa.array([m[0] for m in raw.malformed], pa.int64()),
            "rule": pa.array(["malformed"] * len(raw.malformed), pa.string()),
            "detail": pa.array([m[2] for m in raw.malformed], pa.string()),
            "raw": pa.array([json.dumps({"line": m[1]}, ensure_ascii=False) for m in raw.malformed], pa.string()),
            "day": pa.array([day] * len(raw.malformed), pa.date32()),
            "weight": pa.nulls(len(raw.malformed), pa.float64()),
            "event": pa.nulls(len(raw.malformed), pa.string()),
        }
    )
    return pa.concat_tables([broken.cast(malformed.schema), malformed]).sort_by("source_row")


def _written_as_floats(
    run: Callable[..., duckdb.DuckDBPyConnection], texts: Sequence[str], floats: Sequence[str]
) -> list[str]:
    """Text columns of the contract that are a column of the file in which numbers stand with a fraction or exponent.

    A column is taken for one of the file's where it has its text in every row in which that is such a number.
    """
    pairs = [(c, f) for c in texts for f in floats]
    if not pairs:
        return []
    same = ", ".join(
        f"coalesce(bool_and(m.{name_sql(c)} IS NOT DISTINCT FROM f.{name_sql(f)}) "
        f"FILTER (regexp_full_match(f.{name_sql(f)}, {text_sql(_FLOAT)})), false)"
        for c, f in pairs
    )
    (found,) = run(f'SELECT {same} FROM "#mapped" m JOIN "#file" f USING (source_row)').fetchall()
    return list(dict.fromkeys(c for (c, _), yes in zip(pairs, found, strict=True) if yes))


def _mark_duplicates(trial: _Trial, keys: Callable[[Sequence[date]], pa.Table]) -> None:
    """Mark rows that share the unique columns with an earlier row of the file that stands, or a live row of another.

    Where the row of another file has left, this one is known from then on at the earliest: no point in time sees both.
    """
    run, unique, path = trial.run, trial.contract.unique, trial.landing.path
    span = 'SELECT min(event_at), max(event_at) FROM "#judged" WHERE "#broken" IS NULL HAVING count(*) > 0'
    found = run(span).fetchall()
    if not found:
        return
    first, last = found[0]
    days = [first.date() + timedelta(days=n) for n in range((last.date() - first.date()).days + 1)]
    known = keys(days)
    trial.con.register("#known", known)
    key = ", ".join(name_sql(c) for c in unique)
    shared = same_key(unique)
    what = f"{path}: unique of the contract"
    if known["superseded_at"].null_count < known.num_rows:
        # before the key is compared, which may hold known_at
        follow_ends(lambda sql: run(sql, what), unique, '(SELECT * FROM "#judged" WHERE "#broken" IS NULL)')
        run(
            'UPDATE "#judged" AS s SET known_at = greatest(s.known_at, k."#end") FROM "#ended" k '
            f'WHERE s."#broken" IS NULL AND {shared}',
            what,
        )
    # of rows that the landing made equal, what upstream told last stands
    order = '"#told" DESC, source_row' if "known_at" in unique else "source_row"
    run(
        'CREATE TEMP TABLE "#first" AS WITH s AS '
        f'(SELECT source_row, {key}, first_value(source_row) OVER (PARTITION BY {key} ORDER BY {order}) AS "#first" '
        'FROM "#judged" WHERE "#broken" IS NULL), k AS '
        f"(SELECT {key}, min({{'file': source_file, 'row': source_row}}) AS \"#place\" FROM \"#known\" "
        "WHERE superseded_at IS NULL GROUP BY ALL) "
        f'SELECT s.source_row, s."#first", '
        f'coalesce(k."#place", {{\'file\': {text_sql(path)}, \'row\': s."#first"}}) AS "#place" '
        f'FROM s LEFT JOIN k ON {shared} WHERE k."#place" IS NOT NULL OR s.source_row <> s."#first"',
        what,
    )
    # looked for among those alone that do not stand: they are few
    once = 'row_number() OVER (PARTITION BY f."#first", j."#told" ORDER BY f.source_row) = 1'
    again = f'j."#told" < h."#told" AND {once}' if "known_at" in unique else "false"
    said = " || ', ' || ".join(_value(c) for c in unique)
    run(
        f'CREATE TEMP TABLE "#out_of" AS SELECT f.source_row, f."#first", f."#place", {again} AS "#again" FROM "#first" f '
        'JOIN "#judged" j ON j.source_row = f.source_row JOIN "#judged" h ON h.source_row = f."#first"'
    )
    run(
        'UPDATE "#judged" SET "#broken" = CASE WHEN f."#again" '
        f"THEN {{'rule': 'told_later', 'detail': {said} || ' was told later in row ' || f.\"#first\" || {text_sql(f' of {path}')}}} "
        f"ELSE {{'rule': 'duplicate', 'detail': {said} || ' stands already in row ' || f.\"#place\".row || ' of ' || "
        'f."#place".file} END FROM "#out_of" f WHERE "#judged".source_row = f.source_row'
    )


def same_key(columns: Sequence[str]) -> str:
    """SQL that a row ``k`` has these columns of a row ``s``."""
    return " AND ".join(f"k.{name_sql(c)} IS NOT DISTINCT FROM s.{name_sql(c)}" for c in columns) or "true"


def follow_ends(
    run: Callable[[str], duckdb.DuckDBPyConnection], unique: Sequence[str], rows: str, known: str = '"#known"'
) -> None:
    """Make the table ``#ended``: the unique columns of the rows of ``known`` that have left, and the end of each.

    Of those alone that may matter to ``rows``. Where the unique columns hold known_at, a row that is known from an end may
    meet one there that has left as well: the end of the last of such a chain counts.
    """
    key, rest = ", ".join(name_sql(c) for c in unique), [c for c in unique if c != "known_at"]
    run(
        f'CREATE OR REPLACE TEMP TABLE "#ended" AS SELECT {key}, max(superseded_at) AS "#end" FROM {known} s '
        f"SEMI JOIN {rows} k ON {same_key(rest)} WHERE superseded_at IS NOT NULL GROUP BY ALL"
    )
    if len(rest) == len(unique):
        return
    run('DELETE FROM "#ended" WHERE "#end" <= known_at')
    # each turn doubles the length of the chains that are followed
    follow = 'UPDATE "#ended" AS s SET "#end" = k."#end" FROM "#ended" k WHERE k.known_at = s."#end"'
    while run(f"{follow} AND {same_key(rest)}").fetchall()[0][0]:
        pass
