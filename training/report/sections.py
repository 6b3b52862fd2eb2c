"""What a reader looks at first: the answers, whether they are better, the judge, advice. All text is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training.report import advice, charts
from training.report.charts import Series, figure
from training.report.run import RunRecord, StepRecord, mapping, number
from training.report.text import TITLES, cut, duration, e, hardware

PURPOSE = {
    "step1": "learns to answer from examples",
    "step2": "learns which answers people prefer",
    "step3": "learns to write answers that the reward model likes",
}
MODELS = {"base": ("base model", 4), "sft": ("SFT (step 1)", 1), "rlhf": ("RLHF (step 3)", 2)}
OPEN_SAMPLES, MOST_SAMPLES = 6, 24
MOST_REMARKS = 60
MOST_RATES = 10
EMBEDDED_NAME = "SmolLM2-135M-Instruct (embedded)"


def lead(run: RunRecord) -> str:
    """Under the title: models, data, hardware and time in one line."""
    base = run.steps["step1"].flag("model_name_or_path") or run.steps["step3"].flag("actor_model_name_or_path")
    base = EMBEDDED_NAME if base == "embedded" else base
    recipe = (run.manifest.get("recipe") or {}).get("name")
    seconds = [s.seconds for s in run.steps.values() if s.seconds]
    parts = [
        f"recipe {recipe}" if recipe else "",
        f"starting from {base}" if base else "",
        hardware(run.manifest.get("machine") or {}),
        f"{duration(sum(seconds))} in all" if seconds else "",
        f"started {_first_start(run)}" if _first_start(run) else "",
    ]
    return f'<p class="lead">{e(" · ".join(p for p in parts if p))}</p>'


def _first_start(run: RunRecord) -> str:
    starts = sorted(str(s.entry["started"]) for s in run.steps.values() if s.entry.get("started"))
    return starts[0][:16].replace("T", " ") if starts else ""


def cards(run: RunRecord) -> str:
    """One card for each step: what it is for, and its one most telling number."""
    body = "".join(_card(step) for step in run.steps.values())
    return f'<div class="cards">{body}</div>'


def _card(step: StepRecord) -> str:
    s = step.summary
    numbers = {
        "step1": (number(s.get("perplexity_before")), number(s.get("perplexity_after"))),
        "step2": (number(s.get("accuracy_before")), number(s.get("accuracy_after"))),
        "step3": (None, number(s.get("win_rate"))),
    }[step.name]
    form = figure if step.name == "step1" else "{:.1%}".format
    big = ""
    if numbers[1] is not None:
        was = f'<span class="was">{form(numbers[0])} → </span>' if numbers[0] is not None else ""
        big = f'<p class="big">{was}{form(numbers[1])}</p><p>{e(_meaning(step))}</p>'
    state = f'<span class="state {step.state.replace(" ", "-")}">{step.state}</span>'
    return (
        f'<div class="card"><div class="step"><span>Step {step.name[-1]} · {TITLES[step.name]}</span>{state}</div>'
        f'{big}<p class="muted small">{PURPOSE[step.name]}'
        f"{', ' + duration(step.seconds) if step.seconds else ''}</p></div>"
    )


def _meaning(step: StepRecord) -> str:
    s = step.summary
    if step.name == "step1":
        return "perplexity of held-out answers, lower is better"
    if step.name == "step2":
        longer = number(s.get("accuracy_longer"))
        rule = f" (by length alone: {max(longer, 1 - longer):.0%})" if longer is not None else ""
        return f"of held-out pairs judged right{rule}"
    low, high = number(s.get("win_rate_low")), number(s.get("win_rate_high"))
    interval = f" (95% interval {low:.0%} to {high:.0%})" if low is not None and high is not None else ""
    return f"of its answers beat step 1's, by the reward model{interval}"


def answers(run: RunRecord) -> str:
    """Held-out prompts with the answers of the models side by side."""
    if not run.samples:
        return ""
    drawn = [_sample(sample) for sample in run.samples[:MOST_SAMPLES]]
    more = "".join(drawn[OPEN_SAMPLES:])
    hidden = f"<details><summary>{len(drawn) - OPEN_SAMPLES} more prompts</summary>{more}</details>" if more else ""
    left = len(run.samples) - len(drawn)
    return (
        '<p class="muted">Prompts that no step was trained on, answered by each model under the same settings. '
        "<b>Reward</b> is what PPO maximises: for step 2's reward model alone, normalised, 0 is its mean preferred "
        "answer and 1 a standard deviation above it; "
        "<b>check</b> is the independent evaluation function.</p>"
        + "".join(drawn[:OPEN_SAMPLES])
        + hidden
        + (f'<p class="muted small">{left} more prompts are in samples.json.</p>' if left else "")
    )


def _sample(sample: Mapping[str, Any]) -> str:
    turns = [m for m in sample.get("prompt") or [] if isinstance(m, Mapping)]
    prompt = "\n".join(
        f"{'' if m.get('role') == 'user' and len(turns) == 1 else str(m.get('role', '')) + ': '}{m.get('content', '')}"
        for m in turns
    )
    given = {k: v for k, v in (sample.get("answers") or {}).items() if isinstance(v, Mapping)}
    columns = "".join(_answer(name, answer) for name, answer in given.items())
    return (
        f'<div class="sample"><div class="prompt"><b>{e(cut(prompt))}</b></div>'
        f'<div class="answers">{columns}</div></div>'
    )


def _answer(name: str, answer: Mapping[str, Any]) -> str:
    title, colour = MODELS.get(name, (name, 4))
    scores = [
        f"{key} {value:{form}}"
        for key, form in (("reward", "+.2f"), ("check", ".2f"))
        if (value := number(answer.get(key))) is not None
    ]
    limited = '<p class="note">cut at the longest allowed length</p>' if answer.get("ended") is False else ""
    text = str(answer.get("text") or "")
    shown = e(cut(text)) if text else '<span class="muted">(an empty answer)</span>'
    return (
        f'<div class="answer"><div class="who"><b class="m{colour}">{e(title)}</b><span>{e(" · ".join(scores))}</span>'
        f'</div><div class="text">{shown}</div>{limited}</div>'
    )


def wins(run: RunRecord) -> str:
    """Win rates of RLHF over SFT with intervals, and reward against KL."""
    step = run.steps["step3"]
    s = step.summary
    check = mapping(s.get("eval_function"))
    rows = []
    check_name = Path(str(check.get("name", "check"))).name
    judges = (("RLHF, by step 2's reward model", s), (f"RLHF, by {check_name}", check))
    for label, source in judges:
        share = number(source.get("win_rate"))
        if share is not None:
            rows.append((label, share, number(source.get("win_rate_low")), number(source.get("win_rate_high"))))
    rows += _evaluated_rates(step.evaluation or {})
    intervals = charts.interval_chart("Answers that beat SFT's, 95% intervals", rows, "50%: no difference")
    reward, kl = dict(step.curve("reward/mean")), dict(step.curve("kl/per_sequence"))
    path = [(kl[i], reward[i]) for i in sorted(set(reward) & set(kl))]
    walk = charts.path_chart(
        "Reward against KL, one dot per iteration",
        "KL to the SFT model, nats per response",
        "mean reward",
        path,
        "iteration",
    )
    if not intervals and not walk:
        return ""
    kept = mapping(s.get("kept"))
    best = f" The actor of iteration {kept['iteration']} was kept." if number(kept.get("iteration")) is not None else ""
    text = (
        f"{s.get('prompts', '')} held-out prompts; a tie counts half. Rising reward at little KL is learning; rising "
        f"KL without reward is drift.{best}"
        if rows
        else "Rising reward at little KL is learning; rising KL without reward is drift."
    )
    table = _change_table(
        [
            ("mean reward", s.get("reward_before"), s.get("reward_after"), "+.3f"),
            (f"mean of {check_name}", check.get("before"), check.get("after"), ".3f"),
            ("answer length, tokens", s.get("length_before"), s.get("length_after"), ".1f"),
            ("answers that end by themselves", s.get("eos_rate_before"), s.get("eos_rate_after"), ".1%"),
        ],
        ("SFT", "RLHF"),
    )
    left = f'<div class="stack">{intervals}{table}</div>'
    return f'<p class="muted">{e(text)}</p><div class="grid">{left}{walk}</div>'


def _evaluated_rates(found: Mapping[str, Any]) -> list[tuple[str, float, float | None, float | None]]:
    """Win rates over SFT that step 3's evaluate.py found: policies by judges."""
    rows = []
    for policy, entry in mapping(found.get("models")).items():
        for key, value in mapping(entry).items():
            share, interval = number(value), _numbers(mapping(entry).get(f"{key}_interval"))
            if key.startswith("win_rate_by_") and share is not None:
                low, high = interval if len(interval) == 2 else (None, None)
                judge = key.removeprefix("win_rate_by_").replace("_", " ")
                rows.append((f"evaluated: {policy}, by {judge}", share, low, high))
    return rows[:MOST_RATES]


