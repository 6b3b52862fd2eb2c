"""What ranks leave behind."""

import os
from pathlib import Path

import pytest

from training.utils.distributed import all_reduce_sum, rank


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
