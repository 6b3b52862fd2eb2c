"""What step 3's flags must satisfy together."""

from types import SimpleNamespace

import pytest

from tests.families import save
from tests.step3.hybrid_checks import of
from training.step3_rlhf_finetuning import settings
from training.step3_rlhf_finetuning.arguments import ARGUMENTS, RoleZeroArguments, RolloutArguments
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
        ({"trace": [2, 50], "num_iterations": 3}, "--trace 50: the run ends after --num_iterations 3"),
        ({"trace": [2, 50]}, ""),
    ],
)
def test_a_flag_without_effect_is_said_once(flags, words, capsys):
    values = {"samples_per_prompt": 2, "advantage": "rloo"} | flags
    settings.warn(settings.Flags(*(of(group, values) for group in ARGUMENTS)))
    printed = capsys.readouterr().out
    assert (words in printed) if words else not printed


@pytest.mark.parametrize(("device", "rows", "hint"), [("cpu", 16, False), ("cuda", 16, True), ("cuda", 64, False)])
def test_a_gpu_that_would_mostly_wait_is_said(monkeypatch, capsys, device, rows, hint):
    monkeypatch.setattr(settings, "get_accelerator", lambda: SimpleNamespace(device_name=lambda: device))
    values = {"per_device_generation_batch_size": rows}
    settings.warn(settings.Flags(*(of(group, values) for group in ARGUMENTS)))
    assert ("--per_device_generation_batch_size 64" in capsys.readouterr().out) == hint


@pytest.mark.parametrize("role", ["actor", "critic"])
def test_a_name_of_no_layer_is_refused_by_the_roles_own_flag(tmp_path, role):
    model = save("llama", tmp_path / "model")
    zero = of(RoleZeroArguments, {f"{role}_lora_dim": 4, f"{role}_lora_module_name": "nothing"})
    with pytest.raises(UserError, match=f"^--{role}_lora_module_name nothing matches no linear layer"):
        settings.check_models(model, model, None, zero, None, 8)
