"""What DeepSpeed's ZeRO optimizers hold and allocate, as formulas of the numbers of parameters and ranks.

Read from DeepSpeed 0.19 and held against it, byte by byte, in tests/utils/memory/test_zero.py. DeepSpeed's own
estimators (`estimate_zero2_model_states_mem_needs` and its like) know neither the precision nor the accumulator of
gradients, nor what a step allocates for a moment, which is often where the peak lies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from training.utils.engine.zero_config import effective_stage, is_plain

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
BUCKET = 500_000_000  # DeepSpeed's default reduce_bucket_size, in elements
LIVE = 1_000_000_000  # and its stage3_max_live_parameters
MASTER, MOMENTS = "master weights", "Adam's moments"
OFFLOADED, STAGING = "offloaded gradients", "offload staging"


@dataclass(frozen=True)
class RoleSize:
    """The numbers of elements that decide a role's memory.

    Attributes:
        parameters: all, adapters included.
        trained: those with a gradient.
        largest: of the largest trained parameter.
        packed: those in 4 bits, see `training.utils.engine.four_bit`.
        scales: bytes of their scales, which ZeRO-3 does not shard.
    """

    parameters: int
    trained: int
    largest: int
    packed: int = 0
    scales: int = 0

    def weights(self, width: int) -> int:
        """Bytes of all parameters, where one that is not packed has ``width``; without scales."""
        return (self.parameters - self.packed) * width + self.packed // 2


@dataclass(frozen=True)
class RoleMemory:
    """A role's memory on one rank, in bytes.

    Attributes:
        resident: what it always holds, by name.
        host: the names that are in the host's memory on a machine with an accelerator.
        gathered: whole parameters while a forward or a rollout runs at stage 3.
        kept: more of them that a forward without checkpointing keeps to its backward: 4-bit codes.
        pending: gradients from a backward to the step, beyond what is resident.
        reduction: the most at the end of a backward, ``pending`` included.
        step: the most in the optimizer step, ``pending`` included.
        releases: gradients are reduced and let go during the backward, whenever a bucket is full.
        widens: each gradient is added to its fp32 sum during the backward as soon as it is whole, and let go.
        adds: ``pending`` are the gradients themselves, to which those of the next micro-batch are added one by one.
    """

    resident: dict[str, int]
    host: frozenset[str] = frozenset()
    gathered: int = 0
    pending: int = 0
    reduction: int = 0
    step: int = 0
    releases: bool = False
    widens: bool = False
    adds: bool = False
    kept: int = 0

    @property
    def total(self) -> int:
        """The sum of what is always held."""
        return sum(self.resident.values())


def trained_memory(
    size: RoleSize, *, config: dict[str, Any], dtype: str, ranks: int, on_cpu: bool, accumulates: bool = False
) -> RoleMemory:
    """Memory of a role that trains with AdamW, after its first step.

    Args:
        config: from `training.utils.engine.zero_config.deepspeed_config`.
        dtype: ``bf16``, ``fp16`` or ``fp32``.
        on_cpu: DeepSpeed's reduction bucket is reserved whole; on a CPU only what is used of it becomes resident.
        accumulates: several micro-batches per step.
    """
    zero = config["zero_optimization"]
    stage, offload = effective_stage(zero["stage"]), "offload_optimizer" in zero
    width, trained, share = BYTES[dtype], size.trained, -(-size.trained // ranks)
    elements = int(zero.get("reduce_bucket_size", BUCKET))
    used = min(elements, trained)  # gradients are reduced, and from stage 2 on let go, whenever the bucket is full
    full = trained > elements
    bucket = used if on_cpu else elements
    held = {"parameters": size.weights(width) + size.scales, MASTER: 4 * share, MOMENTS: 8 * share}
    if is_plain(config, ranks):
        return _plain_memory(size, held, width, on_cpu and accumulates)
    host = frozenset({MASTER, MOMENTS, OFFLOADED, STAGING} if offload else ())
    norm = 8 * size.largest  # taken in fp64, parameter by parameter
    if offload:
        held[OFFLOADED] = 4 * share
        if stage < 3:
            held |= {STAGING: width * share, "copy buffers": 2 * width * size.largest}
        else:
            held[STAGING] = 4 * share
    if stage == 1 and dtype == "bf16" and not offload:  # DeepSpeed's BF16_Optimizer: whole fp32 gradients on each rank
        held["gradients"] = 4 * trained
        # its norm is in fp64 for all parameters at once
        return RoleMemory(held, pending=width * trained, reduction=width * trained, step=8 * trained, adds=True)
    if stage == 1:
        pending = 4 * trained + 4 * bucket
        copies = 4 * trained if offload else 0
        reduction = pending + (2 * used if width == 2 else 0)
        return RoleMemory(held, host, 0, pending, reduction, pending + copies + norm, adds=True)
    if stage == 2:
        pending = 4 * share
        alias = width == 4 and ranks == 1 and not accumulates  # then the gradient itself is kept
        reduction = width * (bucket + used) + (0 if alias else pending)
        step = pending + max(norm, 4 * share if width == 4 else 0)
        return RoleMemory(held, host, 0, pending, reduction, step, releases=full)
    held["parameters"] = -(-size.weights(width) // ranks) + size.scales
    if not offload:
        held["gradients"] = 4 * share
    held["reduction bucket"] = width * bucket
    live = int(zero.get("stage3_max_live_parameters", LIVE)) * width
    gathered = min(size.weights(width), live) if ranks > 1 else 0
    kept = max(size.packed // 2 - gathered, 0) if ranks > 1 else 0
    cast = width * -(-used // ranks) if ranks > 1 else 4 * used
    reduction = width * used + cast + gathered
    step = norm if offload else 4 * share
    return RoleMemory(held, host, gathered, 0, reduction, step, releases=full, kept=kept)


def _plain_memory(size: RoleSize, held: dict[str, int], width: int, adds_on_cpu: bool) -> RoleMemory:
    """A role's memory on one rank without ZeRO, see `training.utils.engine.engine.plain_adamw`."""
    gradients = 4 * size.trained
    if width == 4:  # the weights are the masters
        del held[MASTER]
    # its gradient is there twice, and once more where a CPU adds bf16 to fp32
    last = (width + 4 * adds_on_cpu) * size.largest if width == 2 else 0
    return RoleMemory(held, pending=gradients, reduction=gradients + last, step=gradients, widens=width == 2, adds=True)


def frozen_memory(parameters: int, *, zero_stage: int, dtype: str, ranks: int, offload: bool = False) -> RoleMemory:
    """Memory of a role that never trains: whole below stage 3, sharded and gathered for each forward at stage 3.

    Args:
        zero_stage: of the trained role that it accompanies.
        offload: at stage 3 its parameters are in the host's memory.
    """
    width = BYTES[dtype]
    sharded = zero_stage == 3
    held = {"parameters": width * (-(-parameters // ranks) if sharded else parameters)}
    gathered = min(parameters, LIVE) * width if sharded and ranks > 1 else 0
    host = frozenset({"parameters"} if sharded and offload else ())
    return RoleMemory(held, host, gathered)
