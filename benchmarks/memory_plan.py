"""Holds the memory plan against the memory that the steps really take, each in a process of its own.

    python benchmarks/memory_plan.py                     the embedded model, steps 1, 2, 3 at ZeRO 0, 2, 3
    python benchmarks/memory_plan.py --step 1 --zero_stage 2 --model_name_or_path FOLDER
    python benchmarks/memory_plan.py --recipe mini       the flags of a recipe

Rows fill the longest length, as the plan assumes. Measured is the peak of tensor memory: of the accelerator's
allocator, or on a CPU resident memory above that after the imports. There the C library is told to give freed memory
back at once (MALLOC_MMAP_THRESHOLD_), since otherwise it keeps much of it; ``--default_allocator`` shows how much.
"""

from __future__ import annotations

import importlib
import json
import random
import sys
import tempfile
from pathlib import Path

from common import ROOT, TRIMMING, flags_of, head_of, memory_of, number_of, row_of

REWARD = "reward"
PROGRAMS = {
    1: "training.step1_supervised_finetuning.main",
    2: "training.step2_reward_model_finetuning.main",
    3: "training.step3_rlhf_finetuning.main",
}
MIB = 2**20
ROWS, HELD_OUT = 16, 32


def write_data(folder: Path, length: int) -> None:
    """Rows longer than ``length`` tokens in each step's format."""
    chance = random.Random(0)
    words = "the of a to in is you that it he was for on are as with his they at be this have from or one"

    def text(count: int) -> str:
        return " ".join(chance.choices(words.split(), k=count))

    def write(name: str, rows: list[dict]) -> None:
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    for name, count in (("train", ROWS), ("eval", HELD_OUT)):
        chats = [(text(2 * length), text(8)) for _ in range(count)]
        messages = [[{"role": "user", "content": p}, {"role": "assistant", "content": r}] for p, r in chats]
        write(f"step1_{name}", [{"messages": chat} for chat in messages])
        pairs = [(text(2 * length), text(length // 2), text(length // 2)) for _ in range(count)]
        write(f"step2_{name}", [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in pairs])
        write(f"step3_{name}", [{"prompt": text(2 * length)} for _ in range(count)])


def write_reward_model(folder: Path, model: str) -> None:
    """The model with a fresh reward head, which needs as much memory as a trained one."""
    from training.utils.model import classifiers, loading
    from training.utils.model.tokenizer import load_tokenizer

    path = loading.resolve_model(model)
    tokenizer = load_tokenizer(path)
    classifier = classifiers.load_classifier(path, dtype="bf16", pad_token_id=tokenizer.pad_token_id, fresh_head_seed=0)
    classifier.save_pretrained(folder / REWARD)
    tokenizer.save_pretrained(folder / REWARD)


def arguments_of(step: int, model: str, stage: int, data: Path, length: int, batch: int, dtype: str) -> list[str]:
    """The step's flags; its train rows make at least two optimizer steps."""
    rows = 2 * batch
    common = ["--data_path", f"{data}/step{step}_train.jsonl:{rows}", "--dtype", dtype, "--report_to", "none"]
    if step < 3:
        sizes = ["--per_device_train_batch_size", str(batch), "--per_device_eval_batch_size", str(batch)]
        held_out = ["--eval_data_path", f"{data}/step{step}_eval.jsonl:{batch}"]
        return [
            *("--model_name_or_path", model, "--zero_stage", str(stage), "--max_seq_len", str(length)),
            *(common + sizes + held_out + (["--train_on_prompts"] if step == 1 else [])),
        ]
    half = str(length // 2)
    return [
        *("--actor_model_name_or_path", model, "--no-normalize_reward"),
        *("--critic_model_name_or_path", str(data / REWARD)),
        *("--actor_zero_stage", str(stage), "--critic_zero_stage", str(stage), "--num_iterations", "2"),
        *("--eval_data_path", f"{data}/step3_eval.jsonl:{rows}"),
        *("--max_prompt_seq_len", half, "--max_answer_seq_len", half),
        *("--per_device_generation_batch_size", str(batch), "--per_device_training_batch_size", str(batch), *common),
    ]


def arguments_of_recipe(recipe: str, step: int, model: str, data: Path, dtype: str) -> list[str]:
    """A step's flags as a recipe has them, on a few rows of the longest length."""
    from training.utils.run.recipes import flags_of, read_recipe

    section = read_recipe(recipe)[1][f"step{step}"]
    ours: dict[str, str | int] = {
        "data_path": f"{data}/step{step}_train.jsonl",
        "eval_data_path": f"{data}/step{step}_eval.jsonl:8",
    }
    ours |= {"dtype": dtype, "report_to": "none"} | ({"num_iterations": 2} if step == 3 else {})
    flags = flags_of({name: value for name, value in section.items() if name != "eval_function"} | ours, [ROOT])
    if step < 3:
        return ["--model_name_or_path", model, *flags]
    reward = ["--critic_model_name_or_path", str(data / REWARD), "--no-normalize_reward"]
    return ["--actor_model_name_or_path", model, *reward, *flags]


def child(step: int, argv: list[str]) -> int:
    """Run a step in this process and print its peak."""
    program = importlib.import_module(PROGRAMS[step])
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    before = memory_of("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    code = program.main(argv)
    # the steps set the marks back at the end of each phase, and write the phases' peaks
    summary = json.loads((Path(argv[argv.index("--output_dir") + 1]) / "summary.json").read_text(encoding="utf-8"))
    peaks = [phase["peak_gib"] * 2**30 for phase in summary["phases"].values()]
    on_cpu = accelerator.device_name() == "cpu"
    last = memory_of("VmHWM") if on_cpu else accelerator.max_memory_allocated()
    print(f"\nPEAK {int(max(last, *peaks)) - (before if on_cpu else 0)}", flush=True)
    return code


def compare(
    step: int, stage: int, model: str, *, length: int, batch: int, dtype: str, recipe: str, default_allocator: bool
) -> tuple[float, float]:
    """(planned, measured) peak of one step on one rank, in MiB; a ``recipe`` has its own stage, length and batch."""
    from training.utils.run.folders import python_path

    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder), length)
        if step == 3:
            write_reward_model(Path(folder), model)
        if recipe:
            argv = arguments_of_recipe(recipe, step, model, Path(folder), dtype)
        else:
            argv = arguments_of(step, model, stage, Path(folder), length, batch, dtype)
        output = ["--output_dir", f"{folder}/out"]
        folders = {"TRIPOD_CACHE": f"{folder}/cache", "TRIPOD_OUTPUT": f"{folder}/runs"}
        environment = {"PYTHONPATH": python_path(), **folders}
        program = [sys.executable, "-m", PROGRAMS[step], *argv, *output, "--plan"]
        planned = number_of(program, environment, r"\n  peak ([\d,]+) in")
        measuring = [sys.executable, __file__, "--child", str(step), *argv, *output]
        trimming = {} if default_allocator else TRIMMING
        return planned, number_of(measuring, environment | trimming, r"\nPEAK (\d+)") / MIB


def main() -> None:
    """Measure and print a row for each step and stage."""
    if sys.argv[1:2] == ["--child"]:
        sys.exit(child(int(sys.argv[2]), sys.argv[3:]))
    parser = flags_of(__doc__)
    parser.add_argument("--model_name_or_path", default="embedded")
    parser.add_argument("--step", type=int, nargs="+", default=[1, 2, 3], choices=(1, 2, 3))
    parser.add_argument("--zero_stage", type=int, nargs="+", default=[0, 2, 3], choices=(0, 1, 2, 3))
    parser.add_argument("--length", type=int, default=128, help="tokens of a row; step 3: half prompt, half response")
    parser.add_argument("--batch", type=int, default=4, help="rows (step 2: pairs) of a micro-batch")
    parser.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--recipe", default="", help="take a recipe's flags instead of stages, length and batch")
    parser.add_argument("--default_allocator", action="store_true", help="leave the C library's settings alone")
    args = parser.parse_args()
    from training.utils.model.loading import resolve_model

    model = resolve_model(args.model_name_or_path)
    print(head_of("step", "ZeRO", "planned, MiB", "measured, MiB", "planned / measured"), flush=True)
    for step in args.step:
        for stage in [0] if args.recipe else args.zero_stage:
            sizes = {"length": args.length, "batch": args.batch, "dtype": args.dtype, "recipe": args.recipe}
            planned, measured = compare(step, stage, model, default_allocator=args.default_allocator, **sizes)
            print(row_of(step, stage, f"{planned:,.0f}", f"{measured:,.0f}", f"{planned / measured:.2f}"), flush=True)


if __name__ == "__main__":
    main()
