"""A predecessor's command -> the command here, with a line for everything that has changed. Needs no torch."""

from __future__ import annotations

import argparse
import difflib
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from training.migrate.colossalchat import OF_2023, STRATEGY
from training.migrate.devices import launch_of, visible
from training.migrate.e2e import gpus_here
from training.migrate.predecessors import PREDECESSORS
from training.migrate.program import THEIR_DEFAULT, Predecessor, Program, Translation, as_text, as_words
from training.migrate.shell.command import Command, read_command
from training.migrate.shell.words import quoted
from training.step3_rlhf_finetuning import arguments as step3
from training.utils import arguments
from training.utils.arguments import OtherFlag
from training.utils.errors import UserError
from training.utils.run.folders import STEPS, deepspeed_launcher, repository_root, shown


@dataclass(frozen=True)
class Ours:
    """A program of this project.

    Attributes:
        script: its path in the repository.
        groups: its flags; none where they are not known without its imports.
        check: what they must satisfy together.
        launched: deepspeed starts it.
    """

    script: str
    groups: Sequence[type] = ()
    check: Callable[[list[Any]], Any] = list
    launched: bool = True


OURS: Mapping[str, Ours] = {
    "step1": Ours(STEPS["step1"], arguments.STEP1, arguments.check_fine_tuning),
    "step2": Ours(STEPS["step2"], arguments.STEP2, arguments.check_fine_tuning),
    "dpo": Ours(STEPS["dpo"], arguments.DPO, arguments.check_fine_tuning),
    "step3": Ours(STEPS["step3"], step3.ARGUMENTS, step3.check),
    "evaluate1": Ours("training/step1_supervised_finetuning/evaluate.py", launched=False),
    "evaluate2": Ours("training/step2_reward_model_finetuning/evaluate.py", launched=False),
    "preview": Ours("training/utils/data/preview.py", launched=False),
    "train": Ours("train.py", launched=False),
    "chat": Ours("inference/chatbot.py", launched=False),
    "page": Ours("inference/gradio_chatbot.py", launched=False),
}


@dataclass(frozen=True)
class Translated:
    """A command of this project.

    Attributes:
        predecessor, theirs: where it comes from.
        environment, starter, launcher: how it is started; the launcher's are the starter's flags.
        ours: its program.
        flags: the program's, with dashes -> values, none for a switch.
        lines: what has changed.
    """

    predecessor: Predecessor
    theirs: Program
    environment: list[str]
    starter: str
    launcher: list[str]
    ours: Ours
    flags: Mapping[str, Sequence[str]]
    lines: list[str]

    @property
    def arguments(self) -> list[str]:
        """The flags as words."""
        return as_words(self.flags)

    def start(self) -> list[str]:
        """The words before the arguments, but for the environment; programs are those beside this interpreter."""
        python, script = shown(sys.executable), shown(repository_root() / self.ours.script)
        if not self.ours.launched:
            return [python, script]
        torchrun = [python, "-m", "torch.distributed.run"]
        return [*(torchrun if self.starter == "torchrun" else deepspeed_launcher()), *self.launcher, script]

    def text(self) -> str:
        """For a terminal or a script: what has changed as comments, then the command, a flag a line."""
        rows = [self.start(), *([name, *values] for name, values in self.flags.items())]
        head = [f"# {self.predecessor.name}, {self.theirs.title}", *(f"#   {line}" for line in self.lines)]
        entries = (entry.partition("=") for entry in self.environment)
        environment = "".join(f"{name}={quoted(value) if value else ''} " for name, _, value in entries)
        return "\n".join(head) + f"\n{environment}" + " \\\n    ".join(" ".join(map(quoted, row)) for row in rows)


def translate(text: str, source: str = "") -> Translated:
    """The command here for a command of a predecessor, whose name is ``source`` where the command does not show it.

    Raises:
        UserError: no predecessor has such a program, or the command can not be had here: all reasons, in one line.
    """
    command = read_command(
        text, {PurePosixPath(path).name for p in PREDECESSORS for q in p.programs for path in q.paths}
    )
    predecessor, program, told = choose(command, source)
    ours = OURS.get(program.ours)
    if ours is None:
        raise UserError(f"{predecessor.name}, {program.title}: there is no such program here")
    given = given_flags(program.flags, ours, command)
    found = Translation(program.flags, given, defaults_of(ours), ranks_of(command))
    fill(found, program)
    if found.refused:
        raise UserError("; ".join(found.refused))
    if ours.groups:
        known = {name: values for name, values in found.values.items() if "$" not in "".join(values)}
        ours.check(arguments.parse(ours.groups, as_words(known), prog=ours.script, description=""))
    launch = launch_of(command)
    notes = [*command.notes, *(launch.notes if ours.launched else ())]
    environment = launch.environment if ours.launched else command.environment
    lines = [*told, *found.lines, *notes, *(f"not the same: {line}" for line in program.different)]
    return Translated(predecessor, program, environment, launch.starter, launch.launcher, ours, found.values, lines)


