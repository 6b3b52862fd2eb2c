"""What a rollout is asked for and what comes back: prompts, responses, and the Protocol of what lies between.

All engines return one layout: prompts left-padded as they came, responses right-padded to the longest of the batch,
rows in the order of the request.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from training.utils.generation.sampling import SamplingConfig


@dataclass(frozen=True)
class RolloutRequest:
    """Prompts to continue.

    prompt_ids: [B, P] int64, left-padded. prompt_mask: [B, P], 1 on tokens; each row has at least one.
    row_ids: [B] int64, unique to a (prompt, sample) within an iteration: the sampling noise hangs on it.
    seed, iteration: the other two sources of noise. stop_ids: a response ends with any of them. pad_id: fills up.
    rows: the prompts' rows in their dataset, for rewards that read more than tokens.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    row_ids: Tensor
    seed: int
    iteration: int
    stop_ids: tuple[int, ...]
    pad_id: int
    rows: tuple[int, ...] = ()


@dataclass(frozen=True)
class RolloutBatch:
    """Prompts with their responses, R being the longest response of the batch.

    input_ids: [B, P + R] int64. attention_mask: [B, P + R] int64, 1 on prompt and response tokens.
    response_start: P. response_mask: [B, R] bool, the stop token included.
    logprobs: [B, R] fp32 of the sampled tokens, 0 outside the response.
    prefill_seconds: until the prompts were computed.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_start: int
    response_mask: Tensor
    logprobs: Tensor
    prefill_seconds: float = 0.0


def has_ended(rollout: RolloutBatch, stop_ids: tuple[int, ...]) -> Tensor:
    """Whether each response's last token is an end token, ``[B]`` bool."""
    responses = rollout.input_ids[:, rollout.response_start :]
    last = (rollout.response_mask.long().sum(1) - 1).clamp(min=0)
    tokens = responses.gather(1, last.unsqueeze(1)).squeeze(1)
    return torch.isin(tokens, torch.tensor(stop_ids, device=tokens.device)) & rollout.response_mask.any(1)


def response_texts(rollout: RolloutBatch, tokenizer: Any) -> list[str]:
    """The responses as text, without special tokens and surrounding white space."""
    responses = rollout.input_ids[:, rollout.response_start :]
    return [
        tokenizer.decode(ids[mask], skip_special_tokens=True).strip()
        for ids, mask in zip(responses, rollout.response_mask, strict=True)
    ]


class RolloutBackend(Protocol):
    """Continues prompts with a model."""

    def generate(self, model: nn.Module, request: RolloutRequest, sampling: SamplingConfig) -> RolloutBatch:
        """Decode a response for each row of the request; see `RolloutBatch` for the layout."""
        ...
