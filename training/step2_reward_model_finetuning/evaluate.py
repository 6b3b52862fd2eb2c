"""Evaluate step 2: how well the saved reward model, loaded again from disk, tells chosen from rejected answers.

    python training/step2_reward_model_finetuning/evaluate.py
    python training/step2_reward_model_finetuning/evaluate.py --path output/run/step2 --data_path my_pairs.jsonl

Accuracy with a 95% Wilson interval, over all held-out pairs, by source and by length; against a coin and against rules
that know only the length; the margins; how much the reward follows the length; the pairs it gets most wrong. Writes
evaluation.json into the step's folder.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from training.utils import arguments
from training.utils.run.folders import step_folder
from training.utils.run.runtime import prepare_runtime

ARGUMENTS = [arguments.EvaluationArguments, arguments.DataArguments]


def parse_flags(argv: Sequence[str]) -> list[Any]:
    """The flags, by `ARGUMENTS`; without torch, so that ``--help`` and mistakes answer at once."""
    groups = arguments.parse(ARGUMENTS, argv, prog="step2/evaluate.py", description=__doc__)
    step_folder(groups[0].path, "step2")
    return groups


if __name__ == "__main__":
    arguments.answer_early(parse_flags)
prepare_runtime()

from training.step2_reward_model_finetuning import main as step2  # noqa: E402  threads and PATH must be set before
from training.step2_reward_model_finetuning.pairs import held_out_rewards  # noqa: E402
from training.utils import evaluation_programs  # noqa: E402
from training.utils.data.batches import rankings_of  # noqa: E402
from training.utils.data.prepare import prepare_data  # noqa: E402
from training.utils.engine import precision  # noqa: E402
from training.utils.engine.frozen import load_frozen_scorer  # noqa: E402
from training.utils.errors import run_program  # noqa: E402
from training.utils.model.forward import answer_rewards  # noqa: E402
from training.utils.model.limits import check_length  # noqa: E402
from training.utils.model.reward_stats import RewardStats  # noqa: E402
from training.utils.model.tokenizer import load_tokenizer  # noqa: E402
from training.utils.preferences import judge, pairs_of, tell, worst_of  # noqa: E402
from training.utils.run.distributed import init_distributed  # noqa: E402
from training.utils.sharing.trial import find_sharing  # noqa: E402


def main(argv: Sequence[str]) -> int:
    """Evaluate; returns the exit code. See the module's docstring for what it writes."""
    args, data = parse_flags(argv)
    folder = step_folder(args.path, "step2")
    recorded = evaluation_programs.recorded_arguments(folder, step2.ARGUMENTS, step2.OTHERS)
    max_seq_len, seed = recorded[arguments.ModelArguments].max_seq_len, recorded[arguments.TrainingArguments].seed
    check_length(str(folder), max_seq_len, "--max_seq_len of step 2")
    tokenizer = load_tokenizer(str(folder))
    chosen = evaluation_programs.data_arguments(data, recorded[arguments.DataArguments], folder)
    rows = prepare_data("pairs", chosen, tokenizer, max_length=max_seq_len, seed=seed).to_judge_by()
    device = init_distributed()
    settled = precision.settle(args)
    pad_id = tokenizer.pad_token_id
    scorer = load_frozen_scorer(str(folder), dtype=args.dtype, pad_token_id=pad_id, device=device)
    sharing = find_sharing(scorer, answer_rewards, pad_id)
    pairs = pairs_of(rows, held_out_rewards(scorer, rows, args.per_device_eval_batch_size, pad_id, device, sharing))
    found = judge(pairs)
    worst = worst_of(pairs, rows, tokenizer)
    extremes = [pairs[mine.start] for mine in rankings_of(rows)]  # of a ranking its best answer and its worst
    stats = RewardStats.of([(pair.chosen, pair.rejected) for pair in extremes], args.dtype)
    content = found | {"reward_mean_chosen": stats.mean, "reward_std_chosen": stats.std_chosen, "worst_pairs": worst}
    content[precision.SUMMARY_KEY] = settled
    tell(found, worst)
    evaluation_programs.write_evaluation(folder, content)
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
