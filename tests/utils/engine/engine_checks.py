"""Small training runs on fixed rows, callable in this process (one rank) and on the rank pair (two)."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import groups

from training.utils.arguments import LoraArguments
from training.utils.engine import engine as engines
from training.utils.engine.frozen import load_frozen_causal_lm
from training.utils.engine.tensor_parallel import divide_model
from training.utils.engine.zero_config import MAX_GRAD_NORM, deepspeed_config
from training.utils.model import export, loading
from training.utils.model.export import full_state_dict, gathered, plain_weights, save_model
from training.utils.model.forward import enable_gradient_checkpointing, response_log_probs
from training.utils.model.lora import with_adapters
from training.utils.run import distributed
from training.utils.run.distributed import data_rank, data_size, init_distributed, rank, reduce_sums, world_size

TINY_SHARDS = {  # at stage 3 a tiny model's parameters come and go, and some are fetched early, as a large one's do
    "zero_optimization": {
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 100,
    }
}
ROWS = 8


def fixed_rows() -> list[tuple[list[int], list[int]]]:
    """Eight rows of (ids, response mask), of unequal lengths and unequal numbers of response tokens."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for i in range(ROWS):
        prompt, response = 3 + i % 4, 2 + (5 * i) % 7
        ids = torch.randint(3, 399, (prompt + response,), generator=generator).tolist()
        rows.append((ids, [0] * prompt + [1] * response))
    return rows


