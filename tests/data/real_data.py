"""Where the public data lies that nobody here wrote, and which steps each file feeds."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("TRIPOD_REAL_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
STEPS = {
    "hh_harmless.jsonl": (1, 2, 3),
    "dpo_en_demo.json": (1, 2, 3),
    "alpaca_en_demo.json": (1, 3),
    "gsm8k_train.jsonl": (1, 3),
    "gsm8k_model_solutions.jsonl": (1, 2, 3),
    "awesome_chatgpt_prompts.csv": (3,),
}
FED = [(name, step) for name, steps in STEPS.items() for step in steps]


def path_of(name: str) -> Path:
    path = FOLDER / name
    if not path.is_file():
        pytest.skip(f"{name} is not here (TRIPOD_REAL_DATA, or ../shared/data)")
    return path


def raw(name: str) -> list[dict]:
    """The file's rows, read another way than the project's."""
    path = path_of(name)
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
