"""The models and batches that step 3's flags stand for, and what they must satisfy together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from training.step3_rlhf_finetuning.arguments import (
    EvaluationArguments,
    OptimizationArguments,
    PPOArguments,
    RoleArguments,
    RoleZeroArguments,
    RolloutArguments,
    check_batches,
)
from training.step3_rlhf_finetuning.rewards import NONE, check_without_model, split_weight
from training.step3_rlhf_finetuning.roles import RewardModelSettings
from training.utils.arguments import DataArguments
from training.utils.errors import UserError
from training.utils.model import classifiers, loading
from training.utils.model.limits import check_length
from training.utils.model.lora import check_lora
from training.utils.model.reward_model import RewardStats
from training.utils.model.text_reward import load_reward_tokenizer
from training.utils.model.tokenizer import check_vocabulary, load_tokenizer, same_tokenizer
from training.utils.run.distributed import say
from training.utils.run.folders import latest_output


def batches_of_all_ranks(rollout: RolloutArguments, train: OptimizationArguments, ranks: int) -> dict[str, int]:
    """What an iteration and an optimizer step consist of over all ranks."""
    return {
        "responses per iteration": rollout.per_device_generation_batch_size * rollout.generation_batches * ranks,
        "rows per step": train.per_device_training_batch_size * train.gradient_accumulation_steps * ranks,
    }


def divide_batches(
    rollout: RolloutArguments, train: OptimizationArguments, batches: Mapping[str, int], ranks: int
) -> tuple[RolloutArguments, OptimizationArguments]:
    """The flags with each rank's batches, so that they make up ``batches`` on this number of ranks.

    Where a run goes on with another number of ranks, the batch sizes of the flags are kept if they divide a rank's
    share, else the next smaller ones that do.

    Raises:
        UserError: the ranks can not share the rows evenly.
    """
    if batches == batches_of_all_ranks(rollout, train, ranks):
        return rollout, train
    responses, rows = batches["responses per iteration"], batches["rows per step"]
    if responses % (ranks * rollout.samples_per_prompt) or rows % ranks:
        raise UserError(
            f"the run has {responses} responses per iteration and {rows} rows per optimizer step, which {ranks} ranks "
            f"can not share evenly; give it another number of ranks"
        )
    share, samples = responses // ranks, rollout.samples_per_prompt
    generation = max(
        size
        for size in range(1, min(rollout.per_device_generation_batch_size, share) + 1)
        if share % size == 0 and size % samples == 0
    )
    training = max(
        size
        for size in range(1, min(train.per_device_training_batch_size, rows // ranks) + 1)
        if rows // ranks % size == 0 and generation % size == 0
    )
    rollout = replace(rollout, per_device_generation_batch_size=generation, generation_batches=share // generation)
    accumulation = rows // ranks // training
    train = replace(train, per_device_training_batch_size=training, gradient_accumulation_steps=accumulation)
    check_batches(rollout, train)
    return rollout, train


def prompts_per_step(rollout: RolloutArguments, batches: Mapping[str, int], ranks: int) -> int:
    """Prompts of an optimizer step over all ranks; 0 if its rows are not the same number of whole prompts on each."""
    per_step, rest = divmod(batches["rows per step"], rollout.samples_per_prompt)
    return 0 if rest or per_step % ranks else per_step


def warn(
    rollout: RolloutArguments,
    ppo: PPOArguments,
    train: OptimizationArguments,
    zero: RoleZeroArguments,
    evaluate: EvaluationArguments,
) -> None:
    """Warn about flags without effect and a sampler that is not the policy."""
    if zero.critic_lora_dim and ppo.advantage != "gae":
        say(f"warning: --critic_lora_dim has no effect: with --advantage {ppo.advantage} there is no critic")
    if train.num_iterations and max(evaluate.trace, default=0) > train.num_iterations:
        say(f"warning: --trace {max(evaluate.trace)}: the run ends after --num_iterations {train.num_iterations}")
    if rollout.top_p < 1 or rollout.top_k > 0:
        say("warning: with --top_p below 1 or --top_k above 0 the sampler is not the policy that is trained")


def model_paths(args: RoleArguments, functions: Sequence[str]) -> tuple[str, str]:
    """Folders or hub names of actor and reward model; the latter empty if there is none.

    Args:
        args: the flags.
        functions: the values of ``--reward_function``.

    Raises:
        UserError: a path holds no model, there would be no reward at all, or a reward model that is not there has a
            weight.
    """
    actor = loading.resolve_model(
        args.actor_model_name_or_path or str(latest_output("step1")), "--actor_model_name_or_path"
    )
    if args.critic_model_name_or_path == NONE:
        check_without_model(functions, "--critic_model_name_or_path")
        return actor, ""
    named = args.critic_model_name_or_path or str(latest_output("step2"))
    return actor, loading.resolve_model(named, "--critic_model_name_or_path")


def actor_tokenizer(args: RoleArguments, data: DataArguments, actor_path: str) -> Any:
    """The tokenizer of actor and critic, with the chat template that will be in force: the actor's, or the flags'."""
    source = loading.resolve_model(args.tokenizer_name_or_path or actor_path, "--tokenizer_name_or_path")
    return load_tokenizer(
        source, chat_template=data.chat_template, system_message=data.system_message, stop_ids=data.stop_ids
    )


def origins(actor_path: str, reward_path: str, functions: Sequence[str]) -> dict[str, str]:
    """What a run's result depends on beside data and flags, by the flag that names it: models and function files."""
    files = {f"--reward_function {spec}": split_weight(spec)[0].rpartition(":")[0] for spec in functions if ":" in spec}
    reward = {"--critic_model_name_or_path": reward_path} if reward_path else {}
    return {"--actor_model_name_or_path": actor_path} | reward | files


