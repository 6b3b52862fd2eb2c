"""The fault table of docs/reliability.md, a test for each row, on tiny models and real processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.marks import slow
from tests.reliability.tiny_runs import SCRIPTS, metrics, step_arguments, weights
from tests.step3.hybrid_checks import save_tiny_reward_model
from tests.tiny import save_tiny_model
from training.utils.checkpoint import store
from training.utils.run import runtime
from training.utils.run.folders import python_path

SOON = 60.0  # seconds in which every rank has ended after one has failed


@pytest.fixture(scope="module")
def whole(launcher, inputs, tmp_path_factory):
    """Uninterrupted runs, by step; made when first asked for."""
    made = {}

    def of(step):
        if step not in made:
            folder = tmp_path_factory.mktemp(f"whole{step}") / "out"
            run = launcher.start(step, step_arguments(step, inputs, folder), folder.with_suffix(".log"))
            assert run.wait() == 0, run.text()[-3000:]
            made[step] = folder
        return made[step]

    return of


@pytest.fixture(scope="module")
def stopped(launcher, inputs, tmp_path_factory):
    """A copy of a run of step 1 that was killed with two checkpoints behind it."""
    base = tmp_path_factory.mktemp("stopped") / "out"
    run = launcher.start(1, step_arguments(1, inputs, base), base.with_suffix(".log"))
    run.wait_for(lambda: len(checkpoints(base)) >= 2 and checkpoints(base)[-1].name >= "step-00000003")
    run.kill()

    def copy(folder):
        return Path(shutil.copytree(base, folder))

    return copy


def checkpoints(output):
    """Those that a resumed run would try, the latest last: a folder that `latest` does not name yet is none of them."""
    folder = output / store.FOLDER
    return sorted(store.candidates(folder)) if folder.is_dir() else []


def resume(launcher, inputs, output, *more, step=1, ranks=0):
    log = output.parent / f"again-{time.monotonic_ns()}.log"
    arguments = step_arguments(step, inputs, output, *more)
    if not ranks:
        run = launcher.start(step, arguments, log)
        return run.wait(), run.text()
    runs = launcher.start_ranks(step, arguments, log, ranks)
    return max(run.wait() for run in runs), runs[0].text()


def assert_same(step, one, other):
    assert weights(step, one) == weights(step, other)
    assert metrics(one) == metrics(other)


# --- checkpoints --------------------------------------------------------------------------------------------------


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    "what", ["damaged shard", slow("missing shard"), slow("half a shard"), "index edited by hand", slow("no index")]
)
def test_the_checkpoint_before_a_damaged_one_is_taken(launcher, inputs, whole, stopped, tmp_path, what):
    output = stopped(tmp_path / "out")
    newest = checkpoints(output)[-1]
    shard = next(newest.glob("model-rank0000*.safetensors"))
    if what == "damaged shard":
        flip(shard)
    elif what == "missing shard":
        shard.unlink()
    elif what == "half a shard":
        shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    elif what == "index edited by hand":
        index = json.loads((newest / store.INDEX).read_text())
        index["files"][shard.name]["size"] += 1
        (newest / store.INDEX).write_text(json.dumps(index))
    else:
        (newest / store.INDEX).unlink()
    code, text = resume(launcher, inputs, output)
    assert code == 0, text[-2000:]
    assert f"{newest.name} is damaged" in text
    before = store.checkpoint_name(store.step_of(newest) - 1)
    assert re.search(f"going on from .*{before}", text)
    assert_same(1, output, whole(1))


def test_no_whole_checkpoint_is_one_line(launcher, inputs, stopped, tmp_path):
    output = stopped(tmp_path / "out")
    for checkpoint in checkpoints(output):
        flip(next(checkpoint.glob("model-rank*.safetensors")))
    code, text = resume(launcher, inputs, output)
    assert code == 2 and "no checkpoint" in text and "--resume never" in text and "Traceback" not in text


def test_a_full_disk_leaves_the_earlier_checkpoint(launcher, inputs, whole, tmp_path):
    """The write fails as it does on a full disk, in the middle of the third checkpoint."""
    output, log = tmp_path / "out", tmp_path / "log"
    run = launcher.start(1, step_arguments(1, inputs, output), log, {"kind": "full", "step": 8})
    assert run.wait() == 2
    line = next(line for line in run.text().splitlines() if line.startswith("error: "))
    assert "could not be written" in line and "No space left on device" in line and "is intact" in line
    assert checkpoints(output) and not list((output / store.FOLDER).glob(".saving-*"))
    code, text = resume(launcher, inputs, output)
    assert code == 0, text[-2000:]
    assert_same(1, output, whole(1))


def mounted(folder, *options):
    """A small file system of its own in ``folder``; skips where that is not permitted."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip() or 'mount failed'}")
    return folder


