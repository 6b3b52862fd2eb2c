"""What ends a run before its end, and how: signals, an error on one rank, a launcher that is gone, a standstill.

`run_training` is the whole life of a rank. A signal asks the run to stop at its next step, together with all other
ranks and with a checkpoint. An error is written to a note in the output folder, which a thread of every rank looks
for: so no rank waits in a collective for one that has ended, and the log ends with the one traceback that matters.

NCCL does not raise. A collective that timed out, or whose other end is lost, is ended by a thread of PyTorch that
aborts the process (TORCH_NCCL_ASYNC_ERROR_HANDLING=3, the default), and no line of Python runs any more. Python's fault
handler still does: it writes what each thread was doing into a file of the output folder, and that file is the note.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO

from training.utils.errors import RunStopped, UserError, disk_failure, leave_process_group, print_last, run_program
from training.utils.run import phases
from training.utils.run.folders import same_command, take_back
from training.utils.run.processes import STARTED_BY, of_process, parent_of

_end = os._exit  # the system's own: inside reward_functions.no_exit another stands in its place
ECHO = 2.0  # seconds: one Ctrl-C reaches a rank as SIGINT from the terminal and as SIGTERM from DeepSpeed's launcher
LOOK_EVERY = 1.0  # seconds between two looks of the watching thread
COURTESY = 5.0  # seconds from another rank's note to the end of this one: enough to say the same error itself
LOST_WAIT = 10.0  # seconds that a rank whose connection broke waits for the note of the one that broke it
NOTE = ".failed-rank{}.json"
ABORT = ".aborted-rank{}.txt"  # empty while all is well
FAILURE_FILE = "failure.txt"
ORPHAN_LOG = "orphan.log"  # what a run says after the reader of its output has gone

# What gloo and NCCL say when another rank has ended or does not answer
_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Connection refused",
    "recvValue failed",
    "Timed out waiting",
    "timed out",
    "Socket Timeout",
    "NCCL",
    "ProcessGroup",
    "Gloo connect",
)


class _State:
    """Of this process: how far it has come, and where notes go."""

    def __init__(self) -> None:
        self.signalled_at = 0.0
        self.training = False
        self.folder: Path | None = None
        self.hang_timeout = 0.0
        self.known: dict[str, int] = {}
        self.ending = False
        self.supervised = False
        self.abort: TextIO | None = None


_state = _State()


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def loop_begins() -> None:
    """From now on a signal waits for the next step; before, there was nothing to save, and it ended the process."""
    _state.training = True


def watch(folder: Path, hang_timeout: float) -> None:
    """Write and look for notes in ``folder``, and let the watchdog end a rank at which nothing moves.

    Args:
        folder: the output folder, the same on all ranks.
        hang_timeout: in seconds; 0 for no watchdog.
    """
    if _rank() == 0:
        (folder / FAILURE_FILE).unlink(missing_ok=True)
    _state.known = {}
    for path in _notes(folder):
        number = _number(path)
        if number == _rank() or (_rank() == 0 and number >= int(os.environ.get("WORLD_SIZE", "1"))):
            path.unlink(missing_ok=True)  # its own, or of a rank that there is no more
            continue
        with contextlib.suppress(FileNotFoundError):  # its rank begins, too, and takes it away
            _state.known[path.name] = path.stat().st_mtime_ns
    _state.hang_timeout = hang_timeout
    _state.folder = folder
    if _state.supervised:
        _state.abort = (folder / ABORT.format(_rank())).open("w", encoding="utf-8")
        faulthandler.enable(_state.abort)
    phases.beat()


def run_training(main: Callable[[Sequence[str]], int]) -> int:
    """Run a step program as the whole life of this process; returns its exit code.

    0 for success, 2 for bad input, 1 for an error or a run that can not go on, 128 + n if signal n ended it.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        # a background job's SIGINT is ignored, so that Ctrl-C on what is in front does not end it: that stays so
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _on_signal)
    _let_children_end()
    outlive_readers()
    _state.supervised = True
    threading.Thread(target=_watch_for_ever, name="supervision", daemon=True).start()
    try:
        code = run_program(_noting_errors(main))
    except RunStopped as stopped:
        _state.ending = True
        if _rank() == 0:
            print_last(str(stopped))
        leave_process_group()
        code = stopped.code
    except SystemExit as error:
        if _state.folder is None:  # --help, or flags that were refused
            raise
        _fail(RuntimeError(f"something called sys.exit({error.code}) before the step was done"))
    except Exception as error:
        _fail(error)
    _state.ending = True
    if _state.abort is not None:
        faulthandler.disable()
        _state.abort.close()
        Path(_state.abort.name).unlink(missing_ok=True)
    if code == 2 and not _state.training:
        take_back()
    return code


