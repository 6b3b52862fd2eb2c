"""The page in a real browser: Debian's chromium and chromium-driver, driven by selenium, where they are."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import chat_page
import gradio_chatbot
import pytest
import torch
from answer_rewards import AnswerRewards
from chat_models import LoadArguments, load_chat_models
from chat_stream import SamplingArguments
from gradio_chatbot import ServerArguments

import training
from tests.inference.browser import PHONE, Browser, By, Keys, needs_browser, selenium
from tests.inference.tiny_chat import save_parrot

pytestmark = [pytest.mark.slow, needs_browser]

FOX, HOUSE = "the quick brown fox jumps!", "a small red house"


class Visitor(Browser):
    """One visitor of the chat page."""

    def is_ready(self):
        return self.find("#prompt textarea").is_displayed() and self.text("#heading-0")

    def answers(self, column):
        """The answers of a column, the note under an answer as its last line."""
        answers = []
        for row in self.all(f"#chat-{column} .bot-row"):
            if row.find_elements(By.CSS_SELECTOR, ".note"):
                answers[-1] += "\n" + row.text
            else:
                answers.append(row.text)
        return answers

    def ask(self, prompt):
        self.find("#prompt textarea").send_keys(prompt + Keys.ENTER)

    def can_vote(self):
        return self.find("#vote-0").is_enabled()


@pytest.fixture
def visit(visitors):
    """``visit(address)`` opens a browser of its own."""
    return lambda address, **options: visitors(Visitor, address, **options)


@pytest.fixture
def serve(chat_folders, tmp_path):
    """``serve("fox", "house")`` starts a page; models are called Alpha and Omega, votes go to tmp_path."""
    started = []

    def _serve(*paths, blind=False, judge=False, sampling=None, port=18860):
        names = ("Alpha", "Omega")[: len(paths)]
        folders = {n: str(chat_folders.get(p, p)) for n, p in zip(names, paths, strict=True)}
        models = load_chat_models(folders, LoadArguments(), lambda line: None)
        model = AnswerRewards(str(chat_folders["reward"]), []) if judge else None
        if model:
            model.load(torch.device("cpu"))
        sampling = sampling or SamplingArguments(max_new_tokens=200)
        blocks = chat_page.build_page(models, model, sampling, tmp_path / "votes.jsonl", blind=blind)
        blocks.queue(max_size=8)
        address, _ = gradio_chatbot.serve(blocks, ServerArguments(port=port), None, chat_page.STYLE)
        started.append(blocks)
        return address, models

    yield _serve
    for blocks in started:
        blocks.close(verbose=False)


@pytest.fixture
def slowly(monkeypatch):
    """Every token takes 50 ms, so that a browser can watch answers grow.

    After ``hold_after`` tokens an answer grows no more and does not end either, until it is stopped.
    """
    stream = chat_page.stream_answer

    def _stream(*arguments):
        for count, answer in enumerate(stream(*arguments), start=1):
            time.sleep(0.05)
            _stream.tokens += 1
            yield answer
            while _stream.hold_after is not None and count >= _stream.hold_after:
                time.sleep(0.05)
                yield answer

    _stream.tokens, _stream.hold_after = 0, None
    monkeypatch.setattr(chat_page, "stream_answer", _stream)
    return _stream


def test_type_a_prompt_watch_both_answers_and_vote(serve, visit, slowly, tmp_path):
    address, _ = serve("fox", "house", judge=True)
    browser = visit(address)
    assert (browser.text("#heading-0"), browser.text("#heading-1")) == ("A · Alpha", "B · Omega")
    browser.ask("hello")
    seen = set()

    def done():
        seen.add(tuple(browser.answers(c)[-1] for c in range(2)))
        return browser.can_vote()

    browser.until(done)
    growing = [(a, b) for a, b in seen if "tokens" not in a + b and a not in ("…", FOX) and b not in ("…", HOUSE)]
    assert len(growing) >= 2, seen
    for column, text in enumerate((FOX, HOUSE)):
        answer, note = browser.answers(column)[0].split("\n")
        assert answer == text
        assert re.fullmatch(r"reward [+-]\d+\.\d\d \(raw\) · \d+ tokens · [\d.]+ tokens/s", note), note
    browser.click("#vote-1")
    browser.until(lambda: "Saved: B · Omega is better." in browser.text("#notice"))
    [row] = [json.loads(line) for line in (tmp_path / "votes.jsonl").read_text().splitlines()]
    assert row["prompt"] == [{"role": "user", "content": "hello"}]
    assert (row["chosen"], row["rejected"]) == (HOUSE, FOX)
    assert not browser.can_vote()
    browser.click("#chat-1 .message-buttons-left button[title='Copy message']")
    browser.find("#prompt textarea").send_keys(Keys.CONTROL, "v")
    browser.until(lambda: browser.find("#prompt textarea").get_attribute("value") == HOUSE)


def test_votes_of_the_page_train_step_2(serve, visit, chat_folders, tmp_path):
    address, _ = serve("fox", "house", blind=True)
    browser = visit(address)
    for prompt in ("hello", "tell me a story", "why?"):
        browser.ask(prompt)
        browser.until(browser.can_vote)
        browser.click("#vote-0")
        browser.until(lambda: "Saved:" in browser.text("#notice"))
        browser.click("#clear")
        browser.until(lambda: not browser.answers(0))
    votes = tmp_path / "votes.jsonl"
    assert len(votes.read_text().splitlines()) == 3
    flags = {
        "--data_path": votes, "--eval_data_path": votes, "--model_name_or_path": chat_folders["sft"],
        "--output_dir": tmp_path / "step2", "--dtype": "fp32", "--report_to": "none", "--max_seq_len": 256,
    }  # fmt: skip
    script = Path(training.__file__).parent / "step2_reward_model_finetuning" / "main.py"
    command = [sys.executable, str(script), *(str(part) for pair in flags.items() for part in pair)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    assert "pairs: 3 rows to train on" in done.stdout, done.stdout
    assert json.loads((tmp_path / "step2" / "summary.json").read_text())["steps"] >= 1


def test_retry_clear_examples_export_and_settings(serve, visit, tmp_path):
    address, _ = serve("sft", "rlhf", sampling=SamplingArguments(max_new_tokens=12, temperature=1.5))
    browser = visit(address)
    browser.click("#examples button, #examples .gallery-item")
    browser.until(lambda: "story" in browser.find("#prompt textarea").get_attribute("value"))
    browser.click("#send")
    browser.until(browser.can_vote)
    first = browser.answers(0)
    browser.click("#retry")
    browser.until(lambda: browser.can_vote() and browser.answers(0) != first)
    assert len(browser.answers(0)) == 1
    browser.click("#export")
    exported = browser.until(lambda: next(iter(tmp_path.glob("conversation*.json")), None))
    data = json.loads(exported.read_text())
    assert [m["name"] for m in data["models"]] == ["A · Alpha", "B · Omega"]
    assert "story" in data["models"][0]["messages"][0]["content"] and len(data["models"][1]["answers"]) == 1
    browser.click("#clear")
    browser.until(lambda: not browser.answers(0) and not browser.answers(1))


def test_blind_mode_leaks_no_names(serve, visit, tmp_path):
    """Nothing that reaches the browser before the vote holds a name: page source, scripts' data, every message."""
    address, _ = serve("fox", "house", blind=True)
    browser = visit(address, performance=True)
    browser.ask("hello")
    browser.until(browser.can_vote)
    browser.click("#export")
    exported = browser.until(lambda: next(iter(tmp_path.glob("conversation*.json")), None))
    received = [
        browser.driver.page_source,
        browser.driver.execute_script("return JSON.stringify(window.gradio_config)"),
    ]
    received.append(exported.read_text())
    received += _bodies(browser.driver)
    assert any(FOX in part for part in received), "the answers were not captured: the test is blind"
    for part in received:
        assert "Alpha" not in part and "Omega" not in part
        assert "tokens/s" not in part
    assert [browser.text(f"#heading-{c}") for c in range(2)] == ["A", "B"]
    browser.click("#vote-0")
    browser.until(lambda: browser.text("#heading-0")[:4] == "A · ")
    assert {browser.text(f"#heading-{c}")[4:] for c in range(2)} == {"Alpha", "Omega"}
    [row] = [json.loads(line) for line in (tmp_path / "votes.jsonl").read_text().splitlines()]
    shown = browser.text("#heading-0")[4:]
    assert row["vote"]["chosen_model"] == shown and row["vote"]["blind"]
    assert row["chosen"] == {"Alpha": FOX, "Omega": HOUSE}[shown]


