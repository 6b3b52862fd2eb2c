"""Pairs of answers through a scorer: the rewards of both sides, and what each pair weighs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from training.utils.data.batches import (
    collate_answers,
    distinct_answers,
    epoch_batches,
    rank_micro_batches,
    rankings_of,
    spread_rows,
)
from training.utils.metrics import watched
from training.utils.model.forward import answer_rewards
from training.utils.run.distributed import data_rank, data_size, gather_rows
from training.utils.sharing.rows import Sharing, tree_size

# Held-out pairs that a model is judged by before it is trained: most have a fresh head, whose accuracy is a coin's
PAIRS_BEFORE = 64


def score_pairs(scorer: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards of the chosen and of the rejected answers of a batch of `collate_pairs`: two tensors ``[B]``, fp32."""
    rewards = answer_rewards(scorer, batch)
    return rewards[batch["chosen"]], rewards[batch["rejected"]]


def some_rankings(dataset: Any, count: int) -> Any:
    """At most ``count`` prompts' pairs, evenly spread over a dataset of pairs."""
    rankings = rankings_of(dataset)
    return dataset.select([row for i in spread_rows(len(rankings), count) for row in rankings[i]])


def pair_weights(dataset: Any) -> list[float]:
    """1 / (pairs of its ranking) of every row, so that a prompt counts once; 1 of an ordinary pair."""
    return [1 / pairs for pairs in dataset["pairs"][:]]


@torch.no_grad()
def held_out_rewards(
    scorer: Any, dataset: Any, batch_size: int, pad_id: int, device: torch.device, sharing: Sharing | None = None
) -> list[tuple[float, float]]:
    """(chosen, rejected) rewards of every held-out pair in the dataset's order, on all ranks.

    Answers go together where they share a beginning; the others need not: those of like length do, so that little is
    padded.

    Args:
        scorer: gives a score for every token.
        dataset: the pairs.
        batch_size: pairs done together.
        pad_id, sharing: see `collate_answers`.
        device: the scorer's.
    """
    scorer.eval()
    rankings = rankings_of(dataset)
    rows_at_once = batch_size if sharing else 2 * batch_size
    places, units, lengths = _units(dataset, rankings, sharing)
    rewards: list[tuple[tuple[int, int], float]] = []
    for indices in watched(epoch_batches(lengths, rows_at_once * data_size(), 0, 0), "held out"):
        for mine in rank_micro_batches(indices, data_rank(), data_size(), rows_at_once):
            answers: list[dict[str, Any]] = []
            groups = []
            for ranking, members in (units[i] for i in mine or indices[:1]):
                known, _, _ = distinct_answers([dataset[row] for row in rankings[ranking]])
                groups.append(range(len(answers), len(answers) + len(members)))
                answers += [known[i] for i in members]
            batch = collate_answers(answers, groups, pad_id, sharing)
            scores = answer_rewards(scorer, {name: tensor.to(device) for name, tensor in batch.items()})
            whose = [(ranking, i) for ranking, members in (units[i] for i in mine) for i in members]
            rewards += zip(whose, scores.tolist(), strict=False)  # a filler's score belongs to no answer
    by_answer = dict(gather_rows(rewards))
    return [(by_answer[chosen], by_answer[rejected]) for chosen, rejected in places]


def _units(
    dataset: Any, rankings: Sequence[range], sharing: Sharing | None
) -> tuple[list[tuple[Any, Any]], list[tuple[int, Sequence[int]]], list[int]]:
    """What goes through the model together: a ranking's answers where sharing their beginning pays, else each alone.

    Returns:
        The (chosen, rejected) answers of each row, an answer as (ranking, its number in it); the units as (ranking,
        numbers of its answers); their lengths in tokens.
    """
    places: list[tuple[Any, Any]] = []
    units: list[tuple[int, Sequence[int]]] = []
    lengths = []
    for ranking, rows in enumerate(rankings):
        answers, _, sides = distinct_answers([dataset[row] for row in rows])
        places += [((ranking, chosen), (ranking, rejected)) for chosen, rejected in zip(*sides, strict=True)]
        alone = [len(answer["input_ids"]) for answer in answers]
        together = tree_size([answer["input_ids"] for answer in answers])
        if sharing is not None and sharing.pays((len(answers), max(alone)), (1, together)):
            units.append((ranking, range(len(answers))))
            lengths.append(together)
        else:
            units += [(ranking, [i]) for i in range(len(answers))]
            lengths += alone
    return places, units, lengths
