"""Where time and memory went."""

from __future__ import annotations

from training.report import charts
from training.report.charts import figure
from training.report.run import RunRecord, StepRecord, mapping, number
from training.report.text import duration, e, heading

PHASE_NAMES = {"load": "load model", "data": "read data", "rest": "start, stop"}


def time_and_memory(run: RunRecord) -> str:
    """Seconds and peak memory by phase of each step."""
    rows, drawn = [], []
    names: dict[str, int] = {}  # phase -> colour
    for step in run.steps.values():
        phases = _phases(step)
        if not phases:
            continue
        total = sum(seconds for seconds, _ in phases.values())
        for name, (seconds, peak) in phases.items():
            names.setdefault(name, len(names) % 8 + 1)
            memory = f"{peak:.2f} GiB" if peak is not None else ""
            rows.append((step.name, name, seconds, seconds / total if total else 0.0, memory))
        parts = [(name, seconds, duration(seconds)) for name, (seconds, _) in phases.items()]
        drawn.append((heading(step.name), parts))
    if not rows:
        return ""
    has_memory = any(row[4] for row in rows)
    body = "".join(
        f'<tr><td>{heading(name)}</td><td>{e(phase)}</td><td class="n">{duration(seconds)}</td>'
        f'<td class="n">{share:.0%}</td><td class="b"><i style="width:{max(share, 0.005):.1%}"></i></td>'
        + (f'<td class="n">{memory}</td>' if has_memory else "")
        + "</tr>"
        for name, phase, seconds, share, memory in rows
    )
    head = "<tr><th></th><th>phase</th><th class='n'>time</th><th class='n'>share</th><th></th>"
    gpu = bool((run.manifest.get("machine") or {}).get("gpus"))
    kind = "tensors on the first GPU" if gpu else "resident memory of the process"
    note = f"Peak memory: {kind}, of rank 0." if has_memory else "This run did not record memory."
    head += ("<th class='n'>peak memory</th>" if has_memory else "") + "</tr>"
    bars = charts.stacked_bars(drawn, names)
    return (
        f'{bars}<details open><summary>Table</summary><div class="scroll"><table>{head}{body}</table></div></details>'
        f'<p class="muted small">{note}{_speed(run.steps["step3"])}</p>'
    )


def _phases(step: StepRecord) -> dict[str, tuple[float, float | None]]:
    """Phase -> seconds and peak GiB; from summary.json, else as far as metrics.jsonl tells."""
    found: dict[str, tuple[float, float | None]] = {}
    recorded = step.summary.get("phases")
    for name, values in mapping(recorded).items():
        seconds = number(mapping(values).get("seconds"))
        if seconds is not None:
            found[str(name)] = (seconds, number(mapping(values).get("peak_gib")))
    if not found and step.name == "step3":
        for name in ("generate", "score", "train"):
            curve = step.curve(f"time/{name}")
            if curve:
                found[name] = (sum(y for _, y in curve), None)
    elif not found:
        found = _phases_by_gaps(step)
    if found and step.seconds:
        rest = step.seconds - sum(seconds for seconds, _ in found.values())
        if rest > 0.5:
            found["rest" if recorded else "load, evaluate, save"] = (rest, None)
    return {PHASE_NAMES.get(name, name): phase for name, phase in found.items()}


def _phases_by_gaps(step: StepRecord) -> dict[str, tuple[float, float | None]]:
    """Time between two records belongs to what the later one reports: a training step or an evaluation."""
    sums: dict[str, float] = {}
    times = [(number(r.get("time")), any(k.startswith("eval/") for k in r)) for r in step.metrics]
    known = sorted((t, evaluates) for t, evaluates in times if t is not None)
    for (before, _), (after, evaluates) in zip([(0.0, False), *known], known, strict=False):
        name = "evaluate" if evaluates else "train"
        sums[name] = sums.get(name, 0.0) + after - before
    return {name: (seconds, None) for name, seconds in sums.items()}


def _speed(step: StepRecord) -> str:
    speed = [y for _, y in step.curve("time/tokens_per_second")]
    return f" Step 3 decoded {figure(sum(speed) / len(speed))} tokens per second." if speed else ""
