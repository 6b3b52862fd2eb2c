"""Rankings without a browser: who judges what, what is kept, what training reads, what a killed page has lost."""

import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import threading

import pytest
from rank import RankArguments, output_dir
from ranking import ledger as ledger_module
from ranking.items import read_material
from ranking.ledger import Ledger, judge_name

from tests.inference.conftest import INFERENCE
from tests.inference.ranked import rows_of, write_answers
from training.utils.data.formats.columns import convert
from training.utils.data.formats.conversations import Dropped
from training.utils.errors import UserError
from training.utils.intervals import wilson_interval


@pytest.fixture
def make(tmp_path):
    """``make(count, judges)`` gives a ledger of that many prompts with three answers; called again, the same anew."""
    made = []

    def _make(count=4, judges=1, against=False, **options):
        for ledger in made:
            ledger.journal.close()
        if not (tmp_path / "a.jsonl").exists():
            write_answers(tmp_path / "a.jsonl", count, **options)
        (tmp_path / "out").mkdir(exist_ok=True)
        made.append(Ledger(tmp_path / "out", read_material(str(tmp_path / "a.jsonl")), judges))
        return made[-1]

    yield _make
    for ledger in made:
        ledger.journal.close()


def best_first(ledger, judge, item, texts):
    """The places that put these answers in this order, as the judge sees them."""
    shown = [item.texts[i] for i in item.shuffled(judge)]
    return [1 + texts.index(text) for text in shown]


def test_an_order_is_a_row_of_step_2_and_dpo(make, tmp_path):
    ledger = make(1)
    item = ledger.next_for("ann")
    wanted = [item.texts[2], item.texts[0], item.texts[1]]
    ledger.save("ann", item.id, "ranked", best_first(ledger, "ann", item, wanted), note="the first is kind")
    [row] = rows_of(tmp_path / "out" / "rankings.jsonl")
    assert [(a["model"], a["rank"]) for a in row["answers"]] == [("SFT", 2), ("SFT", 3), ("RLHF", 1)]
    assert (row["judge"], row["note"], row["prompt"][0]["content"]) == ("ann", "the first is kind", "Question 0?")
    name, [example] = convert(row)
    assert name == "prompt/answers"
    assert [answer[0]["content"] for answer in example.compared()] == wanted
    assert example.pairs() == [(0, 2), (0, 1), (1, 2)]


def test_ties_stay_ties_and_all_bad_prefers_nothing(make, tmp_path):
    ledger = make(3)
    item = ledger.next_for("ann")
    ledger.save("ann", item.id, "ranked", [1, 2, 1])
    bad = ledger.next_for("ann")
    ledger.save("ann", bad.id, "all_bad", better="What I would have said.")
    ledger.save("ann", ledger.next_for("ann").id, "skipped")
    tied, all_bad = rows_of(tmp_path / "out" / "rankings.jsonl")
    _, [example] = convert(tied)
    assert len(example.pairs()) == 2 and sorted(a["rank"] for a in tied["answers"]) == [1, 1, 2]
    assert all_bad["all_bad"]
    with pytest.raises(Dropped, match="tie"):
        convert(all_bad)
    [written] = rows_of(tmp_path / "out" / "demonstrations.jsonl")
    _, [shown] = convert(written)
    assert shown.response == [{"role": "assistant", "content": "What I would have said."}]
    assert shown.prompt == bad.prompt


def test_an_answer_that_stands_twice_is_shown_once_and_an_empty_one_not_at_all(tmp_path):
    answers = [{"model": m, "response": t} for m, t in (("A", "yes"), ("B", "no"), ("C", "yes"), ("D", " "))]
    lines = [
        {"prompt": "Is it?", "answers": answers},
        {"prompt": "Same?", "answers": [answers[0], answers[2]]},
        {"prompt": "Plain?", "answers": ["one", "two"]},
    ]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    material = read_material(str(file))
    item, plain = material.items
    assert item.texts == ["yes", "no"] and plain.texts == ["one", "two"] and "1 prompt" in material.told[0]
    assert [a["rank"] for a in item.ranked([2, 1])] == [2, 1, 2]
    assert convert({"prompt": item.prompt, "answers": item.ranked([2, 1])})[1][0].pairs() == [(0, 1)]


