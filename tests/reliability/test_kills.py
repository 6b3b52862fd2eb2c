"""Killed at any moment and taken up again, a run ends with the same weights and metrics, bit for bit.

As a program it prints the table of docs/reliability.md: ``python -m tests.reliability.test_kills 45``. With ``--calls``
it kills one run before every call that renames, links, removes, makes or flushes a file of it, in its whole life.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.marks import slow
from tests.reliability.tiny_runs import Launcher, Step, make_inputs, metrics, step_arguments, weights

MOMENTS = ("while saving", "at random")
STAND_IN = str(Path(__file__).parents[1] / "step3" / "stand_in_worker.py")  # in vLLM's place


# Dropout draws random numbers at every step, and adapters with their own learning rate are a third group of parameters
ADAPTERS = ("--lora_dim", "4", "--lora_dropout", "0.3", "--lora_learning_rate", "2e-2", "--lora_alpha", "4")

# A base that is rounded to 4 bits again at each start
ALONE = ("--only_optimize_lora", "--base_bits", "4")
FOUR_BIT = {1: ("--lora_dim", "4", *ALONE), 3: ("--actor_lora_dim", "4", "--critic_lora_dim", "4", *ALONE)}

# What `--calls` prints a row of: step, ranks, flags
PLAIN: list[tuple[Step, int, tuple[str, ...]]] = [(step, ranks, ()) for ranks in (1, 2) for step in (1, 2, "dpo", 3)]
PAST_ONE_CARD: list[tuple[Step, int, tuple[str, ...]]] = [
    *(
        (step, 2, ("--sequence_parallel", "2", "--zero_stage", stage))
        for step, stage in ((1, "2"), (2, "3"), ("dpo", "0"))
    ),
    (1, 2, ("--tensor_parallel", "2", "--zero_stage", "1")),
    (3, 2, ("--tensor_parallel", "2", "--critic_zero_stage", "3")),
    (1, 1, FOUR_BIT[1]),
    (3, 1, FOUR_BIT[3]),
    (3, 1, ("--rollout_engine", "vllm", "--eval_every", "1")),
]


def uninterrupted(
    launcher: Launcher, inputs: Path, step: Step, folder: Path, more: Sequence[str] = ()
) -> tuple[Path, float]:
    """A run without a kill; its folder and its seconds."""
    start = time.monotonic()
    run = launcher.start(step, step_arguments(step, inputs, folder / "whole", *more), folder / "whole.log")
    assert run.wait() == 0, run.text()[-3000:]
    return folder / "whole", time.monotonic() - start


def killed_and_resumed(
    launcher: Launcher,
    inputs: Path,
    step: Step,
    output: Path,
    moments: list[str],
    seconds: float,
    rng: random.Random,
    more: Sequence[str] = (),
) -> int:
    """Start a step, kill it at each of these moments, resume it after each; returns how many kills hit.

    Args:
        moments: of `MOMENTS`; "while saving" waits for a half-written checkpoint.
        seconds: that an uninterrupted run takes; a random kill comes within them.
        more: flags.
    """
    arguments, log = step_arguments(step, inputs, output, *more), output.with_suffix(".log")
    hits = 0
    for moment in moments:
        run = launcher.start(step, arguments, log)
        if moment == "while saving":
            wanted = rng.randint(2, 3)
            seen: set[str] = set()

            def saving(seen: set[str] = seen, wanted: int = wanted) -> bool:
                seen.update(p.name for p in (output / "checkpoints").glob(".saving-*"))
                return len(seen) >= wanted

            run.wait_for(saving)
        else:
            end = time.monotonic() + rng.uniform(0.1, seconds)
            run.wait_for(lambda end=end: time.monotonic() > end)
        if run.alive():
            run.kill()
            hits += 1
        if (output / "summary.json").exists():
            return hits
    run = launcher.start(step, arguments, log)
    assert run.wait() == 0, run.text()[-3000:]
    return hits


def assert_same(step: Step, whole: Path, resumed: Path) -> None:
    assert weights(step, resumed) == weights(step, whole)
    assert metrics(resumed) == metrics(whole)


KILLED = [(1, ADAPTERS), slow(2, ()), slow("dpo", ADAPTERS), (3, ()), slow(1, FOUR_BIT[1]), slow(3, FOUR_BIT[3])]


@pytest.mark.parametrize(("step", "more"), KILLED)
def test_a_kill_while_saving_changes_nothing(launcher, inputs, tmp_path, step, more):
    if "--base_bits" in more:
        pytest.importorskip("bitsandbytes", reason="requirements-optional.txt")
    whole, seconds = uninterrupted(launcher, inputs, step, tmp_path, more)
    resumed, rng = tmp_path / "killed", random.Random(step)
    assert killed_and_resumed(launcher, inputs, step, resumed, ["while saving"], seconds, rng, more) == 1
    assert "going on from" in resumed.with_suffix(".log").read_text()
    assert_same(step, whole, resumed)


SELDOM = ("--save_every", "3")  # checkpoints of a run that is killed once before each of its file calls


def file_calls(
    launcher: Launcher, inputs: Path, step: Step, folder: Path, ranks: int = 1, more: Sequence[str] = ()
) -> tuple[Path, list[str]]:
    """An uninterrupted run, and its calls that rename, link, remove, make or flush something in its folder.

    The last of all is left out: after it has finished, a process takes its empty note away, see watchdog.py.
    """
    output, calls = folder / "counted", folder / "calls"
    fault = {"kind": "kill", "step": 0, "folder": str(output), "calls_file": str(calls)}
    arguments = step_arguments(step, inputs, output, *more)
    runs = launcher.start_ranks(step, arguments, folder / "counted.log", ranks, fault)
    assert [run.wait() for run in runs] == [0] * ranks, runs[0].text()[-3000:]
    *found, last = calls.read_text().splitlines()
    assert last == "unlink /.aborted-rank0.txt"
    return output, found


def killed_at_file_call(
    launcher: Launcher,
    inputs: Path,
    step: Step,
    output: Path,
    number: int,
    ranks: int = 1,
    more: Sequence[str] = (),
) -> Path:
    """Kill rank 0 just before its file call of that number, and the others with it; resume the run."""
    arguments, log = step_arguments(step, inputs, output, *more), output.with_suffix(".log")
    fault = {"kind": "kill", "folder": str(output), "calls_file": str(output.with_suffix(".calls"))}
    runs = launcher.start_ranks(step, arguments, log, ranks, fault | {"step": number})
    assert runs[0].wait() == -9, runs[0].text()[-3000:]
    for run in runs[1:]:
        run.kill()
    runs = launcher.start_ranks(step, arguments, log, ranks)
    assert [run.wait() for run in runs] == [0] * ranks, runs[0].text()[-3000:]
    return output


@pytest.mark.parametrize("step", [slow(1), slow(2), slow("dpo"), 3])
def test_a_kill_while_finishing_changes_nothing(launcher, inputs, tmp_path, step):
    """From the last checkpoint on, where files are moved to where they stay; `file_calls_survived` takes all calls."""
    whole, calls = file_calls(launcher, inputs, step, tmp_path)
    last = max(i for i, call in enumerate(calls) if call.startswith("replace /checkpoints/.latest"))
    ending = list(range(last + 2, len(calls) + 1))  # numbers of calls, from 1
    assert len(ending) >= 5
    for number in [random.Random(step).choice(ending[:-1]), *(ending[-1:] if step == 3 else [])]:
        output = killed_at_file_call(launcher, inputs, step, tmp_path / f"call-{number}", number)
        assert_same(step, whole, output)


def test_a_stop_in_the_last_phase_does_not_log_it_twice(launcher, inputs, tmp_path):
    """The checkpoint is written after the final evaluation was logged, and the resumed run evaluates again."""
    whole, _ = uninterrupted(launcher, inputs, 3, tmp_path)
    stopped, log = tmp_path / "stopped", tmp_path / "stopped.log"
    arguments = step_arguments(3, inputs, stopped, "--save_every", "3")
    run = launcher.start(3, arguments, log)
    assert run.wait_for(lambda: "with the RLHF model" in run.text())
    os.kill(run.pid, signal.SIGTERM)
    assert run.wait() == 128 + signal.SIGTERM, run.text()[-3000:]
    assert not (stopped / "summary.json").exists()
    run = launcher.start(3, arguments, log)
    assert run.wait() == 0, run.text()[-3000:]
    assert_same(3, whole, stopped)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("step", [1, 2, "dpo", 3])
def test_a_kill_before_any_file_call_changes_nothing(launcher, inputs, tmp_path, step, ranks):
    assert file_calls_survived(launcher, inputs, step, tmp_path, ranks) > 20


@pytest.mark.slow
@pytest.mark.parametrize(("step", "ranks", "more"), PAST_ONE_CARD)
def test_a_kill_past_one_card_changes_nothing(inputs, tmp_path, monkeypatch, step, ranks, more):
    if "--base_bits" in more:
        pytest.importorskip("bitsandbytes", reason="requirements-optional.txt")
    monkeypatch.setenv("TRIPOD_ROLLOUT_WORKER", STAND_IN)
    with contextlib.closing(Launcher()) as launcher:  # of the environment that it starts in
        assert file_calls_survived(launcher, inputs, step, tmp_path, ranks, every=9, more=more) > 4


def file_calls_survived(
    launcher: Launcher,
    inputs: Path,
    step: Step,
    folder: Path,
    ranks: int = 1,
    every: int = 1,
    more: Sequence[str] = (),
) -> int:
    """Runs that are killed before each file call of a run's whole life, one each; returns how many.

    Args:
        launcher, inputs, step, folder, ranks: of the runs.
        every: take each second, third ... call only.
        more: flags.
    """
    more = (*SELDOM, *more)
    whole, calls = file_calls(launcher, inputs, step, folder, ranks, more)
    numbers = range(1, len(calls) + 1, every)
    for number in numbers:
        output = killed_at_file_call(launcher, inputs, step, folder / f"call-{number}", number, ranks, more)
        assert_same(step, whole, output)
        shutil.rmtree(output)
    return len(numbers)


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 2, 3])
def test_many_kills_change_nothing(launcher, inputs, tmp_path, step):
    table = kill_often(launcher, inputs, step, tmp_path, kills=15, seed=step)
    assert sum(table.values()) >= 15


def kill_often(launcher: Launcher, inputs: Path, step: Step, folder: Path, kills: int, seed: int) -> dict[str, int]:
    """Runs with up to three kills each until there were ``kills`` of them; each is compared; moment -> kills."""
    whole, seconds = uninterrupted(launcher, inputs, step, folder)
    rng, counts, number = random.Random(seed), dict.fromkeys(MOMENTS, 0), 0
    while sum(counts.values()) < kills:
        moment = MOMENTS[number % 2]
        moments = [moment] * min(3, kills - sum(counts.values()))
        output = folder / f"killed-{number}"
        counts[moment] += killed_and_resumed(launcher, inputs, step, output, moments, seconds, rng)
        assert_same(step, whole, output)
        number += 1
    return counts


def print_calls(launcher: Launcher, inputs: Path, folder: Path, every: int) -> None:
    """The table of kills before file calls, a row of it as soon as it is there."""
    print("| step | ranks | flags | kills before a file call | stuck or unequal |\n|---|---|---|---|---|")
    for number, (step, ranks, more) in enumerate([*PLAIN, *PAST_ONE_CARD]):
        (base := folder / f"kind-{number}").mkdir()
        seldom = every if not more else 5 * every
        count = file_calls_survived(launcher, inputs, step, base, ranks, seldom, more)
        flags = f"`{' '.join(more)}`" if more else ""
        print(f"| {step} | {ranks} | {flags} | {count} | none |", flush=True)


def main(argv: Sequence[str]) -> None:
    """Print a table: ``KILLS`` kills while saving and at random, or ``--calls [EVERY]`` for those before file calls."""
    os.environ["TRIPOD_ROLLOUT_WORKER"] = STAND_IN
    launcher = Launcher()
    with tempfile.TemporaryDirectory() as folder:
        inputs = make_inputs(Path(folder) / "inputs")
        if argv[0] == "--calls":
            print_calls(launcher, inputs, Path(folder), int(argv[1]) if len(argv) > 1 else 1)
        else:
            print(f"| step | kills {MOMENTS[0]} | kills {MOMENTS[1]} | same weights | same metrics |")
            print("|---|---|---|---|---|")
            for step in (1, 2, 3):
                (base := Path(folder) / f"step{step}").mkdir()
                counts = kill_often(launcher, inputs, step, base, -(-int(argv[0]) // 3), seed=step)
                print(f"| {step} | {counts[MOMENTS[0]]} | {counts[MOMENTS[1]]} | all | all |", flush=True)
    launcher.close()


if __name__ == "__main__":
    main(sys.argv[1:])
