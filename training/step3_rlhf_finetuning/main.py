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

from training.step3_rlhf_finetuning import outputs, settings  # noqa: E402
from training.step3_rlhf_finetuning.comparison import load_eval_functions  # noqa: E402
from training.step3_rlhf_finetuning.kept_actor import open_evaluation  # noqa: E402
from training.step3_rlhf_finetuning.plan import show_rlhf_plan  # noqa: E402
from training.step3_rlhf_finetuning.ppo_trainer import PPOTrainer, build_trainer  # noqa: E402
from training.step3_rlhf_finetuning.pretraining_mix import PretrainingMix  # noqa: E402
from training.utils.checkpoint.resume import resume_output_dir  # noqa: E402
from training.utils.engine import precision  # noqa: E402
from training.utils.metrics import progress_bar  # noqa: E402


def loaded_trainer(o: settings.Opened) -> PPOTrainer:
    """Every role of the run, with what the actor's steps learn beside the answers by ``--unsupervised_data_path``."""
    train = o.flags.train
    mix = o.mix and PretrainingMix(
        o.mix,
        train.unsup_coef,
        rows=o.run.batches["rows per step"],
        micro_batch_size=train.per_device_training_batch_size,
        pad_id=o.models.tokenizer.pad_token_id,
        device=o.device,
        seed=train.seed,
    )
    return build_trainer(
        o.flags,
        o.models,
        o.training,
        len(o.schedule),
        o.device,
        o.output_dir,
        phases=o.phases,
        pretraining=mix,
        stop=o.run.stop_by,
        guard=o.run.guard,
    )


def main(argv: Sequence[str]) -> int:
    """Run step 3; returns the exit code. See the module's docstring for what it writes."""
    flags = settings.Flags(*parse_flags(argv))
    precision.check_dtype(flags.roles.dtype)
    settings.warn(flags)
    eval_functions = load_eval_functions(flags.evaluate.eval_function)
    models = settings.find_models(flags)
    if flags.output.plan:
        resume = flags.reliability.resume
        precision.settle(flags.roles, resume_output_dir(resume, flags.output.output_dir), resume)
        return show_rlhf_plan(models, flags)
    opened = settings.open_run(argv, flags, models)
    run, phases, output_dir = opened.run, opened.phases, opened.output_dir
    trainer = loaded_trainer(opened)
    roles = trainer.roles
    phases.end("load")

    # Where the run stands: a checkpoint if there is one, else the SFT model's answers to begin with
    run.load(roles.trained(), {"ema": roles.ema} if roles.ema else {})
    logger = outputs.monitored_logger(output_dir, flags.output.report_to, run)
    with outputs.saved_if_lost(run, run.step):
        evaluator = open_evaluation(opened, trainer, logger, eval_functions)
    run.ready(evaluator.state_dict())

    bar = progress_bar(len(opened.schedule), "step 3", run.step)
    for number in range(run.step, len(opened.schedule)):
        with outputs.saved_if_lost(run, number):
            metrics = trainer.iteration(opened.requests(number), number)
        logger.log(number + 1, metrics)
        bar.update()
        bar.set_postfix(reward=f"{metrics['reward/score']:.2f}", kl=f"{metrics['kl/per_sequence']:.2f}")
        if number + 1 in flags.evaluate.trace:
            outputs.write_trace(output_dir, trainer.scored, opened.training, number + 1)
        with outputs.saved_if_lost(run, number + 1, evaluator):
            evaluator.after_iteration(number + 1)
            if number % outputs.EVERY == 0:
                outputs.show_progress(number + 1, trainer, opened.held_out, logger)
        phases.end("evaluate")
        run.after_step(number + 1, evaluator.state_dict())
        run.stop_if(run.guard.reason, "lower the learning rates, or look at the rewards with --trace")
        phases.end("save")
    bar.close()

    # Save: the actor is the best one so far, by held-out reward at bounded KL
    shards = flags.reliability.max_shard_size
    outputs.save_critic_and_ema(roles, models.tokenizer, output_dir, opened.training.stop_ids, shards)
    phases.end("save")
    with outputs.saved_if_lost(run, run.step):
        summary = evaluator.finish()
    run.stop_if_asked()
    logger.close()
    outputs.publish_actor(output_dir)
    outputs.write_answers(output_dir, evaluator)
    starts = {"actor": models.actor} | ({"critic": models.critic} if models.critic else {})
    summary |= opened.summary()
    outputs.write_cards_and_summary(output_dir, summary, roles, starts, argv, opened.rows, models.tokenizer)
    return 0


if __name__ == "__main__":
    sys.exit(watchdog.run_training(main))
