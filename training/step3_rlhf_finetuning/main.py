"""Step 3: reinforcement learning from human feedback, with PPO.

Five models take part: the actor (trained), the reference (the actor before training), the reward model of step 2
(frozen), the critic (trained; starts from the reward model) and, as the actor's other face, its twin, which decodes.
With --advantage rloo or grpo an answer is judged against the others to its prompt, and there is no critic.
An iteration: the twin answers prompts; each role scores the answers once; the reward, normalised by step 2's
statistics, minus a KL penalty per token becomes advantages; actor and critic take a few clipped steps.
(Ouyang et al. 2022, arXiv 2203.02155; Schulman et al. 2017, arXiv 1707.06347.)

    deepspeed --num_gpus 1 training/step3_rlhf_finetuning/main.py
    deepspeed --num_gpus 2 training/step3_rlhf_finetuning/main.py --actor_model_name_or_path output/run/step1 \
        --critic_model_name_or_path output/run/step2 --actor_zero_stage 2 --critic_zero_stage 2

Writes actor/ (the best by held-out reward at bounded KL) and critic/ (Hugging Face folders), metrics.jsonl,
health.jsonl (advice), samples.json and summary.json, which holds the actor against the SFT model on held-out prompts.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from training.utils.runtime import prepare_runtime

prepare_runtime()

import torch  # noqa: E402  threads and PATH must be set before

from training.step3_rlhf_finetuning import evaluation, prompts, samples, settings  # noqa: E402
from training.step3_rlhf_finetuning.health import HealthMonitor  # noqa: E402
from training.step3_rlhf_finetuning.held_out import HeldOutEvaluation  # noqa: E402
from training.step3_rlhf_finetuning.memory import RolePaths, show_rlhf_plan  # noqa: E402
from training.step3_rlhf_finetuning.ppo_trainer import PPOTrainer  # noqa: E402
from training.step3_rlhf_finetuning.rewards import load_text_function  # noqa: E402
from training.step3_rlhf_finetuning.rlhf_engine import RoleSettings, SharedSettings, build_roles, generation_backend  # noqa: E402
from training.step3_rlhf_finetuning.rollout import SamplingConfig  # noqa: E402
from training.utils import arguments, models  # noqa: E402
from training.utils.checkpoint import move_into, save_model  # noqa: E402
from training.utils.data import prepare_data, stop_token_ids  # noqa: E402
from training.utils.distributed import init_distributed, is_main, rank, say, world_size  # noqa: E402
from training.utils.errors import UserError, run_program  # noqa: E402
from training.utils.lora import check_lora  # noqa: E402
from training.utils.metrics import MetricsLogger, progress_bar, write_summary  # noqa: E402
from training.utils.model_card import write_model_card  # noqa: E402
from training.utils.phases import Phases  # noqa: E402
from training.utils.resume import BEST, METRICS, Run, resume_output_dir  # noqa: E402
from training.utils.reward_model import RewardStats  # noqa: E402
from training.utils.runs import latest_output, prepare_output_dir  # noqa: E402
from training.utils.zero_config import check_dtype, read_user_config  # noqa: E402

SAMPLE_EVERY = 5  # iterations between two looks at one held-out prompt's answer

ARGUMENTS = [
    settings.RoleArguments,
    arguments.DataArguments,
    settings.RolloutArguments,
    settings.PPOArguments,
    settings.OptimizationArguments,
    settings.RoleZeroArguments,
    settings.EvaluationArguments,
    arguments.OutputArguments,
    arguments.ReliabilityArguments,
]


def load_tokenizer(args: settings.RoleArguments, data: arguments.DataArguments, actor_path: str, critic_path: str):
    """The tokenizer of all roles.

    Raises:
        UserError: the reward model was trained with another one.
    """
    source = models.resolve_model(args.tokenizer_name_or_path or actor_path, "--tokenizer_name_or_path")
    template = {"chat_template": data.chat_template, "system_message": data.system_message}
    tokenizer = models.load_tokenizer(source, **template)
    if not models.same_tokenizer(tokenizer, models.load_tokenizer(critic_path, **template)):
        raise UserError(
            f"the reward model {critic_path} has another tokenizer or chat template than the actor {actor_path}; "
            f"train step 2 from this actor's step 1"
        )
    return tokenizer


def main(argv: Sequence[str]) -> int:
    """Run step 3; returns the exit code. See the module's docstring for what it writes."""
    groups = arguments.parse(
        ARGUMENTS, argv, prog="step3_rlhf_finetuning/main.py", description=__doc__, aliases=arguments.ALIASES
    )
    role_args, data, rollout, ppo, train, zero, evaluate, output, reliability = groups
    start, phases = time.monotonic(), Phases()
    check_dtype(role_args.dtype)
    settings.check(rollout, ppo, train, zero)
    eval_function = load_text_function(evaluate.eval_function, "--eval_function")
    overrides = read_user_config(zero.deepspeed_config)
    actor_path = models.resolve_model(
        role_args.actor_model_name_or_path or str(latest_output("step1")), "--actor_model_name_or_path"
    )
    critic_path = models.resolve_model(
        role_args.critic_model_name_or_path or str(latest_output("step2")), "--critic_model_name_or_path"
    )
    stats = RewardStats.read(critic_path) if ppo.normalize_reward and not output.plan else None
    length = rollout.max_prompt_seq_len + rollout.max_answer_seq_len
    for path in (actor_path, critic_path):
        models.check_length(path, length, "--max_prompt_seq_len + --max_answer_seq_len")
    check_lora(actor_path, zero.actor_lora_dim, zero.actor_lora_module_name)
    check_lora(critic_path, zero.critic_lora_dim, zero.critic_lora_module_name)
    if output.plan:
        return show_rlhf_plan(RolePaths(actor_path, critic_path), role_args, rollout, train, zero, overrides)
    output_dir = prepare_output_dir(resume_output_dir(reliability.resume, output.output_dir), "step3")
    tokenizer = load_tokenizer(role_args, data, actor_path, critic_path)
    device = init_distributed(zero.local_rank)
    torch.manual_seed(train.seed)

    # Data
    rows = prepare_data(
        3,
        data,
        tokenizer,
        max_length=length,
        max_prompt_length=rollout.max_prompt_seq_len,
        seed=train.seed,
        run_dir=output_dir,
    )
    say("\n".join(rows.report.lines()))
    stop_ids = tuple(stop_token_ids(tokenizer))
    run = Run.open(
        "step3",
        output_dir,
        reliability,
        groups,
        models={"--actor_model_name_or_path": actor_path, "--critic_model_name_or_path": critic_path},
        data={"training": rows.train, "held-out": rows.held_out},
        batches=settings.batches_of_all_ranks(rollout, train, world_size()),
    )
    settings.divide_batches(rollout, train, run.batches, world_size())
    batches = rollout.generation_batches
    per_rank = rollout.per_device_generation_batch_size // rollout.samples_per_prompt * batches
    schedule = prompts.prompt_schedule(
        len(rows.train),
        per_rank * world_size(),
        epochs=train.num_train_epochs,
        iterations=train.num_iterations,
        seed=train.seed,
    )
    micro_batches = rollout.per_device_generation_batch_size * batches // train.per_device_training_batch_size
    steps_per_iteration = ppo.ppo_epochs * micro_batches // train.gradient_accumulation_steps
    phases.end("data", "loading actor, reference, reward model and critic")

    # Roles
    shared = SharedSettings(
        dtype=role_args.dtype,
        attn_implementation=role_args.attn_implementation,
        offload=zero.offload,
        offload_reference_model=zero.offload_reference_model,
        offload_reward_model=zero.offload_reward_model,
        only_optimize_lora=zero.only_optimize_lora,
        overrides=overrides,
        micro_batch_size=train.per_device_training_batch_size,
        num_warmup_steps=train.num_warmup_steps,
        total_steps=len(schedule) * steps_per_iteration,
        pad_token_id=tokenizer.pad_token_id,
        device=device,
        merge_lora_for_generation=zero.merge_lora_for_generation,
    )
    roles = build_roles(
        RoleSettings(
            actor_path,
            zero.actor_zero_stage,
            train.actor_learning_rate,
            train.actor_weight_decay,
            role_args.actor_gradient_checkpointing,
            zero.actor_lora_dim,
            zero.actor_lora_module_name,
        ),
        RoleSettings(
            critic_path,
            zero.critic_zero_stage,
            train.critic_learning_rate,
            train.critic_weight_decay,
            role_args.critic_gradient_checkpointing,
            zero.critic_lora_dim,
            zero.critic_lora_module_name,
        ),
        shared,
        stats,
        with_critic=ppo.advantage == "gae",
    )
    decoded_together = max(rollout.per_device_generation_batch_size, evaluation.BATCH_SIZE)
    backend = generation_backend(roles.actor, rollout.rollout_engine, rows=decoded_together, length=length)
    sampling = SamplingConfig(
        rollout.max_answer_seq_len, temperature=rollout.temperature, top_p=rollout.top_p, top_k=rollout.top_k
    )
    constants = settings.ppo_settings(ppo, rollout, train)
    trainer = PPOTrainer(roles, backend, sampling, constants, stats, role_args.dtype, phases)
    phases.end("load")

    run.load(roles.trained())
    monitor = HealthMonitor(output_dir)
    monitor.replay(output_dir / METRICS, until=run.step)
    logger = MetricsLogger(
        output_dir, output.report_to, output_dir.parent.name + "/step3", monitor.observe, run.step, run.seconds
    )
    held_out = evaluation.HeldOutPrompts(rows.held_out, tokenizer, stop_ids, train.seed)
    evaluator = HeldOutEvaluation(
        held_out,
        roles,
        backend,
        sampling,
        logger,
        every=evaluate.eval_every,
        iterations=len(schedule),
        function=eval_function,
        function_name=evaluate.eval_function,
        actor_dir=output_dir / BEST,
        save=lambda: save_model(roles.actor.engine, tokenizer, output_dir / BEST, stop_ids=stop_ids),
    )
    shown = samples.sample_rows(held_out)
    if run.step:
        evaluator.load_state_dict(run.progress)
    else:
        evaluator.begin()
    phases.end("evaluate")

    # Loop, from the checkpoint on if there is one
    bar = progress_bar(len(schedule), "step 3", run.step)
    for number, chosen in list(enumerate(schedule))[run.step :]:
        dealt = prompts.deal(chosen, rows.train["length"], world_size(), batches)
        requests = prompts.iteration_requests(
            rows.train,
            chosen,
            [batch[rank()] for batch in dealt],
            samples_per_prompt=rollout.samples_per_prompt,
            stop_ids=stop_ids,
            pad_id=tokenizer.pad_token_id,
            seed=train.seed,
            iteration=number,
            device=device,
        )
        metrics = trainer.iteration(requests, number)
        logger.log(number + 1, metrics)
        bar.update()
        bar.set_postfix(reward=f"{metrics['reward/score']:.2f}", kl=f"{metrics['kl/per_sequence']:.2f}")
        evaluator.after_iteration(number + 1)
        if number % SAMPLE_EVERY == 0:
            text = samples.sample_answer(held_out, shown[-1], roles.actor, backend, sampling)
            say(f"[{number + 1}] {held_out.messages(shown[-1])[-1]['content']}\n    -> {text}")
            logger.text(number + 1, "sample", text)
        phases.end("evaluate")
        run.after_step(number + 1, evaluator.state_dict())
    bar.close()

    # Save: the actor is the best one so far, by held-out reward at bounded KL
    if roles.critic is not None:
        critic_scale = {"reward_mean": stats.mean, "reward_std": stats.std} if stats else {}
        save_model(roles.critic, tokenizer, output_dir / "critic", stop_ids=stop_ids, config_updates=critic_scale)
    phases.end("save")
    summary = evaluator.finish()
    logger.close()
    if is_main():
        move_into(output_dir / BEST, output_dir / "actor")
    phases.end("evaluate", "answering with the model that step 1 started from")
    base = samples.base_answers(held_out, shown, backend, sampling, actor_path, roles)
    named = {"sft": [evaluator.before[i] for i in shown], "rlhf": [evaluator.after[i] for i in shown]}
    if is_main():
        samples.write_samples(output_dir, held_out, ({"base": base} if base else {}) | named, eval_function)
    say(f"held-out reward {summary['reward_before']:.3f} -> {summary['reward_after']:.3f}, win rate over SFT "
        f"{summary['win_rate']:.3f} [{summary['win_rate_low']:.3f}, {summary['win_rate_high']:.3f}]")  # fmt: skip
    phases.end("evaluate")
    summary |= {
        "iterations": len(schedule),
        "seconds": time.monotonic() - start + run.seconds,
        "phases": phases.summary(),
    }
    made: dict[str, Any] = {"argv": argv, "data": rows.report.lines(), "results": summary}
    origins = {"actor": actor_path, "critic": critic_path}
    for role in roles.trained():
        write_model_card(output_dir / role, role, (origins[role], origins[role]), tokenizer=tokenizer, **made)
    write_summary(output_dir, summary)
    say(f"step 3 saved to {output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
