"""The reward of an answer, by a reward model of step 2 (or any sequence classifier with one output)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from chat_models import LOAD_ERRORS

from training.utils.arguments import AUTO
from training.utils.engine.precision import for_device
from training.utils.engine.zero_config import DTYPES
from training.utils.errors import UserError
from training.utils.model.loading import resolve_model
from training.utils.model.reward_stats import STATS_FILE
from training.utils.model.text_reward import TextRewardModel, load_text_reward_model


@dataclass(frozen=True)
class RewardModel:
    """Scores conversations, one at a time, so that no padding is involved.

    Attributes:
        model: reads text, so the chat model's tokenizer may be another one.
        mean, std: of the rewards of step 2's held-out chosen responses; None without ``reward_stats.json``,
            and then rewards are raw scores.
    """

    model: TextRewardModel
    mean: float | None
    std: float | None

    def score(self, messages: Sequence[dict[str, str]]) -> float:
        """Reward of the last message, an assistant's, normalised as in step 3."""
        raw = self.model.rewards([messages], 1).item()
        return raw if self.mean is None or self.std is None else (raw - self.mean) / self.std


def load_reward_model(path: str, report: Callable[[str], None]) -> RewardModel:
    """Load a reward model and its normalisation, in the precision of step 2 if the hardware computes in it.

    Args:
        path: folder or hub name.
        report: gets one line of progress.

    Raises:
        UserError: no model there, more than one output, or a damaged ``reward_stats.json``.
    """
    folder = resolve_model(path, "--reward_model")
    mean, std, dtype = _stats(Path(folder) / STATS_FILE)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    best, _ = for_device(AUTO, device)
    dtype = dtype if dtype in ("fp32", best) else best  # emulated, it would be slower than rounding is wrong
    report(f"loading the reward model from {path} in {dtype} ...")
    try:
        return RewardModel(load_text_reward_model(folder, dtype=dtype, device=device), mean, std)
    except (*LOAD_ERRORS, UserError) as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"--reward_model {path}: can not be loaded: {line}") from error


def _stats(file: Path) -> tuple[float | None, float | None, str]:
    """Mean, standard deviation and precision; no numbers and fp32 where step 2 left none."""
    if not file.is_file():
        return None, None, "fp32"
    try:
        stats = json.loads(file.read_text())
        mean, std, dtype = float(stats["mean"]), float(stats["std"]), stats.get("dtype", "fp32")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{file} is damaged: expected mean and std ({type(error).__name__})") from error
    if not (std > 0 and math.isfinite(std) and math.isfinite(mean)):
        raise UserError(f"{file}: mean is {mean:g} and std {std:g}, which must be above 0; neither may be infinite")
    return mean, std, dtype if dtype in DTYPES else "fp32"
