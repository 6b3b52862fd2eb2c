"""Builds the roles of step 3: actor, reference, critic and reward model, each on its own ZeRO settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from training.step3_rlhf_finetuning.arguments import (
    OptimizationArguments,
    RoleArguments,
    RoleZeroArguments,
    for_each_role,
)
from training.step3_rlhf_finetuning.hybrid_engine import HybridEngine, make_twin
from training.step3_rlhf_finetuning.reward_functions import TextFunction
from training.step3_rlhf_finetuning.reward_sources import (
    FunctionReward,
    RewardMix,
    RewardSource,
    TextReward,
    TokenReward,
)
from training.utils.checkpoint.ema import MovingAverage
from training.utils.engine import engine as engines
from training.utils.engine.frozen import load_frozen_scorer, load_reference
from training.utils.engine.zero_config import deepspeed_config
from training.utils.generation.engines import rollout_backend
from training.utils.generation.rollouts import RolloutBackend
from training.utils.generation.vllm import VllmBackend
from training.utils.model import classifiers, loading
from training.utils.model.forward import TokenScorer, answer_rewards, answer_sums, enable_gradient_checkpointing
from training.utils.model.lora import with_adapters
from training.utils.model.reward_stats import RewardStats
from training.utils.model.text_reward import load_text_reward_model
from training.utils.run.distributed import say
from training.utils.sharing.rows import Sharing
from training.utils.sharing.trial import find_sharing


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
class Build:
    """What roles are built with.

    Attributes:
        args, train, zero: the flags.
        overrides: the user's own DeepSpeed configuration.
        total_steps: optimizer steps of the run.
        pad_token_id: of the actor's tokenizer.
        device: this rank's.
        shares: answers may stand behind the tokens that they have in common in one row, because prompts are answered
            several times or begin alike.
    """

    args: RoleArguments
    train: OptimizationArguments
    zero: RoleZeroArguments
    overrides: dict[str, Any]
    total_steps: int
    pad_token_id: int
    device: torch.device
    shares: bool = False

    def loading(self) -> dict[str, Any]:
        """Precision and attention, which all models of a run have alike."""
        return {"dtype": self.args.dtype, "attn_implementation": self.args.attn_implementation}


@dataclass(frozen=True)
class Roles:
    """The models of step 3.

    Attributes:
        actor: the policy, with the reference beside it.
        critic: engine of a `TokenScorer`; its output is on the scale of the normalised rewards. None where
            advantages need no critic.
        rewards: what responses are worth.
        ema: the moving average of the actor, None without one.
        values_sharing: how answers to a prompt may go through the critic behind it, None for a row each.
    """

    actor: HybridEngine
    critic: Any
    rewards: RewardMix
    ema: MovingAverage | None = None
    values_sharing: Sharing | None = None

    def trained(self) -> dict[str, Any]:
        """The engines that train, by role."""
        return {"actor": self.actor.engine} | ({} if self.critic is None else {"critic": self.critic})


def _ds_config(role: str, build: Build) -> dict[str, Any]:
    return deepspeed_config(
        zero_stage=getattr(build.zero, f"{role}_zero_stage"),
        dtype=build.args.dtype,
        offload=build.zero.offload,
        micro_batch_size=build.train.per_device_training_batch_size,
        tensor_parallel=build.zero.tensor_parallel,
        overrides=build.overrides,
    )


def _initialize(role: str, model: Any, build: Build, config: dict[str, Any]) -> Any:
    train, second = build.train, role == "critic"
    return engines.initialize_engine(
        model if build.zero.tensor_parallel > 1 else model.to(build.device),  # a part fits where the whole may not
        config,
        learning_rate=getattr(train, f"{role}_learning_rate"),
        lora_learning_rate=build.zero.lora(role).lora_learning_rate,
        weight_decay=getattr(train, f"{role}_weight_decay"),
        num_warmup_steps=for_each_role(train.num_warmup_steps, "--num_warmup_steps")[second],
        total_steps=build.total_steps,
        lr_scheduler_type=for_each_role(train.lr_scheduler_type, "--lr_scheduler_type")[second],
    )


def build_actor(path: str, build: Build) -> HybridEngine:
    """The actor and its reference policy, see `training.utils.engine.frozen`."""
    config, zero = _ds_config("actor", build), build.zero
    lora = zero.lora("actor")
    bare = loading.load_causal_lm(path, ds_config=config, base_bits=lora.base_bits, **build.loading())
    model = with_adapters(bare, lora)
    twin = make_twin(model) if zero.tensor_parallel == 1 else None
    if build.args.actor_gradient_checkpointing:
        enable_gradient_checkpointing(model)
    engine = _initialize("actor", model, build, config)
    reference = load_reference(
        path,
        adapters_only=lora.only_optimize_lora,
        zero_stage=zero.actor_zero_stage,
        offload=zero.offload_reference_model,
        device=build.device,
        tensor_parallel=zero.tensor_parallel,
        **build.loading(),
    )
    sharing = find_sharing(engine, answer_sums, build.pad_token_id, "the actor") if build.shares else None
    return HybridEngine(engine, twin, reference, merge_lora=zero.merge_lora_for_generation, sharing=sharing)


def starts_from(sft: str, reward: RewardModelSettings | None) -> str:
    """What the critic starts from: the reward model where it reads the actor's tokens, else the SFT model."""
    return sft if reward is None or reward.reads_text else reward.path


