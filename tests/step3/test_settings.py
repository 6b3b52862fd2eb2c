"""What step 3's flags must satisfy together."""

import re
from types import SimpleNamespace

import pytest

from tests.step3.hybrid_checks import of
from training.step3_rlhf_finetuning import reward_examples, settings
from training.step3_rlhf_finetuning.arguments import ARGUMENTS, RolloutArguments
from training.utils.errors import UserError


def test_a_step_of_half_a_prompt_can_not_be_dealt():
    rollout = RolloutArguments(samples_per_prompt=4)
    assert settings.prompts_per_step(rollout, {"rows per step": 16}, 2) == 4
    assert settings.prompts_per_step(rollout, {"rows per step": 16}, 4) == 4
    assert settings.prompts_per_step(rollout, {"rows per step": 6}, 1) == 0
    assert settings.prompts_per_step(rollout, {"rows per step": 12}, 2) == 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"critic_lora_dim": 8}, "--critic_lora_dim has no effect"),
        ({}, ""),
    ],
)
def test_a_flag_without_effect_is_said_once(flags, words, capsys):
    values = {"samples_per_prompt": 2, "advantage": "rloo"} | flags
    settings.warn(settings.Flags(*(of(group, values) for group in ARGUMENTS)))
    printed = capsys.readouterr().out
    assert (words in printed) if words else not printed


@pytest.mark.parametrize(
    ("flags", "whole"),
    [
        ({"actor_lora_dim": 4}, ["critic"]),
        ({"critic_lora_dim": 4}, ["actor"]),
        ({"actor_lora_dim": 4, "critic_lora_dim": 4}, []),
        ({"actor_lora_dim": 4, "advantage": "rloo", "samples_per_prompt": 2}, []),
    ],
)
def test_a_role_that_trains_whole_beside_adapters_is_said(flags, whole, capsys):
    values = {"only_optimize_lora": True} | flags
    settings.warn(settings.Flags(*(of(group, values) for group in ARGUMENTS)))
    assert re.findall(r"the (\w+) trains whole", capsys.readouterr().out) == whole


@pytest.mark.parametrize(
    ("device", "rows", "flags", "hints"),
    [
        ("cpu", 16, {"actor_zero_stage": 3}, []),
        ("cuda", 16, {}, ["generation_batch_size 64"]),
        ("cuda", 64, {}, []),
        ("cuda", 128, {"critic_zero_stage": 3}, ["scoring_batch_size 64"]),
        ("cuda", 16, {"actor_zero_stage": 3}, ["generation_batch_size 64", "scoring_batch_size 16"]),
        ("cuda", 64, {"actor_zero_stage": 3, "per_device_scoring_batch_size": 64}, []),
    ],
)
def test_a_gpu_that_would_mostly_wait_is_said(monkeypatch, capsys, device, rows, flags, hints):
    monkeypatch.setattr(settings, "get_accelerator", lambda: SimpleNamespace(device_name=lambda: device))
    flags = {"per_device_generation_batch_size": rows} | flags
    settings.warn(settings.Flags(*(of(group, flags) for group in ARGUMENTS)))
    told = capsys.readouterr().out.splitlines()
    assert [f"--per_device_{hint}" in line for hint, line in zip(hints, told, strict=True)] == [True] * len(hints)


@pytest.mark.parametrize("role", ["actor", "critic"])
def test_a_name_of_no_layer_is_refused_by_the_roles_own_flag(tiny_model, role):
    """The critic starts from the actor's model, too."""
    reward = {"critic_model_name_or_path": "none", "reward_function": [f"{reward_examples.__file__}:exact_answer"]}
    adapters = {f"{role}_lora_dim": 4, f"{role}_lora_module_name": "nothing"}
    values = {"actor_model_name_or_path": str(tiny_model)} | reward | adapters
    with pytest.raises(UserError, match=f"^--{role}_lora_module_name nothing matches no linear layer"):
        settings.find_models(settings.Flags(*(of(group, values) for group in ARGUMENTS)))


@pytest.mark.parametrize("flag", settings.OF_THE_CRITIC)
def test_without_a_critic_its_flags_are_said_to_be_idle(flag):
    other = {"critic_lora_module_name": "q_proj", "critic_gradient_checkpointing": True, "whiten_advantages": False}
    values = {flag: other.get(flag, 1 if flag == "critic_lora_dim" else 0.5)}
    by_critic, without = (
        settings.idle_flags(settings.Flags(*(of(group, values | {"advantage": name}) for group in ARGUMENTS)))
        for name in ("gae", "rloo")
    )
    assert flag in without and "no critic" in without[flag]
    assert flag not in by_critic or flag == "critic_lora_module_name" and "--critic_lora_dim" in by_critic[flag]


@pytest.mark.parametrize(
    ("stage", "reward", "words"),
    [(2, "path", "at stage 3 alone"), (3, "path", ""), (3, "none", "no reward model either"), (0, "none", "")],
)
def test_without_a_critic_its_stage_is_the_reward_models(stage, reward, words):
    values = {"advantage": "rloo", "critic_zero_stage": stage, "critic_model_name_or_path": reward}
    found = settings.idle_flags(settings.Flags(*(of(group, values) for group in ARGUMENTS)))
    assert words in found["critic_zero_stage"] if words else "critic_zero_stage" not in found
    by_critic = settings.Flags(*(of(group, values | {"advantage": "gae"}) for group in ARGUMENTS))
    assert "critic_zero_stage" not in settings.idle_flags(by_critic)


@pytest.mark.parametrize(
    ("flag", "value", "needs"),
    [
        ("actor_lora_module_name", "q_proj", {"actor_lora_dim": 4}),
        ("critic_lora_module_name", "q_proj", {"critic_lora_dim": 4}),
        ("unsup_coef", 3.0, {"unsupervised_data_path": ["demo"]}),
        ("target_kl", 0.1, {"ppo_epochs": 2}),
    ],
)
def test_a_flag_that_needs_another_is_idle_without_it(flag, value, needs):
    for values, idle in (({flag: value}, {flag}), ({flag: value} | needs, set())):
        assert settings.idle_flags(settings.Flags(*(of(group, values) for group in ARGUMENTS))).keys() == idle


@pytest.mark.parametrize(
    ("flags", "without"),
    [
        ({"normalize_reward": False}, {"critic_model_name_or_path": "none"}),
        ({"offload_reward_model": True, "critic_zero_stage": 3}, {"critic_model_name_or_path": "none"}),
        ({"offload_reference_model": True, "actor_zero_stage": 3}, {"actor_lora_dim": 4, "only_optimize_lora": True}),
    ],
)
def test_a_flag_of_a_model_is_idle_without_that_model(flags, without):
    for values, idle in ((flags, set()), (flags | without, {next(iter(flags))})):
        assert settings.idle_flags(settings.Flags(*(of(group, values) for group in ARGUMENTS))).keys() == idle
