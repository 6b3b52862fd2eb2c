"""What a recipe's values are on a command line: files lie in the current folder, or beside the recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.utils.run.recipes import flags_of


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a recipe, seen from another one as ``../recipes``."""
    for name in ("here", "recipes/rows", "recipes/demo", "recipes/cosine"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("here/both.csv", "recipes/both.csv", "recipes/mine.csv", "recipes/rules.py", "recipes/chat.jinja"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "recipes"


@pytest.mark.parametrize(
    ("flag", "value", "found"),
    [
        ("data_path", "mine.csv:20", "mine.csv:20"),
        ("eval_data_path", ["rows", "./mine.csv"], ["rows", "mine.csv"]),
        ("sft-only-data-path", "rows", "rows"),
        ("model_name_or_path", "rows", "rows"),
        ("reward_function", "rules.py:score", "rules.py:score"),
        ("chat_template", "chat.jinja", "chat.jinja"),
    ],
)
def test_files_beside_a_recipe_are_found(beside: Path, flag: str, value: object, found: str | list[str]) -> None:
    names = found if isinstance(found, list) else [found]
    assert flags_of({flag: value}, [beside]) == [f"--{flag}", *(f"{beside}/{name}" for name in names)]


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("data_path", "both.csv"),
        ("data_path", "demo"),
        ("data_path", "demo:5"),
        ("data_path", "owner/name"),
        ("data_path", "x" * 300),
        ("chat_template", ""),
        ("lr_scheduler_type", "cosine"),
        ("data_output_path", "rows"),
        ("system_message", "Be kind. " * 40 + "Answer with yes and/or no."),
    ],
)
def test_other_values_stay_as_they_are(beside: Path, flag: str, value: str) -> None:
    assert flags_of({flag: value}, [beside]) == [f"--{flag}", value]
