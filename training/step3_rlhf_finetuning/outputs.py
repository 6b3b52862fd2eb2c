"""What step 3 shows and leaves behind.

Answers of each model to held-out prompts, rollouts as a table and token by token (``--trace``), the roles as models,
model cards, the summary.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from training.step3_rlhf_finetuning.comparison import Answer
from training.step3_rlhf_finetuning.experience import ScoredBatch
from training.step3_rlhf_finetuning.kept_actor import HeldOutEvaluation
from training.step3_rlhf_finetuning.ppo_trainer import PPOTrainer
from training.step3_rlhf_finetuning.prompts import PromptSet, sample_rows
from training.step3_rlhf_finetuning.roles import Roles
from training.utils.checkpoint.resume import BEST, METRICS, Run
from training.utils.data.prepare import StepData
from training.utils.generation.rollouts import RolloutsLost, has_ended, response_texts
from training.utils.health import HealthMonitor
from training.utils.metrics import MetricsLogger, write_summary
from training.utils.model.card import write_model_card
from training.utils.model.export import move_into, save_model
from training.utils.run.distributed import gather_rows, is_main, say
from training.utils.run.files import write_json, write_whole

SAMPLES_FILE = "samples.json"
ANSWERS_FILE = "answers.jsonl"
EVERY = 5  # iterations between two looks at what the actor writes
TABLE_ROWS = 3
TABLE_WIDTH = 56  # characters of a prompt or a response in the log's table


@contextlib.contextmanager
def saved_if_lost(run: Run, number: int, evaluator: HeldOutEvaluation | None = None) -> Iterator[None]:
    """Inside, rollouts that can not be had any more end the run with a checkpoint.

    Args:
        run: of this step.
        number: of the iteration after which the engines stand.
        evaluator: of an iteration that is not yet counted as done.

    Raises:
        RunStopped: after a checkpoint was written.
    """
    try:
        yield
    except RolloutsLost as lost:
        if evaluator is not None:
            run.after_step(number, evaluator.state_dict())
        run.stop_if(str(lost), "with the reason out of the way the same command goes on")


def monitored_logger(output_dir: Path, report_to: str, run: Run) -> MetricsLogger:
    """Where the metrics go, continued where a resumed run stood, and watched by the monitor."""
    monitor = HealthMonitor(output_dir)
    monitor.replay(output_dir / METRICS, run.done is not None)
    name = f"{output_dir.parent.name}/step3"
    return MetricsLogger(output_dir, report_to, name, monitor.observe, run.done, run.seconds)


def show_progress(iteration: int, trainer: PPOTrainer, held_out: PromptSet, logger: MetricsLogger) -> None:
    """Show one held-out prompt's answer, always the same prompt, and some rollouts of the iteration; a collective."""
    row = sample_rows(held_out)[-1]
    with trainer.roles.actor.generation_mode() as twin:
        rollout = trainer.backend.generate(twin, held_out.request([row], trainer.device), trainer.sampling)
    text = response_texts(rollout, held_out.tokenizer)[0]
    table = rollout_table(trainer.scored[0], trainer.scoring.prompts)
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


def _finite(value: float) -> float | None:
    """A number as JSON has it, which knows neither NaN nor infinity."""
    return value if math.isfinite(value) else None


TRACE_FOLDER = "trace"
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
                "sources": {name: _finite(round(float(values[i]), _DIGITS)) for name, values in batch.rewards.items()},
                "score": _finite(round(float(batch.scores[i]), _DIGITS)),
                "tokens": [prompts.tokenizer.decode([token]) for token in ids],
                "ids": ids,
                **{
                    name: [_finite(round(value, _DIGITS)) for value in getattr(e, name)[i][mask].tolist()]
                    for name in ("log_probs", "reference_log_probs", "values", "rewards", "advantages")
                },
            }


def write_trace(folder: Path, batches: Sequence[ScoredBatch], prompts: PromptSet, iteration: int) -> None:
    """Write ``trace/iteration-N.jsonl`` with the rollouts of all ranks, by sample; a collective.

    Args:
        folder: step 3's output.
        batches: this rank's.
        prompts: what their rows refer to.
        iteration: from 1.
    """
    records = gather_rows(list(trace_records(batches, prompts, iteration)))
    if not is_main():
        return
    path = folder / TRACE_FOLDER / f"iteration-{iteration:06d}.jsonl"
    path.parent.mkdir(exist_ok=True)
    lines = [json.dumps(record, ensure_ascii=False) for record in sorted(records, key=lambda r: r["sample"])]
    write_whole(path, "\n".join(lines) + "\n")


