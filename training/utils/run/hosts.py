"""Where ranks run: DeepSpeed's hostfile, whether its hosts answer, and which devices of this one are meant."""

from __future__ import annotations

import codecs
import hashlib
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from training.utils.errors import UserError, refusals
from training.utils.run.files import write_whole
from training.utils.run.folders import CACHE_FOLDER, cache_dir, make_dir

SSH_SECONDS = 8
_LINE = re.compile(r"(\S+)\s+slots=([1-9]\d*)")


def read_hostfile(path: str) -> dict[str, int]:
    """Host -> slots, as DeepSpeed reads them: ``worker-1 slots=8`` a line, ``#`` begins a comment.

    Raises:
        UserError: no such file, a line that is not of that form, a host named twice, or no host.
    """
    hosts: dict[str, int] = {}
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"--hostfile {path}: not UTF-8; save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"--hostfile {path}: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = _LINE.fullmatch(text)
        if match is None:
            raise UserError(f"--hostfile {path}:{number}: {text!r} is not of the form: worker-1 slots=8")
        if match[1] in hosts:
            raise UserError(f"--hostfile {path}:{number}: {match[1]} stands there twice")
        hosts[match[1]] = int(match[2])
    if not hosts:
        raise UserError(f"--hostfile {path}: no host in it; a line reads: worker-1 slots=8")
    return hosts


def _for_launcher(path: str) -> str:
    """The hostfile that DeepSpeed reads: a copy where an editor's mark of UTF-8 would be part of the first host."""
    file = Path(path).expanduser()
    with refusals(f"--hostfile {path}"):
        content = file.read_bytes() if file.is_file() else b""
    if not content.startswith(codecs.BOM_UTF8):
        return path
    copy = cache_dir() / f"hostfile-{hashlib.sha256(content).hexdigest()[:16]}"
    make_dir(copy.parent, CACHE_FOLDER)
    write_whole(copy, content.decode("utf-8-sig", "replace"))
    return str(copy)


def check_hosts(path: str) -> None:
    """See that every host of a hostfile answers to ssh without a password, as DeepSpeed's launcher needs.

    Raises:
        UserError: the file is wrong, a program is missing here, or a host does not answer; names the host.
    """
    hosts = read_hostfile(path)
    for program, package in (("ssh", "openssh-client"), ("pdsh", "pdsh")):
        if len(hosts) > 1 and not shutil.which(program):
            raise UserError(
                f"--hostfile: {program} is missing, DeepSpeed starts hosts with it: apt-get install {package}"
            )
    with ThreadPoolExecutor(max_workers=16) as pool:
        for host, problem in zip(hosts, pool.map(_unreachable, hosts), strict=True):
            if problem:
                raise UserError(
                    f"--hostfile {path}: {host} does not answer to ssh without a password ({problem}); see "
                    f"docs/several_machines.md"
                )


def _unreachable(host: str) -> str:
    command = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={SSH_SECONDS}", host, "true"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=2 * SSH_SECONDS, check=False)
    except FileNotFoundError:
        return "ssh is missing"
    except subprocess.TimeoutExpired:
        return f"nothing within {2 * SSH_SECONDS} s"
    said = done.stderr.strip().splitlines()
    return "" if done.returncode == 0 else (said[-1] if said else f"exit code {done.returncode}")


def with_ranks(launcher: Sequence[str], ranks: int | None, hostfile: str, visible: str | None) -> list[str]:
    """The launcher that starts a program on its ranks, and its options.

    The launcher of DeepSpeed ignores ``CUDA_VISIBLE_DEVICES`` where ``--num_gpus`` is given, and takes the first
    devices: then they are named. It reads numbers alone, so that UUIDs and MIG slices go to ``torchrun``.

    Args:
        ranks: of this host, or of each host; None for one, or for all slots of a hostfile.
        visible: ``CUDA_VISIBLE_DEVICES`` on a machine with an accelerator, None where it says nothing.

    Raises:
        UserError: fewer devices are visible than ranks are asked for.
    """
    if hostfile:
        return [
            *launcher,
            "--hostfile",
            _for_launcher(hostfile),
            *(["--num_gpus", str(ranks)] if ranks else []),
            "--quiet",
        ]
    count, devices = ranks or 1, [name.strip() for name in (visible or "").split(",") if name.strip()]
    if not devices:
        return [*launcher, "--num_gpus", str(count), "--quiet"]
    if count > len(devices):
        raise UserError(f"--num_gpus {count}: CUDA_VISIBLE_DEVICES={visible} names {len(devices)}")
    if all(name.isdigit() for name in devices):
        return [*launcher, "--include", f"localhost:{','.join(devices[:count])}", "--quiet"]
    return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count)]
