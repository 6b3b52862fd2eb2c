"""The one renderer: a conversation becomes token ids and a response mask in the same pass.

The text comes from the tokenizer's chat template. The mask comes from the rendering itself: rendering the turns
before an assistant turn with the generation prompt must give a prefix of the whole text, and the assistant's
tokens are what follows, up to and including the token that ends the turn. The text is cut at both ends of every
assistant turn and the pieces are tokenised one by one, so no token lies across a boundary and the ids before a
response are exactly the ids of the generation prompt: what a rollout sees is what was trained.
"""

from __future__ import annotations

import functools
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from training.utils.data.template import (
    Message,
    RowError,
    Structure,
    added_texts,
    check_no_turn_lost,
    check_tools_written,
    generation_prompt,
    lost,
    render_text,
    short,
    special_texts,
    structure_of,
)

_PROMPT, _TRAINED, _LEFT_OUT = "prompt", "trained", "left out"  # kinds of pieces of a conversation


@dataclass(frozen=True)
class Rendered:
    """A rendered conversation.

    Attributes:
        input_ids: token ids, length T. They end with the end token of the last assistant turn, or with the prompt.
        response_mask: length T, 1 on the tokens of assistant turns that are trained on, their end token included.
        left_out: length T, 1 on the tokens of those that are not (``train`` is "no" in the message).
        text: the text that the ids stand for.
        spans: the assistant turns as (start, end) in ``text``, end token included.
        offsets: (start, end) in ``text`` of every token, empty for a tokenizer that does not tell them.
    """

    input_ids: list[int]
    response_mask: list[int]
    text: str = ""
    spans: list[tuple[int, int]] = field(default_factory=list)
    offsets: list[tuple[int, int]] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)


def _assistant_spans(
    tokenizer: Any, messages: Sequence[Message], full: str, structure: Structure
) -> dict[int, tuple[int, int]]:
    """(start, end) in ``full`` of the assistant turns, from the generation prompt to the end token, by turn.

    Some templates write an earlier answer differently from the last one. Then only the answer in the last turn is
    returned: to train on the others, each needs a rendering that ends with it.
    """
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    last = answers[-1:] if answers and answers[-1] == len(messages) - 1 else []
    for index in answers[: -1 if last else None]:
        _check_reasoning_has_a_place(tokenizer, messages[: index + 1], full)
    if not structure.rewrites:
        try:
            return {index: _span(tokenizer, messages, index, full, structure) for index in answers}
        except RowError:
            if answers == last:
                raise
    return {index: _span(tokenizer, messages, index, full, structure) for index in last}


def is_trained_whole(tokenizer: Any, messages: Sequence[Message]) -> bool:
    """Whether one rendering holds every answer of a conversation as the model would have to write it.

    Raises:
        RowError: the template refuses the conversation.
    """
    answers = [message for message in messages if message["role"] == "assistant"]
    if len(answers) < 2:
        return True
    structure = structure_of(tokenizer)
    plain = not any(message.keys() & _PUT_TOGETHER or "</think>" in message["content"] for message in answers)
    if plain or structure.rewrites:
        return not structure.rewrites
    full = render_text(tokenizer, messages) + _closing(structure, messages[-1])
    return len(_assistant_spans(tokenizer, messages, full, structure)) == len(answers)


def _closing(structure: Structure, last: Message) -> str:
    """What a template leaves out behind a last answer."""
    return structure.closes_call if "tool_calls" in last else structure.closes


_PUT_TOGETHER = {"reasoning", "tool_calls"}  # keys of a turn whose text the template makes of several parts


def _check_reasoning_has_a_place(tokenizer: Any, messages: Sequence[Message], full: str) -> None:
    """A template may leave the reasoning of an earlier answer out, if it writes that of a last one."""
    reasoning = messages[-1].get("reasoning", "").strip()
    if reasoning and reasoning not in full and reasoning not in render_text(tokenizer, messages):
        raise lost(messages[-1], "the reasoning of ")


def _span(tokenizer: Any, messages: Sequence[Message], index: int, full: str, structure: Structure) -> tuple[int, int]:
    """(start, end) in ``full`` of assistant turn ``index``."""
    message = messages[index]
    content = message["content"]
    start = len(generation_prompt(tokenizer, messages, index, full))
    thought, mark, answer = content.rpartition("</think>")
    if not (message.keys() & _PUT_TOGETHER or mark):
        end = _span_end(full, start, content, structure)
        if end is None:
            raise RowError(
                f"the chat template can not be masked exactly: the assistant turn {short(content)!r} "
                "does not stand in its rendering right after the generation prompt"
            )
        return start, end
    # The template puts such a turn together from its parts: it ends where its rendering as the last turn ends.
    alone = render_text(tokenizer, messages[: index + 1]) + _closing(structure, message)
    ends = [alone.rfind(token) + len(token) for token in special_texts(tokenizer) if token in alone[start:]]
    end = max(ends, default=0)
    if not full.startswith(alone[:end]) or end <= start:
        raise RowError(f"the chat template can not be masked exactly: it writes the assistant turn {short(content)!r} "
                       "in another way when more turns follow")  # fmt: skip
    parts = [thought.replace("<think>", ""), answer] if mark else [answer]
    if any(part.strip() not in full[start:end] for part in parts):
        raise lost(message)
    if message.get("reasoning", "").strip() not in full[start:end]:
        raise lost(message, "the reasoning of ")
    return start, end