def own_rows(rows: list[Any]) -> list[Any]:
    """This rank's share of the rows."""
    return rows[data_rank() * ROWS // data_size() : (data_rank() + 1) * ROWS // data_size()]


@contextlib.contextmanager
def divided(ranks: int, *paths: str) -> Iterator[None]:
    """Inside, so many ranks hold a model together; DeepSpeed, which keeps its groups for good, forgets them then."""
    divide_model(ranks, *paths)
    try:
        yield
    finally:
        divide_model(1)
        if ranks > 1:
            groups._release_process_group_references()


def train_divided(ranks: int, model_path: str, **options: Any) -> dict[str, Any]:
    """`train` with a model that so many ranks hold together."""
    with divided(ranks, model_path):
        return train(model_path, tensor_parallel=ranks, **options)


def frozen_divided(ranks: int, model_path: str, stage: int) -> torch.Tensor:
    """Log-probs of the eight rows by a frozen model that so many ranks hold together."""
    device, rows = init_distributed(), fixed_rows()
    kept: dict[str, Any] = {"dtype": "fp32", "attn_implementation": "sdpa", "offload": False, "device": device}
    with divided(ranks, model_path), torch.no_grad():
        model = load_frozen_causal_lm(model_path, zero_stage=stage, tensor_parallel=ranks, **kept)
        assert not any(parameter.requires_grad for parameter in model.parameters())
        return response_log_probs(model, **collate(rows, max(len(ids) for ids, _ in rows)))[0]


def without_guard(guard: str, model_path: str) -> dict[str, Any]:
    """`train_divided` with one thing left out that keeps it right; ``error`` where that is noticed."""
    right = engines.backward

    def by_all_ranks(engine: Any, loss_sum: torch.Tensor, count: float) -> None:
        right(engine, loss_sum * (world_size() / engine.dp_world_size), count)

    faults = {
        "loss factor": (engines, "backward", by_all_ranks),
        "rows once": (distributed, "speaks_for_rows", lambda: True),
        "whole export": (export, "whole", lambda parameter: parameter.detach()),
        "whole logits": (engines, "deepspeed", _Defaults),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*faults[guard])
        try:
            return train_divided(2, model_path, stage=1)
        except RuntimeError as error:
            return {"error": str(error)}


class _Defaults:
    """DeepSpeed, asked for tensor parallelism without a word about the vocabulary."""

    @staticmethod
    def initialize(config: dict[str, Any], **kwargs: Any) -> Any:
        """As DeepSpeed's."""
        ranks = config["tensor_parallel"]["autotp_size"]
        return deepspeed.initialize(config=config | {"tensor_parallel": {"autotp_size": ranks}}, **kwargs)


def collate(rows: list[tuple[list[int], list[int]]], width: int) -> dict[str, torch.Tensor]:
    """Right-padded tensors ``[B, width]``, on the device that trains."""
    names, device = ("input_ids", "attention_mask", "response_mask"), get_accelerator().current_device_name()
    batch = {name: torch.zeros(len(rows), width, dtype=torch.long, device=device) for name in names}
    for i, (ids, mask) in enumerate(rows):
        batch["input_ids"][i, : len(ids)] = torch.tensor(ids)
        batch["attention_mask"][i, : len(ids)] = 1
        batch["response_mask"][i, : len(ids)] = torch.tensor(mask)
    return batch


def train(
    model_path: str,
    *,
    stage: int,
    dtype: str = "fp32",
    micro_batch: int = ROWS,
    steps: int = 3,
    lora: LoraArguments | None = None,
    checkpointing: bool = False,
    per_micro_batch_mean: bool = False,
    poison: int | Collection[int] | None = None,
    learning_rate: float = 1e-2,
    weight_decay: float = 0.1,
    warmup: int = 1,
    named: bool = False,
    save_to: str | None = None,
    tensor_parallel: int = 1,
    max_grad_norm: float = MAX_GRAD_NORM,
    export_between: bool = False,
) -> dict[str, Any]:
    """Train on the eight rows as one optimizer step each time; returns losses, norms, skips and final weights.

    Args:
        per_micro_batch_mean: plants the fault that the global normalisation avoids.
        poison: the step, or the steps, at which rank 0's loss is NaN.
        named: return every parameter as it was and is, by name.
        tensor_parallel: ranks that hold the model together, see `divided`.
        export_between: read all weights before each step.
    """
    device = init_distributed()
    config = deepspeed_config(
        zero_stage=stage,
        dtype=dtype,
        micro_batch_size=micro_batch,
        max_grad_norm=max_grad_norm,
        tensor_parallel=tensor_parallel,
        overrides=TINY_SHARDS,
    )
    model: Any = loading.load_causal_lm(model_path, dtype=dtype, ds_config=config)
    if lora:
        torch.manual_seed(0)
        model = with_adapters(model, lora)
    if checkpointing:
        enable_gradient_checkpointing(model)
    engine = engines.initialize_engine(
        model.to(device),
        config,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        num_warmup_steps=warmup,
        total_steps=10,
        lora_learning_rate=lora.lora_learning_rate if lora else 0.0,
    )
    before = named_parameters(engine) if named else {}
    poisoned = poison if isinstance(poison, Collection) else [poison]
    rows = fixed_rows()
    count = sum(sum(mask) for _, mask in rows)
    mine = own_rows(rows)
    width = max(len(ids) for ids, _ in rows)
    losses, norms, skips, failures, rates = [], [], [], [], []
    for step in range(steps):
        total = 0.0
        if export_between:
            full_state_dict(engine)
        for start in range(0, len(mine), micro_batch):
            piece = mine[start : start + micro_batch]
            batch = collate(piece, width)
            log_probs, _ = response_log_probs(engine, **batch)
            loss = -log_probs.sum()
            divisor = float(count)
            if per_micro_batch_mean:
                divisor = sum(sum(m) for _, m in piece) * world_size() * (len(mine) / micro_batch)
            if step in poisoned and rank() == 0:
                loss = loss * float("nan")
            engines.backward(engine, loss, divisor)
            total += loss.item()
        result = engines.optimizer_step(engine)
        losses.append(reduce_sums({"nll": total}, device)["nll"] / count)
        norms.append(result.grad_norm)
        skips.append(result.skipped)
        failures.append(result.failed)
        rates.append(result.learning_rate)
    if save_to:
        from tests.tiny import tiny_tokenizer

        save_model(engine, tiny_tokenizer(), Path(save_to), stop_ids=[2])
    engine.eval()
    with torch.no_grad():
        after = response_log_probs(engine, **collate(rows, width))[0]
    state = {name: tensor.float() for name, tensor in full_state_dict(engine).items()}
    parameters = {name: (before[name], value) for name, value in named_parameters(engine).items()} if named else {}
    steps_taken = {"losses": losses, "norms": norms, "skips": skips, "failures": failures, "rates": rates}
    found = {"state": state, "log_probs": after, "parameters": parameters, "gathered": most_gathered(engine)}
    return steps_taken | found


def most_gathered(engine: Any) -> int:
    """The most elements of ZeRO-3's parameters that are whole at once while the weights are read; a collective."""
    sharded = [p for p in engine.module.parameters() if hasattr(p, "ds_id")]
    return max(sum(p.ds_numel for p in sharded if p.ds_status.name == "AVAILABLE") for _ in plain_weights(engine))


def named_parameters(engine: Any) -> dict[str, torch.Tensor]:
    """Every whole parameter of an engine, by name; a collective at ZeRO-3."""
    with gathered(list(engine.module.parameters())):
        return {name: p.detach().float().clone() for name, p in engine.module.named_parameters()}
