"""The loop of the `fast` backend: prompts in, one token per row and step, rows leave when they end.

What makes it faster than ``generate`` on the same model: equal prompts are computed once, and so is a beginning that
all prompts share (a chat template's system message); the other prompt tokens come in groups of similar length, so
that a short prompt is not padded to a long one; rows that have ended leave the batch; keys and values are written
into memory reserved once (`DecodeLayer`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from training.utils.generation.cache import DecodeLayer, decode_layers, keep_rows, last_logits, make_cache
from training.utils.generation.cuda_graphs import COLUMNS_ALIGNED, TOKENS_WORTH_A_GRAPH, Rows, decode_still
from training.utils.generation.rollouts import Responses, RolloutRequest
from training.utils.generation.sampling import SamplingConfig, next_tokens, row_keys
from training.utils.model.forward import without_adapters
from training.utils.run.distributed import agree, all_reduce_max
from training.utils.run.phases import beat

# A group of prompts of so many tokens keeps a device's matrix kernels busy; larger ones only bring more padding.
PREFILL_TOKENS = {"cpu": 256}
PREFILL_TOKENS_OF_ACCELERATORS = 8192  # a GPU takes them in about the time that it needs to read the weights once
# Responses that are decoded together: fewer leave a GPU waiting for the next launch most of the time.
ROWS_OF_ACCELERATORS = 64
# A shared beginning costs a forward of its own: it must save more than that.
SHORTEST_PREFIX = 8


def seconds_since(start: float, device: torch.device) -> float:
    """Seconds from ``start``, by `time.perf_counter`, until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def prefill_tokens(device: torch.device) -> int:
    """About how many tokens of prompts one forward takes on a device."""
    return PREFILL_TOKENS.get(device.type, PREFILL_TOKENS_OF_ACCELERATORS)


def _prompt_groups(lengths: list[int], tokens: int) -> list[list[int]]:
    """Rows by length, cut into groups of about ``tokens`` tokens: a short prompt is not padded to a long one."""
    groups: list[list[int]] = [[]]
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        if len(groups[-1]) * lengths[row] >= tokens:
            groups.append([])
        groups[-1].append(row)
    return groups


def _shared_prefix(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, int]:
    """Move the beginning that all prompts share to the left edge, where one copy of it can serve all rows.

    Args:
        ids, mask: [B, P] left-padded prompts; some row fills the width.

    Returns:
        ids and mask in which columns 0 to L - 1 hold the shared beginning and the padding comes after it, and L: 0
        if nothing worth sharing was found. Each row keeps a token after the beginning, as its logits are needed.
    """
    rows, width = ids.shape
    lengths = mask.sum(1)
    limit = int(lengths.min()) - 1
    columns = torch.arange(max(limit, 0), device=ids.device)
    starts = ids.gather(1, (width - lengths)[:, None] + columns)  # [B, limit], the prompts left-aligned
    differs = (starts != starts[:1]).any(0).nonzero()[:, 0]
    shared = int(differs[0]) if len(differs) else limit
    if shared < SHORTEST_PREFIX or (rows - 1) * shared < prefill_tokens(ids.device):
        return ids, mask, 0
    moved = ids.clone()
    moved[:, :shared] = starts[0, :shared]
    kept = torch.arange(width, device=ids.device) >= (width - lengths + shared)[:, None]
    kept[:, :shared] = True
    return moved, kept.to(mask.dtype), shared


def _prefill(
    model: Any, ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache, shared: int, one_forward: bool
) -> Tensor:
    """Run the prompts [B, P] through the model, equal prompts once, and return the last position's logits [B, V].

    ``shared`` columns at the left edge are the same in all rows (`_shared_prefix`).
    """
    layers = decode_layers(cache)
    if not layers:
        return last_logits(model, ids, mask, positions, cache)
    width, device = ids.shape[1], ids.device
    everyone = torch.arange(len(ids), device=device)

    def aim(column: int, past: int, target: Tensor, source: Tensor) -> None:
        """`DecodeLayer.aim` of every layer."""
        for layer in layers:
            layer.aim(column, past, target, source)

    if shared:
        aim(0, 0, everyone, torch.zeros_like(everyone))
        last_logits(model, ids[:1, :shared], mask[:1, :shared], positions[:1, :shared], cache)
    distinct, member = torch.unique(torch.stack([ids * mask, mask]), dim=1, return_inverse=True)
    first = torch.full((distinct.shape[1],), len(ids), device=device).scatter_reduce_(0, member, everyone, "amin")
    lengths = (distinct[1].sum(1) - shared).tolist()
    logits: Tensor | None = None
    for group in [list(range(len(lengths)))] if one_forward else _prompt_groups(lengths, prefill_tokens(device)):
        start = width - max(lengths[row] for row in group)
        place = torch.full((len(lengths),), -1, device=device)
        place[group] = torch.arange(len(group), device=device)
        target = (place[member] >= 0).nonzero()[:, 0]
        source = place[member[target]]
        aim(start, shared, target, source)
        rows = first[group]
        seen = torch.cat([mask[rows, :shared], mask[rows, start:]], dim=1)
        part = last_logits(model, ids[rows, start:], seen, positions[rows, start:], cache)
        if logits is None:
            logits = part.new_empty(len(ids), part.shape[1])
        logits[target] = part[source]
    for layer in layers:
        layer.one_token_each()
    assert logits is not None
    return logits


