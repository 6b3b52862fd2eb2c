"""Which files of a folder hold rows: what `datasets.load_dataset` would read of it.

A folder is a clone of a hub dataset (its README's YAML names the files of each split), or data files side by side, or
in its subfolders if there are none at the top. Links to folders are followed, but for those to a folder that they are
in.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.utils.data.reading.readers import EVAL_WORDS, TYPES, type_of
from training.utils.errors import UserError

# What lies beside rows and is none, by name
_BESIDE = {
    *("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "croissant.json"),
    *("config.json", "package.json", "package-lock.json", "generation_config.json", "tokenizer.json"),
    *(f"{name}.txt" for name in ("license", "licence", "readme", "notice", "citation", "requirements", "changelog")),
}
_MADE = re.compile(r"cache-[0-9a-f]{16}\w*\.arrow")  # what `map` and `filter` of datasets leave beside rows
_METADATA = re.compile(r"metadata\.(csv|jsonl|parquet)", re.IGNORECASE)  # of images or sounds, if other files are there


@dataclass(frozen=True)
class Files:
    """The data files of a folder, and the names of files and splits in it that are not read."""

    train: tuple[Path, ...]
    held_out: tuple[Path, ...] = ()
    unread: tuple[str, ...] = ()


def files_of(where: str, folder: Path) -> Files:
    """The data files of an existing folder; ``where`` is the flag and what the user wrote, for errors.

    Raises:
        UserError: no data file, a link to nothing, or a README whose YAML names files that are not there.
    """
    if (found := _of_readme(where, folder)) is not None:
        return found
    here, there = list(folder.iterdir()), list(_below(folder))
    top, below = _data_files(here), _data_files(there)
    named = top if any(p.name.lower() not in _BESIDE for p in top) else below
    if (lost := next((p for p in named if p.is_symlink() and not p.exists()), None)) is not None:
        raise UserError(f"{where}: {lost} is a link to a file that is not there")
    files = [p for p in named if p.is_file() and p.name.lower() not in _BESIDE]
    files = [p for p in files if not (_METADATA.fullmatch(p.name) or _MADE.fullmatch(p.name))] or files
    if not files:
        if (lost := next((p for p in folder.iterdir() if p.is_symlink() and not p.exists()), None)) is not None:
            raise UserError(f"{where}: the folder holds no data file, and {lost} is a link to nothing")
        raise UserError(f"{where}: the folder holds no data file ({', '.join(TYPES)}, each also .gz)")
    held_out = tuple(p for p in files if is_eval(p, folder))
    train = tuple(p for p in files if not is_eval(p, folder))
    unread = [p.name for p in top if p not in files]
    unread += sorted(p.relative_to(folder).as_posix() for p in [*here, *there] if _is_packed(p))
    beside = Counter(p.relative_to(folder).parts[0] for p in below if p not in files and p.name.lower() not in _BESIDE)
    unread += [f"{name}/ ({count} file{'s' * (count > 1)})" for name, count in sorted(beside.items())]
    return Files(train, held_out, tuple(unread)) if train else Files(held_out, (), tuple(unread))


def _below(folder: Path) -> Iterator[Path]:
    """Every file in the subfolders, hidden ones left out; each folder once, so that links in a ring have an end."""
    root = os.path.realpath(folder)
    seen = {root}
    for parent, folders, files in os.walk(folder, followlinks=True):
        found = {os.path.join(parent, name): name for name in folders if not name.startswith(".")}
        folders.clear()
        for path in sorted(found, key=lambda path: (os.path.islink(path), path)):
            real = os.path.realpath(path)
            if real not in seen and not Path(root).is_relative_to(real):
                seen.add(real)
                folders.append(found[path])
        if Path(parent) != folder:
            yield from (Path(parent, name) for name in files)


def _data_files(paths: Iterable[Path]) -> list[Path]:
    return sorted(p for p in paths if type_of(p) and not p.name.startswith((".", "_")) and not p.is_dir())


def _is_packed(path: Path) -> bool:
    """Whether a file of rows is packed in a way that is not read, such as ``rows.jsonl.zst``."""
    packed = any(suffix.lower().lstrip(".") in TYPES for suffix in path.suffixes) and not type_of(path)
    return packed and not path.name.startswith((".", "_")) and path.is_file()


def is_eval(path: Path, folder: Path) -> bool:
    """Whether a file's name says that it is to be judged by, or that of a folder between it and ``folder``."""
    # test.jsonl, test-00000-of-00001.parquet, held_out.json, my_eval.csv, data.txt.test
    return _names_eval(path.name) or any(_names_eval(part) for part in path.relative_to(folder).parts[:-1])


