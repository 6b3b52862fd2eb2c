"""Conversations become rows of tokens that fit.

Truncation keeps the response: a prompt loses whole oldest turns first (the system turn stays), then its left side.
A row whose response alone does not fit has no room and is left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from training.utils.data.chat import Message, Rendered, encode, render_many
from training.utils.data.conversations import Example, demonstration
from training.utils.data.report import DataReport

Row = dict[str, Any]
NO_ROOM = "no room: the response alone is too long"
NO_TOKEN = "a text that gives no token"
SAME_TOKENS = "identical pair after tokenising"


def _shorter(prompt: list[Message]) -> list[Message] | None:
    """The prompt without its oldest user and assistant turn; None if only the last user turn is left."""
    system = prompt[:1] if prompt[0]["role"] == "system" else []
    turns = prompt[len(system) :]
    return [*system, *turns[2:]] if len(turns) > 2 else None


@dataclass(frozen=True)
class _Fitted:
    """Each row's prompt as it is kept, its renderings, and which rows lost turns."""

    prompts: list[list[Message]]
    rendered: list[list[Rendered]]
    shortened: set[int]


Rendering = Callable[[list[list[Message]], list[int]], list[list[Rendered]]]


def _fit(prompts: Sequence[list[Message]], renderings: Rendering, max_length: int) -> _Fitted:
    """Render every row, and again with fewer turns until it fits or one user turn is left.

    Args:
        prompts: one for each row.
        renderings: makes each row's renderings from (prompts, the rows' numbers); the longest counts.
    """
    kept = list(prompts)
    results: list[list[Rendered]] = [[] for _ in kept]
    open_ = list(range(len(kept)))
    shortened: set[int] = set()
    while open_:
        for i, rendered in zip(open_, renderings([kept[i] for i in open_], open_), strict=True):
            results[i] = rendered
        again = []
        for i in open_:
            if max(len(r.input_ids) for r in results[i]) > max_length:
                shorter = _shorter(kept[i])
                if shorter is not None:
                    kept[i] = shorter
                    shortened.add(i)
                    again.append(i)
        open_ = again
    return _Fitted(kept, results, shortened)


def _count(report: DataReport, shortened: bool, cut: bool) -> None:
    report.turns_dropped += shortened
    report.left_cut += cut
    report.truncated += shortened or cut


def sft_rows(
    tokenizer: Any,
    examples: Sequence[Example],
    max_length: int,
    report: DataReport,
    train_on_prompts: bool = False,
) -> list[list[Row] | str]:
    """Step 1's rows of each example (several for a long plain text), or why it is left out."""
    chats = [i for i, example in enumerate(examples) if not example.text]
    shown = [demonstration(examples[i]) for i in chats]

    def renderings(prompts: list[list[Message]], numbers: list[int]) -> list[list[Rendered]]:
        whole = [([*prompt, *shown[n][1]], False) for prompt, n in zip(prompts, numbers, strict=True)]
        return [[rendered] for rendered in render_many(tokenizer, whole)]

    fitted = _fit([prompt for prompt, _ in shown], renderings, max_length)
    results: list[list[Row] | str] = [""] * len(examples)
    for n, (i, (row,)) in enumerate(zip(chats, fitted.rendered, strict=True)):
        ids, mask = row.input_ids[-max_length:], row.response_mask[-max_length:]
        cut = len(row.input_ids) > max_length
        if cut and 0 not in mask:
            results[i] = NO_ROOM
            continue
        _count(report, n in fitted.shortened, cut)
        report.open_turns += not (examples[i].response or examples[i].chosen)
        results[i] = [
            {"input_ids": ids, "response_mask": [1] * len(ids) if train_on_prompts else mask, "length": len(ids)}
        ]
    texts = [i for i, example in enumerate(examples) if example.text]
    for i, ids in zip(texts, encode(tokenizer, [examples[i].text for i in texts]), strict=True):
        ids = [*ids, tokenizer.eos_token_id]
        # Nothing predicts the first token of a row, so one token alone (EOS behind a full row) would teach nothing.
        chunks = [ids[at : at + max_length] for at in range(0, len(ids) - 1, max_length)]
        results[i] = [{"input_ids": c, "response_mask": [1] * len(c), "length": len(c)} for c in chunks] or NO_TOKEN
    return results


def pair_rows(
    tokenizer: Any, examples: Sequence[Example], max_length: int, report: DataReport
) -> list[list[Row] | str]:
    """Step 2's row of each example, or why it is left out; both answers keep the same prompt tokens."""

    def renderings(prompts: list[list[Message]], numbers: list[int]) -> list[list[Rendered]]:
        asked: list[tuple[list[Message], bool]] = []
        for prompt, n in zip(prompts, numbers, strict=True):
            example = examples[n]
            asked += [(prompt, True), ([*prompt, *example.chosen], False), ([*prompt, *example.rejected], False)]
        flat = render_many(tokenizer, asked)
        return [flat[i : i + 3] for i in range(0, len(flat), 3)]

    fitted = _fit([example.prompt for example in examples], renderings, max_length)
    results: list[list[Row] | str] = []
    for n, (prompt, chosen, rejected) in enumerate(fitted.rendered):
        start = len(prompt.input_ids)
        excess = max(0, max(len(chosen.input_ids), len(rejected.input_ids)) - max_length)
        if excess >= start:
            results.append(NO_ROOM)
            continue
        if chosen.input_ids == rejected.input_ids:
            results.append(SAME_TOKENS)
            continue
        _count(report, n in fitted.shortened, excess > 0)
        row: Row = {}
        for name, answer in (("chosen", chosen), ("rejected", rejected)):
            row[f"{name}_ids"] = answer.input_ids[excess:]
            # Only the compared answer is marked, not the assistant's earlier turns.
            row[f"{name}_mask"] = [0] * (start - excess) + answer.response_mask[start:]
        row["length"] = max(len(row["chosen_ids"]), len(row["rejected_ids"]))
        results.append([row])
    return results


def prompt_rows(
    tokenizer: Any, examples: Sequence[Example], max_length: int, report: DataReport
) -> list[list[Row] | str]:
    """Step 3's row of each example; the ids end with the generation prompt."""

    def renderings(prompts: list[list[Message]], numbers: list[int]) -> list[list[Rendered]]:
        return [[rendered] for rendered in render_many(tokenizer, [(prompt, True) for prompt in prompts])]

    fitted = _fit([example.prompt for example in examples], renderings, max_length)
    results: list[list[Row] | str] = []
    for n, (messages, (prompt,)) in enumerate(zip(fitted.prompts, fitted.rendered, strict=True)):
        _count(report, n in fitted.shortened, len(prompt.input_ids) > max_length)
        ids = prompt.input_ids[-max_length:]
        results.append([{"prompt_ids": ids, "messages": json.dumps(messages, ensure_ascii=False), "length": len(ids)}])
    return results
