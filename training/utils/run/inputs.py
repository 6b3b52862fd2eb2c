"""The files and folders that flags name, looked for without torch: what is not there is said before it is imported."""

from __future__ import annotations

import dataclasses
import importlib.util
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.utils.data.template_file import read_template_file
from training.utils.errors import UserError

MODELS = ("model_name_or_path", "tokenizer_name_or_path")  # ends of the names of flags
DATA = ("data_path",)
FUNCTIONS = ("reward_function", "eval_function")
FILES = ("deepspeed_config",)
NO_BITSANDBYTES = "--base_bits 4 needs bitsandbytes: pip install -r requirements-optional.txt -c constraints.txt"


def check_inputs(groups: Sequence[Any]) -> None:
    """Refuse flags that name something on this machine that is not there; what they stand for is known by their names.

    Args:
        groups: instances of the argument groups.

    Raises:
        UserError: names the flag.
    """
    flags = {field.name: getattr(group, field.name) for group in groups for field in dataclasses.fields(group)}
    for name, value in flags.items():
        check_flag(name, value if isinstance(value, list) else [value])
    if flags.get("base_bits") and not flags.get("plan") and not importlib.util.find_spec("bitsandbytes"):
        raise UserError(NO_BITSANDBYTES)


def check_flag(name: str, values: Sequence[Any]) -> None:
    """The same for the values of one flag, ``name`` without dashes.

    Raises:
        UserError: names the flag.
    """
    for text in filter(None, values):
        if name.endswith(MODELS):
            check_model_path(text, f"--{name}")
        elif name.endswith(DATA):
            _check_data_path(text)
        elif name in FUNCTIONS:
            _check_function(text, f"--{name}")
        elif name == "chat_template":
            read_template_file(text)
        elif name in FILES and not text.lstrip().startswith("{") and not Path(text).expanduser().is_file():
            raise UserError(f"--{name} {text}: no such file")


def check_model_path(name_or_path: str, flag: str) -> None:
    """Refuse a path that holds no model; a name without a path's look may be the hub's.

    Raises:
        UserError: names the flag.
    """
    path = Path(name_or_path).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"{flag} {name_or_path}: no such file")
    elif path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{flag} {name_or_path}: the folder holds no model (no config.json)")
        if _of_another_project(path):
            raise UserError(
                f"{flag} {name_or_path}: a reward model as DeepSpeed-Chat or OpenAssistant save it; convert it once: "
                f"python -m training.migrate.reward_model --path {name_or_path} --data_path PAIRS --output_dir FOLDER"
            )
    elif name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1 or path.exists() or not name_or_path:
        raise UserError(f"{flag} {name_or_path or '(empty)'}: no such folder")


def _of_another_project(folder: Path) -> bool:
    """Whether a reward model lies there that training/migrate/reward_model.py converts; its tensors are not read."""
    if b'"gpt_neox_reward_model"' in (folder / "config.json").read_bytes():
        return True
    file = folder / "pytorch_model.bin"
    if not file.is_file():
        return False
    if not zipfile.is_zipfile(file):
        with file.open("rb") as opened:
            return b"rwtransformer." in opened.read(1 << 20)  # where older files have their names
    with zipfile.ZipFile(file) as opened:
        return any(b"rwtransformer." in opened.read(name) for name in opened.namelist() if name.endswith("data.pkl"))


def _check_data_path(text: str) -> None:
    from training.utils.data.reading.sources import local_source  # its imports take a moment

    local_source(text, "demonstrations")


def _check_function(spec: str, flag: str) -> None:
    file, colon, _ = spec.rpartition(":")
    if colon and not Path(file).expanduser().is_file():
        raise UserError(f"{flag} {spec}: no such file; write it as path/to/file.py:function")
