"""What a row can say, and the words that formats use to say it: conversations, turns, checked texts.

A format (shapes.py) or a named adapter (adapters.py) turns a raw row into examples with these functions. They refuse
what breaks the rules of a conversation (`RowError`) and leave out what teaches nothing (`Dropped`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from decimal import Decimal
from typing import Any

from training.utils.data.chat import is_image
from training.utils.data.template import Message, RowError
from training.utils.errors import half_character
from training.utils.run.files import once_each

Row = Mapping[str, Any]


class Dropped(Exception):
    """A sound row that nothing can be learned from (a tie, an empty response); it is counted and left out."""


@dataclass(frozen=True)
class Example:
    """What a row says.

    Attributes:
        prompt: the conversation up to the last user turn; empty for plain text.
        response: the demonstration that follows it, turns from the first assistant turn on; may be empty.
        chosen, rejected: the preferred and the other continuation; both or neither. Of a ranking best and worst.
        answers: of a ranking, which has three or more: all of them, best first; else empty.
        ranks: of each of them its place, never falling; those with the same are tied.
        text: plain text for language modelling, instead of all the others.
    """

    prompt: list[Message] = field(default_factory=list)
    response: list[Message] = field(default_factory=list)
    chosen: list[Message] = field(default_factory=list)
    rejected: list[Message] = field(default_factory=list)
    answers: list[list[Message]] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    text: str = ""

    def compared(self) -> list[list[Message]]:
        """The answers that are compared with one another, best first; empty if there are none."""
        return self.answers or ([self.chosen, self.rejected] if self.chosen else [])

    def pairs(self) -> list[tuple[int, int]]:
        """Which of `compared` is better than which, a tie is none; the best against the worst comes first."""
        ranks = self.ranks or ([1, 2] if self.chosen else [])
        count = len(ranks)
        return [(i, j) for i in range(count) for j in reversed(range(i + 1, count)) if ranks[i] < ranks[j]]


Converter = Callable[[Row], list[Example]]

MOST_MESSAGES = 1000  # of a conversation: each answer renders all turns before it, which takes half a second then
_ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model", "chatgpt", "bard", "bing"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "observation", "function", "ipython", "tool_response"), "tool"),
    "function_call": "assistant",  # ShareGPT's turn that is a call of a tool and nothing else
}


def _whole(text: str, where: str) -> str:
    """A text as it is; `RowError` if it holds half a character."""
    if half := half_character(text):
        raise RowError(f"{where} holds half a character, {half}, which is no text")
    return text


_KINDS = {bool: "a boolean", int: "a number", float: "a number", str: "a text", list: "a list", dict: "an object"}


def a_kind(value: Any) -> str:
    """What a value of JSON is, with its article."""
    return "empty" if value is None else _KINDS.get(type(value), f"a value of type {type(value).__name__}")


def text_of(row: Row, name: str) -> str:
    """A column as text; None is empty. WebGPT and mkqa wrap the text in a dict."""
    return _column_text(row.get(name), name)


def _column_text(value: Any, name: str) -> str:
    if isinstance(value, dict) and value and not {"full_text", "image_url"} & value.keys():
        keys = ", ".join(str(key) for key in value)[:80]
        raise RowError(f"column {name!r} holds an object where text should be; --column_map {name}=COLUMN.KEY takes "
                       f"one of its keys: {keys}")  # fmt: skip
    return plain_text(value, f"column {name!r}")


def plain_text(value: Any, where: str) -> str:
    """A value as text, a number or a date as tables show it; None and NaN are empty, ``where`` is what errors name."""
    if value is None or (isinstance(value, float) and value != value):  # NaN is how tables write "nothing"
        return ""
    if isinstance(value, dict) and isinstance(value.get("full_text"), str):
        value = value["full_text"]
    if isinstance(value, list) and value and all(isinstance(part, dict) and "type" in part for part in value):
        value = _text_parts(value, where)
    if isinstance(value, (int, float, Decimal, date)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        kind = "an image" if isinstance(value, dict) and "image_url" in value else a_kind(value)
        raise RowError(f"{where} holds {kind} where text should be")
    if is_image(_whole(value, where)):
        raise Dropped("an image's address where text should be")
    return value


def truth_of(value: Any, where: str) -> bool | None:
    """A mark as true or false, whatever a table made of it; None if there is none.

    Raises:
        RowError: neither true, yes or 1, nor false, no or 0.
    """
    if value is None or value == "" or value != value:  # NaN is how tables write "nothing"
        return None
    word = str(value).strip().lower()
    if not isinstance(value, (bool, int, float, str)) or word not in _TRUTHS:
        raise RowError(f"{where} is {value!r}, it must be true, yes or 1, or false, no or 0")
    return _TRUTHS[word]


_TRUTHS = {
    **dict.fromkeys(("true", "yes", "1", "1.0"), True),
    **dict.fromkeys(("false", "no", "0", "0.0"), False),
}


def _text_parts(parts: Sequence[dict[str, Any]], where: str) -> str:
    """The multi-part content of chat APIs, if every part is text."""
    for part in parts:
        if part["type"] != "text" or not isinstance(part.get("text"), str):
            kind = "an image" if "image" in str(part["type"]) else f"a part of type {part['type']!r}"
            raise RowError(f"{where} holds {kind} where text should be")
    return "\n".join(part["text"] for part in parts)


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, dict):
        raise RowError(f"{where} is {a_kind(item)}, it must have a role and a content")
    role = item.get("role", item.get("from"))
    if role is None:
        raise RowError(f"{where} has no role")
    if str(role).lower() not in _ROLES:
        raise RowError(f"{where} has the role {role!r}; known are system, user (human), assistant (gpt) and tool")
    for key, kind in _UNREAD.items():
        if has_value(item.get(key)):
            raise RowError(f"{where} has {key}: {kind} can not be trained on, and without it the row means something "
                           "else; remove the key, or the row", about=key)  # fmt: skip
    more = _more(item, _ROLES[str(role).lower()], where)
    if str(role).lower() == "function_call":
        more["tool_calls"] = _calls(item.get("content", item.get("value")), where)
        item = {"content": ""}
    if "content" not in item and "value" not in item and "tool_calls" not in more:
        raise RowError(f"{where} has no content")
    message = {
        "role": _ROLES[str(role).lower()],
        "content": plain_text(item.get("content", item.get("value")), f"the content of {where}"),
    }
    untrained = not _is_trained(item, where) and message["role"] == "assistant"
    return message | more | (NOT_TRAINED if untrained else {})


NO_TEXT = dict.fromkeys(("images", "image", "videos", "video", "audios", "audio"), "what is no text")
# Keys of a message that change what it means, for which there is no place in a conversation here
_UNREAD = {"tool_responses": "answers of tools beside the text"} | NO_TEXT
_REASONING = ("reasoning_content", "reasoning", "thinking")


def _more(item: Mapping[str, Any], role: str, where: str) -> dict[str, str]:
    """What a message says beside its text: reasoning, calls of tools, whose answer a tool's answer is.

    Raises:
        RowError: they stand where nothing can be made of them.
    """
    more: dict[str, str] = {}
    for key in ("tool_calls", "function_call", *_REASONING):
        if not has_value(item.get(key)):
            continue
        if role != "assistant":
            raise RowError(f"{where} has {key}, which only an assistant's turn can have")
        if key in _REASONING:
            more["reasoning"] = plain_text(item[key], f"{key} of {where}")
        else:
            more["tool_calls"] = _calls(item[key], where)
    if role == "tool":
        given = [key for key in ("name", "tool_call_id") if has_value(item.get(key))]
        more |= {key: _whole(str(item[key]), f"{key} of {where}") for key in given}
    return more


def _json(value: Any, where: str) -> Any:
    """A value that may also stand as JSON in a text (a CSV can hold nothing else), without what is empty in it.

    Tables give every dict the keys of all others, empty where a row has none.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value, object_pairs_hook=once_each)
        except (json.JSONDecodeError, RecursionError):
            raise RowError(f"{where} should be JSON, it is {value[:60]!r}") from None
        except ValueError as error:  # of once_each
            raise RowError(f"{where}: {error}") from None
    if isinstance(value, dict):
        return {key: _json(item, where) if isinstance(item, (dict, list)) else item
                for key, item in value.items() if item is not None}  # fmt: skip
    if isinstance(value, list):
        return [_json(item, where) if isinstance(item, (dict, list)) else item for item in value]
    return value


