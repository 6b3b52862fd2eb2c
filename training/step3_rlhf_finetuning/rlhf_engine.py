"""Builds the roles of step 3: actor, reference, critic and reward model, each on its own ZeRO settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from training.step3_rlhf_finetuning.hybrid_engine import HybridEngine, make_twin
from training.step3_rlhf_finetuning.rollout import RolloutBackend, rollout_backend
from training.utils import engine as engines, models
from training.utils.distributed import say
from training.utils.lora import inject_lora
from training.utils.reward_model import RewardStats
from training.utils.zero_config import deepspeed_config


@dataclass(frozen=True)
class RoleSettings:
    """How a trained role is built: its weights, ZeRO stage, LoRA and schedule."""

    path: str
    zero_stage: int
    learning_rate: float
    weight_decay: float
    gradient_checkpointing: bool
    lora_dim: int
    lora_module_name: str


@dataclass(frozen=True)
class SharedSettings:
    """What all roles have in common."""

    dtype: str
    attn_implementation: str
    offload: bool
    offload_reference_model: bool
    offload_reward_model: bool
    only_optimize_lora: bool
    overrides: dict[str, Any]
    micro_batch_size: int
    num_warmup_steps: int
    total_steps: int
    pad_token_id: int
    device: torch.device
    merge_lora_for_generation: bool = False


@dataclass(frozen=True)
class Roles:
    """The models of step 3.

    Attributes:
        actor: the policy, with the reference beside it.
        critic: engine of a `TokenScorer`; its output is on the scale of the normalised rewards. None where
            advantages need no critic.
        reward: frozen `TokenScorer`, raw rewards.
    """

    actor: HybridEngine
    critic: Any
    reward: Any

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
        weight_decay=role.weight_decay,
        num_warmup_steps=shared.num_warmup_steps,
        total_steps=shared.total_steps,
    )


def build_actor(role: RoleSettings, shared: SharedSettings) -> HybridEngine:
    """The actor and its reference policy.

    With LoRA and `only_optimize_lora` the reference is the actor without its adapter, and costs nothing; in every
    other case it is a second, frozen copy of the SFT model, and the log says so.
    """
    config = _ds_config(role, shared)
    load = {"dtype": shared.dtype, "attn_implementation": shared.attn_implementation}
    model: Any = models.load_causal_lm(role.path, ds_config=config, **load)
    if role.lora_dim:
        model = inject_lora(
            model,
            dim=role.lora_dim,
            module_name=role.lora_module_name,
            only_optimize_lora=shared.only_optimize_lora,
        )
    twin = make_twin(model)
    if role.gradient_checkpointing:
        models.enable_gradient_checkpointing(model)
    engine = _initialize(model, role, shared, config)
    reference = None
    if role.lora_dim and shared.only_optimize_lora:
        say("reference policy: the actor with its adapter disabled, no second model")
    else:
        say("reference policy: a second, frozen copy of the SFT model")
        reference = engines.load_frozen_causal_lm(
            role.path, zero_stage=role.zero_stage, offload=shared.offload_reference_model, device=shared.device, **load
        )
    merge = shared.merge_lora_for_generation and role.lora_dim > 0
    return HybridEngine(engine, twin, reference, merge_lora=merge)


def build_critic(role: RoleSettings, shared: SharedSettings, stats: RewardStats | None) -> Any:
    """The critic: starts from the reward model and speaks in normalised rewards, ``(score - mean) / std``."""
    config = _ds_config(role, shared)
    model: Any = models.load_classifier(
        role.path,
        dtype=shared.dtype,
        pad_token_id=shared.pad_token_id,
        attn_implementation=shared.attn_implementation,
        ds_config=config,
    )
    if role.lora_dim:
        model = inject_lora(
            model,
            dim=role.lora_dim,
            module_name=role.lora_module_name,
            only_optimize_lora=shared.only_optimize_lora,
        )
    if role.gradient_checkpointing:
        models.enable_gradient_checkpointing(model)
    mean, std = (stats.mean, stats.std) if stats else (0.0, 1.0)
    engine = _initialize(models.TokenScorer(model, mean, std), role, shared, config)
    engine.eval()
    return engine


def build_roles(
    actor: RoleSettings,
    critic: RoleSettings,
    shared: SharedSettings,
    stats: RewardStats | None,
    *,
    with_critic: bool = True,
) -> Roles:
    """Load every model and wrap it; a collective.

    Args:
        actor, critic: settings of the two trained roles; the frozen reward model is the critic's origin.
        shared: what all roles have in common.
        stats: step 2's statistics, None to train on raw rewards.
        with_critic: False where advantages come from other answers to the same prompt.
    """
    reward = engines.load_frozen_scorer(
        critic.path,
        zero_stage=critic.zero_stage,
        dtype=shared.dtype,
        pad_token_id=shared.pad_token_id,
        attn_implementation=shared.attn_implementation,
        offload=shared.offload_reward_model,
        device=shared.device,
    )
    return Roles(build_actor(actor, shared), build_critic(critic, shared, stats) if with_critic else None, reward)


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
