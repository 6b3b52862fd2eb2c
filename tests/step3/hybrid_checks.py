"""Step 3 on tiny models, callable in this process (one rank) and on the rank pair (two)."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from transformers import AutoModelForCausalLM

from tests.utils.engine.engine_checks import TINY_SHARDS, collate, divided, fixed_rows
from training.step3_rlhf_finetuning.arguments import (
    OptimizationArguments,
    PPOArguments,
    RoleArguments,
    RoleZeroArguments,
    RolloutArguments,
)
from training.step3_rlhf_finetuning.experience import Scoring
from training.step3_rlhf_finetuning.hybrid_engine import HybridEngine, make_twin
from training.step3_rlhf_finetuning.ppo_trainer import PPOTrainer
from training.step3_rlhf_finetuning.prompts import PromptSet, deal
from training.step3_rlhf_finetuning.roles import (
    Build,
    RewardModelSettings,
    Roles,
    build_actor,
    build_critic,
    build_rewards,
    generation_backend,
)
from training.utils.engine import engine as engines
from training.utils.engine.zero_config import deepspeed_config
from training.utils.generation.engines import rollout_backend
from training.utils.generation.rollouts import RolloutRequest
from training.utils.generation.sampling import SamplingConfig
from training.utils.model import loading
from training.utils.model.export import full_state_dict
from training.utils.model.forward import answer_rewards, response_log_probs
from training.utils.model.reward_stats import RewardStats
from training.utils.run.distributed import data_rank, data_size, init_distributed, rank, world_size
from training.utils.sharing.trial import find_sharing

PAD, STOPS = 0, (2,)
NO_TEXTS = PromptSet(None, None, STOPS, 0)  # for rewards that read tokens alone


def of(group: Any, values: dict[str, Any]) -> Any:
    """The flags of a group among ``values``; its defaults for the rest."""
    return group(**{f.name: values[f.name] for f in dataclasses.fields(group) if f.name in values})


def build(
    stage: int = 0, rate: float = 1e-2, lora: int = 0, *, total_steps: int = 1000, shares: bool = False, **flags: Any
) -> Build:
    """What roles are built with: adapters alone train where there are any, the critic's flags are the actor's."""
    values = {"dtype": "fp32", "per_device_training_batch_size": 2, "only_optimize_lora": lora > 0} | flags
    alike = {"zero_stage": stage, "learning_rate": rate}
    values = {f"{role}_{name}": value for role in ("actor", "critic") for name, value in alike.items()} | values
    groups = [
        of(g, values | {"actor_lora_dim": lora}) for g in (RoleArguments, OptimizationArguments, RoleZeroArguments)
    ]
    return Build(*groups, TINY_SHARDS, total_steps, PAD, init_distributed(), shares)


def scoring(roles: Roles, **flags: Any) -> Scoring:
    """Scores rewards that read tokens alone."""
    values = {"missing_eos_penalty": 0.0, "seed": 1, "per_device_training_batch_size": 2} | flags
    return Scoring(roles, NO_TEXTS, *(of(g, values) for g in (PPOArguments, RolloutArguments, OptimizationArguments)))


def reward_settings(path: str, stats: RewardStats | None = None) -> RewardModelSettings:
    """A reward model that reads the actor's tokens."""
    return RewardModelSettings(path, stats, 1.0, reads_text=False)


