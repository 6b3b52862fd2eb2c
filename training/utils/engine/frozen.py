"""Roles that never train: reward models, reference policies, models that are evaluated.

The reference policy is what the trained policy was when training began. Where adapters made fresh on the starting model
are all that trains, it is the policy with its adapters off and costs nothing; in every other case it is a second,
frozen copy. Step 3 and DPO use it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from training.utils.engine.engine import initialized
from training.utils.engine.zero_config import frozen_config
from training.utils.model.classifiers import load_classifier
from training.utils.model.forward import TokenScorer
from training.utils.model.loading import load_causal_lm
from training.utils.run.distributed import say


def frozen_role(model: nn.Module, config: dict[str, Any] | None, device: torch.device) -> Any:
    """A role that never trains: no gradients; the ranks share its parameters where there is a configuration.

    Args:
        model: loaded under ``sharded_loading(config)``.
        config: from `training.utils.engine.zero_config.frozen_config`.
        device: where the model goes without one.

    Returns:
        A module (an engine with a configuration) in evaluation mode.
    """
    if config is None:
        return model.requires_grad_(False).to(device).eval()
    # AutoTP sums the gradients of norms inside heads by hooks, which parameters without a gradient refuse
    engine = initialized(model.requires_grad_("tensor_parallel" in config), config)
    engine.requires_grad_(False)
    engine.eval()
    return engine


def load_frozen_scorer(
    path: str,
    *,
    dtype: str,
    pad_token_id: int,
    device: torch.device,
    zero_stage: int = 0,
    attn_implementation: str = "sdpa",
    offload: bool = False,
    tensor_parallel: int = 1,
) -> Any:
    """A frozen reward model that scores every token, see `TokenScorer`, `frozen_config` and `frozen_role`."""
    config = frozen_config(zero_stage=zero_stage, dtype=dtype, offload=offload, tensor_parallel=tensor_parallel)
    model = load_classifier(
        path, dtype=dtype, pad_token_id=pad_token_id, attn_implementation=attn_implementation, ds_config=config
    )
    return frozen_role(TokenScorer(model), config, device)


def load_frozen_causal_lm(
    path: str,
    *,
    zero_stage: int,
    dtype: str,
    attn_implementation: str,
    offload: bool,
    device: torch.device,
    tensor_parallel: int = 1,
) -> Any:
    """A frozen causal LM, see `load_causal_lm`, `frozen_config` and `frozen_role`."""
    config = frozen_config(zero_stage=zero_stage, dtype=dtype, offload=offload, tensor_parallel=tensor_parallel)
    model = load_causal_lm(path, dtype=dtype, attn_implementation=attn_implementation, ds_config=config)
    return frozen_role(model, config, device)


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
