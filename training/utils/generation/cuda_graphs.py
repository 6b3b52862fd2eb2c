"""Tokens by CUDA graphs: a whole step of decoding, sampling included, is started by one call of the host.

A step of a model of 24 layers is some 500 kernels, and starting them one by one takes a GPU's host several times as
long as the GPU computes. A graph holds the kernels of one step with their addresses and sizes, so everything that a
step reads and writes stays where it is: the cache's columns are all attended to, those that are empty under a mask,
and what changes from step to step (the column, the token's number, the last tokens, who is still going) lies in tensors
on the device, which the step itself moves on. https://docs.pytorch.org/docs/stable/notes/cuda.html, "CUDA Graphs".

A graph serves up to `TOKENS_OF_A_GRAPH` tokens of the rows it was made for. It lives no longer than the response, so
it never sees weights that have been replaced. Before a graph is made its step runs once without, as CUDA wants it; that
is a step like any other. TRIPOD_CUDA_GRAPHS=0 in the environment decodes without graphs. On a CPU the same steps run
without a graph, which serves the tests alone.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from training.utils.generation.cache import decode_layers, keep_rows, last_logits, make_cache
from training.utils.generation.decode_attention import within_rounding
from training.utils.generation.rollouts import Responses
from training.utils.generation.sampling import SamplingConfig, next_tokens
from training.utils.run.phases import beat

# A graph attends to all columns that it may fill, and making one costs about three steps without one.
TOKENS_OF_A_GRAPH = 256
# Fewer tokens than this are not worth a graph, nor is it worth one to leave ended rows behind for so few.
TOKENS_WORTH_A_GRAPH = 32
# Of so few rows the weights are what a step reads: a graph of fewer would be no faster.
FEW_ROWS = 8
# The host asks who is still going once in so many tokens: a question waits for the device, a token too many is idle.
LOOK_EVERY = 8
# Matrix kernels want rows of a mask to begin at multiples of so many numbers.
COLUMNS_ALIGNED = 8

SWITCH = "TRIPOD_CUDA_GRAPHS"


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
        return last_logits(self.model, self.ids, bias, self.positions, self.cache)

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
        self.positions += self.going[:, None]  # those of ended rows stay where the model has a position
        self.column += 1
        self.number += 1

    def run(self, count: int, step: Callable[[], None]) -> int:
        """Make the steps, by a graph on a GPU; ends early where too few rows are left. Returns how many were made."""
        beat()
        if self.seen.is_cuda and count > 1:
            step = self._captured(step)
        else:
            step()
        for made in range(1, count):
            if made % LOOK_EVERY == 0:
                beat()
                left, lines = int(self.going.sum()), len(self.going)
                few = lines > FEW_ROWS and left <= lines // 2 and count - made >= TOKENS_WORTH_A_GRAPH
                if not left or few:
                    return made
            step()
        return count

    def _captured(self, step: Callable[[], None]) -> Callable[[], None]:
        """Make one step, then a graph of it; returns what makes the next ones.

        Each graph has memory of its own: torch 2.11 fails where a pool is taken whose graphs are gone.
        """
        stream = _side_stream(self.seen.device)
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


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all captures of a process: matrix kernels keep a workspace for every stream that they were on."""
    return torch.cuda.Stream(device)


def decode_still(
    model: Any, cache: Cache, rows: Rows | None, first: int, sampling: SamplingConfig, stop_ids: Tensor, out: Responses
) -> None:
    """Decode from token number ``first`` on until every row has met a stop token or its limit, filling ``out``.

    Args:
        model: a causal LM for which `why_not` has no reason.
        cache: all in reserved memory, with `COLUMNS_ALIGNED` columns to spare, prompts in it.
        stop_ids: [S] on the device.
    """
    while rows is not None and first < sampling.max_new_tokens:
        remaining = sampling.max_new_tokens - first
        count = remaining if remaining < TOKENS_OF_A_GRAPH + TOKENS_WORTH_A_GRAPH else TOKENS_OF_A_GRAPH
        steps = _Steps(model, cache, rows, first, count)

        def step(steps: _Steps = steps) -> None:
            steps.once(sampling, stop_ids, out)

        try:
            made = steps.run(count, step)
        except RuntimeError as error:
            if stop_ids.is_cuda:
                error.add_note(
                    f"It happened while decoding by CUDA graphs; {SWITCH}=0 in the environment does without."
                )
            raise
        first += made
        rows = steps.rest(made)


