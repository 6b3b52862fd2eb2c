"""Tokens by CUDA graphs: a whole step of decoding, sampling included, is started by one call of the host.

A step of a model of 24 layers is some 500 kernels, and starting them one by one takes a GPU's host several times as
long as the GPU computes. A graph holds the kernels of one step with their addresses and sizes, so everything that a
step reads and writes stays where it is: the cache's columns are all attended to, those that are empty under a mask,
and what changes from step to step (the column, the token's number, the last tokens, who is still going) lies in tensors
on the device, which the step itself moves on. https://docs.pytorch.org/docs/stable/notes/cuda.html, "CUDA Graphs".

A graph serves up to `TOKENS_OF_A_GRAPH` tokens of the rows it was made for. It lives no longer than the response, so
it never sees weights that have been replaced. Before a graph is made its step runs once without, as CUDA wants it; that
is a step like any other. On a CPU the same steps run without a graph, which serves the tests alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache

from training.utils.generation.cache import decode_layers, keep_rows, make_cache
from training.utils.generation.decode_attention import within_rounding
from training.utils.generation.sampling import SamplingConfig, next_tokens
from training.utils.run.watchdog import beat

# A graph attends to all columns that it may fill, and making one costs about three steps without one.
TOKENS_OF_A_GRAPH = 256
# Fewer tokens than this are not worth a graph, nor is it worth one to leave ended rows behind for so few.
TOKENS_WORTH_A_GRAPH = 32
# The host asks who is still going once in so many tokens: a question waits for the device, a token too many is idle.
LOOK_EVERY = 8
# Matrix kernels want rows of a mask to begin at multiples of so many numbers.
COLUMNS_ALIGNED = 8


@dataclass
class Rows:
    """What the rows that go on carry from token to token; R rows, T columns so far.

    places: [R] int64, their rows in what is filled in. keys: [R] of `sampling.row_keys`. tokens: [R] the last one.
    positions: [R] that of the last token. mask: [R, T], 0 on padding; the last token is not in it.
    """

    places: Tensor
    keys: Tensor
    tokens: Tensor
    positions: Tensor
    mask: Tensor


@dataclass
class Responses:
    """What decoding fills in, rows in the request's order: ids and logprobs [B, max_new_tokens], lengths [B].

    prefill_seconds: until the prompts were computed.
    """

    ids: Tensor
    logprobs: Tensor
    lengths: Tensor
    prefill_seconds: float = 0.0


class _Steps:
    """Up to ``count`` steps of the same rows."""

    def __init__(self, model: Any, cache: Cache, rows: Rows, number: int, count: int) -> None:
        device, width = rows.mask.device, rows.mask.shape[1]
        self.model, self.cache = model, cache
        columns = -(-(width + count) // COLUMNS_ALIGNED) * COLUMNS_ALIGNED
        self.places, self.keys = rows.places, rows.keys
        self.ids, self.positions = rows.tokens[:, None].clone(), rows.positions[:, None] + 1
        self.seen = torch.zeros(len(rows.mask), columns, dtype=torch.bool, device=device)
        self.seen[:, :width] = rows.mask.bool()
        self.column = torch.tensor([width], device=device)
        self.number = torch.tensor(number, device=device)
        self.going = torch.ones(len(rows.mask), dtype=torch.bool, device=device)
        self.width, self.dtype = width, next(model.parameters()).dtype
        for layer in decode_layers(cache):
            layer.hold_still(self.column, columns)

    def logits(self) -> Tensor:
        """[R, V] after the last tokens, which are written into the cache."""
        self.seen.index_fill_(1, self.column, True)
        bias = torch.zeros(self.seen.shape, dtype=self.dtype, device=self.seen.device)
        bias = bias.masked_fill_(~self.seen, torch.finfo(self.dtype).min)[:, None, None]
        inputs: dict[str, Any] = {"input_ids": self.ids, "attention_mask": bias, "position_ids": self.positions}
        if "logits_to_keep" in inspect.signature(type(self.model).forward).parameters:
            inputs["logits_to_keep"] = 1
        return self.model(**inputs, past_key_values=self.cache, use_cache=True).logits[:, -1]

    def once(self, sampling: SamplingConfig, stop_ids: Tensor, out: Responses) -> None:
        """A token for every row that is still going, and all that the next step needs."""
        tokens, logprobs = next_tokens(self.logits(), self.keys, self.number, sampling, self.ids, self.ids)
        at = (self.places, self.number.expand_as(self.places))
        out.ids[at] = torch.where(self.going, tokens, out.ids[at])
        out.logprobs[at] = torch.where(self.going, logprobs, out.logprobs[at])
        ends = self.going & (tokens[:, None] == stop_ids).any(1)
        out.lengths[self.places] = torch.where(ends, self.number + 1, out.lengths[self.places])
        self.going &= ~ends
        self.ids.copy_(tokens[:, None])
        for moved in (self.positions, self.column, self.number):
            moved += 1

    def run(self, count: int, step: Callable[[], None]) -> int:
        """Make the steps, by a graph on a GPU; ends early where too few rows are left. Returns how many were made."""
        beat()
        if self.seen.is_cuda:
            step = self._captured(step) if count > 1 else step
        else:
            step()
        for made in range(1, count):
            if made % LOOK_EVERY == 0:
                beat()
                left = int(self.going.sum())
                if not left or (left <= len(self.going) // 2 and count - made >= TOKENS_WORTH_A_GRAPH):
                    return made
            step()
        return count

    def _captured(self, step: Callable[[], None]) -> Callable[[], None]:
        """Make one step, then a graph of it; returns what makes the next ones.

        Each graph has memory of its own: torch 2.11 fails where a pool is taken whose graphs are gone.
        """
        stream = torch.cuda.Stream(self.seen.device)
        stream.wait_stream(torch.cuda.current_stream(self.seen.device))
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream(self.seen.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):  # NCCL has threads
            step()
        return graph.replay

    def rest(self, made: int) -> Rows | None:
        """The rows that go on after so many steps, the others out of the cache; None if there are none."""
        for layer in decode_layers(self.cache):
            layer.move_on(made)
        going = self.going.tolist()
        if not any(going):
            return None
        mask, device = self.seen[:, : self.width + made], self.seen.device
        state = (self.places, self.keys, self.ids[:, 0], self.positions[:, 0] - 1, mask)
        kept = torch.arange(len(going), device=device) if all(going) else keep_rows(self.cache, going, device)
        return Rows(*(tensor[kept] for tensor in state))


def decode_still(
    model: Any, cache: Cache, rows: Rows | None, first: int, sampling: SamplingConfig, stop_ids: Tensor, out: Responses
) -> None:
    """Decode from token number ``first`` on until every row has met a stop token or its limit, filling ``out``.

    Args:
        model: a causal LM for which `stands_still` holds.
        cache: all in reserved memory, with `COLUMNS_ALIGNED` columns to spare, prompts in it.
        stop_ids: [S] on the device.
    """
    while rows is not None and first < sampling.max_new_tokens:
        count = min(TOKENS_OF_A_GRAPH, sampling.max_new_tokens - first)
        steps = _Steps(model, cache, rows, first, count)

        def step(steps: _Steps = steps) -> None:
            steps.once(sampling, stop_ids, out)

        made = steps.run(count, step)
        first += made
        rows = steps.rest(made)


_still: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def stands_still(model: Any) -> bool:
    """Whether a step of a model is the same kernels for every token: no sizes that grow, no questions to the device.

    transformers says of a family that it can be compiled whole, and what it lays down for that is what a graph needs.
    Not with 4-bit weights, nor rotary embeddings that change with the length. A small forward is compared once.
    """
    takes = inspect.signature(model.forward).parameters
    rotary = str(getattr(model.config, "rope_parameters", None) or getattr(model.config, "rope_scaling", None))
    fits = (
        getattr(model, "_can_compile_fullgraph", False)
        and "position_ids" in takes
        and getattr(model.config, "_attn_implementation", None) in ("sdpa", "eager")
        and not any(kind in rotary for kind in ("dynamic", "longrope"))
        and all(parameter.is_floating_point() for parameter in model.parameters())
    )
    if fits and model not in _still:
        _still[model] = _gives_the_same(model)
    return bool(fits) and _still[model]


@torch.no_grad()
def _gives_the_same(model: Any) -> bool:
    """Whether the logits of a token after a prompt, padded on the left, are those of a plain forward."""
    weight = next(model.parameters())
    ids = (torch.arange(1, 11).reshape(2, 5) % model.config.get_text_config().vocab_size).to(weight.device)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    positions, everyone = (mask.cumsum(1) - 1).clamp(min=0), torch.arange(2, device=weight.device)

    def forward(columns: slice, cache: Cache) -> Tensor:
        inputs = {"input_ids": ids[:, columns], "attention_mask": mask[:, : columns.stop]}
        return model(**inputs, position_ids=positions[:, columns], past_key_values=cache, use_cache=True).logits[:, -1]

    def after_the_prompt() -> Cache:
        cache = make_cache(model, 2, 4, 1 + COLUMNS_ALIGNED, transposed_keys=False)
        for layer in decode_layers(cache):
            layer.aim(0, 0, everyone, everyone)
        forward(slice(0, 4), cache)
        for layer in decode_layers(cache):
            layer.one_token_each()
        return cache

    cache = after_the_prompt()
    if not decode_layers(cache):
        return False
    rows = Rows(everyone, everyone, ids[:, 4], positions[:, 3], mask[:, :4])
    other = _Steps(model, cache, rows, 0, 1).logits()
    return within_rounding(other.float(), forward(slice(4, 5), after_the_prompt()).float(), weight.dtype)
