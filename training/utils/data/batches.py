"""Batches: which rows go together, in which order, on which rank, and how they are padded.

The order of an epoch is a pure function of (lengths, batch size, seed, epoch), so every rank computes the same one and
a run resumes at any step by skipping: nothing is replayed and nothing is stored.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch

from training.utils.run.distributed import data_rank, data_size
from training.utils.sharing.rows import Sharing, behind_beginnings

Element = TypeVar("Element")

_WINDOW = 50  # batches that are sorted by length together: little padding, and still another mix every epoch
SIDES = ("chosen", "rejected")
_STRETCH = 0.02  # of a length before sorting: costs about one point of padding


def epoch_batches(
    lengths: Sequence[int], global_batch_size: int, seed: int, epoch: int, group_by_length: bool = True
) -> list[list[int]]:
    """The row numbers of every optimizer step of one epoch; every row once, the last batch may be short.

    Args:
        lengths: tokens of each row.
        global_batch_size: rows of one optimizer step, over all ranks and micro-batches.
        seed, epoch: another epoch is another order.
        group_by_length: put rows of like length together, so that little is padded.
    """
    lengths = lengths[:]  # a column of `datasets` reads the disk for every single number, but all of them at once
    order = list(range(len(lengths)))
    shuffler = random.Random(f"{seed}/{epoch}")  # a text seed is hashed with SHA-512: the same on every machine
    shuffler.shuffle(order)
    if group_by_length:
        window = global_batch_size * _WINDOW
        chunks = [order[at : at + window] for at in range(0, len(order), window)]
        # Stretched at random, rows of nearly equal length change places: other company in every epoch
        sort_by = [-length * shuffler.uniform(1 - _STRETCH, 1 + _STRETCH) for length in lengths]
        order = [i for chunk in chunks for i in sorted(chunk, key=sort_by.__getitem__)]
    batches = [order[at : at + global_batch_size] for at in range(0, len(order), global_batch_size)]
    short = [batches.pop()] if batches and len(batches[-1]) < global_batch_size else []
    shuffler.shuffle(batches)
    return batches + short


def batches_after(
    done: int, lengths: Sequence[int], global_batch_size: int, seed: int, epochs: int
) -> Iterator[tuple[int, list[int]]]:
    """The optimizer steps that are left after ``done``: (number of the step, from 1, its rows), see `epoch_batches`."""
    number = 0
    for epoch in range(epochs):
        for batch in epoch_batches(lengths, global_batch_size, seed, epoch):
            number += 1
            if number > done:
                yield number, batch


def rank_micro_batches(
    batch: Sequence[Element], rank: int, world_size: int, micro_batch_size: int
) -> list[list[Element]]:
    """This rank's share of one batch, as micro-batches; neighbours in ``batch`` stay together.

    Every rank gets the same number of micro-batches; in a short batch they are short evenly, and some may be empty.
    """
    per_rank = -(-len(batch) // (world_size * micro_batch_size))
    count = per_rank * world_size
    small, larger = divmod(len(batch), count) if count else (0, 0)
    chunks, at = [], 0
    for i in range(count):
        size = small + (i < larger)
        chunks.append(list(batch[at : at + size]))
        at += size
    # Neighbouring chunks, which are of like length, run at the same time on different ranks.
    return chunks[rank::world_size]


def padding_share(lengths: Sequence[int], batches: Sequence[Sequence[int]], micro_batch_size: int) -> float:
    """The share of padding tokens when each batch is cut into micro-batches padded to their longest row."""
    real = padded = 0
    for batch in batches:
        for chunk in rank_micro_batches(batch, 0, 1, micro_batch_size):
            sizes = [lengths[i] for i in chunk]
            real += sum(sizes)
            padded += max(sizes, default=0) * len(sizes)
    return 1 - real / padded if padded else 0.0


def spread_rows(total: int, count: int) -> list[int]:
    """At most ``count`` of ``total`` rows, evenly spread from the first on."""
    count = min(count, total)
    return [i * total // count for i in range(count)]


def _pad(sequences: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    width = max(map(len, sequences))
    out = torch.full((len(sequences), width), value, dtype=torch.long)
    for row, sequence in zip(out, sequences, strict=True):
        row[: len(sequence)] = torch.tensor(sequence, dtype=torch.long)
    return out


def collate_sft(rows: Sequence[Mapping[str, Any]], pad_id: int) -> dict[str, torch.Tensor]:
    """Step 1's rows as input_ids, attention_mask, response_mask, each [B, T] long, right padded."""
    ids = [row["input_ids"] for row in rows]
    return {
        "input_ids": _pad(ids, pad_id),
        "attention_mask": _pad([[1] * len(row) for row in ids], 0),
        "response_mask": _pad([row["response_mask"] for row in rows], 0),
    }


