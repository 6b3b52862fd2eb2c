"""Hostfiles, and hosts that do not answer; `ssh` and `pdsh` are stand-ins."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from training.utils.errors import UserError
from training.utils.run.hosts import check_hosts, read_hostfile, with_ranks


def stand_in(program: Path, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that is one line of shell, first on PATH."""
    program.parent.mkdir(exist_ok=True)
    program.write_text(f"#!/bin/sh\n{line}\n")
    program.chmod(0o755)
    if str(program.parent) not in os.environ["PATH"]:
        monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")


def test_a_hostfile_is_read_as_deepspeed_reads_it(tmp_path):
    from deepspeed.launcher.runner import fetch_hostfile

    (tmp_path / "hosts").write_text("# the cluster\nworker-1 slots=8\n\nworker-2  slots=4  # old\n")
    ours = read_hostfile(str(tmp_path / "hosts"))
    assert ours == {"worker-1": 8, "worker-2": 4}
    (tmp_path / "plain").write_text("worker-1 slots=8\nworker-2 slots=4\n")
    assert ours == dict(fetch_hostfile(str(tmp_path / "plain")))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no host in it"),
        ("# only a comment\n", "no host in it"),
        ("a slots=1\nb\n", "hosts:2: 'b' is not of the form"),
        ("a slots=two\n", "hosts:1"),
        ("a slots=1\na slots=1\n", "hosts:2: a stands there twice"),
        (None, "No such file"),
    ],
)
def test_a_hostfile_that_is_wrong(tmp_path, text, says):
    if text is not None:
        (tmp_path / "hosts").write_text(text)
    with pytest.raises(UserError, match=says):
        read_hostfile(str(tmp_path / "hosts"))


def test_the_host_that_does_not_answer_is_named(tmp_path, monkeypatch):
    stand_in(tmp_path / "bin" / "pdsh", "exit 0", monkeypatch)
    stand_in(tmp_path / "bin" / "ssh", 'test "$5" = good || { echo "Connection refused" >&2; exit 255; }', monkeypatch)
    (tmp_path / "hosts").write_text("good slots=1\nbad slots=1\n")
    with pytest.raises(UserError, match=r"bad does not answer to ssh without a password \(Connection refused\)"):
        check_hosts(str(tmp_path / "hosts"))
    (tmp_path / "hosts").write_text("good slots=1\n")
    check_hosts(str(tmp_path / "hosts"))


def test_a_host_that_says_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("training.utils.run.hosts.SSH_SECONDS", 0.5)
    stand_in(tmp_path / "bin" / "ssh", "sleep 20", monkeypatch)
    (tmp_path / "hosts").write_text("silent slots=1\n")
    with pytest.raises(UserError, match="silent does not answer .*nothing within 1"):
        check_hosts(str(tmp_path / "hosts"))


def test_a_missing_program_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "hosts").write_text("a slots=1\nb slots=1\n")
    with pytest.raises(UserError, match="ssh is missing.*openssh-client"):
        check_hosts(str(tmp_path / "hosts"))


@pytest.mark.parametrize(
    ("ranks", "hostfile", "visible", "options"),
    [
        (None, "", None, ["deepspeed", "--num_gpus", "1", "--quiet"]),
        (2, "", "", ["deepspeed", "--num_gpus", "2", "--quiet"]),
        (None, "", "3", ["deepspeed", "--include", "localhost:3", "--quiet"]),
        (2, "", "5, 1,2", ["deepspeed", "--include", "localhost:5,1", "--quiet"]),
        (1, "", "GPU-8a1b", [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "1"]),
        (2, "", "MIG-1,MIG-2", [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]),
        (None, "hosts", "3", ["deepspeed", "--hostfile", "hosts", "--quiet"]),
        (4, "hosts", None, ["deepspeed", "--hostfile", "hosts", "--num_gpus", "4", "--quiet"]),
    ],
)
def test_the_devices_that_are_visible_are_those_that_are_taken(ranks, hostfile, visible, options):
    assert with_ranks(["deepspeed"], ranks, hostfile, visible) == options


def test_more_ranks_than_visible_devices():
    with pytest.raises(UserError, match=r"--num_gpus 3: CUDA_VISIBLE_DEVICES=0,1 names 2"):
        with_ranks(["deepspeed"], 3, "", "0,1")
