"""What it takes to do a run again: commands, data, seeds, versions, machine."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from training.report.run import RunRecord, StepRecord, mapping
from training.report.text import TITLES, duration, e, hardware, heading, shortened
from training.utils.arguments import TrainingArguments


def what_ran(run: RunRecord) -> str:
    """Commands, data, seeds, versions and the machine: what it takes to do it again."""
    manifest = run.manifest
    parts = []
    started = manifest.get("started_as") or []
    if started:
        command = "\n".join(shlex.join(str(t) for t in argv) for argv in started if isinstance(argv, list))
        parts.append(f"<pre>{e(command)}</pre>")
    for step in run.steps.values():
        if step.state == "not run":
            continue
        parts.append(
            f'<h3>{heading(step.name)} · {TITLES[step.name]} <span class="muted small">{step.state}</span></h3>'
        )
        if step.entry.get("command"):
            parts.append(f"<pre>{e(shlex.join(str(t) for t in step.entry['command']))}</pre>")
        facts = [f"seed {step.flag('seed') or TrainingArguments.seed}"] if step.entry else []
        computed_in = mapping(step.summary.get("precision")).get("dtype") or step.flag("dtype")
        facts += [f"precision {computed_in}"] if computed_in else []
        facts += [f"started {str(step.entry['started'])[:16].replace('T', ' ')}"] if step.entry.get("started") else []
        facts += [duration(step.seconds)] if step.seconds else []
        parts.append(f'<p class="muted small">{e(" · ".join(facts))}</p>' if facts else "")
        lines = "".join(f"<li>{e(line)}</li>" for line in step.data)
        parts.append(f'<ul class="small">{lines}</ul>' if lines else "")
        parts.append(_inputs(step))
    parts.append(_versions(manifest))
    return "".join(parts)


def _inputs(step: StepRecord) -> str:
    inputs = step.entry.get("inputs")
    if not isinstance(inputs, Mapping) or not inputs:
        return ""
    rows = "".join(
        f"<tr><td>{e(name)}</td><td><code>{e(str(digest)[:16]) if digest else 'not hashed'}</code></td></tr>"
        for name, digest in inputs.items()
    )
    return f"<details><summary>Inputs with the start of their SHA-256</summary><table>{rows}</table></details>"


def _versions(manifest: Mapping[str, Any]) -> str:
    versions = {k: v for k, v in (manifest.get("versions") or {}).items() if v}
    git = manifest.get("git") or {}
    rows = [("machine", hardware(manifest.get("machine") or {}))]
    if git.get("commit"):
        changed = ", with local changes" if git.get("changed") else ""
        rows.append(("commit", f"{shortened(str(git['commit']))[:12]}{changed}"))
    rows.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    body = "".join(f"<tr><td>{e(name)}</td><td>{e(text)}</td></tr>" for name, text in rows if text)
    return f"<h3>Machine and versions</h3><table>{body}</table>" if body else ""
