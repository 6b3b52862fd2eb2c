"""Sources of rows: a local file or folder, a hub name, or a known name become raw rows with their place.

Data is text, never code: only json, jsonl, csv, tsv, txt, parquet and arrow files (each also gzipped) are read, and of
a hub dataset only such files; dataset scripts and pickles are refused.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.utils.data.kinds import Kind
from training.utils.data.reading.folders import files_of, split_names
from training.utils.data.reading.readers import TYPES, read_file, type_of
from training.utils.data.reading.rows import RawRow
from training.utils.errors import UserError, refusals
from training.utils.model import hub

_DEMO = Path(__file__).resolve().parents[3] / "data" / "demo"
_DEMO_FILES = {"demonstrations": "sft.jsonl", "pairs": "preferences.jsonl", "prompts": "prompts.jsonl"}
_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")
# DeepSpeed-Chat's and alpaca-rlhf's names for files that the user brings
_ELSEWHERE = {
    "local/jsonfile": "give the folder of train.json and eval.json itself",
    "multiturnalpaca": "give the path of the folder MultiTurnAlpaca with training_data.txt.train and .test",
}
DATA_PATH = "--data_path"
_MOST_DIGITS = 15  # of a row limit
_SAVED = ("dataset_dict.json", "state.json")  # in folders of DatasetDict.save_to_disk and Dataset.save_to_disk
_HUB_BUILDERS = ("arrow", "csv", "json", "parquet", "text")


@dataclass(frozen=True)
class Source:
    """Where rows come from.

    Attributes:
        name: as the user wrote it, without the row limit.
        train, held_out: data files; ``held_out`` is empty if the source has no eval split of its own.
        limit: the most rows to take of each split, 0 for all.
        hub: a hub dataset's splits (train, held out), or those of a saved one, instead of files.
        unread: files of the folder, and splits, that are not read.
        flag: that names the source, for messages.
    """

    name: str
    train: tuple[Path, ...] = ()
    held_out: tuple[Path, ...] = ()
    limit: int = 0
    hub: tuple[Any, Any] | None = None
    unread: tuple[str, ...] = ()
    flag: str = DATA_PATH

    def rows(self, held_out: bool = False) -> Iterator[RawRow]:
        """The rows of one split, in order, up to the limit.

        Raises:
            UserError: a file as a whole can not be read.
        """
        try:
            yield from itertools.islice(self._all_rows(held_out), self.limit or None)
        except UserError as error:
            raise UserError(f"{self.flag} {error}") from error

    def _all_rows(self, held_out: bool) -> Iterator[RawRow]:
        if self.hub is not None:
            from training.utils.data.reading.tables import hub_rows  # pyarrow takes a moment

            split = self.hub[1 if held_out else 0]
            yield from hub_rows(split, self.name) if split is not None else ()
            return
        for path in self.held_out if held_out else self.train:
            yield from read_file(path)

    @property
    def has_held_out(self) -> bool:
        """Whether the source has an eval split of its own."""
        return bool(self.held_out) or (self.hub is not None and self.hub[1] is not None)

    def fingerprint(self) -> str:
        """A hash of the content of every file, so that an edited file is another source.

        Raises:
            UserError: a file can not be read.
        """
        digest = hashlib.sha256(f"{self.name} {self.limit}".encode())
        files = [("train", path) for path in self.train] + [("held_out", path) for path in self.held_out]
        if self.hub is not None:
            for part, split in zip(("train", "held_out"), self.hub, strict=True):
                files += [(part, Path(f["filename"])) for f in (split.cache_files if split is not None else ())]
        for part, path in files:
            try:
                digest.update(f"{part} {path.name} {path.stat().st_size} ".encode())
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
            except OSError as error:
                raise UserError(f"{self.flag} {path}: {error.strerror or error}") from None
        return digest.hexdigest()


def resolve(text: str, kind: Kind, flag: str = DATA_PATH) -> Source:
    """Find what ``text`` names: ``demo``, a local file or folder, else a hub dataset; ``:N`` limits its rows.

    Raises:
        UserError: nothing of that name, no data file in the folder, an unknown file type, or a limit of 0.
    """
    return local_source(text, kind, flag) or _hub(*_split_limit(text, flag), flag)


def local_source(text: str, kind: Kind, flag: str = DATA_PATH) -> Source | None:
    """`resolve` without the hub, and without its imports: None for a name that may be a hub dataset's.

    Raises:
        UserError: as `resolve`.
    """
    name, limit = _split_limit(text, flag)
    with refusals(f"{flag} {name}"):
        return _local(name, limit, kind, flag)


def _local(name: str, limit: int, kind: Kind, flag: str) -> Source | None:
    if name == "demo":
        return Source(name, (_DEMO / _DEMO_FILES[kind],), (_DEMO / "held_out.jsonl",), limit, flag=flag)
    path = Path(name).expanduser()
    if os.path.isdir(path):
        if any((path / file).is_file() for file in _SAVED):
            return _saved(name, path, limit, flag)
        files = files_of(f"{flag} {name}", path)
        return Source(name, files.train, files.held_out, limit, unread=files.unread, flag=flag)
    if os.path.isfile(path):
        if not type_of(path):
            raise UserError(f"{flag} {path}: not a data file; use one of {', '.join(TYPES)}, each also with .gz")
        return Source(name, (path,), (), limit, flag=flag)
    if os.path.islink(path):
        raise UserError(f"{flag} {name}: a link to {os.readlink(path)}, which is not there")
    _check_form(name, flag)
    looks_local = name.startswith(("/", "./", "../", "~")) or any(s.lstrip(".") in TYPES for s in path.suffixes[-2:])
    if looks_local or not _HUB_NAME.match(name):
        names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, names, n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise UserError(f"{flag} {name}: no such file or folder{hint}")
    return None


def _split_limit(text: str, flag: str) -> tuple[str, int]:
    match = re.fullmatch(r"(.+):(\d+)", text)
    if match is None or os.path.exists(Path(text).expanduser()):  # Path.exists fails on a name that is too long
        return text, 0
    if not match[2].strip("0"):
        raise UserError(f"{flag} {text}: a limit of 0 rows leaves nothing")
    if len(match[2]) > _MOST_DIGITS:
        raise UserError(f"{flag} {match[1]}: a limit of {len(match[2])} digits; without a limit all rows are read")
    return match[1], int(match[2])


def _check_form(name: str, flag: str) -> None:
    """Refuse other forms of a row limit and of several sources, where what they are about is there."""
    source, colon, _ = name.rpartition(":")
    if colon and _is_there(source):
        raise UserError(f"{flag} {name}: behind a colon stands how many rows to read, a whole number: {source}:1000")
    parts = name.split(",")
    if len(parts) > 1 and all(map(_is_there, parts)):
        raise UserError(f"{flag} {name}: several sources stand apart: {flag} {' '.join(parts)}")


def _is_there(name: str) -> bool:
    return bool(name) and (name == "demo" or os.path.exists(Path(name).expanduser()))


def _hub(name: str, limit: int, flag: str) -> Source:
    import datasets

    if name.lower() in _ELSEWHERE:
        raise UserError(f"{flag} {name}: {_ELSEWHERE[name.lower()]}")
    online = hub.is_reachable()
    try:
        builder = datasets.load_dataset_builder(name)
        kind = type(builder).__module__.split(".")
        if kind[:2] != ["datasets", "packaged_modules"] or kind[2] not in _HUB_BUILDERS:
            raise UserError(f"{flag} {name}: not plain data files; save it as json or parquet and give the path")
        splits = datasets.load_dataset(name)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise UserError(
            f"{flag} {name}: no file or folder here, and not loaded from the hub "
            f"({reason if online else 'this machine does not reach it, and its cache has no such dataset'}); "
            f"give the path of a file, or of a folder with the dataset's files"
        ) from None
    return _of_splits(name, limit, splits, flag)


def _saved(name: str, folder: Path, limit: int, flag: str) -> Source:
    import datasets

    try:
        found = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{flag} {name}: not as datasets has saved it ({reason}); save the dataset again") from None
    return _of_splits(name, limit, found if isinstance(found, dict) else {"train": found}, flag)


def _of_splits(name: str, limit: int, splits: Mapping[str, Any], flag: str) -> Source:
    train, held_out = split_names(splits)
    unread = tuple(f"split {split}" for split in splits if split not in (train, held_out))
    # A format that it was saved with is of tensors or tables, and may show some of the columns alone
    rows = [splits[split].with_format(None) if split else None for split in (train, held_out)]
    return Source(name, limit=limit, hub=(rows[0], rows[1]), unread=unread, flag=flag)
