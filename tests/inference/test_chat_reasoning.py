"""A model's reasoning stands apart from its answer, in the words of its own chat template."""

import json

import pytest
from chat_reasoning import Marks, is_opened, marks_of
from chat_sessions import Session
from chat_stream import Answer

from tests.templates import tokenizer_of
from training.utils.data.chat import read_any
from training.utils.data.prepare import prepare_data
from training.utils.data.template import render_text

QUESTION = {"role": "user", "content": "Six by two?"}
THOUGHT, SAID = "Two threes are six.", "It is three."
# Family -> what its model writes behind the generation prompt
WRITES = {
    "qwen3, thinking": f"<think>\n{THOUGHT}\n</think>\n\n{SAID}",
    "gpt-oss": f"<|channel|>analysis<|message|>{THOUGHT}<|end|><|start|>assistant<|channel|>final<|message|>{SAID}",
    "chatml": f"<think>\n{THOUGHT}\n</think>\n\n{SAID}",
}


def answered(family, text, ended="stop", opened=False):
    tokenizer = tokenizer_of(family)
    ids = tokenizer.encode(text, add_special_tokens=False)
    return Answer(tokenizer, ids, ended, marks=marks_of(tokenizer), opened=opened)


@pytest.mark.parametrize("family", WRITES)
def test_reasoning_and_answer_grow_one_after_the_other(family):
    answer = answered(family, WRITES[family])
    assert answer.parts == (THOUGHT, SAID)
    ids, shown = answer.token_ids, []
    for count in range(len(ids)):
        answer = Answer(answer.tokenizer, ids[:count], "", marks=answer.marks)
        shown.append(answer.parts)
        assert THOUGHT.startswith(shown[-1][0]) and SAID.startswith(shown[-1][1]), shown[-1]
        assert shown[-1][0] == THOUGHT or not shown[-1][1]
    assert len({thought for thought, _ in shown}) > 3 and len({said for _, said in shown}) > 3


@pytest.mark.parametrize("family", WRITES)
def test_its_tokens_are_not_those_of_the_answer(family):
    answer = answered(family, WRITES[family])
    count, close = answer.reasoning_tokens, answer.marks.close
    decode = answer.tokenizer.decode
    assert close in decode(answer.token_ids[:count]) and close not in decode(answer.token_ids[: count - 1])
    assert decode(answer.token_ids[count:], skip_special_tokens=True).strip() == SAID
    session = Session(("model",))
    session.ask("Six by two?", "").answers[0] = answer
    note = session.note(session.turns[0], 0, True)
    assert f"{len(answer.token_ids) - count} tokens after {count} of reasoning" in note
    assert answered(family, SAID).reasoning_tokens == 0


@pytest.mark.parametrize(("family", "kept"), [("qwen3, thinking", False), ("gpt-oss", False), ("chatml", True)])
def test_the_next_prompt_is_what_the_template_makes_of_it(family, kept):
    """Where the template drops an earlier turn's reasoning the model does not see it; where it knows none, it does."""
    answer = answered(family, WRITES[family])
    history = [QUESTION, answer.message, {"role": "user", "content": "And nine by three?"}]
    text = answer.tokenizer.decode(read_any(answer.tokenizer, history, add_generation_prompt=True))
    assert (THOUGHT in text) == kept and SAID in text
    assert text == render_text(answer.tokenizer, history, add_generation_prompt=True)


def test_a_template_that_begins_the_reasoning_itself():
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = tokenizer.chat_template.rstrip() + "{% if add_generation_prompt %}<think>\n{% endif %}"
    marks = Marks()
    assert is_opened(tokenizer, marks, [QUESTION]) and not is_opened(tokenizer_of("chatml"), marks, [QUESTION])
    written = f"{THOUGHT}\n</think>\n\n{SAID}"
    assert marks.split(written, True, True) == (THOUGHT, SAID)
    assert marks.split(written, False, True) == ("", written)


@pytest.mark.parametrize(
    ("text", "whole", "parts"),
    [
        ("Hello </think> there", True, ("", "Hello </think> there")),
        ("<think>\n\n</think>\n\nHello", True, ("", "Hello")),
        ("<think>cut at the lim", True, ("cut at the lim", "")),
        ("<think>a </thin", False, ("a", "")),
        ("<think>a </thin", True, ("a </thin", "")),
        ("<th", False, ("", "")),
        ("<th", True, ("", "<th")),
        (" <b>", False, ("", " <b>")),
        ("<think>a</think>b</think>c", True, ("a", "b</think>c")),
    ],
)
def test_edges(text, whole, parts):
    assert Marks().split(text, False, whole) == parts


def test_an_answer_without_reasoning_leaves_its_channel_behind():
    assert answered("gpt-oss", f"<|channel|>final<|message|>{SAID}").parts == ("", SAID)
    assert answered("gpt-oss", f"<|channel|>final<|message|>{SAID}").message == {"role": "assistant", "content": SAID}


def test_a_vote_keeps_it_beside_the_answer(tmp_path):
    """As `reasoning` where the template has a place, so that step 2 trains what the models wrote."""
    session, file = Session(("SFT", "RLHF")), tmp_path / "votes.jsonl"
    for number in range(10):
        session.restart()
        turn = session.ask(f"Six by {number}?", "")
        turn.answers = [answered("qwen3, thinking", WRITES["qwen3, thinking"] + end) for end in ("", f" No, {number}.")]
        session.vote(1, file)
    row = json.loads(file.read_text().splitlines()[0])
    assert row["chosen"] == [{"role": "assistant", "content": f"{SAID} No, 0.", "reasoning": THOUGHT}]
    assert session.history(0, reasoning=False)[-1] == {"role": "assistant", "content": SAID}
    from training.utils.arguments import DataArguments

    tokenizer = tokenizer_of("qwen3, thinking")
    data = prepare_data("pairs", DataArguments(data_path=[str(file)]), tokenizer, max_length=400, seed=1)
    texts = [tokenizer.decode(row["chosen_ids"]) for row in [*data.train, *data.held_out]]
    assert len(texts) == 10 and all(f"<think>\n{THOUGHT}\n</think>\n\n{SAID} No" in text for text in texts)
