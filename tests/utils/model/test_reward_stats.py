"""reward_stats.json from few pairs: what step 2 writes, and what is said about it."""

import json
import math

import pytest

from training.utils.model.reward_stats import FEW, STATS_FILE, RewardStats, few_held_out

# Four preferred answers that happen to lie within 0.03 of each other; the rejected ones lie 0.6 below
FOUR = [(0.50, -0.10), (0.53, -0.05), (0.51, 0.02), (0.49, -0.15)]


def test_a_few_rewards_that_lie_together_do_not_set_the_scale(tmp_path):
    stats = RewardStats.of(FOUR, "fp32")
    assert stats.std_chosen == pytest.approx(0.0148, abs=1e-4)
    assert stats.std_all == pytest.approx(0.293, abs=1e-3)
    assert stats.std == pytest.approx(math.sqrt((4 * stats.std_chosen**2 + 26 * stats.std_all**2) / 30))
    assert -3 < (-0.1 - stats.mean) / stats.std < -1  # a rejected answer's reward; -41 by the preferred ones alone
    assert "4 preferred rewards, fewer than 30" in stats.line() and "0.0148" in stats.line()
    stats.write(tmp_path)
    assert RewardStats.read(tmp_path) == stats


def test_one_pair_has_a_scale():
    assert RewardStats.of([(1.0, -1.0)], "fp32").std == pytest.approx(math.sqrt(29 / 30))


def test_enough_pairs_have_their_own_scale_and_there_is_no_jump():
    pairs = [(0.1 * (-1) ** i, -2.0) for i in range(FEW)]
    stats = RewardStats.of(pairs, "fp32")
    assert (stats.std, stats.line()) == (pytest.approx(0.1), "")
    assert stats.std_all > 1
    stds = [RewardStats.of(pairs[:n], "fp32").std for n in (FEW, FEW - 2, FEW // 2, 4)]
    assert stds == sorted(stds) and stds[1] < 0.3


def test_a_file_of_an_earlier_version_is_read_and_warned_about(tmp_path):
    old = {"mean": 0.5, "std": 0.0148, "count": 4, "dtype": "fp32"}
    (tmp_path / STATS_FILE).write_text(json.dumps(old))
    stats = RewardStats.read(tmp_path)
    assert (stats.std, stats.std_chosen) == (0.0148, None)
    assert stats.line().startswith("warning: ") and "of 4 rewards only" in stats.line()
    (tmp_path / STATS_FILE).write_text(json.dumps(old | {"count": 160}))
    assert RewardStats.read(tmp_path).line() == ""


def test_few_held_out_pairs_are_said_before_training():
    assert "pairs held out: 6, fewer than 30" in few_held_out(6)
    assert few_held_out(FEW) == ""
