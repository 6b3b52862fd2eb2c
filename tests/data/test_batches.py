"""Order, shares of ranks, padding."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings, strategies as st

from training.utils.data.batches import (
    batches_after,
    collate_pairs,
    collate_sft,
    epoch_batches,
    padding_share,
    rank_micro_batches,
    spread_rows,
)

_RANDOM = random.Random(0)
LENGTHS = [_RANDOM.randint(10, 500) for _ in range(1000)]
PINNED = [43, 575, 670, 111]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 70),
    micro=st.integers(1, 5),
    world=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    g=st.booleans(),
)
def test_every_row_once_and_equal_steps_on_every_rank(rows, micro, world, accumulation, g):
    size = micro * world * accumulation
    batches = epoch_batches(LENGTHS[:rows], size, seed=1, epoch=0, group_by_length=g)
    assert sorted(i for batch in batches for i in batch) == list(range(rows))
    assert all(len(batch) == size for batch in batches[:-1])
    for batch in batches:
        shares = [rank_micro_batches(batch, rank, world, micro) for rank in range(world)]
        assert len({len(share) for share in shares}) == 1, "another number of backward passes would hang"
        assert sorted(i for share in shares for chunk in share for i in chunk) == sorted(batch)
        assert all(len(chunk) <= micro for share in shares for chunk in share)
        if len(batch) == size:
            assert all(len(chunk) == micro for share in shares for chunk in share)


def test_order_is_deterministic_and_differs_by_epoch_and_seed():
    first = epoch_batches(LENGTHS, 8, 1, 0)
    assert first == epoch_batches(list(LENGTHS), 8, 1, 0)
    assert first != epoch_batches(LENGTHS, 8, 1, 1)
    assert first != epoch_batches(LENGTHS, 8, 2, 0)
    assert [batch[0] for batch in first[:4]] == PINNED, "the same on every machine and Python"


def test_grouping_saves_padding():
    grouped = padding_share(LENGTHS, epoch_batches(LENGTHS, 8, 1, 0), 8)
    random_order = padding_share(LENGTHS, epoch_batches(LENGTHS, 8, 1, 0, group_by_length=False), 8)
    assert grouped < 0.05 < 0.3 < random_order


@pytest.mark.parametrize("rows", [240, 1000])
def test_rows_keep_other_company_in_every_epoch(rows):
    """Fewer batches than are sorted together, and more: no batch stays as it was."""
    first, second = ({frozenset(b) for b in epoch_batches(LENGTHS[:rows], 8, 1, epoch)} for epoch in (0, 1))
    assert len(first & second) <= len(first) // 4


def test_order_mixes_lengths_over_time():
    """Batches of like length must not come in the order of their length."""
    means = [sum(LENGTHS[i] for i in b) / len(b) for b in epoch_batches(LENGTHS, 8, 1, 0)]
    assert means != sorted(means) and means != sorted(means, reverse=True)


def test_collate_sft():
    rows = [
        {"input_ids": [5, 6, 7], "response_mask": [0, 1, 1]},
        {"input_ids": [0, 8], "response_mask": [0, 1]},
    ]
    batch = collate_sft(rows, pad_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [0, 8, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]], "the id 0 in a row is not padding"
    assert batch["response_mask"].tolist() == [[0, 1, 1], [0, 1, 0]]
    assert all(tensor.dtype == torch.long for tensor in batch.values())


def test_collate_pairs():
    rows = [
        {"chosen_ids": [1, 2], "chosen_mask": [0, 1], "rejected_ids": [1, 3, 4], "rejected_mask": [0, 1, 1]},
        {"chosen_ids": [5, 6], "chosen_mask": [0, 1], "rejected_ids": [5, 7], "rejected_mask": [0, 1]},
    ]
    batch = collate_pairs(rows, pad_id=9)
    assert batch["input_ids"].tolist() == [[1, 2, 9], [5, 6, 9], [1, 3, 4], [5, 7, 9]]
    assert batch["response_mask"].tolist() == [[0, 1, 0], [0, 1, 0], [0, 1, 1], [0, 1, 0]]


ROWS, EPOCHS = LENGTHS[:70], 3  # 9 steps an epoch, the last one short
WHOLE = [batch for epoch in range(EPOCHS) for batch in epoch_batches(ROWS, 8, 3, epoch)]


@pytest.mark.parametrize("done", range(len(WHOLE) + 1))
def test_resuming_after_any_step_replays_nothing(done):
    """Every step of every epoch, its boundaries and the end included."""
    left = list(batches_after(done, ROWS, 8, 3, EPOCHS))
    assert left == [(number, batch) for number, batch in enumerate(WHOLE, 1) if number > done]
    for rank in range(2):
        resumed = [rank_micro_batches(batch, rank, 2, 2) for _, batch in left]
        assert resumed == [rank_micro_batches(batch, rank, 2, 2) for batch in WHOLE][done:]


def test_a_resumed_run_continues_the_epoch_that_it_left():
    """Fails if an epoch began anew, or every epoch had one order."""
    epoch, k = 1, 4
    (number, first), *_ = batches_after(epoch * 125 + k, LENGTHS, 8, 3, EPOCHS)
    assert number == 130 and first == epoch_batches(LENGTHS, 8, 3, epoch)[k]
    assert first != epoch_batches(LENGTHS, 8, 3, epoch)[0] and first not in epoch_batches(LENGTHS, 8, 3, 0)


def test_the_column_of_a_dataset_is_read_once():
    """A column of `datasets` costs a read of the disk for each number that is taken from it alone."""

    class Column(list):
        reads = 0

        def __getitem__(self, key):
            Column.reads += 1
            return list(self) if isinstance(key, slice) else super().__getitem__(key)

    assert epoch_batches(Column(LENGTHS), 8, 1, 0) == epoch_batches(LENGTHS, 8, 1, 0)
    assert Column.reads == 1


def test_rows_are_spread():
    assert spread_rows(10, 4) == [0, 2, 5, 7]
    assert spread_rows(3, 32) == [0, 1, 2]
