"""Two hosts as network namespaces on one machine: each step runs over both, and a host that is cut off ends the run."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.reliability.tiny_runs import SCRIPTS, metrics, step_arguments, weights
from training.utils.run.folders import python_path

pytestmark = pytest.mark.slow
HOSTS = ("tripod-a", "tripod-b")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
TIMEOUT = 20  # seconds that a rank waits for the others


def ip(*arguments):
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True)


def remove():
    for host in HOSTS:
        with contextlib.suppress(subprocess.CalledProcessError):
            ip("netns", "del", host)


@pytest.fixture(scope="module")
def hosts():
    """Two namespaces joined by a cable, each with an address of its own; skips where that is not permitted."""
    if not shutil.which("ip"):
        pytest.skip("no `ip` here: apt-get install iproute2")
    remove()
    try:
        for host in HOSTS:
            ip("netns", "add", host)
        ip("link", "add", "cable-a", "type", "veth", "peer", "name", "cable-b")
        for host, cable, address in zip(HOSTS, ("cable-a", "cable-b"), ADDRESSES, strict=True):
            ip("link", "set", cable, "netns", host)
            ip("-n", host, "link", "set", cable, "name", "eth0")
            ip("-n", host, "addr", "add", f"{address}/24", "dev", "eth0")
            ip("-n", host, "link", "set", "lo", "up")
            ip("-n", host, "link", "set", "eth0", "up")
    except subprocess.CalledProcessError as error:
        remove()
        pytest.skip(f"network namespaces are not permitted here: {error.stderr.strip()}")
    yield HOSTS
    remove()


class TwoHosts:
    """A step under DeepSpeed's launcher on both hosts, as docs/several_machines.md shows it."""

    def __init__(self, step, arguments, folder):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        (hostfile := folder / "hostfile").write_text("".join(f"{host} slots=1\n" for host in HOSTS))
        deepspeed = str(Path(sys.executable).parent / "deepspeed")
        environment = os.environ | {"GLOO_SOCKET_IFNAME": "eth0", "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
        self.logs = [folder / f"{host}.log" for host in HOSTS]
        self.processes = []
        for rank, host in enumerate(HOSTS):
            launch = [deepspeed, "--hostfile", str(hostfile), "--no_ssh", "--node_rank", str(rank)]
            launch += ["--master_addr", ADDRESSES[0], "--master_port", str(port), str(SCRIPTS[step]), *arguments]
            with self.logs[rank].open("a") as log:
                command = ["ip", "netns", "exec", host, *launch]
                self.processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder))

    def wait(self, seconds):
        deadline = time.monotonic() + seconds
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]

    def text(self):
        return "".join(log.read_text(errors="replace") for log in self.logs)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_step_over_two_hosts_that_are_cut_apart(hosts, inputs, tmp_path, step):
    more = ("--distributed_timeout", str(TIMEOUT))
    whole = step_arguments(step, inputs, tmp_path / "whole", *more)
    run = TwoHosts(step, whole, tmp_path)
    assert run.wait(180) == [0, 0], run.text()[-3000:]
    assert (tmp_path / "whole" / "summary.json").is_file()

    output = tmp_path / "cut"
    arguments = step_arguments(step, inputs, output, *more)
    run = TwoHosts(step, arguments, tmp_path)
    deadline = time.monotonic() + 120
    while not (output / "checkpoints" / "latest").is_file():
        assert time.monotonic() < deadline and run.processes[0].poll() is None, run.text()[-3000:]
        time.sleep(0.01)
    ip("-n", HOSTS[1], "link", "set", "eth0", "down")
    try:
        start = time.monotonic()
        codes = run.wait(TIMEOUT + 60)
        assert all(codes) and time.monotonic() - start < TIMEOUT + 60
        assert "the connection to another rank is lost" in run.text()
    finally:
        ip("-n", HOSTS[1], "link", "set", "eth0", "up")
    assert not (output / "summary.json").exists(), "the run was too quick to be cut"

    run = TwoHosts(step, arguments, tmp_path)
    assert run.wait(180) == [0, 0], run.text()[-3000:]
    assert "going on from" in run.text()
    assert weights(step, output) == weights(step, tmp_path / "whole")
    assert metrics(output) == metrics(tmp_path / "whole")