def choose(command: Command, source: str = "") -> tuple[Predecessor, Program, list[str]]:
    """Whose program a command starts: by its path, its flags, its script's folder; and a line where two may be meant.

    Raises:
        UserError: nobody has it, or it may be several steps'.
    """
    script, name = command.script.lower(), PurePosixPath(command.script).name
    pairs = [(p, program) for p in PREDECESSORS for program in p.programs if source in ("", p.name)]
    found = [(p, program) for p, program in pairs if script.endswith(program.paths)] or [
        (p, program) for p, program in pairs if name in (PurePosixPath(path).name for path in program.paths)
    ]
    given = {word.partition("=")[0] for word in command.arguments if word.startswith("--")}
    if (step := OF_2023.get(name, "")) and (STRATEGY in given or not found):
        raise UserError(f"{command.script} of ColossalAI's applications/Chat (2023) is not translated: write the "
                        f"command with the flags of {OURS[step].script}")  # fmt: skip
    if not found:
        names = ", ".join(p.name for p in PREDECESSORS)
        raise UserError(f"{command.script}: no program of {source or names} has this name")
    for place in (script, command.file.lower()):
        found = [(p, program) for p, program in found if any(mark in place for mark in p.marks)] or found
    missing = [_unknown(given, program) for _, program in found]
    found = [pair for pair, count in zip(found, missing, strict=True) if count == min(missing)]
    folders = PurePosixPath(command.file).parts
    found = [(p, program) for p, program in found if PurePosixPath(program.paths[0]).parent.name in folders] or found
    if len({program.ours for _, program in found}) > 1:
        paths = " or ".join(dict.fromkeys(program.paths[0] for _, program in found))
        raise UserError(f"{command.script} may be several steps' program: write its path, {paths}")
    predecessor, program = found[0]
    others = [p.name for p, _ in found[1:] if p is not predecessor]
    name = predecessor.name
    told = [f"taken for {name}'s, whose defaults and constants count; else give --source {others[0]}"] if others else []
    return predecessor, program, told


def ranks_of(command: Command) -> int:
    """The processes that a launcher's flags name, 1 where they name none; without any those of deepspeed here.

    0 where they are on hosts that are not known here.
    """
    if command.all_gpus:
        return len(visible(command.environment).split(",")) if visible(command.environment) else gpus_here()
    flags = [part for word in command.launcher for part in word.split("=", 1)]
    given = dict(zip(flags[:-1], flags[1:], strict=True))
    hosts = given.get("--num_nodes") or (_hosts_of(given["--hostfile"]) if "--hostfile" in given else "1")
    if given.get("--num_gpus", "").isdigit():
        return int(given["--num_gpus"]) * (int(hosts) if hosts.isdigit() else 0)
    if "--hostfile" in given:
        return 0
    host, _, devices = given.get("--include", "").partition(":")
    return len(devices.split(",")) if host == "localhost" and devices else 1


def _hosts_of(hostfile: str) -> str:
    """How many hosts a file names, empty where it is not here."""
    try:
        lines = Path(hostfile).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return ""
    return str(sum(bool(line.split("#")[0].strip()) for line in lines))


def _unknown(given: set[str], program: Program) -> tuple[int, int]:
    """How many of the given flags neither their program nor ours has, and how many theirs does not have."""
    ours = {f"--{name}" for name in arguments.fields_of(OURS[program.ours].groups)} if program.ours in OURS else set()
    here, there = (
        sum(arguments.with_underscores(name, known) not in known for name in given)
        for known in (program.flags.keys() | ours, program.flags)
    )
    return here, there


def defaults_of(ours: Ours) -> dict[str, Any]:
    """Our flag, with dashes -> its default."""
    return {f"--{name}": arguments.default_of(field) for name, (_, field) in arguments.fields_of(ours.groups).items()}


