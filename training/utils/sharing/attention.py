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
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
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
        none: the places in ``queries`` that are of no token.
    """

    queries: Tensor
    keys: Tensor
    bias: Tensor
    none: tuple[Tensor, ...]


@dataclass
class Blocks:
    """The blocks of all rows, ``[R, W]``.

    Attributes:
        pieces: of them, one after another.
        rows, width: R and W.
    """

    pieces: list[Piece]
    rows: int
    width: int
    _places: dict[Any, Tensor] = field(default_factory=dict)

    def places(self, tokens: Tensor, heads: int, by_head: bool) -> Tensor:
        """Indices of the tokens' vectors, head by head, in a tensor of all rows; computed once for all layers.

        Args:
            tokens: ``[N, C]``, a piece's; in the place of no token comes the last one's vector.
            heads: of the tensor.
            by_head: it lies as ``[R, heads, W, D]``, else as ``[R, W, heads, D]``.

        Returns:
            ``[N * heads * C]``.
        """
        key = (id(tokens), heads, by_head)  # the pieces live as long as this
        if (found := self._places.get(key)) is None:
            asked = tokens.clamp(max=self.rows * self.width - 1)
            first, step = asked * heads, 1
            if by_head:
                first, step = asked // self.width * (heads - 1) * self.width + asked, self.width
            found = (first[:, None] + torch.arange(heads)[:, None] * step).flatten()
            self._places[key] = found
        return found

    def slots(self, heads: int) -> Tensor:
        """For each token and head the index of its result in the pieces' joined results, ``[R * W * heads]``.

        A token that is in no piece gets the index behind the last result.
        """
        if (found := self._places.get(heads)) is None:
            table, begin = torch.empty(self.rows * self.width + 1, heads, dtype=torch.long), 0
            table[:] = heads * sum(piece.queries.numel() for piece in self.pieces)
            for piece in self.pieces:
                blocks, size = piece.queries.shape
                first = begin + torch.arange(blocks)[:, None] * heads * size + torch.arange(size)
                table[piece.queries] = first[..., None] + torch.arange(heads) * size
                begin += blocks * heads * size
            found = self._places[heads] = table[:-1].flatten()
        return found


_rows_of: Any = WeakTensorKeyDictionary()  # of each `block_mask` what it was made from and its blocks, while in use


def by_blocks(model: Any, device: torch.device) -> bool:
    """Whether a transformers model's shared rows can get a `block_mask`."""
    calls_interface = getattr(model, "_supports_attention_backend", False)
    return device.type == "cpu" and model.config._attn_implementation == "sdpa" and calls_interface


def block_mask(seen_until: Tensor) -> Tensor:
    """What a model gets as attention mask, ``[R, 1, W, W]``, so that `shared_attention` goes block by block.

    One number in the memory of one: the tensor itself says which rows it stands for.

    Args:
        seen_until: ``[R, W]``, see `tree_mask`.
    """
    rows, width = seen_until.shape
    pieces = list(_pieces(ways_back(seen_until), rows * width))
    mask = torch.ones(1, dtype=torch.bool).expand(rows, 1, width, width)
    _rows_of[mask] = seen_until, Blocks(pieces, rows, width)
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
    bias = torch.zeros(hidden.shape).masked_fill(hidden, float("-inf"))
    return Piece(queries, keys, bias, torch.where(queries == blank))


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
    seen_until, blocks = (None, None) if attention_mask is None else _rows_of.get(attention_mask, (None, None))
    if blocks is None or dropout or any(kwargs.get(name) is not None for name in BEYOND_MASK):
        attention_mask = attention_mask if seen_until is None else tree_mask(seen_until)
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    return _BlockAttention.apply(
        query, key, value, blocks, query.shape[-1] ** -0.5 if scaling is None else scaling
    ), None


AttentionInterface.register("sdpa", shared_attention)


class _Vectors(NamedTuple):
    """The vectors of ``[R, heads, W, D]`` as they lie in memory, or of a copy.

    Attributes:
        found: ``[R * heads * W, D]``.
        heads: how many.
        by_head: whether the tokens of a head lie behind one another, else the heads of a token do.
    """

    found: Tensor
    heads: int
    by_head: bool

    def of(self, tokens: Tensor, blocks: Blocks, key_heads: int) -> Tensor:
        """The vectors of tokens ``[N, C]`` as ``[N * KV, G * C, D]``: the G heads of a key one behind the other."""
        places = blocks.places(tokens, self.heads, self.by_head)
        return self.found.index_select(0, places).view(len(tokens) * key_heads, -1, self.found.shape[-1])

    def add(self, tokens: Tensor, blocks: Blocks, more: Tensor) -> None:
        """Add ``[N * heads, C, D]`` to the vectors of tokens ``[N, C]``."""
        self.found.index_add_(
            0, blocks.places(tokens, self.heads, self.by_head), more.flatten(0, 1).to(self.found.dtype)
        )

    def gathered(self, like: Tensor) -> Tensor:
        """All vectors, in the shape ``[R, heads, W, D]`` and the type of a tensor."""
        shape = like.shape if self.by_head else like.transpose(1, 2).shape
        lying = self.found.to(like.dtype).view(shape)
        return lying if self.by_head else lying.transpose(1, 2)


