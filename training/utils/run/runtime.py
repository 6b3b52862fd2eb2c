"""What must be right before torch is imported: PATH, a compiler, thread counts, quiet libraries.

Each program calls `prepare_runtime` before its other imports; set-up runs ``python -m training.utils.run.runtime``,
which checks the same and compiles. Only the standard library is imported here, so the check needs no packages.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import logging
import os
import platform
import shutil
import sys
import sysconfig
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from training.utils.errors import UserError, run_program
from training.utils.run.environment import wrong_variable

# Warnings of these versions that correct use raises and that a user can not act on. Everything else stays visible.
HARMLESS_WARNINGS = (
    r"`torch\.distributed\.\w+` is deprecated.*",  # DeepSpeed 0.19 calls the older names of torch 2.13
    r"`is_gradient_checkpointing` is deprecated.*",  # PEFT 0.21 asks by the name before transformers 5.23's
    r"`gradient_checkpointing_enable` is deprecated.*",  # transformers 5.17 has no other name for it
)

# One of these is there when DeepSpeed could find an accelerator: NVIDIA, WSL, AMD, Intel, Habana and others.
ACCELERATOR_DEVICES = ("nvidia*", "dxg", "kfd", "dri/renderD*", "accel*", "davinci*", "hl*")

# mallopt(3): the numbers of three settings in malloc.h; the largest value of the last on 64 bits, an int's largest, and
# more than the largest gradient of the models that a CPU trains takes (an embedding's)
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
LARGEST_MMAP_THRESHOLD = 32 << 20
MOST_KEPT = (1 << 31) - 1
GROWN_BY = 256 << 20

SHARED_MEMORY = Path("/dev/shm")
BUILD_START = 30.0  # seconds from torch's lock to its compiler at work, on a machine that is very busy


def prepare_runtime() -> None:
    """Make DeepSpeed usable from this interpreter without an activated environment; exits with 2 if it can not be.

    Puts the interpreter's ``bin`` first on PATH (DeepSpeed starts its ``ninja`` from there), looks for a C++ compiler
    and the Python headers, clears away what killed processes left of builds and of shared memory, sets intra-op
    threads to cores / local ranks and how freed memory is kept, and silences known chatter. Safe to call again. Rank 0
    alone prints what is missing.
    """

    def check(_: object) -> int:
        """What can not be mended here."""
        if wrong := wrong_variable():
            raise UserError(wrong)
        put_bin_on_path()
        check_toolchain()
        return 0

    code = run_program(check, [])
    if code:
        raise SystemExit(code)
    keep_compiled_ops_here()
    remove_stale_build_locks()
    remove_abandoned_buffers()
    set_threads()
    keep_freed_memory()
    let_segments_grow()
    attend_without_plans()
    quiet_libraries()


def put_bin_on_path() -> None:
    """Put the interpreter's ``bin`` (and ninja's folder, where that is another one) first on PATH.

    Raises:
        UserError: there is no ninja.
    """
    bin_dir = str(Path(sys.executable).parent)  # not resolved: .venv/bin, where python itself is a link
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    if folders[0] != bin_dir:
        os.environ["PATH"] = os.pathsep.join([bin_dir, *(f for f in folders if f != bin_dir)])
    if shutil.which("ninja"):
        return
    if importlib.util.find_spec("ninja"):  # a .venv that sees the system's packages: ninja's script stays there
        import ninja

        os.environ["PATH"] += os.pathsep + ninja.BIN_DIR
    if not shutil.which("ninja"):
        raise UserError(
            f"ninja is missing, DeepSpeed compiles with it; install it: {sys.executable} -m pip install ninja"
        )


def check_toolchain() -> None:
    """Look for what DeepSpeed compiles its CPU operations with, at their first use.

    Raises:
        UserError: no C++ compiler or no Python headers; names the packages of Debian and Fedora.
    """
    wanted = os.environ.get("CXX", "c++")
    if not shutil.which(wanted):
        found = next((name for name in ("g++", "clang++") if shutil.which(name)), None)
        if "CXX" in os.environ or found is None:
            raise UserError(
                f"no C++ compiler ({wanted}) is on PATH, DeepSpeed needs one; "
                "install it: apt-get install g++ (Debian, Ubuntu) or dnf install gcc-c++ (Fedora)"
            )
        os.environ["CXX"] = found
    include = Path(sysconfig.get_path("include"))
    if not (include / "Python.h").is_file():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise UserError(
            f"the headers of Python {version} are missing ({include / 'Python.h'}), DeepSpeed needs them; "
            f"install them: apt-get install python{version}-dev (Debian, Ubuntu) or dnf install python3-devel (Fedora)"
        )


def keep_compiled_ops_here() -> None:
    """Let torch compile into this virtual environment, unless ``TORCH_EXTENSIONS_DIR`` is set.

    Its default, one folder per user, is built anew whenever programs of another environment were run in between.
    """
    if sys.prefix != sys.base_prefix and os.access(sys.prefix, os.W_OK):
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))


def remove_stale_build_locks() -> None:
    """Remove the lock of a compilation that was killed: torch would wait for it for ever, without a word.

    A lock is stale when no process works in its folder, `BUILD_START` seconds after it was made.
    """
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "torch_extensions")
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or default)
    if not Path("/proc/self/cwd").exists():
        return
    for lock in [*root.glob("*/lock"), *root.glob("*/*/lock")]:
        while lock.exists() and str(lock.parent.resolve()) not in _of_processes(lambda p: os.readlink(p / "cwd")):
            with contextlib.suppress(FileNotFoundError):  # its compilation may end at any time
                if abs(time.time() - lock.stat().st_mtime) > BUILD_START:  # or the clock was set back
                    lock.unlink()
            time.sleep(0.2)


def remove_abandoned_buffers() -> None:
    """Remove the shared memory that DeepSpeed's collectives leave behind when ranks are killed while groups form.

    It is 2 to 66 MB a rank, and stays until the machine is restarted. A buffer is abandoned when no process has it
    mapped, `BUILD_START` seconds after it was made; those of other users stay.
    """
    ours = [path for path in SHARED_MEMORY.glob(f"deepspeed_allreduce_buffer_{os.getuid()}_*")
            if abs(time.time() - path.stat().st_mtime) > BUILD_START]  # fmt: skip
    if not ours:
        return
    mapped = "".join(_of_processes(lambda process: (process / "maps").read_text(errors="replace")))
    for path in ours:
        if f"{path}\n" not in mapped:
            path.unlink(missing_ok=True)


def _of_processes(read: Callable[[Path], str]) -> Iterator[str]:
    """What can be read of each process that runs."""
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if process.name.isdigit():
                yield read(process)


def available_cores() -> int:
    """Cores this process may use: its affinity, and below that the container's quota (cgroup v2)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = Path("/sys/fs/cgroup/cpu.max")
    if limit.is_file():
        quota, _, period = limit.read_text().partition(" ")
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def local_ranks() -> int:
    """Ranks on this machine, as the launcher says: ``LOCAL_WORLD_SIZE`` (torchrun) or ``LOCAL_SIZE`` (deepspeed).

    Where neither is set, all ranks are taken to be here.
    """
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE")
    return int(next(filter(None, map(os.environ.get, names)), "1"))


