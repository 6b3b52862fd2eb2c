"""Tensor parallelism: neighbouring ranks hold a part of every layer each, and compute a model together.

DeepSpeed's AutoTP cuts the layers: the first linear layer of attention and of the MLP by outputs, the second by inputs,
with one sum over the group behind it (Shoeybi et al. 2019, arXiv 1909.08053). Embeddings, norms and biases after that
sum are whole on each rank, and get the same gradients there. ZeRO shards what a rank holds over those ranks of other
groups that hold the same.

What stands here is what would go wrong in silence. Of tied embeddings AutoTP would cut the vocabulary, so that a rank
sees a part of the logits; families that it can not cut, and heads that do not divide, are refused before a model is
loaded; `Split` says which part of a parameter a rank holds, without which a saved model or checkpoint would be one
rank's part.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.checkpoint.constants import DS_AUTOTP_UC_META
from torch import Tensor, nn

from training.utils.errors import UserError
from training.utils.model.loading import load_config
from training.utils.run.distributed import broadcast_in_row, rank_in_row, ranks_of_a_row, share_rows, world_size

BY_INPUTS = ("o_proj", "out_proj", "dense", "down_proj", "fc2", "dense_4h_to_h")  # layers that are cut by inputs
FAMILIES = ("gpt_neox", "llama", "mistral", "opt", "qwen2", "qwen3")  # by model_type in config.json


def divide_model(ranks: int, *paths: str) -> None:
    """From now on neighbours, ``ranks`` of them, hold a model together: see `share_rows`; 1 for whole models.

    Args:
        ranks: ``--tensor_parallel``.
        paths: folders or hub names of the models that will be loaded.

    Raises:
        UserError: the ranks, or a model's heads, can not be divided so, or AutoTP does not cut its family.
    """
    if world_size() % ranks:
        raise UserError(f"--tensor_parallel {ranks} does not divide the number of ranks, {world_size()}")
    for path in paths if ranks > 1 else ():
        config = load_config(path)
        if config.model_type not in FAMILIES:
            raise UserError(
                f"--tensor_parallel {ranks}: DeepSpeed's AutoTP does not train {config.model_type} ({path}), but "
                f"{', '.join(FAMILIES)}; ZeRO stage 3 takes every family"
            )
        heads = config.num_attention_heads
        for count, kind in ((heads, "attention"), (getattr(config, "num_key_value_heads", None) or heads, "key-value")):
            if count % ranks:
                raise UserError(f"--tensor_parallel {ranks} does not divide the {count} {kind} heads of {path}")
    share_rows(ranks)


@dataclass(frozen=True)
class Split:
    """How a parameter is cut over the ranks of a group.

    Attributes:
        dim: along which.
        sizes: of each rank's part in it.
        shape: of the whole.
    """

    dim: int
    sizes: tuple[int, ...]
    shape: tuple[int, ...]

    def part_shape(self, place: int) -> tuple[int, ...]:
        """The shape of the part of the rank at this place in the group."""
        return (*self.shape[: self.dim], self.sizes[place], *self.shape[self.dim + 1 :])


def split_of(parameter: nn.Parameter) -> Split | None:
    """How AutoTP has cut a parameter; None if every rank has it whole."""
    layout = getattr(parameter, DS_AUTOTP_UC_META, None)
    if not layout or layout["replicated"]:
        return None
    if layout["partition_dim"] is None or not layout["partition_sizes"]:
        raise RuntimeError(f"AutoTP has cut a parameter of {layout['original_shape']} in a way that can not be undone")
    return Split(layout["partition_dim"], tuple(layout["partition_sizes"]), tuple(layout["logical_shape"]))


def whole(parameter: nn.Parameter) -> Tensor:
    """A parameter put together from the ranks of a group, or as it is if it is not cut; a collective in the group.

    The parameter itself stays a part, unlike with DeepSpeed's own gathering, which leaves it in other memory.
    """
    split = split_of(parameter)
    if split is None:
        return parameter.detach()
    parts = []
    for place in range(len(split.sizes)):
        mine = place == rank_in_row()
        part = parameter.detach().contiguous() if mine else parameter.new_empty(split.part_shape(place))
        parts.append(broadcast_in_row(part, place))
    return torch.cat(parts, split.dim)


def cut_for_plan(model: Any, ranks: int) -> None:
    """Give a model without storage the shapes that the first rank of a group has, which computes as much as any.

    Args:
        model: on the meta device, a causal LM or a sequence classifier of one of `FAMILIES`.
        ranks: of a group.
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in f".{name}":
            _cut_linear(module, ranks, dim=int(name.rpartition(".")[2] in BY_INPUTS))
        elif hasattr(module, "num_heads"):
            module.num_heads //= ranks
    if isinstance(head, nn.Linear) and head.weight is not embeddings.weight:
        _cut_linear(head, ranks, dim=0)
        head.forward = functools.partial(_gathered_outputs, head, ranks)  # type: ignore[method-assign]


def _cut_linear(layer: nn.Linear, ranks: int, dim: int) -> None:
    for parameter in (layer.weight, layer.bias if dim == 0 else None):
        if parameter is not None:
            parameter.data = parameter.data.tensor_split(ranks, dim)[0].clone()


def _gathered_outputs(layer: nn.Linear, ranks: int, inputs: Tensor) -> Tensor:
    """Stands in for a layer whose outputs are gathered: as many numbers, and as much memory, on one rank."""
    own = nn.functional.linear(inputs, layer.weight, layer.bias)
    return torch.cat([own] * ranks, -1)[..., : layer.out_features]


def check_split(model: Any) -> None:
    """Make sure that AutoTP has cut a model, and its logits are whole.

    Raises:
        RuntimeError: it has not.
    """
    if not any(split_of(parameter) for parameter in model.parameters()):
        raise RuntimeError(f"DeepSpeed has cut no layer of {type(model).__name__} over {ranks_of_a_row()} ranks")
    if any(getattr(module, "is_vocab_parallel_lm_head", False) for module in model.modules()):
        raise RuntimeError("DeepSpeed has cut the vocabulary: a rank would see a part of the logits")
