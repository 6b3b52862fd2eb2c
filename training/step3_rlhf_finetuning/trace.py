"""``--trace``: every rollout of chosen iterations, token by token, as JSON lines."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from training.step3_rlhf_finetuning.prompts import PromptSet
from training.step3_rlhf_finetuning.rollout import has_ended
from training.step3_rlhf_finetuning.scoring import ScoredBatch
from training.utils.distributed import gather_objects, is_main

FOLDER = "trace"
_DIGITS = 6


def trace_records(batches: Sequence[ScoredBatch], prompts: PromptSet, iteration: int) -> Iterator[dict[str, Any]]:
    """One record for each rollout of this rank.

    The lists all have one entry for each response token: ``tokens`` as text, ``ids``, ``log_probs`` of the actor,
    ``reference_log_probs``, ``values``, ``rewards`` (KL penalty, and the score on the last one), ``advantages``.
    A number that is not finite is None.
    """
    for batch in batches:
        e, ended = batch.experience, has_ended(batch.rollout, batch.request.stop_ids).tolist()
        for i, row in enumerate(batch.request.rows):
            mask = e.mask[i]
            ids = e.input_ids[i, e.response_start :][mask].tolist()
            yield {
                "iteration": iteration,
                "row": row,
                "sample": int(batch.request.row_ids[i]),
                "prompt": prompts.messages(row),
                "response": prompts.tokenizer.decode(ids, skip_special_tokens=True).strip(),
                "ended": ended[i],
                "sources": {name: _number(float(values[i])) for name, values in batch.rewards.items()},
                "score": _number(float(batch.scores[i])),
                "tokens": [prompts.tokenizer.decode([token]) for token in ids],
                "ids": ids,
                **{
                    name: [_number(value) for value in values[i][mask].tolist()]
                    for name, values in (
                        ("log_probs", e.log_probs),
                        ("reference_log_probs", e.reference_log_probs),
                        ("values", e.values),
                        ("rewards", e.rewards),
                        ("advantages", e.advantages),
                    )
                },
            }


def _number(value: float) -> float | None:
    """A number as JSON has it, which knows neither NaN nor infinity."""
    return round(value, _DIGITS) if math.isfinite(value) else None


def write_trace(folder: Path, batches: Sequence[ScoredBatch], prompts: PromptSet, iteration: int) -> None:
    """Write ``trace/iteration-N.jsonl`` with the rollouts of all ranks, by sample; a collective.

    Args:
        folder: step 3's output.
        batches: this rank's.
        prompts: what their rows refer to.
        iteration: from 1.
    """
    records = gather_objects(list(trace_records(batches, prompts, iteration)))
    if not is_main():
        return
    path = folder / FOLDER / f"iteration-{iteration:06d}.jsonl"
    path.parent.mkdir(exist_ok=True)
    lines = [json.dumps(record, ensure_ascii=False) for record in sorted(records, key=lambda r: r["sample"])]
    scratch = path.with_suffix(".tmp")
    scratch.write_text("\n".join(lines) + "\n", encoding="utf-8")
    scratch.replace(path)
