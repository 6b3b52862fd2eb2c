"""Reading files: every type, gzipped or not, rows with their lines, and one clear error for what is broken."""

from __future__ import annotations

import csv
import gzip
import json
import re
import time
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from tests.data import families
from training.utils.arguments import DataArguments
from training.utils.data.prepare import prepare_data, prepare_pretraining
from training.utils.data.reading import readers
from training.utils.data.reading.readers import read_file
from training.utils.data.reading.sources import resolve
from training.utils.data.template import RowError
from training.utils.errors import UserError
from training.utils.model import hub
from training.utils.run.inputs import check_flag

ROWS = [{"prompt": f"Hi {n}\nthere", "response": f"Grüße, «{n}»"} for n in range(5)]


def write(path: Path, rows=ROWS) -> Path:
    """Write ``rows`` in the type that the name says."""
    plain = path.with_suffix("") if path.suffix == ".gz" else path
    kind = plain.suffix
    if kind == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), plain)
    elif kind in (".csv", ".tsv"):
        with plain.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if kind == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif kind == ".json":
        plain.write_text(json.dumps(rows, indent=2, ensure_ascii=False), encoding="utf-8")
    else:
        plain.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    if plain != path:
        path.write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
    return path


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.tsv", "a.parquet", "a.txt", "a.ndjson"])
@pytest.mark.parametrize("zipped", ["", ".gz"])
def test_every_type_gives_the_same_rows(tmp_path, name, zipped):
    path = write(tmp_path / (name + zipped))
    found = list(resolve(str(path), "demonstrations").rows())
    assert [row.values for row in found] == ROWS
    assert all(row.place.startswith(f"{path}:") for row in found)


def test_lines_of_rows(tmp_path):
    pretty = write(tmp_path / "a.json")
    starts = [n for n, line in enumerate(pretty.read_text().splitlines(), 1) if line == "  {"]
    assert [row.place for row in read_file(pretty)] == [f"{pretty}:{n}" for n in starts]
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"a": 1}\n\n{"a": 2}\n')
    assert [row.place for row in read_file(lines)] == [f"{lines}:1", f"{lines}:3"]
    table = write(tmp_path / "a.csv")  # every row has a newline in a quoted cell
    assert [row.place for row in read_file(table)] == [f"{table}:{n}" for n in (2, 4, 6, 8, 10)]


def test_json_lists_and_objects_one_after_the_other(tmp_path):
    path = write(tmp_path / "a.json")
    assert [row.values for row in read_file(path)] == ROWS
    stream = tmp_path / "b.json"
    stream.write_text("\n".join(json.dumps(row, indent=1) for row in ROWS))
    assert [row.values for row in read_file(stream)] == ROWS


def test_byte_order_mark(tmp_path):
    for name, text in (("a.jsonl", '{"a": "b"}'), ("a.json", '[{"a": "b"}]'), ("a.csv", "a\nb\n")):
        path = tmp_path / name
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert [row.values for row in read_file(path)] == [{"a": "b"}]


def test_plain_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("One text.\n\nAnother.\n")
    assert [row.values for row in read_file(path)] == [{"text": "One text."}, {"text": "Another."}]


