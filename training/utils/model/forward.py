"""How a model is called: positions that count real tokens, adapters looked through, activations recomputed."""

from __future__ import annotations

import inspect
from typing import Any

import torch


def without_adapters(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper, its adapter layers in place; any other model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def forward_inputs(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Keyword arguments of a forward in which positions count real tokens only, so padding moves nothing.

    Args:
        model: the module whose ``forward`` will be called; families that place positions from the mask
            themselves (BLOOM) take no ``position_ids``.
        input_ids, attention_mask: ``[B, T]``.
    """
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    return inputs


def enable_gradient_checkpointing(model: Any) -> None:
    """Recompute activations in the backward pass; with LoRA inputs must carry a gradient to reach the adapters."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
