import mmap
import time

import pytest
import torch

from training.utils.run import phases
from training.utils.run.phases import Phases

pytestmark = pytest.mark.skipif(not phases._RESET.exists(), reason="needs Linux's /proc")


def test_peak_and_time_belong_to_the_phase_in_which_they_were(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tape = Phases()
    tape.end("quiet")
    with mmap.mmap(-1, 256 * 2**20) as block:  # not the allocator's, which may have as much at hand
        block[:: mmap.PAGESIZE] = bytes(len(block) // mmap.PAGESIZE)
        tape.end("large")
    time.sleep(0.05)
    tape.end("after")
    tape.end("quiet")
    found = tape.summary()
    assert list(found) == ["quiet", "large", "after"]
    assert found["after"]["seconds"] >= 0.05 > found["quiet"]["seconds"]
    assert found["large"]["peak_gib"] - found["quiet"]["peak_gib"] == pytest.approx(0.25, abs=0.05)


def test_without_the_kernels_mark_only_times_are_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(phases, "_STATUS", tmp_path / "status")
    monkeypatch.setattr(phases, "_RESET", tmp_path / "clear_refs")
    tape = Phases()
    tape.end("all")
    assert set(tape.summary()["all"]) == {"seconds"}
