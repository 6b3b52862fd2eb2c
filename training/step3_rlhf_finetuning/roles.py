"""Builds the roles of step 3: actor, reference, critic and reward model, each on its own ZeRO settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from training.step3_rlhf_finetuning.hybrid_engine import HybridEngine, make_twin
from training.step3_rlhf_finetuning.reward_sources import (
    FunctionReward,
    RewardMix,
    RewardSource,
    TextReward,
    TokenReward,
)
from training.step3_rlhf_finetuning.rewards import TextFunction
from training.utils.arguments import LoraArguments
from training.utils.checkpoint.ema import MovingAverage
from training.utils.engine import engine as engines
from training.utils.engine.reference import load_reference
from training.utils.engine.zero_config import deepspeed_config
from training.utils.generation.engines import rollout_backend
from training.utils.generation.requests import RolloutBackend
from training.utils.model import classifiers, loading
from training.utils.model.forward import enable_gradient_checkpointing
from training.utils.model.lora import with_adapters
from training.utils.model.reward_model import RewardStats
from training.utils.model.text_reward import load_text_reward_model
from training.utils.run.distributed import say


@dataclass(frozen=True)
class RoleSettings:
    """How a trained role is built: its weights, ZeRO stage, LoRA and schedule."""

    path: str
    zero_stage: int
    learning_rate: float
    weight_decay: float
    gradient_checkpointing: bool
    lora: LoraArguments
    lr_scheduler_type: str = "cosine"
    num_warmup_steps: int = 0
    fresh_head_seed: int | None = None  # of a critic that does not start from a reward model


@dataclass(frozen=True)
class RewardModelSettings:
    """The frozen reward model.

    Attributes:
        path: folder or hub name.
        stats: step 2's statistics, None for raw rewards.
        weight: among several sources.
        reads_text: it has another tokenizer or template than the actor, or no head that scores every token; it then
            reads the text, and the critic can not start from it.
    """

    path: str
    stats: RewardStats | None
    weight: float
    reads_text: bool


@dataclass(frozen=True)
class SharedSettings:
    """What all roles have in common."""

    dtype: str
    attn_implementation: str
    offload: bool
    offload_reference_model: bool
    offload_reward_model: bool
    overrides: dict[str, Any]
    micro_batch_size: int
    total_steps: int
    pad_token_id: int
    device: torch.device
    merge_lora_for_generation: bool = False
    ema: bool = False


@dataclass(frozen=True)
class Roles:
    """The models of step 3.

    Attributes:
        actor: the policy, with the reference beside it.
        critic: engine of a `TokenScorer`; its output is on the scale of the normalised rewards. None where
            advantages need no critic.
        rewards: what responses are worth.
        ema: the moving average of the actor, None without one.
    """

    actor: HybridEngine
    critic: Any
    rewards: RewardMix
    ema: MovingAverage | None = None

    def trained(self) -> dict[str, Any]:
        """The engines that train, by role."""
        return {"actor": self.actor.engine} | ({} if self.critic is None else {"critic": self.critic})


def _ds_config(role: RoleSettings, shared: SharedSettings) -> dict[str, Any]:
    return deepspeed_config(
        zero_stage=role.zero_stage,
        dtype=shared.dtype,
        offload=shared.offload,
        micro_batch_size=shared.micro_batch_size,
        overrides=shared.overrides,
    )


def _initialize(model: Any, role: RoleSettings, shared: SharedSettings, config: dict[str, Any]) -> Any:
    return engines.initialize_engine(
        model.to(shared.device),
        config,
        learning_rate=role.learning_rate,
        lora_learning_rate=role.lora.lora_learning_rate,
        weight_decay=role.weight_decay,
        num_warmup_steps=role.num_warmup_steps,
        total_steps=shared.total_steps,
        lr_scheduler_type=role.lr_scheduler_type,
    )


def build_actor(role: RoleSettings, shared: SharedSettings) -> HybridEngine:
    """The actor and its reference policy, see `training.utils.engine.reference`."""
    config = _ds_config(role, shared)
    load: dict[str, Any] = {"dtype": shared.dtype, "attn_implementation": shared.attn_implementation}
    model = with_adapters(loading.load_causal_lm(role.path, ds_config=config, **load), role.lora)
    twin = make_twin(model)
    if role.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    engine = _initialize(model, role, shared, config)
    reference = load_reference(
        role.path,
        adapters_only=role.lora.only_optimize_lora,
        zero_stage=role.zero_stage,
        offload=shared.offload_reference_model,
        device=shared.device,
        **load,
    )
    merge = shared.merge_lora_for_generation and role.lora.lora_dim > 0
    return HybridEngine(engine, twin, reference, merge_lora=merge)


def build_critic(role: RoleSettings, shared: SharedSettings, reward: RewardModelSettings | None) -> Any:
    """The critic: starts from the reward model and speaks in normalised rewards, ``weight x (score - mean) / std``.

    From another model it starts with a fresh head, which gives nearly 0 everywhere.
    """
    config = _ds_config(role, shared)
    bare = classifiers.load_classifier(
        role.path,
        dtype=shared.dtype,
        pad_token_id=shared.pad_token_id,
        attn_implementation=shared.attn_implementation,
        ds_config=config,
        fresh_head_seed=role.fresh_head_seed,
    )
    model = with_adapters(bare, role.lora)
    if role.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    mean, std = 0.0, 1.0
    if reward is not None and role.fresh_head_seed is None:
        stats = reward.stats
        mean, std = (stats.mean, stats.std) if stats else (0.0, 1.0)
        std /= reward.weight
    engine = _initialize(classifiers.TokenScorer(model, mean, std), role, shared, config)
    engine.eval()
    return engine


def build_rewards(
    reward: RewardModelSettings | None,
    functions: Mapping[str, tuple[TextFunction, float]],
    *,
    pad_token_id: int,
    dtype: str,
    device: torch.device,
    attn_implementation: str = "sdpa",
    zero_stage: int = 0,
    offload: bool = False,
) -> RewardMix:
    """Load the reward model, if there is one, and put it together with the functions; a collective.

    Args:
        reward, functions: see `build_roles`.
        pad_token_id: of the actor's tokenizer.
        dtype, device, attn_implementation, zero_stage, offload: see `training.utils.engine.engine.load_frozen_scorer`.
    """
    sources: list[RewardSource] = []
    if reward is not None:
        load: dict[str, Any] = {
            "zero_stage": zero_stage,
            "dtype": dtype,
            "attn_implementation": attn_implementation,
            "offload": offload,
            "device": device,
        }
        if reward.reads_text:
            say("reward model: another tokenizer, chat template or family than the actor's, so it reads the text")
            model = load_text_reward_model(reward.path, **load)
            sources.append(TextReward(model, reward.stats, reward.weight))
        else:
            scorer = engines.load_frozen_scorer(reward.path, pad_token_id=pad_token_id, **load)
            sources.append(TokenReward(scorer, reward.stats, reward.weight))
    sources += [FunctionReward(function, name, weight) for name, (function, weight) in functions.items()]
    return RewardMix(sources)


def build_roles(
    actor: RoleSettings,
    critic: RoleSettings | None,
    reward: RewardModelSettings | None,
    functions: Mapping[str, tuple[TextFunction, float]],
    shared: SharedSettings,
    *,
    reward_zero_stage: int,
) -> Roles:
    """Load every model and wrap it; a collective.

    Args:
        actor, critic: settings of the trained roles; no critic where advantages come from other answers to a prompt.
        reward: of the reward model, None without one.
        functions: further rewards, with their weights, by name.
        shared: what all roles have in common.
        reward_zero_stage: of the reward model; at 3 it is sharded.
    """
    rewards = build_rewards(
        reward,
        functions,
        pad_token_id=shared.pad_token_id,
        dtype=shared.dtype,
        device=shared.device,
        attn_implementation=shared.attn_implementation,
        zero_stage=reward_zero_stage,
        offload=shared.offload_reward_model,
    )
    policy = build_actor(actor, shared)
    values = None if critic is None else build_critic(critic, shared, reward)
    return Roles(policy, values, rewards, MovingAverage(policy.engine) if shared.ema else None)


def generation_backend(actor: HybridEngine, name: str, *, rows: int, length: int) -> RolloutBackend:
    """Decide how the actor generates, now that all roles hold their memory, and how tokens are decoded; a collective.

    Args:
        actor: built, like every other role.
        name: ``hf`` or ``fast``.
        rows: decoded together. length: longest prompt plus response, in tokens.
    """
    packed = name == "fast" and actor.engine.device.type == "cpu"
    actor.choose_generation(rows=rows, length=length, packed=packed)
    return rollout_backend(name, synced=actor.hooked)
