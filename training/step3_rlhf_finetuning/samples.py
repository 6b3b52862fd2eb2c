"""A few held-out prompts answered by each model of a run, for people to read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from training.step3_rlhf_finetuning.evaluation import Answer, answers_of, checks
from training.step3_rlhf_finetuning.hybrid_engine import HybridEngine
from training.step3_rlhf_finetuning.prompts import PromptSet
from training.step3_rlhf_finetuning.rewards import TextFunction
from training.step3_rlhf_finetuning.rlhf_engine import Roles
from training.step3_rlhf_finetuning.rollout import RolloutBackend, SamplingConfig, response_texts
from training.step3_rlhf_finetuning.scoring import ScoredBatch
from training.utils import models
from training.utils.distributed import say
from training.utils.engine import dtype_name
from training.utils.metrics import MetricsLogger

SAMPLES_FILE = "samples.json"
EVERY = 5  # iterations between two looks at what the actor writes
TABLE_ROWS = 3
TABLE_WIDTH = 56  # characters of a prompt or a response in the log's table


def base_answers(
    prompts: PromptSet,
    rows: Sequence[int],
    backend: RolloutBackend,
    sampling: SamplingConfig,
    actor_path: str,
    roles: Roles,
) -> list[Answer] | None:
    """Answers of the model that step 1 started from, if step 1 left its name and there is room; a collective."""
    summary = Path(actor_path) / "summary.json"
    base = json.loads(summary.read_text()).get("base_model") if summary.is_file() else None
    if base is None or not (Path(base) / "config.json").is_file() or not roles.actor.another_fits():
        return None
    engine = roles.actor.engine
    model = models.load_causal_lm(base, dtype=dtype_name(engine)).to(engine.device).eval()
    with torch.no_grad():
        rollout = backend.generate(model, prompts.request(rows, engine.device), sampling)
    return answers_of(prompts, rows, rollout, roles.rewards, batch_size=1)


def sample_answer(
    prompts: PromptSet, row: int, actor: HybridEngine, backend: RolloutBackend, sampling: SamplingConfig
) -> str:
    """What the actor answers one held-out prompt with now; a collective."""
    with actor.generation_mode() as twin:
        rollout = backend.generate(twin, prompts.request([row], actor.engine.device), sampling)
    return response_texts(rollout, prompts.tokenizer)[0]


def show_progress(
    iteration: int,
    batch: ScoredBatch,
    training: PromptSet,
    held_out: PromptSet,
    roles: Roles,
    backend: RolloutBackend,
    sampling: SamplingConfig,
    logger: MetricsLogger,
) -> None:
    """Show one held-out prompt's answer, always the same prompt, and some rollouts of the iteration; a collective."""
    row = sample_rows(held_out)[-1]
    text = sample_answer(held_out, row, roles.actor, backend, sampling)
    table = rollout_table(batch, training)
    say(f"[{iteration}] {held_out.messages(row)[-1]['content']}\n    -> {text}\n{as_text(table)}")
    logger.text(iteration, "sample", text)
    logger.text(iteration, "rollouts", as_markdown(table))


def rollout_table(batch: ScoredBatch, prompts: PromptSet) -> list[tuple[str, str, str]]:
    """(prompt, response, rewards) of a few rollouts of an iteration, the header first."""
    texts = response_texts(batch.rollout, prompts.tokenizer)
    rows = [("prompt", "response", "score: " + ", ".join(batch.rewards))]
    for i in range(min(TABLE_ROWS, len(texts))):
        raw = ", ".join(f"{values[i]:+.2f}" for values in batch.rewards.values())
        prompt = prompts.messages(batch.request.rows[i])[-1]["content"]
        rows.append((prompt, texts[i], f"{batch.scores[i]:+.2f}: {raw}"))
    return rows


def as_text(table: Sequence[tuple[str, str, str]]) -> str:
    """A `rollout_table` for the log: one line a rollout, long texts cut."""
    cut = [[" ".join(cell.split()) for cell in row] for row in table]
    cut = [[c if len(c) <= TABLE_WIDTH else c[: TABLE_WIDTH - 3] + "..." for c in row] for row in cut]
    widths = [max(len(row[i]) for row in cut) for i in range(2)]
    return "\n".join(f"    {row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]}" for row in cut)


def as_markdown(table: Sequence[tuple[str, str, str]]) -> str:
    """A `rollout_table` for TensorBoard."""
    rows = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in table]
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * 3, *rows[1:]])


def sample_rows(prompts: PromptSet, count: int = 3) -> list[int]:
    """Held-out rows to show: the first that asks for a story, if any does, and the first others."""
    rows = range(len(prompts.dataset))
    story = [i for i in rows if "story" in prompts.messages(i)[-1]["content"].lower()][:1]
    return ([i for i in rows if i not in story][: count - len(story)] + story)[:count]


def write_samples(
    folder: Path,
    prompts: PromptSet,
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
