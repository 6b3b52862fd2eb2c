"""Children of tests hear signals as in a terminal, whatever the shell or nohup made this process ignore."""

import signal

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def hear_signals() -> None:
    """For ``preexec_fn``: a background job's SIGINT and nohup's SIGHUP are ignored, and children inherit that."""
    for number in ENDING:
        signal.signal(number, signal.SIG_DFL)


def as_in_the_background() -> None:
    """For ``preexec_fn``: what ``nohup program &`` in a script ignores."""
    hear_signals()
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
