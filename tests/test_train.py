"""train.py with stand-ins for the launcher and the steps: commands, feeding, logs, manifest, failures, signals."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import train
from tests.marks import slow
from tests.signals import as_in_the_background, hear_signals
from tests.utils.run.test_hosts import stand_in
from training.pipeline import estimate
from training.pipeline.shared_flags import GROUPS, SharedArguments
from training.pipeline.showcase import answers_text, summary_table
from training.utils.errors import UserError, run_program
from training.utils.model import hub
from training.utils.run import folders
from training.utils.run.processes import LineLog, last_lines, run_logged
from training.utils.run.recipes import read_recipe

# Takes DeepSpeed's options, starts the program as a child like DeepSpeed's runner, and like it passes no signal on.
LAUNCHER = """
import os, subprocess, sys
at = sys.argv.index("--master_port") + 2
given = [token for token in sys.argv[1:at] if token != "--quiet"]
options = dict(zip(given[::2], given[1::2], strict=True))
assert options.keys() <= {"--hostfile", "--num_gpus", "--master_port"} and int(options["--master_port"]) > 0
code = subprocess.Popen([sys.executable, *sys.argv[at:]], env=os.environ | {"LOCAL_RANK": "0"}).wait()
sys.exit(max(code, 0))
"""

# A step: says its arguments, writes what a step writes; --data_output_path fail:CODE, hang or silent lets it misbehave.
STEP = """
import json, pathlib, signal, sys, time
argv = sys.argv[1:]
out = pathlib.Path(argv[argv.index("--output_dir") + 1])
out.mkdir(parents=True, exist_ok=True)
print("arguments", *argv, flush=True)
for i in range(3):
    sys.stderr.write(f"\\rbar {i}")
sys.stderr.write("\\n")
kind, _, code = argv[argv.index("--data_output_path") + 1].partition(":") if "--data_output_path" in argv else [""] * 3
if kind == "fail":
    print("this line says why", file=sys.stderr)
    sys.exit(int(code))
if kind == "hang":
    def end(*_):
        time.sleep(0.5)
        (out / "cleaned").touch()
        sys.exit(0)
    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    (out / "hanging").touch()
    time.sleep(60)
if out.name == "step3":
    (out / "actor").mkdir(exist_ok=True)
    (out / "samples.json").write_text(json.dumps(SAMPLES))
if kind != "silent":
    (out / "summary.json").write_text(json.dumps(SUMMARY[out.name]))