def _bodies(driver):
    """Every response body and streamed message that the browser got, from its network log."""
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    bodies = [e["params"]["data"] for e in events if e["method"] == "Network.eventSourceMessageReceived"]
    finished = [e["params"]["requestId"] for e in events if e["method"] == "Network.loadingFinished"]
    for request in finished:
        try:
            bodies.append(driver.execute_cdp_cmd("Network.getResponseBody", {"requestId": request})["body"])
        except selenium.common.exceptions.WebDriverException:
            continue  # a download or an empty answer has no body
    return bodies


EVIL = "<script>hit=1</script>"
IMAGE = "<img src='x' onerror='hit=2'>"
CLICK = "<a href='javascript:hit=3'>z</a>"
FETCH = "![z](http://192.0.2.1/p)"


@pytest.mark.parametrize("evil", [EVIL, IMAGE, CLICK, FETCH])
def test_an_answer_can_not_run_or_fetch_anything(evil, serve, visit, tmp_path):
    folder = save_parrot(tmp_path / "evil", f"x{evil}y", one_token=True)
    address, models = serve("fox", str(folder))
    browser = visit(address, performance=True)
    browser.ask("hello" + evil)
    browser.until(browser.can_vote)
    time.sleep(1)
    assert browser.driver.execute_script("return window.hit") is None
    assert not browser.all(".chat script, .chat [onerror], .chat [href^=javascript]")
    events = [json.loads(e["message"])["message"] for e in browser.driver.get_log("performance")]
    refused = {e["params"]["requestId"] for e in events if e["params"].get("blockedReason") == "csp"}
    sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
    left = [p["request"]["url"] for p in sent if p["requestId"] not in refused]
    assert {url.split("/")[2] for url in left if url.startswith("http")} == {address.split("/")[2]}
    assert browser.answers(1)[0].startswith("x")


