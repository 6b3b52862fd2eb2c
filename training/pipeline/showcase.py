"""What a finished run shows on the terminal: a table of its numbers, and three answers side by side."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from training.report.text import duration
from training.utils.run.files import read_object
from training.utils.run.folders import title

MODELS = (("base", "base"), ("sft", "SFT"), ("rlhf", "RLHF"))
WIDEST = 110
Line = tuple[str, str, str, str]  # of the table: name, before, after, and what to hold it against


def summary_table(run: Path, seconds: Mapping[str, float]) -> str:
    """The numbers of each finished step, one per line: name, before, after, and what to hold it against.

    Args:
        run: the run directory; a step without ``summary.json``, and a number that is not in it, is left out.
        seconds: wall time of each step's last start, by ``"step1"`` and so on.
    """
    rows: list[tuple[str, ...]] = []
    for step, lines in (("step1", _step1), ("step2", _step2), ("dpo", _dpo), ("step3", _step3)):
        path = run / step / "summary.json"
        if not path.is_file():
            continue
        summary = read_object(path)
        try:
            found = list(lines(summary)) or [("finished", "", "", "")]
            known = [value for value in (seconds.get(step), summary.get("seconds")) if value is not None]
            time = duration(max(known, default=None))
        except (LookupError, TypeError, ValueError, AttributeError):  # not as a step has written it
            found, time = [("summary.json is damaged", "", "", "")], ""
        for i, line in enumerate(found):
            rows.append((f"{title(step):<6}  {time:>9}" if i == 0 else "", *line))
    if not rows:
        return ""
    rows.insert(0, ("", "", "before", "after", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]:>{widths[3]}}  {row[4]}".rstrip()
        for row in rows
    )


def judges(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What step 3's summary says by each evaluation function; runs of earlier versions had at most one."""
    found = summary.get("eval_functions", [summary.get("eval_function")])
    judged = [f for f in found if isinstance(f, Mapping)] if isinstance(found, list) else []
    ends = [{"low": f.get("win_rate_low"), "high": f.get("win_rate_high"), "n": summary.get("prompts")} for f in judged]
    names = [str(f.get("name") or "evaluation function").rpartition("/")[2] for f in judged]
    return [{**end, **f, "name": name} for end, f, name in zip(ends, judged, names, strict=True)]


def answers_text(run: Path, width: int = 0) -> str:
    """The prompts of step 3's samples.json, each with the answer of the base, the SFT and the RLHF model.

    Empty without samples. ``width`` is in columns, 0 for the terminal's.
    """
    path = run / "step3" / "samples.json"
    if not path.is_file():
        return ""
    width = width or min(WIDEST, shutil.get_terminal_size((100, 24)).columns)
    try:
        samples = enumerate(json.loads(path.read_text(encoding="utf-8")), 1)
        return "\n\n".join(_sample(sample, number, width) for number, sample in samples)
    except (OSError, LookupError, TypeError, ValueError, AttributeError, RecursionError):
        return ""  # not as a step has written it: the report says so


def _sample(sample: Mapping[str, Any], number: int, width: int) -> str:
    lines = [f"-- prompt {number} ".ljust(width, "-")]
    for message in sample["prompt"]:
        lines += _wrapped(message.get("content", ""), width, f"{message.get('role', '')}: ", "    ")
    for key, name in MODELS:
        answer = sample["answers"].get(key)
        if answer is None:
            continue
        known = {"reward": answer.get("reward"), "check": answer.get("check"), **answer.get("checks", {})}
        scores = [f"{name} {value:+.2f}" for name, value in known.items() if value is not None]
        lines += ["", f"  {name:<5} {'   '.join(scores)}".rstrip()]
        lines += _wrapped(answer.get("text", "") or "(nothing)", width, "    ", "    ")
    return "\n".join(lines)


def _step1(s: Mapping[str, Any]) -> Iterator[Line]:
    yield from _change("held-out loss", s, "loss_before", "loss_after", ".3f")
    yield from _change("held-out perplexity", s, "perplexity_before", "perplexity_after", ".2f")


