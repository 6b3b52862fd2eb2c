"""The one renderer: a conversation becomes token ids and a response mask in the same pass.

The text comes from the tokenizer's chat template. The mask comes from the rendering itself: rendering the turns
before an assistant turn with the generation prompt must give a prefix of the whole text, and the assistant's
tokens are what follows, up to and including the token that ends the turn. The text is cut at both ends of every
assistant turn and the pieces are tokenised one by one, so no token lies across a boundary and the ids before a
response are exactly the ids of the generation prompt: what a rollout sees is what was trained.
"""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError

from training.utils.errors import UserError

Message = dict[str, str]

TEMPLATES = Path(__file__).parent / "templates"
DEFAULT_TEMPLATE = "human_assistant"
_SYSTEM_START, _SYSTEM_END = "{#- system message -#}", "{#- end of system message -#}"
_PROBES = ("Kwzhia", "Mvtrqe", "Zplodu", "Gnybis")


_PROMPT, _TRAINED, _LEFT_OUT = "prompt", "trained", "left out"  # kinds of pieces of a conversation


class RowError(UserError):
    """A row that can not be used; ``--on_bad_row skip`` counts it and goes on."""


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


@dataclass(frozen=True)
class _Structure:
    """What a template puts around an assistant's text, found by rendering two probe conversations."""

    end_token: str
    end_id: int
    leads: tuple[str, ...]  # between the generation prompt and the text
    tails: tuple[str, ...]  # between the text and the end token
    adds_prefix: bool  # the tokenizer puts a space before a text that stands alone (SentencePiece)


_structures: weakref.WeakKeyDictionary[Any, tuple[str, _Structure]] = weakref.WeakKeyDictionary()


def template_names() -> list[str]:
    """The names that ``--chat_template`` understands."""
    return sorted(path.stem for path in TEMPLATES.glob("*.jinja"))


def _read_template(name: str) -> str:
    bundled = TEMPLATES / f"{name}.jinja"
    path = Path(name).expanduser()
    if bundled.is_file() and bundled.parent == TEMPLATES:
        return bundled.read_text(encoding="utf-8")
    if not path.is_file():
        raise UserError(f"--chat_template {name}: no such file, and not one of the names {', '.join(template_names())}")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--chat_template {name}: {error}") from None


def _with_system_message(template: str, system_message: str) -> str:
    """Put a default system message into the template itself, so that it travels with every saved tokenizer."""
    start, end = template.find(_SYSTEM_START), template.find(_SYSTEM_END)
    if start == 0 and end > 0:  # one that an earlier step put there
        template = template[end + len(_SYSTEM_END) :]
    # A JSON string is a Jinja string, if it has no escaped surrogates.
    literal = json.dumps(system_message, ensure_ascii=False)
    return (
        f"{_SYSTEM_START}{{%- if not messages or messages[0]['role'] != 'system' -%}}"
        f"{{%- set messages = [{{'role': 'system', 'content': {literal}}}] + messages -%}}"
        f"{{%- endif -%}}{_SYSTEM_END}{template}"
    )


def configure_chat_template(tokenizer: Any, chat_template: str = "", system_message: str = "") -> None:
    """Set ``tokenizer.chat_template``: what it has, a named or given Jinja file, or the project's default.

    Args:
        tokenizer: a transformers tokenizer; it is changed in place, so saving it saves the template.
        chat_template: a name (see `template_names`) or a path; empty keeps the tokenizer's own.
        system_message: put before every conversation that has no system turn.

    Raises:
        UserError: no such template, it is not valid Jinja, it loses a turn or the system message, or it can not be
            masked exactly.
    """
    current = tokenizer.chat_template
    if isinstance(current, dict):  # some tokenizers carry one template for chat and one for tools
        current = current.get("default")
    own = current or _read_template(DEFAULT_TEMPLATE)
    template = _read_template(chat_template) if chat_template else own
    if system_message:
        template = _with_system_message(template, system_message)
    tokenizer.chat_template = template
    _structure(tokenizer)
    if system_message.strip() not in render_text(tokenizer, [{"role": "user", "content": _PROBES[0]}]):
        raise UserError(
            "--system_message: the chat template writes no system turn, so the message would be lost; "
            "choose another --chat_template"
        )


def stop_token_ids(tokenizer: Any) -> list[int]:
    """The tokens that end a response: EOS first, then the template's end of turn where it is another one."""
    ids = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    end_id = _structure(tokenizer).end_id
    return ids if end_id in ids else [*ids, end_id]


