"""Talk to a model in the terminal.

    python inference/chatbot.py                          the model that the latest run's step 3 has trained
    python inference/chatbot.py --path output/demo/step1 any other folder, hub name, GGUF file or LoRA adapter

Answers appear while they are written. Ctrl-C ends an answer, Ctrl-D or /quit the program; the arrow keys bring
earlier prompts back, those of earlier sessions, too. /help lists the commands.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import sys
import time
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.append(str(Path(__file__).resolve().parents[1]))  # outside the environment, to say so

from training.utils.arguments import flag, parse
from training.utils.errors import UserError, run_program
from training.utils.run.environment import check_environment
from training.utils.run.files import append_lines
from training.utils.run.folders import cache_dir

if TYPE_CHECKING:
    from chat_models import ChatModel
    from chat_stream import SamplingArguments

HELP = """\
/system TEXT   set the system message and start anew; without TEXT show it, "/system -" removes it
/reset         start a new conversation
/save FILE     write the conversation as one JSON line, a row that step 1 can train on
/retry         answer the last prompt again, with other random numbers
/set NAME V    change a sampling setting, such as /set temperature 0.5; without NAME list them
/seed N        set the seed of the next answers
/help          this list
/quit          leave (or Ctrl-D)
A line that ends with a backslash goes on in the next one; lines between two lines of \"\"\" are one prompt."""
QUOTES = '"' * 3
JOINERS = "\u200c\u200d"  # which Persian and Hindi words are written with, and pictures of several
HISTORY_FILE = "chat_history"  # in the cache folder
HISTORY_LINES = 1000


@dataclass
class ChatArguments:
    """Chat"""

    path: str = flag("", "folder, hub name, GGUF file or LoRA adapter (default: step3/actor of the latest run)")
    system: str = flag("", "a system message")
    history: bool = flag(True, "keep prompts for the arrow keys of later sessions; --no-history keeps none")


@dataclass
class Conversation:
    """What has been said; ``attempts`` makes every answer draw other random numbers under one seed."""

    system: str
    sampling: SamplingArguments
    messages: list[dict[str, str]] = field(default_factory=list)
    attempts: int = 0

    def restart(self) -> None:
        """A new conversation, whose answers draw what those of one that began so would."""
        self.messages.clear()
        self.attempts = 0
        print("(new conversation)")

    def with_system(self) -> list[dict[str, str]]:
        """The messages, the system message first if there is one."""
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.messages


