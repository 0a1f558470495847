"""The rows of a CSV or Parquet file, read from its bytes and written as bytes: the same rows always make the same.

Belongs here: the two formats. Does not: where a file lies (``file_drop``, ``atomic_files``), what a cell means (``value_codec``).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from delivery.connectors.base import Misconfigured, Unavailable


def _cell(cell: Any, kind: Any) -> Any:
    """As Arrow takes it for a column of this type."""
    import pyarrow.types as types

    if isinstance(cell, int | Decimal) and not isinstance(cell, bool):
        if types.is_decimal(kind):
            return Decimal(cell)
        if types.is_floating(kind):
            return float(cell)
    return cell


def fits(cell: object, kind: Any) -> bool:
    """Whether a column of this Arrow type can hold the cell."""
    import pyarrow as pa

    try:
        return bool(pa.array([_cell(cell, kind)], kind)[0].is_valid)
    except (pa.ArrowException, OverflowError, TypeError):
        return False


def rows_of(
    content: bytes, path: Path, format: str, delimiter: str
) -> tuple[tuple[str, ...], list[list[Any]], Any, str]:
    """Columns, rows, the Arrow table (Parquet), and the line's end (CSV)."""
    if format == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pq.read_table(io.BytesIO(content))
        except (pa.ArrowException, OSError) as error:
            raise Unavailable(f"{path} is no whole Parquet file: {str(error)[:120]}") from None
        columns = [column.to_pylist() for column in table.columns]
        return tuple(table.column_names), [list(row) for row in zip(*columns, strict=True)], table, ""
    try:
        text = content.decode("utf-8-sig")
        rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise Unavailable(f"{path} is no CSV file in UTF-8: {str(error)[:120]}") from None
    header = tuple(rows[0]) if rows else ()
    for n, row in enumerate(rows[1:], 2):
        if len(row) != len(header):
            raise Unavailable(
                f"{path}: row {n} has {len(row)} fields, its header {len(header)}; is it still being written?"
            )
    return header, rows[1:], None, "\r\n" if "\r\n" in text else "\n"


def csv_of(rows: Sequence[Sequence[Any]], delimiter: str, newline: str) -> bytes:
    """Rows, the header among them, as CSV."""
    out = io.StringIO(newline="")
    plain = csv.writer(out, delimiter=delimiter, lineterminator=newline)
    # the csv module leaves a lone carriage return bare, and reads it as the end of a line
    quoted = csv.writer(out, delimiter=delimiter, lineterminator=newline, quoting=csv.QUOTE_ALL)
    for row in rows:
        writer = quoted if any(isinstance(cell, str) and "\r" in cell for cell in row) else plain
        writer.writerow([format(cell, "f") if isinstance(cell, Decimal) else cell for cell in row])
    return out.getvalue().encode()


def parquet_of(columns: Mapping[str, list[Any]], schema: Any, system: str) -> bytes:
    """Columns as Parquet of a schema. Raises Misconfigured naming the system where a cell does not fit into its column."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        arrays = [pa.array([_cell(c, f.type) for c in columns[f.name]], f.type) for f in schema]
    except (pa.ArrowException, OverflowError, TypeError) as error:
        raise Misconfigured(f"{system}: a cell does not fit into its column: {str(error)[:120]}") from None
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), sink, compression="zstd")
    return sink.getvalue()
