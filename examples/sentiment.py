"""Rewards for a friendly text: what a text classifier says, or, without one, words.

    --reward_function examples/sentiment.py:classifier
    --reward_function examples/sentiment.py:words

To use another classifier copy this file and change `MODEL`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

MODEL = "lvwerra/distilbert-imdb"  # any classifier of two classes: a hub name or a folder
_BATCH = 32

PRAISE = """beautiful best brilliant charming clever delight enjoy excellent fun funny good great happy honest joy kind
like love lovely perfect recommend smile strong sweet tender warm wonderful worth"""
BLAME = """annoying awful bad badly boring cheap confused dull embarrassing fail fails hate insult mess never nothing
poor sad silly slow sorry stupid terrible ugly waste weak worse worst wrong"""


@functools.cache
def _loaded() -> tuple[Any, Any, int]:
    """The classifier, its tokenizer, and which of its classes is the positive one: by its name, else the second."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    model = AutoModelForSequenceClassification.from_pretrained(MODEL).to(device).eval()
    if model.config.num_labels != 2:
        raise ValueError(f"{MODEL} has {model.config.num_labels} classes, not a positive and a negative one")
    named = [i for i, name in model.config.id2label.items() if str(name).lower().startswith("pos")]
    return model, AutoTokenizer.from_pretrained(MODEL), named[0] if named else 1


def classifier(
    prompts: Sequence[Sequence[dict[str, str]]], responses: Sequence[str], rows: Sequence[dict[str, Any]]
) -> list[float]:
    """The classifier's logit of the positive class minus that of the negative one, for prompt and response together.

    Args:
        prompts: conversations; the last turn is what the response goes on from.
        responses: texts.
        rows: not looked at.
    """
    import torch

    model, tokenizer, positive = _loaded()
    texts = [f"{turns[-1]['content']} {response}" for turns, response in zip(prompts, responses, strict=True)]
    found: list[float] = []
    for start in range(0, len(texts), _BATCH):
        batch = tokenizer(texts[start : start + _BATCH], return_tensors="pt", padding=True, truncation=True)
        with torch.no_grad():
            logits = model(**batch.to(model.device)).logits.float()
        found += (logits[:, positive] - logits[:, 1 - positive]).tolist()
    return found


def words(
    prompts: Sequence[Sequence[dict[str, str]]], responses: Sequence[str], rows: Sequence[dict[str, Any]]
) -> list[float]:
    """Words of praise minus words of blame in each response, each word once; only `responses` is looked at."""
    praise, blame = set(PRAISE.split()), set(BLAME.split())
    found = [set(re.findall(r"[a-z]+", response.lower())) for response in responses]
    return [float(len(praise & said) - len(blame & said)) for said in found]
