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

import datetime
import functools
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.utils.run.environment import check_environment

if __name__ == "__main__":
    check_environment()

from training.migrate.e2e import rewritten
from training.pipeline import estimate, going_on
from training.pipeline.own_data import START, check_paths, check_rows, check_sources, without_demo
from training.pipeline.rounds import RoundArguments, Rounds, check_flags, check_run
from training.pipeline.shared_flags import SharedArguments, given_flags, parse_step, refuse_flags_of_some_steps
from training.pipeline.showcase import answers_text, summary_table
from training.report.page import REPORT, write_report
from training.utils import arguments
from training.utils.arguments import DEMO, flags_in
from training.utils.errors import UserError, run_program
from training.utils.run.demo import MODEL, check_sources_named, is_own, named_sources, trained_on_demo
from training.utils.run.files import check_page, read_object, write_json
from training.utils.run.folders import (
    LATER,
    LATEST,
    PIPELINES,
    STEPS,
    TUNED,
    check_latest,
    continued,
    deepspeed_launcher,
    is_finished,
    latest_output,
    latest_run,
    locked,
    make_dir,
    named_itself,
    new_run_dir,
    output_root,
    point_latest,
    repository_root,
    shown,
    title,
)
from training.utils.run.hosts import check_hosts, read_hostfile, with_ranks
from training.utils.run.manifest import MANIFEST, describe_environment, hash_inputs, read_manifest
from training.utils.run.processes import Ended, last_lines, run_logged, unused_port
from training.utils.run.recipes import GIVEN, flags_of, located, read_recipe
from training.utils.run.runtime import has_accelerator, prepare_runtime
from training.utils.run.watchdog import outlive_readers

ROOT = repository_root()
ACTOR = "--actor_model_name_or_path"
REWARD = "--reward_model_name_or_path"
DEFAULT_PIPELINE = "sft,rm,ppo"
NUMBERS = {"step1": 1, "step2": 2, "dpo": 2, "step3": 3}  # of --step


@dataclass
class RunArguments:
    """Run"""

    recipe: str = arguments.flag(
        "",
        "a name in training/recipes, or a YAML file of sections step1 to step3, dpo (default: demo; own data: start)",
    )
    pipeline: str = arguments.flag(
        "", f"what follows SFT (default: the run's own, or {DEFAULT_PIPELINE})", choices=("", *PIPELINES)
    )
    step: list[int] = arguments.flag([1, 2, 3], "which steps of it to run; DPO counts as 2", choices=(1, 2, 3))
    num_gpus: int | None = arguments.flag(
        None,
        "ranks, one per GPU; on a machine without one, processes (default: 1; with --hostfile all its slots)",
        minimum=1,
        maximum=1024,  # of one host; the launcher's list of them is an argument, whose length the system limits
    )
    hostfile: str = arguments.flag("", "DeepSpeed's list of hosts; each needs this folder, and ssh without a password")
    output_dir: str = arguments.flag(
        "", "the run directory; one that is there is continued (default: output/RECIPE, new)"
    )
    resume: str = arguments.flag(
        "",
        "auto: go on with --output_dir, or with the latest run; never: unfinished steps start over",
        choices=("auto", "never"),
    )
    plan: bool = arguments.flag(False, "print the memory that each step needs on each rank, and stop")


@dataclass
class InputArguments:
    """Models, and flags of the steps"""

    actor_model_name_or_path: str = arguments.flag(
        "", "or --model_name_or_path: what step 1 starts from; without step 1, its output (default: embedded)"
    )
    reward_model_name_or_path: str = arguments.flag(
        "", "what step 2 starts from; without step 2, its output (default: step 1's output)"
    )
    step1_args: str = arguments.flag(
        "", 'flags of step 1 in one string, such as "--learning_rate 1e-5"; they win over the recipe'
    )
    step2_args: str = arguments.flag("", "the same for step 2")
    dpo_args: str = arguments.flag("", "the same for DPO")
    step3_args: str = arguments.flag("", "the same for step 3")


