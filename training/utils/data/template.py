"""Chat templates: which one a tokenizer has, what a template puts around an answer, what it makes of a conversation.

A template is probed once with plain conversations (`structure_of`). chat.py turns its text into token ids and masks.
"""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError

from training.utils.data.template_file import TemplateFile, read_template_file
from training.utils.errors import UserError, half_character

# A turn: role (system, user, assistant, tool) and content, and where a row has it: reasoning, tool_calls and, in the
# first turn, tools (both as JSON), name and tool_call_id of a tool's answer, train ("no": step 1 does not learn it;
# "elsewhere": another row does)
Message = dict[str, str]

DEFAULT_TEMPLATE = "human_assistant"
_SYSTEM_START, _SYSTEM_END = "{#- system message -#}", "{#- end of system message -#}"
_STOP_IDS = re.compile(r"\{# stop ids: ([\d ]+) #\}\n?")
_PROBES = ("Kwzhia", "Mvtrqe", "Zplodu", "Gnybis")


class RowError(UserError):
    """A row that can not be used; ``--on_bad_row skip`` counts it and goes on.

    Args:
        about: the column, or the key of a message, that the row is refused for; empty if it is none alone.
    """

    def __init__(self, text: str, about: str = "") -> None:
        super().__init__(text)
        self.about = about


@dataclass(frozen=True)
class Structure:
    """What a template puts around an assistant's text, found by rendering plain conversations.

    Attributes:
        end_token: what ends the last answer.
        stop_ids: what ends a response: EOS, the end token, the token that ends a call of a tool, and further ones
            that ``--stop_ids`` or a conversation template named.
        leads: texts between the generation prompt and the answer.
        tails: texts between the answer and the end token.
        closes, closes_call: what is put behind a last answer, or a last call of a tool, that the template leaves
            open, as GLM-4's does (there the header of the next turn ends it); else empty.
        rewrites: an earlier answer is written in another way than the last one, so one rendering has one answer.
        adds_prefix: the tokenizer puts a space before a text that stands alone (SentencePiece).
        takes_blanks: special tokens that swallow the white space after them (Phi-3's): it becomes no token of its own.
    """

    end_token: str
    stop_ids: tuple[int, ...]
    leads: tuple[str, ...]
    tails: tuple[str, ...]
    closes: str
    closes_call: str
    rewrites: bool
    adds_prefix: bool
    takes_blanks: tuple[str, ...]


_structures: weakref.WeakKeyDictionary[Any, tuple[str, Structure]] = weakref.WeakKeyDictionary()


def _split_system(template: str) -> tuple[str, str]:
    """The block that `_with_system_message` put before a template, empty if none, and the template."""
    end = template.find(_SYSTEM_END)
    cut = end + len(_SYSTEM_END) if template.startswith(_SYSTEM_START) and end > 0 else 0
    return template[:cut], template[cut:]


def _with_system_message(template: str, system_message: str) -> str:
    """Put a default system message into the template itself, so that it travels with every saved tokenizer."""
    # A JSON string is a Jinja string, if it has no escaped surrogates.
    literal = json.dumps(system_message, ensure_ascii=False)
    return (
        f"{_SYSTEM_START}{{%- if not messages or messages[0]['role'] != 'system' -%}}"
        f"{{%- set messages = [{{'role': 'system', 'content': {literal}}}] + messages -%}}"
        f"{{%- endif -%}}{_SYSTEM_END}{_split_system(template)[1]}"  # without one that an earlier step put there
    )


def _with_stop_ids(template: str, stop_ids: Sequence[int]) -> str:
    """Put further stop ids into the template as a comment, so that they travel with every saved tokenizer."""
    system, own = _split_system(template)
    ids = " ".join(map(str, dict.fromkeys([*_further_stop_ids(own), *stop_ids])))
    return f"{system}{{# stop ids: {ids} #}}\n{_STOP_IDS.sub('', own)}"  # transformers leaves the newline out


def _further_stop_ids(template: str) -> list[int]:
    found = _STOP_IDS.search(template)
    return [int(number) for number in found[1].split()] if found else []


