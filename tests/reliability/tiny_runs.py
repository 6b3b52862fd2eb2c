"""The three steps on a tiny model: commands, processes that can be killed at any moment, hashes of what they wrote."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.signals import hear_signals
from tests.step3.hybrid_checks import save_tiny_reward_model
from tests.tiny import DEMO, save_tiny_model
from training.utils.run.folders import python_path

ROOT = Path(__file__).resolve().parents[2]
Step = int | str  # 1, 2, 3 or dpo
SCRIPTS: dict[Step, Path] = {
    1: ROOT / "training" / "step1_supervised_finetuning" / "main.py",
    2: ROOT / "training" / "step2_reward_model_finetuning" / "main.py",
    "dpo": ROOT / "training" / "step2_dpo_finetuning" / "main.py",
    3: ROOT / "training" / "step3_rlhf_finetuning" / "main.py",
}
WEIGHTS: dict[Step, list[str]] = {1: ["."], 2: ["."], "dpo": ["."], 3: ["actor", "critic"]}
NOT_REPEATABLE = ("time", "seconds", "memory", "peak", "share")  # names of metrics that are measured, not computed


def make_inputs(folder: Path) -> Path:
    """A tiny SFT model, a tiny reward model and a few rows of data in ``folder``."""
    save_tiny_model(folder / "model")
    save_tiny_reward_model(str(folder / "model"), folder / "reward")
    for name, count in {"sft": 16, "preferences": 16, "prompts": 12, "held_out": 4}.items():
        lines = (DEMO / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def step_arguments(step: Step, inputs: Path, output: Path, *more: str) -> list[str]:
    """Arguments of a step on the tiny inputs: eight steps in steps 1, 2 and DPO, four iterations in step 3."""
    data = {1: "sft", 2: "preferences", "dpo": "preferences", 3: "prompts"}[step]
    common = ["--output_dir", str(output), "--eval_data_path", str(inputs / "held_out.jsonl"), "--report_to", "none"]
    common += ["--data_path", str(inputs / f"{data}.jsonl"), "--dtype", "fp32", "--save_every", "1", "--keep_last", "2"]
    if step != 3:
        common += ["--model_name_or_path", str(inputs / "model"), "--per_device_train_batch_size", "2"]
        common += ["--learning_rate", "1e-2", "--max_seq_len", "480", "--eval_interval", "2"]
    else:
        common += ["--actor_model_name_or_path", str(inputs / "model")]
        common += ["--critic_model_name_or_path", str(inputs / "reward"), "--per_device_generation_batch_size", "4"]
        common += ["--per_device_training_batch_size", "2", "--max_prompt_seq_len", "96", "--max_answer_seq_len", "6"]
        common += ["--ppo_epochs", "2", "--num_iterations", "4", "--actor_learning_rate", "1e-3"]
    return [*common, *more]


def deepspeed_command(step: Step, arguments: list[str], ranks: int) -> list[str]:
    """The command of a step under the deepspeed launcher."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    deepspeed = str(Path(sys.executable).parent / "deepspeed")
    return [deepspeed, "--num_gpus", str(ranks), "--master_port", str(port), str(SCRIPTS[step]), *arguments]


class Launched:
    """A run in a process group of its own, started by a `Launcher`."""

    def __init__(self, launcher: Launcher, pid: int, log: Path) -> None:
        self.pid = pid
        self.log = log
        self._launcher = launcher
        self._code: int | None = None

    def alive(self) -> bool:
        """Whether the process still runs (a zombie does not)."""
        stat = Path(f"/proc/{self.pid}/stat")
        return self._code is None and stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"

    def wait(self, timeout: float = 300.0) -> int:
        """Wait for the end; returns the exit code, negative for a signal."""
        deadline = time.monotonic() + timeout
        while self.alive():
            assert time.monotonic() < deadline, f"still running after {timeout} s:\n{self.text()[-2000:]}"
            time.sleep(0.02)
        if self._code is None:
            self._code = self._launcher.ask({"wait": self.pid})["code"]
        return self._code

    def kill(self) -> None:
        """SIGKILL for the whole group; nothing if it has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait()

    def text(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait_for(self, condition: Callable[[], bool], timeout: float = 240.0) -> bool:
        """Wait until ``condition()`` holds; false if the process ended before."""
        deadline = time.monotonic() + timeout
        while not condition():
            if not self.alive():
                return condition()
            assert time.monotonic() < deadline, f"it did not happen in {timeout} s:\n{self.text()[-2000:]}"
            time.sleep(0.005)
        return True


class Launcher:
    """A process that has imported the step programs and forks runs, see `tests.reliability.zygote`."""

    def __init__(self) -> None:
        environment = os.environ | {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.reliability.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=ROOT,
            preexec_fn=hear_signals,
        )
        assert self._process.stdout is not None
        while (line := self._process.stdout.readline()) and line != "ready\n":
            continue  # what libraries print while they are imported

    def ask(self, request: dict) -> dict:
        """Send one request and read the answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(
        self, step: Step, arguments: list[str], log: Path, fault: dict[str, Any] | None = None, **environment: str
    ) -> Launched:
        """Start a step on one rank; ``fault`` are arguments of `tests.reliability.faults.plant`."""
        request = {"step": step, "argv": arguments, "log": str(log), "env": environment, "fault": fault}
        return Launched(self, self.ask(request)["pid"], log)

    def start_ranks(
        self, step: Step, arguments: list[str], log: Path, ranks: int, fault: dict[str, Any] | None = None
    ) -> list[Launched]:
        """Start a step on several ranks, each a process of its own, as a launcher would."""
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        size = {
            "WORLD_SIZE": str(ranks),
            "LOCAL_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        return [self.start(step, arguments, log, fault, RANK=str(r), LOCAL_RANK=str(r), **size) for r in range(ranks)]

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


def weights(step: Step, output: Path) -> str:
    """A hash over every tensor of the final models."""
    digest = hashlib.sha256()
    for folder in WEIGHTS[step]:
        for file in sorted((output / folder).glob("*.safetensors")):
            for name, tensor in sorted(load_file(file).items()):
                digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def metrics(output: Path) -> list[dict]:
    """metrics.jsonl without what is measured by a clock."""
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if not any(w in k for w in NOT_REPEATABLE)} for record in records]
