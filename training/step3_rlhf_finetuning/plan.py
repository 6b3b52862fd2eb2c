"""The memory plan of step 3: five roles, and phases that decode, score and train."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch

from training.step3_rlhf_finetuning.arguments import (
    OptimizationArguments,
    RoleArguments,
    RoleZeroArguments,
    RolloutArguments,
)
from training.step3_rlhf_finetuning.settings import Flags, Models
from training.utils.arguments import LoraArguments
from training.utils.engine.zero_config import deepspeed_config
from training.utils.generation.decode_loop import PREFILL_TOKENS_OF_ACCELERATORS, prefill_tokens
from training.utils.generation.engines import MIN_STEPS_TO_PACK
from training.utils.generation.packed_linear import packed_bytes
from training.utils.generation.rollouts import rollout_log_probs, state_values
from training.utils.generation.vllm import RESCORED_ROWS, cache_tokens
from training.utils.memory import plan as plans
from training.utils.memory.generation import cache_share
from training.utils.memory.live import FakeModel, PassMemory
from training.utils.memory.training import ranks_told
from training.utils.memory.zero import BYTES, MASTER, MOMENTS, RoleMemory, frozen_memory, trained_memory
from training.utils.model import classifiers
from training.utils.model.forward import without_adapters
from training.utils.model.language_modelling import negative_log_likelihood
from training.utils.run.distributed import world_size

FLAGS = {
    "zero_stage": "--actor_zero_stage {0} --critic_zero_stage {0}",
    "offload": "--offload",
    "checkpointing": "--actor_gradient_checkpointing --critic_gradient_checkpointing",
    "batch": "--per_device_training_batch_size {} (accumulate more)",
    "other_batch": "--per_device_generation_batch_size {}",
    "scored_batch": "--per_device_scoring_batch_size {}",
}

ASLEEP_BYTES = 1 << 30  # of a process that has CUDA and recorded graphs, on its device: an estimate, not measured


@dataclass(eq=False)
class RoleCosts:
    """Passes of the roles without storage, each counted once.

    Args:
        actor, critic, reward: from `training.utils.memory.plan.fake_role`; None for a role that is not there, or a
            reward model whose forward is not known.
        prompt, response: their longest lengths in tokens.
        reward_parameters: of the reward model, 0 without one.
    """

    actor: FakeModel
    critic: FakeModel | None
    reward: FakeModel | None
    prompt: int
    response: int
    reward_parameters: int

    def __post_init__(self) -> None:
        self.trained = ["actor"] if self.critic is None else ["actor", "critic"]
        self.training = functools.cache(self._training)
        self.pretraining = functools.cache(self._pretraining)
        self.scoring = functools.cache(self._scoring)
        self.prefill = functools.cache(self._prefill)

    def _outputs(self, role: str, model: FakeModel, rows: int) -> torch.Tensor:
        ids, mask = plans.fake_batch(rows, self.prompt + self.response)
        response = torch.ones(rows, self.response, dtype=torch.bool)
        if role != "actor":
            return state_values(model, ids, mask, model.on_device(response))
        ids = model.on_device(ids)
        return rollout_log_probs(model, ids, mask, response, 1.0, entropy=not torch.is_grad_enabled())[0]

    def _training(self, role: str, rows: int, checkpointing: bool) -> PassMemory:
        model: FakeModel = getattr(self, role)
        model.gradient_checkpointing(checkpointing)
        return model.training_pass(lambda m: self._outputs(role, m, rows).sum())

    def _pretraining(self, rows: int, checkpointing: bool) -> PassMemory:
        ids, mask = plans.fake_batch(rows, self.prompt + self.response)
        batch = {"input_ids": self.actor.on_device(ids), "attention_mask": mask, "response_mask": mask}
        self.actor.gradient_checkpointing(checkpointing)
        return self.actor.training_pass(lambda m: negative_log_likelihood(m, batch))

    def _scoring(self, role: str, rows: int) -> PassMemory:
        return getattr(self, role).forward_pass(lambda m: self._outputs(role, m, rows))

    def _prefill(self, rows: int, length: int) -> PassMemory:
        ids, mask = plans.fake_batch(rows, length)
        last = torch.zeros(rows, 1, dtype=torch.bool).logical_not()
        return self.actor.forward_pass(lambda m: rollout_log_probs(m, m.on_device(ids), mask, last, 1.0)[0])

    @functools.cached_property
    def cache_bytes_per_token(self) -> int:
        """Bytes of keys and values of one token in all layers."""
        ids, mask = plans.fake_batch(1, 8)
        self.actor.module.eval()
        with torch.no_grad():
            cache = self.actor(input_ids=ids, attention_mask=mask, use_cache=True).past_key_values
        tensors = [t for layer in cache.layers for t in vars(layer).values() if isinstance(t, torch.Tensor)]
        return sum(t.numel() * t.element_size() for t in tensors if t.dim() == 4) // 8


def decoding_parts(
    costs: RoleCosts, rows: int, dtype: str, rollout: RolloutArguments, gathered: int, *, on_cpu: bool
) -> dict[str, int]:
    """What decoding allocates, by name.

    Args:
        costs: of the roles.
        rows: decoded together.
        dtype: of the weights and the cache.
        rollout: the flags; on a CPU vLLM holds what it needs all the time.
        gathered: bytes of the twin's whole parameters at stage 3.
        on_cpu: with small groups of prompts, and linear weights that are laid out once more for the CPU's kernels.
    """
    engine = rollout.rollout_engine
    if engine == "vllm":
        return {} if on_cpu else served_parts(costs, rows, dtype, rollout.vllm_tensor_parallel)
    vocabulary = plans.vocabulary(costs.actor)
    tokens = costs.prompt + costs.response
    cache = rows * tokens * costs.cache_bytes_per_token
    if engine == "hf":  # its cache grows by concatenation: one layer is there twice
        prefill = costs.prefill(rows, costs.prompt)
        return {"gathered twin": gathered, "KV cache": cache, "prompts": prefill.peak}
    device = torch.device("cpu" if on_cpu else "cuda")
    group = max(1, prefill_tokens(device) // costs.prompt + 1)
    packs = on_cpu and costs.response >= MIN_STEPS_TO_PACK
    return {
        "gathered twin": gathered,
        "KV cache": cache,
        "packed weights": packed_bytes(without_adapters(costs.actor.module)) if packs else 0,
        "logits and sampling": rows * vocabulary * (BYTES[dtype] + 4),
        "prompts": costs.prefill(min(rows, group), costs.prompt).peak,
    }


def served_parts(costs: RoleCosts, rows: int, dtype: str, ranks: int) -> dict[str, int]:
    """What vLLM allocates on its rank's device while it is awake, by name.

    Args:
        costs, rows, dtype: as of `decoding_parts`.
        ranks: whose processes hold the model together, and decode the rows of all.
    """
    tokens = cache_tokens(rows * ranks, costs.prompt + costs.response)
    config = without_adapters(costs.actor.module).config
    group = max(1, PREFILL_TOKENS_OF_ACCELERATORS // costs.prompt + 1)
    return {
        "vLLM's weights": plans.base_parameters(costs.actor) * BYTES[dtype] // ranks,
        "its KV cache": cache_share(tokens * costs.cache_bytes_per_token, ranks, config),
        "its prompts and logits": costs.prefill(min(rows, group), costs.prompt).peak,
    }


def rlhf_plan(
    costs: RoleCosts,
    settings: plans.Settings,
    roles: RoleArguments,
    rollout: RolloutArguments,
    train: OptimizationArguments,
    zero: RoleZeroArguments,
    overrides: dict[str, Any],
    stages: tuple[int, int],
    *,
    on_cpu: bool,
) -> plans.Plan:
    """The plan of step 3.

    Args:
        costs: of the roles.
        settings: what may change.
        roles, rollout, train, zero: the step's flags.
        overrides: the user's DeepSpeed configuration.
        stages: ZeRO stages of actor and critic.
        on_cpu: the run is one on CPUs.
    """
    dtype, ranks = roles.dtype, world_size() // zero.tensor_parallel
    shared: dict[str, Any] = {"tensor_parallel": zero.tensor_parallel, "overrides": overrides}
    mix = bool(train.unsupervised_data_path)
    memory: dict[str, RoleMemory] = {}
    for role, stage in zip(costs.trained, stages, strict=False):
        config = deepspeed_config(zero_stage=stage, dtype=dtype, offload=settings.offload, **shared)
        size = plans.role_size(getattr(costs, role))
        accumulates = settings.accumulates or (mix and role == "actor")
        memory[role] = trained_memory(
            size, config=config, dtype=dtype, ranks=ranks, on_cpu=on_cpu, accumulates=accumulates
        )
    bare = functools.partial(frozen_memory, dtype=dtype, ranks=ranks)
    if not (zero.actor_lora_dim and zero.only_optimize_lora):
        count = plans.base_parameters(costs.actor)
        memory["reference"] = bare(count, zero_stage=stages[0], offload=zero.offload_reference_model)
    if costs.reward_parameters:
        memory["reward"] = bare(costs.reward_parameters, zero_stage=stages[1], offload=zero.offload_reward_model)
    if train.enable_ema:
        memory["ema"] = RoleMemory({"moving average": 4 * -(-plans.role_size(costs.actor).trained // ranks)})
    if rollout.rollout_engine == "vllm":
        served = served_parts(costs, settings.other_batch, dtype, rollout.vllm_tensor_parallel)
        memory["vLLM"] = RoleMemory(served if on_cpu else {"while it sleeps": ASLEEP_BYTES})
    kind: dict[str, Any] = {"mix": mix, "on_cpu": on_cpu, "tensor_parallel": zero.tensor_parallel}
    phases = _phases(costs, settings, memory, dtype, rollout, **kind)
    plan = plans.Plan(memory, phases, on_cpu)
    return replace(plan, notes=_without_gathering(plan, zero.tensor_parallel) + _notes(costs, settings))


def states_that_rest(plan: plans.Plan) -> int:
    """Bytes of masters and moments on the device at ZeRO-3, which may be in the host's memory during generation."""
    if plan.on_cpu:
        return 0
    trained = [plan.roles[role] for role in ("actor", "critic") if role in plan.roles and plan.roles[role].gathered]
    return sum(r.resident.get(name, 0) for r in trained for name in (MASTER, MOMENTS) if name not in r.host)