def _runs(counts: Sequence[int]) -> Iterator[range]:
    """The rows of each ranking, from the number that each row has in its column ``pairs``."""
    at = 0
    while at < len(counts):
        yield range(at, at + counts[at])
        at += counts[at]


def rankings_of(dataset: Any) -> list[range]:
    """What counts once in a dataset of pairs: the rows of each ranking, which stand together, or one ordinary pair."""
    return list(_runs(dataset["pairs"][:]))


def element_lengths(dataset: Any) -> list[int]:
    """Tokens of every element of a batch: of a row, or of the longest pair of a ranking."""
    lengths = dataset["length"][:]
    if "pairs" not in dataset.column_names:
        return lengths
    return [max(lengths[row] for row in rows) for rows in rankings_of(dataset)]


def collate_answers(
    answers: Sequence[Mapping[str, Any]], groups: Sequence[Sequence[int]], pad_id: int, sharing: Sharing | None = None
) -> dict[str, torch.Tensor]:
    """Answers as a batch, behind what they have in common at their beginning where that pays.

    Args:
        answers: as rows of `collate_sft`.
        groups: which of them answer the same prompt; every one is in one group.
        sharing: None where each answer is a row of its own.

    Returns:
        What `collate_sft` gives of the answers, [S, T]; where it pays also the same as shared rows, see
        `behind_beginnings`.
    """
    batch = collate_sft(answers, pad_id)
    if sharing is None:
        return batch
    return batch | behind_beginnings(batch["input_ids"], batch["attention_mask"], groups, pad_id, sharing)


def distinct_answers(
    rows: Sequence[Mapping[str, Any]],
) -> tuple[list[dict[str, Any]], list[list[int]], list[list[int]]]:
    """The answers of whole rankings (or ordinary pairs), each once.

    Returns:
        The answers as rows of `collate_sft`, those that are chosen first; which of them each ranking has; and for each
        of `SIDES` which of them each row has.
    """
    ranking = [n for n, run in enumerate(_runs([row.get("pairs", 1) for row in rows])) for _ in run]
    places: dict[tuple[int, tuple[int, ...]], int] = {}
    answers: list[dict[str, Any]] = []
    groups: list[list[int]] = [[] for _ in range(ranking[-1] + 1)]
    sides: list[list[int]] = []
    for name in SIDES:
        side = []
        for n, row in zip(ranking, rows, strict=True):
            answer = {"input_ids": row[f"{name}_ids"], "response_mask": row[f"{name}_mask"]}
            side.append(places.setdefault((n, tuple(answer["input_ids"])), len(places)))
            if side[-1] == len(answers):
                answers.append(answer)
                groups[n].append(side[-1])
        sides.append(side)
    return answers, groups, sides


def collate_pairs(
    rows: Sequence[Mapping[str, Any]], pad_id: int, sharing: Sharing | None = None
) -> dict[str, torch.Tensor]:
    """Whole rankings, or ordinary pairs, as batches of their answers.

    An answer of a ranking stands there once, however many pairs it is in: K answers are K sequences, not K(K - 1).

    Args:
        rows: of a dataset of pairs; those of one ranking stand together.
        pad_id, sharing: see `collate_answers`.

    Returns:
        What `collate_answers` gives of the answers that are chosen, then of the others (of ordinary pairs all rejected
        ones); ``chosen`` and ``rejected``, [B] long: the place of each pair's answers among them; ``weights``, [B]
        fp32: 1 / (pairs of the ranking), so that a prompt counts once.
    """
    answers, groups, sides = distinct_answers(rows)
    pairs = {name: torch.tensor(side) for name, side in zip(SIDES, sides, strict=True)}
    weights = torch.tensor([1 / row.get("pairs", 1) for row in rows])
    return {**collate_answers(answers, groups, pad_id, sharing), **pairs, "weights": weights}


def pair_micro_batches(
    dataset: Any,
    rankings: Sequence[range],
    batch_size: int,
    pad_id: int,
    device: torch.device,
    sharing: Sharing | None = None,
) -> Iterator[dict[str, torch.Tensor]]:
    """This rank's micro-batches of an optimizer step, see `collate_pairs`.

    A rank that has no ranking left gets a filler of weight 0, so that all make the same number of backward passes.

    Args:
        rankings: of the step, over all ranks; of those of `rankings_of`.
        batch_size: rankings of a micro-batch.
        pad_id, sharing: see `collate_answers`.
    """
    for mine in rank_micro_batches(rankings, data_rank(), data_size(), batch_size):
        batch = collate_pairs([dataset[row] for rows in mine or rankings[:1] for row in rows], pad_id, sharing)
        batch["weights"] *= bool(mine)
        yield {name: tensor.to(device) for name, tensor in batch.items()}
