"""Rankings: several answers to one prompt, in an order, with scores or with ranks; ties are allowed.

InstructGPT's way (Ouyang et al. 2022, arXiv 2203.02155, section 3.5): all pairs of a ranking are one element of a
batch, and a prompt counts once, however many answers it has.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from training.utils.data.formats.conversations import (
    MOST_MESSAGES,
    NOT_TRAINED,
    Converter,
    Dropped,
    Example,
    Row,
    answered,
    as_prompt,
    asked,
    assistant_turn,
    continuation,
    conversation,
    listed,
    parse_transcript,
    plain_text,
    preference,
    unpacked,
    user_turn,
)
from training.utils.data.template import Message, RowError

MOST_ANSWERS = 32  # to one prompt: they give 496 pairs
_TEXTS = ("answer", "response", "text", "completion", "output")  # keys of an answer's text
_RANKS, _SCORES = ("rank",), ("score", "overall_score")  # keys and columns where lower is better, and where higher is


def ranking(
    prompt: list[Message], answers: Sequence[list[Message]], order: Sequence[float], response: Sequence[Message] = ()
) -> list[Example]:
    """A prompt with several answers, checked; equal numbers in their ``order``, where lower is better, are ties.

    Returns:
        One example: a ranking, a pair if there are two answers, a demonstration if there is one.

    Raises:
        RowError: too many answers, or one answer with two places.
        Dropped: no answer, an empty one, or all are tied.
    """
    if len(answers) > MOST_ANSWERS:
        raise RowError(f"{len(answers)} answers to one prompt, at most {MOST_ANSWERS} are read")
    kept: dict[str, int] = {}
    for i, answer in enumerate(answers):
        before = kept.setdefault(repr(answer), i)
        if order[before] != order[i]:
            raise RowError(f"answers {before + 1} and {i + 1} are the same and have different places in the ranking")
    best_first = sorted(kept.values(), key=lambda i: order[i])
    if len(best_first) == 1:
        return answered(prompt, list(response or answers[0]))
    if not best_first:
        raise Dropped("no answers")
    if order[best_first[0]] == order[best_first[-1]]:
        raise Dropped("tie")
    sorted_answers = [answers[i] for i in best_first]
    for answer in sorted_answers[1:]:
        (example,) = preference(prompt, sorted_answers[0], answer, response)
    if len(sorted_answers) == 2:
        return [example]
    levels = sorted({order[i] for i in best_first})
    ranks = [1 + levels.index(order[i]) for i in best_first]
    return [dataclasses.replace(example, answers=sorted_answers, ranks=ranks)]


def _numbers(values: Sequence[Any], name: str, count: int) -> list[float]:
    """Scores or ranks, checked: one for each of ``count`` answers."""
    if len(values) != count:
        raise RowError(f"{count} answers and {len(values)} values in {name}")
    found = []
    for i, value in enumerate(values, 1):
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if math.isnan(number):
            raise RowError(f"{name} of answer {i} is {value!r}, it must be a number")
        found.append(number)
    return found


def _order(row: Row, items: Sequence[Any]) -> list[float] | None:
    """Each answer's place, lower is better, from a column or from a key of the answers; None where nothing says it."""
    for names, sign in ((_RANKS, 1.0), (_SCORES, -1.0)):
        for name in names:
            if row.get(f"{name}s") is not None:
                return [sign * n for n in _numbers(listed(row[f"{name}s"], f"{name}s"), f"{name}s", len(items))]
            if any(isinstance(item, Mapping) and item.get(name) is not None for item in items):
                found = [item.get(name) if isinstance(item, Mapping) else None for item in items]
                return [sign * n for n in _numbers(found, name, len(items))]
    return None


def _is_conversation(item: Any) -> bool:
    first = item[0] if isinstance(item, list) and item else item
    return isinstance(first, Mapping) and bool({"role", "from"} & first.keys())


