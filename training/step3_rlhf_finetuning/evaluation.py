"""Held-out prompts answered by a policy, and two policies held against each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from training.step3_rlhf_finetuning.experience import in_pieces, score_log_probs
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
from training.utils.distributed import gather_objects, rank, say, world_size
from training.utils.supervision import beat


@dataclass(frozen=True)
class BatchSizes:
    """Rows per rank that are done together: what fits in training fits here too.

    Attributes:
        decoded: prompts that the policy answers together.
        scored: rows in one forward of the reference or the reward model.
    """

    decoded: int
    scored: int


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
    prompts: PromptSet,
    rows: Sequence[int],
    rollout: RolloutBatch,
    rewards: RewardMix,
    batch_size: int,
    kl: torch.Tensor | None = None,
) -> list[Answer]:
    """The answers in a rollout of these rows, rewarded; a collective.

    Args:
        prompts, rows, rollout: the rollout is of these rows.
        rewards: what answers are worth.
        batch_size: rows in one forward of the reward model.
        kl: ``[B]``, from `sequence_kl`.
    """
    total, _ = rewards.score(rollout, rows, prompts, batch_size)
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


def sequence_kl(reference: Any, rollout: RolloutBatch, temperature: float, batch_size: int) -> torch.Tensor:
    """Monte-Carlo KL of each response, ``[B]`` in nats: its sampled tokens' log-probs minus the reference's.

    The policy's log-probs are the sampler's, so this is the KL of the policy that answered, at one forward less.
    """
    reference_log_probs, _ = score_log_probs(reference, rollout, batch_size, temperature)
    return ((rollout.logprobs - reference_log_probs) * rollout.response_mask).sum(1)


def answer_held_out(
    prompts: PromptSet,
    rows: Sequence[int],
    generation: AbstractContextManager[Any],
    rewards: RewardMix,
    backend: RolloutBackend,
    sampling: SamplingConfig,
    sizes: BatchSizes,
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
        sizes: how many rows at a time.
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
    batches = [mine[piece] for piece in in_pieces(sizes.decoded, len(mine))]
    beat("answering held-out prompts")
    with generation as model:
        rollouts = [backend.generate(model, prompts.request(batch, device), sampling) for batch in batches]
    divergences: list[torch.Tensor | None] = [None] * len(batches)
    if reference is not None:
        with reference as model:
            divergences = [sequence_kl(model, rollout, sampling.temperature, sizes.scored) for rollout in rollouts]
    answers = [
        answer
        for batch, rollout, kl in zip(batches, rollouts, divergences, strict=True)
        for answer in answers_of(prompts, batch, rollout, rewards, sizes.scored, kl)
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


def compare_rewards(after: Sequence[Answer], before: Sequence[Answer], seed: int) -> dict[str, float]:
    """Mean rewards and the win rate of ``after`` over ``before``, answers to the same prompts in the same order.

    A prompt whose reward is not finite on either side takes no part, and the log says how many there are.

    Returns:
        ``reward_after``, ``reward_before`` and what `win_rate` gives; NaN where no prompt is left.
    """
    pairs = [(a.reward, b.reward) for a, b in zip(after, before, strict=True)]
    finite = [pair for pair in pairs if all(map(math.isfinite, pair))]
    if len(finite) < len(pairs):
        say(f"warning: left out of the held-out rewards, not finite: {len(pairs) - len(finite)} of {len(pairs)}")
    if not finite:
        return dict.fromkeys(("reward_after", "reward_before", "win_rate", "win_rate_low", "win_rate_high"), math.nan)
    ours, theirs = map(list, zip(*finite, strict=True))
    return {"reward_after": mean(ours), "reward_before": mean(theirs), **win_rate(ours, theirs, seed=seed)}


def compare(
    prompts: PromptSet,
    before: Sequence[Answer],
    after: Sequence[Answer],
    function: TextFunction | None,
    function_name: str,
) -> dict[str, Any]:
    """SFT against RLHF on the held-out prompts: mean rewards and win rates with 95% intervals."""
    result: dict[str, Any] = {
        "prompts": len(before),
        **compare_rewards(after, before, prompts.seed),
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
