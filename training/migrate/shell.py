"""A command line as a shell reads it: environment, launcher, program and its arguments; nothing is run for that."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from training.utils.errors import UserError

_SEPARATORS = (";", "&&", "||", "|", "&")
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")
VARIABLE = re.compile(r"\$\{?(\w+)(?:\[@\])?\}?")
_ARRAY = re.compile(r"^\s*(?:declare -a )?(\w+)=\(([^()]*)\)", re.MULTILINE)  # dataset=(a b c), over several lines
_REMARK = re.compile(r"\\[ \t]+#[^\n]*$", re.MULTILINE)  # behind a line that goes on, as their pages have it
_BEFORE = ("nohup", "time", "exec", "env", "sudo", "then", "do", "else", "export")  # of a command's own words
_ENVIRONMENTS = ("poetry", "uv", "pipenv", "pdm", "hatch")  # with "run" behind it: the environment of what follows
_BOOTSTRAPS = ("my_deepspeed.py",)  # start deepspeed's launcher and take its flags
_LOOPS = ("for", "while", "until", "select")
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
    "--include": "--include",
    "--exclude": "--exclude",
    "--master_port": "--master_port",
    "--master_addr": "--master_addr",
    "--main_process_port": "--master_port",
    "--main_process_ip": "--master_addr",
    "--num_nodes": "--num_nodes",
    "--host": "--include",
    "--rdzv_backend": None,
    "--rdzv_id": None,
    "--standalone": None,
}
_HOSTS = ("--nnodes", "--num_machines")


@dataclass
class Command:
    """One command that starts a program.

    Attributes:
        environment: ``NAME=value`` before it.
        launcher: flags for deepspeed's launcher.
        all_gpus: it is deepspeed's launcher without flags, which takes all GPUs.
        script: the program's path, below the folder that ``cd`` went to.
        arguments: what follows it.
        notes: what was read over, a line each.
    """

    environment: list[str] = field(default_factory=list)
    launcher: list[str] = field(default_factory=list)
    all_gpus: bool = False
    script: str = ""
    arguments: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_command(text: str) -> Command:
    """The command in a text: one line, or a whole script of which one command starts a Python program.

    Lines may be continued by backslashes; variables that the text sets are filled in, others stay for the shell.

    Raises:
        UserError: there is no such command or several, or a quote is open.
    """
    simple, notes = _simple_commands(text, {})
    found: list[Command] = []
    folder = ""
    loops: list[str] = []
    for words in simple:
        if words[0].split("(")[0] in _LOOPS:
            loops.append(" ".join(words))
        elif words[0] == "done" and loops:
            loops.pop()
        elif words[0] == "cd" and len(words) == 2:
            folder = str(PurePosixPath(folder) / words[1])
        elif (command := _started(words)) is not None:
            if loops:
                raise UserError(f"{command.script} is started by a loop, {loops[-1]!r}: give the command in it alone, "
                                "and put what it becomes in its place")  # fmt: skip
            command.script = str(PurePosixPath(folder) / command.script)
            found.append(command)
    if len(found) != 1:
        problem = "starts no Python program" if not found else f"starts {len(found)} programs: give one at a time"
        raise UserError(f"this command {problem}" + ("" if found else ', as in "deepspeed --num_gpus 2 main.py ..."'))
    [command] = found
    left = sorted({m[0] for word in command.arguments for m in VARIABLE.finditer(word)})
    command.notes += notes + [f"{name} stays as it is, for the shell to fill in" for name in left]
    return command


def _simple_commands(text: str, known: Mapping[str, str]) -> tuple[list[list[str]], list[str]]:
    """The commands of a text as words, with the variables that it sets filled in, and what was read over."""
    arrays = {match[1]: " ".join(shlex.split(match[2], comments=True)) for match in _ARRAY.finditer(text)}
    variables, commands = {**known, **arrays}, list[list[str]]()
    notes: list[str] = []
    for line in _REMARK.sub(r"\\", _ARRAY.sub("", text)).replace("\\\n", " ").splitlines():
        for words in _split(line, notes):
            words = [part for word in words for part in _filled(word, variables)]
            while words and words[0] in _BEFORE:
                words = words[1:]
            if words and all(_ASSIGNMENT.match(word) for word in words):
                for name, _, value in (word.partition("=") for word in words):
                    if not VARIABLE.search(value):
                        variables[name] = value
            elif words:
                inside, more = _script(words, variables)
                commands += inside or [words]
                notes += more
    return commands, notes


def _split(line: str, notes: list[str]) -> list[list[str]]:
    """A line's commands as words; redirections are taken out and noted."""
    for comment in re.finditer(r"(?<!\S)#", line):
        before = line[: comment.start()]
        if before.count('"') % 2 == before.count("'") % 2 == 0:
            line = before
            break
    line = re.sub(r"(?<=\s)[012](?=>)", "", line)  # of 2>&1
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";<>|&")
    lexer.whitespace_split, lexer.commenters = True, ""
    try:
        tokens = list(lexer)
    except ValueError as error:
        raise UserError(f"{line.strip()[:60]}: {error}") from None
    commands: list[list[str]] = [[]]
    while tokens:
        token = tokens.pop(0)
        if token in _SEPARATORS:
            commands.append([])
        elif set(token) <= set("<>&|;") and set(token) & set("<>"):
            target = tokens.pop(0) if tokens else ""
            if token in (">", ">>", "&>", "&>>"):
                notes.append(f"{token} {target} is left out: send the output of this command where you want it")
        else:
            commands[-1].append(token)
    return [words for words in commands if words]


