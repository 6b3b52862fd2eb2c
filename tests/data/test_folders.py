"""Folders as `load_dataset` and `load_from_disk` read them: clones of hub datasets, saved ones, files side by side."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from tests.data import families
from tests.data.test_prepare import prepare, sft, write
from training.utils.data import preview
from training.utils.data.reading.folders import split_names
from training.utils.data.reading.sources import resolve
from training.utils.errors import UserError


def readme(folder: Path, configs: object) -> None:
    folder.mkdir(exist_ok=True)
    text = f"---\nlicense: mit\nconfigs: {json.dumps(configs)}\n---\n\n# A dataset\n"
    (folder / "README.md").write_text(text, encoding="utf-8")


def rows_of(folder: Path, held_out: bool = False) -> list[dict]:
    return [row.values for row in resolve(str(folder), "demonstrations").rows(held_out)]


def parquet(path: Path, rows: list[dict]) -> list[dict]:
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows).to_parquet(path)
    return rows


def test_a_clone_of_a_hub_dataset_is_read_as_load_dataset_reads_it(tmp_path):
    folder = tmp_path / "clone"
    train = parquet(folder / "data" / "train-00000-of-00002.parquet", sft(3))
    train += parquet(folder / "data" / "train-00001-of-00002.parquet", sft(5)[3:])
    test = parquet(folder / "data" / "test-00000-of-00001.parquet", sft(7)[5:])
    files = [{"split": split, "path": f"data/{split}-*"} for split in ("train", "test")]
    readme(folder, [{"config_name": "default", "data_files": files}])
    assert rows_of(folder) == train and rows_of(folder, held_out=True) == test
    theirs = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    assert [list(theirs["train"]), list(theirs["test"])] == [train, test]


@pytest.mark.parametrize("subfolders", [("data",), ("train", "test"), ("deep", "deeper")])
def test_without_yaml_the_files_of_subfolders_are_read(tmp_path, subfolders):
    folder = tmp_path / "clone"
    if "test" in subfolders:
        train, test = (parquet(folder / name / "0000.parquet", sft(2)) for name in subfolders)
    else:
        train, test = (parquet(folder.joinpath(*subfolders, f"{n}-0.parquet"), sft(2)) for n in ("train", "test"))
    (folder / "README.md").write_text("# no YAML\n")
    (folder / ".git").mkdir()
    (folder / ".git" / "index.json").write_text("{}")
    assert rows_of(folder) == train and rows_of(folder, held_out=True) == test


def test_one_configuration_is_chosen_or_asked_for(tmp_path):
    folder = tmp_path / "clone"
    for name in ("main", "socratic"):
        parquet(folder / name / "train.parquet", [{"prompt": name, "response": "a"}])
    configs = [{"config_name": name, "data_files": f"{name}/*.parquet"} for name in ("main", "socratic")]
    readme(folder, configs)
    with pytest.raises(UserError, match="the configurations main, socratic; give the path"):
        resolve(str(folder), "demonstrations")
    readme(folder, [configs[0], configs[1] | {"default": True}])
    source = resolve(str(folder), "demonstrations")
    assert [row.values["prompt"] for row in source.rows()] == ["socratic"]
    assert source.unread == ("configuration main",)


def test_data_files_in_subfolders_beside_others_are_named(tmp_path):
    """Not read, as docs/data.md says; what is no data there is not named, nor hidden folders."""
    write(tmp_path / "a.jsonl", sft(2))
    for folder, names in {
        "more": ("b.jsonl", "c.csv", "config.json"),
        "one/deep": ("d.parquet",),
        ".git": ("e.json",),
    }.items():
        (tmp_path / folder).mkdir(parents=True)
        for name in names:
            (tmp_path / folder / name).write_text("{}\n")
    (tmp_path / "linked").symlink_to(tmp_path / "more")
    source = resolve(str(tmp_path), "demonstrations")
    assert [path.name for path in source.train] == ["a.jsonl"]
    assert source.unread == ("more/ (2 files)", "one/ (1 file)")


@pytest.mark.parametrize("beside", ["dataset_infos.json", "LICENSE.txt", "rows.json"])
def test_what_is_no_rows_does_not_hide_the_subfolders(tmp_path, beside):
    """Of older hub datasets the clone has a JSON file beside the folder of its rows; Spark's folders end in .json."""
    folder = tmp_path / "clone"
    rows = parquet(folder / "data" / "train-0.parquet", sft(3))
    if beside == "rows.json":
        (folder / beside).mkdir()
    else:
        (folder / beside).write_text("{}")
    source = resolve(str(folder), "demonstrations")
    assert rows_of(folder) == rows and source.unread == ((beside,) if beside != "rows.json" else ())


