"""What tests of predecessors' first lines share: the line is started as a user would start it, and what it logged."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.reliability.tiny_runs import Launcher, Step
from training.migrate.translate import translate
from training.utils.run.folders import python_path

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    """A port for deepspeed's launcher; its own is taken where two runs start at a time."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_line(line: str) -> str:
    """``python -m training.migrate --run LINE`` from the repository's folder; returns what it printed."""
    command = [sys.executable, "-m", "training.migrate", "--run", line]
    environment = os.environ | {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout + result.stderr


def train_line(line: str, step: Step, log: Path, ranks: int = 1) -> None:
    """The line's translation as ``ranks`` processes without a launcher, which is quicker; they end well."""
    made = translate(line)
    assert made.launcher[:2] == ["--num_gpus", str(ranks)]
    launcher = Launcher()
    try:
        runs = launcher.start_ranks(step, made.arguments, log, ranks)
        assert [run.wait() for run in runs] == [0] * ranks, runs[0].text()[-3000:]
    finally:
        launcher.close()


def logged(output: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def steps_of(output: Path) -> int:
    """Optimizer steps, or in step 3 iterations, that a run has taken."""
    return max(row.get("iteration", row.get("step", 0)) for row in logged(output))
