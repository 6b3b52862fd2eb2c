"""LoRA through PEFT: injection, what trains, and merged weights for export (Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D
from transformers.utils import find_adapter_config_file

from training.utils.arguments import LoraArguments
from training.utils.engine import four_bit
from training.utils.errors import UserError
from training.utils.model.loading import load_config, remote_code

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

LORA_ALPHA_OVER_RANK = 2  # the usual choice in PEFT's examples
NAMES_FLAG = "--lora_module_name"
MADE_WHOLE = ("mxfp4", "fp8")  # files so quantised transformers makes whole, where it has no kernels for them


def target_modules(model: nn.Module, names: str, flag: str = NAMES_FLAG) -> list[str] | str:
    """Resolve names of layers to the linear layers they mean.

    Args:
        names: ``all-linear``, or comma-separated parts of module names.

    Raises:
        UserError: a name that matches no linear layer; the model's own names are listed.
    """
    if names == "all-linear":
        return names
    linear = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    backbone = [name for name in linear if name.split(".")[-1] not in ("lm_head", "score", "embed_out")]
    matched: set[str] = set()
    for part in (p.strip() for p in names.split(",") if p.strip()):
        hits = [name for name in backbone if part in name]
        if not hits:
            leaves = sorted({name.split(".")[-1] for name in backbone})
            raise UserError(f"{flag} {part} matches no linear layer; this model has {', '.join(leaves)}")
        matched.update(hits)
    return sorted(matched)


def _routers(model: nn.Module) -> list[str]:
    """Routers that are linear layers and give more than a product, such as PhiMoE's: an adapter can not add to that."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "router" in type(module).__name__.lower()
    ]


def check_lora(model_path: str, lora: LoraArguments, flag: str = NAMES_FLAG) -> None:
    """Check a model that is to train, and the names of layers on one without weights, before the real one is loaded.

    Raises:
        UserError: as `with_adapters`, or nothing of the model can be kept in 4 bits, or it brings an adapter.
    """
    config = load_config(model_path)
    quantised = getattr(config, "quantization_config", None)
    if quantised and dict(quantised).get("quant_method") not in MADE_WHOLE:
        raise _quantised(model_path)
    if find_adapter_config_file(model_path):  # all would be frozen, or the adapter replaced
        raise UserError(
            f"{model_path}: brings an adapter (adapter_config.json) beside the model: merge it into the model first "
            "(PEFT's merge_and_unload), or leave it out"
        )
    if not lora.lora_dim:
        return
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, **remote_code())
        if lora.base_bits and not four_bit.packable(model):
            raise UserError(f"{model_path}: no linear layer that --base_bits {lora.base_bits} could round")
        with_adapters(model, lora, flag)


def _quantised(named: str) -> UserError:
    advice = "give the model in 16 or 32 bits, which --base_bits 4 rounds while it loads"
    return UserError(f"{named}: quantised weights do not train: {advice}")


def with_adapters(model: PreTrainedModel, lora: LoraArguments, flag: str = NAMES_FLAG) -> Any:
    """Add adapters to a causal LM or a sequence-classification model, in place, and freeze what they stand for.

    The adapted layers' own weights are frozen, their biases and everything else (embeddings, norms, the layers without
    an adapter) train, as in DeepSpeed-Chat; with ``only_optimize_lora`` nothing trains but the adapters and the reward
    head of a sequence classifier.

    Returns:
        A `PeftModel`; the model itself if ``lora_dim`` is 0.

    Raises:
        UserError: ``lora_module_name`` matches nothing, or what can have no adapter; or the model is quantised, but not
            by ``base_bits``.
    """
    if getattr(model, "is_quantized", False) and not lora.base_bits:
        raise _quantised(model.name_or_path)
    if not lora.lora_dim:
        return model
    from peft import LoraConfig, TaskType, get_peft_model

    scores = is_classifier(model)
    config = LoraConfig(
        r=lora.lora_dim,
        lora_alpha=lora.lora_alpha or LORA_ALPHA_OVER_RANK * lora.lora_dim,
        lora_dropout=lora.lora_dropout,
        target_modules=target_modules(model, lora.lora_module_name, flag),
        exclude_modules=_routers(model),
        task_type=TaskType.SEQ_CLS if scores else TaskType.CAUSAL_LM,
        modules_to_save=["score"] if scores else None,
    )
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    try:
        peft_model = get_peft_model(model, config, autocast_adapter_dtype=False)
    except ValueError as error:  # such as Mamba's projections, which its kernels read without the adapter
        raise UserError(f"{flag} {lora.lora_module_name}: {str(error).splitlines()[0]}") from error
    if not lora.only_optimize_lora:
        adapted = {id(adapted_parameter(layer)) for layer in lora_layers(peft_model).values()}
        for name, parameter in trained:  # of the reward head a copy trains
            head = scores and name.startswith("score.")
            parameter.requires_grad_(not head and id(parameter) not in adapted)
    return peft_model


