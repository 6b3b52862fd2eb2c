"""The ranking page in a real browser, on a desktop and on a phone; see browser.py for what it needs."""

import json
import time

import pytest

from tests.inference.browser import PHONE, Browser, By, Keys, needs_browser
from tests.inference.ranked import rows_of, write_answers
from training.utils.data.formats.columns import convert

pytestmark = [pytest.mark.slow, needs_browser]
SIZES = pytest.mark.parametrize("size", [PHONE, (1280, 800)], ids=["phone", "desktop"])
MARKUP = "<div class='a'><b>bold</b></div> <script>window.hit=1</script> & *stars*\n\n    code"


class Judge(Browser):
    """One judge."""

    def enter(self, name):
        self.find("#judge").clear()
        self.find("#judge").send_keys(name + Keys.ENTER)
        self.until(lambda: self.find("#work").is_displayed() or self.find("#done").is_displayed())
        return self

    def order(self):
        """Letters as they stand, tied ones in one text, by the alphabet: ["C", "AB"]."""
        found = {}
        for card in self.all(".card"):
            place = card.find_element(By.CSS_SELECTOR, ".place").text.rstrip("=")
            found[place] = found.get(place, "") + card.get_attribute("data-letter")
        return ["".join(sorted(letters)) for letters in found.values()]

    def texts(self):
        cards = {card.get_attribute("data-letter"): card for card in self.all(".card")}
        return {k: c.find_element(By.CSS_SELECTOR, ".text").get_attribute("textContent") for k, c in cards.items()}

    def prompt(self):
        return self.text("#prompt")

    def press(self, *keys):
        self.driver.switch_to.active_element.send_keys(*keys)

    def said(self):
        return self.find("#live").get_attribute("textContent")

    def overflow(self):
        """By how many pixels the page is wider than the screen, and what sticks out of it."""
        return self.js(
            "const wide = innerWidth; return [document.documentElement.scrollWidth - wide,"
            "[...document.querySelectorAll('main *:not(.skip)')].filter(e => e.checkVisibility() &&"
            "e.getBoundingClientRect().right > wide + 0.5).map(e => e.id || e.className)]"
        )


@pytest.fixture
def visit(visitors):
    return lambda server, name="ann", **options: visitors(Judge, server.address, **options).enter(name)


@pytest.fixture
def four(tmp_path):
    """A file with four answers to each of six prompts, one of them of markup."""
    file = write_answers(tmp_path / "a.jsonl", 6, ["SFT", "SFT", "DPO", "RLHF"])
    lines = rows_of(file)
    for line in lines:
        line["answers"][0]["response"] = MARKUP + f" {line['id']}"
        line["answers"][1]["response"] = "a long word " + "x" * 300
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def rankings(tmp_path, name="a"):
    return rows_of(tmp_path / f"{name}_rankings" / "rankings.jsonl")


def ranks_of(row):
    return {answer["response"]: answer["rank"] for answer in row["answers"]}


@SIZES
def test_order_ties_and_undo_by_keys(size, serve, visit, four, tmp_path):
    judge = visit(serve("--answers", four), size=size)
    assert judge.order() == ["A", "B", "C", "D"] and judge.prompt() == "Question 0?"
    texts = judge.texts()
    judge.press(Keys.ARROW_DOWN)
    judge.press(Keys.ARROW_DOWN)
    judge.press(Keys.SHIFT, Keys.ARROW_UP)
    judge.until(lambda: judge.order() == ["B", "A", "C", "D"])
    assert judge.until(lambda: judge.said() == "Answer B: place 1 of 4"), "a screen reader is told"
    judge.press("4")
    assert judge.order() == ["A", "C", "D", "B"]
    judge.press("=")
    judge.until(lambda: judge.order() == ["A", "C", "BD"] and "tied with D" in judge.said())
    judge.press("=")
    assert judge.order() == ["A", "C", "D", "B"]
    judge.press("=")
    judge.press(Keys.ENTER)
    judge.until(lambda: judge.prompt() == "Question 1?")
    [row] = rankings(tmp_path)
    assert ranks_of(row) == {texts["A"]: 1, texts["C"]: 2, texts["D"]: 3, texts["B"]: 3}
    assert len(convert(row)[1][0].pairs()) == 5, "six pairs, and one is a tie"
    judge.press("u")
    judge.until(lambda: judge.prompt() == "Question 0?" and judge.order() == ["A", "C", "BD"])
    assert not rankings(tmp_path)
    judge.press("b")
    judge.until(lambda: judge.prompt() == "Question 1?")
    judge.press("s")
    judge.until(lambda: judge.prompt() == "Question 2?")
    [row] = rankings(tmp_path)
    assert row["all_bad"] and set(ranks_of(row).values()) == {1}


