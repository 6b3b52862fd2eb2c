"""The arithmetic of benchmarks/scaling.py: bytes against DeepSpeed's own log of its collectives, tables, bad input."""

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import scaling

from tests.utils.engine.engine_checks import collate, fixed_rows
from training.utils.run.folders import repository_root


def moved_bytes(path: str, stage: int, micro_batches: int, overrides: dict[str, Any]) -> dict[str, float]:
    """Of two ranks, by DeepSpeed's logger: bytes in and out of each in a step and in a gather; parameters."""
    from deepspeed.comm.comm import comms_logger

    from training.utils.engine import engine as engines
    from training.utils.engine.engine import gathered
    from training.utils.engine.zero_config import deepspeed_config
    from training.utils.model import loading
    from training.utils.model.forward import response_log_probs
    from training.utils.run.distributed import init_distributed, world_size

    init_distributed()
    zero = {"stage3_param_persistence_threshold": 0} | overrides
    logged = {"comms_logger": {"enabled": True, "prof_all": True, "verbose": False}, "zero_optimization": zero}
    config = deepspeed_config(zero_stage=stage, dtype="bf16", overrides=logged)
    model: Any = loading.load_causal_lm(path, dtype="bf16", ds_config=config)
    schedule = {"learning_rate": 1e-3, "weight_decay": 0.0, "num_warmup_steps": 0, "total_steps": 9}
    engine = engines.initialize_engine(model, config, **schedule)
    batch = collate(fixed_rows()[:2], 20)

    def moved() -> float:
        share = scaling.ring(world_size())
        whole = {"all_reduce": 2 * share, "reduce_scatter_tensor": share}  # messages are logged whole
        whole["all_gather_into_tensor"] = world_size() - 1  # its message is logged as one rank's part
        parts = [
            whole[name] * size * found[0]
            for name, sizes in comms_logger.comms_dict.items()
            if name != "broadcast"  # the order of ZeRO-3's layers, in its first steps
            for size, found in sizes.items()
        ]
        comms_logger.comms_dict.clear()
        return sum(parts)

    try:
        for _ in range(2):  # the second step of ZeRO-3 has a trace to go by
            comms_logger.comms_dict.clear()
            for _ in range(micro_batches):
                engines.backward(engine, -response_log_probs(engine, **batch)[0].sum(), 10.0)
            engines.optimizer_step(engine)
            step = moved()
        with gathered(list(engine.module.parameters())):
            gather = moved()
    finally:
        comms_logger.enabled = False
    count = sum(int(getattr(p, "ds_numel", p.numel())) for p in engine.module.parameters())
    return {"step": step, "gather": gather, "parameters": count}


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bytes_are_those_that_deepspeed_moves(tiny_model, rank_pair, stage, micro_batches):
    found, _ = rank_pair.run(moved_bytes, str(tiny_model), stage, micro_batches, {})
    count = found["parameters"]
    expected = scaling.training_bytes(count, count, stage=stage, gpus=2, micro_batches=micro_batches)
    assert found["step"] == pytest.approx(expected, rel=0.01)
    assert found["gather"] == pytest.approx(scaling.gathered_bytes(count, 2) if stage == 3 else 0, rel=0.01)


