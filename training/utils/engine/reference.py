"""The reference policy: what the trained policy was when training began, for log-probs without gradients.

Where adapters made fresh on the starting model are all that trains, it is the policy with its adapters off and costs
nothing; in every other case it is a second, frozen copy. Step 3 and DPO use it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from training.utils.engine.engine import load_frozen_causal_lm
from training.utils.run.distributed import say


def load_reference(
    path: str, *, adapters_only: bool, zero_stage: int, offload: bool, device: torch.device, **load: Any
) -> Any:
    """The frozen copy, or None where the policy without its adapters is the reference; says which.

    Args:
        path: the model that training starts from.
        adapters_only: nothing but fresh adapters trains.
        zero_stage: of the policy; at 3 the copy is sharded.
        offload: at ZeRO-3 keep the copy's parameters in CPU memory.
        device: where the copy goes below ZeRO-3.
        load: ``dtype``, ``attn_implementation`` and ``tensor_parallel``, the policy's.
    """
    if adapters_only:
        say("reference policy: the model in training with its adapters off, no second model")
        return None
    say("reference policy: a second, frozen copy of the model that training starts from")
    return load_frozen_causal_lm(path, zero_stage=zero_stage, offload=offload, device=device, **load)


@contextlib.contextmanager
def reference_policy(policy: Any, frozen: Any) -> Iterator[Any]:
    """Inside, a causal LM (or its engine) that gives the reference's log-probs; no gradients are recorded.

    Args:
        policy: the policy's PEFT model or its engine; unused with a frozen copy.
        frozen: from `load_reference`.
    """
    with torch.no_grad():
        if frozen is not None:
            yield frozen
            return
        model = policy.module if hasattr(policy, "module") else policy
        with model.disable_adapter():
            yield policy
