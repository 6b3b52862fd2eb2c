"""Every family's chat template: masks against the template's own text, and what is refused; docs/templates.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import templates
from tests.data.families import smol_like
from training.utils.data import tokenise
from training.utils.data.formats.columns import convert
from training.utils.data.report import DataReport
from training.utils.data.template import RowError

ASK = templates.SEVERAL[0]
PAGE = Path(__file__).resolve().parents[2] / "docs" / "templates.md"


@pytest.mark.parametrize("family", templates.FAMILIES)
def test_the_line_of_the_table(family):
    found = templates.cells(family)
    assert not [text for text in found.values() if text.startswith("FAILS")]
    assert f"| {family} | {' | '.join(found[name] for name in templates.ROWS)} |" in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("family", ["qwen3, thinking", "gpt-oss"])
def test_the_check_sees_an_answer_that_no_row_trains(family, monkeypatch):
    """Without a row for each answer, the reasoning of the first would be lost without a word."""
    monkeypatch.setattr(tokenise, "is_trained_whole", lambda *_: True)
    with pytest.raises(AssertionError):
        templates.check(templates.tokenizer_of(family), templates.ROWS["reasoning, several"])


def test_an_untrained_answer_stays_so_where_each_answer_has_a_row():
    tokenizer = templates.tokenizer_of("qwen3, thinking")
    turns = [dict(turn) for turn in templates.ROWS["reasoning, several"]["messages"]]
    turns[1]["weight"] = 0
    (example,) = convert({"messages": turns})[1]
    for train_on_prompts in (False, True):
        (rows,) = tokenise.sft_rows(tokenizer, [example], 1000, DataReport(kind="demonstrations"), train_on_prompts)
        (row,) = rows
        trained = tokenizer.decode([i for i, bit in zip(row["input_ids"], row["response_mask"], strict=True) if bit])
        assert "Thrice three is nine." in trained and "Three again." in trained
        assert "Three.<|im_end|>" not in trained


def test_tools_and_the_system_turn_survive_truncation():
    tokenizer = templates.tokenizer_of("qwen2.5")
    row = templates.ROWS["tools"]
    long = [row["messages"][0], templates.SEVERAL[0], templates.SEVERAL[1], *row["messages"][1:]]
    (example,) = convert({**row, "messages": long})[1]
    report = DataReport(kind="demonstrations")
    (whole,) = tokenise.sft_rows(tokenizer, [example], 10_000, DataReport(kind="demonstrations"))
    (rows,) = tokenise.sft_rows(tokenizer, [example], whole[0]["length"] - 5, report)
    text = tokenizer.decode(rows[0]["input_ids"])
    assert "Answer in one line." in text and '"description": "The weather of a city"' in text
    assert "One?" not in text and "Weather in Oslo?" in text and report.turns_dropped == 1


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [{**templates.SEVERAL[0], "thinking": "Hm."}, templates.SEVERAL[1]]}, "only an assistant"),
        ({"messages": [templates.SEVERAL[0], {"role": "tool", "content": "x"}]}, "a tool turn after the user"),
        ({"messages": templates.SEVERAL, "tools": "f, g"}, "should be JSON"),
        ({"messages": templates.SEVERAL, "tools": [{"type": "function"}]}, "each with a name"),
        ({"text": "abc", "tools": [templates.TOOL]}, "no conversation"),
        (
            {"messages": [templates.SEVERAL[0], templates._answer("", tool_calls=[{"function": {}}])]},
            "without its name",
        ),
        (
            {"messages": [templates.SEVERAL[0], templates._answer("", tool_calls=[{"name": "f", "arguments": "[1]"}])]},
            "must be an object",
        ),
    ],
)
def test_what_nothing_can_be_made_of_is_refused_by_name(row, reason):
    with pytest.raises(RowError, match=reason):
        convert(row)


@pytest.mark.parametrize(
    "call",
    [
        {"tool_calls": [templates.CALL]},
        {"tool_calls": '[{"name": "get_weather", "arguments": {"city": "Oslo"}}]'},
        {"tool_calls": [{"name": "get_weather", "arguments": '{"city": "Oslo", "when": null}'}]},
        {"tool_calls": [{"name": "get_weather", "arguments": {"city": "Oslo", "of_another_row": None}}]},
        {"function_call": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}},
    ],
)
def test_calls_in_every_usual_form_are_one(call):
    tokenizer = templates.tokenizer_of("qwen2.5")
    turns = [{"from": "human", "value": "Weather?"}, {"from": "gpt", "value": "", **call}]
    (example,) = convert({"conversations": turns, "tools": [templates.TOOL["function"]]})[1]
    (rows,) = tokenise.sft_rows(tokenizer, [example], 1000, DataReport(kind="demonstrations"))
    text = tokenizer.decode(rows[0]["input_ids"])
    assert '{"name": "get_weather", "arguments": {"city": "Oslo"}}' in text


def test_sharegpt_turns_of_tools_are_read():
    turns = [
        {"from": "human", "value": "Weather?"},
        {"from": "function_call", "value": '{"name": "get_weather", "arguments": {"city": "Oslo"}}'},
        {"from": "observation", "value": "rain"},
        {"from": "gpt", "value": "Rain."},
    ]
    (example,) = convert({"conversations": turns, "tools": "[]"})[1]
    assert [turn["role"] for turn in example.prompt] == ["user", "assistant", "tool"]
    (rows,) = tokenise.sft_rows(templates.tokenizer_of("granite"), [example], 1000, DataReport(kind="demonstrations"))
    assert sum(rows[0]["response_mask"]) and rows[0]["length"]


def test_pairs_that_differ_in_reasoning_alone_are_no_identical_pair():
    turns = {"role": "assistant", "content": "Three."}
    row = {"prompt": "Six by two?", "chosen": [turns | {"reasoning": "Halves."}], "rejected": [turns]}
    (example,) = convert(row)[1]
    (rows,) = tokenise.pair_rows(templates.tokenizer_of("qwen3, thinking"), [example], 1000, DataReport(kind="pairs"))
    assert rows[0]["chosen_ids"] != rows[0]["rejected_ids"]
    with pytest.raises(RowError, match="loses the reasoning"):
        tokenise.pair_rows(smol_like(), [example], 1000, DataReport(kind="pairs"))


def test_an_answer_of_several_turns_is_compared_as_a_whole_or_refused():
    """Qwen 3 writes earlier answers without their (empty) reasoning: DPO would not see what differs here."""
    rest = [templates._user("And now?"), templates._answer("Still rain.")]
    row = {"prompt": "Weather?", "chosen": [templates._answer("Rain."), *rest]}
    (example,) = convert(row | {"rejected": [templates._answer("Go away."), *rest]})[1]
    tokenizer = templates.tokenizer_of("qwen2.5")
    (rows,) = tokenise.pair_rows(tokenizer, [example], 1000, DataReport(kind="pairs"))
    trained = [i for i, bit in zip(rows[0]["rejected_ids"], rows[0]["rejected_mask"], strict=True) if bit]
    assert tokenizer.decode(trained) == "Go away.<|im_end|>Still rain.<|im_end|>"
    for family in ("qwen3, thinking", "qwen3, thinking off", "gpt-oss"):
        with pytest.raises(RowError, match="only the last would be compared"):
            tokenise.pair_rows(templates.tokenizer_of(family), [example], 1000, DataReport(kind="pairs"))
