"""A command line as a shell reads it: environment, launcher, program and its arguments; nothing is run for that."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from training.migrate.shell.filling import final
from training.migrate.shell.grammar import ASSIGNMENT
from training.migrate.shell.script import BEFORE, Run, read_script
from training.migrate.shell.words import LITERAL, UNREAD, left_to_the_shell
from training.utils.errors import UserError

_ENVIRONMENTS = ("poetry", "uv", "pipenv", "pdm", "hatch")  # with "run" behind it: the environment of what follows
_OTHER_PROGRAMS = ("echo", "printf", "cat", "ls", "cp", "mv", "rm", "touch", "chmod", "grep", "sed", "tee", "cd", "pip")
_BOOTSTRAPS = ("my_deepspeed.py",)  # start deepspeed's launcher and take its flags
_OTHERS = ("torchrun", "colossalai", "accelerate")  # launchers
_MODULES = {
    **dict.fromkeys(("torch.distributed.run", "torch.distributed.launch"), "torchrun"),
    **dict.fromkeys(("accelerate.commands.launch", "accelerate.commands.accelerate_cli"), "accelerate"),
    **dict.fromkeys(("deepspeed", "deepspeed.launcher.runner"), "deepspeed"),
}
_PYTHON = re.compile(r"python[\d.]*")
# Launchers other than deepspeed: their flag -> deepspeed's; None: it has nothing to say to deepspeed
_RANKS = {
    "--nproc_per_node": "--num_gpus",
    "--num_processes": "--num_gpus",
    "--hostfile": "--hostfile",
    "--master_port": "--master_port",
    "--master_addr": "--master_addr",
    "--main_process_port": "--master_port",
    "--main_process_ip": "--master_addr",
    "--num_nodes": "--num_nodes",
    "--rdzv_backend": None,
    "--rdzv_id": None,
    "--standalone": None,
}
# Flags of accelerate's that change what its ranks compute
_COMPUTES = re.compile(r"--(mixed_precision|downcast_bf16|use_(deepspeed|fsdp|megatron_lm)|"
                       r"(deepspeed|zero|fsdp|offload|gradient|megatron_lm|fp8)_?\w*)")  # fmt: skip
_HOSTS = ("--nnodes", "--num_machines")
_NAMED_HOSTS = ("--host", "--include", "--exclude")  # colossalai's, a comma between them
_SHORT = {"-H": "--hostfile", "-i": "--include", "-e": "--exclude"}  # deepspeed's
# What counts here of accelerate's configuration, which is a file of YAML
_CONFIGURED = ("num_processes", "num_machines", "main_process_port", "main_process_ip", "mixed_precision", "gpu_ids",
               "use_cpu")  # fmt: skip
_COMPUTING = ("deepspeed_config", "fsdp_config", "megatron_lm_config", "fp8_config")


@dataclass
class Command:
    """One command that starts a program.

    Attributes:
        environment: ``NAME=value`` before it.
        launcher: flags for deepspeed's launcher.
        all_gpus: it is deepspeed's launcher without flags, which takes all GPUs.
        by_deepspeed: their launcher is deepspeed's, too.
        script: the program's path, below the folder that ``cd`` went to.
        arguments: what follows it.
        file: the script of the shell's that it stands in, a whole path.
        empty: what is empty in it, by what stands before that.
        notes: what was read over, a line each.
    """

    environment: list[str] = field(default_factory=list)
    launcher: list[str] = field(default_factory=list)
    all_gpus: bool = False
    by_deepspeed: bool = False
    script: str = ""
    arguments: list[str] = field(default_factory=list)
    file: str = ""
    empty: Mapping[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_command(text: str, known: Collection[str] = ()) -> Command:
    """The command in a text: one line, or a whole script of which one command starts a Python program.

    Variables that the text sets are filled in, and conditions on them decided; others stay for the shell.

    Args:
        text: as a shell takes it.
        known: files of programs; where one of several commands starts such a one, it is meant.

    Raises:
        UserError: there is no such command or several, or a quote is open.
    """
    runs, notes, ended = read_script(text)
    every = [(run, command) for run in runs if (command := _started(run.words)) is not None]
    started = [pair for pair in every if PurePosixPath(pair[1].script).name in known] or every
    notes += [f"{pair[1].script} is left out: it is none of their steps" for pair in every if pair not in started]
    for run, command in started:
        if run.inside.endswith("()"):
            raise UserError(f"{run.inside} is no launcher that is known here: give the command in it alone")
        if run.inside:
            raise UserError(f"{command.script} is started by a loop, {run.inside!r}: give the command in it alone, "
                            "and put what it becomes in its place")  # fmt: skip
    if len(started) > 1:
        names = ", ".join(command.script for _, command in started)
        raise UserError(f"this command starts {len(started)} programs, {names}: give one at a time")
    if not started and ended:
        raise UserError(f'this command ends at {ended!r} before it starts a Python program: give the script\'s '
                        'arguments, as in "bash FILE.sh OUTPUT 3"')  # fmt: skip
    if not started:
        raise UserError('this command starts no Python program, as in "deepspeed --num_gpus 2 main.py ..."')
    [(run, command)] = started
    finish(command, run)
    command.file, command.empty = run.file, run.empty
    command.notes += [note.replace(LITERAL, "$").replace(UNREAD, "") for note in (*run.notes, *notes)]
    return command


def finish(command: Command, run: Run) -> None:
    """Add what a script has exported, and say what stays for the shell.

    Raises:
        UserError: a form in the command is not read here.
    """
    own = {entry.partition("=")[0] for entry in command.environment}
    exported = [entry for entry in run.environment if entry.partition("=")[0] not in own]
    command.environment = [final(entry) for entry in [*exported, *command.environment]]
    command.launcher = [final(word) for word in command.launcher]
    command.arguments = [final(word) for word in command.arguments]
    command.script = str(PurePosixPath(final(run.folder)) / final(command.script))
    if run.folder:
        command.notes.append(f"cd {final(run.folder)} is left out: paths are taken from where this command is started")
    words = [*command.launcher, *command.arguments]
    unheard = [word for word in run.known.arguments or () if word.startswith("--") and word not in words]
    if unheard and not run.known.undecided:
        command.notes.append(f"{', '.join(unheard)}: the script does not hand on what it is given; write it there")
    lefts = {left for word in words for left in left_to_the_shell(word)}
    lefts |= {left for entry in command.environment for left in left_to_the_shell(entry) if left.startswith("$(")}
    for left in sorted(lefts):
        undecided = [name for name in re.findall(r"\w+", left) if name in run.known.undecided]
        why = "".join(f"; {run.known.undecided[name]} decides it" for name in undecided)
        command.notes.append(f"{left} stays as it is, for the shell to fill in{why}")


def _started(words: Sequence[str]) -> Command | None:
    """What a command starts, if it starts a Python program."""
    command, rest = Command(), list(words)
    while rest and (ASSIGNMENT.match(rest[0]) or rest[0] in BEFORE or _chooses_environment(rest)):
        if _chooses_environment(rest):
            rest = rest[2:]
        elif (word := rest.pop(0)) not in BEFORE:
            command.environment.append(word)
    if rest and rest[0] in _OTHER_PROGRAMS:
        return None
    at = next((i for i, word in enumerate(rest) if word.endswith(".py") and not word.endswith(_BOOTSTRAPS)), None)
    if at is None:
        at = next((i for i, pair in enumerate(itertools.pairwise(rest)) if _names_module(*pair)), None)
        if at is None:
            return None
        rest[at : at + 2] = [rest[at + 1].replace(".", "/") + ".py"]
    before, command.script, command.arguments = rest[:at], rest[at], rest[at + 1 :]
    name = PurePosixPath(before[0]).name if before else ""
    between = before if name.startswith("-") else before[1:]
    if name in ("bash", "sh"):
        between = before[2:]  # a wrapper that hands its arguments on
        if between and between[0].isdigit():
            command.environment.append(f"CUDA_VISIBLE_DEVICES={between.pop(0)}")
    if _PYTHON.fullmatch(name):
        name, between = _started_by_python(between)
    if name == "deepspeed":
        between = [_SHORT.get(word, word) for word in between]
    name = "accelerate" if name == "accelerate-launch" else name
    if name in _OTHERS:
        _other_launcher(command, name, between)
    elif name in ("", "deepspeed", "bash", "sh") or name.startswith("--"):
        command.launcher, command.all_gpus = between, name == "deepspeed" and not between
        command.by_deepspeed = name == "deepspeed" or bool(between)
    else:
        raise UserError(f"{name} is no launcher that is known here: give the command of a rank, as in "
                        f'"deepspeed --num_gpus 4 {command.script} ..."')  # fmt: skip
    return command


def _chooses_environment(words: Sequence[str]) -> bool:
    return words[0] in _ENVIRONMENTS and words[1:2] == ["run"]


def _names_module(flag: str, name: str) -> bool:
    """Whether a program is started by its name as a module, which stands for its file."""
    return flag in ("-m", "--module") and name not in _MODULES and bool(re.fullmatch(r"\w+(\.\w+)+", name))


def _started_by_python(words: Sequence[str]) -> tuple[str, list[str]]:
    """The launcher that Python runs, a module or a bootstrap, empty if none, and that one's flags."""
    at = next((i for i, word in enumerate(words) if word == "-m" or word.endswith(_BOOTSTRAPS)), None)
    if at is None:
        return "", []  # flags of Python's own
    if words[at] != "-m":
        return "deepspeed", list(words[at + 1 :])
    module = words[at + 1] if at + 1 < len(words) else ""
    return _MODULES.get(module, f"python -m {module}"), list(words[at + 2 :])


