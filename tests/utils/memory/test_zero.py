"""The formulas of ZeRO's memory: closed forms by hand, and against what DeepSpeed allocates."""

import pytest

from tests.marks import slow
from tests.utils.memory.memory_checks import BUCKET, deepspeed_memory, save_wide_model
from training.utils.arguments import LoraArguments
from training.utils.engine.engine import NORM_CHUNK
from training.utils.engine.zero_config import deepspeed_config, is_plain
from training.utils.memory.plan import fake_role, training_phases
from training.utils.memory.training import SequenceCosts
from training.utils.memory.zero import BYTES, RoleSize, frozen_memory, trained_memory

N = 1_000_000
SIZE = RoleSize(N, N, 1000)


@pytest.mark.parametrize(
    ("stage", "dtype", "ranks", "held"),
    [
        (0, "bf16", 1, 2 + 4 + 8),  # weights, master, moments
        (1, "bf16", 4, 2 + 1 + 2 + 4),  # and whole fp32 gradients
        (2, "bf16", 4, 2 + 1 + 2),
        (3, "bf16", 4, 0.5 + 1 + 2 + 1 + 2),  # and a bucket for gradients, whole on each rank
        (1, "fp32", 1, 4 + 8),  # the weights are the masters
        (1, "fp32", 2, 4 + 2 + 4),
        (3, "fp32", 2, 2 + 2 + 4 + 2 + 4),
    ],
)
def test_resident_bytes_per_parameter(stage, dtype, ranks, held):
    config = deepspeed_config(zero_stage=stage, dtype=dtype)
    role = trained_memory(SIZE, config=config, dtype=dtype, ranks=ranks, on_cpu=True)
    assert role.total == held * N


def test_adapters_alone_train_and_have_optimizer_states():
    size = RoleSize(N + 1000, 1000, 100)
    config = deepspeed_config(zero_stage=2, dtype="bf16")
    role = trained_memory(size, config=config, dtype="bf16", ranks=1, on_cpu=True)
    assert role.total == 2 * (N + 1000) + 12 * 1000


def test_offload_moves_states_to_the_host():
    role = trained_memory(
        SIZE, config=deepspeed_config(zero_stage=2, dtype="bf16", offload=True), dtype="bf16", ranks=2, on_cpu=False
    )
    assert sum(size for name, size in role.resident.items() if name in role.host) == (4 + 8 + 4 + 2) * N // 2


def test_the_bucket_is_whole_on_an_accelerator():
    config = deepspeed_config(zero_stage=2, dtype="bf16")
    there, here = (
        trained_memory(SIZE, config=config, dtype="bf16", ranks=2, on_cpu=on_cpu).reduction for on_cpu in (False, True)
    )
    assert there - here == 2 * (500_000_000 - N)


def test_frozen_roles_are_sharded_at_stage_3_only():
    assert frozen_memory(N, zero_stage=2, dtype="bf16", ranks=4).total == 2 * N
    sharded = frozen_memory(N, zero_stage=3, dtype="bf16", ranks=4)
    assert (sharded.total, sharded.gathered) == (N // 2, 2 * N)


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory):
    return save_wide_model(tmp_path_factory.mktemp("models") / "wide")


def check(measured, dtype, ranks, accumulation=1, within=0.07):
    """Resident, backward and step against the formulas; here too the reserved bucket counts whole."""
    size, config = measured["size"], measured["config"]
    role = trained_memory(size, config=config, dtype=dtype, ranks=ranks, on_cpu=False, accumulates=accumulation > 1)
    stage = config["zero_optimization"]["stage"]
    bucket = role.resident.get("reduction bucket", 0)
    if stage == 3:
        assert bucket == BUCKET * (2 if dtype == "bf16" else 4)
    weight = measured["size"].parameters * 2
    assert measured["resident"] == pytest.approx(role.total, rel=within, abs=weight * 0.4)
    gradients = size.trained * (2 if dtype == "bf16" else 4)
    if is_plain(config, ranks):
        gradients += 2 * 4 * size.largest  # of the tied embeddings, in two parts; the plan's passes count them
    backward = role.total + max(role.reduction, role.gathered + gradients)
    assert measured["backward"] == pytest.approx(backward, rel=within, abs=weight * 0.6)
    assert measured["step"] == pytest.approx(role.total + role.step, rel=within, abs=weight * 0.6)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("stage", [slow(1), 2, 3])
def test_one_rank_as_deepspeed_allocates(wide_model, stage, dtype):
    check(deepspeed_memory(str(wide_model), stage=stage, dtype=dtype), dtype, 1)


