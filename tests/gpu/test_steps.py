"""Every step trains as a program: full and LoRA, ZeRO 0, 2 and 3, offload, bf16, fp16 and fp32."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.equality import pairwise
from tests.marks import slow
from tests.reliability.tiny_runs import step_arguments
from tests.reliability.zygote import MODULES
from tests.utils.engine.engine_checks import TINY_SHARDS
from training.step3_rlhf_finetuning.sampler_check import first_ratio_rounding
from training.utils.run.runtime import has_nvidia


@dataclass(frozen=True)
class Case:
    """A step and what it is trained with."""

    step: int | str
    zero_stage: int
    dtype: str
    lora: bool
    offload: bool


FACTORS: dict[str, tuple[Any, ...]] = {
    "step": (1, 2, "dpo", 3),
    "zero_stage": (0, 2, 3),
    "dtype": ("fp16", "bf16", "fp32"),
    "lora": (False, True),
    "offload": (False, True),
}
CASES = pairwise([Case(*values) for values in itertools.product(*FACTORS.values())], tuple(FACTORS))
LOSS = {1: "train/loss", 2: "train/loss", "dpo": "train/loss", 3: "policy/loss"}


def arguments_of(case: Case, inputs: Path, output: Path) -> list[str]:
    """The command of a case on the tiny inputs, without checkpoints."""
    more = ["--dtype", case.dtype, "--save_every", "0"] + ["--offload"] * case.offload
    if case.zero_stage == 3:
        more += ["--deepspeed_config", json.dumps(TINY_SHARDS)]
    role = ("actor_", "critic_") if case.step == 3 else ("",)
    for name in role:
        more += [f"--{name}zero_stage", str(case.zero_stage)]
        if case.lora:
            more += [f"--{name}lora_dim", "4", f"--{name}lora_module_name", "q_proj,down_proj"]
    more += ["--only_optimize_lora"] * case.lora
    if case.step == 3:
        more += ["--num_iterations", "2"]
    else:  # a loss is compared with that of the same rows
        more += ["--num_train_epochs", "2", "--learning_rate", "1e-3" if case.step == "dpo" else "1e-2"]
        more += ["--lora_learning_rate", "1e-2"] * case.lora
    return step_arguments(case.step, inputs, output, *more)


def train(case: Case, inputs: Path, output: Path) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """Run the step's program here; its records that have a loss, and its summary."""
    program = importlib.import_module(MODULES[case.step])  # type: ignore[index]
    assert program.main(arguments_of(case, inputs, output)) == 0
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((output / "summary.json").read_text())
    return [record for record in records if LOSS[case.step] in record], summary


def moved(case: Case, inputs: Path, output: Path) -> float:
    """The largest change of a weight from the start to the saved model, which plain transformers loads."""
    names = {1: ("model", ""), 2: ("reward", ""), "dpo": ("model", ""), 3: ("model", "actor")}[case.step]
    kind: Any = AutoModelForSequenceClassification if case.step == 2 else AutoModelForCausalLM
    before, after = (
        dict(kind.from_pretrained(path, dtype=torch.float32).named_parameters())
        for path in (inputs / names[0], output / names[1])
    )
    return max((after[name] - before[name]).abs().max().item() for name in before if not name.startswith("score"))


@pytest.mark.parametrize(
    "case",
    [CASES[0], *map(slow, CASES[1:])],  # on a CPU one of them in every run
    ids=lambda case: "-".join(map(str, vars(case).values())),
)
def test_every_step_trains(device, fp16_everywhere, inputs, tmp_path, case):
    records, summary = train(case, inputs, tmp_path / "out")
    for record in records:
        for name, value in record.items():
            searching = case.dtype == "fp16" and name.endswith("grad_norm")  # a step above the largest scale is skipped
            assert searching or math.isfinite(value), (name, value)
    assert 1e-5 < moved(case, inputs, tmp_path / "out") < 1.0
    assert summary["precision"]["dtype"] == case.dtype
    if case.step == 3:
        first = records[0]
        assert abs(first["policy/first_ratio"] - 1) <= first_ratio_rounding(case.dtype, device)
        assert first["kl/per_sequence"] == 0.0 or device.type != "cpu"
        assert abs(first["kl/per_sequence"]) < 0.1
    else:
        losses, half = [record[LOSS[case.step]] for record in records], len(records) // 2
        assert sum(losses[half:]) < sum(losses[:half])
    for phase in summary["phases"].values():
        assert ("reserved_gib" in phase) == (device.type == "cuda")
        if device.type == "cuda":
            assert phase["reserved_gib"] >= phase["peak_gib"]
        else:
            assert phase["peak_gib"] > 0


def test_the_sample_holds_every_pair_of_settings():
    seen = {pair for case in CASES for pair in itertools.combinations(vars(case).items(), 2)}
    wanted = {((a, x), (b, y)) for a, b in itertools.combinations(FACTORS, 2) for x in FACTORS[a] for y in FACTORS[b]}
    assert seen == wanted and [f.name for f in fields(Case)] == list(FACTORS)


def test_fp32_products_are_fp32(device):
    """TF32, which some images of GPU machines switch on, keeps 10 bits of a product's factors."""
    assert torch.get_float32_matmul_precision() == "highest"
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(256, 256, generator=generator, dtype=torch.float64) for _ in range(2))
    product = (left.to(device, torch.float32) @ right.to(device, torch.float32)).double().cpu()
    assert ((product - left @ right).abs().max() / (left @ right).abs().max()).item() < 1e-5


def test_segments_of_the_allocator_grow(device):
    said = [os.environ.get(name, "") for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")]
    assert any("expandable_segments:True" in value for value in said) == has_nvidia()
    assert has_nvidia() or device.type != "cuda"
