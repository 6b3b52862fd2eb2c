"""Run the demo over several seeds and print one table: what each step changed, and how long it took.

    python benchmarks/demo_seeds.py --seeds 1 2 3 --output_root output/seeds

Runs `train.py --recipe demo` once for each seed, in `OUTPUT_ROOT/seed-N`; a finished run is not repeated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def run(seed: int, folder: Path) -> None:
    """Run the demo with one seed in all three steps."""
    command = [sys.executable, str(ROOT / "train.py"), "--recipe", "demo", "--output_dir", str(folder)]
    for step in (1, 2, 3):
        command.append(f"--step{step}_args=--seed {seed}")
    subprocess.run(command, check=True)


def row(seed: int, folder: Path) -> str:
    """One line of the table from the three summaries."""
    one, two, three = (json.loads((folder / f"step{k}" / "summary.json").read_text()) for k in (1, 2, 3))
    check: dict[str, Any] = three["eval_functions"][0]
    baseline = max(two["accuracy_longer"], two["accuracy_shorter"])
    interval = f"[{check['low']:.2f}, {check['high']:.2f}]"
    by_reward = f"{three['win_rate']:.2f} [{three['win_rate_low']:.2f}, {three['win_rate_high']:.2f}]"
    minutes = sum(step["seconds"] for step in (one, two, three)) / 60
    cells = [
        str(seed),
        f"{one['loss_before']:.2f} -> {one['loss_after']:.2f}",
        f"{two['accuracy_after']:.3f} (length: {baseline:.3f})",
        f"{three['reward_before']:.2f} -> {three['reward_after']:.2f}",
        by_reward,
        f"{check['before']:.2f} -> {check['after']:.2f}",
        f"{check['win_rate']:.2f} {interval}",
        f"{minutes:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> int:
    """Parse flags, run the seeds that are missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output_root", type=Path, default=ROOT / "output" / "seeds")
    args = parser.parse_args()
    for seed in args.seeds:
        folder = args.output_root / f"seed-{seed}"
        if not (folder / "step3" / "summary.json").is_file():
            run(seed, folder)
    print(
        "| seed | step 1: held-out loss | step 2: held-out accuracy | step 3: held-out reward "
        "| win rate by reward model | check | win rate by check | minutes |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for seed in args.seeds:
        print(row(seed, args.output_root / f"seed-{seed}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
