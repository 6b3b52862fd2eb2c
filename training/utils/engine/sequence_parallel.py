"""Long rows over several ranks: each rank has the whole model (or ZeRO's shard of it) and a piece of every row.

Everything in a causal language model but attention treats tokens one by one, so a rank does that for its own columns.
In attention the ranks exchange heads for columns, each does some heads of whole rows, and they exchange back (Ulysses,
Jacobs et al. 2023, arXiv 2309.14509; DeepSpeed's `UlyssesSPAttentionHF`). What is found of the tokens is then joined,
so all ranks of a row have the same losses, and each has the gradient that goes through its own columns; their sum is
the whole gradient. DeepSpeed knows of none of this: to it all ranks are data-parallel ones.

Rows must be padded on the right, as collators pad them: a causal model then never looks at padding, and no mask is
needed. What takes memory for each token is done in pieces too: the layers' MLPs, and the output layer with its
log-softmax (after Bekman et al. 2025, arXiv 2506.13996).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from deepspeed import comm
from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP, UlyssesSPAttentionHF
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from training.utils.run.distributed import rank_in_row, ranks_of_a_row, row_group

ULYSSES = "ulysses"  # an attention of its own for transformers, so that other models in the process keep theirs
# In which a mask is all that attention lacks, and logits are the output layer's; each is tried in the tests
FAMILIES = (
    "gemma", "glm", "gpt_neox", "llama", "mistral", "olmo2", "opt", "phi", "phi3", "qwen2", "qwen3", "smollm3",
    "stablelm", "starcoder2",
)  # fmt: skip
PIECES = 8  # of the columns in an MLP: its inner activations then take about as much as the layer's input
HEAD_POSITIONS = 512  # whose logits exist at once: 512 x 49,152 x 4 bytes = 100 MB


@functools.cache
def _exchange(size: int, rows: int, heads: int, key_heads: int, width: int) -> UlyssesSPAttentionHF:
    """DeepSpeed's attention for one shape: it takes no batch of another size."""
    return UlyssesSPAttentionHF(
        attn=ALL_ATTENTION_FUNCTIONS["sdpa"],
        batch_size=rows,
        attn_head_count=heads,
        attn_head_size=width,
        kv_head_count=key_heads,
        num_hidden_layers=1,
        process_group=row_group(size),
        seq_length_is_variable=True,
    )


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """Causal attention of a rank's columns to all columns before them, for transformers.

    Args:
        module: the layer's attention.
        query, key, value: ``[B, heads, C, D]`` of the rank's own columns.
        attention_mask: None.
        settings: of transformers' ``sdpa``.

    Returns:
        ``[B, C, heads, D]``.

    Raises:
        ValueError: there is a mask, which would be passed over.
    """
    if attention_mask is not None:
        raise ValueError("rows that are divided among ranks take no attention mask")
    if isinstance(query, FakeTensor):
        return _as_large(module, query, key, value, **settings)
    rows, heads, columns, width = query.shape
    exchange = _exchange(ranks_of_a_row(), rows, heads, key.shape[1], width)
    # Not the model's positions: those stand still at padding, which some kernels take for the start of another row
    first = rank_in_row() * columns
    settings["position_ids"] = torch.arange(first, first + columns, device=query.device).expand(rows, -1)
    groups = getattr(module, "num_key_value_groups", None)
    output, _ = exchange(module, query, key, value, None, **settings)
    if groups is not None:
        module.num_key_value_groups = groups  # it leaves its own there, with which other attention would go wrong
    return output.view(rows, columns, heads, width), None


