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
health.jsonl (advice), answers.jsonl, samples.json, and summary.json: the actor against the SFT model, held out.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))  # outside the environment, to say so

from training.migrate.predecessors import others_of
from training.step3_rlhf_finetuning.arguments import ALIASES, ARGUMENTS, check
from training.utils import arguments
from training.utils.run import watchdog
from training.utils.run.demo import check_training_data
from training.utils.run.runtime import prepare_runtime

OTHERS = others_of("step3")


def parse_flags(argv: Sequence[str]) -> list[Any]:
    """The flags, by `ARGUMENTS`; without torch, so that ``--help`` and mistakes answer at once."""
    others = OTHERS | ALIASES
    return check(arguments.parse(ARGUMENTS, argv, prog="step3/main.py", description=__doc__, others=others))


if __name__ == "__main__":
    arguments.answer_early(parse_flags, OTHERS, check_training_data)
prepare_runtime()

import torch  # noqa: E402  threads and PATH must be set before

from training.step3_rlhf_finetuning import outputs, prompts, settings  # noqa: E402
from training.step3_rlhf_finetuning.evaluation import BatchSizes, load_eval_functions  # noqa: E402
from training.step3_rlhf_finetuning.experience import Scoring  # noqa: E402
from training.step3_rlhf_finetuning.held_out import HeldOutEvaluation, base_model_of  # noqa: E402
from training.step3_rlhf_finetuning.outputs import write_trace  # noqa: E402
from training.step3_rlhf_finetuning.plan import show_rlhf_plan  # noqa: E402
from training.step3_rlhf_finetuning.ppo_trainer import PPOTrainer, check_first_ratio  # noqa: E402
from training.step3_rlhf_finetuning.pretraining_mix import PretrainingMix  # noqa: E402
from training.step3_rlhf_finetuning.rewards import parse_reward_functions  # noqa: E402
from training.step3_rlhf_finetuning.roles import Build, build_roles, generation_backend, starts_from  # noqa: E402
from training.utils.checkpoint.resume import BEST, METRICS, Run, resume_output_dir  # noqa: E402
from training.utils.data import prepare_data, prepare_pretraining, stop_token_ids  # noqa: E402
from training.utils.engine import precision  # noqa: E402
from training.utils.engine.zero_config import read_user_config  # noqa: E402
from training.utils.generation.sampling import SamplingConfig  # noqa: E402
from training.utils.health import HealthMonitor  # noqa: E402
from training.utils.metrics import MetricsLogger, progress_bar  # noqa: E402
from training.utils.model.export import save_model  # noqa: E402
from training.utils.phases import Phases  # noqa: E402
from training.utils.run.distributed import data_rank, data_size, init_distributed, say  # noqa: E402
from training.utils.run.folders import prepare_output_dir  # noqa: E402


