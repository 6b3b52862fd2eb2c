"""The demo's rows train and judge what they are for, and nothing else unasked: every program that takes data."""

import json

import pytest

from tests.bad_inputs import STEPS
from tests.tiny import tiny_tokenizer
from training.migrate.predecessors import others_of
from training.step3_rlhf_finetuning import arguments as step3
from training.utils import arguments
from training.utils.arguments import DataArguments
from training.utils.data.prepare import prepare_data
from training.utils.errors import UserError
from training.utils.run import demo

GROUPS = {1: arguments.STEP1, 2: arguments.STEP2, 3: step3.ARGUMENTS}
NAMED = {
    1: ["--model_name_or_path"],
    2: ["--model_name_or_path"],
    3: ["--actor_model_name_or_path", "--critic_model_name_or_path"],
}


def parsed(step, *argv):
    return arguments.parse(GROUPS[step], argv, prog="", description="", others=others_of(f"step{step}"))


def finished(root, run, step, argv):
    """A step's finished output, which records how it was started."""
    folder = root / run / step
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({"run_with": {"arguments": argv, "folder": "."}} if argv else {}))
    return folder


@pytest.fixture(autouse=True)
def output(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIPOD_OUTPUT", str(tmp_path / "output"))
    return tmp_path / "output"


@pytest.mark.parametrize(("step", "flag"), [(step, flag) for step, flags in NAMED.items() for flag in flags])
def test_a_named_model_needs_named_data(step, flag, output):
    own = finished(output, "a", "step1", ["--data_path", "mine.jsonl"])
    of_demo = finished(output, "b", "step1", ["--model_name_or_path", "embedded"])
    of_part = finished(output, "c", "step1", ["--data_path", "demo:20", "--seed", "1"])
    of_sft = finished(output, "d", "step1", ["--sft_only_data_path", "mine.jsonl"])
    dashed = finished(output, "f", "step1", ["--data-path", "mine.jsonl"])
    not_known = finished(output, "e", "step1", [])
    (of_demo / "actor").mkdir()
    for model in ("hub/name", own, of_sft, dashed, not_known):
        with pytest.raises(UserError, match=f"{flag} .*: name the data too, --data_path FILE; --data_path demo"):
            demo.check_training_data(parsed(step, flag, str(model)))
        demo.check_training_data(parsed(step, flag, str(model), "--data_path", "demo"))
        demo.check_training_data(parsed(step, flag, str(model), "--plan"))
    for model in ("embedded", of_demo, of_part, of_demo / "actor"):
        demo.check_training_data(parsed(step, flag, str(model)))


def test_a_latest_model_of_own_data_needs_named_data(output):
    demo.check_training_data(parsed(2))
    demo.check_training_data(parsed(3))
    finished(output, "a", "step1", [])
    demo.check_training_data(parsed(2))
    finished(output, "b", "step1", ["--data_path", "mine.jsonl"])
    demo.check_training_data(parsed(1))
    for step in (2, 3):
        with pytest.raises(UserError, match="the latest step 1, .*b/step1: name the data too"):
            demo.check_training_data(parsed(step))


def test_the_manifest_of_train_py_is_read_too(output):
    folder = finished(output, "a", "step2", [])
    for argv, known in ((["--data_path", "demo:240"], True), (["--data_path", "x.csv", "demo"], False)):
        (folder.parent / "manifest.json").write_text(json.dumps({"steps": {"step2": {"arguments": argv}}}))
        assert demo.trained_on_demo(folder) is known


def test_sft_only_data_train_and_judge_alone(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": [{**turns[0], "content": f"question {i}"}, turns[1]]} for i in range(20)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"max_length": 256, "seed": 1, "sft_only_data_path": [str(tmp_path / "mine.jsonl")]}
    flags = DataArguments(data_output_path=str(tmp_path / "cache"))
    made = prepare_data("demonstrations", flags, tiny_tokenizer(), **common)
    assert (len(made.train), len(made.held_out)) == (18, 2)
    assert {*made.train["source"], *made.held_out["source"]} == {str(tmp_path / "mine.jsonl")}
    flags = DataArguments(data_path=["demo:30"], eval_data_path=["demo:5"], data_output_path=str(tmp_path / "cache"))
    both = prepare_data("demonstrations", flags, tiny_tokenizer(), **common)
    assert (len(both.train), len(both.held_out)) == (50, 5)


def test_every_training_program_is_among_these():
    assert set(GROUPS) == {step for step in STEPS if isinstance(step, int)}
