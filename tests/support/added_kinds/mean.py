"""A kind of model that somebody adds: what a line earned a day, on average.

Belongs here: the least that a kind of model can be. Does not: anything that another file would have to know of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from models.booster import Because, Encoding
from models.learners.base import Comparison, Floats, Kind, ModelSettings, numbers, squares_apart


class MeanModel(ModelSettings):
    """The section ``model`` with kind ``mean``."""

    kind: Literal["mean"]
    shrink: float = 1.0


class Mean:
    """What all lines earn; the model adds what each line earned itself."""

    learns: ClassVar[bool] = True
    own: ClassVar[bool] = True

    def __init__(self, overall: float, lines: Mapping[str, float], numeric: Sequence[str]) -> None:
        self.overall, self.lines = overall, dict(lines)
        self.encoding = Encoding(tuple(numeric), {})

    @classmethod
    def fit(cls, rows: pa.Table, spec: Mapping[str, Any], *, seed: int, device: str, threads: int) -> Self:
        overall = float(pc.mean(rows["value"]).as_py() or 0.0)
        by_line = rows.group_by("entity_id").aggregate([("value", "mean")]) if cls.own else rows.slice(0, 0)
        lines = (
            dict(zip(by_line["entity_id"].to_pylist(), by_line["value_mean"].to_pylist(), strict=True))
            if cls.own
            else {}
        )
        return cls(overall, lines, spec["numeric"])

    def expect(self, rows: pa.Table) -> Floats:
        return np.array([self.lines.get(e, self.overall) for e in rows["entity_id"].to_pylist()], dtype=np.float64)

    def score(self, features: pa.Table) -> pa.Table:
        return pa.table({"entity_id": features["entity_id"], "earns": self.expect(features)})

    def files(self) -> dict[str, bytes]:
        return {"mean.json": json.dumps([self.overall, self.lines, self.encoding.numeric], sort_keys=True).encode()}

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> Self:
        return cls(*json.loads(files["mean.json"]))

    def evaluate(self, rows: pa.Table) -> dict[str, float]:
        value = numbers(rows["value"])
        return {"mae": float(np.abs(self.expect(rows) - value).mean()), "bias": float((self.expect(rows) - value).mean()),
                "mean_value": float(value.mean())}  # fmt: skip

    def because(self, row: pa.Table) -> Because:
        return Because((), {"earns": float(self.expect(row)[0])}, (), "What the line earned a day, on average.")

    def reads(self) -> dict[str, bool]:
        return {}

    def losses(self, rows: pa.Table) -> dict[str, dict[int, float]]:
        return {}

    def plots(self, rows: pa.Table) -> dict[str, Any]:
        return {}

    def contributions(self, features: pa.Table) -> pa.Table:
        return pa.table({"entity_id": features["entity_id"]})

    def unread(self, features: pa.Table) -> dict[str, list[str]]:
        return {}

    def gains(self) -> dict[str, float]:
        return {}


class Overall(Mean):
    """The rule: what all lines earn."""

    own: ClassVar[bool] = False


KIND = Kind(
    settings=MeanModel,
    learner=Mean,
    rule=Overall,
    policy="nudge",
    scores="amount",
    principal="earns",
    answer="value",
    read_with=(),
    blank=None,
    read=lambda rows: {"predicted": numbers(rows["earns"]), "actual": numbers(rows["value"])},
    features=("budget_micros",),
    outcomes=("value",),
    metrics={"mae": "lower"},
    columns=lambda spec: {},
    comparison=Comparison(
        "value",
        lambda model, rows: model.expect(rows),
        {"mae": lambda p, value: np.abs(p - value)},
        lambda found: abs(found["bias"]) / found["mean_value"],
        "bias as a share of the mean value",
        lambda model, rows: model.expect(rows),
        squares_apart,
    ),
    absent={
        "search": "one number is all that could be searched",
        "distillation": "nothing is smaller than a mean",
        "held-out baseline": "nobody has looked whether its figures are alike",
    },
)
