"""How a model is called: positions that count real tokens, adapters looked through, activations recomputed."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from training.utils.engine import sequence_parallel


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
        mask = tree_mask(attention_mask)
        if model.config._attn_implementation == "eager":  # which adds it to its scores
            mask = torch.zeros_like(mask, dtype=model.dtype).masked_fill(~mask, torch.finfo(model.dtype).min)
        return {"input_ids": input_ids, "attention_mask": mask, "position_ids": position_ids}
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    return inputs


def tree_mask(parts: torch.Tensor) -> torch.Tensor:
    """Which token sees which: ``[B, 1, T, T]`` bool, rows of the last two dimensions see columns.

    Args:
        parts: ``[B, T]``, 1 in the common beginning, which all that follow see, 2 and up in the answers, which see
            themselves too, 0 at padding. Every token sees itself, so that no softmax is empty.
    """
    seen, sees = parts[:, None, :], parts[:, :, None]
    causal = torch.ones(parts.shape[1], parts.shape[1], dtype=torch.bool, device=parts.device).tril()
    itself = torch.eye(parts.shape[1], dtype=torch.bool, device=parts.device)
    return ((causal & ((seen == 1) | (seen == sees) & (seen > 0))) | itself)[:, None]


def enable_gradient_checkpointing(model: Any) -> None:
    """Recompute activations in the backward pass; with LoRA inputs must carry a gradient to reach the adapters."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
