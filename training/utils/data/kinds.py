"""The kinds of rows that a step takes. One source may give all of them; ``--data_split`` divides it in this order."""

from __future__ import annotations

from typing import Literal, get_args

# Demonstrations teach a model to answer (SFT); pairs of a chosen and a rejected answer train a reward model or, by DPO,
# the model itself; prompts are answered by the model that trains (PPO).
Kind = Literal["demonstrations", "pairs", "prompts"]
KINDS: tuple[Kind, ...] = get_args(Kind)
