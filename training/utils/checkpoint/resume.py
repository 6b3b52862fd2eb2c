"""Exact resume: what the next step depends on is saved every ``--save_every`` steps and taken up by ``--resume``.

A step program opens its run before it loads a model, loads the checkpoint into its engines before its loop, and calls
`Run.after_step` after each step::

    run = Run.open(...)                            # finds the checkpoint and refuses one of another run
    run.load({"model": engine})                    # engines, random numbers, metrics.jsonl
    progress = run.progress or {...}               # the program's own state, as it was saved
    run.ready(progress)                            # from now on a signal ends the run with a checkpoint
    for number, batch in batches(after=run.step):
        ...
        run.after_step(number, progress)           # saves when it is time, and when the run is asked to stop

Data order is a function of seed and step, and rollouts draw from counters, so a position is a number. How the files are
made is told in `store`, how engines are kept in `engine_state`, what makes a run the same in `same_run`.
"""

from __future__ import annotations

import base64
import json
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from safetensors.torch import save

from training.utils.arguments import ReliabilityArguments
from training.utils.checkpoint import same_run, store
from training.utils.checkpoint.ema import MovingAverage
from training.utils.checkpoint.engine_state import engine_counters, engine_tensors, load_engine
from training.utils.engine.engine import SkipGuard
from training.utils.errors import RunStopped, UserError
from training.utils.run.distributed import (
    asked_to_stop,
    barrier,
    gather_objects,
    is_main,
    long_work,
    rank,
    say,
    world_size,
)
from training.utils.run.files import set_aside
from training.utils.run.folders import EVALUATION, SHOWN, same_command, shown
from training.utils.run.phases import beat
from training.utils.run.watchdog import loop_begins

METRICS = "metrics.jsonl"
BEST = "best"  # folder of the best model so far, beside the checkpoints
SHARD_BYTES = 1 << 30  # tensors of a rank are written in files of about this size, so that copies in memory stay small

T = TypeVar("T")