def main(argv: Sequence[str]) -> int:
    """Run step 3; returns the exit code. See the module's docstring for what it writes."""
    groups = parse_flags(argv)
    role_args, data, rollout, ppo, train, zero, evaluate, output, reliability = groups
    start, phases = time.monotonic(), Phases()
    precision.check_dtype(role_args.dtype)
    settings.warn(rollout, ppo, train, zero, evaluate)
    eval_functions = load_eval_functions(evaluate.eval_function)
    functions, model_weight = parse_reward_functions(ppo.reward_function, "--reward_function")
    overrides = read_user_config(zero.deepspeed_config)
    actor_path, reward_path = settings.model_paths(role_args, ppo.reward_function)
    tokenizer = settings.actor_tokenizer(role_args, data, actor_path)
    reward_model = settings.reward_model_settings(
        reward_path, tokenizer, normalize=ppo.normalize_reward, weight=model_weight, plan=output.plan
    )
    critic_path = starts_from(actor_path, reward_model) if ppo.advantage == "gae" else ""
    length = rollout.max_prompt_seq_len + rollout.max_answer_seq_len
    settings.check_models(actor_path, critic_path, reward_model, zero, tokenizer, length)
    if output.plan:
        precision.settle(role_args, resume_output_dir(reliability.resume, output.output_dir), reliability.resume)
        return show_rlhf_plan(actor_path, critic_path, reward_model, role_args, rollout, train, zero, overrides)
    check_training_data(groups)
    output_dir = prepare_output_dir(resume_output_dir(reliability.resume, output.output_dir), "step3")
    device = init_distributed(reliability.distributed_timeout)
    watchdog.watch(output_dir, reliability.hang_timeout)
    settled = precision.settle(role_args, output_dir, reliability.resume)
    torch.manual_seed(train.seed)

    # Data
    rows = prepare_data(
        "prompts",
        data,
        tokenizer,
        max_length=length,
        max_prompt_length=rollout.max_prompt_seq_len,
        seed=train.seed,
        run_dir=output_dir,
    )
    rows.announce()
    mix_rows = None
    if train.unsupervised_data_path:
        mix = prepare_pretraining(train.unsupervised_data_path, data, tokenizer, max_length=length, seed=train.seed)
        mix_rows = mix.train
        say("\n".join(["pre-training mix:", *mix.report.lines()]))
    stop_ids = tuple(stop_token_ids(tokenizer))
    training = prompts.PromptSet(rows.train, tokenizer, stop_ids, train.seed)
    held_out = prompts.PromptSet(rows.held_out, tokenizer, stop_ids, train.seed)
    run = Run.open(
        "step3",
        output_dir,
        reliability,
        groups,
        models=settings.origins(actor_path, reward_path, ppo.reward_function),
        data={"training": rows.train, "held-out": rows.held_out} | ({"pre-training": mix_rows} if mix_rows else {}),
        batches=settings.batches_of_all_ranks(rollout, train, data_size()),
    )
    rollout, train = settings.divide_batches(rollout, train, run.batches, data_size())
    per_rank = rollout.per_device_generation_batch_size // rollout.samples_per_prompt * rollout.generation_batches
    lengths, per_step = rows.train["length"], settings.prompts_per_step(rollout, run.batches, data_size())
    passes = {"epochs": train.num_train_epochs, "iterations": train.num_iterations}
    schedule = prompts.prompt_schedule(lengths, per_rank * data_size(), **passes, seed=train.seed)
    phases.end("data", "loading the models of all roles")

    # Roles
    total_steps = len(schedule) * settings.steps_per_iteration(ppo, rollout, train)
    build = Build(role_args, train, zero, overrides, total_steps, tokenizer.pad_token_id, device)
    roles = build_roles(actor_path, reward_model, functions, build, critic=bool(critic_path))
    sizes = BatchSizes(rollout.per_device_generation_batch_size, train.per_device_training_batch_size)
    backend = generation_backend(roles.actor, rollout.rollout_engine, rows=sizes.decoded, length=length)
    sampling = SamplingConfig(
        rollout.max_answer_seq_len, temperature=rollout.temperature, top_p=rollout.top_p, top_k=rollout.top_k
    )
    pretraining = mix_rows and PretrainingMix(
        mix_rows,
        train.unsup_coef,
        rows=run.batches["rows per step"],
        micro_batch_size=train.per_device_training_batch_size,
        pad_id=tokenizer.pad_token_id,
        device=device,
        seed=train.seed,
    )
    scoring = Scoring(roles, training, ppo, rollout, train)
    trainer = PPOTrainer(
        roles, scoring, backend, sampling, role_args.dtype, phases, pretraining, run.stop_if_asked, run.guard
    )
    phases.end("load")

    # Where the run stands: a checkpoint if there is one, else the SFT model's answers to begin with
    run.load(roles.trained(), {"ema": roles.ema} if roles.ema else {})
    monitor = HealthMonitor(output_dir)
    monitor.replay(output_dir / METRICS, until=run.step)
    logger = MetricsLogger(
        output_dir, output.report_to, output_dir.parent.name + "/step3", monitor.observe, run.step, run.seconds
    )
    shards = reliability.max_shard_size

    def save_actor() -> None:
        phases.end("evaluate")
        save_model(roles.actor.engine, tokenizer, output_dir / BEST, stop_ids=stop_ids, max_shard_size=shards)
        phases.end("save")

    evaluator = HeldOutEvaluation(
        held_out,
        roles,
        backend,
        sampling,
        sizes,
        logger,
        every=evaluate.eval_every,
        iterations=len(schedule),
        functions=eval_functions,
        base=base_model_of(actor_path),
        actor_dir=output_dir / BEST,
        save=save_actor,
    )
    if run.step:
        evaluator.load_state_dict(run.progress)
    else:
        evaluator.begin()
    phases.end("evaluate")

    # Loop
    run.ready(evaluator.state_dict())
    bar = progress_bar(len(schedule), "step 3", run.step)
    for number, chosen in list(enumerate(schedule))[run.step :]:
        dealt = prompts.deal(chosen, lengths, data_size(), rollout.generation_batches, per_step)
        requests = prompts.iteration_requests(
            training,
            chosen,
            [batch[data_rank()] for batch in dealt],
            samples_per_prompt=rollout.samples_per_prompt,
            iteration=number,
            device=device,
        )
        metrics = trainer.iteration(requests, number)
        check_first_ratio(metrics["policy/first_ratio"], role_args.dtype)
        logger.log(number + 1, metrics)
        bar.update()
        bar.set_postfix(reward=f"{metrics['reward/score']:.2f}", kl=f"{metrics['kl/per_sequence']:.2f}")
        if number + 1 in evaluate.trace:
            write_trace(output_dir, trainer.scored, training, number + 1)
        evaluator.after_iteration(number + 1)
        if number % outputs.EVERY == 0:
            outputs.show_progress(number + 1, trainer.scored[0], training, held_out, roles, backend, sampling, logger)
        phases.end("evaluate")
        run.after_step(number + 1, evaluator.state_dict())
        run.stop_if(run.guard.reason, "lower the learning rates, or look at the rewards with --trace")
        phases.end("save")
    bar.close()

    # Save: the actor is the best one so far, by held-out reward at bounded KL
    outputs.save_roles(roles, tokenizer, output_dir, stop_ids, shards)
    phases.end("save")
    summary = evaluator.finish()
    run.stop_if_asked()
    logger.close()
    outputs.write_answers(output_dir, evaluator)
    summary |= {
        "iterations": len(schedule),
        "seconds": time.monotonic() - start + run.seconds,
        "phases": phases.summary(),
        precision.SUMMARY_KEY: settled,
        "run_with": settings.run_with(argv, actor_path, reward_path, output_dir),
    }
    starts = {"actor": actor_path} | ({"critic": critic_path} if critic_path else {})
    outputs.write_cards_and_summary(output_dir, summary, roles, starts, argv, rows, tokenizer)
    return 0


if __name__ == "__main__":
    sys.exit(watchdog.run_training(main))
