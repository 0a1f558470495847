"""Delta tables: read as of a version, replace a part atomically.

Belongs here: where a table lies, how it is written and read back. Does not: what a table means (the stages say that).
Timestamps are naive UTC in code and ``timestamp[us, UTC]`` on disk.
"""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Literal

import deltalake
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import CommitProperties
from deltalake.exceptions import DeltaError, TableNotFoundError

_UTC = pa.timestamp("us", tz="UTC")
_NAIVE = pa.timestamp("us")


class TableMissing(LookupError):
    """A table that was asked for has never been written."""


def _retyped(table: pa.Table, to_disk: bool) -> pa.Table:
    """Timestamps between naive UTC (code) and zoned UTC (disk); plain strings and lists whatever Arrow flavour came in."""
    columns, fields = [], []
    for column, field_ in zip(table.columns, table.schema, strict=True):
        kind = field_.type
        if pa.types.is_timestamp(kind):
            kind = _UTC if to_disk else _NAIVE
        elif pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
            kind = pa.string()
        elif pa.types.is_dictionary(kind):
            kind = kind.value_type
        elif pa.types.is_null(kind):
            kind = pa.string()
        elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
            kind = pa.list_(pa.field("element", kind.value_type, nullable=True))
        columns.append(column if column.type == kind else column.cast(kind))
        fields.append(pa.field(field_.name, kind, nullable=True))
    return pa.table(columns, schema=pa.schema(fields))


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


class Moved(RuntimeError):
    """Somebody wrote the table after the version that a write started from; nothing was written."""


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

        Every row of ``data`` must meet the predicate itself. Columns that the table did not have are added. Writers of
        one table come one after the other, whatever they write. ``base``: the version that ``data`` was made from (None:
        there was no table); raises Moved where the table is no longer at it.
        """
        rows = _retyped(data, to_disk=True)
        for attempt in range(_ATTEMPTS):
            at = self.version(table) if base == "newest" else base
            try:
                if at is None:
                    return self._create(table, rows, partition_by)
                opened = self._open(table, at)
                deltalake.write_deltalake(
                    opened, rows, mode="overwrite", predicate=predicate, schema_mode="merge", commit_properties=_ALONE
                )
                return at + 1
            except DeltaError as error:
                now = self.version(table)
                if now == at:
                    raise  # nobody was faster: the write itself cannot be
                if base != "newest":
                    raise Moved(f"table {table!r} is at version {now}, and was to be written on {base}") from error
                time.sleep(random.uniform(0, min(0.5, 0.01 * 2**attempt)))
        raise Moved(f"table {table!r}: other writers came first {_ATTEMPTS} times; run it again")

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
