"""Where runs lie: ``output/NAME/step1``, ``step2``, ``dpo``, ``step3``; ``output/latest`` links to the newest run.

A step is finished if its ``summary.json`` exists, which is written last.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import training
from training.utils.errors import UserError
from training.utils.run.files import read_object
from training.utils.run.runtime import local_ranks

STEPS = {
    "step1": "training/step1_supervised_finetuning/main.py",
    "step2": "training/step2_reward_model_finetuning/main.py",
    "dpo": "training/step2_dpo_finetuning/main.py",
    "step3": "training/step3_rlhf_finetuning/main.py",
}
SAYS = {
    "step1": "perplexity_after",
    "step2": "verdicts",
    "dpo": "loss_kind",
    "step3": "reward_after",
}  # in summary.json
# Steps that use a step's output, directly or not: once they have run, a new output of that step needs a run of its own
LATER = {"step1": ("step2", "dpo", "step3"), "step2": ("step3",), "dpo": (), "step3": ()}
# What train.py runs one after the other: SFT, then reward model and PPO, or DPO
PIPELINES = {
    "sft,rm,ppo": ("step1", "step2", "step3"),
    "sft,dpo": ("step1", "dpo"),
    "sft,rm,dpo": ("step1", "step2", "dpo"),
}
TUNED = {"SFT": "step1", "DPO": "dpo", "RLHF": "step3/actor"}  # models to talk to, and where a run has them
OUTPUT_FOLDER, CACHE_FOLDER = "the output folder", "the cache folder"
INSTEAD = {  # of a folder that no flag has named: how to choose another
    OUTPUT_FOLDER: "; name another: --output_dir, or TRIPOD_OUTPUT in the environment",
    CACHE_FOLDER: "; name another: TRIPOD_CACHE in the environment",
}
LATEST = "latest"
RANK_TIMEOUT = 120.0  # seconds that a rank waits for rank 0 to choose the run's folder

LOCK = ".lock"
CHECKPOINTS = "checkpoints"
WRITTEN = (  # files that the steps write
    *("config.json", "README.md", "metrics.jsonl", "health.jsonl", "answers.jsonl", "samples.json"),
    *("reward_stats.json", "actor/config.json", "critic/config.json", "ema/config.json"),
)
SHOWN = ("samples.json", "answers.jsonl")  # what step 3's models have said
EVALUATION = "evaluation.json"  # what a step's evaluate.py has found

_calls = itertools.count()
_held: dict[Path, contextlib.ExitStack] = {}  # locks on folders, which end with the process
_before: dict[Path, str] = {}  # a step's folder -> what latest linked to when it was asked for
_own: set[Path] = set()  # those that no flag has named and no other process looks into


def title(step: str) -> str:
    """A step's name in a sentence."""
    return f"step {step.removeprefix('step')}" if step.startswith("step") else step.upper()


def repository_root() -> Path:
    """The folder that holds train.py, training/ and inference/."""
    return Path(training.__file__).resolve().parents[1]


def python_path() -> str:
    """PYTHONPATH of a process that imports the repository's packages: its root, then what is on the path already."""
    return os.pathsep.join([str(repository_root()), *filter(None, [os.environ.get("PYTHONPATH")])])


def output_root() -> Path:
    """Where runs are made: ``TRIPOD_OUTPUT``, or output/ in the repository."""
    return Path(os.environ.get("TRIPOD_OUTPUT") or repository_root() / "output").expanduser().absolute()


