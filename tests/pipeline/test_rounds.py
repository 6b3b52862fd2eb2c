"""Rounds of train.py: what each step is given, what judges, what trains; with stand-ins for all but the judge."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

import train
from tests.test_train import Bench
from tests.tiny import DEMO
from training.pipeline import estimate
from training.pipeline.rounds import ROUNDS_FILE, _read_rounds, divide, section_of
from training.utils.errors import UserError, run_program
from training.utils.model import hub
from training.utils.run.folders import is_finished

# Answers of two lengths to thirty prompts, another text in each round; says what it was started with
GENERATE = """
import json, pathlib, sys
argv = sys.argv[1:]
print("arguments", *argv, flush=True)
model = argv[argv.index("--model") + 1]
lines = []
for i in range(30):
    prompt = [{"role": "user", "content": f"Question {i}?"}]
    answers = [{"model": "actor", "response": text, "tokens": 3, "finished": True} for text in (f"{i} {model}", f"{i}")]
    lines.append({"id": f"p{i}", "prompt": prompt, "answers": answers})
pathlib.Path(argv[argv.index("--output") + 1]).write_text("".join(json.dumps(line) + "\\n" for line in lines))
"""
# The accuracy says which model was asked, of the last number of its folder, and about which rankings
EVALUATE = """
import json, pathlib, sys
argv = sys.argv[1:]
print("arguments", *argv, flush=True)
path = pathlib.Path(argv[argv.index("--path") + 1])
sources = argv[argv.index("--eval_data_path") + 1 :]
found = {s: {"accuracy": 0.5 + 0.01 * len(sources), "accuracy_interval": [0.4, 0.6]} for s in sources}
(path / "evaluation.json").write_text(json.dumps({"by_source": found}))
"""
RULES = "def length(prompts, responses, rows):\n    return [float(len(text)) for text in responses]\n\ncheck = length\n"


class Rounds(Bench):
    """The stand-ins of train.py's tests, and those of the rounds' programs."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.programs = {}
        for name, text in (("generate", GENERATE), ("evaluate", EVALUATE)):
            (folder / f"{name}.py").write_text(text)
            self.programs[name] = str(folder / f"{name}.py")
        step = folder / "step.py"  # whose actor a later round may start from
        made = '(out / "actor").mkdir(exist_ok=True)'
        files = '(out / "actor" / "config.json").write_text("{}"); (out / "actor" / "model.safetensors").touch()'
        step.write_text(step.read_text().replace(made, f"{made}; {files}"))
        (folder / "rules.py").write_text(RULES)
        self.recipe.write_text(
            "step1: {num_train_epochs: 2}\nstep2: {data_path: [demo], offload: false}\n"
            "step3: {ppo_epochs: 1, data_path: demo, temperature: 0.7, max_answer_seq_len: 9, only_optimize_lora: true,"
            " actor_lora_dim: 4}\n"
        )

    def go(self, *argv: str) -> int:
        return self.start("--recipe", str(self.recipe), "--output_dir", "output/tiny", *argv)

    def start(self, *argv: str) -> int:
        called = {"launcher": self.launcher, "scripts": self.scripts, "programs": self.programs}
        return run_program(lambda tokens: train.main(tokens, **called), argv)

    def all_arguments(self, step: str, run: str) -> list[str]:
        lines = (self.output / run / f"{step}.log").read_text().splitlines()
        return [line.removeprefix("arguments ") for line in lines if line.startswith("arguments ")]


