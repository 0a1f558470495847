"""The docs say what the code does: names, fields, variables, links and examples are held against it.

``.venv/bin/python tests/test_docs.py`` rewrites the tables between ``<!-- generated: … -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import types
import typing
from collections.abc import Iterator
from datetime import date, datetime, time, timedelta
from pathlib import Path
from typing import Any, Literal

import annotated_types
import numpy as np
import pytest
import typer
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

ROOT = Path(__file__).parent.parent
TOP = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG", "SECURITY")]
DOCS = [*TOP, ROOT / "mlflow" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ROOMS = ("orchestration", "assets", "pipeline", "models", "data_checks", "delivery", "common", "benchmarks")
GENERATED = re.compile(r"<!-- generated: (?P<what>[^>]+?) -->\n(?P<table>.*?)<!-- end -->", re.S)
NAMED_COLUMNS = re.compile(r"<!-- columns: (?P<what>\w+) -->\n\n?(?P<table>(?:\|.*\n)+)")
EXAMPLE = re.compile(
    r"^`workflows/(?P<file>(?P<workflow>claim_order|claims_table)/[\w./]+)`[^\n]*\n\n```\w+\n(?P<text>.*?)^```",
    re.M | re.S,
)
SNIPPET = re.compile(r"<!-- example: (?P<name>\w+) -->\n\n```\w+\n(?P<text>.*?)^```", re.M | re.S)
by_name = pytest.mark.parametrize("page", DOCS, ids=lambda p: str(p.relative_to(ROOT)))


# --- what the generated tables hold -----------------------------------------------------------------------------------


def _takes(kind: Any) -> str:
    """A type as a person reads it."""
    while typing.get_origin(kind) is typing.Annotated:
        kind = typing.get_args(kind)[0]
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return ", ".join(f"`{v}`" for v in inside)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if a is type(None) else _takes(a) for a in inside)
    if origin is tuple:
        one = _takes(inside[0])
        return (
            f"list of {f'({one})' if ' or ' in one else one}"
            if inside[-1] is Ellipsis
            else " and ".join(_takes(a) for a in inside)
        )
    if origin is dict:
        return f"{_takes(inside[0])} → {_takes(inside[1])}"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return f"`{kind.__name__}`"
    names = {str: "text", int: "whole number", float: "number", bool: "true or false", date: "date", time: "time"}
    return names.get(kind, getattr(kind, "__name__", str(kind)))


def _bounds(field: FieldInfo) -> str:
    signs = {
        annotated_types.Gt: ("gt", ">"),
        annotated_types.Ge: ("ge", "≥"),
        annotated_types.Lt: ("lt", "<"),
        annotated_types.Le: ("le", "≤"),
    }
    found = [
        f"{sign} {getattr(m, name):g}"
        for m in field.metadata
        for kind, (name, sign) in signs.items()
        if isinstance(m, kind)
    ]
    return f" ({', '.join(found)})" if found else ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "as below"
    if isinstance(value, str):
        return f"`{value}`"
    return f"`{value:%H:%M}`" if isinstance(value, time) else f"`{json.dumps(value)}`"


def fields(where: str) -> list[list[str]]:
    module, name = where.split(":")
    model = getattr(importlib.import_module(module), name)
    hidden = {"contract", "folder"} if name == "Workflow" else set()
    rows = [["field", "takes", "default", "meaning"]]
    for key, field in model.model_fields.items():
        if key not in hidden:
            parts = typing.get_args(field.annotation) or (field.annotation,)
            section = next((p for p in parts if isinstance(p, type) and issubclass(p, BaseModel)), None)
            meaning = field.description or " ".join((getattr(section, "__doc__", "") or "").split("\n\n")[0].split())
            meaning = meaning.replace("<", "&lt;") or ("Names this kind" if key == "kind" else "–")
            rows.append([f"`{key}`", _takes(field.annotation) + _bounds(field), _default(field), meaning])
    return rows


def unattended(_: str) -> list[list[str]]:
    from orchestration import automation
    from pipeline.workflow import FOLDER, load

    workflow = load(FOLDER / "ad_budget")
    rows = [["name", "starts the job", "when"]]
    for one in automation.unattended([workflow]):
        when = one.when.replace(f"{workflow.deadline:%H:%M} UTC", "the workflow's `deadline`")
        rows.append(
            [
                f"`{one.name}`".replace("ad_budget", "<workflow>"),
                f"`{one.starts}`".replace("ad_budget", "<workflow>"),
                when,
            ]
        )
    return rows


def jobs(_: str) -> list[list[str]]:
    from orchestration import jobs as wiring
    from pipeline.workflow import FOLDER, load

    stages = {
        "daily": (*wiring.DAILY, *wiring.REVIEW, *wiring.GUARD), "prepare": wiring.PREPARE, "decide": wiring.DECIDE,
        "retrain": wiring.RETRAIN, "deliver": wiring.DELIVER, "rollback": ("–",), "reconcile": ("–",),
    }  # fmt: skip
    rows = [["job", "assets, in order", "for"]]
    for job in wiring.jobs_of(load(FOLDER / "ad_budget")):
        name = job.name.removeprefix("ad_budget_")
        rows.append([f"`<workflow>_{name}`", ", ".join(stages[name]), str(job.description)])
    return rows


def stages(_: str) -> list[list[str]]:
    from orchestration.jobs import assets_of
    from pipeline.workflow import FOLDER, load

    rows = [["asset", "made from", "its checks (**blocking** ones stop what comes after)"]]
    for asset in assets_of(load(FOLDER / "ad_budget")):
        needs = sorted(k.path[-1] for k in asset.dependency_keys)
        checks = [f"**{c.name}**" if c.blocking else c.name for c in asset.check_specs]
        rows.append([f"`{asset.key.path[-1]}`", ", ".join(needs) or "the landing zone", ", ".join(checks) or "–"])
    return rows


def reserved(_: str) -> list[list[str]]:
    from pipeline.workflow import ENGINE_COLUMNS

    where = {"events": "a column of contract.yaml", "features": "features.sql", "outcomes": "outcomes.sql"}
    rows = [["in", "the engine's own"]]
    return rows + [
        [f"{where[table]} ({table})", ", ".join(f"`{n}`" for n in names)] for table, names in ENGINE_COLUMNS.items()
    ]


MAKERS = {"reserved": reserved, "fields": fields, "unattended": unattended, "jobs": jobs, "stages": stages}


def made(what: str) -> str:
    """The Markdown of a generated table."""
    maker, _, argument = what.partition(" ")
    rows = [[cell.replace("|", "\\|") for cell in row] for row in MAKERS[maker](argument)]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:], ""])


def first_column(table: str) -> list[str]:
    """Names in the first cells of a table; a cell may hold several."""
    return [name for line in table.splitlines()[2:] for name in re.findall(r"`([^`]+)`", line.split("|")[1])]


# --- the tests --------------------------------------------------------------------------------------------------------


@by_name
def test_generated_tables_are_what_the_code_says(page: Path) -> None:
    for found in GENERATED.finditer(page.read_text()):
        assert found["table"] == made(found["what"]), f"{page.name}: run .venv/bin/python tests/test_docs.py"


def test_every_section_of_a_workflow_has_its_fields_in_the_docs() -> None:
    shown = {
        f["what"].split(":")[1]
        for p in DOCS
        for f in GENERATED.finditer(p.read_text())
        if f["what"].startswith("fields")
    }
    wanted = {
        "Workflow", "Source", "Features", "Outcomes", "Training", "DurationModel", "ResponseModel", "PriorityPolicy", "BudgetPolicy",
        "Arms", "Explore", "GateSpec", "Search", "EarlyStopping", "Distill", "Retraining", "Promotion", "Regression", "Replay", "Metric",
        "Guardrails", "DriftSpec", "EventsContract", "Column", "RowRule", "FeaturesContract", "ExpectationSpec",
        "Delivery", "Approval", "PushSettings", "Guards", "GoogleAdsSettings", "HelpdeskSettings", "RestSettings",
        "SqlTableSettings", "Version", "Closed", "FileDropSettings",
    }  # fmt: skip
    assert shown == wanted


def schemas() -> dict[str, list[str]]:
    from pipeline import dispatch, ingest
    from pipeline.decisions import tables

    named = re.compile(r'(?:table\("|f"\{(?:workflow\.)?name\}/)([a-z_]+)"')
    written = {
        n for room in ("assets", "pipeline") for f in (ROOT / room).rglob("*.py") for n in named.findall(f.read_text())
    }
    return {
        "decisions": [*tables.DECISIONS.names, "decision_id", "batch_id", "day", *tables.RECORD.names],
        "batches": tables.BATCHES.names,
        "decision_outcomes": [*dispatch._DECIDED.names, "known_at", "day"],
        "quarantine": ingest.QUARANTINE.names,
        "files": ingest.FILES.names,
        "tables": sorted(written),
    }


@by_name
def test_tables_of_columns_name_every_column_and_no_other(page: Path) -> None:
    for found in NAMED_COLUMNS.finditer(page.read_text()):
        assert sorted(first_column(found["table"])) == sorted(schemas()[found["what"]]), f"{page.name}: {found['what']}"


def test_every_environment_variable_is_documented_and_no_other() -> None:
    kinds = {".py", ".yaml", ".ini", ".md"}
    files = [f for room in (*ROOMS, "mlflow") for f in (ROOT / room).rglob("*") if f.suffix in kinds] + [
        ROOT / "Makefile"
    ]
    texts = [f.read_text() for f in files]
    used = {n for t in texts for n in re.findall(r"SIGNALBOX_[A-Z]+(?:_[A-Z]+)*", t)}
    used |= {f"SIGNALBOX_{n}" for t in texts for n in re.findall(r'\bsetting\("([A-Z_]+)"', t)}
    page = (ROOT / "docs" / "data_engineer.md").read_text()
    documented = set(re.findall(r"^\| `(SIGNALBOX_[A-Z_]+)`", page, re.M))
    assert documented == used


def names(page: Path) -> Iterator[str]:
    """What stands in code: spans and blocks."""
    text = page.read_text()
    yield from re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
    yield from (
        line for block in re.findall(r"^```(?:bash|sh)?\n(.*?)^```", text, re.M | re.S) for line in block.splitlines()
    )
    yield from (line.strip() for line in re.findall(r"^    (\S.*)$", text, re.M))


@by_name
def test_every_path_that_is_named_exists(page: Path) -> None:
    pattern = rf"(?<![\w./-])(?:{'|'.join((*ROOMS, 'mlflow', 'tests', 'docs'))})/[\w./-]*"
    named = {p.rstrip("./") for name in names(page) for p in re.findall(pattern, name)}
    example = {f"workflows/{part}" for f in EXAMPLE.finditer(page.read_text()) for part in (f["file"], f["workflow"])}
    gone = [p for p in named - example if not (ROOT / p).exists() and not list(ROOT.glob(p + "*"))]
    assert not gone, f"{page.name} names {gone}"


@by_name
def test_every_test_that_is_named_exists(page: Path) -> None:
    for file, test in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page.read_text()):
        assert f"def {test}(" in (ROOT / file).read_text(), f"{page.name}: {file}::{test}"


@by_name
def test_relative_links_lead_somewhere(page: Path) -> None:
    for target, place in re.findall(r"\]\((?!https?:|mailto:)([^)#\s]*)(?:#([^)\s]*))?\)", page.read_text()):
        led_to = page.parent / target if target else page
        assert led_to.exists(), f"{page.name}: {target}"
        if place:
            headings = re.findall(r"^#+ (.*)$", led_to.read_text(), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
            assert place in slugs, f"{page.name}: {target} has no heading {place!r}"


@by_name
def test_every_command_and_option_that_is_named_exists(page: Path) -> None:
    from orchestration.cli.command import app

    group: Any = typer.main.get_command(app)
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    for name in names(page):
        if found := re.search(r"(?:^|[ /])signalbox ([a-z_]+)(.*)", name):
            assert found[1] in group.commands, f"{page.name}: signalbox {found[1]}"
            command, rest = group.commands[found[1]], found[2].split("#")[0]
            if below := getattr(command, "commands", None):
                for second in re.match(r"[\w| ]*", rest)[0].split()[:1]:  # type: ignore[index]
                    for one in second.split("|"):
                        assert one in below, f"{page.name}: signalbox {found[1]} {one}"
                        command = below[one]
            options = {o for p in command.params for o in p.opts}
            unknown = set(re.findall(r"(?<!\S)--[a-z-]+", rest)) - options
            assert not unknown, f"{page.name}: signalbox {found[1]} has no {unknown}"
        for target in re.findall(r"^make ([a-z]+)", name):
            assert target in targets, f"{page.name}: make {target}"
        for module in re.findall(r"python -m (benchmarks[\w.]*)", name):
            assert importlib.util.find_spec(module), f"{page.name}: {module}"


def test_every_file_that_contributing_names_exists() -> None:
    page = ROOT / "CONTRIBUTING.md"
    spans = {name.split()[-1] if " " in name else name for name in names(page)}
    files = {name for name in spans if re.fullmatch(r"\.?[\w-][\w./-]*(?:/|\.(?:md|toml|yaml|lock|py))", name)}
    # what a workflow's own folder holds
    files -= {"workflow.yaml", "contract.yaml"}
    gone = sorted(name for name in files if not (ROOT / name).exists())
    assert len(files) > 40 and not gone, gone


OWN = {
    "connector": (r"(?:GoogleAds|Helpdesk|Rest|SqlTable|FileDrop)Settings", (), "delivery/connectors/"),
    "kind of model": (r"(?:Duration|Response)(?:Model|Learner)", ("duration", "response"), "models/learners/"),
    "kind of policy": (r"(?:Budget|Priority)Policy", ("budget_allocation", "priority_queue"), "models/policies/"),
}
"""What is added → names of those that exist in code, their kinds, the folder that holds a module of each."""
OWN_MODULES = {
    "connector": {
        "rest_spec",
        "google_ads",
        "google_ads_settings",
        "google_ads_transport",
        "helpdesk",
        "rest",
        "sql_table",
        "file_drop",
    },
    "kind of model": {"duration", "response"},
    "kind of policy": {"budget", "priority"},
}


@pytest.mark.parametrize("what", OWN)
def test_contributing_lists_the_files_that_know_one_kind_from_another(what: str) -> None:
    called, kinds, folder = OWN[what]
    found = set()
    for file in (
        f for room in ("assets", "pipeline", "models", "delivery", "orchestration") for f in (ROOT / room).rglob("*.py")
    ):
        path = file.relative_to(ROOT).as_posix()
        if path in {f"{folder}{name}.py" for name in OWN_MODULES[what]} or path.startswith("delivery/sandbox/"):
            continue
        if what != "connector" and path.startswith(("models/learners/", "models/policies/")):
            continue  # a kind of model says which policy reads its scores
        text = file.read_text()
        if not re.search(rf"{called}|{'|'.join(kinds) or 'delivery.connectors import'}", text):
            continue
        for node in ast.walk(ast.parse(text)):
            name = node.name if isinstance(node, ast.alias) else getattr(node, "id", getattr(node, "attr", None))
            by_name = isinstance(name, str) and re.fullmatch(called, name)
            kind = what != "connector" and isinstance(node, ast.Constant) and node.value in kinds
            opens = what == "connector" and isinstance(node, ast.ImportFrom) and node.module == "delivery.connectors"
            opens = opens and {alias.name for alias in node.names} & OWN_MODULES[what]
            if by_name or opens or (kind and not path.startswith("delivery/")):
                found.add(path)
    if what != "connector":
        found.discard("models/catalog.py")
        assert not found, f"{what}: asked for by name where its KIND should be asked: {found}"
        found = {"models/catalog.py"}
    section = re.search(rf"^### A {what}: .*?(?=^##)", (ROOT / "CONTRIBUTING.md").read_text(), re.M | re.S)
    assert section, what
    assert set(re.findall(r"^- `([\w/.]+)`", section[0], re.M)) == found


def test_every_promise_of_security_names_a_test() -> None:
    page = (ROOT / "SECURITY.md").read_text()
    rows = re.findall(r"^\| \*\*.*", page, re.M)
    assert len(rows) > 10
    assert not [row for row in rows if not re.search(r"`tests/[\w/]+\.py::\w+`", row)]


def test_the_change_log_begins_with_what_is_unreleased_and_knows_the_version() -> None:
    import tomllib

    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    found = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert found[0] == ("Unreleased", "") and found[1][0] == version and all(day for _, day in found[1:])


def _claims(folder: Path, start: date, days: int) -> None:
    """Exports of claims as the example's source declares them."""
    folder.mkdir(parents=True)
    rng, begin = np.random.default_rng(1), datetime.combine(start, time())
    lines: dict[int, list[str]] = {n: [] for n in range(days)}
    for claim in range(40 * days):
        opened = begin + timedelta(hours=float(rng.uniform(0, 24 * days)))
        settled = opened + timedelta(hours=float(rng.exponential(30)))
        for at, state in ((opened, "open"), (settled, "settled")):
            if (n := (at - begin).days) in lines:
                exported = begin + timedelta(days=n + 1, hours=1)
                times = [f"{t:%Y-%m-%d %H:%M:%S}" for t in (opened, opened + timedelta(hours=36), at, exported)]
                lines[n].append(
                    f"C{claim},office {claim % 3},{1 + claim % 5},{times[0]},{times[1]},{state},{times[2]},{times[3]}\n"
                )
    for n, rows in lines.items():
        header = "claim,office,priority,opened,due,state,updated,exported\n"
        (folder / f"claims_{start + timedelta(days=n)}.csv").write_text(header + "".join(rows))


