"""What this rank is doing, and where its time and memory go: signs of life, and figures by phase.

The watchdog (`training.utils.run.watchdog`) ends a rank whose last `beat` is too long ago; `Phases` adds up seconds and
peak memory for summary.json and the report. Torch is imported where memory is looked at, as programs answer mistakes
before they import it.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_GIB = 2**30


@dataclass
class Doing:
    """What a rank is doing, and what it is asked.

    Attributes:
        phase: in a word or two, such as "generating".
        step: the number of the last step (iteration) that is done.
        moved_at: of the last sign of life, in seconds of `time.monotonic`.
        asked: the signal that asks it to stop after this step, 0 for none.
    """

    phase: str = "starting"
    step: int = 0
    moved_at: float = field(default_factory=time.monotonic)
    asked: int = 0

    def __str__(self) -> str:
        return f"rank {os.environ.get('RANK', '0')}, step {self.step}, {self.phase}"


doing = Doing()  # this process'


def beat(phase: str | None = None, step: int | None = None) -> None:
    """Say that something has moved, and what is done now, for the watchdog.

    Args:
        phase: what begins, such as "generating"; None goes on with the last.
        step: the number of the step (iteration) that is done.
    """
    doing.moved_at = time.monotonic()
    if phase is not None:
        doing.phase = phase
    if step is not None:
        doing.step = step


class Phases:
    """Time and peak memory between two calls of `end`, added up by name.

    Memory is that of this process: tensors of the CUDA allocator on a GPU, resident memory elsewhere (Linux only;
    other systems get times alone). The marks of the peak are set back at the end of each phase.
    """

    def __init__(self) -> None:
        self._figures: dict[str, dict[str, float]] = {}
        self._last = time.perf_counter()
        _reset_peaks()

    def end(self, name: str) -> None:
        """What has happened since the last call belongs to the phase ``name``, which may come again."""
        figures, ended = self._figures.setdefault(name, {"seconds": 0.0}), time.perf_counter()
        figures["seconds"] += ended - self._last
        self._last = ended
        figures |= {kind: max(figures.get(kind, 0.0), gib) for kind, gib in _peaks().items()}
        _reset_peaks()

    def seconds(self, name: str) -> float:
        """Of a phase so far, 0 if it has not ended yet."""
        return self._figures.get(name, {"seconds": 0.0})["seconds"]

    def summary(self) -> dict[str, dict[str, float]]:
        """Phase -> ``seconds``, and ``peak_gib`` where it is known, in the order of their first end.

        On a GPU also ``reserved_gib``, the most that the allocator held: what it is above the peak lies in fragments.
        """
        return {
            name: {kind: round(value, 3) for kind, value in figures.items()} for name, figures in self._figures.items()
        }


def _peaks() -> dict[str, float]:
    """``peak_gib`` and ``reserved_gib`` since `_reset_peaks`, as far as this machine tells."""
    import torch

    if torch.cuda.is_available():
        peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return {"peak_gib": peak / _GIB, "reserved_gib": reserved / _GIB}
    if not _STATUS.is_file():
        return {}
    line = next((line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:")), "")
    return {"peak_gib": int(line.split()[1]) * 1024 / _GIB} if line else {}


def _reset_peaks() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif _RESET.exists():
        try:
            _RESET.write_text("5")  # sets VmHWM to what is resident now, see proc(5)
        except OSError:
            return  # a container may forbid it: then a phase shows the peak of all phases up to it