def _without_gathering(plan: plans.Plan, tensor_parallel: int) -> list[str]:
    """For a plan at ZeRO-3: what a run does if the whole actor does not fit on a card for generation; [] otherwise."""
    generation = next(phase for phase in plan.phases if phase.name == "generation")
    if not (whole := generation.parts.get("gathered twin", 0)):
        return []
    states = states_that_rest(plan) if tensor_parallel == 1 else 0
    need = plan.need(generation)
    rests = f"optimizer states wait in the host's memory ({(need - states) / plans.MIB:,.0f}), or " if states else ""
    hooks = f"it goes through the ZeRO-3 hooks ({(need - whole) / plans.MIB:,.0f})"
    return [f"where generation does not fit, {rests}{hooks}"]


def _phases(
    costs: RoleCosts,
    settings: plans.Settings,
    memory: dict[str, RoleMemory],
    dtype: str,
    rollout: RolloutArguments,
    *,
    mix: bool,
    on_cpu: bool,
    tensor_parallel: int,
) -> list[plans.Phase]:
    rows, actor, critic = settings.batch, memory["actor"], memory.get("critic")
    whole = plans.role_size(costs.actor).weights(BYTES[dtype]) if actor.gathered else 0  # not only what is live
    logits_of = functools.partial(plans.logits_bytes, costs.actor, columns=costs.response, dtype=dtype)
    decoding = decoding_parts(costs, settings.other_batch, dtype, rollout, whole, on_cpu=on_cpu)
    if rollout.rollout_engine == "vllm" and (rollout.top_p < 1 or rollout.top_k > 0):
        again = costs.scoring("actor", min(settings.other_batch, RESCORED_ROWS))
        decoding["log-probs of the policy"] = actor.gathered + again.peak
    scored_rows = settings.scored_batch or rows
    scored, whole_logits = costs.scoring("actor", scored_rows), logits_of(scored_rows)
    score = {
        "gathered parameters": actor.gathered,
        "logits": whole_logits,
        "activations": scored.peak - whole_logits,
    }
    phases = [  # evaluation does the same with as many rows at a time
        plans.Phase("generation", decoding),
        plans.Phase("scoring: log-probs", score),
    ]
    if costs.reward is not None:
        rewarded = costs.scoring("reward", scored_rows)
        reward = {"gathered parameters": memory["reward"].gathered, "activations": rewarded.peak}
        phases.append(plans.Phase("scoring: rewards", reward))
    train = functools.partial(
        plans.training_phases, accumulates=settings.accumulates, checkpointing=settings.checkpointing
    )
    passes = {role: costs.training(role, rows, settings.checkpointing) for role in costs.trained}
    kept = 0 if critic is None else critic.pending  # of the critic, while the actor steps
    before = kept if settings.accumulates else 0
    phases += train("actor", actor, passes["actor"], logits_of(rows), others=before, others_at_step=kept)
    if mix:  # after PPO's micro-batches, before the step; the loss is on every token that something predicts
        every = plans.logits_bytes(costs.actor, rows, costs.prompt + costs.response - 1, dtype)
        beside = costs.pretraining(rows, settings.checkpointing)
        phases += plans.training_phases("mix", actor, beside, every, accumulates=True, others=kept)[:2]
    if critic is not None:
        phases += train("critic", critic, passes["critic"], 0, others=actor.pending)
    saved = max(plans.role_size(getattr(costs, role)).parameters for role in costs.trained)
    return [*phases, plans.saving_phase(saved * tensor_parallel, BYTES[dtype])]


