"""Step 3's own flags, and what they must satisfy together; without torch. What they stand for is in settings.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from training.utils import arguments
from training.utils.arguments import (
    AUTO,
    BASE_BITS_HELP,
    DTYPE_HELP,
    MAX_SEED,
    PRECISIONS,
    ROLLOUT_ENGINES,
    SCHEDULES,
    LoraArguments,
    check_base_bits,
    flag,
)
from training.utils.errors import UserError
from training.utils.generation.vllm_python import check_vllm

ADVANTAGES = ("gae", "rloo", "grpo")

T = TypeVar("T")


@dataclass
class RoleArguments:
    """Models of the roles"""

    actor_model_name_or_path: str = flag(
        "", "the SFT model: actor and reference start from it (default: the latest step 1)"
    )
    critic_model_name_or_path: str = flag(
        "", "the reward model, from which the critic starts; none to do without (default: the latest step 2)"
    )
    tokenizer_name_or_path: str = flag("", "tokenizer of actor and critic (default: the actor's)")
    dtype: str = flag(AUTO, DTYPE_HELP, choices=PRECISIONS)
    attn_implementation: str = flag("sdpa", "attention of transformers", choices=("sdpa", "eager", "flash_attention_2"))
    actor_gradient_checkpointing: bool = flag(False, "trade a second forward for activation memory")
    critic_gradient_checkpointing: bool = flag(False, "trade a second forward for activation memory")


@dataclass
class RolloutArguments:
    """Rollouts"""

    max_prompt_seq_len: int = flag(256, "longest prompt in tokens; longer ones lose their oldest turns", minimum=4)
    max_answer_seq_len: int = flag(256, "longest response in tokens", minimum=1)
    per_device_generation_batch_size: int = flag(16, "responses per rank that are decoded together", minimum=1)
    per_device_scoring_batch_size: int = flag(
        0, "rows per rank of a forward that scores; 0: --per_device_training_batch_size", minimum=0
    )
    generation_batches: int = flag(1, "generation batches per iteration", minimum=1)
    samples_per_prompt: int = flag(1, "responses to each prompt of an iteration", minimum=1)
    rollout_engine: str = flag("fast", "how tokens are decoded", choices=ROLLOUT_ENGINES)
    vllm_python: str = flag("", "interpreter that has vLLM (default: that of make setup-vllm, else this one)")
    vllm_tensor_parallel: int = flag(1, "ranks whose vLLM processes hold the model together", minimum=1)
    temperature: float = flag(1.0, "sampling temperature, applied in training log-probs too", above=0)
    top_p: float = flag(1.0, "nucleus sampling; below 1 the sampler is no longer the policy", above=0, maximum=1)
    top_k: int = flag(0, "sample from the k likeliest tokens; above 0 the sampler is no longer the policy", minimum=0)


@dataclass
class PPOArguments:
    """PPO"""

    advantage: str = flag(
        "gae",
        "what is better than expected: by a critic (gae), or by other answers to the prompt (rloo, grpo), no critic",
        choices=ADVANTAGES,
    )
    ppo_epochs: int = flag(1, "passes over each iteration's rollouts", minimum=1)
    kl_coef: float = flag(0.05, "weight of the KL penalty to the reference", minimum=0)
    clip_ratio: float = flag(0.2, "clip of the policy ratio", above=0)
    importance_cap: float = flag(
        0.0, "weigh tokens by their probability in training over that in sampling, at most this; 0: not", minimum=0
    )
    clip_value: float = flag(0.2, "clip of the value around the old value, 0 for none", minimum=0)
    clip_reward: float = flag(5.0, "clip of the weighted sum of rewards, 0 for none", minimum=0)
    gamma: float = flag(1.0, "discount per token", minimum=0, maximum=1)
    gae_lambda: float = flag(0.95, "lambda of generalised advantage estimation", minimum=0, maximum=1)
    entropy_coef: float = flag(0.0, "weight of an entropy bonus", minimum=0)
    target_kl: float = flag(
        0.0, "end an iteration's epochs above this KL from the sampling policy, 0 for never", minimum=0
    )
    missing_eos_penalty: float = flag(1.0, "subtracted from the reward of a response cut off at the limit", minimum=0)
    whiten_advantages: bool = flag(True, "shift and scale gae's advantages to mean 0, variance 1")
    normalize_reward: bool = flag(True, "normalise the reward model's rewards by step 2's reward_stats.json")
    reward_function: list[str] = flag(
        [], "file.py:name=WEIGHT, Python functions added to the reward model; model=WEIGHT weighs that one"
    )


@dataclass
class OptimizationArguments:
    """Training"""

    per_device_training_batch_size: int = flag(8, "rows per rank and micro-batch of the update", minimum=1)
    gradient_accumulation_steps: int = flag(1, "micro-batches per optimizer step", minimum=1)
    actor_learning_rate: float = flag(9.65e-6, "peak learning rate of the actor", above=0)
    critic_learning_rate: float = flag(5e-6, "peak learning rate of the critic", above=0)
    actor_weight_decay: float = flag(0.0, "AdamW weight decay of the actor", minimum=0)
    critic_weight_decay: float = flag(0.0, "AdamW weight decay of the critic", minimum=0)
    lr_scheduler_type: list[str] = flag(
        ["cosine"],
        "how the learning rates fall: one for both roles, or the actor's and the critic's",
        choices=SCHEDULES,
    )
    num_warmup_steps: list[int] = flag(
        [0], "optimizer steps of linear warm-up: one number for both roles, or the actor's and the critic's", minimum=0
    )
    num_train_epochs: int = flag(1, "passes over the prompts", minimum=1)
    num_iterations: int = flag(0, "iterations in all, 0 for every prompt of every epoch", minimum=0)
    unsupervised_data_path: list[str] = flag([], "sources of the pre-training mix: plain text or conversations")
    unsup_coef: float = flag(27.8, "weight of the pre-training mix's loss in the actor's", minimum=0)
    enable_ema: bool = flag(False, "keep a moving average of the actor's weights and save it as a model, ema/")
    seed: int = flag(1234, "seed of data order and sampling", minimum=0, maximum=MAX_SEED)


@dataclass
class RoleZeroArguments:
    """DeepSpeed and LoRA of the roles"""

    actor_zero_stage: int = flag(0, "ZeRO stage of actor and reference", choices=(0, 1, 2, 3))
    critic_zero_stage: int = flag(0, "ZeRO stage of critic and reward model", choices=(0, 1, 2, 3))
    offload: bool = flag(False, "keep optimizer states (and at stage 3 parameters) in CPU memory")
    offload_reference_model: bool = flag(False, "at stage 3 keep the reference's parameters in CPU memory")
    offload_reward_model: bool = flag(False, "at stage 3 keep the reward model's parameters in CPU memory")
    tensor_parallel: int = flag(1, arguments.TENSOR_PARALLEL_HELP, minimum=1)
    deepspeed_config: str = flag("", "a JSON file, or JSON, merged over the configuration that these flags make")
    actor_lora_dim: int = flag(0, "rank of the actor's adapters, 0 for none", minimum=0)
    actor_lora_module_name: str = flag("all-linear", "comma-separated parts of module names, or all-linear")
    critic_lora_dim: int = flag(0, "rank of the critic's adapters, 0 for none", minimum=0)
    critic_lora_module_name: str = flag("all-linear", "comma-separated parts of module names, or all-linear")
    actor_lora_learning_rate: float = flag(0.0, "of the actor's adapters; 0: --actor_learning_rate", minimum=0)
    critic_lora_learning_rate: float = flag(0.0, "of the critic's adapters; 0: --critic_learning_rate", minimum=0)
    lora_alpha: int = flag(0, "adapters count with alpha / rank; 0: alpha is twice the rank", minimum=0)
    only_optimize_lora: bool = flag(False, "freeze everything but the adapters (and the critic's head)")
    merge_lora_for_generation: bool = flag(False, "add the actor's adapters to its weights while it generates")
    base_bits: int = flag(0, BASE_BITS_HELP, choices=(0, 4))

    def __post_init__(self) -> None:
        for name, dims in (
            ("only_optimize_lora", ("actor_lora_dim", "critic_lora_dim")),
            ("lora_alpha", ("actor_lora_dim", "critic_lora_dim")),
            ("actor_lora_learning_rate", ("actor_lora_dim",)),
            ("critic_lora_learning_rate", ("critic_lora_dim",)),
            ("merge_lora_for_generation", ("actor_lora_dim",)),
            ("base_bits", ("actor_lora_dim", "critic_lora_dim")),
        ):
            if getattr(self, name) and not any(getattr(self, dim) for dim in dims):
                raise UserError(f"--{name} needs adapters: set {' or '.join(f'--{dim}' for dim in dims)}")
        check_base_bits(self.base_bits, self.only_optimize_lora)
        if self.base_bits and self.merge_lora_for_generation:
            raise UserError(
                f"--merge_lora_for_generation would round the adapters to {self.base_bits} bits: leave it out with "
                f"--base_bits {self.base_bits}"
            )

    def lora(self, role: str) -> LoraArguments:
        """The adapters of ``actor`` or ``critic``; without dropout, with which PPO's first ratio would not be 1."""
        dim: int = getattr(self, f"{role}_lora_dim")
        if not dim:
            return LoraArguments()
        name, rate = getattr(self, f"{role}_lora_module_name"), getattr(self, f"{role}_lora_learning_rate")
        return LoraArguments(dim, name, self.only_optimize_lora, self.lora_alpha, rate, base_bits=self.base_bits)