def configure_chat_template(
    tokenizer: Any, chat_template: str = "", system_message: str = "", stop_ids: Sequence[int] = ()
) -> None:
    """Set ``tokenizer.chat_template``: what it has, a named or given file, or the project's default.

    Args:
        tokenizer: a transformers tokenizer; it is changed in place, so saving it saves the template.
        chat_template: a name or a path, see `read_template_file`; empty keeps the tokenizer's own.
        system_message: put before every conversation that has no system turn; default: the file's.
        stop_ids: tokens that end a response, beside those of the template and of its file.

    Raises:
        UserError: no such template, it is not valid Jinja, it loses a turn or the system message, it can not be
            masked exactly, or a stop id is no token or one that stands inside texts.
    """
    file = read_template_file(chat_template) if chat_template else TemplateFile()
    current = tokenizer.chat_template
    if isinstance(current, dict):  # some tokenizers carry one template for chat and one for tools
        current = current.get("default")
    template = file.template or _template_of(chat_template, file.model) or current
    template = template or read_template_file(DEFAULT_TEMPLATE).template
    further = [*file.stop_ids, *stop_ids]
    if file.end_of_assistant not in ("", *added_texts(tokenizer)):
        template, further = _ended_by_eos(tokenizer, template, file.end_of_assistant, further)
    if further:
        _check_stop_ids(tokenizer, further)
        template = _with_stop_ids(template, further)
    message = system_message or file.system_message
    tokenizer.chat_template = _with_system_message(template, message) if message else template
    _check_it_ends(tokenizer)
    structure_of(tokenizer)
    _check_end_of_assistant(tokenizer, file.end_of_assistant, chat_template)
    for key in file.unread:
        from training.utils.run.distributed import say_once  # imports torch

        say_once(f"note: {chat_template}: {key} is for ColossalChat's own reward functions and is not read here")
    if message.strip() not in render_text(tokenizer, [{"role": "user", "content": _PROBES[0]}]):
        whose = "--system_message" if system_message else f"--chat_template {chat_template}"
        raise UserError(
            f"{whose}: the chat template writes no system turn, so the message would be lost; "
            "choose another --chat_template"
        )


def _template_of(file: str, model: str) -> str:
    """The chat template of the model that a conversation template names."""
    if not model:
        return ""
    from training.utils.model.loading import resolve_model
    from training.utils.model.tokenizer import read_tokenizer

    where = f"--chat_template {file}: chat_template"
    found = read_tokenizer(resolve_model(model, where, weights=False), f"{where} {model}").chat_template
    template = found.get("default") if isinstance(found, dict) else found
    if not template:
        raise UserError(f"{where} {model}: its tokenizer has no chat template")
    return str(template)


def _ended_by_eos(tokenizer: Any, template: str, end: str, stop_ids: list[int]) -> tuple[str, list[int]]:
    """A template whose turns end with EOS instead of a text of several tokens, by which no model could be stopped.

    Returns:
        The template, and the stop ids without those of the text's own tokens.
    """
    tokens, eos = _ids_of(tokenizer, end), tokenizer.eos_token
    if not any(character in eos for character in "'\"\\"):  # it may stand in a string of the template
        template = template.replace(end, eos)
    return template, [] if stop_ids == tokens else stop_ids


def _check_stop_ids(tokenizer: Any, stop_ids: Sequence[int]) -> None:
    names = {number: text for text, number in tokenizer.get_vocab().items()}
    for number in stop_ids:
        if number not in names:
            raise UserError(f"stop id {number}: the tokenizer has no such token, its ids end at {max(names)}")
        if number in tokenizer.added_tokens_decoder or number in tokenizer.all_special_ids:
            continue
        text = tokenizer.decode([number])
        if number in _ids_of(tokenizer, text):
            raise UserError(
                f"stop id {number} is {text!r}, which stands inside texts, so answers would end in the middle; "
                "a response ends with a special token"
            )


