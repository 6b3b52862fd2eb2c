"""How long sequences may be for a model, and whether ranks can divide them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from training.utils.arguments import ModelArguments
from training.utils.engine.sequence_parallel import FAMILIES, ULYSSES
from training.utils.errors import UserError
from training.utils.model.loading import load_config
from training.utils.run.distributed import say, share_rows, world_size


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
        say(
            f"warning: {model_path} changes its frequencies (longrope) for a whole batch as soon as one row has more "
            f"than {bound} tokens, so a row's log-probs depend on its neighbours; keep {flags} within {bound}"
        )


def _longrope_bound(config: Any) -> int | None:
    """Tokens from which on a family such as Phi-3 with ``longrope`` uses other frequencies; None for other families."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if not isinstance(rope, Mapping) or "longrope" not in (rope.get("rope_type"), rope.get("type")):
        return None
    return rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)


def divide_rows(model_path: str, model: ModelArguments, ranks: int) -> str:
    """From now on neighbours, so many ranks, divide each row (`share_rows`); returns the attention to load with.

    Args:
        model_path: from `training.utils.model.loading.resolve_model`.
        model: the flags.
        ranks: ``--sequence_parallel``; 1 leaves all as it is, the flags' attention too.

    Raises:
        UserError: the ranks, the heads, the family or another flag do not allow that.
    """
    if ranks == 1:
        return model.attn_implementation
    asked = f"--sequence_parallel {ranks}"
    if world_size() % ranks:
        raise UserError(f"{asked} does not divide the number of ranks, {world_size()}: each row is on {ranks} of them")
    if model.attn_implementation != "sdpa":
        raise UserError(f"{asked} has an attention of its own, on sdpa: leave out --attn_implementation")
    config = load_config(model_path).get_text_config()
    if config.model_type not in FAMILIES:
        raise UserError(f"{asked}: {model_path} is a {config.model_type} model; it is made for {', '.join(FAMILIES)}")
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    if heads % ranks or (key_heads % ranks and ranks % key_heads):
        kinds = f"{heads} attention heads" + (f" and {key_heads} key heads" if key_heads != heads else "")
        raise UserError(f"{asked}: {model_path} has {kinds}, which {ranks} ranks can not share equally")
    window = getattr(config, "sliding_window", None)
    if window is not None and window < model.max_seq_len:
        raise UserError(
            f"{asked} sees whole rows, and {model_path} no further back than {window} tokens: "
            f"--max_seq_len {model.max_seq_len} is too much"
        )
    share_rows(ranks)
    return ULYSSES
