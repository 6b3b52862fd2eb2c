"""Formats: a raw row of any known shape becomes conversations, and its columns decide which shape it is.

A column `system` is put before what they return, for every format alike (columns.py).
To add a format, write a function from a row to examples with the words of conversations.py, give it a line in
`FORMATS` (tried from the top; the first whose columns are all there counts) and a line in the table of docs/data.md,
which is its test. Datasets whose columns mislead are in adapters.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from training.utils.data.formats.conversations import (
    Converter,
    Dropped,
    Example,
    Row,
    a_kind,
    answered,
    as_prompt,
    asked,
    assistant_turn,
    continuation,
    conversation,
    first_item,
    history_of,
    is_parts,
    messages_of,
    parse_transcript,
    plain_text,
    preference,
    text_of,
    truth_of,
    unpacked,
    user_turn,
    with_system,
)
from training.utils.data.formats.rankings import prompt_answers, prompt_ranking, ranking, rated, tree
from training.utils.data.template import Message, RowError


def prompt_chosen_rejected(row: Row, column: str = "prompt") -> list[Example]:
    """A prompt (a text, a transcript or messages) with a chosen and a rejected answer, and a demonstration if given."""
    value = unpacked(row[column], column)
    empty = value is None or (isinstance(value, str) and not value.strip())
    prompt = [] if empty else as_prompt(messages_of(value, column))
    return _answers_to(row, prompt, isinstance(value, str) and bool(parse_transcript(value)))


def _answers_to(row: Row, prompt: list[Message], transcript: bool) -> list[Example]:
    """The answers of a row to its prompt, which was a transcript or not; without a prompt they are conversations."""
    if all(message["role"] == "system" for message in prompt):
        return [with_system(pair, prompt[0]["content"] if prompt else "") for pair in _transcript_pair(row)]
    prompt = _in_full(row, prompt)
    chosen, rejected, response = (
        continuation(prompt, row.get(name), name, transcript) for name in ("chosen", "rejected", "response")
    )
    if response and not (chosen and rejected):
        return answered(prompt, response)
    return preference(prompt, chosen, rejected, response)


def _in_full(row: Row, prompt: list[Message]) -> list[Message]:
    """The prompt as chosen and rejected repeat it, with the turns that both have before it, such as a system turn."""
    said = [{**message, "content": message["content"].strip()} for message in prompt if message["role"] != "system"]
    found = []
    for name in ("chosen", "rejected"):
        value = unpacked(row.get(name), name)
        turns = messages_of(value, name) if isinstance(value, list) and not is_parts(value) else []
        bare = [{**turn, "content": turn["content"].strip()} for turn in turns]
        end = next((i for i in range(len(said), len(turns)) if bare[i - len(said) : i] == said), 0)
        found.append(turns[:end])
    own = prompt[: prompt[0]["role"] == "system"]
    if not found[0] or found[0] != found[1]:
        return prompt
    if found[0][0]["role"] == "system":
        return found[0] if own in ([], found[0][:1]) else prompt
    return [*own, *found[0]]


def _asked_pair(question: Callable[[Row], str | list[Message]]) -> Converter:
    """Preferences whose prompt is called otherwise; beside whole conversations such a column is metadata."""

    def convert(row: Row) -> list[Example]:
        """One pair."""
        if _is_conversation(row, "chosen") and _is_conversation(row, "rejected"):
            return _transcript_pair(row)
        found = question(row)
        transcript = isinstance(found, str) and bool(parse_transcript(found))
        return _answers_to(row, as_prompt(found) if found else [], transcript)

    return convert


def _context_pair(question: Callable[[Row], str | list[Message]]) -> Converter:
    """`_asked_pair` of a question about a text; a context of messages is the whole prompt."""
    pair = _asked_pair(question)

    def convert(row: Row) -> list[Example]:
        """One pair."""
        value = unpacked(row["context"], "context")
        whole = isinstance(value, list) and any(isinstance(part, dict) for part in value)
        return _context_chosen_rejected(row) if whole else pair(row)

    return convert


def _is_conversation(row: Row, name: str) -> bool:
    """Whether an answer's column holds the turns before the answer, too."""
    value = unpacked(row[name], name)
    if isinstance(value, str):
        return bool(parse_transcript(value))
    messages = messages_of(value, name) if isinstance(value, list) and not is_parts(value) else []
    return bool(messages) and messages[0]["role"] != "assistant"


