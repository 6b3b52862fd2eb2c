"""The optimizer step of a role that no other rank shares, in fp32: nothing is flattened, copied or held twice.

DeepSpeed's ZeRO optimizers keep a flat copy of all masters beside the weights, and at each step copy the gradients
into one flat buffer and the masters back. On one rank, with weights in fp32, the weights are the masters and nothing
is sharded: DeepSpeed then runs its stage 0, which steps the optimizer it is given, and what that stage lacks is added
here: the norm of the gradients, a look at whether they are finite, and clipping. The arithmetic is that of stages 1
and 2, to the last bit.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

CHUNK = 65_536  # elements whose fp64 copies stay in a processor's cache: eight times as fast as a whole matrix at once


def global_norm(optimizer: torch.optim.Optimizer) -> Tensor:
    """Norm of all gradients, fp32: summed in fp64, rounded once for each parameter group, as DeepSpeed does it."""
    norms = []
    for group in optimizer.param_groups:
        gradients = [parameter.grad.reshape(-1) for parameter in group["params"]]
        if gradients[0].device.type == "cpu":
            gradients = [piece for gradient in gradients for piece in gradient.split(CHUNK)]
        squares = torch.stack(torch._foreach_norm(gradients, 2, torch.float64)).square()
        norms.append(squares.sum().float().sqrt())
    return torch.linalg.vector_norm(torch.stack(norms))


def clip_before_step(optimizer: torch.optim.Optimizer, max_grad_norm: float) -> None:
    """Let each step of an optimizer clip gradients first, and change nothing if they are not finite.

    DeepSpeed's engine reads the attributes that are set: ``_global_grad_norm``, and ``overflow``, at which it counts
    the step as skipped and leaves the schedule where it is.

    Args:
        optimizer: of one rank; its ``step`` must pass over parameters without a gradient, as torch's do.
        max_grad_norm: global norm above which gradients are scaled down; 0 for never.
    """

    def before(optimizer: Any, *_: Any) -> None:
        """Norm, finiteness, clipping."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for parameter in parameters:
            if parameter.grad is None:  # an expert that no token went to: decays like all others
                parameter.grad = torch.zeros_like(parameter)
        norm = global_norm(optimizer)
        optimizer.overflow = not bool(torch.isfinite(norm))
        optimizer._global_grad_norm = math.inf if optimizer.overflow else norm
        if optimizer.overflow:
            for parameter in parameters:
                parameter.grad = None
        elif max_grad_norm > 0 and (clip := (norm + 1e-6) / max_grad_norm) > 1:
            torch._foreach_mul_([parameter.grad for parameter in parameters], 1.0 / clip)

    optimizer.register_step_pre_hook(before)
