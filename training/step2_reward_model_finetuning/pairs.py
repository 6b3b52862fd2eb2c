"""Pairs of answers through a scorer: the rewards of both sides, and what each pair weighs."""

from __future__ import annotations

import hashlib
from array import array
from typing import Any

import torch

from training.utils.data import (
    SIDES,
    collate_sft,
    epoch_batches,
    rank_micro_batches,
    rankings_of,
    side_of_pair,
    spread_rows,
)
from training.utils.metrics import watched
from training.utils.model.reward_model import last_token_scores
from training.utils.run.distributed import data_rank, data_size, gather_objects

# Held-out pairs that a model is judged by before it is trained: most have a fresh head, whose accuracy is a coin's
PAIRS_BEFORE = 64


def score_pairs(scorer: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards of the chosen and of the rejected answers of a batch of `collate_pairs`: two tensors ``[B]``, fp32."""
    scores = last_token_scores(scorer(batch["input_ids"], batch["attention_mask"]), batch["response_mask"])
    return scores[batch["chosen"]], scores[batch["rejected"]]


def some_rankings(dataset: Any, count: int) -> Any:
    """At most ``count`` prompts' pairs, evenly spread over a dataset of pairs."""
    rankings = rankings_of(dataset)
    return dataset.select([row for i in spread_rows(len(rankings), count) for row in rankings[i]])


def pair_weights(dataset: Any) -> list[float]:
    """1 / (pairs of its ranking) of every row, so that a prompt counts once; 1 of an ordinary pair."""
    return [1 / pairs for pairs in dataset["pairs"][:]]


@torch.no_grad()
def held_out_rewards(
    scorer: Any, dataset: Any, batch_size: int, pad_id: int, device: torch.device
) -> list[tuple[float, float]]:
    """(chosen, rejected) rewards of every held-out pair in the dataset's order, on all ranks.

    The two sides of a pair need not meet here: answers of like length go together, so that little is padded.
    """
    scorer.eval()
    answers, lengths, places = _distinct_answers(dataset)
    rewards: list[tuple[int, float]] = []
    batches = epoch_batches(lengths, 2 * batch_size * data_size(), 0, 0)
    for indices in watched(batches, "held out"):
        for mine in rank_micro_batches(indices, data_rank(), data_size(), 2 * batch_size):
            sides = [answers[i] for i in mine or indices[:1]]
            batch = collate_sft([side_of_pair(dataset[row], name) for row, name in sides], pad_id)
            ids, mask, response = (batch[k].to(device) for k in ("input_ids", "attention_mask", "response_mask"))
            scores = last_token_scores(scorer(ids, mask), response)
            rewards += zip(mine, scores.tolist(), strict=False)  # a filler's score belongs to no answer
    by_answer = dict(gather_objects(rewards))
    return [(by_answer[chosen], by_answer[rejected]) for chosen, rejected in places]


def _distinct_answers(dataset: Any) -> tuple[list[tuple[int, str]], list[int], list[tuple[int, int]]]:
    """Every answer once: an answer of a ranking stands in several rows.

    Returns:
        The answers as (row, side), what is chosen first; their lengths in tokens; where among them the chosen and the
        rejected answer of each row are.
    """
    first_row = [rows.start for rows in rankings_of(dataset) for _ in rows]
    known: dict[tuple[int, bytes], int] = {}
    answers: list[tuple[int, str]] = []
    lengths, places = [], []
    for name in SIDES:
        side = []
        for row, ids in enumerate(dataset[f"{name}_ids"]):
            digest = hashlib.blake2b(array("q", ids).tobytes(), digest_size=16).digest()
            side.append(known.setdefault((first_row[row], digest), len(known)))
            if side[-1] == len(answers):
                answers.append((row, name))
                lengths.append(len(ids))
        places.append(side)
    return answers, lengths, list(zip(*places, strict=True))
