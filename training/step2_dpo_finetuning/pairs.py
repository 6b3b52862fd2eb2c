"""Pairs of answers through policy and reference: their log-probs, their losses, and how far the two have parted.

What is said of answers stands in tensors ``[2, P]``: the chosen ones, then the rejected ones of P pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from training.step2_dpo_finetuning import dpo
from training.utils.arguments import WITHOUT_REFERENCE, DPOArguments
from training.utils.data.batches import (
    SIDES,
    element_lengths,
    epoch_batches,
    pair_micro_batches,
    rank_micro_batches,
    rankings_of,
    spread_rows,
)
from training.utils.metrics import watched
from training.utils.model.forward import answer_sums, reference_policy, response_kl
from training.utils.run.distributed import data_rank, data_size, gather_rows, reduce_sums
from training.utils.sharing.rows import Sharing

Batch = dict[str, Tensor]
KL_PROMPTS = 64  # held-out prompts whose chosen answers tell the KL: it needs all logits of both models


def answer_log_probs(model: Any, batch: Batch) -> Tensor:
    """Log-prob of each whole answer of the batch's pairs, ``[2, P]`` fp32."""
    return answer_sums(model, batch)[torch.stack([batch[side] for side in SIDES])]


def answer_tokens(batch: Batch) -> Tensor:
    """Tokens of each answer, ``[2, P]``; nothing predicts a first token of a row, so it does not count."""
    return batch["response_mask"][:, 1:].sum(1)[torch.stack([batch[side] for side in SIDES])]


