"""Rows that hold several answers behind the tokens that they have in common, so that the model computes these once.

A shared row is a tree: its root is the tokens with which all of its answers begin, such as a system prompt; then follow
the prompts one after another, each with its own answers behind it. By `tree_mask` every token attends to the path back
to the root and to nothing else, and positions count along that path, so each answer gets the log-probs that it
has in a row of its own.
`training.utils.sharing.trial` finds out which models can do that.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Of token masks: 0 padding, 1 the root, m * PROMPT prompt m (from 1), m * PROMPT + n its answer n (from 1)
PROMPT = 1 << 16


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


def tree_mask(parts: Tensor) -> Tensor:
    """Which token sees which: ``[B, 1, T, T]`` bool, rows of the last two dimensions see columns.

    Args:
        parts: ``[B, T]``, where each token belongs, see `PROMPT`. Every token sees itself, so that no softmax is empty.
    """
    seen, sees = parts[:, None, :], parts[:, :, None]
    causal = torch.ones(parts.shape[1], parts.shape[1], dtype=torch.bool, device=parts.device).tril()
    itself = torch.eye(parts.shape[1], dtype=torch.bool, device=parts.device)
    on_the_way = (seen == 1) | ((seen == sees) | (seen == sees - sees % PROMPT)) & (seen > 0)
    return (causal & on_the_way | itself)[:, None]


def ways_back(parts: Tensor) -> list[list[range]]:
    """For each run of tokens with one place in the tree the path from the root to it, as runs of token numbers.

    Tokens are numbered over all rows: row 1 begins with number T.

    Args:
        parts: ``[B, T]``, as for `tree_mask`, whose mask says the same.
    """
    ways = []
    for row, of_row in enumerate(parts):
        start, runs = row * len(of_row), {}
        places, counts = of_row.unique_consecutive(return_counts=True)
        for place, count in zip(places.tolist(), counts.tolist(), strict=True):
            runs[place] = range(start, start := start + count)
            way = dict.fromkeys((1, place - place % PROMPT, place) if place > 1 else (place,))
            if place:
                ways.append([runs[part] for part in way if part in runs])
    return ways


def shared_length(answers: Sequence[Mapping[str, Any]]) -> int:
    """Tokens of a row that has the common beginning of these answers once, as in `behind_beginnings`."""
    before = [row["response_mask"].index(1) if 1 in row["response_mask"] else None for row in answers]
    beginnings = [row["input_ids"][:-1][:end] for row, end in zip(answers, before, strict=True)]
    common = len(os.path.commonprefix(beginnings))
    return common + sum(len(row["input_ids"]) - common for row in answers)


def _in_common(tokens: Tensor, may: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
    """How many columns the answers of each one's group begin with in common ``[S, 1]``, and how many all answers do.

    Args:
        tokens: ``[S, T]``, each answer's from column 0 on.
        may: ``[S, T]``, which columns may be in common.
        same: ``[S, S]``, who is in a group with whom.
    """
    first = same.int().argmax(1)
    alike = ((tokens == tokens[first]) & may).int().cumprod(1).sum(1)
    of_group = torch.where(same, alike, tokens.shape[1]).amin(1, keepdim=True)
    return of_group, ((tokens == tokens[:1]) & may).all(0).int().cumprod(0).sum()


@dataclass(frozen=True)
class _Deal:
    """Where groups of answers go when they are put into rows; all values are tensors on the device.

    Attributes:
        rows: how many rows there are.
        row: of each answer's group, ``[S]``.
        before: tokens in that row before the group, ``[S]``.
        longest: tokens of the longest row.
    """

    rows: Tensor
    row: Tensor
    before: Tensor
    longest: Tensor


def _dealt(sizes: Tensor, group: Tensor, groups: Tensor, to_a_row: int) -> _Deal:
    """Deal groups over rows so that these become about equally long; with one group to a row, in the groups' order.

    The groups are dealt from the largest to the smallest, first along the rows, then back, and so on.

    Args:
        sizes: tokens of each group, ``[S]``, 0 where there is no group of that number.
        group: of each answer, ``[S]``.
        groups: how many.
        to_a_row: at most.
    """
    numbers = torch.arange(len(sizes), device=sizes.device)
    if to_a_row == 1:
        return _Deal(groups, group, torch.zeros_like(group), sizes.amax())
    rows = -(-groups // to_a_row)
    place = torch.empty_like(numbers)
    place[sizes.argsort(descending=True, stable=True)] = numbers
    turn, at = place // rows, place % rows
    row_of = torch.where(turn % 2 == 0, at, rows - 1 - at)
    beside = (row_of[:, None] == row_of).long()
    before = (beside.tril(-1) * sizes).sum(1)
    return _Deal(rows, row_of[group], before[group], (beside * sizes).sum(1).amax())


def _cheapest(
    sizes: Tensor, group: Tensor, groups: Tensor, root: Tensor, longest: Tensor, sharing: Sharing
) -> tuple[int, int, _Deal] | None:
    """The cheapest way to put groups into rows: number and length of rows, and the deal; None for a row each.

    Args:
        sizes, group, groups: see `_dealt`.
        root: tokens that all begin with.
        longest: tokens of the longest answer with its prompt.
        sharing: of the model.
    """
    count = len(group)
    powers = [1 << n for n in range((count - 1).bit_length() + 1 if sharing.across else 1)]
    deals = [_dealt(sizes, group, groups, to_a_row) for to_a_row in powers]
    told = torch.stack([longest, root, *(number for deal in deals for number in (deal.rows, deal.longest))])
    alone, of_all, *shapes = told.tolist()
    ways = [(rows, of_all + most) for rows, most in zip(shapes[::2], shapes[1::2], strict=True)]
    at = min(range(len(ways)), key=lambda n: (ways[n][1] > sharing.longest, sharing.cost(*ways[n])))
    return (*ways[at], deals[at]) if sharing.pays((count, alone), ways[at]) else None


def behind_beginnings(
    input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor, groups: Tensor, pad_id: int, sharing: Sharing
) -> dict[str, Tensor]:
    """Answers as shared rows, in which those of a group are behind what they have in common at their beginning.

    That ends before the first response token of any of them, and at least one token before the shortest does. Where
    ``sharing`` lets several groups stand in a row, there are as many to a row as is cheapest, a power of two. All of it
    on the device of the inputs with one wait for it, as every model of step 3 needs it for each micro-batch.

    Args:
        input_ids, attention_mask, response_mask: ``[S, T]`` of the answers behind their prompts, padded on either side.
        groups: ``[S]``, a number for those that answer the same prompt.
        pad_id: fills up what is shorter.
        sharing: of the model.

    Returns:
        Nothing where that does not pay. Else [R, W] long: ``shared_ids``; ``shared_mask``, see `PROMPT`;
        ``shared_positions``, in which each answer goes on behind the beginning; and where the answers are:
        ``shared_row`` [S], and ``shared_columns`` [S, T] of their tokens.
    """
    columns = input_ids.shape[1]
    place = torch.arange(columns, device=input_ids.device).expand_as(input_ids)
    padding = attention_mask.argmax(1, keepdim=True)
    lengths = attention_mask.sum(1, keepdim=True)
    unpadded = (place + padding).clamp(max=columns - 1)
    tokens = input_ids.gather(1, unpadded)  # each answer's from column 0 on, as all of the following
    responses = response_mask.bool().gather(1, unpadded).cumsum(1) > 0
    same = groups[:, None] == groups
    beginning, root = _in_common(tokens, ~responses & (place < lengths - 1), same)
    own = lengths - beginning  # tokens behind it
    earlier = same.tril(-1).long()  # in the same group
    leads = earlier.sum(1) == 0  # its group
    group = (leads.cumsum(0) - 1)[same.int().argmax(1)]
    sizes = torch.zeros_like(group).index_add(0, group, (own + (beginning - root) * leads[:, None]).squeeze(1))
    found = _cheapest(sizes, group, leads.sum(), root, lengths.max(), sharing)
    if found is None:
        return {}
    rows, width, deal = found
    start = root + deal.before[:, None]  # of the group
    answer = start + beginning - root + (earlier * own.T).sum(1, keepdim=True)
    column = torch.where(place < root, place, place - root + start)
    column = torch.where(place < beginning, column, place - beginning + answer)
    prompt = (group[:, None] + 1) * PROMPT
    part = torch.where(place < beginning, prompt, prompt + earlier.sum(1, keepdim=True) + 1)
    target = (deal.row[:, None], torch.where(place < lengths, column, width))  # padding falls off the end
    return {
        "shared_ids": _laid(tokens, pad_id, target, rows, width),
        "shared_mask": _laid(torch.where(place < root, 1, part), 0, target, rows, width),
        "shared_positions": _laid(place, 0, target, rows, width),
        "shared_row": deal.row,
        "shared_columns": column.gather(1, (place - padding).clamp(min=0)) * attention_mask,
    }


def _laid(values: Tensor, blank: int, target: tuple[Tensor, Tensor], rows: int, width: int) -> Tensor:
    """``[S, T]`` -> ``[R, W]``; answers agree on what they have in common."""
    out = values.new_full((rows, width + 1), blank)
    out[target] = values
    return out[:, :width]