def test_a_prompt_of_20000_characters_gets_a_message(serve, visit):
    address, _ = serve("fox", "house")
    browser = visit(address)
    browser.driver.execute_script(
        "const box = document.querySelector('#prompt textarea'); box.value = 'x'.repeat(20000);"
        "box.dispatchEvent(new Event('input', {bubbles: true}));"
    )
    browser.click("#send")
    browser.until(lambda: "The prompt has 20,000 characters; at most 10,000 are read" in browser.text("#notice"))
    assert len(browser.find("#prompt textarea").get_attribute("value")) == 20_000, "what was typed is not lost"
    assert not browser.answers(0)
    browser.find("#prompt textarea").clear()
    browser.ask("hello")
    browser.until(browser.can_vote)
    assert browser.answers(0)[0].startswith(FOX)


def test_two_clients_at_once_keep_their_own_conversations(serve, visit, slowly):
    address, _ = serve("fox", "house")
    one, two = visit(address), visit(address)
    one.ask("first visitor")
    two.ask("second visitor")
    one.until(lambda: len(one.answers(0)[-1]) > 3 and len(two.answers(0)[-1]) > 3 and not one.can_vote())
    one.until(one.can_vote)
    two.until(two.can_vote)
    assert "first visitor" in one.text("#chat-0") and "second visitor" not in one.text("#chat-0")
    assert "second visitor" in two.text("#chat-1") and "first visitor" not in two.text("#chat-1")
    assert one.answers(0)[0].startswith(FOX) and two.answers(1)[0].startswith(HOUSE)


