"""The mathematics of PPO, RLOO and GRPO for language models: pure functions on tensors, without models or processes.

Shapes: B rows, R response tokens. Every tensor ``[B, R]`` holds at column t what belongs to response token t: the
log-prob of choosing it, the value of the state before it, the reward for it. ``mask`` is true on response tokens,
the end token included; a response starts at column 0 and has no holes. Everything is fp32.

Sums, not means, are returned by the losses: the caller divides by the token count over all ranks and micro-batches.
"""

from __future__ import annotations

import torch
from torch import Tensor

# What nobody tunes. A log-ratio this large is a broken batch, and exp of it would be infinite.
MAX_LOG_RATIO = 20.0
WHITEN_EPSILON = 1e-8
GROUP_EPSILON = 1e-4  # added to a group's standard deviation: a group of nearly equal scores teaches next to nothing


def clipped(rewards: Tensor, clip_reward: float) -> Tensor:
    """Rewards held in [-clip_reward, clip_reward]; 0 turns it off."""
    return rewards.clamp(-clip_reward, clip_reward) if clip_reward > 0 else rewards


def sequence_scores(rewards: Tensor, ended: Tensor, *, missing_eos_penalty: float) -> Tensor:
    """The reward that PPO maximises for each response, before the KL penalty: ``[B]``.

    Args:
        rewards: ``[B]``, normalised, weighted and `clipped`.
        ended: ``[B]`` bool, whether the response has its end token.
        missing_eos_penalty: subtracted from responses cut off at the length limit.
    """
    return rewards - missing_eos_penalty * (~ended).to(rewards.dtype)


def token_rewards(
    log_probs: Tensor, reference_log_probs: Tensor, scores: Tensor, mask: Tensor, *, kl_coef: float
) -> Tensor:
    """Reward of every token: minus the KL penalty, and the sequence's score once, on its last response token.

    Args:
        log_probs, reference_log_probs: ``[B, R]``, of the sampled tokens under actor and reference.
        scores: ``[B]``, one reward for each response.
        mask: ``[B, R]``.
        kl_coef: weight of ``log_probs - reference_log_probs``, the k1 estimate of the KL divergence
            (Ziegler et al. 2019, arXiv 1909.08593).

    Returns:
        ``[B, R]``, 0 outside the mask. A row without response tokens gets no reward.
    """
    rewards = -kl_coef * (log_probs - reference_log_probs) * mask
    last = mask.long().sum(1) - 1
    rows = (last >= 0).nonzero().squeeze(-1)
    return rewards.index_put((rows, last[rows]), scores[rows], accumulate=True)


