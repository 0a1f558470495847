"""Model versions in MLflow: register one with its evidence, find the one that counts for a day, read it without running it.

Belongs here: everything that speaks to MLflow but the file that MLflow runs (``models.pyfunc_model``). Does not: training
(``models.learners``) and judging (``models.evaluation.gate``).
A version that ``load`` reads runs no code: its files are Booster texts and JSON, read by their digests; nothing is unpickled. For
everybody else it is a model of the flavour python_function, made from code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from common import clock
from common.errors import SignalboxError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput
    from mlflow.models import ModelSignature

    from models.serving import Served

CHAMPION, PREVIOUS, CHALLENGER = "champion", "previous_champion", "challenger"
ALIASES = (CHAMPION, PREVIOUS, CHALLENGER)
_TAG = "signalbox."
_PACKAGE = Path(__file__).parent
_FROM_CODE = "pyfunc_model.py"
"""The file of this package that MLflow runs, and that no version is read by."""
_NEEDED = ("mlflow", "lightgbm", "numpy", "pandas", "pyarrow", "pydantic")
"""What scoring imports, beside the package ``models`` itself."""
_FOLLOWED = f"{_TAG}followed"


class ModelMissing(SignalboxError, LookupError):
    """No version answers to what was asked for."""


class ModelBlocked(SignalboxError, RuntimeError):
    """A version that was rolled back is to be promoted again; a named person must lift the block first."""


class ModelUnreadable(SignalboxError, RuntimeError):
    """A version exists but may not or cannot be read: files gone, a digest that differs, a flavour that runs code."""


def files_digest(files: Mapping[str, bytes]) -> str:
    """SHA-256 over a model's files by name: what a decision records of the model it used."""
    whole = hashlib.sha256()
    for name in sorted(files):
        whole.update(f"{name}\0{hashlib.sha256(files[name]).hexdigest()}\n".encode())
    return whole.hexdigest()


@dataclass(frozen=True)
class Version:
    """One registered version. ``trained_day``: the day at whose cut-off its training set ended."""

    name: str
    number: int
    run_id: str
    trained_day: date
    digest: str
    passed: bool
    blocked: str = ""
    """Why it may not decide (it did harm and was rolled back); empty where it may."""

    def as_dict(self) -> dict[str, Any]:
        """What a decision's record keeps of it."""
        return {"name": self.name, "version": self.number, "run_id": self.run_id, "digest": self.digest}


@dataclass(frozen=True)
class Standing:
    """What the registry says of a model at one moment, read in two calls."""

    aliases: Mapping[str, int]
    """Of ``ALIASES``, those that are set: alias → number."""
    versions: Mapping[int, Version]
    followed: Mapping[str, int | None] | None
    """Where the aliases were put last by this project; None: never. What differs from it was moved by somebody else."""


@dataclass(frozen=True)
class Dataset:
    """What a version was trained on, as MLflow names it: a Delta table at a version, and what of it."""

    name: str
    digest: str
    path: str
    version: int | None
    schema: pa.Schema
    tags: Mapping[str, str]

    def as_mlflow(self) -> DatasetInput:
        """MLflow's form of it; the rows are not copied. MLflow keeps 36 characters of the digest."""
        from mlflow.data.delta_dataset_source import DeltaDatasetSource
        from mlflow.data.meta_dataset import MetaDataset
        from mlflow.entities import DatasetInput, InputTag
        from mlflow.types import ColSpec, Schema

        source = DeltaDatasetSource(path=self.path, delta_table_version=self.version)
        schema = Schema([ColSpec(_mlflow_type(f.type, nulls=False), f.name) for f in self.schema])
        one = MetaDataset(source, name=self.name, digest=self.digest[:36], schema=schema)._to_mlflow_entity()
        tags = {"mlflow.data.context": "training", **self.tags}
        return DatasetInput(one, [InputTag(key, value) for key, value in tags.items()])


