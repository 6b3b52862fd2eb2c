"""Checkpoints on disk: a checkpoint is there whole or not at all, and a damaged one is found before it is used.

``checkpoints/step-00000100/`` holds files of every rank and ``index.json``, which has the size and SHA-256 of each. It
is written under another name, flushed to the disk, read back, and renamed; ``checkpoints/latest`` moves last. So a kill
at any moment leaves the checkpoint before it intact, and a disk that fills up or a file that changes is noticed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from training.utils.checkpoint.digests import read_digest
from training.utils.errors import UserError
from training.utils.run.folders import CHECKPOINTS, shown

FORMAT = 1  # of the files; another version is refused
FOLDER = CHECKPOINTS
INDEX = "index.json"
STATE = "state.json"
LATEST = "latest"
_NAME = re.compile(r"step-(\d{8,})")

Entry = dict[str, Any]  # {"size": bytes, "sha256": hex}
_known: dict[tuple[int, int, int, int], str] = {}  # digests of files that have not changed since, by inode


def checkpoint_name(step: int) -> str:
    """The folder's name of a checkpoint after ``step`` steps."""
    return f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name, -1 for any other folder."""
    match = _NAME.fullmatch(folder.name)
    return int(match.group(1)) if match else -1


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes) -> Entry:
    """Write a file, flush it to the disk, read it back, and return its entry for the index.

    Raises:
        OSError: it can not be written, or what is read back is something else.
    """
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    wanted = hashlib.sha256(content).hexdigest()
    if read_digest(path) != wanted:
        raise OSError(f"{path.name} does not read back as it was written")
    return {"size": len(content), "sha256": wanted}


def link_file(source: Path, target: Path) -> Entry:
    """Put a file that is never written again into a checkpoint, as a link where the file system can."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        with target.open("rb") as file:
            os.fsync(file.fileno())
    stat = target.stat()
    key = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
    if key not in _known:
        _known[key] = read_digest(target)
    return {"size": stat.st_size, "sha256": _known[key]}


def scratch_folder(folder: Path, step: int) -> Path:
    """A new folder to write a checkpoint into; what an interrupted save has left is removed."""
    for left in [*folder.glob(".saving-*"), *folder.glob(".removing-*")]:
        shutil.rmtree(left)
    scratch = folder / f".saving-{checkpoint_name(step)}"
    scratch.mkdir(parents=True)
    return scratch


def publish(scratch: Path, files: Mapping[str, Entry], step: int, keep_last: int) -> Path:
    """Turn a written folder into the latest checkpoint, then remove what ``keep_last`` does not keep.

    Args:
        files: name -> entry of each, those of all ranks.
        keep_last: checkpoints that stay, this one included.

    Raises:
        OSError: the disk is full, or a file has another size than it was written with.
    """
    for name, entry in files.items():
        if (size := (scratch / name).stat().st_size) != entry["size"]:
            raise OSError(f"{name} has {size} bytes instead of {entry['size']}")
    listing = {"format": FORMAT, "files": dict(sorted(files.items()))}
    write_file(scratch / INDEX, _signed(listing))
    for folder in {scratch, *((scratch / name).parent for name in files)}:
        sync_folder(folder)
    folder, target = scratch.parent, scratch.parent / checkpoint_name(step)
    _remove([target] if target.exists() else [])  # damaged, or of the steps after the one this run went on from
    scratch.rename(target)
    sync_folder(folder)
    pointer = folder / f".{LATEST}.tmp"
    write_file(pointer, target.name.encode())
    pointer.replace(folder / LATEST)
    sync_folder(folder)
    older = sorted((p for p in folder.iterdir() if 0 <= step_of(p) < step), key=step_of, reverse=True)
    _remove([*older[keep_last - 1 :], *(p for p in folder.iterdir() if step_of(p) > step)])
    return target


def _signed(listing: dict[str, Any]) -> bytes:
    """The index as JSON with its own hash, so that one edited by hand is noticed."""
    text = json.dumps(listing, sort_keys=True)
    return json.dumps(listing | {"sha256": hashlib.sha256(text.encode()).hexdigest()}, indent=1).encode()


def _remove(folders: list[Path]) -> None:
    """Remove checkpoints so that a kill in between never leaves half of one under its name."""
    for folder in folders:
        gone = folder.with_name(f".removing-{folder.name}")
        folder.rename(gone)
        shutil.rmtree(gone)


def remove_all(folder: Path) -> int:
    """Remove every checkpoint of a run; returns how many there were."""
    found = [p for p in folder.iterdir() if step_of(p) >= 0] if folder.is_dir() else []
    if found:
        (folder / LATEST).unlink(missing_ok=True)
        _remove(found)
    return len(found)


def candidates(folder: Path) -> list[Path]:
    """The checkpoints to try: the latest, then those before it; without a usable ``latest`` all, newest first.

    Raises:
        UserError: the folder is a link to nothing, such as a disk that is not mounted: they are not gone.
    """
    if not folder.is_dir():
        if folder.is_symlink():
            raise UserError(f"{shown(folder)} is a link to nothing: is the disk there on which the checkpoints are?")
        return []
    found = sorted((p for p in folder.iterdir() if step_of(p) >= 0), key=step_of, reverse=True)
    pointer = folder / LATEST
    named = folder / pointer.read_text(errors="replace").strip() if pointer.is_file() else None
    if named is None or step_of(named) < 0 or not any(step_of(p) <= step_of(named) for p in found):
        return found
    return [p for p in found if step_of(p) <= step_of(named)]


def meant(output_dir: Path, resume: str) -> list[Path]:
    """The checkpoints to try that ``--resume`` names, the best first.

    Args:
        output_dir: the step's folder, for ``auto``.
        resume: ``auto``, ``never``, or the path of a checkpoint, of a folder of them, or of a step's output; a
            checkpoint may be missing.
    """
    if resume == "never":
        return []
    path = output_dir if resume == "auto" else Path(resume).expanduser().absolute()
    if resume != "auto" and (step_of(path) >= 0 or (path / INDEX).is_file()):
        return [path]
    return candidates(path if resume != "auto" and path.name == FOLDER else path / FOLDER)


def read_index(checkpoint: Path) -> dict[str, Entry]:
    """The files of a checkpoint with their entries.

    Raises:
        UserError: it was made by another version of the program.
        ValueError: the index is missing, unreadable or changed; the message says which.
    """
    try:
        index = json.loads((checkpoint / INDEX).read_text(encoding="utf-8"))
        claimed = index.pop("sha256")
        version, files = index["format"], index["files"]
    except OSError as error:
        raise ValueError(f"{INDEX}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{INDEX} is not readable") from error
    if version != FORMAT:
        raise UserError(f"{checkpoint} has format {version}, this version of the program reads format {FORMAT}")
    if hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest() != claimed:
        raise ValueError(f"{INDEX} was changed")
    return files


def damage(checkpoint: Path, files: Mapping[str, Entry]) -> Iterator[str]:
    """What is wrong with these files of a checkpoint, one line each; nothing if they are as they were written."""
    for name, entry in files.items():
        path = checkpoint / name
        try:
            size = path.stat().st_size
            if size != entry["size"]:
                yield f"{name} has {size} bytes instead of {entry['size']}"
            elif read_digest(path) != entry["sha256"]:
                yield f"{name} is damaged: its hash is another"
        except FileNotFoundError:
            yield f"{name} is missing"
        except OSError as error:
            yield f"{name}: {error.strerror}"


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The checkpoint's ``state.json``, after its hash was found right."""
    return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
