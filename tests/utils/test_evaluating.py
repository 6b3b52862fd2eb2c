"""Intervals, correlation, histogram and evaluation.json, against hand-computed figures."""

import json

import pytest

from training.step3_rlhf_finetuning import main as step3, settings
from training.utils import arguments, evaluating
from training.utils.errors import UserError
from training.utils.runs import step_folder


def test_wilson_interval():
    # Brown, Cai and DasGupta 2001's way of writing it, at 8 of 10: (8 + 1.92) / 13.84 +- 1.96 / 13.84 * sqrt(2.5604)
    assert evaluating.wilson_interval(0.8, 10) == pytest.approx([0.4902, 0.9433], abs=1e-4)
    low, high = evaluating.wilson_interval(1.0, 10)
    assert (low, high) == (pytest.approx(10 / (10 + 1.959964**2)), pytest.approx(1.0))


def test_bootstrap_interval_of_a_mean_and_of_a_ratio():
    assert evaluating.bootstrap_interval([2.0] * 9, seed=0) == [2.0, 2.0]
    low, high = evaluating.bootstrap_interval([0.0] * 50 + [1.0] * 50, seed=0)
    assert (low, high) == (pytest.approx(0.4, abs=0.02), pytest.approx(0.6, abs=0.02))  # 0.5 +- 1.96 * 0.05
    # every row has a mean of 3 a token, so every resample has, however the lengths differ
    assert evaluating.bootstrap_interval([3.0, 30.0, 300.0], [1, 10, 100], seed=0) == pytest.approx([3.0, 3.0])


def test_correlation():
    assert evaluating.correlation([1, 2, 3], [2, 4, 6]) == pytest.approx(1)
    assert evaluating.correlation([1, 2, 3], [1, -2, 1]) == pytest.approx(0)
    assert evaluating.correlation([0, 0, 3], [1, 2, 1.5]) == pytest.approx(0)
    assert evaluating.correlation([1, 1], [1, 2]) == 0


def test_histogram():
    assert evaluating.histogram([0, 1, 2, 4, 4], bins=4) == {"edges": [0, 1, 2, 3, 4], "counts": [1, 1, 1, 2]}
    assert sum(evaluating.histogram([5, 5], bins=3)["counts"]) == 2


def test_an_earlier_evaluation_is_kept(tmp_path, capsys):
    for number in range(3):
        evaluating.write_evaluation(tmp_path, {"number": number})
    found = {p.name: json.loads(p.read_text())["number"] for p in tmp_path.glob("*.json")}
    assert found == {"evaluation.json": 2, "evaluation-1.json": 0, "evaluation-2.json": 1}
    assert "evaluation-2.json" in capsys.readouterr().out


def test_the_runs_own_flags_come_from_its_manifest(tmp_path):
    argv = ["--data_path", "x.jsonl", "--temperature", "0.7", "--per_device_train_batch_size", "4"]
    (tmp_path / "manifest.json").write_text(json.dumps({"steps": {"step3": {"arguments": argv}}}))
    found = evaluating.recorded_arguments(tmp_path / "step3", step3.ARGUMENTS, arguments.ALIASES)
    assert found[settings.RolloutArguments].temperature == 0.7
    assert evaluating.data_arguments(arguments.DataArguments(), found[arguments.DataArguments]).data_path == ["x.jsonl"]
    templated = arguments.DataArguments(data_path=["x.jsonl"], chat_template="gone.jinja", system_message="Be brief.")
    own = evaluating.data_arguments(arguments.DataArguments(), templated)  # the saved tokenizer carries the template
    assert own == arguments.DataArguments(data_path=["x.jsonl"])
    given = arguments.DataArguments(data_path=["y.jsonl"])
    assert evaluating.data_arguments(given, found[arguments.DataArguments]) is given
    assert evaluating.recorded_arguments(tmp_path / "step1", step3.ARGUMENTS)[settings.RolloutArguments].top_p == 1


def test_an_unfinished_step_is_refused(tmp_path):
    with pytest.raises(UserError, match="has not finished"):
        step_folder(str(tmp_path), "step2")
    with pytest.raises(UserError, match="no such folder"):
        step_folder(str(tmp_path / "none"), "step2")


def test_table():
    rows = [["", "a", "interval"], ["model", 0.12345, [0.1, 0.2]], ["other", 3, None]]
    assert evaluating.table(rows).splitlines() == [
        "           a        interval",
        "model  0.123  [0.100, 0.200]",
        "other      3                ",
    ]
