"""Training that is saved, thrown away and taken up again in new engines; runs here and on the rank pair."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.utils.engine.engine_checks import TINY_SHARDS, collate, divided, fixed_rows, own_rows
from training.utils.arguments import LoraArguments
from training.utils.checkpoint.engine_state import engine_counters, engine_tensors, load_engine
from training.utils.engine import engine as engines
from training.utils.engine.zero_config import deepspeed_config
from training.utils.model import loading
from training.utils.model.export import full_state_dict
from training.utils.model.forward import response_log_probs
from training.utils.model.lora import with_adapters
from training.utils.run.distributed import barrier, init_distributed, rank

ADAPTERS = LoraArguments(4, "q_proj,down_proj", True)
MIXED = LoraArguments(4, "q_proj,down_proj", lora_learning_rate=3e-2)  # the rest trains too, at another rate


def make_engine(
    model_path: str,
    *,
    stage: int,
    dtype: str,
    lora: LoraArguments | None = None,
    offload: bool = False,
    tensor_parallel: int = 1,
) -> Any:
    """A new engine on the tiny model; at ZeRO 3 the smallest parameters stay whole, as they do by default."""
    device = init_distributed()
    zero = TINY_SHARDS["zero_optimization"] | ({"stage3_param_persistence_threshold": 40} if stage == 3 else {})
    config = deepspeed_config(
        zero_stage=stage,
        dtype=dtype,
        offload=offload,
        tensor_parallel=tensor_parallel,
        overrides={"zero_optimization": zero},
    )
    bits = lora.base_bits if lora else 0
    model: Any = loading.load_causal_lm(model_path, dtype=dtype, ds_config=config, base_bits=bits)
    if lora:
        torch.manual_seed(0)
        model = with_adapters(model, lora)
    return engines.initialize_engine(
        model.to(device),
        config,
        learning_rate=1e-2,
        weight_decay=0.1,
        num_warmup_steps=2,
        total_steps=10,
        lora_learning_rate=lora.lora_learning_rate if lora else 0.0,
    )


def take_steps(engine: Any, steps: int) -> list[float]:
    """Optimizer steps on the fixed rows; returns this rank's losses and the learning rates."""
    rows = fixed_rows()
    batch = collate(own_rows(rows), max(len(ids) for ids, _ in rows))
    history = []
    for _ in range(steps):
        log_probs, _ = response_log_probs(engine, **batch)
        loss = -log_probs.sum()
        engines.backward(engine, loss, 40.0)
        result = engines.optimizer_step(engine)
        history += [loss.item(), result.learning_rate, result.grad_norm]
    return history


def save(engine: Any, folder: Path) -> dict[str, Any]:
    """Write this rank's file; returns the counters."""
    folder.mkdir(exist_ok=True)
    save_file(dict(engine_tensors(engine)), folder / f"rank-{rank()}.safetensors")
    barrier()
    return engine_counters(engine)


def interrupted(model_path: str, folder: str, **kind: Any) -> dict[str, Any]:
    """Four steps in one go, and two steps, a checkpoint, two steps in a new engine; ``kind`` is `make_engine`'s."""
    whole = make_engine(model_path, **kind)
    first = take_steps(whole, 2)
    counters = save(whole, Path(folder))
    rest = take_steps(whole, 2)
    again = make_engine(model_path, **kind)
    load_engine(again, sorted(Path(folder).glob("*.safetensors")), counters)
    return {
        "rest": rest,
        "resumed": take_steps(again, 2),
        "first": first,
        "counters": counters,
        "state": full_state_dict(whole),
        "resumed_state": full_state_dict(again),
    }


def interrupted_divided(ranks: int, model_path: str, folder: str, **kind: Any) -> dict[str, Any]:
    """`interrupted` with a model that so many ranks hold together."""
    with divided(ranks, model_path):
        return interrupted(model_path, folder, tensor_parallel=ranks, **kind)


def resumed_divided(ranks: int, model_path: str, *args: Any, **kind: Any) -> dict[str, torch.Tensor]:
    """`resumed_elsewhere` with a model that so many ranks hold together."""
    with divided(ranks, model_path):
        return resumed_elsewhere(model_path, *args, tensor_parallel=ranks, **kind)


def resumed_elsewhere(model_path: str, folder: str, counters: dict[str, Any], **kind: Any) -> dict[str, torch.Tensor]:
    """Two steps from a checkpoint that another world size or stage has written; ``kind`` is `make_engine`'s."""
    engine = make_engine(model_path, **kind)
    load_engine(engine, sorted(Path(folder).glob("*.safetensors")), counters)
    take_steps(engine, 2)
    return full_state_dict(engine)
