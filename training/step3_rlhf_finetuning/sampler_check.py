"""Is the sampler the policy that is trained, and is the first ratio 1? What an iteration's numbers are held against.

The sampler's log-probs of the sampled tokens are held against the training forward's. Decoding one token at a time with
a cache and scoring a whole row at once are two computations of the same number. They differ by rounding; if they differ
by more, responses come from another policy than the one that is trained, and PPO learns from a lie. So the first
iteration compares them and stops the run if they disagree. Later iterations log the mean difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training.utils.errors import UserError
from training.utils.run.distributed import gather_rows, say

# Measured on SmolLM2-135M: fp32 max 2e-5; bf16 mean 0.04, 99th percentile 0.18. Families with recurrent layers come to
# 1.3e-4 in fp32 (zamba2, qwen3_next); a mask that is lost to 0.1 and more. In 16 bit the largest of thousands of tokens
# says nothing: one unlucky token may be far off while all the others agree.
MAX_DIFFERENCE_FP32 = 1e-3
MEAN_DIFFERENCE_16BIT = 0.1
P99_DIFFERENCE_16BIT = 0.5


@dataclass(frozen=True)
class SamplerDifference:
    """How far the sampler's log-probs are from the trainer's: |difference| over all sampled tokens, in nats.

    Attributes:
        mean, p99, largest: mean, 99th percentile and maximum.
        tokens: how many were compared.
    """

    mean: float
    p99: float
    largest: float
    tokens: int

    def __str__(self) -> str:
        return f"mean {self.mean:.2e}, 99th percentile {self.p99:.2e}, max {self.largest:.2e}"


def sampler_difference(
    sampler: Sequence[Tensor], trainer: Sequence[Tensor], masks: Sequence[Tensor]
) -> SamplerDifference:
    """Compare log-probs over all batches of all ranks; a collective.

    Args:
        sampler, trainer: log-probs [B, R] of each batch, from decoding and from the training forward.
        masks: [B, R] bool, true on response tokens.
    """
    mine = [(s - t).abs()[m].double() for s, t, m in zip(sampler, trainer, masks, strict=True)]
    values = torch.tensor(gather_rows(torch.cat(mine).tolist()), dtype=torch.float64)
    if not len(values):
        return SamplerDifference(0.0, 0.0, 0.0, 0)
    ordered = values.sort().values  # NaN sorts last, so it is the largest
    p99 = ordered[int(0.99 * (len(ordered) - 1))].item()
    return SamplerDifference(values.mean().item(), p99, ordered[-1].item(), len(values))


# Before any update the policy's ratio with itself is 1, but for rounding. A run ends if the mean ratio of the first
# minibatch is further from 1 than this
FIRST_RATIO = {"fp32": 1e-3, "fp16": 5e-3, "bf16": 2e-2}
# How far different kernels may take the mean ratio from 1. On a CPU scoring and training run the same kernels, and it
# is exactly 1. Elsewhere scaled_dot_product_attention and matrix libraries may choose others when a gradient is needed.
OTHER_KERNELS = {"fp32": 1e-4, "fp16": 2e-3, "bf16": 1e-2}
# Upper bound on the standard deviation of a single token's ratio with such kernels: of few tokens the mean is off by
# chance as well, so up to `DEVIATIONS` standard errors of the mean are allowed on top
SPREAD = {"fp32": 1e-5, "fp16": 0.008, "bf16": 0.06}
DEVIATIONS = 4


def first_ratio_rounding(dtype: str, device: torch.device, alike: bool = True, tokens: float = math.inf) -> float:
    """How far the first ratio may be from 1 by rounding alone.

    Args:
        dtype, device: the run's.
        alike: as many rows are scored together as are trained together.
        tokens: of the minibatch.
    """
    if device.type == "cpu" and alike:
        return 0.0
    return OTHER_KERNELS[dtype] + DEVIATIONS * SPREAD[dtype] / max(tokens, 1.0) ** 0.5


def check_first_ratio(
    ratio: float, dtype: str, device: torch.device, alike: bool = True, tokens: float = math.inf
) -> None:
    """Stop if the policy's first ratio, of weights that have not moved, is not 1; warn if rounding is not why.

    Args:
        ratio: of the first minibatch.
        dtype, device, alike, tokens: see `first_ratio_rounding`.

    Raises:
        UserError: with the likely cause.
    """
    rounding, off = first_ratio_rounding(dtype, device, alike, tokens), abs(ratio - 1)
    if off > rounding:
        say("warning: the ratio of the first minibatch is not 1 by more than rounding, policy/first_ratio has it")
    allowed = FIRST_RATIO[dtype] + max(rounding - OTHER_KERNELS[dtype], 0.0)
    if not off <= allowed:  # NaN is off too
        raise UserError(
            f"the ratio of the first minibatch is {ratio:.4f}, and before any update it must be 1 (allowed in {dtype}: "
            f"within {allowed:.3g}): two forwards of the same tokens differ, so something in the model draws "
            "random numbers or depends on its mode, such as a router's noise or a dropout under a name of its own"
        )


def check_sampler(difference: SamplerDifference, dtype: str) -> None:
    """Stop if the difference is more than rounding.

    Args:
        difference: of the first iteration.
        dtype: the run's precision: fp32 is judged by its largest difference, 16 bit by mean and 99th percentile.

    Raises:
        UserError: with the figures, the tolerance, and what to try.
    """
    if dtype == "fp32":
        fine, allowed = difference.largest <= MAX_DIFFERENCE_FP32, f"max {MAX_DIFFERENCE_FP32}"
    else:
        fine = difference.mean <= MEAN_DIFFERENCE_16BIT and difference.p99 <= P99_DIFFERENCE_16BIT
        allowed = f"mean {MEAN_DIFFERENCE_16BIT}, 99th percentile {P99_DIFFERENCE_16BIT}"
    if not fine:
        raise UserError(
            f"the sampler is not the policy that is trained: log-probs of {difference.tokens} sampled tokens differ "
            f"from the training forward's by {difference} (allowed in {dtype}: {allowed}); --rollout_engine hf tells "
            f"whether decoding is to blame{'' if dtype == 'fp32' else ', --dtype fp32 whether rounding is'}"
        )
