"""Files of answers and of judgements, a JSON line for each prompt, and how a program writes them that may be killed.

`inference/generate.py` writes answers, `inference/judge.py` and people put them in an order. A line of answers has
``id`` (of the prompt), ``prompt`` (messages), ``answers`` (each ``model``, ``response``, ``tokens``, ``finished``),
``source``, ``row`` (as it stood in its file) and, where the data have one, ``reference``. A line of rankings has a
``rank`` in each answer, 1 the best, and ``judge``: steps 2 and DPO read it as it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from training.utils.errors import UserError, half_character
from training.utils.run.files import append_whole, json_line, once_each, whole_file, write_json
from training.utils.run.folders import locked, make_dir, shown

SETTINGS_FILE = "settings.json"
Line = dict[str, Any]


def prompt_id(messages: Sequence[Mapping[str, Any]]) -> str:
    """A name for a prompt, from its turns alone: the same in every file, 16 hexadecimal digits."""
    text = json.dumps(list(messages), ensure_ascii=True, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_answers(path: str | Path, flag: str, at_least: int = 2) -> list[Line]:
    """The lines of a file of answers, checked: a dict for each prompt, with its ``id``; ``flag`` is named in messages.

    Raises:
        UserError: no such file, a line that is none (with its number), fewer answers than ``at_least``, or one prompt
            twice.
    """
    lines: list[Line] = []
    seen: dict[str, int] = {}
    for number, line in _json_lines(Path(path).expanduser(), flag):
        where = f"{flag} {path}:{number}"
        _check_answers(line, where, at_least)
        line.setdefault("id", prompt_id(line["prompt"]))
        if not isinstance(line["id"], str):
            raise UserError(f"{where}: id is {line['id']!r}, it must be a text")
        if line["id"] in seen:
            raise UserError(f"{where}: the id {line['id']} stands in line {seen[line['id']]} too; each prompt once")
        seen[line["id"]] = number
        lines.append(line)
    if not lines:
        raise UserError(f"{flag} {path}: no line with answers in it")
    return lines


def _json_lines(path: Path, flag: str) -> Iterator[tuple[int, Any]]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UserError(f"{flag} {path}: {reason}") from None
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line, object_pairs_hook=once_each)
            except (json.JSONDecodeError, RecursionError):
                raise UserError(f"{flag} {path}:{number}: not JSON: {line[:60]!r}") from None
            except ValueError as error:  # of once_each
                raise UserError(f"{flag} {path}:{number}: {error}") from None


def _check_answers(line: Any, where: str, at_least: int) -> None:
    if not isinstance(line, dict) or not isinstance(line.get("prompt"), (list, str)) or not line["prompt"]:
        raise UserError(f"{where}: no prompt; a line is as inference/generate.py writes it")
    if isinstance(line["prompt"], str):
        line["prompt"] = [{"role": "user", "content": line["prompt"]}]
    if not all(isinstance(turn, dict) and isinstance(turn.get("content"), str) for turn in line["prompt"]):
        raise UserError(f"{where}: the prompt is no list of messages, each with a role and a content")
    answers = line["answers"] if "answers" in line else line.pop("responses", None)
    if isinstance(answers, list):
        line["answers"] = answers = [{"response": a} if isinstance(a, str) else a for a in answers]
    if not isinstance(answers, list) or not all(
        isinstance(answer, dict) and isinstance(answer.get("response"), str) for answer in answers
    ):
        raise UserError(f"{where}: no answers; a line is as inference/generate.py writes it")
    texts = [turn["content"] for turn in line["prompt"]] + [answer["response"] for answer in answers]
    if half := half_character("".join(texts)):
        raise UserError(f"{where}: the prompt or an answer holds half a character, {half}, which is no text")
    if len(answers) < at_least:
        raise UserError(
            f"{where}: {len(answers)} answer{'' if len(answers) == 1 else 's'}, and {at_least} are needed to compare "
            "them: --samples_per_prompt or a second --model of inference/generate.py"
        )


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSON lines file whole or not at all."""
    with whole_file(path) as file:
        file.writelines((json_line(line) + "\n").encode() for line in lines)


