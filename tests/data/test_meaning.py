"""Keys that change what a row means are honoured or refused by name; metadata is neither."""

from __future__ import annotations

import json

import pytest

from tests.data.test_prepare import prepare, sft, write
from training.utils.data.chat import render
from training.utils.data.formats.columns import convert
from training.utils.data.formats.conversations import Dropped
from training.utils.data.template import RowError
from training.utils.errors import UserError

ASK, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}


@pytest.mark.parametrize(
    "more",
    [
        {"images": ["a.png"]},
        {"tool_responses": ["x"]},
        {"weight": 0.5},
        {"loss_mask": "maybe"},
    ],
)
def test_a_message_that_means_more_than_its_text_is_refused_by_name(more):
    with pytest.raises(RowError, match=next(iter(more))):
        convert({"messages": [ASK, ANSWER | more]})


@pytest.mark.parametrize(
    ("more", "columns", "reason"),
    [
        ({"reasoning_content": "Hm."}, {}, "loses the reasoning"),
        ({"thinking": "Hm."}, {}, "loses the reasoning"),
        ({"tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}, {}, "no call of a tool"),
        ({"function_call": {"name": "f"}}, {}, "no call of a tool"),
        ({}, {"tools": [{"name": "f"}]}, "no tools"),
        ({}, {"tools": '[{"name": "f"}]'}, "no tools"),
    ],
)
@pytest.mark.parametrize("step", [1, 2, 3])
def test_what_a_template_has_no_place_for_is_refused_by_name(tok, tmp_path, more, columns, reason, step):
    turns = [ASK, ANSWER | more, {"role": "user", "content": "And?"}]
    row = {"messages": [*turns, ANSWER]} if step != 2 else {"prompt": turns, "chosen": "A", "rejected": "B"}
    other = [write(tmp_path / "b.jsonl", [{"prompt": "Q", "chosen": "A b", "rejected": "C"}])]
    with pytest.raises(UserError, match=reason):
        prepare(step, tok, write(tmp_path / "a.jsonl", [row | columns]), eval_data_path=other)


@pytest.mark.parametrize("nothing", [None, "", [], float("nan")])
def test_an_empty_key_means_nothing(nothing):
    more = dict.fromkeys(("reasoning_content", "tool_calls", "images", "weight", "train"), nothing)
    row = {"messages": [ASK, ANSWER | more], "tools": nothing, "images": nothing, "kto_tag": nothing or None}
    assert convert(row)[1][0].response == [ANSWER]


@pytest.mark.parametrize(
    "columns",
    [
        {"tool_calls": [{"name": "f"}]},
        {"images": ["a.png"]},
        {"videos": ["a.mp4"]},
        {"audios": [{"path": "a.wav"}]},
    ],
)
@pytest.mark.parametrize(
    "row", [{"messages": [ASK, ANSWER]}, {"prompt": "Why <image>?", "chosen": "A", "rejected": "B"}]
)
def test_a_column_without_which_a_row_means_something_else_is_refused_by_name(columns, row):
    with pytest.raises(RowError, match=next(iter(columns))):
        convert(row | columns)


def test_metadata_stays_ignored():
    row = {
        "messages": [ASK, ANSWER | {"id": 3, "timestamp": "now", "name": "x"}],
        "source": "web",
        "score": 3,
        "lang": "en",
    }
    assert convert(row)[1][0].response == [ANSWER]


@pytest.mark.parametrize("tag", [False, "false", 0])
def test_an_answer_that_is_marked_as_bad_is_left_out(tag):
    with pytest.raises(Dropped, match="bad answer"):
        convert({"messages": [ASK, ANSWER], "kto_tag": tag})
    assert convert({"messages": [ASK, ANSWER], "kto_tag": True})[1]


@pytest.mark.parametrize(
    "mark", [{"weight": 0}, {"train": False}, {"trainable": "no"}, {"loss_mask": 0}, {"loss": False}, {"weight": 0.0}]
)
@pytest.mark.parametrize("train_on_prompts", [False, True])
def test_a_turn_of_weight_0_is_read_and_not_trained(tok, tmp_path, mark, train_on_prompts):
    bad = {"role": "assistant", "content": "A bad answer."}
    turns = [ASK, bad | mark, {"role": "user", "content": "And?"}, ANSWER | {"weight": 1}]
    plain = [ASK, bad, turns[2], ANSWER]
    path = write(tmp_path / "a.jsonl", [{"messages": turns}])
    other = [write(tmp_path / "b.jsonl", sft(1))]
    row = prepare(1, tok, path, eval_data_path=other, train_on_prompts=train_on_prompts).train[0]
    whole = render(tok, plain)
    assert row["input_ids"] == whole.input_ids
    untrained = [i for i, m in zip(row["input_ids"], row["response_mask"], strict=True) if not m]
    text = tok.decode(untrained)
    assert "A bad answer." in text and "So." not in text and ("Why?" in text) != train_on_prompts


def test_marks_of_training_make_no_other_prompt(tok, tmp_path):
    """What one row holds out no other may train on, and step 3 asks it once, without a mark."""
    plain, marked = [], []
    for n in range(30):
        turns = [{"role": "user", "content": f"Why {n}?"}, ANSWER, {"role": "user", "content": "And?"}]
        plain.append({"messages": [*turns, ANSWER]})
        marked.append({"messages": [turns[0] | {"loss": False}, ANSWER | {"weight": 0}, turns[2], ANSWER]})
    paths = [write(tmp_path / f"{name}.jsonl", rows) for name, rows in (("plain", plain), ("marked", marked))]
    data = prepare(1, tok, *paths)
    assert (data.report.shared_prompts, len(data.train) + len(data.held_out)) == (0, 60)
    assert {tuple(row["input_ids"]) for row in data.train}.isdisjoint(tuple(row["input_ids"]) for row in data.held_out)
    asked = prepare(3, tok, *reversed(paths))
    assert asked.report.dropped["exact duplicate"].count == 30
    assert all(set(turn) == {"role", "content"} for turn in json.loads(asked.train[0]["messages"]))


def test_a_row_without_a_trained_turn_is_left_out_and_counted(tok, tmp_path):
    rows = [*sft(4), {"messages": [ASK, ANSWER | {"weight": 0}]}]
    data = prepare(1, tok, write(tmp_path / "a.jsonl", rows))
    assert data.report.dropped["no answer that is trained on (weight 0)"].count == 1


def test_a_compared_answer_counts_whatever_its_weight(tok, tmp_path):
    """The mask of a pair says which token is scored: an empty one would score the first token of the prompt."""
    rows = [{"prompt": [ASK], "chosen": [ANSWER | {"weight": 0}], "rejected": [ANSWER | {"content": "No."}]}]
    other = [write(tmp_path / "b.jsonl", [{"prompt": "Q", "chosen": "A b", "rejected": "C"}])]
    row = prepare(2, tok, write(tmp_path / "a.jsonl", rows), eval_data_path=other).train[0]
    assert 1 in row["chosen_mask"] and 1 in row["rejected_mask"]


def test_the_error_names_the_place(tok, tmp_path):
    rows = [*sft(3), {"messages": [ASK, ANSWER | {"images": ["a.png"]}]}]
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match=r"a\.jsonl:4: .*images"):
        prepare(1, tok, path)
    data = prepare(1, tok, path, on_bad_row="skip")
    assert data.report.dropped["bad row"].count == 1


def test_a_conversation_without_end_is_refused_at_once():
    """120,000 turns fit under the row limit and would take hours without a word."""
    with pytest.raises(RowError, match="120000 messages, at most 1000"):
        convert({"messages": [ASK, ANSWER] * 60_000})
    assert convert({"messages": [ASK, ANSWER] * 500})


@pytest.mark.parametrize("column", ["response", "completion", "label"])
def test_an_answer_beside_what_its_reward_may_be_made_of_is_read(column):
    name, (example,) = convert({"prompt": "1 + 2?", column: "3", "answers": ["3", "three"]})
    assert name == f"prompt/{column}" and example.response[0]["content"] == "3"
