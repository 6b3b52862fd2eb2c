"""The program of ``make gpu-check`` without a GPU: its stages on tiny models, its limits, its files and tables."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from training.utils.errors import run_program

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
STAGES = ("rollout", "step1", "step2", "step3", "shared", "host", "tests", "memory")


@pytest.fixture(scope="module")
def checks() -> ModuleType:
    return importlib.import_module("gpu_check")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("gpu_check")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_line(checks, capsys):
    assert run_program(checks.main, []) == 2
    told = capsys.readouterr()
    assert told.err.startswith("error: gpu_check needs a CUDA GPU: ") and told.err.count("\n") == 1 and not told.out


def test_a_cpu_takes_the_tiny_sizes_alone(checks, capsys):
    with pytest.raises(SystemExit, match="2"):
        checks.parse(["--device", "cpu"])
    assert "--tiny" in capsys.readouterr().err


def test_figures_are_written_over_figures_alone(checks, capsys, tmp_path):
    file = tmp_path / "rows.json"
    file.write_text('{"prompt": "mine"}')
    with pytest.raises(SystemExit, match="2"):
        checks.parse(["--device", "cpu", "--tiny", "--json", str(file)])
    assert "rows.json: there is such a file" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["rollout", "step1", "step2", "step3", "shared", "host"])
def test_a_stage_measures(models, stage):
    stages = importlib.import_module("gpu_stages")
    figures = stages.STAGES[stage](stages.TINY, models)
    assert json.loads(json.dumps(figures)) == figures
    if stage == "shared":
        assert [(found["prompt"], found["response"]) for found in figures["lengths"]] == [(12, 8), (36, 4)]
        for found in figures["lengths"]:
            assert all(len(found[way][phase]) == 1 for way in ("together", "apart") for phase in ("score", "train"))
        return
    if stage == "host":
        assert set(figures["reference"]) == {"card, 2 rows", "card, 4 rows", "host, 2 rows", "host, 4 rows"}
        assert len(figures["states"]["away"]) == len(figures["states"]["back"]) == 2
        return
    sizes, values = stages.TINY, {"step1": "tokens", "step2": "pairs", "step3": "answers"}
    if stage != "rollout":
        assert len(figures["seconds"]) == sizes.steps and all(v > 0 for v in figures[f"{values[stage]}_per_second"])
    else:
        assert [row["engine"] for row in figures["one length"]] == ["hf", "fast", "fast without graphs"]
        assert all(row["tokens_per_second"] > 0 for row in figures["one length"] + figures["mixed lengths"])
    if stage == "step3":
        first = figures["records"][0]
        assert first["rollout/tokens"] == sizes.rows * sizes.response and first["policy/first_ratio"] == 1.0


def stand_in(checks, monkeypatch, programs: dict[str, str]) -> None:
    """Stages that are given programs; ``FOLDER`` in one is where it leaves its figures."""

    def command(stage, arguments, folder):
        return [sys.executable, "-c", programs[stage].replace("FOLDER", str(folder))]

    monkeypatch.setattr(checks, "command_of", command)
    monkeypatch.setattr(checks, "LIMITS", dict.fromkeys(STAGES, 60) | {"rollout": 1})


def test_a_stage_that_fails_or_stands_still_keeps_no_other_from_running(checks, monkeypatch, tmp_path, capsys):
    found = '{"figures": {"tokens_per_second": [1200.0, 1300.0, 1250.0]}}'
    programs = {
        "tests": "raise SystemExit(3)",
        "rollout": "import time; time.sleep(60)",
        "step1": f"open('FOLDER/step1.json', 'w').write('{found}')",
    }
    stand_in(checks, monkeypatch, programs)
    target = tmp_path / "new" / "figures.json"
    argv = ["--device", "cpu", "--tiny", "--json", str(target), "--stages", *programs]
    assert checks.main(argv) == 1
    stages = json.loads(target.read_text())["stages"]
    assert [(name, stage["fine"], stage.get("failure")) for name, stage in stages.items()] == [
        ("tests", False, "ended with exit code 3"),
        ("rollout", False, "not done after 4 s"),
        ("step1", True, None),
    ]
    printed = capsys.readouterr().out
    assert "| step 1, tokens/s | 1,250 (1,200 - 1,300) |" in printed and "not done after 4 s" in printed
    stand_in(checks, monkeypatch, {"step1": programs["step1"]})
    assert checks.main([*argv[:-3], "step1"]) == 0


def test_what_is_timed_runs_alone_and_first(checks):
    assert checks.together(STAGES) == [*([stage] for stage in STAGES[:-2]), ["tests", "memory"]]
    assert checks.together(["memory", "step3"]) == [["step3"], ["memory"]]
    assert checks.together(["step1"]) == [["step1"]]


def test_the_limits_make_25_minutes(checks):
    assert tuple(checks.LIMITS) == STAGES == tuple(importlib.import_module("gpu_stages").STAGES)
    assert sum(max(checks.LIMITS[stage] for stage in at_once) for at_once in checks.together(STAGES)) <= 25 * 60


def planted() -> dict:
    """What a check on a GPU would leave."""
    about = {"card": "NVIDIA A100", "memory_gib": 79.3, "driver": "580.1", "cuda": "13.0", "python": "3.12.3"}
    about |= {"torch": "2.11.0", "deepspeed": "0.19.8", "transformers": "5.17.0", "commit": "abc1234", "changed": False}
    times = {"time/generate": 4.0, "time/score": 1.0, "time/train": 3.0}
    measured = {"hf": (1000.0, 1.0), "fast": (2500.0, 2.5)}
    engines = [
        {"engine": name, "tokens_per_second": speed, "lowest": 900.0, "highest": 3000.0, "ratio_to_hf": ratio}
        for name, (speed, ratio) in measured.items()
    ]
    figures = {
        "rollout": {"one length": engines, "mixed lengths": engines},
        "step1": {"tokens_per_second": [100.0, 300.0, 200.0]},
        "step2": {"pairs_per_second": [5.0]},
        "step3": {"answers_per_second": [8.0, 9.0], "records": [times, times]},
        "shared": {
            "samples_per_prompt": 8,
            "lengths": [
                {"prompt": 256, "response": 128}
                | {way: {"score": [0.5], "train": [1.5]} for way in ("apart", "together")}
            ],
        },
        "host": {
            "states": {"freed_gib": 14.7, "host_gib": 18.0, "away": [9.0, 0.5, 0.75], "back": [0.75, 0.5, 0.25]},
            "reference": {"host, 8 rows": [2.0]},
        },
        "memory": {"rows": [{"step": 1, "planned_mib": 1100, "measured_mib": 1000}]},
    }
    stages = {name: {"fine": True, "seconds": 1.0, "figures": found} for name, found in figures.items()}
    stages["tests"] = {"fine": False, "seconds": 2.0, "failure": "1 failed, 20 passed"}
    return {"machine": about, "date": "2026-01-01", "tiny": False, "note": "By hand.", "stages": stages}


def test_tables_have_every_figure(checks, tmp_path):
    text = checks.tables(planted())
    for part in (
        "### NVIDIA A100, 79.3 GiB",
        "driver 580.1, CUDA 13.0, torch 2.11.0, deepspeed 0.19.8, transformers 5.17.0, commit abc1234.",
        "commit abc1234.\n\nBy hand.\n\n| stage |",
        "| tests | 1 failed, 20 passed | 2.0 |",
        "| step 1, tokens/s | 200 (100 - 300) |",
        "| step 3, answers/s | 8.50 (8.00 - 9.00) | generate 4.00 s, score 1.00 s, train 3.00 s; DeepSpeed-Chat",
        "| 8 of 128 tokens to 256, together | 0.50 (0.50 - 0.50) | 1.50 (1.50 - 1.50) |",
        "| 14.7 GiB of the actor's optimizer states: away | 0.62 (0.50 - 0.75); the first time 9.00 |",
        "| log-probs by a reference: host, 8 rows | 2.00 (2.00 - 2.00) |",
        "| one length | hf | 1,000 (900 - 3,000) | 1.00x |",
        "| mixed lengths | fast | 2,500 (900 - 3,000) | 2.50x |",
        "| step 1 | 1,100 | 1,000 | 1.10 |",
    ):
        assert part in text, part
    (tmp_path / "gpu-a.json").write_text(json.dumps(planted()))
    page = f"before\n{checks.BEGIN}\nold\n{checks.END}\nafter\n"
    assert checks.with_section(page, checks.section(tmp_path)) == f"before\n{checks.BEGIN}\n{text}{checks.END}\nafter\n"
    assert checks.section(tmp_path / "none") == "No GPU has run it yet.\n"


def test_the_page_has_what_the_results_say(checks):
    page = checks.PAGE.read_text(encoding="utf-8")
    assert checks.with_section(page, checks.section(checks.RESULTS)) == page


@pytest.mark.slow
def test_the_whole_check_on_a_cpu(tmp_path):
    target = tmp_path / "figures.json"
    command = [sys.executable, str(BENCHMARKS / "gpu_check.py"), "--device", "cpu", "--tiny", "--json", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    stages = json.loads(target.read_text())["stages"]
    assert list(stages) == list(STAGES) and all("figures" in stage for stage in stages.values())
    assert stages["tests"]["figures"]["passed"] >= 3
