"""A few held-out prompts answered by each model of a run, for people to read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from training.step3_rlhf_finetuning.evaluation import (
    Answer,
    HeldOutPrompts,
    answers_of,
    checks,
    request_for,
    response_texts,
)
from training.step3_rlhf_finetuning.hybrid_engine import HybridEngine
from training.step3_rlhf_finetuning.rewards import TextFunction
from training.step3_rlhf_finetuning.rlhf_engine import Roles
from training.step3_rlhf_finetuning.rollout import RolloutBackend, SamplingConfig
from training.utils import models

SAMPLES_FILE = "samples.json"


def base_answers(
    prompts: HeldOutPrompts,
    rows: Sequence[int],
    backend: RolloutBackend,
    sampling: SamplingConfig,
    actor_path: str,
    roles: Roles,
) -> list[Answer] | None:
    """Answers of the model that step 1 started from, if step 1 left its name; a collective."""
    summary = Path(actor_path) / "summary.json"
    base = json.loads(summary.read_text()).get("base_model") if summary.is_file() else None
    if base is None or not (Path(base) / "config.json").is_file():
        return None
    engine = roles.actor.engine
    dtype = "bf16" if engine.bfloat16_enabled() else "fp32"
    model = models.load_causal_lm(base, dtype=dtype).to(engine.device).eval()
    with torch.no_grad():
        rollout = backend.generate(model, request_for(prompts, rows, engine.device), sampling)
    return answers_of(prompts, rows, rollout, roles.reward)


def sample_answer(
    prompts: HeldOutPrompts, row: int, actor: HybridEngine, backend: RolloutBackend, sampling: SamplingConfig
) -> str:
    """What the actor answers one held-out prompt with now; a collective."""
    with actor.generation_mode() as twin:
        rollout = backend.generate(twin, request_for(prompts, [row], actor.engine.device), sampling)
    return response_texts(rollout, prompts.tokenizer)[0]


def sample_rows(prompts: HeldOutPrompts, count: int = 3) -> list[int]:
    """Held-out rows to show: the first that asks for a story, if any does, and the first others."""
    rows = range(len(prompts.dataset))
    story = [i for i in rows if "story" in prompts.messages(i)[-1]["content"].lower()][:1]
    return ([i for i in rows if i not in story][: count - len(story)] + story)[:count]


def write_samples(
    folder: Path,
    prompts: HeldOutPrompts,
    answers: Mapping[str, Sequence[Answer]],
    function: TextFunction | None,
) -> None:
    """Write ``samples.json``: the same prompts answered by each model, with reward and check.

    Args:
        folder: step 3's output.
        prompts: the held-out prompts.
        answers: model name -> answers, all for the same rows in the same order.
        function: the evaluation function, None to leave checks out.
    """
    values = {name: checks(prompts, given, function) for name, given in answers.items()}
    rows = [a.row for a in next(iter(answers.values()))]
    records = []
    for i, row in enumerate(rows):
        record: dict[str, Any] = {"prompt": prompts.messages(row), "answers": {}}
        for name, given in answers.items():
            checked = values[name]
            record["answers"][name] = asdict(given[i]) | ({"check": checked[i]} if checked is not None else {})
        records.append(record)
    scratch = folder / (SAMPLES_FILE + ".tmp")
    scratch.write_text(json.dumps(records, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    scratch.replace(folder / SAMPLES_FILE)
