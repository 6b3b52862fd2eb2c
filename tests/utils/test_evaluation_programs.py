"""Intervals, correlation, histogram and evaluation.json, against hand-computed figures."""

import json

import pytest

from training.step3_rlhf_finetuning import main as step3, settings
from training.utils import arguments, evaluation_programs
from training.utils.errors import UserError
from training.utils.run import folders
from training.utils.run.folders import step_folder


def test_an_earlier_evaluation_is_kept(tmp_path, capsys):
    for number in range(3):
        evaluation_programs.write_evaluation(tmp_path, {"number": number})
    found = {p.name: json.loads(p.read_text())["number"] for p in tmp_path.glob("*.json")}
    assert found == {"evaluation.json": 2, "evaluation-1.json": 0, "evaluation-2.json": 1}
    assert "evaluation-2.json" in capsys.readouterr().out


def test_the_runs_own_flags_come_from_its_manifest(tmp_path, monkeypatch):
    argv = ["--data_path", "x.jsonl", "--temperature", "0.7", "--per_device_train_batch_size", "4"]
    monkeypatch.setattr(arguments.importlib.util, "find_spec", lambda name: None)
    argv += ["--report_to", "wandb"]  # the run was made where that is installed
    (tmp_path / "manifest.json").write_text(json.dumps({"steps": {"step3": {"arguments": argv}}}))
    found = evaluation_programs.recorded_arguments(tmp_path / "step3", step3.ARGUMENTS, step3.OTHERS)
    assert found[settings.RolloutArguments].temperature == 0.7
    none, recorded = arguments.DataArguments(), found[arguments.DataArguments]
    assert evaluation_programs.data_arguments(none, recorded, tmp_path / "step3").data_path == ["x.jsonl"]
    templated = arguments.DataArguments(data_path=["x.jsonl"], chat_template="gone.jinja", system_message="Be brief.")
    own = evaluation_programs.data_arguments(none, templated, tmp_path / "step3")
    assert own == arguments.DataArguments(data_path=["x.jsonl"]), "the saved tokenizer carries the template"
    given = arguments.DataArguments(data_path=["y.jsonl"])
    assert evaluation_programs.data_arguments(given, recorded, tmp_path / "step1") is given
    with pytest.raises(UserError, match="step1 does not record its data: give --eval_data_path"):
        evaluation_programs.data_arguments(none, none, tmp_path / "step1")
    assert (
        evaluation_programs.recorded_arguments(tmp_path / "step1", step3.ARGUMENTS)[settings.RolloutArguments].top_p
        == 1
    )


def test_a_folder_with_a_bare_name_is_found_from_anywhere(tmp_path, monkeypatch):
    for folder in ("here/rows", "there/run", "there/none", "there/demo", "here/demo"):
        (tmp_path / folder).mkdir(parents=True)
    argv = ["--data_path", "rows", "run", "demo", "--eval_data_path=rows:3", "--data_split", "rows"]
    entry = {"arguments": argv, "folder": str(tmp_path / "here")}
    (tmp_path / "there" / "manifest.json").write_text(json.dumps({"steps": {"step3": entry}}))
    monkeypatch.chdir(tmp_path / "there")
    monkeypatch.setattr(arguments, "shares_of", lambda text: None)  # what names no input stays as it is
    found = evaluation_programs.recorded_arguments(tmp_path / "there" / "step3", step3.ARGUMENTS, step3.OTHERS)
    data = found[arguments.DataArguments]
    assert data.data_path == [str(tmp_path / "here" / "rows"), "run", "demo"]
    assert (data.eval_data_path, data.data_split) == ([f"{tmp_path}/here/rows:3"], "rows")


def test_an_unfinished_step_is_refused(tmp_path):
    with pytest.raises(UserError, match="has not finished"):
        step_folder(str(tmp_path), "step2")
    with pytest.raises(UserError, match="no such folder"):
        step_folder(str(tmp_path / "none"), "step2")


@pytest.mark.parametrize(
    ("key", "title"),
    [("perplexity_after", "step 1"), ("verdicts", "step 2"), ("loss_kind", "DPO"), ("reward_after", "step 3")],
)
def test_another_steps_output_is_refused_with_its_program(tmp_path, key, title):
    (tmp_path / "summary.json").write_text(json.dumps({key: 0}))
    for step in ("step1", "step2", "dpo", "step3"):
        if folders.SAYS[step] == key:
            assert step_folder(str(tmp_path), step) == tmp_path
            continue
        with pytest.raises(UserError, match=f"an output of {title}, not of .*; give it to training/.*/evaluate.py"):
            step_folder(str(tmp_path), step)


def test_table():
    rows = [["", "a", "interval"], ["model", 0.12345, [0.1, 0.2]], ["other", 3, None]]
    assert evaluation_programs.table(rows).splitlines() == [
        "           a        interval",
        "model  0.123  [0.100, 0.200]",
        "other      3                ",
    ]