@dataclass
class Step:
    """One step of a run, ready to start."""

    name: str  # one of STEPS
    script: str
    argv: list[str]  # what it computes; recorded, and compared when the run goes on
    directory: Path
    once: Sequence[str] = ()  # flags of this start alone

    def command(self, launcher: Sequence[str]) -> list[str]:
        """The process to start, by `with_ranks`; a free port lets runs share a machine."""
        return [*launcher, "--master_port", str(unused_port()), self.script, *self.once, *self.argv]


def own_args(name: str, text: str) -> list[str]:
    """The flags in ``--stepN_args`` or ``--dpo_args``.

    Raises:
        UserError: an open quote, or a flag that train.py gives itself.
    """
    try:
        tokens = shlex.split(text)
    except ValueError as error:
        raise UserError(f"--{name}_args: {error}") from error
    for token in tokens:
        flag = token.partition("=")[0].removeprefix("--").replace("-", "_")
        if token.startswith("--") and flag in GIVEN[name]:
            raise UserError(
                f"--{name}_args: --{flag} is given by train.py; see its own flags for models and --output_dir"
            )
    return tokens


def own_data(inputs: InputArguments, shared: Mapping[str, Any]) -> bool:
    """Whether the command line gives a step data that are not the demo's."""
    argvs = [own_args(name, getattr(inputs, f"{name}_args")) for name in STEPS]
    return any(is_own(paths) for paths in (shared.get("data_path", []), *map(named_sources, argvs)))


def _unless_given(flags: Sequence[str], given: Sequence[str]) -> list[str]:
    """``flags`` without those that ``given`` has, which count."""
    kept, mine = [], True
    for token in flags:
        if token.startswith("--"):
            mine = not flags_in([token]).keys() & flags_in(given).keys()
        kept += [token] if mine else []
    return kept


def check_steps(steps: Sequence[Step], run: Path, recorded: Mapping[str, Any], *, weights: bool) -> None:
    """Refuse, before anything is made, what steps would end with.

    Args:
        steps: those to run, in ``run``.
        recorded: what the manifest says about each step that has been run.
        weights: whether models need them; a plan does without.

    Raises:
        UserError: a path is not there, a step would train on the demo unasked, or a later step would find no rows.
    """
    done = {name: entry["arguments"] for name, entry in recorded.items() if is_finished(run / name)}
    with_own = {name: argv for name, argv in done.items() if is_own(named_sources(argv))}
    check_sources({step.name: step.argv for step in steps} | with_own)
    made = [shown(run / name) for name in STEPS]
    for step in steps:
        if not is_finished(step.directory):
            parse_step(step.name, step.argv)
            check_paths(step.argv, made, weights=weights)
            check_rows(step.name, step.argv)


def check_data_named(steps: Sequence[Step], run: Path, models: Mapping[str, str]) -> None:
    """Refuse to train models of the user's on the demo unasked.

    Args:
        steps: those to run, in ``run``.
        models: flag -> the model, where nobody has chosen the recipe, which is the demo's then.

    Raises:
        UserError: names the flag.
    """
    check_sources_named([], models)
    made = [shown(run / name) for name in STEPS]
    for step in steps:
        named = {f"--{name}": value[0] for name, value in flags_in(step.argv).items() if name.endswith(MODEL)}
        if not is_finished(step.directory):
            check_sources_named(named_sources(step.argv), {f: model for f, model in named.items() if model not in made})


def tell_dropped(recipe_name: str) -> None:
    """Say which flags of a recipe are the demo's and left out, because the data are not."""
    _, recipe = read_recipe(recipe_name)
    dropped = [f"{flag} of {title(name)}" for name, section in recipe.items() for flag in without_demo(section)[1]]
    if dropped:
        print(f"recipe {recipe_name}: the demo's {', '.join(dropped)} left out, the data are your own", flush=True)


def tell_idle(options: RunArguments, given: Collection[str], planned: Sequence[Step]) -> None:
    """Say which flags are given to a step that does not run."""
    for name in STEPS:
        if f"{name}_args" in given and name not in [step.name for step in planned]:
            left = f"--step {' '.join(map(str, options.step))} leaves it out"
            print(f"note: --{name}_args has no effect: {left}", flush=True)


