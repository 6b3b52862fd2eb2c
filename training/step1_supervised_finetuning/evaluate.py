"""Evaluate step 1: the SFT model against the model that it started from, on held-out rows.

    python training/step1_supervised_finetuning/evaluate.py
    python training/step1_supervised_finetuning/evaluate.py --path output/run/step1 --max_prompts 0

Both models get the same prompts, rendered by the SFT model's chat template. Perplexity is over response tokens, the end
token included. The answers are decoded greedily, so they are the same at every run, and held against the row's own
response by ROUGE-1, -2 and -L F-measures (Lin 2004), from torchmetrics. Writes evaluation.json into the step's folder.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from training.utils import arguments
from training.utils.run.folders import step_folder
from training.utils.run.runtime import prepare_runtime


@dataclass
class StepArguments:
    """Step 1"""

    base_model_name_or_path: str = arguments.flag("", "what to hold it against (default: what step 1 started from)")
    max_answer_seq_len: int = arguments.flag(128, "longest answer in tokens", minimum=1)


ARGUMENTS = [arguments.EvaluationArguments, StepArguments, arguments.DataArguments]


def parse_flags(argv: Sequence[str]) -> list[Any]:
    """The flags, by `ARGUMENTS`; without torch, so that ``--help`` and mistakes answer at once."""
    groups = arguments.parse(ARGUMENTS, argv, prog="step1/evaluate.py", description=__doc__)
    step_folder(groups[0].path, "step1")
    return groups


if __name__ == "__main__":
    arguments.answer_early(parse_flags)
prepare_runtime()

import torch  # noqa: E402  threads and PATH must be set before

from training.step1_supervised_finetuning import main as step1  # noqa: E402
from training.step1_supervised_finetuning.answers import decoded, last_turn  # noqa: E402
from training.step1_supervised_finetuning.rouge import rouge_scores  # noqa: E402
from training.utils import evaluation_programs, intervals  # noqa: E402
from training.utils.data.batches import collate_answers  # noqa: E402
from training.utils.data.prepare import prepare_data  # noqa: E402
from training.utils.engine import precision  # noqa: E402
from training.utils.errors import UserError, run_program  # noqa: E402
from training.utils.generation.engines import rollout_backend  # noqa: E402
from training.utils.generation.sampling import SamplingConfig  # noqa: E402
from training.utils.metrics import progress_bar  # noqa: E402
from training.utils.model import loading  # noqa: E402
from training.utils.model.forward import answer_sums  # noqa: E402
from training.utils.model.limits import check_length, max_positions  # noqa: E402
from training.utils.model.tokenizer import load_tokenizer  # noqa: E402
from training.utils.run.distributed import init_distributed, say  # noqa: E402
from training.utils.run.files import read_object  # noqa: E402
from training.utils.sharing.trial import find_sharing, shares_across  # noqa: E402

SHOWN = 3  # answers on the terminal; evaluation.json has all


@torch.no_grad()
def likelihoods(model: Any, dataset: Any, batch_size: int, pad_id: int, title: str) -> tuple[list[float], list[int]]:
    """Negative log-likelihood in nats, and tokens, of every row's responses."""
    sharing = find_sharing(model, answer_sums, pad_id, f"the {title} model") if shares_across(model.device) else None
    sums: list[float] = []
    counts: list[int] = []
    bar = progress_bar(len(dataset), f"perplexity of {title}")
    for start in range(0, len(dataset), batch_size):
        rows = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
        batch = collate_answers(rows, [[i] for i in range(len(rows))], pad_id, sharing)
        sums += (-answer_sums(model, {name: tensor.to(model.device) for name, tensor in batch.items()})).tolist()
        counts += batch["response_mask"][:, 1:].sum(1).tolist()
        bar.update(len(rows))
    bar.close()
    return sums, counts


def greedy_answers(
    model: Any, prompts: Sequence[list[int]], tokenizer: Any, batch_size: int, longest: int, title: str
) -> list[str]:
    """The likeliest continuation of each prompt as text, without special tokens."""
    backend, sampling = rollout_backend("fast"), SamplingConfig(longest, greedy=True)
    answers: list[str] = []
    bar = progress_bar(len(prompts), f"answers of {title}")
    for start in range(0, len(prompts), batch_size):
        asked = prompts[start : start + batch_size]
        answers += decoded(backend, model, asked, tokenizer, sampling, model.device)
        bar.update(len(asked))
    bar.close()
    return answers


