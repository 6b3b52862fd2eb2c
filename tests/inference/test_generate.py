"""Answers to prompts: whole, in order, the same however they are made, and rows of every step as they are."""

import errno
import json
import os
import shutil

import generate
import pytest
from chat_arguments import named_models
from transformers import GenerationConfig

from tests.inference.conftest import INFERENCE
from tests.marks import slow
from tests.step3.hybrid_checks import save_tiny_reward_model
from tests.tiny import save_tiny_model, tiny_tokenizer
from training.utils.answers import PartFile, prompt_id, read_answers
from training.utils.arguments import DataArguments
from training.utils.data.prepare import prepare_data
from training.utils.errors import UserError, run_program
from training.utils.generation.engines import FastBackend

SHORT = ["--max_answer_seq_len", "12", "--max_prompt_seq_len", "64"]
LENGTHS = "def length(prompts, responses, rows):\n    return [float(len(text)) for text in responses]\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("policies")
    return {name: save_tiny_model(root / name, seed=seed) for name, seed in (("one", 0), ("two", 7))}


@pytest.fixture(scope="module")
def reward_model(models, tmp_path_factory):
    return save_tiny_reward_model(str(models["one"]), tmp_path_factory.mktemp("reward") / "model")


@pytest.fixture
def asked(tiny_data, models, tmp_path):
    """``asked(*flags)`` runs the program on 8 prompts; gives its exit code. The answers go to ``tmp_path``/a.jsonl."""

    def run(*flags, output="a.jsonl"):
        named = [] if "--model" in flags else ["--model", *(f"{name}={path}" for name, path in models.items())]
        data = ["--data_path", str(tiny_data / "prompts.jsonl"), "--output", str(tmp_path / output)]
        return run_program(generate.main, [*named, *data, *SHORT, *flags])

    return run


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_prompt_is_answered_in_the_order_of_the_data(asked, tiny_data, tmp_path):
    assert asked("--samples_per_prompt", "3") == 0
    found, data = lines_of(tmp_path / "a.jsonl"), lines_of(tiny_data / "prompts.jsonl")
    assert [line["row"] for line in found] == data
    for line in found:
        assert line["id"] == prompt_id(line["prompt"]) and line["prompt"][-1]["role"] == "user"
        assert [answer["model"] for answer in line["answers"]] == ["one"] * 3 + ["two"] * 3
        assert all(answer["finished"] or answer["tokens"] == 12 for answer in line["answers"])
        assert all(set(answer) == {"model", "response", "tokens", "finished"} for answer in line["answers"])
    texts = [answer["response"] for line in found for answer in line["answers"]]
    assert len(set(texts)) > 0.9 * len(texts)  # other noise for every model and every answer
    assert not (tmp_path / "a.jsonl.parts").exists()
    result = json.loads((tmp_path / "a.jsonl.settings").read_text())["result"]
    assert (result["prompts"], result["answers"], result["models"]["one"]["answers"]) == (8, 48, 24)


def test_neither_batch_size_nor_the_number_of_answers_changes_an_answer(asked, tmp_path):
    assert asked("--samples_per_prompt", "2", "--per_device_generation_batch_size", "1") == 0
    assert asked("--samples_per_prompt", "3", "--per_device_generation_batch_size", "5", output="b.jsonl") == 0
    one, other = lines_of(tmp_path / "a.jsonl"), lines_of(tmp_path / "b.jsonl")
    for few, more in zip(one, other, strict=True):
        assert few["answers"] == [answer for i, answer in enumerate(more["answers"]) if i % 3 < 2]
    assert asked("--samples_per_prompt", "2", "--seed", "5", output="c.jsonl") == 0
    assert lines_of(tmp_path / "c.jsonl") != one


def answer_on_a_rank(flags):
    """For both ranks of a pair: run the program there."""
    import sys

    sys.path.insert(0, str(INFERENCE))
    import generate as program

    return program.main(flags)


def test_two_ranks_give_the_same_file(asked, models, tiny_data, tmp_path, rank_pair):
    assert asked("--samples_per_prompt", "2", "--dtype", "fp32") == 0
    flags = [*(f"--model={name}={path}" for name, path in models.items()), "--samples_per_prompt", "2", *SHORT,
             "--data_path", str(tiny_data / "prompts.jsonl"), "--dtype", "fp32"]  # fmt: skip
    assert rank_pair.run(answer_on_a_rank, [*flags, "--output", str(tmp_path / "b.jsonl")]) == [0, 0]
    assert (tmp_path / "b.jsonl").read_bytes() == (tmp_path / "a.jsonl").read_bytes()
    assert not (tmp_path / "b.jsonl.parts").exists()


