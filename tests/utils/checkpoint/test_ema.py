"""The moving average of a role's weights: by the formula, beside an engine that it does not touch."""

import pytest
import torch

from tests.utils.checkpoint.ema_checks import DECAY, averaged
from tests.utils.checkpoint.resume_checks import ADAPTERS, MIXED


def expected(result):
    """The recurrence over the engine's own weights, in fp32."""
    state = {name: t.float() for name, t in result["start"].items()}
    for weights in result["history"]:
        state = {name: DECAY * t + (1 - DECAY) * weights[name].float() for name, t in state.items()}
    return state


def check(result, atol):
    assert result["masters_kept"] and result["loaded"]
    if not result["ema"]:
        return  # only rank 0 has whole weights
    wanted = expected(result)
    last = result["history"][-1]
    for name, tensor in result["ema"].items():
        torch.testing.assert_close(tensor.float(), wanted[name], rtol=0, atol=atol)
        assert torch.equal(result["engine_after"][name], last[name]), "the engine has its own weights again"
    assert max((result["ema"][n].float() - last[n].float()).abs().max() for n in last) > atol


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_ranks(tiny_model, rank_pair, tmp_path, stage):
    for result in rank_pair.run(averaged, str(tiny_model), str(tmp_path / "c"), stage=stage, dtype="fp32"):
        check(result, 1e-6)


@pytest.mark.parametrize(("stage", "lora"), [(1, None), (3, ADAPTERS), (2, MIXED)])
def test_in_bf16_and_with_adapters(tiny_model, tmp_path, stage, lora):
    """Masters stay fp32: averaged in bf16 a decay of 0.992 would round most updates away."""
    result = averaged(str(tiny_model), str(tmp_path / "c"), stage=stage, dtype="bf16", lora=lora)
    check(result, 8e-3)  # what bf16 rounds away of weights above 1
