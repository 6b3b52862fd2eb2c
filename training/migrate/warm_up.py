"""A warm-up that is a share of all optimizer steps, as a number of them: their rows are counted."""

from __future__ import annotations

import math
from collections.abc import Sequence

from training.migrate.program import Translation
from training.utils.errors import UserError


def count_rows(sources: Sequence[str]) -> int | None:
    """The rows of sources on this machine; None where one is not here, or the shell's to say."""
    from training.utils.data.reading.sources import local_source  # its imports take a moment

    total = 0
    for source in sources:
        try:
            found = None if "$" in source else local_source(source, "demonstrations")
            if found is None:
                return None
            total += sum(1 for _ in found.rows(False))
        except UserError:
            return None
    return total


def settle_warm_up(t: Translation, share: float, batch: int, accumulation: int, why: str, *, whole: bool) -> None:
    """Set ``--num_warmup_steps`` to a share of all steps, or say how it is computed.

    Args:
        t: with ``--data_path`` and ``--num_train_epochs`` among its values.
        share: of the optimizer steps of all epochs.
        batch, accumulation: rows of a rank, or of the ranks that take rows together, in a micro-batch, and
            micro-batches in a step.
        why: their flag, or where it stands.
        whole: an epoch leaves rows out that fill no batch, and the share is rounded down; else up, as the Trainer does.
    """
    if "--num_warmup_steps" in t.values or share == 0:
        return
    together = math.prod(int(t.values.get(flag, ["1"])[0]) for flag in ("--tensor_parallel", "--sequence_parallel"))
    epochs, rows = int(t.values.get("--num_train_epochs", ["1"])[0]), batch * max(t.ranks // together, 1)
    shared = f" / {together}" if together > 1 else ""
    divisor = f"{rows * accumulation}" if t.ranks else f"({rows * accumulation} x ranks{shared})"
    data = t.values.get("--data_path", [])
    if read := count_rows(data) if data and t.ranks else None:
        steps = epochs * max((read // rows if whole else math.ceil(read / rows)) // accumulation, 0 if whole else 1)
        counted = math.floor(share * steps) if whole else math.ceil(share * steps)
        t.set("--num_warmup_steps", counted, f"{why}: {share:g} x {steps} steps, {epochs} epochs of {read} rows")
        return
    t.lines.append(
        f"{why} is not set, as the {'rows of ' + ' '.join(data) if t.ranks else 'ranks of all hosts'} can not be "
        f"counted here: add --num_warmup_steps N, N = {share:g} x {epochs} x rows / {divisor}"
    )
