"""Held-out prompts answered by a policy, and two policies held against each other."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from training.step3_rlhf_finetuning.experience import score_log_probs
from training.step3_rlhf_finetuning.prompts import PromptSet
from training.step3_rlhf_finetuning.reward_sources import RewardMix
from training.step3_rlhf_finetuning.rewards import TextFunction, call_text_function, win_rate
from training.step3_rlhf_finetuning.rollout import (
    RolloutBackend,
    RolloutBatch,
    SamplingConfig,
    has_ended,
    response_texts,
)
from training.utils.distributed import gather_objects, rank, world_size
from training.utils.supervision import beat

BATCH_SIZE = 32  # held-out prompts per rank that are answered together: decoding gains little from more on a CPU


@dataclass(frozen=True)
class Answer:
    """One held-out prompt's answer.

    Attributes:
        row: in the dataset.
        text: without special tokens.
        reward: the weighted sum of its normalised rewards, without clip and penalties.
        ended: whether it has its end token.
        length: in tokens.
        kl: log-prob under the policy minus that under the SFT model, summed over the tokens; None if not measured.
    """

    row: int
    text: str
    reward: float
    ended: bool
    length: int
    kl: float | None = None


def answers_of(
    prompts: PromptSet, rows: Sequence[int], rollout: RolloutBatch, rewards: RewardMix, kl: torch.Tensor | None = None
) -> list[Answer]:
    """The answers in a rollout of these rows, rewarded; a collective.

    Args:
        prompts, rows, rollout: the rollout is of these rows.
        rewards: what answers are worth.
        kl: ``[B]``, from `sequence_kl`.
    """
    total, _ = rewards.score(rollout, rows, prompts, BATCH_SIZE)
    return [
        Answer(*values)
        for values in zip(
            rows,
            response_texts(rollout, prompts.tokenizer),
            total.tolist(),
            has_ended(rollout, prompts.stop_ids).tolist(),
            rollout.response_mask.sum(1).tolist(),
            [None] * len(rows) if kl is None else kl.tolist(),
            strict=True,
        )
    ]


def sequence_kl(reference: Any, rollout: RolloutBatch, temperature: float) -> torch.Tensor:
    """Monte-Carlo KL of each response, ``[B]`` in nats: its sampled tokens' log-probs minus the reference's.

    The policy's log-probs are the sampler's, so this is the KL of the policy that answered, at one forward less.
    """
    reference_log_probs, _ = score_log_probs(reference, rollout, BATCH_SIZE, temperature)
    return ((rollout.logprobs - reference_log_probs) * rollout.response_mask).sum(1)


def answer_held_out(
    prompts: PromptSet,
    rows: Sequence[int],
    generation: AbstractContextManager[Any],
    rewards: RewardMix,
    backend: RolloutBackend,
    sampling: SamplingConfig,
    device: torch.device,
    reference: AbstractContextManager[Any] | None = None,
) -> list[Answer]:
    """Answer held-out prompts, on all ranks together; a collective.

    Args:
        prompts: the prompts.
        rows: which of them; at least one.
        generation: gives the policy, such as ``HybridEngine.generation_mode()``.
        rewards: what answers are worth.
        backend, sampling: how to decode.
        device: this rank's.
        reference: gives the SFT model, such as ``HybridEngine.reference_mode()``, to measure the KL to it.

    Returns:
        One answer for each row, in the order of ``rows``, the same on all ranks.
    """
    # Every rank makes the same number of forwards of a sharded model: the last rows may be done twice
    by_length = sorted(rows, key=lambda i: prompts.dataset[i]["length"])
    while len(by_length) % world_size():
        by_length.append(by_length[-1])
    mine = by_length[rank() :: world_size()]
    batches = [mine[i : i + BATCH_SIZE] for i in range(0, len(mine), BATCH_SIZE)]
    beat("answering held-out prompts")
    with generation as model:
        rollouts = [backend.generate(model, prompts.request(batch, device), sampling) for batch in batches]
    divergences: list[torch.Tensor | None] = [None] * len(batches)
    if reference is not None:
        with reference as model:
            divergences = [sequence_kl(model, rollout, sampling.temperature) for rollout in rollouts]
    answers = [
        answer
        for batch, rollout, kl in zip(batches, rollouts, divergences, strict=True)
        for answer in answers_of(prompts, batch, rollout, rewards, kl)
    ]
    by_row = {answer.row: answer for answer in gather_objects(answers)}
    return [by_row[i] for i in rows]


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean of at least one value."""
    return sum(values) / len(values)


def checks(prompts: PromptSet, answers: Sequence[Answer], function: TextFunction | None) -> list[float] | None:
    """The evaluation function's value of each answer, None without one."""
    if function is None:
        return None
    return call_text_function(
        function,
        [prompts.messages(a.row) for a in answers],
        [a.text for a in answers],
        [prompts.original(a.row) for a in answers],
        "--eval_function",
    )


def compare(
    prompts: PromptSet,
    before: Sequence[Answer],
    after: Sequence[Answer],
    function: TextFunction | None,
    function_name: str,
) -> dict[str, Any]:
    """SFT against RLHF on the held-out prompts: mean rewards and win rates with 95% intervals."""
    rewards = [[a.reward for a in answers] for answers in (before, after)]
    result: dict[str, Any] = {
        "prompts": len(before),
        "reward_before": mean(rewards[0]),
        "reward_after": mean(rewards[1]),
        **win_rate(rewards[1], rewards[0], seed=prompts.seed),
        "length_before": mean([a.length for a in before]),
        "length_after": mean([a.length for a in after]),
        "eos_rate_before": mean([float(a.ended) for a in before]),
        "eos_rate_after": mean([float(a.ended) for a in after]),
    }
    old, new = checks(prompts, before, function), checks(prompts, after, function)
    if old is not None and new is not None:
        result["eval_function"] = {
            "name": function_name,
            "before": mean(old),
            "after": mean(new),
            **win_rate(new, old, seed=prompts.seed),
        }
    return result
