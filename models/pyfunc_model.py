"""What MLflow runs to load a registered version ("models from code"): the version's own code reads the version's own files.

Belongs here: finding that code. Does not: anything about models (``models.serving``). The product never runs this: it reads a
version's files by their digests (``Registry.load``).

MLflow copies this file into the version's artifacts, with the packages that it imports beside it in ``code``.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel


def _imported(packages: list[str]) -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] in packages]


def _sources(package: Path) -> dict[str, bytes]:
    return {str(file.relative_to(package)): file.read_bytes() for file in package.rglob("*.py")}


def _is_here(folder: Path, package: str) -> bool:
    """Whether the package that was imported is of the same code."""
    imported = getattr(sys.modules.get(package), "__file__", None)
    return imported is not None and _sources(Path(imported).parent) == _sources(folder / package)


@contextmanager
def _own_code(folder: Path) -> Iterator[None]:
    """Within, the packages of ``folder`` are its own, or those of the same code that were imported before.

    Other code of their names comes back afterwards: a process may load versions of different code, and is free to have a package
    ``models`` or ``common`` of its own.
    """
    packages = sorted(file.parent.name for file in folder.glob("*/__init__.py"))
    if all(_is_here(folder, package) for package in packages):
        yield
        return
    others = {name: sys.modules.pop(name) for name in _imported(packages)}
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in _imported(packages):
            del sys.modules[name]
        sys.modules.update(others)


class Scores(PythonModel):  # type: ignore[misc]
    """The scores of feature rows."""

    def load_context(self, context: Any) -> None:
        """Read the version; its code is imported whole here, so that nothing is looked for later."""
        code = Path(__file__).parent / "code"
        if not (code / "models" / "serving.py").is_file():
            raise FileNotFoundError(
                f"{code}: the version's own code is gone from its artifacts; register the version anew"
            )
        with _own_code(code):
            from models import serving

            self.model = serving.load(Path(context.artifacts["files"]), Path(context.artifacts["columns"]))

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Rows of the features table in, the columns of the stage ``scores`` out."""
        return self.model.predict(model_input)


set_model(Scores())