def _examples(folder: Path) -> Path:
    """The workflows that the guide writes out; what claims_table does not say is claim_order's."""
    guide = (ROOT / "docs" / "data_engineer.md").read_text()
    for found in EXAMPLE.finditer(guide):
        (folder / found["workflow"]).mkdir(exist_ok=True)
        (folder / found["file"]).write_text(found["text"])
    _said(folder, "claim_order", "claims_table", "claims_table")
    return folder


def _snippet(name: str) -> str:
    (text,) = [
        f["text"] for f in SNIPPET.finditer((ROOT / "docs" / "data_engineer.md").read_text()) if f["name"] == name
    ]
    return text


def _said(folder: Path, base: str, name: str, snippet: str) -> None:
    """Write the workflow.yaml of ``base`` to ``name`` with what a snippet says instead."""
    whole = yaml.safe_load((folder / base / "workflow.yaml").read_text())
    for key, value in yaml.safe_load(_snippet(snippet)).items():
        one = value.get("export") if key == "sources" else value
        kept = whole[key]["export"] if key == "sources" else whole.get(key)
        merged = {**kept, **one} if isinstance(kept, dict) and isinstance(one, dict) else one
        whole[key] = {"export": merged} if key == "sources" else merged
    (folder / name / "workflow.yaml").write_text(yaml.safe_dump(whole, sort_keys=False))


