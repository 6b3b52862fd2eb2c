"""Rows that hold several answers, in which the model computes once what these begin with.

A shared row is a tree of tokens, a trie: its answers lie there in the order of their tokens, of each only what the one
before it does not have already. By `tree_mask` every token attends to its way back to the root and to nothing else, and
positions count along that way, so each answer gets the log-probs that it has in a row of its own.
`training.utils.sharing.trial` finds out which models can do that.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sharing:
    """Answers may stand behind what they have in common, each seeing that and itself alone.

    Attributes:
        longest: tokens that a row may have.
        hidden: the model's width. A layer's matrix products cost a token 24 x hidden^2 operations, attention under a
            mask 4 x hidden for each token of its row, so a row of W tokens costs as W (6 hidden + W).
        across: several prompts may stand in a row, as attention costs only what is seen
            (`training.utils.sharing.attention`), and a row W.
    """

    longest: int
    hidden: int
    across: bool = False

    def cost(self, rows: int, width: int) -> int:
        """What so many rows cost, padding counted."""
        return rows * width * (1 if self.across else 6 * self.hidden + width)

    def pays(self, separate: tuple[int, int], shared: tuple[int, int]) -> bool:
        """Whether shared rows are cheaper; both are (rows, tokens of each)."""
        return self.cost(*shared) < self.cost(*separate) and shared[1] <= self.longest


def tree_mask(seen_until: Tensor) -> Tensor:
    """Which token sees which: ``[B, 1, T, T]`` bool, rows of the last two dimensions see columns.

    Args:
        seen_until: ``[B, T]`` long, for each token the column behind the last one that sees it: those in between, which
            lie behind it in its tree, see it all. 0 for padding. Every token sees itself, so that no softmax is empty.
    """
    columns = torch.arange(seen_until.shape[1], device=seen_until.device)
    sees = columns[:, None]
    return ((columns <= sees) & (sees < seen_until[:, None, :]) | (columns == sees))[:, None]


def ways_back(seen_until: Tensor) -> list[list[range]]:
    """For each run of tokens that stand behind one another the path from the root to it, as runs of token numbers.

    Tokens are numbered over all rows: row 1 begins with number T.

    Args:
        seen_until: ``[B, T]``, as for `tree_mask`, whose mask says the same; padding is at the end of a row.
    """
    ways = []
    for row, until in enumerate(seen_until.tolist()):
        first, real = row * len(until), sum(map(bool, until))
        starts = [column for column in range(real) if not column or until[column - 1] <= column]
        way: list[range] = []
        for start, stop in pairwise([*starts, real]):
            seen = [bisect_left(run, -start, key=lambda column: -until[column]) for run in way]
            way = [run[:count] for run, count in zip(way, seen, strict=True) if count] + [range(start, stop)]
            ways.append([range(first + run.start, first + run.stop) for run in way])
    return ways


def tree_size(texts: Sequence[Sequence[int]]) -> int:
    """Tokens of a row that holds these."""
    return _Tree.of([torch.tensor(text) for text in texts], range(len(texts))).width


@dataclass(frozen=True)
class _Tree:
    """Texts in the order of their tokens, as they lie in a row.

    Attributes:
        texts: their numbers.
        known: how many tokens of each the one before it has already.
        width: tokens of all without these.
    """

    texts: list[int]
    known: list[int]
    width: int

    @classmethod
    def of(cls, texts: Sequence[Tensor], members: Iterable[int]) -> _Tree:
        """The tree of some texts, ``[T]`` each."""
        order = sorted(members, key=lambda i: texts[i].tolist())
        known = [0, *(_in_common(texts[i], texts[j]) for i, j in pairwise(order))]
        return cls(order, known, sum(len(texts[i]) for i in order) - sum(known))


def _in_common(one: Tensor, other: Tensor) -> int:
    """How many tokens two texts begin with alike."""
    length = min(len(one), len(other))
    differ = (one[:length] != other[:length]).nonzero()
    return int(differ[0]) if len(differ) else length


def behind_beginnings(
    input_ids: Tensor, attention_mask: Tensor, groups: Sequence[Sequence[int]], pad_id: int, sharing: Sharing
) -> dict[str, Tensor]:
    """Answers as shared rows, in which each stands behind what it has in common with those before it.

    Those of a group share a row. Where ``sharing`` lets several groups stand in one, there are as many to a row as is
    cheapest.

    Args:
        input_ids, attention_mask: ``[S, T]`` of the answers behind their prompts, padded on either side.
        groups: which of them answer the same prompt; every one is in one group.
        pad_id: fills up what is shorter.
        sharing: of the model.

    Returns:
        Nothing where that does not pay. Else, on the device of the inputs, [R, W] long: ``shared_ids``;
        ``shared_seen_until``, see `tree_mask`; ``shared_positions``, which count along each answer; and where the
        answers are: ``shared_row`` [S], and ``shared_columns`` [S, T] of their tokens.
    """
    real = attention_mask.bool().cpu()
    texts = [ids[own] for ids, own in zip(input_ids.cpu(), real, strict=True)]
    trees = _dealt(texts, groups, sharing)
    if trees is None:
        return {}
    return {name: tensor.to(input_ids.device) for name, tensor in _laid(texts, trees, real, pad_id).items()}


def _dealt(texts: Sequence[Tensor], groups: Sequence[Sequence[int]], sharing: Sharing) -> list[_Tree] | None:
    """Which texts stand in which row, None if each needs one of its own."""
    apart = [_Tree.of(texts, group) for group in groups]
    counts = {-(-len(groups) >> n) for n in range(len(groups).bit_length() + 1)} if sharing.across else set()
    cheapest, least = None, (len(texts), max(map(len, texts)))
    for count in (len(groups), *counts):
        trees = apart if count == len(groups) else _in_rows(texts, apart, count)
        shape = count, max(tree.width for tree in trees)
        if sharing.pays(least, shape):
            cheapest, least = trees, shape
    return cheapest


def _in_rows(texts: Sequence[Tensor], groups: Sequence[_Tree], count: int) -> list[_Tree]:
    """Groups in so many rows of about one length: from the largest on, each goes where least is."""
    rows: list[list[int]] = [[] for _ in range(count)]
    filled = [0] * count
    for group in sorted(groups, key=lambda group: -group.width):
        emptiest = filled.index(min(filled))
        rows[emptiest] += group.texts
        filled[emptiest] += group.width
    return [_Tree.of(texts, row) for row in rows]


def _laid(texts: Sequence[Tensor], trees: Sequence[_Tree], real: Tensor, pad_id: int) -> dict[str, Tensor]:
    """`behind_beginnings`, of a row for each tree; ``real`` says where the tokens of ``[S, T]`` are."""
    shape = len(trees), max(tree.width for tree in trees)
    ids, (positions, until) = torch.full(shape, pad_id), torch.zeros(2, *shape, dtype=torch.long)
    row_of, columns = torch.zeros(len(texts), dtype=torch.long), torch.zeros(real.shape, dtype=torch.long)
    for row, tree in enumerate(trees):
        way, width = torch.arange(0), 0
        for i, known in zip(tree.texts, tree.known, strict=True):
            start, width = width, width + len(texts[i]) - known
            way = torch.cat([way[:known], torch.arange(start, width)])
            ids[row, start:width] = texts[i][known:]
            positions[row, start:width] = torch.arange(known, len(texts[i]))
            until[row].index_fill_(0, way, width)
            columns[i, real[i]], row_of[i] = way, row
    laid = {"ids": ids, "seen_until": until, "positions": positions, "row": row_of, "columns": columns}
    return {f"shared_{name}": tensor for name, tensor in laid.items()}