def _step2(s: Mapping[str, Any]) -> Iterator[Line]:
    rules = (("the longer", "accuracy_longer"), ("the shorter", "accuracy_shorter"))
    notes = [_sureness(s, "accuracy_low", "accuracy_high", "held_out", "pairs")]
    notes += [f"always {name}: {s[key]:.3f}" for name, key in rules if s.get(key) is not None]
    note = ", ".join(filter(None, notes))
    yield from _change("held-out accuracy", s, "accuracy_before", "accuracy_after", ".3f", note)
    for kind, found in (s.get("accuracy_by_kind") or {}).items():
        yield f"accuracy against {kind.replace('_', ' ')}", "", f"{found['accuracy']:.3f}", f"{found['pairs']} pairs"
    if s.get("chosen_mean") is not None and s.get("rejected_mean") is not None:
        yield "reward of rejected, chosen", f"{s['rejected_mean']:+.2f}", f"{s['chosen_mean']:+.2f}", ""
    if verdicts := s.get("verdicts") or {}:
        held = [name.replace("_", " ") for name, value in verdicts.items() if value]
        missed = [name.replace("_", " ") for name, value in verdicts.items() if not value]
        text = f"missed: {', '.join(missed)}" if missed else ", ".join(held)
        yield "verdicts that hold", "", f"{len(held)} of {len(verdicts)}", text


def _dpo(s: Mapping[str, Any]) -> Iterator[Line]:
    sure = _sureness(s, "accuracy_low", "accuracy_high", "held_out", "pairs")
    kl = f"KL {s['kl']:.2f} nats per token" if s.get("kl") is not None else ""
    yield from _change("held-out loss", s, "loss_before", "loss_after", ".3f")
    yield from _change("held-out accuracy", s, "", "accuracy_after", ".3f", sure)
    yield from _change("log-prob of chosen", s, "chosen_log_prob_before", "chosen_log_prob_after", ".1f", kl)
    yield from _change("log-prob of rejected", s, "rejected_log_prob_before", "rejected_log_prob_after", ".1f")


def _step3(s: Mapping[str, Any]) -> Iterator[Line]:
    own = {**s, "low": s.get("win_rate_low"), "high": s.get("win_rate_high"), "n": s.get("compared", s.get("prompts"))}
    yield from _change("mean held-out reward", s, "reward_before", "reward_after", "+.3f")
    for check in judges(s):
        notes = [f"base {check['base']:+.3f}"] if check.get("base") is not None else []
        if check.get("difference") is not None:
            low, high = check["difference_low"], check["difference_high"]
            notes.append(f"difference {check['difference']:+.3f} [{low:+.3f}, {high:+.3f}]")
        yield from _change(f"mean {check['name']}", check, "before", "after", "+.3f", ", ".join(notes))
    for name, judge in (("reward model", own), *((check["name"], check) for check in judges(s))):
        sure = _sureness(judge, "low", "high", "n", "prompts")
        yield from _change(f"win rate by {name}", judge, "", "win_rate", ".3f", sure)


def _change(name: str, s: Mapping[str, Any], before: str, after: str, form: str, note: str = "") -> Iterator[Line]:
    """A number after training, and before where it is known; nothing without it."""
    if s.get(after) is not None:
        yield name, format(s[before], form) if s.get(before) is not None else "", format(s[after], form), note


def _sureness(s: Mapping[str, Any], low: str, high: str, count: str, what: str) -> str:
    """Interval, number of rows and ties of a share, as far as they are known."""
    known = s.get(low) is not None and s.get(high) is not None
    parts = [f"95% interval {s[low]:.3f} to {s[high]:.3f}"] if known else []
    parts += [f"{s[count]} {what}"] if s.get(count) is not None else []
    parts += [f"{s['ties']} tie{'' if s['ties'] == 1 else 's'}"] if s.get("ties") is not None else []
    return ", ".join(parts)


def _wrapped(text: str, width: int, first: str, later: str) -> list[str]:
    lines: list[str] = []
    for paragraph in text.strip().splitlines() or [""]:
        lines += textwrap.wrap(paragraph, width, initial_indent=first, subsequent_indent=later) or [""]
        first = later
    return lines