def _as_large(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> tuple[Tensor, None]:
    """What stands for `_attention` in a memory plan: tensors of the same sizes, of no other rank."""
    size = ranks_of_a_row()

    def whole(own: Tensor) -> Tensor:
        """``[B, heads, C, D]`` -> ``[B, heads / ranks, T, D]``."""
        rows, heads, columns, width = own.shape
        if heads % size:
            own, heads = own.repeat_interleave(size // heads, dim=1), size
        return own.transpose(1, 2).clone().view(rows, columns * size, heads // size, width).transpose(1, 2).contiguous()

    inputs = [whole(tensor) for tensor in (query, key, value)]
    output, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, *inputs, None, **settings)
    return output.clone().view(query.transpose(1, 2).shape), None


ALL_ATTENTION_FUNCTIONS.register(ULYSSES, _attention)


@contextlib.contextmanager
def whole_rows(model: Any) -> Iterator[None]:
    """Inside, a model sees whole rows on every rank, as it must to write answers."""
    split = getattr(model.config, "_attn_implementation", "") == ULYSSES
    if split:
        model.config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        if split:
            model.config._attn_implementation = ULYSSES


def own_columns(tensor: Tensor) -> Tensor:
    """This rank's piece ``[B, C]`` of ``[B, T]``; where T can not be divided, zeros follow."""
    size = ranks_of_a_row()
    columns = -(-tensor.shape[1] // size)
    start = rank_in_row() * columns
    return F.pad(tensor, (0, columns * size - tensor.shape[1]))[:, start : start + columns]


def check_right_padded(attention_mask: Tensor) -> None:
    """Refuse what attention without a mask would compute in silence as something else.

    Args:
        attention_mask: ``[B, T]``, of whole rows.

    Raises:
        ValueError: padding before a token, or several texts in a row.
    """
    if (attention_mask > 1).any() or (attention_mask[:, 1:] > attention_mask[:, :-1]).any():
        raise ValueError("rows that are divided among ranks must hold one text each and be padded on the right")


class _Joined(torch.autograd.Function):
    """The columns of all ranks of a row; backward takes the gradient of the own ones.

    All ranks compute the same loss of what is joined, so the gradients of the others' columns are the others' work.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        """``[B, C]`` -> ``[B, C x ranks]``; a collective."""
        size = ranks_of_a_row()
        parts = [torch.empty_like(own) for _ in range(size)]
        if not isinstance(own, FakeTensor):  # of a memory plan, which needs sizes alone
            comm.all_gather(parts, own.contiguous(), group=row_group(size))
        ctx.columns = slice(rank_in_row() * own.shape[1], (rank_in_row() + 1) * own.shape[1])
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """The own columns of the gradient."""
        return grads[0][:, ctx.columns]


def joined(own: Tensor, width: int) -> Tensor:
    """Whole rows ``[B, width]`` from each rank's columns ``[B, C]``, on all ranks of them; a collective."""
    return _Joined.apply(own)[:, :width]


def mlps_in_pieces(model: Any) -> None:
    """Let a model's MLPs go over columns in `PIECES`, and its output layer give log-probs where it is asked for them.

    At ZeRO-3 the parameters of an MLP are gathered once for all pieces, so ranks with other rows stay in step.
    """
    if comm.is_initialized():
        row_group(ranks_of_a_row())  # before DeepSpeed's engine, after which all groups get our time-out
    mlps = [module for name, module in model.named_modules() if name.endswith(".mlp")]
    for mlp in mlps:
        mlp.forward = functools.partial(_tiled, mlp)
    if mlps:
        set_z3_leaf_modules(model, [type(mlps[0])])
    if (head := model.get_output_embeddings()) is not None:
        head.asked = None  # else the arguments of `asked`
        head.forward = functools.partial(_answer, head)


def _tiled(mlp: Any, hidden: Tensor) -> Tensor:
    """The MLP of ``[B, C, H]``."""
    parameters = list(mlp.parameters())
    few = hidden.shape[:-1].numel() < PIECES**2  # TiledMLP may make fewer pieces than it counts, and lose gradients
    if few or _drops(mlp):  # pieces are computed again in the backward, and would drop something else there
        return type(mlp).forward(mlp, hidden)
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters):
        hidden.requires_grad_()  # autograd sees no parameters here: adapters in a first MLP would get no gradient
    return TiledMLP.apply(_of_piece, mlp, hidden, PIECES, parameters)


def _drops(mlp: nn.Module) -> bool:
    """Whether adapters in an MLP drop a share of their inputs now."""
    return any(module.training and module.p for module in mlp.modules() if isinstance(module, nn.Dropout))


def _of_piece(mlp: Any, hidden: Tensor) -> Tensor:
    """The MLP of some columns, put side by side first.

    Where they lie apart torch multiplies by weights that train otherwise than by frozen ones (`should_fold` of its
    matmul), and DPO's policy would not start as its reference.
    """
    return type(mlp).forward(mlp, hidden.contiguous())


def _answer(head: Any, hidden: Tensor) -> Tensor:
    """Logits ``[B, C, V]``, or what is asked for: hidden states ``[B, C, H]``, or log-probs ``[B, C, 1]``."""
    if head.asked is None:
        return type(head).forward(head, hidden)
    targets, temperature = head.asked
    if targets is None:
        return hidden
    found = _HeadLogProbs.apply(hidden.flatten(0, 1), head.weight, head.bias, targets.flatten(), temperature)
    return found.view(*targets.shape, 1)


@contextlib.contextmanager
def asked(model: Any, targets: Tensor | None, temperature: float = 1.0) -> Iterator[None]:
    """Inside, a model's forward gives, where its logits would be, log-probs of tokens or the output layer's inputs.

    Args:
        model: after `mlps_in_pieces`.
        targets: ``[B, C]`` tokens at the positions that the output layer is run on; None for its inputs.
        temperature: see `training.utils.model.forward.response_log_probs`.
    """
    head = model.get_output_embeddings()
    head.asked = targets, temperature
    try:
        yield
    finally:
        head.asked = None


class _HeadLogProbs(torch.autograd.Function):
    """Log-probs of tokens from the output layer's inputs; logits of `HEAD_POSITIONS` exist at once, in both passes."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float
    ) -> Tensor:
        """Hidden states ``[N, H]``, weight ``[V, H]``, bias ``[V]``, tokens ``[N]`` -> ``[N]`` fp32."""
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.temperature = temperature
        pieces = zip(hidden.split(HEAD_POSITIONS), targets.split(HEAD_POSITIONS), strict=True)
        return torch.cat([
            head_log_softmax(piece, weight, bias, temperature).gather(1, tokens[:, None])[:, 0]
            for piece, tokens in pieces
        ])  # fmt: skip

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient ``[N]`` of the log-probs -> those of hidden states, weight and bias."""
        hidden, weight, bias, targets = ctx.saved_tensors
        of_hidden = torch.empty_like(hidden)
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        of_bias = torch.zeros_like(bias, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        for start in range(0, len(hidden), HEAD_POSITIONS):
            piece = slice(start, start + HEAD_POSITIONS)
            gradient = head_log_softmax(hidden[piece], weight, bias, ctx.temperature).exp_()
            gradient.mul_(-grads[0][piece, None]).scatter_add_(1, targets[piece, None], grads[0][piece, None])
            logits = gradient.div_(ctx.temperature).to(weight.dtype)
            torch.matmul(logits, weight, out=of_hidden[piece])
            if of_weight is not None:
                of_weight += logits.T @ hidden[piece]
            if of_bias is not None:
                of_bias += logits.sum(0)
        of_layer = (None if summed is None else summed.to(weight.dtype) for summed in (of_weight, of_bias))
        return of_hidden, *of_layer, None, None


def head_log_softmax(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float = 1.0) -> Tensor:
    """Log-softmax ``[N, V]`` in fp32 of an output layer's logits: ``hidden`` ``[N, H]``, ``weight`` ``[V, H]``."""
    logits = hidden @ weight.T if bias is None else torch.addmm(bias, hidden, weight.T)
    return torch.log_softmax(logits.to(torch.float32) / temperature, dim=-1)