def _function(value: Any) -> dict[str, Any]:
    """A tool, or a call of one, without what OpenAI's form has around it; empty if it has no name."""
    function = value.get("function", value) if isinstance(value, dict) else None
    return function if isinstance(function, dict) and isinstance(function.get("name"), str) else {}


def _calls(value: Any, where: str) -> str:
    """Calls of tools, in any of their usual forms, as chat templates read them; JSON."""
    found = _json(value, f"the call of a tool in {where}")
    calls = []
    for call in found if isinstance(found, list) else [found]:
        if not (function := _function(call)):
            raise RowError(f"{where} calls a tool without its name")
        arguments = _json(function.get("arguments") or {}, f"the arguments of {function['name']} in {where}")
        if not isinstance(arguments, dict):
            raise RowError(f"the arguments of {function['name']} in {where} are {a_kind(arguments)}, "
                           "they must be an object")  # fmt: skip
        number = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        calls.append({**number, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return _whole(json.dumps(calls, ensure_ascii=False), f"the call of a tool in {where}")


def with_tools(example: Example, value: Any) -> Example:
    """Put a row's column of tools (JSON schemas of functions, or OpenAI's form of them) into its conversation.

    Raises:
        RowError: it is no list of functions with names, or the row has no conversation.
    """
    found = _json(value, "the column of tools")
    tools = []
    for tool in found if isinstance(found, list) else [found]:
        if not (function := _function(tool)):
            raise RowError("the column of tools must be a list of functions, each with a name")
        tools.append({"type": "function", "function": function})
    if not example.prompt:
        raise RowError("the row has tools, and no conversation that could use them")
    told = _whole(json.dumps(tools, ensure_ascii=False), "the column of tools")
    return replace(example, prompt=[example.prompt[0] | {"tools": told}, *example.prompt[1:]])


def says_nothing(message: Message) -> bool:
    """Whether a turn has neither text nor a call of a tool."""
    return not (message["content"].strip() or "tool_calls" in message)


# Keys under which data of other programs say whether an assistant's turn is trained on
_MARKS = ("train", "trainable", "loss", "loss_mask", "train_turn")
NOT_TRAINED = {"train": "no"}  # in a message: the turn is part of the conversation, and step 1 does not learn it


def without_marks(messages: Sequence[Message]) -> list[Message]:
    """A conversation as others than step 1 see it: what that does not learn is asked, and compared, as well."""
    return [{key: value for key, value in message.items() if key not in NOT_TRAINED} for message in messages]


def beginning(prompt: Sequence[Message]) -> list[Message]:
    """A prompt up to its first user turn: rows that share it are held out, or given to a step, together.

    A dataset of conversations may have each of their turns as a row, whose prompt holds those before it. White space
    around a turn makes no other one.
    """
    until = 1 + next((i for i, turn in enumerate(prompt) if turn["role"] == "user"), 0)
    return [{**turn, "content": turn["content"].strip()} for turn in without_marks(prompt[:until])]


def has_value(value: Any) -> bool:
    """Whether a cell holds anything: tables write "nothing" as None, NaN, an empty text or list."""
    return not (value is None or value != value or value in ("", [], {}, "[]", "{}", "null", "None"))


def _is_trained(item: Mapping[str, Any], where: str) -> bool:
    """Whether a message's own mark or weight lets it be trained on.

    Raises:
        RowError: a weight between, which no loss here knows.
    """
    if has_value(weight := item.get("weight")):
        if str(weight) not in ("0", "1", "0.0", "1.0", "True", "False"):
            raise RowError(f"{where} has the weight {weight!r}, it must be 0 (not trained on) or 1", about="weight")
        return str(weight) in ("1", "1.0", "True")
    marks = [truth_of(item[key], f"{key} of {where}") for key in _MARKS if has_value(item.get(key))]
    return False not in marks


_OBJECTS_AS_TEXT = re.compile(r"\s*\[\s*\{\s*[\"']")
_LIST_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*["'](role|from|content|value)["']\s*:""")


def unpacked(value: Any, name: str) -> Any:
    """A text that is a list of messages in JSON (a CSV can hold nothing else) as that list; others as they are.

    Raises:
        RowError: a text that begins like such a list and is no JSON.
    """
    if not isinstance(value, str) or not _OBJECTS_AS_TEXT.match(value):
        return value
    try:
        found = json.loads(value, object_pairs_hook=once_each)
    except (ValueError, RecursionError) as error:
        if not _LIST_AS_TEXT.match(value):
            return value
        raise RowError(f"column {name!r} is a text that begins like a list of messages, but no JSON: {error}") from None
    return found if any(_is_message(item) for item in found) else value


def _is_message(item: Any) -> bool:
    """Whether an object has a speaker who is known, or a speaker and a text."""
    who = item.get("role", item.get("from")) if isinstance(item, dict) else None
    return who is not None and (str(who).lower() in _ROLES or bool({"content", "value"} & item.keys()))


def listed(value: Any, name: str) -> list[Any]:
    """A column that holds a list, in a text (a CSV can hold nothing else) as JSON.

    Raises:
        RowError: it is none.
    """
    if isinstance(value, str):
        value = _json(value, f"column {name!r}")
    if not isinstance(value, list):
        raise RowError(f"column {name!r} is {a_kind(value)}, it must be a list")
    return value


def messages_of(value: Any, name: str) -> list[Message]:
    """A column that holds a conversation: a list of messages, one message, or a text (a transcript or one turn).

    A list may also stand in a text, as JSON. A system turn without content is left out.
    """
    value = unpacked(value, name)
    if isinstance(value, str):
        text = plain_text(value, f"column {name!r}")
        return parse_transcript(text) or [user_turn(text)]
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise RowError(f"column {name!r} is {a_kind(value)}, it must be a text or a list of messages")
    if len(value) > MOST_MESSAGES:
        raise RowError(f"column {name!r} holds {len(value)} messages, at most {MOST_MESSAGES} are read")
    messages = [_message(item, f"message {i + 1} of {name!r}") for i, item in enumerate(value)]
    empty_system = messages[:1] and messages[0]["role"] == "system" and not messages[0]["content"].strip()
    return messages[1:] if empty_system else messages


def user_turn(text: str) -> Message:
    """A message of the user."""
    return {"role": "user", "content": text}


def assistant_turn(text: str) -> list[Message]:
    """An answer: the one message that follows a prompt."""
    return [{"role": "assistant", "content": text}]


def _check_turns(messages: Sequence[Message]) -> None:
    """The rules of a conversation: system only first, then user and assistant in turn, no empty turn.

    Tools answer after the assistant, and the assistant goes on after their last answer.
    """
    before = ""
    for message in messages[1:] if messages and messages[0]["role"] == "system" else messages:
        role = message["role"]
        if role == "system":
            raise RowError("a system turn stands after the first message")
        if role not in _FOLLOWS[before]:
            if not before:
                raise RowError(f"the conversation starts with the {role}")
            raise RowError(f"two {role} turns in a row" if role == before else f"a {role} turn after the {before}'s")
        if role == "assistant" and says_nothing(message):
            raise Dropped("empty response")
        if role == "user" and says_nothing(message):
            raise RowError("an empty user turn")
        before = role


# Which roles may follow a role
_FOLLOWS = {"": ("user",), "user": ("assistant",), "assistant": ("user", "tool"), "tool": ("tool", "assistant")}


def with_system(example: Example, system: str) -> Example:
    """Put a row's system column before its conversation, unless that has a system turn or is plain text."""
    if not system.strip() or not example.prompt or example.prompt[0]["role"] == "system":
        return example
    return replace(example, prompt=[{"role": "system", "content": system}, *example.prompt])


def history_of(value: Any) -> list[Message]:
    """A column of earlier turns: pairs of a question and its answer, or messages; in a text (of a CSV) as JSON."""
    value = value or []
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = listed(value, "history")
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return messages_of(value, "history")
    if not isinstance(value, list) or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in value):
        raise RowError("column 'history' must be a list of pairs, each a question and its answer", about="history")
    turns = []
    for question, answer in value:
        turns += [user_turn(plain_text(question, "history")), *assistant_turn(plain_text(answer, "history"))]
    return turns


def with_history(example: Example, value: Any) -> Example:
    """Put a row's column of earlier turns before its question, unless that is a conversation itself, or plain text."""
    system = example.prompt[:1] if example.prompt and example.prompt[0]["role"] == "system" else []
    asked = example.prompt[len(system) :]
    if len(asked) != 1:
        return example
    prompt = [*system, *history_of(value), *asked]
    _check_turns(prompt)
    return replace(example, prompt=prompt)


def conversation(messages: list[Message]) -> Example:
    """Split a conversation into its prompt and its last answer."""
    if not any(message["role"] == "user" for message in messages):
        raise RowError("the conversation has no user turn")
    _check_turns(messages)
    if messages[-1]["role"] == "assistant":
        return Example(prompt=messages[:-1], response=messages[-1:])
    return Example(prompt=messages)


def answered(prompt: str | list[Message], response: str | list[Message]) -> list[Example]:
    """A prompt with its answer; a prompt that is a whole transcript is taken apart."""
    messages = as_prompt(prompt)
    answer = assistant_turn(response) if isinstance(response, str) else response
    return [conversation([*messages, *answer])]


def as_prompt(prompt: str | list[Message]) -> list[Message]:
    """A prompt as messages; a text may be a transcript, whose open last turn is cut."""
    if isinstance(prompt, str):
        prompt = parse_transcript(prompt) or [user_turn(prompt)]
    if prompt and prompt[-1]["role"] == "assistant" and says_nothing(prompt[-1]):
        prompt = prompt[:-1]  # "Assistant:" at the end of a transcript is its generation prompt
    return prompt


def asked(row: Row, name: str) -> str | list[Message]:
    """A column that asks, as it is for `as_prompt`: a text, perhaps a transcript, or messages."""
    value = unpacked(row[name], name)
    return messages_of(value, name) if isinstance(value, list) and not is_parts(value) else text_of(row, name)


def continuation(prompt: list[Message], value: Any, name: str, transcript: bool = False) -> list[Message]:
    """The answer to ``prompt`` in a column: a text, messages or a transcript, with the prompt or without; [] if empty.

    Args:
        transcript: the prompt was a transcript, whose answers begin with a space that is none of theirs.

    Raises:
        Dropped: a transcript that begins with another prompt.
    """
    said = [{**message, "content": message["content"].strip()} for message in prompt if message["role"] != "system"]
    value = unpacked(value, name)
    one = isinstance(value, dict) and value.keys() & {"role", "from"}
    if one or (isinstance(value, list) and not is_parts(value)):
        turns = messages_of(value, name)
        has_system = any(turn["role"] == "system" for turn in turns)
        before = [message for message in prompt if has_system or message["role"] != "system"]
        return turns[len(before) :] if turns[: len(before)] == before else turns  # some datasets repeat the prompt
    text = _column_text(value, name)
    turns = parse_transcript(text)
    if turns and turns[: len(said)] != said:
        raise Dropped("differing prefixes")
    if turns:
        return turns[len(said) :]
    return assistant_turn(text.strip() if transcript else text) if text.strip() else []


def preference(
    prompt: list[Message], chosen: list[Message], rejected: list[Message], response: Sequence[Message] = ()
) -> list[Example]:
    """A prompt with its two answers, checked, and a demonstration if there is one."""
    if not any(message["role"] == "user" for message in prompt):
        raise RowError("the prompt has no user turn")
    for answer in (chosen, rejected):
        if not answer or says_nothing(answer[-1]):
            raise Dropped("empty response")
        if answer[-1]["role"] != "assistant":
            raise RowError("chosen and rejected must end with an assistant turn")
        _check_turns([*prompt, *answer])
    if response:
        _check_turns([*prompt, *response])
    return [Example(prompt=prompt, response=list(response), chosen=chosen, rejected=rejected)]


def demonstration(example: Example) -> tuple[list[Message], list[Message]]:
    """What step 1 learns from: the turns before the last answer, and that answer; two empty lists if there is none.

    Earlier turns of an answer count as prompt, so that a long row loses whole oldest turns. Last turns of the user or
    of tools that nobody answers are left out.
    """
    turns = [*example.prompt, *(example.response or example.chosen)]
    while turns and turns[-1]["role"] in ("user", "tool"):
        turns.pop()
    return (turns[:-1], turns[-1:]) if turns and turns[-1]["role"] == "assistant" else ([], [])


# All of the white space before something, as a group: where `\s*` may begin within it, n blank lines take n * n steps
BLANKS = r"(?<!\s)(\s*+)"
_TURN = re.compile(f"{BLANKS}(Human|Assistant):")
_IN_LINE = re.compile(r"(.*\S)\s+Assistant:", re.DOTALL)  # DeepSpeed-Chat's own files: "Human: ... Assistant:"


def parse_transcript(text: str) -> list[Message]:
    r"""The turns of a "\n\nHuman: ... \n\nAssistant: ..." text, [] if it is none; an open last turn is empty."""
    text = text.replace("\r\n", "\n")
    heads = [head for head in _TURN.finditer(text) if "\n\n" in head[1] or not head.start()]
    if not heads or heads[0].start() or heads[0][2] != "Human":
        return []
    ends = [*(head.start() for head in heads[1:]), len(text)]
    messages = [
        {"role": _ROLES[head[2].lower()], "content": text[head.end() : end].strip()}
        for head, end in zip(heads, ends, strict=True)
    ]
    if messages[-1]["role"] == "user" and (asked := _IN_LINE.fullmatch(messages[-1]["content"])):
        messages[-1:] = [{"role": "user", "content": asked[1]}, {"role": "assistant", "content": ""}]
    for before, after in zip(messages, messages[1:], strict=False):
        if before["role"] == after["role"]:  # hh-rlhf has a few; which text belongs to whom can not be told
            raise Dropped(f"transcript with two {before['role']} turns in a row")
    return messages


def is_parts(value: Any) -> bool:
    """Whether a value is the multi-part content of chat APIs, not a list of messages."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and "type" in value[0]


def first_item(value: Any, name: str) -> str:
    """The first of a list of texts, or of dicts that hold a text; `Dropped` if there is none."""
    if value is None or value == []:
        raise Dropped(f"no {name}")
    if not isinstance(value, list):
        raise RowError(f"column {name!r} is {a_kind(value)}, it must be a list")
    item = value[0]
    return plain_text(item.get("text") if isinstance(item, dict) else item, f"column {name!r}")