def _check_end_of_assistant(tokenizer: Any, end: str, file: str) -> None:
    """A conversation template must claim the end that its template writes, or one that ends responses all the same."""
    written, tokens = structure_of(tokenizer).end_token, _ids_of(tokenizer, end)
    if end in ("", written):
        return
    from training.utils.run.distributed import say_once  # imports torch

    if end not in added_texts(tokenizer):
        what = f"{len(tokens)} tokens of this tokenizer, and one must end a response"
        if written != tokenizer.eos_token:
            raise UserError(f"--chat_template {file}: end_of_assistant {end!r} is {what}; chat_template ends an answer "
                            f"with {written!r}, so name that")  # fmt: skip
        say_once(f"note: {file}: end_of_assistant {end!r} is {what}: every answer ends with {written!r} in its place")
    elif tokens[-1] not in stop_token_ids(tokenizer):
        raise UserError(f"--chat_template {file}: end_of_assistant is {end!r}, and chat_template ends an answer with "
                        f"{written!r}; write the same in both")  # fmt: skip
    else:
        say_once(f"note: {file}: chat_template ends an answer with {written!r}; {end!r} ends a response, too")


def _ids_of(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, nothing added."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


_MOST_SECONDS, _MOST_BYTES = 20, 1 << 30  # that a template may take for a plain question


def _check_it_ends(tokenizer: Any) -> None:
    """Refuse a template with loops or texts without end, by rendering a question in a process with bounds.

    Raises:
        UserError: it takes more than 20 s or 1 GiB.
    """
    if sys.platform != "linux" or _structures.get(tokenizer, ("",))[0] == tokenizer.chat_template:
        return
    import resource

    with warnings.catch_warnings():
        # Python 3.12 warns of other threads' locks, of which Jinja needs none
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            child = os.fork()
        except OSError:  # a process that has reserved more than the machine has can not: nothing is refused untried
            return
    if child == 0:
        code = 1
        try:
            mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (mapped + _MOST_BYTES,) * 2)
            resource.setrlimit(resource.RLIMIT_CPU, (_MOST_SECONDS, _MOST_SECONDS))
            render_text(tokenizer, [{"role": "user", "content": _PROBES[0]}])
            code = 0
        except MemoryError:
            code = 2
        finally:
            os._exit(code)  # other errors are told by the probes that follow, in this program's own process
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 2:
        raise UserError(
            f"the chat template takes more than {_MOST_SECONDS} s or {_MOST_BYTES >> 30} GiB for one question"
        )


def stop_token_ids(tokenizer: Any) -> list[int]:
    """The tokens that end a response: EOS first, then those that end a turn and a call of a tool, and further ones."""
    return list(structure_of(tokenizer).stop_ids)


def calls_of(message: Message) -> list[dict[str, Any]]:
    """The calls of tools in an assistant's turn: {"type": "function", "function": {"name", "arguments"}}."""
    return json.loads(message.get("tool_calls", "[]"))


def _for_template(message: Message) -> dict[str, Any]:
    """A message under the names that templates read; for reasoning there are two."""
    shown: dict[str, Any] = {"role": message["role"], "content": message["content"]}
    shown |= {name: message[name] for name in ("name", "tool_call_id") if name in message}
    if "reasoning" in message:
        shown |= dict.fromkeys(("reasoning_content", "thinking"), message["reasoning"])
    if "tool_calls" in message:
        shown["tool_calls"] = calls_of(message)
    return shown


