"""Files that the flags of a run name, as another folder sees them."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training.utils.arguments import flags_in
from training.utils.run.demo import names_demo
from training.utils.run.folders import shown

# Ends of the names of flags that name files
PATHS = ("_path", "chat_template", "deepspeed_config", "_function", "judge", "rubric", "reward_model", "_python")


def path_seen(folder: Path, value: str) -> str:
    """A relative path in ``folder``, perhaps with ``:N`` or ``:name`` behind it, as seen from the current folder."""
    path, colon, suffix = value.partition(":")
    there = folder / path
    if folder == Path.cwd() or not path or names_demo(value) or Path(path).is_absolute() or not there.exists():
        return value
    return f"{shown(there)}{colon}{suffix}"


def seen(folder: Path, name: str, value: Any) -> Any:
    """A flag's value likewise, if it names files, or is the flags of a step in one string."""
    if isinstance(value, list):
        return [seen(folder, name, item) for item in value]
    if not isinstance(value, str):
        return value
    if not name.endswith("_args"):
        return path_seen(folder, value) if name.endswith(PATHS) else value
    tokens, flag = [], ""
    for token in shlex.split(value):
        name, equals, given = token.partition("=") if token.startswith("--") else ("", "", token)
        flag = name.removeprefix("--").replace("-", "_") or flag
        tokens.append(f"{name}{equals}{seen(folder, flag, given)}")
    return shlex.join(tokens)


def arguments_of(entry: Mapping[str, Any], run: Path) -> list[str]:
    """A step's arguments by its entry in the manifest, with files as the current folder sees them.

    The run's own are those in ``run``, which may have been moved, or copied.
    """
    tokens = _in_run(entry, run)
    return shlex.split(str(seen(Path(entry.get("folder", "")), "step_args", shlex.join(tokens))))


def same_flags(entry: Mapping[str, Any], argv: Sequence[str], run: Path) -> bool:
    """Whether a step's arguments are those of its entry in the manifest, by whatever path they name a file."""
    here = Path.cwd()
    folder = Path(entry.get("folder", here))
    folder = folder if folder.is_dir() else here  # all of it has been moved
    before = _in_run(entry, run) if "arguments" in entry else argv
    return [_absolute(folder, t) for t in before] == [_absolute(here, t) for t in argv]


def _in_run(entry: Mapping[str, Any], run: Path) -> list[str]:
    """An entry's arguments, with what lay in the folder that the run had then at its place in ``run``."""
    folder, tokens = Path(entry.get("folder", "")), list(entry["arguments"])
    named = flags_in(tokens).get("output_dir")
    before = Path(os.path.abspath(folder / named[0] if named else run / "step")).parent
    run = Path(os.path.abspath(run))
    if before == run:
        return tokens
    return [str(inside) if token and (inside := _moved(folder / token, before, run)) else token for token in tokens]


def _moved(path: Path, before: Path, run: Path) -> Path | None:
    """Where what lay in one folder lies in the other; None if it lay elsewhere, or is not there."""
    place = Path(os.path.abspath(path))
    inside = run / place.relative_to(before) if place.is_relative_to(before) else None
    return inside if inside is not None and os.path.exists(inside) else None


def _absolute(folder: Path, value: str) -> str:
    path, colon, suffix = value.partition(":")
    return f"{os.path.abspath(folder / path)}{colon}{suffix}" if path and os.path.exists(folder / path) else value