def _let_children_end() -> None:
    """Let what a user's function forks end in its own way, which is for that function to judge.

    SIGTERM ends it, as it has no step to finish; one that comes before this process's handler is gone waits for that. A
    crash is none of this rank's, whose note the fault handler would write.
    """

    def hold(on: bool) -> None:
        """Let SIGTERM wait, or no more."""
        signal.pthread_sigmask(signal.SIG_BLOCK if on else signal.SIG_UNBLOCK, [signal.SIGTERM])

    def in_child() -> None:
        """Leave this process's handlers behind."""
        if signal.getsignal(signal.SIGTERM) is _on_signal:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if _state.abort is not None:
            faulthandler.disable()
        hold(False)

    os.register_at_fork(before=lambda: hold(True), after_in_child=in_child, after_in_parent=lambda: hold(False))


def outlive_readers() -> None:
    """Let this process go on when nobody reads its output any more, such as behind ``| head``."""
    sys.stdout, sys.stderr = _OutlivesReader(sys.stdout), _OutlivesReader(sys.stderr)


class _OutlivesReader:
    """A text stream that goes on in a file of the output folder when nobody reads it any more.

    Where train.py or a terminal is killed, the next line of a progress bar would else end the run with a broken pipe,
    before it has seen that its launcher is gone and saved.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """As of any stream."""
        try:
            return self._stream.write(text)
        except OSError:
            _write_to_file_instead(self._stream)
            return self._stream.write(text)

    def flush(self) -> None:
        """As of any stream."""
        try:
            self._stream.flush()
        except OSError:
            _write_to_file_instead(self._stream)
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _write_to_file_instead(stream: TextIO) -> None:
    """Let standard output and error be `ORPHAN_LOG`; where no folder is known, let the one that broke be nothing."""
    path = os.devnull if _state.folder is None else _state.folder / ORPHAN_LOG
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for descriptor in (stream.fileno(),) if _state.folder is None else (1, 2):
        os.dup2(file, descriptor)
    os.close(file)


def _noting_errors(main: Callable[[Sequence[str]], int]) -> Callable[[Sequence[str]], int]:
    """``main``, with a note for the other ranks if it meets bad input: this rank may be the only one."""

    def run(argv: Sequence[str]) -> int:
        """The program, its errors noted."""
        try:
            return main(argv)
        except UserError as error:
            _state.ending = True
            _leave_note("user error", str(error))
            raise
        except Exception as error:
            if not (reason := disk_failure(error)):
                raise
            _state.ending = True
            again = f", and go on from the last checkpoint: {same_command(_state.folder)}" if _state.folder else ""
            full = UserError(f"{phases.doing}: {reason}; make room{again}")
            _leave_note("user error", str(full))
            raise full from error

    return run


def _on_signal(number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    name = signal.Signals(number).name
    recent = phases.doing.asked and now - _state.signalled_at < ECHO
    if not _state.training:
        _print(f"{name}: stopped before the first step, there is nothing to save")
        _exit(128 + number)
    if not phases.doing.asked or (recent and number == signal.SIGINT and phases.doing.asked == signal.SIGTERM):
        first = not phases.doing.asked
        phases.doing.asked, _state.signalled_at = number, now  # first of all: the echo may come while this prints
        if first:
            _print(f"{name}: stopping after this step, with a checkpoint (Ctrl-C again stops at once)")
    elif number == signal.SIGINT and not (recent and now - _state.signalled_at < 0.2):
        _print("Ctrl-C again: stopped at once, without a checkpoint")
        _exit(128 + number)


def _print(text: str) -> None:
    """A line on rank 0's stderr, if anybody still reads it; usable in a signal handler."""
    if _rank() == 0:
        with contextlib.suppress(OSError):
            os.write(2, f"\n{text}\n".encode())


def _exit(code: int) -> None:
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # a handler may interrupt a print
        sys.stdout.flush()
    _end(code)


def _fail(error: Exception) -> NoReturn:
    """Tell why this rank ends, in the log and in a note, and end it; what another rank has caused is not told twice."""
    _state.ending = True
    if _is_lost_connection(error):
        deadline = time.monotonic() + LOST_WAIT
        while time.monotonic() < deadline:
            if notes := _other_notes():
                _tell(notes[0])
                _end(1)
            time.sleep(0.2)
        reason = str(error).strip().splitlines()[0]
        kind, text = "lost", f" the connection to another rank is lost (killed? out of memory?): {reason}"
    else:
        kind, text = "error", f"\n{''.join(traceback.format_exception(error))}"
    _leave_note(kind, f"{phases.doing}:{text}")
    print_last(f"{phases.doing}:{text}")
    _end(1)