def _context_chosen_rejected(row: Row) -> list[Example]:
    return prompt_chosen_rejected(row, "context")


def _conversations_pair(row: Row) -> list[Example]:
    return prompt_chosen_rejected(row, "conversations" if "conversations" in row else "messages")


def _transcript_pair(row: Row) -> list[Example]:
    """hh-rlhf: two transcripts; the common prefix ends at the last Assistant turn."""
    if isinstance(unpacked(row["chosen"], "chosen"), list):
        chosen, rejected = messages_of(row["chosen"], "chosen"), messages_of(row["rejected"], "rejected")
    else:
        chosen, rejected = parse_transcript(text_of(row, "chosen")), parse_transcript(text_of(row, "rejected"))
    if not chosen or not rejected:
        raise RowError(r"chosen and rejected have neither a prompt nor '\n\nHuman:' and '\n\nAssistant:' turns; the "
                       "prompt is empty, or its column has another name: --column_map prompt=COLUMN")  # fmt: skip
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        raise Dropped("transcript that does not end with the assistant")
    if chosen[:-1] != rejected[:-1]:
        raise Dropped("differing prefixes")
    return preference(chosen[:-1], chosen[-1:], rejected[-1:])


def _check_not_bad(row: Row) -> None:
    """KTO's rows have a label beside the answer: whether it is a good one."""
    if truth_of(row.get("label"), "label") is False:
        raise Dropped("marked as a bad answer")


def _chat(row: Row) -> list[Example]:
    name = "messages" if "messages" in row else "conversations"
    _check_not_bad(row)
    value = unpacked(row[name], name)
    if not isinstance(value, (list, dict)) and not (isinstance(value, str) and parse_transcript(value)):
        raise RowError(f"column {name!r} is {a_kind(value)}, it must be a list of messages (in a CSV: as JSON)")
    return [conversation(messages_of(value, name))]


def _shp(row: Row) -> list[Example]:
    a, b = text_of(row, "human_ref_a"), text_of(row, "human_ref_b")
    a_is_better = truth_of(row["labels"], "labels")
    if a_is_better is None:
        raise RowError("labels is empty, it must be 1 (A is better) or 0")
    chosen, rejected = (a, b) if a_is_better else (b, a)
    return preference([user_turn(text_of(row, "history"))], assistant_turn(chosen), assistant_turn(rejected))


def webgpt(row: Row) -> list[Example]:
    """WebGPT's comparisons: the answer with the higher score is the chosen one, a tie teaches nothing."""
    answers = [text_of(row, "answer_0"), text_of(row, "answer_1")]
    try:
        scores = [float(row["score_0"]), float(row["score_1"])]
    except (TypeError, ValueError):
        scores = [math.nan, math.nan]
    if any(map(math.isnan, scores)):
        raise RowError(f"the scores must be numbers, they are {row['score_0']!r}, {row['score_1']!r}")
    if scores[0] == scores[1]:
        raise Dropped("tie")
    if scores[0] < scores[1]:
        answers.reverse()
    return preference([user_turn(text_of(row, "question"))], assistant_turn(answers[0]), assistant_turn(answers[1]))


def _summaries(row: Row) -> list[Example]:
    """openai/summarize_from_feedback: a post or an article, two summaries, and which one was chosen."""
    info, summaries = row["info"], row["summaries"]
    if not isinstance(info, dict):
        raise RowError(f"column 'info' is {a_kind(info)}, it must hold a post or an article")
    if not isinstance(summaries, list) or len(summaries) != 2:
        raise RowError("column 'summaries' must be a list of two summaries")
    second = truth_of(row["choice"], "choice")
    if second is None:
        raise RowError("choice is empty, it must be 0 or 1")
    texts = [plain_text(s.get("text") if isinstance(s, dict) else s, "a summary") for s in summaries]
    post = plain_text(info.get("post") or info.get("article"), "column 'info'")
    chosen, rejected = texts[second], texts[not second]
    prompt = [user_turn(f"{post}\n\nTL;DR:")]
    return preference(prompt, assistant_turn(chosen.strip()), assistant_turn(rejected.strip()))