def printable(text: str) -> str:
    """Text without control characters, so that an answer can not move the cursor or retitle the terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf") or c in JOINERS)


def command(line: str, chat: Conversation, model: ChatModel) -> bool:
    """Carry out a line that starts with a slash; False when it means to leave.

    Raises:
        UserError: an unknown command or a bad value; the conversation has not changed then.
    """
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name == "/quit":
        return False
    if name == "/help":
        print(HELP)
    elif name == "/reset":
        chat.restart()
    elif name == "/system":
        if rest:
            chat.system = "" if rest == "-" else rest
            chat.restart()
        print(f"system message: {chat.system or '(none)'}")
    elif name == "/seed":
        _set(f"seed {rest}", chat)
    elif name == "/set":
        _set(rest, chat)
    elif name == "/save":
        _save(rest, chat, model)
    else:
        raise UserError(f"unknown command {name}; /help lists them")
    return True


def _set(rest: str, chat: Conversation) -> None:
    """Change one sampling setting of the answers to come, or list them."""
    from chat_stream import checked_sampling

    settings = vars(chat.sampling)
    name, _, value = rest.replace("=", " ", 1).partition(" ")
    if not name:
        print("\n".join(f"{key} {settings[key]}" for key in settings))
        return
    if name not in settings:
        raise UserError(f"/set {name}: the settings are {', '.join(settings)}")
    chat.sampling = checked_sampling(list((settings | {name: value}).values()))
    if name == "seed":
        chat.attempts = 0
    print(f"({name} {getattr(chat.sampling, name)})")


def _save(name: str, chat: Conversation, model: ChatModel) -> None:
    from chat_stream import untrainable

    if not name:
        raise UserError("/save needs a file name")
    if not chat.messages:
        raise UserError("there is nothing to save yet")
    file, said = Path(name).expanduser(), chat.with_system()
    if token := untrainable(said, [model]):
        raise UserError(f"the conversation holds {token}, which training takes for a token of its own: it is not saved")
    try:
        append_lines(file, [{"messages": said}])
    except OSError as error:
        raise UserError(f"{file} can not be written: {error.strerror}") from error
    print(f"(saved to {file})")


def answer(chat: Conversation, prompt: str, model: ChatModel) -> None:
    """Stream one answer to the terminal and add it to the conversation; Ctrl-C keeps what is there.

    Args:
        chat: gets the prompt and the answer, or neither if the prompt does not fit.
        prompt: not empty.
        model: who answers.
    """
    from chat_stream import stream_answer

    print(f"{model.name}> ", end="", flush=True)
    chat.attempts += 1
    sampling = dataclasses.replace(chat.sampling, seed=(chat.sampling.seed + chat.attempts - 1) % 2**31)
    messages = [*chat.with_system(), {"role": "user", "content": prompt}]
    shown, last, started = "", None, time.monotonic()
    try:
        for last in stream_answer(model, messages, sampling):
            reasoning, said = last.parts
            text = printable(f"(reasoning) {reasoning}" + (f"\n\n{said}" if said else "") if reasoning else said)
            if text.startswith(shown):  # a tokenizer may change its mind about the last character
                sys.stdout.write(text[len(shown) :])
                sys.stdout.flush()
                shown = text
    except KeyboardInterrupt:
        if last is None:
            print("\n(stopped)")
            return
        last.ended = "cancelled"
    assert last is not None
    print()
    limit = f"--max_new_tokens {sampling.max_new_tokens}"
    if len(last.token_ids) < sampling.max_new_tokens:
        limit = f"the model's context, {model.context:,} tokens"
    notes = {"length": f"cut at {limit}", "cancelled": "stopped"}
    parts = [f"{len(last.token_ids)} tokens", f"{time.monotonic() - started:.1f} s"]
    parts += [notes[last.ended]] if last.ended in notes else []
    parts += [f"the oldest {last.dropped} messages no longer fit"] if last.dropped else []
    print(f"({', '.join(parts)})")
    chat.messages += [{"role": "user", "content": prompt}, last.message]


def retry(chat: Conversation, model: ChatModel) -> None:
    """Answer the last prompt again; where that gives nothing, the answer of before stays.

    Raises:
        UserError: nothing has been said.
    """
    if not chat.messages:
        raise UserError("there is nothing to retry yet")
    last = chat.messages[-2:]
    del chat.messages[-2:]
    count = len(chat.messages)
    try:
        answer(chat, last[0]["content"], model)
    finally:
        if len(chat.messages) == count:
            chat.messages += last


def read_prompt(interactive: bool) -> tuple[str, bool]:
    """One prompt or command, several lines that belong together, see `HELP`, as one; whether it may be a command.

    Raises:
        EOFError, KeyboardInterrupt: as ``input`` does.
    """
    more = "...> " if interactive else ""
    lines = [input("\nyou> " if interactive else "")]
    if lines[0].strip() == QUOTES:
        lines = []
        while (line := input(more)).strip() != QUOTES:
            lines.append(line)
        return "\n".join(lines).strip(), False
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input(more))
    text = "\n".join(lines).strip()
    return text, text.startswith("/")


@contextlib.contextmanager
def line_editing(keep: bool) -> Iterator[None]:
    """Arrow keys, and with ``keep`` the prompts of earlier sessions, in a file that this user alone can read."""
    try:
        readline = importlib.import_module("readline")  # its import alone gives input() arrow keys and a history
    except ImportError:
        print("(this Python has no readline: no history with the arrow keys)")
        yield
        return
    file = cache_dir() / HISTORY_FILE
    if not keep:
        yield
        return
    with contextlib.suppress(OSError):  # none yet, or not to be read: a chat goes on without it
        readline.read_history_file(file)
    before = readline.get_current_history_length()
    try:
        yield
    finally:
        new = readline.get_current_history_length() - before
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch(mode=0o600)
            readline.set_history_length(HISTORY_LINES)
            readline.append_history_file(max(new, 0), file)
        except OSError as error:
            print(f"(prompts are not kept for later: {file}: {error.strerror})")


def chat_loop(model: ChatModel, sampling: SamplingArguments, system: str, keep: bool = False) -> None:
    """Read prompts and commands until the end of the input; a mistake costs one line, never the conversation.

    Args:
        model: who answers.
        sampling: how, at first.
        system: a system message, or nothing.
        keep: the history of prompts is kept for later sessions.
    """
    chat = Conversation(system, sampling)
    interactive = sys.stdin.isatty()
    with line_editing(keep) if interactive else contextlib.nullcontext():
        while True:
            try:
                line, commands = read_prompt(interactive)
            except EOFError:
                print()
                return
            except UnicodeDecodeError:
                print("(that line is no UTF-8: it was not read)")
                continue
            except KeyboardInterrupt:
                print("\n(/quit or Ctrl-D leaves)")
                continue
            if not line:
                continue
            try:
                if not commands:
                    answer(chat, line, model)
                elif line == "/retry":
                    retry(chat, model)
                elif not command(line, chat, model):
                    return
            except UserError as error:
                print(f"({error})")
            except KeyboardInterrupt:  # a second one, while the first ended an answer
                print("\n(stopped)")
            except Exception as error:  # out of memory, for example: what was said before is still there
                said = " ".join(str(error).split())
                print(f"\n({type(error).__name__}: {said[:300]}; the conversation is as before)")


def main(argv: Sequence[str]) -> int:
    """Parse, load, chat; 0 when the user leaves."""
    # Heavy imports come after the flags have been checked, so --help and mistakes answer at once.
    from chat_arguments import LoadArguments, SamplingArguments, check_loading, check_path, latest_models

    chat, sampling, load = parse(
        [ChatArguments, SamplingArguments, LoadArguments], argv, prog="chatbot.py", description=__doc__ or ""
    )
    path = chat.path or list(latest_models()[0].values())[-1]
    check_path(path, "--path")
    check_loading(load)
    print("starting ...", flush=True)
    from chat_models import load_chat_models

    [model] = load_chat_models({Path(path).name or path: path}, load, print)
    print("/help lists the commands")
    chat_loop(model, sampling, chat.system, chat.history)
    return 0


if __name__ == "__main__":
    check_environment()
    raise SystemExit(run_program(main))
