"""Where a step's time and memory go: seconds and peak memory by phase, for summary.json and the report."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from training.utils.run.distributed import say

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_GIB = 2**30


class Phases:
    """Time and peak memory between two calls of `end`, added up by name.

    Memory is that of this process: tensors of the CUDA allocator on a GPU, resident memory elsewhere (Linux only;
    other systems get times alone). The marks of the peak are set back at the end of each phase.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._peaks: dict[str, float] = {}
        self._reserved: dict[str, float] = {}
        self._last = time.perf_counter()
        _reset_peak()

    def end(self, name: str, then: str = "") -> None:
        """What has happened since the last call belongs to the phase ``name``, which may come again.

        Args:
            name: of the phase that ends.
            then: what comes next, said on rank 0, so that no wait is silent.
        """
        now = time.perf_counter()
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._last
        self._last = now
        peak = _peak_bytes()
        if peak is not None:
            self._peaks[name] = max(self._peaks.get(name, 0.0), peak / _GIB)
        if torch.cuda.is_available():
            reserved = torch.cuda.max_memory_reserved() / _GIB
            self._reserved[name] = max(self._reserved.get(name, 0.0), reserved)
        if then:
            say(f"{then} ...")
        _reset_peak()

    def seconds(self, name: str) -> float:
        """Of a phase so far, 0 if it has not ended yet."""
        return self._seconds.get(name, 0.0)

    def summary(self) -> dict[str, dict[str, float]]:
        """Phase -> ``seconds``, and ``peak_gib`` where it is known, in the order of their first end.

        On a GPU also ``reserved_gib``, the most that the allocator held: what it is above the peak lies in fragments.
        """
        return {
            name: {"seconds": round(seconds, 3)}
            | ({"peak_gib": round(self._peaks[name], 3)} if name in self._peaks else {})
            | ({"reserved_gib": round(self._reserved[name], 3)} if name in self._reserved else {})
            for name, seconds in self._seconds.items()
        }


def _peak_bytes() -> int | None:
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    if not _STATUS.is_file():
        return None
    line = next((line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:")), "")
    return int(line.split()[1]) * 1024 if line else None


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif _RESET.exists():
        try:
            _RESET.write_text("5")  # sets VmHWM to what is resident now, see proc(5)
        except OSError:
            return  # a container may forbid it: then a phase shows the peak of all phases up to it
