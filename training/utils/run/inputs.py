"""The files and folders that flags name, looked for without torch: what is not there is said before it is imported."""

from __future__ import annotations

import codecs
import dataclasses
import importlib.util
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.utils.data.template_file import read_template_file
from training.utils.errors import UserError, refusals
from training.utils.run.files import LFS, LFS_SAID, read_object
from training.utils.run.folders import installing, shown, with_python

TOKENIZER = "tokenizer_name_or_path"
MODELS = ("model_name_or_path", TOKENIZER)  # ends of the names of flags
DATA = ("data_path",)
FUNCTIONS = ("reward_function", "eval_function")
FILES = ("deepspeed_config",)
# Of a model's folder: what holds its weights, and the objects beside them that are small
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
ADAPTER = "adapter_config.json"
SMALL_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json",
               "added_tokens.json", ADAPTER)  # fmt: skip
# The others that transformers reads as text, a byte order mark included: it is part of every prompt, or no JSON
TEXT_FILES = (*SMALL_FILES, "chat_template.jinja", "chat_template.json", "tokenizer.json", "vocab.json", "vocab.txt",
              "merges.txt")  # fmt: skip
LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForMaskedLM")  # ends of their class names in a config.json
NO_REWARD_HEAD = "a language model without a reward head; step 2 trains one"
GGUF = b"GGUF"  # what such a file begins with


def check_inputs(groups: Sequence[Any]) -> None:
    """Refuse flags that name something on this machine that is not there; what they stand for is known by their names.

    Raises:
        UserError: names the flag.
    """
    flags = {field.name: getattr(group, field.name) for group in groups for field in dataclasses.fields(group)}
    for name, value in flags.items():
        check_flag(name, value if isinstance(value, list) else [value], weights=not flags.get("plan"))
    if flags.get("base_bits") and not flags.get("plan") and not importlib.util.find_spec("bitsandbytes"):
        raise UserError(without_bitsandbytes("--base_bits 4"))


def without_bitsandbytes(flag: str) -> str:
    """What to say where a flag needs the package and it is not there."""
    return f"{flag} needs bitsandbytes: {installing('bitsandbytes')}"


def check_flag(name: str, values: Sequence[Any], *, weights: bool = True) -> None:
    """The same for the values of one flag, ``name`` without dashes; a plan needs no model's ``weights``.

    Raises:
        UserError: names the flag.
    """
    for text in filter(None, values):
        with refusals(f"--{name} {text}"):
            if name.endswith(MODELS):
                check_model_path(text, f"--{name}", weights=weights and name != TOKENIZER)
            elif name.endswith(DATA):
                from training.utils.data.reading.sources import local_source  # its imports take a moment

                local_source(text, "demonstrations", f"--{name}")
            elif name in FUNCTIONS:
                check_function(text, f"--{name}")
            elif name == "chat_template":
                read_template_file(text)
            elif name in FILES and not text.lstrip().startswith("{") and not Path(text).expanduser().is_file():
                raise UserError(f"--{name} {text}: no such file")


def names_input(name: str) -> bool:
    """Whether a flag, ``name`` without dashes, names something that has to be there: what `check_flag` looks for."""
    return name.endswith((*MODELS, *DATA)) or name in (*FUNCTIONS, *FILES, "chat_template")


def check_model_path(name_or_path: str, flag: str, *, weights: bool = True) -> None:
    """Refuse a path that holds no model; a name without a path's look may be the hub's.

    Raises:
        UserError: names ``flag``.
    """
    with refusals(f"{flag} {name_or_path}"):
        _check_model_path(name_or_path, flag, weights)


