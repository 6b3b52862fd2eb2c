"""A process that is killed just before one of its file calls; imports nothing that is slow."""

from __future__ import annotations

import os
import signal
from typing import Any

FILE_CALLS = ("rename", "replace", "link", "unlink", "remove", "rmdir", "mkdir", "fsync")


def kill_at_file_call(folder: str, number: int, calls: str) -> None:
    """Let this process be killed just before its file call of that number, of those that change names in a folder.

    Args:
        folder: an absolute path; calls on files outside do not count.
        number: from 1; 0 for no kill.
        calls: a file that gets a line for each call.
    """
    seen = 0

    def path_of(value: Any, folder_descriptor: int | None) -> str:
        if isinstance(value, int):
            return os.readlink(f"/proc/self/fd/{value}")
        base = os.readlink(f"/proc/self/fd/{folder_descriptor}") if folder_descriptor is not None else os.getcwd()
        return os.path.join(base, os.fspath(value))

    def counted(name: str, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            path = path_of(args[0], kwargs.get("dir_fd"))
            if path == folder or path.startswith(folder + "/"):
                seen += 1
                with open(calls, "a", encoding="utf-8") as log:
                    log.write(f"{name} {path.removeprefix(folder)}\n")
                if seen == number:
                    os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    for name in FILE_CALLS:
        setattr(os, name, counted(name, getattr(os, name)))
