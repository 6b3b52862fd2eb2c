"""Judged pairs: how often rewards tell the chosen from the rejected answer, by source and by length, and the worst.

The rewards are a reward model's, or those that a DPO model implies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from training.utils import evaluation_programs, intervals
from training.utils.run.distributed import say

WORST = 5
LENGTHS = (16, 32, 64, 128, 256, 512)  # upper ends of the length buckets, in tokens of the longer answer


@dataclass(frozen=True)
class Pair:
    """A judged pair.

    Attributes:
        row: in the held-out dataset.
        source: the file or dataset that it comes from.
        chosen, rejected: rewards.
        chosen_length, rejected_length: of the answers in tokens.
        weight: 1, of a ranking's pairs 1 / (their number): a prompt counts once.
    """

    row: int
    source: str
    chosen: float
    rejected: float
    chosen_length: int
    rejected_length: int
    weight: float = 1.0

    @property
    def margin(self) -> float:
        """Reward of the chosen minus that of the rejected answer."""
        return self.chosen - self.rejected

    @property
    def right(self) -> float:
        """1 if the chosen answer has the higher reward, a tie half."""
        return intervals.half_ties(self.chosen, self.rejected)


def share_right(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Pairs, prompts (a ranking has several pairs), accuracy and its 95% interval."""
    weights = [pair.weight for pair in pairs]
    accuracy, prompts = intervals.mean([pair.right for pair in pairs], weights), sum(weights)
    interval = intervals.wilson_interval(accuracy, prompts)
    return {"pairs": len(pairs), "prompts": prompts, "accuracy": accuracy, "accuracy_interval": interval}


def grouped(pairs: Sequence[Pair], key: Callable[[Pair], str]) -> dict[str, dict[str, Any]]:
    """`share_right` of each group, in the order of the keys."""
    groups: dict[str, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(key(pair), []).append(pair)
    return {name: share_right(groups[name]) for name in sorted(groups)}


def length_bucket(pair: Pair) -> str:
    """Which bucket the longer answer falls into; written so that the names sort by length."""
    longest = max(pair.chosen_length, pair.rejected_length)
    low = 1
    for high in LENGTHS:
        if longest <= high:
            return f"{low:>3} to {high:>3} tokens"
        low = high + 1
    return f"{low:>3} tokens and more"


def judge(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Everything that evaluation.json says about the rewards, from the rewards alone."""
    weights = [p.weight for p in pairs]
    longer = intervals.mean([intervals.half_ties(p.chosen_length, p.rejected_length) for p in pairs], weights)
    rewards = [r for p in pairs for r in (p.chosen, p.rejected)]
    lengths = [float(n) for p in pairs for n in (p.chosen_length, p.rejected_length)]
    margins = [p.margin for p in pairs]
    differences = [float(p.chosen_length - p.rejected_length) for p in pairs]
    return {
        **share_right(pairs),
        "baselines": {"a coin": 0.5, "always the longer": longer, "always the shorter": 1 - longer},
        "margin_mean": intervals.mean(margins, weights),
        "correlation_reward_length": intervals.correlation(rewards, lengths, [w for w in weights for _ in range(2)]),
        "correlation_margin_length_difference": intervals.correlation(margins, differences, weights),
        "by_source": grouped(pairs, lambda pair: pair.source),
        "by_length": grouped(pairs, length_bucket),
        "margins": intervals.histogram(margins),
    }


def pairs_of(rows: Any, rewards: Sequence[Sequence[float]]) -> list[Pair]:
    """The pairs of a dataset with their (chosen, rejected) rewards."""
    return [
        Pair(i, row["source"], good, bad, sum(row["chosen_mask"]), sum(row["rejected_mask"]), 1 / row["pairs"])
        for i, (row, (good, bad)) in enumerate(zip(rows, rewards, strict=True))
    ]


def worst_of(pairs: Sequence[Pair], rows: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """The pairs of the smallest margins with their texts."""
    worst = []
    for pair in sorted(pairs, key=lambda pair: pair.margin)[:WORST]:
        texts = {side: tokenizer.decode(rows[pair.row][f"{side}_ids"]) for side in ("chosen", "rejected")}
        worst.append({"margin": pair.margin} | asdict(pair) | {f"{side}_text": text for side, text in texts.items()})
    return worst


def tell(found: dict[str, Any], worst: Sequence[dict[str, Any]]) -> None:
    """Print the tables."""
    lines = [["", "pairs", "accuracy", "95% interval"]]
    groups = {"all held-out pairs": found} | found["by_source"] | found["by_length"]
    lines += [[name, g["pairs"], g["accuracy"], g["accuracy_interval"]] for name, g in groups.items()]
    lines += [[name, "", share, ""] for name, share in found["baselines"].items()]
    say("\n" + evaluation_programs.table(lines))
    say(
        f"\nmean margin {found['margin_mean']:.3f}; correlation of reward and length "
        f"{found['correlation_reward_length']:+.2f}, of margin and difference in length "
        f"{found['correlation_margin_length_difference']:+.2f}"
    )
    top = max(found["margins"]["counts"])
    for low, high, count in zip(
        found["margins"]["edges"], found["margins"]["edges"][1:], found["margins"]["counts"], strict=False
    ):
        say(f"{low:+8.2f} to {high:+8.2f}  {'#' * round(50 * count / top)} {count:.0f}")
    say("\nlargest mistakes, or least sure answers:")
    for pair in worst:
        say(f"  margin {pair['margin']:+.2f}\n    chosen:   {pair['chosen_text']!r}\n"
            f"    rejected: {pair['rejected_text']!r}")  # fmt: skip
