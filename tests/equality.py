"""The equality matrix: what may not change a run's losses, tried in every combination on a tiny model.

    python -m tests.equality            prints the table of docs/results.md (about a quarter of an hour)
    python -m tests.equality 4          its rows of bases in 4 bits, which need bitsandbytes
    python -m tests.equality divided    its rows of two ranks that take a row together (--sequence_parallel)

A case is a step trained for a few optimizer steps on eight fixed rows, over ZeRO stage, ranks, accumulation, full or
LoRA, precision and offload. Its losses are held against those of one rank, without accumulation and offload, at ZeRO 0
in fp32 and at ZeRO 1 in bf16. Runs in this process (one rank) and on the rank pair (two).
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tests.rank_pair import RankPair
from tests.step3.hybrid_checks import PAD, build, prompts, request, reward_settings, save_tiny_reward_model, scoring
from tests.step3.vllm_checks import server
from tests.tiny import save_tiny_model
from tests.utils.engine.engine_checks import ROWS, TINY_SHARDS, collate, divided, fixed_rows, own_rows
from training.step2_dpo_finetuning.pairs import Preferences, answer_log_probs, answer_tokens
from training.step2_reward_model_finetuning.pairs import score_pairs
from training.step2_reward_model_finetuning.preference import bradley_terry_loss
from training.step3_rlhf_finetuning.ppo_trainer import PPOTrainer
from training.step3_rlhf_finetuning.prompts import deal
from training.step3_rlhf_finetuning.roles import (
    Roles,
    build_actor,
    build_critic,
    build_rewards,
    generation_backend,
)
from training.utils.arguments import DPOArguments, LoraArguments
from training.utils.data.batches import SIDES
from training.utils.engine import engine as engines
from training.utils.engine.frozen import load_reference
from training.utils.engine.sequence_parallel import ULYSSES
from training.utils.engine.zero_config import deepspeed_config
from training.utils.generation.rollouts import RolloutBackend, RolloutBatch, RolloutRequest, rollout_log_probs
from training.utils.generation.sampling import SamplingConfig
from training.utils.model import classifiers, loading
from training.utils.model.forward import TokenScorer
from training.utils.model.language_modelling import negative_log_likelihood
from training.utils.model.lora import with_adapters
from training.utils.model.reward_stats import RewardStats
from training.utils.run.distributed import data_rank, data_size, init_distributed, reduce_sums, share_rows
from training.utils.run.runtime import prepare_runtime

# Largest difference of a loss, relative to the larger of it and 1; bf16 weights have three digits. `Matrix.allowed` has
# the exception.
TOLERANCE = {"fp32": 2e-5, "bf16": 5e-2}
RESPONSE = 6  # tokens of step 3's responses
STATS = RewardStats(0.1, 0.7, 10, "fp32")


@dataclass(frozen=True)
class Case:
    """One combination."""

    step: int | str
    zero_stage: int
    ranks: int
    accumulation: int
    lora: bool
    dtype: str
    offload: bool
    tensor_parallel: int = 1
    served: bool = False  # step 3's rollouts come from a process with weights of its own
    base_bits: int = 0
    sequence_parallel: int = 1

    def baseline(self) -> Case:
        """What its losses are held against."""
        stage = 0 if self.dtype == "fp32" else 1
        plain = replace(self, tensor_parallel=1, sequence_parallel=1, served=False)
        return replace(plain, zero_stage=stage, ranks=1, accumulation=1, offload=False)


FACTORS: dict[str, Sequence[Any]] = {
    "step": (1, 2, "dpo", 3),
    "zero_stage": (0, 1, 2, 3),
    "ranks": (1, 2),
    "accumulation": (1, 2),
    "lora": (False, True),
    "dtype": ("fp32", "bf16"),
    "offload": (False, True),
    "tensor_parallel": (1, 2),
}
POSSIBLE = (Case(*values) for values in itertools.product(*FACTORS.values()))
ALL = [case for case in POSSIBLE if case.tensor_parallel == 1 or (case.ranks == 2 and not case.lora)]
FOUR_BIT = [replace(case, base_bits=4) for case in ALL if case.lora]
ON_TWO = [case for case in ALL if (case.ranks, case.tensor_parallel) == (2, 1)]
DIVIDED = [replace(case, sequence_parallel=2) for case in ON_TWO if case.step != 3]
SERVED = [replace(case, served=True) for case in ALL if (case.step, case.dtype, case.tensor_parallel) == (3, "fp32", 1)]


def pairs_of(case: Any, names: Sequence[str] = tuple(FACTORS)) -> set[tuple]:
    """Every pair of settings of a case: ((name, value), (name, value))."""
    return set(itertools.combinations([(name, getattr(case, name)) for name in names], 2))


def pairwise(cases: Sequence[Any], names: Sequence[str] = tuple(FACTORS)) -> list[Any]:
    """A few cases in which every pair of settings occurs: always the one that adds most, the first of equals."""
    missing = set().union(*(pairs_of(case, names) for case in cases))
    chosen = []
    while missing:
        best = max(cases, key=lambda case: len(pairs_of(case, names) & missing))
        chosen.append(best)
        missing -= pairs_of(best, names)
    return chosen


def rejected_row(row: int, step: int | str) -> int:
    """Whose answer is the rejected one of a row: its neighbour's.

    For DPO that of an odd row: were each answer chosen once and rejected once, the first gradient would be 0 but for
    rounding, and Adam would make whole steps of it.
    """
    return (row + 1 + (row % 2 if step == "dpo" else 0)) % ROWS


def train_sequences(case: Case, path: str, fault: bool = False) -> list[float]:
    """Losses of three optimizer steps of step 1, 2 or DPO; the fault: only the last micro-batch's gradient counts."""
    device = init_distributed()
    micro_batch = ROWS // data_size() // case.accumulation
    config = deepspeed_config(
        zero_stage=case.zero_stage,
        dtype=case.dtype,
        offload=case.offload,
        tensor_parallel=case.tensor_parallel,
        overrides=TINY_SHARDS,
    )
    attention = ULYSSES if case.sequence_parallel > 1 else "sdpa"
    made: dict[str, Any] = {"dtype": case.dtype, "attn_implementation": attention}
    made |= {"ds_config": config, "base_bits": case.base_bits}
    model: Any
    if case.step == 2:
        model = classifiers.load_classifier(path, pad_token_id=PAD, **made)
    else:
        model = loading.load_causal_lm(path, **made)
    if case.lora:
        torch.manual_seed(0)
        model = with_adapters(model, LoraArguments(4, "q_proj,down_proj", True, base_bits=case.base_bits))
    wrapped = TokenScorer(model) if case.step == 2 else model
    engine = engines.initialize_engine(
        wrapped.to(device), config, learning_rate=3e-3, weight_decay=0.1, num_warmup_steps=0, total_steps=100
    )
    if case.step == "dpo":
        copied: dict[str, Any] = {"dtype": case.dtype, "attn_implementation": attention, "offload": case.offload}
        copied["tensor_parallel"] = case.tensor_parallel
        frozen = load_reference(path, adapters_only=case.lora, zero_stage=case.zero_stage, device=device, **copied)
        preferences = Preferences(engine, frozen, DPOArguments())
    rows = fixed_rows()
    width = max(len(ids) for ids, _ in rows)
    mine = own_rows(rows)
    losses = []
    for _ in range(3):
        count, total = (sum(sum(m) for _, m in rows) if case.step == 1 else ROWS), 0.0
        batches, references = {}, {}
        for start in range(0, len(mine), micro_batch):
            at, piece = data_rank() * ROWS // data_size() + start, mine[start : start + micro_batch]
            rejected = [rows[rejected_row(at + i, case.step)] for i in range(len(piece))]
            sides = torch.arange(2 * len(piece)).chunk(2)
            batches[start] = collate(piece if case.step == 1 else piece + rejected, width)
            batches[start] |= dict(zip(SIDES, sides, strict=True))
            if case.step == "dpo":
                references[start] = preferences.reference(batches[start])
        engine.train()
        for start, batch in batches.items():
            if case.step == 1:
                loss = negative_log_likelihood(engine, batch)
            elif case.step == 2:
                loss = bradley_terry_loss(*score_pairs(engine, batch), "log_sig").sum()
            else:
                log_probs, tokens = answer_log_probs(engine, batch), answer_tokens(batch)
                loss = preferences.judge(log_probs, references[start], tokens, (0, 0))["loss"].sum()
            lost = fault and start + micro_batch < len(mine)
            engines.backward(engine, loss * (0.0 if lost else 1.0), count)
            total += loss.item()
        engines.optimizer_step(engine)
        losses.append(reduce_sums({"loss": total}, device)["loss"] / count)
    return losses


