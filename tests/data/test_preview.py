"""The preview program: what it shows, what it counts, its page, --validate."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.data import families
from tests.data.test_prepare import pairs, prepare, sft, write
from training.utils.data.preview import Piece, coloured, pieces


@pytest.fixture
def run(preview_program):
    return preview_program


def table(out: str) -> dict[str, str]:
    return dict(
        re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in out.splitlines() if re.search(r"\S\s{2,}\S", line)
    )


def test_rows_and_counts(run, tmp_path):
    rows = pairs(20) + pairs(2) + [{"prompt": "Same?", "chosen": "Yes.", "rejected": "Yes."}]
    rows += [{"prompt": "Long?", "chosen": "Quite a long answer.", "rejected": "No."}]
    code, out, _ = run("--data_path", write(tmp_path / "a.jsonl", rows), "--step", "2", "--rows", "3")
    told = table(out)
    assert code == 0 and out.count("--- row") == 6
    assert re.search(r"<\|im_start\|>assistant\n\[\[Good \d+\.<\|im_end\|>\]\]", out)
    assert told[f"rows read from {tmp_path / 'a.jsonl'}"] == "24" and told["as prompt/chosen/rejected"] == "24"
    assert told["dropped: exact duplicate"].startswith(f"2 ({tmp_path / 'a.jsonl'}:21")
    assert told["dropped: identical pair"].startswith(f"1 ({tmp_path / 'a.jsonl'}:23")
    assert int(told["rows to train on"]) + int(told["rows held out"]) == 21 and int(told["rows held out"]) >= 1
    assert told["pairs whose longer answer is the chosen one"] == "100.0% of 21"
    assert told["held-out rows whose first question is trained on"] == "0"
    assert "p50" in told["length in tokens"] and "grouped by length" in told["padding in batches of 8"]
    assert told["truncated"].startswith("0 of 21")


def test_training_finds_what_preview_tokenised(run, tmp_path):
    path = write(tmp_path / "a.jsonl", sft(20))
    assert run("--data_path", path)[0] == 0
    assert prepare(1, families.smol_like(), path, max_length=512, seed=1234).report.from_cache


def test_colours():
    parts = [
        Piece("<s>", False, True),
        Piece("Hi ", False, False),
        Piece("Yes", True, False),
        Piece("</s>", True, True),
    ]
    assert coloured(parts, False) == "<s>Hi [[Yes</s>]]"
    assert coloured(parts, True) == (
        "\x1b[1;35m\x1b[2m<s>\x1b[0m\x1b[2mHi \x1b[0m\x1b[32mYes\x1b[0m\x1b[1;35m\x1b[32m</s>\x1b[0m"
    )


def test_special_tokens_are_pieces_of_their_own():
    tok = families.smol_like()
    ids = tok("<|im_start|>user\nHé<|im_end|>", add_special_tokens=False)["input_ids"]
    mask = [0] * (len(ids) - 1) + [1]
    assert pieces(tok, ids, mask) == [
        Piece("<|im_start|>", False, True),
        Piece("user\nHé", False, False),
        Piece("<|im_end|>", True, True),
    ]


def test_page_escapes_text(run, tmp_path):
    rows = [{"prompt": "<script>alert(1)</script>", "response": "a & b"}, *sft(3)]
    target = tmp_path / "page.html"
    code, _, _ = run("--data_path", write(tmp_path / "a.jsonl", rows), "--html", str(target))
    page = target.read_text(encoding="utf-8")
    assert code == 0 and "<script>" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert '<span class="trained">a &amp; b</span><span class="trained special">&lt;|im_end|&gt;</span>' in page
    assert "rows to train on" in page
    code, _, err = run("--data_path", str(tmp_path / "a.jsonl"), "--html", str(tmp_path / "no" / "page.html"))
    assert code == 2 and err.startswith("error: --html")


def test_a_page_is_written_over_a_page_alone(run, tmp_path):
    data, target = write(tmp_path / "a.jsonl", sft(3)), tmp_path / "page.html"
    rows = Path(data).read_text()
    for _ in range(2):
        assert run("--data_path", data, "--html", str(target))[0] == 0
    both = str(tmp_path / "b")
    for flags in (["--html", data], ["--html", both, "--write", both]):
        code, _, err = run("--data_path", data, *flags)
        assert code == 2 and "name another one" in err and err.count("\n") == 1
    assert Path(data).read_text() == rows and not (tmp_path / "b").exists()


def test_page_of_pairs_shows_the_prompt_once(run, tmp_path):
    rows = [{"prompt": "Why " + "so " * n + "blue?", "chosen": "Light.", "rejected": "Paint."} for n in range(40)]
    target = tmp_path / "page.html"
    argv = ["--data_path", write(tmp_path / "a.jsonl", rows), "--step", "2", "--rows", "1", "--html", str(target)]
    assert run(*argv)[0] == 0
    page = target.read_text(encoding="utf-8")
    assert page.count("blue?") == 1
    card = page[page.index("<section") : page.index("</section>")]
    answers = re.findall(r'<h3>(\w+)</h3><pre><span class="trained">([^<]+)</span>', card)
    assert answers == [("chosen", "Light."), ("rejected", "Paint.")]
    bars = [int(count) for count in re.findall(r"tokens: (\d+) rows", page)]
    trained = int(re.search(r"rows to train on</td><td>(\d+)", page)[1])
    assert len(bars) == 24 and sum(bars) == trained < 40, "a histogram of the rows to train on"


def test_validate(run, tmp_path):
    good = write(tmp_path / "good.jsonl", sft(10))
    assert run("--data_path", good, "--validate") == (0, "", "")
    bad = tmp_path / "bad.jsonl"
    bad.write_text(
        Path(good).read_text() + "{nonsense\n" + json.dumps(sft(1)[0]) + "\n" + '{"prompt": "a", "response": ""}\n'
    )
    code, out, err = run("--data_path", str(bad), "--validate")
    assert (code, err) == (1, "")
    assert out.splitlines() == [
        f"{bad}:11: broken JSON at column 2: Expecting property name enclosed in double quotes",
        f"1 x empty response: {bad}:13",
        f"1 x exact duplicate: {bad}:12",
    ]
    code, out, err = run("--data_path", str(tmp_path / "none.jsonl"), "--validate")
    assert (code, err) == (1, "") and out.startswith("--data_path") and out.count("\n") == 1


def test_bad_input_is_one_line(run, tmp_path):
    code, out, err = run("--data_path", str(tmp_path / "none.jsonl"))
    assert (code, out) == (2, "") and err.startswith("error: --data_path") and err.count("\n") == 1
    code, _, err = run("--steps", "1")
    assert code == 2 and "did you mean --step" in err


def test_a_file_that_training_refuses_is_not_called_sound(run, tmp_path):
    """All rows ask the same, so none can be held out."""
    path = write(tmp_path / "same.jsonl", [{"prompt": "Why?", "response": f"Answer {n}."} for n in range(5)])
    for more, code in ((), 0), (("--validate",), 1):
        ended, out, _ = run("--data_path", path, "--step", "1", *more)
        assert ended == code and "no row is held out" in out


def test_no_escape_sequence_reaches_the_terminal(run, tmp_path):
    evil = "\x1b]0;title\x07\x1b[31mred\x9b1m"
    rows = [{"prompt": f"Why {n}?{evil}", "response": f"So.{evil}", f"column{evil}": 1} for n in range(12)]
    path = write(tmp_path / "a.jsonl", [*rows, {f"x{evil}": 1}])
    for more in ((), ("--validate",), ("--on_bad_row", "skip")):
        _, out, err = run("--data_path", path, "--step", "1", *more)
        assert "\x1b" not in out + err and "\x07" not in out + err and "red" in out + err


@pytest.mark.parametrize("step", [1, 2, 3])
def test_prepared_rows_can_be_written_to_look_at(run, tmp_path, step):
    rows = pairs(10) if step == 2 else sft(9) + [{"messages": [
        {"role": role, "content": text}
        for role, text in (("user", "A?"), ("assistant", "B."), ("user", "C?"), ("assistant", "D."))
    ]}]  # fmt: skip
    path, target = write(tmp_path / "a.jsonl", rows), tmp_path / "prepared.jsonl"
    code, *_ = run("--data_path", path, "--step", str(step), "--rows", "0", "--write", str(target))
    written = [json.loads(line) for line in target.read_text().splitlines()]
    assert code == 0 and len(written) == 10 and {row["source"] for row in written} == {path}
    assert [row["split"] for row in written] == ["train"] * 9 + ["held_out"]
    tok = families.smol_like()
    data = prepare(step, tok, path, seed=1234, **({"max_prompt_length": 256} if step == 3 else {}))
    stored = [*data.train, *data.held_out]
    if step == 1:
        assert [row["text"] for row in written] == [tok.decode(row["input_ids"]) for row in stored]
        several = next(row for row in written if "A?" in row["text"])
        assert several["trained"] == ["B.<|im_end|>", "D.<|im_end|>"]
    elif step == 2:
        assert [row["rejected_text"] for row in written] == [tok.decode(row["rejected_ids"]) for row in stored]
        assert all(re.fullmatch(r"Good \d+\.<\|im_end\|>", row["chosen_trained"][0]) for row in written)
    else:
        assert [row["text"] for row in written] == [tok.decode(row["prompt_ids"]) for row in stored]
    code, _, err = run("--data_path", path, "--write", str(target))
    assert code == 2 and "there is such a file" in err and len(target.read_text().splitlines()) == 10


def judged(judge: str, number: int, *ranks: int) -> dict:
    answers = [{"response": f"Answer {'x' * i}", "rank": rank} for i, rank in enumerate(ranks, 1)]
    return {"prompt": [{"role": "user", "content": f"Question {number}?"}], "answers": answers, "judge": judge}


def test_judges_ties_and_length(run, tmp_path):
    """Ada and Bob: one of nine comparisons differs altogether, two are a tie to one of them."""
    rows = [judged("ada", 1, 1, 2, 3), judged("bob", 1, 1, 2, 3), judged("ada", 2, 1, 2, 2), judged("bob", 2, 1, 2, 3),
            judged("ada", 3, 2, 1, 2), judged("bob", 3, 1, 2, 2), judged("ada", 4, 1, 1, 1)]  # fmt: skip
    code, out, _ = run("--data_path", write(tmp_path / "a.jsonl", rows), "--step", "2", "--rows", "0")
    told = table(out)
    assert code == 0 and told["prompts by judge"] == "ada 4, bob 3"
    assert told["prompts that several judges have ranked"] == "3"
    # the same of three pairs of answers: in prompt 1 all, in prompt 2 all but the last, in prompt 3 none
    assert told["two judges say the same of two answers"].startswith("55.6%, Krippendorff's alpha ")
    assert told["pairs of answers that are tied, no pairs to train on"] == "3"
    assert told["dropped: tie"].startswith("1 ")
    assert told["pairs whose longer answer is the chosen one"].startswith("8.3% of 12")  # prompt 1 counts once
    alone, out, _ = run("--data_path", write(tmp_path / "b.jsonl", rows[::2]), "--step", "2", "--rows", "0")
    told = table(out)
    assert alone == 0 and told["prompts by judge"] == "ada 4" and "two judges say the same of two answers" not in told
    assert "prompts by judge" not in run("--data_path", write(tmp_path / "c.jsonl", pairs(20)), "--step", "2")[1]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--step 3 --max_seq_len 64", "--max_seq_len changes nothing in rows of --step 3: .*--max_prompt_seq_len"),
        ("--step 1 --max-prompt-seq-len 64", "--max_prompt_seq_len changes nothing in rows of --step 1"),
        ("--step 2 --max_prompt_seq_len=256", "--max_prompt_seq_len changes nothing in rows of --step 2"),
        ("--step 2 --sft_only_data_path demo", "--sft_only_data_path changes nothing in rows of --step 2"),
        ("--step 3 --train_on_prompts", "--train_on_prompts changes nothing in rows of --step 3"),
        ("--validate --html page.html", "--validate .*leave out --html"),
        ("--validate --write rows.jsonl", "--validate .*leave out --write"),
    ],
)
def test_a_flag_that_would_do_nothing_is_refused(run, argv, said):
    code, out, err = run("--data_path", "demo", *argv.split())
    assert (code, out) == (2, "") and re.match(f"error: {said}", err) and err.count("\n") == 1


def test_a_switch_that_is_off_may_be_given(run, tmp_path):
    path = write(tmp_path / "a.jsonl", pairs(10))
    assert run("--data_path", path, "--step", "2", "--no-train_on_prompts", "--html", "", "--validate")[0] == 0
