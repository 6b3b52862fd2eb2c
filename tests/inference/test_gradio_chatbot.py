"""The page without a browser: what its buttons do, what it sends, and who may reach it."""

import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import chat_page
import gradio as gr
import gradio_chatbot
import httpx
import pytest
import torch
from answer_rewards import AnswerRewards
from chat_reasoning import marks_of
from chat_sessions import SAME
from chat_stream import Answer, SamplingArguments
from gradio_chatbot import PageArguments, ServerArguments
from page_guard import address_of, credentials, free_port, names_of

from tests.inference.conftest import INFERENCE
from tests.signals import hear_signals
from training.utils.errors import UserError, run_program
from training.utils.run.folders import python_path

OPTIONS = [64, 0.7, 0.9, 0, 1.0, 7]
FOX, HOUSE = "the quick brown fox jumps!", "a small red house"


@pytest.fixture
def page(load, tmp_path):
    """``page("fox", "house")`` is a `Page` of these models, laid out, with its session."""

    def _page(*names, judge=None, **options):
        made = chat_page.Page(
            load(*names), judge, tmp_path / "votes.jsonl", **({"blind": False, "system": ""} | options)
        )
        with gr.Blocks():
            made.widgets, _ = chat_page._layout(made, SamplingArguments())
        return made, made.new_session()

    return _page


def text_of(update, page, column):
    """What a column shows after the last prompt: the answer, and its note when it has ended."""
    bubbles = update[page.widgets.chats[column]]
    last = max(i for i, bubble in enumerate(bubbles) if bubble["role"] == "user")
    parts = [bubble["content"][0] for bubble in bubbles[last + 1 :]]
    return [part["text"] if isinstance(part, dict) else part.value for part in parts]


def thinking(model, text):
    """A whole answer of a model, as `stream_answer` ends with it."""
    ids = model.tokenizer.encode(text, add_special_tokens=False)
    return Answer(model.tokenizer, ids, "stop", marks=marks_of(model.tokenizer))


def notice_of(update, page):
    return update[page.widgets.notice]["value"]


def test_both_answers_grow_side_by_side_and_get_rewards(page, chat_folders, monkeypatch):
    monkeypatch.setattr(chat_page, "REFRESH_SECONDS", 0)
    judge = AnswerRewards(str(chat_folders["reward"]), [])
    judge.load(torch.device("cpu"))
    p, session = page("fox", "house", judge=judge)
    updates = list(p.send(session, session.last, "hello", "", *OPTIONS))
    both = [(text_of(u, p, 0)[0], text_of(u, p, 1)[0]) for u in updates]
    growing = [(a, b) for a, b in both if a not in ("…", FOX) and b not in ("…", HOUSE)]
    assert len(growing) >= 2, "one column waits for the other"
    assert both[-1] == (FOX, HOUSE)
    expected = judge.score([{"role": "user", "content": "hello"}, {"role": "assistant", "content": HOUSE}])
    assert f"reward {expected:+.2f} (raw)" in text_of(updates[-1], p, 1)[1]
    assert updates[0][p.widgets.stop]["visible"] and not updates[-1][p.widgets.stop]["visible"]
    assert updates[0][p.widgets.prompt] == "" and session.can_vote


def test_the_second_turn_sees_its_own_columns_first_answer(page, monkeypatch):
    p, session = page("fox", "house")
    seen = []
    stream = chat_page.stream_answer
    monkeypatch.setattr(
        chat_page,
        "stream_answer",
        lambda m, h, s: seen.append((m.name, [x["content"] for x in h], s)) or stream(m, h, s),
    )
    list(p.send(session, session.last, "one", "be kind", *OPTIONS))
    list(p.send(session, session.last, "two", "be kind", *OPTIONS))
    list(p.retry(session, session.last, *OPTIONS))
    assert [s[:2] for s in seen[2:4]] == [
        ("fox", ["be kind", "one", FOX, "two"]),
        ("house", ["be kind", "one", HOUSE, "two"]),
    ]
    assert [s[:2] for s in seen[4:]] == [s[:2] for s in seen[2:4]], "retry asks the same"
    assert [s[2].seed for s in seen] == [7, 7, 8, 8, 9, 9], "retry draws anew"


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", OPTIONS, "Write a prompt first."),
        ("x" * 20_000, OPTIONS, "20,000 characters; at most 10,000 are read"),
        ("story " * 1500, OPTIONS, "the model reads at most"),
        ("hello", [64, -1, 0.9, 0, 1.0, 7], "temperature must be"),
        ("hello", [None, 0.7, 0.9, 0, 1.0, 7], "must be a number"),
    ],
)
def test_bad_input_is_a_message_in_the_page_and_changes_nothing(prompt, options, message, page):
    p, session = page("fox", "house")
    updates = list(p.send(session, session.last, prompt, "", *options))
    assert message in notice_of(updates[-1], p)
    assert session.turns == [] and not session.busy
    assert updates[-1].get(p.widgets.prompt, prompt) == prompt.strip(), "the prompt is not lost"
    assert text_of(list(p.send(session, session.last, "hello", "", *OPTIONS))[-1], p, 0)[0] == FOX, "the page goes on"


