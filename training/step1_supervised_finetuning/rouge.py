"""ROUGE of generated answers, by torchmetrics (Lin 2004, https://aclanthology.org/W04-1013)."""

from __future__ import annotations

import re
from collections.abc import Sequence

KINDS = ("rouge1", "rouge2", "rougeL")


def normalise(text: str) -> str:
    """Lower case, words of any script apart by one space: the library's own rule would delete all but a-z and 0-9."""
    return " ".join(re.findall(r"[^\W_]+", text.lower()))


def rouge_scores(answers: Sequence[str], references: Sequence[str]) -> dict[str, list[float]]:
    """F-measures of each answer against its reference: kind -> one value for each.

    Words are not stemmed. ROUGE-1 and -2 count common words and pairs of neighbours, ROUGE-L the longest common
    subsequence.
    """
    from torchmetrics.functional.text.rouge import rouge_score  # takes a second to import: only where it is used

    scores: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for answer, reference in zip(answers, references, strict=True):
        found = rouge_score(answer, reference, rouge_keys=KINDS, normalizer=normalise)
        for kind in KINDS:
            scores[kind].append(found[f"{kind}_fmeasure"].item())
    return scores
