"""The answers, whether they are better, the judge, advice. All text is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from training.pipeline.showcase import judges
from training.report import advice, cards, charts
from training.report.charts import Series
from training.report.run import RunRecord, interval, mapping, number
from training.report.text import cut, duration, e, hardware, heading
from training.utils.intervals import FEW_ROWS

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
    starts = sorted(str(s.entry["started"]) for s in run.steps.values() if s.entry.get("started"))
    parts = [
        f"recipe {recipe}" if recipe else "",
        f"starting from {base}" if base else "",
        hardware(run.manifest.get("machine") or {}),
        f"{duration(sum(seconds))} in all" if seconds else "",
        f"started {starts[0][:16].replace('T', ' ')}" if starts else "",
    ]
    return f'<p class="lead">{e(" · ".join(p for p in parts if p))}</p>'


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
        "answer and 1 a standard deviation above it. Other numbers are of evaluation functions, which training never "
        "sees.</p>"
        + "".join(drawn[:OPEN_SAMPLES])
        + hidden
        + (f'<p class="muted small">{left} more prompts are in samples.json.</p>' if left else "")
    )


def _sample(sample: Mapping[str, Any]) -> str:
    prompt = sample.get("prompt")
    turns = [m for m in prompt if isinstance(m, Mapping)] if isinstance(prompt, list) else []
    said = "\n".join(
        f"{'' if m.get('role') == 'user' and len(turns) == 1 else str(m.get('role', '')) + ': '}{m.get('content', '')}"
        for m in turns
    )
    given = {k: v for k, v in mapping(sample.get("answers")).items() if isinstance(v, Mapping)}
    columns = "".join(_answer(name, answer) for name, answer in given.items())
    return (
        f'<div class="sample"><div class="prompt"><b>{e(cut(said))}</b></div><div class="answers">{columns}</div></div>'
    )


def _answer(name: str, answer: Mapping[str, Any]) -> str:
    title, colour = MODELS.get(name, (name, 4))
    scores = [f"{key} {value:{form}}" for key, value, form in _scores(answer)]
    limited = '<p class="note">cut at the longest allowed length</p>' if answer.get("ended") is False else ""
    text = str(answer.get("text") or "")
    shown = e(cut(text)) if text else '<span class="muted">(an empty answer)</span>'
    return (
        f'<div class="answer"><div class="who"><b class="m{colour}">{e(title)}</b><span>{e(" · ".join(scores))}</span>'
        f'</div><div class="text">{shown}</div>{limited}</div>'
    )


def _scores(answer: Mapping[str, Any]) -> list[tuple[str, float, str]]:
    """Name, value and format of the reward and of each evaluation function, which older runs had one of."""
    named = {"reward": answer.get("reward"), "check": answer.get("check"), **mapping(answer.get("checks"))}
    known = [(name, number(value)) for name, value in named.items()]
    return [(name, value, "+.2f" if name == "reward" else ".2f") for name, value in known if value is not None]


def wins(run: RunRecord) -> str:
    """Win rates of RLHF over SFT with intervals, and reward against KL."""
    step = run.steps["step3"]
    s = step.summary
    checks, rows = judges(s), []
    own = {**s, "name": "step 2's reward model", "low": s.get("win_rate_low"), "high": s.get("win_rate_high"),
           "n": s.get("compared", s.get("prompts"))}  # fmt: skip
    for judge in (own, *checks):
        share, of = number(judge.get("win_rate")), cards.counted(judge, "n", "prompt")
        if share is not None:
            rows.append((f"RLHF, by {judge['name']}", of, share, interval(judge, "low", "high")))
    rows += _evaluated_rates(step.evaluation or {})
    intervals = charts.interval_chart("Answers that beat SFT's, 95% intervals", rows, "50%: no difference")
    reward, kl = dict(step.curve("reward/mean")), dict(step.curve("kl/per_sequence"))
    path = [(kl[i], reward[i]) for i in sorted(set(reward) & set(kl))]
    walk = charts.path_chart(
        "Reward against KL, one dot per iteration", "KL to the SFT model, nats per response", "mean reward", path
    )
    if not intervals and not walk:
        return ""
    kept = mapping(s.get("kept"))
    best = f" The actor of iteration {kept['iteration']} was kept." if number(kept.get("iteration")) is not None else ""
    text = "Rising reward at little KL is learning; rising KL without reward is drift."
    if rows:
        text = (
            f"{s.get('prompts', '')} held-out prompts; a tie counts half; of fewer than {FEW_ROWS} prompts, "
            f"or where all agree, the interval is Wilson's. {text}{best}"
        )
    table = _change_table(
        [
            ("mean reward", s.get("reward_before"), s.get("reward_after"), "+.3f"),
            ("answer length, tokens", s.get("length_before"), s.get("length_after"), ".1f"),
            ("answers that end by themselves", s.get("eos_rate_before"), s.get("eos_rate_after"), ".1%"),
        ]
    )
    warned = cards.marked(cards.warnings(step))
    left = f'<div class="stack">{intervals}{warned}{table}</div>'
    return f'<p class="muted">{e(text)}</p><div class="grid">{left}{walk}</div>{_judges_table(checks)}'


def _judges_table(checks: Sequence[Mapping[str, Any]]) -> str:
    """Means of base, SFT and RLHF model by each evaluation function, and their paired differences."""
    titles = {"base_to_sft": "SFT − base", "difference": "RLHF − SFT", "base_to_rlhf": "RLHF − base"}
    rows = []
    for check in checks:
        cells = [f"{v:.3f}" if (v := number(check.get(key))) is not None else "" for key in ("base", "before", "after")]
        for key in titles:
            value, ends = number(check.get(key)), interval(check, f"{key}_low", f"{key}_high")
            around = " [{:+.3f}, {:+.3f}]".format(*ends) if ends else ""
            cells.append(f"{value:+.3f}{around}" if value is not None else "")
        if any(cells):
            n = number(check.get("n"))
            rows.append([f"{check['name']}" + (f", {n:.0f} prompts" if n is not None else ""), *cells])
    if not rows:
        return ""
    head = "".join(f'<th class="n">{e(t)}</th>' for t in ("base", "SFT", "RLHF", *titles.values()))
    body = "".join(
        f"<tr><td>{e(first)}</td>" + "".join(f'<td class="n">{e(cell)}</td>' for cell in cells) + "</tr>"
        for first, *cells in rows
    )
    return (
        '<h3>Independent measures, which training never saw</h3><p class="muted">Means over the same prompts, '
        f'and paired differences with 95% intervals.</p><div class="scroll">'
        f"<table><tr><th></th>{head}</tr>{body}</table></div>"
    )


def _evaluated_rates(found: Mapping[str, Any]) -> list[charts.Share]:
    """Win rates over SFT that step 3's evaluate.py found: policies by judges."""
    rows = []
    for policy, entry in mapping(found.get("models")).items():
        for key, value in mapping(entry).items():
            share, ends = number(value), _numbers(mapping(entry).get(f"{key}_interval"))
            if key.startswith("win_rate_by_") and share is not None:
                judge = key.removeprefix("win_rate_by_").replace("_", " ")
                known = (ends[0], ends[1]) if len(ends) == 2 else None
                rows.append((f"evaluated: {policy}, by {judge}", "", share, known))
    return rows[:MOST_RATES]


