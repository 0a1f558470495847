"""Delta tables: read as of a version, replace a part atomically.

Belongs here: where a table lies, how it is written and read back. Does not: what a table means (the stages say that).
Timestamps are naive UTC in code and ``timestamp[us, UTC]`` on disk.
"""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Literal

import deltalake
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import CommitProperties
from deltalake.exceptions import DeltaError, TableNotFoundError

from common import duckdb_session
from common.errors import SignalboxError

_UTC = pa.timestamp("us", tz="UTC")
_NAIVE = pa.timestamp("us")


class TableMissing(SignalboxError, LookupError):
    """A table that was asked for has never been written."""


class TypeChanged(SignalboxError, ValueError):
    """A column was to be written with a type in which not every value of the table, or of the write, would stand as it
    is; nothing was written. The message names table and column, both types and the way out."""


def _retyped(table: pa.Table, to_disk: bool) -> pa.Table:
    """Timestamps between naive UTC (code) and zoned UTC (disk); plain strings and lists whatever Arrow flavour came in."""
    columns, fields = [], []
    for column, field_ in zip(table.columns, table.schema, strict=True):
        kind = _flavour(field_.type, _UTC if to_disk else _NAIVE)
        columns.append(column if column.type == kind else column.cast(kind))
        fields.append(pa.field(field_.name, kind, nullable=True))
    return pa.table(columns, schema=pa.schema(fields))


_SIGNED = {pa.uint8(): pa.int16(), pa.uint16(): pa.int32(), pa.uint32(): pa.int64(), pa.uint64(): pa.int64()}


def _flavour(kind: pa.DataType, moment: pa.DataType) -> pa.DataType:
    """The type in which a type is kept. A column without a type is text until its first value (``_common``)."""
    if pa.types.is_timestamp(kind):
        return moment
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind) or pa.types.is_null(kind):
        return pa.string()
    if pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return pa.binary()
    if pa.types.is_dictionary(kind):
        return _flavour(kind.value_type, moment)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.list_(pa.field("element", _flavour(kind.value_type, moment), nullable=True))
    return _SIGNED.get(kind, kind)  # Delta knows no unsigned numbers


def _storable(table: str, data: pa.Table) -> pa.Table:
    """The rows as they are kept, each value as it was. Raises TypeChanged where a type cannot be kept."""
    columns = {}
    for name in data.schema.names:
        column = data.select([name])
        try:
            columns[name] = _retyped(column, to_disk=True)[name]
            deltalake.Schema.from_arrow(pa.schema([(name, columns[name].type)]))
        except Exception as error:  # deltalake raises bare Exceptions here
            raise TypeChanged(
                f"table {table!r}, column {name!r}: {data.schema.field(name).type} cannot be kept as it is "
                f"({str(error).splitlines()[0]}); cast it in the SQL that makes it"
            ) from error
    return pa.table(columns)


def _common(old: pa.DataType, new: pa.DataType) -> pa.DataType | None:
    """The type in which values of both types stand, if there is one; whether each value does is for ``_exactly``."""
    if old == new:
        return old
    if pa.types.is_list(old) and pa.types.is_list(new):
        inner = _common(old.value_type, new.value_type)
        return None if inner is None else pa.list_(pa.field("element", inner, nullable=True))
    for alike in (pa.types.is_integer, pa.types.is_floating):
        if alike(old) and alike(new):
            return max(old, new, key=lambda kind: kind.bit_width)
    if pa.types.is_decimal(old) and pa.types.is_decimal(new):
        whole, scale = max(old.precision - old.scale, new.precision - new.scale), max(old.scale, new.scale)
        return pa.decimal128(whole + scale, scale) if whole + scale <= 38 else None
    if all(pa.types.is_integer(k) or pa.types.is_floating(k) or pa.types.is_decimal(k) for k in (old, new)):
        return pa.float64()
    return None


