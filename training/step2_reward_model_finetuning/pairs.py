"""Pairs of answers through a scorer: micro-batches of this rank, and the rewards of both sides."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from training.utils.data import collate_pairs, epoch_batches, rank_micro_batches
from training.utils.distributed import gather_objects, rank, world_size
from training.utils.metrics import watched
from training.utils.reward_model import last_token_scores


def micro_batches(
    dataset: Any, indices: Sequence[int], batch_size: int, pad_id: int, device: torch.device
) -> Iterator[tuple[dict[str, torch.Tensor], float]]:
    """This rank's micro-batches of pairs, with each pair's weight: 0 for a filler that keeps ranks in step."""
    for rows in rank_micro_batches(indices, rank(), world_size(), batch_size):
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
    """(chosen, rejected) rewards of every held-out pair in the dataset's order, on all ranks."""
    scorer.eval()
    pairs: list[tuple[int, float, float]] = []
    for indices in watched(epoch_batches(dataset["length"], batch_size * world_size(), 0, 0), "held out"):
        shares = rank_micro_batches(indices, rank(), world_size(), batch_size)
        batches = micro_batches(dataset, indices, batch_size, pad_id, device)
        for rows, (batch, weight) in zip(shares, batches, strict=True):
            chosen, rejected = score_pairs(scorer, batch)
            if weight:
                pairs += zip(rows, chosen.tolist(), rejected.tolist(), strict=True)
    return [(chosen, rejected) for _, chosen, rejected in sorted(gather_objects(pairs))]