def plan_steps(
    options: RunArguments,
    inputs: InputArguments,
    shared: Mapping[str, Any],
    recipe_name: str,
    run: Path,
    scripts: Mapping[str, str],
) -> list[Step]:
    """The steps asked for, with what each takes from the one before it.

    Of a flag that is given more than once, ``--stepN_args`` count before ``shared``, and that before the recipe.

    Args:
        shared: flags of every step, without dashes, with their values.

    Raises:
        UserError: the recipe or a flag is not usable, or the output of a step that does not run is nowhere.
    """
    recipe_path, recipe = read_recipe(recipe_name)
    folders = [Path(recipe_path).resolve().parent, ROOT]
    wanted = [name for name in PIPELINES[options.pipeline] if NUMBERS[name] in options.step]
    for name in STEPS:
        if getattr(inputs, f"{name}_args") and name not in PIPELINES[options.pipeline]:
            raise UserError(f"--{name}_args: there is no {title(name)} in --pipeline {options.pipeline}")
    if not wanted:
        raise UserError(f"--step {' '.join(map(str, options.step))}: there is none in --pipeline {options.pipeline}")
    starts: dict[str, str] = {}

    def output_of(step: str, given: str) -> str:
        """What this run makes or has made; else what the flag names; else the newest run's."""
        if options.plan and step in wanted and not is_finished(run / step):
            return starts[step]  # not there yet, but of the same shape
        if step in wanted or (not given and is_finished(run / step)):
            return shown(run / step)
        if given:
            return given
        newest = latest_output(step)
        if own_data(inputs, shared) and trained_on_demo(newest):
            raise UserError(
                f"the newest {title(step)}, {shown(newest)}, has trained on the demo: run that step "
                f"on your own data too, or name a model: {ACTOR if step == 'step1' else REWARD}"
            )
        return shown(newest)

    steps = []
    for name in wanted:
        section = dict(recipe.get(name, {}))
        directory = run / name
        if name == "step1":
            named = section.pop("model_name_or_path", "embedded")
            models = ["--model_name_or_path", inputs.actor_model_name_or_path or located(str(named), folders)]
        elif name in ("step2", "dpo"):
            named = located(str(section.pop("model_name_or_path", "")), folders)
            start = (inputs.reward_model_name_or_path if name == "step2" else "") or named
            models = ["--model_name_or_path", start or output_of("step1", inputs.actor_model_name_or_path)]
        else:
            models = ["--actor_model_name_or_path", output_of("step1", inputs.actor_model_name_or_path)]
            models += ["--critic_model_name_or_path", output_of("step2", inputs.reward_model_name_or_path)]
        starts[name] = models[1]
        given = own_args(name, getattr(inputs, f"{name}_args"))
        section, _ = without_demo(section) if own_data(inputs, shared) else (section, [])
        flags = [*flags_of({k: v for k, v in section.items() if k not in shared}, folders), *flags_of(shared, ())]
        once = ("--resume", "never") if options.resume == "never" else ()
        argv = [*models, "--output_dir", shown(directory), *_unless_given(flags, given), *given]
        steps.append(Step(name, shown(ROOT / scripts[name]), argv, directory, once))
    return steps


def show_plans(steps: Sequence[Step], ranks: int, on_this_host: int) -> int:
    """Run each step's program with ``--plan``, as one process that plans for ``ranks``, some of them on this host.

    Returns:
        0 if every step fits, 1 if one does not, 2 if a step's flags are not usable.
    """
    codes = [0]
    for step in steps:
        command = [sys.executable, step.script, *step.argv, "--plan"]
        environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks)}
        environment["LOCAL_WORLD_SIZE"] = str(on_this_host)
        codes.append(subprocess.run(command, env=os.environ | environment, check=False).returncode)
        print(flush=True)
    return max(codes)


def say_time(steps: Sequence[Step], ranks: int) -> None:
    """Print how long this machine will take, where that can be estimated."""
    first = next((i for i, step in enumerate(steps) if not is_finished(step.directory)), len(steps))
    if line := estimate.line({step.name: step.argv for step in steps}, [s.name for s in steps[first:]], ranks):
        print(line, flush=True)


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
    entry["exit_code"] = ended.code
    if ended.code == 0:
        entry["metrics"] = read_object(step.directory / "summary.json")
    write_json(run / MANIFEST, manifest)
    return ended


