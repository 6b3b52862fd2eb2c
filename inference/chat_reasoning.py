"""What a reasoning model writes before its answer: where it begins and ends, in the words of its own chat template.

Qwen 3 and DeepSeek R1 put it between ``<think>`` and ``</think>``, gpt-oss into a channel of its own. The template is
asked with a conversation that holds a reasoning; one that has no place for any leaves the usual words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from training.utils.data.template import Message, RowError, render_text, special_texts, structure_of

_QUESTION, _REASONING, _ANSWER = "Kwzhia", "Mvtrqe", "Zplodu"


@dataclass(frozen=True)
class Marks:
    """Around a reasoning, without the white space at their ends.

    Attributes:
        open: before it; the model writes it, or the generation prompt has.
        close: between it and the answer.
        leads: what may stand before an answer without reasoning.
        place: the template writes a reasoning that is given beside an answer, and decides which turns keep theirs.
        special: texts of special tokens, where the marks are made of them, else nothing.
    """

    open: str = "<think>"
    close: str = "</think>"
    leads: tuple[str, ...] = ()
    place: bool = False
    special: tuple[str, ...] = ()

    def split(self, text: str, opened: bool, whole: bool) -> tuple[str, str]:
        """(reasoning, answer) of what a model has written.

        Args:
            text: special tokens included if the marks have them.
            opened: the generation prompt ended with the opening mark.
            whole: no more will come; before that, half a mark at the end is held back.
        """
        body = text.lstrip()
        if not opened and not body.startswith(self.open):
            if not whole and any(mark.startswith(body) for mark in (self.open, *self.leads)):
                return "", ""
            lead = next((lead for lead in self.leads if body.startswith(lead)), "")
            return "", self._plain(body[len(lead) :].lstrip() if lead else text)
        if body.startswith(self.open):
            body = body[len(self.open) :]
        reasoning, closed, answer = body.partition(self.close)
        if not (closed or whole):
            half = (n for n in range(len(self.close) - 1, 0, -1) if reasoning.endswith(self.close[:n]))
            reasoning = reasoning[: len(reasoning) - next(half, 0)]
        return self._plain(reasoning).strip(), self._plain(answer).lstrip()

    def _plain(self, text: str) -> str:
        for token in self.special:
            text = text.replace(token, "")
        return text


def marks_of(tokenizer: PreTrainedTokenizerBase) -> Marks:
    """The marks of a tokenizer's template."""
    leads = tuple(lead.strip() for lead in structure_of(tokenizer).leads if lead.strip())
    question = {"role": "user", "content": _QUESTION}
    answer = {"role": "assistant", "content": _ANSWER, "reasoning": _REASONING}
    try:
        prompt = render_text(tokenizer, [question], add_generation_prompt=True)
        text = render_text(tokenizer, [question, answer])
    except RowError:
        return Marks(leads=leads)
    start, end = text.find(_REASONING), text.rfind(_ANSWER)
    close = text[start + len(_REASONING) : end].strip()
    if not (text.startswith(prompt) and len(prompt) <= start < end and close):
        return Marks(leads=leads)
    opening = text[len(prompt) : start].strip() or Marks.open
    special = tuple(token for token in special_texts(tokenizer) if token in opening + close)
    return Marks(opening, close, leads, True, special)


def is_opened(tokenizer: PreTrainedTokenizerBase, marks: Marks, messages: Sequence[Message]) -> bool:
    """Whether the generation prompt behind these messages begins a reasoning itself."""
    return render_text(tokenizer, messages, add_generation_prompt=True).rstrip().endswith(marks.open)
