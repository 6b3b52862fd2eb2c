"""Log-probabilities of given tokens, from logits of response positions only and in fp32."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from training.utils.model.forward import forward_inputs, without_adapters

# Positions whose fp32 log-softmax exists at once: 128 x 49,152 x 4 bytes = 25 MB.
CHUNK_POSITIONS = 128


def response_log_probs(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    response_mask: torch.Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    shared: Mapping[str, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probability of each response token given everything before it.

    Args:
        model: a causal LM, or its DeepSpeed engine: the call goes through its ``forward``.
        input_ids, attention_mask: ``[B, T]``.
        response_mask: ``[B, T]``, true on the tokens wanted; column 0 is left out, as nothing predicts it.
        temperature: logits are divided by it, as the sampler does.
        entropy: also give the entropy of the distribution at each response token, in nats.
        shared: the same rows behind their common beginnings, which then is what the model sees: the ``shared_`` tensors
            of `training.utils.data.batches.collate_answers`.

    Returns:
        Log-probs ``[B, T]`` in fp32, at the column of the token itself and 0 where ``response_mask`` is
        false; and the entropies in the same layout, or None.
    """
    kept, columns = _response_columns(response_mask)
    rows, cols = kept.nonzero(as_tuple=True)
    if shared is None:
        logits = _logits_at(model, input_ids, attention_mask, columns - 1)  # [B, C, V]
        at = (rows, cols)
    else:
        before = shared["shared_columns"][:, columns - 1]  # where the token before each is, [B, C]
        some = before[kept] if rows.numel() else before[:1, 0]
        wanted = some.unique()
        tree = (shared["shared_ids"], shared["shared_mask"])
        logits = _logits_at(model, *tree, wanted, shared["shared_positions"])
        at = (shared["shared_row"][rows], torch.searchsorted(wanted, before[rows, cols]))
    if rows.numel() == 0:
        zero = logits.flatten()[:1].float().sum() * 0.0
        empty = logits.new_zeros(input_ids.shape, dtype=torch.float32) + zero
        return empty, empty.detach() if entropy else None
    targets = input_ids[:, columns][rows, cols]
    parts, entropies = [], []
    # Indexed once and split: the backward of an index fills a tensor as large as all logits, at every piece again
    pieces = zip(logits[at].split(CHUNK_POSITIONS), targets.split(CHUNK_POSITIONS), strict=True)
    for piece, piece_targets in pieces:
        arguments = (piece, piece_targets, temperature, entropy)
        if torch.is_grad_enabled():
            log_probs, chunk_entropy = checkpoint(_chunk, *arguments, use_reentrant=False)
        else:
            log_probs, chunk_entropy = _chunk(*arguments)
        parts.append(log_probs)
        entropies.append(chunk_entropy)
    where = (rows, columns[cols])
    blank = logits.new_zeros(input_ids.shape, dtype=torch.float32)
    result = blank.index_put(where, torch.cat(parts))
    return result, blank.index_put(where, torch.cat(entropies)) if entropy else None


@torch.no_grad()
def response_kl(
    policy: nn.Module,
    reference: AbstractContextManager[Any],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    response_mask: torch.Tensor,
) -> torch.Tensor:
    """KL of the policy's next-token distribution from the reference's at each response token, nats, over all tokens.

    Args:
        policy: as ``model`` of `response_log_probs`, on which the rest is too.
        reference: gives the reference once the policy has had its forward, as the two may share their weights.

    Returns:
        ``[N]`` fp32 of the N response tokens, row by row.
    """
    kept, columns = _response_columns(response_mask)
    own = _logits_at(policy, input_ids, attention_mask, columns - 1)[kept]
    with reference as model:
        other = _logits_at(model, input_ids, attention_mask, columns - 1)[kept]
    parts = []
    for piece, base in zip(own.split(CHUNK_POSITIONS), other.split(CHUNK_POSITIONS), strict=True):
        p, q = (torch.log_softmax(logits.to(torch.float32), dim=-1) for logits in (piece, base))
        parts.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(parts)


def _response_columns(response_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of the columns with a response token ``[C]`` each row has one in ``[B, C]``, and those columns."""
    mask = response_mask.bool().clone()
    mask[:, 0] = False
    columns = mask.any(0).nonzero().squeeze(-1)
    if columns.numel() == 0:  # a zero-weight filler: one column keeps the backward graph whole
        columns = torch.tensor([mask.shape[1] - 1], device=mask.device)
    return mask[:, columns], columns


def _chunk(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float, entropy: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits ``[N, V]``, targets ``[N]`` -> log-probs ``[N]`` and entropies ``[N]``, fp32."""
    log_softmax = torch.log_softmax(logits.to(torch.float32) / temperature, dim=-1)
    chosen = log_softmax.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return chosen, -(log_softmax.exp() * log_softmax).sum(-1) if entropy else None


def _logits_at(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    positions: torch.Tensor,
    position_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits ``[B, len(positions), V]``; the output layer runs on these positions only where the family allows."""
    module = model.module if hasattr(model, "module") else model
    inner = without_adapters(module)
    inputs = forward_inputs(inner, input_ids, attention_mask, position_ids)
    # 1-D on purpose: a 2-D index gathers per row in transformers 5.23 but plainly indexes in 5.17
    if "logits_to_keep" in inspect.signature(inner.forward).parameters:
        return model(**inputs, use_cache=False, logits_to_keep=positions).logits
    return model(**inputs, use_cache=False).logits[:, positions]
