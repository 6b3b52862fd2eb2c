"""The PPO loop: collect rollouts, score them once, update actor and critic for a few epochs.

One loop serves three advantages. ``gae`` needs a critic; ``rloo`` and ``grpo`` compare the answers to one prompt with
each other and have none: no critic is built, scored or trained. What differs is said in `PPOTrainer._with_advantages`
and, for GRPO's KL term, in `PPOTrainer._policy_objective`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from training.step3_rlhf_finetuning import ppo
from training.step3_rlhf_finetuning.experience import (
    Experience,
    actor_log_probs,
    in_pieces,
    make_experience,
    score_log_probs,
    score_rewards,
    score_values,
    state_values,
)
from training.step3_rlhf_finetuning.rewards import sequence_scores
from training.step3_rlhf_finetuning.rlhf_engine import Roles
from training.step3_rlhf_finetuning.rollout import RolloutBackend, RolloutBatch, RolloutRequest, SamplingConfig
from training.step3_rlhf_finetuning.sampler_check import check_sampler, sampler_difference
from training.utils import engine as engines
from training.utils.distributed import all_reduce_sum, reduce_sums, say
from training.utils.phases import Phases
from training.utils.reward_model import RewardStats

ADVANTAGES = ("gae", "rloo", "grpo")


@dataclass(frozen=True)
class PPOSettings:
    """Constants of the update; the names are the flags'."""

    advantage: str
    samples_per_prompt: int
    ppo_epochs: int
    per_device_training_batch_size: int
    gradient_accumulation_steps: int
    kl_coef: float
    clip_ratio: float
    clip_value: float
    clip_reward: float
    gamma: float
    gae_lambda: float
    entropy_coef: float
    target_kl: float
    missing_eos_penalty: float
    whiten_advantages: bool
    seed: int


