"""The pre-training mix: a language modelling loss beside PPO's, so that the actor does not forget how to write.

PPO-ptx of Ouyang et al. 2022 (arXiv 2203.02155, equation 2). The loss is the mean over the tokens of a batch of
pre-training rows, as many rows as an optimizer step of PPO has, times ``--unsup_coef``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from training.utils.data.batches import epoch_batches
from training.utils.engine import engine as engines
from training.utils.model.language_modelling import micro_batches, negative_log_likelihood, predicted_tokens


@dataclass(eq=False)
class PretrainingMix:
    """Rows of plain text that the actor goes on learning.

    The batch of an optimizer step follows from the step's number, so a resumed run takes the same.

    Args:
        dataset: from `training.utils.data.prepare.prepare_pretraining`.
        coefficient: weight of the loss.
        rows: of an optimizer step, over all ranks.
        micro_batch_size: rows of a rank in one forward.
        pad_id, device: see `training.utils.model.language_modelling.micro_batches`.
        seed: of the order.
    """

    dataset: Any
    coefficient: float
    rows: int
    micro_batch_size: int
    pad_id: int
    device: torch.device
    seed: int

    def __post_init__(self) -> None:
        self._tokens = predicted_tokens(self.dataset)
        self._epoch = -1
        self._batches: list[list[int]] = []

    def batch(self, number: int) -> list[int]:
        """The rows of an optimizer step, over all ranks."""
        epoch, index = divmod(number, -(-len(self.dataset) // self.rows))
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, epoch_batches(self.dataset["length"], self.rows, self.seed, epoch)
        return self._batches[index]

    def backward(self, engine: Any, number: int) -> tuple[float, float]:
        """Accumulate the gradient of a step's loss in the actor's engine.

        Args:
            engine: of the actor, in training mode.
            number: of the optimizer step.

        Returns:
            This rank's sum of the negative log-likelihoods in nats, without the coefficient, and its tokens.
        """
        indices = self.batch(number)
        tokens, total, mine = sum(self._tokens[i] for i in indices), 0.0, 0.0
        for batch in micro_batches(self.dataset, indices, self.micro_batch_size, self.pad_id, self.device):
            loss = negative_log_likelihood(engine, batch)
            engines.backward(engine, self.coefficient * loss, tokens)
            total += loss.item()
            mine += batch["response_mask"][:, 1:].sum().item()
        return total, mine
