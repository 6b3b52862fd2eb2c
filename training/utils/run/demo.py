"""The bundled demo rows stand in where they are meant: for the bundled model, and for what has learned from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training.utils.arguments import DEMO, flags_in
from training.utils.errors import UserError
from training.utils.run.folders import is_finished, repository_root, runs_newest_first, shown, title
from training.utils.run.manifest import recorded_run

EMBEDDED = "embedded"  # the bundled model
LATEST_OF = {  # flag of a model -> the step whose latest output it stands for where it is not given, after step 1
    "model_name_or_path": "step1",
    "actor_model_name_or_path": "step1",
    "critic_model_name_or_path": "step2",
}
MODEL = "model_name_or_path"  # ends of the names of flags
SOURCES = ("data_path", "sft_only_data_path")  # flags that name rows to train on


def names_demo(value: str) -> bool:
    """Whether a flag's value is the demo's data (perhaps ``:N`` rows of it), or a file of it (``:name`` a function)."""
    root, name = repository_root(), value.partition(":")[0]
    demo = root / "training" / "data" / DEMO
    path = Path(name).expanduser()
    return name == DEMO or path.absolute().is_relative_to(demo) or (root / path).is_relative_to(demo)


def is_own(paths: Sequence[str]) -> bool:
    """Whether some of the sources are not the demo's."""
    return any(not names_demo(path) for path in paths)


def named_sources(argv: Sequence[str]) -> list[str]:
    """The sources that a step's arguments name to train on."""
    flags = flags_in(argv)
    return [path for name in SOURCES for path in flags.get(name, [])]


def recorded_argv(step_dir: Path) -> list[str] | None:
    """The arguments of the run whose output a folder is; None where they are not recorded."""
    return recorded_run(step_dir).get("arguments")


def trained_on_own(step_dir: Path) -> bool:
    """Whether a step is known to have trained on other rows than the demo's."""
    argv = recorded_argv(step_dir)
    return argv is not None and is_own(named_sources(argv))


def trained_on_demo(model: Path | str) -> bool:
    """Whether a model is a step's output, or in it, and that step is known to have trained on the demo alone."""
    path = Path(model).expanduser().absolute()
    for folder in (path, path.parent):
        argv = recorded_argv(folder)
        if argv is not None:
            return not is_own(named_sources(argv))
    return False  # not known


def check_training_data(groups: Sequence[Any]) -> None:
    """Refuse flags of a training step that name a model and no data; see `check_sources_named`.

    Args:
        groups: instances of its argument groups. With ``--plan`` nothing is trained.

    Raises:
        UserError: as `check_sources_named`.
    """
    flags = {name: value for group in groups for name, value in vars(group).items()}
    sources = [path for name in SOURCES for path in flags.get(name, [])]
    if flags["plan"] or sources:
        return
    models = {f"--{name}": flags[name] for name in flags if name.endswith(MODEL) and flags[name]}
    check_sources_named(sources, models)
    if "sft_only_data_path" in flags:  # step 1 starts from the bundled one
        return
    for name, step in LATEST_OF.items():
        newest = next((run / step for run in runs_newest_first() if is_finished(run / step)), None)
        if flags.get(name) == "" and newest is not None and trained_on_own(newest):
            check_sources_named(sources, {f"--{name}, the latest {title(step)},": str(newest)})


def check_sources_named(sources: Sequence[str], models: Mapping[str, str]) -> None:
    """Refuse to train a model on the demo, or to judge it by the demo, unasked.

    Args:
        models: flag -> the model that training starts from; empty or ``none`` is none.

    Raises:
        UserError: no source is named, and a model is neither the bundled one nor trained on the demo.
    """
    if sources:
        return
    for flag, model in models.items():
        if model not in ("", "none", EMBEDDED) and not trained_on_demo(model):
            raise UserError(
                f"{flag} {shown(model) if Path(model).exists() else model}: name the data too, --data_path FILE; "
                f"--data_path {DEMO} takes the bundled rows, which stand in for the embedded model alone"
            )
