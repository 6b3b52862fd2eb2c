"""Attention on a CPU for decoding one token at a time.

While a batch decodes, each step has a single query per row, and the general attention kernels are made for many. Here
a single query is answered by two batched matrix products over the key-value heads, keys not expanded, stored as
[head_dim, length] so that both products read memory in order (`decode_attention`; the cache: `cache.py`).

The function is registered through transformers' own attention interface. `decode_attention_enabled` selects it for
one module tree and puts everything back: the configuration that selects it is a copy, so a training module
which shares the original configuration object never sees it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from training.utils.generation.cache import last_logits
from training.utils.sharing.attention import BEYOND_MASK

DECODE_ATTENTION = "tripod_decode"


def decode_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Grouped-query attention of one query per row; anything else goes to transformers' sdpa function.

    Args:
        module: the attention module (unused beyond the fallback; the interface passes it).
        query: [B, heads, 1, D]. key, value: [B, key-value heads, T, D].
        attention_mask: [B or 1, heads or 1, 1, T] fp32, added to the scores (made by `decode_mask`), or None.
        scaling: factor of the scores; None: 1 / sqrt(D).

    Returns:
        [B, 1, heads, D] and None in place of the attention weights, as the interface wants.
    """
    if query.shape[2] != 1 or dropout or any(kwargs.get(name) is not None for name in BEYOND_MASK):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    rows, heads, _, width = query.shape
    key_heads, length = key.shape[1], key.shape[2]
    groups = heads // key_heads
    scale = width**-0.5 if scaling is None else scaling
    grouped = query.reshape(rows * key_heads, groups, width)
    scores = torch.bmm(grouped, key.transpose(2, 3).flatten(0, 1)).view(rows, key_heads, groups, length)
    if attention_mask is None:
        scores = scores.float().mul_(scale)
    else:
        if attention_mask.shape[1] != 1:
            attention_mask = attention_mask.view(-1, key_heads, groups, length)
        scores = torch.add(attention_mask, scores, alpha=scale)  # fp32, whatever the type of the products
    weights = scores.softmax(-1).to(value.dtype).flatten(0, 1)
    mixed = torch.bmm(weights, value.flatten(0, 1))
    return mixed.view(rows, 1, heads, value.shape[-1]), None


def decode_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """transformers' sdpa mask; for a single query an fp32 bias, made once per step instead of once per layer."""
    mask = sdpa_mask(*args, **kwargs)
    if mask is None or mask.dtype != torch.bool or mask.shape[-2] != 1:
        return mask
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, torch.finfo(torch.float32).min)


AttentionInterface.register(DECODE_ATTENTION, decode_attention)
AttentionMaskInterface.register(DECODE_ATTENTION, decode_mask)


@contextmanager
def decode_attention_enabled(model: nn.Module) -> Iterator[bool]:
    """Answer single queries of this module tree with `decode_attention` while the context is open.

    Only where the model runs on the CPU with transformers' ``sdpa``: on accelerators sdpa's own kernels are at
    home, and ``eager`` or ``flash_attention`` was somebody's choice. And only where a small forward gives the same
    logits either way: a family that compares the attention's name itself (Falcon) would lose its masks.

    Yields:
        whether it is on.
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    fits = on_cpu and getattr(model.config, "_attn_implementation", None) == "sdpa"
    if fits and model not in _serves:
        _serves[model] = _gives_the_same(model)
    serves = fits and _serves[model]
    with _named(model) if serves else nullcontext():
        yield serves


_serves: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@contextmanager
def _named(model: nn.Module) -> Iterator[None]:
    """Inside, configurations that say ``sdpa`` are copies that say `DECODE_ATTENTION`."""
    copies: dict[int, Any] = {}
    changed: list[tuple[nn.Module, Any]] = []
    for module in model.modules():
        config = module.__dict__.get("config")
        if getattr(config, "_attn_implementation", None) == "sdpa":
            if id(config) not in copies:
                copies[id(config)] = copy.deepcopy(config)
                copies[id(config)]._attn_implementation = DECODE_ATTENTION
            changed.append((module, config))
            module.config = copies[id(config)]
    try:
        yield
    finally:
        for module, config in changed:
            module.config = config


def _gives_the_same(model: Any) -> bool:
    """Whether the model's logits of a prompt and of a token after it are the same under the other name.

    The prompts are padded on the left, so that a mask which is lost makes a difference.
    """
    ids = torch.arange(1, 11).reshape(2, 5) % model.config.get_text_config().vocab_size
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    @torch.no_grad()
    def logits() -> Tensor:
        """``[2, 2, V]``: of the prompts' last token and of the token after it."""
        cache, found = DynamicCache(config=model.config), []
        for columns in (slice(0, 4), slice(4, 5)):
            part = last_logits(model, ids[:, columns], mask[:, : columns.stop], positions[:, columns], cache)
            found.append(part.float())
        return torch.stack(found)

    with _named(model):
        other = logits()
    plain = logits()
    return within_rounding(other, plain, next(model.parameters()).dtype)


def within_rounding(other: Tensor, plain: Tensor, dtype: torch.dtype) -> bool:
    """Whether two fp32 logits of a small forward in ``dtype`` differ no more than its sums in another order may."""
    rounding = 1e-4 if dtype == torch.float32 else 0.05
    return bool((other - plain).abs().max() <= rounding * plain.abs().max().clamp(min=1.0))