def centre(judge, selector, share=0.5):
    """Where an element is on the screen; ``share`` of its height from its top."""
    box = judge.js("const b = document.querySelector(arguments[0]).getBoundingClientRect();"
                   "return [b.left + b.width / 2, b.top + b.height * arguments[1]]", selector, share)  # fmt: skip
    return [round(number) for number in box]


def drag(judge, letter, onto, share, touch):
    """Drag an answer by its dots to a place in another one, with the mouse or a finger."""
    start, end = centre(judge, f".card[data-letter={letter}] .grip"), centre(judge, f".card[data-letter={onto}]", share)
    way = [[start[0], round(start[1] + (end[1] - start[1]) * part / 5)] for part in range(1, 6)]
    if touch:
        for kind, at in [("touchStart", start), *(("touchMove", point) for point in way), ("touchEnd", None)]:
            points = [{"x": at[0], "y": at[1]}] if at else []
            judge.driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
        return
    for kind, at in [("mousePressed", start), *(("mouseMoved", point) for point in way), ("mouseReleased", end)]:
        event = {"type": kind, "x": at[0], "y": at[1], "button": "left", "buttons": 1, "clickCount": 1}
        judge.driver.execute_cdp_cmd("Input.dispatchMouseEvent", event)


@SIZES
def test_order_by_dragging_and_by_buttons(size, serve, visit, tmp_path):
    judge = visit(serve("--answers", write_answers(tmp_path / "a.jsonl", 2)), size=size)
    texts, touch = judge.texts(), size == PHONE
    drag(judge, "C", "A", 0.1, touch)
    judge.until(lambda: judge.order() == ["C", "A", "B"])
    drag(judge, "C", "B", 0.5, touch)
    judge.until(lambda: judge.order() == ["A", "BC"])
    drag(judge, "A", "C", 0.9, touch)
    judge.until(lambda: judge.order() == ["BC", "A"])
    drag(judge, "B", "A", 0.9, touch)
    judge.until(lambda: judge.order() == ["C", "A", "B"])
    judge.click(".card[data-letter=B] .up")
    assert judge.js("return document.activeElement.ariaLabel") == "Move answer B up", "the focus stays where it was"
    judge.click(".card[data-letter=A] .tie")
    assert judge.order() == ["C", "AB"]
    judge.click("#save")
    judge.until(lambda: judge.prompt() == "Question 1?")
    assert ranks_of(rankings(tmp_path)[0]) == {texts["C"]: 1, texts["A"]: 2, texts["B"]: 2}


def test_the_order_that_was_drawn_is_not_saved_by_mistake(serve, visit, four, tmp_path):
    judge = visit(serve("--answers", four))
    judge.press(Keys.ENTER)
    judge.until(lambda: "save once more" in judge.text("#problem"))
    assert not rankings(tmp_path)
    judge.press(Keys.ENTER)
    judge.until(lambda: judge.prompt() == "Question 1?")
    assert len(rankings(tmp_path)) == 1


@SIZES
def test_a_reload_in_the_middle_keeps_all_that_was_said(size, serve, visit, four, tmp_path):
    judge = visit(serve("--answers", four), size=size)
    judge.press("s")
    judge.until(lambda: judge.prompt() == "Question 1?")
    before = judge.texts()
    judge.click(".card[data-letter=C] .up")
    judge.click(".card[data-letter=C] .tie")
    judge.find("#note").send_keys("short")
    judge.find("#better").send_keys("My own\nwords b s u")
    judge.driver.refresh()
    judge.until(lambda: judge.prompt() == "Question 1?" and judge.order() == ["AC", "B", "D"])
    assert judge.texts() == before, "the same letters"
    assert judge.find("#better").get_attribute("value") == "My own\nwords b s u"
    judge.find("#better").send_keys(Keys.CONTROL, Keys.ENTER)
    judge.until(lambda: judge.prompt() == "Question 2?")
    assert judge.find("#note").get_attribute("value") == "", "and not for the next prompt"
    [row] = rankings(tmp_path)
    assert row["note"] == "short"
    [written] = rows_of(tmp_path / "a_rankings" / "demonstrations.jsonl")
    assert written["messages"][-1] == {"role": "assistant", "content": "My own\nwords b s u"}


