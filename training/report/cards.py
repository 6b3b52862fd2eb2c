"""Above everything else: why a run ended early, and each step's headline number with what must be known beside it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from training.pipeline.showcase import judges
from training.report import advice
from training.report.charts import figure
from training.report.run import RunRecord, StepRecord, interval, number, numbers
from training.report.text import TITLES, duration, e, heading, plural
from training.utils.intervals import FEW_ROWS
from training.utils.run.folders import continued, named_itself

PURPOSE = {
    "step1": "learns to answer from examples",
    "step2": "learns which answers people prefer",
    "dpo": "learns from the same pairs without a reward model",
    "step3": "learns to write answers that the reward model likes",
}
MOST_WARNINGS = 3  # of the health monitor on a card


def failure(run: RunRecord) -> str:
    """What failed, the last lines of its log, and how to go on; empty for a run that did not end early."""
    broken = [s for s in run.steps.values() if s.state in advice.BROKEN]
    if not broken:
        return ""
    step = broken[0]
    code = step.entry.get("exit_code")
    headline = f"{heading(step.name)} {step.state}" + (f" (exit code {code})" if code is not None else "")
    lines = "".join(f"<p>{e(line)}</p>" for line in advice.next_steps(run))
    words = [".venv/bin/python", *continued(run.last_command, named_itself(run.path))] if run.last_command else []
    again = f"<pre>{e(shlex.join(words))}</pre>" if words else ""
    logs = "".join(
        f"<h3>Last lines of {s.name}.log</h3><pre>{e(chr(10).join(s.log_tail))}</pre>" for s in broken if s.log_tail
    )
    return f'<section id="failure" class="failure"><h2>{e(headline)}</h2>{logs}{lines}{again}</section>'


def cards(run: RunRecord) -> str:
    """One card for each step: what it is for, its one most telling number, and what to beware of."""
    body = "".join(_card(step) for step in run.steps.values() if step.state != "not run" or step.name in run.pipeline)
    return f'<div class="cards">{body}</div>'


def _card(step: StepRecord) -> str:
    state = f'<span class="state {step.state.replace(" ", "-")}">{step.state}</span>'
    return (
        f'<div class="card"><div class="step"><span>{heading(step.name)} · {TITLES[step.name]}</span>{state}</div>'
        f"{HEADLINES[step.name](step.summary)}{marked(warnings(step))}"
        f'<p class="muted small">{PURPOSE[step.name]}{", " + duration(step.seconds) if step.seconds else ""}</p></div>'
    )


def _big(now: str, meaning: str, was: str = "", around: str = "") -> str:
    before = f'<span class="was">{e(was)} → </span>' if was else ""
    ends = f' <span class="interval">{e(around)}</span>' if around else ""
    return f'<p class="big">{before}{e(now)}{ends}</p><p>{e(meaning)}</p>'


def share_text(s: Mapping[str, Any], what: str, low: str, high: str) -> tuple[str, str]:
    """A share and its interval as texts, the latter empty where it is not known; both empty without the share."""
    share, ends = number(s.get(what)), interval(s, low, high)
    return (f"{share:.1%}", "[{:.0%}, {:.0%}]".format(*ends) if ends else "") if share is not None else ("", "")


def counted(s: Mapping[str, Any], key: str, noun: str) -> str:
    """``6 prompts, 4 ties``, as far as it is known."""
    found = [(number(s.get(key)), noun), (number(s.get("ties")), "tie")]
    return ", ".join(plural(int(count), word) for count, word in found if count is not None)


def _perplexity(s: Mapping[str, Any]) -> str:
    before, after, rows = numbers(s, "perplexity_before", "perplexity_after", "held_out")
    if after is None:
        return ""
    of = f"{plural(int(rows), 'held-out answer')}" if rows is not None else "held-out answers"
    return _big(figure(after), f"perplexity of {of}, lower is better", figure(before) if before is not None else "")


def _accuracy(s: Mapping[str, Any]) -> str:
    share, around = share_text(s, "accuracy_after", "accuracy_low", "accuracy_high")
    before, longer = numbers(s, "accuracy_before", "accuracy_longer")
    if not share:
        return ""
    rule = f" (by length alone: {max(longer, 1 - longer):.0%})" if longer is not None else ""
    of = counted(s, "held_out", "pair")
    meaning = f"of held-out pairs judged right{rule}" + (f"; {of}" if of else "")
    return _big(share, meaning, f"{before:.1%}" if before is not None else "", around)


def _win_rate(s: Mapping[str, Any]) -> str:
    share, around = share_text(s, "win_rate", "win_rate_low", "win_rate_high")
    if not share:
        return ""
    of = counted(s, "compared" if "compared" in s else "prompts", "prompt")
    text = "of its answers beat step 1's, by the reward model" + (f"; {of}" if of else "")
    lines = filter(None, map(judge_text, judges(s)))
    return _big(share, text, around=around) + "".join(f"<p>{e(line)}</p>" for line in lines)


def judge_text(judge: Mapping[str, Any]) -> str:
    """``80.0% [70%, 90%] by manner; 160 prompts, 12 ties``; empty where the judge has no win rate."""
    share, around = share_text(judge, "win_rate", "low", "high")
    of = counted(judge, "n", "prompt")
    return f"{share} {around} by {judge['name']}".replace("  ", " ") + (f"; {of}" if of else "") if share else ""


def _implicit_accuracy(s: Mapping[str, Any]) -> str:
    share, around = share_text(s, "accuracy_after", "accuracy_low", "accuracy_high")
    of, margin = counted(s, "held_out", "pair"), number(s.get("margin_after"))
    text = "of held-out pairs have grown apart the right way" + (f"; {of}" if of else "")
    change = number(s.get("chosen_change"))
    more = f"preferred answers: {change:+.2f} nats per token since the start" if change is not None else ""
    more += f", margin of rewards {margin:.2f}" if more and margin is not None else ""
    return _big(share, text, around=around) + (f"<p>{e(more)}</p>" if more else "") if share else ""


HEADLINES = {"step1": _perplexity, "step2": _accuracy, "dpo": _implicit_accuracy, "step3": _win_rate}


COUNTED = {
    "step1": ("held_out", "answer"),
    "step2": ("held_out", "pair"),
    "dpo": ("held_out", "pair"),
    "step3": ("prompts", "prompt"),
}


def warnings(step: StepRecord) -> Iterator[str]:
    """What a reader must know about the number on the step's card before believing it."""
    s = step.summary
    key, noun = COUNTED[step.name]
    count = number(s.get(key))
    if count and count < FEW_ROWS:
        weight = "" if step.name == "step1" else f" One of them moves the number by {1 / count:.0%}."
        yield f"Only {plural(int(count), f'held-out {noun}')}.{weight}"
    ties = number(s.get("ties"))
    if ties and count and ties > count / 2:
        yield f"{ties:.0f} of {count:.0f} are ties, each counted half: the two hardly differ."
    if step.name == "step2":
        low, longer = numbers(s, "accuracy_low", "accuracy_longer")
        rule = max(longer, 1 - longer) if longer is not None else 0.5
        if low is not None and low <= rule:
            yield f"The interval begins at {low:.0%}, no better than length alone or a coin ({rule:.0%})."
    if step.name == "step3":
        ends = interval(s, "win_rate_low", "win_rate_high")
        if ends and ends[0] <= 0.5 <= ends[1]:
            yield "The interval includes 50%: no difference is shown."
        yield from remarks(step, ("reward/", "eval/"))
    if step.name == "dpo":
        yield from remarks(step, ("eval/",))


def marked(lines: Iterable[str]) -> str:
    """Warnings as paragraphs."""
    return "".join(f'<p class="warning small">{e(line)}</p>' for line in lines)


def remarks(step: StepRecord, metrics: tuple[str, ...]) -> list[str]:
    """The health monitor's last warning about each metric whose name begins with one of these."""
    last = {
        str(r.get("metric")): f"{'Step' if step.name == 'dpo' else 'Iteration'} {r.get('step')}: {r.get('text')}"
        for r in step.health or []
        if r.get("level") == "warning" and str(r.get("metric")).startswith(metrics)
    }
    return list(last.values())[-MOST_WARNINGS:]
