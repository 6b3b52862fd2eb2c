"""The statistics of a reward model's scores, which step 3 normalises with."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from training.utils.errors import UserError
from training.utils.run.files import write_json

if TYPE_CHECKING:
    import torch

STATS_FILE = "reward_stats.json"
MIN_STD = 1e-6  # a reward model that gives every answer the same score can not be normalised
FEW = 30  # the standard deviation of fewer is off by an eighth and more (1 / sqrt(2 n)), and may be off by anything


def few_held_out(pairs: int) -> str:
    """A warning that the statistics will come from so few held-out pairs; empty where there are enough."""
    if pairs >= FEW:
        return ""
    return (
        f"warning: pairs held out: {pairs}, fewer than {FEW}: a poor measure of the reward model, and a poor scale for "
        "the rewards of step 3; give more data, or --eval_data_path"
    )


@dataclass(frozen=True)
class RewardStats:
    """Mean and standard deviation of the rewards of the held-out chosen responses.

    A few chosen rewards may lie close together by chance, and a standard deviation of 0.015 would make a reward of -28
    of every answer that differs. So with fewer than `FEW` of them the missing ones are taken to spread like *all*
    held-out rewards, the rejected ones included: variance = (n std_chosen^2 + (FEW - n) std_all^2) / FEW, as a scaled
    inverse chi-squared prior that weighs FEW - n rewards would have it (Gelman et al., Bayesian Data Analysis, section
    2.6). From `FEW` on it is the sample's own.

    Attributes:
        mean, std: what step 3 normalises with; standard deviations have n in the denominator.
        count: how many responses.
        dtype: the precision the rewards were computed in.
        std_chosen, std_all: of the chosen, and of all held-out rewards; None in files of earlier versions, whose
            ``std`` is that of the chosen ones however few they are.
    """

    mean: float
    std: float
    count: int
    dtype: str
    std_chosen: float | None = None
    std_all: float | None = None

    @classmethod
    def of(cls, pairs: Sequence[tuple[float, float]], dtype: str) -> RewardStats:
        """Statistics of the raw rewards of (chosen, rejected) responses, at least one pair."""
        chosen = [good for good, _ in pairs]
        own, pooled = statistics.pstdev(chosen), statistics.pstdev([reward for pair in pairs for reward in pair])
        missing = max(FEW - len(chosen), 0)
        variance = (len(chosen) * own**2 + missing * pooled**2) / (len(chosen) + missing)
        return cls(statistics.fmean(chosen), math.sqrt(variance), len(chosen), dtype, own, pooled)

    def line(self) -> str:
        """A line about where ``std`` comes from; empty if it is from enough responses."""
        if self.count >= FEW:
            return ""
        if self.std_chosen is None or self.std_all is None:
            return (
                f"warning: {STATS_FILE} has the standard deviation ({self.std:.3g}) of {self.count} rewards only, as "
                "earlier versions wrote it; run step 2 again, with more held-out pairs (--eval_data_path)"
            )
        return (
            f"{STATS_FILE}: {self.count} preferred rewards, fewer than {FEW}: their standard deviation "
            f"{self.std_chosen:.3g} is drawn towards that of all held-out rewards, {self.std_all:.3g}: {self.std:.3g}"
        )

    def normalise(self, reward: torch.Tensor) -> torch.Tensor:
        """``(reward - mean) / std``: 0 is the typical chosen response, 1 a standard deviation above it."""
        return (reward - self.mean) / self.std

    def write(self, folder: Path) -> None:
        """Write ``reward_stats.json``, whole or not at all."""
        write_json(folder / STATS_FILE, asdict(self))

    @classmethod
    def read(cls, folder: str | Path) -> RewardStats:
        """Read ``reward_stats.json`` from a reward model's folder.

        Raises:
            UserError: it is missing or can not normalise; names the flag to go on without.
        """
        path = Path(folder) / STATS_FILE
        without = "give --no-normalize_reward to train on raw rewards"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            stats = cls(
                float(values["mean"]),
                float(values["std"]),
                int(values["count"]),
                str(values["dtype"]),
                *(None if values.get(key) is None else float(values[key]) for key in ("std_chosen", "std_all")),
            )
        except FileNotFoundError as error:
            raise UserError(f"{path} is missing; step 2 writes it, or {without}") from error
        except (OSError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise UserError(f"{path} is not what step 2 writes ({error}); {without}") from error
        known = [value for value in (stats.mean, stats.std, stats.std_chosen, stats.std_all) if value is not None]
        if not (all(map(math.isfinite, known)) and stats.std > MIN_STD):
            raise UserError(f"{path}: mean {stats.mean} and std {stats.std} can not normalise; {without}")
        return stats
