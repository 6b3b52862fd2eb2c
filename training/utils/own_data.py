"""A run on the user's own data takes nothing of the demo; what it would fail on later is said before it begins."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training.utils.errors import UserError
from training.utils.inputs import check_flag
from training.utils.run_flags import flags_in
from training.utils.runs import is_finished, repository_root

DEMO, START = "demo", "start"  # recipes; the first is also the name of a source
MOST_ROWS = 10_000  # of a source, in which a pair is looked for


def names_demo(value: str) -> bool:
    """Whether a flag's value is the demo's data (perhaps ``:N`` rows of it), or a file of it (``:name`` a function)."""
    root, name = repository_root(), value.partition(":")[0]
    demo = root / "training" / "data" / DEMO
    path = Path(name).expanduser()
    return name == DEMO or path.absolute().is_relative_to(demo) or (root / path).is_relative_to(demo)


def is_own(paths: Sequence[str]) -> bool:
    """Whether some of the sources are not the demo's."""
    return any(not names_demo(path) for path in paths)


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

    Args:
        argvs: the arguments of each step that runs.

    Raises:
        UserError: names the steps.
    """
    flags = {name: flags_in(argv) for name, argv in argvs.items()}
    own = [name for name in flags if is_own(flags[name].get("data_path", []))]
    quiet = [name for name in flags if "data_path" not in flags[name]]
    if own and quiet:
        steps = " and ".join(f"step {name[4:]}" for name in quiet)
        raise UserError(
            f"{own[0].replace('step', 'step ')} has data of its own, {steps} would train on the demo: "
            f"give --data_path to train.py, for every step, or in {' and '.join(f'--{name}_args' for name in quiet)}"
        )


def check_paths(argv: Sequence[str], made: Sequence[str]) -> None:
    """Refuse a step's arguments that name a file or folder that is not there.

    Args:
        argv: its arguments.
        made: folders that earlier steps will have made by then.

    Raises:
        UserError: names the flag.
    """
    for name, values in flags_in(argv).items():
        check_flag(name, [v for v in values if v and v not in made and not is_finished(Path(v))])


def check_pairs(argv: Sequence[str]) -> None:
    """Refuse sources for step 2 that hold no preference pair; a hub's dataset is left to the step.

    Args:
        argv: step 2's arguments.

    Raises:
        UserError: names the sources, and what to do.
    """
    from training.utils.data.chat import RowError  # jinja2 and the formats take a moment
    from training.utils.data.columns import UnknownFormat, convert, parse_column_map
    from training.utils.data.conversations import Dropped
    from training.utils.data.sources import local_source

    flags = flags_in(argv)
    paths = flags.get("data_path", [])
    if not is_own(paths):
        return
    column_map = parse_column_map(flags.get("column_map", []))
    count = 0
    for path in paths:
        source = local_source(path, step=2)
        if source is None:
            return
        for row in itertools.islice(source.rows(), MOST_ROWS):
            count += 1
            try:
                examples = [] if isinstance(row.values, RowError) else convert(row.values, source.name, column_map)[1]
            except UnknownFormat as error:
                if count == 1:  # most likely all rows: this says more than that there are no pairs
                    raise UserError(f"{row.place}: {error}") from None
                continue
            except (RowError, Dropped):
                continue
            if any(example.chosen for example in examples):
                return
    raise UserError(
        f"--data_path {' '.join(paths)}: step 2 learns from preference pairs, and none of {count} rows is one; "
        "give rows with columns prompt, chosen and rejected, or train step 1 alone: --step 1"
    )
