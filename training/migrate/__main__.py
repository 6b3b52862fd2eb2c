"""Translate the command of a project that this one follows into the command here, line by line with what has changed.

    python -m training.migrate "deepspeed --num_gpus 1 main.py --actor_model_name_or_path A --actor_dropout 0.0 ..."
    python -m training.migrate run_1.3b.sh ./output 2      a script with its arguments
    python -m training.migrate "$(cat run_1.3b.sh)"        a script's text, which has none
    python -m training.migrate "colossalai run --nproc_per_node 4 train_ppo.py --pretrain A --plugin zero2 ..."
    python -m training.migrate --run "..."                 starts it, too

Flags of this project may be added to their command; they are taken as they are. docs/migration.md has all tables.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from training.migrate.predecessors import PREDECESSORS
from training.migrate.shell.words import left_to_the_shell, quoted
from training.migrate.translate import Translated, translate
from training.utils import arguments
from training.utils.errors import UserError, run_program
from training.utils.run.environment import check_environment
from training.utils.run.watchdog import outlive_readers


@dataclass
class MigrateArguments:
    """Translation"""

    source: str = arguments.flag(
        "", "whose command it is, where its path does not show it", choices=("", *(p.name for p in PREDECESSORS))
    )
    run: bool = arguments.flag(False, "start the command, too")


OPTIONS = ("--run", "--no-run", "--help", "-h")


def parse_flags(argv: Sequence[str]) -> tuple[list[Any], str]:
    """The flags, and the command, which is one argument or all that follow the flags; a script's file is started.

    Raises:
        UserError: there is no command.
    """
    words, own = list(argv), []
    while words and (words[0] in OPTIONS or words[0].split("=")[0] == "--source"):
        own.append(words.pop(0))
        if own[-1] == "--source" and words:
            own.append(words.pop(0))
    groups = arguments.parse([MigrateArguments], own, prog="python -m training.migrate", description=__doc__ or "")
    if not words:
        raise UserError('give the command to translate: python -m training.migrate "deepspeed main.py ..."')
    if os.path.isfile(words[0]) and (words[0].endswith(".sh") or (len(words) == 1 and not words[0].endswith(".py"))):
        words = ["bash", *words]
    return groups, words[0] if len(words) == 1 else " ".join(map(quoted, words))


def filled(word: str) -> str:
    """A word as the shell would have it: its variables and its home folder filled in.

    Raises:
        UserError: a variable that is not set.
    """
    found = os.path.expanduser(os.path.expandvars(word))
    if left := left_to_the_shell(found):
        raise UserError(f"--run: {left[0]} is not set here: export it, or write its value in its place")
    return found


def start(made: Translated) -> NoReturn:
    """Become a translated command."""
    words = [filled(word) for word in (*made.start(), *made.arguments)]
    environment = dict(filled(entry).split("=", 1) for entry in made.environment)
    os.execvpe(words[0], words, os.environ | environment)


def main(argv: Sequence[str]) -> int:
    """Translate, and run if that is asked for; returns the exit code."""
    [options], text = parse_flags(argv)
    made = translate(text, options.source)
    print(made.text(), flush=True)
    if options.run:
        start(made)
    return 0


if __name__ == "__main__":
    check_environment()
    outlive_readers()
    sys.exit(run_program(main))
