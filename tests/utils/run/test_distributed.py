"""What ranks leave behind."""

import datetime
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from training.utils.arguments import ReliabilityArguments
from training.utils.checkpoint import store
from training.utils.checkpoint.resume import Run, _problems
from training.utils.errors import UserError
from training.utils.run import distributed, watchdog
from training.utils.run.distributed import (
    all_reduce_sum,
    bound_waits,
    data_rank,
    data_size,
    gather_rows,
    init_distributed,
    rank,
    share_rows,
)
from training.utils.run.phases import beat


def buffers_and_sum() -> tuple[list[str], float]:
    """Names of this process's shared buffers that another process could still see, and a sum over the ranks."""
    import torch

    mine = f"_{os.environ['MASTER_PORT']}_"
    names = [path.name for path in Path("/dev/shm").glob("deepspeed_allreduce_buffer_*") if mine in path.name]
    return names, all_reduce_sum(torch.tensor([rank() + 1.0])).item()


def save_slowly(folder: str, seconds: float, limit: float) -> dict[str, object]:
    """A checkpoint whose first file takes rank 0 so many seconds, where collectives and signs of life may so many."""
    before, wrote, moves = distributed._limit, store.write_file, []
    distributed._limit = datetime.timedelta(seconds=limit)
    bound_waits()
    run = Run(Path(folder), ReliabilityArguments(), {"batches": {}}, None, {})

    def slow(*args):
        if rank() == 0 and not moves:
            moves.append(seconds)
            time.sleep(seconds)
        return wrote(*args)

    store.write_file, distributed.beat = slow, lambda *_: moves.append(0.0)
    error = ""
    try:
        run.save({"kept": True})
    except RuntimeError as caught:
        error = str(caught)
    finally:
        store.write_file, distributed.beat = wrote, beat
        distributed._limit = before
        bound_waits()
    return {"error": error, "moves": len(moves), "damage": _problems(Path(folder) / "checkpoints" / "step-00000000")}


def test_a_save_that_takes_longer_than_a_collective_may_wait(rank_pair, tmp_path):
    """The waiting rank counts as moving meanwhile, else --hang_timeout would end it."""
    first, second = rank_pair.run(save_slowly, str(tmp_path), 16.0, 6.0)
    assert (first["error"], second["error"]) == ("", "")
    assert second["moves"] >= 5 and first["damage"] == second["damage"] == []


def meet(seconds: float, limit: float, alive: bool) -> str:
    """Long work of rank 0 alone; returns what went wrong on this rank."""
    before = distributed._limit
    distributed._limit, distributed._SIGN_OF_LIFE = datetime.timedelta(seconds=limit), 0.3 if alive else 1e6
    try:
        with distributed.long_work():
            time.sleep(seconds if rank() == 0 else 0.0)
    except RuntimeError as error:
        return str(error)
    finally:
        distributed._limit, distributed._SIGN_OF_LIFE = before, 1.0
    return ""


def test_a_rank_without_a_sign_of_life_is_named_after_the_time_out(rank_pair):
    assert rank_pair.run(meet, 8.0, 4.0, alive=True) == ["", ""]
    first, second = rank_pair.run(meet, 8.0, 2.0, alive=False)
    assert first == "" and "Timed out waiting for rank 0" in second
    assert any(words in second for words in watchdog._LOST), "the rank that is gone is told of, not a traceback"


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="shared memory has no folder here")
def test_no_shared_buffer_keeps_its_name(rank_pair):
    for names, total in rank_pair.run(buffers_and_sum):
        assert names == []
        assert total == 3.0


def test_further_groups_wait_no_longer_than_the_first(monkeypatch):
    """torch gives each new group 30 minutes: a host that is cut off would hold the others in DeepSpeed's groups."""
    import torch
    import torch.distributed as dist
    import torch.distributed.distributed_c10d as c10d

    def limit(group):
        return group._get_backend(torch.device("cpu")).options._timeout

    init_distributed()
    first = c10d._get_default_group()
    before = limit(first)
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "_limit", datetime.timedelta(seconds=77))
        further = dist.new_group([0])
        assert limit(further) > datetime.timedelta(minutes=20)
        bound_waits()
        assert limit(further) == datetime.timedelta(seconds=77)
    dist.destroy_process_group(further)
    bound_waits()
    assert limit(first) == before


def test_the_wait_holds_for_groups_of_nccl_too(monkeypatch):
    """There is no NCCL on a CPU: which groups are given the time-out is what can be seen here."""
    import torch.distributed.distributed_c10d as c10d

    kinds, given = {"default": "nccl", "zero": "nccl", "data": "gloo", "other": "mpi"}, {}
    monkeypatch.setattr(distributed, "_limit", datetime.timedelta(seconds=300))
    monkeypatch.setattr(distributed.dist, "get_backend", kinds.get)
    monkeypatch.setattr(c10d, "_set_pg_timeout", lambda limit, group: given.update({group: limit.total_seconds()}))
    with monkeypatch.context() as patch:
        patch.setattr(distributed.c10d, "_world", SimpleNamespace(pg_map=kinds))
        bound_waits()
    assert given == {"default": 300.0, "zero": 300.0, "data": 300.0}


@pytest.mark.parametrize(("cuda", "says"), [(None, "is a build for CPUs"), ("13.0", "is built for CUDA 13.0")])
def test_a_gpu_that_is_not_used_is_told(monkeypatch, cuda, says):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert distributed.unused_gpu() == ""
    monkeypatch.setattr(distributed, "has_nvidia", lambda: True)
    assert says in distributed.unused_gpu()
    for name, value in (("CUDA_VISIBLE_DEVICES", ""), ("DS_ACCELERATOR", "cpu")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert distributed.unused_gpu() == "", "the CPU is meant"


def count_rows(ranks: int) -> list[object]:
    """What is counted and collected of rows that so many ranks take together."""
    import torch

    share_rows(ranks)
    try:
        return [data_rank(), data_size(), all_reduce_sum(torch.tensor([3.0])).item(), gather_rows([data_rank()])]
    finally:
        share_rows(1)


def test_rows_that_ranks_take_together_count_once(rank_pair):
    assert rank_pair.run(count_rows, 1) == [[0, 2, 6.0, [0, 1]], [1, 2, 6.0, [0, 1]]]
    assert rank_pair.run(count_rows, 2) == [[0, 1, 3.0, [0]], [0, 1, 3.0, [0]]]


def test_ranks_that_can_not_be_divided_are_refused():
    with pytest.raises(UserError, match="1 ranks can not be divided into groups of 2"):
        share_rows(2)


@pytest.mark.parametrize("left", [{"MASTER_PORT": "29500"}, {"MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "1"}])
def test_one_rank_meets_nobody_at_an_address_that_is_left_over(left):
    """As accelerate and cluster profiles leave them: DeepSpeed would look for MPI, torch for the host (192.0.2.1)."""
    program = "from training.utils.run.distributed import *; print(init_distributed(20), world_size())"
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    }
    done = subprocess.run([sys.executable, "-c", program], env=environment | left, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["cpu 1"], done.stderr[-2000:]


def test_several_ranks_that_do_not_know_where_they_meet_are_refused(monkeypatch):
    for name in ("RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(UserError, match="WORLD_SIZE is 2 in the environment, but RANK, MASTER_ADDR is not"):
        init_distributed()