def test_what_was_taken_back_survives_a_reload(serve, visit, four):
    judge = visit(serve("--answers", four))
    judge.click(".card[data-letter=C] .up")
    judge.find("#note").send_keys("short")
    judge.find("#better").send_keys("Mine.")
    judge.click("#save")
    judge.until(lambda: judge.prompt() == "Question 1?")
    judge.click("#undo")
    judge.until(lambda: judge.prompt() == "Question 0?" and judge.order() == ["A", "C", "B", "D"])
    judge.driver.refresh()
    judge.until(lambda: judge.prompt() == "Question 0?" and judge.order() == ["A", "C", "B", "D"])
    assert [judge.find(field).get_attribute("value") for field in ("#note", "#better")] == ["short", "Mine."]


def test_what_was_said_of_other_answers_is_not_taken_for_these(serve, visit, tmp_path):
    """A next round's answers to the same prompts, on the same port: neither a tab that is open nor what it has kept."""
    file = write_answers(tmp_path / "a.jsonl", 2)
    server = serve("--answers", file, "--output_dir", tmp_path / "one")
    judge = visit(server)
    judge.click(".card[data-letter=C] .up")
    judge.find("#note").send_keys("of round 1")
    server.kill()
    write_answers(file, 2, say="{model} says {i} {take} in round 2")
    serve("--answers", file, "--output_dir", tmp_path / "two", port=server.port)
    judge.click("#save")
    judge.until(lambda: "load the page again" in judge.text("#problem"))
    judge.driver.refresh()
    judge.until(lambda: "round 2" in judge.texts()["A"])
    assert judge.order() == ["A", "B", "C"] and not judge.find("#note").get_attribute("value")
    assert not rows_of(tmp_path / "two" / "rankings.jsonl")


def test_two_judges_at_once(serve, visit, four, tmp_path):
    server = serve("--answers", four)
    ann, bob = visit(server, "ann"), visit(server, "bob")
    assert {ann.prompt(), bob.prompt()} == {"Question 0?", "Question 1?"}
    for _ in range(3):
        for judge in (ann, bob):
            judge.press(Keys.ENTER)
            judge.until(lambda judge=judge: judge.text("#problem"))
            before = judge.prompt()
            judge.press(Keys.ENTER)
            judge.until(lambda judge=judge, before=before: judge.prompt() != before)
    rows = rankings(tmp_path)
    assert sorted(row["id"] for row in rows) == [f"p{i}" for i in range(6)]
    assert sorted(row["judge"] for row in rows) == ["ann"] * 3 + ["bob"] * 3
    for judge in (ann, bob):
        judge.until(lambda judge=judge: judge.find("#done").is_displayed())
    bob.click("#undo-done")
    bob.until(lambda: bob.find("#work").is_displayed())
    assert len(rankings(tmp_path)) == 5


@SIZES
def test_a_killed_server_is_told_and_nothing_is_lost(size, serve, visit, four, tmp_path):
    server = serve("--answers", four)
    judge = visit(server, size=size)
    judge.press("b")
    judge.until(lambda: judge.prompt() == "Question 1?")
    server.kill()
    judge.click(".card[data-letter=B] .up")
    judge.click("#save")
    judge.until(lambda: "does not answer" in judge.text("#problem"))
    assert judge.order() == ["B", "A", "C", "D"]
    server.start()
    judge.until(lambda: not judge.text("#problem") and "is back" in judge.said())
    judge.click("#save")
    judge.until(lambda: judge.prompt() == "Question 2?")
    assert [row["id"] for row in rankings(tmp_path)] == ["p0", "p1"]