def test_files_that_are_packed_otherwise_are_named(tmp_path):
    (tmp_path / "deep").mkdir()
    write(tmp_path / "a.jsonl", sft(2))
    for name in ("b.jsonl.zst", "deep/c.parquet.bz2", "notes.md", ".d.csv.zip", "e.tar.zst"):
        (tmp_path / name).write_bytes(b"(\xb5/\xfd")
    source = resolve(str(tmp_path), "demonstrations")
    assert [path.name for path in source.train] == ["a.jsonl"]
    assert source.unread == ("b.jsonl.zst", "deep/c.parquet.bz2")


def test_links_to_folders_are_followed_once(tmp_path):
    """Also where they lead in a ring, or up to the folder that they are in."""
    real, folder = tmp_path / "real", tmp_path / "folder"
    for path in (real / "train", folder):
        path.mkdir(parents=True)
    write(real / "train" / "a.jsonl", sft(2))
    write(tmp_path / "outside.jsonl", sft(2))
    (folder / "data").symlink_to(real)
    (folder / "again").symlink_to(real / "train")
    (folder / "up").symlink_to(tmp_path)
    (folder / "itself").symlink_to(folder)
    (real / "ring").symlink_to(folder)
    (folder / "endless").symlink_to(folder / "endless")
    assert rows_of(folder) == sft(2)


def test_a_folder_whose_only_content_is_a_link_to_nothing_says_so(tmp_path):
    (tmp_path / "data").symlink_to(tmp_path / "gone")
    with pytest.raises(
        UserError, match=r"--data_path .*: the folder holds no data file, and .*data is a link to nothing"
    ):
        resolve(str(tmp_path), "demonstrations")


def test_a_readme_with_a_mark_of_its_encoding(tmp_path):
    folder = tmp_path / "clone"
    parquet(folder / "data" / "train.parquet", sft(2))
    parquet(folder / "other" / "train.parquet", sft(5))
    readme(folder, [{"data_files": "data/*"}])
    (folder / "README.md").write_bytes(b"\xef\xbb\xbf" + (folder / "README.md").read_bytes().replace(b"\n", b"\r\n"))
    assert rows_of(folder) == sft(2)


@pytest.mark.parametrize(
    ("configs", "reason"),
    [
        ([{"data_files": "data/train-*"}], r"names the files data/train-\*.*is the clone complete"),
        ([{"data_files": "../other/*.jsonl"}], "is the clone complete"),
        ([{"data_files": [{"split": "train", "path": "https://example.com/a.jsonl"}]}], "is the clone complete"),
        ([{"data_files": {"train": "."}}], "is the clone complete"),
        ([{"data_files": "*.jsonl", "data_dir": "../other"}], "is the clone complete"),
        ([{"data_files": [{"split": "train", "path": f"{n}*"} for n in "op"]}], "must name the split train once"),
        ([{"data_files": [{"split": "test", "path": []}]}], "must name the split test once, with its files"),
        ([{"data_files": [{"split": "test"}]}], "must name the split test once, with its files"),
        ([{"data_files": "**x/*.jsonl"}], r"README.md names the files \*\*x/\*.jsonl: "),
    ],
)
def test_files_that_are_not_there_are_named(tmp_path, configs, reason):
    folder = tmp_path / "clone"
    readme(folder, configs)
    write(folder / "other.jsonl", sft(4))
    (tmp_path / "other").mkdir()
    write(tmp_path / "other" / "secret.jsonl", sft(4))
    with pytest.raises(UserError, match=reason):
        resolve(str(folder), "demonstrations")


def test_a_clone_may_be_named_by_a_relative_path(tmp_path, monkeypatch):
    train = parquet(tmp_path / "clone" / "data" / "train-0.parquet", sft(2))
    readme(tmp_path / "clone", [{"data_files": "data/train-*"}])
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert rows_of(Path("../clone")) == train


def test_yaml_that_is_none_is_one_line(tmp_path):
    (tmp_path / "README.md").write_text("---\nconfigs: [\n  x: {\n---\n")
    write(tmp_path / "a.jsonl", sft(4))
    with pytest.raises(UserError, match="the YAML of .*README.md can not be read"):
        resolve(str(tmp_path), "demonstrations")


@pytest.mark.parametrize("splits", [False, True])
def test_a_saved_dataset_is_read_as_load_from_disk_reads_it(tmp_path, splits):
    folder = tmp_path / "saved"
    data = datasets.Dataset.from_list(sft(5))
    test = data.select([4])
    saved = datasets.DatasetDict({"train": data, "test": test, "extra": test}) if splits else data
    saved.save_to_disk(folder, **({} if splits else {"num_shards": 2}))
    assert rows_of(folder) == list(data)
    assert rows_of(folder, held_out=True) == (list(test) if splits else [])
    assert resolve(str(folder), "demonstrations").unread == (("split extra",) if splits else ())
    next(folder.rglob("*.arrow")).unlink()
    with pytest.raises(UserError, match="save the dataset again"):
        resolve(str(folder), "demonstrations")


