"""What a model answers to held-out prompts, greedily, and how near that is to the rows' own responses."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from training.step1_supervised_finetuning.rouge import rouge_scores
from training.utils.data.batches import rank_micro_batches, spread_rows
from training.utils.data.template import stop_token_ids
from training.utils.engine.sequence_parallel import whole_rows
from training.utils.errors import UserError
from training.utils.generation.engines import rollout_backend
from training.utils.generation.rollouts import RolloutBackend, RolloutRequest, response_texts
from training.utils.generation.sampling import SamplingConfig
from training.utils.metrics import watched
from training.utils.model.forward import without_adapters
from training.utils.run.distributed import data_rank, data_size, gather_rows

ROUGE_ROWS = 64  # held-out rows that choose a model by ROUGE: their mean is known to about 0.02
ROUGE_TOKENS = 128  # longest answer to them


def last_turn(input_ids: Sequence[int], response_mask: Sequence[int]) -> tuple[list[int], list[int]]:
    """The last response that is trained of a rendered conversation: prompt ids, and response ids with the end token."""
    end = len(response_mask)
    while end and not response_mask[end - 1]:  # behind it stands an answer of weight 0
        end -= 1
    start = end
    while start and response_mask[start - 1]:
        start -= 1
    return list(input_ids[:start]), list(input_ids[start:end])


def decoded(
    backend: RolloutBackend,
    model: Any,
    prompts: Sequence[list[int]],
    tokenizer: Any,
    sampling: SamplingConfig,
    device: torch.device,
) -> list[str]:
    """The continuation of each prompt of one batch as text, without special tokens."""
    how = {"seed": 0, "iteration": 0, "stop_ids": tuple(stop_token_ids(tokenizer))}
    request = RolloutRequest.of(prompts, range(len(prompts)), tokenizer.pad_token_id, device, **how)
    rollout = backend.generate(model, request, sampling)
    return response_texts(rollout, tokenizer)


class RougeJudge:
    """Judges a model while it trains by its answers to some held-out prompts.

    Args:
        dataset: held-out rows of demonstrations.
        tokenizer: reads and writes them.
        max_length: tokens of a prompt and its answer.
        batch_size: prompts that a rank answers together.

    Raises:
        UserError: no row leaves room for an answer.
    """

    def __init__(self, dataset: Any, tokenizer: Any, max_length: int, batch_size: int) -> None:
        turns = [last_turn(row["input_ids"], row["response_mask"]) for row in dataset]
        turns = [turn for turn in turns if turn[0] and turn[1]]
        self._longest = min(max((len(response) for _, response in turns), default=0), ROUGE_TOKENS)
        fitting = [turn for turn in turns if len(turn[0]) + self._longest <= max_length]
        if not fitting:
            raise UserError(f"--best_by rouge: no held-out prompt leaves room for an answer of {self._longest} tokens")
        self._turns = [fitting[i] for i in spread_rows(len(fitting), ROUGE_ROWS)]
        self._tokenizer = tokenizer
        self._batch_size = batch_size

    @torch.no_grad()
    def score(self, engine: Any) -> float:
        """The mean of ROUGE-1, -2 and -L F-measures over the prompts, by greedy answers; a collective.

        At ZeRO-3 the parameters are gathered layer by layer, and the ranks decode in step.
        """
        engine.eval()
        sharded = any(hasattr(parameter, "ds_id") for parameter in engine.module.parameters())
        backend, sampling = rollout_backend("fast", synced=sharded), SamplingConfig(self._longest, greedy=True)
        found: list[tuple[int, str]] = []
        rows = range(len(self._turns))
        for mine in watched(rank_micro_batches(rows, data_rank(), data_size(), self._batch_size), "answers"):
            asked = [self._turns[i][0] for i in mine or rows[:1]]
            with whole_rows(without_adapters(engine.module)):
                answers = decoded(backend, engine.module, asked, self._tokenizer, sampling, engine.device)
            found += zip(mine, answers, strict=False)  # a filler's answer belongs to no row
        if sharded:
            engine.empty_partition_cache()
        engine.train()
        by_row = dict(gather_rows(found))
        references = [self._tokenizer.decode(r, skip_special_tokens=True).strip() for _, r in self._turns]
        values = list(itertools.chain(*rouge_scores([by_row[i] for i in rows], references).values()))
        return sum(values) / len(values)
