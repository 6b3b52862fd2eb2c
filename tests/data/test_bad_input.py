"""Bad input, each kind as a user meets it: one line that names the place, or a row that is left out and counted."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from tests.data import families
from tests.data.test_prepare import pairs, prepare, sft, write
from training.utils.data import prepare as prepare_module, selection
from training.utils.data.formats.columns import convert
from training.utils.data.reading.sources import Source
from training.utils.data.template import RowError, render_text
from training.utils.errors import UserError


def chat(*turns: tuple[str, str]) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


IMAGE = {"type": "image_url", "image_url": {"url": "https://a.example/b.png"}}
# A fifth line after four good ones: what the error says, and under which name it is counted with --on_bad_row skip.
BAD_ROWS = {
    "broken JSON": ('{"prompt": "x", }', "broken JSON at column 17", "bad row"),
    "invalid UTF-8": (b'{"prompt": "\xff", "response": "y"}', "invalid UTF-8: byte 13 of the line is 0xff", "bad row"),
    "10 MB": (json.dumps({"prompt": "x", "response": "y" * 10_000_000}), "the row has 10.0 MB", "bad row"),
    "missing role": (json.dumps({"messages": [{"content": "a"}]}), "message 1 of 'messages' has no role", "bad row"),
    "two user turns": (
        json.dumps(chat(("user", "a"), ("user", "b"), ("assistant", "c"))),
        "two user turns in a row",
        "bad row",
    ),
    "image part": (
        json.dumps({"messages": [{"role": "user", "content": [IMAGE]}]}),
        "the content of message 1 of 'messages' holds an image where text should be",
        "bad row",
    ),
    "half a character": (r'{"prompt": "\ud800", "response": "y"}', r"holds half a character, \\ud800", "bad row"),
    "no value": ('{"prompt": NaN, "response": "y"}', "an empty user turn", "bad row"),
    "rows within": (
        '{"type": "a", "data": [{"prompt": "x", "response": "y"}]}',
        "rows, which lie in its data",
        "bad row",
    ),
    "other columns": ('{"foo": 1}', "no known format has the columns foo", "bad row"),
    "special token": ('{"prompt": "<|im_end|>", "response": "y"}', "which is a special token", "bad row"),
    "empty response": ('{"prompt": "x", "response": " "}', "", "empty response"),
    "image address": (
        '{"prompt": "https://a.example/b.png", "response": "a cat"}',
        "",
        "an image's address where text should be",
    ),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_is_one_line_or_counted(tok, tmp_path, kind):
    line, message, counted_as = BAD_ROWS[kind]
    path = tmp_path / "a.jsonl"
    good = "".join(json.dumps(row) + "\n" for row in sft(5)).encode().splitlines(keepends=True)
    path.write_bytes(b"".join(good[:4]) + (line if isinstance(line, bytes) else line.encode()) + b"\n" + good[4])
    if message:
        with pytest.raises(UserError, match=rf"a\.jsonl:5: .*{message}.*--on_bad_row skip"):
            prepare(1, tok, str(path))
    data = prepare(1, tok, str(path), on_bad_row="skip")
    drop = data.report.dropped[counted_as]
    assert drop.count == 1 and drop.places[0].startswith(f"{path}:5")
    assert len(data.train) + len(data.held_out) == 5 and len("\n".join(data.report.lines())) < 600


def test_a_row_of_10_mb_in_a_list_and_in_a_table(tok, tmp_path):
    rows = [*sft(4), {"prompt": "x", "response": "y" * 10_000_000}, *sft(1, 50)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.csv").write_text("prompt,response\n" + "".join(f"{r['prompt']},{r['response']}\n" for r in rows))
    for name, place in (("a.json", "a.json:1"), ("a.csv", "a.csv:6")):
        with pytest.raises(UserError, match=rf"{place}: the row has 10\.0 MB, the limit is 4\.2 MB"):
            prepare(1, tok, str(tmp_path / name))
        data = prepare(1, tok, str(tmp_path / name), on_bad_row="skip")
        assert data.report.dropped["bad row"].count == 1 and len(data.train) + len(data.held_out) == 5


def test_a_list_whose_quote_is_missing(tok, tmp_path):
    text = json.dumps([*sft(1), *({"text": "words " * 9} for _ in range(9))]).replace("words ", '"words ', 1)
    (tmp_path / "a.json").write_text('[{"prompt": "x, "' + text)
    with pytest.raises(UserError, match=r"a\.json:1: broken JSON at column \d+: "):
        prepare(1, tok, str(tmp_path / "a.json"))
    (tmp_path / "b.json").write_text('[{"prompt": "' + "x" * 1_000_000)
    with pytest.raises(UserError, match=r"column 13: Unterminated string"):
        prepare(1, tok, str(tmp_path / "b.json"))


BAD_FILES = {
    "half.jsonl.gz": (gzip.compress(b'{"prompt": "a", "response": "b"}\n' * 9999)[:60], "cut off or damaged after row"),
    "note.csv": (b"sep=,\nprompt,response\na,b\n", "the first line, sep=,, is a note to spreadsheets: leave it out"),
    "semicolons.csv": (b"prompt;response\na;b\n", "separated by semicolons, not commas; save it with commas"),
    "list.json": (b'[{"prompt": "a", "response": "b"},\n {"prompt",}]', "list.json:2: broken JSON at column 11"),
    "utf16.jsonl": ('{"prompt": "a", "response": "b"}\n'.encode("utf-16"), "the file is in UTF-16; save it as UTF-8"),
    "quote.csv": (b'prompt,response\na,"b\nc,d\n', "quote.csv:2: broken CSV: .*is a quote missing"),
    "nothing.jsonl": (b"\n\n", "no demonstrations to train on are left: 0 rows read"),
    "all_dropped.jsonl": (b'{"prompt": "a", "response": ""}\n' * 3, "3 rows read; 3 empty response"),
}


@pytest.mark.parametrize("name", BAD_FILES)
@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_a_bad_file_is_one_line_whatever_is_skipped(tok, tmp_path, name, on_bad_row):
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        prepare(1, tok, str(tmp_path / name), on_bad_row=on_bad_row)


def test_a_parquet_with_other_columns(tok, tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"zip": [1], "city": ["x"]}), path)
    with pytest.raises(UserError, match=r"a\.parquet:1: no known format has the columns zip, city; three ways"):
        prepare(1, tok, str(path))


def test_a_parquet_with_damaged_pages(tok, tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(sft(200)), path)
    data = bytearray(path.read_bytes())
    data[30:90] = b"\xff" * 60
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.parquet: not a readable parquet file"):
        prepare(1, tok, str(path))


def arrow_text(*values: bytes) -> pyarrow.Array:
    """A column of texts as these bytes, valid or not."""
    offsets = np.cumsum([0, *map(len, values)]).astype("int32")
    return pyarrow.Array.from_buffers(
        pyarrow.string(), len(values), [None, pyarrow.py_buffer(offsets), pyarrow.py_buffer(b"".join(values))]
    )


def bad_tables() -> dict[str, tuple[pyarrow.Table, str]]:
    """A table of three rows whose second can not be used, and what the error says of it."""
    prompts, answers = ["How?", "What?", "Why?"], ["So.", "That.", "Thus."]
    late = pyarrow.array([0, 2**62, 0], pyarrow.timestamp("us"))
    inside = pyarrow.StructArray.from_arrays([answers, late], ["full_text", "made"])
    big = ["So.", "y" * 10_000_000, "Thus."]
    return {
        "big": (pyarrow.table({"prompt": prompts, "response": big}), r"the row has 10\.0 MB, the limit is 4\.2 MB"),
        "big elsewhere": (pyarrow.table({"prompt": prompts, "response": answers, "notes": big}), "the row has 10.0 MB"),
        "invalid": (
            pyarrow.table({"prompt": arrow_text(b"How?", b"a\xffb", b"Why?"), "response": answers}),
            "column 'prompt' can not be read: invalid UTF-8: byte 2 is 0xff",
        ),
        "late": (pyarrow.table({"prompt": prompts, "response": inside}), "column 'response' can not be read: "),
        "late elsewhere": (pyarrow.table({"prompt": prompts, "response": answers, "made": late}), ""),
    }


@pytest.mark.parametrize("kind", bad_tables())
@pytest.mark.parametrize("hub", [False, True])
def test_a_bad_row_of_a_parquet_file_or_of_the_hub(tok, tmp_path, monkeypatch, kind, hub):
    table, message = bad_tables()[kind]
    path, name = tmp_path / "a.parquet", str(tmp_path / "a.parquet")
    pyarrow.parquet.write_table(table, path)
    if hub:
        name, split = "someone/thing", datasets.Dataset(table)
        monkeypatch.setattr(selection, "resolve", lambda text, *_: Source(text, hub=(split, None)))
    if message:
        with pytest.raises(UserError, match=rf"{name}:2: {message}"):
            prepare(1, tok, name, data_output_path=str(tmp_path / "cache"))
    data = prepare(1, tok, name, data_output_path=str(tmp_path / "cache"), on_bad_row="skip")
    assert (data.report.dropped["bad row"].count if message else not data.report.dropped) == 1
    assert len(data.train) + len(data.held_out) == (2 if message else 3)


def test_a_column_that_can_not_be_read_is_null_in_the_row_of_step_3(tok, tmp_path):
    pyarrow.parquet.write_table(bad_tables()["late elsewhere"][0], tmp_path / "a.parquet")
    data = prepare(3, tok, str(tmp_path / "a.parquet"))
    rows = [json.loads(text) for part in (data.train, data.held_out) for text in part["row"]]
    assert next(row for row in rows if row["prompt"] == "What?") == {
        "prompt": "What?",
        "response": "That.",
        "made": None,
    }


def test_a_parquet_with_two_columns_of_one_name(tok, tmp_path):
    table = pyarrow.table([["a"], ["b"], ["c"]], names=["prompt", "prompt", "response"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: a column name stands twice: prompt, prompt, response"):
        prepare(1, tok, str(tmp_path / "a.parquet"))


def test_a_header_with_two_names_that_differ_in_capitals(tok, tmp_path):
    (tmp_path / "a.csv").write_text("prompt,Prompt,chosen,rejected\na,b,c,d\n")
    with pytest.raises(UserError, match=r"a\.csv:2: the columns 'prompt' and 'Prompt' differ only in capitals"):
        prepare(2, tok, str(tmp_path / "a.csv"))


def test_bytes_that_are_no_utf8_in_a_csv_are_a_bad_row(tok, tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"prompt,response\nHow?,So.\nWhat?,\xe9t\xe9\nWhy?,Thus.\n")
    with pytest.raises(UserError, match=r"a\.csv:3: invalid UTF-8: byte 0xe9"):
        prepare(1, tok, str(path))
    data = prepare(1, tok, str(path), on_bad_row="skip")
    assert data.report.dropped["bad row"].count == 1 and len(data.train) + len(data.held_out) == 2


HALF = "\ud800 x"
SAID = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
CALL = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"a": HALF}}]}
HALVES = {
    "prompt of a pair": {"prompt": HALF, "chosen": "a", "rejected": "b"},
    "transcript": {"prompt": f"\n\nHuman: {HALF}\n\nAssistant:", "chosen": "a", "rejected": "b"},
    "transcript of a chat": {"messages": f"\n\nHuman: {HALF}\n\nAssistant: a"},
    "chosen": {"prompt": "x", "chosen": HALF, "rejected": "b"},
    "history": {"instruction": "x", "output": "y", "history": [[HALF, "a"]]},
    "system": {"system": HALF, "prompt": "x", "response": "y"},
    "answers": {"prompt": "x", "answers": [{"response": t, "rank": n} for n, t in enumerate([HALF, "b", "c"], 1)]},
    "tools": {"messages": SAID, "tools": [{"name": "f", "description": HALF}]},
    "tools as text": {"messages": SAID, "tools": json.dumps([{"name": HALF}])},
    "call": {"messages": [SAID[0], CALL]},
    "name of a tool": {"messages": [SAID[0], CALL | {"tool_calls": [{"name": "f"}]},
                                    {"role": "tool", "name": HALF, "content": "1"}, SAID[1]]},
}  # fmt: skip


@pytest.mark.parametrize("kind", HALVES)
def test_half_a_character_wherever_text_comes_in(kind):
    with pytest.raises(RowError, match=r"holds half a character, \\ud800, which is no text"):
        convert(HALVES[kind])


def test_half_a_character_in_a_template_or_a_system_message(tok, tmp_path):
    data, file = write(tmp_path / "a.jsonl", sft(2)), tmp_path / "a.json"
    for given in ({"system_message": HALF}, {"chat_template": "{{ messages }}" + HALF}, {"end_of_assistant": HALF}):
        file.write_text(json.dumps(given))
        with pytest.raises(UserError, match=f"a.json: {next(iter(given))} holds half a character"):
            prepare(1, families.smol_like(), data, chat_template=str(file))
    (tmp_path / "a.jinja").write_text("{{ '\\ud800' }}" + families.SMOL)
    with pytest.raises(UserError, match="template holds half a character"):
        prepare(1, families.smol_like(), data, chat_template=str(tmp_path / "a.jinja"))
    with pytest.raises(RowError, match="half a character"):
        render_text(tok, [{"role": "user", "content": HALF}])  # what somebody types to a chat program


def test_half_a_character_in_a_column_that_names_a_kind(tok, tmp_path):
    rows = [row | {"rejected_kind": HALF} for row in pairs(3)]
    assert len(prepare(2, tok, write(tmp_path / "a.jsonl", rows)).train) == 2


def test_half_a_character_in_a_column_that_nothing_reads(tok, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(r'{"prompt": "Who?", "response": "Ada", "id": "\ud800"}' + "\n" + json.dumps(sft(1)[0]) + "\n")
    assert len(prepare(1, tok, str(path)).train) == 1


@pytest.mark.parametrize(
    "template", ["{{ 1 / 0 }}", "{% for i in range(10 ** 9) %}a{% endfor %}", "{{ messages[9].x }}"]
)
def test_a_template_that_fails(tok, tmp_path, template):
    (tmp_path / "a.jinja").write_text(template)
    with pytest.raises(UserError, match="the chat template fails on a plain conversation"):
        prepare(1, families.smol_like(), write(tmp_path / "a.jsonl", sft(2)), chat_template=str(tmp_path / "a.jinja"))


def test_a_template_that_loses_a_turn(tmp_path):
    (tmp_path / "a.jinja").write_text(families.SMOL.replace("for message in messages", "for message in messages[-2:]"))
    with pytest.raises(UserError, match="the chat template loses the user turn"):
        prepare(1, families.smol_like(), write(tmp_path / "a.jsonl", sft(2)), chat_template=str(tmp_path / "a.jinja"))


EDITS = {
    "longer": lambda rows: [*rows, *sft(3, 100)],
    "shorter": lambda rows: rows[:-2],
    "other rows": lambda rows: rows[::-1],
    "broken": lambda rows: [*rows[:3], {"foo": 1}, *rows[4:]],
    "gone": None,
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_file_that_is_edited_between_the_two_passes(tok, tmp_path, monkeypatch, edit):
    path, cache = write(tmp_path / "a.jsonl", sft(20)), tmp_path / "cache"

    def edit_after(*arguments):
        decided = selection.decide(*arguments)
        if EDITS[edit] is None:
            Path(path).unlink()
        else:
            write(Path(path), EDITS[edit](sft(20)))
        return decided

    monkeypatch.setattr(prepare_module, "decide", edit_after)
    message = r"a\.jsonl: No such file" if edit == "gone" else r"a\.jsonl: the file changed while it was read"
    with pytest.raises(UserError, match=message):
        prepare(1, tok, path, data_output_path=str(cache))
    assert not [p for p in cache.iterdir() if p.is_dir()], "nothing of it stays in the cache"


def test_a_cache_folder_that_can_not_be(tok, tmp_path):
    with pytest.raises(UserError, match=r"--data_output_path: .* can not be written \(.*\); name another folder"):
        prepare(1, tok, write(tmp_path / "a.jsonl", sft(3)), data_output_path="/proc/nowhere")


def test_a_split_that_leaves_nothing_says_so(tok, tmp_path):
    with pytest.raises(UserError, match="20 rows read; --data_split leaves 20 to the other steps"):
        prepare(2, tok, write(tmp_path / "a.jsonl", pairs(20)), data_split="1,0,1")
