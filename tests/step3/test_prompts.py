"""Which prompts an iteration takes, and how they are dealt to ranks, batches and optimizer steps."""

import pytest

from training.step3_rlhf_finetuning.prompts import deal, prompt_schedule


def test_every_prompt_is_used_before_any_comes_again():
    schedule = prompt_schedule([5] * 10, 4, epochs=2, iterations=0, seed=1)
    stream = [p for iteration in schedule for p in iteration]
    assert len(schedule) == 5
    assert sorted(stream[:10]) == sorted(stream[10:20]) == list(range(10))
    assert stream[:10] != stream[10:20]
    assert len(prompt_schedule([5] * 3, 8, epochs=1, iterations=2, seed=1)[1]) == 8


def test_an_iteration_takes_prompts_of_like_length_and_another_order_in_every_pass():
    lengths = [10 + (7 * i) % 60 for i in range(60)]
    schedule = prompt_schedule(lengths, 6, epochs=2, iterations=0, seed=1)
    for half in (schedule[:10], schedule[10:]):
        assert sorted(p for iteration in half for p in iteration) == list(range(60))
        padded = sum(6 * max(lengths[p] for p in iteration) for iteration in half)
        assert padded < 1.15 * sum(lengths)  # in a random order 1.5
        means = [sum(lengths[p] for p in iteration) for iteration in half]
        assert means != sorted(means) and means != sorted(means, reverse=True)
    assert {frozenset(i) for i in schedule[:10]} != {frozenset(i) for i in schedule[10:]}


def test_dealing_gives_every_position_once_and_does_not_depend_on_ranks():
    prompts, lengths = [4, 2, 0, 1, 3, 5, 6, 7], [5, 9, 1, 7, 3, 8, 2, 6]
    for ranks, batches in [(1, 2), (2, 1), (2, 2), (4, 1)]:
        dealt = deal(prompts, lengths, ranks, batches)
        positions = [p for batch in dealt for rank in batch for p in rank]
        assert sorted(positions) == list(range(8))
        assert [lengths[prompts[p]] for p in positions] == sorted(lengths)
        assert {len(rank) for batch in dealt for rank in batch} == {8 // (ranks * batches)}


@pytest.mark.parametrize("batches", [1, 2])
def test_an_optimizer_step_takes_the_same_prompts_however_many_ranks_there_are(batches):
    """The first epoch takes each rank's rows in order, over its generation batches."""
    prompts, lengths = list(range(24)), [(7 * i) % 24 for i in range(24)]

    def steps(ranks, per_step=4):
        dealt = deal(prompts, lengths, ranks, batches, per_step)
        own = [[p for batch in dealt for p in batch[rank]] for rank in range(ranks)]
        share = 4 // ranks
        return [sorted(p for mine in own for p in mine[i : i + share]) for i in range(0, 24 // ranks, share)]

    assert steps(1) == steps(2) == steps(4)
    assert steps(1) != steps(2, per_step=0)
    spreads = [lengths[batch[-1]] - lengths[batch[0]] for batch in deal(prompts, lengths, 2, 2, 4)[0]]
    assert max(spreads) < 12  # prompts of like length are still together
