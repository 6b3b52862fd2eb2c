"""Models to talk to: folders, hub names, GGUF files and LoRA adapters, loaded one after another.

Two paths that rest on the same weights share them: an adapter and its base, two adapters of one base, or the
same folder twice. `load_chat_models` is the whole interface; the terminal chat and the page both start there.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from chat_arguments import LoadArguments, adapter_base
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from training.utils.engine import four_bit
from training.utils.engine.precision import for_device
from training.utils.engine.zero_config import DTYPES
from training.utils.errors import UserError
from training.utils.model.loading import UNREADABLE, check_weights, reason_of, remote_code, resolve_policy
from training.utils.model.tokenizer import end_ids, load_tokenizer


@dataclass
class Weights:
    """One set of weights in memory, perhaps with several adapters on it.

    Attributes:
        model: a causal language model, or PEFT's wrapper around one.
        lock: held while an adapter is chosen and the model runs, because the choice is a state of the model.
        adapters: folder of an adapter -> its name in PEFT.
        active: the adapter that is switched on; None when the base answers.
    """

    model: Any
    lock: threading.Lock = field(default_factory=threading.Lock)
    adapters: dict[str, str] = field(default_factory=dict)
    active: str | None = None

    @contextlib.contextmanager
    def use(self, adapter: str | None) -> Iterator[Any]:
        """Hold the weights with ``adapter`` switched on, or with every adapter off."""
        with self.lock, torch.inference_mode():
            if self.adapters and adapter != self.active:
                if adapter is None:
                    self.model.base_model.disable_adapter_layers()
                else:
                    self.model.base_model.enable_adapter_layers()
                    self.model.set_adapter(adapter)
                self.active = adapter
            yield self.model


@dataclass(frozen=True)
class ChatModel:
    """A name, its tokenizer, and the weights (with one adapter or none) that answer under that name.

    Attributes:
        stop_ids: the whole stop set, see `end_ids`.
        context: the longest prompt plus answer in tokens; None where the model does not say.
    """

    name: str
    path: str
    weights: Weights
    adapter: str | None
    tokenizer: PreTrainedTokenizerBase
    stop_ids: frozenset[int]
    context: int | None

    @property
    def device(self) -> torch.device:
        """Where the input ids go."""
        return self.weights.model.get_input_embeddings().weight.device


def load_chat_models(paths: dict[str, str], arguments: LoadArguments, report: Callable[[str], None]) -> list[ChatModel]:
    """Load every model, in order; every path is looked at before the first weights are read.

    Args:
        paths: name -> folder, hub name, GGUF file, ``embedded``, or a folder with a LoRA adapter.
        arguments: precision, quantisation and placement, the same for all.
        report: gets a line about the precision, then one before and one after each model.

    Raises:
        UserError: a path without a model, a corrupt adapter, an option that does not work here.
    """
    _check_options(arguments)
    if not sys.stderr.isatty():
        disable_progress_bar()
    resolved = {name: _resolve(path) for name, path in paths.items()}
    dtype, line = for_device(arguments.dtype, torch.device(_device(arguments)))
    if line:
        report(line)
    shared: dict[str, Weights] = {}
    models = []
    for number, (name, (base, adapter_dir)) in enumerate(resolved.items(), start=1):
        report(f"[{number}/{len(resolved)}] loading {name} from {paths[name]} ...")
        started = time.monotonic()
        known = base in shared
        if not known:
            shared[base] = Weights(_load_weights(base, replace(arguments, dtype=dtype)))
        adapter = _attach(shared[base], adapter_dir) if adapter_dir else None
        models.append(_chat_model(name, base, adapter_dir, shared[base], adapter, arguments.chat_template))
        size = models[-1].weights.model.get_memory_footprint() / 2**20
        with_whom = "weights shared" if known else f"{size:,.1f} MiB on {models[-1].device}"
        report(f"[{number}/{len(resolved)}] {name}: {with_whom}, {time.monotonic() - started:.1f} s")
    return models


def _check_options(arguments: LoadArguments) -> None:
    if arguments.device_map not in ("", "auto"):
        try:
            device = torch.device(arguments.device_map)
        except RuntimeError as error:
            raise UserError(f"--device_map {arguments.device_map}: use auto, cpu, or a device like cuda:0") from error
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise UserError(f"--device_map {arguments.device_map}: this machine has {torch.cuda.device_count()} GPUs")
    if arguments.quantize != "none":
        four_bit.check_installed("--quantize")


def _resolve(path: str) -> tuple[str, str | None]:
    """Path -> (folder or hub name of the weights, folder of the adapter or None)."""
    base = adapter_base(path, "--path")
    if not base:
        return resolve_policy(path, "--path"), None
    try:
        return resolve_policy(base, "--path"), str(Path(path).expanduser().resolve())
    except UserError as error:
        raise UserError(f"--path {path}: its base model can not be found: {error}") from error


def _device(arguments: LoadArguments) -> str:
    """The device of the weights; with ``--device_map auto``, of the first ones."""
    named = "" if arguments.device_map == "auto" else arguments.device_map
    return named or ("cuda:0" if torch.cuda.is_available() else "cpu")


def _load_weights(base: str, arguments: LoadArguments) -> Any:
    options: dict[str, Any] = {"dtype": DTYPES[arguments.dtype]} | remote_code()
    if arguments.quantize != "none":
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=arguments.quantize == "int8",
            load_in_4bit=arguments.quantize == "int4",
            bnb_4bit_quant_type="nf4",  # Dettmers et al. 2023, arXiv 2305.14314: beats plain int4 at its size
            bnb_4bit_compute_dtype=DTYPES[arguments.dtype],
        )
    if arguments.device_map == "auto" or arguments.quantize != "none":
        options["device_map"] = arguments.device_map or _device(arguments)
    device = _device(arguments)
    try:
        model: Any
        model, info = AutoModelForCausalLM.from_pretrained(
            base, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
        check_weights(f"--path {base}", model, info)
        return (model if "device_map" in options else model.to(device)).eval().requires_grad_(False)
    except torch.cuda.OutOfMemoryError as error:
        raise UserError(f"{base} does not fit on {device}; try --quantize int8, int4 or --device_map auto") from error
    except UNREADABLE as error:
        raise UserError(f"--path {base}: the model can not be loaded: {reason_of(error)}") from error


def _attach(weights: Weights, folder: str) -> str:
    """Put an adapter on the weights, switched off until `Weights.use`; returns its name in PEFT."""
    from peft import PeftConfig, PeftModel

    if folder in weights.adapters:
        return weights.adapters[folder]
    name = f"adapter{len(weights.adapters)}"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # an error below
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # PEFT 0.21 asks by the old name
            if not weights.adapters:
                weights.model = PeftModel(weights.model, PeftConfig.from_pretrained(folder), adapter_name=name)
            device = str(weights.model.get_input_embeddings().weight.device)
            result = weights.model.load_adapter(folder, adapter_name=name, torch_device=device)
    except UNREADABLE as error:
        raise UserError(f"--path {folder}: the adapter can not be loaded: {reason_of(error)}") from error
    if result.missing_keys:
        raise UserError(f"--path {folder}: the adapter lacks weights, {result.missing_keys[0]} among them")
    weights.model.eval().requires_grad_(False)
    weights.model.base_model.disable_adapter_layers()
    weights.adapters[folder], weights.active = name, None
    return name


def _chat_model(
    name: str, base: str, adapter_dir: str | None, weights: Weights, adapter: str | None, chat_template: str
) -> ChatModel:
    own = Path(adapter_dir) if adapter_dir else None
    has_tokenizer = own is not None and (own / "tokenizer_config.json").is_file()
    source = str(own) if has_tokenizer else base
    tokenizer = load_tokenizer(source, chat_template=chat_template, named=f"--path {source}")
    generation = weights.model.generation_config
    if own is not None and (own / "generation_config.json").is_file():
        try:
            generation = GenerationConfig.from_pretrained(str(own))
        except UNREADABLE as error:
            raise UserError(f"--path {own}: generation_config.json is damaged: {reason_of(error)}") from error
    stops = end_ids(tokenizer, generation, f"--path {own or base}")
    config = weights.model.config.get_text_config()
    rows = weights.model.get_input_embeddings().weight.shape[0]
    if max(tokenizer.get_vocab().values(), default=0) >= rows:
        raise UserError(
            f"--path {name}: the tokenizer has ids above the model's {rows} embeddings; they do not belong together"
        )
    context = getattr(config, "max_position_embeddings", None)
    return ChatModel(name, adapter_dir or base, weights, adapter, tokenizer, frozenset(stops), context)