def save_critic_and_ema(
    roles: Roles, tokenizer: Any, output_dir: Path, stop_ids: Sequence[int], max_shard_size: str
) -> None:
    """Save the critic and the moving average of the actor, where there are any; a collective.

    The actor's weights are those that the evaluation kept, see `publish_actor`.
    """
    for name, role in {"critic": roles.critic, "ema": roles.ema}.items():
        if role is None and is_main():
            shutil.rmtree(output_dir / name, ignore_errors=True)  # of an earlier run with other flags
    save: dict[str, Any] = {"stop_ids": stop_ids, "max_shard_size": max_shard_size}
    if roles.critic is not None:
        scorer = roles.critic.module
        scale = {"reward_mean": scorer.mean, "reward_std": scorer.std}  # its values are (score - mean) / std
        save_model(roles.critic, tokenizer, output_dir / "critic", config_updates=scale, **save)
    if roles.ema is not None:
        with roles.ema.in_place():
            save_model(roles.actor.engine, tokenizer, output_dir / "ema", **save)


def publish_actor(output_dir: Path) -> None:
    """Put the kept actor, the best by held-out reward at bounded KL, in its place."""
    if is_main():
        move_into(output_dir / BEST, output_dir / "actor")


def write_answers(output_dir: Path, evaluator: HeldOutEvaluation) -> None:
    """Write what base, SFT and RLHF model answer to held-out prompts: answers.jsonl, and some in samples.json.

    answers.jsonl has a line for each prompt that the RLHF model has answered: ``row``, ``prompt`` (messages), each
    model's text (null where it has not answered), and by model ``reward``, ``ended``, and in ``scores`` what each
    evaluation function says. samples.json has the prompts that people are shown with all that is known of each answer.
    A reward that is not finite is null in both.
    """
    if not is_main():
        return
    prompts, values = evaluator.prompts, evaluator.values
    models = {"base": evaluator.base_answers, "sft": evaluator.before, "rlhf": evaluator.after}
    answers = {model: {answer.row: answer for answer in found} for model, found in models.items()}
    shown = [row for row in sample_rows(prompts) if row in answers["rlhf"]] or list(answers["rlhf"])[:1]

    def given(row: int) -> dict[str, Answer]:
        return {model: known[row] for model, known in answers.items() if row in known}

    samples = []
    for row in shown:
        about = {
            model: asdict(answer)
            | {"reward": _finite(answer.reward), "checks": {name: by[model][row] for name, by in values.items()}}
            for model, answer in given(row).items()
        }
        samples.append({"prompt": prompts.messages(row), "answers": about})
    write_json(output_dir / SAMPLES_FILE, samples)
    lines = []
    for row in answers["rlhf"]:
        found = given(row)
        record = {
            "row": row,
            "prompt": prompts.messages(row),
            **{model: found[model].text if model in found else None for model in models},
            "scores": {name: {model: by[model][row] for model in found} for name, by in values.items()},
            "reward": {model: _finite(answer.reward) for model, answer in found.items()},
            "ended": {model: answer.ended for model, answer in found.items()},
        }
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    write_whole(output_dir / ANSWERS_FILE, "".join(lines))


def write_cards_and_summary(
    output_dir: Path,
    summary: Mapping[str, Any],
    roles: Roles,
    starts: Mapping[str, str],
    argv: Sequence[str],
    rows: StepData,
    tokenizer: Any,
) -> None:
    """Write a card for each model and summary.json, which says that the step is finished.

    ``starts``: role -> the model that it started from.
    """
    results = {**summary, **{f"check {found['name']}": found for found in summary.get("eval_functions", [])}}
    made: dict[str, Any] = {"argv": argv, "data": rows.report.lines(), "results": results}
    more = {"ema": starts["actor"]} if roles.ema is not None else {}
    for role, path in {**starts, **more}.items():
        write_model_card(output_dir / role, role, (path, path), tokenizer=tokenizer, **made)
    say(f"held-out reward {summary['reward_before']:.3f} -> {summary['reward_after']:.3f}, win rate over SFT "
        f"{summary['win_rate']:.3f} [{summary['win_rate_low']:.3f}, {summary['win_rate_high']:.3f}]")  # fmt: skip
    for found in summary.get("eval_functions", []):
        base = f"{found['base']:.3f} -> " if "base" in found else ""
        say(f"{found['name']} {base}{found['before']:.3f} -> {found['after']:.3f}, win rate over SFT "
            f"{found['win_rate']:.3f} [{found['low']:.3f}, {found['high']:.3f}]")  # fmt: skip
    write_summary(output_dir, summary)
    say(f"step 3 saved to {output_dir}")
