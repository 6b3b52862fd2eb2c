"""A model judged by ROUGE, for this process and the rank pair."""

from __future__ import annotations

from typing import Any

import torch

from tests.tiny import tiny_tokenizer
from tests.utils.engine.engine_checks import TINY_SHARDS
from training.step1_supervised_finetuning.answers import RougeJudge
from training.utils.engine import engine as engines
from training.utils.engine.zero_config import deepspeed_config
from training.utils.model import loading
from training.utils.run.distributed import init_distributed

TEXTS = ["a shat forat", "s p p and more of it", "tea", "ab and a story", "no"]


def held_out_rows() -> list[dict[str, Any]]:
    """Prompts and responses of unequal lengths; the last prompt leaves no room within 40 tokens."""
    tokenizer, rows = tiny_tokenizer(), []
    for n, text in enumerate(TEXTS):
        prompt = torch.randint(3, 399, (36 if n == 4 else 3 + n,), generator=torch.Generator().manual_seed(n)).tolist()
        response = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        rows.append({"input_ids": [*prompt, *response], "response_mask": [0] * len(prompt) + [1] * len(response)})
    return rows


def judged(path: str, *, stage: int, batch_size: int) -> tuple[float, bool]:
    """The figure, and whether the engine trains on afterwards."""
    device = init_distributed()
    config = deepspeed_config(zero_stage=stage, dtype="fp32", overrides=TINY_SHARDS)
    model: Any = loading.load_causal_lm(path, dtype="fp32", ds_config=config)
    engine = engines.initialize_engine(
        model.to(device), config, learning_rate=1e-3, weight_decay=0.0, num_warmup_steps=0, total_steps=10
    )
    judge = RougeJudge(held_out_rows(), tiny_tokenizer(), 40, batch_size)
    return judge.score(engine), engine.module.training
