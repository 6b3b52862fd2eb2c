"""Public data that nobody here wrote; skipped where it is not at hand (TRIPOD_REAL_DATA, or ../shared/data)."""

from __future__ import annotations

import json
import re

import pytest

from tests.data import families
from tests.data.real_data import FED, FOLDER, path_of, raw
from tests.data.test_prepare import prepare
from tests.data.test_preview import table
from training.utils.data.kinds import KINDS
from training.utils.errors import UserError

LONG = 100_000  # nothing is truncated, so that counts can be compared

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the folder of real data is not here")


@pytest.mark.parametrize(("name", "step"), FED)
def test_first_rows_of_every_file_feed_its_steps(name, step):
    data = prepare(step, families.tokenizer("smollm2-like"), f"{path_of(name)}:64", max_length=1024)
    assert len(data.train) >= 20 and len(data.held_out) >= 1
    source = data.report.sources[str(path_of(name))]
    assert source.read == 64 and sum(source.formats.values()) >= 60


@pytest.mark.parametrize(("name", "step"), [("alpaca_en_demo.json", 2), ("awesome_chatgpt_prompts.csv", 1)])
def test_a_step_that_a_file_can_not_feed(name, step):
    with pytest.raises(UserError, match=f"no {KINDS[step - 1]} to train on are left: 64 rows read; 64"):
        prepare(step, families.tokenizer("smollm2-like"), f"{path_of(name)}:64")


def independent(name: str) -> dict[str, int]:
    """The same counts, worked out another way."""
    rows = raw(name)
    counts = {"read": len(rows), "empty response": 0, "differing prefixes": 0, "doubled": 0, "identical": 0, "image": 0}
    counts["unpaired"] = 0
    kept = []
    for row in rows:
        if name == "hh_harmless.jsonl":
            heads = [row[k].rpartition("\n\nAssistant:")[0] for k in ("chosen", "rejected")]
            tails = [row[k].rpartition("\n\nAssistant:")[2].strip() for k in ("chosen", "rejected")]
            doubled = any(
                a == b
                for k in ("chosen", "rejected")
                for a, b in zip(*(lambda r: (r, r[1:]))(re.findall(r"\n\n(Human|Assistant):", row[k])), strict=False)
            )
            if doubled:
                counts["doubled"] += 1
            elif heads[0] != heads[1]:
                counts["differing prefixes"] += 1
            elif not all(tails):
                counts["empty response"] += 1
            elif tails[0] == tails[1]:
                counts["identical"] += 1
            else:
                kept.append((heads[0], *tails))
        elif name == "dpo_en_demo.json":
            kept.append(json.dumps(row, sort_keys=True))
        elif name == "alpaca_en_demo.json":
            if row["input"].startswith("http") and row["input"].endswith((".jpg", ".png")):
                counts["image"] += 1
            else:
                kept.append((row["instruction"], row["input"], row["output"]))
        elif name == "awesome_chatgpt_prompts.csv":
            kept.append(row["prompt"])
        elif name == "gsm8k_model_solutions.jsonl":
            marked = [value for value in row.values() if isinstance(value, dict)]
            right, wrong = ([m["solution"] for m in marked if m["is_correct"] is good] for good in (True, False))
            kept += [(row["question"], *pair) for pair in zip(right, wrong, strict=False)]
            counts["unpaired"] += not (right and wrong)
        else:
            kept.append(tuple(row[k] for k in ("question", "answer")))
    counts["kept"] = len(set(kept))
    counts["duplicate"] = len(kept) - len(set(kept))
    return counts


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("hh_harmless.jsonl", 2),
        ("dpo_en_demo.json", 2),
        ("alpaca_en_demo.json", 1),
        ("gsm8k_train.jsonl", 1),
        ("gsm8k_model_solutions.jsonl", 2),
        ("awesome_chatgpt_prompts.csv", 3),
    ],
)
def test_counts_of_the_preview_agree_with_an_independent_count(preview_program, name, step):
    wanted, long = independent(name), ("--max_prompt_seq_len" if step == 3 else "--max_seq_len", str(LONG))
    code, out, _ = preview_program("--data_path", str(path_of(name)), "--step", str(step), "--rows", "0", *long)
    told = table(out)
    assert code == 0
    assert int(told[f"rows read from {path_of(name)}"]) == wanted["read"]
    assert int(told["rows to train on"]) + int(told["rows held out"]) == wanted["kept"]
    dropped = {key.removeprefix("dropped: "): int(v.split()[0]) for key, v in told.items() if key.startswith("dropped")}
    assert {reason: count for reason, count in dropped.items() if count} == {
        reason: count
        for reason, count in {
            "empty response": wanted["empty response"],
            "differing prefixes": wanted["differing prefixes"],
            "transcript with two assistant turns in a row": wanted["doubled"],
            "identical pair": wanted["identical"],
            "an image's address where text should be": wanted["image"],
            "exact duplicate": wanted["duplicate"],
            "no chosen and rejected answer": wanted["unpaired"],
        }.items()
        if count
    }


def test_padding_that_the_preview_prints_is_under_five_percent(preview_program):
    code, out, _ = preview_program("--data_path", str(path_of("alpaca_en_demo.json")), "--rows", "0")
    grouped, ungrouped = (float(share) for share in re.findall(r"([\d.]+)%", table(out)["padding in batches of 8"]))
    assert code == 0 and grouped < 5 and ungrouped > 20
