"""The health monitor on typed-in histories: it speaks when it should and is silent otherwise."""

import dataclasses
import json
import math
import re

import pytest

from training.step3_rlhf_finetuning import main
from training.utils import health_rules
from training.utils.health import HealthMonitor, not_rising
from training.utils.health_rules import MAX_KL

# Of a demo run that went well (seed 1234, 18 iterations): metrics.jsonl, rounded
DEMO = {
    "reward/mean": "-3.5 -3.9 -3.5 -3.6 -2.9 -2.1 -2.6 -1.7 -2.4 -2.4 -1.5 -.6 -.3 -.5 .05 -.2 -.5 -.3",
    "reward/rms": "4.1 4.3 4.5 4.2 3.5 3.4 3.8 3.4 3.5 3.2 2.4 1.9 2.5 2 1.1 1.9 2.4 1.8",
    "reward/std": "1.5 1.2 1.7 1.6 1.8 2.3 2.4 2.5 2.2 2.1 1.8 1.7 2.5 1.9 1.1 1.7 2.3 1.6",
    "reward/clipped_share": "0 " * 18,
    "reward/score": "-3.9 -4.07 -4.29 -4.03 -3.09 -2.75 -3.43 -2.52 -2.9 -2.6 -1.7 -.8 -1 -.7 .05 -.4 -1 -.44",
    "reward/score_std": "1.76 1.4 2.08 1.94 2.03 2.63 2.68 2.75 2.5 2.38 2.12 1.93 2.75 2.18 1.15 1.96 2.59 1.87",
    "kl/per_sequence": "0 .04 .23 .43 .88 4.58 4.78 6.09 7.1 6.33 7.12 10.2 11.7 13.7 11.9 11.5 13.5 10.8",
    "policy/entropy": "1.7 1.72 1.71 1.71 1.75 1.77 1.67 1.75 1.71 1.72 1.68 1.63 1.67 1.52 1.54 1.51 1.44 1.54",
    "rollout/length": "26.8 22 28.6 21.8 22 31.2 31 29.6 29.1 24.4 28.1 25.9 27.9 26 21.7 25 28.2 21.8",
    "rollout/eos_rate": ".92 .96 .79 .88 .96 .83 .79 .83 .88 .96 .96 .96 .83 .96 1 .96 .88 .96",
    "policy/clip_fraction": "0 .002 .015 .013 .01 .019 .005 .011 .003 .022 .006 .008 .005 .003 .01 .005 .002 .006",
    "policy/approx_kl": "0 .001 .003 .002 .002 .002 .001 .002 .001 .002 .001 .001 .001 .001 .002 .001 .001 .001",
    "policy/loss": "0 .001 0 -.005 -.006 -.003 -.002 -.001 -.002 -.006 .002 0 -.002 0 -.004 -.001 .001 0",
    "policy/first_ratio": "1 " * 18,
    "policy/skipped_steps": "0 " * 18,
    "critic/explained_variance": ".01 -.12 .01 -.03 .01 .05 .04 .09 .14 .03 .11 -.07 .14 .13 -.03 -.12 .2 .03",
    "rollout/sampler_difference": "0.045 " * 18,
}


def demo(**changes):
    """The healthy history with one metric replaced (underscores as __ for the slash) by 18 values or one."""
    columns = {name: [float(v) for v in values.split()] for name, values in DEMO.items()}
    for name, values in changes.items():
        columns[name.replace("__", "/")] = list(values) if isinstance(values, (list, tuple)) else [values] * 18
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def remarks(history):
    monitor = HealthMonitor()
    for step, metrics in enumerate(history, 1):
        monitor.observe(step, metrics)
    return monitor.remarks


def warnings(history):
    return [r for r in remarks(history) if r.level == health_rules.WARNING]


def test_a_healthy_history_gets_one_explanation_and_no_warning():
    found = remarks(demo())
    assert [(r.step, r.level, r.metric) for r in found] == [(3, "note", "reward/mean")]
    assert remarks(demo(reward__mean=[0.1 * i for i in range(18)])) == []