def test_a_model_too_large_to_stay_gathered_is_gathered_twice(tiny_model, rank_pair):
    few = {"stage3_max_live_parameters": 1000, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    found, _ = rank_pair.run(moved_bytes, str(tiny_model), 3, 2, few)
    count = found["parameters"]
    embedding = 400 * 32  # tied: gathered for both ends of the model
    expected = scaling.training_bytes(count + embedding, count, stage=3, gpus=2, micro_batches=2, live=1000)
    assert found["step"] == pytest.approx(expected, rel=0.01)


def test_a_step_by_hand():
    billion, gpus = 1_000_000_000, 4
    moved = {
        stage: scaling.training_bytes(2 * billion, 2 * billion, stage=stage, gpus=gpus, micro_batches=3)
        for stage in (1, 2, 3)
    }
    message = 0.75 * 2 * 2 * billion  # (n - 1) / n of 16 bit
    assert moved == {1: 3 * message, 2: 7 * message, 3: 9 * message}


def test_phases_by_hand():
    machine = scaling.Machine(flops=1e12, flops_reached=1, link=10, link_reached=1, memory=100, memory_reached=1)
    role = scaling.Role(10**9, layers=10, hidden=1000, cache=1000)
    case = scaling.Case("a", "b", gpus=2, rows=8, batch=4, prompt=100, response=50, zero_stage=3)
    found = {p.name: p for p in scaling.phases(case, machine, {"actor": role, "critic": role}, twin=True)}
    answers = found["generation: responses"]
    assert answers.moved == 10**9  # half of two bytes a weight
    assert answers.moving == pytest.approx(0.1)
    assert answers.compute == pytest.approx(50 * (2e9 + 8 * 125 * 1000) / 1e11)  # memory-bound
    forward = 8 * 150 * (2e9 + 2 * 10 * 1000 * 150)
    assert found["training: actor"].compute == pytest.approx(4 * forward / 1e12)
    assert found["training: actor"].moved == 2 * (10**9 + 10**9)
    hooked = {p.name: p for p in scaling.phases(case, machine, {"actor": role, "critic": role}, twin=False)}
    assert hooked["generation: responses"].moved == 50 * answers.moved
    machine = replace(machine, host=20)
    rested = list(scaling.phases(case, machine, {"actor": role, "critic": role}, twin=True, rests=True))
    assert rested[0].moved == 2 * 12 * 10**9 and rested[0].moving == pytest.approx(1.2)
    assert rested[1:] == list(found.values())


@pytest.mark.parametrize(
    ("generation", "rested", "hooked", "said"),
    [
        (70, 60, 50, scaling.FITS),
        (90, 70, 50, scaling.RESTS),
        (90, 85, 50, scaling.HOOKS),
        (90, 85, 82, scaling.NOT),
        (90, 70, 82, scaling.RESTS),  # states that are larger than what is gathered
    ],
)
def test_the_first_way_to_generate_that_fits(generation, rested, hooked, said):
    need = {"held": 40.0, "peak": 60.0, "generation": generation, "rested": rested, "hooked": hooked}
    assert scaling.verdict(need, 80.0) == said
    assert scaling.verdict(need | {"peak": 81.0}, 80.0) == scaling.NOT
    whole, at_rest = min(generation, rested) <= 80, rested <= 80 < generation
    assert scaling.gathers(need, 80.0) == (whole, at_rest), "also of what does not fit: its phases may be asked for"


def run_program(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(repository_root() / "benchmarks" / "scaling.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=400)


def test_the_program_plans_a_folder(tiny_model):
    fits = run_program("--actor", str(tiny_model), "--gpus", "4", "--rows", "4", "--machine", "h100")
    assert fits.returncode == 0, fits.stderr
    assert "| 1 |" in fits.stdout and "\nZeRO 1:\n" in fits.stdout and "An iteration of 16 responses" in fits.stdout


@pytest.mark.slow
def test_a_machine_on_which_nothing_fits_is_said(tiny_model):
    small = {"memory_gib": 0.0001}
    none = run_program("--actor", str(tiny_model), "--gpus", "4", "--rows", "4", "--machine", json.dumps(small))
    assert none.returncode == 0 and "Nothing fits" in none.stdout and "An iteration" not in none.stdout


@pytest.mark.parametrize("machine", ["a101", '{"flop": 1}', "{", "[1]"])
def test_a_machine_that_is_none_is_refused_in_one_line(machine):
    result = run_program("--case", "7b", "--machine", machine)
    assert result.returncode == 2 and "--machine" in result.stderr.splitlines()[-1]