def generalised_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438) and the returns to regress on.

    Args:
        rewards, values: ``[B, R]``; ``values[:, t]`` belongs to the state before token t. After the last
            response token the episode is over: its next value is 0.
        mask: ``[B, R]``.
        gamma: discount per token.
        gae_lambda: 1 gives Monte-Carlo returns, 0 one-step differences.

    Returns:
        Advantages and returns (advantages + values), ``[B, R]``, 0 outside the mask.
    """
    mask = mask.to(rewards.dtype)
    advantages = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])
    for t in range(rewards.shape[1] - 1, -1, -1):
        inside_next = mask[:, t + 1] if t + 1 < rewards.shape[1] else torch.zeros_like(running)
        next_value = values[:, t + 1] * inside_next if t + 1 < rewards.shape[1] else inside_next
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        running = (delta + gamma * gae_lambda * running * inside_next) * mask[:, t]
        advantages[:, t] = running
    return advantages, (advantages + values) * mask


def _group_sums(values: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """For each row its group's sum of ``values`` and its group's size, ``[B]`` each."""
    _, member = torch.unique(groups, return_inverse=True)
    blank = values.new_zeros(int(member.max()) + 1 if member.numel() else 0)
    sums = blank.index_add(0, member, values)
    sizes = blank.index_add(0, member, torch.ones_like(values))
    return sums[member], sizes[member]


def leave_one_out_advantages(scores: Tensor, groups: Tensor) -> Tensor:
    """REINFORCE leave-one-out (Ahmadian et al. 2024, arXiv 2402.14740): each score minus the mean of its siblings'.

    Args:
        scores: ``[B]``, one per response, the KL penalty of its tokens subtracted.
        groups: ``[B]``, equal for responses to one prompt; all responses to it are among the rows.

    Returns:
        ``[B]``: the advantage of every token of the response. A response without siblings has none: 0.
    """
    sums, sizes = _group_sums(scores, groups)
    baseline = (sums - scores) / (sizes - 1).clamp(min=1)
    return torch.where(sizes > 1, scores - baseline, torch.zeros_like(scores))


def group_relative_advantages(scores: Tensor, groups: Tensor) -> Tensor:
    """GRPO with outcome rewards (Shao et al. 2024, arXiv 2402.03300, section 4.1.2): scores standardised in a group.

    Args:
        scores: ``[B]``, one per response, without any KL penalty, which GRPO puts into the loss.
        groups: as in `leave_one_out_advantages`.

    Returns:
        ``[B]``: ``(score - mean) / (std + GROUP_EPSILON)``, the standard deviation with n in the denominator.
    """
    sums, sizes = _group_sums(scores, groups)
    centred = scores - sums / sizes
    squares, _ = _group_sums(centred.square(), groups)
    return centred / ((squares / sizes).sqrt() + GROUP_EPSILON)


def whole_groups(valid: Tensor, groups: Tensor) -> Tensor:
    """Rows all of whose group are valid, ``[B]`` bool: an answer is judged against its siblings, so one spoils all.

    Args:
        valid: ``[B]`` bool. groups: as in `leave_one_out_advantages`.
    """
    broken, _ = _group_sums((~valid).float(), groups)
    return broken == 0


def reference_kl(log_probs: Tensor, reference_log_probs: Tensor, mask: Tensor) -> Tensor:
    """GRPO's KL term (arXiv 2402.03300, equation 4), the sum over tokens: ``exp(d) - d - 1``, d = reference - actor.

    Args:
        log_probs: ``[B, R]`` with gradient. reference_log_probs, mask: ``[B, R]``.
    """
    difference = ((reference_log_probs - log_probs) * mask).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return ((difference.exp() - difference - 1) * mask).sum()


def masked_moments(values: Tensor, mask: Tensor) -> Tensor:
    """Count, sum and sum of squares under the mask, ``[3]`` in float64: adding them over ranks gives global moments."""
    kept = values[mask.bool()].to(torch.float64)
    return torch.stack(
        [torch.tensor(float(kept.numel()), dtype=torch.float64, device=kept.device), kept.sum(), kept.square().sum()]
    )


def mean_and_variance(moments: Tensor) -> tuple[float, float]:
    """Mean and variance (n in the denominator) from `masked_moments`; (0, 0) of nothing."""
    count, total, squares = moments.tolist()
    if count == 0:
        return 0.0, 0.0
    mean = total / count
    return mean, max(squares / count - mean * mean, 0.0)


def whiten(values: Tensor, mask: Tensor, moments: Tensor) -> Tensor:
    """Shift and scale to mean 0 and variance 1 under the mask; ``[B, R]``, 0 outside.

    Args:
        values, mask: ``[B, R]``.
        moments: from `masked_moments`, added over every row of the iteration on all ranks.
    """
    mean, variance = mean_and_variance(moments)
    return (values - mean) * (variance + WHITEN_EPSILON) ** -0.5 * mask


def truncated_importance(log_probs: Tensor, sampled: Tensor, mask: Tensor, *, cap: float) -> Tensor:
    """How much likelier the trained policy finds each token than what sampled it did, at most ``cap``.

    As weights of the policy loss they make it one of the policy's own samples, where sampler and trainer round
    differently; the cap bounds the variance (truncated importance sampling, Ionides 2008, J. Comput. Graph. Stat. 17).

    Args:
        log_probs: ``[B, R]`` by the training forward. sampled: ``[B, R]`` by the sampler.
        mask: ``[B, R]``.

    Returns:
        ``[B, R]``, 1 outside the mask.
    """
    log_ratio = ((log_probs - sampled) * mask).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return log_ratio.exp().clamp(max=cap).where(mask.bool(), torch.ones_like(log_ratio))


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_ratio: float,
    importance: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped surrogate (Schulman et al. 2017, arXiv 1707.06347, equation 7), summed over tokens.

    Args:
        log_probs: ``[B, R]`` under the policy being trained, with gradient.
        old_log_probs: ``[B, R]`` under the policy that sampled, from the same forward before any update.
        advantages, mask: ``[B, R]``.
        clip_ratio: epsilon; the ratio is held in [1 - epsilon, 1 + epsilon].
        importance: ``[B, R]`` from `truncated_importance`, weights of the tokens; None for 1.

    Returns:
        The scalar sum, and detached sums: ``ratio``, ``clipped`` (tokens at which the clip binds) and
        ``approx_kl`` (the k3 estimate of the KL from the old policy, Schulman 2020).
    """
    mask = mask.to(log_probs.dtype)
    log_ratio = ((log_probs - old_log_probs) * mask).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_ratio, 1 + clip_ratio)
    loss = (torch.maximum(unclipped, clipped) * (mask if importance is None else mask * importance)).sum()
    with torch.no_grad():
        sums = {
            "ratio": (ratio * mask).sum(),
            "clipped": ((clipped > unclipped) * mask).sum(),
            "approx_kl": ((ratio - 1 - log_ratio) * mask).sum(),
        }
    return loss, sums


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip_value: float) -> Tensor:
    """Half the squared error of the values, pessimistically clipped around the old values; the sum over tokens.

    Args:
        values: ``[B, R]`` with gradient. old_values, returns, mask: ``[B, R]``.
        clip_value: how far a value may move from the old one and still lower the loss; 0 turns the clip off.
    """
    loss = (values - returns).square()
    if clip_value > 0:
        held = old_values + (values - old_values).clamp(-clip_value, clip_value)
        loss = torch.maximum(loss, (held - returns).square())
    return 0.5 * (loss * mask).sum()


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Moments ``[5]`` (float64) from which `explained_variance_from` gives 1 - Var[returns - values] / Var[returns]."""
    kept = mask.bool()
    target, error = returns[kept].to(torch.float64), (returns - values)[kept].to(torch.float64)
    count = torch.tensor(float(target.numel()), dtype=torch.float64, device=target.device)
    return torch.stack([count, target.sum(), target.square().sum(), error.sum(), error.square().sum()])


def explained_variance_from(moments: Tensor) -> float:
    """Explained variance from the moments of `explained_variance` added over ranks; 0 where returns do not vary."""
    count, total, squares, error_total, error_squares = moments.tolist()
    if count == 0:
        return 0.0
    variance = squares / count - (total / count) ** 2
    error_variance = error_squares / count - (error_total / count) ** 2
    return 1 - error_variance / variance if variance > WHITEN_EPSILON else 0.0
