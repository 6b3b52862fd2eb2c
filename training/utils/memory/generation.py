"""Whether a whole model fits beside everything else: the decision between the twin and the hooked engine at ZeRO-3."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from training.utils.engine import four_bit
from training.utils.memory.plan import available_memory, host_memory
from training.utils.model.forward import without_adapters
from training.utils.model.lora import adapted_parameter, is_lora, lora_layers
from training.utils.run.distributed import all_reduce_max, data_size

# The estimate leaves out what an allocator wastes and what kernels need for themselves.
FREE_SHARE = 0.9


def _bytes(parameter: nn.Parameter) -> int:
    """Bytes of the whole parameter, also where ZeRO-3 holds only a part of it."""
    return int(getattr(parameter, "ds_numel", parameter.numel())) * parameter.element_size()


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters of a model, whole also where ZeRO-3 shards them."""
    return sum(map(_bytes, model.parameters()))


def key_heads(config: Any) -> int:
    """Heads of a causal LM that have keys and values of their own; 0 for a family without attention."""
    text = config.get_text_config()
    return int(getattr(text, "num_key_value_heads", 0) or getattr(text, "num_attention_heads", 0))


def cache_share(size: int, ranks: int, config: Any) -> int:
    """What one of ``ranks`` that share a model holds of ``size`` bytes of keys and values: those of its heads."""
    return size // max(1, min(ranks, key_heads(config)))


def cache_bytes(config: Any, tokens: int, item: int) -> int:
    """Bytes of keys and values of so many tokens in all layers of a causal LM, ``item`` bytes a number.

    It is 0 for a family without attention, whose state is small.
    """
    text = config.get_text_config()
    if not getattr(text, "num_attention_heads", 0):
        return 0
    head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * tokens * int(text.num_hidden_layers * key_heads(config) * head_width) * item


def saved_bytes(model: nn.Module) -> int:
    """Bytes of the model once it is saved and loaded again, with a base in 4 bits made whole."""
    packed = [parameter for parameter in model.parameters() if four_bit.is_packed(parameter)]
    return weight_bytes(model) + sum(four_bit.unpacked_bytes(p) - _bytes(p) for p in packed)


def shards_on_their_way(model: nn.Module) -> int:
    """Copies on the accelerator of this rank's shards that are kept in host memory, which a gather by several makes."""
    shards = [parameter.ds_tensor for parameter in model.parameters() if hasattr(parameter, "ds_tensor")]
    away = [shard for shard in shards if shard.device.type != get_accelerator().device_name()]
    return sum(shard.nbytes for shard in away) if data_size() > 1 else 0


def decoding_bytes(model: nn.Module, *, rows: int, length: int) -> int:
    """Bytes of the cache and the logits of a rollout, see `generation_bytes`."""
    config: Any = without_adapters(model).config.get_text_config()
    logits = 2 * rows * config.vocab_size * torch.float32.itemsize
    return cache_bytes(config, rows * length, next(model.parameters()).element_size()) + logits


def generation_bytes(model: nn.Module, *, rows: int, length: int, packed: bool, merged: bool) -> int:
    """Memory that a rollout needs on each rank, in bytes: gathered weights, their copies, then cache and logits.

    Args:
        model: the twin; its parameters may be sharded.
        rows: decoded together. length: longest prompt plus response, in tokens.
        packed: linear weights are copied in another layout (`packed_linear`).
        merged: adapted weights are copied to be written back (`training.utils.model.lora.adapters_merged`).
    """
    weights = weight_bytes(model)
    copies = weights if packed else 0
    if merged and is_lora(model):
        copies += sum(_bytes(adapted_parameter(layer)) for layer in lora_layers(model).values())
    return weights + copies + max(decoding_bytes(model, rows=rows, length=length), shards_on_their_way(model))


def free_bytes() -> int:
    """Memory that this rank may take on its device, in bytes; ranks on one host share the host's memory."""
    get_accelerator().empty_cache()
    return available_memory()


def fits(needed: int, device: torch.device, *, on_host: int = 0) -> bool:
    """Whether every rank has `needed` bytes free; a collective, so that all ranks decide alike.

    Args:
        on_host: bytes that it needs in the host's memory beside an accelerator.
    """
    is_short = needed > FREE_SHARE * free_bytes() or on_host > FREE_SHARE * host_memory()
    short = torch.tensor(float(is_short), device=device)
    return all_reduce_max(short).item() == 0
