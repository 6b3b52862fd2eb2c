"""PPO's formulas against hand-computed tensors and brute force."""

import math

import pytest
import torch

from training.step3_rlhf_finetuning import ppo
from training.utils.model.reward_stats import RewardStats

MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]], dtype=torch.bool)


def test_score_lands_once_on_the_last_response_token():
    log_probs = torch.tensor([[-1.0, -2.0, -3.0, -9.0], [-0.5, -9.0, -9.0, -9.0]])
    reference = torch.tensor([[-1.5, -2.0, -2.0, -1.0], [-1.0, -1.0, -1.0, -1.0]])
    rewards = ppo.token_rewards(log_probs, reference, torch.tensor([10.0, 20.0]), MASK, kl_coef=0.1)
    expected = torch.tensor([[-0.05, 0.0, 0.1 + 10.0, 0.0], [-0.05 + 20.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(rewards, expected)


def test_an_empty_response_gets_no_reward():
    blank = torch.zeros(1, 3)
    rewards = ppo.token_rewards(blank, blank, torch.tensor([5.0]), torch.zeros(1, 3, dtype=torch.bool), kl_coef=0.1)
    assert rewards.abs().sum() == 0


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_advantages_equal_the_sum_they_are_defined_by(gamma, lam):
    torch.manual_seed(0)
    rewards, values = torch.randn(5, 7), torch.randn(5, 7)
    lengths = [7, 1, 4, 6, 0]
    mask = torch.arange(7)[None] < torch.tensor(lengths)[:, None]
    advantages, returns = ppo.generalised_advantages(rewards, values, mask, gamma=gamma, gae_lambda=lam)
    for b, n in enumerate(lengths):
        for t in range(7):
            expected = 0.0
            for k in range(t, n):
                following = values[b, k + 1].item() if k + 1 < n else 0.0
                delta = rewards[b, k].item() + gamma * following - values[b, k].item()
                expected += (gamma * lam) ** (k - t) * delta
            assert advantages[b, t].item() == pytest.approx(expected, abs=1e-5)
            assert returns[b, t].item() == pytest.approx(expected + values[b, t].item() if t < n else 0.0, abs=1e-5)


def test_what_lies_behind_the_response_moves_nothing():
    torch.manual_seed(0)
    rewards, values = torch.randn(2, 4), torch.randn(2, 4)
    one, _ = ppo.generalised_advantages(rewards * MASK, values, MASK, gamma=1.0, gae_lambda=0.9)
    values = values.masked_fill(~MASK, 1e6)
    rewards = rewards.masked_fill(~MASK, -1e6)
    two, _ = ppo.generalised_advantages(rewards, values, MASK, gamma=1.0, gae_lambda=0.9)
    torch.testing.assert_close(one, two)


def test_whitening_is_over_all_parts_together():
    torch.manual_seed(0)
    values, mask = torch.randn(6, 5) * 3 + 2, torch.rand(6, 5) > 0.3
    moments = ppo.masked_moments(values[:2], mask[:2]) + ppo.masked_moments(values[2:], mask[2:])
    white = ppo.whiten(values, mask, moments)
    kept = white[mask]
    assert kept.mean().item() == pytest.approx(0.0, abs=1e-5)
    assert kept.var(unbiased=False).item() == pytest.approx(1.0, abs=1e-4)
    assert white[~mask].abs().sum() == 0


GROUPS = torch.tensor([4, 4, 4, 9, 9, 7])
SCORES = torch.tensor([1.0, 2.0, 6.0, -1.0, 5.0, 3.0])


def test_leave_one_out_by_hand():
    """RLOO: R_i minus the mean of the other answers' R (arXiv 2402.14740, section 3.2)."""
    expected = [1 - (2 + 6) / 2, 2 - (1 + 6) / 2, 6 - (1 + 2) / 2, -1 - 5, 5 + 1, 0.0]
    assert ppo.leave_one_out_advantages(SCORES, GROUPS).tolist() == pytest.approx(expected)


def test_leave_one_out_is_the_centred_score_times_k_over_k_minus_1():
    torch.manual_seed(0)
    scores = torch.randn(5)
    centred = (scores - scores.mean()) * 5 / 4
    torch.testing.assert_close(ppo.leave_one_out_advantages(scores, torch.zeros(5, dtype=torch.long)), centred)


def test_group_relative_by_hand():
    """GRPO: the score standardised within its group (arXiv 2402.03300, section 4.1.2)."""
    std = math.sqrt(((1 - 3) ** 2 + (2 - 3) ** 2 + (6 - 3) ** 2) / 3)
    expected = [(1 - 3) / std, (2 - 3) / std, (6 - 3) / std, -1.0, 1.0, 0.0]
    assert ppo.group_relative_advantages(SCORES, GROUPS).tolist() == pytest.approx(expected, abs=1e-3)
    equal = ppo.group_relative_advantages(torch.full((4,), 0.3), torch.zeros(4, dtype=torch.long))
    assert equal.abs().max() < 1e-3


@pytest.mark.parametrize("function", [ppo.leave_one_out_advantages, ppo.group_relative_advantages])
def test_the_order_of_rows_moves_no_advantage(function):
    order = torch.tensor([5, 0, 3, 2, 4, 1])
    torch.testing.assert_close(function(SCORES[order], GROUPS[order]), function(SCORES, GROUPS)[order])


def test_reference_kl_by_hand_and_its_gradient():
    """exp(d) - d - 1 with d = reference - actor (arXiv 2402.03300, equation 4); the gradient by hand is 1 - exp(d)."""
    log_probs = torch.tensor([[-1.0, -2.0, -3.0, -9.0], [-0.5, -9.0, -9.0, -9.0]], requires_grad=True)
    reference = torch.tensor([[-1.5, -2.0, -2.0, -1.0], [-1.0, -1.0, -1.0, -1.0]])
    loss = ppo.reference_kl(log_probs, reference, MASK)
    assert loss.item() == pytest.approx(2 * (math.exp(-0.5) + 0.5 - 1) + math.exp(1.0) - 1 - 1, abs=1e-5)
    loss.backward()
    expected = torch.tensor([[1 - math.exp(-0.5), 0.0, 1 - math.e, 0.0], [1 - math.exp(-0.5), 0.0, 0.0, 0.0]])
    torch.testing.assert_close(log_probs.grad, expected)


def test_reference_kl_is_an_unbiased_estimate():
    """Under the actor's own distribution its mean is the exact KL(actor || reference)."""
    torch.manual_seed(0)
    actor, reference = torch.randn(2, 6).log_softmax(-1)
    exact = (actor.exp() * (actor - reference)).sum().item()
    terms = [ppo.reference_kl(actor[i].view(1, 1), reference[i].view(1, 1), torch.ones(1, 1)).item() for i in range(6)]
    assert sum(p * t for p, t in zip(actor.exp().tolist(), terms, strict=True)) == pytest.approx(exact, abs=1e-5)


def test_importance_weighs_tokens_up_to_the_cap():
    trained = torch.tensor([[0.2, 0.4, 0.6, 9.9]]).log()
    sampled = torch.tensor([[0.4, 0.2, 0.1, 0.1]]).log()
    weights = ppo.truncated_importance(trained, sampled, MASK[:1], cap=2.5)
    torch.testing.assert_close(weights, torch.tensor([[0.5, 2.0, 2.5, 1.0]]))
    advantages, old = torch.tensor([[1.0, -2.0, 3.0, 5.0]]), trained.clone()
    loss, _ = ppo.policy_loss(trained, old, advantages, MASK[:1], clip_ratio=0.2, importance=weights)
    assert loss.item() == pytest.approx(-(0.5 * 1.0 - 2.0 * 2.0 + 2.5 * 3.0))
    plain, _ = ppo.policy_loss(trained, old, advantages, MASK[:1], clip_ratio=0.2)
    assert plain.item() == pytest.approx(-(1.0 - 2.0 + 3.0))


def test_policy_loss_by_hand():
    old = torch.zeros(1, 4)
    ratio = torch.tensor([[1.5, 0.5, 1.1, 1.0]])
    advantages = torch.tensor([[1.0, 1.0, -1.0, 7.0]])
    mask = torch.tensor([[1, 1, 1, 0]])
    loss, sums = ppo.policy_loss(ratio.log(), old, advantages, mask, clip_ratio=0.2)
    # clipped at 1.2; not clipped below when the advantage is positive; unclipped inside the interval
    assert loss.item() == pytest.approx(-1.2 - 0.5 + 1.1, abs=1e-6)
    assert sums["clipped"].item() == 1
    assert sums["ratio"].item() == pytest.approx(3.1, abs=1e-6)
    expected_kl = sum(r - 1 - math.log(r) for r in (1.5, 0.5, 1.1))
    assert sums["approx_kl"].item() == pytest.approx(expected_kl, abs=1e-5)


def test_policy_gradient_is_minus_advantage_at_ratio_one():
    log_probs = torch.randn(2, 4, requires_grad=True)
    advantages = torch.randn(2, 4)
    loss, _ = ppo.policy_loss(log_probs, log_probs.detach(), advantages, MASK, clip_ratio=0.2)
    loss.backward()
    torch.testing.assert_close(log_probs.grad, -advantages * MASK)


def test_value_loss_by_hand():
    values, old, returns = torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 3.0]]), torch.tensor([[2.0, 5.0]])
    mask = torch.tensor([[1, 1]])
    plain = ppo.value_loss(values, old, returns, mask, clip_value=0.0)
    assert plain.item() == pytest.approx(0.5 * (1 + 4))
    clipped = ppo.value_loss(values, old, returns, mask, clip_value=0.2)
    assert clipped.item() == pytest.approx(0.5 * (1.8**2 + 4))


def test_explained_variance():
    returns, mask = torch.tensor([[1.0, 2.0, 3.0, 99.0]]), torch.tensor([[1, 1, 1, 0]])
    perfect = ppo.explained_variance_from(ppo.explained_variance(returns, returns, mask))
    constant = ppo.explained_variance_from(ppo.explained_variance(torch.full((1, 4), 2.0), returns, mask))
    assert perfect == pytest.approx(1.0)
    assert constant == pytest.approx(0.0, abs=1e-9)


def test_scores_are_normalised_then_clipped_then_penalised():
    raw, ended = torch.tensor([1.0, 3.0, 9.0]), torch.tensor([True, True, False])
    stats = RewardStats(1.0, 2.0, 5, "fp32")
    scores = ppo.sequence_scores(ppo.clipped(stats.normalise(raw), 2.5), ended, missing_eos_penalty=0.5)
    assert scores.tolist() == [0.0, 1.0, 2.0]
    assert ppo.sequence_scores(ppo.clipped(raw, 0), ended, missing_eos_penalty=0).tolist() == [1.0, 3.0, 9.0]