def test_hf_answers_too(asked, tmp_path):
    assert asked("--rollout_engine", "hf", "--samples_per_prompt", "1") == 0
    assert len(lines_of(tmp_path / "a.jsonl")) == 8


def test_answers_end_where_the_models_generation_settings_say(asked, models, tmp_path):
    folder = shutil.copytree(models["one"], tmp_path / "model")
    one = ["--model", f"one={folder}", "--samples_per_prompt", "1", "--temperature", "0"]
    assert asked(*one) == 0
    before = [line["answers"][0] for line in lines_of(tmp_path / "a.jsonl")]
    assert any(answer["tokens"] > 1 for answer in before)
    GenerationConfig(eos_token_id=list(range(3, 400))).save_pretrained(folder)  # whatever comes first but EOS
    assert asked(*one, output="b.jsonl") == 0
    ended = [line["answers"][0] for line in lines_of(tmp_path / "b.jsonl")]
    assert all(answer["finished"] and answer["tokens"] == 1 for answer in ended)


@pytest.fixture
def killed(monkeypatch):
    """``killed(n)``: the process ends in the middle of a line, while batch n is written."""

    def at(batch):
        original, count = FastBackend.generate, iter(range(1000))

        def dies(self, *args):
            if next(count) == batch:
                raise KeyboardInterrupt
            return original(self, *args)

        monkeypatch.setattr(FastBackend, "generate", dies)

    yield at
    monkeypatch.undo()


@pytest.mark.parametrize("line", ["{", "[]", "3", "null", "{}", "[" * 100_000])
def test_a_damaged_line_of_a_part_is_named(line, tmp_path):
    file = PartFile(tmp_path / "a.jsonl", "--output", {})
    file.folder.mkdir()
    (file.folder / "rank0.jsonl").write_text('{"id": "a"}\n' + line + "\n")
    with pytest.raises(UserError, match=r"rank0\.jsonl:2 is damaged"):
        file.lines()


@pytest.mark.parametrize(("batch", "answers"), [slow(0, 0), (1, 5), slow(5, 16 + 5)])
def test_a_run_that_was_killed_goes_on(batch, answers, asked, killed, monkeypatch, tmp_path, capsys):
    flags = ("--samples_per_prompt", "2", "--per_device_generation_batch_size", "5")
    assert asked(*flags) == 0
    killed(batch)
    with pytest.raises(KeyboardInterrupt):
        asked(*flags, output="b.jsonl")
    monkeypatch.undo()
    parts = tmp_path / "b.jsonl.parts"
    part = parts / "rank0.jsonl"
    if part.exists() and part.stat().st_size:
        shutil.copy(part, parts / "rank1.jsonl")  # another number of ranks had written it
        part.write_bytes((parts / "rank1.jsonl").read_bytes()[:90])  # a line that was cut
    capsys.readouterr()
    assert not (tmp_path / "b.jsonl").exists()
    asked_again = []
    original = FastBackend.generate
    monkeypatch.setattr(FastBackend, "generate", lambda self, model, request, sampling: (
        asked_again.extend(request.row_ids.tolist()), original(self, model, request, sampling))[1])  # fmt: skip
    assert asked(*flags, output="b.jsonl") == 0
    assert len(asked_again) == len(set(asked_again)) == 2 * 8 * 2 - answers
    assert (tmp_path / "b.jsonl").read_bytes() == (tmp_path / "a.jsonl").read_bytes()


def test_other_settings_are_refused_and_a_finished_file_stays(asked, tmp_path, capsys, killed, monkeypatch):
    assert asked("--samples_per_prompt", "1") == 0
    before = (tmp_path / "a.jsonl").read_bytes()
    assert asked("--samples_per_prompt", "1", "--per_device_generation_batch_size", "3") == 0
    assert "finished already" in capsys.readouterr().out
    assert asked("--samples_per_prompt", "1", "--temperature", "0.5") == 2
    assert "decoding temperature: 1.0 then, 0.5 now" in capsys.readouterr().err
    killed(1)
    with pytest.raises(KeyboardInterrupt):
        asked("--samples_per_prompt", "1", output="b.jsonl")
    monkeypatch.undo()
    assert asked("--samples_per_prompt", "2", output="b.jsonl") == 2
    assert "samples_per_prompt: 1 then, 2 now" in capsys.readouterr().err
    (tmp_path / "c.jsonl").write_text("mine")
    assert asked(output="c.jsonl") == 2
    assert "there is such a file" in capsys.readouterr().err
    assert (tmp_path / "a.jsonl").read_bytes() == before and (tmp_path / "c.jsonl").read_text() == "mine"