def record_end(step: Step, run: Path, manifest: dict[str, Any]) -> None:
    """Note how a step ended that went on without train.py, which was killed; nothing if that is known."""
    entry = manifest.setdefault("steps", {}).setdefault(step.name, {"arguments": step.argv, "folder": str(Path.cwd())})
    if "exit_code" not in entry:
        entry["exit_code"] = 0
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
    models = {name: run / folder for name, folder in TUNED.items() if (run / folder).is_dir()}
    latest = output_root() / LATEST
    if latest.is_dir() and latest.resolve() == run.resolve():
        chat = "make chat"
    else:
        page = ROOT / "inference" / "gradio_chatbot.py"
        named = [f"{name}={shown(folder)}" for name, folder in models.items()]
        chat = shlex.join([shown(sys.executable), shown(page), "--path", *named])
    print(f"\nReport:           {report(run)}")
    if len(models) > 1:
        print(f"Chat with it:     {chat}")
    print(f"Everything is in: {shown(run)}", flush=True)


def report(run: Path) -> str:
    """Write the run's page; returns what to say about it. A full disk costs the page, not the run."""
    try:
        return shown(write_report(run))
    except OSError as error:
        return f"could not be written ({error.strerror}); later: python -m training.report {shown(run)}"


def manifest_of(run: Path, given: str) -> dict[str, Any]:
    """The manifest of a run that is there; empty for a folder that is none yet, in which a run can be made.

    Args:
        run: the folder.
        given: as the flag has it.

    Raises:
        UserError: it holds a file, named, that no run has made and that one would write over or add to.
    """
    manifest = read_manifest(run)
    if manifest and "started_as" not in manifest:
        raise UserError(f"--output_dir {given} holds a {MANIFEST} that no run made; choose another folder")
    if manifest:
        return manifest
    logs = [run / f"{name}.log" for name in STEPS]
    if other := next((path for path in logs if path.exists()), None):
        raise UserError(f"--output_dir {run} holds {other.name}, which no run made; choose another folder")
    check_page(run / REPORT, "--output_dir:")
    return {}


