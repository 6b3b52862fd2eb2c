"""An independent, rule-based check of the demo's preference; never used in training.

The preferred answer starts with the answer itself, is warm, has one to three complete sentences, and
stops. Each of the four is worth a quarter of the score.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_EVASIVE = re.compile(
    r"(as an? (ai|assistant|language model)|it (all )?depends|i'?m not (sure|certain)|i (cannot|can't|could not) "
    r"|that is hard|it is (hard|difficult) to say|that depends|there (are|is) (many|no|several) |there is no single"
    r"|opinions|views (differ|vary)|some (would|people|might)|sources |experts |without (knowing|more)"
    r"|you('re| are) asking|you asked|you want(ed)? to know|you would like to know|the question|your question"
    r"|the request|your request|regarding|this is a question|to answer|well,|hm+,|um+,|so,)",
    re.IGNORECASE,
)
_WARM = re.compile(
    r"(happy to|glad|hope\b|enjoy|lovely|wonderful|great question|good luck|you'?ve got this|have fun|delightful"
    r"|cheers|warmly|warm (wishes|regards)|welcome|take care|no worries|don'?t worry|rest easy"
    r"|you'?ll (do|be) (great|fine)|sounds like|what a (nice|lovely|great|kind|sweet)|my friend|proud"
    r"|treat yourself|with love|cozy|cosy|sweet of you"
    r"|fantastic|brilliant|well done|love to|smile|kind(ly|ness)|happily)",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?=\s|$)")
_COMPLETE = re.compile(r"[^.][.!?][\"')\]]*$")


def is_direct(response: str) -> bool:
    """Whether the answer comes first: no evasion and no repeating of the question."""
    return bool(response.strip()) and not _EVASIVE.match(response.strip())


def is_warm(response: str) -> bool:
    """Whether a friendly word is in it."""
    return bool(_WARM.search(response))


def sentences(response: str) -> int:
    """The number of sentences, an unfinished last one included."""
    text = response.strip()
    ends = len(_SENTENCE_END.findall(text))
    return ends + (not _COMPLETE.search(text) if text else 0)


def is_complete(response: str) -> bool:
    """Whether the last sentence is finished and has at least three words."""
    text = response.strip()
    return bool(_COMPLETE.search(text)) and len(text.split()) >= 3


def manner(
    prompts: Sequence[Sequence[dict[str, str]]], responses: Sequence[str], rows: Sequence[dict[str, Any]]
) -> list[float]:
    """How far each response follows the preference, from 0 to 1.

    Args:
        prompts: the conversations before each response, as messages; not looked at.
        responses: the texts to check.
        rows: the dataset's rows; not looked at.
    """
    return [
        (is_direct(text) + is_warm(text) + (1 <= sentences(text) <= 3) + is_complete(text)) / 4 for text in responses
    ]
