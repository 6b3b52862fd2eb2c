"""Step 2: the reward model.

Learns which of two answers people prefer. The model is the step-1 model with its output layer replaced by
a head with one number (a reward model keeps its own); the reward of an answer is the number at its last token, the end
token. The loss is Bradley-Terry's, -log sigmoid(reward of chosen - reward of rejected), the mean over all pairs of an
optimizer step on all ranks (Ouyang et al. 2022, arXiv 2203.02155).

    deepspeed --num_gpus 1 training/step2_reward_model_finetuning/main.py
    deepspeed --num_gpus 2 training/step2_reward_model_finetuning/main.py --model_name_or_path output/run/step1 \
        --data_path my_pairs.jsonl --zero_stage 2

Writes a Hugging Face sequence-classification folder, reward_stats.json (mean and standard deviation of the
held-out chosen rewards: step 3 normalises with them), metrics.jsonl and summary.json.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))  # outside the environment, to say so

from training.migrate.predecessors import others_of
from training.utils import arguments
from training.utils.run.demo import check_training_data
from training.utils.run.runtime import prepare_runtime

ARGUMENTS = arguments.STEP2
OTHERS = others_of("step2")


def parse_flags(argv: Sequence[str]) -> list[Any]:
    """The flags, by `ARGUMENTS`; without torch, so that ``--help`` and mistakes answer at once."""
    prog = "step2_reward_model_finetuning/main.py"
    return arguments.parse_fine_tuning(ARGUMENTS, argv, prog=prog, description=__doc__, others=OTHERS)


if __name__ == "__main__":
    arguments.answer_early(parse_flags, OTHERS, check_training_data)
prepare_runtime()


from training.step2_reward_model_finetuning.pairs import (  # noqa: E402
    PAIRS_BEFORE,
    held_out_rewards,
    pair_weights,
    score_pairs,
    some_rankings,
)
from training.step2_reward_model_finetuning.preference import (  # noqa: E402
    CENTER_COEFFICIENT,
    bradley_terry_loss,
    judgement,
    length_accuracy,
    pair_metrics,
    told,
)
from training.utils.data.batches import pair_micro_batches, rankings_of  # noqa: E402
from training.utils.engine import engine as engines  # noqa: E402
from training.utils.engine.frozen import load_frozen_scorer  # noqa: E402
from training.utils.fine_tuning import FineTuning, build_engine, find_model, open_run, step_metrics  # noqa: E402
from training.utils.memory.training import show_sequence_plan  # noqa: E402
from training.utils.model import classifiers, loading  # noqa: E402
from training.utils.model.forward import TokenScorer, answer_rewards  # noqa: E402
from training.utils.model.reward_stats import RewardStats, few_held_out  # noqa: E402
from training.utils.run import watchdog  # noqa: E402
from training.utils.run.distributed import is_main, say  # noqa: E402
from training.utils.run.folders import latest_output  # noqa: E402
from training.utils.sharing.trial import find_sharing  # noqa: E402


def main(argv: Sequence[str]) -> int:
    """Run step 2; returns the exit code. See the module's docstring for what it writes."""
    groups = parse_flags(argv)
    flags = find_model(groups, loading.resolve_model, lambda: str(latest_output("step1")))
    step = groups[-1]
    classifiers.check_reward_family(flags.path)
    if flags.output.plan:
        return show_sequence_plan("step2", flags)
    tuning = open_run("step2", "pairs", argv, groups, flags, counted="pairs")
    rows, run, train, device = tuning.rows, tuning.run, flags.train, tuning.device
    rankings = rankings_of(rows.train)
    if warning := few_held_out(rows.report.held_out_prompts):
        say(warning)
    pad_id = tuning.tokenizer.pad_token_id
    made = {"dtype": flags.model.dtype, "pad_token_id": pad_id, "attn_implementation": flags.attention}

    def load(config: dict[str, Any]) -> Any:
        """The backbone with one output for each token."""
        new: dict[str, Any] = {"fresh_head_seed": train.seed, "base_bits": flags.lora.base_bits}
        return classifiers.load_classifier(flags.path, ds_config=config, **new, **made)

    engine = build_engine(tuning, load, rows=2, wrap=TokenScorer)
    sharing = find_sharing(engine, answer_rewards, pad_id)
    eval_batch = (train.per_device_eval_batch_size, pad_id, device, sharing)
    progress = run.progress
    tuning.start_logging()
    if not run.step:
        progress["before"] = evaluate(0, tuning, engine, some_rankings(rows.held_out, PAIRS_BEFORE), eval_batch)
    engine.train()
    run.ready(progress)
    for number, indices in tuning.steps():
        sums = dict.fromkeys(("loss", "accuracy", "chosen_mean", "rejected_mean"), 0.0)
        mine = [rankings[i] for i in indices]
        size = train.per_device_train_batch_size
        for batch in pair_micro_batches(rows.train, mine, size, pad_id, device, sharing):
            chosen, rejected = score_pairs(engine, batch)
            weights = batch["weights"]
            loss = bradley_terry_loss(chosen, rejected, step.loss)
            centred = loss + CENTER_COEFFICIENT * (chosen + rejected).square()
            engines.backward(engine, (weights * centred).sum(), len(indices))
            right = (chosen > rejected) + 0.5 * (chosen == rejected)
            for name, values in zip(sums, (loss, right, chosen, rejected), strict=True):
                sums[name] += (weights * values).sum().item()
        result, mean = tuning.update(engine, sums, len(indices))
        found = {f"train/{name}": mean[name] for name in sums}
        found["train/margin"] = mean["chosen_mean"] - mean["rejected_mean"]
        shown = {"loss": f"{mean['loss']:.3f}", "accuracy": f"{mean['accuracy']:.2f}"}
        tuning.log_step(number, found | step_metrics(result), **shown)
        if tuning.evaluation_due(number) and number < tuning.total_steps:
            evaluate(number, tuning, engine, rows.held_out, eval_batch)
        tuning.after_step(number, result, progress)
    tuning.save(engine, tuning.output_dir)
    tuning.phases.end("save")
    say("judging the held-out pairs with the saved model ...")

    results = {"accuracy_before": progress["before"]["accuracy"]} | judge_saved(tuning, made, eval_batch)
    tuning.finish("reward", flags.model.model_name_or_path or flags.path, results)
    return 0