# The four questions that ColossalChat's users ask
def test_a_negative_reward_is_explained_once():
    (note,) = [r for r in remarks(demo()) if r.metric == "reward/mean"]
    assert "negative (-3.50), which is normal" in note.text
    # with functions, or --no-normalize_reward, 0 is anything
    assert "depends on the rewards" in note.text and "normal: 0 is" not in note.text


def test_four_pairs_whose_statistics_flatten_every_reward():
    """Rewards of -28 under a clip of 5: all are alike, and only the EOS penalty tells answers apart."""
    history = demo(
        reward__mean=-28.0, reward__rms=28.3, reward__std=0.0, reward__clipped_share=1.0, reward__score_std=0.5,
        reward__score=[-5.5 + 0.03 * i for i in range(18)],
    )  # fmt: skip
    found = remarks(history[:3])
    assert [(r.step, r.level, r.metric) for r in found] == [
        (1, "warning", "reward/rms"),
        (1, "warning", "reward/clipped_share"),
        (2, "warning", "reward/rms"),
        (2, "warning", "reward/clipped_share"),
        (3, "warning", "reward/std"),
    ], "nothing about it is normal"
    texts = {r.metric: r.text for r in found}
    assert "28 standard deviations of reward_stats.json" in texts["reward/rms"]
    assert "100% of the rewards" in texts["reward/clipped_share"] and "--clip_reward" in texts["reward/clipped_share"]
    assert not [r for r in remarks(history) if r.level == health_rules.NOTE]


def test_a_penalty_does_not_hide_that_all_rewards_are_the_same():
    assert {r.metric for r in warnings(demo(reward__std=0.0))} == {"reward/std"}
    assert warnings(demo(reward__score_std=0.0)) == []


def test_half_of_the_rewards_may_lie_beyond_the_clip():
    assert warnings(demo(reward__clipped_share=0.5)) == []
    assert {r.metric for r in warnings(demo(reward__clipped_share=0.51))} == {"reward/clipped_share"}


def test_a_negative_actor_loss_is_explained_once():
    (note,) = [r for r in remarks(demo(policy__loss=-0.05)) if r.metric == "policy/loss"]
    assert (note.level, note.step) == ("note", 3)
    assert "normal" in note.text


def test_a_reward_that_does_not_rise():
    found = warnings(demo(reward__score=[1.0, 1.2, 0.9] * 6))
    assert [(r.step, r.metric) for r in found] == [(9, "reward/score"), (18, "reward/score")]
    assert "not risen in 9 iterations" in found[0].text
    falling = warnings(demo(reward__score=[-0.1 * i for i in range(18)]))
    assert "(-0.25 in the first third, -1.45 in the last)" in falling[1].text


@pytest.mark.parametrize(
    ("metric", "values", "words"),
    [
        ("kl__per_sequence", [3.0 * i for i in range(18)], "garbage"),
        ("policy__entropy", [1.7] * 6 + [4.5] * 12, "garbage"),
        ("policy__entropy", [1.7] * 6 + [0.2] * 12, "all the same"),
    ],
)
def test_garbage_output(metric, values, words):
    found = warnings(demo(**{metric: values}))
    assert found and all(words in r.text for r in found)


@pytest.mark.parametrize(
    ("metric", "value", "step", "text"),
    [
        ("policy__clip_fraction", 0.46, 3, "ratio clipped 46% for 3 iterations: halve --actor_learning_rate"),
        ("rollout__eos_rate", 0.0, 3, "0% of responses end with EOS for 3 iterations: raise --max_answer_seq_len or "),
        ("policy__approx_kl", 0.5, 3, "--target_kl"),
        ("policy__first_ratio", 1.2, 1, "not 1"),
        ("policy__skipped_steps", 2.0, 1, "2 steps of the actor"),
        ("rollout__sampler_difference", 0.3, 3, "--rollout_engine hf"),
        ("reward__std", 0.0, 3, "nothing to learn from; "),
        ("reward__rms", 28.0, 1, "--eval_data_path"),
        ("critic__explained_variance", -0.9, 5, "--critic_learning_rate"),
        ("policy__approx_kl", math.nan, 3, "nan"),
        ("rollout__length", [26.0] * 6 + [9.0] * 12, 9, "shrank from 26 to 9"),
        ("rollout__length", [26.0] * 6 + [90.0] * 12, 9, "grew from 26 to 90"),
    ],
)
def test_each_range_speaks_when_it_is_left(metric, value, step, text):
    found = warnings(demo(**{metric: value}))
    assert {r.metric for r in found} == {metric.replace("__", "/")}
    assert found[0].step == step
    assert text in found[0].text


