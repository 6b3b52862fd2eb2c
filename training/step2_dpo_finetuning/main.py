"""Direct preference optimisation: learns from the pairs that a reward model would learn from, without one, and no PPO.

The policy is the step-1 model, and so is the reference that it is held against. The reward of an answer is beta times
the log of how much likelier the policy finds it than the reference does; the loss is -log sigmoid(reward of chosen -
reward of rejected), the mean over all pairs of an optimizer step on all ranks (Rafailov et al. 2023, arXiv
2305.18290). --loss has others of the same log-probs.

    deepspeed --num_gpus 1 training/step2_dpo_finetuning/main.py
    deepspeed --num_gpus 2 training/step2_dpo_finetuning/main.py --model_name_or_path output/run/step1 \
        --data_path my_pairs.jsonl --zero_stage 2 --beta 0.1

The reference is the model itself with its adapters off where they alone train (--lora_dim with --only_optimize_lora),
else a second, frozen copy. Writes a Hugging Face folder, metrics.jsonl, health.jsonl and summary.json.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))  # outside the environment, to say so

from training.migrate.predecessors import others_of
from training.utils import arguments
from training.utils.run.demo import check_training_data
from training.utils.run.runtime import prepare_runtime

ARGUMENTS = arguments.DPO
OTHERS = others_of("dpo")


def parse_flags(argv: Sequence[str]) -> list[Any]:
    """The flags, by `ARGUMENTS`; without torch, so that ``--help`` and mistakes answer at once."""
    prog = "step2_dpo_finetuning/main.py"
    return arguments.parse_fine_tuning(ARGUMENTS, argv, prog=prog, description=__doc__, others=OTHERS)


if __name__ == "__main__":
    arguments.answer_early(parse_flags, OTHERS, check_training_data)
prepare_runtime()


from training.step2_dpo_finetuning.pairs import Preferences, answer_log_probs, answer_tokens, means  # noqa: E402
from training.utils.checkpoint.resume import METRICS  # noqa: E402
from training.utils.data.batches import pair_micro_batches, rankings_of  # noqa: E402
from training.utils.engine import engine as engines  # noqa: E402
from training.utils.engine.frozen import load_reference  # noqa: E402
from training.utils.fine_tuning import FineTuning, build_engine, find_model, open_run, step_metrics  # noqa: E402
from training.utils.health import HealthMonitor  # noqa: E402
from training.utils.health_rules import DPO_RULES  # noqa: E402
from training.utils.intervals import wilson_interval  # noqa: E402
from training.utils.memory.training import show_sequence_plan  # noqa: E402
from training.utils.model import loading  # noqa: E402
from training.utils.run import watchdog  # noqa: E402
from training.utils.run.distributed import say  # noqa: E402
from training.utils.run.folders import latest_output  # noqa: E402
from training.utils.sharing.trial import find_sharing  # noqa: E402


def main(argv: Sequence[str]) -> int:
    """Run DPO; returns the exit code. See the module's docstring for what it writes."""
    groups = parse_flags(argv)
    flags = find_model(groups, loading.resolve_policy, lambda: str(latest_output("step1")))
    step = groups[-1]
    adapters_only, needs_reference = flags.lora.only_optimize_lora, step.loss not in arguments.WITHOUT_REFERENCE
    copied: dict[str, Any] = {"offload": step.offload_reference_model}
    if flags.output.plan:
        return show_sequence_plan("dpo", flags, copied if needs_reference and not adapters_only else None)
    tuning = open_run("dpo", "pairs", argv, groups, flags, counted="pairs")
    rows, run, train, device = tuning.rows, tuning.run, flags.train, tuning.device
    pad_id = tuning.tokenizer.pad_token_id
    load: dict[str, Any] = {"dtype": flags.model.dtype, "attn_implementation": flags.attention}
    copied |= {"zero_stage": flags.ds.zero_stage, "tensor_parallel": flags.ds.tensor_parallel, "device": device} | load
    frozen = load_reference(flags.path, adapters_only=adapters_only, **copied) if needs_reference else None
    load["base_bits"] = flags.lora.base_bits
    engine = build_engine(tuning, lambda config: loading.load_causal_lm(flags.path, ds_config=config, **load), rows=2)
    sharing = find_sharing(engine, answer_log_probs, pad_id)
    preferences, rankings = Preferences(engine, frozen, step, sharing), rankings_of(rows.train)
    progress, monitor = run.progress, HealthMonitor(tuning.output_dir, DPO_RULES)
    monitor.replay(tuning.output_dir / METRICS, run.done is not None)
    tuning.start_logging(monitor.observe)
    if not run.step:
        progress["before"] = evaluate(0, tuning, preferences, progress)
    run.ready(progress)
    for number, indices in tuning.steps():
        mine = [rankings[i] for i in indices]
        batches = list(pair_micro_batches(rows.train, mine, train.per_device_train_batch_size, pad_id, device, sharing))
        references = [preferences.reference(batch) for batch in batches]
        drift = preferences.drift(batches, references, len(indices))
        engine.train()
        sums: dict[str, float] = {}
        for batch, reference in zip(batches, references, strict=True):
            judged = preferences.judge(answer_log_probs(engine, batch), reference, answer_tokens(batch), drift)
            engines.backward(engine, (batch["weights"] * judged["loss"]).sum(), len(indices))
            for name, values in judged.items():
                sums[name] = sums.get(name, 0.0) + (batch["weights"] * values).sum().item()
        result, mean = tuning.update(engine, sums, len(indices))
        found = {f"train/{name}": value for name, value in mean.items()} | step_metrics(result)
        tuning.log_step(number, found, loss=f"{mean['loss']:.3f}", accuracy=f"{mean['accuracy']:.2f}")
        if tuning.evaluation_due(number) or number == tuning.total_steps:
            progress["after"] = evaluate(number, tuning, preferences, progress)
        tuning.after_step(number, result, progress)
    tuning.logger.close()
    tuning.save(engine, tuning.output_dir)
    tuning.phases.end("save")
    verdict = compared(progress["before"], progress["after"], rows.report.held_out_prompts)
    base = loading.noted(flags.model.model_name_or_path, flags.path)
    about = {"loss_kind": step.loss, "beta": step.strength, "base_model": base}
    remarks = {"remarks": [remark.text for remark in monitor.remarks]}
    tuning.finish("dpo", flags.model.model_name_or_path or flags.path, verdict | about | remarks)
    return 0


