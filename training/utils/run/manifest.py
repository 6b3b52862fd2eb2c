"""manifest.json: what a run was made from and with, so that it can be told apart, explained and repeated."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training.utils.checkpoint.digests import read_digest
from training.utils.errors import UserError
from training.utils.run.runtime import available_cores

PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "peft", "accelerate", "tensorboard", "gguf", "gradio")
NOT_INPUT = {"__pycache__", "checkpoints"}  # folders inside a folder of inputs that are none
NAMED_INPUTS = ("model_name_or_path", "data_path")  # flags whose values are inputs also when they are no files


_SHAPE: dict[str, type] = {"steps": dict, "versions": dict, "machine": dict, "run_with": dict}


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a run, or an empty one.

    Raises:
        UserError: the file is there and is no JSON object, or its parts are of other kinds than they are written.
    """
    if not path.is_file():
        return {}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # JSON's and UTF-8's are ValueErrors
        raise UserError(f"{path} is not readable as JSON: {error}") from error
    if not isinstance(manifest, dict):
        raise UserError(f"{path} is not a manifest: it holds no JSON object")
    for name, kind in _SHAPE.items() if path.name == "manifest.json" else ():
        if not isinstance(manifest.get(name, kind()), kind):
            raise UserError(f"{path} is damaged: {name} is a {type(manifest[name]).__name__}")
    for name, step in manifest.get("steps", {}).items() if path.name == "manifest.json" else ():
        if not isinstance(step, dict) or not isinstance(step.get("arguments", []), list):
            raise UserError(f"{path} is damaged: the entry of {name} is not one")
    return manifest


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all."""
    scratch = path.with_name(path.name + ".tmp")
    with scratch.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


def describe_environment(root: Path) -> dict[str, Any]:
    """Versions of Python and packages, the repository's commit, and the machine."""
    return {"versions": _versions(), "git": _git(root), "machine": _machine()}


def hash_inputs(argv: Sequence[str], named: Mapping[str, Path]) -> dict[str, str | None]:
    """SHA-256 of each file or folder that a command line names as an input.

    Args:
        argv: a step's arguments; the value of ``--output_dir`` is no input.
        named: folders that stand behind names, such as ``demo``.

    Returns:
        Path or name -> hex digest; None for what lies elsewhere, such as a hub name. A folder's digest is over the
        names and contents of all files in it.
    """
    found: dict[str, str | None] = {}
    flag = ""
    for token in argv:
        if token.startswith("--"):
            flag, _, token = token[2:].partition("=")
        if not token or flag == "output_dir":
            continue
        path = _existing(token)
        if path is None and token in named:
            path = named[token]
        if path is not None:
            found[token] = _digest(path)
        elif flag.endswith(NAMED_INPUTS):
            found[token] = None
    return found


def _existing(token: str) -> Path | None:
    """The file or folder that a value names, perhaps with ``:N`` rows or ``:name`` of a function behind it."""
    for text in (token, token.rpartition(":")[0]):
        if text and ("/" in text or "." in text) and Path(text).expanduser().exists():
            return Path(text).expanduser()
    return None


def _digest(path: Path) -> str:
    if path.is_file():
        return read_digest(path)
    digest = hashlib.sha256()
    for file_path in sorted(p for p in path.rglob("*") if p.is_file() and not NOT_INPUT & set(p.parts)):
        digest.update(f"{file_path.relative_to(path)}\0{_digest(file_path)}\n".encode())
    return digest.hexdigest()


def version_of(package: str) -> str | None:
    """The installed version of a package, None without it (the project itself can also run uninstalled)."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> dict[str, str | None]:
    return {"python": platform.python_version()} | {name: version_of(name) for name in ("tripod", *PACKAGES)}


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
