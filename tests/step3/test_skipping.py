"""A reward or a gradient that is not finite: the minibatch is left out on all ranks alike, ten in a row end the run."""

import json

import pytest
import torch

from tests.glossary import glossary
from tests.step3.hybrid_checks import build, prompts, request, reward_settings, scoring
from training.step3_rlhf_finetuning import experience, main as step3, ppo, ppo_trainer
from training.step3_rlhf_finetuning.ppo_trainer import PPOTrainer
from training.step3_rlhf_finetuning.reward_sources import RewardMix, TokenReward
from training.step3_rlhf_finetuning.roles import Roles, build_actor, build_critic
from training.utils.engine.engine import MAX_SKIPPED, SkipGuard
from training.utils.errors import RunStopped
from training.utils.generation.engines import rollout_backend
from training.utils.generation.sampling import SamplingConfig
from training.utils.model.export import full_state_dict
from training.utils.run.distributed import rank, world_size


class Faulty(torch.nn.Module):
    """Scores tokens by their number; a row whose first token is in ``bad`` gets NaN."""

    def __init__(self, bad):
        super().__init__()
        self.bad = torch.tensor(list(bad))

    def forward(self, input_ids, attention_mask):
        scores = (input_ids % 7).float()
        first = input_ids.gather(1, attention_mask.argmax(1, keepdim=True))
        return scores.masked_fill(torch.isin(first, self.bad), float("nan"))