def cache_dir() -> Path:
    """Where converted models and tokenised data are kept: ``TRIPOD_CACHE``, or tripod in the user's cache folder."""
    base = os.environ.get("TRIPOD_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "tripod"
    return Path(base).expanduser()


def shown(path: Path | str) -> str:
    """``path`` as a command in this folder would name it: relative if it lies below, absolute otherwise."""
    full = Path(os.path.abspath(path))
    here = Path.cwd()
    return str(full.relative_to(here)) if full.is_relative_to(here) else str(full)


def with_python(*words: str) -> str:
    """A command of this interpreter, to be pasted in this folder."""
    return shlex.join([shown(sys.executable), *words])


def installing(*packages: str) -> str:
    """The command that installs what is optional, in the versions that are tested, beside the torch that is here."""
    pins = Path(sys.prefix) / "constraints.txt"  # of make setup, which may have kept another torch than the tested one
    pins = pins if pins.is_file() else repository_root() / "constraints.txt"
    return with_python("-m", "pip", "install", *packages, "-c", shown(pins))


def same_command(output_dir: Path) -> str:
    """The command line that goes on with this process's run: its own, with the output folder named.

    Under ``deepspeed`` the launcher is part of it; on several hosts the hostfile is for the user to name.
    """
    arguments = continued([t for t in sys.argv[1:] if not t.startswith("--local_rank")], output_dir)
    ranks = os.environ.get("LOCAL_SIZE")  # set by deepspeed's launcher alone
    launcher = [shown(sys.executable)]
    if ranks:
        one_host = os.environ.get("CROSS_SIZE", "1") == "1"
        launcher = [*deepspeed_launcher(), *(["--num_gpus", ranks] if one_host else ["--hostfile", "HOSTFILE"])]
    return shlex.join([*launcher, shown(sys.argv[0]), *arguments])


def continued(argv: Sequence[str], output_dir: Path) -> list[str]:
    """The same flags, with the output folder named and without ``--resume``: the next start goes on."""
    tokens = list(argv)
    for flag in ("--output_dir", "--resume"):
        while flag in tokens:
            at = tokens.index(flag)
            del tokens[at : at + 2]
        tokens = [t for t in tokens if not t.startswith(f"{flag}=")]
    return [*tokens, "--output_dir", shown(output_dir)]


def deepspeed_launcher() -> list[str]:
    """DeepSpeed's launcher of this interpreter; its script is missing where .venv sees the system's packages."""
    script = Path(sys.executable).with_name("deepspeed")
    return [shown(script)] if script.is_file() else [shown(sys.executable), "-m", "deepspeed.launcher.runner"]


def is_finished(step_dir: Path) -> bool:
    """Whether a step's folder holds its finished output."""
    return os.path.isfile(step_dir / "summary.json")  # of any text that a flag has, however long


def tuned_models(run: Path) -> dict[str, Path]:
    """The models of a run's finished steps that answer, by the names in `TUNED`."""
    return {name: run / path for name, path in TUNED.items() if is_finished(run / path.partition("/")[0])}


def make_dir(path: Path, flag: str = "--output_dir") -> Path:
    """Create ``path`` with its parents and make sure that it can be written.

    Raises:
        UserError: it can not; names ``flag``, and what chooses another.
    """
    instead = INSTEAD.get(flag, "")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag} {path} can not be made: {error.strerror}{instead}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {path} can not be written{instead}")
    return path


def new_run_dir(name: str) -> Path:
    """Create and return ``output/NAME``, or ``NAME-2``, ``NAME-3``, ... where runs of that name are there.

    Raises:
        UserError: the output folder can not be written, or see `check_latest`.
    """
    root = make_dir(output_root(), OUTPUT_FOLDER)
    check_latest(root / name)
    for candidate in itertools.chain([name], (f"{name}-{n}" for n in itertools.count(2))):
        try:
            (root / candidate).mkdir()
        except FileExistsError:  # mkdir decides, so that two runs started together never share a folder
            continue
        return root / candidate
    raise AssertionError("unreachable: there is always a free name")


def named_itself(path: Path) -> Path:
    """The absolute ``path``, with the run that ``output/latest`` links to named itself: the link moves on."""
    path = path.expanduser().absolute()
    for link in (path, *path.parents):
        if link.name == LATEST and link.is_symlink() and _in_output(link):
            return link.parent / os.readlink(link) / path.relative_to(link)
    return path


def _in_output(run: Path) -> bool:
    """Whether a folder is one of those in the output folder, by whatever path, as through a link, that is named."""
    return os.path.realpath(run.parent) == os.path.realpath(output_root())


def check_latest(run: Path) -> None:
    """Refuse a run in the output folder where a folder has, or would have, the name of the link to the newest one.

    Raises:
        UserError: it is there, perhaps by a copy that followed the link, or it is ``run``.
    """
    link = output_root() / LATEST
    if _in_output(run) and not link.is_symlink() and (link.exists() or run.name == LATEST):
        raise UserError(f"{shown(link)} is where the link to the newest run goes: give the folder another name")


