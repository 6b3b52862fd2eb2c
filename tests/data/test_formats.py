"""Every line of the table in docs/data.md, and what the formats refuse."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import time
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path

import pytest

from training.utils.data.formats import columns
from training.utils.data.formats.adapters import ADAPTERS
from training.utils.data.formats.columns import UnknownFormat, convert, parse_column_map
from training.utils.data.formats.conversations import Dropped, Example, demonstration
from training.utils.data.formats.shapes import FORMATS
from training.utils.data.template import RowError
from training.utils.errors import UserError

DOCS = Path(__file__).resolve().parents[2] / "docs" / "data.md"


def summary(result: list[Example] | Dropped) -> str:
    """What the table's last column says."""
    if isinstance(result, Dropped):
        return f"dropped: {result}"

    def turns(messages):
        return " ".join(f"{m['role']}: {m['content']}" for m in messages)

    told = []
    for example in result:
        parts = [f"text: {example.text}"] if example.text else [turns(example.prompt)]
        if example.response:
            parts.append(f"response: {turns(example.response).removeprefix('assistant: ')}")
        if example.answers:
            numbered = zip(example.ranks, example.answers, strict=True)
            told_answers = (f"{rank}. {turns(answer).removeprefix('assistant: ')}" for rank, answer in numbered)
            parts.append(f"ranking: {' '.join(told_answers)}")
        elif example.chosen:
            parts += [
                f"{name}: {turns(answer).removeprefix('assistant: ')}"
                for name, answer in (("chosen", example.chosen), ("rejected", example.rejected))
            ]
        told.append(" → ".join(parts))
    return " ; ".join(told).replace("\n", "\\n")


def outcome(row, source=""):
    try:
        return convert(row, source)
    except Dropped as dropped:
        return "", dropped


def table() -> list[tuple[str, str, str]]:
    lines = DOCS.read_text(encoding="utf-8").splitlines()
    found = []
    for line in lines:
        match = re.fullmatch(r"\| `([^`]+)` \| `(\{.*\})` \| `(.*)` \|", line)
        if match:
            found.append((match[1], match[2], match[3]))
    return found


@pytest.mark.parametrize(("name", "row", "becomes"), table(), ids=lambda value: str(value)[:40])
def test_line_of_the_table(name, row, becomes):
    adapter = name if name.lower() in ADAPTERS else ""
    found, result = outcome(json.loads(row), f"someone/{adapter}" if adapter else "")
    assert summary(result) == becomes
    assert not found or found == name


def test_table_has_every_format_and_adapter():
    told = {name for name, _, _ in table()}
    assert {f.name for f in FORMATS} <= told
    assert set(ADAPTERS) <= {name.lower() for name in told}


HH = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: More?\n\nAssistant:"


def test_hh_prefix_ends_at_the_last_assistant_turn():
    _, (example,) = convert({"chosen": f"{HH} Yes.", "rejected": f"{HH} No."})
    assert [m["role"] for m in example.prompt] == ["user", "assistant", "user"]
    assert (example.chosen[0]["content"], example.rejected[0]["content"]) == ("Yes.", "No.")


@pytest.mark.parametrize(("name", "row", "becomes"), table(), ids=lambda value: str(value)[:40])
def test_a_system_column_is_the_system_turn_of_every_format(name, row, becomes):
    row = {"system": "Be good.", **json.loads(row)}
    _, result = outcome(row, f"someone/{name}" if name.lower() in ADAPTERS else "")
    if isinstance(result, list) and result[0].prompt:
        system = "Be kind." if "Be kind." in becomes else row["system"]  # its own turn comes first
        first = {"role": "system", "content": system}
        assert all(first.items() <= example.prompt[0].items() for example in result)
        assert all([m["role"] for m in example.prompt].count("system") == 1 for example in result)


CONVERSATIONS = {"chosen": f"{HH} Yes.", "rejected": f"{HH} No."}
TWO_ANSWERS = {"chosen": "Yes.", "rejected": "No."}


@pytest.mark.parametrize("name", ["question", "instruction", "query", "input"])
def test_beside_whole_conversations_a_question_is_metadata(name):
    """As before such columns were read: a system turn or other turns before the answer are theirs."""
    _, (example,) = convert({name: "Which is better?", **CONVERSATIONS})
    assert [m["role"] for m in example.prompt] == ["user", "assistant", "user"]
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    row = {key: [*turns, {"role": "assistant", "content": key}] for key in TWO_ANSWERS}
    _, (example,) = convert({name: "Hi", **row})
    assert example.prompt == turns


def test_messages_as_context_are_the_whole_prompt():
    row = {"context": [{"role": "user", "content": "Hi"}], "question": "Which is better?", **TWO_ANSWERS}
    assert convert(row)[1][0].prompt == row["context"]


SYSTEM, Q1, A1, Q2 = (
    {"role": role, "content": text}
    for role, text in (("system", "be kind"), ("user", "Q1"), ("assistant", "A1"), ("user", "Q2"))
)


