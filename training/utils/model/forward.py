"""How a model is called, and what is read from it.

Of a causal LM that is log-probabilities of given tokens, from logits of response positions only and in fp32, with the
reference policy as such a model; of a reward model or critic it is scores.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from training.utils.engine import sequence_parallel
from training.utils.engine.engine import gathered
from training.utils.sharing.attention import block_mask, by_blocks
from training.utils.sharing.rows import tree_mask

# Positions whose fp32 log-softmax exists at once: 128 x 49,152 x 4 bytes = 25 MB.
CHUNK_POSITIONS = 128


def module_of(model: Any) -> Any:
    """The module in a DeepSpeed engine; any other as it is."""
    return model.module if hasattr(model, "module") else model


def without_adapters(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper, its adapter layers in place; any other model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_split(model: Any) -> bool:
    """Whether a transformers model was loaded to see only its rank's columns."""
    return getattr(getattr(model, "config", None), "_attn_implementation", "") == sequence_parallel.ULYSSES


def forward_inputs(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Keyword arguments of a forward in which positions count real tokens only, so padding moves nothing.

    A model whose rows are divided among ranks gets this rank's columns, see `training.utils.engine.sequence_parallel`.

    Args:
        model: the module whose ``forward`` will be called; families that place positions from the mask
            themselves (BLOOM) take no ``position_ids``.
        input_ids, attention_mask: ``[B, T]``.
        position_ids: ``[B, T]`` of shared rows, whose ``attention_mask`` is what `tree_mask` takes; see
            `training.utils.sharing.rows.behind_beginnings`.
    """
    if is_split(model):
        sequence_parallel.check_right_padded(attention_mask)
        positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        own = {"input_ids": input_ids, "position_ids": positions}
        return {name: sequence_parallel.own_columns(tensor) for name, tensor in own.items()}
    if position_ids is not None:
        mask = (block_mask if by_blocks(model, attention_mask.device) else tree_mask)(attention_mask)
        if model.config._attn_implementation == "eager":  # which adds it to its scores
            mask = torch.zeros_like(mask, dtype=model.dtype).masked_fill(~mask, torch.finfo(model.dtype).min)
        return {"input_ids": input_ids, "attention_mask": mask, "position_ids": position_ids}
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    return inputs


def enable_gradient_checkpointing(model: Any) -> None:
    """Recompute activations in the backward pass; with LoRA inputs must carry a gradient to reach the adapters."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


@contextlib.contextmanager
def reference_policy(policy: Any, frozen: Any) -> Iterator[Any]:
    """Inside, a causal LM (or its engine) that gives the reference's log-probs; no gradients are recorded.

    Args:
        policy: the policy's PEFT model or its engine; unused with a frozen copy.
        frozen: from `training.utils.engine.frozen.load_reference`.
    """
    with torch.no_grad():
        if frozen is not None:
            yield frozen
            return
        with module_of(policy).disable_adapter():
            yield policy


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
        shared: the same rows behind what they begin with, which then is what the model sees: the ``shared_`` tensors
            of `training.utils.data.batches.collate_answers`.

    Returns:
        Log-probs ``[B, T]`` in fp32, at the column of the token itself and 0 where ``response_mask`` is
        false; and the entropies in the same layout, or None.
    """
    if is_split(_transformers_model(model)):
        if entropy or shared is not None:
            raise ValueError("rows that are divided among ranks give log-probs alone, and hold one answer each")
        return _log_probs_of_split_rows(model, input_ids, attention_mask, response_mask, temperature), None
    kept, columns = _response_columns(response_mask)
    rows, cols = kept.nonzero(as_tuple=True)
    if shared is None:
        logits = _logits_at(model, input_ids, attention_mask, columns - 1)  # [B, C, V]
        at = (rows, cols)
    else:
        before = shared["shared_columns"][:, columns - 1]  # where the token before each is, [B, C]
        some = before[kept] if rows.numel() else before[:1, 0]
        wanted = some.unique()
        tree = (shared["shared_ids"], shared["shared_seen_until"])
        logits = _logits_at(model, *tree, wanted, shared["shared_positions"])
        at = (shared["shared_row"][rows], torch.searchsorted(wanted, before[rows, cols]))
    if rows.numel() == 0:
        zero = logits.flatten()[:1].float().sum() * 0.0
        empty = logits.new_zeros(input_ids.shape, dtype=torch.float32) + zero
        return empty, empty.detach() if entropy else None
    # A node that keeps its own output for its backward (none does after a linear layer) would find gradients there
    spare = not hasattr(logits.grad_fn, "_saved_result")
    targets, width = input_ids[:, columns][rows, cols], logits.shape[1]
    log_probs, entropies = _TokenLogProbs.apply(
        logits.flatten(0, 1), at[0] * width + at[1], targets, temperature, entropy, spare
    )
    where = (rows, columns[cols])
    blank = logits.new_zeros(input_ids.shape, dtype=torch.float32)
    return blank.index_put(where, log_probs), blank.index_put(where, entropies) if entropy else None


def answer_sums(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Log-prob of each whole answer of a batch of `training.utils.data.batches.collate_answers`: ``[S]``, fp32."""
    rows = (batch["input_ids"], batch["attention_mask"], batch["response_mask"])
    return response_log_probs(model, *rows, shared=batch if "shared_ids" in batch else None)[0].sum(1)


def _own_targets(
    input_ids: torch.Tensor, response_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the columns of this rank must predict, of rows ``[B, T]`` that are divided among ranks.

    Returns:
        The next token of each column ``[B, C]``; whether that is wanted ``[B, C]``; columns ``[K]`` in which some row
        wants it, at least one.
    """
    targets, wanted = (
        sequence_parallel.own_columns(torch.nn.functional.pad(tensor[:, 1:], (0, 1)))
        for tensor in (input_ids, response_mask.bool())
    )
    columns = wanted.any(0).nonzero().squeeze(-1)
    if columns.numel() == 0:  # one column keeps the backward graph whole
        columns = torch.zeros(1, dtype=torch.long, device=wanted.device)
    return targets, wanted, columns


def _joined_at(found: torch.Tensor, wanted: torch.Tensor, columns: torch.Tensor, width: int) -> torch.Tensor:
    """What each rank found in some columns ``[B, K]`` in whole rows ``[B, width]``, one column on; 0 if not wanted."""
    wanted, columns = wanted.to(found.device), columns.to(found.device)
    found = torch.where(wanted[:, columns], found, 0.0)
    own = found.new_zeros(wanted.shape).index_copy(1, columns, found)
    return torch.nn.functional.pad(sequence_parallel.joined(own, width)[:, :-1], (1, 0))


def _log_probs_of_split_rows(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, response_mask: torch.Tensor, temperature: float
) -> torch.Tensor:
    """`response_log_probs` of rows that are divided among ranks, on all of them."""
    targets, wanted, columns = _own_targets(input_ids, response_mask)
    with sequence_parallel.asked(_transformers_model(model), targets[:, columns], temperature):
        found = _logits_at(model, input_ids, attention_mask, columns).squeeze(-1)  # [B, K]
    return _joined_at(found, wanted, columns, input_ids.shape[1])


class _TokenLogProbs(torch.autograd.Function):
    """Log-probs and entropies of some rows of logits, whose backward writes the gradient into the logits themselves.

    Beside the logits only pieces of `CHUNK_POSITIONS` rows exist in fp32. What autograd would make of the same lines
    takes three more tensors of the logits' size: the rows taken out, their gradient, and that of all logits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        at: torch.Tensor,
        targets: torch.Tensor,
        temperature: float,
        entropy: bool,
        spare: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits ``[P, V]``; rows ``[N]``, not empty, and tokens ``[N]`` -> log-probs and entropies ``[N]``, fp32."""
        ctx.save_for_backward(logits, at, targets)
        ctx.temperature, ctx.spare = temperature, spare
        found = []
        for rows, tokens in zip(at.split(CHUNK_POSITIONS), targets.split(CHUNK_POSITIONS), strict=True):
            log_softmax = _log_softmax(logits[rows], temperature)
            chosen = log_softmax.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
            spread = -(log_softmax.exp() * log_softmax).sum(-1) if entropy else torch.zeros_like(chosen)
            found.append((chosen, spread))
        log_probs, entropies = (torch.cat(parts) for parts in zip(*found, strict=True))
        if not entropy:
            ctx.mark_non_differentiable(entropies)
        ctx.entropy = entropy
        return log_probs, entropies

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients ``[N]`` of both -> that of the logits; a row that was asked for twice gets the sum."""
        logits, at, targets = ctx.saved_tensors
        at, order = at.sort()
        targets, of_log_probs = targets[order], grads[0][order]
        wanted, inverse, counts = at.unique_consecutive(return_inverse=True, return_counts=True)
        of_entropies = grads[1].new_zeros(len(wanted)).index_add(0, inverse, grads[1][order]) if ctx.entropy else None
        totals = of_log_probs.new_zeros(len(wanted)).index_add(0, inverse, of_log_probs)
        ends = [0, *counts.cumsum(0)[CHUNK_POSITIONS - 1 :: CHUNK_POSITIONS].tolist()]
        result = logits if ctx.spare else torch.empty_like(logits)
        unused = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        unused[wanted] = False
        for start in range(0, len(wanted), CHUNK_POSITIONS):
            rows, piece = wanted[start : start + CHUNK_POSITIONS], slice(start, start + CHUNK_POSITIONS)
            number = start // CHUNK_POSITIONS
            mine = slice(ends[number], ends[number + 1] if number + 1 < len(ends) else None)
            log_softmax = _log_softmax(logits[rows], ctx.temperature)
            probs, scale = log_softmax.exp(), -totals[piece].unsqueeze(-1)
            if of_entropies is not None:
                spread = (probs * log_softmax).sum(-1, keepdim=True)  # the negative entropy
                scale = scale - of_entropies[piece].unsqueeze(-1) * (log_softmax - spread)
            gradient = probs.mul_(scale)
            gradient.index_put_((inverse[mine] - start, targets[mine]), of_log_probs[mine], accumulate=True)
            result[rows] = gradient.div_(ctx.temperature).to(logits.dtype)
        result[unused] = 0
        return result, None, None, None, None, None


def _log_softmax(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    scaled = logits.to(torch.float32)
    return torch.log_softmax(scaled if temperature == 1 else scaled / temperature, dim=-1)


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
    if is_split(_transformers_model(policy)):
        return _kl_of_split_rows(policy, reference, input_ids, attention_mask, response_mask)
    kept, columns = _response_columns(response_mask)
    own = _logits_at(policy, input_ids, attention_mask, columns - 1).flatten(0, 1)
    with reference as model:
        other = _logits_at(model, input_ids, attention_mask, columns - 1).flatten(0, 1)
    parts = []
    for rows in kept.flatten().nonzero().squeeze(-1).split(CHUNK_POSITIONS):  # of both no copy as a whole
        p, q = (_log_softmax(logits[rows], 1.0) for logits in (own, other))
        parts.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(parts)


def _kl_of_split_rows(
    policy: Any,
    reference: AbstractContextManager[Any],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    response_mask: torch.Tensor,
) -> torch.Tensor:
    """`response_kl` of rows that are divided among ranks, on all of them; logits of some positions exist at once."""
    _, wanted, columns = _own_targets(input_ids, response_mask)
    states, heads = [], []
    for holder in (contextlib.nullcontext(policy), reference):
        with holder as model:
            inner = _transformers_model(model)
            with sequence_parallel.asked(inner, None):
                states.append(_logits_at(model, input_ids, attention_mask, columns).flatten(0, 1))
            heads.append(inner.get_output_embeddings())
    parts = []
    with gathered([parameter for head in heads for parameter in head.parameters()]):
        for pieces in zip(*(s.split(sequence_parallel.HEAD_POSITIONS) for s in states), strict=True):
            p, q = (
                sequence_parallel.head_log_softmax(piece, head.weight, head.bias)
                for piece, head in zip(pieces, heads, strict=True)
            )
            parts.append((p.exp() * (p - q)).sum(-1))
    found = torch.cat(parts).view(-1, len(columns))
    mask = response_mask.bool().clone()
    mask[:, 0] = False
    return _joined_at(found, wanted, columns, input_ids.shape[1])[mask]


def _response_columns(response_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The columns in which any row has a response token, and in which of them each row has one.

    Returns:
        The mask ``[B, C]``, and the columns' numbers ``[C]``.
    """
    mask = response_mask.bool().clone()
    mask[:, 0] = False
    columns = mask.any(0).nonzero().squeeze(-1)
    if columns.numel() == 0:  # a zero-weight filler: one column keeps the backward graph whole
        columns = torch.tensor([mask.shape[1] - 1], device=mask.device)
    return mask[:, columns], columns


def _transformers_model(model: Any) -> Any:
    """The transformers model in an engine or PEFT's wrapper."""
    return without_adapters(module_of(model))


def _logits_at(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    positions: torch.Tensor,
    position_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits ``[B, len(positions), V]``; the output layer runs on these positions only where the family allows."""
    inner = _transformers_model(model)
    inputs = forward_inputs(inner, input_ids, attention_mask, position_ids)
    # 1-D on purpose: a 2-D index gathers per row in transformers 5.23 but plainly indexes in 5.17
    if "logits_to_keep" in inspect.signature(inner.forward).parameters:
        return model(**inputs, use_cache=False, logits_to_keep=positions).logits
    return model(**inputs, use_cache=False).logits[:, positions]


class TokenScorer(nn.Module):
    """A sequence-classification model that scores every token instead of the last one.

    The reward of a response is the score at its last token; the critic's values are all of them. With
    ``mean`` and ``std`` the output is ``(score - mean) / std``: a critic that starts from the reward model
    then starts on the scale of the normalised rewards it must predict.
    """

    def __init__(self, classifier: Any, mean: float = 0.0, std: float = 1.0) -> None:
        super().__init__()
        self.classifier = classifier
        self.mean = mean
        self.std = std

    @property
    def config(self) -> Any:
        """The classifier's configuration (DeepSpeed and transformers look for it)."""
        return self.classifier.config

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """Recompute activations of the backbone in the backward pass."""
        self.classifier.gradient_checkpointing_enable(**kwargs)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Score every token: ids and mask ``[B, T]`` -> ``[B, T]`` fp32, any value at padding; see `forward_inputs`."""
        inner = without_adapters(self.classifier)
        backbone = inner.base_model
        # A policy of the same tokenizer may have more embeddings, and draw an id that no text has
        input_ids = input_ids.clamp(max=inner.get_input_embeddings().num_embeddings - 1)
        inputs = forward_inputs(backbone, input_ids, attention_mask, position_ids)
        scores = inner.score(backbone(**inputs, use_cache=False).last_hidden_state).squeeze(-1).to(torch.float32)
        if is_split(inner):
            scores = sequence_parallel.joined(scores, input_ids.shape[1])
        return (scores - self.mean) / self.std


def last_token_scores(scores: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """The reward of each row: its score at the last response token.

    Args:
        scores: ``[B, T]``, one per token.
        response_mask: ``[B, T]``, 0/1 or bool; a row without any response token gives its score at column 0.

    Returns:
        ``[B]``, in the dtype of ``scores``.
    """
    columns = torch.arange(response_mask.shape[1], device=response_mask.device)
    last = (response_mask.long() * columns).argmax(dim=1)
    return scores.gather(1, last.unsqueeze(1)).squeeze(1)


def token_scores(
    scorer: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    shared: Mapping[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """What a `TokenScorer` says of every token: ``[B, T]`` fp32, anything at padding.

    Args:
        scorer: it, or its engine.
        input_ids, attention_mask: ``[B, T]``.
        shared: see `response_log_probs`.
    """
    if shared is None:
        return scorer(input_ids, attention_mask)
    scores = scorer(shared["shared_ids"], shared["shared_seen_until"], shared["shared_positions"])
    return scores[shared["shared_row"][:, None], shared["shared_columns"]]


def answer_rewards(scorer: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Rewards of a batch of `training.utils.data.batches.collate_answers`: ``[S]``, fp32."""
    shared = batch if "shared_ids" in batch else None
    scores = token_scores(scorer, batch["input_ids"], batch["attention_mask"], shared)
    return last_token_scores(scores, batch["response_mask"])