def render_text(tokenizer: Any, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
    """The chat template's text for ``messages``.

    Raises:
        RowError: the template refuses the conversation (its own message is given).
        UserError: the template is not valid.
    """
    try:
        text = tokenizer.apply_chat_template(
            [_for_template(message) for message in messages],
            tools=next((json.loads(message["tools"]) for message in messages if "tools" in message), None),
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
    if half := half_character(str(text)):
        raise RowError(f"the conversation or its chat template holds half a character, {half}, which is no text")
    return str(text)


def special_texts(tokenizer: Any) -> list[str]:
    """Every text that the tokenizer turns into a special token, longest first."""
    texts = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    texts.update(str(token) for token in tokenizer.all_special_tokens)
    return sorted(texts - {""}, key=lambda text: (-len(text), text))


def forbidden_texts(tokenizer: Any) -> list[str]:
    """What no text of a row may contain: special tokens, and those that end a response, special or not."""
    added, structure = tokenizer.added_tokens_decoder, structure_of(tokenizer)
    ends = {added[number].content for number in structure.stop_ids if number in added}
    return sorted({*special_texts(tokenizer), structure.end_token, *ends}, key=lambda text: (-len(text), text))


def added_texts(tokenizer: Any) -> list[str]:
    """Every token that stands in a text as it is written, special or not, longest first."""
    texts = {token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()}
    return sorted(texts.union(special_texts(tokenizer)), key=lambda text: (-len(text), text))


def _first_added(text: str, added: Sequence[str]) -> tuple[int, str] | None:
    found = [(text.find(token), -len(token), token) for token in added if token in text]
    if not found:
        return None
    position, _, token = min(found)
    return position, token


@dataclass(frozen=True)
class _Around:
    """What stands around one answer of a probe; ``end`` is empty where no special token follows."""

    lead: str = ""
    tail: str = ""
    end: str = ""
    rest: str = ""


def structure_of(tokenizer: Any) -> Structure:
    """Probe the tokenizer's template once.

    Raises:
        UserError: it has none, the template loses a turn, or it can not be masked exactly.
    """
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template; name one with --chat_template")
    known = _structures.get(tokenizer)
    if known is not None and known[0] == tokenizer.chat_template:
        return known[1]
    added = added_texts(tokenizer)
    earlier, *last = (_probe(tokenizer, turns, index, added) for turns, index in ((4, 1), (2, 1), (4, 3)))
    closes = ""
    if not any(around.end for around in last) and earlier.end not in ("", tokenizer.bos_token):
        closes = earlier.tail + earlier.end
        last = [_Around(around.lead, earlier.tail, earlier.end, "") for around in last]
    ends = {around.end for around in last}
    if "" in ends:
        raise UserError(
            "the chat template does not end an assistant turn with a special token of this tokenizer "
            f"(it writes {last[0].rest!r}), so a model could never stop; "
            f"end the turn with {{{{ eos_token }}}}, or choose --chat_template {DEFAULT_TEMPLATE}"
        )
    if len(ends) > 1:
        raise UserError(
            f"the chat template can not be masked exactly: it ends assistant turns with different tokens {sorted(ends)}"
        )
    (end_token,) = ends
    call = _end_of_call(tokenizer, added, open_=bool(closes))
    stops = [tokenizer.eos_token, end_token, call]
    ids = [int(tokenizer.convert_tokens_to_ids(token)) for token in stops if token]
    ids += _further_stop_ids(tokenizer.chat_template)
    found = Structure(
        end_token=end_token,
        stop_ids=tuple(dict.fromkeys(ids)),
        leads=tuple(sorted({around.lead for around in last}, key=len, reverse=True)),
        tails=tuple(sorted({around.tail for around in last}, key=len, reverse=True)),
        closes=closes,
        closes_call=closes and (call or closes),
        rewrites=(earlier.lead, earlier.tail, earlier.end) not in {(a.lead, a.tail, a.end) for a in last},
        adds_prefix=_adds_prefix(tokenizer),
        takes_blanks=tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.rstrip),
    )
    _structures[tokenizer] = (tokenizer.chat_template, found)
    return found


def _probe(tokenizer: Any, turns: int, index: int, added: Sequence[str]) -> _Around:
    """What stands around answer ``index`` of a plain conversation of so many turns."""
    roles = ("user", "assistant") * 2
    messages = [{"role": r, "content": c} for r, c in zip(roles[:turns], _PROBES[:turns], strict=True)]
    try:
        full = render_text(tokenizer, messages)
    except RowError as error:
        raise UserError(f"the chat template fails on a plain conversation: {error}") from None
    check_no_turn_lost(full, messages)
    try:
        start = len(generation_prompt(tokenizer, messages, index, full))
    except RowError:
        if index == turns - 1:
            raise
        return _Around()  # as the last answer alone it may be masked
    content = messages[index]["content"]
    at = full.index(content, start)
    if any(message["content"] in full[start:at] for message in messages[:index]):
        raise UserError("the chat template can not be masked exactly: its generation prompt comes before a user turn")
    after = at + len(content)
    following = full.find(messages[index + 1]["content"], after) if index + 1 < turns else len(full)
    rest = full[after:following]
    position, token = _first_added(rest, added) or (len(rest), "")
    return _Around(full[start:at], rest[:position], token, rest)


def _end_of_call(tokenizer: Any, added: Sequence[str], open_: bool) -> str:
    """What ends a turn that calls a tool: its last special token, or where turns are open the first behind it."""
    function = {"name": _PROBES[1], "arguments": {_PROBES[2]: _PROBES[3]}}
    calls = json.dumps([{"type": "function", "id": "a" * 9, "function": function}])
    messages = [{"role": "user", "content": _PROBES[0]}, {"role": "assistant", "content": "", "tool_calls": calls}]
    if open_:
        messages.append({"role": "tool", "content": _PROBES[0], "tool_call_id": "a" * 9})
    try:
        text = render_text(tokenizer, messages)
    except UserError:
        return ""
    if not 0 <= text.find(_PROBES[1]) < text.find(_PROBES[3]):
        return ""
    rest = text[text.find(_PROBES[3]) + len(_PROBES[3]) :]
    if open_:
        return (_first_added(rest, added) or (0, ""))[1]
    return max((token for token in special_texts(tokenizer) if token in rest), key=rest.rfind, default="")


def _adds_prefix(tokenizer: Any) -> bool:
    """Whether a text that stands alone is tokenised as if a space stood before it."""
    alone, after = tokenizer(["x", "\nx"], add_special_tokens=False)["input_ids"]
    return after[-len(alone) :] != alone


def check_no_turn_lost(full: str, messages: Sequence[Message]) -> None:
    """Raise a `RowError` if a turn is not in a conversation's text.

    What an answer has before ``</think>`` may be missing: templates leave it out of earlier turns.
    """
    position = 0
    for message in messages:
        content = message["content"].strip()
        forms = [content, json.dumps(content, ensure_ascii=False)[1:-1]]
        if message["role"] == "assistant":
            forms.append(content.rpartition("</think>")[2].strip())
        elif message["role"] != "tool":
            forms = forms[:1]
        found, form = next(((at, form) for form in forms if (at := full.find(form, position)) >= 0), (-1, ""))
        if found < 0:
            raise lost(message)
        position = found + len(form)


def check_tools_written(tokenizer: Any, messages: Sequence[Message], full: str, add_generation_prompt: bool) -> None:
    """Raise a `RowError` if a conversation's text is the same without one of its tools or calls of tools."""
    for index, message in enumerate(messages):
        for key, what in (("tools", "tools"), ("tool_calls", "call of a tool")):
            listed = json.loads(message.get(key, "[]"))
            for number, one in enumerate(listed):
                others = json.dumps([*listed[:number], *listed[number + 1 :]])
                without = [*messages[:index], {**message, key: others}, *messages[index + 1 :]]
                if _renders_as(tokenizer, without, add_generation_prompt, full):
                    raise RowError(
                        f"the chat template writes no {what} ({one['function']['name']} is lost); "
                        "choose a --chat_template that does, or leave the row out",
                        about=key,
                    )


def _renders_as(tokenizer: Any, messages: Sequence[Message], add_generation_prompt: bool, text: str) -> bool:
    try:
        return render_text(tokenizer, messages, add_generation_prompt) == text
    except RowError:  # the template misses what was taken away
        return False


def lost(message: Message, what: str = "") -> RowError:
    """The error of a turn that a template does not write, or of its reasoning."""
    error = f"the chat template loses {what}the {message['role']} turn {short(message['content'])!r}"
    if not what:
        return RowError(error)
    advice = "choose a --chat_template that writes it, or put it into the text as the model writes it"
    return RowError(f"{error}; {advice}", about="reasoning")


def generation_prompt(tokenizer: Any, messages: Sequence[Message], index: int, full: str) -> str:
    """The text before answer ``index``, generation prompt included, which must begin ``full``.

    Raises:
        RowError: it does not.
    """
    prefix = render_text(tokenizer, messages[:index], add_generation_prompt=True)
    if not full.startswith(prefix):
        number = sum(message["role"] == "assistant" for message in messages[: index + 1])
        raise RowError(
            "the chat template can not be masked exactly: the generation prompt before assistant turn "
            f"{number} is not a prefix of the whole conversation; choose another --chat_template"
        )
    return prefix


def short(text: str, width: int = 40) -> str:
    """The beginning of a text, for an error."""
    return text if len(text) <= width else text[: width - 3] + "..."