def _change_table(rows: Sequence[tuple[str, Any, Any, str]], heads: tuple[str, str]) -> str:
    body = "".join(
        f'<tr><td>{e(label)}</td><td class="n">{before:{form}}</td><td class="n">{after:{form}}</td></tr>'
        for label, first, second, form in rows
        if (before := number(first)) is not None and (after := number(second)) is not None
    )
    head = f'<tr><th></th><th class="n">{heads[0]}</th><th class="n">{heads[1]}</th></tr>'
    return f"<table>{head}{body}</table>" if body else ""


def reward_model(run: RunRecord) -> str:
    """How well step 2 tells chosen from rejected, against rules that know only the length."""
    step = run.steps["step2"]
    s, found = step.summary, step.evaluation or {}
    named = [
        ("after training", s.get("accuracy_after"), 1),
        ("before training", s.get("accuracy_before"), 4),
        ("always the longer", s.get("accuracy_longer"), 4),
        ("always the shorter", s.get("accuracy_shorter"), 4),
    ]
    rows = [(label, share, colour) for label, value, colour in named if (share := number(value)) is not None]
    bars = charts.bar_chart("Held-out pairs judged right", rows, "50% is a coin's accuracy")
    sides = [
        Series("chosen, held out", step.curve("eval/chosen_mean"), 1, dots=True),
        Series("rejected, held out", step.curve("eval/rejected_mean"), 2, dots=True),
    ]
    scores = charts.line_chart("Mean reward of chosen and rejected answers", "optimizer step", "reward (raw)", sides)
    verdicts = mapping(s.get("verdicts"))
    said = "".join(f"<li>{'yes' if holds else '<b>NO</b>'}: {e(text)}</li>" for text, holds in verdicts.items())
    drawn = _histograms(found)
    if not (bars or scores or drawn):
        return ""
    note = (
        '<p class="muted">Step 3 follows this judge, so what it can not see, or sees wrongly, step 3 will exploit. The '
        "figures are of the model that was saved, loaded again from disk.</p>"
    )
    left = f'<div class="stack">{bars}{f"<ul>{said}</ul>" if said else ""}</div>'
    return f'{note}<div class="grid">{left}{scores}{drawn}</div>'


