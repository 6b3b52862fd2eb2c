"""A run's small files: JSON objects read with one line of what is wrong, texts written whole or not at all."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from training.utils.errors import UserError, half_character, refusals

GENERATOR = '<meta name="generator" content="tripod">'  # in the head of a page of ours, which may be written anew
LFS = b"version https://git-lfs"  # what stands in a file's place where Git LFS has not fetched it
LFS_SAID = "a pointer of Git LFS, not the file itself; run git lfs pull in its folder"


def check_page(path: Path, flag: str) -> None:
    """Refuse to write a page over a file that is none of ours.

    Raises:
        UserError: it holds something else, or may not be read; names the flag.
    """
    with refusals(f"{flag} {path}"):
        if not path.is_file():
            return
        with path.open("rb") as file:
            head = file.read(500)
    if head and GENERATOR.encode() not in head:
        raise UserError(f"{flag} {path}: there is such a file, and it is no page of this program; name another one")


def new_file(text: str) -> str:
    """The name of a file to write that is not there yet, or nothing: a ``type`` of argparse."""
    path = os.path.expanduser(text)
    if path and os.path.exists(path):
        raise argparse.ArgumentTypeError(f"{text}: there is such a file; name another one")
    return path


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, an empty one where there is no file.

    Raises:
        UserError: the file is there and holds no JSON object.
    """
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # JSON's and UTF-8's are ValueErrors
        raise UserError(f"{path} is not readable as JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object")
    return found


def once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object by its pairs, for ``object_pairs_hook``.

    Raises:
        ValueError: a key stands twice, so that its first value would be lost.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} stands twice in one object")
    return found


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that gets its name when all of it is on the disk, also where the machine stops."""
    scratch = path.with_name(path.name + ".tmp")
    try:
        with scratch.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)  # on a full disk it takes the room that the next try needs
        raise


def set_aside(path: Path) -> Path | None:
    """Give a file that is there the next free number in its name; returns what it is called then."""
    if not path.exists():
        return None
    numbered = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in itertools.count(1))
    earlier = next(name for name in numbered if not name.exists())
    return path.rename(earlier)


def write_whole(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with whole_file(path) as file:
        file.write(text.encode())


def append_whole(file: Any, data: bytes) -> None:
    """Append to an unbuffered file, whole or not at all, and wait for the disk."""
    start = file.seek(0, os.SEEK_END)
    try:
        while data:
            data = data[file.write(data) :]
        os.fsync(file.fileno())
    except OSError:
        file.truncate(start)
        raise


def append_lines(path: Path, values: Iterable[Any]) -> None:
    """Append values as lines of JSON, whole or not at all; what ends with no newline, as editors leave it, gets one."""
    data = "".join(json_line(value) + "\n" for value in values).encode()
    with path.open("a+b", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(end - 1, 0))
        append_whole(file, data if file.read(1) in (b"", b"\n") else b"\n" + data)


def json_line(value: Any, default: Callable[[Any], Any] | None = None) -> str:
    """A value as JSON in one line, all of it escaped where it holds half a character, which no UTF-8 file can hold."""
    text = json.dumps(value, ensure_ascii=False, default=default)
    return json.dumps(value, default=default) if half_character(text) else text


def write_json(path: Path, content: Any) -> None:
    """`write_whole` of a value as JSON."""
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
