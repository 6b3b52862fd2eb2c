"""A pair of gloo ranks for in-process multi-rank checks: cheap, as imports and the group are paid once.

Both are forked from a process that has imported what they need; `_imported` lists it.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing as mp
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

TIMEOUT = 400.0  # DeepSpeed compiles its Adam for the CPU in a minute, where both workers of `make test` compute
_imported = ("deepspeed", "peft", "torch._dynamo", "tests.equality", "training.step3_rlhf_finetuning.main")


def _serve(rank: int, ranks: int, port: int, pipe: Any) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "LOCAL_SIZE": str(ranks),  # as under deepspeed's launcher: its shared-memory all-reduce is in use
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    from training.utils.run.runtime import prepare_runtime

    prepare_runtime()
    from training.utils.run.distributed import init_distributed

    init_distributed()
    while (task := pipe.recv()) is not None:
        module, name, environment, args, kwargs = task
        os.environ.update(environment)
        try:
            pipe.send((True, getattr(importlib.import_module(module), name)(*args, **kwargs)))
        except BaseException:  # reported to the test, which fails with it
            pipe.send((False, traceback.format_exc()))


class RankPair:
    """Worker processes, two by default, started at the first `run`."""

    def __init__(self, ranks: int = 2) -> None:
        self._ranks = ranks
        self._workers: list[tuple[Any, Any]] = []

    def _start(self) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads that the server had would be missing in what it forks
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(list(_imported))
        for rank in range(self._ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self._ranks, port, theirs), daemon=True)
            process.start()
            self._workers.append((process, ours))

    def run(self, function: Callable, *args: Any, **kwargs: Any) -> list[Any]:
        """Call a module-level function on all ranks; returns [rank 0's result, rank 1's, ...].

        Raises:
            AssertionError: with the rank's traceback, if either fails or neither answers in time.
        """
        if not self._workers:
            self._start()
        environment = {k: v for k, v in os.environ.items() if k.startswith("TRIPOD_")}
        for _, pipe in self._workers:
            pipe.send((function.__module__, function.__name__, environment, args, kwargs))
        results, failures = [], []
        for rank, (process, pipe) in enumerate(self._workers):
            if not pipe.poll(TIMEOUT if not failures else 10.0):
                failures.append(f"rank {rank} did not answer (alive: {process.is_alive()})")
                continue
            fine, result = pipe.recv()
            results.append(result)
            if not fine:
                failures.append(f"rank {rank}:\n{result}")
        if failures:
            self.close()
            raise AssertionError("\n".join(failures))
        return results

    def close(self) -> None:
        """End all workers."""
        for process, pipe in self._workers:
            if process.is_alive():
                with contextlib.suppress(BrokenPipeError):
                    pipe.send(None)
                process.join(2)
                process.kill()
        self._workers = []
