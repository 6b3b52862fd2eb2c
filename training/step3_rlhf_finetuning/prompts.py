"""Prompts: which ones an iteration takes, how they are dealt to ranks and batches, and how they are asked."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from training.step3_rlhf_finetuning.arguments import RolloutArguments
from training.step3_rlhf_finetuning.reward_functions import Messages
from training.utils.data.batches import epoch_batches
from training.utils.generation.rollouts import RolloutRequest
from training.utils.run.distributed import data_rank, data_size


@dataclass(frozen=True)
class PromptSet:
    """Prompts to answer, and what is needed to ask and to read the answers.

    Attributes:
        dataset: step 3's rows.
        tokenizer: decodes answers.
        stop_ids: the end tokens.
        seed: of the sampling noise.
    """

    dataset: Any
    tokenizer: Any
    stop_ids: tuple[int, ...]
    seed: int

    def messages(self, row: int) -> Messages:
        """The conversation of a row."""
        return json.loads(self.dataset[row]["messages"])

    def original(self, row: int) -> dict[str, Any]:
        """The row as it stood in its file."""
        return json.loads(self.dataset[row]["row"])

    def request(
        self, rows: Sequence[int], device: torch.device, *, iteration: int = -1, row_ids: Sequence[int] | None = None
    ) -> RolloutRequest:
        """A request that answers these rows; without ``row_ids`` the noise depends on the row number."""
        return RolloutRequest.of(
            [self.dataset[i]["prompt_ids"] for i in rows],
            rows if row_ids is None else row_ids,
            self.tokenizer.pad_token_id,
            device,
            seed=self.seed,
            iteration=iteration,
            stop_ids=self.stop_ids,
            rows=tuple(rows),
        )


def prompt_schedule(
    lengths: Sequence[int], per_iteration: int, *, epochs: int, iterations: int, seed: int
) -> list[list[int]]:
    """Prompt numbers of each iteration, always ``per_iteration`` of them, of like length: little is padded.

    The prompts are shuffled and grouped anew for every pass; the last iteration is filled from one more pass.

    Args:
        lengths: tokens of each prompt of the dataset.
        per_iteration: over all ranks.
        epochs: passes over the prompts.
        iterations: if above 0, how many iterations there are, whatever ``epochs`` says.
        seed: of the shuffles.
    """
    lengths = lengths[:]  # a column of `datasets` reads the disk for every single number, but all of them at once
    wanted = iterations or -(-len(lengths) * epochs // per_iteration)
    rng = np.random.default_rng(seed)
    stream: list[int] = []
    for epoch in itertools.count():
        if len(stream) >= wanted * per_iteration:
            break
        order = rng.permutation(len(lengths)).tolist()
        missing = -len(stream) % per_iteration  # in the iteration that the pass before has begun
        stream += order[:missing]
        rest = order[missing:]
        batches = epoch_batches([lengths[i] for i in rest], per_iteration, seed, epoch)
        stream += [rest[i] for batch in batches for i in batch]
    return [stream[i * per_iteration : (i + 1) * per_iteration] for i in range(wanted)]


def deal(
    prompts: Sequence[int], lengths: Sequence[int], ranks: int, batches: int, per_step: int = 0
) -> list[list[list[int]]]:
    """Deal an iteration's positions to generation batches and ranks, prompts of like length together.

    In the first epoch an optimizer step takes each rank's next rows in this order. Dealt step by step, the ranks
    together take the same rows in it however many they are.

    Args:
        prompts: the iteration's prompt numbers; their number is a multiple of ``ranks * batches``.
        lengths: of every prompt of the dataset, in tokens.
        ranks, batches: how many.
        per_step: prompts of an optimizer step over all ranks, a multiple of ``ranks``; 0 where a step does not
            consist of whole prompts: each rank then gets neighbours, and its steps are other ones.

    Returns:
        ``[batch][rank]`` -> positions in ``prompts``.
    """
    order = sorted(range(len(prompts)), key=lambda i: (lengths[prompts[i]], i))
    share = (per_step or len(prompts) // batches) // ranks
    own = [
        [p for start in range(r * share, len(order), share * ranks) for p in order[start : start + share]]
        for r in range(ranks)
    ]
    size = len(prompts) // (ranks * batches)
    return [[mine[b * size : (b + 1) * size] for mine in own] for b in range(batches)]


def dealt_requests(
    prompts: PromptSet,
    chosen: Sequence[int],
    rollout: RolloutArguments,
    per_step: int,
    *,
    iteration: int,
    device: torch.device,
) -> list[RolloutRequest]:
    """This rank's generation batches of an iteration.

    The sampling noise of an answer depends on its prompt's position in ``chosen`` and on its number among the answers
    to it, and not on the number of ranks.

    Args:
        prompts: step 3's training prompts.
        chosen: the iteration's prompt numbers.
        rollout: the flags; each prompt is repeated ``samples_per_prompt`` times, side by side.
        per_step: see `deal`.
        iteration, device: see `RolloutRequest`.
    """
    dealt = deal(chosen, prompts.dataset["length"], data_size(), rollout.generation_batches, per_step)
    requests = []
    for batch in dealt:
        repeated = [(p, s) for p in batch[data_rank()] for s in range(rollout.samples_per_prompt)]
        ids = [p * rollout.samples_per_prompt + s for p, s in repeated]
        requests.append(prompts.request([chosen[p] for p, _ in repeated], device, iteration=iteration, row_ids=ids))
    return requests


def sample_rows(prompts: PromptSet, count: int = 3) -> list[int]:
    """Held-out rows to show: the first that asks for a story, if any does, and the first others."""
    rows = range(len(prompts.dataset))
    story = [i for i in rows if "story" in prompts.messages(i)[-1]["content"].lower()][:1]
    return ([i for i in rows if i not in story][: count - len(story)] + story)[:count]