@pytest.fixture
def rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rounds:
    monkeypatch.setenv("TRIPOD_OUTPUT", str(tmp_path / "output"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(estimate, "embedded_shape", lambda: None)
    monkeypatch.setattr(hub, "is_reachable", lambda: True)
    return Rounds(tmp_path)


JUDGED = ("--judge_args", "--judge rules.py:length")


def ids(path: Path) -> set[str]:
    return {json.loads(line)["id"] for line in path.read_text(encoding="utf-8").strip().split("\n")}


def test_two_rounds(rounds: Rounds, capfd: pytest.CaptureFixture) -> None:
    assert rounds.go("--rounds", "2", *JUDGED, "--generate_args", "--samples_per_prompt 6 --temperature 0.9") == 0
    run, out = rounds.output / "tiny", capfd.readouterr().out
    for number, actor in ((1, "output/tiny/step3/actor"), (2, "output/tiny/round1/step3/actor")):
        folder = run / f"round{number}"
        (asked,) = rounds.all_arguments("generate", f"tiny/round{number}")
        assert asked.startswith(f"--model round{number - 1}={actor} --split train --data_path demo ")
        assert asked.endswith(" --samples_per_prompt 6 --temperature 0.9") and "--max_answer_seq_len 9 " in asked
        assert "lora" not in asked and "ppo" not in asked
        assert len((folder / "rankings.jsonl").read_text().splitlines()) == 30
        held_out, trained = ids(folder / "rankings" / "eval.jsonl"), ids(folder / "rankings" / "train.jsonl")
        assert not held_out & trained and len(held_out | trained) == 30 and 2 <= len(held_out) <= 12
        assert held_out == ids(run / "round1" / "rankings" / "eval.jsonl"), "a prompt judges in every round, or in none"
        for step in ("step2", "step3"):
            assert is_finished(folder / step)
        assert not (folder / "step1").exists() and (folder / "report.html").is_file()
        step2 = rounds.arguments("step2", f"tiny/round{number}")
        earlier = " ".join(f"output/tiny/round{i}/rankings" for i in range(1, number + 1))
        assert f"--data_path demo {earlier}" in step2 and "--model_name_or_path output/tiny/step1 " in step2
        assert "--eval_data_path" not in step2 and "--no-offload" in step2
        step3 = rounds.arguments("step3", f"tiny/round{number}")
        assert "--actor_model_name_or_path output/tiny/step1 " in step3
        assert f"--critic_model_name_or_path output/tiny/round{number}/step2 " in step3
        assert "--ppo_epochs 1" in step3 and "--only_optimize_lora" in step3 and "--data_path demo" in step3
    agreement = json.loads((run / "rounds.json").read_text())["agreement"]
    assert agreement["2"] == {
        "reward model of round 1": {"round 2": {"accuracy": 0.51, "accuracy_interval": [0.4, 0.6]}},
        "reward model of round 2": {
            f"round {i}": {"accuracy": 0.52, "accuracy_interval": [0.4, 0.6]} for i in (1, 2)
        },
    }  # fmt: skip
    table = {row[0]: row[1:] for row in json.loads((run / "rounds.json").read_text())["table"]}
    assert table[""] == ["SFT", "PPO", "round 1", "round 2"]
    assert table["held-out reward, by its own model"] == [0.1, 1.1, 1.1, 1.1]
    assert table["reward model right on judgements of round 2"] == [None, None, 0.51, 0.52]
    assert table["reward model right on judgements of round 1"] == [None, 0.51, 0.51, None][:1] + [0.51, 0.51, 0.52]
    assert "30 of 30 prompts have been judged" in out and "Reports: " in out


def test_what_is_done_is_not_done_again(rounds: Rounds, capfd: pytest.CaptureFixture) -> None:
    assert rounds.go("--rounds", "1", *JUDGED) == 0
    assert rounds.go("--rounds", "2", *JUDGED) == 0
    out = capfd.readouterr().out
    assert "round 1 is finished" in out
    assert (
        len(rounds.all_arguments("generate", "tiny/round1")) == len(rounds.all_arguments("step3", "tiny/round1")) == 1
    )
    assert len(rounds.all_arguments("evaluate", "tiny/round1")) == 2


def test_a_round_that_was_made_from_what_comes_again_is_refused(rounds: Rounds, capfd: pytest.CaptureFixture) -> None:
    assert rounds.go("--rounds", "2", *JUDGED) == 0
    shutil.rmtree(rounds.output / "tiny" / "step3")
    assert rounds.go("--rounds", "2", *JUDGED) == 2
    said = capfd.readouterr().err
    assert "output/tiny/round1 was made from another step 3 than that which is to come: remove it, or move it" in said
    assert not (rounds.output / "tiny" / "step3").exists()
    shutil.rmtree(rounds.output / "tiny" / "round1")
    assert rounds.go("--rounds", "2", *JUDGED) == 2
    assert "round2 was made from another step 3" in capfd.readouterr().err
    shutil.rmtree(rounds.output / "tiny" / "round2")
    evaluate = rounds.folder / "evaluate.py"
    evaluate.write_text(evaluate.read_text().replace("0.5 +", "0.7 +"))
    assert rounds.go("--rounds", "2", *JUDGED) == 0
    known = json.loads((rounds.output / "tiny" / ROUNDS_FILE).read_text())["agreement"]
    assert known["1"]["reward model of round 1"]["round 1"]["accuracy"] == 0.71, "of the new one"


def test_rounds_of_a_run_that_was_moved(rounds: Rounds) -> None:
    assert rounds.go() == 0
    (rounds.output / "tiny").rename(rounds.output / "moved")
    assert rounds.start("--output_dir", "output/moved", "--rounds", "1", *JUDGED) == 0
    moved = rounds.output / "moved"
    assert f"--actor_model_name_or_path {moved}/step1 " in rounds.arguments("step3", "moved/round1")


def test_from_the_last_actor(rounds: Rounds) -> None:
    assert rounds.go("--rounds", "2", "--rounds_from", "actor", *JUDGED) == 0
    for number, actor in ((1, "output/tiny/step3/actor"), (2, "output/tiny/round1/step3/actor")):
        assert f"--actor_model_name_or_path {actor} " in rounds.arguments("step3", f"tiny/round{number}")
        assert "--model_name_or_path output/tiny/step1 " in rounds.arguments("step2", f"tiny/round{number}")


def test_held_out_pairs_of_the_recipe_stay(rounds: Rounds) -> None:
    rounds.recipe.write_text(rounds.recipe.read_text().replace("[demo]", "'demo:240', eval_data_path: 'demo:80'"))
    assert rounds.go("--rounds", "1", *JUDGED) == 0
    step2 = rounds.arguments("step2", "tiny/round1")
    assert "--data_path demo:240 output/tiny/round1/rankings" in step2
    assert "--eval_data_path demo:80 output/tiny/round1/rankings" in step2


def test_people_judge_in_between(rounds: Rounds, capfd: pytest.CaptureFixture) -> None:
    assert rounds.go("--rounds", "1") == 0
    out = capfd.readouterr().out
    asked = "inference/rank.py --answers output/tiny/round1/answers.jsonl --output_dir output/tiny/round1/people"
    assert asked in out and "train.py" in out
    assert not (rounds.output / "tiny" / "round1" / "step2").exists()
    lines = [
        json.loads(line) for line in (rounds.output / "tiny" / "round1" / "answers.jsonl").read_text().splitlines()
    ]
    for line in lines[:6]:
        line["answers"][0]["rank"], line["answers"][1]["rank"], line["judge"] = 1, 2, "ada"
    path = rounds.output / "tiny" / "round1" / "people" / "rankings.jsonl"
    path.parent.mkdir()
    path.touch()  # as the page does when it starts
    assert rounds.go("--rounds", "1") == 0
    assert asked in capfd.readouterr().out
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines[:6], lines[0] | {"judge": "bob"}]))
    assert rounds.go("--rounds", "1") == 0
    assert "6 of 30 prompts have been judged" in capfd.readouterr().out
    assert is_finished(rounds.output / "tiny" / "round1" / "step3")