def _names_eval(text: str) -> bool:
    words = re.split(r"[^a-z]+", text.lower())
    return bool(EVAL_WORDS.intersection(words)) and "train" not in words


def split_names(names: Iterable[str]) -> tuple[str | None, str | None]:
    """Of a dataset's splits the one to train on and the one to judge by, of several the one called like the first."""
    judging = [name for name in names if _names_eval(name)]
    others = [name for name in names if name not in judging] or judging[1:]
    if not others:
        return next(iter(judging), None), None
    train = "train" if "train" in others else others[0]
    left = [name for name in judging if name != train]
    return train, next((name for name in left if _kind_of(name) == _kind_of(train)), next(iter(left), None))


def _kind_of(split: str) -> frozenset[str]:
    """The words of a split's name but those of its use: ``sft`` of ``train_sft`` and ``test_sft``."""
    return frozenset(re.split(r"[^a-z]+", split.lower())) - EVAL_WORDS - {"train", "training"}


def _of_readme(where: str, folder: Path) -> Files | None:
    """The files that a hub dataset's README names in its YAML; None if it names none."""
    readme = folder / "README.md"
    if not readme.is_file():
        return None
    text = readme.read_text(encoding="utf-8-sig", errors="replace")
    match = re.match(r"---\r?\n(.*?)\n---\s*\n", text, re.DOTALL)
    if match is None or "configs:" not in match[1]:
        return None
    import yaml

    try:
        configs = yaml.safe_load(match[1]).get("configs")
    except (yaml.YAMLError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{where}: the YAML of {readme} can not be read: {reason}") from None
    configs = [c for c in configs if isinstance(c, dict) and c.get("data_files")] if isinstance(configs, list) else []
    if not configs:
        return None
    named = [str(config.get("config_name", "default")) for config in configs]
    flagged = [config for config in configs if config.get("default") is True]
    chosen = flagged or [config for config, of in zip(configs, named, strict=True) if of == "default"] or configs
    if len(chosen) > 1:
        raise UserError(f"{where}: the dataset has the configurations {', '.join(named)}; give the path of "
                        "one's files or folder")  # fmt: skip
    others = [f"configuration {of}" for config, of in zip(configs, named, strict=True) if config is not chosen[0]]
    root = folder / str(chosen[0].get("data_dir") or "")
    splits = _splits(chosen[0])
    names = [split for split, _ in splits]
    wrong = next((split for split, patterns in splits if not patterns or names.count(split) > 1), None)
    if wrong is not None:  # of one that is named twice load_dataset reads nothing either
        raise UserError(f"{where}: README.md must name the split {wrong} once, with its files")
    found = {split: _matching(where, folder, root, patterns) for split, patterns in splits}
    train, held_out = split_names(found)
    assert train is not None
    unread = [f"split {name}" for name in found if name not in (train, held_out)]
    return Files(found[train], found[held_out] if held_out else (), (*unread, *others))


def _splits(config: dict[str, Any]) -> list[tuple[str, list[str]]]:
    files = config["data_files"]
    if isinstance(files, dict):
        files = [{"split": split, "path": path} for split, path in files.items()]
    listed = files if isinstance(files, list) else [files]
    if not all(isinstance(entry, dict) for entry in listed):
        return [("train", [str(entry) for entry in listed])]
    paths = ((str(entry.get("split", "train")), entry.get("path")) for entry in listed)
    return [(split, [str(p) for p in (path if isinstance(path, list) else [path]) if p]) for split, path in paths]


def _matching(where: str, folder: Path, root: Path, patterns: Sequence[str]) -> tuple[Path, ...]:
    found: list[Path] = []
    for pattern in patterns:
        asked = root / pattern
        outside = not asked.is_relative_to(folder) or ".." in asked.relative_to(folder).parts
        try:
            files = [] if outside or not pattern.strip("/.") else sorted(p for p in root.glob(pattern) if type_of(p))
        except ValueError as error:
            raise UserError(f"{where}: README.md names the files {pattern}: {error}") from None
        if not files:
            raise UserError(f"{where}: README.md names the files {pattern}, and no data file of that name "
                            "is in the folder; is the clone complete?")  # fmt: skip
        found += files
    return tuple(found)
