"""Ranks: initialisation under any launcher, reductions, rank-0 printing."""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from deepspeed.accelerator import get_accelerator

from training.utils.errors import UserError, printable
from training.utils.run.phases import beat, doing
from training.utils.run.runtime import has_nvidia

DEFAULT_TIMEOUT = 1800.0
# Set by launchers that say ranks in their own words (a shell within a Slurm job has only SLURM_NTASKS)
OTHER_LAUNCHERS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")

T = TypeVar("T")
_limit: datetime.timedelta | None = None  # of every collective, as `init_distributed` was told
_SIGN_OF_LIFE = 1.0  # seconds between two of a rank that others wait for
_meetings = 0
_sharing = 1  # ranks that take the same rows


def init_distributed(timeout: float = DEFAULT_TIMEOUT) -> torch.device:
    """Join the process group and return this rank's device.

    Works under ``deepspeed``, ``torchrun`` and plain ``python``. One rank meets nobody: its group is in its own memory
    and needs no port, which another program could hold, whatever addresses the environment has left over. A second
    call in the same process keeps the group that is there.

    Args:
        timeout: how long a collective may wait for the other ranks, in seconds.

    Raises:
        UserError: a launcher that gives no ranks has started several processes, or one that does not say where they
            meet.
    """
    import deepspeed

    if "RANK" not in os.environ and (named := [name for name in OTHER_LAUNCHERS if name in os.environ]):
        raise UserError(
            f"started by MPI or Slurm ({named[0]}), which do not say RANK and WORLD_SIZE: each process would train "
            f"alone; see docs/several_machines.md for the ways to start on several hosts"
        )
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1 and (missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]):
        raise UserError(
            f"WORLD_SIZE is {ranks} in the environment, but {', '.join(missing)} is not: start with deepspeed or "
            f"torchrun, which set them all, or unset WORLD_SIZE for one process"
        )
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("LOCAL_RANK", "0")
    global _limit
    limit = datetime.timedelta(seconds=timeout)
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))
        torch.set_float32_matmul_precision("highest")  # fp32 is fp32; some images of GPU machines switch TF32 on
    elif line := unused_gpu():
        say(line)
    if not dist.is_initialized():
        _limit = limit
        # gloo on CPU: DeepSpeed's own default there would look for Intel's oneCCL first
        backend = "gloo" if accelerator.device_name() == "cpu" else accelerator.communication_backend_name()
        if ranks == 1:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=limit)
        deepspeed.init_distributed(dist_backend=backend, timeout=limit, auto_mpi_discovery=False, verbose=False)
        release_shared_buffer()
    return torch.device(accelerator.current_device_name())


def unused_gpu() -> str:
    """A warning for a machine whose NVIDIA GPU PyTorch can not use, so that training is left to the CPU; else empty.

    It is meant where the user says so: ``CUDA_VISIBLE_DEVICES`` is empty, or ``DS_ACCELERATOR`` is ``cpu``.
    """
    meant = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or os.environ.get("DS_ACCELERATOR") == "cpu"
    if meant or not has_nvidia() or torch.cuda.is_available():
        return ""
    if torch.version.cuda is None:
        why = f"torch {torch.__version__} is a build for CPUs"
    else:
        why = f"torch {torch.__version__} is built for CUDA {torch.version.cuda}, which the driver may be too old for"
    return f"warning: there is an NVIDIA GPU that is not used, training runs on the CPU: {why}; see docs/faq.md"


def bound_waits() -> None:
    """Give every group the time-out of `init_distributed`: DeepSpeed makes its own, which would wait 30 minutes.

    Call it after each ``deepspeed.initialize``.
    """
    for group in list(c10d._world.pg_map):
        if _limit is not None and dist.get_backend(group) in ("gloo", "nccl"):  # torch can set it for these
            c10d._set_pg_timeout(_limit, group)


def release_shared_buffer() -> None:
    """Take the name from DeepSpeed's shared-memory buffer, so that it ends with the processes; a collective.

    DeepSpeed maps 64 MiB per CPU rank and never unlinks them: each run, killed or not, would keep that memory until
    the machine restarts. Mapped by all ranks, a buffer needs no name any more.
    """
    barrier()  # all ranks have mapped all buffers
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank()}"
    Path("/dev/shm", name).unlink(missing_ok=True)


def rank() -> int:
    """This process's rank, 0 before initialisation."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """The number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def share_rows(ranks: int) -> None:
    """From now on every ``ranks`` neighbours hold one model, or one row, together and take the same rows.

    Such ranks compute the same numbers about the rows, so the first of them speaks for all where rows are counted or
    collected: `all_reduce_sum`, `reduce_sums` and `gather_rows`. The other collectives are of all ranks.

    Raises:
        UserError: the number of ranks is no multiple of it.
    """
    global _sharing
    if world_size() % ranks:
        raise UserError(f"{world_size()} ranks can not be divided into groups of {ranks}")
    _sharing = ranks


def ranks_of_a_row() -> int:
    """How many ranks take the same rows, see `share_rows`."""
    return _sharing


def data_rank() -> int:
    """The number of the share of the rows that this rank takes, from 0; ranks of one group have the same."""
    return rank() // _sharing


def data_size() -> int:
    """Into how many shares rows are divided, and by how many gradients are averaged."""
    return world_size() // _sharing


def rank_in_row() -> int:
    """This rank's place among those that take the same rows, from 0."""
    return rank() % _sharing