def test_a_file_system_that_is_really_full(launcher, inputs, tmp_path):
    small = mounted(tmp_path / "small", "-o", "size=1200k")
    try:
        run = launcher.start(1, step_arguments(1, inputs, small / "out"), tmp_path / "log")
        assert run.wait() == 2, run.text()[-2000:]
        line = next(line for line in run.text().splitlines() if line.startswith("error: "))
        assert "No space left on device" in line
        for checkpoint in checkpoints(small / "out"):
            assert not list(store.damage(checkpoint, store.read_index(checkpoint)))
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize(
    ("kilobytes", "step"),
    [
        (20, 1),
        slow(20, 2),
        slow(20, 3),
        slow(150, 1),
        slow(150, 2),
        (150, 3),
    ],
)
def test_a_disk_that_fills_while_models_and_metrics_are_written(launcher, inputs, tmp_path, step, kilobytes):
    """Without checkpoints: the model that is written at the end, or the first lines of the metrics, do not fit."""
    small = mounted(tmp_path / "small", "-o", f"size={kilobytes}k")
    try:
        more = ("--save_every", "0", "--resume", "never")
        run = launcher.start(step, step_arguments(step, inputs, small / "out", *more), tmp_path / "log")
        assert run.wait() == 2, run.text()[-2000:]
        assert "Traceback" not in run.text()
        line = next(line for line in run.text().splitlines() if line.startswith("error: "))
        assert "No space left on device; make room, and go on from the last checkpoint: " in line
        assert line.endswith(f"--output_dir {small / 'out'}") and "--resume" not in line
        assert not (small / "out" / "summary.json").exists()
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_read_only_directory(launcher, inputs, tmp_path):
    fixed = mounted(tmp_path / "fixed", "-o", "size=1m,ro")
    try:
        run = launcher.start(1, step_arguments(1, inputs, fixed / "out"), tmp_path / "log")
        assert run.wait() == 2
        assert "--output_dir" in run.text() and "Read-only" in run.text() and "Traceback" not in run.text()
    finally:
        subprocess.run(["umount", str(fixed)], check=True)


# --- ranks --------------------------------------------------------------------------------------------------------


def started(launcher, inputs, output, fault=None, step=1, ranks=2, **more):
    extra = [f"--{name}={value}" for name, value in more.items()]
    return launcher.start_ranks(
        step, step_arguments(step, inputs, output, *extra), output.with_suffix(".log"), ranks, fault
    )


def ended_soon(runs):
    start = time.monotonic()
    codes = [run.wait(SOON) for run in runs]
    return codes, time.monotonic() - start


@pytest.mark.parametrize(("step", "where"), [slow(1, "rank 1, step 2, training"), (3, "rank 1, step 0, training")])
def test_an_exception_on_one_rank_ends_all_with_its_traceback_last(launcher, inputs, tmp_path, step, where):
    runs = started(launcher, inputs, tmp_path / "out", {"kind": "raise", "rank": 1, "step": 3}, step=step)
    codes, seconds = ended_soon(runs)
    assert codes == [1, 1] and seconds < SOON
    text = runs[0].text().rstrip()
    assert text.endswith("RuntimeError: planted on rank 1")
    assert text.count("Traceback (most recent call last)") == 1
    assert where in text
    assert "planted on rank 1" in (tmp_path / "out" / "failure.txt").read_text()


def test_a_killed_rank_ends_the_others(launcher, inputs, tmp_path):
    output = tmp_path / "out"
    runs = started(launcher, inputs, output, {"kind": "sleep", "rank": 0, "step": 3, "seconds": 1.0})
    runs[0].wait_for(lambda: bool(checkpoints(output)))
    runs[1].kill()
    codes, seconds = ended_soon(runs)
    assert codes == [1, -signal.SIGKILL] and seconds < SOON
    assert "the connection to another rank is lost" in runs[0].text() and "Traceback" not in runs[0].text()


