"""Held-out prompts answered by a policy, and two policies held against each other.

Best-of-n is a yardstick for PPO that needs no training: of n answers of the SFT model the one with the highest reward.
How far these are from the SFT model's answers is known without measuring: KL = log n - (n - 1) / n nats per answer
(Stiennon et al. 2020, arXiv 2009.01325, appendix G.3; an upper bound that is close for long answers, Beirami et al.
2024, arXiv 2401.01879).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch

from training.step3_rlhf_finetuning.prompts import PromptSet
from training.step3_rlhf_finetuning.reward_functions import (
    TextFunction,
    call_text_function,
    load_text_function,
    unused_name,
)
from training.step3_rlhf_finetuning.reward_sources import RewardMix
from training.utils.generation.rollouts import (
    RolloutBackend,
    RolloutBatch,
    has_ended,
    response_texts,
    row_slices,
    score_log_probs,
)
from training.utils.generation.sampling import SamplingConfig
from training.utils.generation.vllm import VllmBackend
from training.utils.intervals import bootstrap_interval, mean, win_rate
from training.utils.run.distributed import (
    data_rank,
    data_size,
    gather_objects,
    gather_rows,
    on_all_ranks,
    rank,
    say,
    world_size,
)
from training.utils.run.phases import beat


@dataclass(frozen=True)
class EvalFunction:
    """An independent measure of answers, one value of ``--eval_function``.

    Attributes:
        name: of its metrics.
        spec: ``file.py:name``, as it was given.
        function: the function.
    """

    name: str
    spec: str
    function: TextFunction


# What a policy's entry in evaluation.json is keyed by besides evaluation functions
RESERVED = ("reward", "judge", "kl", "length", "eos_rate")


def load_eval_functions(specs: Sequence[str]) -> list[EvalFunction]:
    """The values of ``--eval_function``; a second function of the same name is ``name_2``.

    Raises:
        UserError: see `training.step3_rlhf_finetuning.reward_functions.load_text_function`.
    """
    found: list[EvalFunction] = []
    for spec in filter(None, specs):
        function = load_text_function(spec, "--eval_function")
        found.append(EvalFunction(unused_name(spec, [*RESERVED, *(f.name for f in found)]), spec, function))
    return found


@dataclass(frozen=True)
class Answer:
    """One held-out prompt's answer.

    Attributes:
        row: in the dataset.
        text: without special tokens.
        reward: the weighted sum of its normalised rewards, without clip and penalties; NaN if it was not scored.
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

    @property
    def said(self) -> tuple[int, str, bool, int]:
        """What was answered to which prompt: two answers that agree in it are worth the same."""
        return self.row, self.text, self.ended, self.length


def worth_alike(answers: Sequence[Answer], known: Sequence[Answer]) -> list[Answer]:
    """The answers, where an answer with the same words is in ``known`` with the reward that it has there.

    A reward is rounded differently beside other rows, so equal answers could win or lose against each other.
    """
    rewards = {answer.said: answer.reward for answer in known}
    return [replace(answer, reward=rewards.get(answer.said, answer.reward)) for answer in answers]


def sequence_kl(reference: Any, rollout: RolloutBatch, temperature: float, batch_size: int) -> torch.Tensor:
    """Monte-Carlo KL of each response, ``[B]`` in nats: its sampled tokens' log-probs minus the reference's.

    The policy's log-probs are the sampler's, so this is the KL of the policy that answered, at one forward less.
    """
    reference_log_probs, _ = score_log_probs(reference, rollout, batch_size, temperature)
    return ((rollout.logprobs - reference_log_probs) * rollout.response_mask).sum(1)