@pytest.mark.parametrize(
    ("prompt", "repeated", "whole"),
    [
        ("Q1", [SYSTEM, Q1], [SYSTEM, Q1]),
        ("Q1 \n", [Q1], [Q1]),
        ("Q2", [Q1, A1, Q2], [Q1, A1, Q2]),
        ([SYSTEM, Q1], [Q1], [SYSTEM, Q1]),
        ([SYSTEM, Q1], [SYSTEM, Q1], [SYSTEM, Q1]),
        ([SYSTEM, Q2], [SYSTEM, Q1, A1, Q2], [SYSTEM, Q1, A1, Q2]),
    ],
)
def test_answers_that_repeat_the_prompt_may_say_more_of_it(prompt, repeated, whole):
    """Some datasets have the question once more in a column, without what stands before it in the conversations."""
    good, bad = ({"role": "assistant", "content": text} for text in ("good", "bad"))
    _, [example] = convert({"prompt": prompt, "chosen": [*repeated, good], "rejected": [*repeated, bad]})
    assert (example.prompt, example.chosen, example.rejected) == (whole, [good], [bad])


def test_a_prompt_and_answers_of_different_systems_are_refused():
    other = SYSTEM | {"content": "be short"}
    answers = {name: [other, Q1, A1 | {"content": name}] for name in ("chosen", "rejected")}
    with pytest.raises(RowError, match="a system turn stands after the first message"):
        convert({"prompt": [SYSTEM, Q1], **answers})


def test_a_prompt_comes_before_other_names_for_one():
    row = {"prompt": "Hi", "instruction": "Rate these.", "question": "Which?", "input": "x", **TWO_ANSWERS}
    name, (example,) = convert(row)
    assert name == "prompt/chosen/rejected" and example.prompt[0]["content"] == "Hi"


def test_answers_without_a_prompt_are_told_how_to_name_it():
    with pytest.raises(RowError, match=r"neither a prompt nor .*--column_map prompt=COLUMN"):
        convert({"ask": "Hi", **TWO_ANSWERS})
    assert convert({"ask": "Hi", **TWO_ANSWERS}, "", parse_column_map(["prompt=ask"]))[0] == "prompt/chosen/rejected"
    known = {"question": "Hi", **TWO_ANSWERS}
    assert convert(known, "", parse_column_map(["prompt=question"]))[0] == "prompt/chosen/rejected"


DROPPED = {
    "differing prefixes": {"chosen": f"{HH} Yes.", "rejected": f"{HH.replace('More', 'Less')} No."},
    "empty response": {"chosen": f"{HH} Yes.", "rejected": HH},
    "two assistant turns": {"chosen": f"{HH} Yes.\n\nAssistant: A", "rejected": f"{HH} No."},
    "does not end with the assistant": {"chosen": f"{HH} Yes.\n\nHuman: A", "rejected": f"{HH} No."},
    "tie": {"question": "q", "answer_0": "a", "answer_1": "b", "score_0": 0.5, "score_1": "0.5"},
    "marked as a bad answer": {"prompt": "q", "completion": "a", "label": False},
    "image's address": {"instruction": "What is this?", "input": "https://a.example/b/c.png", "output": "a cat"},
    "empty text": {"text": " "},
    "^tie": {"prompt": "q", "responses": ["a", "b", "c"], "scores": [1, 1.0, "1"]},
    "^empty response": {"prompt": "q", "ranking": ["a", "", "b"]},
    "^no answers": {"prompt": "q", "ranking": []},
    "no answers": {"context": "c", "question": "q", "answers": {"text": []}},
}


@pytest.mark.parametrize("reason", DROPPED)
def test_useless_rows_are_dropped(reason):
    with pytest.raises(Dropped, match=reason):
        convert(DROPPED[reason])


def messages(*pairs, **more):
    return {"messages": [{"role": r, "content": c} for r, c in pairs], **more}