def test_another_model_under_the_same_name_is_seen(asked, models, tmp_path, capsys):
    model = shutil.copytree(models["one"], tmp_path / "model")
    flags = ("--samples_per_prompt", "1", "--model", str(model))
    assert asked(*flags) == 0
    save_tiny_model(model, seed=3)
    assert asked(*flags) == 2
    assert f"content of {model}" in capsys.readouterr().err


@pytest.mark.parametrize("source", [slow("function"), slow("model"), "both"])
def test_the_best_of_several_are_rows_of_step_1(source, asked, models, reward_model, tmp_path):
    rules = tmp_path / "rules.py"
    rules.write_text(LENGTHS)
    flags = {
        "function": ["--reward_function", f"{rules}:length"],
        "model": ["--reward_model", str(reward_model)],
        "both": ["--reward_model", str(reward_model), "--reward_function", f"{rules}:length=0.5"],
    }[source]
    named = ("--model", f"one={models['one']}", "--max_answer_seq_len", "80")  # some of them end
    assert asked(*named, "--samples_per_prompt", "6", *flags, output="all.jsonl") == 0
    assert asked(*named, "--best_of", "6", *flags) == 0
    best, every = lines_of(tmp_path / "a.jsonl"), lines_of(tmp_path / "all.jsonl")
    kept = {line["id"]: line for line in best}
    for line in every:
        whole = [answer for answer in line["answers"] if answer["finished"] and answer["response"]]
        if not whole:
            assert line["id"] not in kept
            continue
        top = max(whole, key=lambda answer: answer["reward"])
        assert kept[line["id"]]["messages"] == [*line["prompt"], {"role": "assistant", "content": top["response"]}]
        assert kept[line["id"]]["reward"] == pytest.approx(top["reward"], abs=1e-4)
        if source == "function":
            assert top["reward"] == max(len(answer["response"]) for answer in whole)
        if source == "both":
            assert top["reward"] == pytest.approx(top["rewards"]["model"] + 0.5 * len(top["response"]), abs=1e-4)
    assert kept
    data = DataArguments(data_path=[str(tmp_path / "a.jsonl")])
    rows = prepare_data("demonstrations", data, tiny_tokenizer(), max_length=256, seed=0, hold_out=False)
    assert len(rows.train) == len(best)


def test_no_best_answer_at_all_is_an_error(asked, models, tmp_path, capsys):
    rules = tmp_path / "rules.py"
    rules.write_text(LENGTHS)
    flags = ("--model", str(models["one"]), "--best_of", "2", "--max_answer_seq_len", "1", "--temperature", "0.01")
    assert asked(*flags, "--reward_function", f"{rules}:length") == 2
    assert "--max_answer_seq_len 1" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "a.jsonl").exists()


def test_answers_are_prompts_of_step_3_and_of_the_program_itself(asked, tmp_path):
    assert asked("--samples_per_prompt", "2") == 0
    made = DataArguments(data_path=[str(tmp_path / "a.jsonl")])
    rows = prepare_data("prompts", made, tiny_tokenizer(), max_length=64, seed=0, hold_out=False)
    found = lines_of(tmp_path / "a.jsonl")
    assert [json.loads(row["messages"]) for row in rows.train] == [line["prompt"] for line in found]
    assert asked("--samples_per_prompt", "2", "--data_path", str(tmp_path / "a.jsonl"), output="b.jsonl") == 0
    again = lines_of(tmp_path / "b.jsonl")
    assert [line["answers"] for line in again] == [line["answers"] for line in found]  # one prompt, one noise


def test_the_datas_own_answer_and_its_held_out_rows(asked, tiny_data, tmp_path):
    """Demonstrations are prompts with a reference; training's held-out rows are the ones that training holds out."""
    flags = ("--data_path", str(tiny_data / "sft.jsonl"), "--samples_per_prompt", "1")
    assert asked(*flags) == 0
    data = lines_of(tiny_data / "sft.jsonl")
    assert [line["reference"] for line in lines_of(tmp_path / "a.jsonl")] == [
        row["messages"][-1]["content"] for row in data
    ]
    assert asked(*flags, "--split", "train", output="train.jsonl") == 0
    assert asked(*flags, "--split", "held_out", output="held.jsonl") == 0
    ids = {name: [line["id"] for line in lines_of(tmp_path / f"{name}.jsonl")] for name in ("a", "train", "held")}
    assert sorted(ids["train"] + ids["held"]) == sorted(ids["a"]) and ids["held"]
    arguments = DataArguments(data_path=[str(tiny_data / "sft.jsonl")])
    held = prepare_data("prompts", arguments, tiny_tokenizer(), max_length=64, seed=1234).held_out
    assert [prompt_id(json.loads(row["messages"])) for row in held] == ids["held"]