_reasons: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def why_not(model: nn.Module) -> str:
    """Why a CUDA graph can not decode with this model: its kernels differ from token to token. Empty if it can.

    Found out once per model.
    """
    if model not in _reasons:
        _reasons[model] = _reason_of_its_family(model) or _reason_found(model)
    return _reasons[model]


def _reason_of_its_family(model: Any) -> str:
    """What its class and its configuration say against it: sizes that grow, questions to the device.

    transformers says of a family that it can be compiled whole, and what it lays down for that is what a graph needs.
    """
    config = model.config.get_text_config()
    rotary = str(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None))
    experts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    reasons = {
        "transformers does not compile it whole": not getattr(model, "_can_compile_fullgraph", False),
        "it takes no position_ids": "position_ids" not in inspect.signature(model.forward).parameters,
        "its positions are a bias made of a mask of tokens": bool(getattr(config, "alibi", False)),
        "its rotary embedding changes with the length": "dynamic" in rotary or "longrope" in rotary,
        "its experts take as many tokens as come": any(getattr(config, name, None) for name in experts),
        "its attention is neither sdpa nor eager": getattr(config, "_attn_implementation", "") not in ("sdpa", "eager"),
        "not all of its layers keep every token": not decode_layers(make_cache(model, 1, 1, 1, transposed_keys=False)),
        "its weights are quantised": not all(p.is_floating_point() for p in model.parameters()),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


@torch.no_grad()
def _reason_found(model: Any) -> str:
    """What a few tokens show: other logits than a plain forward's, or an operation that waits for the device.

    The prompts are padded on the left, and several tokens follow: a mask that is lost makes a difference, and so does
    a position that the host counts.
    """
    weight, prompt, tokens = next(model.parameters()), 4, 3
    ids = torch.arange(1, 2 * (prompt + tokens) + 1, device=weight.device).reshape(2, -1)
    ids = ids % model.config.get_text_config().vocab_size
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    positions, everyone = (mask.cumsum(1) - 1).clamp(min=0), torch.arange(2, device=weight.device)

    def plain(columns: slice, cache: Cache) -> Tensor:
        """Logits ``[2, V]`` behind these columns, by the model's usual forward."""
        return last_logits(model, ids[:, columns], mask[:, : columns.stop], positions[:, columns], cache).float()

    usual = DynamicCache(config=model.config)
    plain(slice(0, prompt), usual)
    expected = [plain(slice(column, column + 1), usual) for column in range(prompt, prompt + tokens)]

    cache = make_cache(model, 2, prompt, tokens + COLUMNS_ALIGNED, transposed_keys=False)
    for layer in decode_layers(cache):
        layer.aim(0, 0, everyone, everyone)
    plain(slice(0, prompt), cache)
    for layer in decode_layers(cache):
        layer.one_token_each()
    rows = Rows(everyone, everyone, ids[:, prompt], positions[:, prompt - 1], mask[:, :prompt])
    steps, found = _Steps(model, cache, rows, 0, tokens), []
    for number in range(tokens):
        steps.ids.copy_(ids[:, prompt + number, None])
        try:
            settled = number > 0 and weight.is_cuda  # a model may settle things at its first token
            with _no_waiting() if settled else contextlib.nullcontext():
                found.append(steps.logits().float())
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        steps.positions += 1
        steps.column += 1
    same = within_rounding(torch.stack(found), torch.stack(expected), weight.dtype)
    return "" if same else "its logits are others when a step stands still"


@contextlib.contextmanager
def _no_waiting() -> Iterator[None]:
    """Inside, what makes the host wait for a GPU is an error, as it would be in a capture."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode")  # is a prototype, torch says
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