def test_the_workflows_that_the_guide_writes_out_read_good(tmp_path: Path) -> None:
    from pipeline import workflow_validation
    from pipeline.workflow import load

    _examples(tmp_path)
    for name in ("claim_order", "claims_table"):
        assert workflow_validation.problems(load(tmp_path / name)) == []
        assert workflow_validation.notes(load(tmp_path / name)) == []
    folder, features = tmp_path / "claim_order", tmp_path / "claim_order" / "features.sql"
    features.write_text(features.read_text().replace("    priority,\n", _snippet("no_status_quo")))
    source = folder / "export.sql"
    source.write_text(source.read_text().replace("opened AS opened_at", _snippet("local_time").strip()))
    _said(tmp_path, "claim_order", "claim_order", "no_status_quo_delivery")
    _said(tmp_path, "claim_order", "claim_order", "small_data")
    assert _snippet("no_status_quo") in features.read_text() and _snippet("local_time").strip() in source.read_text()
    workflow = load(folder)
    assert workflow_validation.problems(workflow) == [] and workflow.training.min_rows == 100
    assert workflow.delivery is not None


def test_local_times_are_turned_as_the_guide_says() -> None:
    from pipeline.ingest.row_rules import open_engine

    rows = [
        ("02.03.2026 10:00",),
        ("02.07.2026 10:00",),
        ("29.03.2026 02:30",),
        ("25.10.2026 02:30",),
        ("soon",),
        (None,),
    ]
    engine = open_engine()
    engine.execute("CREATE TABLE raw (opened VARCHAR)")
    engine.executemany("INSERT INTO raw VALUES (?)", rows)
    found = [r[0] for r in engine.execute(f"SELECT {_snippet('local_time')} FROM raw").fetchall()]
    assert found == [
        "2026-03-02 09:00:00+00", "2026-07-02 08:00:00+00", "2026-03-29 01:30:00+00", "2026-10-25 01:30:00+00", "soon", None,
    ]  # fmt: skip