class Run:
    """One run of a step program, new or taken up.

    Attributes:
        step: steps (step 3: iterations) that are done.
        done: the same where the program goes on from its own state, None where it begins.
        batches: as given to `open`; those of the checkpoint where other ranks go on with it.
        seconds: that the run took before.
        progress: what the program gave to `after_step` last; empty in a new run.
        guard: counts skipped steps; the program tells it of every step before `after_step`.
    """

    def __init__(
        self,
        output_dir: Path,
        settings: ReliabilityArguments,
        description: dict[str, Any],
        checkpoint: Path | None,
        state: dict[str, Any],
    ) -> None:
        self.output_dir = output_dir
        self.folder = output_dir / store.FOLDER
        self.settings = settings
        self.step: int = state.get("step", 0)
        self.batches: dict[str, int] = state.get("run", description)["batches"]
        self.seconds: float = state.get("seconds", 0.0)
        self._description = description | {"batches": self.batches}
        self.progress: dict[str, Any] = state.get("progress", {})
        self.done = self.step if self.progress else None
        self.guard = SkipGuard(state.get("skipped_in_a_row", 0))
        self._start = time.monotonic() - self.seconds
        self._checkpoint, self._state = checkpoint, state
        self._engines: dict[str, Any] = {}
        self._averages: dict[str, MovingAverage] = {}
        latest = checkpoint is not None and store.candidates(self.folder)[:1] == [checkpoint]
        self._saved_at = self.step if latest else -1  # an earlier one, or another folder's, is not what comes next
        # Of metrics.jsonl and of random numbers, when the last step was done: what comes later is done again
        self._metrics_bytes, self._random = 0, dict[str, Any]()

    @classmethod
    def open(
        cls,
        step: str,
        output_dir: Path,
        settings: ReliabilityArguments,
        groups: Sequence[Any],
        *,
        models: Mapping[str, str],
        data: Mapping[str, Any],
        batches: Mapping[str, int],
    ) -> Run:
        """Find what ``--resume`` names and check that it belongs to this run; a collective.

        Args:
            step: ``step1``, ``step2``, ``dpo`` or ``step3``.
            output_dir: the step's folder; checkpoints lie in it.
            settings: the shared flags.
            groups, models, data, batches: see `training.utils.checkpoint.same_run.describe`.

        Raises:
            UserError: nothing whole is there that could be resumed, or it is of another run; or hosts differ.
        """
        description = same_run.describe(step, groups, models, data, batches)
        same_run.refuse_other_ranks(gather_objects([description]))
        checkpoint = _choose(output_dir, settings.resume)
        state: dict[str, Any] = {}
        if checkpoint is not None:
            state = store.read_state(checkpoint)
            named = settings.resume != "auto"
            same_run.refuse_other_run(state["run"], description, Path(shown(checkpoint)), named=named)
            say(f"going on from {shown(checkpoint)}, step {state['step']}")
            if reasons := same_run.inexact_because(state["run"], description):
                say(f"  equal to an uninterrupted run up to rounding, not bit for bit: {', '.join(reasons)}")
        return cls(output_dir, settings, description, checkpoint, state)

    def earlier_starts(self) -> dict[str, dict[str, float]]:
        """The time of the starts that this one goes on from, as a phase of the summary; empty for a new run."""
        return {"earlier starts": {"seconds": round(self.seconds, 3)}} if self.seconds else {}

    def load(self, engines: Mapping[str, Any], averages: Mapping[str, MovingAverage] | None = None) -> None:
        """Put the checkpoint into new engines, and files back as they were; a new run starts clean; a collective.

        Args:
            engines: name -> engine of every role that trains.
            averages: name -> moving average, under names of their own.

        Raises:
            UserError: the checkpoint is gone, or of another model.
        """
        self._engines, self._averages = dict(engines), dict(averages or {})
        if self._checkpoint is None:
            self._note()
            if is_main():
                shutil.rmtree(self.output_dir / BEST, ignore_errors=True)
                for name in (METRICS, *SHOWN):  # of a run that was here before, which is finished no more
                    (self.output_dir / name).unlink(missing_ok=True)
                set_aside(self.output_dir / EVALUATION)
                if removed := store.remove_all(self.folder):
                    say(f"starting over: {removed} checkpoints of an earlier run were removed")
            barrier()
            return
        try:
            self._read(self._checkpoint)
        except FileNotFoundError as error:  # while the model was loaded, or the checkpoint was read
            gone = f"{shown(self._checkpoint)} is gone: is another run at work there? Stop that one first"
            raise UserError(gone) from error
        barrier()
        self._note()

    def _read(self, checkpoint: Path) -> None:
        for name, engine in self._engines.items():
            load_engine(engine, _shards(checkpoint, name), self._state["engines"][name])
        for name, average in self._averages.items():
            average.load(_shards(checkpoint, name))
        _set_random_state(self._state["random"][rank() % len(self._state["random"])])
        if is_main():
            self._restore_files(checkpoint)

    def _restore_files(self, checkpoint: Path) -> None:
        """metrics.jsonl and the best model as they were, whatever was written after the checkpoint."""
        shutil.copyfile(checkpoint / METRICS, self.output_dir / METRICS)
        best = self.output_dir / BEST
        shutil.rmtree(best, ignore_errors=True)
        for file in sorted((checkpoint / BEST).rglob("*")):
            if file.is_file():
                target = best / file.relative_to(checkpoint / BEST)
                target.parent.mkdir(parents=True, exist_ok=True)
                store.link_file(file, target)

    def after_step(self, number: int, progress: dict[str, Any]) -> None:
        """Count a step as done, and save if it is time to.

        Args:
            number: of steps done, from 1.
            progress: the program's own state, as JSON.

        Raises:
            UserError: the disk is full or can not be written.
        """
        self.step, self.progress = number, progress
        self._note()
        beat(step=number)
        if self.settings.save_every and number % self.settings.save_every == 0:
            self.save(progress)
            beat("training")
        self.stop_if_asked()

    def ready(self, progress: dict[str, Any]) -> None:
        """The loop begins: from now on a signal ends the run with a checkpoint.

        Args:
            progress: the program's own state, as JSON, before its next step.
        """
        self.progress = progress
        self._note()
        beat("training", self.step)
        loop_begins()

    def _note(self) -> None:
        metrics = self.output_dir / METRICS
        self._metrics_bytes, self._random = metrics.stat().st_size if metrics.is_file() else 0, _random_state()

    def stop_if_asked(self) -> None:
        """End the run if any rank has got a signal, where the engines stand as after the last step; a collective.

        Raises:
            RunStopped: after a checkpoint was written.
        """
        if number := asked_to_stop(self._device()):
            self.stop_by(number)

    def stop_by(self, number: int) -> NoReturn:
        """End the run, by a signal that all ranks know of, where the engines stand as after the last step.

        Raises:
            RunStopped: after a checkpoint was written.
        """
        self._stop(f"stopped by {signal.Signals(number).name} after step {self.step}", 128 + number)

    def stop_if(self, reason: str, advice: str) -> None:
        """End the run for a reason that all ranks know; does nothing without one.

        Raises:
            RunStopped: with the reason and the advice, after a checkpoint was written.
        """
        if reason:
            self._stop(f"stopped after step {self.step}: {reason}; {advice}", 1)

    def _stop(self, why: str, code: int) -> NoReturn:
        target = self.folder / store.checkpoint_name(self.step)
        if self._saved_at != self.step:
            target = self.save(self.progress)
        raise RunStopped(f"{why}; checkpoint: {shown(target)}\nto go on: {same_command(self.output_dir)}", code)

    def _device(self) -> torch.device:
        return next(iter(self._engines.values())).device

    def save(self, progress: dict[str, Any]) -> Path:
        """Write a checkpoint; a collective.

        Raises:
            UserError: the disk is full or can not be written; the checkpoint before this one is intact.
        """
        target = self.folder / store.checkpoint_name(self.step)
        scratch = self.folder / f".saving-{target.name}"
        self._together(target, lambda: store.scratch_folder(self.folder, self.step) if is_main() else None)
        entries = self._together(target, lambda: self._write_tensors(scratch))
        states = gather_objects([self._random])
        counters = {name: engine_counters(engine) for name, engine in self._engines.items()}

        def publish() -> None:
            """Rank 0 writes what is not a tensor and makes the checkpoint the latest."""
            if not is_main():
                return
            state = {
                "run": self._description,
                "step": self.step,
                "seconds": time.monotonic() - self._start,
                "engines": counters,
                "random": states,
                "progress": progress,
                "skipped_in_a_row": self.guard.in_a_row,
            }
            files = {name: entry for part in entries for name, entry in part.items()}
            files |= self._write_files(scratch)
            files[store.STATE] = store.write_file(scratch / store.STATE, json.dumps(state).encode())
            store.publish(scratch, files, self.step, self.settings.keep_last)

        self._together(target, publish)
        self._saved_at = self.step
        say(f"step {self.step}: checkpoint in {shown(target)}")
        return target

    def _together(self, target: Path, work: Callable[[], T]) -> list[T]:
        """Do a part of saving on every rank; if it fails on one it fails on all, and leaves nothing behind."""
        failure, result = "", None
        with long_work():  # a slow disk may take longer than a collective waits
            try:
                result = work()
            except OSError as error:
                failure = f"rank {rank()}: {error.strerror or error}"
        outcomes = gather_objects([(failure, result)])
        failures = [text for text, _ in outcomes if text]
        if not failures:
            return [value for _, value in outcomes]
        if is_main():
            shutil.rmtree(self.folder / f".saving-{target.name}", ignore_errors=True)
        whole = [p for p in store.candidates(self.folder) if p != target]
        intact = f"; {shown(whole[0])} is intact" if whole else ""
        raise UserError(f"the checkpoint {shown(target)} could not be written: {failures[0]}{intact}")

    def _write_tensors(self, scratch: Path) -> dict[str, store.Entry]:
        """This rank's files of every engine and average, each of about `SHARD_BYTES`."""
        files: dict[str, store.Entry] = {}
        tensors: dict[str, Iterator[tuple[str, torch.Tensor]]]
        tensors = {name: engine_tensors(engine) for name, engine in self._engines.items()}
        tensors |= {name: average.tensors() for name, average in self._averages.items()}
        for name, parts in tensors.items():
            pending: dict[str, torch.Tensor] = {}

            def flush(name: str = name, pending: dict[str, torch.Tensor] = pending) -> None:
                """Write the tensors that are pending into a file of their own."""
                number = sum(1 for file in files if file.startswith(f"{name}-rank"))
                file = f"{name}-rank{rank():04d}-{number:04d}.safetensors"
                files[file] = store.write_file(scratch / file, save(pending))
                pending.clear()

            for key, tensor in parts:
                beat("saving a checkpoint")
                pending[key] = tensor
                if sum(t.nbytes for t in pending.values()) >= SHARD_BYTES:
                    flush()
            if pending:
                flush()
        return files

    def _write_files(self, scratch: Path) -> dict[str, store.Entry]:
        """metrics.jsonl as it was when the last step was done, and the best model so far."""
        metrics = self.output_dir / METRICS
        lines = metrics.read_bytes()[: self._metrics_bytes] if metrics.is_file() else b""
        files = {METRICS: store.write_file(scratch / METRICS, lines)}
        for file in sorted((self.output_dir / BEST).rglob("*")):
            if file.is_file():
                name = str(file.relative_to(self.output_dir))
                (scratch / name).parent.mkdir(parents=True, exist_ok=True)
                files[name] = store.link_file(file, scratch / name)
        return files