BROKEN_FILES = {
    "list.json": (b'[{"a": 1},\n {"a": 2,, }]', r"list\.json:2: broken JSON at column 10"),
    "open.json": (b'[{"a": 1},\n {"a": 2}', r"open\.json:2: broken JSON at column \d+: the list does not end"),
    "comma.json": (b'[{"a": 1} {"a": 2}]', "comma is missing"),
    "trailing.json": (b'[{"a": 1},]', "a comma before the end"),
    "after.json": (b'[{"a": 1}] 3', "something follows the list"),
    "utf8.json": (b'[{"a": 1},\n{"a": "\xff"}]', r"utf8\.json:2: invalid UTF-8: byte 0xff"),
    "marked.json": (b'\xef\xbb\xbf[{"a": "\xff"}]', r"marked\.json:1: invalid UTF-8: byte 0xff"),
    "semicolons.csv": (b"prompt;response\na;b\n", r"semicolons\.csv:1: .*separated by semicolons, not commas"),
    "tabs.csv": (b"prompt\tresponse\na\tb\n", "name the file .tsv"),
    "twice.csv": (b"prompt,prompt\na,b\n", "twice in the header"),
    "latin.csv": (b"prompt,r\xe9ponse\na,b\n", r"latin\.csv:1: invalid UTF-8 in the header: byte 0xe9"),
    "spaces.csv": (b"prompt,prompt \na,b\n", "twice in the header"),
    **{
        f"{codec}.{kind}": (text.encode(codec), f"{codec}.{kind}: the file is in UTF-16, or no text")
        for codec in ("utf-16-le", "utf-16-be")
        for kind, text in (("txt", "One text."), ("csv", "text\nOne."), ("jsonl", '{"text": "One."}'))
    },
    "quote.csv": (b'prompt,response\na,"b" c\n', r"quote\.csv:2: broken CSV"),
    "half.jsonl.gz": (gzip.compress(b'{"a": "x"}\n' * 9999)[:60], "cut off or damaged after row"),
    "not.json.gz": (b"\x1f\x8bnonsense", "cut off or damaged after row 0"),
    "not.parquet": (b"PAR1 nonsense", "not a readable parquet file"),
    "empty.parquet": (b"", "not a readable parquet file"),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_broken_files(tmp_path, name):
    content, message = BROKEN_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_file(tmp_path / name))


@pytest.mark.parametrize("text", ['[{"a": 1}, {"a": 2}]', '\ufeff\n[\n  {\n    "a": 1\n  },\n  {"a": 2}\n]\n'])
@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.jsonl.gz"])
def test_a_list_of_rows_is_read_whatever_its_file_is_called(tmp_path, text, name):
    data = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert [row.values for row in read_file(tmp_path / name)] == [{"a": 1}, {"a": 2}]


BROKEN_LINES = {
    '{"a": 1,, }': "broken JSON at column 9",
    '{"a": 1, "a": 2}': "a stands twice in one object",
    '{"a": [{"b": 1, "b": 1}]}': "b stands twice in one object",
    "[1, 2]": "a row must be a JSON object, this is a list",
    '"x"': "this is a text",
    "[" * 100_000: "broken JSON",
    b'{"a": "\xff"}': "invalid UTF-8: byte 8 of the line is 0xff",
    b'\xef\xbb\xbf{"a": "\xff"}': "invalid UTF-8: byte 8 of the line is 0xff",
    '{"a": "' + "x" * 10_000_000 + '"}': "the row has 10.0 MB, the limit is 4.2 MB",
}


@pytest.mark.parametrize("line", BROKEN_LINES, ids=[str(n) for n in range(len(BROKEN_LINES))])
@pytest.mark.parametrize("zipped", ["", ".gz"])
def test_broken_lines_are_rows_that_can_be_skipped(tmp_path, line, zipped):
    data = b'{"a": 1}\n' + (line if isinstance(line, bytes) else line.encode()) + b'\n{"a": 3}\n'
    path = tmp_path / f"a.jsonl{zipped}"
    path.write_bytes(gzip.compress(data) if zipped else data)
    first, bad, last = read_file(path)
    assert (first.values, last.values, last.place) == ({"a": 1}, {"a": 3}, f"{path}:3")
    assert bad.place == f"{path}:2" and isinstance(bad.values, RowError) and BROKEN_LINES[line] in str(bad.values)


