"""Step 1: supervised fine-tuning.

Teaches a language model to answer, from demonstrations: conversations in which the assistant's turns are
worth imitating. The loss is the cross-entropy of the response tokens only, the end token of each turn
included; prompt tokens are context. The mean is over all response tokens of an optimizer step, on all
ranks and micro-batches together, so the result does not depend on how a batch is divided.

    deepspeed --num_gpus 1 training/step1_supervised_finetuning/main.py
    deepspeed --num_gpus 2 training/step1_supervised_finetuning/main.py --model_name_or_path DIR_OR_HUB_NAME \
        --data_path my_chats.jsonl --zero_stage 2 --lora_dim 8 --lora_module_name q_proj,k_proj --only_optimize_lora

Writes a Hugging Face folder (the best checkpoint by held-out loss), metrics.jsonl and summary.json.
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

ARGUMENTS = arguments.STEP1


def parse_flags(argv: Sequence[str]) -> list[Any]:
    """The flags, by `ARGUMENTS`; without torch, so that ``--help`` and mistakes answer at once."""
    return arguments.parse(ARGUMENTS, argv, prog="step1_supervised_finetuning/main.py", description=__doc__)


if __name__ == "__main__":
    arguments.answer_early(parse_flags)
prepare_runtime()

import torch  # noqa: E402  threads and PATH must be set before

from training.utils.checkpoint.resume import BEST, Run, resume_output_dir  # noqa: E402
from training.utils.data import batches_after, epoch_batches, prepare_data, stop_token_ids  # noqa: E402
from training.utils.engine import engine as engines, precision  # noqa: E402
from training.utils.engine.zero_config import deepspeed_config, read_user_config  # noqa: E402
from training.utils.memory.training import show_sequence_plan  # noqa: E402
from training.utils.metrics import MetricsLogger, progress_bar, watched, write_summary  # noqa: E402
from training.utils.model import loading  # noqa: E402
from training.utils.model.card import write_model_card  # noqa: E402
from training.utils.model.export import move_into, save_model  # noqa: E402
from training.utils.model.forward import enable_gradient_checkpointing  # noqa: E402
from training.utils.model.language_modelling import micro_batches, negative_log_likelihood, predicted_tokens  # noqa: E402
from training.utils.model.limits import check_length  # noqa: E402
from training.utils.model.lora import check_lora, inject_lora  # noqa: E402
from training.utils.model.tokenizer import check_vocabulary, load_tokenizer  # noqa: E402
from training.utils.phases import Phases  # noqa: E402
from training.utils.run import watchdog  # noqa: E402
from training.utils.run.distributed import init_distributed, is_main, reduce_sums, say, world_size  # noqa: E402
from training.utils.run.folders import prepare_output_dir  # noqa: E402


@torch.no_grad()
def held_out_loss(engine, dataset, batch_size: int, pad_id: int) -> float:
    """Mean negative log-likelihood of the held-out response tokens, in nats, over all ranks."""
    engine.eval()
    sums = {"nll": 0.0, "tokens": 0.0}
    for indices in watched(epoch_batches(dataset["length"], batch_size * world_size(), 0, 0), "held out"):
        for batch in micro_batches(dataset, indices, batch_size, pad_id, engine.device):
            sums["nll"] += negative_log_likelihood(engine, batch).item()
            sums["tokens"] += batch["response_mask"][:, 1:].sum().item()
    engine.train()
    total = reduce_sums(sums, engine.device)
    return total["nll"] / max(total["tokens"], 1.0)


def main(argv: Sequence[str]) -> int:
    """Run step 1; returns the exit code. See the module's docstring for what it writes."""
    groups = parse_flags(argv)
    data, model_args, lora, train, ds, output, reliability, step = groups
    start, phases = time.monotonic(), Phases()
    precision.check_dtype(model_args.dtype)
    overrides = read_user_config(ds.deepspeed_config)
    model_path = loading.resolve_model(model_args.model_name_or_path or loading.EMBEDDED)
    check_length(model_path, model_args.max_seq_len, "--max_seq_len")
    check_lora(model_path, lora.lora_dim, lora.lora_module_name)
    if output.plan:
        precision.settle(model_args, resume_output_dir(reliability.resume, output.output_dir), reliability.resume)
        return show_sequence_plan(1, model_path, model_args, lora, train, ds, overrides)
    output_dir = prepare_output_dir(resume_output_dir(reliability.resume, output.output_dir), "step1")
    device = init_distributed(reliability.distributed_timeout)
    watchdog.watch(output_dir, reliability.hang_timeout)
    settled = precision.settle(model_args, output_dir, reliability.resume)
    torch.manual_seed(train.seed)

    # Data
    tokenizer = load_tokenizer(model_path, chat_template=data.chat_template, system_message=data.system_message)
    check_vocabulary(model_path, tokenizer)
    rows = prepare_data(
        1,
        data,
        tokenizer,
        max_length=model_args.max_seq_len,
        seed=train.seed,
        sft_only_data_path=step.sft_only_data_path,
        train_on_prompts=step.train_on_prompts,
        run_dir=output_dir,
    )
    rows.announce()
    pad_id, stop_ids = tokenizer.pad_token_id, stop_token_ids(tokenizer)
    rows_per_rank = train.per_device_train_batch_size * train.gradient_accumulation_steps
    run = Run.open(
        "step1",
        output_dir,
        reliability,
        groups,
        models={"--model_name_or_path": model_path},
        data={"training": rows.train, "held-out": rows.held_out},
        batches={"rows per step": rows_per_rank * world_size()},
    )
    global_batch = run.batches["rows per step"]
    steps_per_epoch = math.ceil(len(rows.train) / global_batch)
    total_steps = steps_per_epoch * train.num_train_epochs
    response_tokens = predicted_tokens(rows.train)
    phases.end("data", "loading the model")

    # Engine
    config = deepspeed_config(
        zero_stage=ds.zero_stage,
        dtype=model_args.dtype,
        offload=ds.offload,
        micro_batch_size=train.per_device_train_batch_size,
        overrides=overrides,
    )
    model = loading.load_causal_lm(
        model_path, dtype=model_args.dtype, attn_implementation=model_args.attn_implementation, ds_config=config
    )
    if lora.lora_dim:
        model = inject_lora(
            model, dim=lora.lora_dim, module_name=lora.lora_module_name, only_optimize_lora=lora.only_optimize_lora
        )
    if model_args.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    engine = engines.initialize_engine(
        model.to(device),
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
    progress = run.progress or {"lowest_loss": math.inf, "best_step": 0}
    logger = MetricsLogger(
        output_dir, output.report_to, output_dir.parent.name + "/step1", done=run.step, seconds=run.seconds
    )

    def evaluate(step_number: int) -> float:
        """The held-out loss, logged."""
        loss = held_out_loss(engine, rows.held_out, train.per_device_eval_batch_size, pad_id)
        logger.log(step_number, {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 50.0))})
        say(f"step {step_number}: held-out loss {loss:.4f}, perplexity {math.exp(min(loss, 50.0)):.2f}")
        phases.end("evaluate")
        if step_number and loss < progress["lowest_loss"] or step_number == total_steps and not progress["best_step"]:
            shards = reliability.max_shard_size
            save_model(engine, tokenizer, output_dir / BEST, stop_ids=stop_ids, max_shard_size=shards)
            phases.end("save")
            progress.update(best_step=step_number, loss_after=loss)
        progress["lowest_loss"] = min(progress["lowest_loss"], loss)
        return loss

    if not run.step:
        progress["loss_before"] = evaluate(0)
    engine.train()
    run.ready(progress)
    bar = progress_bar(total_steps, "step 1", run.step)
    for step_number, indices in batches_after(
        run.step, rows.train["length"], global_batch, train.seed, train.num_train_epochs
    ):
        tokens = sum(response_tokens[i] for i in indices)
        sums = {"nll": 0.0}
        for batch in micro_batches(rows.train, indices, train.per_device_train_batch_size, pad_id, device):
            nll = negative_log_likelihood(engine, batch)
            engines.backward(engine, nll, tokens)
            sums["nll"] += nll.item()
        result = engines.optimizer_step(engine)
        phases.end("train")
        loss = reduce_sums(sums, device)["nll"] / tokens
        logger.log(
            step_number,
            {
                "train/loss": loss,
                "train/grad_norm": result.grad_norm,
                "train/learning_rate": result.learning_rate,
                "train/skipped": float(result.failed),
                "train/response_tokens": tokens,
            },
        )
        bar.update()
        bar.set_postfix(loss=f"{loss:.3f}")
        due = train.eval_interval and step_number % train.eval_interval == 0
        if due or step_number % steps_per_epoch == 0:
            evaluate(step_number)
        run.guard.count(["gradients that are not finite"] if result.failed else [])
        run.after_step(step_number, progress)
        run.stop_if(run.guard.reason, "lower --learning_rate; with --dtype fp16 try bf16")
    bar.close()
    logger.close()
    if is_main():
        move_into(output_dir / BEST, output_dir)
    summary = {
        "held_out": len(rows.held_out),
        "loss_before": progress["loss_before"],
        "loss_after": progress["loss_after"],
        "perplexity_before": math.exp(min(progress["loss_before"], 50.0)),
        "perplexity_after": math.exp(min(progress["loss_after"], 50.0)),
        "base_model": model_path,
        "best_step": progress["best_step"],
        "steps": total_steps,
        "seconds": time.monotonic() - start + run.seconds,
        "phases": phases.summary(),
        precision.SUMMARY_KEY: settled,
    }
    base = (model_args.model_name_or_path or loading.EMBEDDED, model_path)
    write_model_card(output_dir, "sft", base, argv=argv, data=rows.report.lines(), results=summary, tokenizer=tokenizer)
    write_summary(output_dir, summary)
    say(f"step 1 saved to {output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(watchdog.run_training(main))
