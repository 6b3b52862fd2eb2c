"""The README.md inside a saved model's folder: what it is, what it was made from, how to load it."""

from __future__ import annotations

import datetime
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedTokenizerBase

from training.utils.data.chat import render
from training.utils.data.template import structure_of
from training.utils.model.loading import EMBEDDED
from training.utils.run.distributed import is_main
from training.utils.run.files import write_whole
from training.utils.run.folders import STEPS, shown
from training.utils.run.manifest import version_of

CARD = "README.md"
EMBEDDED_ORIGIN = {"base_model": "HuggingFaceTB/SmolLM2-135M-Instruct", "license": "apache-2.0"}


@dataclass(frozen=True)
class Kind:
    """What a step saves: title, what it does, and whether it is a sequence classifier."""

    step: str
    title: str
    sentence: str
    classifier: bool


KINDS = {
    "sft": Kind(
        "step1", "supervised fine-tuned model", "A chat model, taught to answer by example conversations.", False
    ),
    "dpo": Kind(
        "dpo",
        "preference-tuned model",
        "A chat model, fine-tuned on examples and then directly on pairs of a preferred and a rejected answer.",
        False,
    ),
    "reward": Kind(
        "step2",
        "reward model",
        "Scores an answer: the number at its last token, higher where people would prefer the answer. Scores compare "
        "answers to the same prompt; they mean nothing across prompts.",
        True,
    ),
    "actor": Kind(
        "step3",
        "RLHF model",
        "A chat model, fine-tuned on examples and then by PPO towards what a reward model prefers.",
        False,
    ),
    "ema": Kind(
        "step3",
        "RLHF model, averaged",
        "The moving average of the actor's weights over PPO's steps (--enable_ema): a chat model as the actor is.",
        False,
    ),
    "critic": Kind(
        "step3",
        "critic",
        "PPO's value function: at each token, the reward that the finished answer is expected to get. Made to go on "
        "training with, not to judge answers.",
        True,
    ),
}