def test_a_table_of_cases_tells_no_day_what_came_after_it(tmp_path: Path) -> None:
    from pipeline import ingest, point_in_time
    from pipeline.lake import Lake
    from pipeline.workflow import load

    workflow = load(_examples(tmp_path) / "claims_table")
    start = datetime.combine(workflow.start, time())
    days = [workflow.start + timedelta(days=n) for n in range(5)]
    header = "claim,office,priority,opened,due,settled,exported\n"

    def line(name: str, opened: float, settled: float | None, exported: float | None = None) -> str:
        times = [None if d is None else start + timedelta(days=d) for d in (opened, opened + 1, settled, exported)]
        return ",".join([name, "office 1", "3", *("" if t is None else f"{t:%Y-%m-%d %H:%M:%S}" for t in times)]) + "\n"

    def made(history: list[str], live: list[str], lake: Lake, root: Path) -> dict[str, Any]:
        (root / "claims_table").mkdir(parents=True)
        (root / "claims_table" / "claims_history.csv").write_text(header + "".join(history))
        (root / "claims_table" / "claims_live.csv").write_text(header + "".join(live))
        done = ingest.ingest(workflow, lake, root, now=start + timedelta(days=9))
        assert not done.refused and done.accepted == len(history) + len(live), done
        found = {"features": point_in_time.features, "outcomes": point_in_time.outcomes}
        return {
            stage: {d: t.drop_columns(["day"]).to_pylist() for d, t in of(workflow, lake, days)}
            for stage, of in found.items()
        }

    history = [line("A", 0.2, 1.5), line("B", 0.4, 3.5), line("C", 2.5, None)]
    # exported at 01:00 of the next day: open first, then settled
    live = [line("D", 1.2, None, 2.04), line("D", 1.2, 3.6, 4.04)]
    found = made(history, live, Lake(str(tmp_path / "one")), tmp_path / "first")
    open_at = {d: sorted(r["entity_id"] for r in rows) for d, rows in found["features"].items()}
    assert list(open_at.values()) == [["A", "B"], ["B", "D"], ["B", "C", "D"], ["C"], ["C"]]
    told = {r["entity_id"]: (d, r["missed"]) for d, rows in found["outcomes"].items() for r in rows}
    assert told == {"A": (days[1], True), "B": (days[3], True), "D": (days[3], True)}
    later = [line("A", 0.2, 1.5), line("B", 0.4, 4.9), line("C", 2.5, 4.7)]
    other = made(later, live, Lake(str(tmp_path / "two")), tmp_path / "second")
    for stage in found:
        for day in days[:3]:
            assert other[stage][day] == found[stage][day], "what came later changes nothing of an earlier day"


