"""What is looked for before torch is imported: weights in every form that transformers takes, and small files."""

import errno
import io
import json
import os

import pytest

from training.migrate.shell.script import read_script
from training.utils.errors import UserError
from training.utils.run.files import check_page
from training.utils.run.hosts import with_ranks
from training.utils.run.inputs import check_flag, check_model_path

FLAG = "--model_name_or_path"


def folder_with(folder, *names, **texts):
    """A model's folder with its config.json and further files; ``a__json`` is the file a.json."""
    for name in ("config.json", *names):
        (folder / name).write_text("{}")
    for name, text in texts.items():
        (folder / name.replace("__", ".")).write_text(text)
    return str(folder)


INDEX = json.dumps({"weight_map": {"a": "1.bin", "b": "2.bin"}})


@pytest.mark.parametrize(
    ("names", "texts"),
    [
        (["model.safetensors"], {}),
        (["pytorch_model.bin"], {}),
        (["1.bin", "2.bin"], {"model__safetensors__index__json": INDEX}),
        (["1.bin", "2.bin"], {"pytorch_model__bin__index__json": INDEX}),
        (["model.safetensors"], {"pytorch_model__bin__index__json": INDEX}),  # which is not read then
        ([], {"config__json": '{"transformers_weights": "own.safetensors"}'}),
    ],
)
def test_weights_in_any_form_are_found(names, texts, tmp_path):
    check_model_path(folder_with(tmp_path, *names, **texts), FLAG)


@pytest.mark.parametrize(
    ("names", "texts", "said"),
    [
        ([], {}, r"the folder holds no weights \(model.safetensors\)$"),
        (["other.safetensors", "training_args.bin"], {}, "the folder holds no weights"),
        (["q4.gguf"], {}, r"the folder holds no weights \(model.safetensors\); give .*q4.gguf itself"),
        (["1.bin"], {"pytorch_model__bin__index__json": INDEX}, "1 of its files of weights are missing, 2.bin among"),
        ([], {"model__safetensors__index__json": INDEX}, "2 of its files of weights are missing, 1.bin among them"),
        ([], {"model__safetensors__index__json": '{"weight_map": []}'}, "index.json is damaged: it names no files"),
        (["adapter_config.json", "adapter_model.safetensors"], {}, "a LoRA adapter without its base; merge"),
    ],
)
def test_a_folder_without_weights_is_refused_but_for_a_plan_or_a_tokenizer(names, texts, said, tmp_path):
    folder = folder_with(tmp_path, *names, **texts)
    with pytest.raises(UserError, match=said):
        check_model_path(folder, FLAG)
    with pytest.raises(UserError, match=f"--critic_model_name_or_path .*{said}"):
        check_flag("critic_model_name_or_path", [folder])
    check_model_path(folder, FLAG, weights=False)
    check_flag("critic_model_name_or_path", [folder], weights=False)
    check_flag("tokenizer_name_or_path", [folder])


def test_an_adapter_alone_says_where_it_is_merged_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "step1" / "adapter").mkdir(parents=True)
    (tmp_path / "step1" / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="without its base; merge it into that first, see docs/lora.md$"):
        check_model_path("step1/adapter", FLAG)
    folder_with(tmp_path / "step1", "model.safetensors")
    with pytest.raises(UserError, match="step1/adapter: a LoRA adapter without its base; step1 has it merged in$"):
        check_model_path("step1/adapter", FLAG, weights=False)


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("model.safetensors", lambda file: check_model_path(str(file.parent), FLAG)),
        ("rules.py", lambda file: check_flag("reward_function", [f"{file}:score"])),
        ("hosts", lambda file: with_ranks([], None, str(file), None)),
        ("report.html", lambda file: check_page(file, "--output")),
        ("run.sh", lambda file: read_script(f"bash {file}")),
        ("set.sh", lambda file: read_script(f"source {file}")),
    ],
)
def test_a_file_that_may_not_be_read_is_one_line(name, asked, tmp_path, monkeypatch):
    """As root every file can be read, so the system's answer is played."""
    folder_with(tmp_path, name)
    original = io.open

    def refused(path, *args, **kwargs):
        if str(path).endswith(name):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return original(path, *args, **kwargs)

    monkeypatch.setattr(io, "open", refused)
    with pytest.raises(UserError, match=f": Permission denied .*{name}"):
        asked(tmp_path / name)


@pytest.mark.parametrize("name", ["model.safetensors", "1.bin", "tokenizer.json", "tokenizer.model", "config.json"])
def test_a_pointer_of_git_lfs_is_said_to_be_one(name, tmp_path):
    index = {"pytorch_model__bin__index__json": INDEX} if name == "1.bin" else {}
    folder = folder_with(tmp_path, "tokenizer.json", *(["1.bin", "2.bin"] if index else ["model.safetensors"]), **index)
    check_model_path(folder, FLAG)
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(UserError, match=f"^{FLAG} .*: {name} is a pointer of Git LFS, .*run git lfs pull"):
        check_model_path(folder, FLAG)


def test_a_hub_name_is_left_to_the_hub():
    check_model_path("someone/model", FLAG)


@pytest.mark.parametrize("text", ["", "[]", "null", "3", "{", "[" * 100_000])
@pytest.mark.parametrize("name", ["config", "generation_config", "tokenizer_config", "special_tokens_map"])
def test_a_small_file_that_is_no_object_is_named(name, text, tmp_path):
    folder = folder_with(tmp_path, "model.safetensors")
    (tmp_path / f"{name}.json").write_text(text)
    with pytest.raises(UserError, match=rf"/{name}\.json is (damaged|not readable)"):
        check_model_path(folder, FLAG, weights=False)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "vocab.txt", "chat_template.jinja"])
def test_a_byte_order_mark_is_refused_by_its_file(name, tmp_path):
    folder = folder_with(tmp_path, "model.safetensors", "tokenizer.json", "vocab.txt", "chat_template.jinja")
    check_model_path(folder, FLAG)
    (tmp_path / name).write_text("{}", encoding="utf-8-sig")
    with pytest.raises(UserError, match=f"^{FLAG} .*: {name} begins with a byte order mark.*without BOM$"):
        check_model_path(folder, FLAG)


CLOSED = [("model_name_or_path", ""), ("model_name_or_path", "/m"), ("data_path", ""), ("data_path", "/d/a.jsonl")]


@pytest.mark.parametrize(("name", "below"), [*CLOSED, ("reward_function", "/f.py:f"), ("chat_template", "/t.jinja")])
def test_a_folder_that_may_not_be_looked_into_is_one_line(tmp_path, monkeypatch, name, below):
    """As root no folder is closed, so the system's answer is played."""
    closed = tmp_path / "closed"
    closed.mkdir()
    original = os.stat

    def stat(path, *args, **kwargs):
        if str(path).startswith(f"{closed}/"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return original(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", stat)
    with pytest.raises(UserError, match=f"--{name} {closed}.*Permission denied"):
        check_flag(name, [f"{closed}{below}"])