def test_a_judge_sees_one_order_and_another_judge_another(make):
    items = list(make(40).items.values())
    assert [i.shuffled("ann") for i in items] == [i.shuffled("ann") for i in items]
    assert [i.shuffled("ann") for i in items] != [i.shuffled("bob") for i in items]
    firsts = [item.shuffled("ann")[0] for item in items]
    assert {0, 1, 2} == set(firsts)


def test_two_judges_at_once_get_different_prompts_until_each_has_enough_judges(make):
    ledger = make(4)
    one, two = ledger.next_for("ann"), ledger.next_for("bob")
    assert one.id != two.id and ledger.next_for("ann") is one, "a reload gives the same prompt again"
    ledger.save("ann", one.id, "ranked", [1, 2, 3])
    third = ledger.next_for("ann")
    assert third.id not in (one.id, two.id)
    ledger.save("ann", third.id, "skipped")
    ledger.save("ann", ledger.next_for("ann").id, "ranked", [1, 1, 2])
    assert ledger.next_for("ann") is None, "the last one is bob's"
    ledger.save("bob", two.id, "ranked", [3, 2, 1])
    assert ledger.next_for("bob").id == third.id, "what one judge has skipped is for the others"


def test_each_prompt_is_shown_to_as_many_judges_as_asked(make):
    ledger = make(6, judges=2)
    shown = {}
    for judge in itertools.cycle(("ann", "bob", "eve")):
        item = ledger.next_for(judge)
        if item is None:
            break
        shown.setdefault(item.id, []).append(judge)
        ledger.save(judge, item.id, "ranked", [1, 2, 3])
    while any(item := ledger.next_for(judge) for judge in ("ann", "bob", "eve")):
        judge = next(j for j in ("ann", "bob", "eve") if ledger.next_for(j) is item)
        shown.setdefault(item.id, []).append(judge)
        ledger.save(judge, item.id, "ranked", [1, 2, 3])
    assert len(shown) == 6 and all(len(judges) == len(set(judges)) == 2 for judges in shown.values())
    assert ledger.progress("ann") | {"mine": 0} == {"mine": 0, "done": 12, "asked": 12, "judges": 3}


def test_a_prompt_that_nobody_comes_back_to_goes_to_another_judge(make, monkeypatch):
    ledger = make(1)
    item = ledger.next_for("ann")
    assert ledger.next_for("bob") is None
    monkeypatch.setattr(ledger_module, "HOLD_SECONDS", -1)
    assert ledger.next_for("bob") is item
    ledger.save("ann", item.id, "ranked", [1, 2, 3])  # she did come back: what she says is kept


def test_the_same_said_twice_counts_once_and_something_else_is_refused(make):
    ledger = make(2)
    item = ledger.next_for("ann")
    for _ in range(3):
        ledger.save("ann", item.id, "ranked", [1, 2, 3], note="n")
    assert len(ledger.rankings.rows) == 1 and len(ledger.history["ann"]) == 1
    with pytest.raises(UserError, match="Undo"):
        ledger.save("ann", item.id, "ranked", [2, 1, 3])


@pytest.mark.parametrize("places", [[1, 2], [1, 2, 4], [0, 1, 2], [2, 2, 3], []])
def test_places_that_are_no_order_are_refused(places, make):
    ledger = make(1)
    with pytest.raises(UserError, match="no order"):
        ledger.save("ann", ledger.next_for("ann").id, "ranked", places)
    assert not ledger.rankings.rows


def test_undo_goes_back_one_by_one_and_leaves_no_row(make, tmp_path):
    ledger = make(3)
    items = []
    for places in ([1, 2, 3], [2, 1, 2]):
        items.append(ledger.next_for("ann"))
        ledger.save("ann", items[-1].id, "ranked", places, better="Mine.")
    opened = ledger.next_for("ann")
    item, said = ledger.undo("ann", 2)
    assert ledger.undo("ann", 2) == (item, said), "asked twice, by a second click or where the answer was lost"
    assert item is items[1] and said["better"] == "Mine." and ledger.next_for("ann") is item, "and not the open one"
    assert ledger.next_for("bob") is None or ledger.next_for("bob") not in (item, opened)
    assert [row["id"] for row in rows_of(tmp_path / "out" / "rankings.jsonl")] == ["p0"]
    assert ledger.undo("ann", 1)[0] is items[0]
    assert (
        (tmp_path / "out" / "rankings.jsonl").read_text()
        == (tmp_path / "out" / "demonstrations.jsonl").read_text()
        == ""
    )
    with pytest.raises(UserError, match="nothing to undo"):
        ledger.undo("ann", 0)
    again = make()
    assert not again.rankings.rows and again.next_for("ann") in items
    assert again.undo("ann", 1)[0].id == items[0].id, "also where the page was started anew"
    again.save("ann", items[0].id, "skipped")
    for count in (0, 2):
        with pytest.raises(UserError, match="in another tab"):
            again.undo("ann", count)


