"""What this machine computes in: what it can not do is skipped with the reason, what it emulates is done less of."""

import pytest
import torch

from training.utils.engine.precision import capability


def computes_bf16() -> bool:
    """Whether bf16 is computed, not emulated, on the device of the tests."""
    from deepspeed.accelerator import get_accelerator

    return capability(torch.device(get_accelerator().current_device_name())).bf16


def need_fp16() -> None:
    """Skip a test that trains in fp16 where DeepSpeed refuses it, as on most CPUs."""
    from deepspeed.accelerator import get_accelerator

    if not get_accelerator().is_fp16_supported():
        pytest.skip("DeepSpeed does not train in fp16 on this device: it has no instructions for it")
