"""SHA-256 of files, each read once: what was found is kept in the cache folder for as long as the file is the same."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from pathlib import Path

from training.utils.run.folders import cache_dir

CONVERTED_FROM = "converted_from.sha256"  # in a converted model's folder: `file_digest` of what it was made of
_REMEMBERED = 1 << 24  # bytes from which on reading a file again costs more than keeping its hash
_DIGEST = re.compile("[0-9a-f]{64}")


def file_digest(path: Path) -> str:
    """The SHA-256 of a file's content, as hexadecimal digits.

    A large file's is kept under its device, inode, size and times; the time of change (ctime) moves with every write,
    and no program can set it back.
    """
    stat = path.stat()
    if stat.st_size < _REMEMBERED:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    identity = [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
    kept = cache_dir() / "digests" / name
    with contextlib.suppress(OSError, ValueError):  # ValueError: no ASCII
        if _DIGEST.fullmatch(found := kept.read_text(encoding="ascii")):  # after a loss of power it may be empty
            return found
    found = read_digest(path)
    scratch = kept.with_suffix(f".{os.getpid()}.tmp")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(found, encoding="ascii")
        scratch.replace(kept)
    except OSError:  # a cache that can not be written: the file is read again next time
        scratch.unlink(missing_ok=True)
    return found


def read_digest(path: Path) -> str:
    """`file_digest` of what the disk holds now, whatever is remembered."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
