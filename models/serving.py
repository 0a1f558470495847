"""A registered version as other programs use it: which columns it reads, a table of features given as pandas, scores as pandas.

Belongs here: what a version reads, with its types; an example; scoring a DataFrame. Does not: MLflow (``models.registry``), the
file that MLflow runs (``models.pyfunc_model``), how a model scores (``models.learners``).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from models import catalog

if TYPE_CHECKING:
    import pandas as pd

    from models.learners.base import Learner

KIND = b"kind"
EXAMPLES = 3


@dataclass(frozen=True)
class Served:
    """What a version takes and gives."""

    columns: pa.Schema
    """The columns that it reads, of the types that the features had when it was trained. Not nullable: it cannot do without.
    Its metadata name the kind of model."""
    nulls: frozenset[str]
    """Those that had nulls in training."""
    example: pa.Table
    """A few rows of ``columns``; who they are is not told."""
    scores: pa.Table
    """What the version says of them."""


def describe(kind: str, model: Learner, rows: pa.Table) -> Served:
    """What a model that was trained on ``rows`` (features with outcomes) takes and gives.

    The example says nothing that the model's own files do not: its entities have no names, and a category that the model did
    not learn is null.
    """
    reads = model.reads()
    fields = [pa.field(f.name, f.type, nullable=not reads[f.name]) for f in rows.schema if f.name in reads]
    columns = pa.schema(fields, {KIND: kind.encode()})
    chosen = np.unique(np.linspace(0, rows.num_rows - 1, EXAMPLES).astype(np.int64))
    example = rows.select(columns.names).take(pa.array(chosen))
    if "entity_id" in columns.names:
        names = pa.array([f"example-{n + 1}" for n in range(example.num_rows)])
        example = example.set_column(columns.get_field_index("entity_id"), "entity_id", names)
    for name, known in model.encoding.categorical.items():
        values = example.column(name)
        learned = pc.is_in(values.cast(pa.string()), value_set=pa.array(known, pa.string()))
        hidden = pc.if_else(learned, values, pa.scalar(None, values.type))
        example = example.set_column(columns.get_field_index(name), name, hidden)
    nulls = frozenset(name for name in columns.names if rows.column(name).null_count)
    return Served(columns, nulls, example, model.score(example))


def rows_of(frame: pd.DataFrame, columns: pa.Schema) -> pa.Table:
    """Feature rows given as pandas, in the types that the lake has for them: pandas turns whole numbers with nulls into floats,
    dates into texts or times, decimals and booleans into objects. A column that is not there is left out.

    Raises ValueError naming the column whose values are not of its type.
    """
    fields = [field for field in columns if field.name in frame.columns]
    try:
        given = pa.Table.from_pandas(frame[[field.name for field in fields]], preserve_index=False)
    except pa.ArrowException as error:
        raise ValueError(f"the rows cannot be read: {'; '.join(str(arg) for arg in error.args)}") from error
    found = {}
    for field in fields:
        try:
            found[field.name] = given.column(field.name).cast(field.type)
        except pa.ArrowException as error:
            told = f"column {field.name!r} ({frame[field.name].dtype}) is not {field.type}"
            raise ValueError(f"{told}: {str(error).partition(chr(10))[0]}") from error
    return pa.table(found)


@dataclass(frozen=True)
class Model:
    """A version that was read from its files."""

    learner: Learner
    columns: pa.Schema

    def predict(self, frame: pd.DataFrame) -> pd.DataFrame:
        """The scores of feature rows, one row a row and under its index."""
        scores: pd.DataFrame = self.learner.score(rows_of(frame, self.columns)).to_pandas()
        scores.index = frame.index
        return scores


def load(files: Path, columns: Path) -> Model:
    """The version whose files lie in a folder, and whose ``columns`` (a serialised Arrow schema) in a file.

    Raises WrongDigest for a Booster that is not the one that was registered.
    """
    schema = pa.ipc.read_schema(pa.BufferReader(columns.read_bytes()))
    learner = catalog.learner((schema.metadata or {})[KIND].decode())
    return Model(learner.from_files({p.name: p.read_bytes() for p in files.iterdir()}), schema)
