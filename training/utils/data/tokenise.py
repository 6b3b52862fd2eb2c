"""Conversations become rows of tokens that fit.

Truncation keeps the response and what stands first (the token that begins a text, the system turn, the headers of the
roles): a prompt loses whole oldest turns, then the beginning of its longest user text. A row that does not fit without
any of that has no room and is left out.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from training.utils.data.chat import Rendered, encode, is_trained_whole, render_many
from training.utils.data.formats.conversations import Example, demonstration, without_marks
from training.utils.data.report import DataReport
from training.utils.data.template import Message, RowError

Row = dict[str, Any]
NO_ROOM = "no room: the response alone is too long"
NO_ROOM_FOR_TEXT = "no room: the system turn and the template alone are too long"
NOTHING_TRAINED = "no answer that is trained on (weight 0)"
NO_TOKEN = "a text that gives no token"
SAME_TOKENS = "identical pair after tokenising"


def _user_turns(prompt: Sequence[Message]) -> list[int]:
    return [i for i, message in enumerate(prompt) if message["role"] == "user"]


def _without_oldest(prompt: list[Message], turns: int) -> list[Message]:
    """The prompt from a later user turn on, so many after the first; the system turn and the tools are kept."""
    system = prompt[:1] if prompt[0]["role"] == "system" else []
    first, *others = [*system, *prompt[_user_turns(prompt)[turns] :]]
    return [{**first, "tools": prompt[0]["tools"]} if "tools" in prompt[0] else first, *others]


def _with_less_text(tokenizer: Any, prompt: list[Message], excess: int) -> list[Message] | None:
    """The prompt without the first ``excess`` tokens of its longest user text; None if that has no more."""
    users = _user_turns(prompt)
    if not users:
        return None
    at = max(users, key=lambda i: len(prompt[i]["content"]))
    text = prompt[at]["content"]
    if tokenizer.is_fast:
        places = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
        start = next((a for a, _ in places[excess:] if a), len(text))
    else:  # no token says where it stands
        start = -(-len(text) * excess // max(len(encode(tokenizer, [text])[0]), 1))
    rest = text[start:].lstrip()
    return [*prompt[:at], {**prompt[at], "content": rest}, *prompt[at + 1 :]] if rest else None


@dataclass(frozen=True)
class _Fitted:
    """Each row's prompt as it is kept, its renderings, and which rows lost turns, lost text, or have no room."""

    prompts: list[list[Message]]
    rendered: list[list[Rendered]]
    shortened: set[int]
    cut: set[int]
    without_room: set[int]

    def count(self, row: int, report: DataReport) -> None:
        """Count what a row has lost."""
        report.turns_dropped += row in self.shortened
        report.texts_cut += row in self.cut
        report.truncated += row in self.shortened | self.cut


Rendering = Callable[[list[list[Message]], list[int]], list[list[Rendered]]]


