"""PPO from Python: the example runs, it is what the program does, and what was saved goes on."""

from __future__ import annotations

import json
import math
import re
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.marks import slow
from tests.step3.hybrid_checks import save_tiny_reward_model
from training import PPO, STRATEGIES
from training.step3_rlhf_finetuning import main as step3
from training.step3_rlhf_finetuning.reward_sources import TokenReward
from training.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
FLAGS: dict[str, Any] = {
    "dtype": "fp32",
    "per_device_generation_batch_size": 4,
    "per_device_training_batch_size": 2,
    "max_prompt_seq_len": 64,
    "max_answer_seq_len": 6,
    "actor_learning_rate": 1e-3,
    "critic_learning_rate": 1e-3,
    "ppo_epochs": 2,
    "num_iterations": 2,
}
SAME = ("reward/score", "kl/per_sequence", "policy/loss", "critic/loss", "policy/approx_kl", "rollout/tokens")


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory) -> Path:
    """A folder as train.py leaves it, with tiny models."""
    folder = tmp_path_factory.mktemp("run")
    shutil.copytree(tiny_model, folder / "step1")
    save_tiny_reward_model(str(tiny_model), folder / "step2")
    return folder


@pytest.fixture(scope="module")
def models(run) -> dict[str, str]:
    return {"actor_model_name_or_path": str(run / "step1"), "critic_model_name_or_path": str(run / "step2")}


def test_the_example(run, tiny_data, tmp_path, monkeypatch, capsys):
    example = ROOT / "examples" / "ppo_from_python.py"
    monkeypatch.setattr(sys, "argv", ["", str(run), str(tiny_data / "prompts.jsonl"), str(tmp_path), "naive"])
    runpy.run_path(str(example))
    told = re.findall(r"^(\d): reward (-?[\d.]+), KL (-?[\d.]+)$", capsys.readouterr().out, re.M)
    assert [number for number, _, _ in told] == ["0", "1", "2", "3"] and float(told[0][2]) == 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "actor")
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "critic")
    assert (tmp_path / "critic_optimizer" / "rank0.safetensors").is_file()
    body = example.read_text(encoding="utf-8").split('"""')[2].strip().splitlines()
    assert len(body) < 35


def steps_of(ppo: PPO, numbers: range) -> list[dict[str, float]]:
    found = []
    for number in numbers:
        experience = ppo.make_experience(number)
        found.append(ppo.update(experience, number))
    return found


@pytest.fixture(scope="module")
def whole(models, tiny_data, tmp_path_factory) -> tuple[list[dict[str, float]], Path]:
    """The metrics of two iterations, and what was saved after the first one."""
    folder = tmp_path_factory.mktemp("saved")
    held_out = {"eval_data_path": [str(tiny_data / "held_out.jsonl")]}  # as the program below
    ppo = PPO([str(tiny_data / "prompts.jsonl")], strategy="zero2", **held_out, **models, **FLAGS)
    first = steps_of(ppo, range(1))
    for role in ("actor", "critic"):
        ppo.save_model(role, folder / role)
        ppo.save_optimizer(role, folder / f"{role}_optimizer")
    return [*first, *steps_of(ppo, range(1, 2))], folder


def test_it_is_what_the_program_does(whole, models, tiny_data, tmp_path):
    flags = models | FLAGS | {"actor_zero_stage": 2, "critic_zero_stage": 2, "eval_every": 0}
    flags |= {
        "data_path": tiny_data / "prompts.jsonl",
        "output_dir": tmp_path,
        "eval_data_path": tiny_data / "held_out.jsonl",
    }
    assert step3.main([part for name, value in flags.items() for part in (f"--{name}", str(value))]) == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    program = [line for line in lines if "policy/loss" in line]
    for ours, theirs in zip(whole[0], program, strict=True):
        assert {name: ours[name] for name in SAME} == {name: theirs[name] for name in SAME}


def test_who_may_read_what_was_saved_is_who_the_user_allows(whole):
    for role in ("actor", "critic"):
        modes = {path.stat().st_mode for path in (whole[1] / f"{role}_optimizer").iterdir()}
        assert len(modes) == 1, role