def flat(recipe: Mapping[str, Any], prefix: str = "model") -> dict[str, str]:
    """A learner's recipe as parameters that MLflow can search: a field each, without the feature lists."""
    out: dict[str, str] = {}
    for field, value in recipe.items():
        if isinstance(value, Mapping):
            out |= flat(value, f"{prefix}.{field}")
        elif field not in ("numeric", "categorical"):
            out[f"{prefix}.{field}"] = value if isinstance(value, str) else json.dumps(value)
    return out


def _mlflow_type(kind: pa.DataType, *, nulls: bool) -> Any:
    """MLflow's type of a column. Whole numbers and booleans with nulls are ``any``: pandas has another type for them by whether
    nulls are there, and MLflow would refuse one of the two, or take a null of JSON for false. So are decimals."""
    from mlflow.types import DataType
    from mlflow.types.schema import AnyType, Array

    if pa.types.is_list(kind):
        return Array(_mlflow_type(kind.value_type, nulls=False))
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return DataType.string
    if pa.types.is_floating(kind):
        return DataType.float if kind == pa.float32() else DataType.double
    if pa.types.is_date(kind) or (pa.types.is_timestamp(kind) and kind.tz is None):
        return DataType.datetime
    if pa.types.is_signed_integer(kind) and not nulls:
        return DataType.long if kind == pa.int64() else DataType.integer
    if pa.types.is_boolean(kind) and not nulls:
        return DataType.boolean
    return AnyType()


def _signature(served: Served) -> ModelSignature:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema

    takes = [
        ColSpec(_mlflow_type(f.type, nulls=f.name in served.nulls), f.name, required=not f.nullable)
        for f in served.columns
    ]
    gives = [ColSpec(_mlflow_type(f.type, nulls=False), f.name) for f in served.scores.schema]
    return ModelSignature(inputs=Schema(takes), outputs=Schema(gives))


def _steps(curves: Mapping[str, Mapping[int, float]]) -> list[Any]:
    """Curves as MLflow's metrics: a step is a number of rounds."""
    from mlflow.entities import Metric

    now = int(clock.now().timestamp() * 1000)
    return [Metric(f"curve_{name}", value, now, step) for name, one in curves.items() for step, value in one.items()]


def _runs_nothing(flavours: Mapping[str, Any]) -> bool:
    """Whether these are the flavours that ``register`` writes, or those that it wrote before: a version of another flavour may
    hold anything, and is not read."""
    if set(flavours) == {"python_function"}:
        said = flavours["python_function"]
        by_code = said.get("loader_module") == "mlflow.pyfunc.loaders.code_model"
        return by_code and Path(said.get("model_code_path", "")).name == _FROM_CODE and "python_model" not in said
    plain = flavours.get("lightgbm", {}).get("model_class") == "lightgbm.basic.Booster"
    return plain and set(flavours) <= {"lightgbm", "python_function"}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """MLflow without its progress bars, telemetry and informational log lines."""
    import logging

    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    loggers = [logging.getLogger(n) for n in ("mlflow", "mlflow.tracking", "alembic")]
    levels = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)


@contextlib.contextmanager
def _paths_kept() -> Iterator[None]:
    """MLflow tries the example on the model that it is about to log, and leaves that model's folder in the search path."""
    before = list(sys.path)
    try:
        yield
    finally:
        sys.path[:] = before