def test_a_failing_model_is_a_message_in_the_page(page, monkeypatch, caplog):
    p, session = page("fox", "house")
    monkeypatch.setattr(p.models[1].weights.model, "forward", lambda **kw: 1 / 0)
    *_, last = p.send(session, session.last, "hello", "", *OPTIONS)
    assert "terminal" in notice_of(last, p) and "ZeroDivisionError" in caplog.text
    assert session.turns == [] and last[p.widgets.send]["visible"]


def test_answers_stay_where_the_reward_model_fails(page, caplog):
    p, session = page("fox", "house", judge=SimpleNamespace(stats=None, score=lambda messages: 1 / 0))
    *_, last = p.send(session, session.last, "hello", "", *OPTIONS)
    assert "reward model failed" in notice_of(last, p) and "ZeroDivisionError" in caplog.text
    assert text_of(last, p, 0)[0] == FOX and session.turns[0].rewards == [None, None]
    assert session.can_vote and p.widgets.prompt not in last


def test_who_has_to_wait_is_told_at_once(page):
    page, _ = page("fox", "house")
    sessions = [page.new_session() for _ in range(chat_page.VISITORS_AT_ONCE + 1)]
    turns = [page.send(session, session.last, "hello", "", *OPTIONS) for session in sessions[:-1]]
    assert page.knock(sessions[-1])[page.widgets.notice] == gr.skip()
    for turn in turns:
        next(turn)
    notice = page.knock(sessions[-1])[page.widgets.notice]
    assert notice["visible"] and "2 other visitors" in notice["value"]
    assert page.knock(sessions[0])[page.widgets.notice] == gr.skip(), "who is being answered does not wait"
    turns[0].close()
    assert page.knock(sessions[-1])[page.widgets.notice] == gr.skip(), "a place is free again"


def test_stop_keeps_what_is_there(page, monkeypatch):
    monkeypatch.setattr(chat_page, "REFRESH_SECONDS", 0)
    p, session = page("fox", "house")
    updates = p.send(session, session.last, "hello", "", *OPTIONS)
    for _ in range(3):
        next(updates)
    p.stop(session)
    *_, last = updates
    text, note = text_of(last, p, 0)
    assert text and FOX.startswith(text) and text != FOX and "stopped" in note
    assert not session.can_vote and not session.busy


def test_a_visitor_who_leaves_frees_the_models(page, monkeypatch):
    monkeypatch.setattr(chat_page, "REFRESH_SECONDS", 0)
    p, session = page("sft", "rlhf")
    updates = p.send(session, session.last, "hello", "", *OPTIONS)
    for _ in range(3):
        next(updates)
    updates.close()  # what gradio does after a disconnect
    assert not session.busy and not any(m.weights.lock.locked() for m in p.models)
    assert all(answer.ended == "cancelled" for answer in session.turns[-1].answers)


def test_one_answer_at_a_time_for_each_visitor(page, monkeypatch):
    monkeypatch.setattr(chat_page, "REFRESH_SECONDS", 0)
    p, session = page("fox", "house")
    first = p.send(session, session.last, "hello", "", *OPTIONS)
    next(first)
    [refused] = p.send(session, session.last, "again", "", *OPTIONS)
    assert "still being written" in notice_of(refused, p) and len(session.turns) == 1
    list(first)
    assert session.turns


def test_votes_land_in_the_file(page):
    p, session = page("fox", "house")
    list(p.send(session, session.last, "hello", "", *OPTIONS))
    said = notice_of(p.vote(session, 1, session.last), p)
    assert said == "Saved: B · house is better."
    [row] = [json.loads(line) for line in p.votes.read_text().splitlines()]
    assert (row["chosen"], row["rejected"]) == (HOUSE, FOX)
    assert "nothing to vote on" in notice_of(p.vote(session, 1, session.last), p)
    list(p.send(session, session.last, "hello", "", *OPTIONS))
    assert "about the same" in notice_of(p.vote(session, SAME, session.last), p)
    assert len(p.votes.read_text().splitlines()) == 1


