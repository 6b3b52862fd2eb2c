"""Pairs of answers through a scorer: micro-batches of this rank, and the rewards of both sides."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from training.utils.data import SIDES, collate_pairs, collate_sft, epoch_batches, rank_micro_batches, side_of_pair
from training.utils.metrics import watched
from training.utils.model.reward_model import last_token_scores
from training.utils.run.distributed import data_rank, data_size, gather_objects

# Held-out pairs that a model is judged by before it is trained: most have a fresh head, whose accuracy is a coin's
PAIRS_BEFORE = 64


def micro_batches(
    dataset: Any, indices: Sequence[int], batch_size: int, pad_id: int, device: torch.device
) -> Iterator[tuple[dict[str, torch.Tensor], float]]:
    """This rank's micro-batches of pairs, with each pair's weight: 0 for a filler that keeps ranks in step."""
    for rows in rank_micro_batches(indices, data_rank(), data_size(), batch_size):
        batch = collate_pairs([dataset[i] for i in rows or indices[:1]], pad_id)
        yield {name: tensor.to(device) for name, tensor in batch.items()}, float(bool(rows))


def score_pairs(scorer: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards of the chosen and of the rejected answers of a batch ``[2B, T]``: two tensors ``[B]``, fp32."""
    scores = scorer(batch["input_ids"], batch["attention_mask"])
    chosen, rejected = last_token_scores(scores, batch["response_mask"]).chunk(2)
    return chosen, rejected


@torch.no_grad()
def held_out_rewards(
    scorer: Any, dataset: Any, batch_size: int, pad_id: int, device: torch.device
) -> list[tuple[float, float]]:
    """(chosen, rejected) rewards of every held-out pair in the dataset's order, on all ranks.

    The two sides of a pair need not meet here: answers of like length go together, so that little is padded.
    """
    scorer.eval()
    count = len(dataset)
    lengths = [len(row[f"{name}_ids"]) for name in SIDES for row in dataset]  # all chosen, then all rejected
    rewards: list[tuple[int, float]] = []
    batches = epoch_batches(lengths, 2 * batch_size * data_size(), 0, 0)
    for indices in watched(batches, "held out"):
        for answers in rank_micro_batches(indices, data_rank(), data_size(), 2 * batch_size):
            sides = [(dataset[i % count], SIDES[i // count]) for i in answers or indices[:1]]
            batch = collate_sft([side_of_pair(row, name) for row, name in sides], pad_id)
            ids, mask, response = (batch[k].to(device) for k in ("input_ids", "attention_mask", "response_mask"))
            scores = last_token_scores(scorer(ids, mask), response)
            rewards += zip(answers, scores.tolist(), strict=False)  # a filler's score belongs to no answer
    by_answer = dict(gather_objects(rewards))
    return [(by_answer[i], by_answer[i + count]) for i in range(count)]
