"""Which chat templates are masked exactly, for which conversations.

``python -m tests.templates`` prints the table of docs/templates.md. The templates in tests/data/chat_templates are
written anew from the families' public descriptions; the others are the bundled ones. A cell is ``ok``, or how the row
is refused. ``ok`` says, against the template's own text: every answer is trained once, token for token what the model
writes behind the generation prompt of the turns before it, up to the token that ends it, and nothing else is trained.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from tests.data.families import byte_bpe
from training.utils.data import tokenise
from training.utils.data.formats.columns import convert
from training.utils.data.report import DataReport
from training.utils.data.template import RowError, calls_of, configure_chat_template, render_text, stop_token_ids
from training.utils.errors import UserError

FOLDER = Path(__file__).parent / "data" / "chat_templates"
CHATML = ("<|im_start|>", "<|im_end|>")
# Family -> template (a file, or a bundled name), BOS, EOS, further special tokens
FAMILIES: dict[str, tuple[str, str, str, Sequence[str]]] = {
    "chatml": ("chatml", "", "<|endoftext|>", CHATML),
    "llama2": ("llama2", "<s>", "</s>", ()),
    "llama3": (
        "llama3", "<|begin_of_text|>", "<|end_of_text|>", ("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
    ),
    "llama3.1": (
        "llama3.1", "<|begin_of_text|>", "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>")
    ),
    "gemma": ("gemma", "<bos>", "<eos>", ("<start_of_turn>", "<end_of_turn>")),
    "qwen2.5": ("qwen2.5", "", "<|im_end|>", CHATML),
    "qwen3, thinking": ("qwen3", "", "<|im_end|>", CHATML),
    "qwen3, thinking off": ("qwen3", "", "<|im_end|>", CHATML),
    "deepseek v3": (
        "deepseek-v3", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>",
        ("<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>",
         "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"),
    ),
    "glm4": (
        "glm4", "", "<|endoftext|>",
        ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    ),
    "gpt-oss": (
        "gpt-oss", "", "<|return|>", ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|call|>")
    ),
    "mistral": (
        "mistral", "<s>", "</s>",
        ("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]",
         "[/TOOL_RESULTS]"),
    ),
    "phi3": ("phi3", "<s>", "<|endoftext|>", ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")),
    "granite": (
        "granite", "", "<|end_of_text|>", ("<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>")
    ),
}  # fmt: skip


OPEN = ("<|user|>", "<|observation|>")  # what ends an answer, and a call of a tool, that GLM-4's template leaves open


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _answer(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


SYSTEM = {"role": "system", "content": "Answer in one line."}
SEVERAL = [_user("One?"), _answer("Uno."), _user("Two?"), _answer("Dos, tres."), _user("Four?"), _answer("Quatro")]
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
ROWS: dict[str, dict[str, Any]] = {
    "single": {"messages": SEVERAL[:2]},
    "several": {"messages": SEVERAL},
    "system": {"messages": [SYSTEM, *SEVERAL]},
    "reasoning": {"messages": [_user("Six by two?"), _answer("Three.", reasoning_content="Two threes are six.")]},
    "reasoning, several": {
        "messages": [
            _user("Six by two?"),
            _answer("Three.", reasoning_content="Two threes are six."),
            _user("And nine by three?"),
            _answer("Three again.", reasoning_content="Thrice three is nine."),
        ]
    },
    "tools": {
        "messages": [
            SYSTEM,
            _user("Weather in Oslo?"),
            _answer("", tool_calls=[CALL]),
            {"role": "tool", "content": "rain", "tool_call_id": "abcdefghi"},
            _answer("It rains in Oslo."),
            _user("And now?"),
            _answer("Still rain."),
        ],
        "tools": [TOOL],
    },
}


def tokenizer_of(family: str) -> Any:
    """A byte-level tokenizer with the family's special tokens and template."""
    template, bos, eos, special = FAMILIES[family]
    raw = byte_bpe()
    raw.add_special_tokens([token for token in (bos, eos, *special) if token])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=bos or None, eos_token=eos)
    path = FOLDER / f"{template}.jinja"
    if not path.is_file():
        configure_chat_template(tokenizer, template)
        return tokenizer
    text = path.read_text(encoding="utf-8").rstrip("\n")
    if family.endswith("thinking off"):
        text = text.replace("{#- thinking off -#}", "{{- '<think>\n\n</think>\n\n' -}}")
    tokenizer.chat_template = text
    configure_chat_template(tokenizer)
    return tokenizer