def _stack_exchange(row: Row) -> list[Example]:
    return preference(
        [user_turn(text_of(row, "question"))],
        assistant_turn(text_of(row, "response_j")),
        assistant_turn(text_of(row, "response_k")),
    )


def _marked_solutions(row: Row) -> list[Example]:
    """Grade-school maths with solutions marked right or wrong: each right one is paired with a wrong one."""
    found = [value for value in row.values() if isinstance(value, dict) and {"is_correct", "solution"} <= value.keys()]
    marked = [(truth_of(m["is_correct"], "is_correct"), plain_text(m["solution"], "a solution")) for m in found]
    right, wrong = ([text for mark, text in marked if mark is wanted] for wanted in (True, False))
    prompt, truth = [user_turn(text_of(row, "question"))], assistant_turn(text_of(row, "ground_truth"))
    pairs = [
        pair
        for good, bad in zip(right, wrong, strict=False)
        if good.strip() and bad.strip()
        for pair in preference(prompt, assistant_turn(good), assistant_turn(bad), truth)
    ]
    return pairs or [conversation([*prompt, *truth])]


def _instruction(row: Row) -> str | list[Message]:
    """Alpaca's question: instruction with an optional input (dolly: context) and history."""
    about = dict.fromkeys(_passage(row, name) for name in ("input", "context") if name in row)
    user = "\n\n".join(filter(str.strip, [text_of(row, "instruction"), *about]))
    history = history_of(row.get("history"))
    return [*history, user_turn(user)] if history else user


def _alpaca(row: Row) -> list[Example]:
    """An instruction, and output, response or answer."""
    _check_not_bad(row)
    prompt = as_prompt(_instruction(row))
    answer = next(name for name in ("output", "response", "answer") if name in row)
    value = row[answer]
    if isinstance(value, list) and len(value) > 1 and all(isinstance(text, str) for text in value):
        return ranking(prompt, [assistant_turn(text) for text in value], range(len(value)))  # best first
    return answered(prompt, text_of(row, answer))


def _answer(row: Row, name: str) -> Any:
    """A column that answers; of a question's several answers, each of them right (NQ has such), the first."""
    value = row[name]
    several = name == "answer" and isinstance(value, list) and not any(isinstance(v, (dict, list)) for v in value)
    return next(iter(value), None) if several else value


def _pair_of(prompt: str, response: str) -> Converter:
    """Two columns, one answering the other; each may also be a list of messages."""

    def convert(row: Row) -> list[Example]:
        """One conversation, its answer last."""
        if response != "label":
            _check_not_bad(row)
        ask, turns = unpacked(row[prompt], prompt), as_prompt(asked(row, prompt))
        transcript = isinstance(ask, str) and bool(parse_transcript(ask))
        return answered(turns, continuation(turns, _answer(row, response), response, transcript) or assistant_turn(""))

    return convert


def _source_target(row: Row) -> list[Example]:
    """Seed pre-training rows: an empty source makes the target plain text."""
    if text_of(row, "source").strip():
        return _pair_of("source", "target")(row)
    return _text_alone({"text": row["target"]})


def _text_alone(row: Row) -> list[Example]:
    text = text_of(row, "text")
    if not text.strip():
        raise Dropped("empty text")
    return [Example(text=text)]


def _prompt_only(row: Row) -> list[Example]:
    return [conversation(as_prompt(asked(row, "prompt")))]


def _passages(row: Row) -> list[Example]:
    """miracl: the first passage that answers the query, against the first that does not."""
    found = [first_item(row[name], name) for name in ("positive_passages", "negative_passages")]
    return preference([user_turn(text_of(row, "query"))], assistant_turn(found[0]), assistant_turn(found[1]))


