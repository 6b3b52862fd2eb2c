"""The training curves of the steps."""

from __future__ import annotations

from training.report import cards, charts
from training.report.charts import Series
from training.report.run import RunRecord, StepRecord
from training.report.text import TITLES, e, heading

# What the figures of step 3 show, in their order; health remarks about it stand below them
STEP3_METRICS = (
    ("reward/", "eval/reward"), ("kl/", "eval/kl", "policy/approx_kl"), ("rollout/length",), ("rollout/eos_rate",),
    ("policy/entropy",), ("critic/",),
)  # fmt: skip


def curves(run: RunRecord) -> str:
    """The training curves of all steps."""
    one, two, dpo, three = (run.steps[name] for name in TITLES)
    step, iteration = "optimizer step", "iteration"
    drawn = {
        "step1": [
            charts.line_chart(
                "Loss", step, "nats per token", [_train(one, "train/loss"), _held_out(one, "eval/loss")]
            ),
            charts.line_chart("Gradient norm", step, "norm", [Series("norm", one.curve("train/grad_norm"))]),
        ],
        "step2": [
            charts.line_chart(
                "Pairs judged right", step, "share", [_train(two, "train/accuracy"), _held_out(two, "eval/accuracy")],
                zero_one=True,
            ),
            charts.line_chart("Loss", step, "nats per pair", [_train(two, "train/loss"), _held_out(two, "eval/loss")]),
        ],
        "dpo": [
            charts.line_chart(
                "Pairs whose chosen answer has the higher reward", step, "share",
                [_train(dpo, "train/accuracy"), _held_out(dpo, "eval/accuracy")], zero_one=True,
            ),
            charts.line_chart("Loss", step, "per pair", [_train(dpo, "train/loss"), _held_out(dpo, "eval/loss")]),
            charts.line_chart(
                "Held-out rewards", step, "beta x log-ratio to the reference",
                [Series("chosen", dpo.curve("eval/chosen_reward"), 1, dots=True),
                 Series("rejected", dpo.curve("eval/rejected_reward"), 2, dots=True)],
            ),
            _warned(
                charts.line_chart(
                    "How much likelier chosen answers are than before", step, "nats per token",
                    [_train(dpo, "train/chosen_change"), _held_out(dpo, "eval/chosen_change")],
                ),
                dpo, ("train/chosen_change", "eval/chosen_change", "eval/kl"),
            ),
        ],
        "step3": [
            charts.line_chart(
                "Reward", iteration, "mean reward",
                [Series("rollouts", three.curve("reward/mean")), _held_out(three, "eval/reward")],
            ),
            charts.line_chart(
                "KL to the SFT model", iteration, "nats per response",
                [Series("rollouts", three.curve("kl/per_sequence")), _held_out(three, "eval/kl")],
            ),
            charts.line_chart(
                "Answer length", iteration, "tokens", [Series("rollouts", three.curve("rollout/length"))]
            ),
            charts.line_chart(
                "Answers that end by themselves", iteration, "share",
                [Series("rollouts", three.curve("rollout/eos_rate"))], zero_one=True,
            ),
            charts.line_chart("Entropy of the policy", iteration, "nats per token",
                              [Series("entropy", three.curve("policy/entropy"))]),
            charts.line_chart(
                "Critic: explained variance", iteration, "1 is perfect, 0 useless",
                [Series("explained", three.curve("critic/explained_variance"))],
            ),
        ],
    }  # fmt: skip
    drawn["step3"] = [
        _warned(drawing, three, metrics) for drawing, metrics in zip(drawn["step3"], STEP3_METRICS, strict=True)
    ]
    parts = [
        f'<h3>{heading(name)} · {TITLES[name]}</h3><div class="grid">{"".join(figures)}</div>'
        for name, figures in drawn.items()
        if any(figures)
    ]
    return "".join(parts)


def _warned(drawing: str, step: StepRecord, metrics: tuple[str, ...]) -> str:
    """A figure with the health monitor's warnings about what it shows."""
    lines = "".join(f'<p class="warning small">{e(text)}</p>' for text in cards.remarks(step, metrics))
    return drawing.replace("</figure>", f"{lines}</figure>") if lines else drawing


def _train(step: StepRecord, name: str) -> Series:
    return Series("training", step.curve(name), 1)


def _held_out(step: StepRecord, name: str) -> Series:
    return Series("held out", step.curve(name), 2, dots=True)
