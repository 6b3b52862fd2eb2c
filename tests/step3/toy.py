"""A task with a known optimum: a tiny random model must learn to answer with one token, over and over."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from tests.step3.hybrid_checks import PAD, build, request, reward_settings, scoring
from training.step3_rlhf_finetuning.ppo_trainer import PPOTrainer
from training.step3_rlhf_finetuning.reward_sources import RewardMix, TokenReward
from training.step3_rlhf_finetuning.roles import Roles, build_actor, build_critic
from training.utils.generation.engines import rollout_backend
from training.utils.generation.sampling import SamplingConfig
from training.utils.generation.vllm import VllmBackend

VOCABULARY = 16
FAVOURITE = 7
ANSWER_LENGTH = 6
PROMPTS = 16
LEARNING_RATE = {"full": 3e-3, "lora": 1.5e-2}  # a model this small stands, and needs, far more than a real one
CRITIC_LEARNING_RATE = 1e-2
ENTROPY_COEF = 0.015  # with 0.01 and less a prompt may settle on another token before the favourite is tried


def save_toy_models(folder: Path) -> tuple[str, str]:
    """A one-layer Llama of 16 tokens as actor, and as critic the same with a score head; returns both folders."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.15,  # nearly uniform at first; with the head frozen (LoRA) still able to be certain
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=PAD,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "actor")
    config.num_labels = 1
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "critic")
    return str(folder / "actor"), str(folder / "critic")


class CountOfFavourite(nn.Module):
    """How many of an answer's six places hold `FAVOURITE`, as scores of tokens."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """ids, mask ``[B, T]`` -> ``[B, T]``; prompts hold no `FAVOURITE`."""
        return ((input_ids == FAVOURITE) & attention_mask.bool()).cumsum(1).float()


def recent(history: list[float]) -> float:
    """The mean of the last three; what is not there yet counts as 0."""
    return sum(history[-3:]) / 3


def toy_prompts() -> list[list[int]]:
    """Prompts of unequal lengths without `FAVOURITE`; all end alike, as a chat template's generation prompt does."""
    generator = torch.Generator().manual_seed(5)
    return [
        torch.randint(FAVOURITE + 1, VOCABULARY, (1 + i % 3,), generator=generator).tolist() + [1]
        for i in range(PROMPTS)
    ]


def learn(
    models: tuple[str, str],
    *,
    seed: int,
    iterations: int,
    advantage: str = "gae",
    ppo_epochs: int,
    stage: int = 0,
    lora: int = 0,
    generation_batches: int = 1,
    generation_batch_size: int = 128,
    training_batch_size: int = 64,
    samples_per_prompt: int = 8,
    clip_reward: float = 0.0,
    enough: float = math.inf,
    server: VllmBackend | None = None,
) -> list[float]:
    """Share of the optimum after each iteration of PPO, on this process alone; ends at three that are ``enough``.

    ``server`` answers in place of ``fast``.

    Each iteration answers ``generation_batches * generation_batch_size / samples_per_prompt`` prompts.
    """
    updates = iterations * ppo_epochs * generation_batches * (generation_batch_size // training_batch_size)
    noise = (training_batch_size / 64) ** 0.5  # the rates are for steps of 64 rows; smaller ones are noisier
    rate = LEARNING_RATE["lora" if lora else "full"] * noise
    made = build(
        stage,
        rate,
        lora,
        critic_learning_rate=CRITIC_LEARNING_RATE * noise,
        per_device_training_batch_size=training_batch_size,
        total_steps=updates,
    )
    torch.manual_seed(seed)
    roles = Roles(
        build_actor(models[0], made),
        build_critic(models[0], reward_settings(models[1]), made) if advantage == "gae" else None,
        RewardMix([TokenReward(CountOfFavourite())]),
    )
    scored = scoring(
        roles,
        advantage=advantage,
        samples_per_prompt=samples_per_prompt,
        ppo_epochs=ppo_epochs,
        per_device_training_batch_size=training_batch_size,
        kl_coef=0.0,  # nothing but the reward has an optimum
        clip_value=1.0,  # values go up to 6
        clip_reward=clip_reward,  # above a clip the reward is flat and can not be climbed
        entropy_coef=ENTROPY_COEF,
        seed=seed,
    )
    roles.actor.server = server
    backend = server or rollout_backend("fast")
    trainer = PPOTrainer(roles, scored, backend, SamplingConfig(ANSWER_LENGTH), "fp32")
    prompts, history = toy_prompts(), []
    per_batch = generation_batch_size // samples_per_prompt
    for number in range(iterations):
        requests = []
        for batch in range(generation_batches):
            chosen = [(number * generation_batches + batch) * per_batch + i for i in range(per_batch)]
            rows = [prompts[i % PROMPTS] for i in chosen for _ in range(samples_per_prompt)]
            ids = range(batch * generation_batch_size, (batch + 1) * generation_batch_size)
            requests.append(request(rows, list(ids), number, seed))
        history.append(trainer.iteration(requests, number)["reward/mean"] / ANSWER_LENGTH)
        if recent(history) >= enough:
            break
    return history
