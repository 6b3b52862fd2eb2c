"""Draw the training curves of a run from its metrics.jsonl files.

python benchmarks/plot_run.py output/seeds/seed-1 docs/images/curves.png
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from common import json_lines

from training.utils.arguments import Parser
from training.utils.errors import UserError, run_program

# (step, title, metrics with their labels)
PANELS = [
    ("step1", "Step 1: loss", {"train/loss": "training", "eval/loss": "held out"}),
    ("step2", "Step 2: accuracy", {"train/accuracy": "training", "eval/accuracy": "held out"}),
    ("step3", "Step 3: reward", {"reward/mean": "reward of the rollouts"}),
    ("step3", "Step 3: KL to the SFT model", {"kl/per_sequence": "nats per response"}),
    ("step3", "Step 3: response length", {"rollout/length": "tokens"}),
    ("step3", "Step 3: responses that end", {"rollout/eos_rate": "share"}),
]


def main(argv: Sequence[str]) -> int:
    """Read the three steps' metrics of a run and write the picture."""
    parser = Parser(prog="plot_run.py", description=__doc__)
    parser.add_argument("run", type=Path, help="the run's folder, with step1, step2 and step3 in it")
    parser.add_argument("picture", type=Path, help="the file to write")
    given = parser.parse_args(argv)
    draw(given.run, given.picture)
    return 0


def draw(run: Path, picture: Path) -> None:
    """The curves of ``run`` as a picture.

    Raises:
        UserError: a step's metrics are not there.
    """
    figure, axes = plt.subplots(2, 3, figsize=(12, 6), constrained_layout=True)
    for axis, (step, title, metrics) in zip(axes.flat, PANELS, strict=True):
        file = run / step / "metrics.jsonl"
        if not file.is_file():
            raise UserError(f"{file}: no such file; a run of steps 1, 2 and 3 is drawn")
        records = json_lines(file)
        for name, label in metrics.items():
            points = [(r["step"], r[name]) for r in records if name in r]
            held_out = name.startswith("eval/")
            axis.plot(*zip(*points, strict=True), "o-" if held_out else "-", label=label, markersize=4)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("iteration" if step == "step3" else "optimizer step", fontsize=8)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    sys.exit(run_program(main))
