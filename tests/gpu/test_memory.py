"""The plan against what is really allocated: by the CUDA allocator's own count, and on a CPU by ours."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from training.utils.arguments import LoraArguments
from training.utils.engine.zero_config import DTYPES
from training.utils.memory import plan as plans
from training.utils.memory.live import LiveMemory
from training.utils.memory.training import SequenceCosts
from training.utils.model.forward import enable_gradient_checkpointing, response_log_probs

ROOT = Path(__file__).resolve().parents[2]
SIZES = {  # the smallest for which the allocator's blocks of 512 bytes to 2 MiB do not count
    "cpu": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 400},
    "cuda": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "vocab_size": 32000},
}
ROWS, LENGTH = {"cpu": 3, "cuda": 8}, {"cpu": 20, "cuda": 512}


def save_model(folder: Path, kind: str) -> str:
    """A Llama of the device's size, without a tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES[kind], num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=1024)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def allocated(device: torch.device, model: Any, work: Callable[[], object]) -> int:
    """Bytes at the peak of ``work`` above what the model holds."""
    if device.type == "cpu":
        with LiveMemory([*model.parameters(), *model.buffers()]) as memory:
            work()
        return memory.peak
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_pass_takes_what_the_plan_says(device, tmp_path, dtype, checkpointing):
    path, rows, length = save_model(tmp_path / "m", device.type), ROWS[device.type], LENGTH[device.type]
    planned = SequenceCosts(
        plans.fake_role(path, dtype, "sdpa", LoraArguments(), classifier=False), length, classifier=False
    )
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[dtype]).train().to(device)
    if checkpointing:
        enable_gradient_checkpointing(model)
    ids, mask = (tensor.to(device) for tensor in plans.fake_batch(rows, length))

    def work() -> None:
        response_log_probs(model, ids, mask, mask)[0].sum().backward()

    if device.type == "cuda":  # workspaces of the matrix library stay from the first pass on
        work()
        model.zero_grad(set_to_none=True)
    measured = allocated(device, model, work)
    assert planned.training(rows, checkpointing).peak == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_step_takes_what_its_plan_says(device_of_long_tests, tmp_path, stage):
    """Programs in processes of their own; on a CPU a tiny model's few MiB are within what resident memory shows."""
    from tests.tiny import tiny_tokenizer

    device = device_of_long_tests
    path = save_model(tmp_path / "m", device.type)
    tiny_tokenizer().save_pretrained(path)
    size = {"cpu": ("64", "2"), "cuda": ("512", "8")}[device.type]
    command = [sys.executable, str(ROOT / "benchmarks" / "memory_plan.py"), "--model_name_or_path", path, "--step", "1"]
    command += ["--zero_stage", str(stage), "--length", size[0], "--batch", size[1], "--dtype", "bf16"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    row = next((line for line in done.stdout.splitlines() if line.startswith(f"| 1 | {stage} |")), "")
    assert row, done.stdout + done.stderr[-3000:]
    planned, measured = (float(cell.replace(",", "")) for cell in row.split("|")[3:5])
    if device.type == "cuda":
        assert planned == pytest.approx(measured, rel=0.15)
    else:
        assert 0 < planned < measured + 200
