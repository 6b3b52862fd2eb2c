"""A moving average beside a training engine; runs here and on the rank pair."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.utils.checkpoint.resume_checks import make_engine, take_steps
from training.utils.arguments import LoraArguments
from training.utils.checkpoint.ema import MovingAverage
from training.utils.checkpoint.engine_state import MASTER, masters
from training.utils.model.export import full_state_dict
from training.utils.run.distributed import barrier, rank

DECAY = 0.75  # far from 1, so that a forgotten or doubled update shows


def averaged(
    model_path: str, folder: str, *, stage: int, dtype: str, lora: LoraArguments | None = None
) -> dict[str, Any]:
    """Three steps with an update after each: the average, the engine around it, and a checkpoint read back."""
    engine = make_engine(model_path, stage=stage, dtype=dtype, lora=lora)
    average = MovingAverage(engine, DECAY)
    start = full_state_dict(engine)
    history = []
    for _ in range(3):
        take_steps(engine, 1)
        average.update()
        history.append(full_state_dict(engine))
    before = {(p.name, p.start): p.values[MASTER].clone() for p in masters(engine)}
    with average.in_place():
        state = full_state_dict(engine)
    after = {(p.name, p.start): p.values[MASTER].clone() for p in masters(engine)}
    (path := Path(folder)).mkdir(exist_ok=True)
    save_file(dict(average.tensors()), path / f"ema-rank{rank():04d}.safetensors")
    barrier()
    again = MovingAverage(engine, DECAY)
    again.load(sorted(path.glob("ema-*.safetensors")))
    return {
        "start": start,
        "history": history,
        "ema": state,
        "engine_after": full_state_dict(engine),
        "masters_kept": all(torch.equal(before[key], after[key]) for key in before),
        "loaded": all(torch.equal(a[1], b[1]) for a, b in zip(again.tensors(), average.tensors(), strict=True)),
    }