def evaluate(
    number: int, tuning: FineTuning, engine: Any, held_out: Any, eval_batch: Sequence[Any]
) -> dict[str, float]:
    """Some or all held-out pairs' metrics, logged; ``eval_batch`` is what `held_out_rewards` takes after them."""
    metrics = pair_metrics(held_out_rewards(engine, held_out, *eval_batch), pair_weights(held_out))
    engine.train()
    tuning.phases.end("evaluate")
    tuning.logger.log(number, {f"eval/{name}": value for name, value in metrics.items()})
    say(f"step {number}: held-out accuracy {metrics['accuracy']:.3f}, margin {metrics['margin']:.3f}")
    return metrics


def judge_saved(tuning: FineTuning, made: dict[str, Any], eval_batch: Sequence[Any]) -> dict[str, Any]:
    """The numbers that step 3 relies on, of the model on disk in the precision step 3 uses; writes reward_stats.json.

    Args:
        made: how the model is loaded, see `classifiers.load_classifier`.
        eval_batch: what `held_out_rewards` takes after the rows.

    Returns:
        the verdict on the held-out pairs, as `judgement` has it.
    """
    held_out, ds = tuning.rows.held_out, tuning.flags.ds
    loaded: dict[str, Any] = {"zero_stage": ds.zero_stage, "offload": ds.offload, "tensor_parallel": ds.tensor_parallel}
    frozen = load_frozen_scorer(str(tuning.output_dir), device=tuning.device, **loaded, **made)
    pairs = held_out_rewards(frozen, held_out, *eval_batch)
    weighed = pair_weights(held_out)
    after = pair_metrics(pairs, weighed)
    tuning.phases.end("evaluate")
    tuning.logger.log(tuning.total_steps, {f"eval/{name}": value for name, value in after.items()})
    tuning.logger.close()
    # Of a ranking the first pair, which is its best answer against its worst
    stats = RewardStats.of([pairs[mine.start] for mine in rankings_of(held_out)], made["dtype"])
    if line := stats.line():
        say(line)
    longer = length_accuracy(held_out, weighed)
    judged = judgement(pairs, held_out["rejected_kind"][:], longer, weighed)
    say(told(judged))
    if is_main():
        stats.write(tuning.output_dir)
    return judged


if __name__ == "__main__":
    sys.exit(watchdog.run_training(main))