def _shards(checkpoint: Path, name: str) -> list[Path]:
    """The files with the tensors of an engine or an average, of all ranks.

    Raises:
        FileNotFoundError: there are none.
    """
    if not (found := sorted(checkpoint.glob(f"{name}-rank*.safetensors"))):
        raise FileNotFoundError(checkpoint)
    return found


def _choose(output_dir: Path, wanted: str) -> Path | None:
    """The checkpoint that ``--resume`` means, found whole by all ranks together; None to start from the beginning."""
    if wanted == "never":
        return None
    found = gather_objects([store.meant(output_dir, wanted)])[0]  # rank 0's list, whatever changes meanwhile
    if not found or not found[0].is_dir():
        if wanted == "auto":
            return None
        raise UserError(f"--resume {wanted}: there is no checkpoint")
    for checkpoint in found:
        problems = _problems(checkpoint)
        if not problems:
            return checkpoint
        say(f"{shown(checkpoint)} is damaged: {problems[0]}")
    hint = "name another" if found == [Path(wanted).expanduser().absolute()] else "give --resume never to start over"
    raise UserError(f"no checkpoint in {shown(found[-1].parent)} is whole ({shown(found[-1])}: {problems[0]}); {hint}")


def _problems(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint; the ranks share the work of reading it."""
    try:
        files = store.read_index(checkpoint)
    except ValueError as error:
        return gather_objects([str(error)])
    mine = dict(list(files.items())[rank() :: world_size()])
    return gather_objects(list(store.damage(checkpoint, mine)))


def resume_output_dir(resume: str, output_dir: str) -> str:
    """Where a step writes: ``--output_dir``, or without it the folder of the checkpoint that ``--resume`` names.

    Raises:
        UserError: ``--resume`` names nothing.
    """
    if resume in ("auto", "never"):
        return output_dir
    path = Path(resume).expanduser()
    if not path.is_dir():
        raise UserError(f"--resume {resume}: no such folder; give a checkpoint, a step's folder, auto or never")
    if output_dir:
        return output_dir
    parents = [p.parent for p in (path.absolute(), *path.absolute().parents) if p.name == store.FOLDER]
    return str(parents[0] if parents else path)


def _random_state() -> dict[str, Any]:
    """This rank's random number generators, as JSON."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [kind, _text(np.asarray(keys).tobytes()), int(position), int(has_gauss), float(cached)],
        "torch": _text(torch.get_rng_state().numpy().tobytes()),
        "device": _text(get_accelerator().get_rng_state().cpu().numpy().tobytes()),
    }


def _set_random_state(state: Mapping[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.frombuffer(_bytes(keys), dtype=np.uint32), position, has_gauss, cached))
    device = torch.frombuffer(bytearray(_bytes(state["device"])), dtype=torch.uint8)
    if device.numel() == get_accelerator().get_rng_state().numel():  # else the checkpoint is of another kind of device
        get_accelerator().set_rng_state(device)
    torch.set_rng_state(torch.frombuffer(bytearray(_bytes(state["torch"])), dtype=torch.uint8))


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _bytes(text: str) -> bytes:
    return base64.b64decode(text)
