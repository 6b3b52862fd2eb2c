"""Judges that are programs: a function, and an endpoint that fails in every way; a local server stands in for one."""

import datetime
import email.utils
import itertools
import json
import os
import re
import shlex
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import judge
import judge_endpoint
import pytest
from judge_endpoint import FORM, READ_TRIES, Pace, verdict_in

from tests.tiny import tiny_tokenizer
from training.utils import answers as answer_files
from training.utils.arguments import DataArguments
from training.utils.data.prepare import prepare_data
from training.utils.errors import UserError, run_program, run_resumable

KEY = "sk-very-secret-0123456789"
TEXTS = ["Yes.", "A longer answer.", "The longest of all answers, by far.", "Hm"]


def line_of(number, texts=TEXTS):
    answers = [{"model": f"m{i}", "response": t, "tokens": len(t), "finished": True} for i, t in enumerate(texts)]
    prompt = [{"role": "user", "content": f"Question {number}?"}]
    return {"id": f"p{number}", "prompt": prompt, "answers": answers, "source": "x.jsonl", "row": {"number": number}}


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def answers(tmp_path):
    """``answers(lines)`` writes a file of answers; by default of five prompts with four answers each."""

    def write(lines=None):
        path = tmp_path / "answers.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines or map(line_of, range(5))))
        return path

    return write


@pytest.fixture
def rules(tmp_path):
    path = tmp_path / "rules.py"
    path.write_text(
        "def length(prompts, responses, rows):\n    return [len(text) for text in responses]\n"
        "def of_row(prompts, responses, rows):\n    assert len({id(p) for p in prompts}) == 1\n"
        "    return [row['number'] * len(text) for text, row in zip(responses, rows)]\n"
        "def third(prompts, responses, rows):\n    assert rows[0]['number'] != 3, 'not this one'\n"
        "    return [1.0] * len(responses)\n"
        "def words(prompts, responses, rows):\n    return ['good'] * len(responses)\n"
    )
    return path


def run(*flags):
    return run_program(judge.main, [str(flag) for flag in flags])


def ranks(line):
    return {answer["response"]: answer["rank"] for answer in line["answers"]}


# --- a function ----------------------------------------------------------------------------------------------------


def test_a_function_ranks_every_prompt_without_a_connection(answers, rules, tmp_path, monkeypatch, capsys):
    def no_connection(*args):
        raise AssertionError("a connection was made")

    monkeypatch.setattr(socket.socket, "connect", no_connection)
    assert run("--answers", answers(), "--judge", f"{rules}:length") == 0
    found = lines_of(tmp_path / "rankings.jsonl")
    assert [line["id"] for line in found] == [f"p{i}" for i in range(5)]
    for line in found:
        assert ranks(line) == {TEXTS[2]: 1, TEXTS[1]: 2, TEXTS[0]: 3, TEXTS[3]: 4}
        assert line["judge"] == "length" and line["answers"][0]["model"] == "m0" and "row" not in line
    out = capsys.readouterr().out
    look = shlex.split(out.rpartition("next: ")[2])
    assert (
        "5 rankings written" in out
        and os.path.abspath(look[0]) == sys.executable
        and look[-1].endswith("rankings.jsonl")
    )
    assert run("--answers", tmp_path / "answers.jsonl", "--judge", f"{rules}:length") == 0
    assert "finished already" in capsys.readouterr().out


