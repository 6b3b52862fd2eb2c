"""Flags that the chat programs share and what they name; without heavy imports, so that mistakes answer at once."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from training.utils.arguments import AUTO, PRECISIONS, flag
from training.utils.errors import UserError
from training.utils.run.demo import EMBEDDED
from training.utils.run.folders import is_finished, latest_output, runs_newest_first, tuned_models
from training.utils.run.inputs import ADAPTER, check_flag, check_model_path, without_bitsandbytes


@dataclass
class LoadArguments:
    """Loading"""

    dtype: str = flag(
        AUTO, "precision of the weights; auto: bf16 where the hardware computes in it", choices=PRECISIONS
    )
    quantize: str = flag("none", "8 or 4 bits per weight through bitsandbytes", choices=("none", "int8", "int4"))
    chat_template: str = flag("", "a name, a Jinja file, or a conversation template in JSON (default: the saved one)")
    device_map: str = flag("", "auto spreads a model over all devices; cpu or cuda:0 name one (default: the first GPU)")


@dataclass(frozen=True)
class SamplingArguments:
    """Sampling"""

    max_new_tokens: int = flag(256, "longest answer, in tokens", minimum=1, maximum=4096)
    temperature: float = flag(0.7, "0 always takes the likeliest token", minimum=0, maximum=5)
    top_p: float = flag(0.9, "sample from the likeliest tokens that hold this share; 1 keeps all", above=0, maximum=1)
    top_k: int = flag(0, "sample from this many likeliest tokens; 0 keeps all", minimum=0, maximum=1000)
    repetition_penalty: float = flag(1.0, "above 1 makes tokens that were used less likely", above=0, maximum=5)
    seed: int = flag(1234, "the same seed and conversation give the same answer", minimum=0, maximum=2**31 - 1)


def latest_models() -> tuple[dict[str, str], str]:
    """SFT, DPO and RLHF of the newest run that has one of the latter, and its reward model ("" if it has none).

    Raises:
        UserError: no run has got that far; names the ways on.
    """
    try:
        tuned = (run for run in runs_newest_first() if tuned_models(run).keys() - {"SFT"})
        run = next(tuned, None) or latest_output("step3").parent
        models = tuned_models(run)
        sft = models.get("SFT") or latest_output("step1")
    except UserError as error:
        raise UserError(f"{error}; or name models with --path") from error
    judge = str(run / "step2") if is_finished(run / "step2") else ""
    return {name: str(path) for name, path in ({"SFT": sft} | models).items()}, judge


def named_models(values: Sequence[str], flag: str) -> dict[str, str]:
    """Name -> path, in order; whether a model is there is not looked at.

    Args:
        values: ``NAME=PATH``, ``PATH`` (called after its last folder) or the folder of a run, all of whose models are
            meant.
        flag: for messages.

    Raises:
        UserError: an empty name or path, or a name twice.
    """
    found: dict[str, str] = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not equals or "/" in name:
            name, path = Path(value).name or value, value
        if not name or not path:
            raise UserError(f"{flag} {value!r}: expected NAME=PATH")
        folder = Path(path).expanduser()
        of_run = {} if (folder / "config.json").is_file() else tuned_models(folder)
        before = f"{name}-" if value.startswith(f"{name}=") else ""
        for label, model in {f"{before}{of}": str(at) for of, at in of_run.items()}.items() or [(name, path)]:
            if label in found:
                raise UserError(f"{flag}: two models are called {label}; write NAME=PATH with different names")
            found[label] = model
    return found


def adapter_base(path: str, flag: str) -> str:
    """The base model that a folder with a LoRA adapter alone names, a folder or a hub name; empty for other paths.

    Raises:
        UserError: the adapter is damaged, or of another kind; names ``flag``.
    """
    folder = Path(path).expanduser()
    if not (folder / ADAPTER).is_file() or (folder / "config.json").is_file():
        return ""
    try:
        config = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
        base, virtual = config["base_model_name_or_path"], "num_virtual_tokens" in config
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{flag} {path}: {ADAPTER} is damaged ({type(error).__name__})") from error
    if not isinstance(base, str) or not base:
        raise UserError(f"{flag} {path}: {ADAPTER} does not name the base model")
    if virtual:
        raise UserError(f"{flag} {path}: an adapter of virtual tokens; adapters of weights are read here, such as LoRA")
    if not any(folder.glob("adapter_model.*")):
        raise UserError(f"{flag} {path}: the adapter has no weights (adapter_model.safetensors)")
    beside = (folder / base).resolve()
    return str(beside) if (beside / "config.json").is_file() else base


def check_path(path: str, flag: str) -> None:
    """Refuse what is no model: no folder, hub name, GGUF file, ``embedded`` or LoRA adapter; without torch.

    Raises:
        UserError: names ``flag``.
    """
    base = adapter_base(path, flag)
    try:
        if (base or path) != EMBEDDED:
            check_model_path(base or path, flag)
    except UserError as error:
        raise UserError(f"{flag} {path}: its base model can not be found: {error}" if base else str(error)) from error


def check_loading(load: LoadArguments) -> None:
    """Refuse a template that is not there, and bits that need a package which is not.

    Raises:
        UserError: names the flag.
    """
    check_flag("chat_template", [load.chat_template])
    if load.quantize != "none" and not importlib.util.find_spec("bitsandbytes"):
        raise UserError(without_bitsandbytes("--quantize"))
