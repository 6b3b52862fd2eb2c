"""What ends a run, without a run: lost connections, a stderr that nobody reads, whose child a rank is."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.signals import as_in_the_background, hear_signals
from training.utils.checkpoint.same_run import refuse_other_ranks
from training.utils.errors import UserError
from training.utils.run import processes, watchdog
from training.utils.run.distributed import init_distributed


@pytest.mark.parametrize(
    ("error", "ranks", "lost"),
    [
        (RuntimeError("[pair.cc:534] Connection closed by peer [10.0.0.2]:4711"), "2", True),
        (RuntimeError("[pair.cc:534] Connection closed by peer [10.0.0.2]:4711"), "1", False),
        (TimeoutError("Read timed out."), "2", False),
        (BrokenPipeError("Broken pipe"), "2", False),
        (RuntimeError("CUDA out of memory"), "2", False),
    ],
)
def test_only_a_broken_collective_is_a_lost_rank(monkeypatch, error, ranks, lost):
    monkeypatch.setenv("WORLD_SIZE", ranks)
    assert watchdog._is_lost_connection(error) == lost


def test_a_signal_counts_when_nobody_reads_stderr():
    """A closed terminal must not cost the checkpoint."""
    code = (
        "import os, signal; from training.utils.run import phases, watchdog as s; s.loop_begins();"
        "read, write = os.pipe(); os.close(read); os.dup2(write, 2);"
        "signal.signal(signal.SIGPIPE, signal.SIG_IGN); s._on_signal(signal.SIGTERM, None);"
        "os._exit(phases.doing.asked)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == signal.SIGTERM


@pytest.mark.parametrize(("ignore", "code"), [(hear_signals, 130), (as_in_the_background, 143)])
def test_what_was_ignored_at_the_start_stays_ignored_and_sigterm_ends_the_run(ignore, code):
    """A shell makes background jobs deaf to Ctrl-C, which is meant for what runs in front."""
    run = (
        "import os, signal; from training.utils.run.watchdog import run_training;"
        "run_training(lambda _: [os.kill(os.getpid(), n) for n in (signal.SIGINT, signal.SIGTERM)] and 0)"
    )
    assert subprocess.run([sys.executable, "-c", run], check=False, preexec_fn=ignore).returncode == code


@pytest.mark.parametrize(("begins", "left"), [("", []), ("watchdog.loop_begins()", ["latest", "run"])])
def test_a_step_that_is_refused_before_it_begins_leaves_nothing(tmp_path, begins, left):
    run = f"""
from training.utils.errors import UserError
from training.utils.run import folders, watchdog

def main(argv):
    watchdog.watch(folders.prepare_output_dir("", "step1"), 0)
    {begins or "pass"}
    raise UserError("no row is held out")

raise SystemExit(watchdog.run_training(main))
"""
    environment = os.environ | {"TRIPOD_OUTPUT": str(tmp_path)}
    assert subprocess.run([sys.executable, "-c", run], check=False, env=environment).returncode == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == left


@pytest.mark.parametrize(
    ("body", "code"), [("signal.raise_signal(signal.SIGTERM)", 143), ("time.sleep(60)", 1)], ids=["signal", "stands"]
)
def test_a_run_can_be_ended_while_a_users_function_runs(tmp_path, body, code):
    """Inside, os._exit is not the system's: the watchdog's thread and the handler have kept that one."""
    run = f"""
import signal, time
from pathlib import Path
from training.step3_rlhf_finetuning.reward_functions import call_text_function
from training.utils.run import watchdog
def main(argv):
    watchdog.watch(Path({str(tmp_path)!r}), 1)
    call_text_function(lambda *_: {body}, [[]], ["a"], [{{}}], "--reward_function")
