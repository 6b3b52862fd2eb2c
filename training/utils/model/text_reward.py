"""A frozen reward model that reads conversations as text, with a tokenizer and a chat template of its own.

Where actor and reward model share a tokenizer, step 3 scores the sampled tokens themselves and needs none of this. It
serves reward models of other families, judges, and the chat page.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from training.utils.data.chat import read_what_fits
from training.utils.engine.frozen import frozen_role, load_frozen_scorer
from training.utils.engine.zero_config import frozen_config
from training.utils.model import classifiers
from training.utils.model.forward import module_of
from training.utils.model.loading import load_strictly
from training.utils.model.tokenizer import check_vocabulary, load_tokenizer, read_tokenizer

Messages = Sequence[dict[str, str]]


def _places(model: Any) -> int | None:
    """Tokens that a model has positions for; None where it counts without end.

    RoBERTa and its like begin to count behind the place of their padding.
    """
    before = [
        1 + module.padding_idx
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
    ]
    places: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return places and places - max(before, default=0)


class TextRewardModel:
    """Scores the last message of a conversation, an assistant's.

    Args:
        model: a frozen `TokenScorer`, whose score at the last token is the reward; with ``own_forward`` any sequence
            classifier with one output.
        tokenizer: the reward model's own. Without a chat template the conversation and its answer are given as a pair
            of texts, as reward models on BERT-like encoders are trained.
        own_forward: the model serves through its own forward.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, *, own_forward: bool = False) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.own_forward = own_forward
        self.limit = _places(module_of(model))

    def encode(self, messages: Messages) -> list[int]:
        """Token ids in the chat template; without room the oldest turns go first, then the left side."""
        ids, _ = read_what_fits(self.tokenizer, messages, self.limit)
        return ids if self.limit is None else ids[-self.limit :]

    @torch.no_grad()
    def rewards(self, conversations: Sequence[Messages], batch_size: int) -> torch.Tensor:
        """Raw rewards ``[N]``, fp32 on the CPU; a collective if the model is sharded.

        An answer that was cut is read as if it ended there.

        Args:
            conversations: each ends with the assistant's message that is scored.
        """
        device = next(self.model.parameters()).device
        if self.own_forward and self.tokenizer.pad_token_id is None:
            batch_size = 1  # such a forward may look for its pad token, so without one there is no padding
        parts = []
        for start in range(0, len(conversations), batch_size):
            piece = conversations[start : start + batch_size]
            batch = self._right_padded(self._template(piece) if self.tokenizer.chat_template else self._pairs(piece))
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            if self.own_forward:
                scores = self.model(**batch).logits[:, 0]
            else:
                last = batch["attention_mask"].sum(1, keepdim=True) - 1
                scores = self.model(batch["input_ids"], batch["attention_mask"]).gather(1, last).squeeze(1)
            parts.append(scores.float().cpu())
        return torch.cat(parts)

    def _template(self, conversations: Sequence[Messages]) -> dict[str, list[list[int]]]:
        """Conversations in the chat template, as the tokenizer would return them."""
        return {"input_ids": [self.encode(messages) for messages in conversations]}

    def _pairs(self, conversations: Sequence[Messages]) -> dict[str, list[list[int]]]:
        """(what was said before, answer) as the tokenizer's own pairs, with its token types if it has any.

        Without room the prompt is cut first, where the tokenizer cuts, then the answer on its left: the tokenizer's own
        truncation raises where nothing would be left of one of them.
        """
        before = [
            turns[0]["content"] if len(turns) == 2 else "\n".join(f"{m['role']}: {m['content']}" for m in turns[:-1])
            for turns in conversations
        ]
        answers = [turns[-1]["content"] for turns in conversations]
        found = self.tokenizer(before, answers, return_special_tokens_mask=True, verbose=False)
        encoded = {name: list(found[name]) for name in ("input_ids", "token_type_ids") if name in found}
        for i, special in enumerate(found["special_tokens_mask"]):
            if self.limit is not None and len(special) > self.limit:
                words = [at for at, is_special in enumerate(special) if not is_special]
                size = len(self.tokenizer(before[i], add_special_tokens=False, verbose=False)["input_ids"])
                prompt = words[:size] if self.tokenizer.truncation_side == "left" else words[:size][::-1]
                gone = {*[*prompt, *words[size:]][: len(special) - self.limit]}
                for rows in encoded.values():
                    rows[i] = [value for at, value in enumerate(rows[i]) if at not in gone]
        return encoded

    def _right_padded(self, encoded: dict[str, list[list[int]]]) -> dict[str, torch.Tensor]:
        """Rows of unequal lengths as tensors ``[N, T]``, with a mask.

        Always on the right, whatever the tokenizer says: a family with absolute positions would give a row other
        positions beside a longer one. Always with the pad token: some find positions or the last token by it.
        """
        pad = self.tokenizer.pad_token_id
        fill = {"input_ids": pad if pad is not None else 0, "token_type_ids": self.tokenizer.pad_token_type_id}
        lengths = [len(row) for row in encoded["input_ids"]]
        batch = {
            name: torch.tensor([row + [fill[name]] * (max(lengths) - len(row)) for row in rows])
            for name, rows in encoded.items()
        }
        mask = [[1] * length + [0] * (max(lengths) - length) for length in lengths]
        return batch | {"attention_mask": torch.tensor(mask)}


def load_reward_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a reward model; without a chat template it is taken as it is.

    Raises:
        UserError: no tokenizer there, or its ids do not fit the model's embeddings.
    """
    plain = read_tokenizer(path)
    tokenizer = load_tokenizer(path) if plain.chat_template else plain
    check_vocabulary(path, tokenizer)
    return tokenizer


def load_text_reward_model(
    path: str,
    *,
    dtype: str,
    device: torch.device,
    zero_stage: int = 0,
    offload: bool = False,
    attn_implementation: str = "sdpa",
) -> TextRewardModel:
    """Load a frozen reward model of any family; a collective at ZeRO-3.

    The arguments are those of `training.utils.engine.frozen.load_frozen_scorer`.

    Raises:
        UserError: no model or tokenizer there, no reward head, or more than one output.
    """
    classifiers.check_reward_head(path)
    tokenizer = load_reward_tokenizer(path)
    if classifiers.scores_tokens(path):
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        scorer = load_frozen_scorer(
            path,
            zero_stage=zero_stage,
            dtype=dtype,
            pad_token_id=int(pad),
            attn_implementation=attn_implementation,
            offload=offload,
            device=device,
        )
        return TextRewardModel(scorer, tokenizer)
    config = frozen_config(zero_stage=zero_stage, dtype=dtype, offload=offload)
    model, _ = load_strictly(AutoModelForSequenceClassification, path, dtype, attn_implementation, config)
    role = frozen_role(model, config, device)
    return TextRewardModel(role, tokenizer, own_forward=True)