def test_rankings_are_pairs_as_they_are(answers, rules, tmp_path):
    """Ties, equal and empty answers: what training reads is what was judged."""
    lines = [line_of(0), line_of(1, ["same", "same", "longer one"]), line_of(2, ["abc", "", "de"]),
             line_of(3, ["aa", "bb", "c"]), line_of(4, ["one", " ", ""]), line_of(5, ["xy", "yx"])]  # fmt: skip
    assert run("--answers", answers(lines), "--judge", f"{rules}:length") == 0
    found = {line["id"]: ranks(line) for line in lines_of(tmp_path / "rankings.jsonl")}
    assert found == {
        "p0": {TEXTS[2]: 1, TEXTS[1]: 2, TEXTS[0]: 3, TEXTS[3]: 4},
        "p1": {"longer one": 1, "same": 2},
        "p2": {"abc": 1, "de": 2},
        "p3": {"aa": 1, "bb": 1, "c": 2},
        "p5": {"xy": 1, "yx": 1},
    }
    data = DataArguments(data_path=[str(tmp_path / "rankings.jsonl")])
    rows = prepare_data("pairs", data, tiny_tokenizer(), max_length=128, seed=0, hold_out=False)
    assert sorted(rows.train["pairs"]) == [1, 1, 2, 2, *[6] * 6]
    assert {reason: drop.count for reason, drop in rows.report.dropped.items()} == {"tie": 1}


def test_a_function_sees_all_answers_of_a_prompt_and_its_row(answers, rules, tmp_path):
    assert run("--answers", answers(), "--judge", f"{rules}:of_row", "--output", tmp_path / "r.jsonl") == 0
    assert [line["answers"][2]["score"] for line in lines_of(tmp_path / "r.jsonl")] == [
        number * len(TEXTS[2]) for number in range(5)
    ]


def test_several_functions_with_weights(answers, rules, tmp_path):
    assert run("--answers", answers(), "--judge", f"{rules}:length", f"{rules}:of_row=-1") == 0
    for number, line in enumerate(lines_of(tmp_path / "rankings.jsonl")):
        assert line["judge"] == "length+of_row"
        assert [answer["score"] for answer in line["answers"]] == [(1 - number) * len(text) for text in TEXTS]
        assert (set(ranks(line).values()) == {1}) == (number == 1)


def test_a_function_that_raises_is_one_line_and_loses_nothing(answers, rules, tmp_path, capsys):
    path = answers()
    assert run("--answers", path, "--judge", f"{rules}:third") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --judge") and "prompt p3: AssertionError: not this one" in line
    kept = lines_of(tmp_path / "rankings.jsonl.parts" / "rank0.jsonl")
    assert [line["id"] for line in kept] == ["p0", "p1", "p2"]
    assert run("--answers", path, "--judge", f"{rules}:length") == 2
    assert "judge: " in capsys.readouterr().err
    rules.write_text(rules.read_text().replace("!= 3", "!= 9"))
    assert run("--answers", path, "--judge", f"{rules}:third") == 2, "another function under the same name"
    assert "content of the judge" in capsys.readouterr().err


def test_a_full_disk_is_one_line(answers, rules, tmp_path, monkeypatch, capsys):
    path = answers()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert run("--answers", path, "--judge", f"{rules}:length") == 2
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.undo()
    assert run("--answers", path, "--judge", f"{rules}:length") == 0
    assert len(lines_of(tmp_path / "rankings.jsonl")) == 5


MISTAKES = [
    ([], ["--answers"]),
    (["--answers", "none.jsonl"], ["give a judge"]),
    (["--answers", "none.jsonl", "--judge", "RULES:length"], ["none.jsonl", "No such file"]),
    (["--answers", "A", "--judge", "none.py:f"], ["none.py:f", "no such file"]),
    (["--answers", "A", "--judge", "RULES:length", "model=2"], ["--judge model", "no reward model"]),
    (["--answers", "A", "--judge", "RULES:nothing"], ["no function nothing"]),
    (["--answers", "A", "--judge", "RULES:words"], ["prompt p0", "'good'"]),
    (["--answers", "A", "--judge", "RULES:length", "--judge_url", "http://a/v1"], ["one judge at a time"]),
    (["--answers", "A", "--judge", "RULES:length", "--judge_model", "m"], ["belong to --judge_url"]),
    (["--answers", "A", "--judge_url", "http://a/v1"], ["--judge_model"]),
    (["--answers", "A", "--judge_url", "ftp://a/v1", "--judge_model", "m"], ["--judge_url", "http://HOST"]),
    (["--answers", "A", "--judge_url", "http://[a", "--judge_model", "m"], ["--judge_url", "http://HOST"]),
    (["--answers", "A", "--judge_url", f"http://me:{KEY}@a/v1", "--judge_model", "m"], ["TRIPOD_JUDGE_KEY"]),
    (["--answers", "A", "--judge_url", f"http://a/v1?key={KEY}", "--judge_model", "m"], ["TRIPOD_JUDGE_KEY"]),
    (["--answers", "A", "--judge_url", "http://a/v1", "--judge_model", "m", "--rubric", "no.txt"], ["--rubric no.txt"]),
    (["--answers", "A", "--judge_url", "http://a", "--judge_model", "m", "--request_timeout", "0"], ["above 0"]),
    (["--answers", "MANY", "--judge", "RULES:length"], ["33 answers", "reads 32"]),
    (["--answers", "ONE", "--judge", "RULES:length"], ["1 answer, and 2 are needed"]),
    (["--answers", "TWICE", "--judge", "RULES:length"], [":2: the id p0 stands in line 1 too"]),
]


