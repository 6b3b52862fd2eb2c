"""Best-of-n and step 3's evaluation on tiny cases, by hand."""

import math

import pytest

from training.step3_rlhf_finetuning.best_of_n import best_of_kl, chosen_of, kl_to_reach, parse_counts
from training.step3_rlhf_finetuning.evaluate import assemble, judged_by
from training.step3_rlhf_finetuning.evaluation import Answer
from training.utils.errors import UserError


def test_kl_of_best_of_n():
    assert best_of_kl(1) == 0
    assert best_of_kl(4) == pytest.approx(math.log(4) - 0.75)
    # n equally likely, equally good answers: the best of n is the first; P(best) of the top of m answers by counting
    m, n = 1000, 4
    top = [((i / m) ** n - ((i - 1) / m) ** n) for i in range(1, m + 1)]  # P(the i-th best of m is the maximum of n)
    exact = sum(p * math.log(p * m) for p in top)
    assert best_of_kl(n) == pytest.approx(exact, abs=5e-3)


def test_counts():
    assert parse_counts("16,1,4,4", "--best_of") == [1, 4, 16]
    assert parse_counts(" ", "--best_of") == []
    for text in ("1,x", "0", "-2", "4,", "3,4"):
        with pytest.raises(UserError, match="--best_of"):
            parse_counts(text, "--best_of")


def test_groups_of_n_choose_by_reward():
    rewards = [0.1, 0.9, 0.5, 0.5]
    assert chosen_of(rewards, 1) == [0, 1, 2, 3]
    assert chosen_of(rewards, 2) == [1, 2]
    assert chosen_of(rewards, 4) == [1]


def test_kl_at_which_a_reward_is_reached():
    curve = [(0.0, 0.0), (2.0, 0.4), (6.0, 0.8), (9.0, 0.7)]
    assert kl_to_reach(curve, 0.6) == pytest.approx(4.0)
    assert kl_to_reach(curve, 0.4) == pytest.approx(2.0)
    assert kl_to_reach(curve, 0.9) is None
    assert kl_to_reach(curve, -1) == 0.0


def table(lengths, kl=None):
    return [[Answer(i, "", 0.0, True, n, kl) for n in row] for i, row in enumerate(lengths)]


def test_entries_by_hand():
    drawn = {"sft": table([[10], [20]]), "rlhf": table([[30], [40]], kl=2.0), "best_of": table([[1, 2], [3, 4]])}
    judged = {
        "reward": {"sft": [[0.0], [1.0]], "rlhf": [[1.0], [1.0]], "best_of": [[0.5, -1.0], [0.0, 2.0]]},
        "function": {"sft": [[0.5], [0.5]], "rlhf": [[0.0], [1.0]], "best_of": [[0.5, 1.0], [1.0, 0.0]]},
    }
    found = assemble(drawn, judged, [1, 2], seed=0)["models"]
    assert list(found) == ["SFT", "RLHF", "best of 1", "best of 2"]
    assert found["SFT"] == {
        "kl": 0.0,
        "length": 15,
        "eos_rate": 1.0,
        "reward": 0.5,
        "reward_interval": [0.0, 1.0],
        "function": 0.5,
        "function_interval": [0.5, 0.5],
    }
    rlhf = found["RLHF"]
    assert (rlhf["kl"], rlhf["reward"], rlhf["win_rate_by_reward"], rlhf["win_rate_by_function"]) == (2, 1, 0.75, 0.5)
    assert rlhf["win_rate_by_reward_interval"] == [0.5, 1.0]
    one, two = found["best of 1"], found["best of 2"]
    assert (one["length"], one["reward"], one["kl"]) == (2.5, 0.375, 0)
    assert one["win_rate_by_reward"] == ((1 + 0) / 2 + (0 + 1) / 2) / 2
    # best of 2 takes draw 0 of the first prompt and draw 1 of the second
    assert (two["length"], two["reward"], two["function"]) == (2.5, 1.25, 0.25)
    assert (two["win_rate_by_reward"], two["win_rate_by_function"]) == (1.0, 0.25)
    assert two["kl"] == pytest.approx(math.log(2) - 0.5)


def test_a_judge_is_called_once_with_all_answers():
    calls = []

    def judge(answers):
        calls.append(len(answers))
        return [float(a.length) for a in answers]

    assert judged_by(judge, {"a": table([[1], [2]]), "b": table([[3, 4], [5, 6]])}) == {
        "a": [[1.0], [2.0]],
        "b": [[3.0, 4.0], [5.0, 6.0]],
    }
    assert calls == [6]
