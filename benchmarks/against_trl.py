"""The steps against TRL's trainers on a CPU, in turn: ``--step 1`` and ``2`` are in against_trl_tuning.py, 3 is here.

Step 3 against `RLOOTrainer`: the same SFT model, reward, prompts, batches and lengths.

TRL is no dependency of this project. It lives in an environment of its own, which sees this one's packages, so that
both run on the same torch and transformers:

    python3.11 -m venv trl_env && .venv/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
        > trl_env/lib/python3.11/site-packages/tripod.pth
    trl_env/bin/python -m pip install --no-deps trl

    python benchmarks/against_trl.py --step 1 --trl_python trl_env/bin/python --json against_trl_step1.json
    python benchmarks/against_trl.py --step 2 --trl_python trl_env/bin/python --json against_trl_step2.json
    python benchmarks/against_trl.py --sft output/demo/step1 --trl_python trl_env/bin/python
    python benchmarks/against_trl.py --sft output/demo/step1 --trl_python trl_env/bin/python --trl_weights fp32 bf16 \
        --iterations_long 20 --json against_trl.json

The settings are the demo's (training/recipes/demo.yaml), except that the reward is the rule-based check, so that there
is no reward model, and that the learning rate is constant. Each run is a process of its own and begins with an
iteration that is not timed; the trainers take turns. An iteration is 24 answers, four to each of six prompts: they are
generated, scored, and learned from in two optimizer steps of 12 rows. Tripod runs first in each round, and the prompts
of each of its iterations, which it writes down (`--trace`), are what TRL gets, in the same order.

With `--iterations_long` each trains once more, for longer, and its model answers held-out prompts, greedily and by
sampling, before and after: by one function, with plain `generate`, from the saved folders.

Memory is the highest resident memory of the process from its start to its end, as Linux counts it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import ROOT, argv_of, flags_of, head_of, json_lines, memory_of, row_of, spread, write_figures

STEP3 = ROOT / "training" / "step3_rlhf_finetuning" / "main.py"
DEMO = ROOT / "training" / "data" / "demo"
CHECK = DEMO / "manner.py"

SAMPLES, ANSWERS, ROWS_PER_STEP, NEW_TOKENS, TEMPERATURE = 4, 24, 12, 48, 0.7  # the demo's
STEPS = ANSWERS // ROWS_PER_STEP  # optimizer steps of an iteration
# Tripod's constants (engine.py and zero_config.py in training/utils/engine), where TRL's defaults may differ
ADAM_BETA2, MAX_GRAD_NORM = 0.95, 1.0
PHASES = ("generate", "score", "train")
ALWAYS = {  # what TRL is told in each step, as Tripod does it
    "use_cpu": True, "gradient_checkpointing": False, "lr_scheduler_type": "constant", "adam_beta2": ADAM_BETA2,
    "max_grad_norm": MAX_GRAD_NORM, "dataloader_pin_memory": False, "report_to": "none", "save_strategy": "no",
    "disable_tqdm": True,
}  # fmt: skip
TRIPOD = "Tripod"
TRL = {
    "fp32": "TRL, fp32 weights, bf16 autocast",  # what RLOOConfig does unless told otherwise
    "bf16": "TRL, bf16 weights",
}
POLL = 0.1  # seconds between two looks at a process's peak memory
EVALUATION_BATCH = 32

# Printed below the tables; read from the sources of this checkout and of TRL 1.16
EQUAL = """
Equal: SFT weights, chat template, prompts of each iteration, answers per prompt, sampling (temperature {temperature},
no top-k or top-p), length limit, end token, reward, KL coefficient {kl_coef} on the summed log ratio, leave-one-out
baseline, clip range 0.2, rows per forward and per optimizer step, AdamW (fused, beta2 {beta2}, no decay), constant
learning rate {learning_rate}, gradient norm {max_grad_norm}, no gradient checkpointing (TRL's default has it), a
reference model of its own, {threads} threads.
"""
NOT_EQUAL = """
Not equal: {precision} Tripod's ratio and clip are per token and its loss is a mean over tokens; TRL's are per answer
and a mean over answers. TRL shuffles the answers before it divides them into steps. Generation is each one's own:
Tripod's `fast` backend, transformers' `generate` in TRL. On a CPU TRL's log-probs project prompt positions too,
Tripod's those of the response alone. The answers are drawn by different random numbers and by policies that learn
differently, so their lengths differ: see the tokens.
"""
PRECISION = {
    "bf16": "Tripod computes with bf16 weights and keeps fp32 masters and optimizer states. TRL with fp32 weights "
    "casts them to bf16 in each forward (autocast) and keeps no copy; with bf16 weights it has no masters, and its "
    "optimizer states are bf16.",
    "fp32": "",
}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the flags."""
    parser = flags_of(__doc__)
    parser.add_argument("--step", type=int, choices=(1, 2, 3), default=3)
    parser.add_argument("--sft", type=Path, help="both trainers start from it (steps 1 and 2: the embedded model)")
    parser.add_argument("--data", default="", help="rows of steps 1 and 2 (default: the demo's)")
    parser.add_argument("--rows", type=int, default=64, help="of the demo's, for steps 1 and 2")
    parser.add_argument("--batch", type=int, default=8, help="rows or pairs of an optimizer step of steps 1 and 2")
    parser.add_argument("--trl_python", help="interpreter of an environment that has trl")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each trainer")
    parser.add_argument("--iterations", type=int, default=4, help="timed iterations of a run, after one that is not")
    parser.add_argument("--iterations_long", type=int, default=0, help="iterations of the long run, 0 for none")
    parser.add_argument("--held_out", type=int, default=160, help="held-out prompts answered before and after it")
    parser.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--trl_weights", choices=sorted(TRL), nargs="+", default=["fp32"], help="with --dtype bf16")
    parser.add_argument("--learning_rate", type=float, default=1.1e-4)
    parser.add_argument("--kl_coef", type=float, default=0.06)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1, help="of the first round; each round has its own")
    parser.add_argument("--json", default="", help="also write the figures to this file")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)  # the settings of one run of TRL
    arguments = parser.parse_args(argv)
    if not arguments.child and not (arguments.trl_python and (arguments.sft or arguments.step < 3)):
        parser.error("give --trl_python, and --sft for step 3")
    if arguments.json and Path(arguments.json).exists():
        parser.error(f"--json {arguments.json}: there is such a file; name another one")
    if min(arguments.rounds, arguments.iterations, arguments.held_out) < 1:
        parser.error("--rounds, --iterations and --held_out must be at least 1")
    if arguments.step == 3 and not arguments.child and not arguments.sft.is_dir():
        parser.error(f"--sft {arguments.sft}: no such folder")
    if not arguments.child and not has_trl(arguments.trl_python):
        parser.error(f"--trl_python {arguments.trl_python}: no Python that has trl; see --help")
    if arguments.dtype == "auto" and not arguments.child:
        import torch

        from training.utils.engine.precision import for_device

        arguments.dtype, line = for_device("auto", torch.device("cpu"))
        print(line, flush=True)
    if arguments.dtype == "fp32":
        arguments.trl_weights = ["fp32"]
    return arguments