class PartFile:
    """A JSON lines file in the making: what a program has written of it lies in ``NAME.parts``, line by line.

    A program that was killed reads `lines` and goes on with what is missing. Each rank appends to a part of its own; a
    line that was cut by the end of its process is no line. `finish` makes the file of them, whole or not at all.
    Beside it then lies ``NAME.settings``, what it was made with, in JSON.

    Args:
        settings: what its lines depend on; a start with other ones is refused.
    """

    def __init__(self, path: Path, flag: str, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.flag = flag
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.folder = path.with_name(path.name + ".parts")
        self.beside = path.with_name(path.name + ".settings")

    def is_finished(self) -> bool:
        """Whether the file is there, made with the same settings.

        Raises:
            UserError: it was made, or begun, with others.
        """
        if self.path.exists() and self.beside.is_file():
            self._check_same(self.beside, self.path)
        if self._has_lines() and (self.folder / SETTINGS_FILE).is_file():
            self._check_same(self.folder / SETTINGS_FILE, self.folder)
        if self.path.exists() and not self.beside.is_file():
            raise UserError(f"{self.flag} {self.path}: there is such a file, and nothing says that it was made here; "
                            "name another one")  # fmt: skip
        return self.path.exists()

    def _has_lines(self) -> bool:
        return any(part.stat().st_size for part in self.folder.glob("*.jsonl"))

    def _check_same(self, file: Path, what: Path) -> None:
        try:
            before = json.loads(file.read_text(encoding="utf-8"))["settings"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{file} is damaged: remove {shown(what)}, or name another {self.flag}") from None
        if changed := _difference(before, self.settings):
            raise UserError(
                f"{self.flag} {shown(what)} was begun with other settings, {changed}: give the same again, name "
                f"another {self.flag}, or remove it"
            )

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Make the folder of parts, for as long as one process (rank 0) is at work in it.

        Raises:
            UserError: another process is, or it can not be made.
        """
        make_dir(self.path.absolute().parent, self.flag)
        make_dir(self.folder, self.flag)
        with locked(self.folder, "another process"):
            if not self._has_lines():
                write_json(self.folder / SETTINGS_FILE, {"settings": self.settings})
            yield

    def lines(self) -> list[Line]:
        """What has been written so far, by all ranks.

        Raises:
            UserError: a part is damaged.
        """
        found: list[Line] = []
        for part in sorted(self.folder.glob("*.jsonl")):
            *whole, _ = part.read_text(encoding="utf-8", errors="replace").split("\n")  # the last one was cut
            for number, line in enumerate(whole, 1):
                try:
                    found.append(json.loads(line))
                except (ValueError, RecursionError):
                    found.append({})
                if not isinstance(found[-1], dict) or not found[-1]:
                    raise UserError(f"{part}:{number} is damaged: remove the line to have it made again")
        return found

    @contextlib.contextmanager
    def part(self, rank: int = 0) -> Iterator[Callable[[Iterable[Mapping[str, Any]]], None]]:
        """This rank's part: gives a function that appends lines, which are on the disk when it returns."""
        path = self.folder / f"rank{rank}.jsonl"
        whole = path.read_bytes().rfind(b"\n") + 1 if path.is_file() else 0
        with path.open("ab", buffering=0) as file:
            file.truncate(whole)

            def append(lines: Iterable[Mapping[str, Any]]) -> None:
                """Write lines to the end; what a full disk leaves of them is taken back."""
                try:
                    append_whole(file, "".join(json_line(line) + "\n" for line in lines).encode())
                except OSError as error:
                    raise UserError(
                        f"{shown(path)}: {error.strerror}; what was written before is kept: make room, and start again"
                    ) from error

            yield append

    def finish(self, lines: Iterable[Mapping[str, Any]], result: Mapping[str, Any]) -> None:
        """Write the file of these lines, and its settings and ``result`` (counts, times) beside it; the parts go."""
        write_json(self.beside, {"settings": self.settings, "result": dict(result)})
        write_lines(self.path, lines)
        self.clear()

    def clear(self) -> None:
        """Remove the parts: the file is there."""
        if self.path.is_file() and self.folder.is_dir():
            shutil.rmtree(self.folder)


def _difference(before: Any, now: Any, name: str = "") -> str:
    """The first setting that is another one, in words; empty if all are the same."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*now, *(key for key in before if key not in now)]:
            if found := _difference(before.get(key), now.get(key), f"{name} {key}".strip()):
                return found
        return ""
    return "" if before == now else f"{name}: {_short(before)} then, {_short(now)} now"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
