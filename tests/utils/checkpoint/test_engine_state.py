"""An engine's checkpoint: bit for bit on the same ranks and stage, and close on others."""

from pathlib import Path

import pytest
import torch

from tests.marks import slow
from tests.utils.checkpoint.resume_checks import (
    ADAPTERS,
    MIXED,
    interrupted,
    make_engine,
    resumed_elsewhere,
    save,
    take_steps,
)
from training.utils.engine import engine as engines
from training.utils.errors import UserError


def assert_identical(result):
    assert result["resumed"] == result["rest"]
    for name, tensor in result["state"].items():
        assert torch.equal(result["resumed_state"][name], tensor), name


@pytest.mark.parametrize("dtype", ["fp32", slow("bf16")])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_ranks_go_on_bit_for_bit(tiny_model, rank_pair, tmp_path, stage, dtype):
    for result in rank_pair.run(interrupted, str(tiny_model), str(tmp_path / "c"), stage=stage, dtype=dtype):
        assert_identical(result)
        assert result["first"][1] != result["rest"][1], "the schedule moves, so a forgotten one would show"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("lora", [None, MIXED, ADAPTERS])
def test_one_rank_goes_on_bit_for_bit(tiny_model, tmp_path, lora, dtype):
    assert_identical(interrupted(str(tiny_model), str(tmp_path / "c"), stage=0, dtype=dtype, lora=lora))


@pytest.mark.parametrize(("stage", "dtype"), [(1, "fp32"), (2, "bf16"), (1, "bf16")])
@pytest.mark.parametrize("plain_first", [False, True])
def test_one_rank_takes_up_what_zero_has_saved(tiny_model, tmp_path, monkeypatch, plain_first, stage, dtype):
    """Checkpoints of before the plain step, and the way back, bit for bit."""

    def steps(first, then):
        monkeypatch.setattr(engines, "is_plain", lambda config, ranks: first)
        engine = make_engine(str(tiny_model), stage=stage, dtype=dtype)
        take_steps(engine, 2)
        counters = save(engine, tmp_path / "c")
        monkeypatch.setattr(engines, "is_plain", lambda config, ranks: then)
        return resumed_elsewhere(str(tiny_model), str(tmp_path / "c"), counters, stage=stage, dtype=dtype)

    there, stayed = steps(plain_first, not plain_first), steps(plain_first, plain_first)
    exact = (stage, dtype) != (1, "bf16")  # whose norm is another's in the last bit
    for name, tensor in there.items():
        torch.testing.assert_close(tensor, stayed[name], rtol=0, atol=0 if exact else 5e-3, msg=name)


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        (1, {"lora": ADAPTERS}),
        (2, {"lora": MIXED}),
        (3, {"lora": MIXED}),
        (2, {"offload": True}),
        (3, {"offload": True, "lora": ADAPTERS}),
    ],
)
def test_lora_and_offload_go_on_bit_for_bit(tiny_model, rank_pair, tmp_path, stage, options):
    for result in rank_pair.run(
        interrupted, str(tiny_model), str(tmp_path / "c"), stage=stage, dtype="bf16", **options
    ):
        assert_identical(result)


@pytest.mark.parametrize("stage", [slow(1), 3])
def test_other_ranks_and_stages_go_on_closely(tiny_model, rank_pair, tmp_path, stage):
    first, _ = rank_pair.run(interrupted, str(tiny_model), str(tmp_path / "c"), stage=stage, dtype="fp32")
    counters = first["counters"]
    for other in (1, 3):
        state = resumed_elsewhere(str(tiny_model), str(tmp_path / "c"), counters, stage=other, dtype="fp32")
        for name, tensor in first["state"].items():
            torch.testing.assert_close(state[name], tensor, rtol=0, atol=2e-6)


def test_forgotten_moments_would_show(tiny_model, rank_pair, tmp_path):
    first, _ = rank_pair.run(interrupted, str(tiny_model), str(tmp_path / "c"), stage=2, dtype="fp32")
    counters = first["counters"] | {"adam_step": 0}
    state = resumed_elsewhere(str(tiny_model), str(tmp_path / "c"), counters, stage=2, dtype="fp32")
    assert any((state[name] - tensor).abs().max() > 1e-4 for name, tensor in first["state"].items())


def test_another_models_checkpoint_is_refused(tiny_model, rank_pair, tmp_path):
    first, _ = rank_pair.run(interrupted, str(tiny_model), str(tmp_path / "c"), stage=2, dtype="bf16", lora=ADAPTERS)
    with pytest.raises(UserError, match="other trained parameters"):
        resumed_elsewhere(str(tiny_model), str(tmp_path / "c"), first["counters"], stage=2, dtype="bf16")


def test_a_lost_rank_file_is_noticed(tiny_model, rank_pair, tmp_path):
    first, _ = rank_pair.run(interrupted, str(tiny_model), str(tmp_path / "c"), stage=3, dtype="fp32")
    Path(tmp_path / "c" / "rank-1.safetensors").unlink()
    with pytest.raises(UserError, match="lacks values"):
        resumed_elsewhere(str(tiny_model), str(tmp_path / "c"), first["counters"], stage=1, dtype="fp32")