def _some_rank_goes_on(mine: bool, device: torch.device) -> bool:
    """Whether any rank still has a row to decode; a collective."""
    return all_reduce_max(torch.tensor(float(mine), device=device)).item() > 0


def keep_company(model: Any, device: torch.device) -> None:
    """Make forwards of a single token until every rank has ended: a forward gathers layers from all ranks."""
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    while _some_rank_goes_on(False, device):
        last_logits(model, token, token + 1, token, DynamicCache(config=without_adapters(model).config))


def _written_down(
    out: Responses, alive: Tensor, step: int, tokens: Tensor, logprobs: Tensor, stop_ids: Tensor
) -> list[bool]:
    """Put token number ``step`` of the rows ``alive`` into ``out``; which of them go on."""
    out.ids[alive, step] = tokens
    out.logprobs[alive, step] = logprobs
    going = ~torch.isin(tokens, stop_ids)
    out.lengths[alive] = torch.where(going, out.lengths[alive], step + 1)
    return going.tolist()  # here the host waits for the device, once per token


def _without_padding(mask: Tensor, seen: Tensor, layers: Sequence[DecodeLayer]) -> tuple[Tensor, Tensor]:
    """Mask and tokens [B, T] without the columns that only rows which have left were using; the cache likewise."""
    padding = int(mask.argmax(1).min())
    if not padding or not layers:
        return mask, seen
    for layer in layers:
        layer.drop_columns(padding)
    return mask[:, padding:], seen[:, padding:]


def decode(
    model: Any,
    request: RolloutRequest,
    sampling: SamplingConfig,
    out: Responses,
    *,
    transposed_keys: bool,
    synced: bool,
    still: bool = False,
) -> None:
    """Decode until every row has met a stop token or its limit, filling `out`.

    Args:
        model: a causal LM in eval mode.
        request, sampling: see `training.utils.generation.engines`; at least one row.
        out: filled in; at entry every length is the limit.
        transposed_keys: lay the key cache out for `decode_attention`.
        synced: every forward is a collective, prompts in one; `keep_company` then waits for the other ranks.
        still: from the second token on as `cuda_graphs` does it, where enough are to come.
    """
    start = time.perf_counter()
    width = int(request.prompt_mask.sum(1).max())
    seen, mask, shared = request.prompt_ids[:, -width:], request.prompt_mask[:, -width:].long(), 0
    device = mask.device
    still = still and sampling.max_new_tokens > TOKENS_WORTH_A_GRAPH
    new_columns = sampling.max_new_tokens + (COLUMNS_ALIGNED if still else 0)
    cache = make_cache(model, len(mask), width, new_columns, transposed_keys)
    layers = decode_layers(cache)
    if layers and not synced:
        seen, mask, shared = _shared_prefix(seen, mask)
    keys = row_keys(request.seed, request.iteration, request.row_ids.to(device))
    stop_ids = torch.tensor(request.stop_ids, device=device, dtype=torch.long)
    alive = torch.arange(len(mask), device=device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    if synced:
        _some_rank_goes_on(True, device)
    logits = _prefill(model, seen, mask, positions, cache, shared, one_forward=synced)
    out.prefill_seconds = seconds_since(start, device)
    for step in range(sampling.max_new_tokens):
        beat()
        tokens, logprobs = next_tokens(logits, keys, step, sampling, seen, mask)
        tokens, logprobs = agree(tokens), agree(logprobs)
        goes_on = _written_down(out, alive, step, tokens, logprobs, stop_ids)
        if step + 1 == sampling.max_new_tokens or not any(goes_on):
            return
        if not all(goes_on):
            kept = keep_rows(cache, goes_on, device)
            alive, keys, tokens, mask = alive[kept], keys[kept], tokens[kept], mask[kept]
            positions, seen = positions[kept], seen[kept]
            mask, seen = _without_padding(mask, seen, layers)
        if still:
            rows = Rows(alive, keys, tokens, positions[:, -1], mask)
            return decode_still(model, cache, rows, step + 1, sampling, stop_ids, out)
        positions = positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        if sampling.repetition_penalty != 1.0:
            seen = torch.cat([seen, tokens[:, None]], dim=1)
        if synced:
            _some_rank_goes_on(True, device)
        logits = last_logits(model, tokens[:, None], mask, positions, cache)