def test_a_judge_that_fails_ends_the_run_and_it_goes_on(rounds: Rounds, capfd: pytest.CaptureFixture) -> None:
    (rounds.folder / "rules.py").write_text("def length(prompts, responses, rows):\n    raise ValueError('no taste')\n")
    assert rounds.go("--rounds", "1", *JUDGED) == 2
    error = capfd.readouterr().err
    assert "round 1: judge ended with exit code 2" in error and "no taste" in error and "To go on with the run" in error
    (rounds.folder / "rules.py").write_text(RULES)
    assert rounds.go("--rounds", "1", *JUDGED) == 0


def test_a_run_goes_on_with_its_own_rounds(
    rounds: Rounds, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """From another folder, too, in which a file of the same name lies; other ones where they are given."""
    (rounds.folder / "mine.jsonl").write_bytes((DEMO / "preferences.jsonl").read_bytes())
    (rounds.folder / "rules.py").write_text("def length(prompts, responses, rows):\n    raise ValueError('no taste')\n")
    own = ("--rounds_from", "actor", "--generate_args", "--samples_per_prompt 6", "--data_path", "mine.jsonl")
    judged = ("--judge_args=--judge=rules.py:length",)
    assert rounds.go("--rounds", "1", *judged, *own) == 2
    (rounds.folder / "rules.py").write_text(RULES)
    other = rounds.folder / "other"
    other.mkdir()
    (other / "rules.py").write_text("")
    monkeypatch.chdir(other)
    capfd.readouterr()
    assert rounds.start("--resume", "auto", "--step", "2", "3") == 0
    assert "round 1" not in capfd.readouterr().out, "with --step but these"
    assert rounds.start("--resume", "auto") == 0
    assert is_finished(rounds.output / "tiny" / "round1" / "step3") and "Reports: " in capfd.readouterr().out
    step2, step3 = (rounds.arguments(step, "tiny/round1") for step in ("step2", "step3"))
    assert f"--actor_model_name_or_path {rounds.output}/tiny/step3/actor " in step3
    assert f"--data_path {rounds.folder}/mine.jsonl {rounds.output}/tiny/round1/rankings" in step2
    assert rounds.start("--resume", "auto", "--rounds", "2") == 0
    (asked,) = rounds.all_arguments("generate", "tiny/round2")
    assert asked.endswith("--samples_per_prompt 6") and f"--data_path {rounds.folder}/mine.jsonl " in asked
    assert rounds.start("--resume", "auto", "--rounds", "0") == 0 and rounds.start("--resume", "auto") == 0
    assert "Reports: " not in capfd.readouterr().out.rpartition("Report: ")[2]


@pytest.mark.slow
def test_a_round_of_the_real_programs(rounds: Rounds, tiny_model: Path) -> None:
    """Two ranks, a tiny model: the reward model of the round is judged by what the actor of before has written."""
    rounds.recipe.write_text(
        "step1: &s {data_path: 'demo:40', eval_data_path: 'demo:20', max_seq_len: 128, dtype: fp32, report_to: none}\n"
        "step2: *s\n"
        "step3: {data_path: 'demo:40', eval_data_path: 'demo:20', dtype: fp32, report_to: none, max_prompt_seq_len: 64,"
        " max_answer_seq_len: 12, num_iterations: 1, eval_every: 0, eval_function: [rules.py:check], advantage: rloo,"
        " samples_per_prompt: 2, per_device_generation_batch_size: 8}\n"
    )
    argv = ["--recipe", str(rounds.recipe), "--output_dir", "output/tiny", "--model_name_or_path", str(tiny_model)]
    assert train.main([*argv, "--num_gpus", "2", "--rounds", "1", *JUDGED]) == 0
    run = rounds.output / "tiny"
    answers = [json.loads(line) for line in (run / "round1" / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 40 and {a["model"] for line in answers for a in line["answers"]} == {"round0"}
    manifest = json.loads((run / "round1" / "manifest.json").read_text())
    assert list(manifest["steps"]) == ["step2", "step3"]
    known = json.loads((run / "rounds.json").read_text())
    held_out = len((run / "round1" / "rankings" / "eval.jsonl").read_text().splitlines())
    for found in known["agreement"]["1"].values():
        assert found["round 1"]["prompts"] == pytest.approx(held_out)
    table = {row[0]: row[1:] for row in known["table"]}
    assert all(isinstance(value, float) for value in table["check"]) and len(table["check"]) == 3


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--rounds", "1", "--pipeline", "sft,dpo"), "--rounds trains reward model and actor again"),
        (("--rounds", "1", "--step", "1", "2"), "has no finished step3"),
        (("--judge_args", "--judge a.py:f"), "--judge_args is for --rounds, which is not given"),
        (("--rounds_from", "actor"), "--rounds_from is for --rounds, which is not given"),
        (("--rounds", "1", "--judge_args", "--answers x"), "--answers is given by train.py"),
        (("--rounds", "1", "--generate_args", "--output x"), "--output is given by train.py"),
        (("--rounds", "1", "--judge_args", "'"), "--judge_args: No closing quotation"),
        (("--rounds", "-1"), "--rounds is -1"),
    ],
)
def test_flags_that_can_not_be(
    flags: tuple[str, ...], words: str, rounds: Rounds, capfd: pytest.CaptureFixture
) -> None:
    assert rounds.go(*flags) == 2
    assert words in capfd.readouterr().err
    assert not (rounds.output / "tiny").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--judge_args", "--jugde rules.py:f"), "--judge_args: .*--jugde"),
        (("--judge_args", "--judge nowhere.py:f"), "--judge_args: --judge nowhere.py:f: no such file"),
        (("--judge_args", "--judge_url http://localhost/v1"), "--judge_args: --judge_url needs --judge_model"),
        (("--generate_args", "--sample_per_prompt 6"), "--generate_args: .*--sample_per_prompt"),
        (("--generate_args", "--samples_per_prompt 1"), "--generate_args: a round compares"),
        (("--generate_args", "--best_of 4 --reward_model embedded"), "--generate_args: a round compares"),
    ],
)
def test_the_programs_of_a_round_look_at_their_flags_first(
    flags: tuple[str, ...], words: str, rounds: Rounds, capfd: pytest.CaptureFixture
) -> None:
    """Before the steps, which may take days, and before a folder is made."""
    rounds.programs = {}
    assert rounds.go("--rounds", "1", *flags) == 2
    assert re.search(words, capfd.readouterr().err)
    assert not (rounds.output / "tiny").exists()


