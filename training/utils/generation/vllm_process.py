"""The process that vLLM runs in, from the rank's side: started, asked, given weights, lost, ended.

The far end is `training.utils.generation.vllm_worker`, which says what messages there are.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.utils.errors import print_last
from training.utils.generation import vllm_worker
from training.utils.generation.rollouts import RolloutsLost
from training.utils.generation.vllm_python import WORKER, other_interpreter
from training.utils.run.phases import beat
from training.utils.run.processes import last_lines

BUCKET_BYTES = 64 << 20  # of weights in shared memory at a time; a larger tensor goes alone
SILENCE = 300.0  # seconds without a sign of life after which it is given up
LOG_LINES = 8  # of its log, in the message of a run that ends because of it


def _environment(ranks: int) -> dict[str, str]:
    """The worker's: of several GPUs it sees this rank's, and those of the ranks that it works with."""
    mine = other_interpreter() | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # weights come from an iterator, which no process can be sent
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    if torch.cuda.is_available():
        first = int(os.environ.get("LOCAL_RANK", "0")) // ranks * ranks
        visible = [v for v in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if v]
        visible = visible or [str(i) for i in range(first + ranks)]
        mine["CUDA_VISIBLE_DEVICES"] = ",".join(visible[first : first + ranks])
    return mine


class Worker:
    """The process, from the rank's side; it ends with the last reference to this.

    Args:
        python: its interpreter.
        log: the file that its output goes to.
        ranks: whose workers hold a model together; neighbours.
    """

    def __init__(self, python: str, log: Path, ranks: int = 1) -> None:
        self.log = log
        script = os.environ.get(WORKER) or vllm_worker.__file__
        ours, theirs = socket.socketpair()
        descriptor = os.memfd_create("weights")
        with log.open("ab") as output, theirs:
            self.process = subprocess.Popen(
                [python, script, str(theirs.fileno()), str(descriptor), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(theirs.fileno(), descriptor),
                start_new_session=True,  # Ctrl-C is the rank's, which may need answers until its checkpoint is written
                env=_environment(ranks),
            )
        self.channel, self.memory = vllm_worker.Channel(ours), vllm_worker.SharedMemory(descriptor)
        self.close = weakref.finalize(self, _end, self.process, ours, descriptor)

    def ask(self, message: dict[str, Any], limit: float = SILENCE, *, patient: bool = False) -> dict[str, Any]:
        """Send a message and wait for its answer.

        Args:
            message: see `training.utils.generation.vllm_worker`.
            limit: seconds without a sign of life.
            patient: tell the watchdog that this rank moves while it waits, up to the limit.

        Raises:
            RolloutsLost: it has ended, says that it failed, or is silent.
        """
        self._send(message)
        return self._receive(limit, patient)

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self.channel.send(message)
        except OSError as error:
            raise self._lost(self._how_it_ended()) from error

    def _receive(self, limit: float = SILENCE, patient: bool = False) -> dict[str, Any]:
        heard = time.monotonic()
        while True:
            try:
                message = self.channel.receive(wait=1.0)
            except (EOFError, OSError) as error:
                raise self._lost(self._how_it_ended()) from error
            if message is None and time.monotonic() - heard > limit:
                raise self._lost(f"has not answered for {limit:.0f} s")
            if patient or message is not None:
                beat()
            if message is None:
                continue
            if "error" in message:
                raise self._lost(f"failed: {message['error']}")
            if "moving" not in message:
                return message
            heard = time.monotonic()

    def _how_it_ended(self) -> str:
        try:
            code = self.process.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            return "closed the connection"
        return f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"

    def _lost(self, what: str) -> RolloutsLost:
        self.close()
        lines = "\n".join(f"  | {line}" for line in last_lines(self.log, LOG_LINES))
        print_last(f"the last lines of {self.log}:\n{lines}")
        return RolloutsLost(f"vLLM (process {self.process.pid}) {what}; its log is {self.log}")

    def push(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Send weights, a bucket at a time.

        All of them are asked for, also when the process is lost on the way: at ZeRO-3 the other ranks take part.

        Raises:
            RolloutsLost: see `ask`.
        """
        left = iter(weights)
        bucket: list[list[Any]] = []
        offset = 0
        try:
            self._send({"do": "weights"})
            for name, tensor in left:
                beat()
                size = tensor.numel() * tensor.element_size()
                if bucket and offset + size > BUCKET_BYTES:
                    self._send_bucket(bucket)
                    bucket, offset = [], 0
                self.memory.resize(max(len(self.memory), BUCKET_BYTES, size), grow=True)
                raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
                self.memory.at(offset, size).copy_(raw)
                bucket.append([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), offset, size])
                offset += -(-size // 64) * 64  # tensors begin where any type may
            self._send_bucket(bucket)
            self.ask({"bucket": []})
        except RolloutsLost:
            for _ in left:
                beat()
            raise

    def _send_bucket(self, bucket: list[list[Any]]) -> None:
        self.ask({"bucket": bucket, "size": len(self.memory)})


def _end(process: subprocess.Popen, end: socket.socket, descriptor: int) -> None:
    """End the process, which holds nothing that is worth waiting for."""
    end.close()
    os.close(descriptor)
    process.kill()
    process.wait()
