"""Attention and key-value cache for decoding one token at a time.

While a batch decodes, each step has a single query per row. Two things then cost more than they should: the cache of
transformers grows by concatenation, which copies all of it at every step, and the general attention
kernels are made for many queries. Here the cache is written in place into memory reserved once (`DecodeLayer`), and a
single query is answered by two batched matrix products over the key-value heads, keys not expanded, stored as
[head_dim, length] so that both products read memory in order (`decode_attention`).

The function is registered through transformers' own attention interface. `decode_attention_enabled` selects it for
one module tree and puts everything back: the configuration that selects it is a copy, so a training module
which shares the original configuration object never sees it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

DECODE_ATTENTION = "tripod_decode"

# What transformers' sdpa function acts on beyond the mask; a model that passes one of these gets that function.
_BEYOND_MASK = ("position_bias", "softcap", "cache")


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
    if query.shape[2] != 1 or dropout or any(kwargs.get(name) is not None for name in _BEYOND_MASK):
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
    weight = next(model.parameters())
    if weight.device.type != "cpu" or getattr(model.config, "_attn_implementation", None) != "sdpa":
        yield False
        return
    if model not in _serves:
        _serves[model] = _gives_the_same(model)
    if not _serves[model]:
        yield False
        return
    with _named(model):
        yield True


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
    takes = inspect.signature(model.forward).parameters

    @torch.no_grad()
    def logits() -> Tensor:
        """``[2, 2, V]``: of the prompts' last token and of the token after it."""
        cache, found = DynamicCache(config=model.config), []
        for columns in (slice(0, 4), slice(4, 5)):
            seen = mask[:, : columns.stop]
            more = {"position_ids": (seen.cumsum(1) - 1).clamp(min=0)[:, columns]} if "position_ids" in takes else {}
            out = model(ids[:, columns], attention_mask=seen, past_key_values=cache, use_cache=True, **more)
            found.append(out.logits[:, -1].float())
        return torch.stack(found)

    with _named(model):
        other = logits()
    plain = logits()
    rounding = 1e-4 if plain.dtype == next(model.parameters()).dtype else 0.05  # of 16 bit
    return bool((other - plain).abs().max() <= rounding * plain.abs().max().clamp(min=1.0))


class DecodeLayer(DynamicLayer):
    """One layer's keys and values, in memory reserved for all rows and the longest response.

    Prompts come first, a group of them per forward (`aim` says where their states go), all ending in the same column,
    so that every row's next token falls into the same column. From then on each forward adds one column to all rows.
    Rows that leave are overwritten by rows from the end; columns that only they used are dropped from the front.
    """

    def __init__(self, rows: int, prompt_columns: int, capacity: int, transposed_keys: bool) -> None:
        super().__init__()
        self.rows, self.start, self.end, self.capacity = rows, 0, prompt_columns, capacity
        self.transposed_keys = transposed_keys
        self.column = self.past = 0
        self.target: Tensor | None = None
        self.source: Tensor | None = None

    def aim(self, column: int, past: int, target: Tensor, source: Tensor) -> None:
        """The next forward holds prompts: row source[i] is for row target[i].

        Args:
            column: where its first token goes. past: columns 0 to past - 1, the same in all rows, are attended to too.
            target, source: [N] int64.
        """
        self.column, self.past, self.target, self.source = column, past, target, source

    def one_token_each(self) -> None:
        """The prompts are in: from now on a forward holds one token for every row."""
        self.target = self.source = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Reserve the memory; zeros, because padding is read (with weight 0) and 0 x NaN is NaN."""
        heads, value_width = key_states.shape[1], value_states.shape[-1]
        shape = (key_states.shape[-1], self.capacity) if self.transposed_keys else (self.capacity, key_states.shape[-1])
        self._keys = key_states.new_zeros(self.rows, heads, *shape)
        self._values = value_states.new_zeros(self.rows, heads, self.capacity, value_width)
        self.is_initialized = True

    def _view(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values [rows, heads, end - start, D] of those columns, without a copy."""
        keys = self._keys.transpose(2, 3) if self.transposed_keys else self._keys
        return keys[: self.rows, :, start:end], self._values[: self.rows, :, start:end]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new states [B, heads, T, D]; return what this forward attends to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.target is not None:
            return self._store_prompts(key_states, value_states)
        self.end += 1
        keys, values = self._view(self.end - 1, self.end)
        keys.copy_(key_states)
        values.copy_(value_states)
        self.keys, self.values = self._view(self.start, self.end)
        return self.keys, self.values

    def _store_prompts(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self._view(self.column, self.column + key_states.shape[2])
        keys[self.target], values[self.target] = key_states[self.source], value_states[self.source]
        if not self.past:
            return key_states, value_states
        old_keys, old_values = (states[:1].expand(len(key_states), -1, -1, -1) for states in self._view(0, self.past))
        return torch.cat([old_keys, key_states], dim=2), torch.cat([old_values, value_states], dim=2)

    def get_seq_length(self) -> int:
        """Columns that the next forward finds stored."""
        return self.past if self.target is not None else self.end - self.start

    def keep(self, rows: int, target: Tensor, source: Tensor) -> None:
        """Keep this many rows: row source[i] takes the place of row target[i], the others stay where they are."""
        keys, values = self._view(self.start, self.end)
        if len(target):
            keys[target], values[target] = keys[source], values[source]
        self.rows = rows

    def drop_columns(self, count: int) -> None:
        """Forget the first `count` columns, which are padding in every row that is left."""
        self.start += count