def _filled(word: str, variables: Mapping[str, str]) -> list[str]:
    """A word with the variables that are known; a list of several words where it is all of an array."""
    filled = VARIABLE.sub(lambda match: variables.get(match[1], match[0]), word)
    return filled.split() if word.endswith("[@]}") and filled != word else [filled]


def _script(words: Sequence[str], variables: Mapping[str, str]) -> tuple[list[list[str]], list[str]]:
    """The commands of ``bash FILE ARGUMENTS``; none where a word is a Python program, which a wrapper starts."""
    if words[0] not in ("bash", "sh") or len(words) < 2 or any(word.endswith(".py") for word in words):
        return [], []
    path = Path(words[1])
    if not path.is_file():
        raise UserError(f'{words[0]} {words[1]}: no such file here; give the command in it: "$(cat {words[1]})"')
    arguments = {str(n): word for n, word in enumerate(words[2:], 1)}
    return _simple_commands(path.read_text(encoding="utf-8", errors="replace"), {**variables, **arguments})


def _started(words: Sequence[str]) -> Command | None:
    """What a command starts, if it starts a Python program."""
    command, rest = Command(), list(words)
    while rest and (_ASSIGNMENT.match(rest[0]) or rest[0] in _BEFORE or _chooses_environment(rest)):
        if _chooses_environment(rest):
            rest = rest[2:]
        elif (word := rest.pop(0)) not in _BEFORE:
            command.environment.append(word)
    at = next((i for i, word in enumerate(rest) if word.endswith(".py") and not word.endswith(_BOOTSTRAPS)), None)
    if at is None:
        return None
    before, command.script, command.arguments = rest[:at], rest[at], rest[at + 1 :]
    name = PurePosixPath(before[0]).name if before else ""
    between = before if name.startswith("-") else before[1:]
    if name in ("bash", "sh"):
        between = before[2:]  # a wrapper that hands its arguments on
        if between and between[0].isdigit():
            command.environment.append(f"CUDA_VISIBLE_DEVICES={between.pop(0)}")
    if _PYTHON.fullmatch(name):
        name, between = _started_by_python(between)
    if name in _OTHERS:
        _other_launcher(command, name, between)
    elif name in ("", "deepspeed", "bash", "sh") or name.startswith("--"):
        command.launcher, command.all_gpus = between, name == "deepspeed" and not between
    else:
        raise UserError(f"{name} is no launcher that is known here: give the command of a rank, as in "
                        f'"deepspeed --num_gpus 4 {command.script} ..."')  # fmt: skip
    return command


def _chooses_environment(words: Sequence[str]) -> bool:
    return words[0] in _ENVIRONMENTS and words[1:2] == ["run"]


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

    Raises:
        UserError: several hosts, or a number of ranks that the command does not tell.
    """
    words = [part for word in flags for part in (word.split("=", 1) if word.startswith("--") else [word])]
    words = words[1:] if words[:1] in (["run"], ["launch"]) else words
    said: dict[str, str] = {}
    while words:
        name = words.pop(0).replace("-", "_").replace("__", "--", 1)
        said[name] = words.pop(0) if words and not words[0].startswith("-") else ""
    for name, value in said.items():
        ours = _RANKS.get(name)
        if name in _HOSTS and value not in ("1", "1:1"):
            raise UserError(f"{name} {value}: on several hosts give deepspeed a hostfile: --hostfile HOSTS")
        if ours == "--num_gpus" and value in ("gpu", "auto"):
            command.all_gpus = True
        elif ours == "--num_gpus" and not (value.isdigit() or VARIABLE.search(value)):
            raise UserError(f"{name} {value}: give the number of ranks")
        elif ours:
            command.launcher += [ours, value]
            if name == "--hostfile":
                command.notes.append(f"--hostfile {value}: each line as NAME slots=N, N the ranks of that host")
        elif name not in _RANKS and name not in _HOSTS:
            command.notes.append(f"{name} {value}".strip() + " of the launcher is left out: deepspeed starts the ranks")
    if "--num_gpus" in command.launcher or command.all_gpus:
        return
    if launcher == "accelerate":
        if "--config_file" in said:
            raise UserError(f"--config_file {said['--config_file']} says how many ranks accelerate starts: give "
                            "--num_processes N beside it")  # fmt: skip
        command.all_gpus = True
        command.notes.append("without --num_processes all GPUs are taken, accelerate's saved configuration is not read")
    elif launcher == "torchrun":
        command.launcher[:0] = ["--num_gpus", "1"]  # its default; deepspeed's is all GPUs


def quoted(word: str) -> str:
    """A word for the shell; its variables and its home folder stay for the shell to fill in."""
    if re.fullmatch(r"~?[\w@%+=:,./$\{\}\[\]-]+", word):
        return word
    return '"' + re.sub(r'(["\\`])', r"\\\1", word) + '"' if VARIABLE.search(word) else shlex.quote(word)