def one_iteration(actor, reward, *, bad_prompts=(), nan_loss_on=None, of="policy", stage=2, rows=range(8), **changes):
    """Some of eight rows, divided over the ranks; the prompts of that number get NaN, or rank ``nan_loss_on`` a NaN
    loss of the ``policy`` or of the ``value``."""
    made = build(stage, 1e-3)
    torch.manual_seed(0)
    everything = prompts(8)
    scorer = Faulty(everything[i][0] for i in bad_prompts)
    gae = changes.get("advantage", "gae") == "gae"
    roles = Roles(
        build_actor(actor, made),
        build_critic(actor, reward_settings(reward), made) if gae else None,
        RewardMix([TokenReward(scorer)]),
    )
    trainer = PPOTrainer(roles, scoring(roles, **changes), rollout_backend("fast"), SamplingConfig(5), "fp32")
    before = {name: t.clone() for name, t in full_state_dict(roles.actor.engine).items()}
    mine = list(rows)[rank() * len(rows) // world_size() : (rank() + 1) * len(rows) // world_size()]
    policy_loss, value_loss = ppo.policy_loss, ppo.value_loss
    if nan_loss_on == rank() and of == "policy":
        ppo_trainer.ppo.policy_loss = lambda *a, **k: (policy_loss(*a, **k)[0] * float("nan"), policy_loss(*a, **k)[1])
    if nan_loss_on == rank() and of == "value":
        ppo_trainer.ppo.value_loss = lambda *a, **k: value_loss(*a, **k) * float("nan")
    try:
        metrics = trainer.iteration([request([everything[i] for i in mine], mine)], 0)
    finally:
        ppo_trainer.ppo.policy_loss, ppo_trainer.ppo.value_loss = policy_loss, value_loss
    after = full_state_dict(roles.actor.engine)
    moved = [name for name, t in after.items() if not torch.equal(t, before[name])]
    finite = all(t.isfinite().all() for t in after.values())
    schedule = roles.actor.engine.lr_scheduler.last_epoch
    found = [tensor for b in trainer.scored for tensor in (b.experience.values, b.experience.log_probs)]
    shown = sum(int((~tensor.isfinite()).sum()) for tensor in found)
    return {"metrics": metrics, "moved": bool(moved), "finite": finite, "schedule": schedule, "shown": shown}


@pytest.fixture(scope="module")
def reward(tiny_reward):
    return str(tiny_reward)


def test_a_bad_reward_costs_its_minibatch_alone(tiny_model, reward):
    result = one_iteration(str(tiny_model), reward, bad_prompts=[3])
    metrics = result["metrics"]
    assert (metrics["reward/not_finite"], metrics["ppo/skipped"], metrics["ppo/optimizer_steps"]) == (1, 1, 4)
    assert result["moved"] and result["finite"]
    assert result["schedule"] == 3, "the learning rate moves on with steps that were made, as the glossary says"
    assert all(torch.tensor(value).isfinite() for value in metrics.values())
    without = one_iteration(str(tiny_model), reward)["metrics"]
    assert (without["reward/not_finite"], without["ppo/skipped"]) == (0, 0)


def test_means_over_tokens_are_over_the_rows_that_are_finite(tiny_model, reward):
    """Half the rows left out must not look like half the entropy."""
    all_but_one = one_iteration(str(tiny_model), reward, bad_prompts=range(1, 8), importance_cap=0.5)["metrics"]
    alone = one_iteration(str(tiny_model), reward, rows=[0], importance_cap=0.5)["metrics"]
    for name in ("policy/entropy", "kl/per_token", "rollout/importance", "rollout/capped"):
        assert all_but_one[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("scored", ["score_values", "score_log_probs"])
@pytest.mark.parametrize("whiten", [True, False])
def test_a_bad_value_or_log_prob_costs_its_minibatch_alone(tiny_model, reward, monkeypatch, scored, whiten):
    """Whitening sums over all rows, so one NaN must not get into it."""
    whole = getattr(experience, scored)

    def spoilt(*args, **kwargs):
        found = whole(*args, **kwargs)
        first = found[0] if isinstance(found, tuple) else found
        first[3, 0] = float("nan")
        return found

    monkeypatch.setattr(experience, scored, spoilt)
    result = one_iteration(str(tiny_model), reward, whiten_advantages=whiten)
    metrics = result["metrics"]
    assert result["shown"] == 1, "--trace shows what was not finite"
    assert (metrics["reward/not_finite"], metrics["ppo/skipped"], metrics["ppo/optimizer_steps"]) == (1, 1, 4)
    assert result["moved"] and result["finite"]
    assert all(torch.tensor(value).isfinite() for value in metrics.values())


def test_a_resumed_run_goes_on_counting():
    guard = SkipGuard()
    for _ in range(MAX_SKIPPED - 1):
        guard.count(["rewards"])
    resumed = SkipGuard(guard.in_a_row)
    resumed.count(["rewards"])
    assert resumed.reason.startswith("10 optimizer steps in a row")
    resumed = SkipGuard(guard.in_a_row)
    resumed.count([])
    resumed.count(["rewards"])
    assert not resumed.reason


def test_two_ranks_skip_the_same_minibatch(tiny_model, reward, rank_pair):
    """Prompt 6 is rank 1's third row: the second of two common minibatches."""
    for stage in (2, 3):
        one, two = rank_pair.run(one_iteration, str(tiny_model), reward, bad_prompts=[6], stage=stage)
        assert (one["metrics"]["ppo/skipped"], one["metrics"]["ppo/optimizer_steps"]) == (1, 2)
        timeless = [{k: v for k, v in r["metrics"].items() if k[:4] not in ("time", "shar")} for r in (one, two)]
        assert timeless[0] == timeless[1]
        assert one["finite"]


def test_nothing_but_bad_rewards_changes_nothing(tiny_model, reward):
    result = one_iteration(str(tiny_model), reward, bad_prompts=range(8))
    assert result["metrics"]["ppo/skipped"] == 4 and not result["moved"]


def test_a_bad_reward_spoils_its_siblings(tiny_model, reward):
    """Without a critic an answer is judged against the others to its prompt."""
    result = one_iteration(str(tiny_model), reward, bad_prompts=[1], advantage="rloo", samples_per_prompt=4)
    assert result["metrics"]["ppo/skipped"] == 2  # rows 0 to 3: two minibatches
    assert ppo.whole_groups(torch.tensor([True, False, True]), torch.tensor([0, 0, 1])).tolist() == [False, False, True]


def test_a_nan_loss_on_one_rank_skips_both(tiny_model, reward, rank_pair):
    for result in rank_pair.run(one_iteration, str(tiny_model), reward, nan_loss_on=1):
        assert result["metrics"]["ppo/skipped"] == result["metrics"]["ppo/optimizer_steps"] == 2
        assert result["metrics"]["policy/skipped_steps"] == 2
        assert result["finite"] and not result["moved"]


def test_a_critic_that_does_not_learn_is_counted_though_the_actor_does(tiny_model, reward, rank_pair):
    results = rank_pair.run(one_iteration, str(tiny_model), reward, nan_loss_on=1, of="value")
    for result in results:
        metrics = result["metrics"]
        assert (metrics["ppo/skipped"], metrics["critic/skipped_steps"], metrics["policy/skipped_steps"]) == (2, 2, 0)
        assert result["finite"] and result["schedule"] == 2
    assert results[0]["moved"], "rank 0 has the whole weights"
    assert "the actor, the critic or both" in glossary(3)["ppo/skipped"][0]


def test_ten_in_a_row():
    guard = SkipGuard()
    for i in range(3 * MAX_SKIPPED):
        guard.count(["rewards"] if i % MAX_SKIPPED else [])
    assert not guard.reason
    for _ in range(MAX_SKIPPED):
        guard.count(["rewards that are not finite", "noise"])
    assert guard.reason.startswith("10 optimizer steps in a row were skipped")
    assert guard.reason.endswith("rewards that are not finite and noise")


def test_ten_in_a_row_end_the_run_with_a_checkpoint_and_the_reason(
    tiny_model, reward, tiny_data, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        TokenReward, "score", lambda self, rollout, *_: torch.full((len(rollout.input_ids),), float("inf"))
    )
    flags = [
        *("--actor_model_name_or_path", str(tiny_model), "--critic_model_name_or_path", reward),
        *("--data_path", str(tiny_data / "prompts.jsonl"), "--eval_data_path", str(tiny_data / "held_out.jsonl")),
        *("--output_dir", str(tmp_path / "out"), "--dtype", "fp32", "--report_to", "none", "--num_iterations", "9"),
        *("--per_device_generation_batch_size", "4", "--per_device_training_batch_size", "1"),
        *("--max_prompt_seq_len", "128", "--max_answer_seq_len", "6", "--eval_every", "0"),
    ]
    with pytest.raises(RunStopped, match="10 optimizer steps in a row.*that are not finite") as stopped:
        step3.main(flags)
    assert stopped.value.code == 1 and "to go on:" in str(stopped.value)
    assert (tmp_path / "out" / "checkpoints" / "step-00000003" / "index.json").is_file()
    last = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["step"], last["ppo/skipped"]) == (3, 2)  # 4 + 4 + 2
