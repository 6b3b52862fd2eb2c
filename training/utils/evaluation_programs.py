"""What the steps' evaluate.py programs share: which model and rows, tables, evaluation.json."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from training.utils import arguments
from training.utils.errors import UserError
from training.utils.run.demo import recorded_argv
from training.utils.run.distributed import say
from training.utils.run.files import set_aside, write_json
from training.utils.run.folders import EVALUATION, repository_root, shown
from training.utils.run.inputs import names_input
from training.utils.run.manifest import recorded_run
from training.utils.run.recipes import NO_FILES


def recorded_arguments(
    folder: Path, groups: Sequence[type], others: Mapping[str, arguments.OtherFlag] | None = None
) -> dict[type, Any]:
    """The flags that a step was run with, from its summary or train.py's manifest; defaults where neither has them.

    A relative path among them is made absolute if it is found: in the folder that the step was started in, the
    repository, the folders around the run, or here.

    Returns:
        Group -> its flags.
    """
    found = recorded_run(folder)
    started = [Path(found["folder"])] if "folder" in found else []
    folders = [*started, repository_root(), folder.parent, *folder.parent.parents, Path.cwd()]
    argv, flag = list[str](), ""
    for token in found.get("arguments", []):
        flag = token[2:].partition("=")[0] if token.startswith("--") else flag
        argv.append(_located(token, folders, started if names_input(flag) else []))
    argv += ["--report_to", "none"]  # an evaluation reports to nobody, and what the run has reported to may not be here
    parsed = arguments.parse(groups, argv, prog=folder.name, description="", others=others, recorded=True)
    return dict(zip(groups, parsed, strict=True))


def _located(token: str, folders: Sequence[Path], named_bare: Sequence[Path]) -> str:
    """A recorded flag or value with its relative path, perhaps with ``:N`` or ``:name`` behind it, made absolute.

    A name alone is looked for in ``named_bare``: elsewhere a run, or anything, may be called so.
    """
    flag, equals, value = token.partition("=") if token.startswith("--") else ("", "", token)
    path, colon, suffix = value.partition(":")
    if not ("/" in path or "." in path):
        folders = named_bare if path not in NO_FILES else []
    found = next((folder / path for folder in folders if os.path.exists(folder / path)), None)
    return token if found is None else f"{flag}{equals}{found}{colon}{suffix}"


def data_arguments(
    given: arguments.DataArguments, recorded: arguments.DataArguments, folder: Path, more: Sequence[str] = ()
) -> arguments.DataArguments:
    """The data flags given to the evaluation; without any, those that the step was run with.

    The latter without what the saved tokenizer has (template, system message, stop ids): the files may be gone.

    Args:
        more: sources that the step has read beside those of ``--data_path``, to be printed with them.

    Raises:
        UserError: no data are given, and ``folder``, the step's output, does not say what it was run with.
    """
    own = replace(recorded, chat_template="", system_message="", stop_ids=[])
    chosen = own if given == arguments.DataArguments() else given
    if chosen is own and recorded_argv(folder) is None:
        raise UserError(f"{shown(folder)} does not record its data: give --eval_data_path, or --data_path")
    sources = chosen.eval_data_path or [*chosen.sources(more), *more]
    say(f"held-out rows of: {' '.join(sources)}")
    return chosen


def write_evaluation(folder: Path, content: Mapping[str, Any]) -> Path:
    """Write ``evaluation.json`` whole or not at all; one that is there is kept under the next free number."""
    path = folder / EVALUATION
    if earlier := set_aside(path):
        say(f"the earlier {EVALUATION} is kept as {shown(earlier)}")
    write_json(path, content)
    say(f"written to {shown(path)}")
    return path


def table(rows: Sequence[Sequence[Any]]) -> str:
    """Rows of cells in columns, the first left-aligned; floats with three decimals, pairs of them as intervals."""
    texts = [[cell_text(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in texts) for i in range(len(texts[0]))]
    return "\n".join(
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in texts
    )


def cell_text(cell: Any) -> str:
    """A cell of `table`."""
    if isinstance(cell, float):
        return f"{cell:.3f}"
    if isinstance(cell, list):
        return f"[{', '.join(cell_text(part) for part in cell)}]"
    return "" if cell is None else str(cell)
