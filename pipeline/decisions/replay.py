"""The same decision again from its row: what it was made from is found at the versions that it names, and it is made anew.

Belongs here: finding it, and holding both beside each other. Does not: how a decision is made (``pipeline.decisions.scoring``,
``pipeline.decisions.decide``), or why it was made (``pipeline.explain.trace``).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from deltalake.exceptions import DeltaError
from pydantic import ValidationError

from common.errors import SignalboxError
from models.registry import ModelMissing, Registry
from pipeline import point_in_time, provenance
from pipeline.decisions import decide, scoring, tables
from pipeline.lake import Lake, TableMissing
from pipeline.workflow import Workflow


class ReplayImpossible(SignalboxError, RuntimeError):
    """What a decision was made from cannot be found again; the message names it."""


@dataclass(frozen=True)
class Replayed:
    """A recorded decision beside the same decision made again."""

    decision_id: str
    recorded: dict[str, Any]
    again: dict[str, Any]
    same_code: bool

    @property
    def equal(self) -> bool:
        """Whether both are the same to the bit."""
        return self.recorded == self.again

    def as_dict(self) -> dict[str, Any]:
        """For a terminal or JSON."""
        differs = sorted(k for k in self.recorded if self.recorded[k] != self.again.get(k))
        return {
            "decision": self.decision_id,
            "entity": self.recorded["entity_id"],
            "before": self.recorded["before"],
            "after": self.recorded["after"],
            "again": self.again.get("after"),
            "equal to the bit": self.equal,
            "differs in": ", ".join(differs),
            "same code": self.same_code,
            "reasons": self.recorded["reasons"],
        }


@contextlib.contextmanager
def _kept(what: str) -> Iterator[None]:
    """Raise ReplayImpossible naming ``what`` where it can no longer be read."""
    try:
        yield
    except (TableMissing, ModelMissing, DeltaError, OSError, pa.ArrowInvalid) as error:
        raise ReplayImpossible(f"{what} is gone or cannot be read: {error}") from error


def spec_of(name: str, lake: Lake, digest: str) -> Workflow:
    """What a workflow said when it had this digest; raises ReplayImpossible where it is not kept."""
    with _kept(f"{name}/specs"):
        found = lake.read(f"{name}/specs", where=pc.field("digest") == digest)
    if not found.num_rows:
        raise ReplayImpossible(
            f"{name}: no workflow.yaml with digest {digest[:12]}… is kept; the table {name}/specs was cut"
        )
    said = {**json.loads(found["said"][0].as_py()), "folder": Path()}
    try:
        return Workflow.model_validate(said)
    except ValidationError as error:
        # what a later release took out of the format decides nothing any more; the replay shows whether that matters
        for problem in error.errors():
            if problem["type"] != "extra_forbidden":
                raise ReplayImpossible(
                    f"{name}: its workflow.yaml of then is not understood any more: {error}"
                ) from error
            place: Any = said
            for part in problem["loc"][:-1]:
                # the tag of a union stands in the path and not in the text
                place = place[part] if not isinstance(place, dict) or part in place else place
            place.pop(problem["loc"][-1])
    return Workflow.model_validate(said)


def replay(name: str, lake: Lake, registry: Registry, decision_id: str) -> Replayed:
    """Make one recorded decision again from its own row: the versions that it names are read, nothing newer.

    Raises ReplayImpossible where the row, a table version or the model is gone (retention), naming which.
    """
    with _kept(f"{name}/decisions"):
        found = lake.read(f"{name}/decisions", where=pc.field("decision_id") == decision_id)
    if not found.num_rows:
        raise ReplayImpossible(f"{name}: no decision {decision_id!r} is recorded")
    return replay_row(found.to_pylist()[0], lake, registry)


@dataclass(frozen=True)
class MadeFrom:
    """Everything that one recorded decision was made from, found again at the versions that it names."""

    workflow: Workflow
    day: date
    step: str
    features: pa.Table
    """The whole day's, in the order of their keys."""
    scores: pa.Table
    drawn: pa.Table
    learner: Any
    """What scored the row: a learner, the rule, or None for the step ``no_change``."""
    scores_in: Callable[[pa.Table], pa.Table] | None = None
    """In a batch with a canary: the scores that count with other arms drawn."""


def made_from(row: Mapping[str, Any], lake: Lake, registry: Registry) -> MadeFrom:
    """Find it, from a decision's row with its batch's record; raises ReplayImpossible naming what is gone."""
    name, day = row["workflow"], row["day"]
    workflow = spec_of(name, lake, row["spec_digest"])
    with _kept(f"{name}/features version {row['features_version']}"):
        features = point_in_time.ordered(decide.features_of(workflow, lake, day, row["features_version"]))
    # a decision from before what stood was recorded lacks the column
    with _kept(f"{name}/standing version {row.get('standing_version')}"):
        features = scoring.with_standing(
            workflow, features, tables.standing_at(workflow, lake, day, row.get("standing_version"))
        )
    with _kept(f"{name}/arms version {row['arms_version']}"):
        keep = lake.read(f"{name}/arms", version=row["arms_version"])
    drawn = decide.draw_arms(
        workflow, day, pc.unique(decide.of_policy(workflow, features)["unit"]).sort().to_pylist(), keep
    )
    learner: Any = None
    if row["step"] == "rule":
        with _kept(f"{name}/outcomes version {row['outcomes_version']}"):
            learner = scoring.fit_rule(workflow, lake, day, row["features_version"], row["outcomes_version"])
    elif row["step"] != "no_change":
        learner = _decided_by(workflow, registry, row["model_version"], row["model_digest"])
    scores = learner.score(features) if learner is not None else pa.table({})
    if row.get("challenger_version") is None:
        return MadeFrom(workflow, day, row["step"], features, scores, drawn, learner)
    challenger = _decided_by(workflow, registry, row["challenger_version"], row["challenger_digest"])
    theirs = challenger.score(features)

    def scores_in(arms_drawn: pa.Table) -> pa.Table:
        return decide.mixed(workflow, features, arms_drawn, scores, theirs)

    mine = challenger if row.get("arm") == "challenger" else learner
    return MadeFrom(workflow, day, row["step"], features, scores_in(drawn), drawn, mine, scores_in)


def _decided_by(workflow: Workflow, registry: Registry, number: int, digest: str) -> Any:
    """The learner of a version that took part in a batch, if it is still the one that did."""
    with _kept(f"model {workflow.name!r} version {number}"):
        version = registry.by_number(workflow.name, number)
    if version.digest != digest:
        raise ReplayImpossible(
            f"model {workflow.name!r} version {version.number} is not the one that decided (digest differs)"
        )
    return scoring.read_model(workflow, registry, version)


def replay_row(row: Mapping[str, Any], lake: Lake, registry: Registry) -> Replayed:
    """As ``replay``, from the row itself."""
    found = made_from(row, lake, registry)
    again, _ = decide.decide(found.workflow, found.day, found.features, found.scores, found.drawn, found.step)
    mine = again.filter(pc.equal(again["entity_id"], row["entity_id"])).to_pylist()
    recorded = {c: row[c] for c in tables.DECISIONS.names}
    return Replayed(
        row["decision_id"],
        recorded,
        mine[0] if mine else {},
        row["code_digest"] == provenance.digest(found.workflow.name),
    )
