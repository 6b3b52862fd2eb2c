"""What a table is made of: a predecessor, its programs, and what becomes of one of their commands."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from training.utils.arguments import OtherFlag
from training.utils.errors import UserError


@dataclass(frozen=True)
class Constant:
    """What a predecessor has in its code where this project has a flag.

    Attributes:
        value: theirs.
        said: where it stands there, or what it is, in a few words.
    """

    value: Any
    said: str


THEIR_DEFAULT = "their default"
DROPOUT = "dropout is off; there the model's own counts"  # of programs that have no flag for it


@dataclass
class Translation:
    """A command on its way: what was given there, and what it becomes.

    Attributes:
        flags: their program's.
        given: their flags as they were given -> values as text, none for a switch.
        defaults: our flag, with dashes -> its default here.
        ranks: the processes that it starts, 0 where that is not known here.
        values: our flag -> values as text, none for a switch.
        lines: what has changed, a line each.
        refused: what can not be had, a line each.
    """

    flags: Mapping[str, OtherFlag]
    given: Mapping[str, list[str]]
    defaults: Mapping[str, Any]
    ranks: int = 1
    values: dict[str, list[str]] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def theirs(self, name: str) -> Any:
        """The value that a flag has there: as given, else their default. A switch is True or False.

        Raises:
            UserError: it is a number that the shell is to fill in.
        """
        other = self.flags[name]
        if other.kind is bool:
            return name in self.given or bool(other.default)
        if name not in self.given:
            return other.default
        unknown = [text for text in self.given[name] if "$" in text]
        if unknown and other.kind is not str:
            raise UserError(
                f"{name} {unknown[0]}: other flags depend on it, so write its value in the variable's place"
            )
        values = [other.kind(text) for text in self.given[name]]
        return values if other.many else values[-1]

    def set(self, flag: str, value: Any, why: str) -> None:
        """Give one of our flags a value, and say why, unless it has it or was given as ours, which counts."""
        ours = {flag, f"--no-{flag[2:]}"} & self.given.keys() - self.flags.keys()
        if ours or self.values.get(flag) == as_text(value):
            return
        self.values[flag] = as_text(value)
        if value is False:
            self.leave(flag)
            self.values[f"--no-{flag[2:]}"] = []
        self.lines.append(f"{why} -> {shown(flag, value)}")

    def need(self, *names: str) -> None:
        """Refuse a command without one of these flags of theirs, unless it has ours in its place."""
        missing = [name for name in names if name not in self.given and self.flags[name].ours not in self.values]
        self.refused += [f"{name} is missing" for name in missing]

    def leave(self, flag: str, why: str = "") -> None:
        """Do without one of our flags, and say why where that is of interest."""
        self.lines = [line for line in self.lines if not line.startswith(f"{THEIR_DEFAULT} -> {flag} ")]
        if self.values.pop(flag, None) is not None and why:
            self.lines.append(f"{flag} is left out: {why}")


def as_text(value: Any) -> list[str]:
    """A value as the command line has it: numbers without rounding, a switch without any."""
    if isinstance(value, bool):
        return []
    if isinstance(value, (list, tuple)):
        return [text for one in value for text in as_text(one)]
    return [f"{value:.10g}" if isinstance(value, float) else str(value)]


def as_words(flags: Mapping[str, Sequence[str]]) -> list[str]:
    """Flags and their values as words of a command."""
    return [word for name, values in flags.items() for word in (name, *values)]


def shown(flag: str, value: Any) -> str:
    """A flag with its value as the command line has it."""
    return f"--no-{flag[2:]}" if value is False else " ".join([flag, *as_text(value)])


def settle_clipping(t: Translation, flag: str) -> None:
    """Their bound of the gradient's norm, which DeepSpeed's configuration has; 1 is its default here, too."""
    bound = t.theirs(flag)
    if bound != 1.0 and "--deepspeed_config" not in t.values:
        t.set("--deepspeed_config", json.dumps({"gradient_clipping": bound}), f"{flag} {bound:g}")


def settle_report(t: Translation, where: str, why: str) -> None:
    """Where metrics are reported; wandb, where it is not installed, is left for the user to add."""
    if where == "wandb" and not importlib.util.find_spec("wandb"):
        t.lines.append(f"{why}: wandb is not installed here; pip install wandb, then add --report_to wandb")
    else:
        t.set("--report_to", where, why)


def nothing(translation: Translation) -> None:
    """The `Program.settle` of a program whose flags do not depend on each other."""


@dataclass(frozen=True)
class Program:
    """One program of a predecessor.

    Attributes:
        title: what it does there, in words.
        paths: ends of its path, by which a command is known.
        ours: the name of the program here, see `training.migrate.translate.OURS`.
        flags: all that it takes, with their defaults.
        constants: our flag -> the value that their code has for it.
        different: what is not the same and no flag makes the same, a line each.
        settle: what depends on several flags at once.
    """

    title: str
    paths: tuple[str, ...]
    ours: str
    flags: Mapping[str, OtherFlag]
    constants: Mapping[str, Constant] = field(default_factory=dict)
    different: Sequence[str] = ()
    settle: Callable[[Translation], None] = nothing


@dataclass(frozen=True)
class Predecessor:
    """A project whose commands are translated.

    Attributes:
        name: as it calls itself.
        programs: its programs.
        marks: parts of a path that only it has, for programs that have the same name in several projects.
    """

    name: str
    programs: tuple[Program, ...]
    marks: tuple[str, ...] = ()
