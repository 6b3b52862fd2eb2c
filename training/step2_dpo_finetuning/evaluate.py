"""Evaluate DPO: how well the rewards that the saved model implies, loaded again from disk, tell held-out answers apart.

    python training/step2_dpo_finetuning/evaluate.py
    python training/step2_dpo_finetuning/evaluate.py --path output/run/dpo --data_path my_pairs.jsonl

Accuracy with a 95% Wilson interval, over all held-out pairs, by source and by length; against a coin and against rules
that know only the length; the margins; how far preferred answers have moved; the KL to the reference. Writes
evaluation.json into the step's folder. Which answers the model writes, step 3's evaluate.py judges.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from training.utils import arguments
from training.utils.run.folders import is_finished, step_folder
from training.utils.run.runtime import prepare_runtime


@dataclass
class ReferenceArguments:
    """DPO"""

    reference_model_name_or_path: str = arguments.flag("", "what DPO started from (default: the run's own)")


ARGUMENTS = [arguments.EvaluationArguments, ReferenceArguments, arguments.DataArguments]


def parse_flags(argv: Sequence[str]) -> list[Any]:
    """The flags, by `ARGUMENTS`; without torch, so that ``--help`` and mistakes answer at once."""
    groups = arguments.parse(ARGUMENTS, argv, prog="dpo/evaluate.py", description=__doc__)
    step_folder(groups[0].path, "dpo")
    return groups


if __name__ == "__main__":
    arguments.answer_early(parse_flags)
prepare_runtime()

from training.step2_dpo_finetuning import main as dpo  # noqa: E402
from training.step2_dpo_finetuning.pairs import Preferences, answer_log_probs, means  # noqa: E402
from training.utils import evaluation_programs  # noqa: E402
from training.utils.data.prepare import prepare_data  # noqa: E402
from training.utils.engine import precision  # noqa: E402
from training.utils.engine.frozen import load_frozen_causal_lm  # noqa: E402
from training.utils.errors import UserError, run_program  # noqa: E402
from training.utils.model import loading  # noqa: E402
from training.utils.model.limits import check_length  # noqa: E402
from training.utils.model.tokenizer import load_tokenizer  # noqa: E402
from training.utils.preferences import judge, pairs_of, tell, worst_of  # noqa: E402
from training.utils.run.distributed import init_distributed, say  # noqa: E402
from training.utils.sharing.trial import find_sharing  # noqa: E402


def main(argv: Sequence[str]) -> int:
    """Evaluate; returns the exit code. See the module's docstring for what it writes."""
    args, reference, data = parse_flags(argv)
    folder = step_folder(args.path, "dpo")
    recorded = evaluation_programs.recorded_arguments(folder, dpo.ARGUMENTS, dpo.OTHERS)
    model_args, seed = recorded[arguments.ModelArguments], recorded[arguments.TrainingArguments].seed
    settings, beside = recorded[arguments.DPOArguments], folder.parent / "step1"
    check_length(str(folder), model_args.max_seq_len, "--max_seq_len of DPO")
    started = reference.reference_model_name_or_path or model_args.model_name_or_path
    started = started or (str(beside) if is_finished(beside) else "")
    if not started:
        raise UserError("what DPO started from is not known: give --reference_model_name_or_path")
    path = loading.resolve_model(started, "--reference_model_name_or_path")
    tokenizer = load_tokenizer(str(folder))
    chosen = evaluation_programs.data_arguments(data, recorded[arguments.DataArguments], folder)
    rows = prepare_data("pairs", chosen, tokenizer, max_length=model_args.max_seq_len, seed=seed).to_judge_by()
    device = init_distributed()
    settled = precision.settle(args)
    load: dict[str, Any] = {"dtype": args.dtype, "attn_implementation": "sdpa"}
    policy, frozen = (
        load_frozen_causal_lm(name, zero_stage=0, offload=False, device=device, **load) for name in (str(folder), path)
    )
    pad_id = tokenizer.pad_token_id
    preferences = Preferences(policy, frozen, settings, find_sharing(policy, answer_log_probs, pad_id))
    columns = preferences.held_out(rows, args.per_device_eval_batch_size, pad_id)
    rewards = list(zip(columns["chosen_reward"].tolist(), columns["rejected_reward"].tolist(), strict=True))
    pairs = pairs_of(rows, rewards)
    found, worst = judge(pairs), worst_of(pairs, rows, tokenizer)
    told = {name: value for name, value in means(columns).items() if name not in ("accuracy", "margin")}
    kl = preferences.kl(rows, args.per_device_eval_batch_size, pad_id)
    facts = {"loss_kind": settings.loss, "beta": settings.strength, "reference_model": path, "kl": kl}
    tell(found, worst)
    say(f"\nKL to the reference {kl:.3f} nats per token")
    content = facts | found | told | {"worst_pairs": worst, precision.SUMMARY_KEY: settled}
    evaluation_programs.write_evaluation(folder, content)
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
