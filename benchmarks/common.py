"""What the benchmarks share: this checkout on the path, their flags, rows of tables, files of figures."""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


# glibc gives memory back at once, since otherwise it keeps much of it
TRIMMING = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def flags_of(description: str) -> argparse.ArgumentParser:
    """A parser whose ``--help`` shows a program's docstring as it stands."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def row_of(*cells: Any) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def head_of(*cells: Any) -> str:
    """The first two rows of one."""
    return f"{row_of(*cells)}\n|{'---|' * len(cells)}"


def spread(values: Sequence[float], digits: int = 2, unit: str = "") -> str:
    """Median, and lowest to highest."""
    low, high = f"{min(values):,.{digits}f}", f"{max(values):,.{digits}f}"
    return f"{statistics.median(values):,.{digits}f}{unit} ({low} - {high})"


def argv_of(flags: Mapping[str, Any]) -> list[str]:
    """Flags by name as a program takes them."""
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))]


def json_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a file that has one in each line."""
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def memory_of(name: str, pid: int | str = "self") -> int:
    """Bytes that Linux counts for a process: ``VmRSS``, or ``VmHWM``, the peak; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:")), 0)


def found_by(command: Sequence[str]) -> dict[str, float]:
    """Run a program in a process of its own, and return its last line, which is JSON."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def number_of(command: Sequence[str], environment: dict[str, str], pattern: str) -> float:
    """Run a program in a process of its own, and return the number that ``pattern`` finds in what it prints."""
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)
    found = re.search(pattern, done.stdout)
    if not found:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
    return float(found.group(1).replace(",", ""))


def write_figures(path: str | Path, figures: Any) -> None:
    """A file of figures, if there is a path."""
    if path:
        Path(path).write_text(json.dumps(figures, indent=1, default=str) + "\n", encoding="utf-8")


def kl_to_reach(curve: Sequence[tuple[float, float]], reward: float) -> float | None:
    """The KL at which a run first reaches a reward, between two evaluations on the straight line between them.

    Args:
        curve: (KL, reward) of each evaluation, in the order of training.
        reward: to be reached.

    Returns:
        None if no evaluation reaches it.
    """
    for i, (kl, value) in enumerate(curve):
        if value >= reward:
            if i == 0 or curve[i - 1][1] >= value:
                return kl
            before_kl, before = curve[i - 1]
            return before_kl + (kl - before_kl) * (reward - before) / (value - before)
    return None
