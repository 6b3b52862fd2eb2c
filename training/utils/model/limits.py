"""How long sequences may be for a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from training.utils.errors import UserError
from training.utils.model.loading import load_config


def max_positions(model_path: str) -> int | None:
    """The longest sequence the model has positions for, None where the config does not say (ALiBi)."""
    return getattr(load_config(model_path).get_text_config(), "max_position_embeddings", None)


def check_length(model_path: str, length: int, flags: str) -> None:
    """Refuse sequences longer than the model's positions.

    Raises:
        UserError: names the flags to lower.
    """
    limit = max_positions(model_path)
    if limit is not None and length > limit:
        raise UserError(f"{flags} asks for {length} tokens, the model has positions for {limit}")
    if (bound := _longrope_bound(load_config(model_path).get_text_config())) and length > bound:
        print(
            f"warning: {model_path} changes its frequencies (longrope) for a whole batch as soon as one row has more "
            f"than {bound} tokens, so a row's log-probs depend on its neighbours; keep {flags} within {bound}"
        )


def _longrope_bound(config: Any) -> int | None:
    """Tokens from which on a family such as Phi-3 with ``longrope`` uses other frequencies; None for other families."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if not isinstance(rope, Mapping) or "longrope" not in (rope.get("rope_type"), rope.get("type")):
        return None
    return rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
