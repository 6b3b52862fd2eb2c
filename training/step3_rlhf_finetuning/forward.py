"""A model's numbers for a rollout: log-probs, values and scores of its tokens, a few rows at a time.

The layout stays that of the rollout, ``[B, R]`` over the response's columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from training.utils.generation.requests import RolloutBatch
from training.utils.model.logprobs import response_log_probs
from training.utils.model.reward_model import last_token_scores
from training.utils.run.watchdog import beat


def full_response_mask(mask: Tensor, total_length: int) -> Tensor:
    """``[B, R]`` -> ``[B, T]``: false on the prompt's columns."""
    blank = torch.zeros(mask.shape[0], total_length - mask.shape[1], dtype=torch.bool, device=mask.device)
    return torch.cat([blank, mask.bool()], dim=1)


def actor_log_probs(
    model: Any, input_ids: Tensor, attention_mask: Tensor, mask: Tensor, temperature: float, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-probs (and entropies) of the response tokens, ``[B, R]`` fp32, by any causal LM or its engine."""
    total = input_ids.shape[1]
    log_probs, entropies = response_log_probs(
        model,
        input_ids,
        attention_mask,
        full_response_mask(mask, total),
        temperature=temperature,
        entropy=entropy,
    )
    start = total - mask.shape[1]
    return log_probs[:, start:], entropies[:, start:] if entropies is not None else None


def state_values(critic: Any, input_ids: Tensor, attention_mask: Tensor, mask: Tensor) -> Tensor:
    """The critic's value of the state before each response token, ``[B, R]`` fp32, 0 outside the mask.

    The state before token t ends with token t - 1, so its value is the score one column to the left.
    """
    start = input_ids.shape[1] - mask.shape[1]
    return critic(input_ids, attention_mask)[:, start - 1 : -1] * mask


def in_pieces(batch_size: int, total: int) -> list[slice]:
    """Row slices of at most ``batch_size``."""
    return [slice(i, min(i + batch_size, total)) for i in range(0, total, batch_size)]


def scored_pieces(batch_size: int, total: int) -> Iterator[slice]:
    """`in_pieces`, each a sign of life for the watchdog."""
    for piece in in_pieces(batch_size, total):
        beat()
        yield piece


@torch.no_grad()
def score_log_probs(
    model: nn.Module, rollout: RolloutBatch, batch_size: int, temperature: float, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """`actor_log_probs` of a rollout, ``batch_size`` rows at a time."""
    parts = [
        actor_log_probs(
            model,
            rollout.input_ids[piece],
            rollout.attention_mask[piece],
            rollout.response_mask[piece],
            temperature,
            entropy,
        )
        for piece in scored_pieces(batch_size, rollout.input_ids.shape[0])
    ]
    log_probs = torch.cat([p[0] for p in parts])
    return log_probs, torch.cat([p[1] for p in parts if p[1] is not None]) if entropy else None


@torch.no_grad()
def score_values(critic: Any, rollout: RolloutBatch, batch_size: int) -> Tensor:
    """`state_values` of a rollout, ``batch_size`` rows at a time."""
    return torch.cat(
        [
            state_values(critic, rollout.input_ids[piece], rollout.attention_mask[piece], rollout.response_mask[piece])
            for piece in scored_pieces(batch_size, rollout.input_ids.shape[0])
        ]
    )


@torch.no_grad()
def score_rewards(reward: Any, rollout: RolloutBatch, batch_size: int) -> Tensor:
    """Raw reward of each response, ``[B]`` fp32: the reward model's score at its last token."""
    total = rollout.input_ids.shape[1]
    return torch.cat(
        [
            last_token_scores(
                reward(rollout.input_ids[piece], rollout.attention_mask[piece]),
                full_response_mask(rollout.response_mask[piece], total),
            )
            for piece in scored_pieces(batch_size, rollout.input_ids.shape[0])
        ]
    )