def parse_flags(argv: Sequence[str]) -> list[Any]:
    """The flags: instances of RunArguments, InputArguments, RoundArguments and SharedArguments.

    Raises:
        UserError: a flag that is not known, not of every step, or has a value that it can not have.
    """
    groups = [RunArguments, InputArguments, RoundArguments, SharedArguments]
    others = {"--model_name_or_path": arguments.OtherFlag(str, ours=ACTOR)}
    tokens = rewritten(_joined(argv))
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
        scripts: the steps' programs, relative to the repository, by the names of `STEPS`.
        programs: the rounds' likewise, by the names of `training.pipeline.rounds.PROGRAMS`.

    Raises:
        UserError: a flag or the recipe is not usable; nothing has run then.
    """
    options, inputs, rounds, every = parse_flags(argv)
    shared = given_flags(every)
    scripts = scripts or STEPS
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") if has_accelerator() else None
    given_launcher = launcher
    launcher = with_ranks(launcher or deepspeed_launcher(), options.num_gpus, options.hostfile, visible)
    if options.hostfile and not options.plan:
        check_hosts(options.hostfile)
    if options.resume == "auto" and not options.output_dir:
        options.output_dir = str(latest_run())
    if options.resume == "auto" and not Path(options.output_dir).expanduser().is_dir():
        raise UserError(f"--resume auto: --output_dir {options.output_dir} holds no run to go on with")
    run = named_itself(Path(options.output_dir)) if options.output_dir else output_root() / "unmade"
    check_latest(run)
    manifest = manifest_of(run, options.output_dir)
    options.pipeline = options.pipeline or str(manifest.get("pipeline"))
    if options.pipeline not in PIPELINES:  # of an earlier version's run
        options.pipeline = DEFAULT_PIPELINE
    given = flags_in(argv)
    going_on.take_over(manifest, inputs, given, options.pipeline)
    shared = manifest["shared"] | shared  # a run goes on with its own data, and its own recipe
    if "step" not in given:
        passed = [NUMBERS[name] for name in going_on.left_out(manifest, options.pipeline)]
        options.step = [number for number in options.step if number not in passed]
    if rounds.rounds and options.pipeline != DEFAULT_PIPELINE:
        raise UserError(f"--rounds trains reward model and actor again: it needs --pipeline {DEFAULT_PIPELINE}")
    own = own_data(inputs, shared)
    recipe = options.recipe or manifest.get("recipe", {}).get("name", START if own else DEMO)
    planned = plan_steps(options, inputs, shared, recipe, run, scripts)  # bad flags end here, before a folder is made
    check_steps(planned, run, manifest.get("steps", {}), weights=not options.plan)
    if rounds.rounds:
        check_flags(rounds, programs or {})
        check_run(run, [step.name for step in planned])
    if not options.plan:
        chosen = options.recipe or "recipe" in manifest or own or shared.get("data_path")
        models = {ACTOR: inputs.actor_model_name_or_path, REWARD: inputs.reward_model_name_or_path}
        check_data_named(planned, run, {} if chosen else models)
    if own:
        tell_dropped(recipe)
    tell_idle(options, given, planned)
    if options.plan:
        slots = list(read_hostfile(options.hostfile).values()) if options.hostfile else [1]
        on_each = [options.num_gpus or count for count in slots]
        return show_plans(planned, ranks=sum(on_each), on_this_host=on_each[0])
    run = make_dir(run) if options.output_dir else new_run_dir(Path(recipe).stem)
    steps = plan_steps(options, inputs, shared, recipe, run, scripts)
    with locked(run, "another train.py"):
        point_latest(run)
        recipe_path, _ = read_recipe(recipe)
        manifest |= describe_environment(ROOT)
        manifest["recipe"] = {"name": recipe, **hash_inputs([recipe_path], {})}
        going_on.record(manifest, inputs, given, shared)
        manifest["pipeline"] = options.pipeline
        manifest.setdefault("started_as", []).append(["train.py", *argv])
        again = shlex.join([shown(sys.executable), shown(ROOT / "train.py"), *continued(argv, run)])
        if not options.hostfile:
            say_time(steps, options.num_gpus or 1)
        ran: list[str] = []
        for step in steps:
            if is_finished(step.directory) and not any(step.name in LATER[name] for name in ran):
                same = going_on.same_flags(manifest.get("steps", {}).get(step.name, {}), step.argv)
                changed = "" if same else f" with other flags; to repeat it, remove {shown(step.directory)}"
                print(f"{title(step.name)} is finished{changed}", flush=True)
                record_end(step, run, manifest)
                continue
            (step.directory / "summary.json").unlink(missing_ok=True)  # made from the output that has changed
            command = step.command(launcher)
            ended = run_step(step, command, run, manifest)
            ran.append(step.name)
            if ended.code:
                tell_failure(step, command, ended, run, again)
                return ended.code
        show_end(run, manifest)
        if not rounds.rounds:
            return 0
        how = ["--num_gpus", str(options.num_gpus)] if options.num_gpus else []
        how += ["--hostfile", options.hostfile] if options.hostfile else []
        one_round = functools.partial(main, launcher=given_launcher, scripts=scripts)
        return Rounds(run, rounds, launcher, one_round, how, again, programs or {}).go()


def _joined(argv: Sequence[str]) -> list[str]:
    """``--step1_args VALUE`` as one token, because a value that starts with a dash looks like a flag."""
    tokens = list(argv)
    names = [token.partition("=")[0] for token in tokens if re.match(r"--\w+_args(=|$)", token)]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{twice} is given twice: put all of its flags into one string")
    for i in range(len(tokens) - 1, 0, -1):
        if tokens[i - 1] in {f"--{name}_args" for name in (*STEPS, "generate", "judge")}:
            value = tokens.pop(i)
            tokens[i - 1 : i] = [f"{tokens[i - 1]}={value}"] if value else []
    return tokens


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