def _span_end(full: str, start: int, content: str, structure: Structure) -> int | None:
    # Many templates trim the text, so four forms of it are tried, the unchanged one first.
    for form in dict.fromkeys((content, content.rstrip(), content.lstrip(), content.strip())):
        for lead in structure.leads:
            if not full.startswith(lead + form, start):
                continue
            after = start + len(lead) + len(form)
            for tail in structure.tails:
                if full.startswith(tail + structure.end_token, after):
                    return after + len(tail) + len(structure.end_token)
    return None


def render(tokenizer: Any, messages: Sequence[Message], add_generation_prompt: bool = False) -> Rendered:
    """Token ids and response mask of one conversation.

    Raises:
        RowError: the template refuses the conversation, or it can not be masked exactly.
    """
    return render_many(tokenizer, [(messages, add_generation_prompt)], offsets=True)[0]


def render_many(
    tokenizer: Any, conversations: Sequence[tuple[Sequence[Message], bool]], offsets: bool = False
) -> list[Rendered]:
    """`render` for many (messages, add_generation_prompt), in one call of the tokenizer.

    A piece of text that several conversations share is tokenised once.
    """
    structure = structure_of(tokenizer)
    laid_out = [_lay_out(tokenizer, messages, prompt, structure) for messages, prompt in conversations]
    unique: dict[tuple[str, str], int] = {}
    for _, _, pieces in laid_out:
        for piece, context, _ in pieces:
            unique.setdefault((piece, context), len(unique))
    encoded = _encode_pieces(tokenizer, list(unique), structure, offsets)
    results = []
    for text, spans, pieces in laid_out:
        ids: list[int] = []
        mask: list[int] = []
        left_out: list[int] = []
        places: list[tuple[int, int]] = []
        position = 0
        for piece, context, kind in pieces:
            piece_ids, piece_offsets = encoded[unique[piece, context]]
            ids.extend(piece_ids)
            mask.extend([int(kind == _TRAINED)] * len(piece_ids))
            left_out.extend([int(kind == _LEFT_OUT)] * len(piece_ids))
            places.extend((position + a, position + b) for a, b in piece_offsets)
            position += len(piece)
        results.append(Rendered(ids, mask, text, spans, places, left_out))
    return results


def read_any(tokenizer: Any, messages: Sequence[Message], add_generation_prompt: bool = False) -> list[int]:
    """Token ids of a conversation whose answers a model has written, whatever is in them.

    Training must know which tokens are an answer's, so `render` refuses what it can not mask: an answer with
    ``</think>`` in it, a template that writes earlier turns in another way. To score or to continue a conversation
    it is enough to read what the template makes of it, up to the end of the last answer.

    Raises:
        RowError: the template itself refuses the conversation, or loses what is said to a model that is to answer.
    """
    try:
        return render(tokenizer, messages, add_generation_prompt).input_ids
    except RowError:
        text = render_text(tokenizer, messages, add_generation_prompt)
        if add_generation_prompt:
            check_no_turn_lost(text, [message for message in messages if message["role"] != "assistant"])
    structure = structure_of(tokenizer)
    if messages[-1]["role"] == "assistant" and not add_generation_prompt:
        text += _closing(structure, messages[-1])
        end = text.rfind(structure.end_token)
        text = text if end < 0 else text[: end + len(structure.end_token)]
    return encode(tokenizer, [text])[0]


def read_what_fits(
    tokenizer: Any, messages: Sequence[Message], limit: int | None, add_generation_prompt: bool = False
) -> tuple[list[int], int]:
    """`read_any` of a conversation without its oldest turns, question and answer together, as far as they must go.

    A system message and the last question stay, whether they fit or not.

    Args:
        tokenizer, messages, add_generation_prompt: of `read_any`.
        limit: tokens that there is room for; None for any number.

    Returns:
        the ids, and how many messages were left out.

    Raises:
        RowError: see `read_any`.
    """
    start = 1 if messages and messages[0]["role"] == "system" else 0
    most = (len(messages) - start - 1) // 2  # turns before the last question

    @functools.cache
    def read(turns: int) -> list[int]:
        """The ids without so many of the oldest turns."""
        return read_any(tokenizer, [*messages[:start], *messages[start + 2 * turns :]], add_generation_prompt)

    def fits(turns: int) -> bool:
        """Whether there is room for what is left."""
        return limit is None or len(read(turns)) <= limit

    # halving: each conversation takes as long to read as it is, and hundreds of turns may have to go
    turns = 0 if fits(0) else bisect_left(range(most), True, key=fits)
    return read(turns), 2 * turns