def point_latest(run: Path) -> None:
    """Let ``output/latest`` link to ``run``, if that lies in the output folder.

    Raises:
        UserError: see `check_latest`.
    """
    root = output_root()
    if not _in_output(run.absolute()):
        return
    check_latest(run.absolute())
    scratch = root / f".{LATEST}.new"
    try:
        scratch.unlink(missing_ok=True)  # of a program that was killed
        with contextlib.suppress(FileExistsError, FileNotFoundError):  # two programs: either's run is the newest
            scratch.symlink_to(run.name)
            os.replace(scratch, root / LATEST)
    except OSError as error:  # a file system without links, or a folder of another user's
        print(f"note: {shown(root / LATEST)} can not be made: {error.strerror}", flush=True)


def runs_newest_first() -> list[Path]:
    """Every run in the output folder, ``output/latest`` first, then by the time at which a step of it ended last."""
    root = output_root()
    if not root.is_dir():
        return []
    ended: dict[Path, float] = {}
    for run in root.iterdir():
        with contextlib.suppress(FileNotFoundError):  # it is removed meanwhile
            if run.is_dir() and not (run.name == LATEST and run.is_symlink()):
                ended[run] = max(path.stat().st_mtime for path in [*run.glob("*/summary.json")] or [run])
    found = sorted(ended, key=ended.__getitem__, reverse=True)
    latest = root / LATEST
    if latest.is_dir() and latest.is_symlink():
        target = root / os.readlink(latest)
        found = [target, *(p for p in found if p != target)]
    return found


def latest_run(file: str) -> Path:
    """The newest run's folder that holds this file. Folders without it are of single steps, or of runs refused early.

    Raises:
        UserError: there is no run.
    """
    runs = [run for run in runs_newest_first() if (run / file).is_file()]
    if not runs:
        raise UserError(
            f"--resume auto: there is no run in {shown(output_root())} to go on with; name one: --output_dir"
        )
    return runs[0]


def latest_output(step: str) -> Path:
    """The newest run's folder of a finished ``step`` (``"step1"``, ``"step2"``, ``"dpo"`` or ``"step3"``).

    Raises:
        UserError: no run has that step finished; names the command that makes it.
    """
    for run in runs_newest_first():
        if is_finished(run / step):
            return run / step
    command = shlex.join([*deepspeed_launcher(), "--num_gpus", "1", shown(repository_root() / STEPS[step])])
    raise UserError(f"no run in {shown(output_root())} has finished {title(step)}; make it with: {command}")


def step_folder(path: str, step: str) -> Path:
    """The finished output of a step: an evaluation's ``--path``, or the latest run's.

    Raises:
        UserError: it is not there or can not be written, the step has not finished, or it is another step's.
    """
    folder = Path(path).expanduser().absolute() if path else latest_output(step)
    if not folder.is_dir():
        raise UserError(f"--path {path}: no such folder")
    if not is_finished(folder):
        instead = f"; give the step's folder: {shown(folder / step)}" if is_finished(folder / step) else ""
        raise UserError(f"--path {path}: {step} has not finished there (no summary.json){instead}")
    summary = read_object(folder / "summary.json")
    if (of := next((name for name, key in SAYS.items() if key in summary), step)) != step:
        program = f"{Path(STEPS[of]).parent}/evaluate.py"
        raise UserError(f"--path {path}: an output of {title(of)}, not of {title(step)}; give it to {program}")
    return make_dir(folder, "--path")


@contextlib.contextmanager
def locked(folder: Path, who: str) -> Iterator[None]:
    """Keep a second writer out of a run's or a step's folder, as long as this is open or the process lives.

    Raises:
        UserError: one is there, ``who`` in words, or the folder can not be locked.
    """
    with contextlib.ExitStack() as opened:
        try:
            file = opened.enter_context((folder / LOCK).open("a"))
            os.register_at_fork(after_in_child=file.close)  # else a user's worker would hold it when this is killed
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{who} is at work in {shown(folder)}: wait for it, stop it, or choose another") from None
        except OSError as error:  # the lock is another user's, or the file system has none
            why = error.strerror or error
            raise UserError(f"{shown(folder)} can not be locked against another run: {why}; choose another") from None
        yield


def prepare_output_dir(output_dir: str, step: str) -> Path:
    """The folder that a step writes to, created; every rank gets the same one without a process group.

    Args:
        output_dir: the flag's value; empty for the latest run, or for a new one where the latest run already has
            this step or a later one, so that nothing is overwritten.

    Raises:
        UserError: the folder can not be written, holds a finished step, or another process writes to it; or several
            hosts and no ``--output_dir`` to agree on.
    """
    link = output_root() / LATEST
    before = os.readlink(link) if link.is_symlink() else ""
    path = _output_dir(output_dir, step)
    if _rank() == 0 and path not in _held:
        _before[path] = before
        held = contextlib.ExitStack()
        held.enter_context(locked(path, "another run"))
        _held[path] = held
        if not output_dir and os.environ.get("WORLD_SIZE", "1") == "1":
            _own.add(path)
    return path


