"""Reward functions to use or to start from.

    --reward_function training/step3_rlhf_finetuning/reward_examples.py:exact_answer

A reward function gets three lists of one length: prompts (conversations up to the user's turn), responses (texts), and
rows (the dataset's rows as they stood in their file). It returns a finite number for each response.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

# 1,234.50 and -3, but not the minus of a difference: the 8 in "3-8" is no -8
_NUMBER = re.compile(r"(?<![\w.])-?\$?\d[\d,]*(?:\.\d+)?|(?<=-)\d[\d,]*(?:\.\d+)?")


def last_number(text: str) -> float | None:
    """The last number in a text, None without one; thousands may be grouped by commas."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "").replace("$", "")) if found else None


def exact_answer(
    prompts: Sequence[Sequence[dict[str, str]]], responses: Sequence[str], rows: Sequence[dict[str, Any]]
) -> list[float]:
    """1 where a response's last number is the row's, 0 elsewhere: rows as grade-school maths has them (GSM8K).

    Args:
        prompts: not looked at.
        responses: free text that ends with the result.
        rows: each with an ``answer`` that ends in ``#### NUMBER``.
    """
    rewards = []
    for response, row in zip(responses, rows, strict=True):
        wanted = last_number(str(row["answer"]).rpartition("####")[2])
        rewards.append(float(wanted is not None and last_number(response) == wanted))
    return rewards
