"""The rooms keep their walls: imports run one way, and no folder shadows a package."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "orchestration": {"orchestration", "assets", "models", "data_checks", "delivery"},
    "assets": {"assets", "models", "data_checks", "delivery"},
    "models": {"models"},
    "data_checks": {"data_checks"},
    "delivery": {"delivery"},
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
    assert set(wheel["packages"]) == set(ALLOWED)


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
