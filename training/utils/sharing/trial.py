"""Whether a model can forward what several answers begin with once, found by trying it.

Families that place tokens by themselves (ALiBi), keep a state instead of keys and values, or whose kernels take no such
mask as `training.utils.sharing.rows.tree_mask` get a row for each answer; with TRIPOD_SHARED_ROWS=0 in the environment
all do.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from training.utils.data.batches import collate_pairs
from training.utils.model.forward import module_of, without_adapters
from training.utils.run.distributed import gather_objects, say
from training.utils.sharing.attention import by_blocks
from training.utils.sharing.rows import Sharing

SWITCH = "TRIPOD_SHARED_ROWS"
Batch = dict[str, Tensor]
# What each token's hidden state may be off, as a share of what it would be off if its answer saw those before it and
# went on counting from them: a quantile of the tokens, and its limit. In 16 bit single tokens of a trained model may be
# off by that much from rounding alone, but three quarters by 0.07 at most in bf16; of families that can not share, a
# quarter of the tokens is off by 0.27 and more in any precision.
TOLERANCE = {torch.float32: (1.0, 1e-3), torch.float16: (0.75, 0.05), torch.bfloat16: (0.75, 0.15)}
# Transformers' names of layers without a state
ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")
LIMITS = ("max_position_embeddings", "sliding_window", "window_size", "attention_chunk_size")  # of a row, in tokens


def shares_across(device: torch.device) -> bool:
    """Whether different prompts may stand in a row: on a CPU, where attention costs only what is seen (`by_blocks`).

    On a GPU a row for each prompt's answers was not always faster than a row for each answer (docs/results.md): kernels
    that take a mask are slower than those that do not.
    """
    return device.type == "cpu"


@torch.no_grad()
def find_sharing(
    model: Any, answers_of: Callable[[Any, Batch], Tensor], pad_id: int, name: str = "the model"
) -> Sharing | None:
    """Find out whether a model computes the same if answers stand behind what they begin with, and say so.

    Args:
        model: an engine or a model that trains or is frozen; left in evaluation mode. A collective.
        answers_of: model and batch -> numbers of its answers, from shared rows if the batch has them.
        pad_id: of the tokenizer.
        name: of the model, for the line that says which.

    Returns:
        How `collate_answers` may share rows; None where each answer needs a row of its own.
    """
    model.eval()
    module = module_of(model)
    inner = without_adapters(getattr(module, "classifier", module))
    device = inner.device if module is model else model.device
    reason = _why_never(inner) or _why_not(model, answers_of, inner, pad_id, device)
    if reason := next(filter(None, gather_objects([reason])), ""):
        say(f"answers go through {name} each by itself: {reason}")
        return None
    say(f"answers go through {name} behind what they have in common, where that is cheaper")
    across = shares_across(device) and by_blocks(inner, device)  # else attention costs the square of a row
    return Sharing(_longest(inner), inner.config.get_text_config().hidden_size, across)


def _longest(model: Any) -> int:
    """Tokens up to which a row may grow: attention of any layer then reaches from its end to its beginning."""
    config = model.config.get_text_config()
    limits = [getattr(config, name, None) for name in LIMITS]
    return min((limit for limit in limits if limit), default=sys.maxsize)


def _why_never(model: Any) -> str:
    """What the user, or a model's class and configuration, say against shared rows, else empty."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0"
    config = model.config.get_text_config()
    if model.config._attn_implementation not in ("sdpa", "eager"):
        return f"{model.config._attn_implementation} takes no such attention mask"
    if getattr(model, "_is_stateful", False) or set(getattr(config, "layer_types", None) or ()) - set(ATTENTION):
        return "some layers keep a state"
    if getattr(config, "alibi", False) or "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        return "the family places tokens by itself"
    return ""


def _why_not(
    model: Any, answers_of: Callable[[Any, Batch], Tensor], inner: Any, pad_id: int, device: torch.device
) -> str:
    """What is wrong with a small batch of shared rows, empty if nothing is.

    By the hidden states of its tokens: the one number that a fresh head makes of them can say little of a leak.
    """
    everything = Sharing(sys.maxsize, 1 << 20, across=True)
    batch = collate_pairs(_probe(inner.config.get_text_config().vocab_size), pad_id, everything)
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    places = torch.arange(batch["shared_ids"].shape[1], device=device).expand_as(batch["shared_ids"])
    if places.shape[1] > _longest(inner):
        return "its attention does not reach across a row"
    alone = {name: tensor for name, tensor in batch.items() if not name.startswith("shared_")}
    to_the_end = torch.where(batch["shared_seen_until"] > 0, places.shape[1], 0)
    leaking = batch | {"shared_seen_until": to_the_end, "shared_positions": places}
    states: list[Tensor] = []

    def look(rows: Batch) -> None:
        """One forward."""
        with _hidden_states(inner, states):
            answers_of(model, rows)

    look(alone)
    if not states:
        return "its hidden states can not be compared"
    try:
        look(batch)
        look(leaking)
    except (RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return f"the family's forward refuses that ({type(error).__name__})"
    real, where = batch["attention_mask"] == 1, (batch["shared_row"][:, None], batch["shared_columns"])
    reached = (batch["shared_positions"] != places)[where][real]  # by a leak: something else stands before these
    expected, shared, wrong = (found[real][reached] for found in (states[0], states[1][where], states[2][where]))
    quantile, limit = TOLERANCE[inner.dtype]
    off = ((shared - expected).norm(dim=-1) / (wrong - expected).norm(dim=-1)).quantile(quantile).item()
    return "" if off < limit else f"its numbers are others then (by {off:.1g} of a leak's)"


@contextlib.contextmanager
def _hidden_states(model: Any, states: list[Tensor]) -> Iterator[None]:
    """Adds the last hidden states ``[B, T, H]`` of the forward that is made inside, fp32, if the backbone says any.

    OPT's language model calls its backbone's decoder, not its backbone.
    """
    found: list[Tensor] = []

    def keep(_: Any, __: Any, output: Any) -> None:
        """The states in a module's output."""
        if hasattr(output, "last_hidden_state"):
            found.append(output.last_hidden_state)

    backbone = model.base_model
    modules = [backbone] + ([backbone.decoder] if hasattr(backbone, "decoder") else [])
    hooks = [module.register_forward_hook(keep) for module in modules]
    try:
        yield
        states += [kept.float() for kept in found[-1:]]
    finally:
        for hook in hooks:
            hook.remove()


def _probe(vocabulary: int) -> list[dict[str, Any]]:
    """Two rankings of three answers, as rows of pairs, whose prompts begin alike."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for start in (7, 4):
        beginning, *answers = (
            torch.randint(vocabulary, (size,), generator=generator).tolist() for size in (start, 5, 8, 3)
        )
        beginning[:2] = [5, 4]
        for rejected in answers[1:]:
            sides = {"chosen": answers[0], "rejected": rejected}
            row: dict[str, Any] = {"pairs": 2}
            for name, answer in sides.items():
                row |= {f"{name}_ids": beginning + answer, f"{name}_mask": [0] * start + [1] * len(answer)}
            rows.append(row)
    return rows