def set_threads() -> None:
    """Set intra-op threads to cores / local ranks, unless ``OMP_NUM_THREADS`` is set.

    The default, every core in every rank, makes two ranks on two cores several times slower than one.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return
    threads = max(1, available_cores() // local_ranks())
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if "torch" in sys.modules:  # too late for the variable, which is read when torch is imported
        sys.modules["torch"].set_num_threads(threads)


def keep_freed_memory() -> None:
    """Let glibc keep up to 2 GiB of freed memory for the next tensors, on a machine without an accelerator.

    By default glibc returns large blocks to the kernel at every free, and the kernel clears each page anew at the next
    use. Blocks above the largest threshold that glibc accepts would still be returned, unless they come from its heap:
    so the heap grows in steps (`GROWN_BY`) that hold the largest gradients. docs/experiments.md has the measurements.
    Settings in the environment (``MALLOC_...``, ``GLIBC_TUNABLES``) are left alone.
    """
    chosen = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if chosen or has_accelerator() or platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
    libc.mallopt(M_TRIM_THRESHOLD, MOST_KEPT)
    libc.mallopt(M_TOP_PAD, GROWN_BY)


def give_back_freed_memory() -> None:
    """Give the system what `keep_freed_memory` keeps, and other free memory: before work that is of another kind."""
    if not has_accelerator() and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def let_segments_grow() -> None:
    """Let the CUDA allocator grow its segments, on a machine with NVIDIA's devices, unless the environment says how.

    Generation and training ask for blocks of other sizes by turns, and between fixed segments more and more memory
    lies idle until there is none: https://docs.pytorch.org/docs/stable/notes/cuda.html, "expandable_segments".
    """
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # of torch from 2.9 on, and its older name
    if has_nvidia() and not any(name in os.environ for name in names):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def attend_without_plans() -> None:
    """Let PyTorch's attention take cuDNN last, on a machine with NVIDIA's devices, unless the environment says how.

    On Hopper and newer it would come first, and it makes a plan for every number of rows and columns that it has not
    seen: of an hour's texts a few thousand, of a response one per token (docs/results.md, "On a GPU").
    """
    if has_nvidia():
        os.environ.setdefault("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")


def has_nvidia() -> bool:
    """Whether a device file of NVIDIA is there, or of a GPU that Windows lends to Linux."""
    return any(next(Path("/dev").glob(pattern), None) for pattern in ("nvidia[0-9]*", "dxg"))


def has_accelerator() -> bool:
    """Whether a device file of a GPU or another accelerator is there."""
    return any(next(Path("/dev").glob(pattern), None) for pattern in ACCELERATOR_DEVICES)


def quiet_libraries() -> None:
    """Silence routine chatter of the libraries; errors and warnings that say something stay."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else a warning at every fork of a data worker
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # else the page reports home at every start
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' too, one for every load of every role
    if sys.platform == "linux" and not has_accelerator():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else each process warns that it takes the CPU
    for pattern in HARMLESS_WARNINGS:
        warnings.filterwarnings("ignore", message=pattern)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it; it misses a kernel that none uses


def compile_ops(offload: bool = False) -> None:
    """Compile DeepSpeed's shared-memory collectives now; on a CPU its first start would, in about half a minute.

    With ``offload`` the optimizer of ``--offload`` too, which takes minutes.
    """
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() != "cpu":
        return  # on a GPU nothing is compiled before an op is used
    for name in ("ShareMemCommBuilder", *(["CPUAdamBuilder"] * offload)):
        builder = get_accelerator().create_op_builder(name)
        if builder is not None and builder.is_compatible():
            builder.load(verbose=False)


def main(argv: Sequence[str]) -> int:
    """Check this machine and compile DeepSpeed's ops, with ``--offload`` that flag's too.

    With ``--before-install`` only look for the compiler.
    """
    if "--before-install" in argv:
        check_toolchain()
        return 0
    prepare_runtime()
    compile_ops("--offload" in argv)
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