def _inside(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """What the lists of a column hold."""
    return pa.chunked_array([pc.list_flatten(column.combine_chunks())], column.type.value_type)


def _joint(old: pa.ChunkedArray, new: pa.ChunkedArray) -> pa.DataType | None:
    """``_common`` of two columns, where one without a value takes any type."""
    if new.null_count == len(new):
        return old.type
    if old.null_count == len(old):
        return new.type
    if pa.types.is_list(old.type) and pa.types.is_list(new.type):
        inner = _joint(_inside(old), _inside(new))
        return None if inner is None else pa.list_(pa.field("element", inner, nullable=True))
    return _common(old.type, new.type)


def _exactly(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray | None:
    """A column in another type where each value stands in it as it is, else None."""
    if column.type == kind:
        return column
    if column.null_count == len(column):
        return pa.chunked_array([pa.nulls(len(column), kind)])
    if pa.types.is_list(column.type):
        alike = pa.types.is_list(kind) and _exactly(_inside(column), kind.value_type) is not None
        return column.cast(kind) if alike else None
    try:
        cast = column.cast(kind)
        if pa.types.is_floating(column.type) and pa.types.is_floating(kind) and kind.bit_width > column.type.bit_width:
            return cast  # and what is not a number stays none
        back = cast.cast(column.type)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return None
    return cast if back.equals(column) else None


def content_digest(table: pa.Table, columns: Sequence[str] | None = None) -> str:
    """SHA-256 of a table's rows and types in their order, whatever chunks or files they lay in."""
    picked = table.select(list(columns)) if columns is not None else table
    sink = pa.BufferOutputStream()
    whole = pa.Table.from_batches(picked.combine_chunks().to_batches(), schema=picked.schema.remove_metadata())
    # take() rewrites every buffer from offset 0, so that a slice and a copy of it hash the same
    whole = whole.take(pa.array(np.arange(whole.num_rows))).combine_chunks()
    with pa.ipc.new_stream(sink, whole.schema) as writer:
        writer.write_table(whole)
    return hashlib.sha256(sink.getvalue()).hexdigest()


class VersionMissing(TableMissing):
    """A version that was asked for is no longer kept, though the table is."""


class Moved(SignalboxError, RuntimeError):
    """Somebody wrote the table after the version that a write started from; nothing was written."""


def _kept(opened: deltalake.DeltaTable) -> list[pa.Field]:
    """The columns of a table, in the types in which they are kept."""
    return [pa.field(f.name, _flavour(f.type, f.type)) for f in pa.schema(opened.schema().to_arrow())]


def _some(column: pa.ChunkedArray) -> str:
    """The first three of a column's values, for a message."""
    return ", ".join(map(repr, column.drop_null().slice(0, 3).to_pylist())) or "no value"


_ALONE = CommitProperties(max_commit_retries=0)
"""A commit that lands right after the version that it was prepared on, or not at all: Delta's own way of settling two
overwrites of one partition can lose the rows of one of them without an error (delta-rs issue 3622)."""
_ATTEMPTS = 60
"""How often a replacement that other writers came before is tried; each lost race means that another one was won."""
_KEEP = {"delta.logRetentionDuration": "interval 3650 days", "delta.deletedFileRetentionDuration": "interval 3650 days"}
"""Versions are kept until somebody shortens this on a table on purpose: Delta's own 30 days would end every replay."""


@dataclass(frozen=True)
class Lake:
    """The tables below one root: a local folder, or an object store's URL with its ``storage_options``.

    A table is named ``<workflow>/<stage>`` and is partitioned by the day it speaks of.
    """

    root: str
    storage_options: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if "://" not in self.root and set(self.root) & set("[]*?{}"):
            raise ValueError(
                f"{self.root}: the lake's folder may not hold any of [ ] * ? {{ }}; choose another SIGNALBOX_HOME"
            )

    def uri(self, table: str) -> str:
        """Where a table lies."""
        return f"{self.root.rstrip('/')}/{table}" if "://" in self.root else os.path.join(self.root, table)

    def _open(self, table: str, version: int | None = None) -> deltalake.DeltaTable:
        try:
            return deltalake.DeltaTable(self.uri(table), version=version, storage_options=self.storage_options or None)
        except DeltaError as error:
            if version is not None and self.exists(table):
                raise VersionMissing(
                    f"table {table!r} under {self.root} no longer has version {version}: it was cut by vacuum or by "
                    "delta.logRetentionDuration"
                ) from error
            if not isinstance(error, TableNotFoundError):
                raise
            raise TableMissing(
                f"table {table!r} has never been written under {self.root}; materialise it first"
            ) from None

    def exists(self, table: str) -> bool:
        """Whether the table has been written at least once."""
        return bool(deltalake.DeltaTable.is_deltatable(self.uri(table), storage_options=self.storage_options or None))

    def version(self, table: str) -> int | None:
        """The newest version of a table, or None where it has never been written."""
        return self._open(table).version() if self.exists(table) else None

    def read(
        self,
        table: str,
        *,
        version: int | None = None,
        days: Sequence[date] | None = None,
        where: pc.Expression | None = None,
        columns: Sequence[str] | None = None,
    ) -> pa.Table:
        """Rows of a table as of a version; ``days`` prunes partitions by ``day``, ``where`` filters rows.

        Raises TableMissing for a table that was never written, VersionMissing for a version that is no longer kept.
        """
        opened = self._open(table, version)
        pruned = None
        if days and "day" in opened.metadata().partition_columns:
            pruned = [
                ("day", "in", [d.isoformat() for d in days])
            ]  # listing a year's files costs more than reading one day
        dataset = opened.to_pyarrow_dataset(file_pruning_predicate=pruned)
        condition = where
        if days is not None:
            inside = pc.field("day").isin(pa.array(list(days), pa.date32()))
            condition = inside if condition is None else condition & inside
        found = dataset.to_table(columns=list(columns) if columns is not None else None, filter=condition)
        return _retyped(found, to_disk=False)

    def replace(
        self,
        table: str,
        data: pa.Table,
        *,
        predicate: str,
        partition_by: Sequence[str] = ("day",),
        base: int | Literal["newest"] | None = "newest",
    ) -> int:
        """Put ``data`` in the place of the rows that meet ``predicate``, in one commit; returns that commit's version.

        Every row of ``data`` must meet the predicate itself. Columns that the table did not have are added. Where a column
        has another type than in the table, both are kept in the type that holds them exactly (whole numbers become
        fractions, a column without a value takes any type) and the table is rewritten in the same commit; raises
        TypeChanged where there is no such type. Versions before it stay as they are. Writers of one table come one after
        the other, whatever they write. ``base``: the version that ``data`` was made from (None: there was no table);
        raises Moved where the table is no longer at it.
        """
        rows = _storable(table, data)
        for attempt in range(_ATTEMPTS):
            at = self.version(table) if base == "newest" else base
            try:
                if at is None:
                    return self._create(table, rows, partition_by)
                opened = self._open(table, at)
                kinds = self._agreed(table, opened, rows, predicate)
                fitted = pa.table(
                    [_exactly(rows[n], kinds[n]) for n in rows.schema.names],
                    schema=pa.schema([(n, kinds[n]) for n in rows.schema.names]),
                )
                if any(kinds[f.name] != f.type for f in _kept(opened)):
                    self._rewrite(opened, fitted, kinds, predicate)
                else:
                    deltalake.write_deltalake(
                        opened, fitted, mode="overwrite", predicate=predicate, schema_mode="merge",
                        commit_properties=_ALONE,
                    )  # fmt: skip
                return at + 1
            except DeltaError as error:
                now = self.version(table)
                if now == at:
                    raise  # nobody was faster: the write itself cannot be
                if base != "newest":
                    raise Moved(f"table {table!r} is at version {now}, and was to be written on {base}") from error
                time.sleep(random.uniform(0, min(0.5, 0.01 * 2**attempt)))
        raise Moved(f"table {table!r}: other writers came first {_ATTEMPTS} times; run it again")

    def _agreed(
        self, table: str, opened: deltalake.DeltaTable, rows: pa.Table, predicate: str
    ) -> dict[str, pa.DataType]:
        """The type of each column after a replacement. Raises TypeChanged where no type holds every value."""
        kinds = {f.name: f.type for f in _kept(opened)}
        before = dict(kinds)
        for name in rows.schema.names:
            old, new = before.get(name), rows.schema.field(name).type
            if old is None or old == new:
                kinds[name] = new
                continue
            whole = rows[name].null_count == len(rows) or _common(old, new) == old
            if whole and _exactly(rows[name], old) is not None:
                continue  # without looking at what stands
            stays = self._staying(opened, [name], predicate).read_all()[name].cast(old)
            joint = _joint(stays, rows[name])
            held = joint is not None and all(_exactly(c, joint) is not None for c in (stays, rows[name]))
            kinds[name] = joint if held else old
            if not held or (kinds[name] != old and name in opened.metadata().partition_columns):
                raise TypeChanged(
                    f"table {table!r}, column {name!r}: holds {old}, such as {_some(stays)}, and would be given {new}, such "
                    f"as {_some(rows[name])}; no type holds both exactly, so nothing was written. Cast it to {old} where it "
                    "is made (the workflow's SQL, the contract's type), or give the new figure a name of its own"
                )
        return kinds

    def _staying(self, opened: deltalake.DeltaTable, columns: Sequence[str], predicate: str) -> pa.RecordBatchReader:
        """The rows of a table that a replacement leaves, batch by batch."""
        connection = duckdb_session.engine()
        connection.register("stored", opened.to_pyarrow_dataset())
        picked = ", ".join('"' + c.replace('"', '""') + '"' for c in columns)
        return connection.sql(f"SELECT {picked} FROM stored WHERE NOT coalesce(({predicate}), false)").to_arrow_reader()

    def _rewrite(
        self, opened: deltalake.DeltaTable, rows: pa.Table, kinds: dict[str, pa.DataType], predicate: str
    ) -> None:
        """Write the whole table anew, in other types: what stays of it, and the new rows."""
        connection = duckdb_session.engine()
        connection.register("given", rows)
        found = connection.sql(f"SELECT count(*) FROM given WHERE NOT coalesce(({predicate}), false)").fetchall()
        if found != [(0,)]:
            raise ValueError(f"{found[0][0]} rows do not meet the predicate {predicate} of what they replace")
        schema = pa.schema(list(kinds.items()))
        old = {f.name: f.type for f in _kept(opened)}
        staying = self._staying(opened, list(old), predicate)  # opened here: deltalake cannot be asked while it writes

        def batches() -> Iterator[pa.RecordBatch]:
            for batch in staying:
                part = pa.Table.from_batches([batch])
                columns = [
                    _exactly(part[n].cast(old[n]), kind) if n in old else pa.chunked_array([pa.nulls(len(part), kind)])
                    for n, kind in kinds.items()
                ]
                yield from pa.table(columns, schema=schema).to_batches()
            missing = [n for n in kinds if n not in rows.schema.names]
            whole = rows
            for name in missing:
                whole = whole.append_column(name, pa.nulls(rows.num_rows, kinds[name]))
            yield from whole.select(schema.names).cast(schema).to_batches()

        deltalake.write_deltalake(
            opened, pa.RecordBatchReader.from_batches(schema, batches()), mode="overwrite", schema_mode="overwrite",
            partition_by=list(opened.metadata().partition_columns), commit_properties=_ALONE,
        )  # fmt: skip

    def restore(self, table: str, version: int | None) -> None:
        """Make a table what it was at a version, in a new commit; None: before there was one, so that it ends up without rows.

        For the only writer of a table, who takes back what it began: what others wrote since is taken back, too.
        """
        if self.version(table) == version:
            return
        opened = self._open(table)
        if version is None:
            opened.delete(commit_properties=_ALONE)
        else:
            opened.restore(version, commit_properties=_ALONE)

    def _create(self, table: str, rows: pa.Table, partition_by: Sequence[str]) -> int:
        """Write the first version of a table; raises DeltaError where somebody else did."""
        if "://" not in self.root:
            os.makedirs(self.uri(table), exist_ok=True)
        deltalake.write_deltalake(
            self.uri(table), rows, partition_by=list(partition_by), configuration=_KEEP,
            storage_options=self.storage_options or None, commit_properties=_ALONE,
        )  # fmt: skip
        return 0

    def replace_days(self, table: str, data: pa.Table, days: Sequence[date]) -> int:
        """Replace whole days of a table partitioned by ``day`` (days without rows end up empty)."""
        span = ", ".join(f"'{d.isoformat()}'" for d in sorted(days))
        return self.replace(table, data, predicate=f"day IN ({span})")
