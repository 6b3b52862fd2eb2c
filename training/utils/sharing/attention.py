"""Attention of shared rows on a CPU, which costs what their tokens see and not the square of the row.

Of a row with many answers a token sees only the way back to the root. So the queries go in blocks of some tens of
tokens that stand behind one another, each with the keys on its way alone, several blocks in one batched product: the
blocks are those of flash attention (Dao et al. 2022, https://arxiv.org/abs/2205.14135), most of which are skipped.
torch's own kernel for a CPU takes the whole mask, and in bf16 its backward is several times slower than these products.

transformers calls it by its own attention interface, in the place of its sdpa function, which still answers whatever is
no shared row on a CPU (`shared_attention`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from training.utils.sharing.rows import tree_mask, ways_back

BLOCK = 64  # queries of a block at most
ALIKE = 64  # blocks that are looked at together, to find those of like size
CALL = 10_000  # scores of a head that take as long as the calls for a piece
PIECE = 1 << 18  # scores of one head that exist at once: with nine heads 9 MB in fp32
KEPT_KEYS = 128  # up to as many keys the weights are kept for the backward, else they are made again

BEYOND_MASK = ("position_bias", "softcap", "cache")  # a model that passes one of these gets transformers' own function


Block = tuple[range, list[int]]  # queries, and the keys on their way


class Piece(NamedTuple):
    """Blocks whose products are made at once; tokens are numbered over all rows, and one number more is no token.

    Attributes:
        queries: ``[N, C]``, of no token where a block is shorter.
        keys: ``[N, K]``, likewise: the way to the block's last query.
        bias: ``[N, 1, C, K]`` fp32, 0 where a query sees a key, else -inf.
    """

    queries: Tensor
    keys: Tensor
    bias: Tensor


class Blocks(NamedTuple):
    """The blocks of all rows.

    Attributes:
        pieces: of them, one after another.
        slots: ``[T]``, where each token is among the queries of all pieces; behind the last of them if in none.
    """

    pieces: list[Piece]
    slots: Tensor


_rows_of: Any = WeakTensorKeyDictionary()  # parts and blocks of each `block_mask`, while it is in use


def by_blocks(model: Any, device: torch.device) -> bool:
    """Whether a transformers model's shared rows can get a `block_mask`."""
    calls_interface = getattr(model, "_supports_attention_backend", False)
    return device.type == "cpu" and model.config._attn_implementation == "sdpa" and calls_interface


def block_mask(parts: Tensor) -> Tensor:
    """What a model gets as attention mask, ``[R, 1, W, W]``, so that `shared_attention` goes block by block.

    One number in the memory of one: the tensor itself says which rows it stands for.

    Args:
        parts: ``[R, W]``, see `tree_mask`.
    """
    pieces = list(_pieces(ways_back(parts), parts.numel()))
    asked = torch.cat([piece.queries.flatten() for piece in pieces])
    slots = torch.full((parts.numel() + 1,), len(asked))
    slots[asked] = torch.arange(len(asked))
    mask = torch.ones(1, dtype=torch.bool).expand(len(parts), 1, parts.shape[1], parts.shape[1])
    _rows_of[mask] = parts, Blocks(pieces, slots[:-1])
    return mask


