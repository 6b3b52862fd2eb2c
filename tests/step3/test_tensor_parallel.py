"""Step 3 whose models two ranks hold together: decoding in step, the frozen roles, and PPO, as on one rank."""

import pytest

from tests.marks import slow
from tests.rank_pair import RankPair
from tests.step3.hybrid_checks import early_twin, save_tiny_reward_model, trajectory, trajectory_divided
from tests.tiny import save_tiny_model
from training.step3_rlhf_finetuning.arguments import OptimizationArguments, PPOArguments, RolloutArguments
from training.step3_rlhf_finetuning.settings import batches_of_all_ranks, steps_per_iteration
from training.utils.run import distributed

# Losses, rewards and KL of iterations whose tokens are sampled; times and what follows from them left out
COMPARED = ("policy/", "critic/", "reward/", "kl/", "rollout/length", "optim/")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    actor = str(save_tiny_model(folder / "untied", tie=False))
    return actor, str(save_tiny_reward_model(actor, folder / "reward"))


@pytest.fixture(scope="module")
def one_rank(models):
    return trajectory(*models, stage=0, micro_batch=8)


def worst(one, other):
    """The largest relative difference of any compared metric, and its name."""
    found = []
    for a, b in zip(one, other, strict=True):
        names = [name for name in a if name.startswith(COMPARED) and not name.endswith("seconds")]
        assert names and a.keys() == b.keys()
        found += [(abs(a[n] - b[n]) / max(abs(a[n]), 1.0), n) for n in names]
    return max(found)


@pytest.mark.parametrize(("stage", "engine"), [slow(1, "fast"), (3, "fast"), slow(2, "hf"), slow(0, "hf")])
def test_ppo_equals_one_rank(models, one_rank, rank_pair, stage, engine):
    expected = one_rank if engine == "fast" else trajectory(*models, stage=0, micro_batch=8, engine=engine)
    first, second = rank_pair.run(trajectory_divided, 2, *models, stage=stage, micro_batch=8, engine=engine)
    assert worst(expected, first)[0] < 2e-4, worst(expected, first)
    assert worst(first, second)[0] == 0, "ranks disagree about the metrics"
    assert max(metrics["rollout/sampler_difference"] for metrics in first) < 1e-5
    assert [metrics["policy/first_ratio"] for metrics in first] == [1.0] * len(first)


@pytest.mark.slow
def test_two_groups_of_two(models, one_rank):
    """Four ranks, each group with half of the prompts."""
    four = RankPair(4)
    try:
        for stage in (1, 3):
            found = four.run(trajectory_divided, 2, *models, stage=stage, micro_batch=4)
            assert worst(one_rank, found[0])[0] < 2e-4, worst(one_rank, found[0])
            assert all(worst(found[0], other)[0] == 0 for other in found)
    finally:
        four.close()


def test_the_buffer_of_an_iteration_is_that_of_all_groups(monkeypatch):
    """ColossalChat's identity: groups x collected x rows = rows of a step x accumulation x groups, over its steps."""
    monkeypatch.setattr(distributed, "world_size", lambda: 8)
    rollout = RolloutArguments(per_device_generation_batch_size=16, generation_batches=3)
    train = OptimizationArguments(per_device_training_batch_size=4, gradient_accumulation_steps=2)
    monkeypatch.setattr(distributed, "_sharing", 4)
    batches = batches_of_all_ranks(rollout, train, distributed.data_size())
    groups, steps = 8 // 4, steps_per_iteration(PPOArguments(), rollout, train)
    assert batches == {"responses per iteration": groups * 3 * 16, "rows per step": 4 * 2 * groups}
    assert batches["responses per iteration"] == steps * batches["rows per step"]


def test_a_twin_made_before_the_layers_are_cut_is_another_model(models, rank_pair):
    """Why `HybridEngine` has none: its layers would use their part of the weights without the sums over ranks."""
    first, second = rank_pair.run(early_twin, models[0], 1)
    (module, twin), (of_other_rank, _) = first, second
    assert module == of_other_rank != twin