def planned(wide_model, measured, dtype, ranks, accumulation):
    """The role of what was measured, and bytes of its backward by the plan's own passes."""
    accumulates = accumulation > 1
    role = trained_memory(
        measured["size"], config=measured["config"], dtype=dtype, ranks=ranks, on_cpu=False, accumulates=accumulates
    )
    fake = fake_role(str(wide_model), dtype, "sdpa", LoraArguments(), classifier=False)
    passes = SequenceCosts(fake, 5, classifier=False).training(1, False)
    phases = training_phases("model", role, passes, 0, accumulates=accumulates)
    return role, max(sum(phase.parts.values()) for phase in phases[:2])


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_one_rank_in_bf16_sums_gradients_in_fp32_as_they_come(tmp_path, accumulation, tie):
    """The plan's own passes, to a hundredth of the model: a gradient that were kept in bf16 would show."""
    wide_model = save_wide_model(tmp_path, tie=tie)
    measured = deepspeed_memory(str(wide_model), stage=0, dtype="bf16", accumulation=accumulation)
    role, backward = planned(wide_model, measured, "bf16", 1, accumulation)
    exact = {"abs": measured["size"].parameters * 2 / 100}
    assert measured["resident"] == pytest.approx(role.total, **exact)
    assert measured["backward"] - measured["resident"] == pytest.approx(backward, **exact)
    norm = 8 * NORM_CHUNK  # 1 MiB for models of any size, which no plan counts
    assert measured["step"] - measured["resident"] == pytest.approx(role.step + norm, **exact)


@pytest.mark.parametrize(
    ("ranks", "dtype", "offload"),
    [(1, "fp32", False), (2, "fp32", False), (2, "bf16", False), slow(2, "fp32", True)],
)
def test_gradients_are_added_to_those_of_earlier_micro_batches_one_by_one(wide_model, rank_pair, ranks, dtype, offload):
    """To a hundredth of the model: gradients of a whole micro-batch beside the sum of the others would show."""
    settings = {"stage": 1, "dtype": dtype, "accumulation": 2, "offload": offload}
    if ranks == 1:
        measured = deepspeed_memory(str(wide_model), **settings)
    else:
        measured, _ = rank_pair.run(deepspeed_memory, str(wide_model), **settings)
    _, backward = planned(wide_model, measured, dtype, ranks, 2)
    exact = {"abs": measured["size"].parameters * 4 / 100}
    assert measured["backward"] - measured["resident"] == pytest.approx(backward, **exact)


@pytest.mark.parametrize(
    ("stage", "dtype"), [slow(1, "bf16"), (2, "bf16"), slow(3, "bf16"), slow(2, "fp32"), (3, "fp32")]
)
def test_two_ranks_as_deepspeed_allocates(wide_model, rank_pair, stage, dtype):
    first, _ = rank_pair.run(deepspeed_memory, str(wide_model), stage=stage, dtype=dtype, accumulation=2)
    check(first, dtype, 2, 2)


@pytest.mark.parametrize("stage", [slow(2), 3])
def test_offload_and_adapters_as_deepspeed_allocates(wide_model, stage):
    check(deepspeed_memory(str(wide_model), stage=stage, dtype="bf16", offload=True), "bf16", 1)
    check(
        deepspeed_memory(str(wide_model), stage=stage, dtype="bf16", lora=LoraArguments(8, only_optimize_lora=True)),
        "bf16",
        1,
    )
    check(deepspeed_memory(str(wide_model), stage=stage, dtype="bf16", lora=LoraArguments(8)), "bf16", 1)


def test_a_formula_without_the_moments_is_caught(wide_model):
    measured = deepspeed_memory(str(wide_model), stage=2, dtype="bf16")
    measured["size"] = RoleSize(measured["size"].parameters, measured["size"].trained // 2, measured["size"].largest)
    with pytest.raises(AssertionError):
        check(measured, "bf16", 1)


@pytest.mark.parametrize("stage", [slow(1), 2, 3])
@pytest.mark.parametrize("dtype", ["bf16", slow("fp32")])
def test_gradients_are_let_go_bucket_by_bucket(wide_model, rank_pair, stage, dtype):
    """With buckets that are a tenth of the model: from stage 2 on a large model's gradients are never all there."""
    measured, _ = rank_pair.run(deepspeed_memory, str(wide_model), stage=stage, dtype=dtype, bucket=BUCKET // 160)
    size, config = measured["size"], measured["config"]
    role = trained_memory(size, config=config, dtype=dtype, ranks=2, on_cpu=False)
    passes = SequenceCosts(
        fake_role(str(wide_model), dtype, "sdpa", LoraArguments(), classifier=False), 5, classifier=False
    ).training(1, False)
    backward = training_phases("model", role, passes, 0, accumulates=False)[0]
    planned, gradients = sum(backward.parts.values()), size.trained * BYTES[dtype]
    within = 0.35 if stage == 3 else 0.15  # at stage 3 the plan has the largest parameter gathered beside its gradient
    assert measured["backward"] - measured["resident"] == pytest.approx(planned, abs=within * gradients)
    assert ("gradients and buckets" in backward.parts) == (stage > 1)
