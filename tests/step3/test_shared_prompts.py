"""Answers to a prompt that go through the models behind it give the numbers of a row each, in a whole PPO run too."""

from __future__ import annotations

import pytest
import torch

from tests.marks import slow
from tests.step3.test_trajectories import assert_same, timeless
from tests.step3.trajectory_checks import record, replayed
from training.utils.errors import UserError
from training.utils.generation import rollouts
from training.utils.sharing.rows import Sharing, tree_mask

ALWAYS = Sharing(1 << 20, 1 << 20)  # where it saves a token
FOUR = {"samples": 4}  # of eight rows


def rollout():
    """Ids, attention and response mask of six answers to three prompts, padded on both sides, out of order."""
    prompts = {"a": [11, 12, 13], "b": [21], "c": [31, 32]}
    answers = [("a", [1, 2]), ("b", [3, 4, 5]), ("a", []), ("c", [6]), ("a", [1, 2]), ("b", [7])]
    ids, mask, response = [], [], []
    for prompt, answer in answers:
        left, right = 3 - len(prompts[prompt]), 3 - len(answer)
        ids.append([0] * left + prompts[prompt] + answer + [0] * right)
        mask.append([0] * left + [1] * (6 - left - right) + [0] * right)
        response.append([True] * len(answer) + [False] * right)
    return torch.tensor(ids), torch.tensor(mask), torch.tensor(response)


def test_shared_rows_hold_every_answer_in_the_columns_of_the_rollout():
    ids, mask, response = rollout()
    shared = rollouts.behind_prompts(ids, mask, response, ALWAYS)
    assert len(shared["shared_ids"]) == 3 and (shared["shared_seen_until"] > 0).sum() < mask.sum()
    own, real = (shared["shared_row"][:, None], shared["shared_columns"]), mask == 1
    assert torch.equal(shared["shared_ids"][own][real], ids[real])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    assert torch.equal(shared["shared_positions"][own][real], positions[real])
    seen = tree_mask(shared["shared_seen_until"])[:, 0]
    for row, columns, own_tokens in zip(shared["shared_row"], shared["shared_columns"], real, strict=True):
        mine = columns[own_tokens].tolist()
        for i, column in enumerate(mine):
            assert seen[row, column].nonzero().flatten().tolist() == mine[: i + 1]


@pytest.mark.parametrize("sharing", [None, Sharing(1, 1 << 20)])
def test_rows_stay_alone_where_a_model_can_not_share_or_its_window_is_shorter(sharing):
    assert rollouts.behind_prompts(*rollout(), sharing) is None


def test_one_answer_to_a_prompt_stays_alone():
    ids, mask, response = (part[[0, 1, 3]] for part in rollout())
    assert rollouts.behind_prompts(ids, mask, response, ALWAYS) is None


def test_columns_without_a_token_are_left_out():
    ids, mask, response = (part[[1, 3, 5]] for part in rollout())  # prompts of one and two tokens, padded to three
    rows = rollouts.seen(ids, mask, response, None)
    assert rows.ids.tolist() == [[0, 21, 3, 4, 5], [31, 32, 6, 0, 0], [0, 21, 7, 0, 0]] and rows.start == 2
    rows = rollouts.seen(ids[1:], mask[1:], response[1:], None)
    assert rows.ids.tolist() == [[31, 32, 6], [0, 21, 7]] and rows.mask.tolist() == [[True], [True]]
    empty = torch.zeros_like(response[:1])
    rows = rollouts.seen(ids[:1], mask[:1] * torch.tensor([1, 1, 1, 0, 0, 0]), empty, None)
    assert rows.ids.tolist() == [[21, 3]] and rows.mask.tolist() == [[False]], "the backward needs a column"


@pytest.fixture(scope="module")
def models(tiny_model, tiny_reward):
    return str(tiny_model), str(tiny_reward)


@pytest.fixture(scope="module")
def recorded(models):
    """Of a row for each answer, in micro-batches of both prompts."""
    history, rows = record(*models, **FOUR)
    assert len({len(tokens) for tokens, _ in rows.values()}) > 1
    return history, rows


def how_often(monkeypatch):
    """Counts (forwards with shared rows, forwards without)."""
    counts, behind_prompts = [0, 0], rollouts.behind_prompts

    def counted(*args):
        shared = behind_prompts(*args)
        counts[shared is None] += 1
        return shared

    monkeypatch.setattr(rollouts, "behind_prompts", counted)
    return counts


@pytest.mark.parametrize("micro_batch", [8, 4, slow(2)])
def test_ppo_is_the_same(models, recorded, monkeypatch, micro_batch):
    history, rows = recorded
    counts = how_often(monkeypatch)
    cut = {"stage": 0, "micro_batch": micro_batch, "accumulation": 8 // micro_batch}
    other = replayed(*models, rows, **cut, **FOUR, shares=True)
    shared, alone = counts
    # actor, reference, reward, critic of five iterations, and actor and critic in the first of two epochs
    assert shared >= 5 * 6 * (8 // micro_batch) and (micro_batch < 8 or not alone)
    assert_same(history, other)
    assert other[0]["policy/first_ratio"] == 1 and other[0]["kl/per_token"] == 0


def test_answers_that_see_each_other_are_noticed(models, recorded, monkeypatch):
    """By the look for models that can share, and where that were blind, by the sampler's log-probs."""
    fault = "answers see each other"
    counts = how_often(monkeypatch)
    assert_same(recorded[0], replayed(*models, recorded[1], stage=0, micro_batch=8, **FOUR, shares=True, fault=fault))
    assert not counts[0]
    monkeypatch.setattr("training.utils.sharing.trial.TOLERANCE", {torch.float32: (1.0, 9.0)})
    with pytest.raises(UserError, match="the sampler is not the policy"):
        replayed(*models, recorded[1], stage=0, micro_batch=8, **FOUR, shares=True, fault=fault)


@pytest.mark.parametrize(("stage", "lora"), [(3, 4), slow(2, 0), slow(3, 0)])
def test_two_ranks_and_stages(models, rank_pair, stage, lora):
    history, rows = record(*models, **FOUR, lora=lora)
    cut = {"stage": stage, "lora": lora, "micro_batch": 4}
    two, other = rank_pair.run(replayed, *models, rows, **cut, **FOUR, shares=True)
    assert timeless(two) == timeless(other)
    assert_same(history, two)


@pytest.mark.parametrize("advantage", ["rloo", slow("grpo")])
def test_advantages_over_other_answers_and_an_entropy_bonus(models, monkeypatch, advantage):
    flags = {"advantage": advantage, "entropy_coef": 0.01}
    history, rows = record(*models, **FOUR, **flags)
    counts = how_often(monkeypatch)
    found = replayed(*models, rows, stage=0, micro_batch=8, shares=True, **FOUR, **flags)
    assert_same(history, found, within=1e-4 if advantage == "grpo" else 1e-5)  # it divides by a group's small spread
    assert counts[0] and not counts[1]
