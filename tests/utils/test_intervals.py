"""Intervals, correlations and histograms against known numbers."""

from __future__ import annotations

import pytest
import torch

from training.utils import intervals


def test_wilson_interval():
    # Brown, Cai and DasGupta 2001's way of writing it, at 8 of 10: (8 + 1.92) / 13.84 +- 1.96 / 13.84 * sqrt(2.5604)
    assert intervals.wilson_interval(0.8, 10) == pytest.approx([0.4902, 0.9433], abs=1e-4)
    low, high = intervals.wilson_interval(1.0, 10)
    assert (low, high) == (pytest.approx(10 / (10 + 1.959964**2)), pytest.approx(1.0))


def test_a_bootstrap_in_pieces_is_the_same_and_holds_a_piece(monkeypatch):
    values, weights = [float(n % 7) for n in range(30)], [1.0 + n % 3 for n in range(30)]
    whole, made = intervals.bootstrap_interval(values, weights, seed=0), []
    randint = torch.randint
    monkeypatch.setattr(torch, "randint", lambda *args, **more: made.append(randint(*args, **more)) or made[-1])
    monkeypatch.setattr(intervals, "DRAWS", 1000)
    assert intervals.bootstrap_interval(values, weights, seed=0) == whole
    assert max(draws.numel() for draws in made) <= 1000 and sum(map(len, made)) == intervals.RESAMPLES


def test_bootstrap_interval_of_a_mean_and_of_a_ratio():
    assert intervals.bootstrap_interval([2.0] * 9, seed=0) == [2.0, 2.0]
    low, high = intervals.bootstrap_interval([0.0] * 50 + [1.0] * 50, seed=0)
    assert (low, high) == (pytest.approx(0.4, abs=0.02), pytest.approx(0.6, abs=0.02))  # 0.5 +- 1.96 * 0.05
    # every row has a mean of 3 a token, so every resample has, however the lengths differ
    assert intervals.bootstrap_interval([3.0, 30.0, 300.0], [1, 10, 100], seed=0) == pytest.approx([3.0, 3.0])


def test_correlation():
    assert intervals.correlation([1, 2, 3], [2, 4, 6]) == pytest.approx(1)
    assert intervals.correlation([1, 2, 3], [1, -2, 1]) == pytest.approx(0)
    assert intervals.correlation([0, 0, 3], [1, 2, 1.5]) == pytest.approx(0)
    assert intervals.correlation([1, 1], [1, 2]) == 0


def test_histogram():
    assert intervals.histogram([0, 1, 2, 4, 4], bins=4) == {"edges": [0, 1, 2, 3, 4], "counts": [1, 1, 1, 2]}
    assert sum(intervals.histogram([5, 5], bins=3)["counts"]) == 2


def test_win_rate_counts_a_tie_half():
    result = intervals.win_rate([1.0, 2.0, 3.0, 4.0], [0.0, 2.0, 5.0, 1.0], seed=0)
    assert result["win_rate"] == (1 + 0.5 + 0 + 1) / 4
    assert (result["win_rate_low"], result["win_rate_high"]) == pytest.approx((0.2194, 0.9081), abs=1e-4)  # Wilson's
    assert result["ties"] == 1
    sure = intervals.win_rate([1.0] * 50, [0.0] * 50, seed=0)
    assert (sure["win_rate_low"], sure["win_rate_high"]) == pytest.approx((0.9287, 1.0), abs=1e-4)  # not sure
