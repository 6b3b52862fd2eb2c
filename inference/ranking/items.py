"""What people judge: prompts with their answers, from one file, or from two that are held against each other."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from training.utils.answers import read_answers
from training.utils.data.formats.rankings import MOST_ANSWERS
from training.utils.errors import UserError
from training.utils.run.folders import shown

Message = dict[str, Any]


@dataclass(frozen=True)
class Item:
    """A prompt with its answers.

    Attributes:
        id: of the prompt.
        prompt: the conversation so far.
        answers: each with ``model`` and ``response``, as in their file.
    """

    id: str
    prompt: list[Message]
    answers: list[dict[str, str]]

    @cached_property
    def texts(self) -> list[str]:
        """The different answers: one that stands twice is shown once, and training refuses two places for it."""
        return list(dict.fromkeys(answer["response"] for answer in self.answers))

    @cached_property
    def digest(self) -> str:
        """Of all that a judge sees: a judgement belongs to these answers and to no others, whatever they are called."""
        return _digest([self.prompt, [answer["response"] for answer in self.answers]])

    @property
    def named_digest(self) -> str:
        """As older journals have it, with the names of the answers, which may depend on the folder."""
        return _digest([self.prompt, self.answers])

    def shuffled(self, judge: str) -> list[int]:
        """In which order a judge sees `texts`: always the same for one judge, and blind."""
        order = list(range(len(self.texts)))
        random.Random(f"{judge}\n{self.id}").shuffle(order)
        return order

    def ranked(self, places: Sequence[int]) -> list[dict[str, Any]]:
        """The answers with their ranks, as steps 2 and DPO read them; ``places`` has one for each of `texts`."""
        rank = dict(zip(self.texts, places, strict=True))
        return [answer | {"rank": rank[answer["response"]]} for answer in self.answers]


def _digest(told: Any) -> str:
    return hashlib.sha256(json.dumps(told, ensure_ascii=True, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Material:
    """All that is to be judged.

    Attributes:
        items: prompts with two answers or more that differ.
        same: of two files, pairs of models whose answers are the same: ties that nobody has to look at.
        told: what was left out, in words.
    """

    items: list[Item]
    same: list[tuple[str, str]]
    told: list[str]


def read_material(answers: str, against: str = "") -> Material:
    """Prompts with all their answers, or with the first answers of two files.

    Raises:
        UserError: a file that can not be read, or nothing in it to compare.
    """
    items = _pairs(answers, against) if against else _all_answers(answers)
    same, judged = [], []
    for item in items:
        if len(item.texts) > 1:
            judged.append(item)
        elif against:
            same.append((item.answers[0]["model"], item.answers[1]["model"]))
    if not judged:
        raise UserError(f"--answers {answers}: no prompt has two different answers, there is nothing to judge")
    alike, become = len(items) - len(judged), "are ties" if against else "are left out"
    told = f"{alike} prompts have answers that are all the same: they {become}"
    return Material(judged, same, [told] if alike else [])


def _all_answers(answers: str) -> list[Item]:
    items = []
    for line in read_answers(answers, "--answers"):
        if len(line["answers"]) > MOST_ANSWERS:
            raise UserError(f"--answers {answers}: {len(line['answers'])} answers to the prompt {line['id']}, at most "
                            f"{MOST_ANSWERS} are read by step 2")  # fmt: skip
        # step 2 leaves out a whole ranking in which an answer is empty
        kept = [_answer(answer) for answer in line["answers"] if answer["response"].strip()]
        items.append(Item(line["id"], line["prompt"], kept))
    return items


def _answer(answer: Mapping[str, Any], model: str | None = None) -> dict[str, str]:
    return {"model": str(answer.get("model") or "") if model is None else model, "response": answer["response"]}


def _pairs(answers: str, against: str) -> list[Item]:
    files = {"--answers": answers, "--against": against}
    read = {flag: read_answers(path, flag, at_least=1) for flag, path in files.items()}
    names = _names(files, read)
    other = {line["id"]: line for line in read["--against"]}
    items = []
    for line in read["--answers"]:
        if line["id"] not in other:
            continue
        if other[line["id"]]["prompt"] != line["prompt"]:
            raise UserError(f"--against {against}: the prompt {line['id']} is another one than in {answers}")
        both = [line["answers"][0], other[line["id"]]["answers"][0]]
        items.append(Item(line["id"], line["prompt"], [_answer(a, name) for a, name in zip(both, names, strict=True)]))
    if not items:
        raise UserError(f"--against {against}: none of its prompts stands in {answers}")
    return items


def _names(files: Mapping[str, str], read: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """What the two runs are called: by their models' names, by their files where these do not tell them apart."""
    names = []
    for flag, lines in read.items():
        models = {str(answer.get("model") or "") for line in lines for answer in line["answers"]}
        if len(models) > 1:
            raise UserError(f"{flag} {files[flag]}: answers of {', '.join(sorted(models))}; two files are compared of "
                            "one model each, one file with several is ranked without --against")  # fmt: skip
        names.append(models.pop())
    if names[0] == names[1] or not all(names):
        names = [shown(Path(path).expanduser()) for path in files.values()]
    return names