@pytest.mark.parametrize(
    ("names", "train", "held_out"),
    [
        ("train validation test", "train", "validation"),
        ("test validation training", "training", "test"),
        ("test_prefs test_sft train_prefs train_sft", "train_prefs", "test_prefs"),
        ("train_sft train_prefs test_prefs test_sft", "train_sft", "test_sft"),
        ("test_gen train_sft", "train_sft", "test_gen"),
        ("validation test", "test", "validation"),
        ("train_eval", "train_eval", None),
        ("test", "test", None),
        ("default", "default", None),
    ],
)
def test_no_split_to_judge_by_is_trained_on(names, train, held_out):
    """Whatever order they stand in; and what is held out is of the kind that is trained on."""
    assert split_names(names.split()) == (train, held_out)


@pytest.mark.parametrize("kind", ["torch", "numpy", "pandas", "arrow"])
def test_a_format_that_a_dataset_was_saved_with_changes_no_row(tmp_path, kind):
    """load_from_disk gives it again: tensors, tables, and of the columns those alone that it named."""
    rows = [{"prompt": "q", "responses": ["a", "b"], "scores": [1.0, 2.0], "response": "c"}] * 2
    data = datasets.Dataset.from_list(rows)
    for number, columns in enumerate((None, ["prompt"])):
        data.with_format(kind, columns=columns).save_to_disk(tmp_path / f"{number}")
        assert rows_of(tmp_path / f"{number}") == rows


def test_an_arrow_file_is_read_in_either_form_and_a_cut_one_is_named(tmp_path):
    import pyarrow

    table = pyarrow.Table.from_pylist(sft(4))
    for name, writer in (("stream", pyarrow.ipc.new_stream), ("file", pyarrow.ipc.new_file)):
        path = tmp_path / f"{name}.arrow"
        with pyarrow.OSFile(str(path), "wb") as sink, writer(sink, table.schema) as out:
            out.write_table(table)
        assert [row.values for row in resolve(str(path), "demonstrations").rows()] == sft(4)
        path.write_bytes(path.read_bytes()[:200])
        with pytest.raises(UserError, match="not a readable arrow file"):
            list(resolve(str(path), "demonstrations").rows())


def test_what_lies_beside_the_rows_is_not_taken_for_them(tmp_path):
    write(tmp_path / "train.jsonl", sft(4))
    for name in ("dataset_info.json", "requirements.txt", "LICENSE.txt", "metadata.csv"):
        (tmp_path / name).write_text("{}\n")
    source = resolve(str(tmp_path), "demonstrations")
    assert [path.name for path in source.train] == ["train.jsonl"]
    assert sorted(source.unread) == ["LICENSE.txt", "dataset_info.json", "metadata.csv", "requirements.txt"]
    data = prepare(1, families.smol_like(), str(tmp_path))
    assert "not read: LICENSE.txt" in "\n".join(data.report.lines())


def test_what_map_and_filter_leave_beside_a_dataset_is_not_read(tmp_path):
    """Changed copies of its rows, in datasets' own cache and in a folder that was saved and loaded again."""
    datasets.Dataset.from_list(sft(4)).save_to_disk(tmp_path / "all" / "saved")
    saved = tmp_path / "all" / "saved"
    loaded = datasets.load_from_disk(saved)
    loaded.filter(lambda row: True)
    made = loaded.map(lambda row: {"response": row["response"] + "!"}).cache_files[0]["filename"]
    (saved / "cache-0123456789abcdef_00001_of_00004.arrow").write_bytes(Path(made).read_bytes())  # of num_proc
    assert rows_of(tmp_path / "all") == sft(4)
    assert resolve(str(tmp_path / "all"), "demonstrations").unread == ("saved/ (3 files)",)


def test_a_pointer_of_git_lfs_is_named(tmp_path):
    path = tmp_path / "train.parquet"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n")
    with pytest.raises(UserError, match="git lfs pull"):
        list(resolve(str(path), "demonstrations").rows())


def test_preview_says_which_columns_were_read_and_which_were_not(tmp_path):
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    rows = [{"prompt": f"Q {i}", "response": "A", "lang": "en", "score": i} for i in range(6)]
    rows += [{"messages": turns, "images": ["a.png"]}, {"messages": turns, "system": "Be kind."}]
    more = {"role": "assistant", "content": "So.", "reasoning_content": "Hm."}
    rows += [{"messages": [turns[0], more]}, {"Context": "Q?", "chosen": "A", "rejected": "B"}]
    data = prepare(1, families.smol_like(), write(tmp_path / "a.jsonl", rows), on_bad_row="skip")
    table = dict(preview.counts(data, 2, 0))
    assert table["  columns read"] == "prompt 6, response 6, messages 2, system 1, Context 1, chosen 1, rejected 1"
    assert table["  columns ignored"] == "lang 6, score 6"
    assert (
        table["  rows refused for"] == "reasoning 1, images 1" or table["  rows refused for"] == "images 1, reasoning 1"
    )
