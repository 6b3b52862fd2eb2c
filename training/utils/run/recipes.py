"""Recipes: one YAML file with the flags of the steps as they are, in sections step1, step2, step3 and dpo."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training.utils.arguments import DEMO
from training.utils.errors import UserError
from training.utils.run.demo import EMBEDDED
from training.utils.run.folders import STEPS, repository_root, shown
from training.utils.run.inputs import names_input

# What train.py itself gives each step; a recipe may name the models that steps 1, 2 and DPO start from.
GIVEN = {
    "step1": ("output_dir", "model_name_or_path"),
    "step2": ("output_dir", "model_name_or_path"),
    "dpo": ("output_dir", "model_name_or_path"),
    "step3": ("output_dir", "actor_model_name_or_path", "critic_model_name_or_path"),
}
PLAN = "plan"  # of a step alone it would end the run there

NO_FILES = ("", DEMO, EMBEDDED, "none")  # values of such flags with a meaning of their own
MERGE = "tag:yaml.org,2002:merge"  # the key <<, which takes over another mapping's flags


def read_recipe(name: str) -> tuple[str, dict[str, dict[str, Any]]]:
    """The recipe's file and its sections, which may be absent or empty.

    Raises:
        UserError: there is no such file, or it is not made of sections of flags.
    """
    import yaml  # not there outside the environment, where --help is answered too

    bundled = {path.stem: path for path in (repository_root() / "training" / "recipes").glob("*.yaml")}
    path = bundled.get(name) or Path(name).expanduser()
    if not path.is_file():
        names = ", ".join(sorted(bundled))
        raise UserError(f"--recipe {name}: no such file, and no recipe of that name; there are: {names}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8-sig"), _loader()) or {}
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:  # ValueError: a date that is none
        raise UserError(f"--recipe {path}: not readable as YAML: {error}") from error
    except OSError as error:
        raise UserError(f"--recipe {path}: {error.strerror}") from error
    if not isinstance(content, dict):
        raise UserError(f"--recipe {path}: needs sections step1, step2, step3 or dpo")
    for section, flags in content.items():
        if section not in STEPS:
            near = difflib.get_close_matches(str(section), STEPS, n=1)
            raise UserError(
                f"--recipe {path}: unknown section {section}" + (f"; did you mean {near[0]}?" if near else "")
            )
        if not isinstance(flags, dict | None):
            raise UserError(f"--recipe {path}: section {section} holds no flags, as in: learning_rate: 1e-5")
        for flag, value in (flags or {}).items():
            reserved = GIVEN[section] if section == "step3" else GIVEN[section][:1]
            if flag in (*reserved, PLAN):
                raise UserError(f"--recipe {path}: {section} gets --{flag} from train.py")
            if isinstance(value, dict):
                raise UserError(f"--recipe {path}: {section}: {flag} can not hold a section")
    return str(path), {section: flags or {} for section, flags in content.items()}


def _loader() -> Any:
    """YAML's loader of plain values, which refuses a key that stands twice: the first value would be lost."""
    import yaml

    class Loader(yaml.SafeLoader):
        """As https://pyyaml.org/wiki/PyYAMLDocumentation has it for loaders of one's own."""

        def compose_mapping_node(self, anchor: Any) -> Any:
            """A mapping whose keys are all different, before ``<<`` brings in another one's."""
            node = super().compose_mapping_node(anchor)
            lines: dict[str, int] = {}
            for key, _ in node.value:
                line, name = key.start_mark.line + 1, str(key.value)
                if key.tag != MERGE and name in lines:
                    raise yaml.YAMLError(f"line {line}: {name} stands there again, as in line {lines[name]}")
                lines[name] = line
            return node

    return Loader


def flags_of(section: Mapping[str, Any], folders: Sequence[Path]) -> list[str]:
    """A recipe's section as command-line arguments: ``true`` is ``--name``, ``false`` ``--no-name``, null is left out.

    Args:
        folders: where a relative path may lie that is not there from the current folder.
    """
    argv: list[str] = []
    for name, value in section.items():
        if value is None or value == []:
            continue
        if isinstance(value, bool):
            argv.append(f"--{name}" if value else f"--no-{name}")
            continue
        values = [str(v) for v in (value if isinstance(value, list) else [value])]
        if names_input(name.replace("-", "_")):
            values = [located(v, folders) for v in values]
        argv += [f"--{name}={values[0]}"] if len(values) == 1 and values[0].startswith("-") else [f"--{name}", *values]
    return argv


def located(value: str, folders: Sequence[Path]) -> str:
    """A path in a recipe, perhaps with ``:name`` behind it, as seen from here; what is not here lies in the folders."""
    path, colon, suffix = value.partition(":")
    if path in NO_FILES or os.path.isabs(path) or os.path.exists(path):
        return value
    found = next((folder / path for folder in folders if os.path.exists(folder / path)), None)
    return f"{shown(found)}{colon}{suffix}" if found else value
