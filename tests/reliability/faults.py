"""Faults to plant in a run: they happen on one rank, at one optimizer step."""

from __future__ import annotations

import errno
import os
import time
from typing import Any

from training.utils import checkpoint_store, engine


def plant(kind: str, rank: int = 0, step: int = 2, seconds: float = 0.0) -> None:
    """Let a fault happen in this process if it is that rank.

    Args:
        kind: ``raise``, an exception; ``sleep``, for ``seconds``; ``full``, no room on the disk while saving.
        rank: where.
        step: the optimizer step, from 1; for ``full`` the file of all checkpoints.
        seconds: for ``sleep``.
    """
    if int(os.environ.get("RANK", "0")) != rank:
        return
    calls = 0
    where: Any = checkpoint_store if kind == "full" else engine
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
        return original(*args, **kwargs)

    setattr(where, name, faulty)
