"""What ranks leave behind."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from training.utils.run import distributed
from training.utils.run.distributed import all_reduce_sum, bound_waits, init_distributed, rank


def buffers_and_sum() -> tuple[list[str], float]:
    """Names of this process's shared buffers that another process could still see, and a sum over the ranks."""
    import torch

    mine = f"_{os.environ['MASTER_PORT']}_"
    names = [path.name for path in Path("/dev/shm").glob("deepspeed_allreduce_buffer_*") if mine in path.name]
    return names, all_reduce_sum(torch.tensor([rank() + 1.0])).item()


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="shared memory has no folder here")
def test_no_shared_buffer_keeps_its_name(rank_pair):
    for names, total in rank_pair.run(buffers_and_sum):
        assert names == []
        assert total == 3.0


def test_further_groups_wait_no_longer_than_the_first(monkeypatch):
    """torch gives each new group 30 minutes: a host that is cut off would hold the others in DeepSpeed's groups."""
    import datetime

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
    import datetime

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