def test_blind_mode_in_the_page(page):
    p, session = page("fox", "house", blind=True)
    names = ("fox", "house")
    updates = list(p.send(session, session.last, "hello", "", *OPTIONS))
    headings = [updates[-1][h] for h in p.widgets.headings]
    assert headings == ["A", "B"]
    assert all(len(text_of(u, p, c)) == 1 for u in updates for c in range(2)), "no note: speed and reward tell"
    shown = p.vote(session, 0, session.last)
    assert sorted(shown[h][4:] for h in p.widgets.headings) == sorted(names)
    assert "Clear starts the next blind round" in notice_of(shown, p)
    assert [p.clear(session, session.last)[h] for h in p.widgets.headings] == ["A", "B"]
    assert sorted(p.set_blind(session, session.last, False)[h][4:] for h in p.widgets.headings) == sorted(names)
    assert [p.set_blind(session, session.last, True)[h] for h in p.widgets.headings] == ["A", "B"]


def test_one_model_is_a_plain_chat(page):
    p, session = page("fox", blind=True)
    *_, last = p.send(session, session.last, "hello", "", *OPTIONS)
    assert text_of(last, p, 0)[0] == FOX and last[p.widgets.headings[0]] == "fox" and p.widgets.votes == []


def test_an_empty_answer_is_visible(page, monkeypatch):
    p, session = page("fox", "house")
    list(p.send(session, session.last, "hello", "", *OPTIONS))
    session.turns[0].answers[0].token_ids = []
    assert "empty answer" in text_of(p.view(session), p, 0)[0]


# --- who may reach the page ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "example.org"])
def test_other_addresses_need_a_password(host):
    with pytest.raises(UserError, match="--auth"):
        credentials(host, "")
    assert credentials(host, "me:se:cret") == ("me", "se:cret")


def test_a_public_link_needs_a_password():
    with pytest.raises(UserError, match="--share.*--auth"):
        credentials("127.0.0.1", "", share=True)


@pytest.mark.parametrize("auth", ["me", "me:", ":secret", ":"])
def test_half_a_password_is_refused(auth):
    with pytest.raises(UserError, match="USER:PASSWORD"):
        credentials("127.0.0.1", auth)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.8.8"])
def test_this_machine_needs_none(host):
    assert credentials(host, "") is None


def test_a_taken_port_leads_to_the_next_free_one():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert port < free_port("127.0.0.1", port) < port + 100