def _answer(prompt: list[Message], item: Any, name: str, transcript: bool) -> list[Message]:
    """One answer of a list: a text, messages, or a dict that holds the text."""
    if isinstance(item, Mapping) and not _is_conversation(item):
        key = next((key for key in _TEXTS if key in item), None)
        if key is None:
            raise RowError(f"an answer in {name!r} has none of {', '.join(_TEXTS)}")
        item = item[key]
    return continuation(prompt, item, name, transcript)


def _ranked(row: Row, ask: str, name: str, items: Sequence[Any], order: Sequence[float]) -> list[Example]:
    prompt, question = as_prompt(asked(row, ask)), unpacked(row[ask], ask)
    transcript = isinstance(question, str) and bool(parse_transcript(question))
    answers = [_answer(prompt, item, name, transcript) for item in items]
    return ranking(prompt, answers, order, continuation(prompt, row.get("response"), "response", transcript))


def prompt_ranking(row: Row) -> list[Example]:
    """InstructGPT's data: a prompt and its answers, best first; those that stand in a list of their own are tied."""
    items, order = [], []
    for place, item in enumerate(listed(row["ranking"], "ranking")):
        tied = item if isinstance(item, list) and not _is_conversation(item) else [item]
        items += tied
        order += [float(place)] * len(tied)
    return _ranked(row, "prompt", "ranking", items, order)


def rated(ask: str, name: str) -> Converter:
    """A prompt and a list of answers with scores or ranks, in a column or in the answers."""

    def convert(row: Row) -> list[Example]:
        """One ranking."""
        items = listed(row[name], name)
        order = _order(row, items)
        if order is None:
            raise RowError(f"nothing says which of the {name} is better: give each a score or a rank")
        return _ranked(row, ask, name, items, order)

    return convert


def prompt_answers(row: Row) -> list[Example]:
    """Nectar: a prompt and answers with their ranks; answers without are what a prompt's reward may be made of."""
    answers = row["answers"]
    if isinstance(answers, str) and not answers.lstrip().startswith("[{"):
        answers = []
    if not isinstance(answers, (str, list)) or _order(row, listed(answers, "answers")) is None:
        return [conversation(as_prompt(asked(row, "prompt")))]
    return rated("prompt", "answers")(row)


def places(row: Row) -> dict[str, float] | None:
    """Each answer's text and its place, lower is better, in a row of a prompt and its ranked answers; None for others.

    Raises:
        RowError: an answer has no number for its place.
    """
    items = row.get("answers")
    if not isinstance(items, list) or not all(isinstance(item, Mapping) for item in items):
        return None
    order = _order(row, items)
    texts = [str(next((item[key] for key in _TEXTS if key in item), "")) for item in items]
    return None if order is None else dict(zip(texts, order, strict=True))


def tree(row: Row) -> list[Example]:
    """OpenAssistant's trees: a ranking of the replies to every message of the user, wherever it stands.

    A message whose replies rank nothing, such as a tie, leaves the others what they are.
    """
    found: list[Example] = []
    useless = Dropped("no answers")
    open_: list[tuple[list[Message], Any]] = [([], row["prompt"])]
    while open_:
        before, node = open_.pop()
        if not isinstance(node, dict) or len(before) > MOST_MESSAGES:
            raise RowError("column 'prompt' must be a tree of messages with a text and their replies")
        prompt = [*before, user_turn(plain_text(node.get("text"), "a message"))]
        replies = [r for r in node.get("replies") or [] if isinstance(r, dict) and not r.get("deleted")]
        for reply in replies:
            (answer,) = assistant_turn(plain_text(reply.get("text"), "a reply"))
            answer |= NOT_TRAINED  # what goes on from it does not teach it: it may be the worse one
            open_ += [([*prompt, answer], further) for further in reply.get("replies") or []]
        ranked = [r for r in replies if r.get("rank") is not None] or replies[:1]
        if ranked:
            texts = [assistant_turn(plain_text(r.get("text"), "a reply")) for r in ranked]
            try:
                found += ranking(prompt, texts, _numbers([r.get("rank", 0) for r in ranked], "rank", len(ranked)))
            except Dropped as dropped:
                useless = dropped
    if not found:
        raise useless
    return found
