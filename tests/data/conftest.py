"""The small tokenizer, and the preview program as a function."""

from __future__ import annotations

import pytest

from tests.data import families
from training.utils.data import preview
from training.utils.errors import run_program
from training.utils.model import loading, tokenizer


@pytest.fixture(scope="module")
def tok():
    """The small tokenizer."""
    return families.smol_like()


@pytest.fixture
def preview_program(monkeypatch, capsys):
    """Run the program with the small tokenizer; gives (exit code, stdout, stderr)."""
    tok = families.smol_like()
    monkeypatch.setattr(loading, "resolve_model", lambda name, **_: name)
    monkeypatch.setattr(tokenizer, "load_tokenizer", lambda path, **kwargs: tok)

    def program(*argv: str):
        code = run_program(preview.main, list(argv))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return program
