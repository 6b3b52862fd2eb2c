"""What train.py is asked to do: its flags, and what a run that goes on takes over from its start."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.pipeline.own_data import START
from training.pipeline.paths import path_seen, seen
from training.pipeline.rounds import RoundArguments
from training.report.page import REPORT
from training.utils import arguments
from training.utils.arguments import DEMO, flags_in
from training.utils.errors import UserError
from training.utils.run.demo import is_own, named_sources
from training.utils.run.files import check_page, write_json
from training.utils.run.folders import (
    LATER,
    PIPELINES,
    STEPS,
    check_latest,
    latest_run,
    named_itself,
    output_root,
    repository_root,
)
from training.utils.run.manifest import MANIFEST, describe_environment, hash_inputs, read_manifest
from training.utils.run.recipes import GIVEN, PLAN, read_recipe

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


def joined(argv: Sequence[str]) -> list[str]:
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


def own_args(name: str, text: str) -> list[str]:
    """The flags in ``--stepN_args`` or ``--dpo_args``.

    Raises:
        UserError: an open quote, something before the first flag, or a flag that train.py gives itself.
    """
    try:
        tokens = shlex.split(text)
    except ValueError as error:
        raise UserError(f"--{name}_args: {error}") from error
    if tokens and not tokens[0].startswith("-"):
        raise UserError(f"--{name}_args: {tokens[0]} stands before the first flag, and belongs to none")
    for token in tokens:
        flag = token.partition("=")[0].removeprefix("--").replace("-", "_")
        if token.startswith("--") and flag in (*GIVEN[name], PLAN):
            raise UserError(
                f"--{name}_args: --{flag} is given by train.py; see its own flags for models, --output_dir and --plan"
            )
    return tokens


@dataclass
class Asked:
    """What a start of train.py is to do.

    Attributes:
        options, inputs, rounds: the flags, with what the run brings along.
        shared: flags of every step, without dashes, with their values.
        given: names of the flags of this start.
        run: the folder; one that is not there is made later.
        manifest: the run's, empty for a new one.
        recipe: its name, or a file.
        own: a step has data that are not the demo's.
    """

    options: RunArguments
    inputs: InputArguments
    rounds: RoundArguments
    shared: dict[str, Any]
    given: Collection[str]
    run: Path
    manifest: dict[str, Any]
    recipe: str
    own: bool

    @property
    def wanted(self) -> list[str]:
        """The steps to run, in their order."""
        return [name for name in PIPELINES[self.options.pipeline] if NUMBERS[name] in self.options.step]

    @property
    def models(self) -> dict[str, str]:
        """The models that flags of its own name: flag -> value, empty if it is not given."""
        return {ACTOR: self.inputs.actor_model_name_or_path, REWARD: self.inputs.reward_model_name_or_path}

    @property
    def as_bundled(self) -> bool:
        """Whether it is the demo as it stands, on one rank, of which no step has anything to refuse."""
        given = self.shared or any(vars(self.inputs).values()) or self.options.hostfile
        return self.recipe == DEMO and not given and self.options.num_gpus in (None, 1)


def taken_up(groups: Sequence[Any], argv: Sequence[str]) -> Asked:
    """The flags, with what the run that they name has been started with.

    ``groups`` are instances of RunArguments, InputArguments, RoundArguments and SharedArguments.

    Raises:
        UserError: there is no run to go on with, or a folder or a flag is not usable.
    """
    options, inputs, rounds, every = groups
    if options.resume == "auto" and not options.output_dir:
        options.output_dir = str(latest_run(MANIFEST))
    if options.resume == "auto" and not Path(options.output_dir).expanduser().is_dir():
        raise UserError(f"--resume auto: --output_dir {options.output_dir} holds no run to go on with")
    run = named_itself(Path(options.output_dir)) if options.output_dir else output_root() / "unmade"
    check_latest(run)
    manifest = _manifest_of(run, options.output_dir)
    options.pipeline = options.pipeline or str(manifest.get("pipeline"))
    if options.pipeline not in PIPELINES:  # of an earlier version's run
        options.pipeline = DEFAULT_PIPELINE
    given = flags_in(argv)
    own_rounds = [] if "step" in given or options.pipeline != DEFAULT_PIPELINE else [rounds]  # with its own steps alone
    _take_over(manifest, [inputs, *own_rounds], given, options.pipeline)
    asked_of_all = {name: value for name, value in vars(every).items() if value is not None}
    shared = manifest["shared"] | asked_of_all  # a run goes on with its own data, and its own recipe
    if "step" not in given:
        passed = [NUMBERS[name] for name in _left_out(manifest, options.pipeline)]
        options.step = [number for number in options.step if number not in passed]
    if rounds.rounds and options.pipeline != DEFAULT_PIPELINE:
        raise UserError(f"--rounds trains reward model and actor again: it needs --pipeline {DEFAULT_PIPELINE}")
    argvs = [own_args(name, getattr(inputs, f"{name}_args")) for name in STEPS]
    own = any(is_own(paths) for paths in (shared.get("data_path", []), *map(named_sources, argvs)))
    recipe = options.recipe or manifest.get("recipe", {}).get("name", START if own else DEMO)
    return Asked(options, inputs, rounds, shared, given, run, manifest, recipe, own)


def _manifest_of(run: Path, given: str) -> dict[str, Any]:
    """The manifest of a run that is there; empty for a folder that is none yet, in which a run can be made.

    One with a file that no run has made and that one would write over or add to is refused. ``given`` is as the flag
    has it.
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


