"""Step 2: the reward model.

Learns which of two answers people prefer. The model is the step-1 model with its output layer replaced by
a head with one number; the reward of an answer is the number at its last token, the end token. The loss is
Bradley-Terry's, -log sigmoid(reward of chosen - reward of rejected), the mean over all pairs of an optimizer
step on all ranks (Ouyang et al. 2022, arXiv 2203.02155).

    deepspeed --num_gpus 1 training/step2_reward_model_finetuning/main.py
    deepspeed --num_gpus 2 training/step2_reward_model_finetuning/main.py --model_name_or_path output/run/step1 \
        --data_path my_pairs.jsonl --zero_stage 2

Writes a Hugging Face sequence-classification folder, reward_stats.json (mean and standard deviation of the
held-out chosen rewards: step 3 normalises with them), metrics.jsonl and summary.json.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))  # outside the environment, to say so

from training.utils import arguments
from training.utils.run.runtime import prepare_runtime

ARGUMENTS = arguments.STEP2


def parse_flags(argv: Sequence[str]) -> list[Any]:
    """The flags, by `ARGUMENTS`; without torch, so that ``--help`` and mistakes answer at once."""
    return arguments.parse(ARGUMENTS, argv, prog="step2_reward_model_finetuning/main.py", description=__doc__)


if __name__ == "__main__":
    arguments.answer_early(parse_flags)
prepare_runtime()

import torch  # noqa: E402  threads and PATH must be set before

from training.step2_reward_model_finetuning.pairs import (  # noqa: E402
    PAIRS_BEFORE,
    held_out_rewards,
    micro_batches,
    score_pairs,
)
from training.step2_reward_model_finetuning.preference import (  # noqa: E402
    CENTER_COEFFICIENT,
    bradley_terry_loss,
    judgement,
    length_accuracy,
    pair_metrics,
    told,
)
from training.utils.checkpoint.resume import Run, resume_output_dir  # noqa: E402
from training.utils.data import batches_after, prepare_data, spread_rows, stop_token_ids  # noqa: E402
from training.utils.engine import engine as engines, precision  # noqa: E402
from training.utils.engine.zero_config import deepspeed_config, read_user_config  # noqa: E402
from training.utils.memory.training import show_sequence_plan  # noqa: E402
from training.utils.metrics import MetricsLogger, progress_bar, write_summary  # noqa: E402
from training.utils.model import classifiers, loading  # noqa: E402
from training.utils.model.card import write_model_card  # noqa: E402
from training.utils.model.export import save_model  # noqa: E402
from training.utils.model.forward import enable_gradient_checkpointing  # noqa: E402
from training.utils.model.limits import check_length  # noqa: E402
from training.utils.model.lora import check_lora, inject_lora  # noqa: E402
from training.utils.model.reward_model import RewardStats, few_held_out  # noqa: E402
from training.utils.model.tokenizer import check_vocabulary, load_tokenizer  # noqa: E402
from training.utils.phases import Phases  # noqa: E402
from training.utils.run import watchdog  # noqa: E402
from training.utils.run.distributed import init_distributed, rank, reduce_sums, say, world_size  # noqa: E402
from training.utils.run.folders import latest_output, prepare_output_dir  # noqa: E402


def main(argv: Sequence[str]) -> int:
    """Run step 2; returns the exit code. See the module's docstring for what it writes."""
    groups = parse_flags(argv)
    data, model_args, lora, train, ds, output, reliability, step = groups
    start, phases = time.monotonic(), Phases()
    precision.check_dtype(model_args.dtype)
    overrides = read_user_config(ds.deepspeed_config)
    model_path = loading.resolve_model(model_args.model_name_or_path or str(latest_output("step1")))
    check_length(model_path, model_args.max_seq_len, "--max_seq_len")
    classifiers.check_reward_family(model_path)
    check_lora(model_path, lora.lora_dim, lora.lora_module_name)
    if output.plan:
        precision.settle(model_args, resume_output_dir(reliability.resume, output.output_dir), reliability.resume)
        return show_sequence_plan(2, model_path, model_args, lora, train, ds, overrides)
    output_dir = prepare_output_dir(resume_output_dir(reliability.resume, output.output_dir), "step2")
    device = init_distributed(reliability.distributed_timeout)
    watchdog.watch(output_dir, reliability.hang_timeout)
    settled = precision.settle(model_args, output_dir, reliability.resume)
    torch.manual_seed(train.seed)

    # Data
    tokenizer = load_tokenizer(model_path, chat_template=data.chat_template, system_message=data.system_message)
    check_vocabulary(model_path, tokenizer)
    rows = prepare_data(2, data, tokenizer, max_length=model_args.max_seq_len, seed=train.seed, run_dir=output_dir)
    rows.announce()
    if warning := few_held_out(len(rows.held_out)):
        say(warning)
    pad_id, stop_ids = tokenizer.pad_token_id, stop_token_ids(tokenizer)
    pairs_per_rank = train.per_device_train_batch_size * train.gradient_accumulation_steps
    run = Run.open(
        "step2",
        output_dir,
        reliability,
        groups,
        models={"--model_name_or_path": model_path},
        data={"training": rows.train, "held-out": rows.held_out},
        batches={"pairs per step": pairs_per_rank * world_size()},
    )
    global_batch = run.batches["pairs per step"]
    steps_per_epoch = math.ceil(len(rows.train) / global_batch)
    total_steps = steps_per_epoch * train.num_train_epochs
    phases.end("data", "loading the model")

    # Engine
    config = deepspeed_config(
        zero_stage=ds.zero_stage,
        dtype=model_args.dtype,
        offload=ds.offload,
        micro_batch_size=2 * train.per_device_train_batch_size,
        overrides=overrides,
    )
    load = {"dtype": model_args.dtype, "pad_token_id": pad_id, "attn_implementation": model_args.attn_implementation}
    model = classifiers.load_classifier(model_path, ds_config=config, fresh_head_seed=train.seed, **load)
    if lora.lora_dim:
        model = inject_lora(
            model, dim=lora.lora_dim, module_name=lora.lora_module_name, only_optimize_lora=lora.only_optimize_lora
        )
    if model_args.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    engine = engines.initialize_engine(
        classifiers.TokenScorer(model).to(device),
        config,
        learning_rate=train.learning_rate,
        weight_decay=train.weight_decay,
        num_warmup_steps=train.num_warmup_steps,
        total_steps=total_steps,
        lr_scheduler_type=train.lr_scheduler_type,
    )
    phases.end("load")

    # Loop, from the checkpoint on if there is one
    run.load({"model": engine})
    progress = run.progress
    logger = MetricsLogger(
        output_dir, output.report_to, output_dir.parent.name + "/step2", done=run.step, seconds=run.seconds
    )

    def evaluate(step_number: int, held_out: Any) -> dict[str, float]:
        """Some or all held-out pairs' metrics, logged."""
        metrics = pair_metrics(held_out_rewards(engine, held_out, train.per_device_eval_batch_size, pad_id, device))
        engine.train()
        phases.end("evaluate")
        logger.log(step_number, {f"eval/{name}": value for name, value in metrics.items()})
        say(f"step {step_number}: held-out accuracy {metrics['accuracy']:.3f}, margin {metrics['margin']:.3f}")
        return metrics

    if not run.step:
        progress["before"] = evaluate(0, rows.held_out.select(spread_rows(len(rows.held_out), PAIRS_BEFORE)))
    engine.train()
    run.ready(progress)
    bar = progress_bar(total_steps, "step 2", run.step)
    for step_number, indices in batches_after(
        run.step, rows.train["length"], global_batch, train.seed, train.num_train_epochs
    ):
        sums = dict.fromkeys(("loss", "correct", "chosen", "rejected"), 0.0)
        for batch, weight in micro_batches(rows.train, indices, train.per_device_train_batch_size, pad_id, device):
            chosen, rejected = score_pairs(engine, batch)
            loss = bradley_terry_loss(chosen, rejected, step.loss)
            centred = loss + CENTER_COEFFICIENT * (chosen + rejected).square()
            engines.backward(engine, weight * centred.sum(), len(indices))
            sums["loss"] += weight * loss.sum().item()
            sums["correct"] += weight * (chosen > rejected).sum().item()
            sums["chosen"] += weight * chosen.sum().item()
            sums["rejected"] += weight * rejected.sum().item()
        result = engines.optimizer_step(engine)
        phases.end("train")
        mean = {name: total / len(indices) for name, total in reduce_sums(sums, device).items()}
        logger.log(
            step_number,
            {
                "train/loss": mean["loss"],
                "train/accuracy": mean["correct"],
                "train/chosen_mean": mean["chosen"],
                "train/rejected_mean": mean["rejected"],
                "train/margin": mean["chosen"] - mean["rejected"],
                "train/grad_norm": result.grad_norm,
                "train/learning_rate": result.learning_rate,
                "train/skipped": float(result.failed),
            },
        )
        bar.update()
        bar.set_postfix(loss=f"{mean['loss']:.3f}", accuracy=f"{mean['correct']:.2f}")
        if train.eval_interval and step_number % train.eval_interval == 0 and step_number < total_steps:
            evaluate(step_number, rows.held_out)
        run.guard.count(["gradients that are not finite"] if result.failed else [])
        run.after_step(step_number, progress)
        run.stop_if(run.guard.reason, "lower --learning_rate; with --dtype fp16 try bf16")
    bar.close()
    save_model(engine, tokenizer, output_dir, stop_ids=stop_ids, max_shard_size=reliability.max_shard_size)
    phases.end("save", "judging the held-out pairs with the saved model")

    # The numbers that step 3 relies on come from the model on disk, in the precision step 3 uses
    frozen = engines.load_frozen_scorer(
        str(output_dir), zero_stage=ds.zero_stage, offload=ds.offload, device=device, **load
    )
    pairs = held_out_rewards(frozen, rows.held_out, train.per_device_eval_batch_size, pad_id, device)
    after = pair_metrics(pairs)
    phases.end("evaluate")
    logger.log(total_steps, {f"eval/{name}": value for name, value in after.items()})
    logger.close()
    stats = RewardStats.of(pairs, model_args.dtype)
    if line := stats.line():
        say(line)
    judged = judgement(pairs, rows.held_out["rejected_kind"][:], length_accuracy(rows.held_out))
    say(told(judged))
    if rank() == 0:
        stats.write(output_dir)
    summary = {
        "accuracy_before": progress["before"]["accuracy"],
        **judged,
        "steps": total_steps,
        "seconds": time.monotonic() - start + run.seconds,
        "phases": phases.summary(),
        precision.SUMMARY_KEY: settled,
    }
    base, data_lines = (model_args.model_name_or_path or model_path, model_path), rows.report.lines()
    write_model_card(output_dir, "reward", base, argv=argv, data=data_lines, results=summary, tokenizer=tokenizer)
    write_summary(output_dir, summary)
    say(f"step 2 saved to {output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(watchdog.run_training(main))
