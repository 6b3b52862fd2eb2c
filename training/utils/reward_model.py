"""What a reward model says about a batch, and the statistics that step 3 normalises with."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from training.utils.errors import UserError

STATS_FILE = "reward_stats.json"
MIN_STD = 1e-6  # a reward model that gives every answer the same score can not be normalised
FEW = 8  # the standard deviation of fewer is off by a quarter and more (1 / sqrt(2 n))


def few_held_out(pairs: int) -> str:
    """A warning that the statistics will come from few rewards, empty where there are enough.

    Args:
        pairs: how many pairs are held out.
    """
    if pairs >= FEW:
        return ""
    return (
        f"warning: pairs held out: {pairs}, a poor scale for the rewards of step 3, which needs at least 2; "
        "give more data, or --eval_data_path"
    )


def last_token_scores(scores: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """The reward of each row: its score at the last response token.

    Args:
        scores: ``[B, T]``, one per token.
        response_mask: ``[B, T]``, 0/1 or bool; a row without any response token gives its score at column 0.

    Returns:
        ``[B]``, in the dtype of ``scores``.
    """
    columns = torch.arange(response_mask.shape[1], device=response_mask.device)
    last = (response_mask.long() * columns).argmax(dim=1)
    return scores.gather(1, last.unsqueeze(1)).squeeze(1)


@dataclass(frozen=True)
class RewardStats:
    """Mean and standard deviation of the rewards of the held-out chosen responses.

    Attributes:
        mean, std: of the raw rewards; ``std`` with n in the denominator.
        count: how many responses.
        dtype: the precision the rewards were computed in.
    """

    mean: float
    std: float
    count: int
    dtype: str

    @classmethod
    def of(cls, rewards: Sequence[float], dtype: str) -> RewardStats:
        """Statistics of a list of raw rewards."""
        mean = sum(rewards) / len(rewards)
        variance = sum((r - mean) ** 2 for r in rewards) / len(rewards)
        return cls(mean, math.sqrt(variance), len(rewards), dtype)

    def normalise(self, reward: torch.Tensor) -> torch.Tensor:
        """``(reward - mean) / std``: 0 is the typical chosen response, 1 a standard deviation above it."""
        return (reward - self.mean) / self.std

    def write(self, folder: Path) -> None:
        """Write ``reward_stats.json``, whole or not at all."""
        scratch = folder / (STATS_FILE + ".tmp")
        scratch.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        scratch.replace(folder / STATS_FILE)

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
            stats = cls(float(values["mean"]), float(values["std"]), int(values["count"]), str(values["dtype"]))
        except FileNotFoundError as error:
            raise UserError(f"{path} is missing; step 2 writes it, or {without}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is not what step 2 writes ({error}); {without}") from error
        if not (math.isfinite(stats.mean) and math.isfinite(stats.std) and stats.std > MIN_STD):
            raise UserError(f"{path}: mean {stats.mean} and std {stats.std} can not normalise; {without}")
        return stats
