"""benchmarks/against_trl.py: every step runs both trainers on a tiny model; what is asked wrongly is one line."""

import importlib.util
import json
import subprocess
import sys

import pytest

from training.utils.run.folders import repository_root

PROGRAM = repository_root() / "benchmarks" / "against_trl.py"
FEW = ["--rows", "12", "--batch", "4", "--rounds", "1", "--iterations", "1", "--dtype", "fp32", "--threads", "1"]


def compare(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROGRAM), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="requirements-optional.txt")
@pytest.mark.parametrize(("step", "trainers"), [(1, ("group_by_length", "padding_free")), (2, ("group_by_length",))])
def test_steps_1_and_2_train_by_both(tiny_model, tmp_path, step, trainers):
    figures = tmp_path / "figures.json"
    made = compare(
        "--step", str(step), "--sft", str(tiny_model), "--trl_python", sys.executable, "--json", str(figures), *FEW
    )
    assert made.returncode == 0, made.stderr[-2000:]
    rows = [line for line in made.stdout.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + len(trainers) and all(any(name in row for row in rows) for name in trainers)
    assert json.loads(figures.read_text())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="requirements-optional.txt")
def test_step_3_trains_by_both(tiny_model, tmp_path):
    figures = tmp_path / "figures.json"
    made = compare("--sft", str(tiny_model), "--trl_python", sys.executable, "--json", str(figures), *FEW)
    assert made.returncode == 0, made.stderr[-2000:]
    assert "| Tripod |" in made.stdout and "| TRL |" in made.stdout and "Equal: SFT weights" in made.stdout
    assert json.loads(figures.read_text())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--step", "1"], "--trl_python"),
        (["--trl_python", sys.executable], "--sft"),
        (["--step", "1", "--trl_python", sys.executable, "--rounds", "0"], "--rounds"),
        (["--step", "1", "--trl_python", "no_such_python"], "no_such_python"),
        (["--step", "1", "--trl_python", "false"], "no Python that has trl"),
        (["--sft", "no_such_folder", "--trl_python", sys.executable], "no_such_folder"),
    ],
)
def test_what_is_asked_wrongly_is_one_line(arguments, words):
    refused = compare(*arguments)
    last = refused.stderr.splitlines()[-1]
    assert refused.returncode == 2 and words in last and "Traceback" not in refused.stderr