def check(tokenizer: Any, row: dict[str, Any]) -> None:
    """Hold steps 1 and 3's rows of a conversation against the template's own text; see the module.

    Raises:
        RowError: the row is refused.
        AssertionError: it is not masked exactly.
    """
    (example,) = convert(row)[1]
    turns = [*example.prompt, *example.response]
    (rows,) = tokenise.sft_rows(tokenizer, [example], 10_000, DataReport(kind="demonstrations"))
    assert isinstance(rows, list), rows
    found = []
    for made in rows:
        starts = [i for i, bit in enumerate(made["response_mask"]) if bit and not made["response_mask"][i - 1]]
        for start in starts:
            end = next((i for i in range(start, made["length"]) if not made["response_mask"][i]), made["length"])
            found.append((made["input_ids"][:start], made["input_ids"][start:end]))
    expected = []
    stops = [tokenizer.convert_ids_to_tokens(i) for i in stop_token_ids(tokenizer)]
    for i, turn in enumerate(turns):
        if turn["role"] == "assistant":
            before = render_text(tokenizer, turns[:i], add_generation_prompt=True)
            whole = render_text(tokenizer, turns[: i + 1])
            assert whole.startswith(before)
            said = whole[len(before) :]
            last = calls_of(turn)[-1]["function"]["arguments"]["city"] if "tool_calls" in turn else turn["content"]
            after = said.rindex(last) + len(last)
            ends = [at + len(stop) for stop in stops if (at := said.find(stop, after)) >= 0]
            expected.append((before, said[: min(ends)] if ends else f"{said}{OPEN[bool(calls_of(turn))]}", turn))
    assert len(found) == len(expected), (len(found), len(expected))
    for (prompt, answer), (before, said, turn) in zip(found, expected, strict=True):
        prompt_text, text = (tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in (prompt, answer))
        assert prompt_text == before, (prompt_text, before)
        assert text == said, (text, said)
        for part in (turn["content"], turn.get("reasoning", "")):
            assert part in text, (part, text)
    (asked,) = tokenise.prompt_rows(tokenizer, [example], 10_000, DataReport(kind="prompts"))
    assert isinstance(asked, list), asked
    assert asked[0]["prompt_ids"] == found[-1][0], "a rollout sees another prompt than was trained"


def cell(tokenizer: Any, row: dict[str, Any]) -> str:
    """``ok``, or how the row is refused, or how it fails."""
    try:
        check(tokenizer, row)
    except RowError as error:
        return f"refused: {str(error).split(';')[0]}"
    except AssertionError as error:
        return f"FAILS: {error}"
    return "ok"


def cells(family: str) -> dict[str, str]:
    """The cells of a family's line."""
    try:
        tokenizer = tokenizer_of(family)
    except UserError as error:
        return {"single": f"refused: {error}"}
    return {name: cell(tokenizer, row) for name, row in ROWS.items()}


def main(names: Sequence[str]) -> int:
    """Print the table; returns 1 if a cell fails."""
    print(f"| template | {' | '.join(ROWS)} |\n|{'---|' * (len(ROWS) + 1)}")
    failed = False
    for family in names or FAMILIES:
        found = cells(family)
        failed |= any(text.startswith("FAILS") for text in found.values())
        print(f"| {family} | {' | '.join(found.get(name, '') for name in ROWS)} |")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
