"""What step 3 leaves behind: the roles as models, answers to read, model cards, the summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training.step3_rlhf_finetuning import samples
from training.step3_rlhf_finetuning.held_out import HeldOutEvaluation
from training.step3_rlhf_finetuning.rlhf_engine import Roles, RoleSettings
from training.utils.checkpoint import move_into, save_model
from training.utils.data import StepData
from training.utils.distributed import is_main, say
from training.utils.metrics import write_summary
from training.utils.model_card import write_model_card
from training.utils.resume import BEST


def save_roles(roles: Roles, tokenizer: Any, output_dir: Path, stop_ids: Sequence[int], max_shard_size: str) -> None:
    """Save the critic and the moving average of the actor, where there are any; a collective."""
    save: dict[str, Any] = {"stop_ids": stop_ids, "max_shard_size": max_shard_size}
    if roles.critic is not None:
        scorer = roles.critic.module
        scale = {"reward_mean": scorer.mean, "reward_std": scorer.std}  # its values are (score - mean) / std
        save_model(roles.critic, tokenizer, output_dir / "critic", config_updates=scale, **save)
    if roles.ema is not None:
        with roles.ema.in_place():
            save_model(roles.actor.engine, tokenizer, output_dir / "ema", **save)


def write_answers(output_dir: Path, evaluator: HeldOutEvaluation) -> None:
    """Put the kept actor in its place, and write what base, SFT and RLHF model answer: answers.jsonl, samples.json."""
    if not is_main():
        return
    move_into(output_dir / BEST, output_dir / "actor")
    given = {"base": evaluator.base_answers, "sft": evaluator.before, "rlhf": evaluator.after}
    answers = {model: {answer.row: answer for answer in found} for model, found in given.items()}
    shown = [row for row in samples.sample_rows(evaluator.prompts) if row in answers["rlhf"]]
    shown = shown or list(answers["rlhf"])[:1]
    samples.write_samples(output_dir, evaluator.prompts, shown, answers, evaluator.values)
    samples.write_all_answers(output_dir, evaluator.prompts, answers, evaluator.values)


def write_cards_and_summary(
    output_dir: Path,
    summary: Mapping[str, Any],
    roles: Roles,
    origins: Mapping[str, RoleSettings | None],
    argv: Sequence[str],
    rows: StepData,
    tokenizer: Any,
) -> None:
    """Write a card for each model and summary.json, which says that the step is finished."""
    results = {**summary, **{f"check {found['name']}": found for found in summary.get("eval_functions", [])}}
    made: dict[str, Any] = {"argv": argv, "data": rows.report.lines(), "results": results}
    starts = {role: origin.path for role, origin in origins.items() if origin is not None}
    if roles.ema is not None:
        starts["ema"] = starts["actor"]
    for role, path in starts.items():
        write_model_card(output_dir / role, role, (path, path), tokenizer=tokenizer, **made)
    say(f"held-out reward {summary['reward_before']:.3f} -> {summary['reward_after']:.3f}, win rate over SFT "
        f"{summary['win_rate']:.3f} [{summary['win_rate_low']:.3f}, {summary['win_rate_high']:.3f}]")  # fmt: skip
    for found in summary.get("eval_functions", []):
        base = f"{found['base']:.3f} -> " if "base" in found else ""
        say(f"{found['name']} {base}{found['before']:.3f} -> {found['after']:.3f}, win rate over SFT "
            f"{found['win_rate']:.3f} [{found['low']:.3f}, {found['high']:.3f}]")  # fmt: skip
    write_summary(output_dir, summary)
    say(f"step 3 saved to {output_dir}")