class Dictated:
    """A rollout backend whose responses are given: the twin only says how likely they are.

    In bf16 rounding may turn a sampled token into another, and two correct runs would part.
    """

    def generate(self, model: Any, request: RolloutRequest, sampling: SamplingConfig) -> RolloutBatch:
        """Responses that depend on the row's number and the iteration alone."""
        columns = torch.arange(sampling.max_new_tokens)
        tokens = (request.row_ids.unsqueeze(1) * 31 + columns * 7 + request.iteration * 11) % 390 + 3
        lengths = 2 + request.row_ids % (sampling.max_new_tokens - 1)
        mask = columns < lengths.unsqueeze(1)
        ids = torch.cat([request.prompt_ids, tokens.masked_fill(~mask, PAD)], dim=1)
        attention = torch.cat([request.prompt_mask, mask.long()], dim=1)
        with torch.no_grad():
            log_probs, _ = rollout_log_probs(model, ids, attention, mask, sampling.temperature)
        return RolloutBatch(ids, attention, request.prompt_ids.shape[1], mask, log_probs)


def train_ppo(case: Case, path: str, reward_path: str, fault: bool = False) -> list[float]:
    """Policy loss, value loss, reward and KL of three PPO iterations; the fault: advantages are not whitened."""
    micro_batch = ROWS // data_size() // case.accumulation
    made = build(
        case.zero_stage,
        1e-3,
        4 if case.lora else 0,
        critic_lora_dim=4 if case.lora else 0,
        dtype=case.dtype,
        offload=case.offload,
        base_bits=case.base_bits,
        per_device_training_batch_size=micro_batch,
        tensor_parallel=case.tensor_parallel,
    )
    reward = reward_settings(reward_path, STATS)
    load: dict[str, Any] = {"pad_token_id": PAD, "dtype": case.dtype, "device": made.device}
    load["tensor_parallel"] = case.tensor_parallel
    rewards = build_rewards(reward, {}, zero_stage=case.zero_stage, **load)
    torch.manual_seed(0)
    roles = Roles(build_actor(path, made), build_critic(path, reward, made), rewards)
    scored = scoring(
        roles,
        per_device_training_batch_size=micro_batch,
        gradient_accumulation_steps=case.accumulation,
        whiten_advantages=not fault,
    )
    backend: RolloutBackend = Dictated()
    if case.dtype == "fp32":
        backend = generation_backend(roles.actor, "fast", rows=ROWS, length=32)
    if case.served:
        roles.actor.server = backend = server(path)
    trainer = PPOTrainer(roles, scored, backend, SamplingConfig(RESPONSE), case.dtype)
    everything = prompts(ROWS)
    losses = []
    for number in range(3):
        dealt = deal(list(range(ROWS)), [len(p) for p in everything], data_size(), 1)[0][data_rank()]
        metrics = trainer.iteration([request([everything[i] for i in dealt], dealt, number)], number)
        losses += [metrics[name] for name in ("policy/loss", "critic/loss", "reward/mean", "kl/per_token")]
    return losses