def _pieces(ways: Sequence[Sequence[range]], tokens: int) -> Iterator[Piece]:
    """The blocks, those of like size together."""
    blocks = []
    for *before, own in ways:
        above = [token for run in before for token in run]
        size = -(-len(own) // -(-len(own) // BLOCK))
        blocks += [(own[at : at + size], [*above, *own[: at + size]]) for at in range(0, len(own), size)]
    blocks.sort(key=lambda block: len(block[0]) * len(block[1]))
    for at in range(0, len(blocks), ALIKE):
        for part in _cheapest_parts(blocks[at : at + ALIKE]):
            yield _piece(part, tokens)


def _cheapest_parts(blocks: Sequence[Block]) -> list[Sequence[Block]]:
    """Cut a row of blocks where that costs least: each part a call, and its scores with what they are filled up by."""
    best: list[tuple[float, int]] = [(0.0, 0)]  # of the blocks up to here: cost, where the last part begins
    for end in range(1, len(blocks) + 1):
        queries = keys = 0
        found = (math.inf, 0)
        for start in range(end - 1, -1, -1):
            queries, keys = max(queries, len(blocks[start][0])), max(keys, len(blocks[start][1]))
            scores = (end - start) * queries * keys
            if scores > PIECE and found[0] < math.inf:
                break
            found = min(found, (best[start][0] + CALL + scores, start))
        best.append(found)
    parts, end = [], len(blocks)
    while end:
        start = best[end][1]
        parts.append(blocks[start:end])
        end = start
    return parts


def _piece(blocks: Sequence[Block], blank: int) -> Piece:
    """Blocks of queries and keys, filled up with a token that is none."""
    most, longest = (max(map(len, column)) for column in zip(*blocks, strict=True))
    queries, keys = torch.full((len(blocks), most), blank), torch.full((len(blocks), longest), blank)
    for n, (asking, seen) in enumerate(blocks):
        queries[n, : len(asking)] = torch.arange(asking.start, asking.stop)
        keys[n, : len(seen)] = torch.tensor(seen)
    last = torch.tensor([[len(seen) - len(asking)] for asking, seen in blocks]) + torch.arange(most)
    hidden = torch.arange(longest) > last[:, None, :, None]
    return Piece(queries, keys, torch.zeros(hidden.shape).masked_fill(hidden, float("-inf")))


def shared_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of shared rows under a `block_mask`; anything else goes to transformers' sdpa function.

    Args:
        module: the attention module, for that function.
        query: ``[R, heads, W, D]``. key, value: ``[R, key-value heads, W, D]``.
        attention_mask: ``[R, 1, W, W]``.
        dropout: of the weights; with any that function answers.
        scaling: factor of the scores; None: 1 / sqrt(D).

    Returns:
        ``[R, W, heads, D]``, 0 for padding, and None in place of the weights, as the interface wants.
    """
    parts, blocks = (None, None) if attention_mask is None else _rows_of.get(attention_mask, (None, None))
    if blocks is None or dropout or any(kwargs.get(name) is not None for name in BEYOND_MASK):
        attention_mask = attention_mask if parts is None else tree_mask(parts)
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    of_token = [tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value)]  # [T, heads, D]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = _BlockAttention.apply(*of_token, blocks, scale)
    return out.unflatten(0, (query.shape[0], -1)), None


AttentionInterface.register("sdpa", shared_attention)


def _of_blocks(tensor: Tensor, tokens: Tensor, key_heads: int) -> Tensor:
    """``[T, heads, D]`` -> ``[N * KV, G * C, D]`` of tokens ``[N, C]``: the heads of a key stand behind one another."""
    found = pad(tensor.flatten(1), (0, 0, 0, 1)).index_select(0, tokens.flatten())
    grouped = found.view(*tokens.shape, key_heads, -1, tensor.shape[-1]).permute(0, 2, 3, 1, 4)
    return grouped.reshape(len(tokens) * key_heads, -1, tensor.shape[-1])


def _of_tokens(blocks: Tensor, tokens: Tensor, key_heads: int) -> Tensor:
    """Back from `_of_blocks`, one row for each of ``tokens``: ``[N * C, heads * D]``."""
    grouped = blocks.view(len(tokens), key_heads, -1, tokens.shape[1], blocks.shape[-1]).permute(0, 3, 1, 2, 4)
    return grouped.reshape(tokens.numel(), -1)


def _in_order(found: Sequence[Tensor], blocks: Blocks, like: Tensor) -> Tensor:
    """``[T, heads, D]`` of what `_of_tokens` gave of the queries of each piece."""
    nothing = found[0].new_zeros(1, found[0].shape[1])
    return torch.cat([*found, nothing]).index_select(0, blocks.slots).view(*like.shape[:2], -1)


def _weights(query: Tensor, key: Tensor, piece: Piece, scale: float) -> Tensor:
    """What each query takes of each key: ``[N * KV, G * C, K]``; scores and softmax in fp32."""
    scores = torch.bmm(query.float(), (key.float() * scale).transpose(1, 2))
    of_heads = scores.view(len(piece.queries), -1, piece.queries.shape[1], scores.shape[-1])
    return of_heads.add_(piece.bias).softmax(-1).view_as(scores).to(query.dtype)


class _BlockAttention(torch.autograd.Function):
    """Grouped-query attention piece by piece, forward and backward."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scale: float) -> Tensor:
        """Query, key and value ``[T, heads, D]``, the last two with as many heads as they have -> as the query."""
        heads, found, kept = key.shape[1], [], []
        for piece in blocks.pieces:
            keys, values = (_of_blocks(tensor, piece.keys, heads) for tensor in (key, value))
            weights = _weights(_of_blocks(query, piece.queries, heads), keys, piece, scale)
            found.append(_of_tokens(torch.bmm(weights, values), piece.queries, heads))
            kept.append(weights if piece.keys.shape[1] <= KEPT_KEYS else None)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.blocks, ctx.scale = blocks, scale
        return _in_order(found, blocks, query)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """Gradients of query, key and value; those of a key are summed in fp32."""
        query, key, value, *kept = ctx.saved_tensors
        heads, of_query = key.shape[1], []
        of_key, of_value = (
            tensor.new_zeros(len(tensor) + 1, tensor[0].numel(), dtype=torch.float32) for tensor in (key, value)
        )
        for piece, weights in zip(ctx.blocks.pieces, kept, strict=True):
            queries, out = (_of_blocks(tensor, piece.queries, heads) for tensor in (query, grads[0]))
            keys, values = (_of_blocks(tensor, piece.keys, heads) for tensor in (key, value))
            if weights is None:
                weights = _weights(queries, keys, piece, ctx.scale)
            of_weights = torch.bmm(out, values.transpose(1, 2))
            of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            for total, by, asking in ((of_value, weights, out), (of_key, of_scores, queries)):
                said = _of_tokens(torch.bmm(by.transpose(1, 2), asking), piece.keys, heads)
                total.index_add_(0, piece.keys.flatten(), said.float())
            of_query.append(_of_tokens(torch.bmm(of_scores, keys), piece.queries, heads))
        of_key *= ctx.scale
        summed = (total[:-1].view_as(tensor).to(tensor.dtype) for total, tensor in ((of_key, key), (of_value, value)))
        return _in_order(of_query, ctx.blocks, query).mul_(ctx.scale), *summed, None, None