def take_back() -> None:
    """Undo `prepare_output_dir` for a step that was refused before it began.

    ``output/latest`` links to the run that it linked to before. A folder in which nothing is goes, if no flag has named
    it and no other rank looks for notes in it.
    """
    link = output_root() / LATEST
    for path, before in _before.items():
        if _in_output(path.parent) and link.is_symlink() and os.readlink(link) == path.parent.name != before:
            point_latest(link.parent / before) if before else link.unlink()
        if path in _own and not _has_begun(path):
            with contextlib.suppress(OSError):  # the run's folder holds other steps
                shutil.rmtree(path)
                path.parent.rmdir()


def _has_begun(step_dir: Path) -> bool:
    """Whether there is more in a step's folder than locks and notes."""
    return step_dir.is_dir() and any(not path.name.startswith(".") for path in step_dir.iterdir())


def _output_dir(output_dir: str, step: str) -> Path:
    if output_dir:
        path = named_itself(Path(output_dir))
        if path.name == step:
            check_latest(path.parent)
        make_dir(path)
        if is_finished(path):
            raise UserError(f"--output_dir {output_dir} already holds a finished run; choose another, or remove it")
        if foreign := _foreign(path):
            raise UserError(f"--output_dir {output_dir} holds {foreign}, which no run of this step made and which it "
                            "would write over; choose another folder")  # fmt: skip
        if _rank() == 0 and path.name == step:
            point_latest(path.parent)
        return path
    world, local = int(os.environ.get("WORLD_SIZE", "1")), local_ranks()
    if world == 1:
        return _choose_output_dir(step)
    if world > local:
        raise UserError("several hosts can not agree on a new run: give --output_dir")
    return _agree(step)


def _foreign(folder: Path) -> str:
    """A file of a folder that a step would replace and that none has made, such as a model's; empty if there is none.

    A step's folder has its lock from the first moment on, and checkpoints, wherever it was copied to.
    """
    if (folder / LOCK).exists() or (folder / CHECKPOINTS).is_dir():
        return ""
    return next((name for name in WRITTEN if (folder / name).exists()), "")


def _choose_output_dir(step: str) -> Path:
    latest = output_root() / LATEST
    later = any(_has_begun(latest / name) for name in LATER[step])
    free = latest.is_dir() and latest.is_symlink() and not is_finished(latest / step) and not later
    run = output_root() / os.readlink(latest) if free else new_run_dir("run")
    path = make_dir(run / step, OUTPUT_FOLDER)
    point_latest(run)
    return path


def _agree(step: str) -> Path:
    """Rank 0 chooses; the other ranks of the same launcher read its choice from a file named after the launch."""
    root = make_dir(output_root(), OUTPUT_FOLDER)
    port = os.environ.get("MASTER_PORT", "0")
    note = root / f".launch-{os.getppid()}-{_start_time(os.getppid())}-{port}-{next(_calls)}.json"
    if _rank() == 0:
        for old in root.glob(".launch-*"):
            if abs(time.time() - old.stat().st_mtime) > RANK_TIMEOUT:
                old.unlink(missing_ok=True)
        try:
            choice = {"path": str(_choose_output_dir(step))}
        except UserError as error:
            choice = {"error": str(error)}
        scratch = note.with_suffix(".tmp")
        scratch.write_text(json.dumps(choice), encoding="utf-8")
        os.replace(scratch, note)
    deadline = time.monotonic() + RANK_TIMEOUT
    while not note.exists():
        if time.monotonic() > deadline:
            raise UserError("rank 0 chose no output folder; give --output_dir")
        time.sleep(0.05)
    choice = json.loads(note.read_text(encoding="utf-8"))
    if "error" in choice:
        raise UserError(choice["error"])
    return Path(choice["path"])


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _start_time(pid: int) -> str:
    """Tells a launcher from an earlier one with the same process id; empty where there is no /proc."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.read_text().rpartition(")")[2].split()[19] if stat.is_file() else ""