_GENERATE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this file lies
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
messages = [{"role": "user", "content": "Why is the sky blue?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**inputs, max_new_tokens=100)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""
_SCORE = """\
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

folder = "."  # where this file lies
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder)
messages = [
    {"role": "user", "content": "Why is the sky blue?"},
    {"role": "assistant", "content": "Because air scatters blue light more than red."},
]
end = END  # the score stands at the token that ends an answer; the template may write more behind it
text = tokenizer.apply_chat_template(messages, tokenize=False)CLOSED
inputs = tokenizer(text[: text.rindex(end) + len(end)], add_special_tokens=False, return_tensors="pt")
with torch.no_grad():
    score = model(**inputs).logits[0, 0].item()
print(score)
"""
_ADAPTER = """\
from peft import CLASS

model = CLASS.from_pretrained("."MORE)
"""


def write_model_card(
    folder: Path,
    kind: str,
    base: tuple[str, str],
    *,
    argv: Sequence[str],
    data: Sequence[str],
    results: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Write ``README.md`` into a saved model's folder on rank 0, and into its ``adapter/`` where there is one.

    Args:
        kind: a key of `KINDS`.
        base: the model that training started from, as the user named it (``embedded`` for the packaged one), and
            where it lies: its own card tells the licence and the first model of the chain.
        data: lines about the rows, such as the data report's.
        results: the step's summary; numbers and yes/no answers are shown, also one level down.
        tokenizer: the saved one; tells which token an answer ends with.
    """
    if not is_main():
        return
    about, origin, program = KINDS[kind], _origin(*base), STEPS[KINDS[kind].step]
    code = _scoring_code(tokenizer) if about.classifier else _GENERATE
    first = origin.get("base_model", "")
    name = shown(base[0]) if Path(base[0]).is_dir() else base[0]
    started = f"`{name}`" + (f", which goes back to {first}" if first and first != name else "")
    precision = results.get("precision")
    inside = f", in {precision['dtype']}" if isinstance(precision, Mapping) and "dtype" in precision else ""
    made = f"{datetime.date.today().isoformat()} with Tripod {version_of('tripod') or ''}".rstrip()
    sections = [
        _front_matter(kind, origin),
        f"# {folder.parent.name}/{folder.name}: {about.title}",
        f"{about.sentence} Trained on {made}{inside}, from {started}.",
        "## Data\n\n" + "\n".join(f"- {line}" for line in data),
        f"## Flags\n\n```\n{shlex.join([program, *argv])}\n```\n\nFlags that are not named had their defaults; "
        f"`{program} --help` lists them.",
        "## Results\n\n" + _table(results),
        f"## How to load it\n\nPlain transformers is enough:\n\n```python\n{code}```",
        "The tokenizer has no token to pad with that is not an end token, so `config.json` names none: plain "
        "transformers scores one text at a time, and refuses batches."
        if about.classifier and tokenizer.pad_token_id == tokenizer.eos_token_id
        else "",
        "`reward_stats.json` holds the mean and standard deviation of the scores of preferred answers; "
        "`(score - mean) / std` is what step 3 trains on."
        if kind == "reward"
        else "",
        "## Licence\n\n" + _licence(origin),
    ]
    _write(folder / CARD, sections)
    if (folder / "adapter" / "adapter_config.json").is_file():
        _write(folder / "adapter" / CARD, _adapter_sections(kind, origin, started))


def _adapter_sections(kind: str, origin: Mapping[str, str], started: str) -> list[str]:
    scores = KINDS[kind].classifier  # the base may be a language model, of which transformers makes two outputs
    peft, more = ("SequenceClassification", ", num_labels=1") if scores else ("CausalLM", "")
    code = _ADAPTER.replace("CLASS", f"AutoPeftModelFor{peft}").replace("MORE", more)
    return [
        _front_matter(kind, origin),
        f"# LoRA adapter: {KINDS[kind].title}",
        f"The adapter alone, on top of {started}. The folder above holds the same model with the adapter merged into "
        "the weights.",
        f"## How to load it\n\n```python\n{code}```",
        "## Licence\n\n" + _licence(origin),
    ]


def read_front_matter(card: Path) -> dict[str, Any]:
    """The YAML block at the head of a model card; empty where there is no card, no block, or none that is YAML."""
    if not card.is_file():
        return {}
    parts = card.read_text(encoding="utf-8", errors="replace").split("---\n")
    try:
        found = yaml.safe_load(parts[1]) if len(parts) > 2 and not parts[0].strip() else {}
    except yaml.YAMLError:
        return {}  # a card is prose for people; one that is no YAML tells nothing
    return found if isinstance(found, dict) else {}


def _origin(base: str, base_folder: str) -> dict[str, str]:
    """``license`` and ``base_model`` (the first model of the chain), as far as they are known."""
    if base == EMBEDDED:
        return dict(EMBEDDED_ORIGIN)
    card = read_front_matter(Path(base_folder) / CARD)
    known = {key: card[key] for key in ("license", "license_name", "license_link") if isinstance(card.get(key), str)}
    first = card.get("base_model") if "tripod" in (card.get("tags") or []) else None
    if not Path(base_folder).is_dir():
        first = base  # a hub name
    return known | ({"base_model": first} if isinstance(first, str) else {})


def _scoring_code(tokenizer: PreTrainedTokenizerBase) -> str:
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    end = tokenizer.convert_ids_to_tokens(render(tokenizer, turn).input_ids[-1])
    closed = " + end" if structure_of(tokenizer).closes else ""  # GLM-4's template leaves a last answer open
    return _SCORE.replace("END", repr(str(end))).replace("CLOSED", closed)


def _front_matter(kind: str, origin: Mapping[str, str]) -> str:
    task = "text-classification" if KINDS[kind].classifier else "text-generation"
    head: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": task, **origin, "tags": ["tripod", kind]}
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---"


def _table(results: Mapping[str, Any]) -> str:
    rows = []
    for name, value in results.items():
        below = value.items() if isinstance(value, Mapping) else [("", value)]
        for inner, number in below:
            text = _number(number)
            if text is not None:
                title = f"{name}: {inner}" if inner else name
                rows.append(f"| {title.replace('_', ' ').replace('|', '/')} | {text} |")
    return "\n".join(["| | |", "|---|---|", *rows])


def _number(value: Any) -> str | None:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value) if isinstance(value, int) else None


def _licence(origin: Mapping[str, str]) -> str:
    first = origin.get("base_model", "the model that training started from")
    named = origin.get("license_name") or origin.get("license")
    under = f", which is under {named}" if named else "; see there for its terms"
    return (
        f"The weights derive from {first}{under}. Its terms hold for them, and so may those of the data listed above. "
        "Nothing here has been checked for truth or harm: test the model on your own prompts before others use it."
    )


def _write(card: Path, sections: Sequence[str]) -> None:
    write_whole(card, "\n\n".join(part for part in sections if part) + "\n")
