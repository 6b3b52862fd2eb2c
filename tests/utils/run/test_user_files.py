"""Text files that a user writes are read with an editor's mark of UTF-8 (BOM) and lines of Windows, too."""

import json
from pathlib import Path
from typing import Any

import pytest
from deepspeed.launcher.runner import fetch_hostfile

from training.utils.answers import read_answers
from training.utils.data.reading.sources import resolve
from training.utils.data.template_file import read_template_file
from training.utils.engine.zero_config import read_user_config
from training.utils.errors import UserError
from training.utils.run.hosts import read_hostfile, with_ranks
from training.utils.run.recipes import read_recipe

ANSWERS = [{"id": str(n), "prompt": "Hi", "answers": ["a", "b"]} for n in range(2)]
ROW = {"prompt": "Hi", "response": "Hello"}


def launched_hosts(path: str) -> dict[str, int]:
    """What DeepSpeed's launcher reads of the file that it is given."""
    command = with_ranks(["deepspeed"], None, path, None)
    return dict(fetch_hostfile(command[command.index("--hostfile") + 1]))


# Name of a file, its text, how it is read
FILES: dict[str, tuple[str, Any]] = {
    "answers.jsonl": (
        "".join(json.dumps(line) + "\n" for line in ANSWERS),
        lambda path: read_answers(path, "--answers"),
    ),
    "hosts": ("worker-1 slots=8\nworker-2 slots=4\n", read_hostfile),
    "launched": ("worker-1 slots=8\nworker-2 slots=4\n", launched_hosts),
    "config.json": ('{"zero_optimization": {\n"reduce_bucket_size": 1000}}', read_user_config),
    "recipe.yaml": ("step1:\n  learning_rate: 1e-5\n", lambda path: read_recipe(path)[1]),
    "template.jinja": ("{% for m in messages %}\n{{ m.content }}\n{% endfor %}", read_template_file),
    "template.json": ('{"system_message": "Be kind.",\n"stop_ids": [7]}', read_template_file),
    **{
        name: (text, lambda path: [row.values for row in resolve(path, "demonstrations").rows()])
        for name, text in {
            "rows.jsonl": json.dumps(ROW) + "\n",
            "rows.json": json.dumps([ROW], indent=1),
            "rows.csv": "prompt,response\nHi,Hello\n",
            "rows.txt": "Some text.\nMore of it.\n",
        }.items()
    },
}


@pytest.mark.parametrize("name", FILES)
def test_a_mark_of_utf_8_and_lines_of_windows_change_nothing(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TRIPOD_CACHE", str(tmp_path / "cache"))
    text, read = FILES[name]
    found = []
    for folder, content in (
        ("plain", text.encode()),
        ("marked", b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode()),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(content)
        found.append(read(str(tmp_path / folder / name)))
    assert found[0] == found[1] and found[0]


def test_a_hostfile_in_utf_16_is_one_line(tmp_path: Path):
    (tmp_path / "hosts").write_text("worker-1 slots=8\n", encoding="utf-16")
    with pytest.raises(UserError, match="--hostfile .*hosts: not UTF-8"):
        read_hostfile(str(tmp_path / "hosts"))