@dataclass(frozen=True)
class Asking:
    """How models answer held-out prompts.

    Attributes:
        prompts: the prompts.
        backend, sampling: how to decode.
        decoded: prompts per rank that the policy answers together; what fits in training fits here too.
        scored: rows per rank in one forward of the reference or the reward model.
        device: this rank's.
    """

    prompts: PromptSet
    backend: RolloutBackend
    sampling: SamplingConfig
    decoded: int
    scored: int
    device: torch.device

    def answers(
        self,
        rows: Sequence[int],
        generation: AbstractContextManager[Any],
        rewards: RewardMix | None,
        reference: AbstractContextManager[Any] | None = None,
    ) -> list[Answer]:
        """One answer to each prompt, on all ranks together; a collective.

        Args:
            rows: of the prompts; at least one.
            generation: gives the policy, such as ``HybridEngine.generation_mode()``.
            rewards: what answers are worth, None not to ask.
            reference: gives the SFT model, such as ``HybridEngine.reference_mode()``, to measure the KL to it.

        Returns:
            In the order of ``rows``, the same on all ranks.
        """
        prompts, scored = self.prompts, self.scored
        # Every rank makes the same number of forwards of a sharded model: the last rows may be done twice
        by_length = sorted(rows, key=lambda i: prompts.dataset[i]["length"])
        while len(by_length) % data_size():
            by_length.append(by_length[-1])
        mine = by_length[data_rank() :: data_size()]
        batches = [mine[piece] for piece in row_slices(self.decoded, len(mine))]
        beat("answering held-out prompts")
        with generation as model:
            requests = (prompts.request(batch, self.device) for batch in batches)
            rollouts = [self.backend.generate(model, request, self.sampling) for request in requests]
        divergences: list[torch.Tensor | None] = [None] * len(batches)
        if reference is not None:
            with reference as model:
                divergences = [sequence_kl(model, each, self.sampling.temperature, scored) for each in rollouts]
        answers = []
        for batch, rollout, kl in zip(batches, rollouts, divergences, strict=True):
            worth = [math.nan] * len(batch)
            if rewards is not None:
                worth = rewards.score(rollout, batch, prompts, scored)[0].tolist()
            texts, ended = response_texts(rollout, prompts.tokenizer), has_ended(rollout, prompts.stop_ids).tolist()
            lengths = rollout.response_mask.sum(1).tolist()
            kls = [None] * len(batch) if kl is None else kl.tolist()
            answers += [Answer(*of) for of in zip(batch, texts, worth, ended, lengths, kls, strict=True)]
        by_row = {answer.row: answer for answer in gather_rows(answers)}
        return [by_row[i] for i in rows]


