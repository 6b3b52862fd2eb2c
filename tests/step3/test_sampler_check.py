"""The self-check of the first iteration: rounding passes, another policy does not, and the message says what is off."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.step3.hybrid_checks import trajectory
from training.step3_rlhf_finetuning import ppo_trainer
from training.step3_rlhf_finetuning.sampler_check import (
    SamplerDifference,
    check_first_ratio,
    check_sampler,
    first_ratio_rounding,
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
        check_first_ratio(ratio, dtype, torch.device("cpu"))
    else:
        with pytest.raises(UserError, match="before any update it must be 1.*router's noise"):
            check_first_ratio(ratio, dtype, torch.device("cpu"))


def another_kernel_with_a_gradient(monkeypatch, noise=0.0):
    """As CUDA's sdpa may: attention that a gradient is asked of runs another kernel; ``noise`` plants more than that.

    Returns what was the largest difference of each call, once there has been one.
    """
    plain = torch.nn.functional.scaled_dot_product_attention
    differences = []

    def attention(*args, **kwargs):
        if not torch.is_grad_enabled():
            return plain(*args, **kwargs)
        with sdpa_kernel(SDPBackend.MATH):
            out = plain(*args, **kwargs)
        with torch.no_grad():
            differences.append((out - plain(*args, **kwargs)).abs().max().item())
        return out * (1 + noise * torch.sin(torch.arange(out.shape[-1])).to(out.dtype))

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    return differences


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_another_kernel_moves_the_first_ratio_by_rounding_alone(tiny_model, tiny_reward, monkeypatch, capsys, dtype):
    one_step = {"stage": 0, "dtype": dtype, "iterations": 1, "micro_batch": 8, "ppo_epochs": 1}
    [same] = trajectory(str(tiny_model), str(tiny_reward), **one_step)
    assert same["policy/first_ratio"] == 1.0 and same["policy/approx_kl"] == 0.0
    differences = another_kernel_with_a_gradient(monkeypatch)
    [other] = trajectory(str(tiny_model), str(tiny_reward), **one_step)
    ratio, cpu, cuda = other["policy/first_ratio"], torch.device("cpu"), torch.device("cuda")
    assert max(differences) > 0.0, "the kernels must differ for this to mean anything"
    assert first_ratio_rounding(dtype, cpu) == 0.0 < first_ratio_rounding(dtype, cuda)
    assert abs(ratio - 1) <= first_ratio_rounding(dtype, cuda)
    capsys.readouterr()
    check_first_ratio(ratio, dtype, cuda)
    assert "warning" not in capsys.readouterr().out


def test_more_than_another_kernel_is_said_and_ends_the_run(tiny_model, tiny_reward, monkeypatch, capsys):
    another_kernel_with_a_gradient(monkeypatch, noise=0.1)
    with pytest.raises(UserError, match="before any update it must be 1"):
        trajectory(str(tiny_model), str(tiny_reward), stage=0, iterations=1, micro_batch=8, ppo_epochs=1)
    capsys.readouterr()
    check_first_ratio(1.00005, "fp32", torch.device("cpu"), alike=False)  # other rows were scored together
    check_first_ratio(1.0005, "fp32", torch.device("cpu"))
    assert capsys.readouterr().out.count("not 1 by more than rounding") == 1


def test_few_tokens_may_be_off_by_chance_where_other_rows_are_scored_together():
    """Numbers of a row's padding: 0.06 a token in bf16, so 32 tokens are beyond 0.02 in one iteration of fifty."""
    other = {"dtype": "bf16", "device": torch.device("cuda"), "alike": False}
    for ratio, tokens in ((1.05, 32), (0.96, 64), (1.02, 100_000)):
        check_first_ratio(ratio, tokens=tokens, **other)
    for ratio, tokens in ((1.08, 32), (1.03, 4096), (math.nan, 32)):
        with pytest.raises(UserError, match="before any update"):
            check_first_ratio(ratio, tokens=tokens, **other)
    with pytest.raises(UserError, match="before any update"):
        check_first_ratio(1.05, "bf16", torch.device("cpu"), alike=True, tokens=32)


def test_a_run_looks_at_its_first_ratio_alone(tiny_model, tiny_reward, monkeypatch):
    """Later there is something to lose, and what draws random numbers would have been seen."""
    seen = []
    monkeypatch.setattr(ppo_trainer, "check_first_ratio", lambda ratio, *_: seen.append(ratio))
    trajectory(str(tiny_model), str(tiny_reward), stage=0, iterations=3, micro_batch=8, ppo_epochs=1)
    assert seen == [1.0]


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
def test_a_planted_difference_stops_the_first_iteration(tiny_model, tiny_reward, capsys, dtype, by, fine):
    run = {"stage": 0, "dtype": dtype, "iterations": 1, "micro_batch": 4, "backend": Shifted(by)}
    if fine:
        trajectory(str(tiny_model), str(tiny_reward), **run)
        assert "sampler against trainer, log-probs of " in capsys.readouterr().out
    else:
        with pytest.raises(UserError, match="the sampler is not the policy"):
            trajectory(str(tiny_model), str(tiny_reward), **run)
