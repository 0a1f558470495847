"""The rooms keep their walls: imports run one way, and no folder shadows a package."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "orchestration": {"orchestration", "assets", "pipeline", "models", "data_checks", "delivery", "common"},
    "assets": {"assets", "pipeline", "models", "data_checks", "delivery", "common"},
    "pipeline": {"pipeline", "models", "data_checks", "delivery", "common"},
    "models": {"models", "common"},
    "data_checks": {"data_checks", "common"},
    "delivery": {"delivery", "common"},
    "common": {"common"},
}
HEAVY = {"great_expectations", "evidently", "mlflow", "lightgbm", "scipy", "sklearn", "matplotlib", "pandas"}


def modules(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imported(tree: ast.AST) -> list[tuple[str, int]]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name.split(".")[0], node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append((node.module.split(".")[0], node.lineno))
    return found


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_run_one_way(room: str) -> None:
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for file in modules(room)
        for name, line in imported(ast.parse(file.read_text()))
        if (name in ALLOWED and name not in ALLOWED[room])
        or (name == "dagster" and room not in ("orchestration", "assets"))
    ]
    assert modules(room) and not wrong, "\n".join(wrong)


def at_run(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Every import of a module that is ever done, also inside functions: all but those for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and ast.unparse(node.test).split(".")[-1] == "TYPE_CHECKING":
            yield from at_run(ast.Module(node.orelse, []))
        else:
            yield from at_run(node)


def graph(sources: Mapping[str, str]) -> dict[str, dict[str, int]]:
    """Of each module (dotted name → source) the modules that it imports, with the line. A package stands for its
    ``__init__``: who imports a module of it does not count as importing that."""
    found: dict[str, dict[str, int]] = {}
    for name, source in sources.items():
        mine = found[name] = {}
        for node in at_run(ast.parse(source)):
            if isinstance(node, ast.Import):
                wanted = [(alias.name, alias.name) for alias in node.names]
            else:
                assert not node.level, f"{name}:{node.lineno}: imports name the module from its room on"
                wanted = [(f"{node.module}.{alias.name}", str(node.module)) for alias in node.names]
            for place in (one if one in sources else other for one, other in wanted):
                if place in sources:
                    mine.setdefault(place, node.lineno)
    return found


def circle(imports: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Modules of which each imports the next and the last one the first, which stands at both ends; none: an empty list."""
    done: set[str] = set()

    def walk(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        met = next((c for other in sorted(imports[name]) if (c := walk(other, [*way, name]))), [])
        done.add(name)
        return met

    return next((c for name in sorted(imports) if (c := walk(name, []))), [])


def test_no_module_imports_itself_by_way_of_others() -> None:
    sources = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file.read_text()
        for room in ALLOWED
        for file in modules(room)
    }
    imports = graph(sources)
    met = circle(imports)
    steps = [f"{one}:{imports[one][other]} imports {other}" for one, other in pairwise(met)]
    assert len(sources) > 100
    assert not met, "\n".join(["an import circle; move what both ends need to a third module:", *steps])


@pytest.mark.parametrize(
    ("sources", "found"),
    [
        ({"a.x": "from a import y", "a.y": "from a import z", "a.z": "import os"}, []),
        ({"a.x": "from a import y", "a.y": "from a.z import f", "a.z": "def f():\n    import a.x"}, ["a.x", "a.y", "a.z", "a.x"]),
        ({"a.x": "from a import y", "a.y": "if TYPE_CHECKING:\n    from a import x"}, []),
        ({"a.x": "from a import y", "a.y": "if TYPE_CHECKING:\n    pass\nelse:\n    from a import x"}, ["a.x", "a.y", "a.x"]),
        ({"a.x": "import a.y", "a.y": "class C:\n    try:\n        from a.x import f\n    except ImportError:\n        pass"}, ["a.x", "a.y", "a.x"]),
        ({"a": "from a import x", "a.x": "from a import y", "a.y": ""}, []),
        ({"a": "from a.x import f", "a.x": "from a import g"}, ["a", "a.x", "a"]),
        ({"a.x": "import x", "x": ""}, []),
    ],
)  # fmt: skip
def test_circles_are_seen_wherever_the_import_stands(sources: dict[str, str], found: list[str]) -> None:
    assert circle(graph(sources)) == found