@functools.cache
def row_group(ranks: int) -> Any:
    """The process group of the ``ranks`` neighbours that take the same rows; a collective of all when first called."""
    for start in range(0, world_size(), ranks):
        group = dist.new_group(list(range(start, start + ranks)), timeout=_limit)
        if start <= rank() < start + ranks:
            mine = group
    return mine


def broadcast_in_row(values: torch.Tensor, place: int) -> torch.Tensor:
    """The values of one of the ranks that take the same rows, in place; a collective of these.

    Args:
        values: contiguous, of the same shape on all of them.
        place: that rank, see `rank_in_row`.
    """
    dist.broadcast(values, group=row_group(_sharing), group_src=place)
    return values


def agree(values: torch.Tensor) -> torch.Tensor:
    """The values of the first of the ranks that take the same rows: the others' may differ by rounding; in place."""
    return broadcast_in_row(values, 0) if _sharing > 1 else values


def speaks_for_rows() -> bool:
    """Whether this rank's numbers count: it is the first of those that take the same rows."""
    return rank_in_row() == 0


def is_main() -> bool:
    """Whether this is rank 0."""
    return rank() == 0


def say(message: str) -> None:
    """Print one message, on rank 0 only, without tearing a progress bar."""
    if is_main():
        from tqdm import tqdm

        tqdm.write(printable(message))


@functools.cache
def say_once(message: str) -> None:
    """`say`, but of the same message only once: for all roles of a model, or where a tokenizer is set up again."""
    say(message)


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all shares of the rows; returns a new one of the same shape, in float64 on its device."""
    total = values.detach().to(torch.float64).clone()
    if not speaks_for_rows():
        total.zero_()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total, op=dist.ReduceOp.SUM)
    return total


def all_reduce_max(values: torch.Tensor) -> torch.Tensor:
    """Elementwise maximum over all ranks; returns a new tensor."""
    largest = values.detach().to(torch.float64).clone()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest


def asked_to_stop(device: torch.device) -> int:
    """The signal that asks any rank to stop after this step, SIGINT before SIGTERM, 0 for none; a collective."""
    signals = (0, signal.SIGTERM, signal.SIGINT)
    strength = torch.tensor(float(signals.index(doing.asked)), device=device)
    return signals[int(all_reduce_max(strength).item())]


def reduce_sums(sums: Mapping[str, float], device: torch.device) -> dict[str, float]:
    """Add up named sums over all shares of the rows in one collective; every rank must name the same keys."""
    names = sorted(sums)
    total = all_reduce_sum(torch.tensor([float(sums[n]) for n in names], dtype=torch.float64, device=device))
    return dict(zip(names, total.tolist(), strict=True))


def gather_objects(local: Sequence) -> list:
    """Concatenate every rank's list, in rank order, on all ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return list(local)
    parts: list = [None] * dist.get_world_size()
    dist.all_gather_object(parts, list(local))
    return [item for part in parts for item in part]


def gather_rows(local: Sequence) -> list:
    """Concatenate what was found for each share of the rows, in their order, on all ranks."""
    return gather_objects(local if speaks_for_rows() else [])


def on_all_ranks(work: Callable[[], T]) -> T:
    """Do something that may fail with a `UserError` on one rank only; then it fails on all; a collective.

    Raises:
        UserError: the first failing rank's.
    """
    result: list[T] = []
    problem = ""
    try:
        result.append(work())
    except UserError as error:
        problem = str(error)
    if problems := [text for text in gather_objects([problem]) if text]:
        raise UserError(problems[0])
    return result[0]


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


@contextlib.contextmanager
def long_work() -> Iterator[None]:
    """Inside, ranks may take longer than a collective may wait, each in its own time; they leave together.

    A rank that is done waits for the others outside of any collective, as long as each gives signs of life: the
    time-out is between two of them. For files that rank 0 writes; no collective may be inside. An exception leaves at
    once.

    Raises:
        RuntimeError: of a rank there was no sign of life for the time-out of `init_distributed`.
    """
    if world_size() == 1:
        yield
        return
    global _meetings
    _meetings += 1
    store, meeting, done = c10d._get_default_store(), f"long_work/{_meetings}", threading.Event()

    def live() -> None:
        """Count up this rank's sign of life until the work is done."""
        while not done.wait(_SIGN_OF_LIFE):
            store.add(f"{meeting}/alive/{rank()}", 1)

    thread = threading.Thread(target=live, name="sign of life", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    store.add(f"{meeting}/done/{rank()}", 1)
    for other in range(world_size()):
        _wait_for(store, meeting, other)


def _wait_for(store: Any, meeting: str, other: int) -> None:
    """Wait until a rank is done with `long_work`, however long that takes while it lives."""
    limit = (_limit or datetime.timedelta(seconds=DEFAULT_TIMEOUT)).total_seconds()
    seen, seen_at, pause = 0, time.monotonic(), 0.005
    while not store.add(f"{meeting}/done/{other}", 0):
        if (alive := store.add(f"{meeting}/alive/{other}", 0)) != seen:
            seen, seen_at = alive, time.monotonic()
            beat()  # this rank moves as long as that one does
        if time.monotonic() - seen_at > limit:
            raise RuntimeError(f"Timed out waiting for rank {other}: no sign of life for {limit:.0f} s")
        time.sleep(pause)
        pause = min(2 * pause, 0.5)
