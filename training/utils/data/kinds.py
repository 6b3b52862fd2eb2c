"""The kinds of rows that a step takes. One source may give all of them; ``--data_split`` divides it in this order."""

from __future__ import annotations

import math
from typing import Literal, get_args

from training.utils.errors import UserError

# Demonstrations teach a model to answer (SFT); pairs of a chosen and a rejected answer train a reward model or, by DPO,
# the model itself; prompts are answered by the model that trains (PPO).
Kind = Literal["demonstrations", "pairs", "prompts"]
KINDS: tuple[Kind, ...] = get_args(Kind)


def shares_of(data_split: str) -> list[float]:
    """The share of each of `KINDS` in ``--data_split``, together 1; none where it is empty.

    Raises:
        UserError: it is not three shares.
    """
    if not data_split:
        return []
    try:
        shares = [float(part) for part in data_split.split(",")]
    except ValueError:
        shares = []
    if len(shares) != 3 or not all(share >= 0 for share in shares) or not 0 < sum(shares) < math.inf:
        raise UserError(
            f"--data_split {data_split}: give the shares of SFT, preferences and prompts, for example 2,4,4"
        )
    return [share / sum(shares) for share in shares]
