"""Where the tests of this folder run: on the CPU, most in full runs of the suite only, and, marked gpu, on a CUDA GPU.

DeepSpeed has one accelerator per process. `tests/conftest.py` takes the GPU for it where TRIPOD_TEST_DEVICE is cuda, as
``make gpu-check`` says; else every test is a CPU's, on a machine with a GPU too.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from tests.reliability.tiny_runs import make_inputs
from training.utils.engine import precision
from training.utils.run.distributed import init_distributed

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "inference"))

NO_GPU = "runs on a CUDA GPU, with TRIPOD_TEST_DEVICE=cuda"


def only_here(kind: str) -> torch.device:
    """This process's device, if it is of the kind that the test is for; else the test is skipped."""
    if kind != get_accelerator().device_name():
        pytest.skip(NO_GPU if kind == "cuda" else "the same test runs on this process's GPU")
    return init_distributed()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    """Each kind of device in turn."""
    return only_here(request.param)


@pytest.fixture(params=[pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)])
def device_of_long_tests(request) -> torch.device:
    """The same for tests that take a CPU long, or whose CPU part others hold in every run."""
    return only_here(request.param)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Path:
    """A tiny SFT model, a reward model on it, and a few rows for each step."""
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def fp16_everywhere(monkeypatch, device) -> None:
    """On a CPU, too, fp16 is taken for a precision that trains: its kernels are there, DeepSpeed asks for fast ones."""
    if device.type == "cpu":
        monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
        monkeypatch.setattr(precision, "check_dtype", lambda *_: None)
