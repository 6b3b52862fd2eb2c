"""One visitor's conversation with several models: what was said, what is shown, votes and export.

Nothing here knows Gradio or a network, so all of it is tested without a browser.
"""

from __future__ import annotations

import itertools
import json
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chat_stream import Answer, Message

from training.utils.errors import UserError
from training.utils.run.files import append_lines, json_line, whole_file

MAX_PROMPT_CHARACTERS = 10_000  # a page of text has 3,000; beyond this it is a paste by mistake
SAME = -1  # a vote for none of the columns
LETTERS = "ABCDEFGH"  # of the columns
_votes_lock = threading.RLock()  # two clicks at once are two threads
_numbers = itertools.count(1)


@dataclass
class Turn:
    """One prompt and the answers to it, one per column.

    Attributes:
        rewards: one per column, None while unknown or without a reward model.
        vote: the column that won, `SAME`, or None before the vote.
        rows: what the vote has appended to its file.
        number: tells it apart from all others of this server, also from one with the same prompt.
    """

    prompt: str
    answers: list[Answer | None]
    rewards: list[float | None]
    vote: int | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    number: int = field(default_factory=_numbers.__next__)

    @property
    def complete(self) -> bool:
        """Whether every column has an answer that ended by itself or at the limit."""
        return all(answer is not None and answer.ended in ("stop", "length") for answer in self.answers)


