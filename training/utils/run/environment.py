"""Whether this interpreter has the packages, and what launchers set is right; with the standard library alone.

A program may be started outside .venv.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

PACKAGES = ("torch", "deepspeed", "transformers", "yaml", "numpy")
ROOT = Path(__file__).resolve().parents[3]
# Variables that hold a number -> the least and the greatest one
NUMBERS = {
    "WORLD_SIZE": (1, None),
    "RANK": (0, None),
    "LOCAL_WORLD_SIZE": (1, None),
    "LOCAL_SIZE": (1, None),
    "LOCAL_RANK": (0, None),
    "MASTER_PORT": (0, 65535),
    "OMP_NUM_THREADS": (1, None),
}
EMPTY_IS_UNSET = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMP_NUM_THREADS")
BELOW = {"RANK": "WORLD_SIZE", "LOCAL_RANK": "LOCAL_WORLD_SIZE"}  # counted from 0


def wrong_variable() -> str:
    """A message about the first environment variable that no program can work with; empty if there is none.

    Checked are HOME, the launcher's variables and the numbers of threads.
    """
    if not os.path.isabs(os.path.expanduser("~")):
        return "HOME is not set in the environment and this user has no home folder, where caches lie: set HOME"
    numbers = {}
    for name, (least, greatest) in NUMBERS.items():
        if (text := os.environ.get(name)) is None or (not text and name in EMPTY_IS_UNSET):
            continue
        try:  # of threads OpenMP takes a number for each level of nesting, 4,2
            levels = [int(part) for part in (text.split(",") if name == "OMP_NUM_THREADS" else [text])]
        except ValueError:
            return f"{name} is {text!r} in the environment: a number is needed; set it right, or unset it"
        numbers[name] = min(levels)
        if numbers[name] < least or (greatest is not None and numbers[name] > greatest):
            bound = f"at least {least}" if greatest is None else f"from {least} to {greatest}"
            return f"{name} is {text} in the environment: it must be {bound}; set it right, or unset it"
    for name, size in BELOW.items():
        count = numbers.get(size, 1 if name == "RANK" else None)
        if name in numbers and count is not None and numbers[name] >= count:
            there = f"{size} is {count}" if size in numbers else f"{size} is not set, so there is one rank"
            return f"{name} is {numbers[name]} in the environment and {there}: ranks are counted from 0"
    return ""


def check_environment() -> None:
    """End the process with one line and exit code 2 if the packages are not there, or a variable is wrong.

    A program calls it above its other imports, which would end in a traceback, when it is run; ``--help`` is answered
    without.
    """
    if {"-h", "--help"}.intersection(sys.argv[1:]):
        return
    if wrong := wrong_variable():
        if wrong.startswith("RANK ") or os.environ.get("RANK", "0") == "0":
            print(f"error: {wrong}", file=sys.stderr, flush=True)
        raise SystemExit(2)
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if not missing:
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