def has_trl(python: str) -> bool:
    """Whether this is an interpreter that finds TRL."""
    look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('trl') is None)"
    return shutil.which(python) is not None and subprocess.run([python, "-c", look], check=False).returncode == 0


def environment(threads: int) -> dict[str, str]:
    """What both trainers' processes see: equal threads, no network, no chatter."""
    quiet = {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    return os.environ | quiet | {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}


def run(
    command: Sequence[str], threads: int, log: Path, poll: float = POLL, look: Callable[[int], None] = lambda pid: None
) -> float:
    """Run a program to its end and return its peak resident memory in GiB; exits with the log's end if it fails.

    The peak is asked for over and over: Tripod resets the mark after each phase, for its own summary. So is ``look``.
    """
    peak = 0.0
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment(threads))
        while process.poll() is None:
            peak = max(peak, memory_of("VmHWM", process.pid) / 2**30)
            look(process.pid)
            time.sleep(poll)
    if process.returncode:
        sys.exit(f"{' '.join(command)}\nended with {process.returncode}:\n{log.read_text()[-4000:]}")
    return peak


def run_tripod(arguments: argparse.Namespace, folder: Path, iterations: int, seed: int) -> dict[str, Any]:
    """Train with step 3 in ``folder``.

    Returns:
        ``peak`` in GiB, ``iterations`` (see `iteration`), ``prompts``: those of each iteration, as messages.
    """
    flags = {
        "actor_model_name_or_path": arguments.sft,
        "critic_model_name_or_path": "none",
        "reward_function": f"{CHECK}:{CHECK.stem}",
        "data_path": DEMO / "prompts.jsonl",
        "eval_data_path": f"{DEMO / 'held_out.jsonl'}:4",  # it always answers some at the start and the end, untimed
        "data_output_path": folder.parent / "data",
        "output_dir": folder,
        "dtype": arguments.dtype,
        "advantage": "rloo",
        "samples_per_prompt": SAMPLES,
        "per_device_generation_batch_size": ANSWERS,
        "per_device_training_batch_size": ROWS_PER_STEP,
        "num_iterations": iterations,
        "max_answer_seq_len": NEW_TOKENS,
        "temperature": TEMPERATURE,
        "actor_learning_rate": arguments.learning_rate,
        "lr_scheduler_type": "constant",
        "kl_coef": arguments.kl_coef,
        "clip_reward": 0,
        "missing_eos_penalty": 0,
        "seed": seed,
        "eval_every": 0,
        "save_every": 0,
        "report_to": "none",
    }
    command = [sys.executable, str(STEP3), "--no-normalize_reward", *argv_of(flags)]
    command += ["--trace", *map(str, range(1, iterations + 1))]
    peak = run(command, arguments.threads, folder.with_suffix(".log"))
    measured = [
        iteration({phase: r[f"time/{phase}"] for phase in PHASES}, int(r["rollout/tokens"]), r[f"source/{CHECK.stem}"])
        for r in json_lines(folder / "metrics.jsonl")
        if "time/train" in r
    ]
    traces = [folder / "trace" / f"iteration-{number:06d}.jsonl" for number in range(1, iterations + 1)]
    answers = [[line["prompt"] for line in json_lines(trace)] for trace in traces]
    return {"peak": peak, "iterations": measured, "prompts": [prompts[::SAMPLES] for prompts in answers]}