@pytest.mark.parametrize("host", ["192.0.2.7", "no.such.host.invalid"])
def test_a_foreign_address_is_refused(host):
    with pytest.raises(UserError, match="--host"):
        free_port(host, 7860)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--host", "0.0.0.0"], "--auth USER:PASSWORD"),
        (["--share"], "--auth USER:PASSWORD"),
        (["--path", "A=/nowhere"], "--path /nowhere: no such folder"),
        (["--path", "/a/x", "/b/x"], "two models are called x"),
        (["--path", *(f"M{n}=/x" for n in range(5))], "at most 4 models"),
        ([], "name models with --path"),
        (["--port", "0"], "--port"),
        (["--pth", "x"], "did you mean --path?"),
        (["--votes_path", "{tmp}/file/votes.jsonl"], "--votes_path"),
        (["--votes_path", "{tmp}"], "is a folder"),
    ],
)
def test_bad_flags_are_one_line_and_exit_code_2(flags, message, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert run_program(gradio_chatbot.main, [f.format(tmp=tmp_path) for f in flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_bad_reward_model_is_said_before_anything_loads(chat_folders, capsys):
    arguments = PageArguments(
        path=[f"A={chat_folders['fox']}"], reward_model="/nowhere", votes_path="", blind=False, system=""
    )
    with pytest.raises(UserError, match="--reward_model /nowhere"):
        gradio_chatbot.models_of(arguments)
    assert "loading" not in capsys.readouterr().out


@pytest.fixture
def served(load, tmp_path):
    """``served(blind=..., auth=...)`` starts a page of two models called Alpha and Omega; gives its address."""
    started = []

    def _serve(auth="", blind=False):
        import dataclasses

        models = [dataclasses.replace(m, name=n) for m, n in zip(load("fox", "house"), ("Alpha", "Omega"), strict=True)]
        blocks = chat_page.build_page(models, None, SamplingArguments(), tmp_path / "votes.jsonl", blind=blind)
        blocks.queue(max_size=4)
        server = ServerArguments(auth=auth, port=17860)
        address, _ = gradio_chatbot.serve(blocks, server, credentials(server.host, server.auth), chat_page.STYLE)
        started.append(blocks)
        return address.rstrip("/")

    yield _serve
    for blocks in started:
        blocks.close(verbose=False)


def test_the_page_holds_no_names_no_api_and_asks_nobody_else(served):
    address = served(blind=True)
    html = httpx.get(address).text
    config = httpx.get(f"{address}/config").text
    assert "Tripod" in html
    for name in ("Alpha", "Omega", "fox", "house"):
        assert name not in html and name not in config, name
    assert "fonts.googleapis" not in html and "Content-Security-Policy" in html + config
    assert httpx.get(f"{address}/gradio_api/info").json() == {"named_endpoints": {}, "unnamed_endpoints": {}}


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, 200),
        ({"Host": "localhost:17860"}, 200),
        ({"Host": "[::1]:17860"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "localhost.evil.example:17860"}, 403),
        ({"Host": ""}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Host": "localhost:1", "Origin": "http://localhost:2"}, 403),
        ({"Host": "localhost:1", "Origin": "http://localhost:1"}, 200),
    ],
)
def test_foreign_names_and_foreign_pages_do_not_reach_the_page(served, headers, expected):
    """DNS rebinding has a Host of its own, another page an Origin."""
    address = served()
    assert httpx.get(f"{address}/config", headers=headers).status_code == expected
    body = {"data": [], "fn_index": 0, "session_hash": "x"}
    joined = httpx.post(f"{address}/gradio_api/queue/join", json=body, headers=headers).status_code
    assert (joined == 403) == (expected == 403)


def test_nothing_is_uploaded(served):
    address = served()
    answer = httpx.post(f"{address}/gradio_api/upload", files={"files": ("a.txt", b"text")})
    assert answer.status_code == 403


@pytest.mark.parametrize("origin", ["http://evil.example", "null"])
def test_a_page_with_a_password_takes_no_requests_of_other_pages(served, origin):
    address = served(auth="me:secret")
    login = {"username": "me", "password": "secret"}
    assert httpx.post(f"{address}/login", data=login, headers={"Origin": origin}).status_code == 403
    assert httpx.post(f"{address}/login", data=login).status_code == 200


def test_a_tab_that_shows_other_answers_has_no_vote_on_the_last_ones(page):
    """A duplicated tab has the conversation of the first, and the answers that it was opened with."""
    p, session = page("fox", "house")
    *_, last = p.send(session, session.last, "one", "", *OPTIONS)
    shown = last[p.widgets.shown]
    *_, other = p.send(session, session.last, "two", "", *OPTIONS)
    refused = p.vote(session, 1, shown)
    assert "another tab" in notice_of(refused, p) and not p.votes.exists()
    assert refused[p.widgets.shown] == other[p.widgets.shown], "and now it shows them"
    assert "is better" in notice_of(p.vote(session, 1, refused[p.widgets.shown]), p)
    assert "another tab" in notice_of(p.unvote(session, shown), p) and p.votes.read_text()
    p.clear(session, session.last)
    *_, last = p.send(session, session.last, "one", "", *OPTIONS)
    assert last[p.widgets.shown] != shown, "nor has one from before Clear, or a retry"
    *_, retried = p.retry(session, session.last, *OPTIONS)
    assert retried[p.widgets.shown] != last[p.widgets.shown]


def test_a_tab_that_shows_other_answers_neither_retries_nor_edits_the_last_ones(page):
    p, session = page("fox", "house")
    *_, last = p.send(session, session.last, "one", "", *OPTIONS)
    list(p.send(session, session.last, "two", "", *OPTIONS))
    turns = list(session.turns)
    for refused in (p.edit(session, last[p.widgets.shown]), *p.retry(session, last[p.widgets.shown], *OPTIONS)):
        assert "another tab" in notice_of(refused, p) and p.widgets.prompt not in refused
        assert refused[p.widgets.shown] == session.last and session.turns == turns and not session.busy
    assert p.edit(session, session.last)[p.widgets.prompt] == "two"


def test_a_tab_that_shows_other_answers_neither_adds_to_them_nor_clears_them(page):
    p, session = page("fox", "house")
    *_, last = p.send(session, 0, "one", "", *OPTIONS)
    *_, other = p.send(session, last[p.widgets.shown], "two", "", *OPTIONS)
    turns, stale = list(session.turns), last[p.widgets.shown]
    added = list(p.send(session, stale, "three", "", *OPTIONS))
    for refused in (*added, p.clear(session, stale), p.set_blind(session, stale, True)):
        assert "another tab" in notice_of(refused, p) and p.widgets.prompt not in refused
        assert refused[p.widgets.shown] == other[p.widgets.shown] and not refused[p.widgets.blind]
        assert session.turns == turns and not session.busy and not session.cancel
    *_, then = p.send(session, added[0][p.widgets.shown], "three", "", *OPTIONS)
    assert len(session.turns) == 3 and not notice_of(then, p)
    p.clear(session, session.last)
    [refused] = p.send(session, then[p.widgets.shown], "four", "", *OPTIONS)
    assert "another tab" in notice_of(refused, p) and not session.turns, "it has been cleared meanwhile"


def test_one_vote_a_round_whatever_is_clicked_at_once(page):
    p, session = page("fox", "house")
    list(p.send(session, session.last, "hello", "", *OPTIONS))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: p.vote(session, n % 2, session.last), range(32)))
    assert len(p.votes.read_text().splitlines()) == 1


