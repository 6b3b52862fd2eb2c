"""The mathematics of preferences: the Bradley-Terry loss, and what tells a good reward model from a bad one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from training.utils.intervals import half_ties, mean, wilson_interval

# Pulls the sum of a pair's two rewards towards 0, which the Bradley-Terry loss leaves free, so that chosen answers
# tend to be positive and rejected ones negative (Eisenstein et al. 2023, arXiv 2312.09244, section 2).
CENTER_COEFFICIENT = 0.01


def bradley_terry_loss(chosen: torch.Tensor, rejected: torch.Tensor, kind: str) -> torch.Tensor:
    """Negative log-likelihood that the chosen answers win: rewards ``[B]`` and ``[B]`` -> ``[B]``.

    The two kinds are the same function, written as in Ouyang et al. (log_sig) and Askell et al. (log_exp),
    both in a form that does not overflow.
    """
    if kind == "log_sig":
        return -torch.nn.functional.logsigmoid(chosen - rejected)
    return torch.nn.functional.softplus(rejected - chosen)


def pair_metrics(pairs: Sequence[tuple[float, float]], weights: Sequence[float]) -> dict[str, float]:
    """Accuracy (a tie counts half), mean rewards, margin and loss of (chosen, rejected) rewards.

    Args:
        pairs: (chosen, rejected) rewards.
        weights: of each pair, see `training.utils.data.batches.collate_pairs`.
    """
    chosen, rejected = (mean(side, weights) for side in zip(*pairs, strict=True))
    losses = bradley_terry_loss(torch.tensor([c for c, _ in pairs]), torch.tensor([r for _, r in pairs]), "log_sig")
    weighed = losses * torch.tensor(weights)
    return {
        "accuracy": mean([half_ties(c, r) for c, r in pairs], weights),
        "chosen_mean": chosen,
        "rejected_mean": rejected,
        "margin": chosen - rejected,
        "loss": (weighed.sum() / sum(weights)).item(),
    }


def accuracy_by_kind(
    pairs: Sequence[tuple[float, float]], kinds: Sequence[str], weights: Sequence[float]
) -> dict[str, dict[str, float]]:
    """How often the chosen answer wins against each kind of rejected answer, such as an answer to another prompt.

    Args:
        pairs: (chosen, rejected) rewards.
        kinds: each pair's ``rejected_kind``; empty for a pair without one, which is left out.
        weights: see `pair_metrics`.

    Returns:
        By kind, in alphabetical order: ``accuracy`` (a tie counts half) and the number of ``pairs``.
    """
    found = {}
    for kind in sorted(set(kinds) - {""}):
        rows = [i for i, other in enumerate(kinds) if other == kind]
        metrics = pair_metrics([pairs[i] for i in rows], [weights[i] for i in rows])
        found[kind] = {"accuracy": metrics["accuracy"], "pairs": len(rows)}
    return found


def length_accuracy(dataset: Any, weights: Sequence[float]) -> float:
    """Accuracy of always preferring the answer with more tokens; always the shorter one has 1 minus this."""
    wins = [half_ties(sum(c), sum(r)) for c, r in zip(dataset["chosen_mask"], dataset["rejected_mask"], strict=True)]
    return mean(wins, weights)


def verdicts(metrics: dict[str, float]) -> dict[str, bool]:
    """ColossalChat's three questions to a reward model before it is used."""
    return {
        "chosen mean above rejected mean": metrics["chosen_mean"] > metrics["rejected_mean"],
        "accuracy above 0.6": metrics["accuracy"] > 0.6,
        "chosen positive and rejected negative": metrics["chosen_mean"] > 0 > metrics["rejected_mean"],
    }


def judgement(
    pairs: Sequence[tuple[float, float]], kinds: Sequence[str], longer: float, weights: Sequence[float]
) -> dict[str, Any]:
    """What the summary says of a finished reward model.

    Args:
        pairs: (chosen, rejected) rewards of the held-out pairs.
        kinds: see `accuracy_by_kind`.
        longer: see `length_accuracy`.
        weights: see `pair_metrics`; a ranking counts as one that is held out.
    """
    metrics = pair_metrics(pairs, weights)
    prompts = round(sum(weights))
    low, high = wilson_interval(metrics["accuracy"], prompts)
    return {
        "held_out": prompts,
        "ties": sum(chosen == rejected for chosen, rejected in pairs),
        "accuracy_after": metrics["accuracy"],
        "accuracy_low": low,
        "accuracy_high": high,
        "accuracy_by_kind": accuracy_by_kind(pairs, kinds, weights),
        "accuracy_longer": longer,
        "accuracy_shorter": 1 - longer,
        "chosen_mean": metrics["chosen_mean"],
        "rejected_mean": metrics["rejected_mean"],
        "verdicts": verdicts(metrics),
    }


def told(judged: dict[str, Any]) -> str:
    """A `judgement` for the terminal, a line for each of its parts."""
    lines = [
        f"held-out accuracy {judged['accuracy_after']:.3f} (always the longer answer: {judged['accuracy_longer']:.3f})"
    ]
    for kind, found in judged["accuracy_by_kind"].items():
        lines.append(f"  {found['accuracy']:.3f} of {found['pairs']} pairs whose rejected answer is of the kind {kind}")
    lines += [f"  {'yes' if holds else 'NO '}  {question}" for question, holds in judged["verdicts"].items()]
    return "\n".join(lines)
