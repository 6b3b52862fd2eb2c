"""What train.py looks for in the user's rows before step 1 trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from training.pipeline.own_data import check_rows
from training.utils.errors import UserError


def test_pairs_may_stand_behind_many_demonstrations(tmp_path: Path) -> None:
    rows: list[dict[str, str]] = [{"prompt": f"Question {n}?", "response": "So."} for n in range(12_000)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="none of 12000 rows is one"):
        check_rows("step2", ["--data_path", str(path)])
    with path.open("a") as file:
        file.writelines(json.dumps({"prompt": f"{n}?", "chosen": "Yes.", "rejected": "No."}) + "\n" for n in range(2))
    check_rows("step2", ["--data_path", str(path)])