@dataclass
class EvaluationArguments:
    """Evaluation"""

    eval_every: int = flag(
        10, "evaluate on some held-out prompts every this many iterations, 0 for the end only", minimum=0
    )
    eval_function: list[str] = flag([], "file.py:name ..., independent measures of answers beside the reward model")
    trace: list[int] = flag(
        [], "write every rollout of these iterations to trace/, with numbers for each token", minimum=1
    )


ARGUMENTS = [
    RoleArguments,
    arguments.DataArguments,
    RolloutArguments,
    PPOArguments,
    OptimizationArguments,
    RoleZeroArguments,
    EvaluationArguments,
    arguments.OutputArguments,
    arguments.ReliabilityArguments,
]


# What train.py and evaluate.py call the reward model, and flags of steps 1 and 2 that can not be had here
ALIASES = {
    "--reward_model_name_or_path": arguments.OtherFlag(str, ours="--critic_model_name_or_path"),
    "--lora_dropout": arguments.OtherFlag(
        float, 0.0, said="with dropout PPO's first ratio would not be 1", only=(0.0,)
    ),
    "--sequence_parallel": arguments.OtherFlag(
        int, 1, said="prompts are padded on the left, and tokens decoded one by one: neither can be divided", only=(1,)
    ),
}


def check(groups: list[Any]) -> list[Any]:
    """Refuse flags that contradict each other.

    Args:
        groups: instances of `ARGUMENTS`.

    Returns:
        The same.

    Raises:
        UserError: names the flags.
    """
    _, _, rollout, ppo, train, zero, _, output, _ = groups
    check_batches(rollout, train)
    if ppo.advantage != "gae" and rollout.samples_per_prompt < 2:
        raise UserError(
            f"--advantage {ppo.advantage} compares answers to the same prompt: --samples_per_prompt must be at least 2"
        )
    adapters = {name: getattr(zero, name) for name in ("actor_lora_dim", "critic_lora_dim")}
    arguments.check_tensor_parallel(zero.tensor_parallel, adapters)
    if zero.tensor_parallel > 1 and rollout.rollout_engine == "vllm":
        raise UserError(
            "--rollout_engine vllm has a whole model beside each rank: it does not go with --tensor_parallel "
            f"{zero.tensor_parallel}; give --rollout_engine fast"
        )
    if rollout.vllm_tensor_parallel > 1 and rollout.rollout_engine != "vllm":
        raise UserError("--vllm_tensor_parallel is read with --rollout_engine vllm alone")
    if not output.plan:  # which may be made before vLLM is installed
        check_vllm(rollout.rollout_engine, rollout.vllm_python)
    for_each_role(train.lr_scheduler_type, "--lr_scheduler_type")
    for_each_role(train.num_warmup_steps, "--num_warmup_steps")
    for name, wanted, stage in (
        ("--offload_reference_model", zero.offload_reference_model, zero.actor_zero_stage),
        ("--offload_reward_model", zero.offload_reward_model, zero.critic_zero_stage),
    ):
        if wanted and stage < 3:
            role = "actor" if "reference" in name else "critic"
            raise UserError(f"{name} moves the parameters of ZeRO-3: it needs --{role}_zero_stage 3")
    return groups