def prompts(count: int) -> list[list[int]]:
    """Prompts of unequal lengths, the same on all ranks."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 399, (3 + i % 5,), generator=generator).tolist() for i in range(count)]


def request(
    rows: list[list[int]], ids: list[int], iteration: int = 0, seed: int = 1, stop_ids: tuple[int, ...] = STOPS
) -> RolloutRequest:
    """Left-padded prompts, on the device that generates; the noise depends on ``ids``."""
    width = max(len(r) for r in rows)
    mask = [[0] * (width - len(r)) + [1] * len(r) for r in rows]
    tokens = [[PAD] * (width - len(r)) + r for r in rows]
    device = get_accelerator().current_device_name()
    tensors = (torch.tensor(values, device=device) for values in (tokens, mask, ids))
    return RolloutRequest(*tensors, seed=seed, iteration=iteration, stop_ids=stop_ids, pad_id=PAD)


def train_two_steps(actor: HybridEngine) -> None:
    """Two optimizer steps on fixed rows, the same on all ranks."""
    rows = fixed_rows()
    batch = collate(rows, max(len(ids) for ids, _ in rows))
    for _ in range(2):
        with actor.training_mode() as engine:
            log_probs, _ = response_log_probs(engine, **batch)
            engines.backward(engine, -log_probs.sum() / world_size(), 30.0)
            engines.optimizer_step(engine)


def twin_equals_engine(
    path: str,
    *,
    stage: int,
    dtype: str = "fp32",
    lora: int = 0,
    base_bits: int = 0,
    checkpointing: bool = False,
    unlink: bool = False,
) -> dict[str, Any]:
    """Train two steps, decode greedily on the twin, and compare with a plain model of the same weights.

    Ranks stop at different lengths. ``unlink`` plants a fault: a twin with weights of its own.
    """
    torch.manual_seed(0)
    flags = {"dtype": dtype, "base_bits": base_bits, "actor_gradient_checkpointing": checkpointing}
    actor = build_actor(path, build(stage, 1e-2, lora, **flags))
    if unlink:
        own = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        actor = HybridEngine(actor.engine, own, actor.reference)
    train_two_steps(actor)
    rows = fixed_rows()
    batch = collate(rows, max(len(ids) for ids, _ in rows))
    sampling = SamplingConfig(3 if rank() else 9, greedy=True)
    mine = request(prompts(6)[rank() :: 2], list(range(3)))
    with actor.generation_mode() as twin:
        rollouts = {name: rollout_backend(name).generate(twin, mine, sampling) for name in ("hf", "fast")}
        training_flag = twin.training
    with actor.scoring_mode() as engine:
        by_engine, _ = response_log_probs(engine, **batch)
    state = full_state_dict(actor.engine)
    return {
        "tokens": {name: r.input_ids for name, r in rollouts.items()},
        "request": mine,
        "sampling": sampling,
        "engine_log_probs": by_engine,
        "state": state,
        "twin_trains": training_flag,
        "own_reference": actor.reference is not None,
    }


def trajectory(
    actor_path: str,
    reward_path: str,
    *,
    stage: int,
    critic_stage: int | None = None,
    iterations: int = 3,
    accumulation: int = 1,
    micro_batch: int = 2,
    scored: int = 0,
    samples: int = 1,
    shares: bool = False,
    ppo_epochs: int = 2,
    lora: int = 0,
    dtype: str = "fp32",
    rate: float = 1e-3,
    answer_length: int = 6,
    rows: int = 8,
    kl_coef: float = 0.05,
    engine: str = "fast",
    backend: Any = None,
    hooked: bool = False,
    order: int = 0,
    stop_ids: tuple[int, ...] = STOPS,
    tensor_parallel: int = 1,
    **more: Any,
) -> list[dict[str, float]]:
    """Metrics of a few PPO iterations over the same ``rows`` prompts, dealt to the ranks as the program deals them.

    ``scored`` rows are in a forward that scores (0: ``micro_batch``). With ``samples`` each prompt has as many of the
    rows, one beside the other; where a model ``shares`` it sees them behind their prompt. ``more`` are flags of PPO.
    ``backend`` replaces the ``engine`` of that name, of which ``vllm`` is a process with weights of its own; ``order``
    seeds a shuffle of the samples (0: as dealt); ``hooked`` generates through the ZeRO-3 hooks.
    """
    torch.manual_seed(0)
    of_critic = stage if critic_stage is None else critic_stage
    reward = reward_settings(reward_path, RewardStats(0.1, 0.7, 10, dtype))
    made = build(
        stage,
        rate,
        lora,
        dtype=dtype,
        critic_zero_stage=of_critic,
        per_device_training_batch_size=micro_batch,
        tensor_parallel=tensor_parallel,
        shares=shares,
    )
    load: dict[str, Any] = {"pad_token_id": PAD, "dtype": dtype, "device": made.device}
    together: dict[str, Any] = {"tensor_parallel": tensor_parallel, "shares": shares}
    rewards = build_rewards(reward, {}, zero_stage=of_critic, **together, **load)
    policy, critic = build_actor(actor_path, made), build_critic(actor_path, reward, made)
    values_sharing = find_sharing(critic, answer_rewards, PAD) if shares else None
    roles = Roles(policy, critic, rewards, None, values_sharing)
    scored = scoring(
        roles,
        ppo_epochs=ppo_epochs,
        per_device_training_batch_size=micro_batch,
        gradient_accumulation_steps=accumulation,
        per_device_scoring_batch_size=scored,
        samples_per_prompt=samples,
        kl_coef=kl_coef,
        **more,
    )
    sampling = SamplingConfig(answer_length)
    roles.actor.hooked = hooked
    if engine == "vllm":
        from tests.step3.vllm_checks import server

        roles.actor.server = backend = server(actor_path)
    backend = backend or rollout_backend(engine, synced=hooked)
    if tensor_parallel > 1:
        backend = generation_backend(roles.actor, engine, rows=rows, length=64)
    trainer = PPOTrainer(roles, scored, backend, sampling, dtype)
    all_prompts = [prompt for prompt in prompts(rows // samples) for _ in range(samples)]
    lengths = [len(prompt) for prompt in all_prompts[::samples]]
    history = []
    for number in range(iterations):
        dealt = deal(list(range(rows // samples)), lengths, data_size(), 1)[0][data_rank()]
        dealt = [prompt * samples + sample for prompt in dealt for sample in range(samples)]
        if order:
            random.Random(order + number).shuffle(dealt)
        history.append(
            trainer.iteration([request([all_prompts[i] for i in dealt], dealt, number, stop_ids=stop_ids)], number)
        )
    return history


def trajectory_divided(ranks: int, actor_path: str, reward_path: str, **options: Any) -> list[dict[str, float]]:
    """`trajectory` with models that so many ranks hold together."""
    with divided(ranks, actor_path, reward_path):
        return trajectory(actor_path, reward_path, tensor_parallel=ranks, **options)


def early_twin(path: str, stage: int) -> list[list[list[int]]]:
    """Greedy tokens of a model that ranks hold together: of the engine's module, and of a twin made before."""
    with divided(2, path):
        model = loading.load_causal_lm(path, dtype="fp32")
        twin = make_twin(model)
        config = deepspeed_config(zero_stage=stage, dtype="fp32", tensor_parallel=2, overrides=TINY_SHARDS)
        schedule = {"num_warmup_steps": 0, "total_steps": 1}
        engine = engines.initialize_engine(model, config, learning_rate=1e-3, weight_decay=0.0, **schedule)
        asked, sampling = request(prompts(3), list(range(3))), SamplingConfig(8, greedy=True)
        found = []
        for module in (engine.module.eval(), twin):
            found.append(rollout_backend("fast").generate(module, asked, sampling).input_ids.tolist())
        return found


def save_tiny_reward_model(path: str, folder: Path) -> Path:
    """A reward model with the tiny model's backbone and a fresh head."""
    from training.utils.model.classifiers import load_classifier
    from training.utils.model.export import save_model
    from training.utils.model.forward import TokenScorer
    from training.utils.model.tokenizer import load_tokenizer

    model = load_classifier(path, dtype="fp32", pad_token_id=PAD, fresh_head_seed=1)
    with torch.no_grad():
        model.score.weight.mul_(30)
    save_model(TokenScorer(model), load_tokenizer(path), folder, stop_ids=STOPS)
    RewardStats(0.1, 0.7, 10, "fp32").write(folder)
    return folder
