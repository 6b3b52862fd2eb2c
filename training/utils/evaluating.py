"""What the steps' evaluate.py programs share: which model and rows, intervals, tables, evaluation.json."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from training.utils import arguments
from training.utils.distributed import say
from training.utils.manifest import read_manifest, write_json
from training.utils.runs import repository_root, shown

EVALUATION_FILE = "evaluation.json"
RESAMPLES = 2000  # of each bootstrap
Z95 = 1.959964
FEW_ROWS = 30  # fewer are too few for a bootstrap


def recorded_arguments(
    folder: Path, groups: Sequence[type], aliases: Mapping[str, str] | None = None
) -> dict[type, Any]:
    """The flags that a step was run with, from its summary or train.py's manifest; defaults where neither has them.

    A relative path among them is made absolute if it is found: in the folder that the step was started in, the
    repository, the folders around the run, or here.

    Args:
        folder: the step's output.
        groups, aliases: of the step's program.

    Returns:
        Group -> its flags.
    """
    found = read_manifest(folder / "summary.json").get("run_with")
    if found is None:
        found = read_manifest(folder.parent / "manifest.json").get("steps", {}).get(folder.name, {})
    started = [Path(found["folder"])] if "folder" in found else []
    folders = [*started, repository_root(), folder.parent, *folder.parent.parents, Path.cwd()]
    argv = [_located(token, folders) for token in found.get("arguments", [])]
    parsed = arguments.parse(groups, argv, prog=folder.name, description="", aliases=aliases)
    return dict(zip(groups, parsed, strict=True))


def _located(token: str, folders: Sequence[Path]) -> str:
    """A recorded flag or value with its relative path, perhaps with ``:N`` or ``:name`` behind it, made absolute."""
    flag, equals, value = token.partition("=") if token.startswith("--") else ("", "", token)
    path, colon, suffix = value.partition(":")
    if not ("/" in path or "." in path):
        return token
    found = next((folder / path for folder in folders if os.path.exists(folder / path)), None)
    return token if found is None else f"{flag}{equals}{found}{colon}{suffix}"


def data_arguments(given: arguments.DataArguments, recorded: arguments.DataArguments) -> arguments.DataArguments:
    """The data flags given to the evaluation; without any, those that the step was run with.

    The latter without template and system message: the saved tokenizer has them, and their file may be gone.
    """
    own = replace(recorded, chat_template="", system_message="")
    chosen = own if given == arguments.DataArguments() else given
    say(f"held-out rows of: {' '.join(chosen.eval_data_path or chosen.data_path)}")
    return chosen


def write_evaluation(folder: Path, content: Mapping[str, Any]) -> Path:
    """Write ``evaluation.json`` whole or not at all; one that is there is kept under the next free number."""
    path = folder / EVALUATION_FILE
    if path.exists():
        number = 1
        while (earlier := folder / f"evaluation-{number}.json").exists():
            number += 1
        path.rename(earlier)
        say(f"the earlier {EVALUATION_FILE} is kept as {shown(earlier)}")
    write_json(path, content)
    say(f"written to {shown(path)}")
    return path


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean of at least one value."""
    return sum(values) / len(values)


def bootstrap_interval(values: Sequence[float], weights: Sequence[float] | None = None, *, seed: int) -> list[float]:
    """95% percentile bootstrap interval of a mean over rows (Efron and Tibshirani 1993, chapter 13).

    Args:
        values: one for each row; with ``weights``, each row's sum.
        weights: each row's count, for a mean over its parts, such as the tokens of a response.
        seed: of the resamples.

    Returns:
        Lower and upper end.
    """
    value = torch.tensor(values, dtype=torch.float64)
    weight = torch.ones_like(value) if weights is None else torch.tensor(weights, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(value), (RESAMPLES, len(value)), generator=generator)
    means = value[draws].sum(1) / weight[draws].sum(1).clamp(min=1e-12)
    return torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()


def wilson_interval(share: float, count: int) -> list[float]:
    """95% interval of a share (Wilson 1927): unlike the bootstrap's it is not a point where every row is right."""
    centre = share + Z95**2 / (2 * count)
    half = Z95 * math.sqrt(share * (1 - share) / count + Z95**2 / (4 * count**2))
    scale = 1 + Z95**2 / count
    return [max((centre - half) / scale, 0.0), min((centre + half) / scale, 1.0)]


def share_interval(values: Sequence[float], *, seed: int) -> list[float]:
    """95% interval of a mean of shares, each 0 to 1: the bootstrap's, below `FEW_ROWS` rows Wilson's.

    The bootstrap of a few rows is too narrow, and a point where they all agree. Wilson's takes each for a yes or a no,
    which no share between them spreads more than.
    """
    if len(values) < FEW_ROWS:
        return wilson_interval(mean(values), len(values))
    return bootstrap_interval(values, seed=seed)


def correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Pearson's correlation; 0 where one of the two does not vary."""
    x, y = (torch.tensor(values, dtype=torch.float64) for values in (a, b))
    x, y = x - x.mean(), y - y.mean()
    spread = (x.norm() * y.norm()).item()
    return (x @ y).item() / spread if spread > 0 else 0.0


def histogram(values: Sequence[float], bins: int = 20) -> dict[str, list[float]]:
    """``edges`` (one more than bins, from the least to the greatest value) and ``counts``."""
    low, high = min(values), max(values)
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts, edges = torch.histogram(torch.tensor(values, dtype=torch.float64), bins=bins, range=(low, high))
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def table(rows: Sequence[Sequence[Any]]) -> str:
    """Rows of cells in columns, the first left-aligned; floats with three decimals, pairs of them as intervals."""
    texts = [[cell_text(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in texts) for i in range(len(texts[0]))]
    return "\n".join(
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in texts
    )


def cell_text(cell: Any) -> str:
    """A cell of `table`."""
    if isinstance(cell, float):
        return f"{cell:.3f}"
    if isinstance(cell, list):
        return f"[{', '.join(cell_text(part) for part in cell)}]"
    return "" if cell is None else str(cell)
