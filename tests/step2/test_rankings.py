"""A reward model trained on rankings is one trained on their pairs, each with 1 / (pairs of its prompt)."""

import math

import datasets
import pytest

from tests.marks import slow
from tests.step2.ranking_checks import PAD, fixed_rankings, train_pair_by_pair, train_rankings
from training.step2_reward_model_finetuning.pairs import some_rankings
from training.step2_reward_model_finetuning.preference import pair_metrics
from training.utils.data.batches import collate_pairs, element_lengths, rankings_of
from training.utils.preferences import Pair, judge

TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def pair_by_pair(tiny_model):
    return train_pair_by_pair(str(tiny_model))


def assert_same(found, expected):
    assert found["losses"] == pytest.approx(expected["losses"], abs=TOLERANCE)
    for reward, other in zip(found["rewards"], expected["rewards"], strict=True):
        assert reward == pytest.approx(other, abs=10 * TOLERANCE)
    for name, tensor in expected["state"].items():
        # Adam makes a whole step of a gradient that is rounding alone: single weights may differ by more
        difference = (found["state"][name] - tensor).abs()
        assert difference.mean() < TOLERANCE and difference.max() < 100 * TOLERANCE, name


@pytest.mark.parametrize("micro_batch", [1, 2, slow(5)])
def test_rankings_equal_their_weighted_pairs(pair_by_pair, tiny_model, micro_batch):
    found = train_rankings(str(tiny_model), stage=1, micro_batch=micro_batch)
    assert_same(found, pair_by_pair)
    assert found["sequences"] == 3 * (2 + 3 + 4 + 2 + 5), "an answer goes through the model once"


@pytest.mark.parametrize("micro_batch", [slow(1), 2, slow(5)])
def test_shared_beginnings_leave_the_trajectory(pair_by_pair, tiny_model, micro_batch):
    found = train_rankings(str(tiny_model), stage=1, micro_batch=micro_batch, shares=True)
    assert_same(found, pair_by_pair)
    assert found["sequences"] == 3 * 5 if micro_batch == 1 else found["sequences"] < 3 * 5, "a row for several prompts"


@pytest.mark.parametrize(("stage", "micro_batch"), [(2, 2), (3, 1)])
def test_shared_beginnings_on_two_ranks(pair_by_pair, tiny_model, rank_pair, stage, micro_batch):
    first, second = rank_pair.run(train_rankings, str(tiny_model), stage=stage, micro_batch=micro_batch, shares=True)
    assert_same(first, pair_by_pair)
    assert first["rewards"] == second["rewards"] and first["sequences"] + second["sequences"] <= 3 * 5


@pytest.mark.parametrize(("stage", "micro_batch"), [slow(1, 1), (2, 2), slow(3, 1)])
def test_rankings_on_two_ranks_equal_their_weighted_pairs(pair_by_pair, tiny_model, rank_pair, stage, micro_batch):
    """Five prompts on two ranks: one of them has a filler."""
    first, second = rank_pair.run(train_rankings, str(tiny_model), stage=stage, micro_batch=micro_batch)
    assert_same(first, pair_by_pair)
    assert first["rewards"] == second["rewards"] and first["metrics"] == second["metrics"]


def test_pairs_that_each_count_once_would_not_pass(pair_by_pair, tiny_model):
    with pytest.raises(AssertionError):
        assert_same(train_rankings(str(tiny_model), stage=1, micro_batch=2, fault=True), pair_by_pair)


def test_metrics_of_rankings_are_means_over_prompts(pair_by_pair):
    rows, rewards = fixed_rankings(), pair_by_pair["rewards"]
    right, losses = {}, {}
    for row, (good, bad) in zip(rows, rewards, strict=True):
        right.setdefault(row["source"], []).append(float(good > bad))
        losses.setdefault(row["source"], []).append(math.log1p(math.exp(bad - good)))
    means = [sum(of_prompt) / len(of_prompt) for of_prompt in right.values()]
    found = pair_metrics(rewards, [1 / row["pairs"] for row in rows])
    assert found["accuracy"] == pytest.approx(sum(means) / 5)
    assert found["loss"] == pytest.approx(sum(sum(x) / len(x) for x in losses.values()) / 5, abs=TOLERANCE)
    pairs = [
        Pair(i, row["source"], good, bad, 1, 2, 1 / row["pairs"])
        for i, (row, (good, bad)) in enumerate(zip(rows, rewards, strict=True))
    ]
    judged = judge(pairs)
    assert judged["accuracy"] == pytest.approx(sum(means) / 5) and judged["prompts"] == pytest.approx(5)
    assert {name: group["accuracy"] for name, group in judged["by_source"].items()} == pytest.approx(
        dict(zip(right, means, strict=True))
    )


def test_an_answer_stands_in_a_batch_once():
    rows = fixed_rankings()[:4]  # a pair and a ranking of three
    batch = collate_pairs(rows, PAD)
    ids, attention = batch["input_ids"], batch["attention_mask"]
    for n, row in enumerate(rows):
        for name in ("chosen", "rejected"):
            place = batch[name][n]
            assert ids[place][attention[place] == 1].tolist() == row[f"{name}_ids"]
    assert len(ids) == 5 and batch["weights"].tolist() == pytest.approx([1, 1 / 3, 1 / 3, 1 / 3])


def test_rankings_stay_whole():
    dataset = datasets.Dataset.from_list(fixed_rankings())
    rankings = rankings_of(dataset)
    assert [len(rows) for rows in rankings] == [1, 3, 6, 1, 9]
    assert element_lengths(dataset) == [max(dataset["length"][i] for i in rows) for rows in rankings]
    some = some_rankings(dataset, 2)
    assert [len(rows) for rows in rankings_of(some)] == [1, 6] and set(some["source"]) == {"s0", "s2"}