def _lay_out(
    tokenizer: Any, messages: Sequence[Message], add_generation_prompt: bool, structure: Structure
) -> tuple[str, list[tuple[int, int]], list[tuple[str, str, str]]]:
    """The text, the assistant spans, and the pieces (text, what stands before it, its kind) to tokenise."""
    full = render_text(tokenizer, messages, add_generation_prompt)
    check_tools_written(tokenizer, messages, full, add_generation_prompt)
    ends = messages[-1]["role"] == "assistant" and not add_generation_prompt
    if ends:
        full += _closing(structure, messages[-1])
    check_no_turn_lost(full, messages)
    found = _assistant_spans(tokenizer, messages, full, structure)
    spans = list(found.values())
    if ends:
        full = full[: spans[-1][1]]  # cuts the newline that many templates put after the last end token
    added = tuple(added_texts(tokenizer)) if structure.adds_prefix else ()
    pieces: list[tuple[str, str, str]] = []
    position = 0
    kinds = [_LEFT_OUT if "train" in messages[index] else _TRAINED for index in found]
    for (start, end), answer in zip([*spans, (len(full), len(full))], [*kinds, _PROMPT], strict=True):
        if full.endswith(structure.takes_blanks, start, end):  # behind a cut they would be tokens
            end += len(full[end:]) - len(full[end:].lstrip())
        for a, b, kind in ((position, start, _PROMPT), (start, end, answer)):
            if b > a:
                before = full[max(0, a - 200) : a]
                after_token = before.endswith(added) or before.rstrip().endswith(structure.takes_blanks)
                context = "first" if a == 0 else "token" if after_token or not structure.adds_prefix else "text"
                pieces.append((full[a:b], context, kind))
        position = end
    return full, spans, pieces


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of plain texts; nothing is added to them."""
    return [ids for ids, _ in _encode_plain(tokenizer, texts, False)]


def _encode_plain(tokenizer: Any, texts: Sequence[str], offsets: bool) -> list[tuple[list[int], list[tuple[int, int]]]]:
    if not texts:
        return []
    batch = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=offsets and tokenizer.is_fast,
        verbose=False,
    )
    places = batch["offset_mapping"] if offsets and tokenizer.is_fast else [[]] * len(texts)
    return list(zip(batch["input_ids"], places, strict=True))


def _encode_pieces(
    tokenizer: Any, pieces: Sequence[tuple[str, str]], structure: Structure, offsets: bool
) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Tokenise pieces of texts as they stand: no space is invented where the text before them goes on.

    SentencePiece tokenizers put a space before any text. A piece that follows other text is therefore tokenised
    behind a character that nothing merges with, and one that follows a special token behind a special token, unless
    that takes in the white space that the piece begins with; what that adds is cut off again.
    """
    if not structure.adds_prefix or not tokenizer.is_fast:
        return _encode_plain(tokenizer, [piece for piece, _ in pieces], offsets)
    results: list[tuple[list[int], list[tuple[int, int]]] | None] = [None] * len(pieces)
    behind, anything = ("token",), ("token", "text")
    guards = (("", ("first",)), (structure.end_token, behind), ("\n", anything), (".", anything), ("", anything))
    for guard, contexts in guards:
        open_ = [i for i, (_, context) in enumerate(pieces) if context in contexts and results[i] is None]
        for i, found in zip(open_, _encode_plain(tokenizer, [guard + pieces[i][0] for i in open_], True), strict=True):
            results[i] = _cut(found, len(guard)) if guard else found
    assert all(result is not None for result in results)
    return [result for result in results if result is not None]


def _cut(
    encoded: tuple[list[int], list[tuple[int, int]]], width: int
) -> tuple[list[int], list[tuple[int, int]]] | None:
    """Drop the tokens of the first ``width`` characters; None if a token lies across that place."""
    ids, places = encoded
    first = next((i for i, (_, end) in enumerate(places) if end > width), len(ids))
    if first < len(ids) and places[first][0] < width:
        return None
    return ids[first:], [(a - width, b - width) for a, b in places[first:]]


_ADDRESS = r"data:image/\S+|https?://\S+\.(png|jpe?g|gif|webp|bmp|svg)(\?\S*)?"
_IMAGE = re.compile(rf"^(?=\s*+\S++\s*+$)\s*({_ADDRESS})\s*$", re.IGNORECASE)  # of one word alone


def is_image(text: str) -> bool:
    """Whether a text is nothing but the address or the data of an image."""
    return len(text) < 1 << 20 and bool(_IMAGE.match(text)) or text.startswith("data:image/")