def test_a_start_makes_the_files_for_training_anew_and_cuts_a_line_that_was_not_finished(make, tmp_path):
    ledger = make(3)
    ledger.save("ann", ledger.next_for("ann").id, "ranked", [1, 2, 3])
    open_ = ledger.next_for("ann")
    rankings, journal = tmp_path / "out" / "rankings.jsonl", tmp_path / "out" / "journal.jsonl"
    whole = rankings.read_text()
    rankings.write_text(whole + whole[:20])
    with journal.open("a") as file:
        file.write('{"item": "p1", "judge": "ann", "act": "ran')
    again = make()
    assert rankings.read_text() == whole and again.next_for("ann").id == open_.id
    assert again.next_for("bob").id not in ("p0", open_.id), "what ann has open is still hers"


# Rows of others in the page's files: judge.py's, another page's, no JSON, one without the end of its line
FOREIGN = {
    "rankings.jsonl": '{"id": "p0", "prompt": "q", "answers": [], "judge": "m"}\n',
    "demonstrations.jsonl": '{"id": "p0", "messages": [], "judge": "ann", "time": "2026-01-01T10:00:00+0000"}\n',
    "rankings.jsonl of text": "my notes\n",
    "rankings.jsonl cut": '{"id": "p0", "prompt": "q"',
    "journal.jsonl": '{"at": "08:00", "act": "breakfast"}',
}


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("case", FOREIGN)
def test_a_file_that_the_page_has_not_made_is_refused_and_kept(make, tmp_path, case, begun):
    file = tmp_path / "out" / case.partition(" ")[0]
    if begun:
        ledger = make(2)
        ledger.save("ann", ledger.next_for("ann").id, "ranked", [1, 2, 3], better="Mine.")
    file.parent.mkdir(exist_ok=True)
    content = (file.read_text() if begun and file.name != "journal.jsonl" else "") + FOREIGN[case]
    file.write_text(content)
    before = {path.name: path.read_bytes() for path in file.parent.iterdir()}
    with pytest.raises(UserError, match=rf"{file.name} is .*--output_dir"):
        make(2)
    assert {path.name: path.read_bytes() for path in file.parent.iterdir()} == before


def test_a_page_goes_on_where_it_was_killed_between_the_journal_and_the_other_files(make, tmp_path):
    ledger = make(2)
    rankings = tmp_path / "out" / "rankings.jsonl"
    ledger.save("ann", ledger.next_for("ann").id, "ranked", [1, 2, 3])
    undone = rankings.read_bytes()
    ledger.undo("ann", len(ledger.history["ann"]))
    rankings.write_bytes(undone)  # as if killed before the row was taken out
    assert not make(2).rankings.rows and not rankings.read_bytes()


