"""The programs with models that two ranks hold together: as on one rank, and bit for bit after a kill."""

import pytest
import torch
from safetensors.torch import load_file

from tests.reliability.tiny_runs import WEIGHTS, metrics, step_arguments, weights

TOGETHER = ("--tensor_parallel", "2")


def tensors(step, output):
    files = [file for folder in WEIGHTS[step] for file in sorted((output / folder).glob("*.safetensors"))]
    return {(str(file.relative_to(output)), name): tensor for file in files for name, tensor in load_file(file).items()}


def finished(runs):
    assert [run.wait() for run in runs] == [0] * len(runs), runs[0].text()[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "more"),
    [
        (1, ("--zero_stage", "1")),
        (2, ("--zero_stage", "3")),
        ("dpo", ("--zero_stage", "2")),
        (3, ("--critic_zero_stage", "3")),
    ],
)
def test_programs_equal_one_rank_and_go_on_after_a_kill(launcher, inputs, tmp_path, step, more):
    finished([launcher.start(step, step_arguments(step, inputs, tmp_path / "alone"), tmp_path / "alone.log")])

    def start(name):
        arguments = step_arguments(step, inputs, tmp_path / name, *TOGETHER, *more)
        return launcher.start_ranks(step, arguments, tmp_path / f"{name}.log", 2)

    finished(start("together"))
    alone, together = tensors(step, tmp_path / "alone"), tensors(step, tmp_path / "together")
    assert alone.keys() == together.keys()
    for name, expected in alone.items():
        torch.testing.assert_close(together[name], expected, rtol=0, atol=5e-4)
    runs = start("killed")
    assert runs[0].wait_for(lambda: (tmp_path / "killed" / "checkpoints" / "step-00000002").exists())
    for run in runs:
        run.kill()
    finished(start("killed"))
    assert weights(step, tmp_path / "killed") == weights(step, tmp_path / "together")
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "together")
