"""Best-of-n: of n answers of the SFT model the one with the highest reward. No training, a yardstick for PPO.

How far the chosen answers are from the SFT model's is known without measuring: KL = log n - (n - 1) / n nats per
answer (Stiennon et al. 2020, arXiv 2009.01325, appendix G.3; an upper bound that is close for long answers, Beirami et
al. 2024, arXiv 2401.01879).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from training.utils.errors import UserError


def best_of_kl(n: int) -> float:
    """KL of best-of-n to the model that it draws from, in nats per answer."""
    return math.log(n) - (n - 1) / n


def parse_counts(text: str, flag: str) -> list[int]:
    """``1,4,16`` -> [1, 4, 16], in rising order and each once; empty text gives none.

    Raises:
        UserError: not whole numbers from 1 on, or the largest is no multiple of another.
    """
    try:
        counts = sorted({int(part) for part in text.split(",")}) if text.strip() else []
    except ValueError:
        counts = [0]
    if any(n < 1 for n in counts):
        raise UserError(f"{flag} {text}: write whole numbers from 1 on with commas between them, such as 1,4,16")
    for n in counts:
        if counts[-1] % n:
            raise UserError(
                f"{flag} {text}: {n} does not divide {counts[-1]}; all share the same {counts[-1]} answers to a prompt"
            )
    return counts


def chosen_of(rewards: Sequence[float], n: int) -> list[int]:
    """Cut a prompt's answers into groups of n; the position of the highest reward in each (the first of equal ones).

    With more answers than n every group is one draw of best-of-n, and a mean over groups has less noise.
    """
    groups = [range(start, start + n) for start in range(0, len(rewards) - n + 1, n)]
    return [max(group, key=lambda i: rewards[i]) for group in groups]


def kl_to_reach(curve: Sequence[tuple[float, float]], reward: float) -> float | None:
    """The KL at which a run first reaches a reward, between two evaluations on the straight line between them.

    Args:
        curve: (KL, reward) of each evaluation, in the order of training.
        reward: to be reached.

    Returns:
        None if no evaluation reaches it.
    """
    for i, (kl, value) in enumerate(curve):
        if value >= reward:
            if i == 0 or curve[i - 1][1] >= value:
                return kl
            before_kl, before = curve[i - 1]
            return before_kl + (kl - before_kl) * (reward - before) / (value - before)
    return None