@contextlib.contextmanager
def shared_rows(ranks: int) -> Iterator[None]:
    """Inside, so many ranks take each row together; with 1 all stays as it is."""
    if ranks > 1:
        share_rows(ranks)
    try:
        yield
    finally:
        if ranks > 1:
            share_rows(1)


def run_case(values: dict[str, Any], path: str, reward_path: str, fault: bool = False) -> list[float]:
    """Losses of a case, on as many ranks as there are."""
    case = Case(**values)
    with divided(case.tensor_parallel, path, reward_path), shared_rows(case.sequence_parallel):
        if case.step == 3:
            return train_ppo(case, path, reward_path, fault)
        return train_sequences(case, reward_path if case.step == 2 else path, fault)


class Matrix:
    """Runs cases; baselines are run once.

    Args:
        path, reward_path: a tiny model and a reward model on it.
        pair: two living ranks.
    """

    def __init__(self, path: Path, reward_path: Path, pair: RankPair) -> None:
        self.paths = (str(path), str(reward_path))
        self.pair = pair
        self._baselines: dict[Case, list[float]] = {}

    def losses(self, case: Case, fault: bool = False) -> list[float]:
        """A case's losses."""
        if case.ranks == 1:
            return run_case(asdict(case), *self.paths, fault)
        first, second = self.pair.run(run_case, asdict(case), *self.paths, fault)
        assert first == second, "ranks report different losses"
        return first

    def baseline(self, case: Case) -> list[float]:
        """The losses of its baseline."""
        if (plain := case.baseline()) not in self._baselines:
            self._baselines[plain] = self.losses(plain)
        return self._baselines[plain]

    def difference(self, case: Case, fault: bool = False) -> float:
        """The largest difference of a loss from the baseline's, relative to the larger of the loss and 1."""
        return _largest(self.losses(case, fault), self.baseline(case))

    def allowed(self, case: Case) -> float:
        """The largest difference that rounding explains.

        Ranks that hold a model together round their parts of a sum to 16 bits before they add them, so nothing is
        rounded as on one rank, and a few steps at a high rate make much of it: no more than 16 bits make of the
        baseline's own losses in fp32. Not in step 3, which draws other tokens in another precision.
        """
        if case.dtype == "fp32" or case.tensor_parallel == 1 or case.step == 3:
            return TOLERANCE[case.dtype]
        exact = self.baseline(replace(case, dtype="fp32"))
        return max(TOLERANCE[case.dtype], _largest(self.baseline(case), exact))


