"""Whether this interpreter has the packages; with the standard library alone, for programs started outside .venv."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

PACKAGES = ("torch", "deepspeed", "transformers", "yaml", "numpy")
ROOT = Path(__file__).resolve().parents[3]


def check_environment() -> None:
    """End the process with one line and exit code 2 if the packages are not there; programs call it when they are run.

    A program calls it above its other imports, which would end in a traceback; ``--help`` is answered without them.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if not missing or {"-h", "--help"}.intersection(sys.argv[1:]):
        return
    if int(os.environ.get("RANK", "0")) == 0:
        python = ROOT / ".venv" / "bin" / "python"
        inside = Path(sys.executable).absolute() == python
        ready = python.exists() and not inside
        there = python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python
        how = f"use {there}" if ready else f"run make setup in {ROOT}" + ("" if inside else f", then use {there}")
        text = f"error: {sys.executable} does not have {', '.join(missing)}: {how} {'' if inside else sys.argv[0]}"
        print(text.rstrip(), file=sys.stderr, flush=True)
    raise SystemExit(2)