def test_a_visitor_who_has_to_wait_is_told(serve, visit, slowly, tmp_path):
    save_parrot(tmp_path / "endless", "a small red house", then_stop=False)
    address, _ = serve("fox", str(tmp_path / "endless"), sampling=SamplingArguments(max_new_tokens=450))
    slowly.hold_after = 40  # however slow the machine is, the answers before have not ended when the last one asks
    visitors = [visit(address) for _ in range(chat_page.VISITORS_AT_ONCE + 1)]
    for browser in visitors[:-1]:
        browser.ask("hello")
        browser.until(lambda browser=browser: len(browser.answers(1)[-1]) > 20)
    last = visitors[-1]
    last.ask("hello")
    last.until(lambda: "2 other visitors are being answered" in last.text("#notice"))
    visitors[0].click("#stop")
    last.until(lambda: last.answers(0)[0].startswith(FOX) and "other visitors" not in last.text("body"))
    assert not any("other visitors" in browser.text("body") for browser in visitors)


def test_stop_and_a_closed_tab_end_the_work(serve, visit, slowly, tmp_path):
    save_parrot(tmp_path / "endless", "a small red house", then_stop=False)
    address, _ = serve("fox", str(tmp_path / "endless"))
    browser = visit(address)
    browser.ask("hello")
    browser.until(lambda: len(browser.answers(1)[-1]) > 20)
    browser.click("#stop")
    browser.until(lambda: "stopped" in browser.answers(1)[-1] and browser.find("#send").is_displayed())
    assert not browser.can_vote()
    browser.ask("once more")
    browser.until(lambda: len(browser.answers(1)) == 2 and len(browser.answers(1)[-1]) > 20)
    browser.driver.get("about:blank")
    time.sleep(2)
    tokens = slowly.tokens
    time.sleep(2)
    assert slowly.tokens == tokens, "the models go on without a reader"


def test_one_model_is_a_plain_chat_page(serve, visit):
    address, _ = serve("fox")
    browser = visit(address)
    assert browser.text("#heading-0") == "Alpha" and not browser.all("#vote-0")
    browser.ask("hello")
    browser.until(lambda: "tokens/s" in browser.answers(0)[0])
    browser.ask("again")
    browser.until(lambda: len(browser.answers(0)) == 2 and "tokens/s" in browser.answers(0)[1])


SIZES = pytest.mark.parametrize("size", [PHONE, (1280, 900)], ids=["phone", "desktop"])
ONE_SIZE = pytest.mark.parametrize(  # what a size changes is seen in the two tests above all
    "size", [PHONE, pytest.param((1280, 900), marks=pytest.mark.slow)], ids=["phone", "desktop"]
)
TYPED = "<div class='a'> and <b>x</b> *stars* &amp; `c`\n    <i>four spaces</i>"


@SIZES
def test_the_prompt_is_in_sight_and_nothing_sticks_out(size, serve, visit):
    address, _ = serve("fox", "house")
    browser = visit(address, size=size)
    box = "const b = document.querySelector('#prompt textarea').getBoundingClientRect(); return [b.top, b.bottom]"
    for _ in range(2):
        top, bottom = browser.js(box)
        assert 0 < top < bottom <= size[1], "the prompt is in sight before and after an answer"
        assert browser.js("return document.documentElement.scrollWidth") <= browser.js("return innerWidth")
        browser.ask("hello")
        browser.until(browser.can_vote)
    left = "return document.querySelector('#chat-1').getBoundingClientRect().left"
    if size == PHONE:
        assert browser.js(left) > 300, "one model at a time"
        browser.js("document.querySelector('#columns').scrollTo(1000, 0)")  # as a swipe does
        assert browser.until(lambda: 0 <= browser.js(left) < 100)
    else:
        assert browser.js(left) < 700