def render_text(tokenizer: Any, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
    """The chat template's text for ``messages``.

    Raises:
        RowError: the template refuses the conversation (its own message is given).
        UserError: the template is not valid.
    """
    try:
        text = tokenizer.apply_chat_template(
            [{"role": m["role"], "content": m["content"]} for m in messages],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except TemplateSyntaxError as error:
        raise UserError(f"the chat template is not valid Jinja: line {error.lineno}: {error.message}") from None
    except SecurityError as error:
        raise UserError(f"the chat template does what a template must not do: {error}") from None
    except TemplateError as error:
        raise RowError(f"the chat template refuses the conversation: {error}") from None
    except (TypeError, LookupError, AttributeError, ValueError, ArithmeticError, RecursionError) as error:
        raise RowError(f"the chat template fails on the conversation: {error}") from None
    return str(text)


def special_texts(tokenizer: Any) -> list[str]:
    """Every text that the tokenizer turns into a special token, longest first."""
    texts = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    texts.update(str(token) for token in tokenizer.all_special_tokens)
    return sorted(texts - {""}, key=lambda text: (-len(text), text))


def forbidden_texts(tokenizer: Any) -> list[str]:
    """What no text of a row may contain: special tokens, and the token that ends a turn, special or not."""
    return sorted({*special_texts(tokenizer), _structure(tokenizer).end_token}, key=lambda text: (-len(text), text))


def _added_texts(tokenizer: Any) -> list[str]:
    texts = {token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()}
    return sorted(texts.union(special_texts(tokenizer)), key=lambda text: (-len(text), text))


def _first_added(text: str, added: Sequence[str]) -> tuple[int, str] | None:
    found = [(text.find(token), -len(token), token) for token in added if token in text]
    if not found:
        return None
    position, _, token = min(found)
    return position, token


def _structure(tokenizer: Any) -> _Structure:
    """Probe the tokenizer's template once; see `_Structure`."""
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template; name one with --chat_template")
    known = _structures.get(tokenizer)
    if known is not None and known[0] == tokenizer.chat_template:
        return known[1]
    leads, tails, ends = set(), set(), set()
    added = _added_texts(tokenizer)
    for turns in (2, 4):
        roles = ("user", "assistant") * 2
        messages = [{"role": r, "content": c} for r, c in zip(roles[:turns], _PROBES[:turns], strict=True)]
        try:
            full = render_text(tokenizer, messages)
        except RowError as error:
            raise UserError(f"the chat template fails on a plain conversation: {error}") from None
        _check_no_turn_lost(full, messages)
        for index in range(1, turns, 2):
            lead, tail, end = _around(tokenizer, messages, index, full, added)
            leads.add(lead)
            tails.add(tail)
            ends.add(end)
    if len(ends) > 1:
        raise UserError(
            f"the chat template can not be masked exactly: it ends assistant turns with different tokens {sorted(ends)}"
        )
    end_token = ends.pop()
    found = _Structure(
        end_token=end_token,
        end_id=int(tokenizer.convert_tokens_to_ids(end_token)),
        leads=tuple(sorted(leads, key=len, reverse=True)),
        tails=tuple(sorted(tails, key=len, reverse=True)),
        adds_prefix=_adds_prefix(tokenizer),
    )
    _structures[tokenizer] = (tokenizer.chat_template, found)
    return found


def _around(
    tokenizer: Any, messages: list[Message], index: int, full: str, added: Sequence[str]
) -> tuple[str, str, str]:
    """The texts before and after assistant turn ``index`` of a probe, and the end token."""
    start = len(_prefix(tokenizer, messages, index, full))
    content = messages[index]["content"]
    at = full.index(content, start)
    if any(message["content"] in full[start:at] for message in messages[:index]):
        raise UserError("the chat template can not be masked exactly: its generation prompt comes before a user turn")
    after = at + len(content)
    following = full.find(messages[index + 1]["content"], after) if index + 1 < len(messages) else len(full)
    found = _first_added(full[after:following], added)
    if found is None:
        raise UserError(
            "the chat template does not end an assistant turn with a special token of this tokenizer "
            f"(it writes {full[after:following]!r}), so a model could never stop; "
            f"end the turn with {{{{ eos_token }}}}, or choose --chat_template {DEFAULT_TEMPLATE}"
        )
    position, token = found
    return full[start:at], full[after : after + position], token


def _check_no_turn_lost(full: str, messages: Sequence[Message]) -> None:
    position = 0
    for message in messages:
        content = message["content"].strip()
        found = full.find(content, position)
        if found < 0:
            raise RowError(f"the chat template loses the {message['role']} turn {_short(content)!r}")
        position = found + len(content)


def _prefix(tokenizer: Any, messages: Sequence[Message], index: int, full: str) -> str:
    prefix = render_text(tokenizer, messages[:index], add_generation_prompt=True)
    if not full.startswith(prefix):
        raise RowError(
            "the chat template can not be masked exactly: the generation prompt before assistant turn "
            f"{index // 2 + 1} is not a prefix of the whole conversation; choose another --chat_template"
        )
    return prefix


def _short(text: str, width: int = 40) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def _assistant_spans(
    tokenizer: Any, messages: Sequence[Message], full: str, structure: _Structure
) -> list[tuple[int, int]]:
    """(start, end) in ``full`` of every assistant turn: from the generation prompt to its end token."""
    spans: list[tuple[int, int]] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start = len(_prefix(tokenizer, messages, index, full))
        end = _span_end(full, start, message["content"], structure)
        if end is None:
            raise RowError(
                f"the chat template can not be masked exactly: the assistant turn {_short(message['content'])!r} "
                "does not stand in its rendering right after the generation prompt"
            )
        spans.append((start, end))
    return spans


def _span_end(full: str, start: int, content: str, structure: _Structure) -> int | None:
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

    Args:
        tokenizer: with a chat template, see `configure_chat_template`.
        messages: role/content dicts.
        add_generation_prompt: end with what stands before an assistant's answer.

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
    structure = _structure(tokenizer)
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
        RowError: the template itself refuses the conversation.
    """
    try:
        return render(tokenizer, messages, add_generation_prompt).input_ids
    except RowError:
        text = render_text(tokenizer, messages, add_generation_prompt)
    end = _structure(tokenizer).end_token
    if messages[-1]["role"] == "assistant" and not add_generation_prompt and end in text:
        text = text[: text.rindex(end) + len(end)]
    return encode(tokenizer, [text])[0]


def _lay_out(
    tokenizer: Any, messages: Sequence[Message], add_generation_prompt: bool, structure: _Structure
) -> tuple[str, list[tuple[int, int]], list[tuple[str, str, str]]]:
    """The text, the assistant spans, and the pieces (text, what stands before it, its kind) to tokenise."""
    full = render_text(tokenizer, messages, add_generation_prompt)
    _check_no_turn_lost(full, messages)
    spans = _assistant_spans(tokenizer, messages, full, structure)
    if spans and not add_generation_prompt and messages[-1]["role"] == "assistant":
        full = full[: spans[-1][1]]  # cuts the newline that many templates put after the last end token
    added = _added_texts(tokenizer) if structure.adds_prefix else ()
    pieces: list[tuple[str, str, str]] = []
    position = 0
    answers = [message for message in messages if message["role"] == "assistant"]
    kinds = [_LEFT_OUT if message.get("train") == "no" else _TRAINED for message in answers]
    for (start, end), answer in zip([*spans, (len(full), len(full))], [*kinds, _PROMPT], strict=True):
        for a, b, kind in ((position, start, _PROMPT), (start, end, answer)):
            if b > a:
                before = full[max(0, a - 200) : a]
                after_token = any(before.endswith(token) for token in added)
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


def _adds_prefix(tokenizer: Any) -> bool:
    """Whether a text that stands alone is tokenised as if a space stood before it."""
    alone, after = encode(tokenizer, ["x", "\nx"])
    return after[-len(alone) :] != alone


def _encode_pieces(
    tokenizer: Any, pieces: Sequence[tuple[str, str]], structure: _Structure, offsets: bool
) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Tokenise pieces of texts as they stand: no space is invented where the text before them goes on.

    SentencePiece tokenizers put a space before any text. A piece that follows other text is therefore tokenised
    behind a character that nothing merges with, and one that follows a special token behind a special token;
    what that adds is cut off again.
    """
    if not structure.adds_prefix or not tokenizer.is_fast:
        return _encode_plain(tokenizer, [piece for piece, _ in pieces], offsets)
    results: list[tuple[list[int], list[tuple[int, int]]] | None] = [None] * len(pieces)
    for guard, context in (("", "first"), (structure.end_token, "token"), ("\n", "text"), (".", "text"), ("", "text")):
        open_ = [i for i, (_, c) in enumerate(pieces) if c == context and results[i] is None]
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


_IMAGE = re.compile(r"^\s*(data:image/\S+|https?://\S+\.(png|jpe?g|gif|webp|bmp|svg)(\?\S*)?)\s*$", re.IGNORECASE)


def is_image(text: str) -> bool:
    """Whether a text is nothing but the address or the data of an image."""
    return len(text) < 1 << 20 and bool(_IMAGE.match(text)) or text.startswith("data:image/")