def _fit(tokenizer: Any, prompts: Sequence[list[Message]], renderings: Rendering, max_length: int) -> _Fitted:
    """Render every row; a row that is too long loses its oldest turns, as few as possible, then text of its longest.

    Args:
        renderings: makes each row's renderings from (prompts, the rows' numbers); the longest counts.
    """
    fitted = _Fitted(list(prompts), [[] for _ in prompts], set(), set(), set())
    excess = dict.fromkeys(range(len(prompts)), 1)  # tokens that the rendering which is kept has too many; 0: it fits

    def render(rows: Sequence[int], tried: Sequence[list[Message]]) -> set[int]:
        """Render rows with these prompts; which of them fit. What does not replaces nothing that does."""
        fit = set()
        for i, prompt, rendered in zip(rows, tried, renderings(list(tried), list(rows)), strict=True):
            over = max(0, max(len(r.input_ids) for r in rendered) - max_length)
            if excess[i] or not over:
                fitted.prompts[i], fitted.rendered[i], excess[i] = prompt, rendered, over
            fit |= set() if over else {i}
        return fit

    render(range(len(prompts)), prompts)
    # Of each row that is too long, by bisection (a long row has hundreds of turns): the largest known number of turns
    # whose removal is not enough, and the smallest known that is (at first one that is never tried: all turns)
    less = {i: (0, len(_user_turns(prompts[i]))) for i, over in excess.items() if over}
    while rows := [i for i, (few, enough) in less.items() if enough - few > 1]:
        middle = {i: sum(less[i]) // 2 for i in rows}
        fit = render(rows, [_without_oldest(prompts[i], middle[i]) for i in rows])
        less |= {i: (less[i][0], middle[i]) if i in fit else (middle[i], less[i][1]) for i in rows}
    fitted.shortened.update(i for i, (few, _) in less.items() if few or not excess[i])
    rows = [i for i in less if excess[i]]
    while rows:
        cut = {i: _with_less_text(tokenizer, fitted.prompts[i], excess[i]) for i in rows}
        fitted.without_room.update(i for i, prompt in cut.items() if prompt is None)
        kept = {i: prompt for i, prompt in cut.items() if prompt is not None}
        fitted.cut.update(kept)
        fit = render(list(kept), list(kept.values()))
        rows = [i for i in kept if i not in fit]
    return fitted


def sft_rows(
    tokenizer: Any,
    examples: Sequence[Example],
    max_length: int,
    report: DataReport,
    train_on_prompts: bool = False,
) -> list[list[Row] | str]:
    """Step 1's rows of each example, or why it is left out.

    There are several for a long plain text, and for a conversation whose earlier answers the template writes in another
    way than a last one (without its reasoning): then each answer has a row that ends with it.
    """
    whole = {i: demonstration(example) for i, example in enumerate(examples) if not example.text}
    shown = [(i, *part) for i, turns in whole.items() for part in _apart(tokenizer, *turns)]

    def renderings(prompts: list[list[Message]], numbers: list[int]) -> list[list[Rendered]]:
        asked = [([*prompt, *shown[n][2]], False) for prompt, n in zip(prompts, numbers, strict=True)]
        return [[rendered] for rendered in render_many(tokenizer, asked)]

    fitted = _fit(tokenizer, [prompt for _, prompt, _ in shown], renderings, max_length)
    results: list[list[Row] | str] = [NOTHING_TRAINED] * len(examples)
    for n, ((i, _, _), (row,)) in enumerate(zip(shown, fitted.rendered, strict=True)):
        done = results[i] if isinstance(results[i], list) else []
        if n in fitted.without_room:
            results[i] = done or NO_ROOM
            continue
        ids, mask = row.input_ids, row.response_mask
        if 1 not in mask:
            continue
        if train_on_prompts and not _hides_an_untrained_answer(fitted.prompts[n], row):
            mask = [1 - left_out for left_out in row.left_out]
        fitted.count(n, report)
        report.open_turns += not (done or examples[i].response or examples[i].chosen)
        results[i] = [*done, {"input_ids": ids, "response_mask": mask, "length": len(ids)}]
    texts = [i for i, example in enumerate(examples) if example.text]
    # What the tokenizer puts before a plain text: the token that begins a sequence, for those that have one
    start = [i for i in tokenizer("a")["input_ids"][:1] if i == tokenizer.bos_token_id] if texts else []
    room = max_length - len(start)
    for i, ids in zip(texts, encode(tokenizer, [examples[i].text for i in texts]), strict=True):
        ids = [*ids, tokenizer.eos_token_id]
        # Nothing predicts the first token of a row, so one token alone (EOS behind a full row) would teach nothing.
        chunks = [[*start, *ids[at : at + room]] for at in range(0, len(ids) - 1, room)]
        results[i] = [{"input_ids": c, "response_mask": [1] * len(c), "length": len(c)} for c in chunks] or NO_TOKEN
    return results


def _apart(tokenizer: Any, prompt: list[Message], answer: list[Message]) -> list[tuple[list[Message], list[Message]]]:
    """A conversation as it is, or each of its trained answers behind the turns before it, which that row leaves out."""
    turns = [*prompt, *answer]
    if is_trained_whole(tokenizer, turns):
        return [(prompt, answer)]
    trained = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and turn.get("train") != "no"]
    before = [{"train": "elsewhere"} | turn if turn["role"] == "assistant" else turn for turn in turns]
    return [(before[:i], turns[i : i + 1]) for i in trained]


def _hides_an_untrained_answer(prompt: Sequence[Message], row: Rendered) -> bool:
    """Whether a prompt has an answer of weight 0 whose place in the rendering is not known."""
    answers = [message for message in prompt if message["role"] == "assistant"]
    return len(row.spans) <= len(answers) and any(message.get("train") == "no" for message in answers)


