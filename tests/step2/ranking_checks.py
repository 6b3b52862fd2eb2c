"""A reward model trained on rankings, for this process (one rank) and the rank pair; and the same pair by pair."""

from __future__ import annotations

import itertools
from typing import Any

import datasets
import torch

from tests.utils.engine.engine_checks import TINY_SHARDS
from training.step2_reward_model_finetuning.pairs import (
    held_out_rewards,
    pair_weights,
    score_pairs,
)
from training.step2_reward_model_finetuning.preference import bradley_terry_loss, pair_metrics
from training.utils.data.batches import pair_micro_batches, rankings_of
from training.utils.engine import engine as engines
from training.utils.engine.zero_config import deepspeed_config
from training.utils.model import classifiers
from training.utils.model.export import full_state_dict
from training.utils.model.forward import TokenScorer, answer_rewards
from training.utils.run.distributed import init_distributed, reduce_sums
from training.utils.sharing.trial import find_sharing

PAD, STEPS, SEED = 2, 3, 5
RATE: dict[str, Any] = {
    "learning_rate": 1e-3,
    "weight_decay": 0.1,
    "num_warmup_steps": 0,
    "total_steps": 100,
    "lr_scheduler_type": "constant",
}


def fixed_rankings() -> list[dict[str, Any]]:
    """Pairs of five prompts: rankings of 2, 3, 4, 2 and 5 answers of unequal lengths, with a tie in the last one."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for prompt, count in enumerate((2, 3, 4, 2, 5)):
        start = torch.randint(3, 399, (3 + prompt,), generator=generator).tolist()
        answers = [torch.randint(3, 399, (2 + (5 * i + prompt) % 7,), generator=generator) for i in range(count)]
        ranks = [1, 2, 2, 3, 4] if count == 5 else range(count)
        pairs = [(i, j) for i, j in itertools.combinations(range(count), 2) if ranks[i] < ranks[j]]
        for pair in pairs:
            row: dict[str, Any] = {"pairs": len(pairs), "length": 0, "source": f"s{prompt}"}
            for name, i in zip(("chosen", "rejected"), pair, strict=True):
                row[f"{name}_ids"] = [*start, *answers[i].tolist()]
                row[f"{name}_mask"] = [0] * len(start) + [1] * len(answers[i])
                row["length"] = max(row["length"], len(row[f"{name}_ids"]))
            rows.append(row)
    return rows


def train_rankings(
    path: str, *, stage: int, micro_batch: int, fault: bool = False, shares: bool = False
) -> dict[str, Any]:
    """Losses of three steps on all rankings, and what the model says of them then; the fault: every pair counts one.

    With ``shares`` answers stand behind their prompt where the model says that they may.
    """
    device = init_distributed()
    config = deepspeed_config(zero_stage=stage, dtype="fp32", micro_batch_size=micro_batch, overrides=TINY_SHARDS)
    model: Any = classifiers.load_classifier(
        path, dtype="fp32", pad_token_id=PAD, ds_config=config, fresh_head_seed=SEED
    )
    engine = engines.initialize_engine(TokenScorer(model).to(device), config, **RATE)
    dataset = datasets.Dataset.from_list(fixed_rankings())
    rankings = rankings_of(dataset)
    sharing = find_sharing(engine, answer_rewards, PAD) if shares else None
    engine.train()
    losses, sequences = [], 0
    for _ in range(STEPS):
        total = 0.0
        for batch in pair_micro_batches(dataset, rankings, micro_batch, PAD, device, sharing):
            weights = (batch["weights"] > 0).float() if fault else batch["weights"]
            loss = (weights * bradley_terry_loss(*score_pairs(engine, batch), "log_sig")).sum()
            engines.backward(engine, loss, len(rankings))
            total += loss.item()
            sequences += len(batch.get("shared_ids", batch["input_ids"])) * bool(batch["weights"].any())
        engines.optimizer_step(engine)
        losses.append(reduce_sums({"loss": total}, device)["loss"] / len(rankings))
    rewards = held_out_rewards(engine, dataset, 2, PAD, device, sharing)
    state = {name: tensor.float() for name, tensor in full_state_dict(engine).items()}
    metrics = pair_metrics(rewards, pair_weights(dataset))
    return {"losses": losses, "state": state, "rewards": rewards, "metrics": metrics, "sequences": sequences}


def train_pair_by_pair(path: str) -> dict[str, Any]:
    """The same in plain PyTorch: every pair through the model by itself, with its weight."""
    model = classifiers.load_classifier(path, dtype="fp32", pad_token_id=PAD, fresh_head_seed=SEED)
    groups = engines.parameter_groups(model, RATE["weight_decay"])
    optimizer = torch.optim.AdamW(groups, lr=RATE["learning_rate"], betas=engines.ADAM_BETAS)
    rows = fixed_rankings()
    prompts = sum(1 / row["pairs"] for row in rows)

    def rewards() -> list[tuple[torch.Tensor, torch.Tensor]]:
        def score(ids: list[int]) -> torch.Tensor:
            return model(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).logits[0, 0]

        return [(score(row["chosen_ids"]), score(row["rejected_ids"])) for row in rows]

    losses = []
    for _ in range(STEPS):
        weighed = [
            -torch.nn.functional.logsigmoid(good - bad) / row["pairs"]
            for row, (good, bad) in zip(rows, rewards(), strict=True)
        ]
        loss = torch.stack(weighed).sum() / prompts
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        found = [(good.item(), bad.item()) for good, bad in rewards()]
    return {"losses": losses, "state": {n: p.detach() for n, p in model.named_parameters()},
            "rewards": found}  # fmt: skip
