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
    """This rank's flat fp32 masters, one for each parameter group (ZeRO 3: sub-group); of a plain step each."""
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        return list(zero.fp32_partitioned_groups_flat)
    return [p for group in adam_of(zero).param_groups for p in group["params"]]


def make_moments(zero: Any) -> None:
    """Give the optimizer the state that its first step would make."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    counts_in_python = isinstance(adam_of(zero), DeepSpeedCPUAdam)
    for flat in flat_partitions(zero):
        state = adam_of(zero).state[flat]
        if not state:
            state["step"] = 0 if counts_in_python else torch.zeros((), dtype=torch.float32, device=flat.device)
            state |= {key: torch.zeros_like(flat.data) for key in MOMENTS}


def _that_rest(engine: Any) -> list[Tensor]:
    """Masters and moments that an engine at ZeRO-3 has on its device; the moments are made if no step has yet.

    Below ZeRO-3 none, as DeepSpeed keeps views of them there by parameter, and none that are swapped to a disk.
    """
    zero = engine.optimizer
    if not hasattr(zero, "fp32_partitioned_groups_flat") or getattr(zero, "swap_optimizer", False):
        return []
    make_moments(zero)
    flats = flat_partitions(zero)
    states = [*flats, *(adam_of(zero).state[flat][key] for flat in flats for key in MOMENTS)]
    return [tensor for tensor in states if tensor.device.type == engine.device.type]


def resting_bytes(engine: Any) -> tuple[int, int]:
    """What `states_on_host` frees on this rank's accelerator, and takes of the host's memory; makes missing moments.

    Nothing below ZeRO-3, with ``--offload`` or on a CPU. Page-locked memory is taken in powers of two, and PyTorch
    keeps it for the next time.
    """
    sizes = [tensor.nbytes for tensor in _that_rest(engine)]
    if engine.device.type == "cpu":
        return 0, 0
    return sum(sizes), sum(1 << (size - 1).bit_length() for size in sizes)


@contextlib.contextmanager
def states_on_host(engine: Any) -> Iterator[None]:
    """Inside, masters and moments of an engine at ZeRO-3 are in page-locked host memory; nothing may step there.

    DeepSpeed's ``offload_states`` does the same for its own FusedAdam alone.
    """
    moved: list[Tensor] = []
    try:
        for tensor in _that_rest(engine):
            host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.device.type != "cpu")
            tensor.data = host.copy_(tensor.data)
            moved.append(tensor)
        get_accelerator().empty_cache()
        yield
    finally:
        for tensor in moved:
            tensor.data = tensor.data.to(engine.device)
