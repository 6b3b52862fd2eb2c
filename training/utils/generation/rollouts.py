"""Rollouts: what is asked for, what comes back from any decoder, and what models say of its tokens.

All decoders return one layout: prompts left-padded as they came, responses right-padded to the longest of the batch,
rows in the order of the request. Log-probs, values and scores keep it, ``[B, R]`` over the response's columns, also
where a model sees the answers to a prompt behind it in one row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from training.utils.errors import UserError
from training.utils.generation.sampling import SamplingConfig
from training.utils.model.forward import last_token_scores, response_log_probs, token_scores
from training.utils.run.phases import beat
from training.utils.sharing.rows import Sharing, behind_beginnings


@dataclass(frozen=True)
class RolloutRequest:
    """Prompts to continue.

    prompt_ids: [B, P] int64, left-padded. prompt_mask: [B, P], 1 on tokens; each row has at least one.
    row_ids: [B] int64, unique to a (prompt, sample) within an iteration: the sampling noise depends on it.
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


def full_response_mask(mask: Tensor, total_length: int) -> Tensor:
    """``[B, R]`` -> ``[B, T]``: false on the prompt's columns."""
    blank = torch.zeros(mask.shape[0], total_length - mask.shape[1], dtype=torch.bool, device=mask.device)
    return torch.cat([blank, mask.bool()], dim=1)


def behind_prompts(
    input_ids: Tensor, attention_mask: Tensor, mask: Tensor, sharing: Sharing | None
) -> dict[str, Tensor] | None:
    """The same rows with the answers to a prompt behind it, None where that does not pay or ``sharing`` is None.

    Args:
        input_ids, attention_mask: ``[B, T]`` of a rollout, padded on both sides.
        mask: ``[B, R]`` of its responses.
        sharing: of the model, see `training.utils.sharing.trial.find_sharing`.

    Returns:
        See `training.utils.sharing.rows.behind_beginnings`.
    """
    if sharing is None:
        return None
    response = full_response_mask(mask, input_ids.shape[1])
    prompts = input_ids.masked_fill(response | (attention_mask == 0), -1)[:, : input_ids.shape[1] - mask.shape[1]]
    numbers = torch.unique(prompts, dim=0, return_inverse=True)[1].tolist()
    groups = [[i for i, other in enumerate(numbers) if other == number] for number in dict.fromkeys(numbers)]
    return behind_beginnings(input_ids, attention_mask, groups, 0, sharing) or None


class Seen(NamedTuple):
    """Rows of a rollout as a model sees them.

    Attributes:
        ids, attention_mask: ``[B, T]``, T from the first to the last column with a token of any row.
        mask: ``[B, R]`` of the responses, at least one column.
        shared: see `behind_prompts`.
    """

    ids: Tensor
    attention_mask: Tensor
    mask: Tensor
    shared: dict[str, Tensor] | None

    @property
    def start(self) -> int:
        """Column of the first response token."""
        return self.ids.shape[1] - self.mask.shape[1]


def seen(input_ids: Tensor, attention_mask: Tensor, mask: Tensor, sharing: Sharing | None) -> Seen:
    """Rows ``[B, T]`` of a rollout and their response mask ``[B, R]`` without the columns that are padding in all."""
    start, found = input_ids.shape[1] - mask.shape[1], attention_mask.any(0).nonzero()
    columns = slice(int(found[0]), max(int(found[-1]), start) + 1)
    rows = input_ids[:, columns], attention_mask[:, columns], mask[:, : columns.stop - start]
    return Seen(*rows, behind_prompts(*rows, sharing))


def rollout_log_probs(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    mask: Tensor,
    temperature: float,
    entropy: bool = False,
    sharing: Sharing | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs (and entropies) of the response tokens, ``[B, R]`` fp32, by any causal LM or its engine."""
    rows = seen(input_ids, attention_mask, mask, sharing)
    log_probs, entropies = response_log_probs(
        model,
        rows.ids,
        rows.attention_mask,
        full_response_mask(rows.mask, rows.ids.shape[1]),
        temperature=temperature,
        entropy=entropy,
        shared=rows.shared,
    )
    more = (0, mask.shape[1] - rows.mask.shape[1])
    of_entropies = None if entropies is None else pad(entropies[:, rows.start :], more)
    return pad(log_probs[:, rows.start :], more), of_entropies


def state_values(
    critic: Any, input_ids: Tensor, attention_mask: Tensor, mask: Tensor, sharing: Sharing | None = None
) -> Tensor:
    """The critic's value of the state before each response token, ``[B, R]`` fp32, 0 outside the mask.

    The state before token t ends with token t - 1, so its value is the score one column to the left.
    """
    rows = seen(input_ids, attention_mask, mask, sharing)
    scores = token_scores(critic, rows.ids, rows.attention_mask, rows.shared)
    return pad(scores[:, rows.start - 1 : -1] * rows.mask, (0, mask.shape[1] - rows.mask.shape[1]))


def row_slices(batch_size: int, total: int) -> list[slice]:
    """Row slices of at most ``batch_size``."""
    return [slice(i, min(i + batch_size, total)) for i in range(0, total, batch_size)]


def _parts(rollout: RolloutBatch, batch_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Ids, attention and response mask of ``batch_size`` rows at a time, each a sign of life for the watchdog."""
    for piece in row_slices(batch_size, rollout.input_ids.shape[0]):
        beat()
        yield rollout.input_ids[piece], rollout.attention_mask[piece], rollout.response_mask[piece]


@torch.no_grad()
def score_log_probs(
    model: nn.Module,
    rollout: RolloutBatch,
    batch_size: int,
    temperature: float,
    entropy: bool = False,
    sharing: Sharing | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`rollout_log_probs` of a rollout, ``batch_size`` rows at a time."""
    parts = [rollout_log_probs(model, *part, temperature, entropy, sharing) for part in _parts(rollout, batch_size)]
    log_probs = torch.cat([p[0] for p in parts])
    return log_probs, torch.cat([p[1] for p in parts if p[1] is not None]) if entropy else None


@torch.no_grad()
def score_values(critic: Any, rollout: RolloutBatch, batch_size: int, sharing: Sharing | None = None) -> Tensor:
    """`state_values` of a rollout, ``batch_size`` rows at a time."""
    return torch.cat([state_values(critic, *part, sharing) for part in _parts(rollout, batch_size)])


@torch.no_grad()
def score_rewards(reward: Any, rollout: RolloutBatch, batch_size: int, sharing: Sharing | None = None) -> Tensor:
    """Raw reward of each response, ``[B]`` fp32: the reward model's score at its last token."""
    found = []
    for part in _parts(rollout, batch_size):
        rows = seen(*part, sharing)
        scores = token_scores(reward, rows.ids, rows.attention_mask, rows.shared)
        found.append(last_token_scores(scores, full_response_mask(rows.mask, rows.ids.shape[1])))
    return torch.cat(found)
