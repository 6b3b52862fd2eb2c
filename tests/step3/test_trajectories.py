"""Whole step-3 trajectories are the same however the work is cut: ranks, accumulation, ZeRO stage, hooks, order.

Five iterations of two epochs, in fp32, on recorded rollouts; losses agree to 1e-5. Each kind of test is shown to fail
on a mistake of its kind.
"""

from __future__ import annotations

import pytest

from tests.marks import slow
from tests.step3.trajectory_checks import record, replayed
from training.utils.generation import rollouts

LOSSES = ("policy/loss", "critic/loss", "reward/mean", "kl/per_token", "policy/entropy")


@pytest.fixture(scope="module")
def models(tiny_model, tiny_reward):
    return str(tiny_model), str(tiny_reward)


@pytest.fixture(scope="module")
def recorded(models):
    history, rows = record(*models)
    assert len({len(tokens) for tokens, _ in rows.values()}) > 1, "responses of one length would hide wrong means"
    assert len({round(m["policy/loss"], 4) for m in history}) == 5, "a trajectory that stands still proves nothing"
    return history, rows


def differences(one, two):
    """The largest difference of each loss over the iterations; of a loss above 1, as a share of it."""
    assert [m["rollout/tokens"] for m in one] == [m["rollout/tokens"] for m in two]
    pairs = list(zip(one, two, strict=True))
    return {name: max(abs(a[name] - b[name]) / max(1.0, abs(a[name])) for a, b in pairs) for name in LOSSES}


def assert_same(one, two, within=1e-5):
    found = differences(one, two)
    assert max(found.values()) <= within, found
    for a, b in zip(one, two, strict=True):
        for name in ("policy/grad_norm", "critic/grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-3), name


def timeless(history):
    return [{k: v for k, v in m.items() if not k.startswith(("time/", "share/"))} for m in history]


def test_a_replay_is_the_run_it_was_recorded_from(models, recorded):
    history, rows = recorded
    assert timeless(replayed(*models, rows, stage=0, micro_batch=8)) == timeless(history)


@pytest.mark.parametrize("fault", ["", "a step at every micro-batch"])
def test_accumulation(models, recorded, fault):
    history, rows = recorded
    other = replayed(*models, rows, stage=0, micro_batch=2, accumulation=4, fault=fault)
    if fault:
        assert max(differences(history, other).values()) > 1e-3
    else:
        assert_same(history, other)


@pytest.mark.parametrize("order", [1, slow(2)])
@pytest.mark.parametrize("fault", ["", "rows in another order"])
def test_order_of_the_samples(models, recorded, fault, order):
    history, rows = recorded
    other = replayed(*models, rows, stage=0, micro_batch=2, accumulation=4, order=order, fault=fault)
    if fault:
        assert max(differences(history, other).values()) > 1e-3
    else:
        assert_same(history, other)


@pytest.mark.parametrize(
    ("stage", "critic_stage", "micro_batch", "accumulation", "fault"),
    [
        slow(1, 1, 1, 4, ""),
        slow(2, 2, 2, 2, ""),
        (3, 3, 4, 1, ""),
        (1, 1, 4, 1, "each rank for itself"),
        slow(0, 0, 4, 1, ""),
        slow(2, 0, 4, 1, ""),
        slow(3, 1, 1, 4, ""),
        slow(2, 2, 4, 1, "a phantom optimizer step"),
    ],
)
def test_two_ranks_and_stages(models, recorded, rank_pair, stage, critic_stage, micro_batch, accumulation, fault):
    history, rows = recorded
    cut = {"stage": stage, "critic_stage": critic_stage, "micro_batch": micro_batch, "accumulation": accumulation}
    two, other = rank_pair.run(replayed, *models, rows, **cut, fault=fault)
    if fault:
        assert max(differences(history, two).values()) > 1e-3
    else:
        assert timeless(two) == timeless(other), "ranks disagree about the metrics"
        assert_same(history, two)


@pytest.mark.parametrize("stage", [slow(1), 2, slow(3)])
def test_stages_on_one_rank(models, recorded, stage):
    history, rows = recorded
    assert_same(history, replayed(*models, rows, stage=stage, micro_batch=8))


@pytest.mark.parametrize(("scored", "forwards"), [slow(0, 4), slow(3, 3), slow(8, 1), (100, 1)])
def test_rows_that_are_scored_together(models, recorded, monkeypatch, scored, forwards):
    """Each forward of the reward model is a pass over its weights; it scores eight rows five times."""
    history, rows = recorded
    calls = []
    last_token_scores = rollouts.last_token_scores
    monkeypatch.setattr(rollouts, "last_token_scores", lambda *args: calls.append(1) or last_token_scores(*args))
    other = replayed(*models, rows, stage=0, micro_batch=2, accumulation=4, scored=scored)
    assert_same(history, other)
    assert len(calls) == 5 * forwards
    assert other[0]["kl/per_token"] == 0
    assert other[0]["policy/first_ratio"] == pytest.approx(1, abs=0 if not scored else 1e-6)


def stale(history):
    """The largest mean difference between the sampler's log-probs and the engine's: is the twin the actor?"""
    return max(m["rollout/sampler_difference"] for m in history)


@pytest.mark.parametrize("lora", [slow(0), slow(4)])
def test_twin_and_hooks(models, recorded, rank_pair, lora):
    """Live: with the same policy both draw the same tokens, so the recording is only needed to compare with it."""
    cut = {"stage": 3, "micro_batch": 4, "lora": lora}
    twin, hooked = (rank_pair.run(replayed, *models, None, **cut, hooked=hooked)[0] for hooked in (False, True))
    assert_same(twin, hooked)
    assert max(stale(twin), stale(hooked)) < 1e-5
    if not lora:
        assert_same(recorded[0], hooked)


def test_a_twin_with_weights_of_its_own_is_caught(models):
    run = replayed(*models, None, stage=0, micro_batch=8, fault="a twin with weights of its own")
    assert run[0]["rollout/sampler_difference"] < 1e-5 and stale(run) > 1e-3