def _other_launcher(command: Command, launcher: str, flags: Sequence[str]) -> None:
    """The flags of torchrun, ``accelerate launch`` and ``colossalai run`` as deepspeed's.

    Refused are several hosts, a number of ranks that the command does not tell, and what belongs to the program.
    """
    words = [part for word in flags for part in (word.split("=", 1) if word.startswith("--") else [word])]
    words = words[1:] if words[:1] in (["run"], ["launch"]) else words
    said: dict[str, str] = {}
    while words:
        name = words.pop(0).replace("-", "_").replace("__", "--", 1)
        said[name] = words.pop(0) if words and not words[0].startswith("-") else ""
    if launcher == "accelerate" and "--config_file" in said:
        said = _configuration(said["--config_file"], command) | said
    computes = [name for name, value in said.items() if _COMPUTES.fullmatch(name) and value not in ("no", "none")]
    if launcher == "accelerate" and computes:
        written = ", ".join(f"{name} {said[name]}".strip() for name in computes)
        raise UserError(f"{written} of accelerate is not carried over: write what it means behind "
                        f"{command.script}, such as --dtype bf16, --zero_stage 2, --offload")  # fmt: skip
    for name, value in said.items():
        ours = _RANKS.get(name)
        if name in _HOSTS and value not in ("1", "1:1"):
            raise UserError(f"{name} {value}: on several hosts give deepspeed a hostfile: --hostfile HOSTS")
        if ours == "--num_gpus" and value in ("gpu", "auto"):
            command.all_gpus = True
        elif ours == "--num_gpus" and not (value.isdigit() or left_to_the_shell(value)):
            raise UserError(f"{name} {value}: give the number of ranks")
        elif ours:
            command.launcher += [ours, value]
            if name == "--hostfile":
                command.notes.append(f"--hostfile {value}: each line as NAME slots=N, N the ranks of that host")
        elif name in _NAMED_HOSTS and value not in ("localhost", "127.0.0.1"):
            raise UserError(f"{name} {value}: name the hosts in a file, each line as NAME slots=N: --hostfile HOSTS")
        elif name == "--gpu_ids" and value not in ("", "all"):
            command.environment.append(f"CUDA_VISIBLE_DEVICES={value}")
        elif name in ("--cpu", "--use_cpu"):
            command.environment.append("CUDA_VISIBLE_DEVICES=")
            command.launcher += [] if "--num_processes" in said else ["--num_gpus", "1"]
        elif name not in (*_RANKS, *_HOSTS, *_NAMED_HOSTS, "--gpu_ids"):
            command.notes.append(f"{name} {value}".strip() + " of the launcher is left out: deepspeed starts the ranks")
    if "--num_gpus" in command.launcher or command.all_gpus:
        return
    if launcher == "accelerate":
        if "--config_file" in said and not Path(said["--config_file"]).expanduser().is_file():
            raise UserError(f"--config_file {said['--config_file']} says how many ranks accelerate starts: give "
                            "--num_processes N beside it")  # fmt: skip
        command.all_gpus = True
        command.notes.append("without --num_processes all GPUs are taken, accelerate's saved configuration is not read")
    elif launcher == "torchrun":
        command.launcher[:0] = ["--num_gpus", "1"]  # its default; deepspeed's is all GPUs


def _configuration(path: str, command: Command) -> dict[str, str]:
    """The flags that a configuration of accelerate's stands for; none, said aloud, where it is not here."""
    file = Path(path).expanduser()
    if not file.is_file():
        command.notes.append(f"--config_file {path} is not here: what it says of precision, ZeRO and FSDP is left out")
        return {}
    import yaml  # not there outside the environment

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        found = {f"--{name}": str(content[name]) for name in _CONFIGURED if content.get(name) not in (None, False, "")}
        found |= {f"--{name}": " ".join(content[name]) for name in _COMPUTING if content.get(name)}
    except (yaml.YAMLError, ValueError, OSError, RecursionError, TypeError, AttributeError) as error:
        raise UserError(f"--config_file {path}: not a configuration of accelerate's") from error
    return {name: "no" if value == "False" else value for name, value in found.items()}
