"""Base weights in 4 bits under adapters (QLoRA: Dettmers et al. 2023, arXiv 2305.14314), through bitsandbytes.

A linear layer's weights are kept as NF4 codes, two in a byte, with a scale for every 64 of them, which is itself kept
in 8 bits (double quantisation): 4.13 bits a weight. Embeddings, norms, biases, the output layer and a reward head stay
in ``--dtype``, and so do the layers that transformers does not build of linear layers, such as fused experts. Each
product makes one layer's weights whole in ``--dtype`` and forgets them; gradients pass through, nothing of the base
trains. ZeRO-3 shards the codes; the scales are whole on every rank.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from training.utils.engine.zero_config import DTYPES
from training.utils.errors import UserError
from training.utils.run.inputs import without_bitsandbytes

BLOCK, SCALE_BLOCK = 64, 256  # weights to a scale, scales to a scale of theirs: bitsandbytes' and the paper's


def check_installed(flag: str = "--base_bits 4") -> None:
    """Refuse to go on without bitsandbytes, which ``flag`` needs; transformers imports it only after the download.

    Raises:
        UserError: says how to install it.
    """
    # it logs its way of working on a CPU (a cast, an optional kernel) at its import and once per layer and token
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UserError(without_bitsandbytes(flag)) from error


def loading_options(dtype: str, ds_config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Further arguments of ``from_pretrained``, with which a rank loads the whole model, rounded tensor by tensor.

    Raises:
        UserError: bitsandbytes is missing, or DeepSpeed would change the codes on their way.
    """
    check_installed()
    zero = (ds_config or {}).get("zero_optimization", {})
    if zero.get("offload_param", {}).get("device") == "nvme" or zero.get("zero_quantized_weights"):
        name = "zero_quantized_weights" if zero.get("zero_quantized_weights") else "offload_param on nvme"
        raise UserError(f"--deepspeed_config: {name} is for weights in 16 bits: leave it out with --base_bits 4")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[dtype],
    )
    return {"quantization_config": config, "device_map": {"": get_accelerator().current_device_name()}}


def settle(model: nn.Module, path: str) -> str:
    """Make a model that was loaded with `loading_options` fit to train; returns a line about what is in 4 bits."""
    packed = 0
    for module in model.modules():
        if not is_packed(getattr(module, "weight", None)):
            continue
        layer: Any = module
        # else an evaluation on a CPU with bf16 instructions rearranges the codes for good, and training stops silently
        layer.support_avx512bf16_for_cpu = False
        layer.weight.of_conv1d = issubclass(layer.source_cls, Conv1D)
        packed += layer.weight.quant_state.shape.numel()
    others = sum(p.numel() for p in model.parameters() if not is_packed(p))
    return f"{path}: {packed:,} weights of linear layers in 4 bits, {others:,} other parameters in --dtype"


def packable(model: Any) -> list[nn.Module]:
    """The layers of a model without adapters that loading would keep in 4 bits."""
    kept = {id(model.get_output_embeddings()), id(getattr(model, "score", None))}
    return [m for m in model.modules() if type(m) in (nn.Linear, Conv1D) and id(m) not in kept]


def scale_bytes(weights: int) -> int:
    """What the scales of one layer take, with their tables.

    Args:
        weights: of the layer.
    """
    blocks = -(-weights // BLOCK)
    return blocks + 4 * -(-blocks // SCALE_BLOCK) + 4 * (16 + 256 + 1)  # NF4's codes, those of the scales, their mean


def is_packed(parameter: Any) -> bool:
    """Whether a parameter holds 4-bit codes; also where ZeRO-3 shards them."""
    return getattr(parameter, "quant_state", None) is not None


def scale_offset(parameter: Any) -> torch.Tensor:
    """The mean of a packed parameter's scales, or all of them where no mean is kept: not finite if a weight was not."""
    state = parameter.quant_state
    return state.absmax if state.offset is None else state.offset


def unpacked(parameter: nn.Parameter) -> torch.Tensor:
    """A parameter's weights as its layer multiplies with them: of a packed one a new tensor ``[out, in]``.

    Its codes must be whole, see `training.utils.engine.engine.gathered`.
    """
    if not is_packed(parameter):
        return parameter.detach()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(parameter.data, parameter.quant_state)  # type: ignore[attr-defined]


def unpacked_bytes(parameter: Any) -> int:
    """What `unpacked` of a packed parameter takes."""
    return parameter.quant_state.shape.numel() * parameter.quant_state.dtype.itemsize


def as_in_files(parameter: nn.Parameter, weight: torch.Tensor) -> torch.Tensor:
    """`unpacked` weights as a plain model has them: GPT-2's are ``[in, out]``, and only packed ones are not."""
    return weight.T.contiguous() if getattr(parameter, "of_conv1d", False) else weight
