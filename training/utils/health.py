"""A health monitor: turns the metrics of step 3 and of DPO into one-line advice while it trains.

Two levels. A *warning* says what is wrong and which flag to change. A *note* explains what looks wrong and is not,
such as a negative reward. A remark is made when a metric has been outside its healthy range for some iterations in a
row, and again each time that number has doubled. docs/metrics.md has the same ranges beside what each metric is.

Remarks go to the log and to ``health.jsonl``: ``step``, ``level``, ``metric``, ``value`` and ``text`` in each line.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from training.utils.health_rules import DRIFTS, HEALTHY, NOTE, RULES, WARNING, Rule
from training.utils.run.distributed import is_main, say

HEALTH_FILE = "health.jsonl"
FIRST_LOOK = 9  # iterations before a trend is judged: three thirds of three
FALL = 2.0  # standard errors by which an evaluation function may lie below its best before it is said to fall


@dataclass(frozen=True)
class Remark:
    """One line of advice.

    Attributes:
        step: the iteration, or the optimizer step.
        level: ``note`` or ``warning``.
        metric, value: what it is about.
        text: what is seen, then after a colon what to do.
    """

    step: int
    level: str
    metric: str
    value: float
    text: str


def not_rising(history: Sequence[float]) -> tuple[float, float] | None:
    """Means of the first and the last third of a history, if the last is not above the first by a standard error.

    None as well for fewer values than `FIRST_LOOK`, one for each iteration.
    """
    third = len(history) // 3
    if len(history) < FIRST_LOOK:
        return None
    first, last = history[:third], history[-third:]
    error = math.sqrt((statistics.variance(first) + statistics.variance(last)) / third)
    start, end = statistics.fmean(first), statistics.fmean(last)
    return None if end > start + error else (start, end)


class HealthMonitor:
    """Watches metrics and makes remarks.

    Args:
        folder: gets ``health.jsonl``; None writes nothing and prints nothing.
        rules: ranges of metrics; step 3's by default.

    Attributes:
        remarks: all that were made.
    """

    def __init__(self, folder: Path | None = None, rules: Sequence[Rule] = RULES) -> None:
        self._rules = rules
        self.remarks: list[Remark] = []
        self._file = folder / HEALTH_FILE if folder is not None and is_main() else None
        self._history: dict[str, list[float]] = {}
        self._outside: dict[str, int] = {}
        self._trend_due = FIRST_LOOK
        if self._file is not None:
            self._file.touch()  # an empty file says that the monitor was there and had nothing to remark

    def observe(self, step: int, metrics: Mapping[str, float]) -> list[Remark]:
        """Take one record of metrics.jsonl; returns the remarks that it gave rise to, already logged."""
        for name, value in metrics.items():
            self._history.setdefault(name, []).append(value)
        found = [*self._ranges(step, metrics)]
        if "reward/score" in metrics:
            found += [*self._trend(step), *self._drift(step, metrics)]
        if "eval/reward" in metrics:
            found += self._exploited(step)
        self.remarks += found
        if self._file is not None and found:
            with self._file.open("a", encoding="utf-8") as file:
                for remark in found:
                    say(f"[{step}] {remark.level}: {remark.text}")
                    file.write(json.dumps(asdict(remark), ensure_ascii=False) + "\n")
        return found

    def replay(self, metrics: Path, resumed: bool) -> None:
        """Take up a resumed run: look at its ``metrics.jsonl`` again, without a word, and write ``health.jsonl`` anew.

        In a new run (not ``resumed``) there is nothing to look at.
        """
        file, self._file = self._file, None
        if file is None:
            return
        for line in metrics.read_text(encoding="utf-8").splitlines() if resumed else []:
            record = json.loads(line)
            self.observe(record.pop("step"), {name: value for name, value in record.items() if name != "time"})
        text = "".join(json.dumps(asdict(remark), ensure_ascii=False) + "\n" for remark in self.remarks)
        file.write_text(text, encoding="utf-8")
        self._file = file

    def _counted(self, name: str, outside: bool, patience: int, once: bool = False) -> bool:
        """Count iterations in a row; true at ``patience`` and at every doubling of it."""
        count = self._outside[name] = self._outside.get(name, 0) + 1 if outside else 0
        if once and any(remark.metric == name and remark.level == NOTE for remark in self.remarks):
            return False
        multiple, rest = divmod(count, patience)
        return count > 0 and rest == 0 and multiple & (multiple - 1) == 0

    def _ranges(self, step: int, metrics: Mapping[str, float]) -> list[Remark]:
        found = []
        for rule in self._rules:
            value = metrics.get(rule.metric)
            if value is None:
                continue
            outside = not rule.low <= value <= rule.high
            unless = [(name, *HEALTHY[name]) for name in rule.unless]
            if any(not low <= metrics.get(name, low) <= high for name, low, high in unless):
                outside = False
            if self._counted(rule.metric, outside, rule.patience, rule.once):
                text = rule.text.format(value=value, count=self._outside[rule.metric])
                found.append(Remark(step, rule.level, rule.metric, value, text))
        return found

    def _trend(self, step: int) -> list[Remark]:
        """Whether the reward rises, looked at after 9, 18, 36, ... iterations."""
        history = self._history["reward/score"]
        if len(history) < self._trend_due:
            return []
        self._trend_due *= 2
        flat = not_rising(history)
        if flat is None:
            return []
        start, end = flat
        text = (
            f"the reward has not risen in {len(history)} iterations ({start:.2f} in the first third, {end:.2f} in the "
            "last): see that the reward model tells good from bad (step 2's accuracy and verdicts), then raise "
            "--actor_learning_rate or --per_device_generation_batch_size, or lower --kl_coef"
        )
        return [Remark(step, WARNING, "reward/score", end, text)]

    def _drift(self, step: int, metrics: Mapping[str, float]) -> list[Remark]:
        """Length and entropy against their first three iterations."""
        found = []
        for name, limit, outside, text in DRIFTS:
            history = self._history.get(name, [])
            if name not in metrics or len(history) <= 3:
                continue
            start = statistics.fmean(history[:3])
            if self._counted(f"{name} {limit}", outside(metrics[name], start * limit), 3):
                found.append(Remark(step, WARNING, name, metrics[name], text.format(start=start, value=metrics[name])))
        return found

    def _exploited(self, step: int) -> list[Remark]:
        """The reward model says better, an independent measure says worse."""
        rewards, found = self._history["eval/reward"], []
        for metric in [name for name in self._history if name.startswith("eval/") and name.endswith("/mean")]:
            name = metric.split("/")[1]
            values, errors = self._history[metric], self._history.get(f"eval/{name}/error", [])
            if len(values) < 2 or not len(values) == len(errors) == len(rewards):
                continue
            fallen = values[-1] < max(values) - FALL * errors[-1] and rewards[-1] >= max(rewards)
            if self._counted(f"exploited {name}", fallen, 1):
                text = (
                    f"held-out reward rises ({rewards[-1]:.2f}) while --eval_function {name} falls "
                    f"({max(values):.2f} -> {values[-1]:.2f}): the reward model is being exploited; raise --kl_coef or "
                    "end earlier (--num_iterations)"
                )
                found.append(Remark(step, WARNING, metric, values[-1], text))
        return found
