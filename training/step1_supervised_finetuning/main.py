"""Step 1: supervised fine-tuning.

Teaches a language model to answer, from demonstrations: conversations in which the assistant's turns are
worth imitating. The loss is the cross-entropy of the response tokens only, the end token of each turn
included; prompt tokens are context. The mean is over all response tokens of an optimizer step, on all
ranks and micro-batches together, so the result does not depend on how a batch is divided.

    deepspeed --num_gpus 1 training/step1_supervised_finetuning/main.py
    deepspeed --num_gpus 2 training/step1_supervised_finetuning/main.py --model_name_or_path DIR_OR_HUB_NAME \
        --data_path my_chats.jsonl --zero_stage 2 --lora_dim 8 --lora_module_name q_proj,k_proj --only_optimize_lora

Writes a Hugging Face folder (the best checkpoint by held-out loss, or by ROUGE), metrics.jsonl and summary.json.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))  # outside the environment, to say so

from training.migrate.predecessors import others_of
from training.utils import arguments
from training.utils.run.demo import check_training_data
from training.utils.run.runtime import prepare_runtime

ARGUMENTS = arguments.STEP1
OTHERS = others_of("step1")


def parse_flags(argv: Sequence[str]) -> list[Any]:
    """The flags, by `ARGUMENTS`; without torch, so that ``--help`` and mistakes answer at once."""
    prog = "step1_supervised_finetuning/main.py"
    return arguments.parse_fine_tuning(ARGUMENTS, argv, prog=prog, description=__doc__, others=OTHERS)


if __name__ == "__main__":
    arguments.answer_early(parse_flags, OTHERS, check_training_data)
prepare_runtime()

import torch  # noqa: E402  threads and PATH must be set before

from training.step1_supervised_finetuning.answers import RougeJudge  # noqa: E402
from training.utils.checkpoint.resume import BEST  # noqa: E402
from training.utils.data.batches import epoch_batches  # noqa: E402
from training.utils.engine import engine as engines  # noqa: E402
from training.utils.fine_tuning import FineTuning, build_engine, find_model, open_run, step_metrics  # noqa: E402
from training.utils.memory.training import show_sequence_plan  # noqa: E402
from training.utils.metrics import watched  # noqa: E402
from training.utils.model import loading  # noqa: E402
from training.utils.model.export import move_into  # noqa: E402
from training.utils.model.forward import answer_sums  # noqa: E402
from training.utils.model.language_modelling import micro_batches, negative_log_likelihood, predicted_tokens  # noqa: E402
from training.utils.run import watchdog  # noqa: E402
from training.utils.run.distributed import data_size, is_main, reduce_sums, say  # noqa: E402
from training.utils.sharing.rows import Sharing  # noqa: E402
from training.utils.sharing.trial import find_sharing, shares_across  # noqa: E402


@torch.no_grad()
def held_out_loss(tuning: FineTuning, engine: Any, sharing: Sharing | None) -> float:
    """Mean negative log-likelihood of the held-out response tokens, in nats, over all ranks."""
    engine.eval()
    dataset, size = tuning.rows.held_out, tuning.flags.train.per_device_eval_batch_size
    sums = {"nll": 0.0, "tokens": 0.0}
    for indices in watched(epoch_batches(dataset["length"], size * data_size(), 0, 0), "held out"):
        for batch in micro_batches(dataset, indices, size, tuning.tokenizer.pad_token_id, tuning.device, sharing):
            sums["nll"] += negative_log_likelihood(engine, batch).item()
            sums["tokens"] += batch["response_mask"][:, 1:].sum().item()
    engine.train()
    total = reduce_sums(sums, tuning.device)
    return total["nll"] / max(total["tokens"], 1.0)


def main(argv: Sequence[str]) -> int:
    """Run step 1; returns the exit code. See the module's docstring for what it writes."""
    groups = parse_flags(argv)
    step = groups[-1]
    flags = find_model(groups, loading.resolve_policy, lambda: loading.EMBEDDED)
    if flags.output.plan:
        return show_sequence_plan("step1", flags)
    more = {"sft_only_data_path": step.sft_only_data_path, "train_on_prompts": step.train_on_prompts}
    tuning = open_run("step1", "demonstrations", argv, groups, flags, counted="rows", **more)
    train, rows, run, device = flags.train, tuning.rows, tuning.run, tuning.device
    pad_id, response_tokens = tuning.tokenizer.pad_token_id, predicted_tokens(rows.train)
    asked = (rows.held_out, tuning.tokenizer, flags.model.max_seq_len, train.per_device_eval_batch_size)
    rouge = RougeJudge(*asked) if step.best_by == "rouge" else None
    load: dict[str, Any] = {"dtype": flags.model.dtype, "attn_implementation": flags.attention}
    load["base_bits"] = flags.lora.base_bits
    engine = build_engine(tuning, lambda config: loading.load_causal_lm(flags.path, ds_config=config, **load))
    sharing = find_sharing(engine, answer_sums, pad_id) if shares_across(device) else None
    progress = run.progress or {"lowest_loss": math.inf, "best_step": 0}
    tuning.start_logging()
    if not run.step:
        evaluate(0, tuning, engine, sharing, rouge, progress)
    engine.train()
    run.ready(progress)
    for number, indices in tuning.steps():
        tokens = sum(response_tokens[i] for i in indices)
        sums = {"nll": 0.0}
        for batch in micro_batches(rows.train, indices, train.per_device_train_batch_size, pad_id, device, sharing):
            nll = negative_log_likelihood(engine, batch)
            engines.backward(engine, nll, tokens)
            sums["nll"] += nll.item()
        result, mean = tuning.update(engine, sums, tokens)
        found = {"train/loss": mean["nll"], **step_metrics(result), "train/response_tokens": tokens}
        tuning.log_step(number, found, loss=f"{mean['nll']:.3f}")
        if tuning.evaluation_due(number) or number % tuning.steps_per_epoch == 0:
            evaluate(number, tuning, engine, sharing, rouge, progress)
        tuning.after_step(number, result, progress)
    tuning.logger.close()
    publish_best(tuning, progress)
    return 0


