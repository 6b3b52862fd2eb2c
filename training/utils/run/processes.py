"""Run a program as a child: its output live on the terminal and in a log, signals passed on, nothing left behind."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from types import FrameType

from training.utils.errors import print_last

GRACE = 15.0  # seconds that a process has to end after it was asked twice, or after its parent has ended
STARTED_BY = "TRIPOD_STARTED_BY"  # tells a child the process that it may not outlive
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_ESCAPES = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")


def unused_port() -> int:
    """A port of the loopback interface that nothing listens on, at present: for ranks to meet at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Ended:
    """How a child ended: ``code`` as a shell gives it, and the signal that this process got and passed on."""

    code: int
    signal: int | None = None


class LineLog:
    """Writes a stream to an unbuffered file as lines: of a progress bar its last state, of colours nothing.

    What can not be written is left out, which is said once: a full disk costs the log, not the program.
    """

    def __init__(self, file: RawIOBase) -> None:
        self._file = file
        self._rest = b""
        self._told = False

    def feed(self, data: bytes) -> None:
        """Take the next bytes; complete lines are in the file when this returns."""
        *lines, rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._write(line)
        # what a carriage return will overwrite is dropped at once: a bar that runs for days stays one line
        self._rest = rest[rest[:-1].rfind(b"\r") + 1 :]

    def close(self) -> None:
        """Write a last line that has no end."""
        if self._rest.strip():
            self._write(self._rest)

    def _write(self, line: bytes) -> None:
        try:
            self._file.write(_ESCAPES.sub(b"", line.rstrip(b"\r").rpartition(b"\r")[2]).rstrip() + b"\n")
        except OSError as error:
            if not self._told:
                print_last(f"warning: the log can not be written: {error.strerror}")
            self._told = True


def run_logged(command: Sequence[str], log: Path, *, grace: float = GRACE) -> Ended:
    """Run ``command`` in a process group of its own; copy its output to the terminal and append it to ``log``.

    SIGINT and SIGTERM that this process gets go to the group's ranks, SIGHUP as SIGTERM, and not to DeepSpeed's
    processes above them: its runner passes none on, and its launcher would kill the ranks after half a minute, be a
    checkpoint written or not. A rank ends by itself after its step; a second Ctrl-C ends it at once. Returns when the
    group has ended; after a second signal what is left of it is killed in ``grace`` seconds.

    Raises:
        OSError: the command can not be started.
    """
    with log.open("ab", buffering=0) as file, _output_of_child() as (child_end, own_end):
        lines = LineLog(file)
        lines.feed(b"$ " + " ".join(command).encode() + b"\n")
        received: list[int] = []
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=child_end,
            stderr=child_end,
            start_new_session=True,
            env=os.environ | {STARTED_BY: str(os.getpid())},
        )
        os.close(child_end)
        with _passing_signals_on(process.pid, received):
            _copy_output(process, own_end, lines, received, grace)
            lines.close()
            code = process.wait()
            _end_group(process.pid, signalled=bool(received), grace=grace)
    if received:
        return Ended(128 + received[0], received[0])
    return Ended(128 - code if code < 0 else code)


def last_lines(log: Path, count: int = 20) -> list[str]:
    """The last ``count`` lines of a log that are not empty."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 65536))
        text = file.read().decode(errors="replace")
    return [line for line in text.splitlines() if line.strip()][-count:]


@contextlib.contextmanager
def _output_of_child() -> Iterator[tuple[int, int]]:
    """Descriptors to write to and to read from: a terminal if ours is one, so that bars are drawn; else a pipe."""
    if sys.stdout.isatty():
        own_end, child_end = pty.openpty()
        size = shutil.get_terminal_size()
        termios.tcsetwinsize(child_end, (size.lines, size.columns))
    else:
        own_end, child_end = os.pipe()
    try:
        yield child_end, own_end
    finally:
        os.close(own_end)


@contextlib.contextmanager
def _passing_signals_on(group: int, received: list[int]) -> Iterator[None]:
    def forward(number: int, frame: FrameType | None) -> None:
        """Note a signal and send it to the ranks, SIGHUP as SIGTERM."""
        received.append(number)
        _signal_ranks(group, signal.SIGTERM if number == signal.SIGHUP else number)

    # SIGHUP is ignored under nohup, SIGINT in a script's background jobs: they stay ignored, and SIGTERM ends the run
    numbers = [n for n in FORWARDED if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, forward) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _copy_output(process: subprocess.Popen, source: int, lines: LineLog, received: list[int], grace: float) -> None:
    """Copy until the output ends, or the process has ended and what it left behind is silent."""
    terminal = sys.stdout.buffer
    killed_at = None
    while True:
        ended = process.poll() is not None
        if select.select([source], [], [], 0.2)[0]:
            try:
                data = os.read(source, 65536)
            except OSError:  # a pseudo-terminal whose other end is closed
                return
            if not data:
                return
            with contextlib.suppress(OSError):  # the terminal was closed; the log goes on
                terminal.write(data)
                terminal.flush()
            lines.feed(data)
        elif ended:
            return
        if len(received) > 1 and killed_at is None:
            killed_at = time.monotonic() + grace
        if killed_at is not None and time.monotonic() > killed_at:
            _signal_group(process.pid, signal.SIGKILL)
            return


def _end_group(group: int, *, signalled: bool, grace: float) -> None:
    """Wait until no process of the group is left; ask what outlived its parent to end, and kill it in the end."""
    if not signalled and _group_lives(group):
        _signal_group(group, signal.SIGTERM)
    deadline = time.monotonic() + grace
    while _group_lives(group):
        if time.monotonic() > deadline:
            _signal_group(group, signal.SIGKILL)
            return
        time.sleep(0.05)


def _group_lives(group: int) -> bool:
    return _signal_group(group, 0)


def _signal_ranks(group: int, number: int) -> None:
    """Signal the processes of a group that a launcher has made ranks; the whole group while there are none.

    What a rank has forked has its environment, and may be needed for the step that the rank finishes.
    """
    ranks = [pid for pid in _members(group) if b"\0LOCAL_RANK=" in b"\0" + of_process(pid, "environ")]
    if not ranks:
        _signal_group(group, number)
    for pid in (pid for pid in ranks if parent_of(pid) not in ranks):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def of_process(pid: int, what: str) -> bytes:
    """What a file of /proc says about a process; empty if it has ended, or there is no /proc."""
    try:
        return Path(f"/proc/{pid}/{what}").read_bytes()
    except OSError:
        return b""


def parent_of(pid: int) -> int:
    """A process's parent, 0 if it has ended or there is no /proc."""
    status = of_process(pid, "stat").rpartition(b")")[2].split()
    return int(status[1]) if status else 0


def _members(group: int) -> list[int]:
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return [pid for pid in pids if _group_of(pid) == group]


def _group_of(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return -1


def _signal_group(group: int, number: int) -> bool:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True
