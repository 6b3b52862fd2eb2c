"""Rows of Arrow tables: parquet and arrow files, and datasets of the hub.

Many rows are turned into Python values at once. Where that fails (bytes that are no UTF-8, a date that Python does not
have) or would take much memory it is done cell by cell, and a cell that fails is an error of its column in its row.
"""

from __future__ import annotations

import gzip
import io
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from training.utils.data.reading.rows import MAX_ROW_CHARACTERS, RawRow, too_big
from training.utils.data.template import RowError
from training.utils.errors import UserError

_BATCH = 256
# What turning an Arrow value into a Python value raises; the hub's library also decodes images, and may lack a package
_UNREADABLE = (ValueError, OverflowError, KeyError, OSError, ImportError, pyarrow.ArrowException)


def read_table(file: Any, path: Path, kind: str) -> Iterator[RawRow]:
    """Every row of a ``parquet`` or an ``arrow`` file.

    Raises:
        UserError: not of that kind, cut off, a damaged page, or two columns of one name.
    """
    try:
        batches = _parquet_batches(file, path) if kind == "parquet" else _arrow_batches(file)
        for number, values in enumerate(itertools.chain.from_iterable(map(_rows, batches)), 1):
            yield _raw_row(values, f"{path}:{number}")
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable {kind} file: {str(error).splitlines()[0]}") from None


def _parquet_batches(file: Any, path: Path) -> Iterator[pyarrow.RecordBatch]:
    zipped = isinstance(getattr(file, "raw", None), gzip.GzipFile)  # parquet is read from its end: unpacked first
    table = pyarrow.parquet.ParquetFile(io.BytesIO(file.read()) if zipped else file)
    names = table.schema_arrow.names
    if len(set(names)) != len(names):
        raise UserError(f"{path}: a column name stands twice: {', '.join(names)}")
    yield from table.iter_batches(batch_size=_BATCH)


def _arrow_batches(file: Any) -> Iterator[pyarrow.RecordBatch]:
    """Of a stream (as ``save_to_disk`` writes it), or of a file with its table of contents at the end."""
    if file.peek(6)[:6] == b"ARROW1":
        reader = pyarrow.ipc.open_file(pyarrow.BufferReader(file.read()))
        batches: Iterable[pyarrow.RecordBatch] = map(reader.get_batch, range(reader.num_record_batches))
    else:
        batches = pyarrow.ipc.open_stream(file)
    for batch in batches:
        yield from (batch.slice(start, _BATCH) for start in range(0, batch.num_rows, _BATCH))


def hub_rows(split: Any, name: str) -> Iterator[RawRow]:
    """Every row of a `datasets.Dataset`; places are ``name`` and the row's number from 1."""
    for start in range(0, len(split), _BATCH):
        numbers = range(start, min(start + _BATCH, len(split)))
        try:
            columns = split[start : numbers.stop]
            found = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
        except _UNREADABLE:
            found = [_hub_row(split, number) for number in numbers]
        for number, values in zip(numbers, found, strict=True):
            yield _raw_row(values, f"{name}:{number + 1}")


def _hub_row(split: Any, number: int) -> dict[str, Any]:
    try:
        return split[number]
    except _UNREADABLE:
        return _cells(split.with_format("arrow")[number : number + 1], 0)


def _rows(batch: pyarrow.RecordBatch) -> Iterable[dict[str, Any]]:
    one_by_one = (_cells(batch, number) for number in range(batch.num_rows))
    try:
        return batch.to_pylist() if batch.nbytes <= MAX_ROW_CHARACTERS else one_by_one
    except _UNREADABLE:  # of which cell, the others tell
        return one_by_one


def _cells(batch: pyarrow.RecordBatch | pyarrow.Table, number: int) -> dict[str, Any]:
    return {name: _cell(batch.column(i)[number], name) for i, name in enumerate(batch.schema.names)}


def _cell(value: pyarrow.Scalar, name: str) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        return RowError(f"column {name!r} can not be read: invalid UTF-8: byte {error.start + 1} is 0x{byte:02x}")
    except _UNREADABLE as error:
        return RowError(f"column {name!r} can not be read: {error}")


def _raw_row(values: dict[str, Any], place: str) -> RawRow:
    size = characters_of(values)
    return RawRow(values, place, size) if size <= MAX_ROW_CHARACTERS else RawRow(too_big(size), place)


def characters_of(value: Any) -> int:
    """About how long a value is as text: the characters in it, however deep, and a few for each number."""
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, dict):
        return sum(map(characters_of, value.values()))
    return sum(map(characters_of, value)) if isinstance(value, (list, tuple)) else 8