@pytest.mark.parametrize("rank", [0, slow(1)])
def test_a_rank_killed_while_groups_form_ends_the_others_and_leaves_nothing(launcher, inputs, tmp_path, rank):
    output = tmp_path / "out"
    runs = started(launcher, inputs, output, {"kind": "form", "rank": rank})
    codes, seconds = ended_soon(runs)
    assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == 1 and seconds < SOON
    port = re.findall(r"beside the buffers of port (\d+)", runs[0].text())[0]
    left = list(runtime.SHARED_MEMORY.glob(f"deepspeed_allreduce_buffer_*_{port}_*"))
    assert left, "nothing to remove"
    for buffer in left:
        os.utime(buffer, (0, 0))  # long ago
    again = started(launcher, inputs, output)
    assert ended_soon(again)[0] == [0, 0], again[0].text()[-2000:]
    assert not [buffer for buffer in left if buffer.exists()]


@pytest.mark.parametrize("rank", [slow(0), 1])
def test_an_aborted_rank_is_named_and_ends_the_others(launcher, inputs, tmp_path, rank):
    """NCCL's way to end a collective that timed out: SIGABRT, no exception here or on the ranks that wait."""
    output = tmp_path / "out"
    runs = started(launcher, inputs, output, {"kind": "abort", "rank": rank, "step": 3, "seconds": 120.0})
    codes, seconds = ended_soon(runs)
    assert codes[rank] == -signal.SIGABRT and codes[1 - rank] == 1 and seconds < SOON
    line = f"rank {rank} was ended from outside Python (aborted; a collective that timed out?)"
    assert line in runs[0].text() and "Traceback" not in runs[0].text()
    assert line in (output / "failure.txt").read_text()
    assert "in faulty" in (output / f".aborted-rank{rank}.txt").read_text(), "what the thread was doing"
    assert "step-00000002" in str(checkpoints(output)[-1])
    again = started(launcher, inputs, output)
    assert ended_soon(again)[0] == [0, 0], again[0].text()[-2000:]
    assert "step-00000002" in again[0].text()
    assert not list(output.glob(".aborted-*"))


@pytest.mark.slow
def test_a_slow_rank_changes_nothing(launcher, inputs, tmp_path):
    slow = started(launcher, inputs, tmp_path / "slow", {"kind": "sleep", "rank": 1, "step": 2, "seconds": 3.0})
    assert ended_soon(slow)[0] == [0, 0]
    assert ended_soon(started(launcher, inputs, tmp_path / "quick"))[0] == [0, 0]
    assert_same(1, tmp_path / "slow", tmp_path / "quick")


def test_a_standstill_is_named(launcher, inputs, tmp_path):
    fault = {"kind": "sleep", "rank": 1, "step": 2, "seconds": 120.0}
    runs = started(launcher, inputs, tmp_path / "out", fault, hang_timeout=12)  # starting takes 5 s on a slow machine
    codes, seconds = ended_soon(runs)
    assert codes == [1, 1] and seconds < SOON
    assert "rank 1, step 1, training: nothing has moved for" in runs[0].text()
    assert "in faulty" in runs[0].text(), "the stack says what the thread was doing"


# --- signals ------------------------------------------------------------------------------------------------------


def trains(output):
    """Whether a step has been recorded."""
    file = output / "metrics.jsonl"
    return file.exists() and any(f'"{name}/loss"' in file.read_text() for name in ("train", "policy"))


def after_a_checkpoint(run, output):
    assert run.wait_for(lambda: bool(checkpoints(output)))


@pytest.mark.parametrize(
    ("number", "step"),
    [
        slow(signal.SIGTERM, 1),
        slow(signal.SIGTERM, 2),
        (signal.SIGTERM, 3),
        slow(signal.SIGINT, 1),
        (signal.SIGINT, 2),
        slow(signal.SIGINT, 3),
    ],
)
def test_a_signal_stops_with_a_checkpoint_and_the_line_to_go_on(launcher, inputs, whole, tmp_path, step, number):
    output = tmp_path / "out"
    slow = {"kind": "sleep", "step": 2, "seconds": 0.7}
    run = launcher.start(step, step_arguments(step, inputs, output, "--save_every", "100"), tmp_path / "log", slow)
    assert run.wait_for(lambda: trains(output))
    os.kill(run.pid, number)
    assert run.wait() == 128 + number, run.text()[-2000:]
    assert f"{number.name}: stopping after this step, with a checkpoint" in run.text()
    again = run.text().rpartition("to go on: ")[2]
    assert "main.py" in again and f"--output_dir {output}" in again and "--local_rank" not in again
    assert len(checkpoints(output)) == 1
    code, text = resume(launcher, inputs, output, "--save_every", "100", step=step)
    assert code == 0 and "going on from" in text
    assert_same(step, output, whole(step))