@SIZES
def test_two_runs_against_each_other(size, serve, visit, tmp_path):
    write_answers(tmp_path / "a.jsonl", 4, ["SFT"], say="plain {i}")
    write_answers(tmp_path / "b.jsonl", 4, ["RLHF"], say="kind {i}")
    server = serve("--answers", tmp_path / "a.jsonl", "--against", tmp_path / "b.jsonl")
    judge = visit(server, size=size)
    for number in range(4):
        judge.until(lambda number=number: judge.prompt() == f"Question {number}?")
        kind = next(letter for letter, text in judge.texts().items() if text.startswith("kind"))
        if number < 2:
            judge.press(Keys.ARROW_LEFT if kind == "A" else Keys.ARROW_RIGHT)
        elif number == 2:
            judge.click("#same")
        else:
            judge.click("#left" if kind == "A" else "#right")
        if number == 0:
            judge.until(lambda: judge.prompt() == "Question 1?")
            judge.press("u")
            judge.until(lambda kind=kind: f"{kind} is better" in judge.text("#how"))
            judge.press(Keys.ARROW_LEFT if kind == "A" else Keys.ARROW_RIGHT)
    judge.until(lambda: judge.find("#done").is_displayed())
    judge.click("#show-results")
    judge.until(lambda: judge.text("#found td"))
    cells = [cell.text for cell in judge.all("#found td")]
    assert cells == ["RLHF", "SFT", "87.5%", "39.6% to 98.7%", "25.0%", "4"], cells
    rows = rankings(tmp_path, "a_against_b")
    assert [len(row["answers"]) for row in rows] == [2] * 4
    judge.click("#exports a")
    exported = judge.until(lambda: next(iter(tmp_path.glob("rankings*.jsonl")), None))
    assert judge.until(lambda: rows_of(exported) == rows)


@SIZES
@pytest.mark.parametrize("against", [False, True], ids=["all", "two"])
def test_nothing_sticks_out_and_markup_is_text(size, against, serve, visit, four, tmp_path):
    flags = []
    if against:
        lines = rows_of(four)
        for name, take in (("x", 0), ("y", 1)):
            rows = [line | {"answers": [line["answers"][take] | {"model": name}]} for line in lines]
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        flags = ["--answers", tmp_path / "x.jsonl", "--against", tmp_path / "y.jsonl"]
    judge = visit(serve(*(flags or ["--answers", four])), size=size)
    judge.find("#note").send_keys("n")
    assert judge.js("return innerWidth") == size[0] or size != PHONE
    assert judge.overflow() == [0, []]
    assert f"{MARKUP} p0" in judge.texts().values()
    assert judge.js("return window.hit") is None and not judge.all(".text *")
    judge.js("document.body.style.height = '3000px'; scrollTo(0, 300)")
    seen = judge.js(
        "const b = document.querySelector('#actions').getBoundingClientRect(); return b.bottom <= innerHeight"
    )
    assert seen, "the buttons stay in sight"
    logs = [entry for entry in judge.driver.get_log("browser") if entry["level"] == "SEVERE"]
    assert not logs, logs


def test_the_page_is_usable_within_a_second(serve, visit, tmp_path):
    judge = visit(serve("--answers", write_answers(tmp_path / "a.jsonl", 500)), size=PHONE)
    seconds = []
    for _ in range(3):
        started = time.monotonic()
        judge.driver.refresh()
        judge.until(lambda: judge.find(".card").is_displayed())
        seconds.append(time.monotonic() - started)
    assert min(seconds) < 1, seconds


def test_for_a_screen_reader_and_the_keyboard(serve, visit, four):
    judge = visit(serve("--answers", four))
    nameless = judge.js(
        "return [...document.querySelectorAll('button, input, textarea, summary, progress')].filter("
        "e => e.checkVisibility() && !(e.ariaLabel || e.textContent.trim() || e.labels?.length)).map(e => e.outerHTML)"
    )
    assert not nameless
    assert judge.js("return document.activeElement.id") == "prompt-title", "reading begins at the prompt"
    order = []
    for _ in range(30):
        judge.press(Keys.TAB)
        order.append(judge.js("const e = document.activeElement; return e.id || e.dataset.letter || e.className"))
    wanted = ["A", "tie", "up", "down", "B", "C", "D", "save", "bad", "skip", "note", "better"]
    places = [order.index(name) for name in wanted]
    assert places == sorted(places), order
    judge.click("#help summary")
    judge.click("#shortcuts")
    judge.press("b")
    time.sleep(0.3)
    assert judge.prompt() == "Question 0?", "single keys can be switched off"