@SIZES
def test_what_is_typed_and_answered_is_shown_as_it_is(size, serve, visit, tmp_path):
    said = "x <b>bold</b> `<i>code</i>` y"
    folder = save_parrot(tmp_path / "tags", said, one_token=True)
    address, _ = serve("fox", str(folder))
    browser = visit(address, size=size)
    browser.js("const b = document.querySelector('#prompt textarea'); b.value = arguments[0];"
               "b.dispatchEvent(new Event('input', {bubbles: true}))", TYPED)  # fmt: skip
    browser.click("#send")
    browser.until(browser.can_vote)
    assert browser.js("return document.querySelector('#chat-0 .typed').textContent") == TYPED
    answer = browser.js("return document.querySelector('#chat-1 .bot-row .md').textContent")
    assert answer.replace(chat_page.JOINER, "").strip() == "x <b>bold</b> <i>code</i> y"
    assert browser.js("return document.querySelector('#chat-1 .bot-row code').textContent") == "<i>code</i>"
    if size != PHONE:
        browser.click("#chat-1 .message-buttons-left button[title='Copy message']")
        browser.find("#prompt textarea").send_keys(Keys.CONTROL, "v")
        browser.until(lambda: browser.find("#prompt textarea").get_attribute("value") == said)


@ONE_SIZE
def test_one_can_scroll_up_clear_and_stop_while_answers_grow(size, serve, visit, slowly, tmp_path):
    save_parrot(tmp_path / "endless", "a small red house", then_stop=False)
    address, _ = serve("fox", str(tmp_path / "endless"), sampling=SamplingArguments(max_new_tokens=450))
    browser = visit(address, size=size)
    scroll = (
        "const all = [...document.querySelectorAll('#chat-1 *')].filter(e => e.scrollHeight > e.clientHeight + 60 &&"
        "getComputedStyle(e).overflowY !== 'visible'); return all[0]"
    )
    browser.ask("hello " * 300)
    grown = browser.until(lambda: browser.js(scroll) is not None and len(browser.answers(1)[-1]) > 60 and slowly.tokens)
    room = f"const e = (() => {{ {scroll} }})(); return e.scrollHeight - e.scrollTop - e.clientHeight"
    assert browser.until(lambda: browser.js(room) < 100) is True, "a growing answer is followed"
    browser.js(f"(() => {{ {scroll} }})().scrollTop = 0")
    browser.until(lambda: slowly.tokens > grown + 40)
    assert browser.js(f"return (() => {{ {scroll} }})().scrollTop") < 30, "the page does not pull one down again"
    browser.click("#clear")
    browser.until(lambda: not browser.answers(0) and not browser.answers(1) and browser.find("#send").is_displayed())
    tokens = slowly.tokens
    time.sleep(1)
    assert slowly.tokens <= tokens + 2 and not browser.answers(1)
    browser.ask("once more")
    browser.until(lambda: len(browser.answers(1)[-1]) > 20)
    browser.find("#prompt textarea").send_keys(Keys.ESCAPE)
    browser.until(lambda: "stopped" in browser.answers(1)[-1] and browser.find("#send").is_displayed())


@ONE_SIZE
def test_a_reload_keeps_the_conversation(size, serve, visit):
    address, _ = serve("fox", "house", blind=True)
    browser = visit(address, size=size)
    browser.ask("hello")
    browser.until(browser.can_vote)
    before = browser.answers(0)
    browser.driver.refresh()
    browser.until(lambda: browser.answers(0) == before and browser.can_vote())
    assert browser.text("#heading-0") == "A" and "Alpha" not in browser.driver.page_source
    other = visit(address)
    assert not other.answers(0), "another visitor has a conversation of their own"
    browser.click("#vote-0")
    browser.until(lambda: "Saved:" in browser.text("#notice"))