def _histograms(found: Mapping[str, Any]) -> str:
    """Every entry of an evaluation that holds edges and counts."""
    drawn = []
    for name, value in found.items():
        if not isinstance(value, Mapping):
            continue
        edges, counts = (_numbers(value.get(key)) for key in ("edges", "counts"))
        if edges and counts:
            title = name.replace("_", " ").capitalize()
            drawn.append(charts.histogram(title, "reward of chosen minus rejected", edges, counts))
    return "".join(drawn)


def _numbers(values: Any) -> list[float]:
    if not isinstance(values, list):
        return []
    found = [number(v) for v in values]
    return [v for v in found if v is not None] if all(v is not None for v in found) else []


def health(run: RunRecord) -> str:
    """What the health monitor said while the steps ran."""
    known = {name: step.health for name, step in run.steps.items() if step.health is not None}
    if not known:
        return '<p class="muted">This run has no remarks of a health monitor (health.jsonl).</p>'
    rows = [
        f'<tr><td>Step {name[-1]}</td><td class="n">{e(r.get("step", ""))}</td>'
        f'<td class="{"warning" if r.get("level") == "warning" else "muted"}">{e(r.get("level", ""))}</td>'
        f"<td>{e(r.get('text', ''))}</td></tr>"
        for name, remarks in known.items()
        for r in remarks
    ]
    if not rows:
        return "<p>Nothing left its healthy range.</p>"
    more = f'<p class="muted small">{len(rows) - MOST_REMARKS} more.</p>' if len(rows) > MOST_REMARKS else ""
    head = '<tr><th></th><th class="n">iteration</th><th></th><th>remark</th></tr>'
    return f'<div class="scroll"><table>{head}{"".join(rows[:MOST_REMARKS])}</table></div>{more}'


def next_steps(run: RunRecord) -> str:
    """Advice, and for a step that failed the end of its log."""
    items = "".join(f"<li>{e(line)}</li>" for line in advice.next_steps(run))
    logs = "".join(
        f"<h3>Last lines of {step.name}.log</h3><pre>{e(chr(10).join(step.log_tail))}</pre>"
        for step in run.steps.values()
        if step.log_tail
    )
    return (f'<ul class="next">{items}</ul>' if items else "") + logs