NOISY = """
import os, random, signal
calls = 0

def noisy(prompts, responses, rows):
    global calls
    calls += 1
    if os.environ.get("STOP_AT") == str(calls):
        os.kill(os.getpid(), signal.SIGTERM)
    return [random.random() for _ in responses]
"""


@pytest.fixture
def noisy(launcher, inputs, tmp_path):
    """Runs step 3 with a reward that draws random numbers, and at one of its calls asks its run to stop."""
    (tmp_path / "noisy.py").write_text(NOISY)

    def run(output, stop_at="", *more):
        arguments = step_arguments(3, inputs, output, "--reward_function", f"{tmp_path / 'noisy.py'}:noisy", *more)
        started = launcher.start(3, arguments, output.with_suffix(".log"), STOP_AT=stop_at)
        assert started.wait() == (143 if stop_at else 0), started.text()[-2000:]
        return started.text()

    return run


def test_a_stop_while_scoring_takes_back_the_random_numbers_that_were_drawn(noisy, tmp_path):
    """The iteration is done again: with the same numbers, though some of them are not drawn from a counter."""
    short = ("--num_iterations", "2", "--save_every", "9")
    noisy(tmp_path / "whole", "", *short)
    for step in (0, 1):
        stopped = noisy(tmp_path / "out", "2", *short)
        assert store.step_of(checkpoints(tmp_path / "out")[-1]) == step
    assert stopped.count("with the SFT model") == 1, "what was answered before the first iteration is in the checkpoint"
    noisy(tmp_path / "out", "", *short)
    assert_same(3, tmp_path / "out", tmp_path / "whole")


def test_a_stop_after_going_back_goes_on_from_there(noisy, tmp_path):
    """Nothing has been learned yet, and the line to go on names no checkpoint."""
    output, other = tmp_path / "out", tmp_path / "other"
    noisy(output, "4", "--keep_last", "9")
    assert [folder.name for folder in checkpoints(output)] == ["step-00000001", "step-00000002"]
    for folder in (other, output):
        noisy(folder, "1", "--resume", str(output / store.FOLDER / "step-00000001"))
        assert [checkpoint.name for checkpoint in checkpoints(folder)] == ["step-00000001"]


def test_sigterm_right_after_ctrl_c_is_the_launchers_echo(launcher, inputs, tmp_path):
    output = tmp_path / "out"
    run = launcher.start(
        1, step_arguments(1, inputs, output), tmp_path / "log", {"kind": "sleep", "step": 3, "seconds": 1.0}
    )
    after_a_checkpoint(run, output)
    os.kill(run.pid, signal.SIGINT)
    os.kill(run.pid, signal.SIGTERM)
    assert run.wait() == 130
    assert run.text().count("stopping after this step") == 1


def test_a_second_ctrl_c_stops_at_once(launcher, inputs, tmp_path):
    output = tmp_path / "out"
    slow = {"kind": "sleep", "step": 3, "seconds": 30.0}
    run = launcher.start(1, step_arguments(1, inputs, output), tmp_path / "log", slow)
    run.wait_for(lambda: [p.name for p in checkpoints(output)][-1:] == ["step-00000002"])
    time.sleep(1.5)  # the third step has begun, and sleeps
    os.kill(run.pid, signal.SIGINT)
    time.sleep(0.5)
    start = time.monotonic()
    os.kill(run.pid, signal.SIGINT)
    assert run.wait() == 130 and time.monotonic() - start < 5
    assert "stopped at once" in run.text()
    assert [p.name for p in checkpoints(output)][-1] == "step-00000002"


def test_a_signal_to_one_rank_stops_both_after_the_same_step(launcher, inputs, tmp_path):
    output = tmp_path / "out"
    runs = started(launcher, inputs, output, {"kind": "sleep", "rank": 0, "step": 3, "seconds": 0.7})
    after_a_checkpoint(runs[0], output)
    os.kill(runs[1].pid, signal.SIGTERM)
    assert ended_soon(runs)[0] == [143, 143]
    assert "stopped by SIGTERM after step" in runs[0].text()


