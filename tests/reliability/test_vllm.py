"""A run whose rollouts come from another process: killed with it or left alone by it, it ends the same, bit for bit."""

import random
import re
import time
from pathlib import Path

import pytest

from tests.marks import slow
from tests.reliability.test_kills import STAND_IN, assert_same, killed_and_resumed, uninterrupted
from tests.reliability.tiny_runs import step_arguments

SERVED = ("--rollout_engine", "vllm", "--eval_every", "1", "--num_iterations", "3")


@pytest.fixture(scope="module")
def served(launcher, inputs, tmp_path_factory):
    """Starts step 3 with a stand-in for vLLM, which may die; and an uninterrupted run."""
    environment = {"TRIPOD_ROLLOUT_WORKER": STAND_IN}

    class Served:
        """A `Launcher` that says where the worker is."""

        def start(self, step, arguments, log, dies_at=0):
            """As `Launcher.start`."""
            return launcher.start(step, arguments, log, None, TRIPOD_STAND_IN_DIES_AT=str(dies_at), **environment)

    made = Served()
    whole, seconds = uninterrupted(made, inputs, 3, tmp_path_factory.mktemp("served"), SERVED)
    return made, whole, seconds


def requests_before(iteration: int) -> int:
    """Requests of a run of `SERVED` before an iteration, from 0: one batch of held-out prompts, and of rollouts."""
    at_first = 1 + iteration  # the SFT model's answers, and evaluations
    looks = 1 if iteration else 0  # at a sample, after the first iteration
    return at_first + iteration + looks


@pytest.mark.parametrize(
    ("dies_at", "stopped"),
    [
        slow(requests_before(1) + 1, "stopped after step 1"),  # rollouts
        (requests_before(1) + 2, "stopped after step 2"),  # the evaluation after them
        slow(1, "stopped after step 0"),  # the first evaluation
    ],
)
def test_its_death_ends_the_run_with_a_checkpoint_and_its_last_lines(inputs, served, tmp_path, dies_at, stopped):
    start, whole, _ = served
    output = tmp_path / "out"
    arguments, log = step_arguments(3, inputs, output, *SERVED), tmp_path / "log"
    run = start.start(3, arguments, log, dies_at)
    assert run.wait() == 1
    text = log.read_text()
    assert "| the stand-in dies here" in text
    last = text[text.rindex("stopped after step") :]
    assert re.match(
        rf"{stopped}: vLLM \(process \d+\) was ended by signal 9; its log is .*vllm-rank0.log; .*checkpoint: ", last
    )
    assert "Traceback" not in text
    assert start.start(3, arguments, log).wait() == 0
    assert_same(3, whole, output)


@pytest.mark.slow  # what its death leaves is in every run: the test above
def test_a_killed_run_resumes_and_leaves_no_process(inputs, served, tmp_path):
    start, whole, seconds = served
    output = tmp_path / "killed"
    hits = killed_and_resumed(start, inputs, 3, output, ["while saving"], seconds, random.Random(3), SERVED)
    assert hits == 1
    assert_same(3, whole, output)
    deadline = time.monotonic() + 60
    while found := workers_of(output):
        assert time.monotonic() < deadline, found
        time.sleep(0.2)


def workers_of(output: Path) -> list[str]:
    """Processes whose output goes to a log of this folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            found += [process.name] * str((process / "fd" / "1").resolve()).startswith(str(output))
        except OSError:  # it has ended, or is another user's
            continue
    return found