def iteration(seconds: dict[str, float], tokens: int, check: float) -> dict[str, Any]:
    """What is kept of an iteration: seconds by phase and in all, response tokens, the answers' mean check."""
    return {**seconds, "seconds": sum(seconds.values()), "tokens": tokens, "check": check}


def run_trl(
    arguments: argparse.Namespace, folder: Path, weights: str, prompts: Sequence[Any], seed: int
) -> dict[str, Any]:
    """Train with TRL on these prompts, six for each iteration; returns what `run_tripod` does, and trl's version."""
    folder.mkdir()
    settings = {
        "sft": str(arguments.sft),
        "folder": str(folder),
        "prompts": prompts,
        "weights": weights,
        "autocast": arguments.dtype == "bf16" and weights == "fp32",
        "learning_rate": arguments.learning_rate,
        "kl_coef": arguments.kl_coef,
        "seed": seed,
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    command = [arguments.trl_python, str(Path(__file__).resolve()), "--child", str(folder / "settings.json")]
    peak = run(command, arguments.threads, folder.with_suffix(".log"))
    return {"peak": peak, **json.loads((folder / "figures.json").read_text())}


def load_check() -> Callable[..., list[float]]:
    """The demo's check, from its file: TRL's environment need not have this project's package."""
    spec = importlib.util.spec_from_file_location("check", CHECK)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.manner


def trl_config(settings: dict[str, Any]) -> Any:
    """TRL's settings of a run: Tripod's, where it has them."""
    from trl import RLOOConfig

    return RLOOConfig(
        output_dir=settings["folder"],
        bf16=settings["autocast"],
        model_init_kwargs={"dtype": {"fp32": "float32", "bf16": "bfloat16"}[settings["weights"]]},
        num_generations=SAMPLES,
        per_device_train_batch_size=ROWS_PER_STEP,
        gradient_accumulation_steps=1,
        steps_per_generation=STEPS,
        max_steps=STEPS * len(settings["prompts"]),
        shuffle_dataset=False,
        max_completion_length=NEW_TOKENS,
        temperature=TEMPERATURE,
        beta=settings["kl_coef"],
        learning_rate=settings["learning_rate"],
        seed=settings["seed"],
        **ALWAYS,
    )


def train_with_trl(settings: dict[str, Any]) -> None:
    """One run of TRL, in its own process and environment; leaves the model and figures.json in the run's folder.

    The phases are cut where step 3 cuts them: generation; log-probs of actor and reference, rewards and advantages;
    the optimizer steps with everything around them.
    """
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import RLOOTrainer

    score = load_check()
    spent: dict[str, float] = {}
    measured: list[dict[str, Any]] = []
    asked: list[Any] = []

    def check(prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
        """The reward as TRL calls it; notes tokens, the mean check and the prompts."""
        values = score(prompts, [turns[-1]["content"] for turns in completions], [])
        spent["tokens"], spent["check"] = sum(map(len, completion_ids)), statistics.mean(values)
        asked.append(prompts[::SAMPLES])
        return values

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose seconds go to ``spent``."""

        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = function(*args, **kwargs)
            spent[name] = time.perf_counter() - started
            return result

        return call

    class Clock(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % STEPS == 0:
                spent["started"] = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            """Count the time of the optimizer steps of an iteration."""
            if state.global_step % STEPS == 0:
                seconds = time.perf_counter() - spent["started"]
                generate, experience = spent["generate"], spent["experience"]
                phases = {"generate": generate, "score": experience - generate, "train": seconds - experience}
                measured.append(iteration(phases, int(spent["tokens"]), spent["check"]))

    rows = [{"prompt": messages} for prompts in settings["prompts"] for messages in prompts]
    dataset, clock = Dataset.from_list(rows), Clock()
    trainer = RLOOTrainer(settings["sft"], check, trl_config(settings), dataset, callbacks=[clock])
    trainer._generate_single_turn = timed("generate", trainer._generate_single_turn)
    trainer._generate_and_score_completions = timed("experience", trainer._generate_and_score_completions)
    trainer.train()
    trainer.save_model(settings["folder"])
    figures = {"iterations": measured, "prompts": asked, "version": importlib.metadata.version("trl")}
    Path(settings["folder"], "figures.json").write_text(json.dumps(figures))


def run_all(arguments: argparse.Namespace, folder: Path, iterations: int, seed: int) -> dict[str, dict[str, Any]]:
    """One run of each trainer, Tripod first; exits if they did not answer the same prompts."""
    folder.mkdir()
    runs = {TRIPOD: run_tripod(arguments, folder / "tripod", iterations, seed)}
    progress(folder, TRIPOD, runs[TRIPOD])
    prompts = runs[TRIPOD].pop("prompts")
    for weights in arguments.trl_weights:
        name = TRL[weights] if arguments.dtype == "bf16" else "TRL"
        runs[name] = run_trl(arguments, folder / f"trl-{weights}", weights, prompts, seed)
        if runs[name].pop("prompts") != prompts:
            sys.exit(f"{name} answered other prompts than {TRIPOD}")
        progress(folder, name, runs[name])
    return runs


def progress(folder: Path, name: str, result: dict[str, Any]) -> None:
    """Say that a run has ended, with the seconds of its iterations."""
    seconds = ", ".join(f"{i['seconds']:.1f}" for i in result["iterations"])
    print(f"{folder.name}: {name}: {seconds} s, peak {result['peak']:.2f} GiB", file=sys.stderr, flush=True)


def timed_iterations(result: dict[str, Any]) -> list[dict[str, Any]]:
    """All iterations of a run but the first."""
    return result["iterations"][1:]


def seconds_of(result: dict[str, Any], phase: str = "seconds") -> float:
    """The median over a run's timed iterations."""
    return statistics.median(i[phase] for i in timed_iterations(result))


def check_scores(arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Mean check and tokens of a saved model's answers to the held-out prompts, greedy and sampled.

    Template, precision, end tokens and the random numbers are the same for every folder.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, utils

    from training.utils.engine.zero_config import DTYPES

    utils.logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    prompts = [row["prompt"] for row in json_lines(DEMO / "held_out.jsonl")[: arguments.held_out]]
    tokenizer = AutoTokenizer.from_pretrained(arguments.sft, padding_side="left")
    stop_ids = GenerationConfig.from_pretrained(arguments.sft).eos_token_id
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[arguments.dtype]).eval()
    score = load_check()
    figures: dict[str, float] = {}
    sampling = {"do_sample": True, "temperature": TEMPERATURE, "top_k": 0, "top_p": 1.0}
    for name, choice in (("greedy", {"do_sample": False}), ("sampled", sampling)):
        texts, tokens = [], 0
        torch.manual_seed(arguments.seed)
        for start in range(0, len(prompts), EVALUATION_BATCH):
            batch = tokenizer.apply_chat_template(
                prompts[start : start + EVALUATION_BATCH],
                add_generation_prompt=True,
                return_dict=True,
                return_tensors="pt",
                padding=True,
            )
            ends = {"max_new_tokens": NEW_TOKENS, "eos_token_id": stop_ids, "pad_token_id": tokenizer.pad_token_id}
            answers = model.generate(**batch, **ends, **choice)[:, batch["input_ids"].shape[1] :]
            texts += tokenizer.batch_decode(answers, skip_special_tokens=True)
            tokens += int((answers != tokenizer.pad_token_id).sum())
        figures |= {name: statistics.mean(score([], texts, [])), f"{name}_tokens": tokens / len(texts)}
    return figures


def train_long(arguments: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """The long run of each trainer, and the check of the SFT model's and the trained models' answers."""
    runs = run_all(arguments, folder, arguments.iterations_long, arguments.seed)
    models = [arguments.sft, folder / "tripod" / "actor", *(folder / f"trl-{w}" for w in arguments.trl_weights)]
    figures: dict[str, dict[str, Any]] = {}
    for name, path in zip(["SFT model", *runs], models, strict=True):
        figures[name] = check_scores(arguments, path) | runs.get(name, {})
        print(f"{name}: check {figures[name]['sampled']:.3f} (sampled)", file=sys.stderr, flush=True)
    return figures


def table(rounds: Sequence[dict[str, dict[str, Any]]]) -> str:
    """Medians over the timed iterations of all rounds as Markdown; the range is that of the rounds' medians."""
    measures = ("response tokens/s", "tokens per answer", "peak memory, GiB", "time against Tripod")
    lines = [head_of("trainer", "s per iteration", "lowest - highest", *PHASES, *measures)]
    for name in rounds[0]:
        runs = [round_[name] for round_ in rounds]
        every = [i for result in runs for i in timed_iterations(result)]
        medians = [seconds_of(result) for result in runs]
        ratios = [seconds_of(round_[name]) / seconds_of(round_[TRIPOD]) for round_ in rounds]
        cells = [
            name,
            f"{statistics.median(i['seconds'] for i in every):.2f}",
            f"{min(medians):.2f} - {max(medians):.2f}",
            *(f"{statistics.median(i[phase] for i in every):.2f}" for phase in PHASES),
            f"{statistics.median(i['tokens'] / i['seconds'] for i in every):.1f}",
            f"{sum(i['tokens'] for i in every) / len(every) / ANSWERS:.1f}",
            f"{max(result['peak'] for result in runs):.2f}",
            spread(ratios, unit="x"),
        ]
        lines.append(row_of(*cells))
    return "\n".join(lines)


def long_table(arguments: argparse.Namespace, figures: dict[str, dict[str, Any]]) -> str:
    """The check of held-out answers after the long run as Markdown."""
    lines = [
        f"After {arguments.iterations_long} iterations, one run each: the check of the answers to "
        f"{arguments.held_out} held-out prompts.\n",
        head_of("model", "check, greedy", "check, sampled", "tokens per answer, sampled"),
    ]
    for name, f in figures.items():
        lines.append(row_of(name, f"{f['greedy']:.3f}", f"{f['sampled']:.3f}", f"{f['sampled_tokens']:.1f}"))
    return "\n".join(lines)


def versions_of(rounds: Sequence[dict[str, Any]]) -> list[str]:
    """Of the libraries that a measurement ran on, TRL's from its own process."""
    packages = ("torch", "transformers", "deepspeed", "accelerate")
    found = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    return [*found, f"trl {next(run['version'] for run in rounds[0].values() if 'version' in run)}"]


def report(arguments: argparse.Namespace, rounds: Sequence[dict[str, Any]], long_: dict[str, Any]) -> str:
    """Everything that is printed."""
    versions = versions_of(rounds)
    head = (
        f"{', '.join(versions)}; {arguments.threads} threads, {arguments.dtype}. An iteration: {ANSWERS} answers of at "
        f"most {NEW_TOKENS} tokens to {ANSWERS // SAMPLES} prompts, {STEPS} optimizer steps. Medians of "
        f"{arguments.iterations} iterations in each of {arguments.rounds} rounds, after one that is not counted; "
        f"trainers in turn; wall-clock seconds."
    )
    facts = vars(arguments) | {"temperature": TEMPERATURE, "beta2": ADAM_BETA2, "max_grad_norm": MAX_GRAD_NORM}
    parts = [head, table(rounds), *([long_table(arguments, long_)] if long_ else [])]
    for text in (EQUAL, NOT_EQUAL):
        parts.append(textwrap.fill(" ".join(text.format(**facts, precision=PRECISION[arguments.dtype]).split()), 120))
    return "\n\n".join(parts)


def main(argv: Sequence[str]) -> int:
    """Run the rounds and the long runs, print the tables, and write the JSON file if asked to."""
    arguments = parse(argv)
    if arguments.child:
        settings = json.loads(Path(arguments.child).read_text())
        if "step" in settings:
            import against_trl_tuning

            against_trl_tuning.train_with_trl(settings)
        else:
            train_with_trl(settings)
        return 0
    if arguments.step < 3:
        import against_trl_tuning

        return against_trl_tuning.main(arguments)
    arguments.sft = arguments.sft.resolve()
    with tempfile.TemporaryDirectory() as work:
        rounds = [
            run_all(arguments, Path(work) / f"round-{number + 1}", arguments.iterations + 1, arguments.seed + number)
            for number in range(arguments.rounds)
        ]
        long_ = train_long(arguments, Path(work) / "long-run") if arguments.iterations_long else {}
    print(report(arguments, rounds, long_))
    write_figures(arguments.json, {"arguments": vars(arguments), "rounds": rounds, "long": long_})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
