"""Answers of one or more models to prompts: to be put in an order, to be learned from, or to be looked at.

    python inference/generate.py --data_path prompts.jsonl                      the latest run's models, 4 answers each
    python inference/generate.py --model SFT=output/demo/step1 --model RLHF=output/demo/step3/actor \
        --data_path prompts.jsonl --samples_per_prompt 2 --output output/answers.jsonl
    deepspeed --num_gpus 4 inference/generate.py --model output/demo --data_path prompts.jsonl
    python inference/generate.py --model output/demo/step1 --data_path prompts.jsonl --best_of 16 \
        --reward_model output/demo/step2 --output output/best.jsonl             rejection sampling: rows for step 1

One JSON line for each prompt, in the order of the data: id, prompt (messages), answers (each with model, response,
tokens, finished), source, row, and the data's own answer as reference. Next: judge.py or rank.py put answers in an
order. With --best_of a line has messages, the prompt and its best answer, and that answer's reward (Llama 2, Touvron et
al. 2023, arXiv 2307.09288, section 3.2.3; RAFT, Dong et al. 2023, arXiv 2304.06767).

The noise of an answer depends on --seed, prompt, model's name and number of the answer, so with --rollout_engine fast
neither batch size nor number of ranks changes an answer. A run that was killed goes on when it is started again.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # outside the environment, to say so

from chat_arguments import named_models

from training.utils import arguments
from training.utils.arguments import AUTO, MAX_SEED, PRECISIONS, ROLLOUT_ENGINES, OtherFlag, flag
from training.utils.errors import UserError, print_last, run_resumable
from training.utils.generation.vllm_python import check_vllm
from training.utils.run.demo import check_sources_named
from training.utils.run.folders import latest_output, output_root, runs_newest_first, shown, tuned_models
from training.utils.run.inputs import check_model_path
from training.utils.run.runtime import prepare_runtime

SPLITS = ("all", "train", "held_out")
ANSWERS = 4  # to a prompt by each model
WAIT = 7 * 24 * 3600.0  # seconds that a rank waits for the others: they meet at the end only


@dataclass
class GenerateArguments:
    """Answers"""

    model: list[str] = flag(
        [],
        "NAME=PATH of each model, or a run's folder: its SFT, DPO and RLHF models (default: the latest run's)",
        repeated=True,
    )
    output: str = flag("", "the file to write (default: answers.jsonl in the output folder, with --best_of best.jsonl)")
    split: str = flag(
        "all", "which prompts: all, or those that training takes or holds out under the same data flags", choices=SPLITS
    )
    samples_per_prompt: int | None = flag(None, f"answers to a prompt by each model (default: {ANSWERS})", minimum=1)
    best_of: int = flag(0, "keep the best of so many answers by reward, as rows for step 1; 0 keeps all", minimum=0)
    reward_model: str = flag("", "reward model that answers are rewarded by")
    reward_function: list[str] = flag(
        [], "file.py:name=WEIGHT, functions added to the reward model, as in step 3; model=WEIGHT weighs that one"
    )

    def __post_init__(self) -> None:
        if self.best_of and self.samples_per_prompt is not None:
            raise UserError("--best_of says how many answers there are: leave --samples_per_prompt out")
        if self.best_of == 1:
            raise UserError("--best_of 1: the best of one answer is that answer; give 2 or more")
        if self.best_of and not (self.reward_model or self.reward_function):
            raise UserError("--best_of needs to know what is best: give --reward_model or --reward_function")

    @property
    def count(self) -> int:
        """Answers to a prompt by each model."""
        return self.best_of or self.samples_per_prompt or ANSWERS

    @property
    def path(self) -> Path:
        """The file to write."""
        default = output_root() / ("best.jsonl" if self.best_of else "answers.jsonl")
        return Path(self.output).expanduser() if self.output else default


@dataclass
class DecodingArguments:
    """Decoding"""

    max_prompt_seq_len: int = flag(256, "longest prompt in tokens; longer ones lose their oldest turns", minimum=4)
    max_answer_seq_len: int = flag(256, "longest answer in tokens", minimum=1)
    per_device_generation_batch_size: int = flag(16, "answers per rank that are decoded together", minimum=1)
    rollout_engine: str = flag("fast", "how tokens are decoded", choices=ROLLOUT_ENGINES)
    vllm_python: str = flag("", "interpreter that has vLLM (default: that of make setup-vllm, else this one)")
    temperature: float = flag(1.0, "sampling temperature; 0 takes the likeliest token", minimum=0)
    top_p: float = flag(1.0, "sample from the likeliest tokens that hold this share; 1 keeps all", above=0, maximum=1)
    top_k: int = flag(0, "sample from this many likeliest tokens; 0 keeps all", minimum=0)
    seed: int = flag(1234, "of the sampling, and of which prompts are held out", minimum=0, maximum=MAX_SEED)
    dtype: str = flag(AUTO, "precision of the models; auto: bf16 where the hardware computes in it", choices=PRECISIONS)


ARGUMENTS = [GenerateArguments, DecodingArguments, arguments.DataArguments]
OTHERS = {"--local_rank": OtherFlag(int, -1), "--deepspeed": OtherFlag(bool, False)}  # of launchers


def parse_flags(argv: Sequence[str]) -> list[Any]:
    """The flags, by `ARGUMENTS`; without torch, so that ``--help`` and mistakes answer at once."""
    groups = arguments.parse(ARGUMENTS, argv, prog="generate.py", description=__doc__, others=OTHERS)
    options, decoding, _ = groups
    if decoding.temperature == 0 and options.count > 1:
        raise UserError(
            f"--temperature 0 gives the same answer {options.count} times: give a higher one, or --samples_per_prompt 1"
        )
    check_vllm(decoding.rollout_engine, decoding.vllm_python)
    models_of(options)
    if options.reward_model:
        check_model_path(options.reward_model, "--reward_model")
    return groups


def models_of(options: GenerateArguments) -> dict[str, str]:
    """Name -> path of each model, those of the latest run where none is named.

    Raises:
        UserError: a path without a model, or a name twice.
    """
    latest = next((run for run in runs_newest_first() if tuned_models(run)), None)
    found = named_models(options.model or [str(latest or latest_output("step1"))], "--model")
    for path in found.values():
        check_model_path(path, "--model")
    return found


def settings_of(groups: Sequence[Any], models: Mapping[str, str], prompts: Sequence[str], dtype: str) -> dict[str, Any]:
    """What the answers depend on.

    Args:
        groups: the flags.
        models: name -> folder or hub name.
        prompts: their ids.
        dtype: the models' precision.
    """
    from training.utils.checkpoint.same_run import input_fingerprint

    options, decoding, data = groups
    rewards = [options.reward_model] * bool(options.reward_model) + [
        spec.rpartition(":")[0] for spec in options.reward_function if ":" in spec
    ]
    drawn = {k: v for k, v in asdict(decoding).items() if k not in ("per_device_generation_batch_size", "vllm_python")}
    return {
        "model": dict(models),
        "samples_per_prompt": options.count,
        "best_of": options.best_of,
        "reward": {"model": options.reward_model, "functions": options.reward_function},
        "decoding": drawn | {"dtype": dtype},
        "data": {k: v for k, v in asdict(data).items() if k != "data_output_path"} | {"split": options.split},
        "prompts": hashlib.sha256(" ".join(prompts).encode()).hexdigest(),
        "content of": {path: input_fingerprint(path) for path in [*models.values(), *rewards]},
    }


def main(argv: Sequence[str]) -> int:
    """Answer every prompt that has not been answered; returns the exit code."""
    groups = parse_flags(argv)
    options, decoding, data = groups
    models = models_of(options)
    check_sources_named(data.data_path, {f"--model {name}": path for name, path in models.items()})
    prepare_runtime()
    from answer_rewards import AnswerRewards  # what follows takes seconds
    from answering import Answering, read_prompts, resolved_models

    from training.utils.answers import PartFile
    from training.utils.engine.precision import for_device
    from training.utils.run.distributed import barrier, init_distributed, is_main, rank, say

    paths = resolved_models(models, decoding)
    rewards = AnswerRewards(options.reward_model, options.reward_function)
    prompts = read_prompts(next(iter(paths.values())), data, decoding, options.split)
    device = init_distributed(WAIT)
    dtype, line = for_device(decoding.dtype, device)
    file = PartFile(options.path, "--output", settings_of(groups, paths, [p.id for p in prompts], dtype))
    if file.is_finished():
        if is_main():
            file.clear()
        say(f"{shown(file.path)} is finished already, with these settings")
        return 0
    with file.opened() if is_main() else contextlib.nullcontext():
        barrier()
        done = file.lines()
        barrier()  # all have read before one writes
        say(line)
        say(f"{len(prompts)} prompts, {options.count} answers each of {', '.join(paths)}"
            + (f"; {len(done)} answers are there" if done else ""))  # fmt: skip
        work, started = Answering(prompts, decoding, options.count, rewards, data, dtype, device), time.monotonic()
        try:
            with file.part(rank()) as append:
                for name, path in paths.items():
                    work.answer(name, path, done, append)
        except UserError as error:
            if not is_main():  # who else would say it; the launcher then ends the others
                print_last(f"error: rank {rank()}: {error}")
            raise
        barrier()
        if is_main():
            lines, result = work.lines(file.lines(), list(paths), options.best_of)
            file.finish(lines, result | {"seconds": round(time.monotonic() - started, 1)})
            say(f"{len(lines)} lines written to {shown(file.path)}")
        barrier()
    return 0


if __name__ == "__main__":
    arguments.answer_early(parse_flags)
    sys.exit(run_resumable(main))