U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
MORE, B = {"role": "user", "content": "more"}, {"role": "assistant", "content": "b"}
ANSWERS = {  # a row, what becomes of it
    "no prompt": ({"prompt": [], "chosen": [U, A], "rejected": [U, B]}, "user: q → chosen: a → rejected: b"),
    "null prompt": ({"prompt": None, "chosen": [U, A], "rejected": [U, B]}, "user: q → chosen: a → rejected: b"),
    "system prompt": (
        {"prompt": [{"role": "system", "content": "s"}], "chosen": [U, A], "rejected": [U, B]},
        "system: s user: q → chosen: a → rejected: b",
    ),
    "several turns": (
        {"context": [U], "chosen": [A, MORE, B], "rejected": [B]},
        "user: q → chosen: a user: more assistant: b → rejected: b",
    ),
    "no pair": ({"prompt": "q", "response": "a", "chosen": None, "rejected": None}, "user: q → response: a"),
    "half a pair": ({"prompt": "q", "response": "a", "chosen": "b", "rejected": ""}, "user: q → response: a"),
    "listed response": (
        {"prompt": "q", "response": [A], "chosen": "b", "rejected": "c"},
        "user: q → response: a → chosen: b → rejected: c",
    ),
    "whole response": (
        {"prompt": "q", "response": [U, A], "chosen": "b", "rejected": "c"},
        "user: q → response: a → chosen: b → rejected: c",
    ),
    "number": (
        {"prompt": "q", "response": 7, "chosen": "b", "rejected": "c"},
        "user: q → response: 7 → chosen: b → rejected: c",
    ),
    "history of messages": (
        {"instruction": "more", "output": "b", "history": [U, A]},
        "user: q assistant: a user: more → response: b",
    ),
    "history of a prompt": (
        {"prompt": "more", "response": "b", "history": [["q", "a"]], "system": "s"},
        "system: s user: q assistant: a user: more → response: b",
    ),
    "history in a text": (
        {"question": "more", "answer": "b", "history": '[["q", "a"]]'},
        "user: q assistant: a user: more → response: b",
    ),
    "history of a pair": (
        {"prompt": "more", "chosen": "a", "rejected": "b", "history": [U, A]},
        "user: q assistant: a user: more → chosen: a → rejected: b",
    ),
    "history beside the whole conversation": (
        {"messages": [U, A, MORE, B], "history": [["q", "a"]]},
        "user: q assistant: a user: more → response: b",
    ),
    "no history": ({"instruction": "q", "output": "a", "history": ""}, "user: q → response: a"),
    "summaries as texts": (
        {"info": {"article": "q"}, "summaries": ["a", "b"], "choice": 1.0},
        "user: q\\n\\nTL;DR: → chosen: b → rejected: a",
    ),
    "repeated transcript": (
        {"prompt": HH, "chosen": f"{HH} Yes.", "rejected": f"{HH} No."},
        "user: Hi assistant: Hello user: More? → chosen: Yes. → rejected: No.",
    ),
    "transcripts of a plain prompt": (
        {"prompt": "q", "chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
        "user: q → chosen: a → rejected: b",
    ),
    "transcripts of another prompt": (
        {"prompt": HH, "chosen": f"{HH} Yes.", "rejected": f"{HH.replace('More', 'Less')} No."},
        "dropped: differing prefixes",
    ),
    "lines of Windows": (
        {"chosen": f"{HH} Yes.".replace("\n", "\r\n"), "rejected": f"{HH} No.".replace("\n", "\r\n")},
        "user: Hi assistant: Hello user: More? → chosen: Yes. → rejected: No.",
    ),
    "prompt with lines of Windows": (
        {"prompt": HH.replace("\n", "\r\n"), "response": " Yes."},
        "user: Hi assistant: Hello user: More? → response: Yes.",
    ),
    "messages in a text": ({"messages": json.dumps([U, A])}, "user: q → response: a"),
    "conversations in a text": (
        {"conversations": '[{"from": "human", "value": "q"}, {"value": "a", "from": "gpt"}]'},
        "user: q → response: a",
    ),
    "pair in a text": (
        {"prompt": json.dumps([U]), "chosen": json.dumps([U, A]), "rejected": json.dumps([B])},
        "user: q → chosen: a → rejected: b",
    ),
    "whole pair in a text": (
        {"chosen": json.dumps([U, A]), "rejected": json.dumps([U, B])},
        "user: q → chosen: a → rejected: b",
    ),
    "answer in a text": ({"prompt": json.dumps([U]), "completion": json.dumps([A])}, "user: q → response: a"),
    "prompt in a text": ({"prompt": json.dumps([U, A, MORE])}, "user: q assistant: a user: more"),
    "JSON that is no messages": (
        {"prompt": '{"role": "x"}', "response": '[{"a": 1}]'},
        'user: {"role": "x"} → response: [{"a": 1}]',
    ),
    "messages in a text whose keys come in any order": (
        {"prompt": json.dumps([{"id": "1"} | U]), "completion": json.dumps([{"tool_calls": None} | A])},
        "user: q → response: a",
    ),
    "JSON with keys of messages that is none": (
        {"prompt": '[{"from": "Paris", "to": "Rome"}]', "response": '[{"value": 5, "unit": "kg"}]'},
        'user: [{"from": "Paris", "to": "Rome"}] → response: [{"value": 5, "unit": "kg"}]',
    ),
    "empty system turn": (
        {"system": "s", "messages": [{"role": "system", "content": ""}, U, A]},
        "system: s user: q → response: a",
    ),
    "repeated prompt": ({"prompt": [U], "completion": [U, A]}, "user: q → response: a"),
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_answers_in_every_form(kind):
    row, becomes = ANSWERS[kind]
    assert summary(outcome(row)[1]) == becomes


MARKS = {
    False: [False, 0, 0.0, "False", " no", "0", "FALSE"],
    True: [True, 1, 1.0, "true", "Yes", "1", None, "", float("nan")],
}


@pytest.mark.parametrize(("good", "mark"), [(good, mark) for good, marks in MARKS.items() for mark in marks])
def test_marks_of_bad_answers_in_every_form(good, mark):
    """A CSV has no booleans, and a number is none."""
    rows = [
        messages(("user", "q"), ("assistant", "a"), label=mark),
        {"prompt": "q", "completion": "a", "label": mark},
        {"prompt": "q", "response": "a", "label": mark},
        {"instruction": "q", "output": "a", "label": mark},
        {"context": "", "question": "q", "answer": "a", "label": mark},
    ]
    for row in rows:
        assert summary(outcome(row)[1]) == ("user: q → response: a" if good else "dropped: marked as a bad answer")
    if mark not in (None, "") and mark == mark:
        solutions = {"x": {"is_correct": mark, "solution": "X"}, "y": {"is_correct": not good, "solution": "Y"}}
        _, (pair,) = convert({"question": "q", "ground_truth": "3", **solutions})
        assert pair.chosen[0]["content"] == ("X" if good else "Y")
        _, (pair,) = convert({"history": "q", "human_ref_A": "X", "human_ref_B": "Y", "labels": mark})
        assert pair.chosen[0]["content"] == ("X" if good else "Y")


BAD = {
    "3 answers and 2 values in scores": {"prompt": "q", "responses": ["a", "b", "c"], "scores": [1, 2]},
    "scores of answer 2 is nan, it must": {"prompt": "q", "responses": ["a", "b"], "scores": [1, float("nan")]},
    "scores of answer 1 is None": {"prompt": "q", "responses": ["a", "b"], "scores": [None, 1]},
    "ranks of answer 1 is True": {"prompt": "q", "responses": ["a", "b"], "ranks": [True, 2]},
    "answers 1 and 3 are the same and have different": {"prompt": "q", "ranking": ["a", "b", "a"]},
    "overall_score of answer 2 is None": {
        "instruction": "q",
        "completions": [{"response": "a", "overall_score": 1}, {"response": "b"}],
    },
    "nothing says which of the completions": {"instruction": "q", "completions": ["a", "b"]},
    "33 answers to one prompt, at most 32": {"prompt": "q", "ranking": [str(i) for i in range(33)]},
    "an answer in 'answers' has none of answer": {"prompt": "q", "answers": [{"rank": 1}, {"rank": 2}]},
    "column 'ranking' is a number": {"prompt": "q", "ranking": 3},
    "column 'ranking': a stands twice in one object": {"prompt": "q", "ranking": '[{"a": 1, "a": 2}]'},
    "column 'ranking' should be JSON": {"prompt": "q", "ranking": "a > b"},
    "must be a tree": {"message_tree_id": 1, "prompt": "q"},
    "column 'messages' is a text, it must be a list": {"messages": "What is it?"},
    "column 'messages' is a text that begins like a list of messages, but no JSON": {"messages": str([U, A])},
    "column 'prompt' is a text that begins like a list": {"prompt": str([U]), "response": "a"},
    "label is 'good', it must be true": {"prompt": "q", "response": "a", "label": "good"},
    "label is 2, it": messages(("user", "q"), ("assistant", "a"), label=2),
    "is_correct is 'maybe'": {"question": "q", "ground_truth": "3", "x": {"is_correct": "maybe", "solution": "3"}},
    "they are nan, 0.5": {"question": "q", "answer_0": "a", "answer_1": "b", "score_0": float("nan"), "score_1": 0.5},
    "labels is empty": {"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": None},
    "the prompt has no user turn": {"prompt": [], "chosen": [A], "rejected": [B]},
    "column 'response' holds a boolean": {"prompt": "q", "chosen": "a", "rejected": "b", "response": True},
    "message 2 of 'messages' has no role": {"messages": [{"role": "user", "content": "a"}, {"content": "b"}]},
    "message 1 of 'messages' has no content": {"messages": [{"role": "user"}]},
    "the role 'critic'": messages(("user", "a"), ("critic", "b")),
    "a tool turn after the user's": messages(("user", "a"), ("tool", "b")),
    "two user turns in a row": messages(("user", "a"), ("user", "b"), ("assistant", "c")),
    "two assistant turns in a row": messages(("user", "a"), ("assistant", "b"), ("assistant", "c")),
    "starts with the assistant": messages(("assistant", "a"), ("user", "b")),
    "no user turn": messages(("system", "a")),
    "a system turn stands after": messages(("user", "a"), ("system", "b"), ("assistant", "c")),
    "an empty user turn": messages(("user", " "), ("assistant", "b")),
    "holds an image where text": messages(("user", [{"type": "image_url", "image_url": {"url": "x"}}])),
    "column 'output' holds a list": {"instruction": "a", "output": ["b"]},
    "column 'messages' is a number, it must be a list of messages": {"messages": 3},
    "column 'prompt' is a number, it must be a text or a list of messages": {"prompt": 1, "chosen": 2, "rejected": 3},
    "message 1 of 'messages' is a text": {"messages": ["hi"]},
    "column 'history' must be a list of pairs": {"prompt": "q", "response": "a", "history": "Earlier."},
    "must be numbers": {"question": "q", "answer_0": "a", "answer_1": "b", "score_0": "x", "score_1": 1},
    "labels is 'A'": {"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": "A"},
    "neither a prompt nor": {"chosen": "yes", "rejected": "no"},
    "the prompt is empty, or its column has another name": {"prompt": None, "chosen": "yes", "rejected": "no"},
    "column 'text' stands beside 'role'": {"message_id": "1", "parent_id": None, "text": "Hi", "role": "prompter"},
    "column 'text' stands beside 'question'.* --column_map text=text": {"Text": "A passage.", "question": "Who?"},
    "column 'text' stands beside 'summary'": {"text": "A passage.", "summary": "Short."},
    "column 'prompt' stands beside 'context', which prompt/response .* --column_map prompt=prompt": {
        "prompt": "Sum up.",
        "context": "A passage.",
        "response": "Short.",
    },
    "column 'input' stands beside 'prompt'": {"prompt": "Into French", "input": "Hello", "output": "Bonjour"},
    "column 'question' stands beside 'choices'": {"question": "1 + 1?", "choices": ["2", "3"], "answer": "A"},
    "column 'question' stands beside 'paragraphs'": {"question": "Who?", "paragraphs": ["Ada."], "answer": "A"},
    "column 'prompt' stands beside 'context'": {"prompt": "Who?", "context": "Ada.", "chosen": "A", "rejected": "B"},
    "column 'prompt' stands beside 'context', which prompt/ranking .* write both into one column": {
        "prompt": "Who?",
        "context": "Ada.",
        "ranking": ["A", "B"],
    },
    "column 'messages' stands beside 'documents'": messages(
        ("user", "a"), ("assistant", "b"), documents=[{"text": "c"}]
    ),
    "column 'instruction' stands beside 'input'": {
        "instruction": "Sum up.",
        "input": "A passage.",
        "completions": [{"response": "a", "score": 1}, {"response": "b", "score": 2}],
    },
    "rejected must end with an assistant turn": {
        "prompt": "a",
        "chosen": "b",
        "rejected": [{"role": "user", "content": "c"}],
    },
}


def test_a_text_beside_columns_of_a_conversation_is_plain_where_that_is_said():
    row = {"text": "A passage.", "question": "Who?", "role": "", "parent_id": None}
    assert convert(row, column_map=parse_column_map(["text=text"]))[1] == [Example(text="A passage.")]
    assert convert(row | {"question": None, "lang": "en"})[1] == [Example(text="A passage.")], "empty ones say nothing"


def test_a_part_of_what_is_asked_may_be_in_the_prompt_or_be_named():
    """What a prompt was put together from is metadata; an instruction takes its input or context with it."""
    row = {"prompt": "Who? (A) Ada (B) Bob", "input": "Who?", "context": " ", "completion": "A"}
    assert summary(outcome(row)[1]) == "user: Who? (A) Ada (B) Bob → response: A"
    row = {"question": row["prompt"], "options": ["Ada", "Bob"], "answer": "A"}
    assert summary(outcome(row)[1]) == "user: Who? (A) Ada (B) Bob → response: A"
    row = {"prompt": "Into French", "input": "Hello", "output": "Bonjour"}
    for pair, asked in (("instruction=prompt", "Into French\n\nHello"), ("input=input", "Hello")):
        (example,) = convert(row, column_map=parse_column_map([pair]))[1]
        assert [turn["content"] for turn in example.prompt] == [asked]


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"question": "Who?", "passage": "Ada wrote.", "answer": "Ada"}, "Who?\n\nAda wrote."),
        ({"question": "Who?", "choices": ["Ada", "Bob"], "answer": "Ada"}, "Who?\n\nAda\n\nBob"),
        ({"question": "Who?", "input": "Ada wrote.", "answer": "Ada"}, "Who?\n\nAda wrote."),
        ({"query": "Who?", "context": "Ada wrote.", "response": "Ada"}, "Who?\n\nAda wrote."),
        ({"prompt": "Who?", "input": "Ada wrote.", "output": "Ada"}, "Who?\n\nAda wrote."),
        ({"prompt": "Who?", "context": "Ada wrote.", "chosen": "Ada", "rejected": "Bob"}, "Who?\n\nAda wrote."),
        ({"query": "Who?", "context": "Ada wrote.", "chosen": "Ada", "rejected": "Bob"}, "Who?\n\nAda wrote."),
        ({"question": "Who?", "choices": ["Ada", "Bob"], "chosen": "Ada", "rejected": "Bob"}, "Who?\n\nAda\n\nBob"),
        ({"instruction": "Be brief.", "question": "Who?", "answer": "Ada"}, "Be brief.\n\nWho?"),
        ({"instruction": "Who?", "options": ["Ada", "Bob"], "output": "Ada"}, "Who?\n\nAda\n\nBob"),
        ({"prompt": "Be brief.", "question": "Who?", "response": "Ada"}, "Be brief.\n\nWho?"),
        ({"prompt": "Who?", "source": "wiki", "target": "Ada"}, "Who?\n\nwiki"),
    ],
)
def test_the_column_map_that_a_refusal_names_reads_both(row, asked):
    with pytest.raises(RowError) as error:
        convert(row)
    both = re.search("--column_map (.*?), or", str(error.value))[1].split()
    (example,) = convert(row, column_map=parse_column_map(both))[1]
    assert [turn["content"] for turn in example.prompt] == [asked]
    assert (example.response or example.chosen)[0]["content"] == "Ada"