"""

SUMMARY = {
    "step1": {"loss_before": 3.25, "loss_after": 2.5, "perplexity_before": 25.8, "perplexity_after": 12.2},
    "step2": {
        "accuracy_before": 0.5,
        "accuracy_after": 0.91,
        "accuracy_by_kind": {"warm_empty": {"accuracy": 0.875, "pairs": 32}},
        "accuracy_longer": 0.4,
        "accuracy_shorter": 0.6,
        "chosen_mean": 1.5,
        "rejected_mean": -1.25,
        "verdicts": {"accuracy_above_0.6": True, "chosen_above_rejected": False},
    },
    "dpo": {"loss_before": 0.693, "loss_after": 0.512, "accuracy_after": 0.75, "held_out": 80, "kl": 0.12},
    "step3": {
        "reward_before": 0.1,
        "reward_after": 1.1,
        "win_rate": 0.8,
        "win_rate_low": 0.7,
        "win_rate_high": 0.9,
        "eval_function": {"name": "check.py:score", "win_rate": 0.75, "before": 0.4, "after": 0.6},
    },
}

SAMPLES = [
    {
        "prompt": [{"role": "user", "content": "Write a story about a kite."}],
        "answers": {
            "base": {"text": "kite " * 60, "reward": -1.5, "check": 0.25},
            "sft": {"text": "First line.\nSecond line.", "reward": 0.5},
            "rlhf": {"text": "The kite flew home.", "reward": 2.0, "check": 1.0},
        },
    },
    {"prompt": [{"role": "user", "content": "Hello"}], "answers": {"rlhf": {"text": ""}}},
]


class Bench:
    """An output folder of its own, stand-ins for launcher and steps, and train.py on top of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.output = folder / "output"
        launcher, step = folder / "launcher.py", folder / "step.py"
        launcher.write_text(LAUNCHER)
        step.write_text(STEP.replace("SAMPLES", repr(SAMPLES)).replace("SUMMARY", repr(SUMMARY)))
        self.launcher = [sys.executable, str(launcher)]
        self.scripts = {name: str(step) for name in folders.STEPS}
        self.recipe = folder / "tiny.yaml"
        self.recipe.write_text("step1: {num_train_epochs: 2}\nstep3: {ppo_epochs: 1}\n")

    def train(self, *argv: str) -> int:
        argv = argv if "--recipe" in argv else ("--recipe", str(self.recipe), *argv)
        return train.main(list(argv), launcher=self.launcher, scripts=self.scripts)

    def manifest(self, run: str = "tiny") -> dict:
        return json.loads((self.output / run / "manifest.json").read_text())

    def arguments(self, step: str, run: str = "tiny") -> str:
        lines = (self.output / run / f"{step}.log").read_text().splitlines()
        return next(line.removeprefix("arguments ") for line in lines if line.startswith("arguments "))


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setenv("TRIPOD_OUTPUT", str(tmp_path / "output"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(estimate, "embedded_shape", lambda: None)  # else each run measures
    monkeypatch.setattr(hub, "is_reachable", lambda: True)
    return Bench(tmp_path)


def test_a_device_with_a_uuid_is_left_to_torchrun(bench: Bench, monkeypatch, capfd: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(train, "has_accelerator", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8a1b")
    assert bench.train("--step", "1") == 0
    assert "torch.distributed.run --nproc_per_node 1" in capfd.readouterr().out
    assert bench.manifest()["steps"]["step1"]["exit_code"] == 0
    with pytest.raises(UserError, match="names 1"):
        bench.train("--step", "1", "--num_gpus", "2", "--output_dir", "output/other")
    assert not (bench.output / "other").exists()


def test_each_step_feeds_the_next(bench: Bench, capfd: pytest.CaptureFixture) -> None:
    assert bench.train("--num_gpus", "2", "--step3_args", "--gamma 0.9 --system_message 'two words'") == 0
    assert (
        bench.arguments("step1") == "--model_name_or_path embedded --output_dir output/tiny/step1 --num_train_epochs 2"
    )
    assert bench.arguments("step2") == "--model_name_or_path output/tiny/step1 --output_dir output/tiny/step2"
    assert bench.arguments("step3") == (
        "--actor_model_name_or_path output/tiny/step1 --critic_model_name_or_path output/tiny/step2 "
        "--output_dir output/tiny/step3 --ppo_epochs 1 --gamma 0.9 --system_message two words"
    )
    out = capfd.readouterr().out
    printed = [line for line in out.splitlines() if "--num_gpus 2" in line]
    assert len(printed) == 3 and printed[2].endswith("--system_message 'two words'")
    for step, command in zip(("step1", "step2", "step3"), printed, strict=True):
        assert out.index(command) < out.index("bar 2", out.index(command)), "the command comes before the output"
        done = subprocess.run(command, shell=True, capture_output=True, text=True)  # it works as printed
        assert f"--output_dir output/tiny/{step}" in done.stdout
    assert (bench.output / "latest").resolve() == bench.output / "tiny"
    assert os.readlink(bench.output / "latest") == "tiny"


def test_says_once_how_long_it_will_take(
    bench: Bench, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "embedded_shape", lambda: estimate.Shape(30, 576, 1536, 576, 192, 49152))
    monkeypatch.setattr(estimate, "has_accelerator", lambda: False)
    monkeypatch.setattr(estimate, "measure", lambda shape, dtype: estimate.Speeds(4e10, 4e10))
    assert bench.train("--step2_args", "--loss log_exp") == 0
    out = capfd.readouterr().out
    assert out.count("this machine will take about") == 1
    assert out.index("this machine will take about") < out.index("== step 1")
    (bench.output / "tiny" / "step3" / "summary.json").unlink()
    assert bench.train("--output_dir", "output/tiny") == 0
    assert "minutes (step 3: " in capfd.readouterr().out, "finished steps take no time"
    assert bench.train("--output_dir", "output/tiny") == 0
    assert bench.train("--actor_model_name_or_path", "my/model", "--data_path", "demo") == 0
    assert "this machine" not in capfd.readouterr().out


def test_end_shows_table_answers_and_where_to_look(bench: Bench, capfd: pytest.CaptureFixture) -> None:
    assert bench.train() == 0
    out = capfd.readouterr().out
    assert "3.250" in out and "2.500" in out and "always the longer: 0.400" in out
    assert "The kite flew home." in out and "reward +2.00   check +1.00" in out
    report, chat, where = out.splitlines()[-3:]
    assert (report, where) == ("Report:           output/tiny/report.html", "Everything is in: output/tiny")
    assert Path(chat.split()[-1]).is_file(), "from this folder, which has no Makefile"
    assert "The kite flew home." in (bench.output / "tiny" / "report.html").read_text()
    assert bench.train("--output_dir", str(bench.folder / "elsewhere")) == 0
    last = capfd.readouterr().out.splitlines()[-2]
    assert "gradio_chatbot.py --path SFT=elsewhere/step1 RLHF=elsewhere/step3/actor" in last


def test_a_report_that_can_not_be_written_costs_no_run(
    bench: Bench, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(run: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train, "write_report", full)
    assert bench.train() == 0
    said = "Report:           could not be written (No space left on device); later: "
    later = capfd.readouterr().out.partition(said)[2].splitlines()[0]
    assert later.endswith(" -m training.report output/tiny")


def test_dpo_beside_reward_model_and_ppo(bench: Bench, capfd: pytest.CaptureFixture) -> None:
    """Pipelines of one run share what is finished; a run goes on with its last one, and its page has all of them."""
    assert bench.train("--pipeline", "sft,dpo", "--dpo_args", "--beta 0.2") == 0
    run = bench.output / "tiny"
    out = capfd.readouterr().out
    assert [name for name in folders.STEPS if (run / name).is_dir()] == ["step1", "dpo"]
    said = (run / "dpo.log").read_text()
    assert "--model_name_or_path output/tiny/step1" in said and "--beta 0.2" in said
    assert "== DPO\n" in out and "Chat with it:" in out and "held-out accuracy" in out
    page = (run / "report.html").read_text()
    assert "DPO · Direct preference optimisation" in page and "Step 3 ·" not in page
    assert bench.train("--output_dir", str(run), "--pipeline", "sft,rm,ppo") == 0
    assert "step 1 is finished" in capfd.readouterr().out and (run / "step3").is_dir()
    page = (run / "report.html").read_text()
    assert "DPO · Direct" in page and "Step 3 ·" in page
    (run / "step2" / "summary.json").unlink()
    assert bench.train("--output_dir", str(run), "--pipeline", "sft,rm,dpo") == 0
    assert "DPO is finished\n" in capfd.readouterr().out, "which does not follow from step 2"
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["pipeline"] == "sft,rm,dpo" and set(manifest["steps"]) == set(folders.STEPS)
    assert bench.train("--output_dir", str(run), "--step", "1") == 0
    assert json.loads((run / "manifest.json").read_text())["pipeline"] == "sft,rm,dpo"


def test_an_unknown_pipeline(bench: Bench) -> None:
    with pytest.raises(UserError, match="--pipeline.*sft,dpo"):
        bench.train("--pipeline", "sft,ppo")


def test_runs_stand_beside_each_other(bench: Bench) -> None:
    for name in ("tiny", "tiny-2", "tiny-3"):
        assert bench.train("--step", "1") == 0
        assert folders.is_finished(bench.output / name / "step1")
        assert (bench.output / "latest").resolve() == bench.output / name


def test_manifest(bench: Bench, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("{}\n")
    demo = ("--step2_args", "--data_path demo", "--step3_args", "--data_path demo")
    assert bench.train("--step1_args", f"--data_path {data}:10 some/hub-name", *demo) == 0
    manifest = bench.manifest()
    assert manifest["versions"]["torch"] and manifest["versions"]["python"].startswith("3.")
    assert set(manifest["git"]) == {"commit", "changed"}
    assert manifest["recipe"]["name"] == str(bench.recipe) and len(manifest["recipe"][str(bench.recipe)]) == 64
    first, second = manifest["steps"]["step1"], manifest["steps"]["step2"]
    assert first["exit_code"] == 0 and first["seconds"] > 0 and first["metrics"] == SUMMARY["step1"]
    assert first["command"][-5:] == ["--num_train_epochs", "2", "--data_path", f"{data}:10", "some/hub-name"]
    # sha256 of "{}\n"
    assert first["inputs"][f"{data}:10"] == "ca3d163bab055381827226140568f3bef7eaac187cebd76878e0b63e9e442356"
    assert first["inputs"]["embedded"] is None and first["inputs"]["some/hub-name"] is None
    assert len(second["inputs"]["output/tiny/step1"]) == 64 and len(second["inputs"]["demo"]) == 64
    assert not any("step2" in name for name in second["inputs"]), "what a step writes is not an input"
    assert not list((bench.output / "tiny").glob("*.tmp"))


def test_log_keeps_lines_not_bars(bench: Bench) -> None:
    assert bench.train("--step", "1") == 0
    log = (bench.output / "tiny" / "step1.log").read_text()
    assert "bar 2\n" in log and "bar 0" not in log and "\r" not in log


def test_failure_names_step_and_how_to_go_on(bench: Bench, capfd: pytest.CaptureFixture) -> None:
    assert bench.train("--step2_args", "--data_output_path fail:7") == 7
    error = capfd.readouterr().err
    assert "step 2 failed with exit code 7" in error and "    this line says why" in error
    again = next(line for line in error.splitlines() if line.startswith("To run this step alone again:"))
    assert subprocess.run(again.partition(":")[2], shell=True, capture_output=True).returncode == 7
    assert "train.py --recipe" in error and error.rstrip().endswith("--output_dir output/tiny")
    assert bench.manifest()["steps"]["step2"]["exit_code"] == 7
    assert "this line says why" in (bench.output / "tiny" / "report.html").read_text()
    assert "step3" not in bench.manifest()["steps"]


def test_success_without_output_is_a_failure(bench: Bench, capfd: pytest.CaptureFixture) -> None:
    assert bench.train("--step1_args=--data_output_path silent") == 1
    assert "step 1 failed with exit code 1" in capfd.readouterr().err


def test_continues(bench: Bench, capfd: pytest.CaptureFixture) -> None:
    assert bench.train("--step2_args", "--data_output_path fail:2") == 2
    first = bench.manifest()["steps"]["step1"]
    capfd.readouterr()
    # with its own recipe, not the default one
    again = ["--output_dir", "output/tiny", "--step2_args", ""]
    assert train.main(again, launcher=bench.launcher, scripts=bench.scripts) == 0
    assert "step 1 is finished\n" in capfd.readouterr().out
    manifest = bench.manifest()
    assert manifest["steps"]["step1"] == first
    assert "--ppo_epochs 1" in bench.arguments("step3")
    assert len(manifest["started_as"]) == 2
    assert bench.train("--output_dir", "output/tiny", "--step1_args", "--seed 2") == 0
    out = capfd.readouterr().out
    assert "step 1 is finished with other flags; to repeat it, remove output/tiny/step1" in out
    assert "step 3 is finished\n" in out and "2.500" in out, "a finished run shows its table again"


def test_resume_auto_goes_on_with_the_latest_run(bench: Bench, capfd: pytest.CaptureFixture) -> None:
    assert bench.train() == 0
    assert bench.train("--step2_args", "--data_output_path fail:3") == 3
    again = capfd.readouterr().err + "".join(bench.manifest("tiny-2")["started_as"][-1])
    assert "tiny-2" in again
    # the recipe is the run's own: none is given
    again = ["--resume", "auto", "--step2_args", ""]
    assert train.main(again, launcher=bench.launcher, scripts=bench.scripts) == 0
    assert "step 1 is finished" in capfd.readouterr().out
    assert (bench.output / "tiny-2" / "step3" / "summary.json").exists()
    assert sorted(p.name for p in bench.output.iterdir()) == ["latest", "tiny", "tiny-2"]
    assert "--resume" not in bench.arguments("step3", "tiny-2"), "a step's own default is auto"


def test_resume_auto_passes_over_what_train_has_not_started(bench: Bench, capfd: pytest.CaptureFixture) -> None:
    """Such as the folder of a step that was refused: what it was to train on is not known."""
    folders.prepare_output_dir("", "step1")
    with pytest.raises(UserError, match="--resume auto: there is no run in output to go on with"):
        train.main(["--resume", "auto"], launcher=bench.launcher, scripts=bench.scripts)
    assert bench.train() == 0
    folders.prepare_output_dir("", "step1")
    assert (bench.output / "latest").readlink() == Path("run-2")
    assert train.main(["--resume", "auto"], launcher=bench.launcher, scripts=bench.scripts) == 0
    assert "step 3 is finished" in capfd.readouterr().out
    assert sorted(p.name for p in bench.output.iterdir()) == ["latest", "run", "run-2", "tiny"]


def test_resume_never_starts_unfinished_steps_over(bench: Bench, capfd: pytest.CaptureFixture) -> None:
    assert bench.train("--step2_args", "--data_output_path fail:3") == 3
    assert bench.train("--output_dir", "output/tiny", "--resume", "never", "--step2_args=") == 0
    assert "--resume never" in bench.arguments("step3")
    capfd.readouterr()
    assert bench.train("--output_dir", "output/tiny") == 0
    assert "with other flags" not in capfd.readouterr().out, "it says how this start began, not what was computed"


def test_resume_where_nothing_is(bench: Bench) -> None:
    with pytest.raises(UserError, match="no run"):
        bench.train("--resume", "auto")
    with pytest.raises(UserError, match="output/none holds no run"):
        bench.train("--resume", "auto", "--output_dir", "output/none")
    assert not bench.output.exists()


def test_several_hosts(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    stand_in(tmp_path / "bin" / "ssh", 'test "$5" != cut-off', monkeypatch)
    (tmp_path / "hosts").write_text("near slots=2\n")
    assert bench.train("--hostfile", "hosts") == 0
    commands = [line for line in capfd.readouterr().out.splitlines() if "--hostfile hosts" in line]
    assert len(commands) == 3 and not any("--num_gpus" in line for line in commands), "all slots of the file"
    (tmp_path / "hosts").write_text("cut-off slots=2\n")
    with pytest.raises(UserError, match="cut-off does not answer to ssh"):
        bench.train("--hostfile", "hosts")
    assert not (bench.output / "tiny-2").exists()


def test_later_steps_follow_a_repeated_one(bench: Bench) -> None:
    assert bench.train() == 0
    started = bench.manifest()["steps"]["step3"]["command"]
    (bench.output / "tiny" / "step2" / "summary.json").unlink()
    assert bench.train("--output_dir", "output/tiny") == 0
    assert bench.manifest()["steps"]["step3"]["command"] != started, "another port: it ran again"


def test_what_a_repeated_step_invalidates_starts_over_however_it_ends(bench: Bench) -> None:
    """Step 2 could not go on from its checkpoints of another step 1, and is not finished where train.py is killed."""
    assert bench.train() == 0
    run = bench.output / "tiny"
    shutil.rmtree(run / "step1")
    for step in ("step2", "step3"):
        (run / step / "checkpoints" / "step-00000004").mkdir(parents=True)
    assert bench.train("--output_dir", "output/tiny", "--step1_args", "--data_output_path fail:3") == 3
    for step in ("step2", "step3"):
        assert not folders.is_finished(run / step) and not any((run / step / "checkpoints").iterdir())
    assert bench.train("--output_dir", "output/tiny", "--step1_args=") == 0
    assert folders.is_finished(run / "step3")


def test_a_step_that_is_made_again_alone_ends_what_was_made_from_it(bench: Bench, capfd: pytest.CaptureFixture) -> None:
    assert bench.train() == 0
    run = bench.output / "tiny"
    shutil.rmtree(run / "step1")
    capfd.readouterr()
    assert bench.train("--output_dir", "output/tiny", "--step", "1") == 0
    said = capfd.readouterr().out
    assert "note: step 2 and step 3, made from another step 1, no longer count as finished: train.py without" in said
    assert not folders.is_finished(run / "step2") and not folders.is_finished(run / "step3")
    assert "failed" not in said + (run / "report.html").read_text().partition("</style>")[2]
    assert bench.train("--output_dir", "output/tiny") == 0
    assert "note:" not in capfd.readouterr().out and folders.is_finished(run / "step3")


def test_a_step_that_was_not_made_from_the_one_that_is_made_again_stays(bench: Bench, tiny_model: Path) -> None:
    """Nor does what lies in another run and is linked from this one lose anything."""
    assert bench.train("--reward_model_name_or_path", str(tiny_model), "--data_path", "demo") == 0
    run, before = bench.output / "tiny", bench.manifest()["steps"]["step2"]
    shutil.rmtree(run / "step1")
    assert bench.train("--output_dir", "output/tiny") == 0
    assert bench.manifest()["steps"]["step2"] == before, "it began with a model of its own"
    assert bench.train("--output_dir", "output/other") == 0
    shutil.rmtree(bench.output / "other" / "step2")
    (bench.output / "other" / "step2").symlink_to(run / "step2")
    shutil.rmtree(bench.output / "other" / "step1")
    assert bench.train("--output_dir", "output/other") == 0
    assert folders.is_finished(run / "step2") and bench.manifest()["steps"]["step2"] == before


def test_a_step_that_comes_again_is_looked_at_before_the_first(bench: Bench, tmp_path: Path) -> None:
    """It was finished, and is to start over: what it would be refused for is said before step 1 takes hours."""
    assert bench.train() == 0
    shutil.rmtree(bench.output / "tiny" / "step1")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": "c", "response": "d"}\n')
    with pytest.raises(UserError, match="step 2 learns from preference pairs, and none of 2 rows is one"):
        bench.train("--output_dir", "output/tiny", "--data_path", str(tmp_path / "rows.jsonl"))
    assert folders.is_finished(bench.output / "tiny" / "step2"), "nothing has happened"


def test_a_run_that_was_moved_is_the_same_run(
    bench: Bench, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (bench.folder / "rows.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 2)
    demo = ("--step2_args", "--data_path demo", "--step3_args", "--data_path demo")
    assert bench.train("--step1_args", "--data_path rows.jsonl", *demo) == 0
    (bench.folder / "disk").mkdir()
    shutil.move(bench.output / "tiny", bench.folder / "disk" / "moved")
    monkeypatch.chdir(bench.folder / "disk")
    capfd.readouterr()
    assert train.main(["--output_dir", "moved"], launcher=bench.launcher, scripts=bench.scripts) == 0
    assert "step 3 is finished\n" in (said := capfd.readouterr().out) and "with other flags" not in said


def test_a_long_text_with_a_full_stop_is_no_file(bench: Bench, capfd: pytest.CaptureFixture) -> None:
    text = "Be brief. " * 40
    assert bench.train("--system_message", text, "--data_path", "demo") == 0
    assert bench.train("--output_dir", "output/tiny") == 0
    assert "step 3 is finished\n" in capfd.readouterr().out


def test_plan_asks_each_step_and_makes_no_run(
    bench: Bench, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    echo = bench.folder / "step.py"
    echo.write_text(
        "import os, sys\n"
        "print('arguments', os.environ['WORLD_SIZE'], *sys.argv[1:])\n"
        "sys.exit('ppo_epochs' in str(sys.argv))"
    )
    assert bench.train("--plan", "--num_gpus", "4", "--actor_model_name_or_path", "my/base") == 1, "step 3 does not fit"
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("arguments 4 ")]
    assert len(lines) == 3 and all(line.endswith("--plan") for line in lines)
    assert lines[1].startswith("arguments 4 --model_name_or_path my/base ")  # step 1's output is of the same shape
    assert "--critic_model_name_or_path my/base " in lines[2]
    assert not bench.output.exists()


def test_nothing_to_run_or_named_twice_is_said(bench: Bench) -> None:
    with pytest.raises(UserError, match="--step 3: there is none in --pipeline sft,dpo"):
        bench.train("--pipeline", "sft,dpo", "--step", "3")
    with pytest.raises(UserError, match="--step1_args: --output_dir is given by train.py"):
        bench.train("--step1_args", "--output-dir elsewhere")
    assert not bench.output.exists()


def test_starts_in_the_middle(bench: Bench) -> None:
    with pytest.raises(UserError, match=r"finished step 1; make it with: .*deepspeed --num_gpus 1 .*step1"):
        bench.train("--step", "2")
    assert not (bench.output / "tiny").exists()
    named = ["--actor_model_name_or_path", "my/sft", "--data_path", "demo"]
    with pytest.raises(UserError, match="--model_name_or_path my/sft: name the data too, --data_path FILE"):
        bench.train("--step", "2", *named[:2])
    assert not (bench.output / "tiny").exists()
    assert bench.train("--step", "2", *named) == 0
    assert bench.arguments("step2").startswith("--model_name_or_path my/sft ")
    assert bench.train("--step", "3", *named, "--reward_model_name_or_path", "my/rm") == 0
    assert "--critic_model_name_or_path my/rm " in bench.arguments("step3", "tiny-2")
    assert bench.train("--step", "3", *named) == 0  # the newest run's reward model
    assert "--critic_model_name_or_path output/tiny/step2 " in bench.arguments("step3", "tiny-3")


def test_a_model_that_no_step_takes_is_said(bench: Bench, capfd: pytest.CaptureFixture) -> None:
    reward, actor = "--reward_model_name_or_path", "--actor_model_name_or_path"
    assert bench.train("--pipeline", "sft,dpo", "--data_path", "demo", reward, "my/rm") == 0
    assert f"note: {reward} has no effect: no step that runs takes it" in capfd.readouterr().out
    both = (actor, "my/sft", reward, "my/rm", "--data_path", "demo")
    assert bench.train("--step", "2", *both) == 0
    assert f"note: {actor} has no effect: no step" in capfd.readouterr().out
    assert bench.train("--step", "3", *both) == 0 and "no effect" not in capfd.readouterr().out


def test_models_by_flag_and_by_recipe(bench: Bench) -> None:
    recipe = "step1: {model_name_or_path: a/b%s}\nstep2: {model_name_or_path: c/d%s}\nstep3: {gamma: 1%s}\n"
    bench.recipe.write_text(recipe % ("", "", ""))
    with pytest.raises(UserError, match="--model_name_or_path a/b: name the data too"):
        bench.train()
    bench.recipe.write_text(recipe % ((", data_path: demo",) * 3))
    assert bench.train() == 0
    assert bench.arguments("step1").startswith("--model_name_or_path a/b ")
    assert bench.arguments("step2").startswith("--model_name_or_path c/d ")
    assert bench.train("--actor_model_name_or_path", "e/f", "--reward_model_name_or_path", "g/h") == 0
    assert bench.arguments("step1", "tiny-2").startswith("--model_name_or_path e/f ")
    assert bench.arguments("step2", "tiny-2").startswith("--model_name_or_path g/h ")


def test_a_recipe_may_lie_in_the_home_folder_and_share_flags(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(bench.folder))
    text = "step1: &same {seed: 1, gamma: 2}\nstep2: &more {<<: *same, seed: 3}\nstep3: {<<: *more, seed: 4}"
    (bench.folder / "mine.yaml").write_text(text)
    path, sections = read_recipe("~/mine.yaml")
    assert path == str(bench.folder / "mine.yaml")
    assert [sections[name] for name in sections] == [{"seed": seed, "gamma": 2} for seed in (1, 3, 4)]


def test_recipe_values(bench: Bench) -> None:
    (bench.folder / "recipes").mkdir()
    (bench.folder / "recipes" / "own.jsonl").touch()
    (bench.folder / "x.jsonl").touch()
    recipe = bench.folder / "recipes" / "r.yaml"
    recipe.write_text(
        textwrap.dedent("""
            step1:
              offload: true
              gradient_checkpointing: false
              data_path: [demo, x.jsonl]
              learning_rate: 1e-5
              system_message: -3
              data_split: null
              eval_data_path: ./own.jsonl:4
              data_output_path: ./missing.py
        """)
    )
    assert bench.train("--recipe", str(recipe), "--step", "1") == 0
    assert bench.arguments("step1", "r").partition("step1 ")[2] == (
        "--offload --no-gradient_checkpointing --data_path demo x.jsonl --learning_rate 1e-5 --system_message=-3 "
        "--eval_data_path recipes/own.jsonl:4 --data_output_path ./missing.py"
    )


BAD = [
    (["--num_gpu", "2"], "unknown flag --num_gpu; did you mean --num_gpus"),
    (["--num_gpus", "0"], "--num_gpus is 0, it must be at least 1"),
    (["--num_gpus", "1000000"], "--num_gpus is 1000000, it must be at least 1 and at most 1024"),
    (["--step", "4"], "invalid choice: 4"),
    (["--recipe", "nosuch"], "no recipe of that name; there are: .*demo"),
    (["--recipe", "~/none.yaml"], "--recipe ~/none.yaml: no such file, and no recipe of that name; there are: .*demo"),
    (["--recipe", "sub/none"], "no recipe of that name; there are: .*demo, "),
    (["--recipe", "../recipes/demo"], "no recipe of that name; there are: .*demo, "),
    (["--recipe", "twice.yaml"], "twice.yaml: not readable as YAML: line 3: step1 stands there again, as in line 1"),
    (["--recipe", "flag.yaml"], "line 3: seed stands there again, as in line 2"),
    (["--recipe", "flow.yaml"], "line 1: seed stands there again, as in line 1"),
    (["--recipe", "day.yaml"], "day.yaml: not readable as YAML: "),
    (["--recipe", "section.yaml"], "unknown section stpe1; did you mean step1"),
    (["--recipe", "list.yaml"], "needs sections"),
    (["--recipe", "flags.yaml"], "section step1 holds no flags"),
    (["--recipe", "broken.yaml"], "not readable as YAML"),
    (["--recipe", "output.yaml"], "step1 gets --output_dir from train.py"),
    (["--recipe", "nested.yaml"], "step1: optimizer can not hold a section"),
    (["--step1_args", "--output_dir x"], "--output_dir is given by train.py"),
    (["--step3_args", "--plan"], "--step3_args: --plan is given by train.py"),
    (["--recipe", "plan.yaml"], "step2 gets --plan from train.py"),
    (["--step2_args", "mine.jsonl --seed 1"], "--step2_args: mine.jsonl stands before the first flag"),
    (["--step1_args", "'open"], "--step1_args: No closing quotation"),
    (["--output_dir", "file/run"], "--output_dir .*file/run can not be made"),
    (["--output_dir", "site"], "--output_dir site holds a manifest.json that no run made"),
    (["--output_dir", "pages"], "--output_dir: .*report.html: there is such a file, and it is no page of this"),
    (["--output_dir", "logs"], "--output_dir .*logs holds step2.log, which no run made"),
    (["--step3_args", "--ppo_epoch 2"], "^step 3.*: unknown flag --ppo_epoch; did you mean --ppo_epochs"),
    (["--step2_args", "--learning_rate fast"], "^step 2.*: argument --learning_rate: invalid float value: 'fast'"),
    (["--step3_args", "--advantage grpo"], "^step 3.*: --advantage grpo compares"),
    (["--recipe", "unknown.yaml"], "^step 2.*: unknown flag --learning_rat; did you mean --learning_rate"),
    (["--pipeline", "sft,dpo", "--dpo_args", "--offload_reference_model"], "^DPO: --offload_reference_model moves"),
    (["--dpo_args", "--beta 0.5"], "--dpo_args: there is no DPO in --pipeline"),
    (["--pipeline", "sft,dpo", "--step2_args", "--loss log_exp"], "--step2_args: there is no .* in --pipeline sft,dpo"),
    (["--step1_args", "--seed 1", "--step1_args=--seed 2"], "--step1_args is given twice"),
    (["--data_path"], "--data_path: expected at least one argument"),
    (
        ["--model_name_or_path", "a/b", "--actor_model_name_or_path", "c/d"],
        "--model_name_or_path a/b and --actor_model_name_or_path c/d are the same flag here",
    ),
    (["--output_dir", "bad"], "manifest.json is not readable as JSON"),
]


@pytest.mark.parametrize(("argv", "message"), BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_bad_flags_end_before_anything_runs(bench: Bench, argv: list[str], message: str) -> None:
    files = {
        "section.yaml": "stpe1: {}",
        "twice.yaml": "step1: {seed: 1}\nstep2: {seed: 1}\nstep1: {seed: 2}",
        "flag.yaml": "step1:\n  seed: 1\n  seed: 2",
        "flow.yaml": 'step1: {seed: 1, "seed": 2}',
        "day.yaml": "step1: {seed: 2026-99-99}",
        "list.yaml": "[1]",
        "flags.yaml": "step1: 3",
        "broken.yaml": "step1: {a: [}",
        "output.yaml": "step1: {output_dir: x}",
        "nested.yaml": "step1: {optimizer: {lr: 1}}",
        "unknown.yaml": "step2: {learning_rat: 1}",
        "plan.yaml": "step2: {plan: true}",
        "file": "",
        "pages/report.html": "<html>my own report</html>",
        "logs/step2.log": "my log",
        "site/manifest.json": '{"name": "a page"}',
        "bad/manifest.json": "{",
    }
    for folder in ("pages", "logs", "site", "bad"):
        (bench.folder / folder).mkdir()
    for name, text in files.items():
        (bench.folder / name).write_text(text)
    with pytest.raises(UserError, match=message):
        bench.train(*argv)
    assert not bench.output.exists()
    assert all((bench.folder / name).read_text() == text for name, text in files.items())


def test_bad_flag_as_a_program() -> None:
    root = folders.repository_root()
    done = subprocess.run([sys.executable, root / "train.py", "--stpe", "1"], capture_output=True, text=True, cwd=root)
    assert done.returncode == 2
    assert done.stderr == "error: unknown flag --stpe; did you mean --step?\n" and not done.stdout


def test_two_at_work_in_one_run(bench: Bench) -> None:
    (bench.output / "tiny").mkdir(parents=True)
    with (
        folders.locked(bench.output / "tiny", "another train.py"),
        pytest.raises(UserError, match="another train.py is at work"),
    ):
        bench.train("--output_dir", "output/tiny")


@pytest.mark.parametrize(
    "text",
    [
        b"[]",
        b"{",
        b"",
        b"\xff\xfe",
        b'{"steps": []}',
        b'{"steps": {"step1": 3}}',
        b'{"steps": {"step1": {"arguments": "x"}}}',
        b'{"versions": "1"}',
        b"[" * 100_000,
    ],
)
def test_a_damaged_manifest_is_one_line(bench: Bench, text: bytes) -> None:
    (bench.output / "tiny").mkdir(parents=True)
    (bench.output / "tiny" / "manifest.json").write_bytes(text)
    with pytest.raises(UserError, match=r"manifest\.json"):
        bench.train("--output_dir", "output/tiny")


def test_two_steps_in_one_folder(tmp_path: Path) -> None:
    """One of two programs that write to the same files would lose its metrics, without a word."""
    call = f"from training.utils.run.folders import prepare_output_dir as p; p({str(tmp_path)!r}, 'step1')"
    hold = subprocess.Popen([sys.executable, "-c", f"{call}; print('held', flush=True); input()"],
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert hold.stdout is not None and hold.stdin is not None
    assert hold.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="another run is at work in"):
        folders.prepare_output_dir(str(tmp_path), "step1")
    hold.communicate("\n")
    assert folders.prepare_output_dir(str(tmp_path), "step1") == folders.prepare_output_dir(str(tmp_path), "step1")


PAIRS = "".join(f'{{"prompt": "{p}", "chosen": "Hi!", "rejected": "No."}}\n' for p in ("Hello", "Bye"))


def own_run(bench: Bench, *argv: str) -> int:
    """train.py on data of the user's own, without a recipe if none is given."""
    (bench.folder / "mine.jsonl").write_text(PAIRS)
    return train.main(list(argv), launcher=bench.launcher, scripts=bench.scripts)


def test_shared_flags_reach_every_step_and_win_over_the_recipe(bench: Bench) -> None:
    bench.recipe.write_text(
        "step1: {seed: 1, dtype: bf16}\nstep2: {data_path: [demo, other.csv]}\nstep3: {offload: true}\n"
    )
    every = ["--data_path", "mine.jsonl", "--dtype", "fp32", "--seed", "7", "--no-offload", "--num_warmup_steps", "2"]
    model = ["--model_name_or_path", "my/base", "--step2_args", "--seed 8"]
    assert own_run(bench, "--recipe", str(bench.recipe), *every, *model) == 0
    for step in ("step1", "step2", "step3"):
        argv = bench.arguments(step)
        for words in ("--data_path mine.jsonl", "--dtype fp32", "--no-offload", "--num_warmup_steps 2"):
            assert f"{words} " in f"{argv} ", (step, words)
        assert ("--seed 8" if step == "step2" else "--seed 7") in argv and argv.count("--data_path") == 1
        assert not any(word in argv for word in ("--seed 1 ", "bf16", "--offload", "demo", "other.csv"))
    assert bench.arguments("step2").endswith("--seed 8")
    assert bench.arguments("step1").startswith("--model_name_or_path my/base ")


def test_another_name_of_a_flag_wins_over_the_recipe(bench: Bench) -> None:
    bench.recipe.write_text("step3: {num_iterations: 5, ppo_epochs: 1}")
    assert bench.train("--step3_args", "--test_stop_step 3") == 0
    argv = bench.arguments("step3")
    assert argv.endswith(" --ppo_epochs 1 --test_stop_step 3") and "--num_iterations" not in argv


def test_every_shared_flag_is_one_of_each_step() -> None:
    names = {field.name for field in dataclasses.fields(SharedArguments)}
    assert names >= {"data_path", "eval_data_path", "column_map", "dtype", "seed", "deepspeed_config", "report_to"}
    assert not names & {"output_dir", "resume", "plan", "model_name_or_path", "learning_rate", "loss", "kl_coef"}
    for groups in GROUPS.values():
        assert names <= {field.name for group in groups for field in dataclasses.fields(group)}


@pytest.mark.parametrize(
    "argv", [["--data_path", "mine.jsonl"], ["--step", "1", "--step1_args", "--data_path mine.jsonl"]]
)
def test_own_data_start_from_their_own_recipe(bench: Bench, argv: list[str]) -> None:
    assert own_run(bench, *argv) == 0
    manifest = bench.manifest("start")
    assert manifest["recipe"]["name"] == "start" and "demo" not in json.dumps(manifest["steps"])
    assert "--eval_function" not in json.dumps(manifest)


def test_own_data_take_nothing_of_the_demo_recipe(bench: Bench, capfd: pytest.CaptureFixture) -> None:
    assert own_run(bench, "--recipe", "demo", "--data_path", "mine.jsonl") == 0
    [line] = [line for line in capfd.readouterr().out.splitlines() if line.startswith("recipe demo: ")]
    assert "data_path of step 2" in line and "eval_function of step 3" in line
    argvs = [entry["arguments"] for entry in bench.manifest("demo")["steps"].values()]
    assert "--eval_function" not in argvs[2] and "--advantage" in argvs[2], "the rest of the recipe stays"
    for argv in argvs:
        assert not any(token.startswith("demo") or "data/demo" in token for token in argv)


def test_own_data_stay_when_the_run_goes_on(bench: Bench) -> None:
    assert own_run(bench, "--data_path", "mine.jsonl", "--step3_args=--data_output_path fail:3") == 3
    again = ["--resume", "auto", "--step3_args", ""]
    assert train.main(again, launcher=bench.launcher, scripts=bench.scripts) == 0
    lines = (bench.output / "start" / "step3.log").read_text().splitlines()
    assert all("--data_path mine.jsonl" in line for line in lines if line.startswith("arguments "))


REFUSED = [
    (["--step1_args", "--data_path mine.jsonl"], "step 1 has data of its own, step 2 and step 3 would"),
    (["--data_path", "plain.csv"], "plain.csv: step 2 learns from preference pairs, and none of 2 rows"),
    (["--data_path", "same.csv"], "same.csv: step 2 learns from preference pairs, and none of 1 rows"),
    (["--data_path", "one.csv"], "one.csv: step 2 needs preference pairs of two prompts.*--eval_data_path"),
    (["--data_path", "turns.csv"], "turns.csv: step 2 needs preference pairs of two prompts, which begin differently"),
    (["--data_path", "mine.jsonl", "--eval_data_path", "plain.csv"],
     "^--eval_data_path plain.csv: step 2 is judged by preference pairs, and none of 2 rows"),
    (["--data_path", "mine.jsonl", "--step3_args", "--data_path text.txt"],
     "^--data_path text.txt: step 3 learns from prompts, and none of 1 rows has one; "),
    (["--data_path", "mine.jsonl", "--step3_args", "--data_path one.csv"],
     "^--data_path one.csv: step 3 needs rows of two prompts"),
    (["--data_path", "odd.csv"], r"odd.csv:2: no known format has the columns a, b"),
    (["--data_path", "none.csv"], "--data_path none.csv: no such file"),
    (["--data_path", "mine.jsonl", "--model_name_or_path", "./none"], "./none: no such folder"),
    (["--data_path", "mine.jsonl", "--step3_args", "--eval_function none.py:f"], "--eval_function none.py:f: no such"),
    (["--data_path"], "--data_path: expected at least one argument"),
    (["--learning_rate", "1e-5"], "--learning_rate is a flag of step 1, step 2, DPO alone: .* or --dpo_args"),
    (["--kl_coef=1"], "--kl_coef is a flag of step 3 alone: .*--step3_args"),
    (["--loss", "log_exp"], "--loss is a flag of step 2, DPO alone: .*--step2_args or --dpo_args"),
    (["--seed", "-1"], "--seed is -1, it must be at least 0"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "message"), REFUSED, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_own_data_are_refused_before_anything_is_made(bench: Bench, argv: list[str], message: str) -> None:
    (bench.folder / "plain.csv").write_text("prompt,response\nHello,Hi\nBye,See you\n")
    (bench.folder / "odd.csv").write_text("a,b\n1,2\n")
    (bench.folder / "one.csv").write_text("prompt,chosen,rejected\nHello,Hi,No\nHello,Hi,Yes\n")
    chat = "\n\nHuman: Hello\n\nAssistant: Hi\n\nHuman: And you?\n\nAssistant:"
    (bench.folder / "turns.csv").write_text(f'prompt,chosen,rejected\nHello,Hi,No\n"{chat}",Well,No\n')
    (bench.folder / "text.txt").write_text("One text.\n")
    (bench.folder / "same.csv").write_text("prompt,chosen,rejected\nHello,Hi,Hi\n")
    with pytest.raises(UserError, match=message):
        own_run(bench, *argv)
    assert not bench.output.exists()


def test_a_model_of_a_hub_out_of_reach_is_said_before_anything_is_made(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "is_reachable", lambda: False)
    with pytest.raises(UserError, match="no-one/no-model: no folder here, .*give the folder of a model, or embedded"):
        own_run(bench, "--data_path", "mine.jsonl", "--model_name_or_path", "no-one/no-model")
    assert not bench.output.exists()


def call_reward_model(folder: Path) -> None:
    """Let a language model's folder say that it is a reward model's."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForSequenceClassification"]}))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        slow(["--step", "2", "3", "--actor_model_name_or_path", "reward"],
         "^step 3: --actor_model_name_or_path .*reward is a LlamaForSequenceClassification, a reward model"),
        slow(["--step", "1", "2", "--reward_model_name_or_path", "mute"],
         "^step 2: .*mute: no tokenizer can be loaded from it"),
        (["--step1_args", "--chat_template chatml", "--step3_args", "--max_prompt_seq_len 500"],
         r"^step 3: --max_prompt_seq_len \+ --max_answer_seq_len asks for 628 tokens, the model has positions for 512"),
    ],
    ids=["a reward model as actor", "no tokenizer", "too long, and the template is step 1's"],
)  # fmt: skip
def test_what_a_later_step_would_refuse_is_said_before_the_first(
    bench: Bench, tiny_model: Path, argv: list[str], message: str
) -> None:
    """By the steps' own programs."""
    shutil.copytree(tiny_model, bench.folder / "reward")
    call_reward_model(bench.folder / "reward")
    shutil.copytree(tiny_model, bench.folder / "mute", ignore=shutil.ignore_patterns("*token*"))
    shutil.copytree(tiny_model, bench.folder / "base")
    (bench.folder / "base" / "chat_template.jinja").write_text("{{ raise_exception('none') }}")
    (bench.folder / "mine.jsonl").write_text(PAIRS)
    start = "base" if "--step3_args" in argv else str(tiny_model)
    model = [] if "--actor_model_name_or_path" in argv else ["--model_name_or_path", start]
    with pytest.raises(UserError, match=message):
        train.main(["--data_path", "mine.jsonl", *model, *argv], launcher=bench.launcher)
    assert not bench.output.exists()


def test_later_steps_are_asked_too_where_other_hosts_compute(
    bench: Bench, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a precision that they may have, and this one does not."""
    stand_in(tmp_path / "bin" / "ssh", "true", monkeypatch)
    monkeypatch.setattr(train, "has_accelerator", lambda: False)
    (tmp_path / "hosts").write_text("near slots=2\n")
    (bench.folder / "mine.jsonl").write_text(PAIRS)
    argv = ["--data_path", "mine.jsonl", "--model_name_or_path", str(tiny_model), "--hostfile", "hosts"]
    with pytest.raises(UserError, match=r"^step 3: --max_prompt_seq_len \+ --max_answer_seq_len asks for"):
        train.main([*argv, "--dtype", "fp16", "--step3_args", "--max_prompt_seq_len 500"], launcher=bench.launcher)
    assert not bench.output.exists()


def test_a_reward_model_that_is_none_is_said_before_anything_is_made(bench: Bench, tiny_model: Path) -> None:
    folder = shutil.copytree(tiny_model, bench.folder / "model")
    given = ("--data_path", "mine.jsonl", "--step", "1", "3", "--reward_model_name_or_path", "model")
    with pytest.raises(UserError, match="^model: a language model without a reward head; step 2 trains one"):
        own_run(bench, *given)
    call_reward_model(folder)
    with pytest.raises(UserError, match="^model/reward_stats.json is missing; .* --no-normalize_reward"):
        own_run(bench, *given)
    assert not bench.output.exists()
    assert own_run(bench, *given, "--step3_args", "--no-normalize_reward") == 0


def test_the_demos_recipe_is_not_taken_for_a_named_model(bench: Bench) -> None:
    for flag in ("--actor_model_name_or_path", "--reward_model_name_or_path"):
        with pytest.raises(UserError, match=f"{flag} my/model: name the data too, --data_path FILE"):
            own_run(bench, flag, "my/model")
    assert not bench.output.exists()
    assert own_run(bench, "--actor_model_name_or_path", "my/model", "--recipe", "demo") == 0, "it was asked for"
    assert "--data_path demo " in bench.arguments("step1", "demo")


def test_own_data_given_to_each_step_are_asked_for_again(bench: Bench) -> None:
    """Else the unfinished steps of the run would go on with the demo."""
    each = [text for n in (1, 2, 3) for text in (f"--step{n}_args", "--data_path mine.jsonl")]
    assert own_run(bench, *each[:-1], each[-1] + " --data_output_path fail:3") == 3
    with pytest.raises(UserError, match="step 1 has data of its own, step 3 would train on the demo"):
        own_run(bench, "--resume", "auto", "--step3_args", "")


def test_a_run_goes_on_with_its_own_models_and_flags_of_steps(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """Also from another folder, in which a file of the same name lies."""
    (bench.folder / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (bench.folder / "model" / name).write_text("{}")
    flags = [
        "--data_path",
        "mine.jsonl",
        "--model_name_or_path",
        "model",
        "--step2_args",
        "--eval_data_path mine.jsonl",
    ]
    assert own_run(bench, *flags, "--step1_args", "--data_output_path fail:3") == 3
    assert "--model_name_or_path model" in bench.arguments("step1", "start")
    (bench.folder / "other").mkdir()
    (bench.folder / "other" / "mine.jsonl").write_text(PAIRS)
    monkeypatch.chdir(bench.folder / "other")
    again = ["--resume", "auto", "--step1_args", ""]
    assert train.main(again, launcher=bench.launcher, scripts=bench.scripts) == 0
    argvs = {name: " ".join(entry["arguments"]) for name, entry in bench.manifest("start")["steps"].items()}
    assert f"--model_name_or_path {bench.folder}/model " in argvs["step1"]
    data = f"data_path {bench.folder}/mine.jsonl"
    assert all(f"--{data}" in argv for argv in argvs.values()) and f"--eval_{data}" in argvs["step2"]
    monkeypatch.chdir("/")
    capfd.readouterr()
    assert train.main(["--resume", "auto"], launcher=bench.launcher, scripts=bench.scripts) == 0
    assert "with other flags" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("steps", "model"), [("2 3", "--actor_model_name_or_path"), ("1 3", "--reward_model_name_or_path")]
)
def test_a_run_goes_on_without_the_step_that_it_has_left_out(bench: Bench, steps: str, model: str) -> None:
    """Else that step would train, and those after it again, over what is finished."""
    ran = [f"step{number}" for number in steps.split()]
    assert own_run(bench, "--data_path", "mine.jsonl", "--step", *steps.split(), model, "my/model") == 0
    assert own_run(bench, "--resume", "auto") == 0
    assert [name for name in folders.STEPS if (bench.output / "start" / name).is_dir()] == ran


def test_own_data_do_not_go_on_from_the_demo(bench: Bench) -> None:
    assert own_run(bench, "--step", "1") == 0
    with pytest.raises(UserError, match="newest step 1, output/demo/step1, has trained on the demo: .*--actor_model"):
        own_run(bench, "--data_path", "mine.jsonl", "--step", "2")
    assert own_run(bench, "--data_path", "mine.jsonl", "--step", "1") == 0
    assert own_run(bench, "--data_path", "mine.jsonl", "--step", "2") == 0
    assert "--model_name_or_path output/start/step1 " in bench.arguments("step2", "start-2")
    named = ("--actor_model_name_or_path", "output/demo/step1")
    assert own_run(bench, "--data_path", "mine.jsonl", "--step", "2", *named) == 0, "by its name it may be had"


def test_rows_without_pairs_train_step_1(bench: Bench) -> None:
    (bench.folder / "plain.csv").write_text("prompt,response\nHello,Hi\n")
    assert own_run(bench, "--data_path", "plain.csv", "--step", "1") == 0


@pytest.mark.parametrize("kind", ["csv", pytest.param("json", marks=pytest.mark.slow)])
def test_own_rows_through_the_three_real_steps(bench: Bench, tiny_model: Path, kind: str) -> None:
    """60 pairs, the programs themselves, a tiny model: every step trains on them and no argument names the demo."""
    rows = [
        {"prompt": f"What is {n} plus {n}?", "chosen": f"It is {2 * n}.", "rejected": f"I like {n}."} for n in range(60)
    ]
    path = bench.folder / f"mine.{kind}"
    with path.open("w", newline="") as file:
        if kind == "json":
            json.dump(rows, file)
        else:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    model = [
        "--model_name_or_path",
        str(tiny_model),
        "--dtype",
        "fp32",
        "--report_to",
        "none",
        "--num_train_epochs",
        "1",
    ]
    tuning = "--max_seq_len 128 --per_device_train_batch_size 16"
    rlhf = "--max_prompt_seq_len 64 --max_answer_seq_len 8 --num_iterations 1 --eval_every 0"
    steps = ["--step1_args", tuning, "--step2_args", tuning, "--step3_args", rlhf]
    assert train.main(["--data_path", path.name, *model, *steps], launcher=bench.launcher) == 0
    for name, entry in bench.manifest("start")["steps"].items():
        argv = entry["arguments"]
        assert not any(token.startswith("demo") or "data/demo" in token for token in argv), name
        assert argv[argv.index("--data_path") + 1] == path.name and path.name in entry["inputs"]
        log = (bench.output / "start" / f"{name}.log").read_text()
        assert f"{path.name}: 60 rows" in log, log[-2000:]
    assert (bench.output / "start" / "step3" / "actor" / "config.json").is_file()


def _wait_for(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_reach_the_step_and_nothing_is_left(bench: Bench, number: signal.Signals) -> None:
    check_the_end(bench, number, hear_signals)


def test_a_background_job_hears_sigterm_alone(bench: Bench) -> None:
    check_the_end(bench, signal.SIGTERM, as_in_the_background, passed_over=(signal.SIGINT, signal.SIGHUP))


def check_the_end(bench: Bench, number: signal.Signals, start: Callable[[], None], passed_over=()) -> None:
    driver = bench.folder / "driver.py"
    driver.write_text(
        f"import sys; sys.path.insert(0, {str(folders.repository_root())!r}); import train\n"
        f"sys.exit(train.main(sys.argv[1:], launcher={bench.launcher!r}, scripts={bench.scripts!r}))\n"
    )
    argv = [sys.executable, driver, "--recipe", bench.recipe, "--step1_args=--data_output_path hang"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=start)
    step = bench.output / "tiny" / "step1"
    _wait_for((step / "hanging").exists)
    for ignored in passed_over:
        process.send_signal(ignored)
    process.send_signal(number)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert (step / "cleaned").exists(), "train.py waited for the step, although the launcher had gone"
    assert f"step 1 was stopped by {number.name}" in error and "Traceback" not in error
    assert "--output_dir output/tiny" in error.splitlines()[-1]
    assert bench.manifest()["steps"]["step1"]["exit_code"] == 128 + number


def test_what_does_not_end_is_killed(tmp_path: Path) -> None:
    code = "import signal, os, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(os.getpid(), flush=True)"
    parent = (
        "import subprocess, sys\n"
        f"p = subprocess.Popen([sys.executable, '-c', {code + '; time.sleep(60)'!r}], stdout=subprocess.PIPE)\n"
        "print(p.stdout.readline().decode(), flush=True)\n"
        "sys.exit(3)\n"
    )
    start = time.monotonic()
    assert run_logged([sys.executable, "-c", parent], tmp_path / "log", grace=1.0).code == 3
    assert time.monotonic() - start < 15
    pid = int(last_lines(tmp_path / "log", 1)[0])
    status = Path(f"/proc/{pid}/stat")
    _wait_for(lambda: not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z")


def test_line_log(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with path.open("wb", buffering=0) as file:
        log = LineLog(file)
        for piece in (b"one\r\n\x1b[31mtw", b"o\x1b[0m\n", b"\r10%", b"\r20", b"%\r", b"\r30%"):
            log.feed(piece)
        log.close()
    assert path.read_text() == "one\ntwo\n30%\n"
    assert last_lines(path, 2) == ["two", "30%"]


def test_a_run_goes_on_when_nobody_reads_its_output(bench: Bench) -> None:
    """Such as behind `| head`; what it has to say of a step that fails stands on the other stream."""
    program = f"""
import sys, train
train.STEPS, train.deepspeed_launcher = {bench.scripts!r}, lambda: {bench.launcher!r}
sys.exit(train.run_pipeline())
"""
    flags = ["--recipe", str(bench.recipe), "--step3_args", "--data_output_path fail:5"]
    command = [sys.executable, "-c", program, *flags]
    there = os.environ | {"PYTHONPATH": folders.python_path()}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=there) as process:
        assert process.stdout is not None and process.stderr is not None
        while not process.stdout.readline().startswith("== step 1"):
            continue
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 5, said
    assert "Traceback" not in said and "step 3 failed with exit code 5" in said
    assert folders.is_finished(bench.output / "tiny" / "step2") and (bench.output / "tiny" / "report.html").is_file()


def test_a_full_disk_costs_the_log_and_not_the_step(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    ended = run_logged([sys.executable, "-c", "print('one'); print('two'); raise SystemExit(3)"], Path("/dev/full"))
    assert ended.code == 3
    out, err = capfdbinary.readouterr()
    assert out == b"one\ntwo\n"
    assert err == b"warning: the log can not be written: No space left on device\n"


def test_table_tolerates_missing_numbers(tmp_path: Path) -> None:
    assert summary_table(tmp_path, {}) == "" and answers_text(tmp_path) == ""
    (tmp_path / "step3").mkdir()
    turns = ('[{"prompt": 5}]', '[{"prompt": [3], "answers": {}}]', '[{"prompt": [{"content": null}], "answers": {}}]')
    answers = ('[{"prompt": [], "answers": 3}]', '[{"prompt": [], "answers": {"sft": {"reward": "x"}}}]')
    for text in ("{", "3", "null", "[3]", "[" * 100_000, *turns, *answers):
        (tmp_path / "step3" / "samples.json").write_text(text)
        assert answers_text(tmp_path) == ""
    (tmp_path / "step3" / "samples.json").unlink()
    (tmp_path / "step3" / "summary.json").write_text('{"reward_before": "x", "reward_after": [], "seconds": "long"}')
    assert "summary.json is damaged" in summary_table(tmp_path, {})
    shutil.rmtree(tmp_path / "step3")
    for step, summary in (("step1", {}), ("step2", {"accuracy_after": 0.9}), ("step3", {"reward_after": 1.0})):
        (tmp_path / step).mkdir()
        (tmp_path / step / "summary.json").write_text(json.dumps(summary))
    table = summary_table(tmp_path, {"step2": 75.2})
    assert "1 min 15 s" in table and "0.900" in table and "+1.000" in table


def test_table_says_how_many_prompts_and_ties(tmp_path: Path) -> None:
    judge = {"name": "manner", "n": 6, "base": 0.25, "before": 0.4, "after": 0.6, "win_rate": 0.75, "low": 0.35,
             "high": 0.95, "ties": 1, "difference": 0.2, "difference_low": -0.1, "difference_high": 0.5}  # fmt: skip
    three = SUMMARY["step3"] | {"prompts": 6, "compared": 6, "ties": 4}
    three["eval_functions"] = [judge, judge | {"name": "content", "win_rate": 0.5}]
    two = SUMMARY["step2"] | {"accuracy_low": 0.5, "accuracy_high": 0.98, "held_out": 9, "ties": 0}
    for step, summary in {"step2": two, "step3": three}.items():
        (tmp_path / step).mkdir()
        (tmp_path / step / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "step3" / "samples.json").write_text(
        json.dumps([{"prompt": [], "answers": {"rlhf": {"text": "x", "reward": 1, "checks": {"content": 0.5}}}}])
    )
    table = summary_table(tmp_path, {})
    for words in (
        "95% interval 0.700 to 0.900, 6 prompts, 4 ties",
        "95% interval 0.350 to 0.950, 6 prompts, 1 tie",
        "95% interval 0.500 to 0.980, 9 pairs, 0 ties, always the longer: 0.400",
        "base +0.250, difference +0.200 [-0.100, +0.500]",
        "win rate by content",
    ):
        assert words in table, words
    assert "reward +1.00   content +0.50" in answers_text(tmp_path)


def test_table_and_answers_are_readable(tmp_path: Path) -> None:
    for step, summary in SUMMARY.items():
        (tmp_path / step).mkdir()
        (tmp_path / step / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "step3" / "samples.json").write_text(json.dumps(SAMPLES))
    lines = summary_table(tmp_path, {"step1": 12.0}).splitlines()
    assert lines[0].split() == ["before", "after"]
    column = lines[0].index("after") + len("after")
    assert all(len(line) <= column or line[column] == " " for line in lines), "numbers stand in columns"
    assert any("win rate by check.py:score" in line and "0.750" in line for line in lines)
    assert any("accuracy against warm empty" in line and "0.875" in line and "32 pairs" in line for line in lines)
    assert any("missed: chosen above rejected" in line and "1 of 2" in line for line in lines)
    text = answers_text(tmp_path, width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert "    First line.\n    Second line.\n" in text and "    (nothing)" in text
    assert (
        text.index("  base  reward -1.50") < text.index("  SFT   reward +0.50\n") < text.index("  RLHF  reward +2.00")
    )


class TestOutputFolders:
    """training/utils/run/folders.py without train.py: what the steps use when they run bare."""

    def finish(self, output: Path, *names: str) -> None:
        for name in names:
            (output / name).mkdir(parents=True, exist_ok=True)
            (output / name / "summary.json").write_text("{}")

    def test_bare_steps_share_a_run(self, bench: Bench) -> None:
        for step in ("step1", "step2", "step3"):
            assert folders.prepare_output_dir("", step) == bench.output / "run" / step
            self.finish(bench.output, f"run/{step}")
        assert folders.prepare_output_dir("", "step2") == bench.output / "run-2" / "step2", "nothing is overwritten"

    def test_unfinished_step_is_taken_up(self, bench: Bench) -> None:
        assert folders.prepare_output_dir("", "step1") == folders.prepare_output_dir("", "step1")

    def test_step1_does_not_join_a_run_with_later_steps(self, bench: Bench) -> None:
        self.finish(bench.output, "run/step2")
        folders.point_latest(bench.output / "run")
        assert folders.prepare_output_dir("", "step1") == bench.output / "run-2" / "step1"

    def test_a_run_that_the_link_names_is_the_run_itself(self, bench: Bench) -> None:
        """The link may move on, and must not lead to itself."""
        (bench.output / "run").mkdir(parents=True)
        folders.point_latest(bench.output / "run")
        named = bench.output / "latest" / "step1"
        assert folders.prepare_output_dir(str(named), "step1") == bench.output / "run" / "step1"
        assert (bench.output / "latest").readlink() == Path("run")
        self.finish(bench.output, *(f"run/{name}" for name in ("step1", "step2", "step3")))
        assert train.main(["--output_dir", str(bench.output / "latest"), "--data_path", "demo"]) == 0
        assert (bench.output / "latest").readlink() == Path("run")

    def test_a_folder_in_the_place_of_the_link(self, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
        """A copy that followed the link makes it, and so would a run of that name."""
        bench.output.mkdir()
        words = "is where the link to the newest run goes: give the folder another name"
        for named in ("latest", "new", ""):
            flags = ["--output_dir", str(bench.output / named)] if named else []
            assert run_program(train.main, flags) == 2 and words in capsys.readouterr().err
            with pytest.raises(UserError, match=words):
                folders.prepare_output_dir(str(bench.output / named / "step1") if named else "", "step1")
            assert not (bench.output / "new").exists()
            self.finish(bench.output, "latest/step1")
            assert folders.latest_run("step1/summary.json") == bench.output / "latest"
            assert folders.latest_output("step1") == bench.output / "latest" / "step1"

    def test_latest_output(self, bench: Bench) -> None:
        self.finish(bench.output, "a/step1", "b/step1")
        folders.point_latest(bench.output / "a")
        assert folders.latest_output("step1") == bench.output / "a" / "step1"
        self.finish(bench.output, "c/step2")
        assert folders.latest_output("step2") == bench.output / "c" / "step2"
        with pytest.raises(UserError, match="no run in output has finished step 3; make it with: .*deepspeed"):
            folders.latest_output("step3")

    def test_unwritable(self, bench: Bench) -> None:
        (bench.folder / "file").touch()
        with pytest.raises(UserError, match="--output_dir .*file/step1 can not be made"):
            folders.prepare_output_dir("file/step1", "step1")

    def test_ranks_agree(self, bench: Bench) -> None:
        code = "from training.utils.run.folders import prepare_output_dir as p; print(p('', 'step1'), p('', 'step2'))"
        outputs = []
        for _launch in range(2):
            env = os.environ | {"WORLD_SIZE": "2", "LOCAL_SIZE": "2", "MASTER_PORT": str(_launch)}
            ranks = [
                subprocess.Popen(
                    [sys.executable, "-c", code], env=env | {"RANK": rank}, stdout=subprocess.PIPE, text=True
                )
                for rank in ("1", "0")
            ]
            first, second = (rank.communicate(timeout=30)[0] for rank in ranks)
            assert first == second
            outputs.append(first)
            self.finish(bench.output, "run/step1", "run/step2")
            for note in bench.output.glob(".launch-*"):
                os.utime(note, (0, 0))
        assert "run/step1" in outputs[0] and "run-2/step1" in outputs[1]
        assert len(list(bench.output.glob(".launch-*"))) == 2, "the second launch has removed the first one's notes"

    def test_ranks_get_the_same_error(self, bench: Bench) -> None:
        (bench.folder / "file").touch()
        code = "from training.utils.run.folders import prepare_output_dir as p; p('', 'step1')"
        env = os.environ | {"WORLD_SIZE": "4", "LOCAL_SIZE": "2", "RANK": "1"}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert "several hosts can not agree on a new run: give --output_dir" in done.stderr
