"""Faults to plant in a run: they happen on one rank, at one optimizer step."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from typing import Any

from tests.reliability.file_kills import kill_at_file_call
from training.utils.checkpoint import store
from training.utils.engine import engine
from training.utils.run import distributed


def plant(
    kind: str, rank: int = 0, step: int = 2, seconds: float = 0.0, folder: str = "", calls_file: str = ""
) -> None:
    """Let a fault happen in this process if it is that rank.

    Args:
        kind: ``form``, killed when groups have formed, and the memory they share still has its name; ``raise``, an
            exception; ``sleep``, for ``seconds``; ``full``, no room on the disk while saving; ``kill``, see
            `kill_at_file_call`; ``abort``, as NCCL does it: a thread that is not Python's aborts the process while it
            waits in a collective, and the other ranks wait on, without an exception.
        rank: where.
        step: the optimizer step, from 1; for ``full`` the file of all checkpoints, for ``kill`` the file call.
        seconds: for ``sleep``.
        folder, calls_file: for ``kill``.
    """
    aborts = int(os.environ.get("RANK", "0")) == rank
    if not aborts and kind != "abort":
        return
    if kind == "kill":
        kill_at_file_call(folder, step, calls_file)
        return
    if kind == "form":
        distributed.release_shared_buffer = _killed  # type: ignore[assignment]
        return
    calls = 0
    where: Any = store if kind == "full" else engine
    name = "write_file" if kind == "full" else "optimizer_step"
    original = getattr(where, name)

    def faulty(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if kind == "full" and calls >= step:
            raise OSError(errno.ENOSPC, "No space left on device")
        if kind == "raise" and calls == step:
            raise RuntimeError(f"planted on rank {rank}")
        if kind == "sleep" and calls == step:
            time.sleep(seconds)
        if kind == "abort" and calls == step:
            if aborts:
                threading.Timer(0.3, os.abort).start()
            time.sleep(seconds)
        return original(*args, **kwargs)

    setattr(where, name, faulty)


def _killed() -> None:
    print(f"killed beside the buffers of port {os.environ['MASTER_PORT']}", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