watchdog.run_training(main)
"""
    assert subprocess.run([sys.executable, "-c", run], check=False, preexec_fn=hear_signals).returncode == code


def test_what_a_users_function_forks_ends_on_its_own(tmp_path):
    """As what runs a model's code: it is ended after a second, or it crashes, and the run goes on."""
    run = f"""
import multiprocessing, os, time
from pathlib import Path
from training.utils.run import phases, watchdog
def main(argv):
    watchdog.watch(Path({str(tmp_path)!r}), 0)
    watchdog.loop_begins()
    context, codes = multiprocessing.get_context("fork"), []
    for target, told in ((time.sleep, True), (os.abort, False)):
        worker = context.Process(target=target, args=(60,) * told, daemon=True)
        worker.start()
        if told:
            worker.terminate()
        worker.join(20)
        codes.append(worker.exitcode)
    note = Path(watchdog._state.abort.name).read_text()
    return 0 if (codes, phases.doing.asked, note) == ([-15, -6], 0, "") else 7
watchdog._end(watchdog.run_training(main))
"""
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, preexec_fn=hear_signals)
    assert (done.returncode, done.stderr) == (0, "")


def test_signals_are_passed_on_to_ranks_and_not_to_what_they_fork(monkeypatch):
    """Launcher 1 has made the ranks 2 and 3, of which one has forked a worker of the same environment."""
    parents, heard = {1: 0, 2: 1, 3: 1, 4: 3}, []
    monkeypatch.setattr(processes, "_members", lambda _: list(parents))
    monkeypatch.setattr(processes, "of_process", lambda pid, _: b"" if pid == 1 else b"LOCAL_RANK=0\0")
    monkeypatch.setattr(processes, "parent_of", parents.__getitem__)
    monkeypatch.setattr(processes.os, "kill", lambda pid, number: heard.append((pid, number)))
    processes._signal_ranks(1, signal.SIGTERM)
    assert heard == [(2, signal.SIGTERM), (3, signal.SIGTERM)]


def test_processes_that_mpi_or_slurm_started_do_not_each_train_alone(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(UserError, match="SLURM_STEP_NUM_TASKS.*several_machines"):
        init_distributed()
    assert "RANK" not in os.environ


def test_hosts_that_differ_do_not_train_together():
    one = {
        "flags": {"seed": 1, "data_path": ["/a"]},
        "models": {},
        "data": {"training": "x"},
        "versions": {"torch": "2"},
    }
    refuse_other_ranks([one, one | {"flags": {"seed": 1, "data_path": ["/b"]}}])  # the same rows in another folder
    for part, other in (("flags", {"seed": 2}), ("data", {"training": "y"}), ("versions", {"torch": "3"})):
        with pytest.raises(UserError, match=f"rank 1 differs from rank 0 in {part}"):
            refuse_other_ranks([one, one | {part: one[part] | other}])


def test_a_note_that_its_rank_takes_away_meanwhile_is_none(tmp_path, monkeypatch):
    """Ranks that go on after a failure begin side by side: each removes its own note of before."""
    monkeypatch.setattr(watchdog, "_state", watchdog._State())
    monkeypatch.setenv("WORLD_SIZE", "3")
    for number in (1, 2):
        (tmp_path / watchdog.NOTE.format(number)).write_text("{}")
    look = Path.glob

    def listed(folder, pattern):
        found = list(look(folder, pattern))
        (tmp_path / watchdog.NOTE.format(1)).unlink(missing_ok=True)
        return found

    monkeypatch.setattr(Path, "glob", listed)
    watchdog.watch(tmp_path, 0)
    assert set(watchdog._state.known) == {watchdog.NOTE.format(2)}


@pytest.mark.parametrize(("rank", "left"), [(0, {1}), (1, {0, 2, 3})])
def test_notes_of_ranks_that_are_no_more_go(tmp_path, monkeypatch, rank, left):
    """A run of four ranks failed, and goes on with two."""
    monkeypatch.setattr(watchdog, "_state", watchdog._State())
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    kinds = (watchdog.NOTE, watchdog.ABORT)
    for name in (kind.format(number) for kind in kinds for number in range(4)):
        (tmp_path / name).write_text("{}")
    watchdog.watch(tmp_path, 0)
    assert {path.name for path in tmp_path.iterdir()} == {kind.format(n) for kind in kinds for n in left}
    assert set(watchdog._state.known) == {path.name for path in tmp_path.iterdir()}
