"""What a rollout is asked for and what comes back: prompts, responses, and the Protocol of what lies between.

All engines return one layout: prompts left-padded as they came, responses right-padded to the longest of the batch,
rows in the order of the request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from training.utils.errors import UserError
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

    @classmethod
    def of(
        cls, prompts: Sequence[Sequence[int]], row_ids: Sequence[int], pad_id: int, device: torch.device, **more: Any
    ) -> RolloutRequest:
        """Prompts of unequal lengths as token ids, on a device; ``more`` are the other fields."""
        width = max(map(len, prompts))
        ids = [[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        tensors = {"prompt_ids": ids, "prompt_mask": mask, "row_ids": list(row_ids)}
        on_device: dict[str, Any] = {name: torch.tensor(values, device=device) for name, values in tensors.items()}
        return cls(**on_device, pad_id=pad_id, **more)


@dataclass
class Responses:
    """What decoding fills in, rows in the request's order: ids and logprobs [B, max_new_tokens], lengths [B].

    prefill_seconds: until the prompts were computed.
    """

    ids: Tensor
    logprobs: Tensor
    lengths: Tensor
    prefill_seconds: float = 0.0


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


def assemble(
    request: RolloutRequest, responses: Tensor, lengths: Tensor, logprobs: Tensor, prefill_seconds: float
) -> RolloutBatch:
    """Put prompts, responses [B, >=R] and log-probs of the same shape into the common layout."""
    longest = int(lengths.max()) if lengths.numel() else 0
    response_mask = torch.arange(longest, device=lengths.device) < lengths[:, None]
    responses = responses[:, :longest].masked_fill(~response_mask, request.pad_id)
    return RolloutBatch(
        input_ids=torch.cat([request.prompt_ids, responses], dim=1),
        attention_mask=torch.cat([request.prompt_mask.long(), response_mask.long()], dim=1),
        response_start=request.prompt_ids.shape[1],
        response_mask=response_mask,
        logprobs=logprobs[:, :longest].masked_fill(~response_mask, 0.0),
        prefill_seconds=prefill_seconds,
    )


class RolloutsLost(UserError):
    """What decodes is gone or can not be trusted any more, on all ranks alike; the message is one line that says why.

    Step 3 ends with a checkpoint (`training.step3_rlhf_finetuning.outputs.saved_if_lost`), others with the line alone.
    """


class RolloutBackend(Protocol):
    """Continues prompts with a model."""

    def generate(self, model: nn.Module, request: RolloutRequest, sampling: SamplingConfig) -> RolloutBatch:
        """Decode a response for each row of the request; see `RolloutBatch` for the layout."""
        ...
