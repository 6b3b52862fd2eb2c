"""Reward models and critics on disk: a classifier with one output, checked and loaded."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from training.utils.errors import UserError
from training.utils.model.loading import load_config, load_strictly, reason_of, remote_code
from training.utils.run.inputs import NO_REWARD_HEAD, is_language_model


def load_classifier(
    path: str,
    *,
    dtype: str,
    pad_token_id: int,
    attn_implementation: str = "sdpa",
    ds_config: dict[str, Any] | None = None,
    fresh_head_seed: int | None = None,
    base_bits: int = 0,
) -> PreTrainedModel:
    """Load a sequence-classification model with one output: the layout of a reward model.

    Args:
        path: a causal LM or a reward model.
        dtype: ``bf16``, ``fp16`` or ``fp32``.
        pad_token_id: goes to the config; plain transformers needs it to find the end of a row.
        ds_config, base_bits: see `load_causal_lm`.
        fresh_head_seed: if given, a head that the files do not hold is drawn from N(0, 1 / (d + 1)^2), d the hidden
            size (Stiennon et al. 2020, arXiv 2009.01325, appendix B).

    Raises:
        UserError: the family has no sequence-classification model with a ``score`` head, or the files hold no head
            and none is to be drawn.
    """
    model, headless = load_strictly(
        AutoModelForSequenceClassification,
        path,
        dtype,
        attn_implementation,
        ds_config,
        base_bits=base_bits,
        may_miss="score" if fresh_head_seed is not None else "",
        num_labels=1,
        pad_token_id=pad_token_id,
    )
    if not _has_score_head(model):
        raise UserError(f"{path}: {type(model).__name__} has no score head with one output")
    if headless and fresh_head_seed is not None:
        _fresh_head(model.score, fresh_head_seed)
    return model


def _has_score_head(model: Any) -> bool:
    return isinstance(getattr(model, "score", None), nn.Linear) and model.score.out_features == 1


def check_reward_family(path: str) -> None:
    """Refuse a family that transformers has no sequence classifier for, before anything is loaded.

    Raises:
        UserError: names the class that is missing.
    """
    config = load_config(path)
    if not hasattr(config, "auto_map") and type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        name = type(config).__name__.removesuffix("Config")
        raise UserError(f"{path}: transformers has no {name}ForSequenceClassification, which a reward model is")


def check_reward_head(path: str) -> None:
    """Refuse a language model where a reward model is asked for: its head would be drawn at random at every start.

    Raises:
        UserError: names the model.
    """
    if is_language_model(load_config(path).architectures):
        raise UserError(f"{path}: {NO_REWARD_HEAD}")


def _bare_classifier(path: str) -> Any:
    """A sequence classifier with one output, without storage."""
    config = load_config(path)
    if is_language_model(config.architectures):
        config.num_labels = 1  # one for the head that would be drawn
    if config.num_labels != 1:
        raise UserError(f"{path}: the model has {config.num_labels} outputs, a reward model has one")
    try:
        with torch.device("meta"):
            return AutoModelForSequenceClassification.from_config(config, **remote_code())
    except (ImportError, ValueError) as error:
        raise UserError(f"{path}: {reason_of(error)}") from error


def parameter_count(path: str) -> int:
    """The number of parameters of a reward model, from its configuration alone."""
    return sum(p.numel() for p in _bare_classifier(path).parameters())


def scores_tokens(path: str) -> bool:
    """Whether a reward model is a causal backbone with a ``score`` head, which can score every token
    (`training.utils.model.forward.TokenScorer`).

    Others, such as DeBERTa, give one number for a whole text through their own forward.

    Raises:
        UserError: the family has no sequence classifier, or the classifier has more than one output.
    """
    return _has_score_head(_bare_classifier(path))


def _fresh_head(head: nn.Linear, seed: int) -> None:
    import deepspeed

    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(1, head.in_features, generator=generator) / (head.in_features + 1)
    sharded = hasattr(head.weight, "ds_id")
    gather = deepspeed.zero.GatheredParameters([head.weight], modifier_rank=0) if sharded else contextlib.nullcontext()
    with gather, torch.no_grad():
        if head.weight.numel():
            head.weight.copy_(values)
