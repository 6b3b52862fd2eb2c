"""The exceptions that end a program in order: shown as one line, with their exit code, instead of a traceback."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence


class UserError(Exception):
    """Bad input. Its message is one line that says what is wrong and how to go on; exit code 2."""


class RunStopped(Exception):
    """A run ends before its end, all ranks together, with a checkpoint; the message says why, and how to go on."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def run_program(main: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> int:
    """Run a program's ``main(argv)`` and turn a `UserError` into one line on stderr and exit code 2.

    Every rank meets the same bad input, so every rank returns; only rank 0 prints. Without ``argv`` this is the whole
    life of a process, and its process group is ended too.
    """
    try:
        code = main(list(sys.argv[1:] if argv is None else argv))
        if argv is None:
            leave_process_group()
        return code
    except Exception as error:
        reason = " ".join(str(error).split()) if isinstance(error, UserError) else disk_failure(error)
        if not reason and not isinstance(error, UserError):
            raise
        rank = os.environ.get("RANK", "0")
        if not rank.isdecimal() or int(rank) == 0:  # RANK may be no number: then the error is about that
            print_last(f"error: {reason}")
        return 2


def run_resumable(main: Callable[[Sequence[str]], int]) -> int:
    """`run_program` of a program that goes on where it was stopped: Ctrl-C says so in a line, exit code 130."""
    try:
        return run_program(main)
    except KeyboardInterrupt:
        print_last("stopped; started again with the same flags it goes on")
        return 130


_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


def disk_failure(error: BaseException) -> str:
    """What a full or read-only disk has said, in one line, if an error comes from it; else empty.

    Libraries that write tensors raise errors of their own, whose text has what the system said.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _DISK_ERRORS:
            return f"{cause.filename}: {cause.strerror}" if cause.filename else str(cause.strerror)
        for number in _DISK_ERRORS:
            if os.strerror(number) in str(cause) and not isinstance(cause, UserError):
                return os.strerror(number)
        cause = cause.__cause__ or cause.__context__
    return ""


_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def printable(text: str) -> str:
    """A text for the terminal: control and half characters, which data of others may hold, are shown as ``?``.

    An escape sequence could colour, hide or rewrite what a program says, or the terminal's title.
    """
    return _CONTROLS.sub("?", text)


_HALF = re.compile("[\ud800-\udfff]")  # a surrogate alone, which JSON can write and UTF-8 can not


def half_character(text: str) -> str:
    """What is half a character in a text, a surrogate that stands alone, as an escape; empty if nothing is."""
    found = None if text.isascii() else _HALF.search(text)
    return f"\\u{ord(found[0]):04x}" if found else ""


@contextlib.contextmanager
def refusals(named: str) -> Iterator[None]:
    """Turn what the system refuses inside, such as a look into another user's folder, into an error about ``named``.

    Raises:
        UserError: with the system's reason.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{named}: {error.strerror or error} ({error.filename})") from None


def print_last(text: str) -> None:
    """Print on stderr as the last thing of a process: on a line of its own, below a progress bar that is drawn."""
    tqdm = sys.modules.get("tqdm")
    with contextlib.suppress(OSError):  # nobody reads it: the terminal was closed
        for bar in list(getattr(tqdm.tqdm, "_instances", ())) if tqdm is not None else ():
            bar.close()
        print(printable(text), file=sys.stderr, flush=True)


def leave_process_group() -> None:
    """End the group before the interpreter: a gloo thread that outlives it aborts the process after all is done."""
    dist = sys.modules.get("torch.distributed")  # not there in a program that never made a group
    if dist is not None and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
