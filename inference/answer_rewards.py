"""What answers are worth: a reward model's scores, users' functions, or several of them with weights, as in step 3."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from training.step3_rlhf_finetuning.reward_functions import (
    Messages,
    call_text_function,
    check_without_model,
    parse_reward_functions,
)
from training.utils.arguments import AUTO
from training.utils.engine.precision import for_device
from training.utils.errors import UserError
from training.utils.model import classifiers, loading
from training.utils.model.reward_stats import STATS_FILE, RewardStats
from training.utils.model.text_reward import TextRewardModel, load_text_reward_model
from training.utils.run.distributed import say


class AnswerRewards:
    """The sources of an answer's reward, added up as in step 3: the model's scores normalised, all with weights.

    Args:
        model: of ``--reward_model``, empty without one.
        specs: of ``--reward_function``; without both it is a reward of nothing.

    Raises:
        UserError: no such model or function, or a language model where a reward model is asked for.
    """

    def __init__(self, model: str, specs: Sequence[str]) -> None:
        if specs and not model:
            check_without_model(specs, "--reward_model")
        self.functions, self.weight = parse_reward_functions(specs, "--reward_function")
        self.path = loading.resolve_model(model, "--reward_model") if model else ""
        if self.path:
            classifiers.check_reward_head(self.path)
            classifiers.scores_tokens(self.path)  # a family without a classifier, or with several outputs, is refused
        has_stats = self.path and (Path(self.path) / STATS_FILE).is_file()
        self.stats = RewardStats.read(self.path) if has_stats else None
        self.model: TextRewardModel | None = None

    def load(self, device: torch.device) -> None:
        """Load the reward model, if there is one and it has not been loaded."""
        if not self.path or self.model is not None:
            return
        best, _ = for_device(AUTO, device)
        dtype = self.stats.dtype if self.stats is not None and self.stats.dtype in ("fp32", best) else best
        if self.stats is None and self.functions:
            say(f"warning: {self.path} has no {STATS_FILE}: its raw scores are added to the functions' values")
        try:
            self.model = load_text_reward_model(self.path, dtype=dtype, device=device)
        except UserError as error:
            raise UserError(f"--reward_model {self.path}: can not be loaded: {error}") from error

    def score(self, messages: Messages) -> float:
        """The reward of the last message, an assistant's, alone in its batch."""
        *prompt, answer = messages
        return float(self.of([prompt], [answer["content"]], [{}], 1)[0]["reward"])

    def of(
        self,
        prompts: Sequence[Messages],
        responses: Sequence[str],
        rows: Sequence[dict[str, Any]],
        batch_size: int,
    ) -> list[dict[str, Any]]:
        """For each response its ``reward``, and ``rewards`` by source where there are several; {} without any source.

        Raises:
            UserError: a function fails, or returns no finite numbers.
        """
        values: dict[str, list[float]] = {}
        total = torch.zeros(len(responses), dtype=torch.float64)
        if self.model is not None:
            conversations = [
                [*prompt, {"role": "assistant", "content": text}]
                for prompt, text in zip(prompts, responses, strict=True)
            ]
            raw = self.model.rewards(conversations, batch_size)
            raw = self.stats.normalise(raw) if self.stats is not None else raw
            values["model"] = raw.tolist()
            total += self.weight * raw.double()
        for name, (function, weight) in self.functions.items():
            values[name] = call_text_function(function, prompts, responses, rows, f"--reward_function {name}")
            total += weight * torch.tensor(values[name], dtype=torch.float64)
        if not values:
            return [{} for _ in responses]
        sources = [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]
        several = len(values) > 1
        return [
            {"reward": reward} | ({"rewards": by_source} if several else {})
            for reward, by_source in zip(total.tolist(), sources, strict=True)
        ]
