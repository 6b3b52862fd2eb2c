"""Steps 1, 2 and DPO on fixed rows, whole on one rank or divided among ranks; on any number of ranks."""

from __future__ import annotations

from typing import Any

import torch

from tests.utils.engine.engine_checks import TINY_SHARDS, collate, named_parameters
from training.step2_dpo_finetuning.pairs import Preferences, answer_log_probs, answer_tokens
from training.step2_reward_model_finetuning.pairs import score_pairs
from training.step2_reward_model_finetuning.preference import bradley_terry_loss
from training.utils.arguments import DPOArguments, LoraArguments
from training.utils.data.batches import SIDES
from training.utils.engine import engine as engines, sequence_parallel
from training.utils.engine.frozen import load_reference
from training.utils.engine.zero_config import deepspeed_config
from training.utils.memory.live import LiveMemory
from training.utils.model import classifiers, loading
from training.utils.model.forward import TokenScorer, enable_gradient_checkpointing, response_log_probs
from training.utils.model.language_modelling import negative_log_likelihood
from training.utils.model.lora import with_adapters
from training.utils.run.distributed import data_rank, data_size, init_distributed, reduce_sums, share_rows

LENGTHS = (37, 5, 90, 64, 3, 71, 22, 48)  # of rows; the last few columns of a batch are one row's alone
PAD = 2


def rows(vocabulary: int = 400) -> list[tuple[list[int], list[int]]]:
    """Eight rows of (ids, response mask) of very unequal lengths; of some all response is on one rank."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for i, length in enumerate(LENGTHS):
        prompt = 1 + (7 * i) % (length - 1)
        made.append((torch.randint(3, vocabulary - 1, (length,), generator=generator).tolist(), [0] * prompt))
        made[-1][1].extend([1] * (length - prompt))
    return made


def pair_batches(step: int | str, micro_batch: int) -> list[dict[str, torch.Tensor]]:
    """This rank's micro-batches, each as wide as its longest row."""
    everything = rows()
    share = len(everything) // data_size()
    batches = []
    for start in range(data_rank() * share, (data_rank() + 1) * share, micro_batch):
        numbers = range(start, min(start + micro_batch, (data_rank() + 1) * share))
        picked = [everything[i] for i in numbers]
        if step != 1:  # the rejected answer of a row is the answer of another
            picked += [everything[(i + 1 + i % 2) % len(everything)] for i in numbers]
        batch = collate(picked, max(len(ids) for ids, _ in picked))
        if step == 1:
            batches.append(batch)
            continue
        sides = torch.arange(2 * len(numbers), device=batch["input_ids"].device).chunk(2)
        batches.append(batch | dict(zip(SIDES, sides, strict=True)))
    return batches


def trained(
    step: int | str,
    path: str,
    *,
    ranks: int,
    stage: int,
    dtype: str = "fp32",
    lora: bool = False,
    base_bits: int = 0,
    checkpointing: bool = False,
    micro_batch: int = 2,
    steps: int = 2,
    fault: bool = False,
) -> dict[str, Any]:
    """Losses, gradient norms and final weights of a few optimizer steps; log-probs or rewards in evaluation before.

    Args:
        step: 1, 2 or ``dpo``.
        path: of a causal LM.
        ranks: that share a row.
        stage, dtype, lora, base_bits, checkpointing: as the flags.
        micro_batch: rows (pairs) of each share.
        fault: gradients are averaged over shares of the rows, not over ranks.
    """
    device = init_distributed()
    share_rows(ranks)
    attention = sequence_parallel.ULYSSES if ranks > 1 else "sdpa"
    load: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention}
    bits = {"base_bits": base_bits}
    config = deepspeed_config(zero_stage=stage, dtype=dtype, overrides=TINY_SHARDS)
    try:
        torch.manual_seed(0)
        model: Any
        if step == 2:
            more: dict[str, Any] = load | bits | {"pad_token_id": PAD, "fresh_head_seed": 0}
            model = classifiers.load_classifier(path, ds_config=config, **more)
        else:
            model = loading.load_causal_lm(path, ds_config=config, **load, **bits)
        if lora:
            torch.manual_seed(0)
            model = with_adapters(model, LoraArguments(4, "q_proj,down_proj", True, **bits))
        wrapped = TokenScorer(model) if step == 2 else model
        if checkpointing:
            enable_gradient_checkpointing(wrapped)
        engine = engines.initialize_engine(
            wrapped.to(device), config, learning_rate=1e-3, weight_decay=0.1, num_warmup_steps=0, total_steps=100
        )
        if step == "dpo":
            copied = {"zero_stage": stage, "offload": False, "device": device} | load
            frozen = load_reference(path, adapters_only=lora, **copied)
            preferences = Preferences(engine, frozen, DPOArguments())
        batches = pair_batches(step, micro_batch)
        count = sum(sum(mask[1:]) for _, mask in rows()) if step == 1 else len(LENGTHS)
        engine.eval()
        result: dict[str, Any] = {"losses": [], "norms": []}
        with torch.no_grad():
            if step == 1:
                result["eval"] = [negative_log_likelihood(engine, batch) for batch in batches]
            elif step == 2:
                result["eval"] = [torch.stack(score_pairs(engine, batch)) for batch in batches]
            else:
                result["eval"] = [answer_log_probs(engine, batch) for batch in batches]
        for _ in range(steps):
            references = [preferences.reference(batch) if step == "dpo" else None for batch in batches]
            engine.train()
            total = 0.0
            for batch, reference in zip(batches, references, strict=True):
                if step == 1:
                    loss = negative_log_likelihood(engine, batch)
                elif step == 2:
                    loss = bradley_terry_loss(*score_pairs(engine, batch), "log_sig").sum()
                else:
                    judged = preferences.judge(
                        answer_log_probs(engine, batch), reference, answer_tokens(batch), [0.0, 0.0]
                    )
                    loss = judged["loss"].sum()
                engines.backward(engine, loss / ranks if fault else loss, count)
                total += loss.item()
            result["norms"].append(engines.optimizer_step(engine).grad_norm)
            result["losses"].append(reduce_sums({"loss": total}, device)["loss"] / count)
        result["weights"] = named_parameters(engine)
        return result
    finally:
        share_rows(1)


