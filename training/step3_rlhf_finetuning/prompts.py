"""Which prompts each iteration takes, and how they are dealt to ranks and generation batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from training.step3_rlhf_finetuning.rollout import RolloutRequest
from training.utils.data import collate_prompts


def prompt_schedule(count: int, per_iteration: int, *, epochs: int, iterations: int, seed: int) -> list[list[int]]:
    """Prompt numbers of each iteration, always ``per_iteration`` of them.

    The prompts are shuffled anew for every pass; the last iteration is filled from one more pass.

    Args:
        count: prompts in the dataset.
        per_iteration: over all ranks.
        epochs: passes over the prompts.
        iterations: if above 0, how many iterations there are, whatever ``epochs`` says.
        seed: of the shuffles.
    """
    wanted = iterations or -(-count * epochs // per_iteration)
    rng = np.random.default_rng(seed)
    stream: list[int] = []
    while len(stream) < wanted * per_iteration:
        stream += rng.permutation(count).tolist()
    return [stream[i * per_iteration : (i + 1) * per_iteration] for i in range(wanted)]


def deal(prompts: Sequence[int], lengths: Sequence[int], ranks: int, batches: int) -> list[list[list[int]]]:
    """Deal an iteration's positions to generation batches and ranks, prompts of like length together.

    Args:
        prompts: the iteration's prompt numbers; their number is a multiple of ``ranks * batches``.
        lengths: of every prompt of the dataset, in tokens.
        ranks, batches: how many.

    Returns:
        ``[batch][rank]`` -> positions in ``prompts``.
    """
    order = sorted(range(len(prompts)), key=lambda i: (lengths[prompts[i]], i))
    size = len(prompts) // (ranks * batches)
    pieces = [order[i * size : (i + 1) * size] for i in range(ranks * batches)]
    return [pieces[b * ranks : (b + 1) * ranks] for b in range(batches)]


def iteration_requests(
    dataset: Any,
    prompts: Sequence[int],
    positions: Sequence[Sequence[int]],
    *,
    samples_per_prompt: int,
    stop_ids: tuple[int, ...],
    pad_id: int,
    seed: int,
    iteration: int,
    device: torch.device,
) -> list[RolloutRequest]:
    """One rank's generation batches of an iteration.

    Args:
        dataset: step 3's prompts.
        prompts: the iteration's prompt numbers.
        positions: this rank's positions in ``prompts``, for each generation batch; the sampling noise hangs
            on position and sample, so it does not depend on the number of ranks.
        samples_per_prompt: each prompt is repeated this often, side by side.
        stop_ids, pad_id, seed, iteration, device: see `RolloutRequest`.
    """
    requests = []
    for batch in positions:
        repeated = [(p, s) for p in batch for s in range(samples_per_prompt)]
        tensors = collate_prompts([dataset[prompts[p]] for p, _ in repeated], pad_id)
        requests.append(
            RolloutRequest(
                prompt_ids=tensors["input_ids"].to(device),
                prompt_mask=tensors["attention_mask"].to(device),
                row_ids=torch.tensor([p * samples_per_prompt + s for p, s in repeated], device=device),
                seed=seed,
                iteration=iteration,
                stop_ids=stop_ids,
                pad_id=pad_id,
            )
        )
    return requests
