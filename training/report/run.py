"""What a run directory holds, read so that a partial, failed or damaged run still gives a page."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.utils.arguments import flags_in
from training.utils.errors import UserError
from training.utils.run.folders import PIPELINES, STEPS
from training.utils.run.manifest import read_manifest
from training.utils.run.processes import last_lines

STOPPED = (129, 130, 143)  # exit codes of a terminal that was closed, Ctrl-C and SIGTERM
_DATA_LINE = re.compile(r"rows read: |^dropped \d+: |^truncated \d+: |rows to train on, |that is also trained on")
_FIRST_LINES = 500  # of a start, among which those about the rows are


@dataclass
class StepRecord:
    """What one step left behind.

    Attributes:
        name: one of `STEPS`.
        entry: its part of manifest.json; empty for a step that train.py did not start.
        summary: summary.json; empty unless the step is finished.
        metrics: records of metrics.jsonl in the order of their steps.
        evaluation: evaluation.json, what the step's evaluate.py found; None without it.
        health: remarks of the health monitor; None where the run has none.
        data: lines of the log about the rows.
        log_tail: the last lines of the log of a step that failed.
    """

    name: str
    entry: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    evaluation: dict[str, Any] | None = None
    health: list[dict[str, Any]] | None = None
    data: list[str] = field(default_factory=list)
    log_tail: list[str] = field(default_factory=list)

    @property
    def state(self) -> str:
        """``finished``, ``failed``, ``stopped``, ``unfinished`` (at work, killed, or to start over) or ``not run``."""
        if self.summary:
            return "finished"
        code = self.entry.get("exit_code")
        if code in STOPPED:
            return "stopped"
        if code:
            return "failed"
        return "unfinished" if self.entry or self.metrics else "not run"

    @property
    def seconds(self) -> float | None:
        """Wall time with start and end of the process, or what the step itself has measured: all of its starts."""
        known = (number(found.get("seconds")) for found in (self.entry, self.summary))
        return max(filter(None, known), default=None)

    def curve(self, name: str) -> list[tuple[float, float]]:
        """(step, value) of one metric; what is missing or not finite is left out."""
        points = [(number(r.get("step")), number(r.get(name))) for r in self.metrics]
        return [(x, y) for x, y in points if x is not None and y is not None]

    def flag(self, name: str) -> str | None:
        """The value of a flag on the step's command line; None if it had its default."""
        values = flags_in([str(token) for token in self.entry.get("arguments", [])]).get(name)
        return values[0] if values else None


@dataclass
class RunRecord:
    """A whole run; ``notes`` says what could not be read."""

    path: Path
    manifest: dict[str, Any]
    steps: dict[str, StepRecord]
    samples: list[dict[str, Any]]
    notes: list[str]

    @property
    def pipeline(self) -> tuple[str, ...]:
        """The steps that a run of its pipeline has."""
        return PIPELINES.get(str(self.manifest.get("pipeline")), PIPELINES["sft,rm,ppo"])

    @property
    def last_command(self) -> list[str]:
        """The words of the last command of train.py; empty if it is not known."""
        started = self.manifest.get("started_as")
        last = started[-1] if isinstance(started, list) and started else None
        return [str(word) for word in last] if isinstance(last, list) else []


def number(value: Any) -> float | None:
    """A finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        found = float(value)
    except OverflowError:  # JSON's integers have no end
        return None
    return found if math.isfinite(found) else None


def numbers(found: Mapping[str, Any], *keys: str) -> list[float | None]:
    """The `number` at each of these keys."""
    return [number(found.get(key)) for key in keys]


def interval(found: Mapping[str, Any], low: str, high: str) -> tuple[float, float] | None:
    """An interval's ends, by their keys; None unless both are known."""
    first, last = numbers(found, low, high)
    return None if first is None or last is None else (first, last)


def mapping(value: Any) -> Mapping[str, Any]:
    """An object of JSON, or an empty one for anything else."""
    return value if isinstance(value, Mapping) else {}


def read_run(path: Path) -> RunRecord:
    """Read a run directory.

    Raises:
        UserError: there is no such folder, it holds no run, or its manifest is damaged.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such run directory")
    manifest = read_manifest(path)
    if not manifest and not any((path / name).is_dir() for name in STEPS):
        raise UserError(f"{path} holds no run: neither manifest.json nor {', '.join(STEPS)}")
    notes: list[str] = []
    entries = manifest.get("steps") or {}
    steps = {name: _read_step(path, name, entries.get(name) or {}, notes) for name in STEPS}
    samples = _json(path / "step3" / "samples.json", notes, list) or []
    return RunRecord(path, manifest, steps, [s for s in samples if isinstance(s, dict)], notes)


def _read_step(run: Path, name: str, entry: Mapping[str, Any], notes: list[str]) -> StepRecord:
    folder, log = run / name, run / f"{name}.log"
    record = StepRecord(name, dict(entry))
    record.summary = _json(folder / "summary.json", notes, dict) or {}
    record.metrics = _one_per_step(_lines(folder / "metrics.jsonl", notes) or [])
    record.evaluation = _json(folder / "evaluation.json", notes, dict)
    record.health = _lines(folder / "health.jsonl", notes)
    if log.is_file():
        record.data = _data_lines(log, " ".join(["$", *map(str, entry.get("command", []))]))
        if record.state in ("failed", "unfinished"):
            record.log_tail = last_lines(log)
    return record


def _data_lines(log: Path, start: str) -> list[str]:
    """What a step's last start, which its log begins with ``start``, has said about the rows."""
    lines: list[str] = []
    with log.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.rstrip() == start:
                lines = []
            elif len(lines) < _FIRST_LINES:
                lines.append(line)
    return [line.strip() for line in lines if _DATA_LINE.search(line)]


def _json(path: Path, notes: list[str], kind: type) -> Any:
    """A JSON file's content; None, and a note unless the file is not there, if it is not what it should be."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{path.parent.name}/{path.name} can not be read: {error}")
        return None
    if not isinstance(content, kind):
        notes.append(f"{path.parent.name}/{path.name} is not what this page expects, it is left out")
        return None
    return content


def _lines(path: Path, notes: list[str]) -> list[dict[str, Any]] | None:
    """The objects of a JSON-lines file; a killed run leaves half a last line, other damage is noted."""
    if not path.is_file():
        return None
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    records, bad = [], 0
    for i, line in enumerate(lines):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            bad += bool(line.strip()) and i + 1 < len(lines)
            continue
        if isinstance(record, dict):
            records.append(record)
    if bad:
        notes.append(f"{path.parent.name}/{path.name}: {bad} lines are damaged and left out")
    return records


def _one_per_step(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records in the order of their steps; of two with the same step and metrics, as a resumed run has, the later."""
    last: dict[tuple[float, frozenset[str]], dict[str, Any]] = {}
    for record in records:
        step = number(record.get("step"))
        if step is not None:
            last[step, frozenset(record)] = record
    return sorted(last.values(), key=lambda r: r["step"])
