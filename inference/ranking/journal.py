"""Lines that survive: a file that is only appended to, each line on the disk before the page says that it is saved."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from training.utils.errors import UserError
from training.utils.run.files import append_whole, json_line, whole_file
from training.utils.run.folders import shown

OPENED = b'{"act": "opened"'  # what each start appends, the first one to an empty file


class Journal:
    """A JSON lines file of one process.

    A process that ends at any moment loses no line that `append` has returned from; a line that its end has cut is
    removed at the next start.

    Args:
        path: the file, made where there is none.

    Raises:
        UserError: it can not be written, another process writes it, or it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("a+b", buffering=0)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._file.seek(0)
            data = self._file.read()
            if not data.startswith(OPENED[: len(data)]):
                raise UserError(f"{shown(path)} is no journal of this page: give another --output_dir")
            whole = data.rfind(b"\n") + 1
            self._file.truncate(whole)
        except BlockingIOError:
            raise UserError(
                f"{shown(path)} is in use by another page; end that one, or give another --output_dir"
            ) from None
        except OSError as error:
            raise UserError(f"{shown(path)}: {error.strerror}") from error
        self.lines: list[dict[str, Any]] = []
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                self.lines.append(json.loads(line))
            except (ValueError, RecursionError):
                self.lines.append({})
            if not _is_whole(self.lines[-1]):
                raise UserError(
                    f"{shown(path)}:{number} is damaged: remove the line, and the prompt's rows in the other files, to "
                    "have it judged again"
                )

    def append(self, line: Mapping[str, Any]) -> None:
        """Add a line; it is on the disk when this returns, and not at all if it raises.

        Raises:
            UserError: the disk is full, or the file has been moved.
        """
        if not self.path.exists() or not os.path.samestat(self.path.stat(), os.fstat(self._file.fileno())):
            raise UserError(f"{self.path.name} has been moved or removed while the page was open; start the page again")
        append_bytes(self._file, (json_line(line) + "\n").encode())

    def close(self) -> None:
        """Let another process have it."""
        self._file.close()


def _is_whole(line: Any) -> bool:
    """Whether a line has what every act has."""
    if not isinstance(line, dict):
        return False
    needed = {"act", "time"} if line.get("act") == "opened" else {"act", "time", "item", "judge", "answers"}
    return needed <= line.keys()


def append_bytes(file: Any, data: bytes) -> None:
    """Append to an unbuffered file, whole or not at all, and wait for the disk.

    Raises:
        UserError: it can not be written.
    """
    try:
        append_whole(file, data)
    except OSError as error:
        raise UserError(f"not saved: {Path(file.name).name}: {error.strerror}; make room, and save again") from error


class RowsFile:
    """A file of rows, one for each key: new rows are appended, after any other change it is written anew."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[tuple[str, str], bytes] = {}
        self._new: list[bytes] = []
        self._size = -1  # of the file as `flush` has left it; where it has another one, it is written anew

    def holds_only(self, made: Collection[tuple[str, str, str]]) -> bool:
        """Whether all rows in the file are of these, each its id, judge and time; a last one may have been cut.

        Raises:
            UserError: the file can not be read.
        """
        try:
            *lines, cut = self.path.read_bytes().split(b"\n") if self.path.exists() else [b""]
            rows = [json.loads(line) for line in lines]
            known = all((row["id"], row["judge"], row["time"]) in made for row in rows)
        except OSError as error:
            raise UserError(f"{shown(self.path)}: {error.strerror}") from error
        except (ValueError, LookupError, TypeError, RecursionError):  # no JSON, or no row of this page
            return False
        return known and (not cut or any(row.startswith(cut) for row in self.rows.values()))

    def put(self, key: tuple[str, str], row: Mapping[str, Any]) -> None:
        """Add a row."""
        self.rows[key] = (json_line(row) + "\n").encode()
        self._new.append(self.rows[key])

    def drop(self, key: tuple[str, str]) -> None:
        """Take a row out, if it is there."""
        if self.rows.pop(key, None) is not None:
            self._size = -1

    def flush(self) -> None:
        """Bring the file up to date.

        Raises:
            UserError: it can not be written; the next call writes it anew.
        """
        data, size, self._new, self._size = b"".join(self._new), self._size, [], -1
        if self.path.is_file() and self.path.stat().st_size == size:
            if data:
                with self.path.open("ab", buffering=0) as file:
                    append_bytes(file, data)
            self._size = size + len(data)
        else:
            data = b"".join(self.rows.values())
            try:
                with whole_file(self.path) as file:
                    file.write(data)
            except OSError as error:
                raise UserError(f"{shown(self.path)}: {error.strerror}") from error
            self._size = len(data)
