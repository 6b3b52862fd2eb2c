"""The training curves of the steps."""

from __future__ import annotations

from dataclasses import dataclass

from training.report import cards, charts
from training.report.charts import Series
from training.report.run import RunRecord, StepRecord
from training.report.text import TITLES, heading


@dataclass(frozen=True)
class Curve:
    """A metric as a `Series`."""

    label: str
    metric: str
    colour: int = 1
    dots: bool = False


@dataclass(frozen=True)
class Figure:
    """What one figure shows; the health monitor's warnings about metrics that begin with ``warned`` stand below it."""

    title: str
    y_label: str
    curves: tuple[Curve, ...]
    warned: tuple[str, ...] = ()
    zero_one: bool = False


def _both(name: str) -> tuple[Curve, ...]:
    return Curve("training", f"train/{name}"), Curve("held out", f"eval/{name}", 2, dots=True)


def _rollouts(metric: str, *held_out: str) -> tuple[Curve, ...]:
    return Curve("rollouts", metric), *(Curve("held out", name, 2, dots=True) for name in held_out)


FIGURES = {
    "step1": [
        Figure("Loss", "nats per token", _both("loss")),
        Figure("Gradient norm", "norm", (Curve("norm", "train/grad_norm"),)),
    ],
    "step2": [
        Figure("Pairs judged right", "share", _both("accuracy"), zero_one=True),
        Figure("Loss", "nats per pair", _both("loss")),
    ],
    "dpo": [
        Figure("Pairs whose chosen answer has the higher reward", "share", _both("accuracy"), zero_one=True),
        Figure("Loss", "per pair", _both("loss")),
        Figure("Held-out rewards", "beta x log-ratio to the reference",
               (Curve("chosen", "eval/chosen_reward", 1, dots=True),
                Curve("rejected", "eval/rejected_reward", 2, dots=True))),
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
        Figure("Entropy of the policy", "nats per token", (Curve("entropy", "policy/entropy"),), ("policy/entropy",)),
        Figure("Critic: explained variance", "1 is perfect, 0 useless",
               (Curve("explained", "critic/explained_variance"),), ("critic/",)),
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
    series = [Series(one.label, step.curve(one.metric), one.colour, one.dots) for one in figure.curves]
    unit = "iteration" if step.name == "step3" else "optimizer step"
    drawing = charts.line_chart(figure.title, unit, figure.y_label, series, zero_one=figure.zero_one)
    return drawing.replace("</figure>", f"{cards.marked(cards.remarks(step, figure.warned))}</figure>")