@pytest.mark.parametrize(
    "more",
    [
        {"instruction": "Who?", "input": "Ada wrote.", "output": "Ada", "prompt": "### Who?\nAda wrote.\n### Ada"},
        {"question": "Who? (A) Ada", "choices": {"label": ["A"], "text": ["Ada"]}, "answer": "Ada"},
        {"prompt": [{"role": "user", "content": "Who?"}], "question": "Who?"},
        {"prompt": "Who?", "source": "web", "title": "x", "response": "Ada"},
        {**messages(("user", "Ada wrote. Who?"), ("assistant", "Ada")), "context": "Ada wrote.", "prompt": "x"},
    ],
)
def test_what_tells_the_same_again_is_metadata(more):
    """As columns beside a row have it that were made of it, or that it was made of."""
    assert convert(more)[1]


def test_messages_hold_what_they_were_put_together_from():
    """As texts, with their line ends and quotes."""
    row = {"prompt": [{"role": "user", "content": "A\nB 'c'\n\nWho?"}], "completion": "Ada", "context": "A\nB 'c'"}
    assert convert(row)[1][0].prompt == row["prompt"]


@pytest.mark.parametrize(("given", "asked"), [("", "Who?\n\nAda wrote."), ("A", "Who?\n\nA\n\nAda wrote.")])
def test_an_input_does_not_hide_a_context(given, asked):
    row = {"instruction": "Who?", "input": given, "context": "Ada wrote.", "output": "Ada"}
    assert [turn["content"] for turn in convert(row)[1][0].prompt] == [asked]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": {"0": "a", "1": "b"}, "response": {"0": "c", "1": "d"}},
        {"0": {"prompt": "a", "response": "c"}, "1": {"prompt": "b", "response": "d"}},
        {"columns": ["prompt", "response"], "index": [0], "data": [["a", "c"]]},
        {"prompt": ["a", "b"], "response": ["c", "d"]},
        {"messages": [[U, A], [U, A]], "id": [1, 2]},
    ],
)
def test_an_object_that_is_a_whole_table_is_told_how_rows_are_written(row):
    """pandas' to_json writes the first by itself."""
    with pytest.raises(UnknownFormat, match="orient='records', lines=True"):
        convert(row)