def test_arguments_as_a_section_and_back() -> None:
    argv = ["--model_name_or_path", "m", "--output_dir", "o", "--data_path", "a:3", "b", "--no-offload", "--enable_ema",
            "--learning_rate=1e-3", "--seed", "-1", "--reward_function", "f.py:g=-0.5"]  # fmt: skip
    section = section_of(argv, "step2")
    assert section == {"data_path": ["a:3", "b"], "offload": False, "enable_ema": True, "learning_rate": "1e-3",
                       "seed": "-1", "reward_function": "f.py:g=-0.5"}  # fmt: skip
    from training.utils.run.recipes import flags_of

    again = flags_of(yaml.safe_load(json.dumps(section)), ())
    assert section_of(again, "step2") == section


def ranking(number: int, *ranks: int, **more: object) -> str:
    answers = [{"response": f"{i}", "rank": rank} for i, rank in enumerate(ranks)]
    return json.dumps({"id": f"p{number}", "prompt": f"Question {number}?", "answers": answers} | more) + "\n"


def test_rankings_that_can_not_be_divided(tmp_path: Path) -> None:
    path, answers = tmp_path / "rankings.jsonl", tmp_path / "answers.jsonl"
    answers.write_text(json.dumps({"prompt": "Hi?", "answers": [{"response": "a"}, {"response": "b"}]}))
    for text, words in (
        (ranking(0, 1, 2) + ranking(1, 1, 1), "1 prompts have answers that differ in rank"),
        (ranking(0, 1, 2) + "{\n", "rankings.jsonl:2: no ranking"),
        (ranking(0, 1, 2, answers=[{"response": "a"}]), "rankings.jsonl:1: no ranking"),
        (ranking(0, 1, 2, id=3), "rankings.jsonl:1: no ranking"),
        (ranking(0, 1, 2).replace("{", '{"answers": [], ', 1), "rankings.jsonl:1: no ranking"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=words):
            divide(path, answers, tmp_path / "rankings")
        assert not (tmp_path / "rankings").exists()
    cut = ranking(1, 1, 2, note="a\u2028b").replace("\\u2028", "\u2028")  # as json_line leaves it
    path.write_text(ranking(0, 1, 2) + cut + ranking(0, 2, 1), encoding="utf-8")
    divide(path, answers, tmp_path / "rankings")
    sides = [ids(tmp_path / "rankings" / name) for name in ("train.jsonl", "eval.jsonl")]
    assert sorted(map(len, sides)) == [1, 1] and sides[0] != sides[1]


@pytest.mark.parametrize("text", ["{", "[]", '{"agreement": 3}', '{"agreement": {"1": []}}'])
def test_a_damaged_record_of_the_rounds_is_named(text, tmp_path):
    (tmp_path / ROUNDS_FILE).write_text(text)
    with pytest.raises(UserError, match=r"rounds\.json is (damaged|not readable)"):
        _read_rounds(tmp_path / ROUNDS_FILE)