def test_a_remark_comes_again_when_its_streak_has_doubled_and_a_break_starts_over():
    assert [r.step for r in warnings(demo(policy__clip_fraction=0.46))] == [3, 6, 12]
    assert "for 12 iterations" in warnings(demo(policy__clip_fraction=0.46))[-1].text
    assert warnings(demo(policy__clip_fraction=[0.46, 0.46, 0.1] * 6)) == []


def test_held_out_evaluations():
    def evaluation(reward, kl, high, function, error=0.03):
        function = {"eval/content/mean": function, "eval/content/error": error, "eval/manner/mean": 1.0 + reward,
                    "eval/manner/error": 0.0}  # fmt: skip
        return {"eval/reward": reward, "eval/kl": kl, "eval/win_rate_high": high, **function}

    good = [evaluation(0.1, 0.0, 0.6, 0.7), evaluation(0.5, 5.0, 0.9, 0.8), evaluation(0.6, 9.0, 0.9, 0.78)]
    assert remarks(good) == []
    (exploited,) = remarks([*good, evaluation(0.9, 12.0, 0.9, 0.5)])
    assert exploited.metric == "eval/content/mean"
    assert "--eval_function content falls (0.80 -> 0.50): the reward model is being exploited" in exploited.text
    assert remarks([evaluation(0.1, 1.0, 0.9, 100.0, 3.0), evaluation(0.5, 2.0, 0.9, 99.9, 3.0)]) == []  # on any scale
    (lost,) = remarks([evaluation(0.1, 1.0, 0.3, 0.7)])
    assert "loses to the SFT model" in lost.text
    (far,) = remarks([evaluation(0.1, MAX_KL + 1, 0.9, 0.7)])
    assert "this actor is not kept" in far.text


def test_remarks_are_written_as_they_come(tmp_path, capsys):
    monitor = HealthMonitor(tmp_path)
    assert (tmp_path / "health.jsonl").read_text() == ""
    for step, metrics in enumerate(demo(rollout__eos_rate=0.0), 1):
        monitor.observe(step, metrics)
    records = [json.loads(line) for line in (tmp_path / "health.jsonl").read_text().splitlines()]
    assert records == [dataclasses.asdict(r) for r in monitor.remarks]
    assert set(records[0]) == {"step", "level", "metric", "value", "text"}
    assert "[3] warning: 0% of responses end with EOS" in capsys.readouterr().out


def test_advice_names_flags_that_exist():
    flags = {f"--{f.name}" for group in main.ARGUMENTS for f in dataclasses.fields(group)}
    texts = [rule.text for rule in health_rules.RULES] + [text for *_, text in health_rules.DRIFTS]
    texts += [r.text for r in warnings(demo(reward__score=1.0))]
    named = {flag.replace("--no-", "--") for text in texts for flag in re.findall(r"--[\w-]+", text)}
    assert len(named) > 8
    assert named <= flags


def test_not_rising_needs_nine_values_and_more_than_noise():
    assert not_rising([1.0] * 8) is None
    assert not_rising([1.0] * 9) == (1.0, 1.0)
    assert not_rising([0, 0, 0, 0, 0, 0, 1, 1, 1]) is None
    assert not_rising([0, 4, -4, 0, 0, 0, 0.1, 4.1, -3.9]) == pytest.approx((0, 0.1))
