"""What an engine's optimizer holds on this rank, masters and Adam's moments, and a rest for it in host memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


def adam_of(zero: Any) -> Any:
    """The optimizer within DeepSpeed's ``engine.optimizer``; an engine with a plain step has no other."""
    return getattr(zero, "optimizer", zero)


def flat_partitions(zero: Any) -> list[Tensor]:
    """This rank's flat fp32 masters, one for each parameter group (ZeRO 3: sub-group); of a plain step the weights."""
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        return list(zero.fp32_partitioned_groups_flat)
    return [p for group in adam_of(zero).param_groups for p in group["params"]]


def _at_zero_3(engine: Any) -> list[Tensor]:
    """Masters and moments of an engine at ZeRO-3; of another none, where DeepSpeed keeps views of them by parameter."""
    zero = engine.optimizer
    if not hasattr(zero, "fp32_partitioned_groups_flat"):
        return []
    flats = flat_partitions(zero)
    return [*flats, *(state[key] for flat in flats for key in MOMENTS if key in (state := adam_of(zero).state[flat]))]


def resting_bytes(engine: Any) -> int:
    """What `states_on_host` frees on this rank's accelerator: nothing below ZeRO-3, with ``--offload`` or on a CPU."""
    return sum(tensor.nbytes for tensor in _at_zero_3(engine) if tensor.device.type != "cpu")


@contextlib.contextmanager
def states_on_host(engine: Any) -> Iterator[None]:
    """Inside, masters and moments of an engine at ZeRO-3 are in page-locked host memory; nothing may step there.

    DeepSpeed's ``offload_states`` does the same for its own FusedAdam alone.
    """
    moved = [(tensor, tensor.device) for tensor in _at_zero_3(engine)]
    for tensor, device in moved:
        host = torch.empty_like(tensor, device="cpu", pin_memory=device.type != "cpu")
        tensor.data = host.copy_(tensor.data)
    get_accelerator().empty_cache()
    try:
        yield
    finally:
        for tensor, device in moved:
            tensor.data = tensor.data.to(device)
