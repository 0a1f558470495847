"""Model versions in MLflow: register one with its evidence, find the one that counts for a day, read it without running it.

Belongs here: everything that speaks to MLflow. Does not: training (``models.learners``) and judging (``models.gate``).
A loaded model runs no code: its files are Booster texts and JSON, read by their digests; nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import MlflowClient

CHAMPION, PREVIOUS, CHALLENGER = "champion", "previous_champion", "challenger"
ALIASES = (CHAMPION, PREVIOUS, CHALLENGER)
_ALLOWED_FLAVOURS = {"lightgbm", "python_function"}
_TAG = "signalbox."
_FOLLOWED = f"{_TAG}followed"


class ModelMissing(LookupError):
    """No version answers to what was asked for."""


class ModelBlocked(RuntimeError):
    """A version that was rolled back is to be promoted again; a named person must lift the block first."""


class ModelUnreadable(RuntimeError):
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

    def register(
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
        inputs: Mapping[str, str],
        seed: int,
    ) -> Version:
        """Log a training run with its evidence and register its files as the next version of ``name``.

        ``inputs`` maps feature names to MLflow column types for the signature. The first ``*.txt`` of ``files`` (by
        name) is the Booster that MLflow shows; every file lies beside it and is what ``load`` reads.
        """
        import lightgbm
        import mlflow
        from mlflow.models import ModelSignature
        from mlflow.types import ColSpec, Schema

        primary = next(f for f in sorted(files) if f.endswith(".txt"))
        booster = lightgbm.Booster(model_str=files[primary].decode())
        signature = ModelSignature(
            inputs=Schema([ColSpec(kind, column) for column, kind in inputs.items()]),
            outputs=Schema([ColSpec("double", "score")]),
        )
        digest = files_digest(files)
        with quiet(), tempfile.TemporaryDirectory() as folder:
            mlflow.set_tracking_uri(self.uri)
            for file, content in files.items():
                Path(folder, file).write_bytes(content)
            run_name = f"{name} {trained_day}"
            with mlflow.start_run(experiment_id=self._experiment(name), run_name=run_name) as run:
                mlflow.log_params({**params, "seed": seed})
                mlflow.log_metrics({k: float(v) for k, v in metrics.items()})
                mlflow.set_tags({**tags, "mlflow.note.content": card})
                mlflow.log_text(card, "model_card.md")
                for plot, figure in plots.items():
                    mlflow.log_figure(figure, f"plots/{plot}.png")
                logged = mlflow.lightgbm.log_model(
                    booster,
                    name="model",
                    signature=signature,
                    extra_files=[str(Path(folder, file)) for file in sorted(files)],
                    pip_requirements=[f"lightgbm=={lightgbm.__version__}"],
                )
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
        return Version(name, int(made.version), run_id, trained_day, digest, passed)

    def promote(self, version: Version) -> bool:
        """Move the alias ``champion``; who held it becomes ``previous_champion``.

        A version trained for an earlier day than the champion (a backfill) takes no alias: False. It counts for the days
        between, see ``as_of``. Raises ModelBlocked for a version that was rolled back.
        """
        if version.blocked:
            raise ModelBlocked(
                f"model {version.name!r} version {version.number} was rolled back ({version.blocked}) and is not promoted again"
            )
        current = self.by_alias(version.name, CHAMPION)
        if current is not None and current.trained_day > version.trained_day and current.trained_day != date.max:
            return False
        if current is not None and current.number != version.number:
            self.client.set_registered_model_alias(version.name, PREVIOUS, str(current.number))
        self.client.set_registered_model_alias(version.name, CHAMPION, str(version.number))
        return True

    def step_back(self, name: str, number: int, reason: str) -> Version | None:
        """Block a version and give its aliases to the versions before it; returns the champion that then counts.

        Rerunnable. None where no version that may decide is left: the days after are decided by the rule. Raises
        ModelMissing where there is no such version.
        """
        harmful = self.by_number(name, number)
        self.block(name, number, reason)
        champion, previous = self.by_alias(name, CHAMPION), self.by_alias(name, PREVIOUS)
        if harmful.number not in {v.number for v in (champion, previous) if v is not None}:
            return champion
        heirs = [v for v in self.versions(name) if v.passed and not v.blocked and v.trained_day <= harmful.trained_day]
        heirs.sort(key=lambda v: (v.trained_day, v.number), reverse=True)
        if champion is not None and not champion.blocked:
            heirs = [champion, *(v for v in heirs if v.number != champion.number)]
        elif previous is not None and not previous.blocked:
            heirs = [previous, *(v for v in heirs if v.number != previous.number)]
        for alias, heir in zip((CHAMPION, PREVIOUS), [*heirs[:2], None, None], strict=False):
            if heir is not None:
                self.client.set_registered_model_alias(name, alias, str(heir.number))
            elif self.by_alias(name, alias) is not None:
                self.client.delete_registered_model_alias(name, alias)
        return heirs[0] if heirs else None

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
        """Say something at a version, such as what its gate found (``models.gate.tags``)."""
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
        if (
            not set(flavours) <= _ALLOWED_FLAVOURS
            or flavours.get("lightgbm", {}).get("model_class") != "lightgbm.basic.Booster"
        ):
            raise ModelUnreadable(
                f"{place}: flavours {sorted(flavours)} are not a plain LightGBM Booster; only its text file is ever read"
            )
        files = {}
        for file, wanted in json.loads(recorded).items():
            path = folder / "extra_files" / file
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
