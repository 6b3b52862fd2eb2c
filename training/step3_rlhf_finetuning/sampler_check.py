"""Is the sampler the policy? Its log-probs of the sampled tokens against the training forward's.

Decoding one token at a time with a cache and scoring a whole row at once are two computations of the same number. They
differ by rounding; if they differ by more, responses come from another policy than the one that is trained, and PPO
learns from a lie. So the first iteration compares them and stops the run if they disagree. Later iterations log the
mean difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training.utils.distributed import gather_objects
from training.utils.errors import UserError

# Measured on SmolLM2-135M: fp32 max 2e-5; bf16 mean 0.04, 99th percentile 0.18. In 16 bit the largest of thousands of
# tokens says nothing: one unlucky token may be far off while all the others agree.
MAX_DIFFERENCE_FP32 = 1e-4
MEAN_DIFFERENCE_16BIT = 0.1
P99_DIFFERENCE_16BIT = 0.5


@dataclass(frozen=True)
class SamplerDifference:
    """Of |sampler - trainer| over the sampled tokens, in nats: mean, 99th percentile, largest; and their number."""

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
    values = torch.tensor(gather_objects(torch.cat(mine).tolist()), dtype=torch.float64)
    if not len(values):
        return SamplerDifference(0.0, 0.0, 0.0, 0)
    ordered = values.sort().values  # NaN sorts last, so it is the largest
    p99 = ordered[int(0.99 * (len(ordered) - 1))].item()
    return SamplerDifference(values.mean().item(), p99, ordered[-1].item(), len(values))


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
            f"whether decoding is to blame, --dtype fp32 whether rounding is"
        )
