"""The steps of a run: the arguments of each, what each takes from the one before, what is refused before any starts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.pipeline.asked import ACTOR, REWARD, Asked, own_args
from training.pipeline.own_data import check_paths, check_reward_model, check_rows, check_sources, without_demo
from training.pipeline.shared_flags import flag_names, parse_step
from training.utils.arguments import flags_in
from training.utils.errors import UserError
from training.utils.run.demo import (
    EMBEDDED,
    LATEST_OF,
    MODEL,
    check_sources_named,
    is_own,
    named_sources,
    trained_on_demo,
)
from training.utils.run.folders import (
    LATER,
    PIPELINES,
    STEPS,
    is_finished,
    latest_output,
    repository_root,
    shown,
    title,
)
from training.utils.run.manifest import recorded_run
from training.utils.run.recipes import flags_of, located, read_recipe


@dataclass
class Step:
    """One step of a run, ready to start."""

    name: str  # one of STEPS
    script: str
    argv: list[str]  # what it computes; recorded, and compared when the run goes on
    directory: Path
    once: Sequence[str] = ()  # flags of this start alone


def plan_steps(asked: Asked, scripts: Mapping[str, str]) -> list[Step]:
    """The steps asked for, with what each takes from the one before it.

    Of a flag that is given more than once, ``--stepN_args`` count before ``shared``, and that before the recipe.
    ``scripts`` are the steps' programs, by the names of `STEPS`.

    Raises:
        UserError: the recipe or a flag is not usable, or the output of a step that does not run is nowhere.
    """
    options, shared = asked.options, asked.shared
    recipe_path, recipe = read_recipe(asked.recipe)
    folders = [Path(recipe_path).resolve().parent, repository_root()]
    for name in STEPS:
        if getattr(asked.inputs, f"{name}_args") and name not in PIPELINES[options.pipeline]:
            raise UserError(f"--{name}_args: there is no {title(name)} in --pipeline {options.pipeline}")
    if not asked.wanted:
        raise UserError(f"--step {' '.join(map(str, options.step))}: there is none in --pipeline {options.pipeline}")
    starts: dict[str, str] = {}  # what each of them starts from
    steps: list[Step] = []
    template: list[str] = []  # of step 1's output
    for name in asked.wanted:
        section = dict(recipe.get(name, {}))
        models = _models(asked, name, section, folders, starts)
        starts[name] = models[1]
        given = own_args(name, getattr(asked.inputs, f"{name}_args"))
        section, _ = without_demo(section) if asked.own else (section, [])
        flags = [*flags_of({k: v for k, v in section.items() if k not in shared}, folders), *flags_of(shared, ())]
        once = ("--resume", "never") if options.resume == "never" else ()
        if options.plan:  # what stands in for step 1's output has its template too
            flags = [*_unless_given(name, template, flags), *flags]
        directory = asked.run / name
        argv = [*models, "--output_dir", shown(directory), *_unless_given(name, flags, given), *given]
        if name == "step1":
            template = [f"--chat_template={value}" for value in flags_in(argv).get("chat_template", [])]
        steps.append(Step(name, shown(repository_root() / scripts[name]), argv, directory, once))
    return steps


def _models(
    asked: Asked, name: str, section: dict[str, Any], folders: Sequence[Path], starts: Mapping[str, str]
) -> list[str]:
    """The flags of the models that a step starts from; takes the recipe's out of its ``section``."""
    actor, reward = asked.inputs.actor_model_name_or_path, asked.inputs.reward_model_name_or_path
    if name == "step3":
        models = [ACTOR, _output_of(asked, "step1", actor, starts)]
        return [*models, "--critic_model_name_or_path", _output_of(asked, "step2", reward, starts)]
    named = located(str(section.pop("model_name_or_path", EMBEDDED if name == "step1" else "")), folders)
    if name == "step1":
        return ["--model_name_or_path", actor or named]
    start = (reward if name == "step2" else "") or named
    return ["--model_name_or_path", start or _output_of(asked, "step1", actor, starts)]


def _output_of(asked: Asked, step: str, given: str, starts: Mapping[str, str]) -> str:
    """What this run makes or has made; else what the flag names; else the newest run's."""
    made = asked.run / step
    if asked.options.plan and step in asked.wanted and not is_finished(made):
        return starts[step]  # not there yet, but of the same shape
    if step in asked.wanted or (not given and is_finished(made)):
        return shown(made)
    if given:
        return given
    newest = latest_output(step)
    if asked.own and trained_on_demo(newest):
        raise UserError(
            f"the newest {title(step)}, {shown(newest)}, has trained on the demo: run that step "
            f"on your own data too, or name a model: {ACTOR if step == 'step1' else REWARD}"
        )
    return shown(newest)