def _check_model_path(name_or_path: str, flag: str, weights: bool) -> None:
    path = Path(name_or_path).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"{flag} {name_or_path}: no such file")
        with path.open("rb") as file:
            if file.read(len(GGUF)) != GGUF:
                raise UserError(f"{flag} {name_or_path}: the file is no GGUF file, or damaged")
    elif path.is_dir():
        if not (path / "config.json").is_file():
            if (path / ADAPTER).is_file():
                raise UserError(f"{flag} {name_or_path}: {_adapter_alone(path)}")
            inside = sorted(shown(found.parent) for of in ("*", "*/actor") for found in path.glob(f"{of}/config.json"))
            instead = f"; a run's or a step's has some in it: {', '.join(inside)}" if inside else ""
            raise UserError(f"{flag} {name_or_path}: the folder holds no model (no config.json){instead}")
        if _of_another_project(path):
            raise UserError(
                f"{flag} {name_or_path}: a reward model as DeepSpeed-Chat or OpenAssistant save it; convert it once: "
                + with_python("-m", "training.migrate.reward_model", "--path", name_or_path)
                + " --data_path PAIRS --output_dir FOLDER"
            )
        if pointer := next((name for name in (*TEXT_FILES, "tokenizer.model") if _begins(path / name, LFS)), None):
            raise UserError(f"{flag} {name_or_path}: {pointer} is {LFS_SAID}")
        if marked := next((path / name for name in TEXT_FILES if _begins(path / name, codecs.BOM_UTF8)), None):
            raise UserError(f"{flag} {name_or_path}: {marked.name} begins with a byte order mark, with which no "
                            "program reads it as it is meant; save it as UTF-8 without BOM")  # fmt: skip
        for name in SMALL_FILES:
            read_object(path / name)
        if weights and (missing := _missing_weights(path)):
            raise UserError(f"{flag} {name_or_path}: {missing}")
    elif name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1 or path.exists() or not name_or_path:
        raise UserError(f"{flag} {name_or_path or '(empty)'}: no such folder")


def is_language_model(architectures: object) -> bool:
    """Whether a configuration's classes say that the files hold a language model, and so no reward head."""
    return isinstance(architectures, list) and any(str(name).endswith(LANGUAGE_MODELS) for name in architectures)


def _begins(file: Path, mark: bytes) -> bool:
    """Whether a file is there and begins so: with UTF-8's byte order mark, say, which editors on Windows may write."""
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        return opened.read(len(mark)) == mark


def _missing_weights(folder: Path) -> str:
    """What a model's folder lacks of its weights, in words; empty if they are there.

    Of several forms transformers takes the first in the order of `WEIGHTS`.

    Raises:
        UserError: an index of weights is no JSON object.
        OSError: a file can not be opened.
    """
    if read_object(folder / "config.json").get("transformers_weights"):
        return ""  # under a name of their own
    found = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if found is None and (folder / ADAPTER).is_file():
        return _adapter_alone(folder)
    if found is None:
        whole = next(folder.glob("*.gguf"), None)
        return f"the folder holds no weights ({WEIGHTS[0]})" + (f"; give {shown(whole)} itself" if whole else "")
    parts = read_object(found).get("weight_map", {}) if found.suffix == ".json" else {"": found.name}
    if not isinstance(parts, dict) or not parts or not all(isinstance(name, str) for name in parts.values()):
        return f"{found.name} is damaged: it names no files of weights"
    missing = sorted({name for name in parts.values() if not (folder / name).is_file()})
    for name in sorted(set(parts.values()).difference(missing)):
        if _begins(folder / name, LFS):  # opens each: of one that is closed to this user safetensors says "not there"
            return f"{name} is {LFS_SAID}"
    return f"{len(missing)} of its files of weights are missing, {missing[0]} among them" if missing else ""


def _adapter_alone(folder: Path) -> str:
    """What to say of a folder with a LoRA adapter and no weights of a model; steps save it in the model's folder."""
    above = folder.absolute().parent
    merged = f"; {shown(above)} has it merged in" if any((above / name).is_file() for name in WEIGHTS) else ""
    return "a LoRA adapter without its base" + (merged or "; merge it into that first, see docs/lora.md")


_THEIR_BACKBONE = re.compile(rb"rwtran(?:s|rs)former\.")  # so written, and miswritten until October 2023


def _of_another_project(folder: Path) -> bool:
    """Whether a reward model lies there that training/migrate/reward_model.py converts; its tensors are not read."""
    if b'"gpt_neox_reward_model"' in (folder / "config.json").read_bytes():
        return True
    file = folder / "pytorch_model.bin"
    if not file.is_file():
        return False
    if not zipfile.is_zipfile(file):
        with file.open("rb") as opened:
            return _THEIR_BACKBONE.search(opened.read(1 << 20)) is not None  # where older files have their names
    with zipfile.ZipFile(file) as opened:
        names = (opened.read(name) for name in opened.namelist() if name.endswith("data.pkl"))
        return any(_THEIR_BACKBONE.search(found) for found in names)


def check_function(spec: str, flag: str) -> None:
    """Refuse ``FILE:NAME`` where there is no such file, or one that may not be read."""
    file, colon, _ = spec.rpartition(":")
    if colon and not (path := Path(file).expanduser()).is_file():
        raise UserError(f"{flag} {spec}: no such file; write it as path/to/file.py:function")
    if colon:
        with refusals(f"{flag} {spec}"):
            path.open("rb").close()