def run_with(argv: Sequence[str], actor_path: str, reward_path: str, output_dir: Path) -> dict[str, Any]:
    """What the run was started with, for evaluate.py: goes into summary.json, as not every run has a manifest.

    Args:
        argv: the flags.
        actor_path, reward_path: from `model_paths`: what the flags or their defaults stood for.
        output_dir: where the run writes.

    Returns:
        ``arguments``, and ``folder``, which relative paths in them start from.
    """
    found = ["--actor_model_name_or_path", actor_path, "--critic_model_name_or_path", reward_path or NONE]
    return {"arguments": [*argv, *found, "--output_dir", str(output_dir.resolve())], "folder": str(Path.cwd())}


def reward_model_settings(
    path: str, tokenizer: Any, *, normalize: bool, weight: float, plan: bool
) -> RewardModelSettings | None:
    """How the reward model serves: on tokens, or on texts where its tokenizer, template or family is another one.

    Args:
        path: from `model_paths`; empty gives None.
        tokenizer: the actor's, with the chat template that will be in force.
        normalize, weight: the flags'.
        plan: only ``--plan`` is asked for, which needs no statistics.

    Raises:
        UserError: no statistics, no tokenizer, no reward head, or a model that can not be a reward model.
    """
    if not path:
        return None
    if not plan:  # a plan may be made with a stand-in, before step 2 has run
        classifiers.check_reward_head(path)
    stats = RewardStats.read(path) if normalize and not plan else None
    if stats is not None and (line := stats.line()):
        say(line)
    reads_text = not classifiers.scores_tokens(path) or not same_tokenizer(tokenizer, load_reward_tokenizer(path))
    return RewardModelSettings(path, stats, weight, reads_text)


def check_models(
    actor: str,
    critic: str,
    reward: RewardModelSettings | None,
    zero: RoleZeroArguments,
    tokenizer: Any,
    length: int,
) -> None:
    """Refuse models that can not read the actor's tokens, or whose adapters match nothing, before any is loaded.

    Args:
        actor, critic: what they start from, the latter empty where there is no critic.
        reward: None without one.
        zero: the flags.
        tokenizer: of the prompts and answers.
        length: the longest sequence in tokens.

    Raises:
        UserError: too few positions or embeddings, or a LoRA name without a match.
    """
    for role, path in (("actor", actor), ("critic", critic)):
        if path:
            check_lora(path, zero.lora(role))
    readers = [actor, critic, reward.path if reward and not reward.reads_text else ""]
    for path in dict.fromkeys(filter(None, readers)):
        check_length(path, length, "--max_prompt_seq_len + --max_answer_seq_len")
        check_vocabulary(path, tokenizer)


def steps_per_iteration(ppo: PPOArguments, rollout: RolloutArguments, train: OptimizationArguments) -> int:
    """Optimizer steps that an iteration makes unless ``--target_kl`` ends it."""
    rows = rollout.per_device_generation_batch_size * rollout.generation_batches
    return ppo.ppo_epochs * rows // train.per_device_training_batch_size // train.gradient_accumulation_steps
