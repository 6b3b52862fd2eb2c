"""Means with their 95% intervals, correlations, histograms: what evaluations and reports say about rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

RESAMPLES = 2000  # of each bootstrap
DRAWS = 1 << 21  # of rows, at once: all of 100,000 rows would take gigabytes
Z95 = 1.959964
FEW_ROWS = 30  # fewer are too few for a bootstrap


def mean(values: Sequence[float], weights: Sequence[float] | None = None) -> float:
    """The arithmetic mean of at least one value, each with its weight if there are weights."""
    if weights is None:
        return sum(values) / len(values)
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)


def bootstrap_interval(values: Sequence[float], weights: Sequence[float] | None = None, *, seed: int) -> list[float]:
    """95% percentile bootstrap interval of a mean over rows (Efron and Tibshirani 1993, chapter 13).

    Args:
        values: one for each row; with ``weights``, each row's sum.
        weights: each row's count, for a mean over its parts, such as the tokens of a response.

    Returns:
        Lower and upper end.
    """
    import torch  # here, because train.py and the report need none of it and answer without packages

    value = torch.tensor(values, dtype=torch.float64)
    weight = torch.ones_like(value) if weights is None else torch.tensor(weights, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    means = []
    for piece in torch.empty(RESAMPLES).split(max(DRAWS // len(value), 1)):
        draws = torch.randint(len(value), (len(piece), len(value)), generator=generator)
        means.append(value[draws].sum(1) / weight[draws].sum(1).clamp(min=1e-12))
    return torch.quantile(torch.cat(means), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()


def wilson_interval(share: float, count: float) -> list[float]:
    """95% interval of a share (Wilson 1927): unlike the bootstrap's it is not a point where every row is right."""
    centre = share + Z95**2 / (2 * count)
    half = Z95 * math.sqrt(share * (1 - share) / count + Z95**2 / (4 * count**2))
    scale = 1 + Z95**2 / count
    return [max((centre - half) / scale, 0.0), min((centre + half) / scale, 1.0)]


def share_interval(values: Sequence[float], *, seed: int) -> list[float]:
    """95% interval of a mean of shares, each 0 to 1: the bootstrap's, below `FEW_ROWS` rows or of equal ones Wilson's.

    The bootstrap of a few rows is too narrow, and a point where they all agree. Wilson's takes each row for a yes or a
    no; values between 0 and 1 spread less than these, so the interval is at worst too wide.
    """
    if len(values) < FEW_ROWS or len(set(values)) == 1:
        return wilson_interval(mean(values), len(values))
    return bootstrap_interval(values, seed=seed)


def half_ties(a: float, b: float) -> float:
    """1 if a is above b, 0.5 if they are equal, else 0."""
    return (a > b) + 0.5 * (a == b)


def win_rate(ours: Sequence[float], theirs: Sequence[float], *, seed: int) -> dict[str, Any]:
    """Share of prompts at which ours is worth more, a tie half, with a 95% interval over prompts.

    Args:
        ours, theirs: one value for each prompt, in the same order.

    Returns:
        ``win_rate``, ``win_rate_low``, ``win_rate_high`` (see `share_interval`), and how many ``ties``.
    """
    pairs = list(zip(ours, theirs, strict=True))
    wins = [half_ties(a, b) for a, b in pairs]
    low, high = share_interval(wins, seed=seed)
    ties = sum(a == b for a, b in pairs)
    return {"win_rate": mean(wins), "win_rate_low": low, "win_rate_high": high, "ties": ties}


def correlation(a: Sequence[float], b: Sequence[float], weights: Sequence[float] | None = None) -> float:
    """Pearson's correlation, each point with its weight if there are weights; 0 where one of the two does not vary."""
    import numpy as np

    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    root = np.sqrt(np.ones_like(x) if weights is None else np.asarray(weights, np.float64))
    x, y = (root * (values - np.average(values, weights=root**2)) for values in (x, y))
    spread = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / spread if spread > 0 else 0.0


def histogram(values: Sequence[float], bins: int = 20) -> dict[str, list[float]]:
    """``edges`` (one more than bins, from the least to the greatest value) and ``counts``."""
    import numpy as np

    counts, edges = np.histogram(np.asarray(values, np.float64), bins=bins)
    return {"edges": edges.tolist(), "counts": counts.tolist()}
