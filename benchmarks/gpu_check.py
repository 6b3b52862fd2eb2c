"""Everything that one CUDA GPU must show, in at most 25 minutes: tests, speed, memory. ``make gpu-check`` runs it.

    python benchmarks/gpu_check.py                         # all stages, results into benchmarks/results/
    python benchmarks/gpu_check.py --stages step3 memory
    python benchmarks/gpu_check.py --device cpu --tiny     # its whole logic on a CPU, in a minute or two
    python benchmarks/gpu_check.py --tables                # write docs/results.md's section anew from the results

The stages, each a process of its own with a time limit (`LIMITS`), are in `gpu_stages.py`: the tests marked gpu;
`fast` against `hf`; tokens per second of step 1 and pairs per second of step 2; an iteration of step 3 with an actor of
OPT-1.3B's shape and a critic of OPT-350M's, 256 + 256 tokens; answers behind a shared prompt against answers apart;
what rests in host memory; the memory plan against the allocator's peak. Those that time something come first, each
alone, then the others at once. A stage that fails, or takes longer, does not keep the others from running. What was
found is on the disk after each.

Ends with 0 if every stage was fine, 1 if one was not, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import ROOT, flags_of, head_of, row_of, spread, write_figures

from training.utils.errors import UserError, run_program

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results.md"
BEGIN, END = "<!-- written by benchmarks/gpu_check.py --tables -->", "<!-- end of what it wrote -->"
LIMITS = {  # seconds; 25 minutes, as the last two run together
    "rollout": 180, "step1": 150, "step2": 120, "step3": 270, "shared": 120, "host": 120, "tests": 540, "memory": 240,
}  # fmt: skip
UNTIMED = ("tests", "memory")  # nothing else of a check depends on what runs beside it
POLL = 0.2  # seconds
PUBLISHED = 6.27  # answers per second of DeepSpeed-Chat: OPT-1.3B + 350M at 256 + 256 tokens on one A100


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the flags."""
    parser = flags_of(__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models and few tokens: does it run at all?")
    parser.add_argument("--stages", nargs="+", choices=list(LIMITS), default=list(LIMITS))
    parser.add_argument("--json", type=Path, help="where the figures go; of a GPU by default into benchmarks/results/")
    parser.add_argument("--tables", action="store_true", help="only write the section of docs/results.md anew")
    parser.add_argument("--stage", choices=list(LIMITS), help=argparse.SUPPRESS)  # a process for one of them
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    there = arguments.json.read_text("utf-8", "replace") if arguments.json and arguments.json.is_file() else ""
    if there and not there.startswith('{\n "machine"'):
        parser.error(f"--json {arguments.json}: there is such a file, and it holds no such figures; name another one")
    if arguments.device == "cpu" and not arguments.tiny:
        parser.error("--device cpu is for --tiny: the sizes are a GPU's")
    return arguments


def machine(device: str) -> dict[str, Any]:
    """What the figures were measured on: card, driver, versions, commit."""
    import torch

    packages = ("torch", "deepspeed", "transformers", "peft", "accelerate")
    found: dict[str, Any] = {"python": platform.python_version(), "processor": platform.machine()}
    found |= {name: importlib.metadata.version(name) for name in packages}
    found["commit"] = _said(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"])
    found["changed"] = bool(_said(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"]))
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        driver = _said(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"])
        found |= {"card": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}
        found |= {"driver": driver, "cuda": torch.version.cuda}
    return found


def _said(command: list[str]) -> str:
    """A command's output; empty where it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def check_device(device: str) -> None:
    """There must be a GPU for what is a GPU's.

    Raises:
        UserError: there is none that PyTorch can use.
    """
    if device == "cpu":
        return
    import torch

    from training.utils.run.distributed import unused_gpu

    if not torch.cuda.is_available():
        why = unused_gpu().removeprefix("warning: ") or "no CUDA GPU is here"
        raise UserError(f"gpu_check needs a CUDA GPU: {why} (--device cpu --tiny runs its logic on a CPU)")


def command_of(stage: str, arguments: argparse.Namespace, folder: Path) -> list[str]:
    """The process of one stage."""
    command = [sys.executable, str(Path(__file__).resolve()), "--stage", stage, "--folder", str(folder)]
    return [*command, "--device", arguments.device, *(["--tiny"] * arguments.tiny)]


def limit_of(stage: str, device: str) -> int:
    """Seconds that a stage may take; a CPU, which may be busy, has four times those of a GPU."""
    return LIMITS[stage] * (4 if device == "cpu" else 1)


def together(stages: Sequence[str]) -> list[list[str]]:
    """What runs at the same time: a stage that times something alone, in the order given; then the others at once."""
    others = [stage for stage in stages if stage in UNTIMED]
    return [[stage] for stage in stages if stage not in UNTIMED] + [others] * bool(others)


def run_stages(stages: Sequence[str], arguments: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """Stages at the same time, each a process: whether it was fine, its seconds, what it found or why it failed."""
    environment = os.environ | {"TRIPOD_TEST_DEVICE": arguments.device, "TRIPOD_CACHE": str(folder / "cache")}
    environment |= {"DS_ACCELERATOR": arguments.device}
    if arguments.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    own: dict[str, Any] = {"cwd": ROOT, "env": environment, "start_new_session": True, "stdin": subprocess.DEVNULL}
    started = time.monotonic()
    running = {stage: subprocess.Popen(command_of(stage, arguments, folder), **own) for stage in stages}
    results: dict[str, dict[str, Any]] = {}
    try:
        while running:
            time.sleep(POLL)
            seconds = time.monotonic() - started
            for stage, process in list(running.items()):
                late = seconds > limit_of(stage, arguments.device)
                if process.poll() is not None or late:
                    results[stage] = _outcome(stage, running.pop(stage), arguments, folder, seconds)
    finally:  # Ctrl-C, too, ends them with what they have started themselves
        for process in running.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return results


def _outcome(
    stage: str, process: subprocess.Popen[bytes], arguments: argparse.Namespace, folder: Path, seconds: float
) -> dict[str, Any]:
    """What became of a stage that has ended, or is ended here because its time is over."""
    failure = ""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        failure = f"not done after {limit_of(stage, arguments.device)} s"
    code, found = process.wait(), folder / f"{stage}.json"
    result: dict[str, Any] = {"seconds": round(seconds, 1)}
    result |= json.loads(found.read_text(encoding="utf-8")) if found.is_file() else {}
    if code and not failure:
        failure = result.get("failure") or f"ended with exit code {code}"
    return {"fine": not failure} | result | ({"failure": failure} if failure else {})


def child(arguments: argparse.Namespace) -> int:
    """Run one stage in this process; its figures, or why it failed, go into a file."""
    from training.utils.run.runtime import prepare_runtime

    prepare_runtime()
    import gpu_stages

    sizes = gpu_stages.TINY if arguments.tiny else gpu_stages.FULL
    result: dict[str, Any]
    try:
        result = {"figures": gpu_stages.STAGES[arguments.stage](sizes, arguments.folder)}
    except gpu_stages.StageFailed as error:
        result = {"figures": error.figures, "failure": str(error)}
    except Exception as error:  # told here and in the results; the other stages go on
        traceback.print_exc()
        result = {"failure": f"{type(error).__name__}: {error}"[:2000]}
    (arguments.folder / f"{arguments.stage}.json").write_text(json.dumps(result), encoding="utf-8")
    return int("failure" in result)


def check(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the stages, and write what is known after each."""
    about = machine(arguments.device)
    now = datetime.datetime.now(datetime.UTC)
    found: dict[str, Any] = {"machine": about, "date": f"{now:%Y-%m-%d}", "tiny": arguments.tiny}
    results: dict[str, dict[str, Any]] = {}
    target = arguments.json
    if target is None and arguments.device == "cuda":
        card = re.sub(r"[^a-z0-9]+", "-", about["card"].lower()).strip("-")
        target = RESULTS / f"gpu-{card}-{now:%Y%m%d-%H%M}.json"
    with tempfile.TemporaryDirectory(prefix="gpu_check-") as folder:
        for stages in together(arguments.stages):
            for stage in stages:
                print(f"== {stage}, at most {limit_of(stage, arguments.device)} s", flush=True)
            results |= run_stages(stages, arguments, Path(folder))
            for stage in stages:
                told = results[stage].get("failure") or "fine"
                print(f"== {stage}: {told}, {results[stage]['seconds']} s", flush=True)
            found["stages"] = {stage: results[stage] for stage in arguments.stages if stage in results}
            if target is not None:
                target.parent.mkdir(parents=True, exist_ok=True)
                write_figures(target, found)
    if target is not None:
        print(f"figures: {target}")
    return found


def tables(found: dict[str, Any]) -> str:
    """The figures of one check as Markdown."""
    about, stages = found["machine"], found["stages"]
    card = f"{about['card']}, {about['memory_gib']} GiB" if "card" in about else "a CPU, tiny models"
    versions = ", ".join(f"{name} {about[name]}" for name in ("torch", "deepspeed", "transformers"))
    driver = f"driver {about['driver']}, CUDA {about['cuda']}, " if "card" in about else ""
    changed = " with changes" if about["changed"] else ""
    what = f"{found['date']}, {driver}{versions}, commit {about['commit'] or 'unknown'}{changed}."
    lines = [f"### {card}", "", what, ""]
    lines += [found["note"], ""] if "note" in found else []
    lines.append(head_of("stage", "result", "seconds"))
    for name, stage in stages.items():
        said = "fine" if stage["fine"] else stage["failure"].splitlines()[-1][:200]
        lines.append(row_of(name, said, stage["seconds"]))
    figures = {name: stage["figures"] for name, stage in stages.items() if "figures" in stage}
    speeds = []
    if "step1" in figures:
        speeds.append(row_of("step 1, tokens/s", spread(figures["step1"]["tokens_per_second"], 0), ""))
    if "step2" in figures:
        speeds.append(row_of("step 2, pairs/s", spread(figures["step2"]["pairs_per_second"]), ""))
    if "step3" in figures:
        values = figures["step3"]["answers_per_second"]
        times = figures["step3"]["records"][1:]
        shares = {n: statistics.median(r[f"time/{n}"] for r in times) for n in ("generate", "score", "train")}
        where = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in shares.items())
        more = where if found["tiny"] else f"{where}; DeepSpeed-Chat published {PUBLISHED} on one A100"
        speeds.append(row_of("step 3, answers/s", spread(values), more))
    if speeds:
        lines += ["", head_of("training", "median (lowest - highest)", ""), *speeds]
    if "shared" in figures:
        lines += ["", head_of("answers to a prompt", "score, s", "train, s")]
        samples = figures["shared"]["samples_per_prompt"]
        for found in figures["shared"]["lengths"]:
            for way in ("apart", "together"):
                name = f"{samples} of {found['response']} tokens to {found['prompt']}, {way}"
                lines.append(row_of(name, spread(found[way]["score"]), spread(found[way]["train"])))
    if "host" in figures:
        states, reference = figures["host"]["states"], figures["host"]["reference"]
        lines += ["", head_of("in host memory, ZeRO-3", "seconds (lowest - highest)")]
        size = f"{states['freed_gib']:.1f} GiB of the actor's optimizer states"
        for way in ("away", "back"):
            first, *later = states[way]
            lines.append(row_of(f"{size}: {way}", f"{spread(later)}; the first time {first:.2f}"))
        lines += [row_of(f"log-probs by a reference: {place}", spread(times)) for place, times in reference.items()]
    if "rollout" in figures:
        lines += ["", head_of("rollouts", "engine", "tokens/s (lowest - highest)", "against hf")]
        for name in ("one length", "mixed lengths"):
            for engine in figures["rollout"][name]:
                speed = f"{engine['tokens_per_second']:,.0f} ({engine['lowest']:,.0f} - {engine['highest']:,.0f})"
                lines.append(row_of(name, engine["engine"], speed, f"{engine['ratio_to_hf']:.2f}x"))
    if "memory" in figures:
        lines += ["", head_of("memory", "planned, MiB", "measured, MiB", "planned / measured")]
        for step in figures["memory"]["rows"]:
            planned, measured = step["planned_mib"], step["measured_mib"]
            lines.append(row_of(f"step {step['step']}", f"{planned:,}", f"{measured:,}", f"{planned / measured:.2f}"))
    return "\n".join(lines) + "\n"


def section(results: Path) -> str:
    """The whole section of the page, from the files of all checks."""
    files = sorted(results.glob("gpu-*.json")) if results.is_dir() else []
    if not files:
        return "No GPU has run it yet.\n"
    return "\n".join(tables(json.loads(file.read_text(encoding="utf-8"))) for file in files)


def with_section(page: str, text: str) -> str:
    """The page with that section between its markers."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{text}{END}{rest.split(END)[1]}"


def main(argv: Sequence[str]) -> int:
    """Run the check; see the module's docstring for the exit code."""
    arguments = parse(argv)
    if arguments.stage:
        return child(arguments)
    if arguments.tables:
        PAGE.write_text(with_section(PAGE.read_text(encoding="utf-8"), section(RESULTS)), encoding="utf-8")
        return 0
    check_device(arguments.device)
    found = check(arguments)
    print(tables(found))
    if arguments.device == "cuda" and arguments.json is None:
        PAGE.write_text(with_section(PAGE.read_text(encoding="utf-8"), section(RESULTS)), encoding="utf-8")
    return int(not all(stage["fine"] for stage in found["stages"].values()))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the stage ends with it
    sys.exit(run_program(main))
