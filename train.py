"""Run the steps of a pipeline in one run directory, each as its own ``deepspeed`` process, each feeding the next.

    python train.py                                    the demo: embedded model, bundled data, into output/demo
    python train.py --data_path mine.csv               your own data in every step, into output/start
    python train.py --recipe my.yaml --num_gpus 2      your own flags, a section for each step
    python train.py --resume auto                      goes on with the latest run: with its step, where it stopped
    python train.py --output_dir output/demo           goes on with that run; finished steps are skipped
    python train.py --pipeline sft,dpo                 no reward model and no PPO: DPO on the pairs, in RUN/dpo
    python train.py --step 2 3 --actor_model_name_or_path SFT_MODEL --data_path mine.csv    starts from a model you have
    python train.py --step3_args "--ppo_epochs 2"      anything else, as the step's own flags
    python train.py --rounds 2 --judge_args "--judge rules.py:score"    then twice: answer, judge, train again

The exact command of each step is printed before it starts and can be run by itself. A run directory holds
step1/, step2/, step3/ or dpo/, a log of each, and manifest.json: versions, commands, inputs with hashes, metrics,
times.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from training.utils.run.environment import check_environment

if __name__ == "__main__":
    check_environment()

from training.migrate.e2e import rewritten
from training.pipeline import estimate
from training.pipeline.asked import ACTOR, InputArguments, RunArguments, joined, record_start, taken_up
from training.pipeline.paths import same_flags
from training.pipeline.rounds import RoundArguments, Rounds, check_flags, check_run
from training.pipeline.shared_flags import SharedArguments, refuse_flags_of_some_steps
from training.pipeline.showcase import answers_text, summary_table
from training.pipeline.steps import Step, check_data_named, check_steps, due, made_from, plan_steps, tell_ignored
from training.report.page import write_report
from training.utils import arguments
from training.utils.arguments import DEMO
from training.utils.checkpoint.store import remove_all
from training.utils.errors import UserError, run_program
from training.utils.run.demo import named_sources
from training.utils.run.files import read_object, write_json
from training.utils.run.folders import (
    CHECKPOINTS,
    LATEST,
    STEPS,
    continued,
    deepspeed_launcher,
    is_finished,
    locked,
    make_dir,
    new_run_dir,
    output_root,
    point_latest,
    repository_root,
    shown,
    title,
    tuned_models,
    with_python,
)
from training.utils.run.hosts import check_hosts, read_hostfile, with_ranks
from training.utils.run.manifest import MANIFEST, SUMMARY, hash_inputs
from training.utils.run.processes import Ended, last_lines, run_logged, unused_port
from training.utils.run.runtime import has_accelerator, prepare_runtime
from training.utils.run.watchdog import outlive_readers

ROOT = repository_root()


def parse_flags(argv: Sequence[str]) -> list[Any]:
    """The flags: instances of RunArguments, InputArguments, RoundArguments and SharedArguments.

    Raises:
        UserError: a flag that is not known, not of every step, or has a value that it can not have.
    """
    groups = [RunArguments, InputArguments, RoundArguments, SharedArguments]
    others = {"--model_name_or_path": arguments.OtherFlag(str, ours=ACTOR)}
    tokens = rewritten(joined(argv))
    refuse_flags_of_some_steps(tokens, groups)
    return arguments.parse(groups, tokens, prog="train.py", description=__doc__, others=others)


def main(
    argv: Sequence[str],
    *,
    launcher: Sequence[str] | None = None,
    scripts: Mapping[str, str] | None = None,
    programs: Mapping[str, str] | None = None,
) -> int:
    """Run the steps; returns the exit code: 0, that of the step that failed, or 128 + the signal that ended it.

    Args:
        argv: the flags.
        launcher: what starts a step instead of ``deepspeed``, for tests.
        scripts: the steps' programs, relative to the repository, by the names of `STEPS`; given ones are not asked
            before the first of them starts.
        programs: the rounds' likewise, by the names of `training.pipeline.rounds.PROGRAMS`.

    Raises:
        UserError: a flag or the recipe is not usable; nothing has run then.
    """
    groups = parse_flags(argv)
    options, _, rounds, _ = groups
    asks, scripts, programs = not scripts, scripts or STEPS, programs or {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") if has_accelerator() else None
    on_ranks = with_ranks(launcher or deepspeed_launcher(), options.num_gpus, options.hostfile, visible)
    if options.hostfile and not options.plan:
        check_hosts(options.hostfile)
    asked = taken_up(groups, argv)
    planned = plan_steps(asked, scripts)  # bad flags end here, before a folder is made
    check_steps(asked, planned)
    check_flags(rounds, asked.given, programs)
    if rounds.rounds:
        check_run(asked.run, asked.wanted, rounds.rounds)
    if not options.plan:
        check_data_named(asked, planned)
    tell_ignored(asked, planned)
    slots = list(read_hostfile(options.hostfile).values()) if options.hostfile else [1]
    on_each = [options.num_gpus or count for count in slots]
    if options.plan:
        return show_plans(planned, ranks=sum(on_each), on_this_host=on_each[0])
    if asks and not asked.as_bundled:
        standing_in = dataclasses.replace(asked, options=dataclasses.replace(options, plan=True))
        check_later(plan_steps(standing_in, scripts), sum(on_each), on_each[0], options.hostfile)
    asked.run = make_dir(asked.run) if options.output_dir else new_run_dir(Path(asked.recipe).stem)
    steps = plan_steps(asked, scripts)
    with locked(asked.run, "another train.py"):
        point_latest(asked.run)
        record_start(asked, argv)
        again = shlex.join([shown(sys.executable), shown(ROOT / "train.py"), *continued(argv, asked.run)])
        if not options.hostfile:
            say_time(steps, options.num_gpus or 1)
        if code := run_steps(steps, asked.run, asked.manifest, on_ranks, again):
            return code
        show_end(asked.run, asked.manifest)
        if not rounds.rounds:
            return 0
        how = ["--num_gpus", str(options.num_gpus)] if options.num_gpus else []
        how += ["--hostfile", options.hostfile] if options.hostfile else []
        one_round = functools.partial(main, launcher=launcher, scripts=scripts)
        return Rounds(asked.run, rounds, on_ranks, one_round, how, again, programs).go()


def show_plans(steps: Sequence[Step], ranks: int, on_this_host: int) -> int:
    """Run each step's program with ``--plan``, as one process that plans for ``ranks``, some of them on this host.

    Returns:
        0 if every step fits, 1 if one does not, 2 if a step's flags are not usable.
    """
    codes = [0]
    for step in steps:
        codes.append(_plan(step, ranks, on_this_host).returncode)
        print(flush=True)
    return max(codes)


def check_later(steps: Sequence[Step], ranks: int, on_this_host: int, hostfile: str) -> None:
    """Ask the programs of later steps what they make of their flags and models, before the first one takes hours.

    ``steps`` are those to run, of a plan: what is not made yet is stood in for. With a ``hostfile`` others may compute
    than this host, if that has no accelerator: their precision is not its own.

    Raises:
        UserError: one would refuse them.
    """
    later = due(steps)[1:]
    if later:
        print(f"asking {' and '.join(title(step.name) for step in later)} about flags and models ...", flush=True)
    if hostfile and not has_accelerator():
        later = [dataclasses.replace(step, argv=[*step.argv, "--dtype", "bf16"]) for step in later]
    with ThreadPoolExecutor() as pool:
        answers = pool.map(lambda step: _plan(step, ranks, on_this_host, capture_output=True, text=True), later)
    for step, answer in zip(later, answers, strict=True):
        if answer.returncode == 2:
            *_, said = answer.stderr.strip().splitlines() or [""]
            raise UserError(f"{title(step.name)}: {said.removeprefix('error: ')}")


def _plan(step: Step, ranks: int, on_this_host: int, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, step.script, *step.argv, "--plan"]
    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(on_this_host)}
    return subprocess.run(command, env=os.environ | environment, check=False, **options)


def say_time(steps: Sequence[Step], ranks: int) -> None:
    """Print how long this machine will take, where that can be estimated."""
    first = next((i for i, step in enumerate(steps) if not is_finished(step.directory)), len(steps))
    if line := estimate.line({step.name: step.argv for step in steps}, [s.name for s in steps[first:]], ranks):
        print(line, flush=True)


def run_steps(steps: Sequence[Step], run: Path, manifest: dict[str, Any], launcher: Sequence[str], again: str) -> int:
    """Run those that are not finished, and those that follow one of these; the exit code of one that fails, else 0."""
    for step in steps:
        entry = manifest.get("steps", {}).get(step.name, {})
        if is_finished(step.directory):
            changed = f" with other flags; to repeat it, remove {shown(step.directory)}"
            print(f"{title(step.name)} is finished{'' if same_flags(entry, step.argv, run) else changed}", flush=True)
            if "exit_code" not in entry:  # it went on without train.py, which was killed
                known = {"arguments": step.argv, "folder": str(Path.cwd())}
                record_end(manifest.setdefault("steps", {}).setdefault(step.name, known), step, run, manifest)
            continue
        start_over_after(step, steps, run, manifest)
        command = [*launcher, "--master_port", str(unused_port()), step.script, *step.once, *step.argv]
        ended = run_step(step, command, run, manifest)
        if ended.code:
            tell_failure(step, command, ended, run, again)
            return ended.code
    return 0


def start_over_after(step: Step, steps: Sequence[Step], run: Path, manifest: Mapping[str, Any]) -> None:
    """Let what was made from the output that changes start over, in this start or a later one: it could not go on."""
    later = made_from(step.name, run)
    left = [title(name) for name in later if is_finished(run / name) and name not in [other.name for other in steps]]
    for name in later:
        (run / name / SUMMARY).unlink(missing_ok=True)
        remove_all(run / name / CHECKPOINTS)
        for key in ("exit_code", "metrics"):
            manifest.get("steps", {}).get(name, {}).pop(key, None)
    if left:
        print(f"note: {' and '.join(left)}, made from another {title(step.name)}, no longer count as finished: "
              "train.py without --step makes them again", flush=True)  # fmt: skip


def run_step(step: Step, command: list[str], run: Path, manifest: dict[str, Any]) -> Ended:
    """Run one step; its command, inputs, time, exit code and metrics are in manifest.json when this returns."""
    print(f"\n== {title(step.name)}\n{shlex.join(command)}\n", flush=True)
    named = {"demo": ROOT / "training" / "data" / "demo"}
    data = [] if named_sources(step.argv) else ["--data_path", DEMO]  # the steps' default
    entry: dict[str, Any] = {
        "command": command,
        "arguments": step.argv,
        "folder": str(Path.cwd()),
        "inputs": hash_inputs([*step.argv, *data], named),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    manifest.setdefault("steps", {})[step.name] = entry
    write_json(run / MANIFEST, manifest)
    start = time.monotonic()
    ended = run_logged(command, run / f"{step.name}.log")
    if ended.code == 0 and not is_finished(step.directory):
        ended = Ended(1)  # the launcher says 0 when it was killed itself
    entry["seconds"] = round(time.monotonic() - start, 1)
    record_end(entry, step, run, manifest, ended.code)
    return ended


def record_end(entry: dict[str, Any], step: Step, run: Path, manifest: Mapping[str, Any], code: int = 0) -> None:
    """Note in the manifest how a step ended, and what it found."""
    entry["exit_code"] = code
    if code == 0:
        entry["metrics"] = read_object(step.directory / "summary.json")
    write_json(run / MANIFEST, manifest)


def tell_failure(step: Step, command: list[str], ended: Ended, run: Path, again: str) -> None:
    """Say on stderr which step failed, what it said last, and how to go on."""
    log = run / f"{step.name}.log"
    name = title(step.name)
    if ended.signal is not None:
        lines = [f"\n{name} was stopped by {signal.Signals(ended.signal).name}."]
    else:
        hint = " (killed; the machine may have run out of memory)" if ended.code in (137, 247) else ""
        lines = [f"\n{name} failed with exit code {ended.code}{hint}. The last lines of {shown(log)}:"]
        lines += [f"    {line}" for line in last_lines(log)]
    lines += [f"The run so far, as a page:     {report(run)}"]
    lines += [f"To run this step alone again:  {shlex.join(command)}", f"To go on with the run:         {again}"]
    print("\n".join(lines), file=sys.stderr, flush=True)


def show_end(run: Path, manifest: Mapping[str, Any]) -> None:
    """The summary table, the answers to held-out prompts, and where to look next."""
    seconds = {name: entry["seconds"] for name, entry in manifest.get("steps", {}).items() if "seconds" in entry}
    for text in (summary_table(run, seconds), answers_text(run)):
        if text:
            print(f"\n{text}")
    models = tuned_models(run)
    latest, page = output_root() / LATEST, shown(ROOT / "inference" / "gradio_chatbot.py")
    if latest.is_dir() and latest.resolve() == run.resolve():
        chat = "make chat" if Path.cwd() == ROOT else with_python(page)
    else:
        chat = with_python(page, "--path", *(f"{name}={shown(folder)}" for name, folder in models.items()))
    print(f"\nReport:           {report(run)}")
    if len(models) > 1:
        print(f"Chat with it:     {chat}")
    print(f"Everything is in: {shown(run)}", flush=True)


def report(run: Path) -> str:
    """Write the run's page; returns what to say about it. A full disk costs the page, not the run."""
    try:
        return shown(write_report(run))
    except OSError as error:
        later = with_python("-m", "training.report", shown(run))
        return f"could not be written ({error.strerror}); later: {later}"


def run_pipeline() -> int:
    """Run `main` as the whole life of this process; returns its exit code."""
    prepare_runtime()
    outlive_readers()
    try:
        return run_program(main)
    except KeyboardInterrupt:  # between two steps; during one, run_logged passes the signal on
        return 130


if __name__ == "__main__":
    sys.exit(run_pipeline())
