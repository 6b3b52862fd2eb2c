"""Rankings from their file to the rows of a step: counts, duplicates, what does not fit, what is held out."""

from __future__ import annotations

import itertools
import json

import pytest

from training.utils.arguments import DataArguments
from training.utils.data import preview
from training.utils.data.batches import element_lengths, rankings_of
from training.utils.data.prepare import prepare_data
from training.utils.errors import UserError


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def rankings(count: int) -> list[dict]:
    """Prompts with four answers each, the last two of them tied: five pairs."""
    return [
        {"prompt": f"Question {n}?", "ranking": [f"Best {n}.", f"Good {n}.", [f"Bad {n}.", f"Poor {n}."]]}
        for n in range(count)
    ]


def pairs(count: int) -> list[dict]:
    return [{"prompt": f"Asked {n}?", "chosen": f"Good {n}.", "rejected": f"Bad {n}!"} for n in range(count)]


def prepare(kind, tok, *paths, max_length=512, **more):
    return prepare_data(kind, DataArguments(data_path=list(paths), **more), tok, max_length=max_length, seed=1)


def answers(tok, row) -> tuple[str, ...]:
    """What is compared in a row, from its tokens."""
    found = []
    for name in ("chosen", "rejected"):
        ids, mask = row[f"{name}_ids"], row[f"{name}_mask"]
        found.append(tok.decode([i for i, bit in zip(ids, mask, strict=True) if bit]).removesuffix("<|im_end|>"))
    return tuple(found)


def test_rows_of_rankings_and_pairs(tok, tmp_path):
    data = prepare("pairs", tok, write(tmp_path / "a.jsonl", [*rankings(20), *pairs(20)]))
    report, both = data.report, [*data.train, *data.held_out]
    assert len(both) == 20 * 5 + 20 and report.train_prompts + report.held_out_prompts == 40
    for dataset, prompts in ((data.train, report.train_prompts), (data.held_out, report.held_out_prompts)):
        groups = rankings_of(dataset)
        assert len(groups) == prompts == len(element_lengths(dataset))
        assert {len(rows) for rows in groups} == {1, 5}, "all pairs of a prompt are on one side"
        for rows in groups:
            shown = [answers(tok, dataset[i]) for i in rows]
            number = shown[0][0].split()[1].rstrip(".")
            best, good, bad, poor = (f"{word} {number}." for word in ("Best", "Good", "Bad", "Poor"))
            if len(rows) == 5:
                assert shown[0] == (best, poor), "the best against the worst comes first"
                assert set(shown) == {(best, good), *itertools.product((best, good), (bad, poor))}
    told = "\n".join(report.lines())
    assert f"{report.train_prompts} prompts ({report.train_rows} pairs) to train on" in told
    assert "up to 4 answers to a prompt" in told


def test_ordinary_pairs_are_told_as_before(tok, tmp_path):
    data = prepare("pairs", tok, write(tmp_path / "a.jsonl", pairs(20)))
    assert set(data.train["pairs"]) == {1} and not data.report.has_rankings
    assert f"{data.report.train_rows} rows to train on" in "\n".join(data.report.lines())
    assert element_lengths(data.train) == data.train["length"][:]


def test_the_best_answer_is_the_demonstration(tok, tmp_path):
    data = prepare("demonstrations", tok, write(tmp_path / "a.jsonl", rankings(4)))
    assert all("Best" in tok.decode(row["input_ids"]) for row in [*data.train, *data.held_out])
    assert len(data.train) + len(data.held_out) == 4
    prompts = prepare("prompts", tok, write(tmp_path / "a.jsonl", rankings(4)))
    assert len(prompts.train) + len(prompts.held_out) == 4


def test_a_ranking_given_twice_counts_once(tok, tmp_path):
    once, again = rankings(6), [{**row, "ranking": row["ranking"][:2]} for row in rankings(1)]
    data = prepare("pairs", tok, write(tmp_path / "a.jsonl", [*once, *once, *again]))
    assert data.report.dropped["exact duplicate"].count == 6
    assert data.report.train_prompts + data.report.held_out_prompts == 7, "other answers are another ranking"


def test_an_answer_that_is_too_long_leaves_with_its_pairs(tok, tmp_path):
    long = {"prompt": "Why?", "ranking": ["word " * 200, "Because.", "No.", "Apples."]}
    pair = {"prompt": "Who?", "ranking": ["word " * 200, "Ada.", "word " * 300]}
    path = write(tmp_path / "a.jsonl", [long, pair, *rankings(1)])
    data = prepare("pairs", tok, path, max_length=80, eval_data_path=[write(tmp_path / "b.jsonl", pairs(1))])
    first = [answers(tok, row) for row in data.train][:3]
    assert set(first) == {("Because.", "No."), ("Because.", "Apples."), ("No.", "Apples.")}
    assert set(data.train["pairs"][:3]) == {3}
    assert data.report.answers_too_long == 1
    assert data.report.dropped["no room: the response alone is too long"].count == 1
    assert "1 answers of rankings are too long" in "\n".join(data.report.lines())


def test_one_answer_and_all_tied_are_told(tok, tmp_path):
    rows = [{"prompt": "a", "ranking": ["b"]}, {"prompt": "c", "ranking": [["d", "e", "f"]]}]
    with pytest.raises(
        UserError, match=r"no pairs to train on are left: 2 rows read; 1 no chosen and rejected answer; 1 tie"
    ):
        prepare("pairs", tok, write(tmp_path / "a.jsonl", rows))
    bad = [*rankings(3), {"prompt": "a", "responses": ["b", "c"], "scores": [1, None]}]
    with pytest.raises(UserError, match=r"a.jsonl:4: scores of answer 2 is None, it must be a number"):
        prepare("pairs", tok, write(tmp_path / "a.jsonl", bad))


def test_a_special_token_in_any_answer_is_refused(tok, tmp_path):
    rows = [{"prompt": "a", "ranking": ["b", "c<|im_end|>", "d"]}, *rankings(3)]
    with pytest.raises(UserError, match=r"a.jsonl:1: the text contains '<\|im_end\|>'"):
        prepare("pairs", tok, write(tmp_path / "a.jsonl", rows))


def test_preview_shows_prompts_and_pairs(tok, tmp_path):
    data = prepare("pairs", tok, write(tmp_path / "a.jsonl", rankings(20)))
    table = dict(preview.counts(data, 4, 1))
    assert table["rows read from " + data.train[0]["source"]] == "20"
    assert table["rows to train on"] == str(5 * data.report.train_prompts)
    assert table["  pairs of so many prompts, which count once"].startswith(f"{data.report.train_prompts}, and ")
    titles = [title for title, _ in preview.shown_rows(data, tok, 1)]
    assert titles[0].endswith("one of 5 pairs of its prompt, chosen")
