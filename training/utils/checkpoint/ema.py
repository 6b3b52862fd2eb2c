"""An exponential moving average of a role's weights, kept in fp32 beside the masters, sharded as they are.

Averaged weights forget the noise of the last steps; InstructGPT and DeepSpeed-Chat keep such a copy of the actor. Each
rank averages the parts of the masters that it holds, so the average costs 4 bytes for each trained parameter, divided
by the ranks, and no communication. Parameters that do not train are those of the role itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.utils.checkpoint.engine_state import MASTER, SavedParts, masters, replace_masters, written_parts

DECAY = 0.992  # DeepSpeed-Chat's and InstructGPT's


class MovingAverage:
    """The average of an engine's trained weights; it starts as they are now.

    Args:
        engine: of the role.
        decay: share of the average that each update keeps.
    """

    def __init__(self, engine: Any, decay: float = DECAY) -> None:
        self.engine = engine
        self.decay = decay
        self._values = {(part.name, part.start): part.values[MASTER].detach().clone() for part in masters(engine)}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are after an optimizer step."""
        for part in masters(self.engine):
            self._values[part.name, part.start].lerp_(part.values[MASTER], 1 - self.decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the engine's weights are the average, to be saved; afterwards they are its own again, bit for bit.

        A collective. Train nothing inside.
        """
        own = {(part.name, part.start): part.values[MASTER].detach().clone() for part in masters(self.engine)}
        replace_masters(self.engine, self._values)
        try:
            yield
        finally:
            replace_masters(self.engine, own)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What this rank writes to a checkpoint: (key, a copy in CPU memory)."""
        for part in written_parts(self.engine, moments=False):
            yield part.key(MASTER), self._values[part.name, part.start].to("cpu", copy=True)

    def load(self, files: list[Path]) -> None:
        """Take the average from a checkpoint's files, written by any number of ranks."""
        saved = SavedParts(files)
        for part in masters(self.engine):
            self._values[part.name, part.start].copy_(saved.read(part, MASTER))