def checks(prompts: PromptSet, answers: Sequence[Answer], function: EvalFunction) -> list[float]:
    """The evaluation function's value of each answer, of which each rank asks for a share; a collective.

    Raises:
        UserError: on all ranks, see `training.step3_rlhf_finetuning.reward_functions.call_text_function`.
    """
    start, end = (len(answers) * number // world_size() for number in (rank(), rank() + 1))
    mine = answers[start:end]
    values = on_all_ranks(
        lambda: (
            call_text_function(
                function.function,
                [prompts.messages(a.row) for a in mine],
                [a.text for a in mine],
                [prompts.original(a.row) for a in mine],
                f"--eval_function {function.spec}",
            )
            if mine
            else []
        )
    )
    return gather_objects(values)


@contextlib.contextmanager
def decoding(model: Any, server: VllmBackend | None) -> Iterator[Any]:
    """Inside, a model that no engine holds answers; what decodes in a process of its own rests when it has."""
    with torch.no_grad():
        yield model
    if server is not None:
        server.rest()


# Evaluation function -> model (base, sft, rlhf) -> row -> value
Values = dict[str, dict[str, dict[int, float]]]


def values_of(prompts: PromptSet, answers: Mapping[str, Sequence[Answer]], functions: Sequence[EvalFunction]) -> Values:
    """What each evaluation function says about each model's answers; a collective."""
    return {
        function.name: {
            model: dict(zip((a.row for a in given), checks(prompts, given, function), strict=True)) if given else {}
            for model, given in answers.items()
        }
        for function in functions
    }


def compare_rewards(after: Sequence[Answer], before: Sequence[Answer], seed: int) -> dict[str, Any]:
    """Mean rewards and the win rate of ``after`` over ``before``, answers to the same prompts in the same order.

    A prompt whose reward is not finite on either side takes no part, and the log says how many there are.

    Returns:
        ``reward_after``, ``reward_before``, ``compared`` (prompts that took part) and what `win_rate` gives; NaN where
        no prompt is left.
    """
    pairs = [(a.reward, b.reward) for a, b in zip(after, before, strict=True)]
    finite = [pair for pair in pairs if all(map(math.isfinite, pair))]
    if len(finite) < len(pairs):
        say(f"warning: left out of the held-out rewards, not finite: {len(pairs) - len(finite)} of {len(pairs)}")
    if not finite:
        numbers = dict.fromkeys(
            ("reward_after", "reward_before", "win_rate", "win_rate_low", "win_rate_high"), math.nan
        )
        return numbers | {"compared": 0, "ties": 0}
    ours, theirs = map(list, zip(*finite, strict=True))
    means = {"reward_after": mean(ours), "reward_before": mean(theirs), "compared": len(finite)}
    return means | win_rate(ours, theirs, seed=seed)


def compare(
    before: Sequence[Answer],
    after: Sequence[Answer],
    functions: Sequence[EvalFunction],
    values: Values,
    seed: int,
) -> dict[str, Any]:
    """SFT against RLHF on the held-out prompts: mean rewards, win rates and what evaluation functions say.

    Args:
        before, after: answers to the same prompts in the same order.
        functions, values: see `values_of`.
        seed: of the bootstraps.
    """
    result: dict[str, Any] = {
        "prompts": len(before),
        **compare_rewards(after, before, seed),
        "length_before": mean([a.length for a in before]),
        "length_after": mean([a.length for a in after]),
        "eos_rate_before": mean([float(a.ended) for a in before]),
        "eos_rate_after": mean([float(a.ended) for a in after]),
    }
    if functions:
        result["eval_functions"] = [compare_by(function, values[function.name], seed) for function in functions]
    return result


def compare_by(function: EvalFunction, values: Mapping[str, Mapping[int, float]], seed: int) -> dict[str, Any]:
    """The entry of an evaluation function in summary.json, over the prompts that the RLHF model has answered.

    Returns:
        ``name``, ``function`` (where it is), the means ``before`` (SFT) and ``after`` (RLHF), ``win_rate`` with its
        interval ``low`` to ``high``, ``ties``, ``n`` prompts, and ``difference``, the mean of after minus before, with
        its 95% bootstrap interval. Where the base model has answered these prompts also its mean ``base`` and the
        differences ``base_to_sft`` and ``base_to_rlhf``.
    """
    rows = list(values["rlhf"])
    by_model = {model: [known[row] for row in rows] for model, known in values.items() if set(rows) <= set(known)}
    won = win_rate(by_model["rlhf"], by_model["sft"], seed=seed)
    result: dict[str, Any] = {"name": function.name, "function": function.spec, "n": len(rows)}
    result |= {
        "before": mean(by_model["sft"]),
        "after": mean(by_model["rlhf"]),
        "win_rate": won["win_rate"],
        "low": won["win_rate_low"],
        "high": won["win_rate_high"],
        "ties": won["ties"],
    }
    pairs = {"difference": ("sft", "rlhf")}
    if "base" in by_model:
        result["base"] = mean(by_model["base"])
        pairs |= {"base_to_sft": ("base", "sft"), "base_to_rlhf": ("base", "rlhf")}
    for name, (old, new) in pairs.items():
        found = [b - a for a, b in zip(by_model[old], by_model[new], strict=True)]
        low, high = bootstrap_interval(found, seed=seed)
        result |= {name: mean(found), f"{name}_low": low, f"{name}_high": high}
    return result


def best_of_kl(n: int) -> float:
    """KL of best-of-n to the model that it draws from, in nats per answer."""
    return math.log(n) - (n - 1) / n


def chosen_of(rewards: Sequence[float], n: int) -> list[int]:
    """Cut a prompt's answers into groups of n; the position of the highest reward in each (the first of equal ones).

    With more answers than n every group is one draw of best-of-n, and a mean over groups has less noise.
    """
    groups = [range(start, start + n) for start in range(0, len(rewards) - n + 1, n)]
    return [max(group, key=lambda i: rewards[i]) for group in groups]