@dataclass
class Session:
    """A conversation; it lives on the server, and the browser only gets what `heading` and the texts show.

    Attributes:
        names: the models' names.
        order: the model in each column; shuffled in blind mode.
        blind: names, rewards and speeds are hidden until the vote.
        revealed: they are to be seen.
        seen: they have been since the columns were shuffled, so that a later vote is not blind.
        system: the system message of this conversation, fixed by its first prompt.
        attempts: answers asked for so far; retry draws other ones.
        busy: answers are growing right now.
        cancel: asks the growing answers to end.
    """

    names: tuple[str, ...]
    blind: bool = False
    order: list[int] = field(default_factory=list)
    revealed: bool = True
    seen: bool = False
    system: str = ""
    turns: list[Turn] = field(default_factory=list)
    attempts: int = 0
    busy: bool = False
    cancel: bool = False

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """A new conversation; in blind mode with the columns shuffled and hidden again."""
        self.order = list(range(len(self.names)))
        if self.blind:
            # not from the seed of the answers, which the visitor knows
            random.SystemRandom().shuffle(self.order)
        self.revealed, self.seen = not self.blind, False
        self.turns, self.system, self.attempts = [], "", 0

    def heading(self, column: int) -> str:
        """What a column is called: its letter, and its model's name when that may be seen."""
        letter = LETTERS[column]
        if len(self.names) == 1:
            return self.names[0]
        return f"{letter} · {self.names[self.order[column]]}" if self.revealed else letter

    def history(self, column: int, turns: int | None = None, reasoning: bool = True) -> list[Message]:
        """The conversation of one column as messages: its own answers only, up to ``turns`` turns.

        Args:
            column, turns: of the page.
            reasoning: with what a model has written before an answer, else answers alone.
        """
        messages: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns[:turns]:
            messages.append({"role": "user", "content": turn.prompt})
            answer = turn.answers[column]
            if answer is not None:
                said = {"role": "assistant", "content": answer.parts[1]}
                messages.append(answer.message if reasoning else said)
        return messages

    def ask(self, prompt: str, system: str) -> Turn:
        """Start a turn.

        Raises:
            UserError: an empty or too long prompt or system message; nothing has changed then.
        """
        if not prompt.strip():
            raise UserError("Write a prompt first.")
        for what, text in (("prompt", prompt), ("system message", system)):
            if len(text) > MAX_PROMPT_CHARACTERS:
                raise UserError(
                    f"The {what} has {len(text):,} characters; at most {MAX_PROMPT_CHARACTERS:,} are read. "
                    "Please shorten it."
                )
        if not self.turns:
            self.system = system.strip()
        columns = len(self.names)
        self.turns.append(Turn(prompt.strip(), [None] * columns, [None] * columns))
        self.attempts += 1
        return self.turns[-1]

    def retry(self) -> Turn:
        """Empty the last turn, to answer its prompt again with other random numbers.

        Raises:
            UserError: there is no turn, or its vote is already in the file.
        """
        if not self.turns:
            raise UserError("There is nothing to retry yet.")
        if self.turns[-1].vote is not None:
            raise UserError("This round has your vote already; write the next prompt, or clear.")
        columns = len(self.names)
        self.turns[-1] = Turn(self.turns[-1].prompt, [None] * columns, [None] * columns)
        self.attempts += 1
        return self.turns[-1]

    def take_back(self) -> str:
        """Remove the last turn; gives its prompt, to be edited.

        Raises:
            UserError: there is no turn, its answers are growing, or its vote is in the file.
        """
        if self.busy:
            raise UserError("The last answers are still being written; stop them first.")
        if not self.turns:
            raise UserError("There is no prompt to edit yet.")
        if self.turns[-1].vote is not None:
            raise UserError("This round has your vote; undo the vote first.")
        return self.turns.pop().prompt

    @property
    def last(self) -> int:
        """The number of the last turn, 0 without one."""
        return self.turns[-1].number if self.turns else 0

    @property
    def can_vote(self) -> bool:
        """Whether the last turn waits for a vote."""
        waits = bool(self.turns) and self.turns[-1].complete and self.turns[-1].vote is None
        return waits and len(self.names) > 1 and not self.busy

    def vote(self, winner: int, file: Path) -> list[dict[str, Any]]:
        """Record the vote on the last turn and show the names; returns the rows that were appended.

        Args:
            winner: the better column, or `SAME`.
            file: where preferences go; ties go to a file beside it, since step 2 can learn nothing from them.

        Raises:
            UserError: no finished turn waits for a vote, or the file can not be written.
        """
        with _votes_lock:
            if not self.can_vote:
                raise UserError("There is nothing to vote on: wait for whole answers, one vote for each round.")
            if winner != SAME and not 0 <= winner < len(self.names):
                raise UserError("There is no such answer.")
            rows = self._same_row() if winner == SAME else self.preference_rows(winner)
            append_rows(ties_file(file) if winner == SAME else file, rows)
            self.turns[-1].vote, self.turns[-1].rows = winner, rows
            self.revealed = self.seen = True
        return rows

    @property
    def can_unvote(self) -> bool:
        """Whether the last turn has a vote that can be taken back."""
        return not self.busy and bool(self.turns) and self.turns[-1].vote is not None

    def unvote(self, file: Path) -> None:
        """Take the vote on the last turn back, out of its file; names that it has shown stay shown.

        Raises:
            UserError: there is none, or the file can not be written.
        """
        with _votes_lock:
            if not self.can_unvote:
                raise UserError("There is no vote to undo.")
            turn = self.turns[-1]
            remove_rows(ties_file(file) if turn.vote == SAME else file, turn.rows)
            turn.vote, turn.rows = None, []

    def preference_rows(self, winner: int) -> list[dict[str, Any]]:
        """The winner against every other column that said something else, each a row of step 2."""
        rows = []
        chosen, chosen_model = self.history(winner), self.names[self.order[winner]]
        for loser in range(len(self.names)):
            rejected = self.history(loser)
            if loser == winner or rejected == chosen:
                continue
            shared = 0
            while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
                shared += 1
            rows.append(
                {
                    "prompt": chosen[:shared],
                    "chosen": _continuation(chosen[shared:]),
                    "rejected": _continuation(rejected[shared:]),
                    "vote": {"chosen_model": chosen_model, "rejected_model": self.names[self.order[loser]]}
                    | self._how(),
                }
            )
        return rows

    def _same_row(self) -> list[dict[str, Any]]:
        about = {"models": [self.names[model] for model in self.order]} | self._how()
        return [{"conversations": [self.history(column) for column in range(len(self.names))], "vote": about}]

    def _how(self) -> dict[str, Any]:
        """What every row says of its vote."""
        return {"blind": self.blind and not self.seen, "time": _now()}

    def export(self) -> str:
        """The whole conversation as JSON; in blind mode without names, rewards and speeds before the vote."""
        columns = []
        for column in range(len(self.names)):
            answers = []
            for turn in self.turns:
                answer = turn.answers[column]
                if answer is None:
                    continue
                entry: dict[str, Any] = {"ended": answer.ended, "tokens": len(answer.token_ids)}
                if answer.reasoning_tokens:
                    entry["reasoning_tokens"] = answer.reasoning_tokens
                if self.revealed:
                    entry |= {"reward": turn.rewards[column], "tokens_per_second": round(answer.tokens_per_second, 2)}
                answers.append(entry)
            columns.append({"name": self.heading(column), "messages": self.history(column), "answers": answers})
        votes = [None if t.vote is None else "same" if t.vote == SAME else self.heading(t.vote) for t in self.turns]
        data = {"time": _now(), "blind": self.blind, "models": columns, "votes": votes}
        return json.dumps(data, indent=2, ensure_ascii=False)

    def note(self, turn: Turn, column: int, normalised: bool) -> str:
        """The line under an answer: reward, length, speed, and why it ended; "" while it grows."""
        answer = turn.answers[column]
        if answer is None or not answer.ended:
            return ""
        parts = []
        reward = turn.rewards[column]
        if self.revealed:
            if reward is not None:
                parts.append(f"reward {reward:+.2f}" + ("" if normalised else " (raw)"))
            thought = answer.reasoning_tokens
            after = f" after {thought} of reasoning" if thought else ""
            parts.append(f"{len(answer.token_ids) - thought} tokens{after}")
            if answer.tokens_per_second:
                parts.append(f"{answer.tokens_per_second:.1f} tokens/s")
        endings = {"length": "cut at the limit", "cancelled": "stopped"}
        if answer.ended in endings:
            parts.append(endings[answer.ended])
        if answer.dropped:
            parts.append(f"the oldest {answer.dropped} messages no longer fit")
        return " · ".join(parts)


