"""Where rewards come from: a reward model, Python functions, or several of them with weights.

The reward of a response is the weighted sum of its sources, each normalised by its own statistics if it has any. A
reward model with the actor's tokenizer scores the sampled tokens themselves; another reads the text in its own chat
template; a function gets prompts, responses and the rows of the dataset.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from training.step3_rlhf_finetuning.prompts import PromptSet
from training.step3_rlhf_finetuning.reward_functions import TextFunction, call_text_function
from training.utils.errors import UserError
from training.utils.generation.rollouts import RolloutBatch, response_texts, score_rewards
from training.utils.model.reward_stats import RewardStats
from training.utils.model.text_reward import TextRewardModel
from training.utils.run.distributed import agree, on_all_ranks
from training.utils.sharing.rows import Sharing


class RewardSource(Protocol):
    """Gives each response a number."""

    @property
    def name(self) -> str:
        """For metrics and traces."""

    @property
    def weight(self) -> float:
        """In the sum of all sources."""

    @property
    def stats(self) -> RewardStats | None:
        """What its rewards are normalised with, None for nothing."""

    def score(self, rollout: RolloutBatch, rows: Sequence[int], prompts: PromptSet, batch_size: int) -> Tensor:
        """Raw rewards ``[B]``, fp32 on the rollout's device.

        Args:
            rollout: responses to ``rows`` of ``prompts``, in that order.
            batch_size: rows in one forward.
        """


@dataclass(frozen=True)
class TokenReward:
    """A frozen `TokenScorer` with the actor's tokenizer: the score at the response's last token.

    ``sharing`` says how answers to a prompt may go through it behind the prompt, None for a row each.
    """

    scorer: Any
    stats: RewardStats | None = None
    weight: float = 1.0
    sharing: Sharing | None = None
    name: str = "model"

    def score(self, rollout: RolloutBatch, rows: Sequence[int], prompts: PromptSet, batch_size: int) -> Tensor:
        """See `RewardSource`; neither rows nor prompts are looked at."""
        return score_rewards(self.scorer, rollout, batch_size, self.sharing)


@dataclass(frozen=True)
class TextReward:
    """A reward model with a tokenizer and a chat template of its own."""

    model: TextRewardModel
    stats: RewardStats | None = None
    weight: float = 1.0
    name: str = "model"

    def score(self, rollout: RolloutBatch, rows: Sequence[int], prompts: PromptSet, batch_size: int) -> Tensor:
        """See `RewardSource`."""
        texts = response_texts(rollout, prompts.tokenizer)
        conversations = [
            [*prompts.messages(row), {"role": "assistant", "content": text}]
            for row, text in zip(rows, texts, strict=True)
        ]
        return self.model.rewards(conversations, batch_size).to(rollout.input_ids.device)


@dataclass(frozen=True)
class FunctionReward:
    """A user's function of (prompts, responses, rows)."""

    function: TextFunction
    name: str
    weight: float = 1.0
    stats: RewardStats | None = None

    def score(self, rollout: RolloutBatch, rows: Sequence[int], prompts: PromptSet, batch_size: int) -> Tensor:
        """See `RewardSource`; a collective, so that an error on one rank ends all.

        Raises:
            UserError: see `training.step3_rlhf_finetuning.reward_functions.call_text_function`.
        """
        texts = response_texts(rollout, prompts.tokenizer)
        values = on_all_ranks(
            lambda: call_text_function(
                self.function,
                [prompts.messages(row) for row in rows],
                texts,
                [prompts.original(row) for row in rows],
                f"--reward_function {self.name}",
            )
        )
        return torch.tensor(values, dtype=torch.float32, device=rollout.input_ids.device)


@dataclass(frozen=True)
class RewardMix:
    """All sources of a run's rewards; at least one, each with a name of its own.

    Raises:
        UserError: two sources have one name.
    """

    sources: Sequence[RewardSource]

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        if len({*names}) < len(names):
            raise UserError(f"two sources of rewards have one name: {', '.join(names)}")

    def score(
        self, rollout: RolloutBatch, rows: Sequence[int], prompts: PromptSet, batch_size: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Reward each response; a collective.

        Args:
            rollout: responses to ``rows`` of ``prompts``, in that order.
            batch_size: rows in one forward.

        Returns:
            The weighted sum of the normalised rewards ``[B]``, and the raw ones ``[B]`` by source.
        """
        raw = {source.name: source.score(rollout, rows, prompts, batch_size) for source in self.sources}
        total = torch.zeros_like(next(iter(raw.values())))
        for source in self.sources:
            value = raw[source.name]
            total = total + source.weight * (source.stats.normalise(value) if source.stats is not None else value)
        return agree(total), raw  # a user's function may give other numbers each time
