"""The programs with ranks that divide rows: they end with what one rank with whole rows ends with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.marks import slow
from tests.reliability.tiny_runs import metrics, step_arguments

DIVIDED = ("--sequence_parallel", "2")
KIND = {1: ("--best_by", "rouge"), 2: (), "dpo": ("--loss", "kto")}  # what takes more forwards than training does


def run(launcher, inputs: Path, step, output: Path, ranks: int, *more: str) -> str:
    """A run of six steps on some ranks, two rows a step and share; what rank 0 printed."""
    arguments = step_arguments(step, inputs, output, *more)
    launched = launcher.start_ranks(step, arguments, output.with_suffix(".log"), ranks)
    assert [one.wait() for one in launched] == [0] * ranks, launched[0].text()[-6000:]
    return launched[0].text()


def assert_alike(found: Path, expected: Path) -> None:
    """The same metrics and weights, but for rounding."""
    for mine, theirs in zip(metrics(found), metrics(expected), strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            assert mine[name] == pytest.approx(value, rel=1e-3, abs=1e-4), (theirs["step"], name)
    weights, others = (load_file(folder / "model.safetensors") for folder in (found, expected))
    for name, weight in others.items():
        assert torch.allclose(weights[name], weight, atol=2e-3), name
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (found, expected)]
    assert summaries[0]["steps"] == summaries[1]["steps"]


@pytest.mark.parametrize(
    ("step", "stage"),
    [(1, "2"), slow(2, "3"), slow("dpo", "3")],
)
def test_a_run_with_divided_rows_equals_one_with_whole_rows(launcher, inputs, tmp_path, step, stage):
    small = ("--learning_rate", "1e-4")
    run(launcher, inputs, step, tmp_path / "whole", 1, *KIND[step], *small)
    text = run(launcher, inputs, step, tmp_path / "divided", 2, *DIVIDED, "--zero_stage", stage, *KIND[step], *small)
    assert_alike(tmp_path / "divided", tmp_path / "whole")
    assert step == 1 or "each by itself" in text


@pytest.mark.slow
def test_a_run_goes_on_with_rows_that_are_no_longer_divided(launcher, inputs, tmp_path):
    small = ("--learning_rate", "1e-4", "--max_seq_len", "480")
    run(launcher, inputs, 1, tmp_path / "whole", 1, *small)
    output = tmp_path / "other"
    arguments = step_arguments(1, inputs, output, *small, *DIVIDED)
    fault = {"kind": "raise", "step": 3}
    launched = launcher.start_ranks(1, arguments, output.with_suffix(".log"), 2, fault)
    assert all(one.wait() != 0 for one in launched), launched[0].text()[-3000:]
    text = run(launcher, inputs, 1, output, 2, *small, "--per_device_train_batch_size", "1")
    assert "going on from" in text
    assert_alike(output, tmp_path / "whole")