def _change_table(rows: Sequence[tuple[str, Any, Any, str]]) -> str:
    """A table of numbers of the SFT and of the RLHF model; those that are not known are left out."""
    body = "".join(
        f'<tr><td>{e(label)}</td><td class="n">{before:{form}}</td><td class="n">{after:{form}}</td></tr>'
        for label, first, second, form in rows
        if (before := number(first)) is not None and (after := number(second)) is not None
    )
    head = '<tr><th></th><th class="n">SFT</th><th class="n">RLHF</th></tr>'
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
    for kind, judged in mapping(s.get("accuracy_by_kind")).items():
        found_in = mapping(judged)
        named.append((f"against {kind.replace('_', ' ')}, {found_in.get('pairs')}", found_in.get("accuracy"), 2))
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
    warned = cards.marked(cards.warnings(step))
    note = (
        '<p class="muted">Step 3 follows this judge, so what it can not see, or sees wrongly, step 3 will exploit. The '
        "figures are of the model that was saved, loaded again from disk.</p>"
    )
    left = f'<div class="stack">{bars}{warned}{f"<ul>{said}</ul>" if said else ""}</div>'
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
    remarks = [(name, remark) for name, said in known.items() for remark in said]
    if not remarks:
        return "<p>Nothing left its healthy range.</p>"
    rows = [
        f'<tr><td>{heading(name)}</td><td class="n">{e(r.get("step", ""))}</td>'
        f'<td class="{"warning" if r.get("level") == "warning" else "muted"}">{e(r.get("level", ""))}</td>'
        f"<td>{e(r.get('text', ''))}</td></tr>"
        for name, r in remarks[:MOST_REMARKS]
    ]
    more = f'<p class="muted small">{len(remarks) - len(rows)} more.</p>' if len(remarks) > len(rows) else ""
    head = '<tr><th></th><th class="n">iteration</th><th></th><th>remark</th></tr>'
    return f'<div class="scroll"><table>{head}{"".join(rows)}</table></div>{more}'


def next_steps(run: RunRecord) -> str:
    """Advice; a run that ended early begins with its own."""
    if cards.failure(run):
        return ""
    items = "".join(f"<li>{e(line)}</li>" for line in advice.next_steps(run))
    return f'<ul class="next">{items}</ul>' if items else ""