def _continuation(messages: Sequence[Message]) -> str | list[Message]:
    """A plain string for one answer; with a reasoning, or after the columns' histories have parted, the messages."""
    plain = len(messages) == 1 and "reasoning" not in messages[0]
    return messages[0]["content"] if plain else list(messages)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def ties_file(file: Path) -> Path:
    """Where votes for "same" go: votes.jsonl -> votes_same.jsonl."""
    return file.with_name(f"{file.stem}_same{file.suffix}")


def append_rows(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Append JSON lines, whole or not at all as far as other visitors of this page see.

    Raises:
        UserError: the file can not be written.
    """
    try:
        with _votes_lock:
            file.parent.mkdir(parents=True, exist_ok=True)
            append_lines(file, rows)
    except OSError as error:
        raise UserError(f"The vote can not be saved to {file.name}: {error.strerror}.") from error


def _line(row: dict[str, Any]) -> bytes:
    return (json_line(row) + "\n").encode()


def remove_rows(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Take rows out that `append_rows` has written, whatever stands around them by now.

    Raises:
        UserError: one is no longer there, or the file can not be written.
    """
    try:
        with _votes_lock:
            lines = file.read_bytes().splitlines(keepends=True) if rows else []
            for row in rows:
                if _line(row) not in lines:
                    raise UserError(f"The vote is no longer in {file.name}; it can not be undone here.")
                del lines[len(lines) - 1 - lines[::-1].index(_line(row))]
            if rows:
                with whole_file(file) as out:
                    out.writelines(lines)
    except OSError as error:
        raise UserError(f"The vote can not be taken out of {file.name}: {error.strerror}.") from error
