"""The sampler draws from the distribution it claims to, and its noise is a function of four integers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from training.utils.generation.sampling import (
    SamplingConfig,
    exponentials,
    next_tokens,
    penalise_repetition,
    row_keys,
    truncate,
)

DRAWS = 20_000
NOTHING = torch.zeros(1, 1, dtype=torch.long)


def draw_many(logits: Tensor, sampling: SamplingConfig, seed: int = 0) -> Tensor:
    """Counts [V] of DRAWS tokens drawn for as many rows with the same logits [V]."""
    keys = row_keys(seed, 0, torch.arange(DRAWS))
    tokens, logprobs = next_tokens(logits.expand(DRAWS, -1), keys, 0, sampling, NOTHING, NOTHING)
    policy = (logits / sampling.temperature).log_softmax(-1)
    torch.testing.assert_close(logprobs, policy[tokens], atol=1e-5, rtol=0)
    return torch.bincount(tokens, minlength=len(logits)).double()


def chi_square_z(counts: Tensor, probabilities: Tensor) -> float:
    """Pearson's statistic as standard deviations from its mean, tokens expected under 5 times pooled into one."""
    expected = probabilities.double() * DRAWS
    rare = expected < 5
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    kept = expected > 0
    freedom = int(kept.sum()) - 1
    statistic = ((counts - expected)[kept] ** 2 / expected[kept]).sum().item()
    return (statistic - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("vocabulary", [40, 256, 700])  # less than a block, one block, two and a part
@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_draws_follow_the_softmax(vocabulary: int, temperature: float) -> None:
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(1)) * 2
    counts = draw_many(logits, SamplingConfig(1, temperature=temperature))
    assert abs(chi_square_z(counts, (logits / temperature).softmax(-1))) < 4
    wrong = (logits / (temperature * 1.2)).softmax(-1)
    assert chi_square_z(counts, wrong) > 8, "the statistic must tell a temperature that is 20% off"


@pytest.mark.parametrize(("top_k", "top_p"), [(10, 1.0), (0, 0.7), (30, 0.8), (1, 1.0), (0, 1e-6)])
def test_truncation_keeps_the_support_that_transformers_keeps(top_k: int, top_p: float) -> None:
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(2)) * 3
    expected = TemperatureLogitsWarper(0.8)(NOTHING, logits)
    if top_k:
        expected = TopKLogitsWarper(top_k)(NOTHING, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(NOTHING, expected)
    ours = logits / 0.8
    truncate(ours, top_k, top_p)
    assert torch.equal(ours, expected)
    counts = draw_many(logits[0], SamplingConfig(1, temperature=0.8, top_k=top_k, top_p=top_p))
    assert counts[expected[0] == -math.inf].sum() == 0
    if (expected > -math.inf).sum() > 1:
        assert abs(chi_square_z(counts, expected[0].softmax(-1))) < 4


def test_penalty_is_transformers_penalty_without_the_padding() -> None:
    scores = torch.randn(2, 20, generator=torch.Generator().manual_seed(3))
    ids = torch.tensor([[9, 4, 4, 7], [0, 0, 5, 6]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    ours = scores.clone()
    penalise_repetition(ours, ids, mask, 1.7)
    penalty = RepetitionPenaltyLogitsProcessor(1.7)
    assert torch.equal(ours[0], penalty(ids[:1], scores[:1].clone())[0])
    assert torch.equal(ours[1], penalty(ids[1:, 2:], scores[1:].clone())[0])
    assert ours[1, 0] == scores[1, 0], "a pad token is not a token seen"


def test_penalty_survives_many_repetitions() -> None:
    ids = torch.full((1, 256), 3)  # an 8-bit count of them would be 0 again
    scores = torch.ones(1, 8)
    penalise_repetition(scores, ids, torch.ones_like(ids), 2.0)
    assert scores[0].tolist() == [1, 1, 1, 0.5, 1, 1, 1, 1]


def test_greedy_takes_the_maximum_whatever_truncation_says() -> None:
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(4))
    sampling = SamplingConfig(1, greedy=True, top_k=3, top_p=0.1, temperature=0.5)
    tokens, logprobs = next_tokens(logits, row_keys(0, 0, torch.arange(5)), 0, sampling, NOTHING, NOTHING)
    assert torch.equal(tokens, logits.argmax(-1))
    torch.testing.assert_close(logprobs, (logits / 0.5).log_softmax(-1).amax(-1))


def test_logits_are_left_as_they_were() -> None:
    logits = torch.randn(3, 256)
    before = logits.clone()
    sampling = SamplingConfig(1, temperature=0.5, top_k=5, repetition_penalty=2.0)
    ids = torch.ones(3, 2, dtype=torch.long)
    next_tokens(logits, row_keys(0, 0, torch.arange(3)), 0, sampling, ids, ids)
    assert torch.equal(logits, before)


def test_noise_is_exponential_and_independent() -> None:
    noise = exponentials(row_keys(0, 0, torch.arange(200)), 5, 1000)
    assert noise.dtype == torch.float64 and bool((noise > 0).all()) and bool(noise.isfinite().all())
    assert abs(noise.mean() - 1) < 0.01 and abs(noise.var() - 1) < 0.03
    assert len(noise.unique()) == noise.numel()
    centred = noise - noise.mean()
    for rows in (0, 1):  # neighbours along rows and along slots
        assert abs((centred * centred.roll(1, rows)).mean()) < 0.01
    other = exponentials(row_keys(0, 0, torch.arange(200)), 6, 1000) - 1
    assert abs((centred * other).mean()) < 0.01


def test_noise_depends_on_all_four_integers_and_on_nothing_else() -> None:
    row = torch.tensor([3])
    base = exponentials(row_keys(1, 2, row), 4, 10)
    assert torch.equal(base, exponentials(row_keys(1, 2, torch.tensor([9, 3])), 4, 10)[1:])
    assert torch.equal(base[:, :6], exponentials(row_keys(1, 2, row), 4, 6))
    # Orders matter too: (1, 2) is not (2, 1).
    others = [
        exponentials(row_keys(2, 1, row), 4, 10),
        exponentials(row_keys(1, 3, torch.tensor([2])), 4, 10),
        exponentials(row_keys(1, 2, torch.tensor([4])), 3, 10),
        exponentials(row_keys(1, 2, row), 5, 10),
    ]
    assert all(not torch.isin(base, other).any() for other in others)


def test_rounding_changes_few_draws() -> None:
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(6))
    rounded = logits + 0.01 * torch.randn(5000, generator=torch.Generator().manual_seed(7))
    keys = row_keys(0, 0, torch.arange(4000))
    first, second = (
        next_tokens(given.expand(4000, -1), keys, 0, SamplingConfig(1), NOTHING, NOTHING)[0]
        for given in (logits, rounded)
    )
    distance = 0.5 * (logits.softmax(-1) - rounded.softmax(-1)).abs().sum().item()
    assert (first != second).float().mean() < 4 * distance, "inverting the cumulative distribution would change most"
