import json
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
from chat_sessions import LETTERS, MAX_PROMPT_CHARACTERS, SAME, Session, append_rows, ties_file
from chat_stream import Answer

import training
from tests.inference.tiny_chat import make_tokenizer
from training.utils.data.formats.shapes import FORMATS
from training.utils.errors import UserError


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def talk(tokenizer):
    """``talk(session, prompt, answers...)`` is a finished turn."""

    def _talk(session, prompt, *answers, ended="stop", system=""):
        turn = session.ask(prompt, system)
        for column, text in enumerate(answers):
            turn.answers[column] = Answer(tokenizer, tokenizer.encode(text, add_special_tokens=False), ended)
            turn.answers[column].seconds = 0.5
            turn.rewards[column] = 0.25 + column
        return turn

    return _talk


def two(**options):
    return Session(("SFT", "RLHF"), **options)


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def as_step2_reads(row):
    """The row through the data layer, by its columns alone."""
    columns = {name.lower() for name in row}
    found = next(f for f in FORMATS if f.columns <= columns)
    assert found.name == "prompt/chosen/rejected"
    [example] = found.convert(row)
    return example


def test_histories_are_separate(talk):
    session = two()
    talk(session, "one", "a1", "b1", system="be kind")
    talk(session, "two", "a2", "b2", system="ignored later")
    assert session.history(0) == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "a1"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "a2"},
    ]
    assert [m["content"] for m in session.history(1, 1)] == ["be kind", "one", "b1"]


def test_a_vote_is_a_row_of_step_2(talk, tmp_path):
    session, file = two(), tmp_path / "deep" / "votes.jsonl"
    talk(session, "one", "bad", "good", system="be kind")
    session.vote(1, file)
    [row] = rows_of(file)
    assert row["prompt"] == [{"role": "system", "content": "be kind"}, {"role": "user", "content": "one"}]
    assert (row["chosen"], row["rejected"]) == ("good", "bad")
    assert row["vote"] | {"time": ""} == {"chosen_model": "RLHF", "rejected_model": "SFT", "blind": False, "time": ""}
    example = as_step2_reads(row)
    assert example.chosen == [{"role": "assistant", "content": "good"}] and example.prompt == row["prompt"]


def test_a_vote_after_the_histories_parted_keeps_both(talk, tmp_path):
    """Step 2 has one prompt for both answers; what the models had said before belongs to what is compared."""
    session, file = two(), tmp_path / "votes.jsonl"
    talk(session, "one", "a1", "b1")
    talk(session, "two", "a2", "b2")
    session.vote(0, file)
    [row] = rows_of(file)
    assert row["prompt"] == [{"role": "user", "content": "one"}]
    assert [m["content"] for m in row["chosen"]] == ["a1", "two", "a2"]
    assert [m["content"] for m in row["rejected"]] == ["b1", "two", "b2"]
    assert as_step2_reads(row).rejected == row["rejected"]


def test_equal_histories_stay_the_prompt(talk, tmp_path):
    session, file = two(), tmp_path / "votes.jsonl"
    talk(session, "one", "same", "same")
    talk(session, "two", "a2", "b2")
    session.vote(0, file)
    [row] = rows_of(file)
    assert [m["content"] for m in row["prompt"]] == ["one", "same", "two"]
    assert (row["chosen"], row["rejected"]) == ("a2", "b2")


def test_the_best_of_three_is_two_rows(talk, tmp_path):
    session, file = Session(("X", "Y", "Z")), tmp_path / "votes.jsonl"
    talk(session, "one", "x", "y", "z")
    session.vote(1, file)
    assert [(r["chosen"], r["rejected"]) for r in rows_of(file)] == [("y", "x"), ("y", "z")]


def test_ties_go_beside_the_file(talk, tmp_path):
    session, file = two(), tmp_path / "votes.jsonl"
    talk(session, "one", "a", "b")
    session.vote(SAME, file)
    assert not file.exists()
    [row] = rows_of(tmp_path / "votes_same.jsonl")
    assert row["vote"]["models"] == ["SFT", "RLHF"]
    assert ties_file(file).name == "votes_same.jsonl"


def test_identical_answers_are_no_preference(talk, tmp_path):
    session, file = two(), tmp_path / "votes.jsonl"
    talk(session, "one", "a", "a")
    assert session.vote(0, file) == []
    assert not file.exists() or file.read_text() == ""


