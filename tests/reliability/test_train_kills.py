"""train.py killed before any of its file calls and started again ends with the same run; the steps are stand-ins."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_train import Bench
from training.utils.run.folders import python_path

# A process of its own, as train.py is: it may die at any call. Arguments: folder, number, calls, launcher, step, argv
TRAIN = """
import json, sys
from tests.reliability.file_kills import kill_at_file_call
from training.pipeline import estimate
import train
folder, number, calls, launcher, step, *argv = sys.argv[1:]
estimate.embedded_shape = lambda: None
kill_at_file_call(folder, int(number), calls)
sys.exit(train.main(argv, launcher=json.loads(launcher), scripts=dict.fromkeys(("step1", "step2", "step3"), step)))
"""


def start(bench: Bench, number: int, calls: Path, *argv: str) -> int:
    """Run train.py, killed before file call ``number`` (0: not at all); returns its exit code."""
    step = bench.scripts["step1"]
    arguments = [str(bench.output), str(number), str(calls), json.dumps(bench.launcher), step, *argv]
    environment = os.environ | {"PYTHONPATH": python_path(), "TRIPOD_OUTPUT": str(bench.output)}
    command = [sys.executable, "-c", TRAIN, *arguments]
    return subprocess.run(command, cwd=bench.folder, env=environment, capture_output=True, timeout=120).returncode


def outcome(bench: Bench) -> dict:
    """What a run has left: exit codes and metrics of its steps, its files, where `latest` points."""
    run = bench.output / "run"
    manifest = json.loads((run / "manifest.json").read_text())
    return {
        "steps": {name: (entry["exit_code"], entry["metrics"]) for name, entry in manifest["steps"].items()},
        "files": sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()),
        "latest": os.readlink(bench.output / "latest"),
        "beside": sorted(path.name for path in bench.output.iterdir()),
    }


def bench_in(folder: Path) -> tuple[Bench, list[str]]:
    """A bench in a folder of its own, and the flags of its run."""
    folder.mkdir()
    bench = Bench(folder)
    return bench, ["--recipe", str(bench.recipe), "--output_dir", str(bench.output / "run")]


def survived(folder: Path, numbers: int | None) -> int:
    """Kill runs before file calls, one each, and take them up; returns how many there were to choose from.

    Args:
        folder: of all of them.
        numbers: how many calls are tried, None for all.
    """
    whole, flags = bench_in(folder / "whole")
    assert start(whole, 0, folder / "calls", *flags) == 0
    calls = (folder / "calls").read_text().splitlines()
    chosen = range(1, len(calls) + 1)
    for number in chosen if numbers is None else random.Random(0).sample(chosen, numbers):
        bench, flags = bench_in(folder / f"call-{number}")
        assert start(bench, number, folder / f"calls-{number}", *flags) == -9, calls[number - 1]
        assert start(bench, 0, folder / f"again-{number}", *flags) == 0, calls[number - 1]
        assert outcome(bench) == outcome(whole), calls[number - 1]
    return len(calls)


def test_train_killed_before_a_file_call(tmp_path):
    assert survived(tmp_path, 2) >= 10


@pytest.mark.slow
def test_train_killed_before_any_file_call(tmp_path):
    survived(tmp_path, None)