def is_classifier(model: Any) -> bool:
    """Whether a transformers model gives scores."""
    return type(model).__name__.endswith("ForSequenceClassification")


def is_lora(model: nn.Module) -> bool:
    """Whether the model is wrapped by PEFT."""
    from peft import PeftModel

    return isinstance(model, PeftModel)


def only_adapters_train(peft_model: nn.Module) -> bool:
    """Whether the base weights stay what they were, so that base and adapter together are the model."""
    return not any(
        parameter.requires_grad and not is_adapter(name) and ".modules_to_save." not in name
        for name, parameter in peft_model.named_parameters()
    )


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name in a `PeftModel` belongs to an adapter."""
    return ".lora_" in name


def lora_layers(peft_model: nn.Module) -> dict[str, Any]:
    """PEFT's adapter layers by their name in the base model."""
    from peft.tuners.lora import LoraLayer

    base: Any = peft_model.get_base_model()  # type: ignore[operator]
    return {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}


def adapted_parameter(layer: Any) -> nn.Parameter:
    """The base parameter that an adapter layer adds to: a linear layer's weight, or all experts' of a fused layer."""
    return getattr(layer.get_base_layer(), getattr(layer, "parameter_name", "weight"))


def adapter_parameters(layer: Any) -> list[nn.Parameter]:
    """The parameters that an adapter layer adds to its base layer."""
    return [parameter for name, parameter in layer.named_parameters() if name.startswith("lora_")]


def plain_name(name: str, adapter: str) -> str:
    """A base model's name for a parameter, from that within PEFT."""
    return name.replace(".base_layer", "").replace(f".modules_to_save.{adapter}.", ".")


@torch.no_grad()
def merged_weight(layer: Any, adapter: str) -> torch.Tensor:
    """The base weight of one adapter layer with its adapter added; a new tensor, summed in fp32 and rounded once.

    Of a base in 4 bits it is a weight in the precision that the layer multiplies in.
    """
    parameter = adapted_parameter(layer)
    weight = four_bit.unpacked(parameter)
    merged = (weight.to(torch.float32) + layer.get_delta_weight(adapter).to(torch.float32)).to(weight.dtype)
    return four_bit.as_in_files(parameter, merged)


@contextlib.contextmanager
def adapters_merged(peft_model: PeftModel) -> Iterator[None]:
    """Inside, the base weights hold the adapters' share and the adapter layers of this module tree are passed over.

    On leaving, saved copies of the base weights are written back, bit for bit, whatever happened inside. Unmerging by
    subtraction would not do: in bf16 it leaves the base off by 5e-4. Parameters must be whole; at ZeRO-3 the gather
    must go around this context, and what is written back inside it does not depend on whether the gather keeps or
    drops changes. Modules elsewhere that share the parameters see the merged weights meanwhile: train nothing inside.
    Costs a copy of the adapted layers' weights.
    """
    adapter = peft_model.active_adapter
    saved: list[tuple[Any, torch.Tensor]] = []
    try:
        for layer in lora_layers(peft_model).values():
            weight = adapted_parameter(layer)
            merged = merged_weight(layer, adapter)
            saved.append((layer, weight.detach().clone()))
            weight.data.copy_(merged)
            layer.merged_adapters.append(adapter)  # PEFT's own mark: the forward runs the base layer alone
        yield
    finally:
        for layer, original in saved:
            adapted_parameter(layer).data.copy_(original)
            layer.merged_adapters.clear()
