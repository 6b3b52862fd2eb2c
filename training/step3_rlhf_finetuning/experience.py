"""Rollouts -> experience, once per iteration: every role scores them, rewards become advantages.

One pass serves three advantages. ``gae`` needs a critic; ``rloo`` and ``grpo`` compare the answers to one prompt with
each other and have none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from training.step3_rlhf_finetuning import ppo
from training.step3_rlhf_finetuning.arguments import (
    OptimizationArguments,
    PPOArguments,
    RolloutArguments,
    scoring_rows,
)
from training.step3_rlhf_finetuning.prompts import PromptSet
from training.step3_rlhf_finetuning.roles import Roles
from training.utils.generation.rollouts import RolloutBatch, RolloutRequest, has_ended, score_log_probs, score_values
from training.utils.run.distributed import all_reduce_sum, reduce_sums


@dataclass(frozen=True)
class Experience:
    """One generation batch with everything the update needs.

    Rows keep one padded layout from here to the last PPO epoch: another padding would move bf16 log-probs.

    Shapes: B rows, P padded prompt length, R padded response length, T = P + R. Tensors ``[B, R]`` are 0
    outside ``mask`` and aligned as in `training.step3_rlhf_finetuning.ppo`.

    Attributes:
        input_ids, attention_mask: ``[B, T]``, prompts left-padded, responses right-padded.
        mask: ``[B, R]`` bool, response tokens with the end token.
        log_probs: ``[B, R]`` of the actor before this iteration's updates, from its engine.
        reference_log_probs: ``[B, R]``.
        values: ``[B, R]`` of the critic before this iteration's updates.
        rewards: ``[B, R]``, KL penalty and the sequence score.
        advantages, returns: ``[B, R]``, filled in once per iteration.
        valid: ``[B]`` bool, whether the row may be learned from: its reward, log-probs and values are finite.
        importance: ``[B, R]``, weights of the policy loss by ``--importance_cap``; None without it.
    """

    input_ids: Tensor
    attention_mask: Tensor
    mask: Tensor
    log_probs: Tensor
    reference_log_probs: Tensor
    values: Tensor
    rewards: Tensor
    advantages: Tensor
    returns: Tensor
    valid: Tensor
    importance: Tensor | None = None

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def response_start(self) -> int:
        """P, the column of the first response token."""
        return self.input_ids.shape[1] - self.mask.shape[1]

    def rows(self, indices: Sequence[int]) -> Experience:
        """The given rows, in the same layout."""
        index = torch.as_tensor(indices, device=self.input_ids.device)
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: part[index] for name, part in parts.items() if part is not None})


@dataclass(frozen=True)
class ScoredBatch:
    """One generation batch and everything that was found out about it.

    Attributes:
        request, rollout: prompts and responses.
        experience: what the update needs.
        rewards: ``[B]`` by source, raw.
        scores: ``[B]``, what PPO maximises before the KL penalty; 0 where a number of the row is not finite.
    """

    request: RolloutRequest
    rollout: RolloutBatch
    experience: Experience
    rewards: dict[str, Tensor]
    scores: Tensor


def _finite_rows(reward: Tensor, by_token: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Which rows have a finite reward [B] and finite numbers at their response tokens [B, T]: bool [B]."""
    finite = reward.isfinite()
    for numbers in by_token:
        finite = finite & (numbers.isfinite() | ~mask).all(1)
    return finite