def _vectors(tensor: Tensor) -> _Vectors:
    by_head = not tensor.transpose(1, 2).is_contiguous()
    lying = tensor if by_head else tensor.transpose(1, 2)
    return _Vectors(lying.reshape(-1, tensor.shape[-1]), tensor.shape[1], by_head)


def _room(blocks: Blocks, like: Tensor, heads: int, key_heads: int) -> tuple[Tensor, list[Tensor]]:
    """Room for a vector like those of a tensor for each query, with zeros behind it, and the pieces' parts of it.

    The parts are ``[N * KV, G * C, D]``.
    """
    sizes = [piece.queries.numel() * heads for piece in blocks.pieces]
    room = like.new_empty(sum(sizes) + 1, like.shape[-1])
    room[-1] = 0
    parts = zip(room[:-1].split(sizes), blocks.pieces, strict=True)
    return room, [part.view(len(piece.queries) * key_heads, -1, room.shape[-1]) for part, piece in parts]


def _in_order(room: Tensor, blocks: Blocks, heads: int) -> Tensor:
    """`_room` -> ``[R, W, heads, D]``."""
    return room.index_select(0, blocks.slots(heads)).view(blocks.rows, blocks.width, heads, -1)


def _weights(query: Tensor, key: Tensor, piece: Piece, scale: float) -> Tensor:
    """What each query takes of each key: ``[N * KV, G * C, K]``; scores and softmax in fp32."""
    scores = torch.bmm(query.float(), (key.float() * scale).transpose(1, 2))
    of_heads = scores.view(len(piece.queries), -1, piece.queries.shape[1], scores.shape[-1])
    return of_heads.add_(piece.bias).softmax(-1).view_as(scores).to(query.dtype)


class _BlockAttention(torch.autograd.Function):
    """Grouped-query attention piece by piece, forward and backward."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scale: float) -> Tensor:
        """``[R, heads, W, D]``, key and value with as many heads as they have -> ``[R, W, heads, D]``."""
        heads, key_heads, kept = query.shape[1], key.shape[1], []
        asking, keys, values = map(_vectors, (query, key, value))
        room, parts = _room(blocks, value, heads, key_heads)
        for piece, part in zip(blocks.pieces, parts, strict=True):
            asked, seen = asking.of(piece.queries, blocks, key_heads), keys.of(piece.keys, blocks, key_heads)
            weights = _weights(asked, seen, piece, scale)
            torch.bmm(weights, values.of(piece.keys, blocks, key_heads), out=part)
            kept.append(weights if piece.keys.shape[1] <= KEPT_KEYS else None)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.blocks, ctx.scale = blocks, scale
        return _in_order(room, blocks, heads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """Gradients of query, key and value; those of a key are summed in fp32."""
        query, key, value, *kept = ctx.saved_tensors
        blocks, heads, key_heads = ctx.blocks, query.shape[1], key.shape[1]
        asking, keys, values, said = map(_vectors, (query, key, value, grads[0].transpose(1, 2)))
        of_key, of_value = (of._replace(found=torch.zeros_like(of.found, dtype=torch.float32)) for of in (keys, values))
        room, parts = _room(blocks, query, heads, key_heads)
        for piece, weights, part in zip(blocks.pieces, kept, parts, strict=True):
            asked, out = (of.of(piece.queries, blocks, key_heads) for of in (asking, said))
            seen, worth = (of.of(piece.keys, blocks, key_heads) for of in (keys, values))
            out.view(len(piece.queries), heads, -1, out.shape[-1])[piece.none[0], :, piece.none[1]] = 0
            if weights is None:
                weights = _weights(asked, seen, piece, ctx.scale)
            of_weights = torch.bmm(out, worth.transpose(1, 2))
            of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            of_value.add(piece.keys, blocks, torch.bmm(weights.transpose(1, 2), out))
            of_key.add(piece.keys, blocks, torch.bmm(of_scores.transpose(1, 2), asked))
            torch.bmm(of_scores, seen, out=part)
        of_query = _in_order(room, blocks, heads).mul_(ctx.scale).transpose(1, 2)
        of_key.found.mul_(ctx.scale)
        return of_query, of_key.gathered(key), of_value.gathered(value), None, None