@pytest.mark.parametrize("name", ["first", "place", "rule", "detail", "raw", "row", "f", "k"])
def test_a_column_that_is_not_reserved_may_be_called_as_its_author_likes(tmp_path: Path, name: str) -> None:
    from pipeline import ingest, workflow_validation
    from pipeline.lake import Lake
    from pipeline.workflow import load

    folder = _examples(tmp_path) / "claim_order"
    for file in ("contract.yaml", "export.sql", "features.sql", "outcomes.sql"):
        (folder / file).write_text((folder / file).read_text().replace("claim_id", name))
    workflow = load(folder)
    assert workflow_validation.problems(workflow, thorough=False) == []
    _claims(tmp_path / "landing" / "claim_order", workflow.start, 2)
    done = ingest.ingest(workflow, Lake(str(tmp_path / "lake")), tmp_path / "landing", now=datetime(2026, 6, 1))
    assert done.accepted and not done.refused


def test_the_workflow_that_the_guide_adds_decides(
    tmp_path: Path, empty_registry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dagster as dg

    from assets.resources import RegistryResource, resources
    from orchestration import runner
    from pipeline.workflow import load

    monkeypatch.setenv("SIGNALBOX_HOME", str(tmp_path / "home"))
    workflow = load(_examples(tmp_path) / "claim_order")
    days = [workflow.start + timedelta(days=n) for n in range(4)]
    _claims(tmp_path / "home" / "landing" / "claim_order", days[0], len(days))
    now = f"{days[-1] + timedelta(days=1)}T04:00:00"
    given = resources(now) | {
        "registry": RegistryResource(uri=empty_registry.uri, artifacts=empty_registry.artifacts, ui="")
    }

    with dg.DagsterInstance.ephemeral() as instance:
        result = runner.run(workflow, "daily", days[0], days[-1], now=now, instance=instance, given=given)

    assert result.success, runner.failed_steps(result)
    assert not [r for r in runner.check_rows(result) if r["result"] == "ERROR"]
    batch = given["lake"].lake.read("claim_order/batches", days=days[-1:]).to_pylist()[0]
    assert (batch["step"], batch["status"]) == ("rule", "READY") and batch["changed"] > 0


def test_python_in_the_docs_runs_on_a_lake(
    tmp_path: Path, ads: Any, registry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from models import serving
    from pipeline import point_in_time
    from tests.support.aliases import promote

    bench = ads.copy(tmp_path / ".signalbox")
    bench.decide(registry, bench.last)
    rows, model = point_in_time.training_set(bench.workflow, bench.lake, bench.last), bench.fit(bench.last)
    promote(
        registry,
        bench.register(registry, bench.last, files=model.files(), served=serving.describe("response", model, rows)),
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SIGNALBOX_HOME", raising=False)
    monkeypatch.setenv("SIGNALBOX_MLFLOW_URI", registry.uri)
    pages = [p for p in DOCS if not p.name.startswith("world_")]  # those show how to simulate a month
    blocks = [(p, b) for p in pages for b in re.findall(r"^```python\n(.*?)^```", p.read_text(), re.M | re.S)]
    assert len(blocks) >= 3
    for page, block in blocks:
        exec(compile(block, page.name, "exec"), {})


if __name__ == "__main__":
    for path in DOCS:
        text = path.read_text()
        path.write_text(
            GENERATED.sub(lambda m: f"<!-- generated: {m['what']} -->\n{made(m['what'])}<!-- end -->", text)
        )
