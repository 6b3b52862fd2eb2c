"""Run the demo over several seeds: what each step changed, what base, SFT and RLHF model say, and how long it took.

    python benchmarks/demo_seeds.py --seeds 1 2 3 --output_root output/seeds
    python benchmarks/demo_seeds.py --seeds 1 2 3 --page docs/demo_answers.md    also the answers, as a page

Runs ``train.py --recipe demo`` once for each seed, in ``OUTPUT_ROOT/seed-N``; a finished run is not repeated. The page
shows 15 held-out prompts, evenly spread over the file, with the answers of the first seed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import ROOT, flags_of, head_of, json_lines, row_of

from training.utils.data.batches import spread_rows
from training.utils.intervals import bootstrap_interval, half_ties, mean

HEADING = "# Answers of the demo"
MODELS = (("base", "base"), ("sft", "SFT"), ("rlhf", "RLHF"))
PAIRS = (("base", "sft"), ("base", "rlhf"), ("sft", "rlhf"))
SHOWN = 15


def run(seed: int, folder: Path) -> None:
    """Run the demo with one seed in all three steps."""
    command = [sys.executable, str(ROOT / "train.py"), "--recipe", "demo", "--output_dir", str(folder)]
    for step in (1, 2, 3):
        command.append(f"--step{step}_args=--seed {seed} --eval_data_path demo")  # all held-out prompts, not half
    subprocess.run(command, check=True)


def steps_row(seed: int, folder: Path) -> str:
    """One line of the table of the three steps, from their summaries."""
    one, two, three = (json.loads((folder / f"step{k}" / "summary.json").read_text()) for k in (1, 2, 3))
    kinds = two["accuracy_by_kind"]
    traps = ", ".join(f"{kind} {kinds[kind]['accuracy']:.2f}" for kind in ("warm_empty", "wrong_form", "other_prompt"))
    minutes = [step["seconds"] / 60 for step in (one, two, three)]
    cells = [
        str(seed),
        f"{one['loss_before']:.2f} -> {one['loss_after']:.2f}",
        f"{two['accuracy_after']:.3f} ({traps})",
        f"{three['reward_before']:.2f} -> {three['reward_after']:.2f}",
        f"{three['kept']['kl']:.1f} (iteration {three['kept']['iteration']})",
        f"{sum(minutes):.1f} ({', '.join(f'{m:.1f}' for m in minutes)})",
    ]
    return row_of(*cells)


def answers_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's answers.jsonl, by row."""
    return sorted(json_lines(folder / "step3" / "answers.jsonl"), key=lambda line: line["row"])


def interval(values: Sequence[float]) -> str:
    """The mean over prompts and its 95% bootstrap interval."""
    low, high = bootstrap_interval(values, seed=0)
    return f"{mean(values):+.3f} [{low:+.3f}, {high:+.3f}]"


def check_rows(name: str, runs: Sequence[tuple[str, Sequence[Sequence[dict[str, Any]]]]]) -> list[str]:
    """Lines of the table of one check: a line for each seed, and one of all, where a prompt's value is its mean.

    Args:
        name: the check.
        runs: a title, and the answers of one seed or of several.
    """
    lines = []
    for title, found in runs:
        prompts = [[a["scores"][name] for a in answers] for answers in zip(*found, strict=True)]  # of each seed

        def values(model: str, prompts: list[list[dict[str, float]]] = prompts) -> list[float]:
            """A model's mean over the seeds at each prompt."""
            return [mean([scores[model] for scores in seeds]) for seeds in prompts]

        means = [f"{mean(values(model)):.3f}" for model, _ in MODELS]
        shifts = [interval([b - a for a, b in zip(values(x), values(y), strict=True)]) for x, y in PAIRS]
        wins = [mean([half_ties(scores["rlhf"], scores["sft"]) for scores in seeds]) for seeds in prompts]
        lines.append(row_of(name, title, *means, *shifts, interval(wins).replace("+", "")))
    return lines


def page(seed: int, answers: Sequence[dict[str, Any]]) -> str:
    """The answers to evenly spread prompts as Markdown."""
    rows = [answers[i] for i in spread_rows(len(answers), SHOWN)]
    names = list(rows[0]["scores"])
    text = [
        f"{HEADING}\n",
        f"{SHOWN} of the {len(answers)} held-out prompts, evenly spread over the file (no choice by hand), answered "
        f"by the embedded base model, after step 1 (SFT) and after step 3 (RLHF) of the demo with seed {seed}, at the "
        "demo's sampling settings and at most 48 tokens; an answer that reached that limit ends with ... here. In "
        f"brackets: {' and '.join(names)} checks. "
        "`.venv/bin/python benchmarks/demo_seeds.py --page docs/demo_answers.md` writes this page.\n",
    ]
    for number, row in enumerate(rows, 1):
        turns = " / ".join(f"{turn['role']}: {turn['content']}" for turn in row["prompt"])
        asked = row["prompt"][-1]["content"] if len(row["prompt"]) == 1 else turns
        text.append(f"**{number}. {asked}**\n")
        for model, title in MODELS:
            scores = ", ".join(f"{name} {row['scores'][name][model]:.2f}" for name in names)
            answer = " ".join(row[model].split()) + ("" if row["ended"][model] else " ...")
            text.append(f"- {title}: {answer} ({scores})")
        text.append("")
    return "\n".join(text)


def main() -> int:
    """Parse flags, run the seeds that are missing, print the tables."""
    parser = flags_of(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output_root", type=Path, default=ROOT / "output" / "seeds")
    parser.add_argument("--page", type=Path, help="write the answers to this file")
    args = parser.parse_args()
    if args.page and args.page.exists() and not args.page.read_text("utf-8", "replace").startswith(HEADING):
        parser.error(f"--page {args.page}: there is such a file, and it is no page of answers; name another one")
    folders = {seed: args.output_root / f"seed-{seed}" for seed in args.seeds}
    for seed, folder in folders.items():
        if not (folder / "step3" / "summary.json").is_file():
            run(seed, folder)
    of_steps = ("step 1: held-out loss", "step 2: held-out accuracy", "step 3: held-out reward")
    print(head_of("seed", *of_steps, "KL, nats", "minutes"))
    for seed, folder in folders.items():
        print(steps_row(seed, folder))
    answers = {seed: answers_of(folder) for seed, folder in folders.items()}
    runs = [(str(seed), [found]) for seed, found in answers.items()] + [("all", list(answers.values()))]
    shifts = [f"{old} to {new}" for old, new in (("base", "SFT"), ("base", "RLHF"), ("SFT", "RLHF"))]
    print("\n" + head_of("check", "seed", "base", "SFT", "RLHF", *shifts, "win rate of RLHF over SFT"))
    for name in next(iter(answers.values()))[0]["scores"]:
        print("\n".join(check_rows(name, runs)))
    if args.page:
        args.page.write_text(page(args.seeds[0], answers[args.seeds[0]]), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
