"""The training curves of the steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from training.report import cards, charts
from training.report.charts import Series
from training.report.run import RunRecord, StepRecord
from training.report.text import TITLES, heading


@dataclass(frozen=True)
class Figure:
    """What one figure shows: a `Series` for each metric, which gives its points.

    The health monitor's warnings about metrics that begin with ``warned`` stand below it.
    """

    title: str
    y_label: str
    curves: Mapping[str, Series]
    warned: tuple[str, ...] = ()
    zero_one: bool = False


HELD_OUT = Series("held out", colour=2, dots=True)


def _both(name: str) -> dict[str, Series]:
    return {f"train/{name}": Series("training"), f"eval/{name}": HELD_OUT}


def _rollouts(metric: str, *held_out: str) -> dict[str, Series]:
    return {metric: Series("rollouts"), **dict.fromkeys(held_out, HELD_OUT)}


FIGURES = {
    "step1": [
        Figure("Loss", "nats per token", _both("loss")),
        Figure("Gradient norm", "norm", {"train/grad_norm": Series("norm")}),
    ],
    "step2": [
        Figure("Pairs judged right", "share", _both("accuracy"), zero_one=True),
        Figure("Loss", "nats per pair", _both("loss")),
    ],
    "dpo": [
        Figure("Pairs whose chosen answer has the higher reward", "share", _both("accuracy"), zero_one=True),
        Figure("Loss", "per pair", _both("loss")),
        Figure("Held-out rewards", "beta x log-ratio to the reference",
               {"eval/chosen_reward": Series("chosen", dots=True),
                "eval/rejected_reward": Series("rejected", colour=2, dots=True)}),
        Figure("How much likelier chosen answers are than before", "nats per token", _both("chosen_change"),
               ("train/chosen_change", "eval/chosen_change", "eval/kl")),
    ],
    "step3": [
        Figure("Reward", "mean reward", _rollouts("reward/mean", "eval/reward"), ("reward/", "eval/reward")),
        Figure("KL to the SFT model", "nats per response", _rollouts("kl/per_sequence", "eval/kl"),
               ("kl/", "eval/kl", "policy/approx_kl")),
        Figure("Answer length", "tokens", _rollouts("rollout/length"), ("rollout/length",)),
        Figure("Answers that end by themselves", "share", _rollouts("rollout/eos_rate"), ("rollout/eos_rate",),
               zero_one=True),
        Figure("Entropy of the policy", "nats per token", {"policy/entropy": Series("entropy")}, ("policy/entropy",)),
        Figure("Critic: explained variance", "1 is perfect, 0 useless",
               {"critic/explained_variance": Series("explained")}, ("critic/",)),
    ],
}  # fmt: skip


def curves(run: RunRecord) -> str:
    """The training curves of all steps."""
    drawn = {name: [_drawn(figure, run.steps[name]) for figure in FIGURES[name]] for name in TITLES}
    return "".join(
        f'<h3>{heading(name)} · {TITLES[name]}</h3><div class="grid">{"".join(figures)}</div>'
        for name, figures in drawn.items()
        if any(figures)
    )


def _drawn(figure: Figure, step: StepRecord) -> str:
    series = [replace(one, points=step.curve(metric)) for metric, one in figure.curves.items()]
    unit = "iteration" if step.name == "step3" else "optimizer step"
    drawing = charts.line_chart(figure.title, unit, figure.y_label, series, zero_one=figure.zero_one)
    return drawing.replace("</figure>", f"{cards.marked(cards.remarks(step, figure.warned))}</figure>")