def test_a_vote_that_step_2_would_refuse_is_not_saved(page):
    """README promises that votes train as they are."""
    p, session = page("fox", "house")
    list(p.send(session, session.last, "what does <|im_end|> mean?", "", *OPTIONS))
    assert "holds <|im_end|>" in notice_of(p.vote(session, 1, session.last), p)
    p.clear(session, session.last)
    list(p.send(session, session.last, "and <pad>?", "", *OPTIONS))
    notice = notice_of(p.vote(session, 1, session.last), p)
    assert "<pad>" not in notice and "holds <pad>" in notice.replace(chat_page.JOINER, ""), "a tag would not be seen"
    assert not p.votes.exists()


def test_a_vote_on_several_answers_that_the_template_writes_in_another_way_is_not_saved(page):
    p, session = page("fox", "house")
    template = (Path(__file__).parents[1] / "data" / "chat_templates" / "qwen3.jinja").read_text()
    for model in p.models:
        model.tokenizer.chat_template = template
    list(p.send(session, session.last, "hello", "", *OPTIONS))
    assert "Saved" in notice_of(p.vote(session, 1, session.last), p)
    list(p.send(session, session.last, "and now?", "", *OPTIONS))
    assert "not saved: the chat template writes an earlier turn" in notice_of(p.vote(session, 0, session.last), p)
    assert len(p.votes.read_text().splitlines()) == 1 and session.can_vote
    assert "Saved" in notice_of(p.vote(session, SAME, session.last), p)


def test_an_address_of_ipv6_stands_in_brackets():
    assert [address_of(host, 80) for host in ("::1", "localhost", "127.0.0.1")] == [
        "[::1]:80", "localhost:80", "127.0.0.1:80"
    ]  # fmt: skip
    assert {"fe80::1", "localhost"} <= names_of("fe80::1", password=False) and not names_of("fe80::1", password=True)


def test_only_the_password_opens_the_page(served):
    address = served(auth="me:secret")
    assert httpx.get(f"{address}/config").status_code == 401
    assert "Tripod" not in json.dumps(httpx.get(f"{address}/config").json())
    assert httpx.post(f"{address}/gradio_api/queue/join", json={"data": [], "fn_index": 0}).status_code == 401
    assert httpx.post(f"{address}/login", data={"username": "me", "password": "wrong"}).status_code == 400
    with httpx.Client() as client:
        assert client.post(f"{address}/login", data={"username": "me", "password": "secret"}).status_code == 200
        assert client.get(f"{address}/config").status_code == 200


