"""The self-check of the first iteration: rounding passes, another policy does not, and the message says what is off."""

from __future__ import annotations

import pytest
import torch

from tests.step3.hybrid_checks import save_tiny_reward_model, trajectory
from training.step3_rlhf_finetuning.ppo_trainer import (
    SamplerDifference,
    check_first_ratio,
    check_sampler,
    sampler_difference,
)
from training.utils.errors import UserError
from training.utils.generation.engines import FastBackend


def difference(mean=0.0, p99=0.0, largest=0.0):
    return SamplerDifference(mean, p99, largest, 1000)


@pytest.mark.parametrize(
    ("dtype", "seen", "fine"),
    [
        ("fp32", difference(1e-6, 9e-5, 9.9e-4), True),
        ("fp32", difference(1e-6, 1e-5, 1.1e-3), False),
        ("bf16", difference(0.099, 0.49, 30.0), True),  # never the largest: one unlucky token proves nothing
        ("bf16", difference(0.11, 0.2, 0.3), False),
        ("bf16", difference(0.05, 0.51, 0.6), False),
        ("fp16", difference(0.05, 0.51, 0.6), False),
        ("fp32", difference(float("nan"), float("nan"), float("nan")), False),
        ("bf16", difference(float("nan"), float("nan"), float("nan")), False),
    ],
)
def test_tolerances(dtype, seen, fine):
    if fine:
        check_sampler(seen, dtype)
    else:
        with pytest.raises(
            UserError, match=f"not the policy.*1000 sampled tokens.*allowed in {dtype}.*--rollout_engine hf"
        ):
            check_sampler(seen, dtype)


@pytest.mark.parametrize(
    ("ratio", "dtype", "fine"),
    [
        (1.0, "fp32", True),
        (1.0009, "fp32", True),
        (1.014, "fp32", False),
        (1.014, "bf16", True),
        (0.97, "bf16", False),
        (1.006, "fp16", False),
        (float("nan"), "fp32", False),
    ],
)
def test_a_first_ratio_that_is_not_one(ratio, dtype, fine):
    """1.014 is what a router's noise made of it."""
    if fine:
        check_first_ratio(ratio, dtype)
    else:
        with pytest.raises(UserError, match="before any update it must be 1.*router's noise"):
            check_first_ratio(ratio, dtype)


def test_statistics_are_of_response_tokens_only():
    mask = torch.tensor([[True] * 100, [True] * 50 + [False] * 50])
    sampler = torch.zeros(2, 100)
    trainer = torch.where(mask, 0.0, 1000.0)
    trainer[0, :3] = -2.0
    seen = sampler_difference([sampler, sampler[:1]], [trainer, trainer[:1]], [mask, mask[:1]])
    assert (seen.tokens, seen.largest, seen.p99) == (250, 2.0, 2.0)
    assert seen.mean == pytest.approx(6 * 2.0 / 250)
    assert sampler_difference([sampler[:0]], [trainer[:0]], [mask[:0]]).tokens == 0


class Shifted:
    """A backend whose kept log-probs are off, as a sampler with a wrong temperature or mask would leave them."""

    def __init__(self, by):
        self.by = by

    def generate(self, model, request, sampling):
        batch = FastBackend().generate(model, request, sampling)
        batch.logprobs[batch.response_mask] += self.by
        return batch


@pytest.mark.parametrize(("dtype", "by", "fine"), [("fp32", 0.0, True), ("fp32", 3e-3, False), ("bf16", 0.3, False)])
def test_a_planted_difference_stops_the_first_iteration(tiny_model, tmp_path, capsys, dtype, by, fine):
    reward = save_tiny_reward_model(str(tiny_model), tmp_path / "reward")
    run = {"stage": 0, "dtype": dtype, "iterations": 1, "micro_batch": 4, "backend": Shifted(by)}
    if fine:
        trajectory(str(tiny_model), str(reward), **run)
        assert "sampler against trainer, log-probs of " in capsys.readouterr().out
    else:
        with pytest.raises(UserError, match="the sampler is not the policy"):
            trajectory(str(tiny_model), str(reward), **run)