def given_flags(flags: Mapping[str, OtherFlag], ours: Ours, command: Command) -> dict[str, list[str]]:
    """The flags of a command, with dashes -> values as text; a flag of ours among theirs is taken as it is.

    Raises:
        UserError: flags that nobody knows, a value that their program would not take or that can not be had here.
    """
    parser = arguments.Parser(prog=command.script, allow_abbrev=False, add_help=False)
    hidden: dict[str, Any] = {"default": argparse.SUPPRESS}
    for name, other in flags.items():
        if not name.startswith("-"):
            parser.add_argument(name, type=partial(_checked, other), nargs="?", **hidden)
        elif other.kind is bool:
            parser.add_argument(name, dest=name, action="store_const", const=[], **hidden)
        else:
            parser.add_argument(
                name, dest=name, type=partial(_checked, other), nargs="*" if other.many else 1, **hidden
            )
    for name, (hint, _) in arguments.fields_of(ours.groups).items():
        switch: dict[str, Any] = {"action": "store_const", "const": []} if hint is bool else {"nargs": "*"}
        for written in (f"--{name}", f"--no-{name}")[: 2 if hint is bool else 1]:
            if written not in flags:
                parser.add_argument(written, dest=written, **switch, **hidden)
    known = {name: action for action in parser._actions for name in action.option_strings}
    words = [arguments.with_underscores(word, known) for word in command.arguments]
    for name, behind in itertools.pairwise([*words, "--"]):
        if name in command.empty.keys() & known and behind.startswith("--") and known[name].nargs != 0:
            raise UserError(f"{name} {command.empty[name]}: that is empty there; write its value in its place, or give "
                            'the script\'s arguments, as in "bash FILE.sh OUTPUT 3"')  # fmt: skip
    values, unknown = parser.parse_known_args(words)
    if names := list(dict.fromkeys(word.partition("=")[0] for word in unknown if word.startswith("-"))):
        near = {name: difflib.get_close_matches(name, known, n=1, cutoff=arguments.CLOSE) for name in names}
        listed = [name + (f" (did you mean {near[name][0]}?)" if near[name] else "") for name in names]
        raise UserError(f"{command.script} has no flag {', '.join(listed)}")
    if unknown:
        raise UserError(f"{command.script}: unexpected argument {unknown[0]!r}")
    order = {arguments.with_underscores(word, known).partition("=")[0]: i for i, word in enumerate(words)}
    given = {name: [value] if isinstance(value, str) else value for name, value in vars(values).items()}
    return dict(sorted(given.items(), key=lambda item: order.get(item[0], 0)))


def _checked(other: OtherFlag, text: str) -> str:
    """The text, for a type of `argparse`: it raises if it is no value of the flag."""
    if "$" not in text:  # else the shell's to say
        other.value(text)
    return text


def fill(t: Translation, program: Program) -> None:
    """What was given, then their defaults and constants where ours differ, then what several flags decide."""
    meant: dict[str, str] = {}  # our flag -> the name that it is given by
    for name, values in t.given.items():
        other = t.flags.get(name)
        ours = name if other is None else other.ours
        first = meant.setdefault(ours, name)
        if ours and t.given[first] != values:
            each = " and ".join(" ".join([one, *t.given[one]]) for one in (first, name))
            t.refused.append(f"{each} are the same flag here, with different values: give one of them")
        if other is None:
            t.values[name] = values
        elif other.ours:
            t.values[other.ours] = values
            if other.ours != name:
                said = f" ({other.said})" if other.said else ""
                t.lines.append(f"{' '.join([name, *values])} -> {' '.join([other.ours, *values])}{said}")
        elif not other.settled and name not in arguments.LAUNCHERS:
            t.lines.append(f"{' '.join([name, *values])}: nothing to do here, {other.said}")
    for name, other in t.flags.items():
        left = other.ours and name not in t.given and other.ours not in t.values and other.default is not None
        if left and not _equal(other.default, t.defaults.get(other.ours)):
            t.set(other.ours, other.default, THEIR_DEFAULT)
    for flag, constant in program.constants.items():
        if not {flag, f"--no-{flag[2:]}"} & t.values.keys() and not _equal(constant.value, t.defaults.get(flag)):
            t.set(flag, constant.value, f"their constant, {constant.said}")
    program.settle(t)


def _equal(theirs: Any, ours: Any) -> bool:
    if isinstance(theirs, bool) or isinstance(ours, bool):
        return theirs is ours
    return as_text(theirs) == as_text(ours)