def test_the_program_starts_says_where_and_ends_on_ctrl_c(chat_folders, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [
            sys.executable, str(INFERENCE / "gradio_chatbot.py"), "--path", f"A={chat_folders['fox']}",
            f"B={chat_folders['house']}", "--reward_model", str(chat_folders["reward"]), "--port", str(port),
            "--votes_path", str(tmp_path / "votes.jsonl"),
        ]  # fmt: skip
        environment = os.environ | {"PYTHONPATH": python_path(), "GRADIO_SHARE": "True"}
        program = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            cwd=tmp_path,
            preexec_fn=hear_signals,
        )
        lines = []
        try:
            for line in program.stdout:
                lines.append(line)
                if line.startswith("open "):
                    break
            said = "".join(lines)
            assert f"port {port} is in use, taking " in said and "loading the reward model" in said, said
            address = lines[-1].split()[1]
            assert address.startswith("http://127.0.0.1:") and "gradio.live" not in said
            assert httpx.get(address).status_code == 200
            program.send_signal(signal.SIGINT)
            assert program.wait(20) == 0
        finally:
            program.kill()
            program.stdout.close()


def test_reasoning_is_a_bubble_of_its_own_and_no_part_of_what_is_judged(page, monkeypatch):
    """The answer's bubble, with its copy button, holds the answer alone; so does what the reward model reads."""
    p, session = page("fox", "house")
    judged = []
    p.judge = SimpleNamespace(score=lambda messages: judged.append(messages) or 0.5, stats=1.0)
    written = "<think>\nSmall or red?\n</think>\n\nRed."
    monkeypatch.setattr(chat_page, "stream_answer", lambda model, *_: iter([thinking(model, written)]))
    *_, last = p.send(session, session.last, "which?", "", *OPTIONS)
    reasoning, answer, _ = (b["content"][0] for b in last[p.widgets.chats[0]] if b["role"] == "assistant")
    assert (reasoning["text"], answer["text"]) == ("Small or red?", "Red.")
    titles = [bubble.get("metadata", {}).get("title") for bubble in last[p.widgets.chats[0]]]
    assert titles == [None, "Reasoning", None, None]
    assert [m["content"] for m in judged[0]] == ["which?", "Red."] and len(judged) == 2
    assert session.history(0)[-1] == {"role": "assistant", "content": written}, "this template knows no reasoning"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<b>x</b> &amp; a<b <3 & so", "<~b>x<~/b> &~amp; a<~b <3 & so"),
        ("use `<b>` and ``a`<i>``", "use `<b>` and ``a`<i>``"),
        ("```html\n<div>\n```\n<div>", "```html\n<div>\n```\n<~div>"),
        ("~~~\n<a>\n```\n<b>", "~~~\n<a>\n```\n<b>"),
        ("```\n<grows", "```\n<grows"),
        ("a ` b <i>", "a ` b <~i>"),
        ("<!-- x --><?php", "<~!-- x --><~?php"),
        ("\\`<b>x</b>\\` and `<b>`", "\\`<~b>x<~/b>\\` and `<b>`"),
        ("``` a`b\n<b>x</b>", "``` a`b\n<~b>x<~/b>"),
    ],
)
def test_markup_of_an_answer_is_shown_and_code_stays_code(text, shown):
    assert chat_page.without_markup(text) == shown.replace("<~", f"<{chat_page.JOINER}").replace(
        "&~", f"&{chat_page.JOINER}"
    )


def test_clear_while_answers_grow_clears_and_ends_them(page):
    p, session = page("fox", "house")
    turn = p.send(session, session.last, "hello", "", *OPTIONS)
    next(turn)
    next(turn, None)
    update = p.clear(session, session.last)
    assert session.turns == [] and update[p.widgets.chats[0]] == []
    *_, last = [update, *turn]
    assert session.turns == [] and not session.busy and last[p.widgets.chats[1]] == []
    assert text_of(list(p.send(session, session.last, "again", "", *OPTIONS))[-1], p, 0)[0] == FOX


def test_a_tab_finds_its_conversation_again_and_old_ones_go(page, monkeypatch):
    p, _ = page("fox", "house")
    first = p.start("token")[p.widgets.session]
    list(p.send(first, first.last, "hello", "", *OPTIONS))
    assert p.start("token")[p.widgets.session] is first and p.start("other")[p.widgets.session] is not first
    assert p.start("")[p.widgets.session] is not p.start("")[p.widgets.session]
    monkeypatch.setattr(chat_page, "MOST_SESSIONS", 2)
    p.start("third")
    assert p.start("token")[p.widgets.session] is not first


def test_the_server_says_which_one_it_is(page):
    import page_guard
    from starlette.testclient import TestClient

    client = TestClient(page_guard.PageGuard(None, frozenset()))
    assert client.get("/alive").text == page_guard.INSTANCE
