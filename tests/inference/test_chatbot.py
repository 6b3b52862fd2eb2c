import json
import os
import pty
import select
import subprocess
import sys
import time

import chat_stream
import chatbot
import pytest
from chat_reasoning import marks_of
from transformers import AutoTokenizer

from tests.inference.conftest import INFERENCE
from tests.inference.tiny_chat import save_parrot
from training.utils.errors import run_program
from training.utils.run.folders import python_path

FOX = "the quick brown fox jumps!"


@pytest.fixture
def type_in(monkeypatch, capsys):
    """``type_in(lines, *flags)`` runs the program on these lines; gives its exit code and what it printed."""

    def _run(lines, *flags):
        pending = iter(lines)

        def read(prompt=""):
            line = next(pending, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", read)
        code = run_program(chatbot.main, list(flags))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return _run


def test_a_conversation_of_two_turns_with_history(type_in, chat_folders, tmp_path):
    save = tmp_path / "talk.jsonl"
    save.write_text('{"messages": []}')  # as editors leave a last line
    lines = ["hello", "again", f"/save {save}", "/reset", "new", f"/save {save}"]
    code, out, _ = type_in(lines, "--path", str(chat_folders["fox"]), "--system", "be kind")
    assert code == 0 and out.count(f"fox> {FOX}") == 3
    _, first, second = (json.loads(line)["messages"] for line in save.read_text().splitlines())
    assert [m["content"] for m in first] == ["be kind", "hello", FOX, "again", FOX]
    assert [m["content"] for m in second] == ["be kind", "new", FOX]


@pytest.fixture
def seen(monkeypatch):
    """What the model was asked: the contents of the messages, and the sampling."""
    found = []
    stream = chat_stream.stream_answer

    def spy(model, messages, sampling):
        found.append(([m["content"] for m in messages], sampling))
        return stream(model, messages, sampling)

    monkeypatch.setattr(chat_stream, "stream_answer", spy)
    return found


def test_the_model_sees_the_history_and_the_system_message(type_in, chat_folders, seen):
    lines = ["one", "/seed 9", "two", "/system be brief", "three", "/system -", "four", "five"]
    lines += ["/reset", "six", "/set seed 9", "seven"]
    type_in(lines, "--path", str(chat_folders["fox"]), "--temperature", "0.3", "--top_k", "4", "--seed", "3")
    assert [m for m, _ in seen] == [["one"], ["one", FOX, "two"], ["be brief", "three"], ["four"],
                                      ["four", FOX, "five"], ["six"], ["six", FOX, "seven"]]  # fmt: skip
    assert [s.seed for _, s in seen] == [3, 9, 9, 9, 10, 9, 9], "one seed and conversation, one answer"
    assert all(s.temperature == 0.3 and s.top_k == 4 for _, s in seen)


def test_commands(type_in, chat_folders, tmp_path):
    lines = [
        "/help", "/system", "/seed x", "/seed 99999999999", "/save", "/save a", "/nonsense", "", "   ", "hello",
        f"/save {tmp_path}/no/such/folder/x", "/quit", "never read",
    ]  # fmt: skip
    code, out, _ = type_in(lines, "--path", str(chat_folders["fox"]))
    assert code == 0 and out.count(FOX) == 1
    for said in ("/save FILE", "system message: (none)", "/save needs", "nothing to save", "unknown command /nonsense"):
        assert said in out
    for said in ("seed must be a number", "seed must be at least 0 and at most", "can not be written"):
        assert said in out


def test_a_prompt_between_quotes_is_never_a_command(type_in, chat_folders, seen):
    type_in(['"""', "/quit", "what does this do?", '"""', '"""', "/retry", '"""'], "--path", str(chat_folders["fox"]))
    assert [m[-1] for m, _ in seen] == ["/quit\nwhat does this do?", "/retry"]


def test_a_row_that_training_would_refuse_is_not_saved(type_in, chat_folders, tmp_path):
    save = tmp_path / "talk.jsonl"
    lines = ["what is <|im_end|>?", f"/save {save}", "/reset", "hello", f"/save {save}"]
    code, out, _ = type_in(lines, "--path", str(chat_folders["fox"]))
    assert code == 0 and "holds <|im_end|>" in out and len(save.read_text().splitlines()) == 1


def test_ctrl_c_ends_the_answer_and_not_the_chat(type_in, chat_folders, monkeypatch, tmp_path):
    stream = chat_stream.stream_answer

    def interrupted(model, messages, sampling):
        for count, answer in enumerate(stream(model, messages, sampling)):
            if count == stops_after:
                raise KeyboardInterrupt
            yield answer

    monkeypatch.setattr(chat_stream, "stream_answer", interrupted)
    stops_after = 3
    lines = ["hello", f"/save {tmp_path}/talk", KeyboardInterrupt(), "again"]
    code, out, _ = type_in(lines, "--path", str(chat_folders["fox"]))
    assert code == 0 and out.count("stopped") == 2 and "Ctrl-D leaves" in out
    part = json.loads((tmp_path / "talk").read_text())["messages"][1]["content"]
    assert part and FOX.startswith(part) and part != FOX
    stops_after = 0  # before the first token
    code, out, _ = type_in(["hello", "/save x"], "--path", str(chat_folders["fox"]))
    assert code == 0 and "(stopped)" in out and "nothing to save" in out


@pytest.mark.parametrize("error", [RuntimeError("out of\nmemory"), KeyboardInterrupt()])
def test_what_breaks_an_answer_does_not_end_the_chat(error, type_in, chat_folders, monkeypatch, tmp_path):
    """A second Ctrl-C, while the first one ends an answer, too."""
    answer, save = chatbot.answer, tmp_path / "talk.jsonl"

    def breaks(chat, prompt, model):
        if prompt == "too much":
            raise error
        answer(chat, prompt, model)

    monkeypatch.setattr(chatbot, "answer", breaks)
    code, out, err = type_in(["hello", "too much", "again", f"/save {save}"], "--path", str(chat_folders["fox"]))
    assert code == 0 and not err
    assert ("(stopped)" if isinstance(error, KeyboardInterrupt) else "(RuntimeError: out of memory;") in out
    assert [m["content"] for m in json.loads(save.read_text())["messages"]] == ["hello", FOX, "again", FOX]


def test_answers_can_not_command_the_terminal(type_in, tmp_path):
    save_parrot(tmp_path / "evil", "a\x1b[2J\x07é\u202eb")
    code, out, _ = type_in(["hello"], "--path", str(tmp_path / "evil"))
    assert code == 0 and "a[2Jéb\n" in out
    assert "\x1b" not in out and "\x07" not in out and "\u202e" not in out


def test_words_and_pictures_that_are_joined_stay_whole():
    for text in ("\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "\U0001f469\u200d\U0001f33e"):
        assert chatbot.printable(text) == text


def test_a_cut_answer_is_said(type_in, chat_folders):
    _, out, _ = type_in(["hello"], "--path", str(chat_folders["fox"]), "--max_new_tokens", "2")
    assert "cut at --max_new_tokens 2" in out
    tokenizer = AutoTokenizer.from_pretrained(chat_folders["fox"])
    around = tokenizer.apply_chat_template([{"role": "user", "content": ""}], add_generation_prompt=True)["input_ids"]
    _, out, _ = type_in(["~" * (510 - len(around))], "--path", str(chat_folders["fox"]), "--max_new_tokens", "99")
    assert "(2 tokens" in out and "cut at the model's context, 512 tokens" in out


def test_a_prompt_that_does_not_fit_is_said_and_forgotten(type_in, chat_folders):
    code, out, _ = type_in(["story " * 2000, "hello"], "--path", str(chat_folders["fox"]))
    assert code == 0 and "the model reads at most" in out and FOX in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--path", "/nowhere"], "--path /nowhere: no such folder"),
        ([], "name models with --path"),
        (["--temprature", "1"], "did you mean --temperature?"),
        (["--temperature", "-1"], "--temperature"),
        (["--top_p", "0"], "--top_p"),
        (["--quantize", "int3"], "--quantize"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(flags, message, type_in):
    code, _, err = type_in([], *flags)
    assert code == 2 and message in err and err.count("\n") == 1


class Screen:
    """Reads what a program writes to a terminal; what follows an awaited text stays for the next one."""

    def __init__(self, terminal):
        self.terminal, self.unread = terminal, ""

    def until(self, text, seconds=90):
        end = time.monotonic() + seconds
        while text not in self.unread:
            assert time.monotonic() < end, self.unread
            if select.select([self.terminal], [], [], 0.2)[0]:
                self.unread += os.read(self.terminal, 4096).decode(errors="replace")
        self.unread = self.unread.split(text, 1)[1]


def test_arrow_keys_bring_earlier_prompts_back_in_a_real_terminal(chat_folders):
    pytest.importorskip("readline")
    terminal, inner = pty.openpty()
    screen = Screen(terminal)
    command = [sys.executable, str(INFERENCE / "chatbot.py"), "--path", str(chat_folders["fox"])]
    environment = os.environ | {"PYTHONPATH": python_path(), "TERM": "xterm"}
    program = subprocess.Popen(command, stdin=inner, stdout=inner, stderr=inner, env=environment, cwd="/")
    try:
        screen.until("you> ")
        os.write(terminal, b"first words\n")
        screen.until(FOX)
        screen.until("you> ")
        os.write(terminal, b"\x1b[A")
        screen.until("first words")
        os.write(terminal, b"\n")
        screen.until(FOX)
        screen.until("you> ")
        os.write(terminal, b"\x04")  # Ctrl-D
        assert program.wait(20) == 0
    finally:
        program.kill()
        os.close(terminal)
        os.close(inner)


def test_reasoning_comes_first_and_is_said(type_in, chat_folders, monkeypatch):
    def thinking(model, messages, sampling):
        ids = model.tokenizer.encode("<think>\nSmall or red?\n</think>\n\nRed.", add_special_tokens=False)
        for count in range(len(ids)):
            yield chat_stream.Answer(model.tokenizer, ids[: count + 1], "", marks=marks_of(model.tokenizer))
        yield chat_stream.Answer(model.tokenizer, ids, "stop", marks=marks_of(model.tokenizer))

    monkeypatch.setattr(chat_stream, "stream_answer", thinking)
    code, out, _ = type_in(["which?"], "--path", str(chat_folders["fox"]))
    assert code == 0 and "fox> (reasoning) Small or red?\n\nRed.\n" in out


def test_retry_settings_and_prompts_of_several_lines(type_in, chat_folders, seen):
    lines = [
        "/retry", "one \\", "two", "/retry", "/set temperature 0.5", "/set top_k=7", "/set",
        '"""', "a", "", "  b", '"""', "/set temperature 9", "/set warmth 1", "/set top_p much", "last",
    ]  # fmt: skip
    code, out, _ = type_in(lines, "--path", str(chat_folders["fox"]), "--seed", "3")
    assert code == 0 and "nothing to retry" in out
    assert [m for m, _ in seen] == [
        ["one \ntwo"],
        ["one \ntwo"],
        ["one \ntwo", FOX, "a\n\n  b"],
        ["one \ntwo", FOX, "a\n\n  b", FOX, "last"],
    ]
    assert [(s.seed, s.temperature, s.top_k) for _, s in seen] == [(3, 0.7, 0), (4, 0.7, 0), (5, 0.5, 7), (6, 0.5, 7)]
    assert "temperature 0.5\ntop_p 0.9\ntop_k 7" in out
    for said in ("temperature must be at least 0", "/set warmth: the settings are max_new_tokens", "must be a number"):
        assert said in out


def test_a_retry_that_is_stopped_at_once_keeps_the_answer_of_before(load):
    [model] = load("fox")
    chat = chatbot.Conversation("", chat_stream.SamplingArguments())
    chatbot.answer(chat, "hello", model)
    before = list(chat.messages)

    def stopped(*arguments):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_stream, "stream_answer", stopped)
        chatbot.retry(chat, model)
    assert chat.messages == before


@pytest.mark.parametrize("flags", [[], ["--no-history"]])
def test_prompts_of_an_earlier_session_come_back(flags, tmp_path):
    """With a terminal: the history of readline, in a file of this user alone."""
    script = (
        f"import sys; sys.path[:0] = [{str(INFERENCE)!r}]; import chatbot, types\n"
        "chatbot.answer = lambda chat, prompt, model: print('asked', repr(prompt))\n"
        f"chatbot.chat_loop(types.SimpleNamespace(name='m'), None, '', keep={not flags})\n"
    )

    def session(keys):
        master, slave = pty.openpty()
        environment = os.environ | {"TRIPOD_CACHE": str(tmp_path / "cache")}
        process = subprocess.Popen(
            [sys.executable, "-c", script], stdin=slave, stdout=slave, stderr=slave, env=environment
        )
        os.close(slave)
        said = b""
        for key in keys:
            end = time.monotonic() + 60
            while not said.rstrip().endswith(b"you>") and time.monotonic() < end:
                if select.select([master], [], [], 0.2)[0]:
                    said += os.read(master, 4096)
            os.write(master, key)
            said += b" "
            time.sleep(0.1)
        end = time.monotonic() + 60
        while time.monotonic() < end:  # what it wrote last is still there when it has ended
            if select.select([master], [], [], 0.2)[0]:
                try:
                    said += os.read(master, 4096)
                except OSError:
                    break
        assert process.wait(60) == 0
        os.close(master)
        return said.decode()

    assert "asked 'first one'" in session([b"first one\n", b"/quit\n"])
    file = tmp_path / "cache" / chatbot.HISTORY_FILE
    assert file.exists() == (not flags)
    if not flags:
        assert file.stat().st_mode & 0o077 == 0
        assert "asked 'first one'" in session([b"\x1b[A\x1b[A\n", b"/quit\n"]), "two lines up: /quit, and the prompt"