def test_lists_of_messages_are_no_table():
    assert convert({"context": [U, A, U], "chosen": [A, U, B], "rejected": [B, U, A]})[0] == "context/chosen/rejected"


def test_several_passages_are_what_a_question_is_about():
    """HotpotQA as the hub's table has it and as its own file has it, in every format with a context."""
    pairs = [["Ada", ["A poet.", " She wrote."]], ["Bob", ["A cat."]]]
    table = {name: list(column) for name, column in zip(("title", "sentences"), zip(*pairs, strict=True), strict=True)}
    for context in (pairs, table):
        for row in (
            {"question": "Who?", "answer": "Ada"},
            {"question": "Who?", "answers": ["Ada"]},
            {"question": "Who?", "chosen": "Ada", "rejected": "Bob"},
        ):
            asked = convert({"context": context, **row})[1][0].prompt[0]["content"]
            assert asked == "Ada\nA poet. She wrote.\n\nBob\nA cat.\n\nWho?"
    for name in ("context", "input"):
        row = {"instruction": "Who?", name: ["One.", " Two."], "output": "Ada"}
        assert convert(row)[1][0].prompt[0]["content"] == "Who?\n\nOne.\n\nTwo."


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (42, "42"),
        (3.0, "3.0"),
        (Decimal("3.10"), "3.10"),
        (date(2020, 1, 2), "2020-01-02"),
        (datetime(2020, 1, 2, 3, 4), "2020-01-02 03:04:00"),
        (["Paris", "paris"], "Paris"),
        ([42, 43], "42"),
        ([], ""),
        (None, ""),
    ],
)
@pytest.mark.parametrize("columns", [{"question": "q"}, {"question": "q", "context": "c"}])
def test_an_answer_that_a_table_holds_as_no_text(columns, value, text):
    """Several right answers are NQ's; numbers and dates come from parquet."""
    if not text:
        with pytest.raises(Dropped):
            convert({**columns, "answer": value})
        return
    assert convert({**columns, "answer": value})[1][0].response == [{"role": "assistant", "content": text}]


