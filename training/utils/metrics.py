"""Where numbers go: metrics.jsonl always, TensorBoard or Weights & Biases beside it, a progress bar on rank 0."""

from __future__ import annotations

import html
import json
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from training.utils.run.distributed import is_main
from training.utils.run.files import write_json
from training.utils.run.phases import beat

T = TypeVar("T")


class MetricsLogger:
    """Writes one record per step, on rank 0; silent on the other ranks.

    Args:
        directory: gets ``metrics.jsonl`` and ``tensorboard/``.
        report_to: ``tensorboard``, ``wandb`` or ``none``.
        name: the run's name in Weights & Biases.
        watch: called with every record on rank 0, after it was written.
        done: steps that a resumed run has behind it, None for a new run; what was recorded of later ones is dropped.
        seconds: that they took.
    """

    def __init__(
        self,
        directory: Path,
        report_to: str,
        name: str,
        watch: Callable[[int, Mapping[str, float]], object] | None = None,
        done: int | None = None,
        seconds: float = 0.0,
    ) -> None:
        self._watch = watch
        self._file = self._writer = self._wandb = None
        self._start = time.monotonic() - seconds
        if not is_main():
            return
        mode = "w" if done is None else "a"  # a resumed run has put the file back as it was at its checkpoint
        self._file = open(directory / "metrics.jsonl", mode, encoding="utf-8")  # noqa: SIM115  as long as the run
        if report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=0 if done is None else done + 1)
        elif report_to == "wandb":
            import wandb

            self._wandb = wandb.init(
                project="tripod",
                name=name,
                dir=str(directory),
                id=_wandb_id(directory, done is not None),
                resume="allow",
            )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record scalars of one optimizer step or iteration."""
        if self._file is None:
            return
        record = {"step": step, "time": round(time.monotonic() - self._start, 3), **values}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)
        if self._watch is not None:
            self._watch(step, values)

    def text(self, step: int, name: str, content: str) -> None:
        """Record a text, such as a sample answer or a table in Markdown."""
        if self._writer is not None:
            self._writer.add_text(name, content, step)
        if self._wandb is not None:  # which shows no Markdown, and a model wrote the text
            import wandb

            shown = f'<pre style="white-space: pre-wrap">{html.escape(content)}</pre>'
            self._wandb.log({name: wandb.Html(shown)}, step=step)

    def close(self) -> None:
        """Flush and close every sink."""
        if self._file is not None:
            self._file.close()
        if self._writer is not None:
            self._writer.close()
        if self._wandb is not None:
            self._wandb.finish()


def _wandb_id(directory: Path, resumed: bool) -> str:
    """The run's identity in Weights & Biases: kept beside its metrics, so that a resumed run goes on with its own."""
    file = directory / "wandb_run_id.txt"
    if resumed and file.is_file():
        return file.read_text(encoding="utf-8").strip()
    fresh = secrets.token_hex(4)
    file.write_text(f"{fresh}\n", encoding="utf-8")
    return fresh


def progress_bar(total: int, description: str, done: int = 0) -> Any:
    """A progress bar with ETA on rank 0; one that shows nothing elsewhere."""
    return tqdm(total=total, initial=done, desc=description, dynamic_ncols=True, disable=not is_main(), mininterval=0.5)


def watched(items: Sequence[T], description: str) -> Iterable[T]:
    """The items, with a bar on rank 0 that appears when they take more than two seconds and leaves when they end."""
    for item in tqdm(
        items, desc=description, dynamic_ncols=True, disable=not is_main(), delay=2, leave=False, mininterval=0.5
    ):
        beat()
        yield item


def write_summary(directory: Path, summary: Mapping[str, Any]) -> None:
    """Write ``summary.json`` whole or not at all; its presence says that the step is finished."""
    if is_main():
        write_json(directory / "summary.json", summary)
