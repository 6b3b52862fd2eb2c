"""What DeepSpeed really allocates, on a model so wide and batches so small that activations hardly count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from training.utils.arguments import LoraArguments
from training.utils.engine import engine as engines
from training.utils.engine.zero_config import deepspeed_config
from training.utils.memory.live import LiveMemory
from training.utils.memory.zero import RoleSize
from training.utils.model import loading
from training.utils.model.forward import response_log_probs
from training.utils.model.lora import with_adapters
from training.utils.run.distributed import init_distributed

BUCKET = 50_000_000  # elements; far more than the model has


def save_wide_model(folder: Path, *, tie: bool = True) -> Path:
    """A four-layer Llama of 3.1 million parameters and an output layer that may be its own, without a tokenizer."""
    config = LlamaConfig(
        vocab_size=2000,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=tie,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def deepspeed_memory(
    path: str,
    *,
    stage: int,
    dtype: str,
    offload: bool = False,
    lora: LoraArguments | None = None,
    accumulation: int = 1,
    bucket: int = BUCKET,
) -> dict[str, Any]:
    """Bytes alive after the second step, and the peaks of its backward and its step; and the model's size."""
    device = init_distributed()
    sizes = {"reduce_bucket_size": bucket, "stage3_prefetch_bucket_size": 0, "stage3_param_persistence_threshold": 0}
    overrides = {"zero_optimization": sizes}
    config = deepspeed_config(zero_stage=stage, dtype=dtype, offload=offload, overrides=overrides)
    ids = torch.arange(3, 8).unsqueeze(0)
    mask = torch.ones_like(ids)
    with LiveMemory() as memory:
        model: Any = loading.load_causal_lm(path, dtype=dtype, ds_config=config)
        for parameter in model.parameters():  # made by the loader, below what a dispatch mode sees
            if parameter.numel():
                memory.add(parameter.data)
        if lora:
            model = with_adapters(model, lora)
        counts = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
        engine = engines.initialize_engine(
            model.to(device), config, learning_rate=1e-3, weight_decay=0.0, num_warmup_steps=0, total_steps=9
        )
        for _ in range(2):
            memory.peak = memory.bytes
            for _ in range(accumulation):
                engines.backward(engine, -response_log_probs(engine, ids, mask, mask)[0].sum(), 3.0)
            backward = memory.peak
            memory.peak = memory.bytes
            engines.optimizer_step(engine)
            step = memory.peak
        resident = memory.bytes
    trained = [n for n, trains in counts if trains]
    size = RoleSize(sum(n for n, _ in counts), sum(trained), max(trained))
    return {"resident": resident, "backward": backward, "step": step, "size": size, "config": config}