def _take_over(manifest: dict[str, Any], inputs: Sequence[Any], given: Collection[str], pipeline: str) -> None:
    """Let a run go on with its own models, rounds and flags of steps, where they are not given anew, even empty ones.

    ``inputs`` are the groups of flags that take them. Relative paths in its manifest become those that the
    current folder sees; flags of steps that are not in this start's pipeline stay there alone.
    """
    folder = Path(manifest.get("folder") or Path.cwd())
    for name in ("shared", "inputs"):
        manifest[name] = {flag: seen(folder, flag, value) for flag, value in manifest.get(name, {}).items()}
    if (folder / (recipe := manifest.get("recipe", {}).get("name", ""))).is_file():
        manifest["recipe"]["name"] = path_seen(folder, recipe)
    for name, value in manifest["inputs"].items():
        step = name.removesuffix("_args")
        group = next((group for group in inputs if name in vars(group)), None)
        if group is None or name in given or (step in STEPS and step not in PIPELINES[pipeline]):
            continue
        if getattr(group, name) == getattr(type(group), name):  # else given by another name
            setattr(group, name, value)


def _left_out(manifest: Mapping[str, Any], pipeline: str) -> list[str]:
    """Steps that the run has skipped and that can not follow any more, as steps that use their output have run.

    It has skipped them because the user gave a model in their place, or for want of a reward model.
    """
    run = manifest.get("steps", {})
    return [name for name in PIPELINES[pipeline] if name not in run and any(later in run for later in LATER[name])]


def record_start(asked: Asked, argv: Sequence[str]) -> None:
    """Note in the manifest by which flags the run is made, and what one that goes on needs."""
    manifest = asked.manifest
    manifest |= describe_environment(repository_root())
    manifest["recipe"] = {"name": asked.recipe, **hash_inputs([read_recipe(asked.recipe)[0]], {})}
    kept = {name: value for name, value in manifest["inputs"].items() if name not in asked.given}
    groups = (asked.inputs, asked.rounds)
    now = {name: (value, getattr(type(group), name)) for group in groups for name, value in vars(group).items()}
    manifest["inputs"] = kept | {name: value for name, (value, default) in now.items() if value != default}
    manifest["shared"], manifest["folder"] = asked.shared, str(Path.cwd())
    manifest["pipeline"] = asked.options.pipeline
    manifest.setdefault("started_as", []).append(["train.py", *argv])
    write_json(asked.run / MANIFEST, manifest)  # rounds may follow without a step that runs