def base_model(folder: Any, given: str) -> str:
    """The model that step 1 started from.

    Raises:
        UserError: its name is not known, or it is gone.
    """
    name = given or str(read_object(folder / "summary.json").get("base_model") or "")
    if not name:
        raise UserError(f"{folder}/summary.json does not name the model that step 1 started from: give "
                        "--base_model_name_or_path")  # fmt: skip
    return loading.resolve_model(name, "--base_model_name_or_path")


def main(argv: Sequence[str]) -> int:
    """Evaluate; returns the exit code. See the module's docstring for what it writes."""
    args, step, data = parse_flags(argv)
    folder = step_folder(args.path, "step1")
    base_path = base_model(folder, step.base_model_name_or_path)
    recorded = evaluation_programs.recorded_arguments(folder, step1.ARGUMENTS, step1.OTHERS)
    max_seq_len, seed = recorded[arguments.ModelArguments].max_seq_len, recorded[arguments.TrainingArguments].seed
    for path in (str(folder), base_path):
        check_length(path, max_seq_len, "--max_seq_len of step 1")
        check_length(path, step.max_answer_seq_len, "--max_answer_seq_len")
    tokenizer = load_tokenizer(str(folder))
    own = [] if data != arguments.DataArguments() else recorded[arguments.SupervisedArguments].sft_only_data_path
    chosen = evaluation_programs.data_arguments(data, recorded[arguments.DataArguments], folder, own)
    length: dict[str, Any] = {"max_length": max_seq_len, "seed": seed, "sft_only_data_path": own}
    rows = prepare_data("demonstrations", chosen, tokenizer, **length).to_judge_by()
    device = init_distributed()
    settled = precision.settle(args)
    limit = (max_positions(base_path) or sys.maxsize) - step.max_answer_seq_len
    turns = [last_turn(row["input_ids"], row["response_mask"]) for row in rows]
    # a plain text is all response
    turns = [turn for turn in turns if turn[1] and 0 < len(turn[0]) <= limit][: args.max_prompts or None]
    prompts = [prompt for prompt, _ in turns]
    references = [tokenizer.decode(response, skip_special_tokens=True).strip() for _, response in turns]

    results: dict[str, dict[str, Any]] = {}
    answers: dict[str, list[str]] = {}
    for name, path in (("base", base_path), ("sft", str(folder))):
        model = loading.load_causal_lm(path, dtype=args.dtype).to(device).eval()
        batch = args.per_device_eval_batch_size
        nll, tokens = likelihoods(model, rows, batch, tokenizer.pad_token_id, name)
        loss, interval = sum(nll) / sum(tokens), intervals.bootstrap_interval(nll, tokens, seed=seed)
        answers[name] = greedy_answers(model, prompts, tokenizer, batch, step.max_answer_seq_len, name)
        results[name] = {
            "loss": loss,
            "perplexity": math.exp(loss),
            "perplexity_interval": [math.exp(end) for end in interval],
        }
        for kind, values in rouge_scores(answers[name], references).items() if prompts else ():
            interval = intervals.bootstrap_interval(values, seed=seed)
            results[name] |= {kind: intervals.mean(values), f"{kind}_interval": interval}
        del model
    columns = [key for key in results["base"] if not key.endswith("_interval")]
    head = ["", "base", "", "SFT", ""]
    body = [
        [key, results["base"][key], results["base"].get(f"{key}_interval"), results["sft"][key],
         results["sft"].get(f"{key}_interval")] for key in columns
    ]  # fmt: skip
    say(f"\n{len(rows)} held-out rows, {len(prompts)} prompts answered; in brackets 95% bootstrap intervals over rows")
    say(evaluation_programs.table([head, *body]))
    samples = [
        {"prompt": tokenizer.decode(p), "reference": r, "base": answers["base"][i], "sft": answers["sft"][i]}
        for i, (p, r) in enumerate(zip(prompts, references, strict=True))
    ]
    for sample in samples[:SHOWN]:
        say("\n" + "\n".join(f"{name:<10}{text}" for name, text in sample.items()))
    content = {"rows": len(rows), "prompts": len(prompts), "base_model": base_path, "models": results,
               precision.SUMMARY_KEY: settled}  # fmt: skip
    evaluation_programs.write_evaluation(folder, content | {"samples": samples})
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