def test_a_signal_before_the_first_step_ends_at_once(launcher, inputs, tmp_path):
    run = launcher.start(3, step_arguments(3, inputs, tmp_path / "out"), tmp_path / "log")
    run.wait_for(lambda: "rows to train on" in run.text())
    os.kill(run.pid, signal.SIGTERM)
    assert run.wait() == 143
    assert not checkpoints(tmp_path / "out")


def test_a_rank_whose_launcher_is_gone_stops_itself(inputs, tmp_path):
    output = tmp_path / "out"
    arguments = step_arguments(1, inputs, output, "--num_train_epochs", "400", "--save_every", "5")
    code = f"import subprocess, sys; subprocess.run([sys.executable, {str(SCRIPTS[1])!r}, *sys.argv[1:]])"
    environment = os.environ | {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1", "LOCAL_RANK": "0", "RANK": "0"}
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen(
            [sys.executable, "-c", code, *arguments], stdout=log, stderr=log, env=environment | {"WORLD_SIZE": "1"}
        )
        deadline = time.monotonic() + 120
        while not checkpoints(output):
            assert time.monotonic() < deadline and launcher.poll() is None, (tmp_path / "log").read_text()[-2000:]
            time.sleep(0.05)
        launcher.kill()
        launcher.wait()
    while "to go on:" not in (tmp_path / "log").read_text():
        assert time.monotonic() < deadline + 30, (tmp_path / "log").read_text()[-2000:]
        time.sleep(0.1)
    assert "the launcher is gone" in (tmp_path / "log").read_text()


@pytest.mark.slow  # the watch is that of the test above
def test_a_rank_whose_launcher_went_while_it_was_starting_stops_itself(inputs, tmp_path):
    """Else it would train on unseen, and the same command given again would work in the same folder."""
    arguments = step_arguments(1, inputs, tmp_path / "out", "--num_train_epochs", "400")
    code = (
        "import subprocess, sys; "
        f"print(subprocess.Popen([sys.executable, {str(SCRIPTS[1])!r}, *sys.argv[1:]], start_new_session=True).pid)"
    )
    environment = os.environ | {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1", "LOCAL_RANK": "0", "RANK": "0"}
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment | {"WORLD_SIZE": "1", "LOCAL_SIZE": "1", "CROSS_SIZE": "1"},
            text=True,
            check=True,
        )
    deadline, orphan = time.monotonic() + 120, Path(f"/proc/{int(launcher.stdout.split()[0])}")
    while orphan.exists() and "State:\tZ" not in (orphan / "status").read_text():
        assert time.monotonic() < deadline, (tmp_path / "log").read_text()[-2000:]
        time.sleep(0.2)
    assert "the launcher is gone" in (tmp_path / "log").read_text()
    assert not (tmp_path / "out" / "summary.json").exists()


def test_a_run_outlives_the_reader_of_its_output(inputs, tmp_path):
    """A progress bar that nobody reads is no reason to end, least of all before the checkpoint."""
    output = tmp_path / "out"
    command = [sys.executable, str(SCRIPTS[1]), *step_arguments(1, inputs, output)]
    environment = os.environ | {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
    deadline = time.monotonic() + 120
    while not checkpoints(output):
        assert time.monotonic() < deadline and run.poll() is None
        time.sleep(0.02)
    run.stdout.close()
    assert run.wait(120) == 0
    assert (output / "summary.json").exists() and "step 1 saved" in (output / "orphan.log").read_text()


def test_a_suspended_run_does_not_stand_still(launcher, inputs, tmp_path):
    arguments = step_arguments(1, inputs, tmp_path / "out", "--hang_timeout", "15", "--num_train_epochs", "4")
    run = launcher.start(1, arguments, tmp_path / "log")
    run.wait_for(lambda: checkpoints(tmp_path / "out"))
    os.kill(run.pid, signal.SIGSTOP)
    time.sleep(18)
    os.kill(run.pid, signal.SIGCONT)
    assert run.wait() == 0, run.text()[-2000:]


# --- resuming with something changed ------------------------------------------------------------------------------


def tensors(step, output):
    from safetensors.torch import load_file

    folder = output if step < 3 else output / "actor"
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def assert_close(step, one, other):
    a, b = tensors(step, one), tensors(step, other)
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[name], b[name], rtol=0, atol=2e-4) for name in a)


