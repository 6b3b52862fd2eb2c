"""Export to Hugging Face folders: whole or not at all, and verified by loading them again."""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

from training.utils.engine import four_bit
from training.utils.engine.engine import gathered
from training.utils.engine.tensor_parallel import whole
from training.utils.model.forward import TokenScorer, module_of
from training.utils.model.loading import remote_code, write_model
from training.utils.model.lora import (
    adapted_parameter,
    adapter_parameters,
    is_adapter,
    is_classifier,
    is_lora,
    lora_layers,
    merged_weight,
    only_adapters_train,
    plain_name,
)
from training.utils.run.distributed import is_main, long_work, say
from training.utils.run.phases import beat
from training.utils.run.runtime import give_back_freed_memory


def unwrap(engine: Any) -> Any:
    """The transformers (or PEFT) model inside an engine and a `TokenScorer`."""
    module = module_of(engine)
    return module.classifier if isinstance(module, TokenScorer) else module


def plain_weights(engine: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """A role's weights under plain transformers names, one tensor after the other, adapters merged in.

    A collective at ZeRO-3 and with tensor parallelism: each parameter is gathered (with the adapters of its layer) when
    its turn comes and freed before the next, so no rank ever holds more than one whole layer. A tensor is on the
    engine's device, and whole only until the next one is asked for. A tied parameter comes once, under its first name.
    """
    model = unwrap(engine)
    base, adapter = (model.get_base_model(), model.active_adapter) if is_lora(model) else (model, "")
    layers = {id(adapted_parameter(layer)): layer for layer in lora_layers(model).values()} if adapter else {}
    for name, parameter in base.named_parameters():
        if is_adapter(name) or ".original_module." in name:
            continue
        layer = layers.get(id(parameter))
        with gathered([parameter] if layer is None else [parameter, *adapter_parameters(layer)]):
            if layer is not None:
                tensor = merged_weight(layer, adapter)
            elif four_bit.is_packed(parameter):
                tensor = four_bit.as_in_files(parameter, four_bit.unpacked(parameter))
            else:
                tensor = whole(parameter)
            yield plain_name(name, adapter), tensor
    saved = base.state_dict().keys()  # others are computed anew by every model
    yield from ((plain_name(name, adapter), buffer) for name, buffer in base.named_buffers() if name in saved)


def tied_names(engine: Any) -> dict[str, list[str]]:
    """The name under which `plain_weights` gives a tied parameter -> its other ones."""
    model = unwrap(engine)
    base, adapter = (model.get_base_model(), model.active_adapter) if is_lora(model) else (model, "")
    names: dict[int, list[str]] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(plain_name(name, adapter))
    return {first: others for first, *others in names.values() if others}


def full_state_dict(engine: Any) -> dict[str, torch.Tensor]:
    """All of `plain_weights` in the host's memory of rank 0; the others get an empty dictionary; a collective."""
    weights = ((name, tensor.cpu().clone() if is_main() else tensor) for name, tensor in plain_weights(engine))
    return {name: tensor for name, tensor in weights if is_main()}


def save_model(
    engine: Any,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    *,
    stop_ids: Sequence[int],
    config_updates: dict[str, Any] | None = None,
    max_shard_size: str = "5GB",
) -> None:
    """Write a role as a folder that plain transformers loads, then load it and compare every tensor.

    Files are written into a folder of ``directory`` and moved up when all are there; a collective. With LoRA the folder
    ``adapter`` in it holds the adapter alone with the tokenizer, if that and the base model are the whole model.

    Args:
        engine: the role's engine (or bare model).
        tokenizer: saved with its chat template.
        directory: where the model goes; other files in it are left alone.
        stop_ids: EOS and the template's turn end; saved in ``generation_config.json``.
        max_shard_size: weights beyond it go into several files and an index.

    Raises:
        RuntimeError: the saved model differs from the engine's.
    """
    say(f"saving {directory.name}, and comparing it with the engine ...")
    give_back_freed_memory()  # else activations' and gradients' stays taken beside the files that are read back
    model = unwrap(engine)
    beat(f"saving {directory.name}")
    weights = full_state_dict(engine)
    with _scratch(directory) as scratch:
        if is_lora(model) and only_adapters_train(model):
            adapters = [p for name, p in model.named_parameters() if is_adapter(name) or ".modules_to_save." in name]
            if any(map(four_bit.is_packed, model.parameters())):
                say("the folder adapter belongs on the base in 4 bits that it has learned on: nf4, double quantisation")
            with gathered(adapters):
                if is_main():
                    write_model(model, scratch / "adapter")
                    _verify_adapter(scratch / "adapter", model)
        elif is_lora(model):
            say("no adapter folder: not only the adapters train, so an adapter alone would be another model")
        with long_work():
            if is_main():
                _write(model, weights, tokenizer, scratch, stop_ids, config_updates or {}, max_shard_size)
                beat(f"reading {directory.name} back")
                _verify(scratch, weights)
                move_into(scratch, directory)


@contextlib.contextmanager
def _scratch(directory: Path) -> Iterator[Path]:
    """A folder in ``directory``, as beside it may be another file system; what a killed run has left there goes."""
    scratch = directory / ".saving"
    if is_main():
        shutil.rmtree(scratch, ignore_errors=True)
    try:
        yield scratch
    finally:
        if is_main():
            shutil.rmtree(scratch, ignore_errors=True)


def _write(
    model: Any,
    weights: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    scratch: Path,
    stop_ids: Sequence[int],
    config_updates: dict[str, Any],
    max_shard_size: str,
) -> None:
    base = model.get_base_model() if is_lora(model) else model
    config = copy.deepcopy(base.config)
    for name in ("quantization_config", "_is_quantized"):  # the weights that are written are whole
        vars(config).pop(name, None)
    config.use_cache = True
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    if is_classifier(base) and tokenizer.pad_token_id in stop_ids:
        # plain transformers takes the last token that is not pad for a row's end, so without one: of single rows it
        # takes the last token, and batches it refuses
        config.pad_token_id = None
    config.dtype = next(iter(weights.values())).dtype
    for key, value in config_updates.items():
        setattr(config, key, value)
    with torch.device("meta"):  # the names of a plain model, whatever PEFT or ZeRO did to this one
        plain = type(base)(config).to(config.dtype)  # save_pretrained writes the model's dtype into the config
    if getattr(plain, "generation_config", None) is not None:
        plain.generation_config = _generation_config(base.generation_config, stop_ids, tokenizer.pad_token_id)
    # it empties the dictionary it is given
    write_model(plain, scratch, state_dict=dict(weights), max_shard_size=max_shard_size)
    tokenizer.save_pretrained(scratch)
    if (adapter := scratch / "adapter").is_dir():  # on its base it is asked in the template that it has learned
        tokenizer.save_pretrained(adapter)
        if getattr(plain, "generation_config", None) is not None:
            plain.generation_config.save_pretrained(adapter)


def _generation_config(original: GenerationConfig, stop_ids: Sequence[int], pad_id: int) -> GenerationConfig:
    """How the saved model decodes by default: as the base model, but for its end and pad tokens.

    Some models on the hub come with settings that transformers reads and refuses to write, such as a temperature
    without sampling: what has no effect is left out.
    """
    config = copy.deepcopy(original)
    config.eos_token_id, config.pad_token_id = list(stop_ids), pad_id
    if not config.do_sample:
        plain = GenerationConfig()
        for name in ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"):
            setattr(config, name, getattr(plain, name, None))
    try:
        config.validate(strict=True)
    except ValueError:
        config = GenerationConfig(eos_token_id=list(stop_ids), pad_token_id=pad_id)
        say("the base model's generation_config.json is not valid, the saved model gets a plain one")
    return config


def _verify(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Load the folder with plain transformers and compare it with what was to be saved, bit for bit."""
    dtype = next(iter(weights.values())).dtype
    classifier = "score.weight" in weights
    factory = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    loaded = factory.from_pretrained(folder, dtype=dtype, **remote_code()).state_dict()
    wrong = [name for name, tensor in weights.items() if name not in loaded or not torch.equal(loaded[name], tensor)]
    if wrong:
        raise RuntimeError(
            f"{folder}: the saved model differs from the trained one in {len(wrong)} tensors: {wrong[:3]}"
        )


def _verify_adapter(folder: Path, model: Any) -> None:
    """Read the adapter and compare it with the trained one, bit for bit."""
    from peft import get_peft_model_state_dict

    saved = load_file(folder / "adapter_model.safetensors")
    trained = get_peft_model_state_dict(model)
    wrong = [name for name, value in trained.items() if name not in saved or not torch.equal(saved[name], value.cpu())]
    if wrong or len(saved) != len(trained):
        raise RuntimeError(
            f"{folder}: the saved adapter differs from the trained one: {wrong[:3] or sorted(saved)[:3]}"
        )


def move_into(scratch: Path, directory: Path) -> None:
    """Move a finished folder's files; config.json goes last, as its presence says that a model is there.

    A run that is killed meanwhile and resumed puts the whole folder back, and moves it again.

    Weights of an earlier model that was saved in other files go, else they would be loaded instead; its adapter too.
    """
    directory.mkdir(parents=True, exist_ok=True)
    entries = sorted(scratch.iterdir(), key=lambda p: p.name == "config.json")
    if not (scratch / "adapter").exists():
        shutil.rmtree(directory / "adapter", ignore_errors=True)
    for file in directory.glob("model*.safetensors*"):
        if not (scratch / file.name).exists():
            file.unlink()
    for entry in entries:
        target = directory / entry.name
        if target.is_dir():
            shutil.rmtree(target)
        if target.exists() and os.path.samefile(entry, target):
            entry.unlink()  # both are links to a checkpoint's file, and renaming one onto the other does nothing
        else:
            os.replace(entry, target)
    scratch.rmdir()
