"""Cross-entropy of marked tokens over divided batches: step 1's loss, and step 3's pre-training mix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from training.utils.data.batches import collate_answers, rank_micro_batches
from training.utils.model.forward import answer_sums
from training.utils.run.distributed import data_rank, data_size
from training.utils.sharing.rows import Sharing

Batch = dict[str, torch.Tensor]


def micro_batches(
    dataset: Any,
    indices: Sequence[int],
    batch_size: int,
    pad_id: int,
    device: torch.device,
    sharing: Sharing | None = None,
) -> Iterator[Batch]:
    """This rank's micro-batches of one global batch; an empty one becomes a filler whose mask is 0.

    Args:
        indices: the rows of the batch, over all ranks.
        pad_id, sharing: see `collate_answers`; every row is a group of its own.
    """
    for rows in rank_micro_batches(indices, data_rank(), data_size(), batch_size):
        answers = [dataset[i] for i in rows or indices[:1]]
        batch = collate_answers(answers, [[i] for i in range(len(answers))], pad_id, sharing)
        if not rows:
            batch["response_mask"].zero_()
        yield {name: tensor.to(device) for name, tensor in batch.items()}


def negative_log_likelihood(model: Any, batch: Batch) -> torch.Tensor:
    """Sum of the negative log-likelihoods of a micro-batch's marked tokens, a scalar in nats."""
    return -answer_sums(model, batch).sum()


def predicted_tokens(dataset: Any) -> list[int]:
    """How many marked tokens each row has that something predicts: nothing predicts a row's first."""
    return [sum(mask[1:]) for mask in dataset["response_mask"]]