def _passage(row: Row, name: str) -> str:
    """What a question is about: a text, a list of them, or titles with their sentences, as HotpotQA has them."""
    value = row.get(name)
    if isinstance(value, dict) and value.keys() == {"title", "sentences"}:  # one row of a table of lists
        value = [list(pair) for pair in zip(value["title"], value["sentences"], strict=True)]
    if not isinstance(value, list) or is_parts(value):
        return text_of(row, name)
    where, texts = f"column {name!r}", []
    for part in value:
        if isinstance(part, list) and len(part) == 2 and isinstance(part[1], list):
            sentences = " ".join(plain_text(sentence, where).strip() for sentence in part[1])
            part = f"{plain_text(part[0], where)}\n{sentences}"
        texts.append(plain_text(part, where).strip())
    return "\n\n".join(texts)


def _passage_and_question(row: Row) -> str:
    passage, question = _passage(row, "context"), text_of(row, "question")
    return f"{passage}\n\n{question}" if passage.strip() else question


def _squad(row: Row) -> list[Example]:
    """Reading comprehension (squad, mlqa): a passage, a question about it, answers."""
    answers = row["answers"]
    texts = answers.get("text") if isinstance(answers, dict) else answers
    return answered(_passage_and_question(row), first_item(texts, "answers"))


def _passage_and_answer(row: Row) -> list[Example]:
    _check_not_bad(row)
    return answered(_passage_and_question(row), text_of({"answer": _answer(row, "answer")}, "answer"))


def _hc3(row: Row) -> list[Example]:
    return answered(text_of(row, "question"), first_item(row["human_answers"], "human_answers"))


@dataclass(frozen=True)
class Format:
    """A shape of rows: its name, the (lower-case) columns it must have, and what becomes of a row."""

    name: str
    columns: frozenset[str]
    convert: Converter


def _format(name: str, convert: Converter) -> Format:
    return Format(name, frozenset(name.lower().split("/")), convert)


FORMATS = (
    _format("conversations/chosen/rejected", _conversations_pair),
    _format("prompt/chosen/rejected", prompt_chosen_rejected),
    _format("context/question/chosen/rejected", _context_pair(_passage_and_question)),
    _format("context/instruction/chosen/rejected", _context_pair(_instruction)),
    _format("context/chosen/rejected", _context_chosen_rejected),
    _format("messages/chosen/rejected", _conversations_pair),
    _format("instruction/chosen/rejected", _asked_pair(_instruction)),
    _format("question/chosen/rejected", _asked_pair(partial(asked, name="question"))),
    _format("query/chosen/rejected", _asked_pair(partial(asked, name="query"))),
    _format("input/chosen/rejected", _asked_pair(partial(asked, name="input"))),
    _format("chosen/rejected", _transcript_pair),
    _format("history/human_ref_A/human_ref_B/labels", _shp),
    _format("question/answer_0/answer_1/score_0/score_1", webgpt),
    _format("question/response_j/response_k", _stack_exchange),
    _format("query/positive_passages/negative_passages", _passages),
    _format("info/summaries/choice", _summaries),
    _format("prompt/ranking", prompt_ranking),
    _format("prompt/responses/scores", rated("prompt", "responses")),
    _format("prompt/responses/ranks", rated("prompt", "responses")),
    _format("query/responses/scores", rated("query", "responses")),
    _format("instruction/completions", rated("instruction", "completions")),
    _format("message_tree_id/prompt", tree),
    _format("messages", _chat),
    _format("conversations", _chat),
    _format("instruction/output", _alpaca),
    _format("instruction/response", _alpaca),
    _format("instruction/answer", _alpaca),
    _format("prompt/completion", _pair_of("prompt", "completion")),
    _format("prompt/response", _pair_of("prompt", "response")),
    _format("prompt/label", _pair_of("prompt", "label")),
    _format("context/question/answers", _squad),
    _format("question/human_answers/chatgpt_answers", _hc3),
    _format("question/ground_truth", _marked_solutions),
    _format("context/question/answer", _passage_and_answer),
    _format("question/answer", _pair_of("question", "answer")),
    _format("query/response", _pair_of("query", "response")),
    _format("input/output", _pair_of("input", "output")),
    _format("input/target", _pair_of("input", "target")),
    _format("source/target", _source_target),
    _format("prompt/answers", prompt_answers),
    _format("prompt", _prompt_only),
    _format("text", _text_alone),
)