def _is_lost_connection(error: Exception) -> bool:
    """Whether a collective failed because of another rank; torch raises RuntimeErrors, a hub's time-out is none."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return several and isinstance(error, RuntimeError) and any(text in str(error) for text in _LOST)


def _leave_note(kind: str, text: str) -> None:
    if _state.folder is None:
        return
    try:
        if kind != "user error":
            (_state.folder / FAILURE_FILE).write_text(text, encoding="utf-8")
        scratch = _state.folder / (NOTE.format(_rank()) + ".tmp")
        scratch.write_text(json.dumps({"rank": _rank(), "kind": kind, "text": text}), encoding="utf-8")
        scratch.replace(_state.folder / NOTE.format(_rank()))
    except OSError as error:  # a full disk: the launcher ends the other ranks
        print(f"rank {_rank()}: no note can be left in {_state.folder}: {error.strerror}", file=sys.stderr, flush=True)


def _other_notes() -> list[dict[str, Any]]:
    """What other ranks have left since this run began."""
    found: list[dict[str, Any]] = []
    for path in _notes(_state.folder) if _state.folder is not None else ():
        with contextlib.suppress(OSError, ValueError):  # it is being replaced
            if _number(path) != _rank() and _state.known.get(path.name) != path.stat().st_mtime_ns:
                found += [json.loads(path.read_text(encoding="utf-8"))] if path.suffix == ".json" else _aborted(path)
    return found


def _notes(folder: Path) -> list[Path]:
    """The notes in a folder, and the files of fault handlers."""
    return [path for kind in (NOTE, ABORT) for path in folder.glob(kind.format("*"))]


def _number(path: Path) -> int:
    """The rank that a note or a file of the fault handler is of."""
    return int(path.stem.rpartition("rank")[2])


def _aborted(path: Path) -> list[dict[str, Any]]:
    """A note for a rank whose fault handler has written; none while its file is empty."""
    if not (lines := path.read_text(encoding="utf-8", errors="replace").splitlines()):
        return []
    number = _number(path)
    what = lines[0].removeprefix("Fatal Python error: ").lower()
    text = f"rank {number} was ended from outside Python ({what}; a collective that timed out?): {path} has its threads"
    return [{"rank": number, "kind": "aborted", "text": text}]


def _tell(note: dict[str, Any]) -> None:
    """Say for a rank that was aborted what it can not say itself: on the first rank that is left."""
    if note["kind"] == "aborted" and _rank() == (0 if note["rank"] else 1):
        print_last(note["text"])
        _leave_note("lost", note["text"])


def _watch_for_ever() -> None:
    launchers = _launchers()
    noted_at, looked = 0.0, time.monotonic()
    if "CROSS_SIZE" in os.environ and _is_orphan():  # which DeepSpeed's launcher sets, and a container's start does not
        _launcher_is_gone()  # while this rank was starting
        launchers = []
    while not _state.ending:
        time.sleep(LOOK_EVERY)
        now = time.monotonic()
        if now - looked > 5 * LOOK_EVERY:
            phases.doing.moved_at += now - looked  # all of this process was suspended (Ctrl-Z, a laptop's lid)
        looked = now
        if not noted_at and (notes := _other_notes()):
            noted_at, note = now, notes[0]
        if noted_at and now - noted_at > COURTESY and not _state.ending:
            if note["kind"] == "user error" and _rank() == 0:
                print_last(f"error: {note['text']} (rank {note['rank']})")
            _tell(note)
            _end(2 if note["kind"] == "user error" else 1)
        if any(os.getppid() != parent if child == os.getpid() else parent_of(child) != parent
               for child, parent in launchers):  # fmt: skip
            _launcher_is_gone()
            launchers = []
        if _state.hang_timeout and now - phases.doing.moved_at > _state.hang_timeout and not _state.ending:
            _stand_still(now - phases.doing.moved_at)


def _launcher_is_gone() -> None:
    """Stop as SIGTERM would: an orphan would go on for ever."""
    _print("the launcher is gone")
    os.kill(os.getpid(), signal.SIGTERM)


def _stand_still(seconds: float) -> None:
    text = f"{phases.doing}: nothing has moved for {seconds:.0f} s (--hang_timeout)"
    print_last(f"{text}; what each thread is doing:")
    faulthandler.dump_traceback(all_threads=True)
    _leave_note("standstill", text)
    _end(1)


def _launchers() -> list[tuple[int, int]]:
    """(process, its parent) pairs that must stay as they are: this rank under its launcher, that under DeepSpeed's
    runner, which SIGTERM ends without a word to anybody, and that under train.py if it has started this."""
    if "LOCAL_RANK" not in os.environ:
        return []  # plain python may well outlive its shell
    parent = os.getppid()
    pairs = [(os.getpid(), parent)]
    runner = parent_of(parent)
    if "deepspeed.launcher.launch" in _command(parent) and "deepspeed" in _command(runner):
        pairs.append((parent, runner))
        if parent_of(runner) == int(os.environ.get(STARTED_BY, "0")):
            pairs.append((runner, parent_of(runner)))
    return pairs


def _is_orphan() -> bool:
    """Whether the process that started this one has ended: its children are the system's first process' then."""
    parent = os.getppid()
    return parent == 1 or "systemd" in _command(parent).split(" ")[0]


def _command(pid: int) -> str:
    return of_process(pid, "cmdline").replace(b"\0", b" ").decode(errors="replace")
