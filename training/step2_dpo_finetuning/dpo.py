"""The mathematics of preference optimisation: losses of pairs of answers, pure functions of their scores.

The score of an answer is its log-probability under the policy less that under the reference, summed over its tokens:
what the reward is, but for a factor and a constant of the prompt, of which the policy is the optimum (Rafailov et al.
2023, arXiv 2305.18290). Some losses take the mean over tokens, and some no reference. beta times it is called reward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from training.utils.arguments import SMOOTHED

PER_TOKEN = ("ipo", "simpo", "orpo")  # the mean over an answer's tokens, so that length is worth nothing

_LOG_2 = 0.6931471805599453
_LARGEST_LOG_PROB = -1e-6  # of an answer's mean token in orpo's odds, which have no bound at probability 1


def scores(loss: str, log_probs: Tensor, reference: Tensor | None, tokens: Tensor) -> Tensor:
    """The score of each answer.

    Args:
        loss: its name.
        log_probs, reference: of whole answers under policy and reference, ``[N]``; None where the loss has none.
        tokens: of the answers, ``[N]``.
    """
    difference = log_probs if reference is None else log_probs - reference
    return difference / tokens if loss in PER_TOKEN else difference


def pair_loss(
    loss: str,
    chosen: Tensor,
    rejected: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    gamma: float = 0.0,
    drift: Sequence[float] = (0.0, 0.0),
) -> Tensor:
    """The loss of each pair.

    - ``sigmoid``: DPO; with ``label_smoothing`` that share of labels is taken to be wrong (Mitchell 2023).
    - ``hinge``: SLiC (Zhao et al. 2023, arXiv 2305.10425) on the same rewards, as in Liu et al. 2023, arXiv 2309.06657.
    - ``ipo``: a margin of 1 / (2 beta), no more (Azar et al. 2023, arXiv 2310.12036), of mean log-probs as its authors
      have it since.
    - ``simpo``: no reference, a margin ``gamma`` between rewards (Meng et al. 2024, arXiv 2405.14734).
    - ``orpo``: no reference, supervised loss of the chosen answer and beta times that of the odds (Hong et al. 2024,
      arXiv 2403.07691).
    - ``kto``: each answer by itself against how far the policy has drifted (Ethayarajh et al. 2024, arXiv 2402.01306);
      of pairs, the drift is seen on the other side's answers, as in the authors' paired form.

    Args:
        loss: its name.
        chosen, rejected: `scores`, ``[P]``.
        beta: how closely the policy is held to the reference; orpo's weight of the odds.
        label_smoothing, gamma: see above.
        drift: mean score of all chosen and of all rejected answers of the optimizer step, at least 0 (kto).

    Returns:
        ``[P]``.
    """
    margin = beta * (chosen - rejected) - (gamma if loss == "simpo" else 0.0)
    if loss in SMOOTHED:
        return -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)
    if loss == "hinge":
        return torch.relu(1 - margin)
    if loss == "ipo":
        return (chosen - rejected - 1 / (2 * beta)).square()
    if loss == "orpo":
        return -chosen - beta * logsigmoid(_log_odds(chosen) - _log_odds(rejected))
    of_chosen, of_rejected = drift
    return 1 - (torch.sigmoid(beta * (chosen - of_rejected)) + torch.sigmoid(beta * (of_chosen - rejected))) / 2


def _log_odds(log_probs: Tensor) -> Tensor:
    """log(p / (1 - p)) of log p, without loss of digits at either end."""
    x = log_probs.clamp(max=_LARGEST_LOG_PROB)
    near_one = x > -_LOG_2
    one_minus = torch.where(
        near_one, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(torch.where(near_one, -_LOG_2, x)))
    )
    return x - one_minus