@pytest.mark.parametrize("room", ALLOWED)
def test_heavy_libraries_are_imported_inside_functions(room: str) -> None:
    def at_load(body: list[ast.stmt]) -> list[ast.stmt]:
        kept: list[ast.stmt] = []
        for node in body:
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                continue
            if isinstance(node, ast.Import | ast.ImportFrom):
                kept.append(node)
        return kept

    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {name} at load"
        for file in modules(room)
        if file.name != "pyfunc_model.py"  # MLflow runs it, and nobody imports it
        for node in at_load(ast.parse(file.read_text()).body)
        for name, line in imported(node)
        if name in HEAVY
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("room", ALLOWED)
def test_every_module_says_what_belongs_in_it(room: str) -> None:
    silent = [str(f.relative_to(ROOT)) for f in modules(room) if not ast.get_docstring(ast.parse(f.read_text()))]
    assert not silent


def test_the_folder_mlflow_never_shadows_the_package() -> None:
    import mlflow

    assert not list((ROOT / "mlflow").rglob("*.py")), "nothing importable can live in mlflow/"
    assert Path(mlflow.__file__).parent != ROOT / "mlflow"
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert set(wheel["packages"]) == {*ALLOWED, "workflows"}


@pytest.mark.parametrize("room", ALLOWED)
def test_who_imports_a_room_gets_its_types(room: str) -> None:
    assert (ROOT / room / "py.typed").is_file(), "without it a type checker takes the room's types for unknown"


def test_what_is_said_to_be_slow_exists() -> None:
    from tests import conftest

    assert not [name for name in conftest.SLOW if not (ROOT / "tests" / name).exists()]
    assert not [name for name in conftest.HEAVY if not hasattr(conftest, name)]


def test_the_lock_is_hashed_and_names_no_index() -> None:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith((" ", "#"))]
    assert len(pins) > 100
    assert all("==" in pin for pin in pins), [p for p in pins if "==" not in p]
    assert sum("--hash=sha256:" in line for line in lines) >= len(pins)
    assert not [
        line for line in lines if "://" in line or line.startswith(("--index", "--extra-index", "--find-links"))
    ]


def test_the_drawing_of_the_rooms_shows_the_imports_that_there_are() -> None:
    spec = importlib.util.spec_from_file_location("draw_architecture", ROOT / "docs" / "draw_architecture.py")
    assert spec is not None and spec.loader is not None
    drawing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(drawing)
    shown = re.findall(r"^\S+ > \S+: \d+$", drawing.TARGET.read_text(), re.M)
    assert shown == drawing.listed(drawing.edges()), ".venv/bin/python docs/draw_architecture.py draws it anew"


OPENS = ("connect", "sql", "query", "execute", "default_connection")


def opens_duckdb(node: ast.AST) -> bool:
    """Whether it is, or fetches under any name, what opens a DuckDB."""
    if isinstance(node, ast.ImportFrom):
        return node.module == "duckdb" and any(alias.name in OPENS for alias in node.names)
    if isinstance(node, ast.Import):
        return any(alias.name == "duckdb" and alias.asname for alias in node.names)
    return (
        isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "duckdb"
        and node.attr in OPENS
    )


def test_duckdb_is_opened_in_one_place() -> None:
    wrong = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for room in (*ALLOWED, "benchmarks")
        for file in modules(room)
        if file != ROOT / "common" / "duckdb_session.py"
        for node in ast.walk(ast.parse(file.read_text()))
        if opens_duckdb(node)
    ]
    assert opens_duckdb(ast.parse("from duckdb import connect as c").body[0]), "by whatever name"
    assert not wrong, f"common.duckdb_session.engine() opens it, locked: {wrong}"


READS_A_CLOCK = re.compile(r"datetime\.(?:now|utcnow|today)\(|\bdate\.today\(|\btime\.time\(")


def test_what_time_it_is_is_read_in_one_place() -> None:
    wrong = [
        f"{file.relative_to(ROOT)}:{number}"
        for room in ALLOWED
        for file in modules(room)
        if file != ROOT / "common" / "clock.py"
        and "sandbox" not in file.parts  # stand-ins for systems have clocks of their own
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if READS_A_CLOCK.search(line)
    ]
    assert not wrong, f"common.clock tells it: {wrong}"


@pytest.mark.parametrize(
    ("words", "never"),
    [
        (["--help"], {"sqlalchemy", "pyarrow", "numpy", "pydantic", "dagster"}),
        (["status"], {"dagster", "mlflow", "pandas", "lightgbm"}),
        (["batches", "ad_budget"], {"dagster", "mlflow", "pandas", "lightgbm"}),
    ],
    ids=lambda one: " ".join(one) if isinstance(one, list) else "",
)
def test_a_command_loads_what_it_needs_alone(words: list[str], never: set[str], tmp_path: Path) -> None:
    script = (
        "import sys; from typer.testing import CliRunner; from orchestration.cli import command\n"
        f"done = CliRunner().invoke(command.app, {words!r}); assert done.exit_code == 0, done.output\n"
        f"print(sorted({never!r} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env={**os.environ, "SIGNALBOX_HOME": str(tmp_path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "[]"