@dataclass
class PhaseClock:
    """Seconds per phase of one iteration."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to the phase's seconds."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


class PPOTrainer:
    """Runs iterations of PPO over the roles of step 3.

    Args:
        roles: from `training.step3_rlhf_finetuning.rlhf_engine.build_roles`.
        backend: decodes responses.
        sampling: how; the temperature is also applied in the training log-probs.
        settings: constants of the update.
        stats: step 2's reward statistics, None for raw rewards.
        dtype: the run's precision, which decides how far sampler and trainer may differ.
        phases: gets the time and memory of generating, scoring and training.
    """

    def __init__(
        self,
        roles: Roles,
        backend: RolloutBackend,
        sampling: SamplingConfig,
        settings: PPOSettings,
        stats: RewardStats | None,
        dtype: str,
        phases: Phases | None = None,
    ) -> None:
        self.phases = phases or Phases()
        self.roles = roles
        self.backend = backend
        self.sampling = sampling
        self.settings = settings
        self.stats = stats
        self.dtype = dtype
        self.clock = PhaseClock()
        self._checked = False

    @property
    def device(self) -> torch.device:
        """This rank's device."""
        return self.roles.actor.engine.device

    def iteration(self, requests: Sequence[RolloutRequest], number: int) -> dict[str, float]:
        """One iteration: rollouts, experience, update; returns metrics that are the same on all ranks.

        Args:
            requests: this rank's generation batches; every rank has the same number, each of the same size.
            number: of the iteration, from 0.
        """
        self.clock = PhaseClock()
        self.roles.actor.gather_seconds = 0.0
        with self.clock.phase("generate"), self.roles.actor.generation_mode() as twin:
            rollouts = [self.backend.generate(twin, request, self.sampling) for request in requests]
        self.phases.end("generate")
        with self.clock.phase("score"):
            experiences, metrics = self.score(rollouts, requests)
        self.phases.end("score")
        with self.clock.phase("train"):
            metrics |= self.update(experiences, number)
        self.phases.end("train")
        seconds = self.clock.seconds
        seconds["gather"] = self.roles.actor.gather_seconds
        metrics |= {f"time/{name}": value for name, value in seconds.items()}
        metrics["time/tokens_per_second"] = metrics["rollout/tokens"] / max(seconds["generate"], 1e-9)
        return metrics

    def score(
        self, rollouts: Sequence[RolloutBatch], requests: Sequence[RolloutRequest]
    ) -> tuple[list[Experience], dict[str, float]]:
        """One scoring pass per role, advantages included; metrics of the rollouts.

        Args:
            rollouts: this rank's generation batches.
            requests: what each of them answers.
        """
        experiences: list[Experience] = []
        sums: dict[str, float] = {}
        for rollout, request in zip(rollouts, requests, strict=True):
            experience, part = self._score_one(rollout, request)
            experiences.append(experience)
            sums = {name: sums.get(name, 0.0) + value for name, value in part.items()}
        total = reduce_sums(sums, self.device)
        self._check_sampler(rollouts, experiences)
        groups = [request.row_ids // self.settings.samples_per_prompt for request in requests]
        experiences, advantage_metrics = self._with_advantages(experiences, groups)
        rows, tokens = total["rows"], total["tokens"]
        mean = total["scores"] / rows
        metrics = {
            "reward/raw": total["raw"] / rows,
            "reward/score": mean,
            "reward/score_std": max(total["scores_squared"] / rows - mean * mean, 0.0) ** 0.5,
            "kl/per_token": total["kl"] / tokens,
            "kl/per_sequence": total["kl"] / rows,
            "policy/entropy": total["entropy"] / tokens,
            "rollout/length": tokens / rows,
            "rollout/eos_rate": total["ended"] / rows,
            "rollout/tokens": tokens,
            "rollout/sampler_difference": total["difference"] / tokens,
        }
        return experiences, metrics | advantage_metrics

    def _score_one(self, rollout: RolloutBatch, request: RolloutRequest) -> tuple[Experience, dict[str, float]]:
        batch, mask = self.settings.per_device_training_batch_size, rollout.response_mask
        temperature = self.sampling.temperature
        with self.roles.actor.scoring_mode() as engine:
            log_probs, entropy = score_log_probs(engine, rollout, batch, temperature, entropy=True)
        with self.roles.actor.reference_mode() as reference:
            reference_log_probs, _ = score_log_probs(reference, rollout, batch, temperature)
        raw = score_rewards(self.roles.reward, rollout, batch)
        critic = self.roles.critic
        values = torch.zeros_like(log_probs) if critic is None else score_values(critic, rollout, batch)
        ended = has_ended(rollout, request.stop_ids)
        scores = sequence_scores(
            raw,
            ended,
            stats=self.stats,
            clip_reward=self.settings.clip_reward,
            missing_eos_penalty=self.settings.missing_eos_penalty,
        )
        experience = make_experience(
            rollout,
            log_probs=log_probs,
            reference_log_probs=reference_log_probs,
            values=values,
            scores=scores,
            kl_coef=0.0 if self.settings.advantage == "grpo" else self.settings.kl_coef,
        )
        assert entropy is not None
        sums = {
            "rows": float(len(raw)),
            "tokens": mask.sum().item(),
            "raw": raw.sum().item(),
            "scores": scores.sum().item(),
            "scores_squared": scores.square().sum().item(),
            "kl": ((log_probs - reference_log_probs) * mask).sum().item(),
            "entropy": (entropy * mask).sum().item(),
            "ended": ended.sum().item(),
            "difference": ((rollout.logprobs - log_probs).abs() * mask).sum().item(),
        }
        return experience, sums

    def _check_sampler(self, rollouts: Sequence[RolloutBatch], experiences: Sequence[Experience]) -> None:
        """On the first iteration, stop if the sampler is not the policy that is trained.

        Raises:
            UserError: see `training.step3_rlhf_finetuning.sampler_check`.
        """
        if self._checked:
            return
        self._checked = True
        difference = sampler_difference(
            [r.logprobs for r in rollouts], [e.log_probs for e in experiences], [e.mask for e in experiences]
        )
        say(f"sampler against trainer, log-probs of {difference.tokens} tokens: {difference}")
        check_sampler(difference, self.dtype)

    def _with_advantages(
        self, experiences: Sequence[Experience], groups: Sequence[Tensor]
    ) -> tuple[list[Experience], dict[str, float]]:
        """Advantages once per iteration: gae's by token and whitened over all ranks, the others' by response.

        Args:
            experiences: this rank's generation batches.
            groups: ``[B]`` each, equal for answers to one prompt, which are all in one batch.
        """
        settings, filled = self.settings, []
        moments = torch.zeros(3, dtype=torch.float64, device=self.device)
        variance = torch.zeros(5, dtype=torch.float64, device=self.device)
        for e, group in zip(experiences, groups, strict=True):
            if settings.advantage == "gae":
                advantages, returns = ppo.generalised_advantages(
                    e.rewards, e.values, e.mask, gamma=settings.gamma, gae_lambda=settings.gae_lambda
                )
                variance += ppo.explained_variance(e.values, returns, e.mask)
            else:
                rloo = settings.advantage == "rloo"
                by_group = ppo.leave_one_out_advantages if rloo else ppo.group_relative_advantages
                advantages = by_group(e.rewards.sum(1), group).unsqueeze(1) * e.mask
                returns = torch.zeros_like(advantages)
            filled.append(replace(e, advantages=advantages, returns=returns))
            moments += ppo.masked_moments(advantages, e.mask)
        moments, variance = all_reduce_sum(moments), all_reduce_sum(variance)
        if settings.whiten_advantages and settings.advantage == "gae":
            filled = [replace(e, advantages=ppo.whiten(e.advantages, e.mask, moments)) for e in filled]
        mean, spread = ppo.mean_and_variance(moments)
        metrics = {"advantage/mean": mean, "advantage/std": spread**0.5}
        if self.roles.critic is not None:
            metrics["critic/explained_variance"] = ppo.explained_variance_from(variance)
        return filled, metrics

    def update(self, experiences: Sequence[Experience], number: int) -> dict[str, float]:
        """PPO epochs over the experience; returns means over all tokens of all minibatches.

        The first epoch takes rows in the order and the pieces they were scored in, so that its first minibatch
        has a ratio of exactly 1 on any device; later epochs shuffle.

        Args:
            experiences: this rank's generation batches.
            number: of the iteration; seeds the shuffle.
        """
        size, accumulation = self.settings.per_device_training_batch_size, self.settings.gradient_accumulation_steps
        generator = torch.Generator().manual_seed(self.settings.seed + number)
        totals: dict[str, float] = {}
        steps: list[tuple[engines.StepResult, engines.StepResult | None]] = []
        first_ratio = None
        for epoch in range(self.settings.ppo_epochs):
            pieces = [e.rows(rows) for e in experiences for rows in _minibatch_rows(len(e), size, epoch, generator)]
            if epoch:
                pieces = [pieces[i] for i in torch.randperm(len(pieces), generator=generator).tolist()]
            epoch_kl = [0.0, 0.0]
            for start in range(0, len(pieces), accumulation):
                sums, actor_step, critic_step = self._optimizer_step(pieces[start : start + accumulation])
                steps.append((actor_step, critic_step))
                first_ratio = sums["ratio"] / sums["tokens"] if first_ratio is None else first_ratio
                totals = {name: totals.get(name, 0.0) + value for name, value in sums.items()}
                epoch_kl = [epoch_kl[0] + sums["approx_kl"], epoch_kl[1] + sums["tokens"]]
            if self.settings.target_kl and epoch_kl[0] / epoch_kl[1] > self.settings.target_kl:
                break
        tokens = max(totals["tokens"], 1.0)
        metrics = {
            "policy/loss": totals["policy_loss"] / tokens,
            "policy/ratio": totals["ratio"] / tokens,
            "policy/first_ratio": 1.0 if first_ratio is None else first_ratio,
            "policy/clip_fraction": totals["clipped"] / tokens,
            "policy/approx_kl": totals["approx_kl"] / tokens,
            **_step_metrics("policy", [actor_step for actor_step, _ in steps]),
            "ppo/optimizer_steps": float(len(steps)),
        }
        critic_steps = [critic_step for _, critic_step in steps if critic_step is not None]
        if critic_steps:
            metrics |= {"critic/loss": totals["value_loss"] / tokens, **_step_metrics("critic", critic_steps)}
        return metrics

    def _optimizer_step(
        self, pieces: Sequence[Experience]
    ) -> tuple[dict[str, float], engines.StepResult, engines.StepResult | None]:
        """One step of both optimizers over these micro-batches, normalised over the tokens of all ranks."""
        settings, critic = self.settings, self.roles.critic
        tokens = all_reduce_sum(torch.stack([p.mask.sum() for p in pieces]).sum()).item()
        sums = dict.fromkeys(("ratio", "clipped", "approx_kl", "policy_loss", "value_loss"), 0.0)
        if critic is not None:
            critic.train()
        with self.roles.actor.training_mode() as engine:
            for piece in pieces:
                objective, statistics = self._policy_objective(engine, piece)
                engines.backward(engine, objective, tokens)
                statistics["value_loss"] = torch.zeros(())
                if critic is not None:
                    values = state_values(critic, piece.input_ids, piece.attention_mask, piece.mask)
                    error = ppo.value_loss(
                        values, piece.values, piece.returns, piece.mask, clip_value=settings.clip_value
                    )
                    engines.backward(critic, error, tokens)
                    statistics["value_loss"] = error.detach()
                sums = {name: sums[name] + statistics[name].item() for name in sums}
            actor_step = engines.optimizer_step(engine)
        critic_step = None
        if critic is not None:
            critic_step = engines.optimizer_step(critic)
            critic.eval()
        return reduce_sums(sums, self.device) | {"tokens": tokens}, actor_step, critic_step

    def _policy_objective(self, engine: Any, piece: Experience) -> tuple[Tensor, dict[str, Tensor]]:
        """What the actor's step minimises on a micro-batch, summed over tokens, and detached sums for the metrics."""
        settings = self.settings
        log_probs, entropy = actor_log_probs(
            engine,
            piece.input_ids,
            piece.attention_mask,
            piece.mask,
            self.sampling.temperature,
            entropy=settings.entropy_coef > 0,
        )
        loss, statistics = ppo.policy_loss(
            log_probs, piece.log_probs, piece.advantages, piece.mask, clip_ratio=settings.clip_ratio
        )
        objective = loss if entropy is None else loss - settings.entropy_coef * (entropy * piece.mask).sum()
        if settings.advantage == "grpo" and settings.kl_coef > 0:
            kl = ppo.reference_kl(log_probs, piece.reference_log_probs, piece.mask)
            objective = objective + settings.kl_coef * kl
        return objective, statistics | {"policy_loss": loss.detach()}


def _step_metrics(role: str, steps: Sequence[engines.StepResult]) -> dict[str, float]:
    """Metrics of a role's optimizer steps of one iteration."""
    return {
        f"{role}/grad_norm": steps[-1].grad_norm,
        f"{role}/learning_rate": steps[-1].learning_rate,
        f"{role}/skipped_steps": float(sum(step.skipped for step in steps)),
    }


def has_ended(rollout: RolloutBatch, stop_ids: tuple[int, ...]) -> Tensor:
    """Whether each response's last token is an end token, ``[B]`` bool."""
    responses = rollout.input_ids[:, rollout.response_start :]
    last = (rollout.response_mask.long().sum(1) - 1).clamp(min=0)
    tokens = responses.gather(1, last.unsqueeze(1)).squeeze(1)
    return torch.isin(tokens, torch.tensor(stop_ids, device=tokens.device)) & rollout.response_mask.any(1)


def _minibatch_rows(count: int, size: int, epoch: int, generator: torch.Generator) -> list[list[int]]:
    """Row numbers of each micro-batch: in order in the first epoch, shuffled later."""
    order = torch.randperm(count, generator=generator).tolist() if epoch else list(range(count))
    return [order[piece] for piece in in_pieces(size, count)]