@pytest.mark.parametrize(("flags", "words"), MISTAKES)
def test_mistakes_are_one_line(flags, words, answers, rules, tmp_path, capsys):
    files = {"A": answers()}
    for name, lines in (("MANY", [line_of(0, [f"answer {i}" for i in range(33)])]), ("ONE", [line_of(0, ["a"])]),
                        ("TWICE", [line_of(0), line_of(0)])):  # fmt: skip
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = [str(files.get(flag, flag)).replace("RULES", str(rules)) for flag in flags]
    assert run(*given) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and all(word in line for word in words), line
    assert KEY not in line
    assert not (tmp_path / "rankings.jsonl").exists()


# --- an endpoint ---------------------------------------------------------------------------------------------------


class Server:
    """An endpoint: ``answer(number, body, headers)`` gives (status, headers, text), or seconds to be silent first."""

    def __init__(self, answer):
        self.requests = []
        lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    number = len(outer.requests)
                    headers = {name.lower(): value for name, value in self.headers.items()}
                    outer.requests.append((time.monotonic(), self.path, headers, body))
                status, headers, text = answer(number, body, self.headers)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                data = text.encode() if isinstance(text, str) else text
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def served(monkeypatch):
    """``served(answer)`` starts a `Server`; waits between tries take no time."""
    monkeypatch.setattr(judge_endpoint, "FIRST_WAIT", 0.001)
    monkeypatch.setenv(judge_endpoint.KEY, KEY)
    servers = []

    def start(answer):
        servers.append(Server(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def shown(body):
    """The two answers of a request, in the order in which the judge sees them."""
    text = body["messages"][1]["content"]
    return [re.search(rf"<{mark}>\n(.*)\n</{mark}>", text)[1] for mark in "AB"]


def said(verdict):
    return 200, {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": verdict}}]})


def longer(number, body, headers):
    a, b = shown(body)
    return said(json.dumps({"better": "A" if len(a) > len(b) else "B"}))


def by_url(server, path, *flags):
    return run("--answers", path, "--judge_url", server.url, "--judge_model", "judge-1", *flags)


def test_every_two_answers_are_asked_both_ways_round(answers, served, tmp_path, capsys):
    server = served(longer)
    rubric = tmp_path / "rubric.txt"
    rubric.write_bytes(b"\xef\xbb\xbfPrefer what is long.\r\n")
    assert by_url(server, answers(), "--rubric", rubric) == 0
    assert len(server.requests) == 5 * 4 * 3
    asked = [(*shown(body), body["messages"][1]["content"]) for _, _, _, body in server.requests]
    for number in range(5):
        mine = [(a, b) for a, b, text in asked if f"Question {number}?" in text]
        assert sorted(mine) == sorted(itertools.permutations(TEXTS, 2))
    for _, path, headers, body in server.requests:
        assert path == "/v1/chat/completions" and headers["authorization"] == f"Bearer {KEY}"
        assert body["model"] == "judge-1" and body["messages"][0]["content"].startswith("Prefer what is long.")
    found = lines_of(tmp_path / "rankings.jsonl")
    assert [line["id"] for line in found] == [f"p{i}" for i in range(5)]
    for line in found:
        assert ranks(line) == {TEXTS[2]: 1, TEXTS[1]: 2, TEXTS[0]: 3, TEXTS[3]: 4}
        assert [answer["score"] for answer in line["answers"]] == [1.0, 2.0, 3.0, 0.0] and line["judge"] == "judge-1"
    assert "100% of the pairs got one verdict" in capsys.readouterr().out


def test_a_judge_that_prefers_what_it_sees_first_ties_everything(answers, served, tmp_path, capsys):
    server = served(lambda number, body, headers: said('{"better": "A"}'))
    assert by_url(server, answers()) == 0
    assert all(set(ranks(line).values()) == {1} for line in lines_of(tmp_path / "rankings.jsonl"))
    out = capsys.readouterr().out
    assert "called better 60 times, the second 0" in out and "0% of the pairs got one verdict" in out


def test_disagreement_and_ties(answers, served, tmp_path):
    """Of three answers: x beats y both ways; z against x is a tie once, and contradicted against y."""

    def answer(number, body, headers):
        verdicts = {"xy": "A", "yx": "B", "xz": "tie", "zx": "B", "yz": "A", "zy": "A"}
        return said(verdicts["".join(shown(body))])

    assert by_url(served(answer), answers([line_of(0, ["x", "y", "z"])])) == 0
    [line] = lines_of(tmp_path / "rankings.jsonl")
    assert [(a["score"], a["rank"]) for a in line["answers"]] == [(1.5, 1), (0.5, 3), (1.0, 2)]


FAILURES = {
    "500": (500, {}, "oops"),
    "429 without a word": (429, {}, ""),
    "no JSON": (200, {}, "<html>busy</html>"),
    "other JSON": (200, {}, '{"error": {"message": "overloaded"}}'),
    "a list": (200, {}, "[]"),
    "no text": (200, {}, '{"choices": [{"message": {"content": null}}]}'),
    "no verdict": (200, {}, '{"choices": [{"message": {"content": "Both are fine, I think."}}]}'),
    "broken UTF-8": (200, {}, b"\xff\xfe{"),
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_what_fails_is_asked_again(failure, answers, served, tmp_path):
    failed = set()

    def answer(number, body, headers):
        if (pair := tuple(shown(body))) not in failed:
            failed.add(pair)
            return failure
        return longer(number, body, headers)

    server = served(answer)
    assert by_url(server, answers([line_of(0)])) == 0
    assert len(server.requests) == 2 * 12
    [line] = lines_of(tmp_path / "rankings.jsonl")
    assert ranks(line) == {TEXTS[2]: 1, TEXTS[1]: 2, TEXTS[0]: 3, TEXTS[3]: 4}


def test_silence_is_a_failure(answers, served, tmp_path, capsys):
    def answer(number, body, headers):
        if number == 0:
            time.sleep(3)
        return longer(number, body, headers)

    server = served(answer)
    assert by_url(server, answers([line_of(0, TEXTS[:2])]), "--request_timeout", "0.5", "--parallel_requests", 1) == 0
    assert len(server.requests) == 3


@pytest.mark.parametrize("kind", ["seconds", "date"])
def test_retry_after_holds_all_requests_back(kind, answers, served, tmp_path):
    """After the 429 no request comes before the time that it names, whichever thread would send it."""
    at = []

    def answer(number, body, headers):
        if number == 0:
            at.append(time.monotonic())
            later = email.utils.format_datetime(datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=3))
            return 429, {"Retry-After": "2" if kind == "seconds" else later}, "slow down"
        return longer(number, body, headers)

    server = served(answer)
    assert by_url(server, answers([line_of(0, TEXTS[:3])]), "--parallel_requests", 1) == 0
    times = [moment for moment, *_ in server.requests]
    assert times[1] - at[0] >= 1.8
    assert len(times) == 7


def test_the_pace():
    pace, stop = Pace(1200), threading.Event()
    start = time.monotonic()
    for _ in range(5):
        pace.wait(stop)
    assert time.monotonic() - start >= 4 * 0.05
    pace.pause(0.3)
    start = time.monotonic()
    pace.wait(stop)
    assert time.monotonic() - start >= 0.29


def test_an_endpoint_that_never_answers_ends_in_one_line_and_goes_on_later(answers, served, tmp_path, capsys):
    broken = [True]

    def answer(number, body, headers):
        return (503, {}, f"no: {headers['authorization']}") if broken and number >= 7 else longer(number, body, headers)

    server, path = served(answer), answers()
    assert by_url(server, path, "--parallel_requests", "2") == 2
    captured = capsys.readouterr()
    [line] = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert "6 tries without an answer" in line and "503" in line and "Bearer ***" in line
    kept = lines_of(tmp_path / "rankings.jsonl.parts" / "rank0.jsonl")
    assert len(kept) == 7 and not (tmp_path / "rankings.jsonl").exists()
    before = len(server.requests)
    broken.clear()
    assert by_url(server, path, "--parallel_requests", "3", "--request_timeout", "30") == 0
    assert len(server.requests) - before == 60 - 7, "nothing is asked twice"
    assert len(lines_of(tmp_path / "rankings.jsonl")) == 5
    everything = captured.out + captured.err + "".join(f.read_text() for f in tmp_path.rglob("*") if f.is_file())
    assert KEY not in everything


@pytest.mark.parametrize(
    ("status", "headers", "words"),
    [
        (401, {}, ["status 401", "TRIPOD_JUDGE_KEY is not what it asks for", "***"]),
        (404, {}, ["status 404", "***"]),
        (302, {"Location": "http://127.0.0.1:9/steal"}, ["status 302", "no redirect is followed"]),
    ],
)
def test_a_refusal_is_one_line_at_once(status, headers, words, answers, served, capsys, tmp_path):
    server = served(lambda number, body, given: (status, headers, f"bad key {KEY} \x1b[31m"))
    assert by_url(server, answers(), "--parallel_requests", "1") == 2
    captured = capsys.readouterr()
    [line] = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert all(word in line for word in words) and KEY not in captured.err + captured.out and "\x1b[31m" not in line
    assert len(server.requests) <= 2
    assert KEY not in "".join(f.read_text() for f in tmp_path.rglob("*") if f.is_file())


def test_without_a_key_none_is_sent(answers, served, monkeypatch):
    monkeypatch.delenv(judge_endpoint.KEY)
    server = served(longer)
    assert by_url(server, answers()) == 0
    assert all("authorization" not in headers for _, _, headers, _ in server.requests)


def test_a_judge_without_verdicts_is_an_error_and_is_asked_again(answers, served, tmp_path, capsys):
    mute = [True]

    def answer(number, body, headers):
        return said(f"I like both. {KEY}") if mute else longer(number, body, headers)

    server, path = served(answer), answers([line_of(0)])
    assert by_url(server, path) == 2
    assert "12 of 12 answers hold no verdict, such as 'I like both. ***'" in capsys.readouterr().err
    mute.clear()
    assert by_url(server, path) == 0
    [line] = lines_of(tmp_path / "rankings.jsonl")
    assert ranks(line)[TEXTS[2]] == 1


@pytest.mark.parametrize("status", [400, 413, 422, None])
def test_a_prompt_that_is_refused_is_tied_and_named_and_a_start_after_that_is_not_stuck(
    status, answers, served, tmp_path, capsys
):
    """An endpoint's error may hold the question, and so a verdict that none has spoken."""

    def answer(number, body, headers):
        if "Question 1?" not in body["messages"][1]["content"]:
            return longer(number, body, headers)
        return (status, {}, f"too long: {KEY} {FORM}") if status else (200, {}, '{"choices": [{"message": {}}]}')

    server, path = served(answer), answers([line_of(0), line_of(1), line_of(2)])
    assert by_url(server, path) == 0
    assert len(server.requests) == 12 + 12 * READ_TRIES + 12
    found = {line["id"]: set(ranks(line).values()) for line in lines_of(tmp_path / "rankings.jsonl")}
    assert found == {"p0": {1, 2, 3, 4}, "p1": {1}, "p2": {1, 2, 3, 4}}
    out = capsys.readouterr().out
    assert f"no verdict about the prompt p1, the last: '{f'status {status}: too long: ***' if status else ''}" in out
    done = [{"id": "p1", "a": a, "b": b, "verdict": "unreadable"} for a, b in itertools.permutations(range(4), 2)]
    done += [{"id": f"p{i}", "a": a, "b": b, "verdict": "A"} for i in (0, 2) for a in range(4) for b in range(4)]
    again = judge_endpoint.Endpoint(judge.EndpointArguments(judge_url=server.url, judge_model="judge-1"))
    file = answer_files.PartFile(tmp_path / "more.jsonl", "--output", {})
    with file.opened():
        judge.judge_by_endpoint(again, lines_of(path), file, done)


def test_an_endpoint_that_refuses_everything_is_one_line_soon(answers, served, capsys):
    server = served(lambda number, body, headers: (400, {}, "temperature must be 1"))
    assert by_url(server, answers([line_of(i, TEXTS[:2]) for i in range(100)])) == 2
    assert "status 400: temperature must be 1" in capsys.readouterr().err
    assert len(server.requests) < 100


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ('{"better": "A"}', "A"),
        ('```json\n{"better": "b"}\n```', "B"),
        ('At first {"better": "A"}, but then: {"better": "tie"}', "tie"),
        ("B", "B"),
        ("**A**", "A"),
        (" Tie. ", "tie"),
        ('{"better": "C"}', None),
        ("A is better", None),
        ('{"better": A}', None),
        ('{"better": "A", "reason": "B has {x} in it"}', "A"),
        ('{"better": "B", "scores": {"A": 1, "B": 2}}', "B"),
        ('{"better": "A", "reason": {"better": "B", "why": "shorter"}}', "A"),
        ('{"verdict": {"better": "tie"}}', "tie"),
        ('{"a":' * 2000, None),
        ("", None),
    ],
)
def test_verdicts_are_read(text, verdict):
    assert verdict_in(text) == verdict


def test_a_bad_key_and_one_in_the_clear(answers, monkeypatch, capsys):
    monkeypatch.setenv(judge_endpoint.KEY, "a\nb")
    assert run("--answers", answers(), "--judge_url", "http://a/v1", "--judge_model", "m") == 2
    assert "holds characters that no key has" in capsys.readouterr().err
    monkeypatch.setenv(judge_endpoint.KEY, KEY)
    monkeypatch.setattr(judge_endpoint, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda *args, **kwargs: (_ for _ in ()).throw(socket.gaierror(8, "no host"))
    )
    assert run("--answers", answers(), "--judge_url", "http://judge.invalid/v1", "--judge_model", "m") == 2
    captured = capsys.readouterr()
    assert "goes over the network in the clear" in captured.out and "6 tries" in captured.err
    assert KEY not in captured.out + captured.err


def test_half_a_character_in_a_column_that_nothing_reads_is_written_and_in_an_answer_refused(tmp_path):
    line = {"id": "a", "prompt": "q", "row": {"id": "\ud800", "name": "\u00e9"}}
    file = answer_files.PartFile(tmp_path / "a.jsonl", "--output", {})
    with file.opened(), file.part() as append:
        append([line])
        assert file.lines() == [line]
        file.finish(file.lines(), {})
    assert json.loads(file.path.read_text()) == line
    answer_files.write_lines(file.path, [line | {"answers": ["x", "y \ud800"]}])
    with pytest.raises(UserError, match=r"a.jsonl:1: the prompt or an answer holds half a character, \\ud800"):
        answer_files.read_answers(file.path, "--answers")


def test_ctrl_c_says_how_to_go_on(capsys, monkeypatch):
    def stop(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.argv", ["judge.py"])
    assert run_resumable(stop) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "stopped; started again with the same flags it goes on"