def _notes(costs: RoleCosts, settings: plans.Settings) -> list[str]:
    lines = []
    for role in costs.trained:
        now, other = (
            costs.training(role, settings.batch, on).peak for on in (settings.checkpointing, not settings.checkpointing)
        )
        note, change = "without" if settings.checkpointing else "with", (other - now) / plans.MIB
        lines.append(f"{note} --{role}_gradient_checkpointing the {role}'s backward needs {change:+,.0f}")
    if costs.reward_parameters and costs.reward is None:
        lines.append("the reward model's own forward is not planned, only its parameters")
    return lines


def show_rlhf_plan(models: Models, flags: Flags) -> int:
    """Print the plan of step 3; returns the exit code, see `training.utils.memory.plan.show_plan`.

    Args:
        models: what the roles would start from.
        flags: the step's.

    Raises:
        UserError: no model can be built from a path.
    """
    roles, rollout, train, zero = flags.roles, flags.rollout, flags.train, flags.zero
    actor, critic, reward = models.actor, models.critic, models.reward
    build = functools.partial(
        plans.fake_role,
        dtype=roles.dtype,
        attn_implementation=roles.attn_implementation,
        tensor_parallel=zero.tensor_parallel,
    )
    scorer, parameters = None, 0  # of the reward model on a rank
    if reward is not None and classifiers.scores_tokens(reward.path):
        scorer = build(reward.path, lora=LoraArguments(), classifier=True)
        parameters = plans.role_size(scorer).parameters
    elif reward is not None:
        parameters = classifiers.parameter_count(reward.path)
    costs = RoleCosts(
        build(actor, lora=zero.lora("actor"), classifier=False),
        build(critic, lora=zero.lora("critic"), classifier=True) if critic else None,
        scorer,
        rollout.max_prompt_seq_len,
        rollout.max_answer_seq_len,
        parameters,
    )
    settings = plans.Settings(
        zero_stage=max(zero.actor_zero_stage, zero.critic_zero_stage),
        offload=zero.offload,
        checkpointing=roles.actor_gradient_checkpointing and (not critic or roles.critic_gradient_checkpointing),
        batch=train.per_device_training_batch_size,
        other_batch=rollout.per_device_generation_batch_size,
        accumulates=train.gradient_accumulation_steps > 1,
        scored_batch=rollout.per_device_scoring_batch_size,
    )
    asked, on_cpu = (zero.actor_zero_stage, zero.critic_zero_stage), plans.device().type == "cpu"

    def plan_of(s: plans.Settings) -> plans.Plan:
        """The plan with other settings, whose ZeRO stage is then that of actor and critic."""
        stages = asked if s.zero_stage == settings.zero_stage else (s.zero_stage, s.zero_stage)
        return rlhf_plan(costs, s, roles, rollout, train, zero, models.overrides, stages, on_cpu=on_cpu)

    paths = ", ".join([actor] if reward is None else [actor, reward.path])
    precision = plans.in_words(roles.dtype, zero.lora("actor"))
    title = f"step 3: {paths}, {precision}, ZeRO {asked[0]} and {asked[1]}, ranks: {ranks_told(zero.tensor_parallel)}"
    return plans.show_plan(title, settings, plan_of, FLAGS)