@dataclass(eq=False)
class Scoring:
    """Scores the rollouts of an iteration.

    Args:
        roles: see `training.step3_rlhf_finetuning.roles.build_roles`.
        prompts: what the requests' rows refer to.
        ppo, rollout, train: the flags.
    """

    roles: Roles
    prompts: PromptSet
    ppo: PPOArguments
    rollout: RolloutArguments
    train: OptimizationArguments

    def __post_init__(self) -> None:
        self._rows = scoring_rows(self.rollout, self.train)

    def score(
        self, rollouts: Sequence[RolloutBatch], requests: Sequence[RolloutRequest]
    ) -> tuple[list[ScoredBatch], dict[str, float]]:
        """One scoring pass per role, advantages included; metrics over all ranks; a collective.

        Args:
            rollouts: this rank's generation batches.
            requests: what each of them answers.
        """
        batches: list[ScoredBatch] = []
        sums: dict[str, float] = {}
        with self.roles.actor.reference_mode() as reference:  # once: it may gather the whole actor
            references = [self._log_probs(reference, rollout)[0] for rollout in rollouts]
        for rollout, request, reference_log_probs in zip(rollouts, requests, references, strict=True):
            batch, part = self._score_one(rollout, request, reference_log_probs)
            batches.append(batch)
            sums = {name: sums.get(name, 0.0) + value for name, value in part.items()}
        total = reduce_sums(sums, rollouts[0].input_ids.device)
        batches, metrics = self._with_advantages(batches)
        rows, tokens, finite = total["rows"], max(total["finite_tokens"], 1.0), max(total["finite"], 1.0)

        def moments(name: str) -> tuple[float, float]:
            """Mean and standard deviation over responses."""
            mean = total[name] / finite
            return mean, max(total[f"{name}_squared"] / finite - mean * mean, 0.0) ** 0.5

        score, score_std = moments("scores")
        return batches, metrics | {
            **{name: value / finite for name, value in total.items() if name.startswith("source/")},
            "reward/mean": total["reward"] / finite,
            "reward/std": moments("clipped")[1],
            "reward/clipped_share": total["beyond_clip"] / finite,
            **({"reward/rms": (total["normalised_squared"] / finite) ** 0.5} if "normalised_squared" in total else {}),
            "reward/score": score,
            "reward/score_std": score_std,
            "reward/not_finite": rows - total["finite"],
            "kl/per_token": total["kl"] / tokens,
            "kl/per_sequence": total["kl"] / finite,
            "policy/entropy": total["entropy"] / tokens,
            "rollout/length": total["tokens"] / rows,
            "rollout/eos_rate": total["ended"] / rows,
            "rollout/tokens": total["tokens"],
            "rollout/sampler_difference": total["difference"] / tokens,
            **{f"rollout/{name}": total[name] / tokens for name in ("importance", "capped") if name in total},
        }

    def _log_probs(self, model: Any, rollout: RolloutBatch, entropy: bool = False) -> tuple[Tensor, Tensor | None]:
        temperature, sharing = self.rollout.temperature, self.roles.actor.sharing
        return score_log_probs(model, rollout, self._rows, temperature, entropy=entropy, sharing=sharing)

    def _asked(
        self, rollout: RolloutBatch, request: RolloutRequest
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """What actor, critic and reward sources say of a rollout.

        Returns:
            The actor's log-probs and entropies and the critic's values, 0 without one, ``[B, R]``; the reward and the
            raw rewards by source, ``[B]``.
        """
        critic = self.roles.critic
        with self.roles.actor.scoring_mode() as engine:
            log_probs, entropy = self._log_probs(engine, rollout, entropy=True)
            assert entropy is not None
        reward, raw = self.roles.rewards.score(rollout, request.rows, self.prompts, self._rows)
        if critic is None:
            return log_probs, entropy, torch.zeros_like(log_probs), reward, raw
        return log_probs, entropy, score_values(critic, rollout, self._rows, self.roles.values_sharing), reward, raw

    def _score_one(
        self, rollout: RolloutBatch, request: RolloutRequest, reference_log_probs: Tensor
    ) -> tuple[ScoredBatch, dict[str, float]]:
        flags, mask = self.ppo, rollout.response_mask
        log_probs, entropy, values, reward, raw = self._asked(rollout, request)
        finite = _finite_rows(reward, (log_probs, reference_log_probs, values), mask)
        # a row that is left out must not reach the sums over all rows through 0 * NaN
        reward = reward.masked_fill(~finite, 0.0)
        own, reference, spread, sampled = (
            part.masked_fill(~finite.unsqueeze(1), 0.0)
            for part in (log_probs, reference_log_probs, entropy, rollout.logprobs)
        )
        taken = mask & finite.unsqueeze(1)
        importance = None
        if flags.importance_cap:
            importance = ppo.truncated_importance(own, sampled, mask, cap=flags.importance_cap)
        ended = has_ended(rollout, request.stop_ids)
        held = ppo.clipped(reward, flags.clip_reward)
        scores = ppo.sequence_scores(held, ended, missing_eos_penalty=flags.missing_eos_penalty)
        scores = scores.masked_fill(~finite, 0.0)
        rewards = ppo.token_rewards(own, reference, scores, mask, kl_coef=flags.kl_coef * (flags.advantage != "grpo"))
        blank = torch.zeros_like(rewards)  # until advantages are
        experience = Experience(
            rollout.input_ids,
            rollout.attention_mask,
            mask,
            log_probs,  # as they are, for the trace: no update uses a row that is left out
            reference_log_probs,
            values,
            rewards,
            advantages=blank,
            returns=blank,
            valid=finite,
            importance=importance,
        )
        sums = {
            **{f"source/{name}": values.masked_fill(~finite, 0.0).sum().item() for name, values in raw.items()},
            "rows": float(len(reward)),
            "finite": finite.sum().item(),
            "tokens": mask.sum().item(),
            "finite_tokens": taken.sum().item(),
            "reward": reward.sum().item(),
            "clipped": held.double().sum().item(),
            "clipped_squared": held.double().square().sum().item(),
            "beyond_clip": (held != reward).sum().item(),
            "scores": scores.double().sum().item(),
            "scores_squared": scores.double().square().sum().item(),
            "kl": ((own - reference) * mask).sum().item(),
            "entropy": (spread * mask).sum().item(),
            "ended": ended.sum().item(),
            "difference": ((sampled - own).abs() * mask).sum().item(),
        }
        if importance is not None:
            sums["importance"] = (importance * taken).sum().item()
            sums["capped"] = ((importance >= flags.importance_cap) & taken).sum().item()
        for source in self.roles.rewards.sources:
            if source.stats is not None:  # the reward model: the one source with statistics
                normalised = source.stats.normalise(raw[source.name]).masked_fill(~finite, 0.0)
                sums["normalised_squared"] = normalised.double().square().sum().item()
        return ScoredBatch(request, rollout, experience, raw, scores), sums

    def _with_advantages(self, batches: Sequence[ScoredBatch]) -> tuple[list[ScoredBatch], dict[str, float]]:
        """Advantages once per iteration: gae's by token and whitened over all ranks, the others' by response.

        Answers to one prompt are all in one batch. Rows with a number that is not finite take no part.
        """
        flags, filled = self.ppo, []
        device = batches[0].rollout.input_ids.device
        moments = torch.zeros(3, dtype=torch.float64, device=device)
        variance = torch.zeros(5, dtype=torch.float64, device=device)
        for batch in batches:
            e = batch.experience
            if flags.advantage == "gae":
                values = e.values.masked_fill(~e.valid.unsqueeze(1), 0.0)
                advantages, returns = ppo.generalised_advantages(
                    e.rewards, values, e.mask, gamma=flags.gamma, gae_lambda=flags.gae_lambda
                )
                variance += ppo.explained_variance(values, returns, e.mask & e.valid.unsqueeze(1))
            else:
                group = batch.request.row_ids // self.rollout.samples_per_prompt
                rloo = flags.advantage == "rloo"
                by_group = ppo.leave_one_out_advantages if rloo else ppo.group_relative_advantages
                advantages = by_group(e.rewards.sum(1), group).unsqueeze(1) * e.mask
                returns = torch.zeros_like(advantages)
                e = replace(e, valid=ppo.whole_groups(e.valid, group))
            moments += ppo.masked_moments(advantages, e.mask & e.valid.unsqueeze(1))
            filled.append(replace(batch, experience=replace(e, advantages=advantages, returns=returns)))
        moments, variance = all_reduce_sum(moments), all_reduce_sum(variance)
        if flags.whiten_advantages and flags.advantage == "gae":
            filled = [
                replace(b, experience=replace(e, advantages=ppo.whiten(e.advantages, e.mask, moments)))
                for b, e in ((b, b.experience) for b in filled)
            ]
        mean, spread = ppo.mean_and_variance(moments)
        metrics = {"advantage/mean": mean, "advantage/std": spread**0.5}
        if self.roles.critic is not None:
            metrics["critic/explained_variance"] = ppo.explained_variance_from(variance)
        return filled, metrics
