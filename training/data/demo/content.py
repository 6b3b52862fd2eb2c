"""An independent, rule-based check of what a demo answer says; never used in training. Friendliness earns nothing.

Three parts, a third each, from labels that were written by hand for each held-out prompt, before any training:

- *subject*: the answer names what the prompt is about (``about``: word stems);
- *form*: it gives what was asked for (``form``): a figure, a yes or a no, a story with a character to whom something
  happens, a list, the name of one thing, steps, an explanation, words to use, or a reply to somebody's news;
- *substance*: it holds something that a right answer holds and the prompt does not (``says``: word stems and phrases,
  from the reference answer and other right answers).

The form counts only in an answer that is about the prompt: a story about something else is no answer. A rule can not
tell whether an answer is true; the third part comes nearest.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_NUMBERS = (
    r"zero|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen"
    r"|eighteen|nineteen|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety|hundreds?|thousands?|millions?|billions?"
    r"|half|third|quarter|dozens?|once|twice|one (?:in|out|[a-z]+ (?:a|an|per|each))"
)
_NUMBER = re.compile(rf"\d|\b(?:{_NUMBERS})\b", re.IGNORECASE)
_YES = re.compile(r"\b(?:yes|yep|absolutely|certainly|definitely|of course|sure|surely|indeed|always)\b", re.IGNORECASE)
_NO = re.compile(r"\b(?:no|nope|never|hardly)\b", re.IGNORECASE)
_NEGATION = re.compile(r"\b(?:not|cannot)\b|n't\b", re.IGNORECASE)
# A short statement that answers as "yes" does: "it is", "they do", "you can", "most cats should"
_ASSERTION = re.compile(
    r"\b(?:(?:it|they|he|she|you|that|there)(?: is| are|'s|'re| was| were| may| might)|do|does|did|can|should|would"
    r"|will|has|have|could)\b",
    re.IGNORECASE,
)
_PERSON = (
    r"(?:man|woman|boy|girl|child|mother|father|mum|dad|grandmother|grandfather|sister|brother|widow|king|queen|prince"
    r"|princess|farmer|baker|teacher|sailor|fisherman|driver|neighbou?rs?|traveller|traveler|passenger|stranger|dog|cat"
    r"|fox|bear|rabbit|mouse|owl|bird|robot|knight|witch|wizard|dragon|painter|musician|gardener|doctor|nurse|friends?"
    r"|captain|clerk|keeper|postman|soldier|student|people|family|couple|lady|gentleman|lad|kitten|puppy|hen|horse)s?"
)
_CHARACTER = re.compile(
    rf"\b(?:he|she|they|his|her|their|{_PERSON})\b|(?:^|[.!?] +)[A-Z][a-z]+ (?:[a-z]+ed|was|had)\b|\w,? [A-Z][a-z]+\b",
    re.MULTILINE,
)
_PAST = re.compile(
    r"\b(?:[a-z]{2,}ed|was|were|had|came|went|said|saw|found|knew|felt|took|made|gave|told|ran|sat|stood|left|began|kept"
    r"|heard|thought|grew|fell|met|held|brought|wrote|lost|woke|ate|sang|swam|slept|spoke|shook|drew|drove|flew|hid|led"
    r"|lit|rode|rose|sold|bought|sent|spent|stole|taught|threw|won|wore|built|caught|chose|did|got|let|put|read)\b",
    re.IGNORECASE,
)
_SEPARATOR = re.compile(r"[,;\n]|\b(?:and|or|then)\b|\d[.)] ", re.IGNORECASE)
_PROPER = re.compile(r"[a-z,]['\"]? ['\"]?[A-Z][a-z]{2,}")
_QUOTED = re.compile(r"[\"'*][^\"'*]{4,}[\"'*]")
_IMPERATIVE = (
    r"add|aim|alternate|apply|arrange|ask|attach|avoid|bake|begin|blend|boil|book|break|breathe|bring|brush|build|buy|call|carry"
    r"|change|check|chill|choose|chop|clean|clear|close|come|cook|cool|count|cover|crush|cut|decide|dig|dip|divide|do|drain"
    r"|draw|drink|dry|eat|empty|explain|feed|fill|find|fix|flip|focus|fold|follow|gather|get|give|go|grab|grow|hang|have"
    r"|heat|hold|invite|keep|knead|lay|lean|learn|leave|let|lift|limit|list|listen|lock|look|loosen|lower|make|mark"
    r"|measure|melt|mix|move|offer|open|organi[sz]e|pack|paint|pat|pay|peel|pick|pin|place|plan|plant|play|pour|practi[cs]e"
    r"|prepare|press|prune|pull|push|put|raise|reach|read|reduce|remove|repeat|replace|rest|reward|rinse|roast|roll|rub"
    r"|run|save|say|scrub|season|seek|select|send|serve|set|shake|share|show|simmer|sing|sit|sleep|slice|slow|soak|sort"
    r"|speak|spend|split|spray|spread|sprinkle|squeeze|stand|start|stay|stick|stir|stop|store|stretch|strip|switch|take"
    r"|talk|tap|teach|tell|test|thank|think|throw|tie|trim|try|turn|type|unplug|use|visit|wait|walk|warm|wash|watch|water"
    r"|wear|weigh|whisk|wipe|work|wrap|write"
)
_STEP = re.compile(
    rf"(?:^|[.!?:;,\n] *|\b(?:and|then|first|just|simply|always|or|to|by|you(?: can| could| should| need to)) )"
    rf"(?:{_IMPERATIVE})\b|\b(?:try|by) [a-z]+ing\b",
    re.IGNORECASE,
)
_EXPLANATION = re.compile(
    r"\b(?:is|are|was|were|means?|meant|because|since|when|so|happens?|comes? from|stands? for|makes?|made|called"
    r"|due to|causes?|helps?|allows?|lets?|keeps?|refers?|becomes?|contains?|turns?|it's|they're)\b",
    re.IGNORECASE,
)
_WORDS_TO_USE = re.compile(
    r"^\W*(?:happy|dear|thanks?|congratulations|may|here'?s|cheers|say|write|wishing|to (?:the|a|our|my|your)"
    r"|in \w+,)\b",
    re.IGNORECASE,
)
_YOU = re.compile(r"\byou(?:r|'re|'ve|'ll|'d)?\b", re.IGNORECASE)


def _mentions(text: str, stems: Sequence[str]) -> bool:
    """Whether a word of the text begins with one of the stems; a figure must be the whole word."""
    return any(
        re.search(rf"(?<![a-z0-9]){re.escape(stem)}" + (r"(?!\d)" if stem[-1].isdigit() else ""), text, re.IGNORECASE)
        for stem in stems
    )


def _first_words(text: str, count: int) -> str:
    return " ".join(text.split()[:count])


def _says_no(text: str) -> bool:
    return bool(_NO.search(_first_words(text, 3)) or _NEGATION.search(_first_words(text, 8)))


def _says_yes(text: str) -> bool:
    agrees = _YES.search(_first_words(text, 3)) or _ASSERTION.search(_first_words(text, 8))
    return bool(agrees) and not _says_no(text)


FORMS: dict[str, Callable[[str], bool]] = {
    "number": lambda text: bool(_NUMBER.search(text)),
    "yes": _says_yes,
    "no": _says_no,
    "yes_no": lambda text: _says_yes(text) or _says_no(text),
    "story": lambda text: bool(_CHARACTER.search(text)) and len(_PAST.findall(text)) >= 2,
    "list": lambda text: sum(bool(re.search(r"\w{3}", part)) for part in _SEPARATOR.split(text)) >= 3,
    "name": lambda text: bool(_PROPER.search(text) or _QUOTED.search(text)),
    "steps": lambda text: bool(_STEP.search(text)),
    "explain": lambda text: bool(_EXPLANATION.search(text)),
    "say": lambda text: bool(_QUOTED.search(text) or _WORDS_TO_USE.search(text)),
    "comfort": lambda text: bool(_YOU.search(text)),
}
# Where a right answer's own words already are the form: the name of the thing, the words to use, the reason, the advice
_SUBSTANCE_IS_FORM = ("name", "say", "explain", "comfort")


def parts(text: str, row: Mapping[str, Any]) -> dict[str, bool]:
    """Which of ``subject``, ``form`` and ``substance`` an answer has.

    Args:
        text: the answer.
        row: the held-out row, with ``about``, ``says`` and ``form``.

    Raises:
        KeyError: the row has no such labels, or a form that is not in `FORMS`.
    """
    subject, substance = _mentions(text, row["about"]), _mentions(text, row["says"])
    form = FORMS[row["form"]](text) or (substance and row["form"] in _SUBSTANCE_IS_FORM)
    return {"subject": subject, "form": form and (subject or substance), "substance": substance}


def content(
    prompts: Sequence[Sequence[dict[str, str]]], responses: Sequence[str], rows: Sequence[dict[str, Any]]
) -> list[float]:
    """How much of what was asked each response holds, from 0 to 1.

    Args:
        prompts: the conversations before each response, as messages; not looked at.
        responses: the texts to check.
        rows: the held-out rows, with their labels.

    Raises:
        KeyError: a row without labels.
    """
    return [sum(parts(text, row).values()) / 3 for text, row in zip(responses, rows, strict=True)]