def test_a_system_turn_under_other_names():
    for name in ("system_prompt", "System_Message"):
        read: set[str] = set()
        (example,) = convert({name: "Be kind.", "prompt": "Hi", "response": "Hello"}, read=read)[1]
        assert example.prompt[0] == {"role": "system", "content": "Be kind."} and name.lower() in read
    row = {"system": "Be brief.", "system_prompt": "Be kind.", "prompt": "Hi", "chosen": "Hello", "rejected": "No"}
    assert convert(row)[1][0].prompt[0]["content"] == "Be brief."


def test_a_ranking_in_every_form():
    """A CSV's text, answers as messages, one answer twice, one answer alone."""
    levels = [[A], [[{"role": "assistant", "content": "c"}], {"role": "assistant", "content": "d"}], "e"]
    for row, becomes in (
        ({"prompt": "q", "ranking": '["a", ["c", "d"], "e"]'}, "ranking: 1. a 2. c 2. d 3. e"),
        ({"prompt": [U], "ranking": levels}, "ranking: 1. a 2. c 2. d 3. e"),
        ({"prompt": "q", "responses": ["a", "b", "a"], "scores": [2, "1", 2.0]}, "chosen: a → rejected: b"),
        ({"prompt": "q", "responses": ["a", "b", "c"], "ranks": "[2, 1, 1]"}, "ranking: 1. b 1. c 2. a"),
        (
            {"prompt": "q", "answers": [{"text": t, "rank": None, "score": n} for n, t in enumerate("ab")]},
            "chosen: b → rejected: a",
        ),
        ({"prompt": "q", "ranking": ["a"]}, "response: a"),
        ({"prompt": "q", "ranking": ["a", "b"], "response": "c"}, "response: c → chosen: a → rejected: b"),
    ):
        assert summary(outcome(row)[1]) == f"user: q → {becomes}"


def test_a_turn_of_a_tree_that_ranks_nothing_leaves_the_others():
    tied = [{"text": "a", "rank": 0}, {"text": "b", "rank": 0}]
    more = [{"text": "Yes.", "rank": 1}, {"text": "No.", "rank": 0}]
    row = {"message_tree_id": "7", "prompt": {"text": "q", "replies": tied}}
    assert summary(outcome(row)[1]) == "dropped: tie"
    tied[0]["replies"] = [{"text": "more?", "replies": more}, {"text": "else?", "replies": [{"text": " "}]}]
    assert summary(outcome(row)[1]) == "user: q assistant: a user: more? → chosen: No. → rejected: Yes."


def test_an_answer_of_a_tree_teaches_where_it_is_the_best_alone():
    """A conversation that goes on from a worse answer must not teach that one."""
    more = [{"text": "more?", "replies": [{"text": "Yes."}]}]
    replies = [{"text": "worse", "rank": 1, "replies": more}, {"text": "best", "rank": 0, "replies": more}]
    examples = convert({"message_tree_id": "7", "prompt": {"text": "q", "replies": replies}})[1]
    trained = [
        turn["content"]
        for example in examples
        for turn in itertools.chain(*demonstration(example))
        if turn["role"] == "assistant" and "train" not in turn
    ]
    assert sorted(trained) == ["Yes.", "Yes.", "best"]