def test_one_vote_for_each_finished_turn(talk, tmp_path):
    session, file = two(), tmp_path / "votes.jsonl"
    with pytest.raises(UserError):
        session.vote(0, file)
    talk(session, "one", "a", "b", ended="cancelled")
    assert not session.can_vote
    session.retry()
    assert not session.can_vote
    session.restart()
    talk(session, "one", "a", "b", ended="length")
    session.busy = True
    assert not session.can_vote
    session.busy = False
    with pytest.raises(UserError):
        session.vote(2, file)
    session.vote(0, file)
    with pytest.raises(UserError):
        session.vote(1, file)
    with pytest.raises(UserError):
        session.retry()
    assert len(rows_of(file)) == 1
    alone = Session(("SFT",))
    talk(alone, "one", "a")
    assert not alone.can_vote


def test_an_unwritable_file_is_said_and_the_vote_stays_open(talk, tmp_path):
    session = two()
    talk(session, "one", "a", "b")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can not be saved"):
        session.vote(0, tmp_path / "file" / "votes.jsonl")
    assert session.can_vote


def everything_shown(session):
    notes = [session.note(turn, c, True) for turn in session.turns for c in range(2)]
    return " ".join([session.heading(0), session.heading(1), session.export(), *notes])


def test_blind_mode_hides_names_rewards_and_speeds_until_the_vote(talk, tmp_path):
    session = two(blind=True)
    talk(session, "one", "a b c", "d e f")
    for hidden in ("SFT", "RLHF", "reward", "tokens/s", "tokens_per_second"):
        assert hidden not in everything_shown(session)
    session.vote(0, tmp_path / "votes.jsonl")
    for shown in ("SFT", "RLHF", "reward +0.25", "tokens/s"):
        assert shown in everything_shown(session)
    [row] = rows_of(tmp_path / "votes.jsonl")
    assert row["vote"]["blind"] and row["vote"]["chosen_model"] == ("SFT", "RLHF")[session.order[0]]
    session.restart()
    assert "SFT" not in everything_shown(session) and session.turns == []


def test_blind_mode_shuffles():
    orders = Counter(tuple(two(blind=True).order) for _ in range(200))
    assert set(orders) == {(0, 1), (1, 0)} and min(orders.values()) > 50  # 1 in 10^12 by chance
    assert {tuple(two().order) for _ in range(20)} == {(0, 1)}


def test_prompts_are_limited():
    session = two()
    session.ask("x" * MAX_PROMPT_CHARACTERS, "")
    for prompt, system in (("x" * 20_000, ""), ("hello", "x" * 20_000), ("", ""), (" \n ", "")):
        with pytest.raises(UserError):
            session.ask(prompt, system)
    assert len(session.turns) == 1
    with pytest.raises(UserError, match="20,000 characters; at most 10,000"):
        session.ask("x" * 20_000, "")


def test_retry_empties_the_last_turn_and_counts(talk):
    session = two()
    with pytest.raises(UserError, match="nothing to retry"):
        session.retry()
    talk(session, "one", "a", "b")
    turn = session.retry()
    assert turn.prompt == "one" and turn.answers == [None, None] and session.attempts == 2 and len(session.turns) == 1


def test_the_export_holds_the_whole_conversation(talk, tmp_path):
    session = two()
    talk(session, "one", "a", "b")
    session.vote(1, tmp_path / "v.jsonl")
    talk(session, "two", "c", "d", ended="length")
    data = json.loads(session.export())
    assert [m["name"] for m in data["models"]] == ["A · SFT", "B · RLHF"]
    assert [m["content"] for m in data["models"][1]["messages"]] == ["one", "b", "two", "d"]
    assert data["models"][1]["answers"][1]["reward"] == 1.25 and data["models"][0]["answers"][1]["ended"] == "length"
    assert data["votes"] == ["B · RLHF", None]


def test_notes_tell_why_an_answer_ended(talk):
    session = two()
    turn = talk(session, "one", "a b c", "b", ended="length")
    turn.answers[1].ended, turn.answers[1].dropped = "cancelled", 4
    assert "reward +0.25 · " in session.note(turn, 0, True) and "cut at the limit" in session.note(turn, 0, True)
    assert "(raw)" in session.note(turn, 0, False)
    assert session.note(turn, 1, True).endswith("stopped · the oldest 4 messages no longer fit")
    turn.answers[0].ended = ""
    assert session.note(turn, 0, True) == ""


def test_one_model_has_its_plain_name():
    assert Session(("SFT",)).heading(0) == "SFT"
    assert [two().heading(c)[0] for c in range(2)] == list(LETTERS[:2])