@dataclass(frozen=True)
class Registry:
    """The MLflow tracking server or store at ``uri``; new experiments put their artifacts below ``artifacts``."""

    uri: str
    artifacts: str

    @cached_property
    def client(self) -> MlflowClient:
        """MLflow's client, made on first use: the import takes seconds."""
        os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        # A day has a deadline: MLflow's own seven retries of two minutes would outlast it.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        import mlflow

        with quiet():
            mlflow.set_tracking_uri(self.uri)
            return mlflow.MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)

    def _experiment(self, name: str) -> str:
        found = self.client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        return str(self.client.create_experiment(name, artifact_location=f"{self.artifacts.rstrip('/')}/{name}"))

    def register(  # noqa: PLR0913 - given by name
        self,
        name: str,
        files: Mapping[str, bytes],
        *,
        trained_day: date,
        passed: bool,
        params: Mapping[str, Any],
        metrics: Mapping[str, float],
        tags: Mapping[str, str],
        plots: Mapping[str, Figure],
        card: str,
        seed: int,
        served: Served | None = None,
        dataset: Dataset | None = None,
        curves: Mapping[str, Mapping[int, float]] | None = None,
    ) -> Version:
        """Log a training run with its evidence and register its files as the next version of ``name``.

        The files are what ``load`` reads. Beside them stand the code and the requirements by which anybody scores with MLflow
        alone, where ``served`` says what the version takes and gives (``models.serving.describe``). ``curves``: what was lost
        after so many rounds, by name.
        """
        import mlflow

        digest = files_digest(files)
        with quiet(), _paths_kept(), tempfile.TemporaryDirectory() as folder:
            mlflow.set_tracking_uri(self.uri)
            kept = Path(folder, "files")
            kept.mkdir()
            for file, content in files.items():
                (kept / file).write_bytes(content)
            artifacts, how = {"files": str(kept)}, dict[str, Any]()
            if served is not None:
                columns = Path(folder, "columns.arrow")
                columns.write_bytes(served.columns.serialize())
                artifacts["columns"] = str(columns)
                how = {"signature": _signature(served), "input_example": served.example.to_pandas()}
            run_name = f"{name} {trained_day}"
            with mlflow.start_run(experiment_id=self._experiment(name), run_name=run_name) as run:
                mlflow.log_params({**params, "seed": seed})
                mlflow.log_metrics({k: float(v) for k, v in metrics.items()})
                if curves:
                    self.client.log_batch(run.info.run_id, metrics=_steps(curves))
                mlflow.set_tags({**tags, "mlflow.note.content": card})
                mlflow.log_text(card, "model_card.md")
                for plot, figure in plots.items():
                    mlflow.log_figure(figure, f"plots/{plot}.png")
                logged = mlflow.pyfunc.log_model(
                    name="model",
                    python_model=str(_PACKAGE / _FROM_CODE),
                    code_paths=[str(_PACKAGE), str(_PACKAGE.with_name("common"))],
                    artifacts=artifacts,
                    pip_requirements=[f"{package}=={metadata.version(package)}" for package in _NEEDED],
                    **how,
                )
                if dataset is not None:
                    self.client.log_inputs(run.info.run_id, datasets=[dataset.as_mlflow()])
                run_id = run.info.run_id
            if not self.client.search_registered_models(f"name = '{name}'"):
                self.client.create_registered_model(name)
            version_tags = {
                f"{_TAG}trained_day": trained_day.isoformat(),
                f"{_TAG}digest": digest,
                f"{_TAG}files": json.dumps({f: hashlib.sha256(c).hexdigest() for f, c in sorted(files.items())}),
                f"{_TAG}gate": "passed" if passed else "refused",
                **{name: text for name, text in tags.items() if name.startswith(f"{_TAG}gate_")},
            }
            made = self.client.create_model_version(
                name,
                source=logged.model_uri,
                run_id=run_id,
                tags=version_tags,
                description=card,
                model_id=logged.model_id,
            )
            # the page of the model itself names its version by this tag, as MLflow's own registering writes it
            named = json.dumps([{"name": name, "version": made.version}])
            self.client.set_logged_model_tags(logged.model_id, {"mlflow.modelVersions": named})
        return Version(name, int(made.version), run_id, trained_day, digest, passed)

    def standing(self, name: str) -> Standing:
        """Aliases and versions of a model; empty where there is no such model. Raises MLflow's error where it is down."""
        import mlflow
        from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

        try:
            model = self.client.get_registered_model(name)
        except mlflow.exceptions.MlflowException as error:
            if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
                raise
            return Standing({}, {}, None)
        said = model.tags.get(_FOLLOWED)
        return Standing(
            aliases={alias: int(number) for alias, number in model.aliases.items() if alias in ALIASES},
            versions={v.number: v for v in self.versions(name)},
            followed=None if said is None else dict(json.loads(said)),
        )

    def follow(self, name: str, aliases: Mapping[str, int | None]) -> None:
        """Set aliases to the versions given; None takes one away. Last write wins in MLflow: the caller sees to its turn."""
        for alias, number in aliases.items():
            if number is not None:
                self.client.set_registered_model_alias(name, alias, str(number))
            else:
                self.client.delete_registered_model_alias(name, alias)

    def remember(self, name: str, followed: Mapping[str, int | None]) -> None:
        """Write down where the aliases were put, so that what somebody else moves can be told from it."""
        self.client.set_registered_model_tag(name, _FOLLOWED, json.dumps(followed, sort_keys=True))

    def block(self, name: str, number: int, reason: str) -> None:
        """Mark a version as one that may not decide."""
        self.client.set_model_version_tag(name, str(number), f"{_TAG}blocked", reason[:500] or "rolled back")

    def passed(self, name: str, number: int) -> None:
        """Mark a version as one that has passed its gate, which may be later than its training."""
        self.client.set_model_version_tag(name, str(number), f"{_TAG}gate", "passed")

    def held(self, name: str, number: int) -> None:
        """Mark a version as one that its gate holds for a person."""
        self.client.set_model_version_tag(name, str(number), f"{_TAG}gate", "held")

    def put_back(self, name: str, number: int, reason: str) -> None:
        """Say at a version why the alias that somebody gave it was taken away again."""
        self.client.set_model_version_tag(name, str(number), f"{_TAG}put_back", reason[:500])

    def tag(self, name: str, number: int, tags: Mapping[str, str]) -> None:
        """Say something at a version, such as what its gate found (``models.evaluation.gate.tags``)."""
        for key, text in tags.items():
            self.client.set_model_version_tag(name, str(number), key, text)

    def lift(self, name: str, number: int) -> None:
        """Take the block of a version away again, on a named person's word (which the ledger keeps)."""
        if self.by_number(name, number).blocked:
            self.client.delete_model_version_tag(name, str(number), f"{_TAG}blocked")

    def versions(self, name: str) -> list[Version]:
        """Every version of a model, oldest first."""
        found = self.client.search_model_versions(f"name = '{name}'", max_results=10_000)
        return sorted((self._version(v) for v in found), key=lambda v: v.number)

    def by_number(self, name: str, number: int) -> Version:
        """One version; raises ModelMissing where it was deleted or never was."""
        import mlflow

        try:
            return self._version(self.client.get_model_version(name, str(number)))
        except mlflow.exceptions.MlflowException as error:
            raise ModelMissing(f"model {name!r} has no version {number}: {error}") from error

    def by_alias(self, name: str, alias: str) -> Version | None:
        """The version behind an alias, or None where the model or the alias does not exist."""
        import mlflow
        from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, RESOURCE_DOES_NOT_EXIST, ErrorCode

        absent = {ErrorCode.Name(INVALID_PARAMETER_VALUE), ErrorCode.Name(RESOURCE_DOES_NOT_EXIST)}
        try:
            return self._version(self.client.get_model_version_by_alias(name, alias))
        except mlflow.exceptions.MlflowException as error:
            if error.error_code in absent:
                return None
            raise

    def _version(self, found: Any) -> Version:
        tags = found.tags
        trained = tags.get(f"{_TAG}trained_day")
        return Version(
            name=found.name,
            number=int(found.version),
            run_id=found.run_id or "",
            # A version that somebody registered by hand says nothing of its training: it counts for no past day.
            trained_day=date.fromisoformat(trained) if trained else date.max,
            digest=tags.get(f"{_TAG}digest", ""),
            passed=tags.get(f"{_TAG}gate") == "passed",
            blocked=tags.get(f"{_TAG}blocked", ""),
        )

    def as_of(self, name: str, day: date) -> list[Version]:
        """The champion that counts for ``day`` and the one before it, the champion first.

        It is who holds the alias; for a day before that version was trained (a backfill) it is the newest version
        that had passed its gate by then, so that no model looks ahead. A blocked version counts for no day. Empty where
        there is none.
        """
        held = self.by_alias(name, CHAMPION)
        passed = [v for v in self.versions(name) if v.passed and not v.blocked and v.trained_day <= day]
        if held is not None and held.trained_day <= day and not held.blocked:
            before = self.by_alias(name, PREVIOUS)
            counts = before is not None and before.number != held.number and before.trained_day <= day
            counts = counts and before is not None and not before.blocked
            return [held, before] if before is not None and counts else [held]
        newest_first = sorted(passed, key=lambda v: (v.trained_day, v.number), reverse=True)
        return newest_first[:2]

    def recipe(self, version: Version) -> dict[str, Any]:
        """What a version's learner was given (model section and feature lists); raises ModelUnreadable where no run says so."""
        import mlflow

        try:
            said = self.client.get_run(version.run_id).data.params["recipe"]
        except (mlflow.exceptions.MlflowException, KeyError) as error:
            raise ModelUnreadable(
                f"model {version.name!r} version {version.number}: its run says no recipe: {error}"
            ) from error
        return dict(json.loads(said))

    def load(self, version: Version) -> dict[str, bytes]:
        """A version's files, each checked against the digest recorded when it was registered.

        Raises ModelUnreadable where a file is gone or differs or the version carries a flavour that would run code.
        """
        import mlflow
        import yaml

        place = f"model {version.name!r} version {version.number}"
        try:
            recorded = self.client.get_model_version(version.name, str(version.number)).tags.get(f"{_TAG}files")
        except mlflow.exceptions.MlflowException as error:
            raise ModelMissing(f"{place}: is not in the registry: {error}") from error
        if recorded is None:
            raise ModelUnreadable(
                f"{place}: was not registered by this project (no digests); train it with the job {version.name}_retrain"
            )
        try:
            with quiet():
                # process-wide in MLflow: another registry may have been used in between
                mlflow.set_tracking_uri(self.uri)
                folder = Path(mlflow.artifacts.download_artifacts(f"models:/{version.name}/{version.number}"))
            flavours = dict(yaml.safe_load((folder / "MLmodel").read_text(encoding="utf-8"))["flavors"])
        except (mlflow.exceptions.MlflowException, OSError, yaml.YAMLError, KeyError, TypeError) as error:
            raise ModelUnreadable(f"{place}: its artifacts cannot be read: {error}") from error
        if not _runs_nothing(flavours):
            raise ModelUnreadable(
                f"{place}: flavours {sorted(flavours)} are not those of a version that this project registers; it is not read"
            )
        # before versions were registered with their code, their files lay beside a Booster of the flavour lightgbm
        kept = folder / ("extra_files" if "lightgbm" in flavours else "artifacts/files")
        files = {}
        for file, wanted in json.loads(recorded).items():
            path = kept / file
            if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
                raise ModelUnreadable(f"{place}: file {file!r} is gone from its artifacts")
            files[file] = path.read_bytes()
            if hashlib.sha256(files[file]).hexdigest() != wanted:
                raise ModelUnreadable(
                    f"{place}: file {file!r} differs from what was registered (SHA-256 {wanted[:12]}…)"
                )
        if files_digest(files) != version.digest:
            raise ModelUnreadable(
                f"{place}: its files do not give the digest {version.digest[:12]}… that the version carries"
            )
        return files
