"""manifest.json: what a run was made from and with, so that it can be told apart, explained and repeated."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training.utils.checkpoint.digests import read_digest
from training.utils.errors import UserError
from training.utils.run.files import read_object
from training.utils.run.folders import CHECKPOINTS
from training.utils.run.runtime import available_cores

PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "peft", "accelerate", "tensorboard", "gguf", "gradio")
NOT_INPUT = {"__pycache__", CHECKPOINTS}  # folders inside a folder of inputs that are none
WRITTEN_TO = ("output_dir", "data_output_path", "resume")  # flags whose values a step writes to, or has written
NAMED_INPUTS = ("model_name_or_path", "data_path")  # flags whose values are inputs also when they are no files


MANIFEST, SUMMARY = "manifest.json", "summary.json"
_DICTIONARIES = ("steps", "versions", "machine", "run_with", "shared", "inputs", "recipe")
_SHAPE: dict[str, Any] = {**dict.fromkeys(_DICTIONARIES, dict), "started_as": list, "folder": str, "git": dict | None}


def read_manifest(run: Path) -> dict[str, Any]:
    """The manifest of a run, or an empty one.

    Raises:
        UserError: the file is there and is no JSON object, or its parts are of other kinds than they are written.
    """
    path = run / MANIFEST
    manifest = read_object(path)
    for name, kind in _SHAPE.items():
        if name in manifest and not isinstance(manifest[name], kind):
            raise UserError(f"{path} is damaged: {name} is a {type(manifest[name]).__name__}")
    for name, step in manifest.get("steps", {}).items():
        if not _is_started(step):
            raise UserError(f"{path} is damaged: the entry of {name} is not one")
    return manifest


def _is_started(found: Any) -> bool:
    if not isinstance(found, dict) or not isinstance(found.get("folder", ""), str):
        return False
    words = [found.get(name, []) for name in ("arguments", "command")]
    return all(isinstance(given, list) and all(isinstance(word, str) for word in given) for given in words)


def recorded_run(step_dir: Path) -> dict[str, Any]:
    """How the step whose output a folder is was started, from its summary or train.py's manifest: ``arguments`` and,
    in a summary, the ``folder`` it was started in; empty where neither has it.

    Raises:
        UserError: the file is there and is damaged.
    """
    path = step_dir / SUMMARY
    found = read_object(path).get("run_with")
    if found is None:
        return read_manifest(step_dir.parent).get("steps", {}).get(step_dir.name, {})
    if not _is_started(found):
        raise UserError(f"{path} is damaged: run_with is not what a step writes")
    return found


def describe_environment(root: Path) -> dict[str, Any]:
    """Versions of Python and packages, the repository's commit, and the machine."""
    versions = {"python": platform.python_version()} | {name: version_of(name) for name in ("tripod", *PACKAGES)}
    return {"versions": versions, "git": _git(root), "machine": _machine()}


def hash_inputs(argv: Sequence[str], named: Mapping[str, Path]) -> dict[str, str | None]:
    """SHA-256 of each file or folder that a command line names as an input.

    Args:
        argv: a step's arguments; values of `WRITTEN_TO` are no inputs.
        named: folders that stand behind names, such as ``demo``.

    Returns:
        Path or name -> hex digest; None for what lies elsewhere, such as a hub name, or may not be read. A folder's
        digest is over the names and contents of all files in it.
    """
    found: dict[str, str | None] = {}
    flag = ""
    for token in argv:
        if token.startswith("--"):
            flag, _, token = token[2:].partition("=")
        if not token or flag.replace("-", "_") in WRITTEN_TO:
            continue
        path = named.get(token) or _existing(token, bare=flag.endswith(NAMED_INPUTS))
        if path is not None:
            found[token] = None
            with contextlib.suppress(OSError):  # a file of another user's, or one that goes meanwhile
                found[token] = _digest(path)
        elif flag.endswith(NAMED_INPUTS):
            found[token] = None
    return found


def _existing(token: str, bare: bool) -> Path | None:
    """The file or folder that a value names, perhaps with ``:N`` rows or ``:name`` of a function behind it.

    One whose name is a word alone only where the flag names inputs: ``bare``.
    """
    for text in (token, token.rpartition(":")[0]):
        if text and (bare or "/" in text or "." in text) and os.path.exists(os.path.expanduser(text)):
            return Path(text).expanduser()
    return None


def _digest(path: Path) -> str:
    if path.is_file():
        return read_digest(path)
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        name = file.relative_to(path)
        if not NOT_INPUT & set(name.parts):
            digest.update(f"{name}\0{_digest(file)}\n".encode())
    return digest.hexdigest()


def version_of(package: str) -> str | None:
    """The installed version of a package, None without it (the project itself can also run uninstalled)."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(root: Path) -> dict[str, Any] | None:
    def ask(*arguments: str) -> str | None:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    if shutil.which("git") is None or not (commit := ask("rev-parse", "HEAD")):
        return None
    return {"commit": commit, "changed": bool(ask("status", "--porcelain", "--untracked-files=no"))}


def _machine() -> dict[str, Any]:
    machine: dict[str, Any] = {"system": platform.platform(), "cores": available_cores(), "gpus": []}
    machine["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True)
        machine["gpus"] = done.stdout.split("\n")[:-1] if done.returncode == 0 else []
    return machine
