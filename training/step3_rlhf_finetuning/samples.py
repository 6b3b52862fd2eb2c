"""A few held-out prompts answered by each model of a run, for people to read."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from training.step3_rlhf_finetuning.evaluation import Answer, BatchSizes, Values, answer_held_out
from training.step3_rlhf_finetuning.hybrid_engine import HybridEngine
from training.step3_rlhf_finetuning.prompts import PromptSet
from training.step3_rlhf_finetuning.rlhf_engine import Roles
from training.step3_rlhf_finetuning.rollout import RolloutBackend, SamplingConfig, response_texts
from training.step3_rlhf_finetuning.scoring import ScoredBatch
from training.utils import models
from training.utils.distributed import gather_objects, say
from training.utils.engine import dtype_name
from training.utils.errors import UserError
from training.utils.manifest import read_manifest
from training.utils.metrics import MetricsLogger

SAMPLES_FILE = "samples.json"
ANSWERS_FILE = "answers.jsonl"
EVERY = 5  # iterations between two looks at what the actor writes
TABLE_ROWS = 3
TABLE_WIDTH = 56  # characters of a prompt or a response in the log's table


def base_model_of(actor_path: str) -> str:
    """The model that step 1 started from, as its summary says; empty where it does not."""
    return str(read_manifest(Path(actor_path) / "summary.json").get("base_model") or "")


def base_answers(
    prompts: PromptSet,
    rows: Sequence[int],
    backend: RolloutBackend,
    sampling: SamplingConfig,
    sizes: BatchSizes,
    base: str,
    roles: Roles,
) -> list[Answer]:
    """Answers of the model that step 1 started from, under the settings and the noise of the others; a collective.

    Those of `sample_rows`, which people see, are rewarded: evaluation functions judge the others, no reward does.

    Returns:
        One for each row, in order; none if the model can not be loaded or there is no room for it, which is said.
    """
    engine = roles.actor.engine
    if not roles.actor.another_fits():
        say(f"the base model {base} does not answer: there is no room to load it beside the others")
        return []
    model = _load_base(base, prompts, engine)
    if model is None:
        return []
    say(f"answering {len(rows)} held-out prompts with the base model ...")
    seen = set(sample_rows(prompts))
    answers: list[Answer] = []
    with torch.no_grad():
        for shown, rewards in ((True, roles.rewards), (False, None)):
            if chosen := [row for row in rows if (row in seen) == shown]:
                generation = contextlib.nullcontext(model)
                answers += answer_held_out(
                    prompts, chosen, generation, rewards, backend, sampling, sizes, engine.device
                )
    return sorted(answers, key=lambda answer: answer.row)


def _load_base(base: str, prompts: PromptSet, engine: Any) -> Any | None:
    """The base model on all ranks or none: it may be gone, or lack embeddings of tokens that step 1 has added."""
    problem, model = "", None
    try:
        path = models.resolve_model(base)
        models.check_vocabulary(path, prompts.tokenizer)
        model = models.load_causal_lm(path, dtype=dtype_name(engine)).to(engine.device).eval()
    except (OSError, ValueError, RuntimeError, UserError) as error:
        problem = str(error).strip().splitlines()[0]
    if problems := [text for text in gather_objects([problem]) if text]:
        say(f"the base model {base} does not answer: {problems[0]}")
        return None
    return model


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
    folder: Path, prompts: PromptSet, rows: Sequence[int], answers: Mapping[str, Mapping[int, Answer]], values: Values
) -> None:
    """Write ``samples.json``: some prompts answered by each model, with reward and the evaluation functions' values.

    Args:
        folder: step 3's output.
        prompts: the held-out prompts.
        rows: which are shown.
        answers: model -> row -> answer; a row that a model has not answered is left out.
        values: what evaluation functions say.
    """
    records = []
    for row in rows:
        given = {
            model: asdict(known[row])
            | {"reward": _finite(known[row].reward), "checks": {name: by[model][row] for name, by in values.items()}}
            for model, known in answers.items()
            if row in known
        }
        records.append({"prompt": prompts.messages(row), "answers": given})
    _write(folder / SAMPLES_FILE, json.dumps(records, indent=2, ensure_ascii=False) + "\n")


def write_all_answers(
    folder: Path, prompts: PromptSet, answers: Mapping[str, Mapping[int, Answer]], values: Values
) -> None:
    """Write ``answers.jsonl``: a line for each held-out prompt that the RLHF model has answered.

    Its keys: ``row``, ``prompt`` (messages), each model's text (null where it has not answered), and by model
    ``reward`` (null where it is not finite), ``ended``, and in ``scores`` what each evaluation function says.
    """
    lines = []
    for row in answers["rlhf"]:
        given = {model: known[row] for model, known in answers.items() if row in known}
        record = {
            "row": row,
            "prompt": prompts.messages(row),
            **{model: given[model].text if model in given else None for model in answers},
            "scores": {name: {model: by[model][row] for model in given} for name, by in values.items()},
            "reward": {model: _finite(a.reward) for model, a in given.items()},
            "ended": {model: a.ended for model, a in given.items()},
        }
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    _write(folder / ANSWERS_FILE, "".join(lines))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)