def test_all_pairs_of_a_ranking_but_the_ties():
    row = {"prompt": "q", "responses": list("abcde"), "scores": [1, 3, 2, 3, 0]}
    _, (example,) = convert(row)
    order = dict(zip(row["responses"], row["scores"], strict=True))
    texts = [answer[0]["content"] for answer in example.compared()]
    found = [(texts[i], texts[j]) for i, j in example.pairs()]
    assert sorted(found) == sorted((a, b) for a in order for b in order if order[a] > order[b])
    assert found[0] == ("b", "e") and len(found) == 9


@pytest.mark.parametrize("reason", BAD)
def test_bad_rows(reason):
    with pytest.raises((RowError), match=reason):
        convert(BAD[reason])


SUMMARIES = {"info": {"post": "p"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 1}
WRONG_TYPES = [
    *(
        (message, {"instruction": "q", "output": "a", "history": history}, "")
        for message, history in (
            ("column 'history' must be a list of pairs", "abc"),
            ("column 'history' must be a list of pairs", [["a"]]),
            ("column 'history' must be a list of pairs", 5),
            ("message 1 of 'history' has no role", [{"question": "a", "answer": "b"}]),
        )
    ),
    ("column 'info' is a text", {**SUMMARIES, "info": "p"}, ""),
    ("column 'info' is empty", {**SUMMARIES, "info": None}, ""),
    ("a list of two summaries", {**SUMMARIES, "summaries": None}, ""),
    ("a list of two summaries", {**SUMMARIES, "summaries": ["a"]}, ""),
    ("choice is 2", {**SUMMARIES, "choice": 2}, ""),
    ("choice is \\[1\\]", {**SUMMARIES, "choice": [1]}, ""),
    ("queries and answers must hold a text for each", {"queries": "q", "answers": {"ja": ["a"]}}, "mkqa-japanese"),
    ("queries and answers must hold a text for each", {"queries": {"ja": "q"}, "answers": None}, "mkqa-japanese"),
    ("column 'answers' is a number, it must be a list", {"context": "c", "question": "q", "answers": 3}, ""),
    ("column 'questions' is a text, it must be a list", {"questions": "q", "paragraph": "p"}, "qag_jaquad"),
    ("--column_map context=COLUMN.KEY .*: a, b", {"context": {"a": ["c"], "b": 1}, "question": "q", "answer": "x"}, ""),
    ("--column_map answer=COLUMN.KEY .*: value", {"question": "q", "answer": {"value": "a"}}, ""),
]


@pytest.mark.parametrize(("message", "row", "source"), WRONG_TYPES)
def test_wrong_types_are_bad_rows(message, row, source):
    with pytest.raises(RowError, match=message):
        convert(row, source)


VALUES = [
    None,
    "",
    "x",
    "[",
    "{",
    0,
    1.5,
    True,
    [],
    {},
    [[]],
    [{}],
    [None],
    ["x"],
    {"a": 1},
    [["a"]],
    [[1, 2, 3]],
    {"role": 1},
]


@pytest.mark.parametrize("format_", FORMATS, ids=lambda f: f.name)
def test_no_value_of_any_column_is_a_traceback(format_):
    """Every format says itself what is wrong with a column of its own."""
    names = [*format_.columns, "system", "history", "input", "context", "response", "label"]
    said = set()
    for name, value, other in itertools.product(names, VALUES, ("x", [{"role": "user", "content": "x"}])):
        try:
            convert({**dict.fromkeys(format_.columns, other), name: value})
        except (RowError, Dropped) as error:
            said.add(str(error))
    assert said and not [message for message in said if "does not fit the format" in message]


def test_what_a_format_did_not_think_of_names_the_format(monkeypatch):
    broken = dataclasses.replace(FORMATS[0], columns=frozenset({"zzz"}), convert=lambda row: row["zzz"]["a"])
    monkeypatch.setattr(columns, "FORMATS", (broken,))
    with pytest.raises(RowError, match=rf"the row does not fit the format {FORMATS[0].name}: TypeError"):
        convert({"zzz": 3})


def test_empty_response_is_dropped_everywhere():
    for row in (
        {"instruction": "a", "output": " "},
        messages(("user", "a"), ("assistant", "")),
        {"prompt": "a", "chosen": "", "rejected": "b"},
    ):
        with pytest.raises(Dropped, match="empty response"):
            convert(row)


def test_multi_part_text_is_joined():
    _, (example,) = convert(messages(("user", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])))
    assert example.prompt[0]["content"] == "a\nb"


def test_unknown_columns_show_three_ways_to_go_on():
    with pytest.raises(UserError, match=r"columns foo, bar; three ways.*--column_map.*messages.*shapes\.py"):
        convert({"foo": 1, "bar": 2})


def test_column_map():
    column_map = parse_column_map(["prompt=body.ask", "response=reply"])
    _, (example,) = convert({"body": {"ask": "a"}, "reply": "b", "text": "noise"}, "", column_map)
    assert (example.prompt[0]["content"], example.response[0]["content"]) == ("a", "b")
    column_map.check_all_found()
    with pytest.raises(UserError, match="write NAME=COLUMN"):
        parse_column_map(["prompt"])
    with pytest.raises(UserError, match="no format has a column promt; did you mean prompt"):
        parse_column_map(["promt=ask"])
    with pytest.raises(UserError, match="no row has the column nope"):
        typo = parse_column_map(["prompt=nope"])
        convert({"prompt": "a"}, "", typo)
        typo.check_all_found()