def test_a_key_twice_is_a_bad_row_of_a_list_too(tmp_path):
    (tmp_path / "a.json").write_text(f'[{{"a": 1}}, {{"a": {{"b": 1, "b": 2}}, "c": "{"x" * 99}"}},\n{{"a": 3}}]')
    first, bad, last = read_file(tmp_path / "a.json")
    assert (first.values, last.values, last.place) == ({"a": 1}, {"a": 3}, f"{tmp_path}/a.json:2")
    assert isinstance(bad.values, RowError) and "b stands twice in one object" in str(bad.values)


def test_a_spreadsheets_empty_rows_and_columns_are_none(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(",,,\nprompt,response,,\na,b,,\n,,,\n , ,,\n\nc,d,,e\n")
    rows = list(read_file(path))
    assert [(row.values["prompt"], row.values["response"], row.place) for row in rows] == [
        ("a", "b", f"{path}:3"), ("c", "d", f"{path}:7")
    ]  # fmt: skip


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_header_in_the_middle_is_no_row(tmp_path, mark):
    """Of files that were put together with cat: "prompt" would be a prompt."""
    path = tmp_path / "a.csv"
    path.write_bytes(2 * (mark + b"prompt, response\nHi,Hello\n"))
    first, second, third = read_file(path)
    assert first.values == third.values == {"prompt": "Hi", "response": "Hello"}
    assert isinstance(second.values, RowError) and "the header stands here again" in str(second.values)
    assert second.place.endswith("a.csv:3")


def test_csv_row_with_too_few_cells(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,response\na,b\nc\n")
    _, bad = read_file(path)
    assert "1 cells where the header has 2" in str(bad.values) and bad.place == f"{path}:3"


def test_row_limit(tmp_path):
    path = write(tmp_path / "a.jsonl")
    assert len(list(resolve(f"{path}:3", "demonstrations").rows())) == 3
    assert resolve(f"{path}:3", "demonstrations").fingerprint() != resolve(str(path), "demonstrations").fingerprint()
    with pytest.raises(UserError, match="limit of 0"):
        resolve(f"{path}:0", "demonstrations")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt"])
def test_a_number_of_any_length_is_read(tmp_path, name):
    row = '{"prompt": "a", "count": 17, "id": ' + "1" * 5000 + "}"
    (tmp_path / name).write_text(f"[{row}]" if name == "a.json" else row)
    (found,) = read_file(tmp_path / name)
    assert found.values == {"prompt": "a", "count": 17, "id": "1" * 5000}


def test_a_limit_of_many_digits(tmp_path):
    path = write(tmp_path / "a.jsonl")
    assert len(list(resolve(f"{path}:{10**14}", "demonstrations").rows())) == 5
    for digits in (20, 200, 5000):
        with pytest.raises(UserError, match=f"a limit of {digits} digits; without a limit all rows are read"):
            resolve(f"{path}:{'9' * digits}", "demonstrations")


def test_folder_with_an_eval_split(tmp_path):
    for name in ("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl.gz", "test.json", "validation.csv"):
        write(tmp_path / name)
    (tmp_path / "README.md").write_text("not data")
    source = resolve(str(tmp_path), "demonstrations")
    assert [p.name for p in source.train] == ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl.gz"]
    assert [p.name for p in source.held_out] == ["test.json", "validation.csv"]
    assert len(list(source.rows())) == 10 and len(list(source.rows(held_out=True))) == 10


def test_a_link_to_nothing_in_a_folder(tmp_path):
    write(tmp_path / "train.jsonl")
    (tmp_path / "notes.md").symlink_to(tmp_path / "gone.md")
    assert len(resolve(str(tmp_path), "demonstrations").train) == 1
    (tmp_path / "more.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(UserError, match=r"more\.jsonl is a link to a file that is not there"):
        resolve(str(tmp_path), "demonstrations")


def test_training_data_of_seed_004(tmp_path):
    folder = tmp_path / "MultiTurnAlpaca"
    folder.mkdir()
    for name in ("training_data.txt.train", "training_data.txt.test"):
        (folder / name).write_text('{"instruction": "User: Hi", "output": "Hello"}\n')
    source = resolve(str(folder), "demonstrations")
    assert [p.name for p in source.train] == ["training_data.txt.train"] and source.has_held_out
    assert next(iter(source.rows())).values["output"] == "Hello"


def test_what_does_not_exist(tmp_path, monkeypatch):
    write(tmp_path / "sft.jsonl")
    with pytest.raises(UserError, match=r"no such file or folder; did you mean .*sft\.jsonl"):
        resolve(str(tmp_path / "stf.jsonl"), "demonstrations")
    with pytest.raises(UserError, match="no such file or folder"):
        resolve("a" * 300 + ".jsonl", "demonstrations")
    with pytest.raises(UserError, match="no data file"):
        (tmp_path / "empty").mkdir()
        resolve(str(tmp_path / "empty"), "demonstrations")
    (tmp_path / "a.pkl").write_bytes(b"x")
    with pytest.raises(UserError, match="not a data file"):
        resolve(str(tmp_path / "a.pkl"), "demonstrations")


@pytest.mark.parametrize("name", ["broken.jsonl", "broken"])
def test_a_link_to_nothing_is_called_one(tmp_path, name):
    link = tmp_path / name
    link.symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(UserError, match=r"--data_path .*: a link to .*gone\.jsonl, which is not there$"):
        resolve(str(link), "demonstrations")


def _wrong_sources(folder: Path) -> dict[str, str]:
    """What is wrong -> a source."""
    (folder / "empty").mkdir()
    write(folder / "some.jsonl")
    files = {"broken.json": "[{", "a.pkl": "x", "bad.jsonl": "{\n", "unknown.jsonl": '{"foo": 1}\n',
             "nothing.jsonl": "", "semicolons.csv": "prompt;response\na;b\n", "utf16.jsonl": "\ufffe"}  # fmt: skip
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-16" if name == "utf16.jsonl" else "utf-8")
    (folder / "link.jsonl").symlink_to(folder / "gone")
    names = [*files, "empty", "none.jsonl", "link.jsonl", "some.jsonl:0"]
    return {name: str(folder / name) for name in names}


@pytest.mark.parametrize("flag", ["data_path", "eval_data_path", "sft_only_data_path", "unsupervised_data_path"])
def test_what_is_wrong_with_a_source_names_the_flag_that_gave_it(tmp_path, flag, monkeypatch):
    monkeypatch.setenv("TRIPOD_CACHE", str(tmp_path / "cache"))
    tok = families.smol_like()
    good = str(write(tmp_path / "good.jsonl"))
    (tmp_path / "wrong").mkdir()
    for name, path in _wrong_sources(tmp_path / "wrong").items():
        first = {"data_path": [path], "sft_only_data_path": []}.get(flag, [good])
        data = DataArguments(data_path=first, eval_data_path=[path] if flag == "eval_data_path" else [])
        with pytest.raises(UserError) as raised:
            if flag == "unsupervised_data_path":
                prepare_pretraining([path], data, tok, max_length=128, seed=0)
            else:
                only = [path] if flag == "sft_only_data_path" else []
                options = {"max_length": 128, "seed": 0, "sft_only_data_path": only}
                prepare_data("demonstrations", data, tok, **options).to_judge_by()
        assert str(raised.value).startswith(f"--{flag} {tmp_path / 'wrong'}"), name
        if name in ("empty", "none.jsonl", "link.jsonl", "a.pkl"):  # found without reading it
            with pytest.raises(UserError, match=f"^--{flag} "):
                check_flag(flag, [path])


@pytest.mark.parametrize("name", ["Dahoas/rm-static", "MultiTurnAlpaca", "local/jsonfile"])
def test_hub_names_without_a_network(monkeypatch, name):
    """At once, in one line: the hub's libraries would try for half a minute and warn every time."""
    import huggingface_hub.constants

    for variable in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.socket, "getaddrinfo", _raise(OSError("no name server")))
    monkeypatch.setattr(time, "sleep", _raise(AssertionError("it must not be tried again")))
    with pytest.raises(UserError, match=rf"--data_path {name}: .*give the (path of a f|folder|path of the f)"):
        resolve(name, "demonstrations")


def test_hub_that_fails_says_why(monkeypatch):
    monkeypatch.setattr(hub, "is_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset_builder", _raise(ConnectionError("503 try later")))
    with pytest.raises(UserError, match=r"someone/thing: no file or folder here.*\(503 try later\)"):
        resolve("someone/thing", "demonstrations")


def _raise(error):
    def fail(*args, **kwargs):
        raise error

    return fail


def test_hub_dataset(tmp_path, monkeypatch):
    """A folder of data files goes through the same two calls of `datasets` as a hub name."""
    folder = tmp_path / "repository"
    folder.mkdir()
    write(folder / "train.jsonl")
    write(folder / "test.jsonl", ROWS[:2])
    monkeypatch.setattr(hub, "is_reachable", lambda: True)
    real_builder, real_load = datasets.load_dataset_builder, datasets.load_dataset
    cache = str(tmp_path / "cache")
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name: real_builder(str(folder), cache_dir=cache))
    monkeypatch.setattr(datasets, "load_dataset", lambda name: real_load(str(folder), cache_dir=cache))
    source = resolve("someone/thing:4", "demonstrations")
    assert [row.values for row in source.rows()] == ROWS[:4]
    assert [row.values for row in source.rows(held_out=True)] == ROWS[:2]
    assert source.fingerprint() == resolve("someone/thing:4", "demonstrations").fingerprint()
    assert next(iter(source.rows())).place == "someone/thing:1"


def test_hub_dataset_that_is_code_is_refused(monkeypatch):
    class Script:
        pass

    monkeypatch.setattr(hub, "is_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name: Script())
    monkeypatch.setattr(datasets, "load_dataset", _raise(AssertionError("it must not be loaded")))
    with pytest.raises(UserError, match="not plain data files"):
        resolve("someone/thing", "demonstrations")


def test_an_edited_file_is_another_source(tmp_path):
    path = write(tmp_path / "a.jsonl")
    before = resolve(str(path), "demonstrations").fingerprint()
    text = path.read_text()
    path.write_text(text.replace("Hi 3", "Hi 9"))
    assert resolve(str(path), "demonstrations").fingerprint() != before


@pytest.mark.parametrize("name", ["a.json.gz", "a.jsonl.gz", "a.csv.gz", "a.txt"])
@pytest.mark.parametrize("blank", [b" ", b"\n"])
def test_blanks_without_end_take_no_time(tmp_path, name, blank, monkeypatch):
    """30 MB of them, gzipped to a few kB, were read character by character."""
    monkeypatch.setattr(readers, "_MOST_EMPTY_LINES", 100_000)
    text = blank * 30_000_000
    path = tmp_path / name
    path.write_bytes(gzip.compress(text, 1) if name.endswith(".gz") else text)
    start = time.process_time()
    try:
        assert not [row for row in read_file(path) if not isinstance(row.values, RowError)]
    except UserError as error:
        assert "empty lines" in str(error) or "broken CSV" in str(error)
    assert time.process_time() - start < 3


@pytest.mark.parametrize(
    ("given", "told"),
    [
        *((f"a.jsonl:{limit}", "whole number: a.jsonl:1000") for limit in ("0.5", "50%", "-3", "1e3", "", "8:3")),
        ("demo:half", "whole number: demo:1000"),
        ("a.jsonl,demo", "--data_path a.jsonl demo"),
        ("a.jsonl,", "no such file"),
        ("b.jsonl:x", "no such file"),
    ],
)
def test_other_forms_of_a_limit_and_of_several_sources_are_told_how_to_write_them(tmp_path, monkeypatch, given, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text("{}")
    with pytest.raises(UserError, match=re.escape(told)):
        resolve(given, "pairs")
