"""How a model is called, and the scores of a reward model or critic; log-probs are in `logprobs.py`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from training.utils.engine import sequence_parallel
from training.utils.sharing.attention import block_mask, by_blocks
from training.utils.sharing.rows import tree_mask


def module_of(model: Any) -> Any:
    """The module in a DeepSpeed engine; any other as it is."""
    return model.module if hasattr(model, "module") else model


def without_adapters(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper, its adapter layers in place; any other model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def forward_inputs(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Keyword arguments of a forward in which positions count real tokens only, so padding moves nothing.

    A model whose rows are divided among ranks gets this rank's columns, see `training.utils.engine.sequence_parallel`.

    Args:
        model: the module whose ``forward`` will be called; families that place positions from the mask
            themselves (BLOOM) take no ``position_ids``.
        input_ids, attention_mask: ``[B, T]``.
        position_ids: ``[B, T]`` of rows with several answers behind one beginning, whose ``attention_mask`` says what
            belongs together, see `training.utils.data.batches.collate_answers`.
    """
    if sequence_parallel.is_split(model):
        sequence_parallel.check_right_padded(attention_mask)
        positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        own = {"input_ids": input_ids, "position_ids": positions}
        return {name: sequence_parallel.own_columns(tensor) for name, tensor in own.items()}
    if position_ids is not None:
        mask = (block_mask if by_blocks(model, attention_mask.device) else tree_mask)(attention_mask)
        if model.config._attn_implementation == "eager":  # which adds it to its scores
            mask = torch.zeros_like(mask, dtype=model.dtype).masked_fill(~mask, torch.finfo(model.dtype).min)
        return {"input_ids": input_ids, "attention_mask": mask, "position_ids": position_ids}
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    return inputs


def enable_gradient_checkpointing(model: Any) -> None:
    """Recompute activations in the backward pass; with LoRA inputs must carry a gradient to reach the adapters."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


class TokenScorer(nn.Module):
    """A sequence-classification model that scores every token instead of the last one.

    The reward of a response is the score at its last token; the critic's values are all of them. With
    ``mean`` and ``std`` the output is ``(score - mean) / std``: a critic that starts from the reward model
    then starts on the scale of the normalised rewards it must predict.
    """

    def __init__(self, classifier: Any, mean: float = 0.0, std: float = 1.0) -> None:
        super().__init__()
        self.classifier = classifier
        self.mean = mean
        self.std = std

    @property
    def config(self) -> Any:
        """The classifier's configuration (DeepSpeed and transformers look for it)."""
        return self.classifier.config

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """Recompute activations of the backbone in the backward pass."""
        self.classifier.gradient_checkpointing_enable(**kwargs)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Score every token: ids and mask ``[B, T]`` -> ``[B, T]`` fp32, any value at padding; see `forward_inputs`."""
        inner = without_adapters(self.classifier)
        backbone = inner.base_model
        inputs = forward_inputs(backbone, input_ids, attention_mask, position_ids)
        scores = inner.score(backbone(**inputs, use_cache=False).last_hidden_state).squeeze(-1).to(torch.float32)
        if sequence_parallel.is_split(inner):
            scores = sequence_parallel.joined(scores, input_ids.shape[1])
        return (scores - self.mean) / self.std


def last_token_scores(scores: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """The reward of each row: its score at the last response token.

    Args:
        scores: ``[B, T]``, one per token.
        response_mask: ``[B, T]``, 0/1 or bool; a row without any response token gives its score at column 0.

    Returns:
        ``[B]``, in the dtype of ``scores``.
    """
    columns = torch.arange(response_mask.shape[1], device=response_mask.device)
    last = (response_mask.long() * columns).argmax(dim=1)
    return scores.gather(1, last.unsqueeze(1)).squeeze(1)


def token_scores(
    scorer: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    shared: Mapping[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """What a `TokenScorer` says of every token: ``[B, T]`` fp32, anything at padding.

    Args:
        scorer: it, or its engine.
        input_ids, attention_mask: ``[B, T]``.
        shared: see `training.utils.model.logprobs.response_log_probs`.
    """
    if shared is None:
        return scorer(input_ids, attention_mask)
    scores = scorer(shared["shared_ids"], shared["shared_mask"], shared["shared_positions"])
    return scores[shared["shared_row"][:, None], shared["shared_columns"]]


def answer_rewards(scorer: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Rewards of a batch of `training.utils.data.batches.collate_answers`: ``[S]``, fp32."""
    shared = batch if "shared_ids" in batch else None
    scores = token_scores(scorer, batch["input_ids"], batch["attention_mask"], shared)
    return last_token_scores(scores, batch["response_mask"])
