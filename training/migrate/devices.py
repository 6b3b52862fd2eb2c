"""Which devices a command's ranks take: what ``CUDA_VISIBLE_DEVICES`` means to its launcher, and to deepspeed's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from training.migrate.shell.command import Command
from training.migrate.shell.words import left_to_the_shell
from training.utils.errors import UserError

NAME = "CUDA_VISIBLE_DEVICES"
SINGLE = ["--num_gpus", "1"]  # without flags deepspeed's launcher would take all GPUs, and python starts one process
_CHOSEN = ("--num_gpus", "--num_nodes", "--include", "--exclude")  # beside these deepspeed ignores the variable


@dataclass
class Launch:
    """How a command here is started.

    Attributes:
        environment: ``NAME=value`` before it.
        starter: the launcher.
        launcher: its flags.
        notes: what is not as it may look, a line each.
    """

    environment: list[str]
    starter: str
    launcher: list[str]
    notes: list[str] = field(default_factory=list)


def visible(environment: Sequence[str]) -> str:
    """The devices that a command's own environment names, empty if it says nothing."""
    values = [value for name, _, value in (entry.partition("=") for entry in environment) if name == NAME]
    return values[-1] if values else ""


def launch_of(command: Command) -> Launch:
    """The launcher with the devices that the command takes.

    deepspeed ignores ``CUDA_VISIBLE_DEVICES`` where ``--num_gpus`` is given; torchrun and python do not: then its
    devices are named. deepspeed reads numbers alone, so that UUIDs and MIG slices go to torchrun, and so does an empty
    value, which deepspeed's launcher takes for none.

    Raises:
        UserError: there are more ranks than devices.
    """
    flags = command.launcher if command.launcher or command.all_gpus else SINGLE
    launch = Launch(command.environment, "deepspeed", list(flags))
    value = visible(command.environment)
    hidden = not value and f"{NAME}=" in command.environment
    names = {word.partition("=")[0] for word in flags}
    beside = next((name for name in ("--hostfile", *_CHOSEN) if name in names), "")
    if hidden and "--num_gpus" in flags and not (command.by_deepspeed or beside != "--num_gpus"):
        launch.starter, launch.launcher = "torchrun", _torchruns(flags)
        launch.notes.append("torchrun starts the ranks: deepspeed's launcher would give them GPUs")
    if not value or (command.by_deepspeed and not beside):
        return launch
    if command.by_deepspeed or beside not in ("", "--num_gpus"):
        as_there = ", as there" if command.by_deepspeed else ""
        launch.notes.append(f"deepspeed ignores {NAME}={value} beside {beside}{as_there}, and takes the first devices; "
                            f"without {beside}, --include localhost:{value} takes those of this host")  # fmt: skip
        return launch
    count = flags[flags.index("--num_gpus") + 1] if "--num_gpus" in flags else ""
    return _named(launch, value, count)


def _named(launch: Launch, value: str, count: str) -> Launch:
    """The first of the devices, as many as there are ranks; all where the number is not known."""
    devices = [name.strip() for name in value.split(",") if name.strip()]
    if left_to_the_shell(value) or not count.isdigit():
        launch.notes.append(f"--include localhost:{value}: all of these devices, a rank each")
    elif int(count) > len(devices):
        raise UserError(f"{count} ranks: {NAME}={value} names {len(devices)}")
    else:
        devices = devices[: int(count)]
    rest = _without(launch.launcher, "--num_gpus")
    if left_to_the_shell(value) or all(name.isdigit() for name in devices):
        launch.environment = [entry for entry in launch.environment if entry.partition("=")[0] != NAME]
        launch.launcher = ["--include", f"localhost:{','.join(devices)}", *rest]
        return launch
    launch.starter = "torchrun"
    launch.launcher = _torchruns(["--num_gpus", str(len(devices)), *rest])
    launch.notes = ["torchrun starts the ranks: deepspeed's launcher takes numbers of devices alone"]
    return launch


def _torchruns(flags: Sequence[str]) -> list[str]:
    count = flags[flags.index("--num_gpus") + 1]
    return ["--nproc_per_node", count, *_without(_without(flags, "--num_gpus"), "--num_nodes")]


def _without(flags: Sequence[str], name: str) -> list[str]:
    at = flags.index(name) if name in flags else len(flags)
    return [*flags[:at], *flags[at + 2 :]]