@pytest.mark.parametrize("line", ["{", "[]", "3", "null", "{}", '{"item": "1"}', "[" * 100_000])
def test_a_damaged_line_of_the_journal_is_named(line, make, tmp_path):
    ledger = make(3)
    ledger.save("ann", ledger.next_for("ann").id, "ranked", [1, 2, 3])
    with (tmp_path / "out" / "journal.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=r"journal\.jsonl:\d+ is damaged"):
        make()


def test_judgements_of_other_answers_are_not_taken(make, tmp_path):
    ledger = make(2)
    ledger.save("ann", ledger.next_for("ann").id, "ranked", [1, 2, 3])
    write_answers(tmp_path / "a.jsonl", 2, say="other {model} {i} {take}")
    with pytest.raises(UserError, match="had other answers"):
        make()


def test_judgements_stay_where_the_folder_has_changed_and_so_do_those_of_a_journal_of_before(tmp_path, monkeypatch):
    """Two files of a model of one name are called by their paths from here."""
    for name in ("one", "two"):
        write_answers(tmp_path / f"{name}.jsonl", 2, ["SFT"], say=name + " {i}")
    files = str(tmp_path / "one.jsonl"), str(tmp_path / "two.jsonl")
    (tmp_path / "out").mkdir()

    def ledger():
        return Ledger(tmp_path / "out", read_material(*files), 1)

    monkeypatch.chdir(tmp_path)
    here = ledger()
    item = here.next_for("ann")
    here.save("ann", item.id, "ranked", [1, 2])
    here.journal.close()
    monkeypatch.chdir("/")
    there = ledger()
    assert there.items[item.id].answers != item.answers and item.id in there.judged
    there.journal.close()
    monkeypatch.chdir(tmp_path)
    journal = tmp_path / "out" / "journal.jsonl"
    journal.write_text(journal.read_text().replace(item.digest, item.named_digest))
    again = ledger()
    assert item.id in again.judged
    again.journal.close()


def test_two_pages_do_not_write_one_journal(make, tmp_path):
    make(1)
    with pytest.raises(UserError, match="another page"):
        Ledger(tmp_path / "out", read_material(str(tmp_path / "a.jsonl")), 1)


def test_a_journal_that_was_moved_away_is_missed(make, tmp_path):
    ledger = make(1)
    item = ledger.next_for("ann")
    (tmp_path / "out" / "journal.jsonl").rename(tmp_path / "gone.jsonl")
    with pytest.raises(UserError, match="moved"):
        ledger.save("ann", item.id, "ranked", [1, 2, 3])
    assert not ledger.judged[item.id], "what is not on the disk has not been said"


def test_agreement_and_win_rates_against_hand_counts(tmp_path):
    answers, against = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    write_answers(answers, 5, ["SFT"], say="plain {i}")
    write_answers(against, 6, ["RLHF"], say="kind {i}")
    lines = against.read_text().replace("kind 4", "plain 4")
    against.write_text(lines)
    (tmp_path / "out").mkdir()
    ledger = Ledger(tmp_path / "out", read_material(str(answers), str(against)), 2)
    assert len(ledger.items) == 4 and ledger.same == [("SFT", "RLHF")]
    said = {"ann": [(1, 2), (1, 2), (2, 1), (1, 1)], "bob": [(1, 2), (1, 2), (1, 2), (1, 1)]}  # SFT's place, RLHF's
    for judge, all_places in said.items():
        for item, ranks in zip(ledger.items.values(), all_places, strict=True):
            ledger.save(judge, item.id, "ranked", [ranks[i] for i in item.shuffled(judge)])
    [rate] = ledger.win_rates()
    share = (1 + 1 + 0.5 + 0.5 + 0.5) / 5  # the fifth is the same in both
    assert rate["models"] == ("SFT", "RLHF") and rate["share"] == pytest.approx(share)
    assert rate["interval"] == pytest.approx(wilson_interval(share, 5)) and rate["prompts"] == 5
    assert rate["ties"] == pytest.approx(2 / 5)
    assert ledger.agreement().same == 3 / 4 and ledger.agreement().prompts == 4
    ledger.journal.close()


@pytest.mark.parametrize("name", ["", "  ", "x" * 41, "a\x07b", "\u202e"])
def test_names_that_are_none(name):
    with pytest.raises(UserError, match="name"):
        judge_name(name)
    assert judge_name("  Ann  Lee ") == "Ann Lee"


BAD = {
    "no prompts": ('{"answers": [{"response": "a"}, {"response": "b"}]}', "no prompt"),
    "no answers": ('{"prompt": "a"}', "no answers"),
    "one answer": ('{"prompt": "a", "answers": [{"response": "b"}]}', "1 answer"),
    "an id twice": ('{"id": "x", "prompt": "a", "answers": ["b", "c"]}\n' * 2, "x"),
    "all the same": ('{"prompt": "a", "answers": ["b", "b"]}', "no prompt has two different answers"),
    "half a character": ('{"prompt": "a", "answers": ["b", "\\ud800"]}', "half a character"),
    "no JSON": ("prompt,answers\n", "not JSON"),
    "nothing": ("", "no line"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_before_the_page_starts(case, tmp_path):
    content, words = BAD[case]
    file = tmp_path / "a.jsonl"
    file.write_text(content)
    with pytest.raises(UserError, match=words) as error:
        read_material(str(file))
    assert str(file) in str(error.value)


def test_files_that_do_not_go_together(tmp_path):
    one, two, several = (tmp_path / f"{n}.jsonl" for n in ("one", "two", "several"))
    write_answers(one, 2, ["A"])
    write_answers(several, 2, ["A", "B"])
    two.write_text('{"id": "p0", "prompt": "Another?", "answers": ["x"]}\n')
    with pytest.raises(UserError, match="the prompt p0 is another one"):
        read_material(str(one), str(two))
    with pytest.raises(UserError, match="answers of A, B"):
        read_material(str(one), str(several))
    two.write_text('{"id": "q", "prompt": "Another?", "answers": ["x"]}\n')
    with pytest.raises(UserError, match="none of its prompts"):
        read_material(str(one), str(two))


def test_a_tilde_that_the_shell_has_left_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a", "b"):
        write_answers(tmp_path / f"{name}.jsonl", 2, [""], say=name + " {i}")
    assert {a["model"] for a in read_material("~/a.jsonl", "~/b.jsonl").items[0].answers} == {
        str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")
    }  # fmt: skip
    assert output_dir(RankArguments(answers="~/a.jsonl")) == tmp_path / "a_rankings"
    assert output_dir(RankArguments(answers="~/a.jsonl", output_dir="~/out")) == tmp_path / "out"


def run(*flags, **options):
    command = [sys.executable, str(INFERENCE / "rank.py"), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)


def test_the_program_refuses_in_one_line(tmp_path):
    file = write_answers(tmp_path / "a.jsonl", 2)
    (tmp_path / "file").write_text("")
    cases = {
        (): "--answers",
        ("--answers", tmp_path / "none"): "none",
        ("--answers", file, "--host", "0.0.0.0"): "--auth",
        ("--answers", file, "--output_dir", tmp_path / "file" / "x"): "--output_dir",
        ("--answers", file, "--output_dir", tmp_path / "judged"): "judged/rankings.jsonl",
    }
    (tmp_path / "judged").mkdir()
    (tmp_path / "judged" / "rankings.jsonl").write_text(FOREIGN["rankings.jsonl"])
    for flags, word in cases.items():
        result = run(*flags)
        assert result.returncode == 2, (flags, result)
        [line] = result.stderr.splitlines()
        assert line.startswith("error: ") and word in line
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # noqa: E731
    result = run("--answers", file, preexec_fn=limit)
    assert result.returncode == 2 and "File too large" in result.stderr and len(result.stderr.splitlines()) == 1


def judge_all(server, judge, places, limit=10_000):
    """A scripted judge over HTTP: sees, says, and gets the next one; gives the ids."""
    judged = []
    _, state = server.call("api/next", {"judge": judge})
    while state["item"] and len(judged) < limit:
        item = state["item"]
        shown = {"item": item["id"], "digest": item["digest"]}
        content = {"judge": judge, **shown, "act": "ranked", "places": places(item["answers"])}
        status, state = server.call("api/save", content)
        assert status == 200, state
        judged.append(item["id"])
    return judged


def by_text(texts):
    """Places by what the answers say: any two judges agree."""
    return [1 + sorted(texts).index(text) for text in texts]


def test_200_prompts_three_judges_at_once_and_kills_in_between(serve, tmp_path):
    answers = write_answers(tmp_path / "a.jsonl", 200)
    server = serve("--answers", answers)
    for limit in (40, 55):
        judge_all(server, "ann", by_text, limit)
        server.kill()  # SIGKILL
        server.start()
    found = {}
    threads = [
        threading.Thread(target=lambda name=name: found.update({name: judge_all(server, name, by_text)}))
        for name in ("ann", "bob", "eve")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    judged = [one for ids in found.values() for one in ids]
    assert len(judged) == len(set(judged)) == 105
    rows = rows_of(tmp_path / "a_rankings" / "rankings.jsonl")
    assert sorted(row["id"] for row in rows) == sorted(f"p{i}" for i in range(200)), "none lost, none twice"
    for row in rows:
        best = min(row["answers"], key=lambda answer: answer["rank"])
        assert best["response"] == sorted(answer["response"] for answer in row["answers"])[0]
        assert len(convert(row)[1][0].pairs()) == 3
    _, results = server.call("api/results")
    [rate] = results["win_rates"]
    assert rate["models"] == ["RLHF", "SFT"] and rate["share"] == 1 and rate["prompts"] == 200
    said = server.stop()
    assert "200 of 200 judgements" in said and "RLHF preferred to SFT: 100.0%" in said


def test_a_full_disk_is_told_and_loses_nothing(serve, tmp_path):
    answers, folder = write_answers(tmp_path / "a.jsonl", 200), tmp_path / "a_rankings"
    (tmp_path / "limited.py").write_text(
        "import resource, runpy, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))\n"
        f"sys.path.insert(0, {str(INFERENCE)!r})\n"
        f"runpy.run_path({str(INFERENCE / 'rank.py')!r}, run_name='__main__')\n"
    )
    server = serve("--answers", answers, program=tmp_path / "limited.py")
    saved = []
    status, state = server.call("api/next", {"judge": "ann"})
    while status == 200:
        shown = {"item": state["item"]["id"], "digest": state["item"]["digest"]}
        content = {"judge": "ann", **shown, "act": "ranked", "places": [1, 2, 3]}
        status, state = server.call("api/save", content)
        saved.append(content["item"])
    assert status == 400 and "File too large" in state["error"]
    server.kill()
    assert (folder / "journal.jsonl").read_bytes().endswith(b"\n")
    judged = {line["item"] for line in rows_of(folder / "journal.jsonl") if line["act"] == "ranked"}
    assert judged >= set(saved[:-1]) and len(judged) > 3
    again = serve("--answers", answers)
    assert {row["id"] for row in rows_of(folder / "rankings.jsonl")} == judged
    assert again.call("api/next", {"judge": "ann"})[1]["item"]["id"] not in judged


def test_what_the_server_answers(serve, tmp_path):
    server = serve("--answers", write_answers(tmp_path / "a.jsonl", 3), "--auth", "me:se:cret")
    key = {"Authorization": "Basic bWU6c2U6Y3JldA=="}  # me:se:cret
    assert server.call("api/next", {"judge": "ann"})[0] == server.call("", Authorization="Basic bWU6eA==")[0] == 401
    status, state = server.call("api/next", {"judge": "ann"}, **key)
    assert status == 200 and "SFT" not in json.dumps(state) and "model" not in json.dumps(state)
    for path, content in {
        "api/next": {"judge": 1},
        "api/save": {"judge": "ann", "item": "p9", "act": "ranked"},
        "api/undo": {"judge": "ann"},
    }.items():
        status, told = server.call(path, content, **key)
        assert status == 400 and told["error"]
    assert server.call("api/save", {"judge": "ann", "note": "x" * 2**20}, **key)[0] == 413
    assert server.call("api/next", {"judge": "ann"}, Origin="http://elsewhere.example", **key)[0] == 403
    assert server.call("page/../app.py", **key)[0] == server.call("page/none", **key)[0] == 404
    assert server.call("export/journal.jsonl", **key)[0] == 404
    other = {"judge": "ann", "item": state["item"]["id"], "digest": "of another file", "act": "all_bad"}
    for said in (other, {name: other[name] for name in ("judge", "item", "act")}):
        status, told = server.call("api/save", said, **key)
        assert status == 400 and "load the page again" in told["error"]
    half = other | {"digest": state["item"]["digest"], "note": "\ud800"}
    assert "half a character" in server.call("api/save", half, **key)[1]["error"]
    server.call("api/save", half | {"note": "", "better": "Mine."}, **key)
    for name in ("rankings.jsonl", "demonstrations.jsonl"):
        _, exported = server.call(f"export/{name}", **key)
        written = (tmp_path / "a_rankings" / name).read_text()
        assert written and (exported if isinstance(exported, str) else json.dumps(exported) + "\n") == written


def test_a_name_that_is_not_the_pages_own_is_refused(serve, tmp_path):
    server = serve("--answers", write_answers(tmp_path / "a.jsonl", 3))
    assert server.call("", Host="rebound.example")[0] == 403 and server.call("")[0] == 200
    os.kill(server.process.pid, signal.SIGINT)
    assert server.process.wait(60) == 0
