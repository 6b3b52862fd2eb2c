"""Sequence rewards, user functions and win rates."""

import pickle
import sys

import pytest
import torch

from training.step3_rlhf_finetuning.prompts import deal, prompt_schedule
from training.step3_rlhf_finetuning.rewards import call_text_function, load_text_function, sequence_scores, win_rate
from training.step3_rlhf_finetuning.rlhf_arguments import RolloutArguments
from training.step3_rlhf_finetuning.rollout import RolloutBatch, has_ended
from training.step3_rlhf_finetuning.settings import prompts_per_step
from training.utils.errors import UserError
from training.utils.reward_model import RewardStats


def test_scores_are_normalised_then_clipped_then_penalised():
    raw, ended = torch.tensor([1.0, 3.0, 9.0]), torch.tensor([True, True, False])
    stats = RewardStats(1.0, 2.0, 5, "fp32")
    scores = sequence_scores(stats.normalise(raw), ended, clip_reward=2.5, missing_eos_penalty=0.5)
    assert scores.tolist() == [0.0, 1.0, 2.0]
    assert sequence_scores(raw, ended, clip_reward=0, missing_eos_penalty=0).tolist() == [1.0, 3.0, 9.0]


@pytest.mark.parametrize("pad", [0, 2])
def test_the_end_token_is_found_with_pad_equal_to_eos_and_not(pad):
    ids = torch.tensor([[9, 9, 5, 2, pad], [9, 9, 5, 6, 7], [9, 9, pad, pad, pad]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]], dtype=torch.bool)
    rollout = RolloutBatch(ids, torch.ones_like(ids), 2, mask, torch.zeros(3, 3))
    assert has_ended(rollout, (2,)).tolist() == [True, False, False]


def test_win_rate_counts_a_tie_half():
    result = win_rate([1.0, 2.0, 3.0, 4.0], [0.0, 2.0, 5.0, 1.0], seed=0)
    assert result["win_rate"] == (1 + 0.5 + 0 + 1) / 4
    assert result["win_rate_low"] <= result["win_rate"] <= result["win_rate_high"]
    sure = win_rate([1.0] * 50, [0.0] * 50, seed=0)
    assert (sure["win_rate_low"], sure["win_rate_high"]) == (1.0, 1.0)


PROMPTS = [[{"role": "user", "content": f"p{i}"}] for i in range(3)]
ANSWERS = ["a", "bb", "ccc"]


def test_a_function_is_loaded_and_called(tmp_path):
    (tmp_path / "f.py").write_text("def size(prompts, responses, rows):\n    return [len(r) for r in responses]\n")
    function = load_text_function(f"{tmp_path}/f.py:size", "--eval_function")
    assert call_text_function(function, PROMPTS, ANSWERS, [{}] * 3, "--eval_function") == [1.0, 2.0, 3.0]


DATACLASS = """from __future__ import annotations
from dataclasses import dataclass
import json
import lies_beside_{0}

@dataclass
class Length:
    value: float

def size(prompts, responses, rows):
    import lies_beside_too_{0}
    assert json.loads("1") == 1
    return [Length(lies_beside_{0}.times * lies_beside_too_{0}.times * len(r)).value for r in responses]
"""


def test_a_function_file_may_define_dataclasses_and_import_what_lies_beside_it(tmp_path, monkeypatch):
    """Under a name of its own: the files may be called like modules of Python and of the project."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    before, functions = {name: sys.modules[name] for name in ("json", "training")}, []
    for name, times in (("json", 2), ("training", 3)):
        (tmp_path / f"{name}.py").write_text(DATACLASS.format(name))
        (tmp_path / f"lies_beside_{name}.py").write_text(f"times = {times}\n")
        (tmp_path / f"lies_beside_too_{name}.py").write_text("times = 1\n")
        functions.append(load_text_function(f"{tmp_path}/{name}.py:size", "--eval_function"))
    for function, times in zip(functions, (2, 3), strict=True):
        assert call_text_function(function, PROMPTS, ANSWERS, [{}] * 3, "--eval_function") == [
            times,
            times * 2,
            times * 3,
        ]
        length = function.__globals__["Length"](1.0)
        assert pickle.loads(pickle.dumps(length)) == length
    assert sys.path[-1] == str(tmp_path) and sys.path.count(str(tmp_path)) == 1
    assert {name: sys.modules[name] for name in before} == before


def test_a_file_that_fails_leaves_no_module(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "f.py").write_text("1 / 0\n")
    before = set(sys.modules)
    with pytest.raises(UserError, match="ZeroDivisionError"):
        load_text_function(f"{tmp_path}/f.py:size", "--eval_function")
    assert set(sys.modules) == before


def broken_at_two(prompts, responses, rows):
    return [1 / (len(r) - 2) for r in responses]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda p, r, rows: [1.0], "1 values for 3"),
        (lambda p, r, rows: [1.0, float("nan"), 1.0], "row 1"),
        (lambda p, r, rows: [1.0, 1.0, "good"], "row 2"),
        (lambda p, r, rows: [None, 1.0, 1.0], "row 0"),
        (broken_at_two, "at row 1, prompt 'p1', response 'bb'"),
    ],
)
def test_a_bad_function_is_one_line_that_names_the_row(function, words):
    with pytest.raises(UserError, match=words):
        call_text_function(function, PROMPTS, ANSWERS, [{}] * 3, "--eval_function")


def test_every_prompt_is_used_before_any_comes_again():
    schedule = prompt_schedule(10, 4, epochs=2, iterations=0, seed=1)
    stream = [p for iteration in schedule for p in iteration]
    assert len(schedule) == 5
    assert sorted(stream[:10]) == sorted(stream[10:20]) == list(range(10))
    assert stream[:10] != stream[10:20]
    assert len(prompt_schedule(3, 8, epochs=1, iterations=2, seed=1)[1]) == 8


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


def test_a_step_of_half_a_prompt_can_not_be_dealt():
    rollout = RolloutArguments(samples_per_prompt=4)
    assert prompts_per_step(rollout, {"rows per step": 16}, 2) == 4
    assert prompts_per_step(rollout, {"rows per step": 16}, 4) == 4
    assert (
        prompts_per_step(rollout, {"rows per step": 6}, 1) == prompts_per_step(rollout, {"rows per step": 12}, 2) == 0
    )