def evaluate(
    number: int,
    tuning: FineTuning,
    engine: Any,
    sharing: Sharing | None,
    rouge: RougeJudge | None,
    progress: dict[str, Any],
) -> None:
    """The held-out loss, and ROUGE if that is asked for, logged; the trained model with the best is kept."""
    loss = held_out_loss(tuning, engine, sharing)
    found = {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 50.0))}
    told, score = f"held-out loss {loss:.4f}, perplexity {found['eval/perplexity']:.2f}", loss
    if rouge is not None:
        found["eval/rouge"] = rouge.score(engine)
        told, score = f"{told}, ROUGE {found['eval/rouge']:.3f}", -found["eval/rouge"]
    tuning.logger.log(number, found)
    say(f"step {number}: {told}")
    tuning.phases.end("evaluate")
    last = number == tuning.total_steps
    if number and score < progress["lowest_loss"] or last and not progress["best_step"]:
        tuning.save(engine, tuning.output_dir / BEST)
        tuning.phases.end("save")
        progress.update(best_step=number, loss_after=loss, lowest_loss=score)  # by ROUGE: its negative
    if not number:
        progress.update(loss_before=loss, score_before=score)


def publish_best(tuning: FineTuning, progress: dict[str, Any]) -> None:
    """Put the best model where the run's is looked for, with its card and the summary."""
    if not progress["lowest_loss"] < progress.get("score_before", math.inf):
        say(f"warning: no trained model is better than the untrained one on the held-out rows; that of step "
            f"{progress['best_step']} is kept, the best of them: lower --learning_rate, or give more data")  # fmt: skip
    if is_main():
        move_into(tuning.output_dir / BEST, tuning.output_dir)
    named = tuning.flags.model.model_name_or_path or loading.EMBEDDED
    results = {
        "held_out": len(tuning.rows.held_out),
        "loss_before": progress["loss_before"],
        "loss_after": progress["loss_after"],
        "perplexity_before": math.exp(min(progress["loss_before"], 50.0)),
        "perplexity_after": math.exp(min(progress["loss_after"], 50.0)),
        "base_model": loading.noted(named, tuning.flags.path),
        "best_step": progress["best_step"],
    }
    tuning.finish("sft", named, results)


if __name__ == "__main__":
    sys.exit(watchdog.run_training(main))
