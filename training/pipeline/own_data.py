"""A run on the user's own data takes nothing of the demo; what it would fail on later is said before it begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training.utils.arguments import flags_in
from training.utils.errors import UserError
from training.utils.model import hub
from training.utils.model.reward_stats import RewardStats
from training.utils.run.demo import is_own, named_sources, names_demo
from training.utils.run.files import read_object
from training.utils.run.folders import is_finished, title
from training.utils.run.inputs import MODELS, NO_REWARD_HEAD, check_flag, is_language_model

START = "start"  # the recipe of own data; the demo's has the name of its source
_PAIRS = (
    "preference pairs",
    "preference pairs, and none of {} rows is one (two answers that differ); give rows with columns prompt, chosen and "
    "rejected",
)
_PROMPTS = ("rows", "prompts, and none of {} rows has one; give rows with a column prompt")
_TAKEN = {"step2": _PAIRS, "dpo": _PAIRS, "step3": _PROMPTS}  # what a step takes, and what is said where there is none


def without_demo(section: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A recipe's section without what is the demo's, and the flags that are left out."""
    kept, dropped = {}, []
    for name, value in section.items():
        values = value if isinstance(value, list) else [value]
        left = [v for v in values if not (isinstance(v, str) and names_demo(v))]
        if len(left) < len(values):
            dropped.append(name)
        if left or not values:
            kept[name] = left if isinstance(value, list) else value
    return kept, dropped


def check_sources(argvs: Mapping[str, Sequence[str]]) -> None:
    """Refuse a run of which some steps have data of their own, while others would train on the demo by default.

    Raises:
        UserError: names the steps.
    """
    sources = {name: named_sources(argv) for name, argv in argvs.items()}
    own = [name for name, named in sources.items() if is_own(named)]
    quiet = [name for name, named in sources.items() if not named]
    if own and quiet:
        steps = " and ".join(map(title, quiet))
        raise UserError(
            f"{title(own[0])} has data of its own, {steps} would train on the demo: "
            f"give --data_path to train.py, for every step, or in {' and '.join(f'--{name}_args' for name in quiet)}"
        )


def check_paths(argv: Sequence[str], made: Sequence[str], *, weights: bool = True) -> None:
    """Refuse a step's arguments that name a file or folder that is not there, or a model of a hub out of reach.

    Folders that are ``made`` by earlier steps will be there by then. Models need weights, but for a plan.

    Raises:
        UserError: names the flag.
    """
    for name, values in flags_in(argv).items():
        there = [v for v in values if v and v not in made and not is_finished(Path(v))]
        check_flag(name, there, weights=weights)
        for value in there if name.endswith(MODELS) else ():
            hub.check_model(value, f"--{name}")


def check_reward_model(options: Mapping[str, Any], made: Sequence[str]) -> None:
    """Refuse a folder that step 3 is to take for a reward model, and that holds none or lacks its statistics.

    Folders that are ``made`` by earlier steps will be there by then.

    Raises:
        UserError: names the folder.
    """
    named = options["critic_model_name_or_path"]
    folder = Path(named).expanduser()
    if named in made or not (folder / "config.json").is_file():
        return
    if is_language_model(read_object(folder / "config.json").get("architectures")):
        raise UserError(f"{named}: {NO_REWARD_HEAD}")
    if options["normalize_reward"]:
        RewardStats.read(folder)


def check_rows(step: str, argv: Sequence[str]) -> None:
    """Refuse sources without rows for step 2, DPO or step 3, to train on and to judge by, but for the hub's.

    Step 1, which comes first, says so itself.

    Raises:
        UserError: names the sources, and what to do.
    """
    flags = flags_in(argv)
    for flag in ("data_path", "eval_data_path") if step in _TAKEN else ():
        paths = flags.get(flag, [])
        if not is_own(paths):
            continue
        enough = 1 if flag == "eval_data_path" or flags.get("eval_data_path") else 2
        found = _usable(step, f"--{flag}", paths, flags.get("column_map", []), enough)
        if found is None:
            continue
        prompts, count = found
        named, (rows, none) = f"--{flag} {' '.join(paths)}", _TAKEN[step]
        if prompts:
            raise UserError(
                f"{named}: {title(step)} needs {rows} of two prompts, which begin differently, one to train on and one "
                f"to judge by, and of {count} rows only one has any; give more data, or --eval_data_path"
            )
        uses = "learns from" if flag == "data_path" else "is judged by"
        raise UserError(f"{named}: {title(step)} {uses} {none.format(count)}, or train step 1 alone: --step 1")


def _usable(step: str, flag: str, paths: Sequence[str], columns: Sequence[str], enough: int) -> tuple[int, int] | None:
    """How many prompts that begin differently the rows for a step have, and the rows read; None once there are enough.

    The first row is refused where no format has its columns.
    """
    from training.utils.data.formats.columns import UnknownFormat, convert, parse_column_map
    from training.utils.data.formats.conversations import Dropped, beginning
    from training.utils.data.reading.sources import local_source
    from training.utils.data.template import RowError  # jinja2 and the formats take a moment

    column_map = parse_column_map(columns)
    prompts, count = list[object](), 0
    for path in paths:
        source = local_source(path, "prompts" if step == "step3" else "pairs", flag)
        if source is None:
            return None
        held_out = flag == "--eval_data_path" and source.has_held_out
        for row in source.rows(held_out):
            count += 1
            try:
                examples = [] if isinstance(row.values, RowError) else convert(row.values, source.name, column_map)[1]
            except UnknownFormat as error:
                if count == 1:  # most likely all rows: this says more than that there are none
                    raise UserError(f"{row.place}: {error}") from None
                continue
            except (RowError, Dropped):
                continue
            for example in examples:
                fits = example.prompt if step == "step3" else example.chosen and example.chosen != example.rejected
                if fits and beginning(example.prompt) not in prompts:
                    prompts.append(beginning(example.prompt))
            if len(prompts) >= (1 if source.has_held_out else enough):
                return None
    return len(prompts), count