def evaluate(
    number: int, tuning: FineTuning, preferences: Preferences, progress: Mapping[str, Any]
) -> dict[str, float]:
    """The held-out pairs' metrics, logged."""
    asked = (tuning.rows.held_out, tuning.flags.train.per_device_eval_batch_size, tuning.tokenizer.pad_token_id)
    found = means(preferences.held_out(*asked))
    found["chosen_change"] = found["chosen_per_token"] - progress.get("before", found)["chosen_per_token"]
    if preferences.frozen is not None or tuning.flags.lora.only_optimize_lora:
        found["kl"] = preferences.kl(*asked)
    tuning.phases.end("evaluate")
    tuning.logger.log(number, {f"eval/{name}": value for name, value in found.items()})
    say(
        f"step {number}: held-out loss {found['loss']:.4f}, accuracy {found['accuracy']:.3f}, "
        f"margin {found['margin']:.3f}"
    )
    return found


def compared(before: Mapping[str, float], after: Mapping[str, float], held_out: int) -> dict[str, float]:
    """What the summary says of the held-out pairs, by their metrics before and after training; accuracy with its 95%
    interval over ``held_out`` prompts."""
    low, high = wilson_interval(after["accuracy"], held_out)
    sides = ("loss", "margin", "chosen_log_prob", "rejected_log_prob")
    return {
        "held_out": held_out,
        "accuracy_after": after["accuracy"],
        "accuracy_low": low,
        "accuracy_high": high,
        **{f"{name}_{when}": found[name] for name in sides for when, found in (("before", before), ("after", after))},
        **{name: after[name] for name in ("chosen_reward", "rejected_reward", "chosen_change", "kl") if name in after},
    }


if __name__ == "__main__":
    sys.exit(watchdog.run_training(main))