def test_a_runs_folder_names_its_models(models, tmp_path):
    for step, model in (("step1", "."), ("step3", "actor")):
        shutil.copytree(models["one"], tmp_path / "run" / step / model)
        (tmp_path / "run" / step / "summary.json").write_text("{}")
    run = tmp_path / "run"
    assert named_models([str(run)], "--model") == {"SFT": str(run / "step1"), "RLHF": str(run / "step3" / "actor")}
    assert list(named_models([f"a={run}", f"b={models['two']}", str(models["one"])], "--model")) == [
        "a-SFT", "a-RLHF", "b", "one"]  # fmt: skip


def test_a_full_disk_is_one_line_and_loses_nothing(asked, tmp_path, monkeypatch, capsys):
    flags = ("--samples_per_prompt", "2", "--per_device_generation_batch_size", "5")
    assert asked(*flags) == 0
    count, original = iter(range(100)), os.fsync

    def full(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("rank0.jsonl") and next(count) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    assert asked(*flags, output="b.jsonl") == 2
    [line] = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith("error: ") and "rank0.jsonl: No space left on device" in line
    assert len(lines_of(tmp_path / "b.jsonl.parts" / "rank0.jsonl")) == 10
    monkeypatch.undo()
    assert asked(*flags, output="b.jsonl") == 0
    assert (tmp_path / "b.jsonl").read_bytes() == (tmp_path / "a.jsonl").read_bytes()


def test_a_reward_function_that_raises_is_one_line_and_loses_nothing(asked, models, tmp_path, capsys):
    rules = tmp_path / "rules.py"
    rules.write_text("calls = []\ndef f(prompts, responses, rows):\n    calls.append(1)\n"
                     "    assert len(calls) < 3, 'third time'\n    return [1.0] * len(responses)\n")  # fmt: skip
    flags = ("--model", str(models["one"]), "--best_of", "2", "--per_device_generation_batch_size", "4")
    assert asked(*flags, "--reward_function", f"{rules}:f") == 2
    assert "AssertionError: third time" in capsys.readouterr().err.splitlines()[-1]
    assert len(lines_of(tmp_path / "a.jsonl.parts" / "rank0.jsonl")) == 8


def line_of(**more):
    return {"prompt": "Hi?", "answers": [{"response": "a"}, {"response": "b"}]} | more


BAD_FILES = [
    ([line_of(), line_of()], ["a.jsonl:2", "stands in line 1 too"]),
    ([line_of(), line_of(prompt="Who?", id="x"), line_of(prompt="Why?", id="x")], ["a.jsonl:3", "id x", "line 2"]),
    ([line_of(prompt="")], ["a.jsonl:1", "no prompt"]),
    ([{"answers": line_of()["answers"]}], ["a.jsonl:1", "no prompt"]),
    ([line_of(prompt=[{"role": "user"}])], ["a.jsonl:1", "no list of messages"]),
    ([line_of(answers="a")], ["a.jsonl:1", "no answers"]),
    ([line_of(answers=[1, 2])], ["a.jsonl:1", "no answers"]),
    ([line_of(answers=[{"response": "a"}])], ["a.jsonl:1", "1 answer, and 2 are needed"]),
    ([line_of(id=3)], ["a.jsonl:1", "must be a text"]),
    ([], ["a.jsonl", "no line with answers"]),
]


@pytest.mark.parametrize(("lines", "words"), BAD_FILES)
def test_files_of_answers_that_are_none(lines, words, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(Exception) as error:
        read_answers(path, "--answers")
    assert all(word in str(error.value) for word in words), str(error.value)


def test_files_that_can_not_be_read(tmp_path):
    twice = b'{"prompt": "a", "answers": ["b", "c"], "prompt": "d"}\n'
    broken, last = (b'{"prompt": \n', "a.jsonl:1: not JSON"), (twice, "a.jsonl:1: prompt stands twice in one object")
    for content, words in ((None, "No such file"), (b"\xff\n", "not UTF-8"), broken, last):
        if content is not None:
            (tmp_path / "a.jsonl").write_bytes(content)
        with pytest.raises(Exception, match=words):
            read_answers(tmp_path / "a.jsonl", "--answers")