def test_votes_of_many_visitors_stay_whole_lines(tmp_path):
    file, text = tmp_path / "votes.jsonl", "ä" * 5000

    def visitor(number):
        for _ in range(5):
            append_rows(file, [{"visitor": number, "text": text}])

    threads = [threading.Thread(target=visitor, args=(n,)) for n in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert Counter(row["visitor"] for row in rows_of(file)) == dict.fromkeys(range(8), 5)


@pytest.fixture
def votes_file(talk, tmp_path):
    """Votes of first turns and of later ones, whose rows differ in form."""
    file = tmp_path / "votes.jsonl"
    for number in range(10):
        session = two()
        talk(session, f"question {number}", f"good answer {number}", f"bad answer {number}")
        session.vote(0, file)
        talk(session, f"more {number}", f"good {number}", f"bad {number}", ended="length")
        session.vote(0, file)
    return file


def test_the_data_layer_reads_votes_of_both_forms(votes_file, tokenizer):
    from training.utils.arguments import DataArguments
    from training.utils.data.prepare import prepare_data

    arguments = DataArguments(data_path=[str(votes_file)])
    data = prepare_data("pairs", arguments, tokenizer, max_length=256, seed=1)
    rows = [*data.train, *data.held_out]
    assert len(rows) == 20
    texts = [tokenizer.decode(row["chosen_ids"]) for row in rows]
    assert all("good" in text and "bad" not in text for text in texts)
    assert sum("more" in text for text in texts) == 10
    assert all("bad" in tokenizer.decode(row["rejected_ids"]) for row in rows)


@pytest.mark.slow
def test_votes_train_step_2_as_they_are(votes_file, chat_folders, tmp_path):
    script = Path(training.__file__).parent / "step2_reward_model_finetuning" / "main.py"
    flags = {
        "--data_path": votes_file, "--model_name_or_path": chat_folders["sft"], "--output_dir": tmp_path / "step2",
        "--max_seq_len": 256, "--dtype": "fp32", "--report_to": "none",
    }  # fmt: skip
    command = [sys.executable, str(script), *(str(part) for pair in flags.items() for part in pair)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    assert (tmp_path / "step2" / "reward_stats.json").is_file()
    steps = [json.loads(line) for line in (tmp_path / "step2" / "metrics.jsonl").read_text().splitlines()]
    assert max(entry["step"] for entry in steps) >= 1


def test_votes_are_lines_of_their_own_also_behind_one_without_an_end_and_on_a_full_disk(tmp_path, monkeypatch):
    file = tmp_path / "votes.jsonl"
    file.write_text('{"by": "hand"}')  # as editors leave a last line
    append_rows(file, [{"a": 1}, {"half": "\ud800"}])
    append_rows(file, [])
    assert rows_of(file) == [{"by": "hand"}, {"a": 1}, {"half": "\ud800"}]
    before = file.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left"):
        patch.setattr("os.fsync", full)
        append_rows(file, [{"b": 1}])
    assert file.read_bytes() == before, "half a line would spoil the next one"


@pytest.mark.parametrize("winner", [0, SAME])
def test_a_vote_is_taken_out_of_its_file_and_nothing_else(winner, talk, tmp_path):
    session, file = two(), tmp_path / "votes.jsonl"
    written = ties_file(file) if winner == SAME else file
    append_rows(written, [{"before": 1}])
    with pytest.raises(UserError, match="no vote to undo"):
        session.unvote(file)
    talk(session, "one", "a", "b")
    session.vote(winner, file)
    append_rows(written, [{"after": 1}])
    assert session.can_unvote and len(rows_of(written)) == 3
    session.unvote(file)
    assert rows_of(written) == [{"before": 1}, {"after": 1}] and session.can_vote and not session.can_unvote
    session.vote(1, file)
    written.write_text("")
    file.write_text("")
    with pytest.raises(UserError, match="no longer in votes.jsonl"):
        session.unvote(file)
    assert session.can_unvote


def test_a_vote_after_the_names_were_seen_is_not_blind(talk, tmp_path):
    session, file = two(blind=True), tmp_path / "votes.jsonl"
    talk(session, "one", "a", "b")
    session.vote(0, file)
    assert rows_of(file)[0]["vote"]["blind"]
    session.unvote(file)
    session.vote(0, file)
    assert [row["vote"]["blind"] for row in rows_of(file)] == [False]
    session.restart()
    talk(session, "one", "a", "b")
    session.vote(0, file)
    assert [row["vote"]["blind"] for row in rows_of(file)] == [False, True]


def test_the_last_prompt_is_taken_back_to_be_edited(talk, tmp_path):
    session = two()
    with pytest.raises(UserError, match="no prompt to edit"):
        session.take_back()
    talk(session, "one", "a", "b")
    talk(session, "two", "a", "b")
    assert session.take_back() == "two" and [turn.prompt for turn in session.turns] == ["one"]
    session.vote(0, tmp_path / "votes.jsonl")
    with pytest.raises(UserError, match="undo the vote first"):
        session.take_back()
