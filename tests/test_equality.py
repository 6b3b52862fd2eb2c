"""ZeRO stage, ranks, accumulation, LoRA, precision and offload in every combination leave the losses as they are."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.equality import ALL, DIVIDED, SERVED, TOLERANCE, Case, Matrix, pairs_of, pairwise
from tests.hardware import computes_bf16

NAMES = [(step, lora, dtype) for step in (1, 2, "dpo", 3) for lora in (False, True) for dtype in ("fp32", "bf16")]


def plain(step, dtype):
    """One rank, two micro-batches, full weights: the cheapest case in which accumulation can go wrong."""
    return Case(step, 1, 1, 2, lora=False, dtype=dtype, offload=False)


def sample(bf16):
    """Cases that hold every pair of settings; where bf16 is emulated, ten times slower, one of it for each step."""
    if bf16:
        return pairwise(ALL)
    return pairwise([case for case in ALL if case.dtype == "fp32"]) + [plain(step, "bf16") for step in (1, 2, "dpo", 3)]


@pytest.fixture(scope="module")
def matrix(tiny_model, tiny_reward, rank_pair):
    return Matrix(tiny_model, tiny_reward, rank_pair)


@pytest.mark.parametrize("bf16", [True, False])
def test_the_sample_holds_every_pair_of_settings(bf16):
    covered = [case for case in ALL if bf16 or case.dtype == "fp32"]
    assert set().union(*map(pairs_of, sample(bf16))) >= set().union(*map(pairs_of, covered))
    assert len(sample(bf16)) < 25


@pytest.mark.parametrize("case", sample(computes_bf16()), ids=lambda c: "-".join(map(str, vars(c).values())))
def test_sample(matrix, case):
    assert matrix.difference(case) <= matrix.allowed(case)


@pytest.mark.parametrize("step", [1, 2, "dpo", 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_planted_fault_is_caught(matrix, step, dtype):
    assert matrix.difference(plain(step, dtype), fault=True) > 2 * TOLERANCE[dtype]


@pytest.fixture
def served(monkeypatch):
    """Rollouts of ``served`` cases come from the stand-in."""
    monkeypatch.setenv("TRIPOD_ROLLOUT_WORKER", str(Path(__file__).parent / "step3" / "stand_in_worker.py"))


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_rollouts_of_a_server_are_the_same(matrix, served, lora):
    different = {c: d for c in SERVED if c.lora == lora and (d := matrix.difference(c)) > TOLERANCE["fp32"]}
    assert not different


def test_a_case_of_rows_that_two_ranks_take_together(matrix):
    case = replace(plain("dpo", "fp32"), zero_stage=2, ranks=2, sequence_parallel=2)
    assert case in DIVIDED and matrix.difference(case) <= TOLERANCE["fp32"]
    assert matrix.difference(case, fault=True) > 2 * TOLERANCE["fp32"]


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 2, "dpo"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_rows_that_two_ranks_take_together_are_the_same(matrix, step, dtype):
    cases = [case for case in DIVIDED if (case.step, case.dtype) == (step, dtype)]
    assert len(cases) == 32
    different = {case: d for case in cases if (d := matrix.difference(case)) > matrix.allowed(case)}
    assert not different


@pytest.mark.slow
@pytest.mark.parametrize(("step", "lora", "dtype"), NAMES)
def test_whole_matrix(matrix, step, lora, dtype):
    cases = [case for case in ALL if (case.step, case.lora, case.dtype) == (step, lora, dtype)]
    assert len(cases) == (32 if lora else 48)
    different = {case: d for case in cases if (d := matrix.difference(case)) > matrix.allowed(case)}
    assert not different
