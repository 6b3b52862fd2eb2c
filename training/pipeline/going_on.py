"""What a run that goes on takes over from its start: data, models, flags of steps, and which steps it leaves out."""

from __future__ import annotations

import os
import shlex
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from training.utils.run.demo import names_demo
from training.utils.run.folders import LATER, PIPELINES, STEPS, shown

PATHS = ("_path", "chat_template", "deepspeed_config", "_function")  # ends of the names of flags that name files


def take_over(manifest: dict[str, Any], inputs: Any, given: Collection[str], pipeline: str) -> None:
    """Let a run go on with its own models and flags of steps, where they are not given anew.

    Args:
        manifest: the run's, empty for a new one; relative paths in it become those that the current folder sees.
        inputs: the models and flags of steps of this start; what is taken over is put in there.
        given: names of the flags of this start, empty ones too.
        pipeline: of this start; flags of other steps stay in the manifest alone.
    """
    folder = Path(manifest.get("folder") or Path.cwd())
    for name in ("shared", "inputs"):
        manifest[name] = {flag: _seen(folder, flag, value) for flag, value in manifest.get(name, {}).items()}
    if (folder / (recipe := manifest.get("recipe", {}).get("name", ""))).is_file():
        manifest["recipe"]["name"] = _from(folder, recipe)
    for name, value in manifest["inputs"].items():
        step = name.removesuffix("_args")
        if name in vars(inputs) and name not in given and not (step in STEPS and step not in PIPELINES[pipeline]):
            setattr(inputs, name, getattr(inputs, name) or value)


def record(manifest: dict[str, Any], inputs: Any, given: Collection[str], shared: Mapping[str, Any]) -> None:
    """Note what `take_over` needs."""
    kept = {name: value for name, value in manifest["inputs"].items() if name not in given}
    manifest["inputs"] = kept | {name: value for name, value in vars(inputs).items() if value}
    manifest["shared"], manifest["folder"] = dict(shared), str(Path.cwd())


def same_flags(entry: Mapping[str, Any], argv: Sequence[str]) -> bool:
    """Whether a step's arguments are those of its entry in the manifest, by whatever path they name a file."""
    here = Path.cwd()
    folder = Path(entry.get("folder", here))
    return [_absolute(folder, t) for t in entry.get("arguments", argv)] == [_absolute(here, t) for t in argv]


def _absolute(folder: Path, value: str) -> str:
    path, colon, suffix = value.partition(":")
    return f"{os.path.abspath(folder / path)}{colon}{suffix}" if path and (folder / path).exists() else value


def left_out(manifest: Mapping[str, Any], pipeline: str) -> list[str]:
    """Steps that the run has passed over, for a model of the user's or without a reward model: they do not come after
    those that would be made from their output."""
    run = manifest.get("steps", {})
    return [name for name in PIPELINES[pipeline] if name not in run and any(later in run for later in LATER[name])]


def _from(folder: Path, value: str) -> str:
    """A relative path in ``folder``, perhaps with ``:N`` or ``:name`` behind it, as seen from the current folder."""
    path, colon, suffix = value.partition(":")
    there = folder / path
    if folder == Path.cwd() or not path or names_demo(value) or Path(path).is_absolute() or not there.exists():
        return value
    return f"{shown(there)}{colon}{suffix}"


def _seen(folder: Path, name: str, value: Any) -> Any:
    """A flag's value likewise, if it names files, or is the flags of a step in one string."""
    if isinstance(value, list):
        return [_seen(folder, name, item) for item in value]
    if not isinstance(value, str):
        return value
    if not name.endswith("_args"):
        return _from(folder, value) if name.endswith(PATHS) else value
    tokens, flag = [], ""
    for token in shlex.split(value):
        is_flag = token.startswith("--")
        flag = token.removeprefix("--") if is_flag else flag
        tokens.append(token if is_flag else _seen(folder, flag, token))
    return shlex.join(tokens)
