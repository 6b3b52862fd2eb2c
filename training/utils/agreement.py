"""How far judges agree who put the same answers in an order: Krippendorff's alpha over pairs of answers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Agreement:
    """What several judges said of the same answers.

    Attributes:
        alpha: Krippendorff's alpha, 1 where all agree and 0 as by chance; None where nothing can be compared.
        same: share of comparisons in which two judges said the same of two answers: the first, the second, a tie. This
            is the figure of InstructGPT, 73% among its labelers (Ouyang et al. 2022, section 3.4).
        prompts: that two judges or more have put in an order.
    """

    alpha: float | None
    same: float | None
    prompts: int


def krippendorff_alpha(units: Iterable[Sequence[float]]) -> float | None:
    """Krippendorff's alpha with squared differences (Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability").

    Args:
        units: the values that a unit was given, one for each of its judges; units of fewer than two do not count.

    Returns:
        1 - observed / expected disagreement; None if no unit counts, or all values are the same.
    """
    compared = [unit for unit in units if len(unit) > 1]
    count = sum(len(unit) for unit in compared)
    if not count:
        return None
    # sum over ordered pairs of (a - b)^2 = 2 (n sum a^2 - (sum a)^2), within units and over all values
    observed = sum(_squared_differences(unit) / (len(unit) - 1) for unit in compared) / count
    expected = _squared_differences([value for unit in compared for value in unit]) / (count * (count - 1))
    return 1 - observed / expected if expected > 0 else None


def _squared_differences(values: Sequence[float]) -> float:
    return 2 * (len(values) * sum(value * value for value in values) - sum(values) ** 2)


def agreement(rankings: Iterable[Sequence[Sequence[float]]]) -> Agreement:
    """The agreement of judges on pairs of answers: the first is better, the second, or a tie between.

    Each pair counts in both orders, since which of two answers is called the first means nothing.

    Args:
        rankings: for each prompt what each of its judges said: the answers' ranks, all in one order of the answers.
    """
    units: list[list[float]] = []
    said = agreed = prompts = 0
    for judges in rankings:
        prompts += len(judges) > 1
        for i, j in itertools.combinations(range(len(judges[0]) if judges else 0), 2):
            unit = [float((ranks[j] > ranks[i]) - (ranks[j] < ranks[i])) for ranks in judges]
            units += [unit, [-value for value in unit]]
            pairs = list(itertools.combinations(unit, 2))
            said += len(pairs)
            agreed += sum(one == other for one, other in pairs)
    return Agreement(krippendorff_alpha(units), agreed / said if said else None, prompts)