@dataclass(frozen=True)
class Preferences:
    """A policy, its reference and a loss.

    Args:
        engine: the policy's.
        frozen: see `training.utils.engine.frozen.load_reference`.
        settings: the loss and its constants.
        sharing: whether both forward what answers begin with once, see `collate_answers`.
    """

    engine: Any
    frozen: Any
    settings: DPOArguments
    sharing: Sharing | None = None

    def reference(self, batch: Batch) -> Tensor | None:
        """`answer_log_probs` of the reference, None for a loss without one.

        In evaluation mode, and before the first backward of an optimizer step: DeepSpeed counts forwards in training.
        """
        if self.settings.loss in WITHOUT_REFERENCE:
            return None
        self.engine.eval()
        with reference_policy(self.engine, self.frozen) as model:
            return answer_log_probs(model, batch)

    def judge(
        self, policy: Tensor, reference: Tensor | None, tokens: Tensor, drift: Sequence[float]
    ) -> dict[str, Tensor]:
        """What is known of each pair.

        Args:
            policy, reference, tokens: ``[2, P]``.
            drift: see `dpo.pair_loss`.

        Returns:
            Name of a metric -> ``[P]``; ``loss`` has the gradient.
        """
        settings, beta = self.settings, self.settings.strength
        chosen, rejected = dpo.scores(settings.loss, policy, reference, tokens)
        constants = {"beta": beta, "label_smoothing": settings.label_smoothing, "gamma": settings.margin}
        losses = dpo.pair_loss(settings.loss, chosen, rejected, **constants, drift=drift)
        found = {
            "loss": losses,
            "accuracy": (chosen > rejected).float() + 0.5 * (chosen == rejected).float(),
            "margin": beta * (chosen - rejected),
            "chosen_reward": beta * chosen,
            "rejected_reward": beta * rejected,
            "chosen_log_prob": policy[0],
            "rejected_log_prob": policy[1],
        }
        found["chosen_per_token"] = policy[0] / tokens[0]
        if reference is not None:
            found["chosen_change"] = (policy[0] - reference[0]) / tokens[0]
        return found

    @torch.no_grad()
    def drift(self, batches: Sequence[Batch], references: Sequence[Tensor | None], count: int) -> list[float]:
        """kto's drift of an optimizer step: mean scores of all chosen and all rejected answers, at least 0; else zeros.

        It must be known before the first backward, so kto takes one forward more than the other losses. A collective.

        Args:
            batches: this rank's micro-batches.
            references: of each.
            count: pairs (rankings) of the step on all ranks.
        """
        if self.settings.loss != "kto":
            return [0.0, 0.0]
        self.engine.eval()
        sums = torch.zeros(2, dtype=torch.float64)
        for batch, reference in zip(batches, references, strict=True):
            assert reference is not None
            scores = answer_log_probs(self.engine, batch) - reference
            sums += (batch["weights"] * scores).sum(1).double().cpu()
        chosen, rejected = sums.tolist()
        total = reduce_sums({"chosen": chosen, "rejected": rejected}, self.engine.device)
        return [max(total[side] / count, 0.0) for side in SIDES]

    @torch.no_grad()
    def held_out(self, dataset: Any, batch_size: int, pad_id: int) -> dict[str, Tensor]:
        """`judge` of all held-out pairs in the dataset's order, on all ranks, ``[N]`` on the CPU; a collective.

        ``weights`` is what each pair counts in a mean.
        """
        self.engine.eval()
        rankings, lengths = rankings_of(dataset), element_lengths(dataset)
        found: list[tuple[int, list[float]]] = []
        for indices in watched(epoch_batches(lengths, batch_size * data_size(), 0, 0), "held out"):
            step = [rankings[i] for i in indices]
            places = rank_micro_batches(step, data_rank(), data_size(), batch_size)
            batches = pair_micro_batches(dataset, step, batch_size, pad_id, self.engine.device, self.sharing)
            for mine, batch in zip(places, batches, strict=True):
                reference, policy = self.reference(batch), answer_log_probs(self.engine, batch)
                parts = [batch["weights"][None], policy, answer_tokens(batch)]
                parts += [] if reference is None else [reference]
                columns = torch.cat([part.double().cpu() for part in parts])
                pairs = [row for rows in mine for row in rows]
                found += zip(pairs, columns.T.tolist(), strict=False)  # a filler's pairs are nobody's
        by_row = dict(gather_rows(found))
        table = torch.tensor([by_row[i] for i in range(len(dataset))], dtype=torch.float64).T
        weights, policy, tokens, reference = table[0], table[1:3], table[3:5], table[5:] if len(table) > 5 else None
        drift = [0.0, 0.0]
        if reference is not None:
            drift = ((weights * (policy - reference)).sum(1) / weights.sum()).clamp(min=0).tolist()
        return {"weights": weights, **self.judge(policy, reference, tokens, drift)}

    @torch.no_grad()
    def kl(self, dataset: Any, batch_size: int, pad_id: int) -> float:
        """KL of the policy from the reference at chosen answers' tokens, nats per token, exact; a collective.

        Args:
            dataset: held-out pairs, of which those of `KL_PROMPTS` prompts are taken.
            batch_size: pairs done together.
            pad_id: of the tokenizer.
        """
        self.engine.eval()
        sums = {"kl": 0.0, "tokens": 0.0}
        rankings = rankings_of(dataset)
        some = [rankings[i] for i in spread_rows(len(rankings), KL_PROMPTS)]
        whole = batch_size * data_size()
        for step in (some[at : at + whole] for at in range(0, len(some), whole)):
            for batch in pair_micro_batches(dataset, step, batch_size, pad_id, self.engine.device):
                rows = batch["chosen"].unique()
                chosen = [batch[name][rows] for name in ("input_ids", "attention_mask", "response_mask")]
                found = response_kl(self.engine, reference_policy(self.engine, self.frozen), *chosen)
                counts = bool(batch["weights"].any())  # a filler does not
                sums["kl"] += counts * found.sum().item()
                sums["tokens"] += counts * len(found)
        total = reduce_sums(sums, self.engine.device)
        return total["kl"] / max(total["tokens"], 1.0)


def means(columns: Mapping[str, Tensor]) -> dict[str, float]:
    """The mean of each metric of `Preferences.held_out`, in which a prompt counts once."""
    weights = columns["weights"]
    return {
        name: ((weights * values).sum() / weights.sum()).item() for name, values in columns.items() if name != "weights"
    }