def made_from(step: str, run: Path) -> list[str]:
    """The steps of a run that were made from the output of one of them, directly or not.

    Those that are links to another run's are not.
    """
    made = [step]
    for name in LATER[step]:
        if (run / name).is_dir() and not (run / name).is_symlink() and _starts_from(run / name, made):
            made.append(name)
    return made[1:]


def due(steps: Sequence[Step]) -> list[Step]:
    """Those that are not finished, and those that were made from what one of these makes again."""
    todo = [step for step in steps if not is_finished(step.directory)]
    again = {step.directory.parent / name for step in todo for name in made_from(step.name, step.directory.parent)}
    return [step for step in steps if step in todo or step.directory in again]


def _starts_from(folder: Path, steps: Sequence[str]) -> bool:
    """Whether a step began with a model of one of these steps of its run, wherever that lay; so if it is not known."""
    found = recorded_run(folder)
    flags, started = flags_in(found.get("arguments", [])), Path(found.get("folder", ""))
    models = [os.path.abspath(started / path) for name in LATEST_OF for path in flags.get(name, [])]
    if not models or not flags.get("output_dir"):
        return True
    run = os.path.dirname(os.path.abspath(started / flags["output_dir"][0]))
    return any(os.path.join(run, step) in models for step in steps)


def _unless_given(step: str, flags: Sequence[str], given: Sequence[str]) -> list[str]:
    """``flags`` of a step without those that ``given`` has, under whatever name, which count."""
    kept, mine, names = [], True, flag_names(step, given)
    for token in flags:
        if token.startswith("--"):
            mine = not flag_names(step, [token]) & names
        kept += [token] if mine else []
    return kept


def check_steps(asked: Asked, steps: Sequence[Step]) -> None:
    """Refuse, before anything is made, what steps would end with.

    Raises:
        UserError: a path is not there, a step would train on the demo unasked, or a later step would find no rows.
    """
    run, recorded = asked.run, asked.manifest.get("steps", {})
    done = {name: entry["arguments"] for name, entry in recorded.items() if is_finished(run / name)}
    with_own = {name: argv for name, argv in done.items() if is_own(named_sources(argv))}
    check_sources({step.name: step.argv for step in steps} | with_own)
    made = [shown(run / name) for name in STEPS]
    for step in due(steps):
        groups = parse_step(step.name, step.argv)
        check_paths(step.argv, made, weights=not asked.options.plan)
        if step.name == "step3" and not asked.options.plan:
            check_reward_model({name: value for group in groups for name, value in vars(group).items()}, made)
        check_rows(step.name, step.argv)


def check_data_named(asked: Asked, steps: Sequence[Step]) -> None:
    """Refuse to train models of the user's on the demo unasked.

    Raises:
        UserError: names the flag.
    """
    chosen = asked.options.recipe or "recipe" in asked.manifest or asked.own or asked.shared.get("data_path")
    check_sources_named([], {} if chosen else asked.models)  # the recipe is the demo's, and nobody has chosen it
    made = [shown(asked.run / name) for name in STEPS]
    for step in due(steps):
        named = {f"--{name}": value[0] for name, value in flags_in(step.argv).items() if name.endswith(MODEL)}
        check_sources_named(named_sources(step.argv), {f: model for f, model in named.items() if model not in made})


def tell_ignored(asked: Asked, planned: Sequence[Step]) -> None:
    """Say which flags of a recipe are the demo's and left out, and which are given to no step that runs."""
    _, recipe = read_recipe(asked.recipe) if asked.own else ("", {})
    dropped = [f"{flag} of {title(name)}" for name, section in recipe.items() for flag in without_demo(section)[1]]
    if dropped:
        print(f"recipe {asked.recipe}: the demo's {', '.join(dropped)} left out, the data are your own", flush=True)
    taken = [token for step in planned for token in step.argv]
    for flag, model in asked.models.items():
        if flag.removeprefix("--") in asked.given and model not in taken:
            print(f"note: {flag} has no effect: no step that runs takes it", flush=True)
    for name in STEPS:
        if f"{name}_args" in asked.given and name not in [step.name for step in planned]:
            left = f"--step {' '.join(map(str, asked.options.step))} leaves it out"
            print(f"note: --{name}_args has no effect: {left}", flush=True)