@pytest.mark.parametrize(
    ("ranks", "more"),
    [slow(2, ()), slow(0, ("--zero_stage", "3")), slow(2, ("--zero_stage", "2")), (2, ("--tensor_parallel", "2"))],
)
def test_other_ranks_or_another_stage_go_on_and_say_so(launcher, inputs, whole, stopped, tmp_path, ranks, more):
    output = stopped(tmp_path / "out")
    code, text = resume(launcher, inputs, output, *more, ranks=ranks)
    assert code == 0, text[-2000:]
    assert "up to rounding, not bit for bit" in text
    assert ("world size" in text) == bool(ranks)
    assert_close(1, output, whole(1))


def test_another_library_version_goes_on_and_says_so(launcher, inputs, whole, stopped, tmp_path):
    output = stopped(tmp_path / "out")
    newest = checkpoints(output)[-1]
    state = json.loads((newest / store.STATE).read_text())
    state["run"]["versions"]["transformers"] = "5.0.0"
    index = {"format": store.FORMAT, "files": store.read_index(newest)}
    index["files"][store.STATE] = store.write_file(newest / store.STATE, json.dumps(state).encode())
    (newest / store.INDEX).write_bytes(store._signed(index))
    code, text = resume(launcher, inputs, output)
    assert code == 0 and "transformers 5.0.0 -> " in text
    assert_same(1, output, whole(1))


def test_accepted_changes(launcher, inputs, whole, stopped, tmp_path):
    output = stopped(tmp_path / "out")
    code, text = resume(launcher, inputs, output, "--save_every", "3", "--keep_last", "1", "--hang_timeout", "99")
    assert code == 0 and "not bit for bit" not in text
    assert_same(1, output, whole(1))


@pytest.mark.parametrize("flag", [("--learning_rate", "1e-3"), slow(("--seed", "5")), slow(("--train_on_prompts",))])
def test_changed_arguments_are_refused_by_name(launcher, inputs, stopped, tmp_path, flag):
    output = stopped(tmp_path / "out")
    notes = set(output.glob(".aborted-rank*"))  # of the killed rank, empty; the next start makes its own
    before = {p: p.stat().st_mtime_ns for p in output.rglob("*") if p.is_file() and p not in notes}
    code, text = resume(launcher, inputs, output, *flag)
    assert code == 2 and flag[0] in text and "which changes the result" in text and "Traceback" not in text
    assert before == {p: p.stat().st_mtime_ns for p in output.rglob("*") if p.is_file() and p in before}


def refused(launcher, inputs, output, *more, step=1):
    code, text = resume(launcher, inputs, output, *more, step=step)
    assert code == 2 and "Traceback" not in text, text[-2000:]
    return next(line for line in text.splitlines() if line.startswith("error: "))


def test_a_checkpoint_of_another_step_model_or_version(launcher, inputs, stopped, tmp_path):
    output = stopped(tmp_path / "out")
    line = refused(launcher, inputs, tmp_path / "two", "--resume", str(output), step=2)
    assert "checkpoint of step1, this is step2" in line
    other = save_tiny_model(tmp_path / "model", seed=9)
    line = refused(launcher, inputs, output, "--model_name_or_path", str(other))
    assert "another model" in line and "--model_name_or_path" in line
    index = json.loads((checkpoints(output)[-1] / store.INDEX).read_text())
    (checkpoints(output)[-1] / store.INDEX).write_text(json.dumps(index | {"format": 99}))
    assert "has format 99" in refused(launcher, inputs, output)


def test_a_reward_model_that_was_trained_again_is_refused(launcher, inputs, tmp_path):
    output, reward = tmp_path / "out", tmp_path / "reward"
    shutil.copytree(inputs / "reward", reward)
    arguments = step_arguments(3, inputs, output, "--critic_model_name_or_path", str(reward))
    run = launcher.start(3, arguments, tmp_path / "log")
    run.wait_for(lambda: bool(checkpoints(output)))
    run.kill()
    shutil.rmtree(reward)
    save_tiny_reward_model(str(save_tiny_model(tmp_path / "m", seed=4)), reward)
    line = refused(launcher, inputs, output, "--critic_model_name_or_path", str(reward), step=3)
    assert "--critic_model_name_or_path" in line


def test_nothing_to_resume(launcher, inputs, tmp_path):
    assert "no such folder" in refused(launcher, inputs, tmp_path / "out", "--resume", str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    assert "there is no checkpoint" in refused(launcher, inputs, tmp_path / "out", "--resume", str(tmp_path / "empty"))