MAPPED = {  # flags, a row, what becomes of it
    "fullest": (
        ["chosen=good", "rejected=bad"],
        {"prompt": "q", "good": "a", "bad": "b"},
        "q → chosen: a → rejected: b",
    ),
    "one of three": (
        ["prompt=question"],
        {"question": "q", "chosen": "a", "rejected": "b"},
        "q → chosen: a → rejected: b",
    ),
    "its own name": (["prompt=question"], {"question": "q", "answer": "a"}, "q → response: a"),
    "rest of two": (["prompt=ask"], {"ask": "q", "response": "a"}, "q → response: a"),
    "both": (["prompt=question", "response=answer"], {"question": "q", "answer": "a", "x": 1}, "q → response: a"),
    "optional": (["input=extra"], {"instruction": "q", "extra": "e", "output": "a"}, "q\\n\\ne → response: a"),
    "alone": (["text=body"], {"prompt": "q", "completion": "c", "body": "t"}, "text: t"),
    "label": (["label=summary"], {"prompt": "q", "summary": "a"}, "q → response: a"),
    "added": (
        ["response=best"],
        {"prompt": "q", "chosen": "a", "rejected": "b", "best": "c"},
        "q → response: c → chosen: a → rejected: b",
    ),
    "instead": (["prompt=short"], {"prompt": "q", "short": "s", "response": "a"}, "s → response: a"),
}


@pytest.mark.parametrize("kind", MAPPED)
def test_mapped_and_other_columns_are_one_row(kind):
    flags, row, becomes = MAPPED[kind]
    assert summary(convert(row, "", parse_column_map(flags))[1]).removeprefix("user: ") == becomes


PAIR = {"prompt": "exact", "Prompt": "other", "chosen": "c", "rejected": "r"}
# Rows with columns that differ in capitals alone, --column_map, and what becomes of them: a word of the error or of all
TWINS = {
    "pair": (PAIR, [], "'prompt' and 'Prompt' differ only in capitals.*--column_map prompt=COLUMN"),
    "answer": ({"prompt": "q", "Response": "a", "response": "b"}, [], "'Response' and 'response' differ"),
    "tools": ({"messages": [], "tools": [], "Tools": [{"name": "f"}]}, [], "'tools' and 'Tools' .* rename one$"),
    "one of three mapped": (PAIR | {"PROMPT": "x"}, ["response=PROMPT"], "'prompt' and 'Prompt' differ"),
    "the other": (PAIR, ["prompt=Prompt"], "other"),
    "the exact": (PAIR, ["prompt=prompt"], "exact"),
    "a name for each": ({"prompt": "exact", "Prompt": "a"}, ["response=Prompt"], "exact"),
    "nothing reads them": ({"prompt": "exact", "response": "a", "id": 1, "ID": 2}, [], "exact"),
}


@pytest.mark.parametrize("kind", TWINS)
def test_columns_that_differ_only_in_capitals(kind):
    row, flags, word = TWINS[kind]
    for given in (row, dict(reversed(row.items()))):
        if "'" in word:
            with pytest.raises(RowError, match=word if given is row else "differ only in capitals"):
                convert(given, "", parse_column_map(flags))
        else:
            [example] = convert(given, "", parse_column_map(flags))[1]
            assert example.prompt == [{"role": "user", "content": word}]


LONG_BLANKS = {
    "": {"prompt": "a%sb", "chosen": "c", "rejected": "d"},
    "multiturnalpaca": {"instruction": "User: a%sb", "output": "c"},
    "webgpt_comparisons": {"question": "q", "answer_0": "a%sb [1]", "answer_1": "c", "score_0": 1, "score_1": 0},
    "sharegpt_alpaca_oa_vicuna_format": {"prompt": "USER: a%sb", "label": "c"},
    "openassistant-guanaco": {"text": "### Human: a%sb### Assistant: c"},
}


@pytest.mark.parametrize("source", LONG_BLANKS)
def test_blank_lines_without_end_take_no_time(source):
    """Step by step from each of them it took minutes, for every row and every pass."""
    blanks = "\n" * 60_000
    row = {
        name: cell.replace("%s", blanks) if isinstance(cell, str) else cell
        for name, cell in LONG_BLANKS[source].items()
    }
    start = time.process_time()
    (example,) = convert(row, source)[1]
    assert time.process_time() - start < 2
    turns = [*example.prompt, *example.response, *example.chosen]
    assert sum(f"a{blanks}b" in turn["content"] for turn in turns) == 1


def test_an_address_without_end_takes_no_time():
    for end, dropped in ((" Hm?", False), ("", True)):
        start = time.process_time()
        _, result = outcome({"prompt": "http://a" + ".png?" * 20_000 + end, "response": "b"})
        assert time.process_time() - start < 2 and isinstance(result, Dropped) == dropped


def test_an_adapter_needs_its_name():
    row = {"prompt": "\n\nHuman: Hi", "chosen": "Assistant: A", "rejected": "Assistant: B"}
    assert convert(row, "yitingxie/rlhf-reward-datasets")[1][0].chosen[0]["content"] == "A"
    assert convert(row, "mine")[1][0].chosen[0]["content"] == "Assistant: A"
    assert ADAPTERS.keys() == {name.lower() for name in ADAPTERS}
