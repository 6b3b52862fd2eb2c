"""The plain step: one rank, nothing sharded or offloaded, so no flat buffers.

DeepSpeed's ZeRO optimizers keep a flat copy of all masters beside the weights, and at each step copy the gradients into
one flat buffer and the masters back. On one rank nothing is sharded (`training.utils.engine.zero_config.is_plain`):
DeepSpeed then runs its stage 0, which steps the optimizer it is given, and what that stage lacks is added here. The
arithmetic is that of stage 2, to the last bit. (Stage 1 is equal in fp32; its optimizer for bf16 takes the norm in
fp32, and rounds the sum of several micro-batches' gradients to bf16.)

In fp32 the weights are the masters. In bf16 each trained weight has one: its gradient is added to the master's, in
fp32, as soon as a backward has it whole, and let go.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

NORM_CHUNK = 262_144  # elements whose fp64 copies stay in a processor's cache: many times as fast as a matrix at once
CAST = (torch.float16, torch.float32, torch.float64)  # what DeepSpeed casts to bf16, buffers left as they are


def plain_adamw(
    model: nn.Module, groups: Sequence[dict[str, Any]], *, bf16: bool, max_grad_norm: float, **settings: Any
) -> Any:
    """AdamW whose every step clips first, changes nothing if a gradient is not finite, and rounds masters to weights.

    DeepSpeed's engine reads the attributes that are set: ``_global_grad_norm``, and ``overflow``, at which it counts
    the step as skipped and leaves the schedule where it is.

    Args:
        model: on its device.
        groups: parameters of the model that train, as torch's optimizers take them.
        bf16: the model computes in bf16, else in fp32.
        max_grad_norm: global norm above which gradients are scaled down; 0 for never.
        settings: of `torch.optim.AdamW`.
    """
    weights = [weight for group in groups for weight in group["params"]]
    if bf16:
        for parameter in model.parameters():
            if parameter.dtype in CAST:
                parameter.data = parameter.data.bfloat16()
        groups = [group | {"params": [_with_master(weight) for weight in group["params"]]} for group in groups]
    optimizer: Any = torch.optim.AdamW(groups, fused=True, **settings)
    optimizer.masters = dict(zip(weights, (m for group in groups for m in group["params"]), strict=True))

    def before(optimizer: Any, *_: Any) -> None:
        """Norm, finiteness, clipping."""
        masters = list(optimizer.masters.values())
        for master in masters:
            if master.grad is None:  # an expert that no token went to: decays like all others
                master.grad = torch.zeros_like(master)
        norm = global_norm(optimizer)
        optimizer.overflow = not bool(torch.isfinite(norm))
        optimizer._global_grad_norm = math.inf if optimizer.overflow else norm
        if optimizer.overflow:
            optimizer.zero_grad()
        elif max_grad_norm > 0 and (clip := (norm + 1e-6) / max_grad_norm) > 1:
            torch._foreach_mul_([master.grad for master in masters], 1.0 / clip)

    def after(optimizer: Any, *_: Any) -> None:
        """The weights follow; gradients are let go, of which DeepSpeed only knows the weights'."""
        round_weights(optimizer)
        optimizer.zero_grad()

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
    return optimizer


def _with_master(weight: nn.Parameter) -> Tensor:
    """A bf16 weight's fp32 master, which takes over the weight's gradients."""
    master = weight.detach().float()

    def take(weight: Tensor) -> None:
        """Add a gradient that is whole."""
        assert weight.grad is not None, "another engine trains this weight"
        if master.grad is None:
            master.grad = weight.grad.float()
        else:
            master.grad += weight.grad
        weight.grad = None

    weight.register_post_accumulate_grad_hook(take)
    return master


def round_weights(optimizer: Any) -> None:
    """Make a model's weights from the masters, where they are not the same.

    Args:
        optimizer: from `plain_adamw`.
    """
    apart = {weight: master for weight, master in optimizer.masters.items() if weight is not master}
    with torch.no_grad():
        torch._foreach_copy_(list(apart), list(apart.values())) if apart else None


def global_norm(optimizer: torch.optim.Optimizer) -> Tensor:
    """Norm of all gradients, fp32: summed in fp64, rounded once for each parameter group, as DeepSpeed does it."""
    norms = []
    for group in optimizer.param_groups:
        gradients = [parameter.grad.reshape(-1) for parameter in group["params"]]
        if gradients[0].device.type == "cpu":
            gradients = [piece for gradient in gradients for piece in gradient.split(NORM_CHUNK)]
        squares = torch.stack(torch._foreach_norm(gradients, 2, torch.float64)).square()
        norms.append(squares.sum().float().sqrt())
    return torch.linalg.vector_norm(torch.stack(norms))