def pair_rows(
    tokenizer: Any, examples: Sequence[Example], max_length: int, report: DataReport
) -> list[list[Row] | str]:
    """The pairs of each example, or why it is left out; all its answers keep the same prompt tokens.

    An answer of a ranking that alone is too long is left out, and its pairs with it.

    Raises:
        RowError: the mask of an answer of several turns would be that of its last one.
    """
    answers = [example.compared() for example in examples]

    def renderings(prompts: list[list[Message]], numbers: list[int]) -> list[list[Rendered]]:
        """The prompt of each row, and the conversation with each of its answers."""
        asked: list[tuple[list[Message], bool]] = []
        for prompt, n in zip(prompts, numbers, strict=True):
            asked += [(prompt, True), *((without_marks([*prompt, *whole]), False) for whole in answers[n])]
        flat = iter(render_many(tokenizer, asked))
        return [list(itertools.islice(flat, 1 + len(answers[n]))) for n in numbers]

    fitted = _fit(tokenizer, [example.prompt for example in examples], renderings, max_length)
    results: list[list[Row] | str] = []
    for n, (prompt, *whole) in enumerate(fitted.rendered):
        if n in fitted.without_room:
            fewer = _without_longest(examples[n], whole)
            result = pair_rows(tokenizer, [fewer], max_length, report)[0] if fewer else NO_ROOM
            report.answers_too_long += not isinstance(result, str)
            results.append(result)
            continue
        _check_all_compared(examples[n], whole)
        start, pairs = len(prompt.input_ids), examples[n].pairs()
        pairs = [(i, j) for i, j in pairs if whole[i].input_ids != whole[j].input_ids]
        if not pairs:
            results.append(SAME_TOKENS)
            continue
        fitted.count(n, report)
        rows: list[Row] = []
        for pair in pairs:
            row: Row = {"pairs": len(pairs)}
            for name, answer in zip(("chosen", "rejected"), (whole[i] for i in pair), strict=True):
                row[f"{name}_ids"] = answer.input_ids
                # Only the compared answer is marked, not the assistant's earlier turns.
                row[f"{name}_mask"] = [0] * start + answer.response_mask[start:]
            rows.append(row | {"length": max(len(row["chosen_ids"]), len(row["rejected_ids"]))})
        results.append(rows)
    return results


def _check_all_compared(example: Example, whole: Sequence[Rendered]) -> None:
    """Raise a `RowError` if an answer has a turn whose place in its rendering is not known."""
    for answer, rendered in zip(example.compared(), whole, strict=True):
        turns = sum(message["role"] == "assistant" for message in answer)
        if turns > max(len(rendered.spans), 1):
            raise RowError(
                "the chat template writes an earlier turn in another way than the last one, so of an answer of several "
                "turns only the last would be compared; choose another --chat_template"
            )


def _without_longest(example: Example, whole: Sequence[Rendered]) -> Example | None:
    """A ranking without its longest answer; None if that leaves nothing to compare."""
    kept = list(range(len(whole)))
    kept.remove(max(kept, key=lambda i: len(whole[i].input_ids)))
    answers, ranks = [example.compared()[i] for i in kept], [example.ranks[i] for i in kept if example.ranks]
    fewer = dataclasses.replace(example, answers=answers, ranks=ranks, chosen=answers[0], rejected=answers[-1])
    return fewer if ranks and fewer.pairs() else None


def prompt_rows(
    tokenizer: Any, examples: Sequence[Example], max_length: int, report: DataReport
) -> list[list[Row] | str]:
    """Step 3's row of each example; the ids end with the generation prompt."""

    def renderings(prompts: list[list[Message]], numbers: list[int]) -> list[list[Rendered]]:
        return [[rendered] for rendered in render_many(tokenizer, [(prompt, True) for prompt in prompts])]

    fitted = _fit(tokenizer, [example.prompt for example in examples], renderings, max_length)
    results: list[list[Row] | str] = []
    for n, (messages, (prompt,)) in enumerate(zip(fitted.prompts, fitted.rendered, strict=True)):
        if n in fitted.without_room:
            results.append(NO_ROOM_FOR_TEXT)
            continue
        fitted.count(n, report)
        text = json.dumps(without_marks(messages), ensure_ascii=False)
        results.append([{"prompt_ids": prompt.input_ids, "messages": text, "length": len(prompt.input_ids)}])
    return results
