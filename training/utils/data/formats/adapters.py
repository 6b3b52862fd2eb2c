"""Named adapters: datasets whose columns alone would mislead, chosen by the last part of the source's name.

To add one, write a function as in shapes.py, and give it a line in `ADAPTERS` and one in the second table of
docs/data.md.
"""

from __future__ import annotations

import re

from training.utils.data.formats.conversations import (
    BLANKS,
    Converter,
    Example,
    Row,
    answered,
    as_prompt,
    assistant_turn,
    conversation,
    first_item,
    plain_text,
    preference,
    text_of,
)
from training.utils.data.formats.shapes import prompt_chosen_rejected, webgpt
from training.utils.data.template import RowError


def _rlhf_reward_datasets(row: Row) -> list[Example]:
    """yitingxie/rlhf-reward-datasets: the prompt lacks its last "Assistant:", the answers begin with it."""
    prompt = as_prompt(text_of(row, "prompt"))
    answers = [assistant_turn(text_of(row, name).split("Assistant:")[-1].strip()) for name in ("chosen", "rejected")]
    return preference(prompt, answers[0], answers[1])


def _multi_turn_alpaca(row: Row) -> list[Example]:
    """MultiTurnAlpaca: the instruction holds the whole dialogue so far."""

    def marked(head: re.Match[str]) -> str:
        """The beginning of a turn, if it stands at the beginning of a line."""
        name, line = "Assistant" if head[2] == "Assistant" else "Human", head[1].find("\n")
        first = not head.start() and name == "Human"
        return f"{head[1][: max(line, 0)]}\n\n{name}:" if line >= 0 or first else head[0]

    dialogue = re.sub(rf"{BLANKS}(User|Human|Assistant)\s*+:", marked, text_of(row, "instruction"))
    return answered(dialogue, text_of(row, "output"))


def _webgpt_comparisons(row: Row) -> list[Example]:
    """WebGPT's answers cite pages as [1] or [2, 3] that a model without a browser can not know."""
    clean = {name: re.sub(rf"{BLANKS}\[[\d\s,]+\]", "", text_of(row, name)) for name in ("answer_0", "answer_1")}
    return webgpt({**row, **clean})


def _sharegpt_alpaca(row: Row) -> list[Example]:
    """pvduy/sharegpt_alpaca_oa_vicuna_format: USER: and ASSISTANT: in one line."""
    text = re.sub(f"{BLANKS}USER:", "\n\nHuman:", text_of(row, "prompt").replace("</s>", ""))
    text = re.sub(f"{BLANKS}ASSISTANT:", "\n\nAssistant:", text)
    return answered(text, text_of(row, "label").replace("</s>", "").strip())


def _guanaco(row: Row) -> list[Example]:
    """openassistant-guanaco: a text with "### Human:" and "### Assistant:"."""
    text = re.sub(f"{BLANKS}### (Human|Assistant):", r"\n\n\2:", text_of(row, "text"))
    return [conversation(as_prompt(text))]


def _comparisons(row: Row) -> list[Example]:
    """CarperAI/openai_summarize_comparisons: summaries carry the end marker of another tokenizer."""
    marker = re.compile(r"<\|(startoftext|endoftext)\|>")
    clean = {name: marker.sub("", text_of(row, name)).strip() for name in ("prompt", "chosen", "rejected")}
    return prompt_chosen_rejected(clean)


def _mkqa(language: str) -> Converter:
    def convert(row: Row) -> list[Example]:
        """The question and its first answer in this language."""
        queries, answers = row["queries"], row["answers"]
        if not isinstance(queries, dict) or not isinstance(answers, dict):
            raise RowError("queries and answers must hold a text for each language, such as zh_cn")
        return answered(
            plain_text(queries.get(language), f"queries.{language}"),
            first_item(answers.get(language), "answers"),
        )

    return convert


def _qg_jaquad(row: Row) -> list[Example]:
    return answered(text_of(row, "question"), text_of(row, "sentence"))


def _qag_jaquad(row: Row) -> list[Example]:
    """lmqg/qag_jaquad: the first of several questions, answered by the paragraph."""
    return answered(first_item(row["questions"], "questions"), text_of(row, "paragraph"))


ADAPTERS: dict[str, tuple[frozenset[str], Converter]] = {
    "rlhf-reward-datasets": (frozenset({"prompt", "chosen", "rejected"}), _rlhf_reward_datasets),
    "multiturnalpaca": (frozenset({"instruction", "output"}), _multi_turn_alpaca),
    "webgpt_comparisons": (frozenset({"question", "answer_0", "answer_1", "score_0", "score_1"}), _webgpt_comparisons),
    "sharegpt_alpaca_oa_vicuna_format": (frozenset({"prompt", "label"}), _sharegpt_alpaca),
    "openassistant-guanaco": (frozenset({"text"}), _guanaco),
    "openai_summarize_comparisons": (frozenset({"prompt", "chosen", "rejected"}), _comparisons),
    "mkqa-chinese": (frozenset({"queries", "answers"}), _mkqa("zh_cn")),
    "mkqa-japanese": (frozenset({"queries", "answers"}), _mkqa("ja")),
    "qg_jaquad": (frozenset({"question", "sentence"}), _qg_jaquad),
    "qag_jaquad": (frozenset({"questions", "paragraph"}), _qag_jaquad),
}
