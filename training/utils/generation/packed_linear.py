"""Linear layers with their weights laid out for the CPU's matrix kernels, for as long as a rollout lasts.

oneDNN computes x @ W.T fastest when W is stored in blocks that fit the kernel. From a plain weight it must rearrange W
at every call: unnoticeable with thousands of tokens, but about half of the time when a decoding step brings 32. During
a rollout the weights do not change, so they are rearranged once; PyTorch's compiler does the same when it freezes a
model. The price is a second copy of those weights while the context is open.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from training.utils.engine.precision import onednn_bf16

# Smaller matrices (LoRA's) gain nothing from another layout.
_SMALLEST = 128 * 128


def packing_supported() -> bool:
    """Whether this PyTorch has oneDNN's packed linear layer, on a processor where it was tried (x86)."""
    return platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()


def _packable(module: nn.Linear) -> bool:
    """A plain linear layer in bf16 or fp32 on the CPU whose forward nobody else has replaced."""
    if type(module) is not nn.Linear or "forward" in module.__dict__ or module.weight.numel() < _SMALLEST:
        return False
    if module.weight.device.type != "cpu" or getattr(module, "four_bit", False):  # the latter of a memory plan
        return False
    if module.weight.dtype == torch.bfloat16:
        return bool(onednn_bf16())
    return module.weight.dtype == torch.float32


def packed_bytes(model: nn.Module) -> int:
    """Bytes of the copies that `packed_linear` would make of a module tree's weights."""
    if not packing_supported():
        return 0
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and _packable(m)]
    weights = {id(m.weight): m.weight for m in layers}
    return sum(w.numel() * w.element_size() for w in weights.values())


def _packed_forward(weight: Tensor, bias: Tensor | None, inputs: Tensor) -> Tensor:
    """inputs [..., in] @ weight.T + bias, with the packed weight."""
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


@contextmanager
def packed_linear(model: nn.Module, rows: int) -> Iterator[int]:
    """Run this module tree's linear layers from packed copies of their weights while the context is open.

    The weights must be whole (gathered) and must not change inside. No gradient passes through.

    Args:
        model: a module tree; modules elsewhere that share its parameters are not touched.
        rows: the batch size that the layout is chosen for.

    Yields:
        how many layers are packed.
    """
    packed: dict[int, Tensor] = {}  # by address: tied weights are packed once
    changed: list[nn.Linear] = []
    try:
        for module in model.modules() if packing_supported() else ():
            if isinstance(module, nn.Linear) and _packable(module):
                weight = module.weight.detach()
                if weight.data_ptr() not in packed:
                    packed[weight.data_ptr()] = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
                forward = functools.partial(_packed_forward, packed[weight.data_ptr()], module.bias)
                module.__dict__["forward"] = forward
                changed.append(module)
        yield len(changed)
    finally:
        for module in changed:
            del module.__dict__["forward"]
