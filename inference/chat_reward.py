"""The reward of an answer, by a reward model of step 2 (or any sequence classifier with one output)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from chat_models import DTYPES, LOAD_ERRORS
from transformers import PreTrainedTokenizerBase

from training.utils.data import render
from training.utils.errors import UserError
from training.utils.models import TokenScorer, load_classifier, load_tokenizer, resolve_model

STATS = "reward_stats.json"


@dataclass(frozen=True)
class RewardModel:
    """Scores conversations, one at a time, so that no padding is involved.

    Attributes:
        mean, std: of the rewards of step 2's held-out chosen responses; None without ``reward_stats.json``,
            and then rewards are raw scores.
    """

    scorer: TokenScorer
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    mean: float | None
    std: float | None

    def score(self, messages: Sequence[dict[str, str]]) -> float | None:
        """Reward of the last message, an assistant's: the score at its last token, normalised as in step 3.

        The conversation is rendered anew in the reward model's own template, so the chat model's tokenizer may
        be another one. An answer that was cut is scored as if it ended there. The oldest turns are left out where
        the model has no positions for them; None if even the last one is too long.
        """
        limit = getattr(self.scorer.config, "max_position_embeddings", None)
        kept = list(messages)
        start = 1 if kept and kept[0]["role"] == "system" else 0
        row = render(self.tokenizer, kept).input_ids
        while limit is not None and len(row) > limit:
            if len(kept) - start <= 2:
                return None
            del kept[start : start + 2]
            row = render(self.tokenizer, kept).input_ids
        ids = torch.tensor([row], device=self.device)
        with torch.inference_mode():
            raw = float(self.scorer(ids, torch.ones_like(ids))[0, -1])
        return raw if self.mean is None or self.std is None else (raw - self.mean) / self.std


def load_reward_model(path: str, report: Callable[[str], None]) -> RewardModel:
    """Load a reward model and its normalisation, in the precision in which step 2 measured the latter.

    Args:
        path: folder or hub name.
        report: gets one line of progress.

    Raises:
        UserError: no model there, more than one output, or a damaged ``reward_stats.json``.
    """
    folder = resolve_model(path, "--reward_model")
    mean, std, dtype = _stats(Path(folder) / STATS)
    report(f"loading the reward model from {path} ...")
    tokenizer = load_tokenizer(folder)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        classifier: Any = load_classifier(folder, dtype=dtype, pad_token_id=int(tokenizer.pad_token_id or 0))
    except LOAD_ERRORS as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"--reward_model {path}: can not be loaded: {line}") from error
    scorer = TokenScorer(classifier.to(device).eval().requires_grad_(False))
    return RewardModel(scorer, tokenizer, device, mean, std)


def _stats(file: Path) -> tuple[float | None, float | None, str]:
    """Mean, standard deviation and precision; no numbers and fp32 where step 2 left none."""
    if not file.is_file():
        return None, None, "fp32"
    try:
        stats = json.loads(file.read_text())
        mean, std, dtype = float(stats["mean"]), float(stats["std"]), stats.get("dtype", "fp32")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged: expected mean and std ({type(error).__name__})") from error
    if not std > 0:
        raise UserError(f"{file}: std is {std:g}, it must be above 0")
    return mean, std, dtype if dtype in DTYPES and dtype != "auto" else "fp32"
