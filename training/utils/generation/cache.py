"""The key-value cache of the `fast` backend: memory reserved once, rows that leave it, columns that are dropped.

transformers' own cache grows by concatenation, which copies all of it at every token.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from training.utils.model.forward import without_adapters


@functools.cache
def accepted_inputs(model_class: Any) -> frozenset[str]:
    """The names of the arguments that the forward of a model's class takes."""
    return frozenset(inspect.signature(model_class.forward).parameters)


def last_logits(model: Any, ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache) -> Tensor:
    """Logits [B, V] of the last position of ids [B, T], given all columns' mask and these tokens' positions."""
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache, "use_cache": True}
    model_class: Any = type(without_adapters(model))
    accepted = accepted_inputs(model_class)
    if "position_ids" in accepted:  # BLOOM has none: its bias by distance is computed from the mask
        inputs["position_ids"] = positions
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = 1
    return model(**inputs).logits[:, -1]


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
        self.place: Tensor | None = None  # where the next token goes, on the device: see `hold_still`
        self.columns = 0

    def aim(self, column: int, past: int, target: Tensor, source: Tensor) -> None:
        """Prepare for a forward of prompts, whose row source[i] goes into row target[i] of the cache.

        Args:
            column: where its first token goes. past: columns 0 to past - 1, the same in all rows, are attended to too.
            target, source: [N] int64.
        """
        self.column, self.past, self.target, self.source = column, past, target, source

    def one_token_each(self) -> None:
        """The prompts are in: from now on a forward holds one token for every row."""
        self.target = self.source = None

    def hold_still(self, place: Tensor, columns: int) -> None:
        """From now on all forwards work on tensors of the same size at the same address, as a CUDA graph needs it.

        Args:
            place: [1] int64 on the device, the column that a token is written to, from the first one that is in use.
            columns: how many are attended to, filled or not.
        """
        self.place, self.columns = place, columns

    def move_on(self, steps: int) -> None:
        """Go on after `hold_still`, when each row has got ``steps`` tokens: each forward adds a column again."""
        self.place = None
        self.end += steps

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
        if self.place is not None:
            self.keys, self.values = self._view(self.start, self.start + self.columns)
            self.keys.index_copy_(2, self.place, key_states)
            self.values.index_copy_(2, self.place, value_states)
            return self.keys, self.values
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


def make_cache(model: Any, rows: int, prompt_columns: int, new_columns: int, transposed_keys: bool) -> Cache:
    """A cache in reserved memory; transformers' own where some layer is not plain attention (sliding window, say)."""
    cache = DynamicCache(config=without_adapters(model).config)
    if not cache.layers or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return cache
    capacity = prompt_columns + new_columns
    return Cache(layers=[DecodeLayer(rows, prompt_columns, capacity, transposed_keys) for _ in cache.layers])


def decode_layers(cache: Cache) -> list[DecodeLayer]:
    """All layers of a cache of the `fast` backend that are in reserved memory: every one or none."""
    return [layer for layer in cache.layers if isinstance(layer, DecodeLayer)]


def survivors(going: list[bool]) -> tuple[list[int], list[int], list[int]]:
    """The rows that go on, so ordered that as few as possible change place: the last ones fill the holes.

    Returns:
        the old place of each row that goes on, in the new order; the new places of those that move; their old places.
    """
    kept = [row for row, goes_on in enumerate(going) if goes_on]
    holes = [row for row in range(len(kept)) if not going[row]]
    movers = [row for row in kept if row >= len(kept)]
    order = list(range(len(kept)))
    for hole, mover in zip(holes, movers, strict=True):
        order[hole] = mover
    return order, holes, movers


def keep_rows(cache: Cache, going: list[bool], device: torch.device) -> Tensor:
    """Let the rows that have ended leave the cache; returns the old places of those that are left, in their order."""
    order, holes, movers = survivors(going)
    layers = decode_layers(cache)
    kept, target, source = (torch.tensor(rows, device=device) for rows in (order, holes, movers))
    for layer in layers:
        layer.keep(len(order), target, source)
    if not layers:
        cache.batch_select_indices(kept)
    return kept