def log_probs_of(path: str, attention: str, ids: torch.Tensor) -> torch.Tensor:
    """Log-probs of rows without padding, by a model that is loaded with an attention."""
    model = loading.load_causal_lm(path, dtype="fp32", attn_implementation=attention).eval()
    with torch.no_grad():
        return response_log_probs(model, ids, torch.ones_like(ids), torch.ones_like(ids))[0]


def greedy(model: Any, ids: torch.Tensor) -> list[list[int]]:
    """A few greedy tokens after each row."""
    length = ids.shape[1]
    found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, eos_token_id=[])
    return found[:, length:].tolist()


@torch.no_grad()
def beside(path: str, ids: torch.Tensor) -> dict[str, Any]:
    """A model that divides rows among two ranks, and another in the same process that does not."""
    init_distributed()
    share_rows(2)
    try:
        divided = loading.load_causal_lm(path, dtype="fp32", attn_implementation=sequence_parallel.ULYSSES).eval()
        mask = torch.ones_like(ids)
        found = {"divided": response_log_probs(divided, ids, mask, mask)[0]}
        found["whole"] = log_probs_of(path, "sdpa", ids)
        with sequence_parallel.whole_rows(divided):
            found["answers"] = greedy(divided, ids)
        found["again"] = response_log_probs(divided, ids, mask, mask)[0]
        return found
    finally:
        share_rows(1)


@torch.no_grad()
def refused(path: str) -> list[str]:
    """What is said of rows that can not be divided: padded on the left, with several answers, and with a mask."""
    share_rows(2)
    said = []
    try:
        model = loading.load_causal_lm(path, dtype="fp32", attn_implementation=sequence_parallel.ULYSSES).eval()
        ids = torch.arange(3, 15).view(2, 6)
        left, parts = torch.ones_like(ids), torch.ones_like(ids)
        left[1, :2] = 0
        parts[:, 4:] = 2
        places = {"position_ids": torch.arange(3).repeat(2, 1)}
        for attempt in (
            lambda: response_log_probs(model, ids, left, left),
            lambda: response_log_probs(model, ids, parts, left),
            lambda: model(input_ids=ids[:, :3], attention_mask=torch.ones(2, 1, 3, 3).bool(), **places),
        ):
            try:
                attempt()
                said.append("")
            except ValueError as error:
                said.append(str(error))
        return said
    finally:
        share_rows(1)


def live_memory(path: str, classifier: bool, length: int, checkpointing: bool) -> int:
    """Bytes of tensors at the peak of a forward and backward over two rows that two ranks divide."""
    share_rows(2)
    try:
        model: Any
        load: dict[str, Any] = {"dtype": "fp32", "attn_implementation": sequence_parallel.ULYSSES}
        if classifier:
            load |= {"pad_token_id": PAD, "fresh_head_seed": 0}
            model = TokenScorer(classifiers.load_classifier(path, **load))
        else:
            model = loading.load_causal_lm(path, **load)
        model.train()
        if checkpointing:
            enable_gradient_checkpointing(model)
        ids = torch.full((2, length), 5)
        mask = torch.ones_like(ids)
        with LiveMemory([*model.parameters(), *model.buffers()]) as memory:
            found = model(ids, mask) if classifier else response_log_probs(model, ids, mask, mask)[0]
            found.sum().backward()
        return memory.peak
    finally:
        share_rows(1)