def build_critic(sft: str, reward: RewardModelSettings | None, build: Build) -> Any:
    """The critic: starts from the reward model and speaks in normalised rewards, ``weight x (score - mean) / std``.

    Where it can not (`starts_from`) it is the SFT model with a fresh head, which gives nearly 0 everywhere.
    """
    config, path, lora = _ds_config("critic", build), starts_from(sft, reward), build.zero.lora("critic")
    from_reward = reward is not None and path == reward.path
    bare = classifiers.load_classifier(
        path,
        pad_token_id=build.pad_token_id,
        ds_config=config,
        fresh_head_seed=None if from_reward else build.train.seed,
        base_bits=lora.base_bits,
        **build.loading(),
    )
    model = with_adapters(bare, lora)
    if build.args.critic_gradient_checkpointing:
        enable_gradient_checkpointing(model)
    mean, std = 0.0, 1.0
    if reward is not None and from_reward:
        mean, std = (reward.stats.mean, reward.stats.std) if reward.stats else (0.0, 1.0)
        std /= reward.weight
    engine = _initialize("critic", TokenScorer(model, mean, std), build, config)
    engine.eval()
    return engine


def build_rewards(
    reward: RewardModelSettings | None,
    functions: Mapping[str, tuple[TextFunction, float]],
    *,
    pad_token_id: int,
    tensor_parallel: int = 1,
    shares: bool = False,
    **load: Any,
) -> RewardMix:
    """Load the reward model, if there is one, and put it together with the functions; a collective.

    Args:
        reward, functions: see `build_roles`.
        pad_token_id: of the actor's tokenizer.
        tensor_parallel: ranks that hold it together; one that reads the text is whole on each rank.
        shares: see `Build`.
        load: dtype and device, and as needed attn_implementation, zero_stage and offload, see
            `training.utils.engine.frozen.load_frozen_scorer`.
    """
    sources: list[RewardSource] = []
    if reward is not None:
        if reward.reads_text:
            say("reward model: another tokenizer, chat template or family than the actor's, so it reads the text")
            model = load_text_reward_model(reward.path, **load)
            sources.append(TextReward(model, reward.stats, reward.weight))
        else:
            scorer = load_frozen_scorer(reward.path, pad_token_id=pad_token_id, tensor_parallel=tensor_parallel, **load)
            sharing = find_sharing(scorer, answer_rewards, pad_token_id, "the reward model") if shares else None
            sources.append(TokenReward(scorer, reward.stats, reward.weight, sharing))
    sources += [FunctionReward(function, name, weight) for name, (function, weight) in functions.items()]
    return RewardMix(sources)


def build_roles(
    sft: str,
    reward: RewardModelSettings | None,
    functions: Mapping[str, tuple[TextFunction, float]],
    build: Build,
    *,
    critic: bool,
) -> Roles:
    """Load every model and wrap it; a collective.

    Args:
        sft: the model that actor and reference start from.
        reward: of the reward model, None without one.
        functions: further rewards, with their weights, by name.
        build: flags and what else the roles have in common.
        critic: build one; not where advantages come from other answers to a prompt.
    """
    rewards = build_rewards(
        reward,
        functions,
        pad_token_id=build.pad_token_id,
        device=build.device,
        zero_stage=build.zero.critic_zero_stage,
        offload=build.zero.offload_reward_model,
        tensor_parallel=build.zero.tensor_parallel,
        shares=build.shares,
        **build.loading(),
    )
    policy = build_actor(sft, build)
    values = build_critic(sft, reward, build) if critic else None
    average = MovingAverage(policy.engine) if build.train.enable_ema else None
    sharing = None
    if critic and build.shares:
        sharing = find_sharing(values, answer_rewards, build.pad_token_id, "the critic")
    return Roles(policy, values, rewards, average, sharing)


def generation_backend(
    actor: HybridEngine,
    name: str,
    *,
    rows: int,
    length: int,
    server: VllmBackend | None = None,
    trained: Iterable[Any] = (),
) -> RolloutBackend:
    """Decide how the actor generates, now that all roles hold their memory, and how tokens are decoded; a collective.

    Args:
        actor: built, like every other role.
        name: ``hf``, ``fast`` or ``vllm``.
        rows: decoded together. length: longest prompt plus response, in tokens.
        server: of ``vllm``, which takes its memory now.
        trained: engines whose optimizers' states may make room, beside the actor's.
    """
    actor.server = server
    packed = name == "fast" and actor.engine.device.type == "cpu"
    actor.choose_generation(rows=0 if server else rows, length=length, packed=packed, trained=trained)
    if server is not None:
        get_accelerator().empty_cache()  # the server asks how much of the card is free
        server.start(actor.engine.device)
        return server
    return rollout_backend(name, synced=actor.hooked)
