"""Readers: one data file becomes a stream of raw rows with their places.

A wrong row is an error of that row, which ``--on_bad_row skip`` counts; what leaves nothing to go on with (a JSON list
that does not parse, a cut gzip) is an error of the file.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from training.utils.data.reading.rows import MAX_ROW_CHARACTERS, RawRow, too_big
from training.utils.data.template import RowError
from training.utils.errors import UserError
from training.utils.run.files import LFS, LFS_SAID, once_each

TYPES = ("json", "jsonl", "ndjson", "csv", "tsv", "txt", "parquet", "arrow")
EVAL_WORDS = {"eval", "evaluation", "test", "validation", "valid", "val", "dev", "held"}
_CHUNK = 1 << 20
_BLANKS = re.compile(r"[ \t\r\n]+")
_MOST_EMPTY_LINES = 1_000_000  # one after the other: a damaged file, which would be read for hours without a word
_MOST_DIGITS = 4000  # Python refuses to read longer numbers (a guard against its slow conversion)
_ESCAPED = re.compile("[\udc80-\udcff]")  # what "surrogateescape" makes of bytes that are no UTF-8


def _integer(digits: str) -> int | str:
    """A number of JSON; one that Python would refuse stays the text that it is."""
    return int(digits) if len(digits) <= _MOST_DIGITS else digits


_DECODER = json.JSONDecoder(parse_int=_integer, object_pairs_hook=once_each)
_LAX = json.JSONDecoder(parse_int=_integer)  # to go on behind a row with a key twice


def type_of(path: Path) -> str:
    """The data type that the name tells, '' if none; a trailing .gz, .train or .test is looked through."""
    for suffix in reversed(path.suffixes):
        suffix = suffix.lower().lstrip(".")
        if suffix in TYPES:
            return "jsonl" if suffix == "ndjson" else suffix
        if suffix not in ("gz", "train", *EVAL_WORDS):
            return ""
    return ""


def _read_table(file: IO[bytes], path: Path) -> Iterator[RawRow]:
    from training.utils.data.reading.tables import read_table  # pyarrow takes a moment

    return read_table(file, path, type_of(path))


def read_file(path: Path) -> Iterator[RawRow]:
    """Every row of one data file, read as a stream.

    Raises:
        UserError: the file as a whole can not be read (broken JSON array, cut gzip, wrong delimiter, not parquet).
    """
    number = 0
    try:
        with path.open("rb") as raw:
            zipped = path.name.lower().endswith(".gz") or raw.peek(2)[:2] == b"\x1f\x8b"
            file: Any = io.BufferedReader(gzip.GzipFile(fileobj=raw)) if zipped else raw
            if file.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise UserError(f"{path}: the file is in UTF-16; save it as UTF-8")
            if file.peek(len(LFS))[: len(LFS)] == LFS:
                raise UserError(f"{path}: {LFS_SAID}")
            kind = type_of(path)
            if kind not in ("parquet", "arrow") and b"\0" in file.peek(1):
                raise UserError(f"{path}: the file is in UTF-16, or no text (it has zero bytes); save it as UTF-8")
            if kind == "jsonl" and file.peek(1).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[":
                kind = "json"  # a list of all rows, whatever the file is called
            for row in _READERS[kind](file, path):
                number += 1
                yield row
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: the gzip file is cut off or damaged after row {number} ({error})") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None


def _decode(data: bytes) -> str | RowError:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return RowError(f"invalid UTF-8: byte {error.start + 1} of the line is 0x{error.object[error.start]:02x}")


def _lines(file: IO[bytes], path: Path) -> Iterator[tuple[str | RowError, str]]:
    number = empty = 0
    while line := file.readline(4 * MAX_ROW_CHARACTERS):
        number += 1
        empty = 0 if line.strip() else empty + 1
        _check_not_empty(empty, path, number)
        size = len(line)
        while not line.endswith(b"\n") and (more := file.readline(_CHUNK)):  # skip the rest of a huge line
            size += len(more)
            line = line[:1] if not more.endswith(b"\n") else b"\n"
        yield (too_big(size) if size > MAX_ROW_CHARACTERS else _decode(line.rstrip(b"\r\n"))), f"{path}:{number}"


def _check_not_empty(lines: int, path: Path, number: int) -> None:
    if lines > _MOST_EMPTY_LINES:
        raise UserError(f"{path}:{number}: {lines} empty lines one after the other; is the file damaged?")


def _parse_object(line: str) -> dict[str, Any] | RowError:
    try:
        value = _DECODER.decode(line)
    except json.JSONDecodeError as error:
        return RowError(f"broken JSON at column {error.colno}: {error.msg}")
    except ValueError as error:  # of once_each
        return RowError(str(error))
    except RecursionError:
        return RowError("broken JSON: nested too deeply")
    return _object(value)


_JSON_TYPES = {str: "text", list: "list", bool: "boolean", int: "number", float: "number", type(None): "null"}


def _object(value: Any) -> dict[str, Any] | RowError:
    if isinstance(value, (dict, RowError)):
        return value
    return RowError(f"a row must be a JSON object, this is a {_JSON_TYPES[type(value)]}")


def _read_lines(file: IO[bytes], path: Path) -> Iterator[RawRow]:
    """An object of JSON a line; in a .txt one document a line, unless the first line begins with a brace."""
    json_lines = None if type_of(path) == "txt" else True
    for line, place in _lines(file, path):
        if isinstance(line, RowError):
            yield RawRow(line, place)
        elif line.strip():
            if json_lines is None:
                json_lines = line.lstrip().startswith("{")
            yield RawRow(_parse_object(line) if json_lines else {"text": line}, place, len(line))


def _read_json(file: IO[bytes], path: Path) -> Iterator[RawRow]:
    """A JSON array of objects, or objects one after the other, decoded one at a time from the whole text."""
    data = file.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + error.object.count(b"\n", 0, error.start)
        raise UserError(f"{path}:{line}: invalid UTF-8: byte 0x{error.object[error.start]:02x}") from None

    def behind(at: int) -> int:
        """The place of the next character that is no white space."""
        blanks = _BLANKS.match(text, at)
        return blanks.end() if blanks else at

    def broken(at: int, reason: str) -> UserError:
        """An error that names line and column of a place in the text."""
        line, column = 1 + text.count("\n", 0, at), at - text.rfind("\n", 0, at)
        return UserError(f"{path}:{line}: broken JSON at column {column}: {reason}")

    at = behind(0)
    array = text.startswith("[", at)
    at = behind(at + array)
    line = 1 + text.count("\n", 0, at)
    while at < len(text) and not (array and text[at] == "]"):
        try:
            value, end = _decoded(text, at)
        except json.JSONDecodeError as error:
            raise broken(error.pos, error.msg) from None
        except RecursionError:
            raise broken(at, "nested too deeply") from None
        size = end - at
        yield RawRow(too_big(size) if size > MAX_ROW_CHARACTERS else _object(value), f"{path}:{line}", size)
        after = behind(end)
        if array and text.startswith(",", after):
            after = behind(after + 1)
            if text.startswith("]", after):
                raise broken(after, "a comma before the end of the list")
        elif array and after < len(text) and text[after] != "]":
            raise broken(after, "a comma is missing between two rows")
        line += text.count("\n", at, after)
        at = after
    if array and at == len(text):
        raise broken(at, "the list does not end")
    if array and behind(at + 1) < len(text):
        raise broken(behind(at + 1), "something follows the list")


def _decoded(text: str, at: int) -> tuple[Any, int]:
    """The JSON value that starts at a place, a `RowError` for one with a key twice, and the place behind it."""
    try:
        return _DECODER.raw_decode(text, at)
    except json.JSONDecodeError:
        raise
    except ValueError as error:  # of once_each
        return RowError(str(error)), _LAX.raw_decode(text, at)[1]


def _read_csv(file: IO[bytes], path: Path) -> Iterator[RawRow]:
    delimiter = "\t" if type_of(path) == "tsv" else ","
    csv.field_size_limit(4 * MAX_ROW_CHARACTERS)
    # A byte that is no UTF-8 becomes a surrogate, so that its row can be named, and left out
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    columns: list[str] = []
    start, empty = 1, 0
    while True:
        start = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"{path}:{start}: broken CSV: {error}; is a quote missing?") from None
        blank = not any(map(str.strip, cells))  # spreadsheets write commas alone for rows that were emptied
        empty = empty + 1 if blank else 0
        _check_not_empty(empty, path, start)
        if blank:
            continue
        if not columns:
            columns = _header(cells, delimiter, path)
            continue
        values: dict[str, Any] | RowError = dict(zip(columns, cells, strict=False))
        size = sum(map(len, cells))
        if len(cells) != len(columns):
            values = RowError(f"{len(cells)} cells where the header has {len(columns)}; is a quote missing?")
        elif [cell.strip("\ufeff").strip() for cell in cells] == columns:
            values = RowError("the header stands here again, as where files were put together; remove the line")
        elif size > MAX_ROW_CHARACTERS:
            values = too_big(size)
        elif (wrong := next(filter(None, map(_ESCAPED.search, cells)), None)) is not None:
            values = RowError(f"invalid UTF-8: byte 0x{ord(wrong[0]) - 0xDC00:02x}")
        yield RawRow(values, f"{path}:{start}", size)


def _header(cells: list[str], delimiter: str, path: Path) -> list[str]:
    if cells[0].lower().startswith("sep="):
        raise UserError(f"{path}:1: the first line, {','.join(cells)}, is a note to spreadsheets: leave it out")
    if len(cells) == 1:
        for other, word in ((";", "semicolons"), ("\t", "tabs"), (",", "commas"), ("|", "bars")):
            if other != delimiter and other in cells[0]:
                wanted = "commas" if delimiter == "," else "tabs"
                raise UserError(
                    f"{path}:1: the header {cells[0][:60]!r} is one cell: it is separated by {word}, not {wanted}; "
                    + ("name the file .tsv" if other == "\t" else f"save it with {wanted}")
                )
    names = [cell.strip() for cell in cells]
    if wrong := _ESCAPED.search("".join(names)):
        raise UserError(f"{path}:1: invalid UTF-8 in the header: byte 0x{ord(wrong[0]) - 0xDC00:02x}; save it as UTF-8")
    if twice := next((name for name in names if name and names.count(name) > 1), None):
        raise UserError(f"{path}:1: the column name {twice} stands twice in the header: {', '.join(names)}")
    return names


_READERS: dict[str, Callable[[IO[bytes], Path], Iterator[RawRow]]] = {
    **dict.fromkeys(("jsonl", "txt"), _read_lines),
    **dict.fromkeys(("csv", "tsv"), _read_csv),
    **dict.fromkeys(("parquet", "arrow"), _read_table),
    "json": _read_json,
}