def test_keys_votes_and_what_can_be_taken_back(serve, visit, tmp_path):
    address, _ = serve("fox", "house")
    browser = visit(address)
    box = browser.find("#prompt textarea")
    browser.click("#export")
    browser.until(lambda: "nothing to export" in browser.text("#notice"))
    for prompt in ("first", "second"):
        browser.ask(prompt)
        browser.until(lambda prompt=prompt: browser.can_vote() and prompt in browser.text("#chat-0"))
    for wanted in ("second", "first", "first"):
        box.send_keys(Keys.ARROW_UP)
        browser.until(lambda wanted=wanted: box.get_attribute("value") == wanted)
    box.send_keys(Keys.ARROW_DOWN, Keys.ARROW_DOWN)
    browser.until(lambda: box.get_attribute("value") == "")
    focus = []
    for _ in range(6):
        browser.driver.switch_to.active_element.send_keys(Keys.TAB)
        focus.append(browser.js("return document.activeElement.id"))
    assert [name for name in focus if name.startswith("vote")] == ["vote-0", "vote-same", "vote-1"]
    assert focus.index("vote-0") < focus.index("retry"), "votes come before the rest"
    browser.click("#vote-1")
    browser.until(lambda: "Saved:" in browser.text("#notice"))
    assert len((tmp_path / "votes.jsonl").read_text().splitlines()) == 1
    browser.click("#edit")
    browser.until(lambda: "undo the vote first" in browser.text("#notice"))
    browser.click("#unvote")
    browser.until(lambda: "taken back" in browser.text("#notice") and browser.can_vote())
    assert (tmp_path / "votes.jsonl").read_text() == ""
    browser.click("#edit")
    browser.until(lambda: box.get_attribute("value") == "second" and len(browser.answers(0)) == 1)
    box.send_keys(" thoughts" + Keys.ENTER)
    browser.until(lambda: browser.can_vote() and "second thoughts" in browser.text("#chat-0"))


def test_a_duplicated_tab_votes_on_what_it_shows(serve, visit, tmp_path):
    address, _ = serve("fox", "house")
    browser = visit(address)
    browser.ask("hello")
    browser.until(browser.can_vote)
    browser.js("window.open(location.href)")  # takes the tab's own storage along, as "duplicate" does
    first, second = browser.until(lambda: len(browser.driver.window_handles) == 2 and browser.driver.window_handles)
    browser.driver.switch_to.window(second)
    browser.until(browser.can_vote)
    browser.driver.switch_to.window(first)
    browser.ask("and now?")
    browser.until(lambda: len(browser.answers(0)) == 2 and browser.can_vote())
    browser.driver.switch_to.window(second)
    browser.click("#vote-1")
    browser.until(lambda: "another tab" in browser.text("#notice") and len(browser.answers(0)) == 2)
    assert not (tmp_path / "votes.jsonl").exists()
    browser.click("#vote-1")
    browser.until(lambda: "Saved:" in browser.text("#notice"))


@ONE_SIZE
def test_a_server_that_is_gone_is_said_and_the_page_goes_on_when_it_is_back(size, chat_folders, visit, tmp_path):
    script = Path(gradio_chatbot.__file__)
    command = [sys.executable, str(script), "--path", f"Fox={chat_folders['fox']}", f"House={chat_folders['house']}"]
    command += ["--port", "18890", "--votes_path", str(tmp_path / "votes.jsonl"), "--dtype", "fp32"]

    def start():
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        while "open http" not in (line := process.stdout.readline()):
            assert line or process.poll() is None
        return process

    process = start()
    try:
        browser = visit("http://127.0.0.1:18890/", size=size)
        browser.ask("hello")
        browser.until(browser.can_vote)
        process.kill()
        process.wait()
        browser.until(lambda: "does not answer" in browser.text("#ask #gone"))
        browser.find("#prompt textarea").send_keys("typed meanwhile")
        process = start()
        browser.until(lambda: not browser.all("#gone") and not browser.answers(0))
        browser.until(lambda: browser.find("#prompt textarea").get_attribute("value") == "typed meanwhile")
        browser.find("#prompt textarea").send_keys(Keys.ENTER)
        browser.until(lambda: browser.can_vote() and browser.answers(0)[0].startswith(FOX))
    finally:
        process.kill()


def test_dark_mode_has_no_stray_panels(serve, visit):
    address, _ = serve("fox", "house")
    browser = visit(address)
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    browser.driver.refresh()
    browser.until(lambda: browser.js("return document.body.classList.contains('dark')"))
    stray = browser.js(
        "return [...document.querySelectorAll('#actions > *, #actions .block, #title, .heading, #columns, #ask')]"
        ".filter(e => !e.matches('button') && e.checkVisibility() &&"
        "getComputedStyle(e).backgroundColor !== 'rgba(0, 0, 0, 0)').map(e => e.outerHTML.slice(0, 200))"
    )
    assert not stray