def test_a_reward_function_draws_the_same_numbers_in_each_run(models, tiny_data, tmp_path):
    file = tmp_path / "lot.py"
    body = "def draw(prompts, answers, rows):\n    return [random.random() + numpy.random.rand() for _ in answers]\n"
    file.write_text(f"import random\nimport numpy\n{body}")
    scores = []
    for name in ("once", "again"):
        flags = FLAGS | {"actor_model_name_or_path": models["actor_model_name_or_path"], "eval_every": 0}
        flags |= {"critic_model_name_or_path": "none", "reward_function": f"{file}:draw"}
        flags |= {"data_path": tiny_data / "prompts.jsonl", "output_dir": tmp_path / name}
        assert step3.main([part for flag, value in flags.items() for part in (f"--{flag}", str(value))]) == 0
        lines = (tmp_path / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        scores.append([line["reward/score"] for line in map(json.loads, lines) if "reward/score" in line])
    assert scores[0] == scores[1] and len({*scores[0]}) > 1


@pytest.mark.parametrize("strategy", ["zero2", slow("gemini")])
def test_model_and_optimizer_go_on_where_they_were_saved(whole, models, tiny_data, strategy):
    metrics, folder = whole
    held_out = {"eval_data_path": [str(tiny_data / "held_out.jsonl")]}
    ppo = PPO([str(tiny_data / "prompts.jsonl")], strategy=strategy, **held_out, **models, **FLAGS)
    for role in ("actor", "critic"):
        ppo.load_model(role, folder / role)
        ppo.load_optimizer(role, folder / f"{role}_optimizer")
    (found,) = steps_of(ppo, range(1, 2))
    for name in SAME:
        assert found[name] == pytest.approx(metrics[1][name], abs=1e-5), name


def test_weights_alone_are_loaded_too(whole, models, tiny_data):
    """Without the optimizer the experience is the same, as it needs no moments."""
    metrics, folder = whole
    held_out = {"eval_data_path": [str(tiny_data / "held_out.jsonl")]}
    ppo = PPO([str(tiny_data / "prompts.jsonl")], **held_out, **models, **FLAGS)
    before = ppo.make_experience(1)
    ppo.load_model("actor", folder / "actor")
    assert ppo.make_experience(1)[0].log_probs.shape[0] == before[0].log_probs.shape[0]
    assert ppo._found["kl/per_sequence"] == pytest.approx(metrics[1]["kl/per_sequence"], abs=1e-5)


def test_ten_skipped_steps_are_an_error_each_time(models, tiny_data, monkeypatch):
    monkeypatch.setattr(TokenReward, "score", lambda self, rollout, *_: torch.full((len(rollout.input_ids),), math.inf))
    ppo = PPO([str(tiny_data / "prompts.jsonl")], **models, **(FLAGS | {"ppo_epochs": 5}))
    for number in range(2):
        experience = ppo.make_experience(number)
        with pytest.raises(RuntimeError, match="10 optimizer steps in a row were skipped"):
            ppo.update(experience, number)


def test_strategies_are_settings():
    assert set(STRATEGIES) == {"naive", "ddp", "zero2", "zero2_cpu", "gemini", "gemini_auto"}
    page = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
    for name, flags in STRATEGIES.items():
        row = re.search(rf"^\| `{name}` \|(.*)\|$", page, re.M)
        assert row, name
        for flag, value in flags.items():
            assert f"--{flag}" in row[1] and (value is True or f"--{flag} {value}" in row[1]), (name, flag)


def test_bad_input(models, tiny_data, tmp_path):
    data = [str(tiny_data / "prompts.jsonl")]
    with pytest.raises(UserError, match="strategy 'zero9': there are naive, ddp"):
        PPO(data, strategy="zero9", **models)
    with pytest.raises(UserError, match="--ppo_epoch.*did you mean --ppo_epochs"):
        PPO(data, ppo_epoch=1, **models)
    with pytest.raises(UserError, match="enable_ema, output_dir: what the program of step 3 does"):
        PPO(data, enable_ema=True, output_dir=str(tmp_path), **models)
    with pytest.raises(UserError, match="no such file"):
        PPO([str(tmp_path / "none.jsonl")], **models)
    with pytest.raises(UserError, match="data_path is an empty list"):
        PPO([], **models)
    with pytest.raises(UserError, match="path.jsonl: no such file"):
        PPO(tmp_path / "path.jsonl", **models)
    with pytest.raises(UserError, match="one.jsonl: no such file"):
        PPO(str(tmp_path / "one.jsonl"), **models)
    ppo = PPO(data, **models, **FLAGS)
    config = AutoConfig.from_pretrained(models["actor_model_name_or_path"], num_hidden_layers=3)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "deeper")
    config.num_hidden_layers, config.intermediate_size = 2, 2 * config.intermediate_size
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "wider")
    for other in ("deeper", "wider"):
        with pytest.raises(UserError, match=f"{other} is of another model: .* does not fit"):
            ppo.load_model("actor", tmp_path / other)
    ppo = PPO(data, **models, **(FLAGS | {"actor_lora_dim": 2}))
    with pytest.raises(UserError, match="with LoRA start from the folder"):
        ppo.load_model("actor", models["actor_model_name_or_path"])
    with pytest.raises(UserError, match="no role 'reward' trains here: actor, critic"):
        ppo.save_model("reward", tmp_path)
    with pytest.raises(UserError, match="no optimizer that save_optimizer wrote"):
        ppo.load_optimizer("critic", tmp_path)