def _largest(found: Sequence[float], expected: Sequence[float]) -> float:
    """Difference of two lists of losses, relative to the larger of the expected one and 1."""
    return max(abs(a - b) / max(abs(b), 1.0) for a, b in zip(found, expected, strict=True))


def table(matrix: Matrix, cases: Iterable[Case] = ALL) -> str:
    """Markdown: the largest difference of each group of cases, by ZeRO stage."""
    groups: dict[tuple, dict[int, list[float]]] = {}
    within: dict[tuple, float] = {}
    for case in cases:
        full = "full" if case.tensor_parallel == 1 else "full, held by two ranks"
        rows = ", rows divided" if case.sequence_parallel > 1 else ""
        weights = "4-bit base" if case.base_bits else "LoRA" if case.lora else full
        weights += rows
        group = case.step, weights, case.dtype
        row, within[group] = groups.setdefault(group, {}), matrix.allowed(case)
        row.setdefault(case.zero_stage, []).append(matrix.difference(case))
    lines = [
        "| step | weights | precision | ZeRO 0 | ZeRO 1 | ZeRO 2 | ZeRO 3 | within |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for group, row in groups.items():
        cells = [f"{max(row[stage]):.1e}" for stage in sorted(row)]
        lines.append("| " + " | ".join([*map(str, group), *cells, f"{within[group]:.0e}"]) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    """Print the table."""
    prepare_runtime()
    pair = RankPair()
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = save_tiny_model(Path(folder) / "model")
            reward = save_tiny_reward_model(str(path), Path(folder) / "reward")
            cases = {"4": FOUR_BIT, "divided": DIVIDED}.get(" ".join(argv), ALL)
            print(table(Matrix(path, reward, pair), cases))
    finally:
        pair.close()


if __name__ == "__main__":
    main(sys.argv[1:])
