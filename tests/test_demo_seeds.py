"""The benchmark of the demo's seeds, on runs that are there: tables with intervals, and the page of answers."""

import json
import subprocess
import sys
from pathlib import Path

from training.utils.run.folders import repository_root

PROGRAM = repository_root() / "benchmarks" / "demo_seeds.py"


def make_run(folder: Path, gain: float) -> None:
    """A finished run of 30 prompts in which every RLHF answer gains ``gain`` in the check over the SFT answer."""
    kinds = {kind: {"accuracy": 0.75, "pairs": 4} for kind in ("warm_empty", "wrong_form", "other_prompt")}
    summaries = {
        "step1": {"loss_before": 3.9, "loss_after": 3.3, "seconds": 60.0},
        "step2": {"accuracy_after": 0.9, "accuracy_by_kind": kinds, "seconds": 60.0},
        "step3": {
            "reward_before": -1.5,
            "reward_after": 0.25,
            "kept": {"kl": 8.5, "iteration": 16},
            "seconds": 120.0,
        },
    }
    for step, summary in summaries.items():
        (folder / step).mkdir(parents=True)
        (folder / step / "summary.json").write_text(json.dumps(summary))
    lines = [
        {
            "row": row,
            "prompt": [{"role": "user", "content": f"Question {row}?"}],
            **{model: f"{model} answers {row}." for model in ("base", "sft", "rlhf")},
            "scores": {"content": {"base": 0.25, "sft": 0.5, "rlhf": 0.5 + gain}},
            "ended": {"base": False, "sft": True, "rlhf": True},
        }
        for row in reversed(range(30))
    ]
    (folder / "step3" / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_tables_and_page(tmp_path: Path) -> None:
    for seed, gain in ((1, 0.25), (2, -0.125)):
        make_run(tmp_path / f"seed-{seed}", gain)
    command = [sys.executable, str(PROGRAM), "--seeds", "1", "2", "--output_root", str(tmp_path)]
    command += ["--page", str(tmp_path / "page.md")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "| 1 | 3.90 -> 3.30 | 0.900 (warm_empty 0.75, wrong_form 0.75, other_prompt 0.75) |" in printed
    one, two, both = (line for line in printed.splitlines() if line.startswith("| content"))
    assert "| 0.250 | 0.500 | 0.750 | +0.250 [+0.250, +0.250] | +0.500" in one and "| 1.000 [1.000, 1.000] |" in one
    assert "| -0.125 [-0.125, -0.125] | 0.000 [0.000, 0.000] |" in two
    # of both seeds a prompt's value is its mean: (0.25 - 0.125) / 2, and it wins once and loses once
    assert "| +0.062 [+0.062, +0.062] | 0.500 [0.500, 0.500] |" in both
    page = (tmp_path / "page.md").read_text()
    assert page.count("- RLHF: ") == 15 and "**1. Question 0?**" in page and "**15. Question 28?**" in page
    assert "- base: base answers 0. ... (content 0.25)" in page and "- SFT: sft answers 0. (content 0.50)" in page