def for_each_role(values: Sequence[T], name: str) -> tuple[T, T]:
    """The actor's and the critic's value of a flag that takes one or two.

    Raises:
        UserError: another number of values.
    """
    if len(values) not in (1, 2):
        raise UserError(f"{name}: give one value for both roles, or the actor's and the critic's")
    return values[0], values[-1]


def check_batches(rollout: RolloutArguments, train: OptimizationArguments) -> None:
    """Refuse batch sizes that do not divide.

    Raises:
        UserError: names the two flags.
    """
    generation, training = rollout.per_device_generation_batch_size, train.per_device_training_batch_size
    divisors = {"samples_per_prompt": rollout.samples_per_prompt, "per_device_training_batch_size": training}
    for name, part in divisors.items():
        if generation % part:
            raise UserError(f"--per_device_generation_batch_size {generation} is not a multiple of --{name} {part}")
    pieces = generation * rollout.generation_batches // training
    if pieces % train.gradient_accumulation_steps:
        times = train.gradient_accumulation_steps // math.gcd(pieces, train.gradient_accumulation_steps)
        raise UserError(
            f"an iteration has {pieces} micro-batches per rank, not a multiple of --gradient_accumulation_steps "
            f"{train.gradient_accumulation_steps}; --generation_batches {rollout.generation_batches * times} makes one"
        )


def scoring_rows(rollout: RolloutArguments, train: OptimizationArguments) -> int:
    """Rows per rank of a forward that scores; at ZeRO-3 each such forward gathers the weights of its role once."""
    return rollout.per_device_scoring_batch_size or train.per_device_training_batch_size


def scored_alike(rollout: RolloutArguments, train: OptimizationArguments) -> bool:
    """Whether rows are scored in the pieces they are trained in, which alone makes old and new log-probs equal."""
    return scoring_rows(rollout, train) == train.per_device_training_batch_size
