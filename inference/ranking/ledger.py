"""Who judges what next, what has been said, and the files that training reads."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from ranking.items import Item, Material
from ranking.journal import Journal, RowsFile
from training.utils.agreement import Agreement, agreement
from training.utils.errors import UserError, half_character
from training.utils.intervals import half_ties, wilson_interval
from training.utils.run.folders import shown

HOLD_SECONDS = 1800  # how long a prompt is kept for a judge who has it open and says nothing
JOURNAL, RANKINGS, DEMONSTRATIONS = "journal.jsonl", "rankings.jsonl", "demonstrations.jsonl"
ACTS = ("ranked", "all_bad", "skipped")
LONGEST_NAME, LONGEST_TEXT = 40, 100_000  # characters of a judge's name, of a note or an answer
Event = dict[str, Any]


class Ledger:
    """All judgements of some prompts.

    The journal is what counts: each act of a judge is a line of it, on the disk before the judge is told so. The two
    other files follow it and are made anew from it at each start.

    Args:
        folder: of the files.
        material: what is judged.
        judges_per_item: how many judges each prompt is shown to.

    Raises:
        UserError: files that can not be written or that no journal here has made, or judgements of other answers.
    """

    def __init__(self, folder: Path, material: Material, judges_per_item: int) -> None:
        self.items = {item.id: item for item in material.items}
        self.same = material.same
        self.folder = folder
        self.judges_per_item = judges_per_item
        self.judged: dict[str, dict[str, Event]] = defaultdict(dict)  # prompt -> judge -> the last act
        self.history: dict[str, list[str]] = defaultdict(list)  # judge -> prompts, as they were judged
        self.undone: dict[str, tuple[Item, Event]] = {}  # judge -> what was taken back last, if nothing was said since
        self.held: dict[str, dict[str, float]] = defaultdict(dict)  # prompt -> judge -> since when
        self.behind = ""  # why the files for training do not follow the journal
        self.rankings = RowsFile(folder / RANKINGS)
        self.demonstrations = RowsFile(folder / DEMONSTRATIONS)
        if not (folder / JOURNAL).exists():
            self._check_own([])  # before there is one
        self.journal = Journal(folder / JOURNAL)
        for event in self.journal.lines:
            if event["act"] != "opened":
                self._check_same(event)
                self._follow(event)
        self._check_own(self.journal.lines)
        self.journal.append({"act": "opened", "judges_per_item": judges_per_item, "time": _now()})  # the disk has room
        self._flush()

    def _check_same(self, event: Event) -> None:
        item = self.items.get(event["item"])
        if item is None or event["answers"] not in (item.digest, item.named_digest):
            what = "is not among these answers" if item is None else "had other answers"
            raise UserError(f"--output_dir {self.folder} holds judgements of another file: the prompt {event['item']} "
                            f"{what}; give the file that they belong to, or another --output_dir")  # fmt: skip

    def _check_own(self, events: Sequence[Event]) -> None:
        """Refuse a file for training, which is made anew, if it holds a row that none of these events has made."""
        made = {(event["item"], event["judge"], event["time"]) for event in events if event["act"] in ACTS}
        for file in (self.rankings, self.demonstrations):
            if not file.holds_only(made):
                raise UserError(f"{shown(file.path)} is not this page's, which would write it anew: give another "
                                "--output_dir, or move the file away")  # fmt: skip

    def next_for(self, judge: str) -> Item | None:
        """The prompt that a judge has open, or the first that wants a judge; it is kept for them. None at the end."""
        now = time.time()
        for item in self.items.values():
            if judge in self.held[item.id] and judge not in self.judged[item.id]:
                self.held[item.id][judge] = now
                return item
        for item in self.items.values():
            if judge in self.judged[item.id]:
                continue
            others = {who for who, since in self.held[item.id].items() if now - since < HOLD_SECONDS}
            if len(others | self._judges(item.id)) < self.judges_per_item:
                self._record(item, judge, "shown")
                return item
        return None

    def _judges(self, item: str) -> set[str]:
        return {judge for judge, event in self.judged[item].items() if event["act"] != "skipped"}

    def _ranks(self, item: str) -> list[list[int]]:
        return [event["ranks"] for event in self.judged[item].values() if event["act"] != "skipped"]

    def save(
        self, judge: str, item_id: str, act: str, places: Sequence[int] = (), note: str = "", better: str = ""
    ) -> None:
        """Record what a judge says of a prompt. The same said twice (a second click, a lost answer) counts once.

        Args:
            judge: their name.
            item_id: of the prompt.
            act: one of `ACTS`.
            places: of each answer in the order that the judge sees; 1 is the best, equal ones are tied.
            note: what the judge has to say beside.
            better: an answer of their own.

        Raises:
            UserError: no such prompt, places that are no order, a second judgement, or a full disk.
        """
        item = self.items.get(item_id)
        if item is None:
            raise UserError("There is no such prompt; load the page again.")
        if act not in ACTS:
            raise UserError("There is no such judgement.")
        ranks = [1] * len(item.texts)
        if act == "ranked":
            if sorted(set(places)) != list(range(1, 1 + len(set(places)))) or len(places) != len(item.texts):
                raise UserError("These places are no order of the answers.")
            ranks = [places[item.shuffled(judge).index(i)] for i in range(len(item.texts))]
        said = {"ranks": ranks, "note": _text(note, "note"), "better": _text(better, "answer")}
        before = self.judged[item_id].get(judge)
        if before is not None:
            if {"act": act} | said == {name: before[name] for name in ("act", *said)}:
                return
            raise UserError("You have judged this prompt already; Undo brings it back.")
        self._record(item, judge, act, said)

    def undo(self, judge: str, judged: int) -> tuple[Item, Event]:
        """Take a judge's last judgement back; gives the prompt, which is open to them again, and what they had said.

        The same asked twice (a second click, a lost answer) takes one back, and gives it twice.

        Args:
            judge: their name.
            judged: how many judgements of theirs the page shows.

        Raises:
            UserError: there is none, there are others than the page shows, or the disk is full.
        """
        if judged == len(self.history[judge]) + 1 and judge in self.undone:
            return self.undone[judge]
        if judged != len(self.history[judge]):
            raise UserError("You have gone on in another tab; load the page again.")
        if not judged:
            raise UserError("There is nothing to undo.")
        self._record(self.items[self.history[judge][-1]], judge, "undone")
        return self.undone[judge]

    def _record(self, item: Item, judge: str, act: str, said: Mapping[str, Any] | None = None) -> None:
        event = {"item": item.id, "judge": judge, "act": act, **(said or {}), "time": _now(), "answers": item.digest}
        self.journal.append(event)
        self._follow(event)
        try:
            self._flush()
            self.behind = ""
        except UserError as error:  # the judgement is safe in the journal, the next one writes these files anew
            self.behind = str(error)

    def _follow(self, event: Event) -> None:
        """Take one line of the journal into account."""
        item, judge, act = self.items[event["item"]], event["judge"], event["act"]
        key = (item.id, judge)
        if act in ("shown", "undone"):
            self.held[item.id][judge] = datetime.fromisoformat(event["time"]).timestamp()
        if act == "undone":
            self.history[judge].remove(item.id)
            self.undone[judge] = item, self.judged[item.id].pop(judge)
            self.rankings.drop(key)
            self.demonstrations.drop(key)
        if act not in ACTS:
            return
        self.held[item.id].pop(judge, None)
        self.undone.pop(judge, None)
        self.judged[item.id][judge] = event
        self.history[judge].append(item.id)
        for file, row in ((self.rankings, _ranking(item, event)), (self.demonstrations, _demonstration(item, event))):
            if row is not None:
                file.put(key, row)

    def _flush(self) -> None:
        self.rankings.flush()
        self.demonstrations.flush()

    def progress(self, judge: str) -> dict[str, Any]:
        """How far this judge and all judges are."""
        done = sum(min(len(self._judges(item)), self.judges_per_item) for item in self.items)
        judges = {name for judged in self.judged.values() for name in judged}
        return {
            "mine": len(self.history[judge]),
            "done": done,
            "asked": len(self.items) * self.judges_per_item,
            "judges": len(judges),
        }

    def agreement(self) -> Agreement:
        """Between judges of the same prompts."""
        return agreement(self._ranks(item) for item in self.items)

    def win_rates(self) -> list[dict[str, Any]]:
        """For any two models: how often the first one's answer was preferred, a tie half, each prompt counting once.

        Returns:
            For each: ``models``, ``share``, its 95% ``interval`` (Wilson), ``ties`` (share of them) and ``prompts``.
        """
        scores: dict[tuple[str, str], list[list[float]]] = defaultdict(list)
        for item in self.items.values():
            rank = [dict(zip(item.texts, ranks, strict=True)) for ranks in self._ranks(item.id)]
            found: dict[tuple[str, str], list[float]] = defaultdict(list)
            for one in item.answers:
                for other in item.answers:
                    if one["model"] and one["model"] < other["model"]:
                        ranks = [(r[one["response"]], r[other["response"]]) for r in rank]
                        found[one["model"], other["model"]] += [half_ties(b, a) for a, b in ranks]
            for models, values in found.items():
                if values:
                    scores[models].append(values)
        for models in self.same:
            scores[min(models), max(models)].append([0.5])
        return [_win_rate(models, values) for models, values in sorted(scores.items())]


def _win_rate(models: tuple[str, str], prompts: Sequence[Sequence[float]]) -> dict[str, Any]:
    share = sum(sum(values) / len(values) for values in prompts) / len(prompts)
    ties = sum(sum(value == 0.5 for value in values) / len(values) for values in prompts) / len(prompts)
    if share < 0.5:
        models, share = (models[1], models[0]), 1 - share
    interval = wilson_interval(share, len(prompts))
    return {"models": models, "share": share, "interval": interval, "ties": ties, "prompts": len(prompts)}


def _ranking(item: Item, event: Event) -> dict[str, Any] | None:
    """A row for step 2 and DPO; one whose answers are all bad has them tied, and teaches nothing."""
    if event["act"] == "skipped":
        return None
    row = {"id": item.id, "prompt": item.prompt, "answers": item.ranked(event["ranks"]), "judge": event["judge"]}
    row |= {"all_bad": True} if event["act"] == "all_bad" else {}
    row |= {"note": event["note"]} if event["note"] else {}
    return row | {"time": event["time"]}


def _demonstration(item: Item, event: Event) -> dict[str, Any] | None:
    """A row for step 1: the answer that a judge has written."""
    if not event["better"]:
        return None
    messages = [*item.prompt, {"role": "assistant", "content": event["better"]}]
    return {"id": item.id, "messages": messages, "judge": event["judge"], "time": event["time"]}


def _text(text: str, what: str) -> str:
    if len(text) > LONGEST_TEXT:
        raise UserError(f"The {what} has {len(text):,} characters, at most {LONGEST_TEXT:,} are kept.")
    if half_character(text):
        raise UserError(f"The {what} holds half a character, which no file can hold.")
    return text.strip()


def judge_name(name: str) -> str:
    """A judge's name, without blanks around it.

    Raises:
        UserError: it is empty, too long, or not printable.
    """
    name = " ".join(name.split())
    if not name or len(name) > LONGEST_NAME or not name.isprintable():
        raise UserError(f"Give a name of 1 to {LONGEST_NAME} letters.")
    return name


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
