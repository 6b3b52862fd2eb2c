"""Draw reward against KL through step 3, with best-of-n of the SFT model on the same axes, from a run's own files.

    python benchmarks/plot_reward_kl.py output/latest docs/images/reward_kl.png
    python benchmarks/plot_reward_kl.py output/seeds/seed-{1,2,3} docs/images/reward_kl.png     # side by side

Reads step3/metrics.jsonl (the held-out evaluations during training, and every iteration's rollouts) and
step3/evaluation.json (training/step3_rlhf_finetuning/evaluate.py writes it). Prints the KL at which PPO first reaches
the reward of each best-of-n, on the straight line between two evaluations.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from common import head_of, json_lines, kl_to_reach, row_of
from matplotlib.axes import Axes

from training.utils.errors import UserError, run_program

Point = tuple[float, float]  # (KL in nats per response, mean raw reward)


def read_points(run: Path) -> tuple[list[Point], list[Point], dict[str, Point]]:
    """Held-out evaluations, rollouts, and the models of evaluation.json.

    Raises:
        UserError: a file is missing, or has no such points.
    """
    metrics, evaluation = run / "step3" / "metrics.jsonl", run / "step3" / "evaluation.json"
    if not metrics.is_file():
        raise UserError(f"{metrics}: no such file; give the folder of a run that has finished step 3")
    records = json_lines(metrics)
    held_out = [(r["eval/kl"], r["eval/reward"]) for r in records if "eval/kl" in r]
    rollouts = [(r["kl/per_sequence"], r["reward/mean"]) for r in records if "reward/mean" in r]
    if not evaluation.is_file():
        raise UserError(f"{evaluation} is missing: python training/step3_rlhf_finetuning/evaluate.py makes it")
    models = json.loads(evaluation.read_text(encoding="utf-8"))["models"]
    return held_out, rollouts, {name: (entry["kl"], entry["reward"]) for name, entry in models.items()}


def kl_table(curve: Sequence[Point], models: dict[str, Point]) -> list[str]:
    """A Markdown table: for each best-of-n its reward, its KL, and the KL at which the curve reaches the reward."""
    lines = [head_of("best-of-n of the SFT model", "reward", "its KL", "KL at which PPO reaches it")]
    for name, (kl, reward) in models.items():
        if name.startswith("best of"):
            reached = kl_to_reach(curve, reward)
            lines.append(row_of(name, f"{reward:.3f}", f"{kl:.2f}", "never" if reached is None else f"{reached:.2f}"))
    return lines


def draw(axis: Axes, run: Path) -> list[str]:
    """One run on its own axes; returns the lines of its table."""
    held_out, rollouts, models = read_points(run)
    curve = held_out or rollouts
    axis.plot(*zip(*rollouts, strict=True), ".", color="0.7", label="PPO, rollouts of an iteration")
    if held_out:
        axis.plot(*zip(*held_out, strict=True), "o-", label="PPO, held-out evaluations")
    for name, point in models.items():
        if name == "RLHF":
            axis.plot(*point, "s", color="C3", label="the actor that was kept")
        elif name.startswith("best of"):
            axis.plot(*point, "^", color="C2")
            axis.annotate(name, point, textcoords="offset points", xytext=(6, -4), fontsize=8)
    axis.plot([], [], "^", color="C2", label="best-of-n of the SFT model")
    axis.set_title(run.resolve().name, fontsize=9)
    axis.set_xlabel("KL to the SFT model, nats per response")
    axis.grid(alpha=0.3)
    return kl_table(curve, models)


def main(argv: Sequence[str]) -> int:
    """Draw and print; returns the exit code."""
    if len(argv) < 2:
        raise UserError("give folders of runs and the picture to write: plot_reward_kl.py output/latest picture.png")
    *runs, picture = map(Path, argv)
    size = (7.0, 4.5) if len(runs) == 1 else (4.0 * len(runs), 3.8)
    figure, axes = plt.subplots(1, len(runs), figsize=size, sharey=True, squeeze=False, constrained_layout=True)
    tables = [draw(axis, run) for axis, run in zip(axes[0], runs, strict=True)]
    axes[0][0].set_ylabel("mean reward")
    axes[0][-1].legend(fontsize=8, loc="lower right")
    figure.savefig(picture, dpi=110)
    for run, table in zip(runs, tables, strict=True):
        print("\n".join([*([f"\n{run.name}"] if len(runs) > 1 else []), *table]))
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
