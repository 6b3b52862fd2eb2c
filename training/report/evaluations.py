"""evaluation.json of the steps as tables: whatever numbers it holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from training.report.charts import figure
from training.report.run import RunRecord, number
from training.report.text import TITLES, cut, e, heading, words

MOST_ROWS = 12
INTERVAL = "_interval"


def evaluations(run: RunRecord) -> str:
    """evaluation.json of each step as tables: whatever numbers it holds."""
    parts = []
    for step in run.steps.values():
        if step.evaluation:
            body = _entries(step.evaluation)
            parts.append(f"<h3>{heading(step.name)} · {TITLES[step.name]}</h3>{body}")
    return "".join(parts)


def _entries(found: Mapping[str, Any]) -> str:
    """Plain numbers first, then each table; long ones (answers, worst pairs) are folded up."""
    plain = {k: v for k, v in found.items() if isinstance(v, (str, int, float)) and not isinstance(v, bool)}
    numbers = _pairs_table({**plain, **{k: v for k, v in found.items() if k.removesuffix(INTERVAL) in plain}})
    parts = [numbers if plain else ""]
    for name, value in found.items():
        if isinstance(value, Mapping) and not ({"edges", "counts"} <= set(value)):
            inner, unfolded = _inner_table(value), " open"
        elif isinstance(value, list) and value and all(isinstance(v, Mapping) for v in value):
            inner, unfolded = _rows_table(value), ""
        else:
            continue
        parts.append(f"<details{unfolded}><summary>{e(words(name))}</summary>{inner}</details>" if inner else "")
    return "".join(parts)


def _inner_table(value: Mapping[str, Any]) -> str:
    if value and all(isinstance(v, Mapping) for v in value.values()):
        return _rows_table([{"": name, **entry} for name, entry in value.items()])
    return _pairs_table(value)


def _pairs_table(entry: Mapping[str, Any]) -> str:
    cells = _with_intervals(entry)
    rows = [f'<tr><td>{e(words(k))}</td><td class="n">{e(text)}</td></tr>' for k, text in cells.items()]
    return f"<table>{''.join(rows)}</table>"


def _rows_table(rows: Sequence[Mapping[str, Any]]) -> str:
    shown = [_with_intervals(row) for row in rows[:MOST_ROWS]]
    keys = list(dict.fromkeys(k for row in shown for k in row))
    head = "".join(f"<th>{e(words(k))}</th>" for k in keys)
    body = "".join("<tr>" + "".join(f"<td>{e(row.get(k, ''))}</td>" for k in keys) + "</tr>" for row in shown)
    more = f'<p class="muted small">{len(rows) - MOST_ROWS} more rows.</p>' if len(rows) > MOST_ROWS else ""
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>{more}'


def _with_intervals(entry: Mapping[str, Any]) -> dict[str, str]:
    """Each entry as text; an entry ``NAME_interval`` goes behind the number that it belongs to."""
    return {
        key: _shown(value) + (f" {_shown(entry[key + INTERVAL])}" if key + INTERVAL in entry else "")
        for key, value in entry.items()
        if not (key.endswith(INTERVAL) and key.removesuffix(INTERVAL) in entry)
    }


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return figure(value) if number(value) is not None else str(value)
    if isinstance(value, list) and all(number(v) is not None for v in value):
        return f"[{', '.join(figure(float(v)) for v in value)}]"
    if isinstance(value, Mapping):
        return ", ".join(f"{words(str(k))} {_shown(v)}" for k, v in value.items())
    return cut(str(value), 600)
