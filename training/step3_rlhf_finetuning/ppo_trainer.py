"""The PPO loop: collect rollouts, score them once, update actor and critic for a few epochs.

One loop serves the three advantages of `training.step3_rlhf_finetuning.experience`. With ``rloo`` and ``grpo`` there is
no critic: none is built, scored or trained; GRPO's KL term is in `PPOTrainer._policy_objective`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from training.step3_rlhf_finetuning import ppo
from training.step3_rlhf_finetuning.arguments import scored_alike
from training.step3_rlhf_finetuning.experience import Experience, ScoredBatch, Scoring
from training.step3_rlhf_finetuning.pretraining_mix import PretrainingMix
from training.step3_rlhf_finetuning.prompts import PromptSet
from training.step3_rlhf_finetuning.roles import Build, Roles, build_roles, generation_backend
from training.step3_rlhf_finetuning.sampler_check import check_first_ratio, check_sampler, sampler_difference
from training.step3_rlhf_finetuning.settings import Flags, Models, steps_per_iteration, vllm_server
from training.utils.engine import engine as engines
from training.utils.generation.rollouts import (
    RolloutBackend,
    RolloutRequest,
    rollout_log_probs,
    row_slices,
    state_values,
)
from training.utils.generation.sampling import SamplingConfig
from training.utils.run.distributed import all_reduce_sum, asked_to_stop, reduce_sums, say
from training.utils.run.phases import Phases, beat
from training.utils.sharing.trial import shares_across

BAD_REWARDS = "rewards, log-probs or values that are not finite"
BAD_GRADIENTS = "gradients of the {} that are not finite"


@dataclass(frozen=True)
class OptimizerStep:
    """What one optimizer step did on all ranks.

    Attributes:
        sums: over its tokens, and their number ``tokens``.
        actor, critic: None for a role that made no step.
        skipped: why a role learned nothing, the actor or the critic; empty if all that train did.
    """

    sums: dict[str, float]
    actor: engines.StepResult | None
    critic: engines.StepResult | None
    skipped: list[str]


class PPOTrainer:
    """Runs iterations of PPO over the roles of step 3.

    Args:
        roles: from `training.step3_rlhf_finetuning.roles.build_roles`.
        scoring: turns rollouts into experience; its flags are those of the update.
        backend: decodes responses.
        sampling: how.
        dtype: the run's precision, which decides how far sampler and trainer may differ.
        phases: gets the time and memory of generating, scoring and training.
        pretraining: adds its loss to the actor's, None without one.
        stop: ends the run by the signal that asks for it, between the parts of an iteration before weights change.
        guard: says when skipped steps must stop the run.

    Attributes:
        scored: this rank's batches of the last iteration.
    """

    def __init__(
        self,
        roles: Roles,
        scoring: Scoring,
        backend: RolloutBackend,
        sampling: SamplingConfig,
        dtype: str,
        phases: Phases | None = None,
        pretraining: PretrainingMix | None = None,
        stop: Callable[[int], NoReturn] | None = None,
        guard: engines.SkipGuard | None = None,
    ) -> None:
        self.phases = phases or Phases()
        self.roles = roles
        self.scoring = scoring
        self.backend = backend
        self.sampling = sampling
        self.ppo = scoring.ppo
        self.train = scoring.train
        self.dtype = dtype
        self.pretraining = pretraining
        self.stop = stop
        self.scored: list[ScoredBatch] = []
        self.guard = guard or engines.SkipGuard()
        self._checked = self._updated = False
        self._before: dict[str, float] = {}  # seconds of the phases outside an iteration, at the last record

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
        metrics = self.make_experience(requests, number)
        self._stop_if_asked()
        beat("training")
        scored = time.perf_counter()
        metrics |= self.update([batch.experience for batch in self.scored], number)
        self.phases.end("train")
        return metrics | self._timing(time.perf_counter() - scored, metrics)

    def make_experience(self, requests: Sequence[RolloutRequest], number: int) -> dict[str, float]:
        """Answer and score: `scored` is what the update needs; arguments and result as of `iteration`."""
        self.roles.actor.gather_seconds = 0.0
        started = time.perf_counter()
        beat("generating")
        with self.roles.actor.generation_mode() as twin:
            rollouts = [self.backend.generate(twin, request, self.sampling) for request in requests]
        generated = time.perf_counter()
        self.phases.end("generate")
        self._stop_if_asked()
        beat("scoring")
        self.scored, metrics = self.scoring.score(rollouts, requests)
        self._check_sampler(self.scored, number)
        self.phases.end("score")
        return metrics | {"time/generate": generated - started, "time/score": time.perf_counter() - generated}

    def _stop_if_asked(self) -> None:
        if self.stop and (number := asked_to_stop(self.device)):
            self.stop(number)

    def _timing(self, train: float, metrics: Mapping[str, float]) -> dict[str, float]:
        """Seconds of the phases, and the share of each in the time since the last record."""
        gather, generate = self.roles.actor.gather_seconds, metrics["time/generate"]
        prefill = sum(batch.rollout.prefill_seconds for batch in self.scored)
        seconds = {
            "gather": gather,
            "prefill": prefill,
            "decode": max(generate - gather - prefill, 0.0),
            "score": metrics["time/score"],
            "train": train,
        }
        for name in ("evaluate", "save"):  # after the last iteration
            seconds[name] = self.phases.seconds(name) - self._before.get(name, 0.0)
            self._before[name] = self.phases.seconds(name)
        total = max(sum(seconds.values()), 1e-9)
        return {
            **{f"time/{name}": value for name, value in seconds.items()},
            "time/tokens_per_second": metrics["rollout/tokens"] / max(generate, 1e-9),
            **{f"share/{name}": value / total for name, value in seconds.items()},
        }

    def _check_sampler(self, batches: Sequence[ScoredBatch], number: int) -> None:
        """In a run's first iteration, stop if the sampler is not the policy that is trained.

        A process that resumes a run only prints how far the two are apart.

        Raises:
            UserError: see `training.step3_rlhf_finetuning.sampler_check`.
        """
        if self._checked:
            return
        self._checked = True
        difference = sampler_difference(
            [b.rollout.logprobs for b in batches],
            [b.experience.log_probs for b in batches],
            [b.experience.mask & b.experience.valid.unsqueeze(1) for b in batches],
        )
        say(f"sampler against trainer, log-probs of {difference.tokens} tokens: {difference}")
        if number == 0:
            check_sampler(difference, self.dtype)

    def _check_ratio(self, step: OptimizerStep) -> None:
        """In the process's first iteration, stop if the policy's ratio is not 1 before its first update.

        It is not checked again: the cause, such as random numbers in a forward, shows at once, and stopping later would
        cost a trained model. The health monitor watches the metric from then on.

        Raises:
            UserError: see `training.step3_rlhf_finetuning.sampler_check`.
        """
        if self._updated:
            return
        self._updated = True
        if tokens := step.sums["tokens"]:
            alike = scored_alike(self.scoring.rollout, self.train)
            check_first_ratio(step.sums["ratio"] / tokens, self.dtype, self.device, alike, tokens)

    def update(self, experiences: Sequence[Experience], number: int) -> dict[str, float]:
        """PPO epochs over the experience; returns means over all tokens of all minibatches.

        The first epoch takes rows in the order and the pieces they were scored in, so that its first minibatch
        has a ratio of 1 (`sampler_check.first_ratio_rounding` says how exactly); later epochs shuffle.

        Args:
            experiences: this rank's generation batches.
            number: of the iteration; seeds the shuffle.
        """
        size, accumulation = self.train.per_device_training_batch_size, self.train.gradient_accumulation_steps
        generator = torch.Generator().manual_seed(self.train.seed + number)
        steps: list[OptimizerStep] = []
        planned = self.ppo.ppo_epochs * sum(-(-len(e) // size) for e in experiences) // accumulation
        for epoch in range(self.ppo.ppo_epochs):
            pieces = [e.rows(rows) for e in experiences for rows in _minibatch_rows(len(e), size, epoch, generator)]
            if epoch:
                pieces = [pieces[i] for i in torch.randperm(len(pieces), generator=generator).tolist()]
            first = len(steps)
            for start in range(0, len(pieces), accumulation):
                step = self._optimizer_step(pieces[start : start + accumulation], number * planned + len(steps))
                if not steps:
                    self._check_ratio(step)
                steps.append(step)
                self.guard.count(step.skipped)
                if self.guard.reason:
                    return _update_metrics(steps)
            epoch_sums = _added([step.sums for step in steps[first:]])
            moved = epoch_sums["approx_kl"] / max(epoch_sums["tokens"], 1.0)
            if self.ppo.target_kl and moved > self.ppo.target_kl:
                break
        return _update_metrics(steps)

    def _optimizer_step(self, pieces: Sequence[Experience], number: int) -> OptimizerStep:
        """One step of both optimizers over these micro-batches, normalised over the tokens of all ranks.

        Args:
            pieces: of this rank.
            number: of the step since the run began, for the pre-training mix.
        """
        critic = self.roles.critic
        counts = torch.stack([torch.stack([p.mask.sum(), (~p.valid).sum()]) for p in pieces]).sum(0)
        tokens, invalid = all_reduce_sum(counts).tolist()
        sums = dict.fromkeys(("ratio", "clipped", "approx_kl", "policy_loss", "value_loss"), 0.0)
        if self.pretraining is not None:
            sums |= {"pretraining_loss": 0.0, "pretraining_tokens": 0.0}
        if invalid:
            return OptimizerStep(sums | {"tokens": 0.0}, None, None, [BAD_REWARDS])
        if critic is not None:
            critic.train()
        with self.roles.actor.training_mode() as engine:
            for piece in pieces:
                objective, statistics = self._policy_objective(engine, piece)
                engines.backward(engine, objective, tokens)
                statistics["value_loss"] = torch.zeros(())
                if critic is not None:
                    sharing = self.roles.values_sharing
                    values = state_values(critic, piece.input_ids, piece.attention_mask, piece.mask, sharing)
                    error = ppo.value_loss(
                        values, piece.values, piece.returns, piece.mask, clip_value=self.ppo.clip_value
                    )
                    engines.backward(critic, error, tokens)
                    statistics["value_loss"] = error.detach()
                sums |= {name: sums[name] + value.item() for name, value in statistics.items()}
            if self.pretraining is not None:
                sums["pretraining_loss"], sums["pretraining_tokens"] = self.pretraining.backward(engine, number)
            actor_step = engines.optimizer_step(engine)
        if self.roles.ema is not None and not actor_step.skipped:
            self.roles.ema.update()
        skipped = [BAD_GRADIENTS.format("actor")] if actor_step.failed else []
        critic_step = None
        if critic is not None:
            critic_step = engines.optimizer_step(critic)
            critic.eval()
            skipped += [BAD_GRADIENTS.format("critic")] if critic_step.failed else []
        return OptimizerStep(reduce_sums(sums, self.device) | {"tokens": tokens}, actor_step, critic_step, skipped)

    def _policy_objective(self, engine: Any, piece: Experience) -> tuple[Tensor, dict[str, Tensor]]:
        """What the actor's step minimises on a micro-batch, summed over tokens, and detached sums for the metrics."""
        flags = self.ppo
        log_probs, entropy = rollout_log_probs(
            engine,
            piece.input_ids,
            piece.attention_mask,
            piece.mask,
            self.sampling.temperature,
            entropy=flags.entropy_coef > 0,
            sharing=self.roles.actor.sharing,
        )
        loss, statistics = ppo.policy_loss(
            log_probs,
            piece.log_probs,
            piece.advantages,
            piece.mask,
            clip_ratio=flags.clip_ratio,
            importance=piece.importance,
        )
        objective = loss if entropy is None else loss - flags.entropy_coef * (entropy * piece.mask).sum()
        if flags.advantage == "grpo" and flags.kl_coef > 0:
            kl = ppo.reference_kl(log_probs, piece.reference_log_probs, piece.mask)
            objective = objective + flags.kl_coef * kl
        return objective, statistics | {"policy_loss": loss.detach()}


def build_trainer(
    flags: Flags,
    models: Models,
    prompts: PromptSet,
    iterations: int,
    device: torch.device,
    folder: Path | None = None,
    **of_the_program: Any,
) -> PPOTrainer:
    """Load every model, and put together what an iteration needs; a collective.

    Args:
        flags, models: see `training.step3_rlhf_finetuning.settings`.
        prompts: what is trained on.
        iterations: of the whole run, over which learning rates fall.
        device: this rank's.
        folder: where a vLLM's log goes; a new temporary one without it.
        of_the_program: see `PPOTrainer`, from ``phases`` on.
    """
    rollout, train = flags.rollout, flags.train
    total_steps = iterations * steps_per_iteration(flags.ppo, rollout, train)
    pad_id, shares = models.tokenizer.pad_token_id, rollout.samples_per_prompt > 1 or shares_across(device)
    build = Build(flags.roles, train, flags.zero, models.overrides, total_steps, pad_id, device, shares)
    server = vllm_server(flags, models, folder)
    roles = build_roles(models.actor, models.reward, models.functions, build, critic=bool(models.critic))
    backend = generation_backend(
        roles.actor,
        rollout.rollout_engine,
        rows=rollout.per_device_generation_batch_size,
        length=flags.length,
        server=server,
        trained=roles.trained().values(),
    )
    sampling = SamplingConfig(
        rollout.max_answer_seq_len, temperature=rollout.temperature, top_p=rollout.top_p, top_k=rollout.top_k
    )
    scoring = Scoring(roles, prompts, flags.ppo, rollout, train)
    return PPOTrainer(roles, scoring, backend, sampling, flags.roles.dtype, **of_the_program)


def _added(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Sums of equal keys."""
    return {name: sum(part[name] for part in parts) for name in parts[0]}


def _update_metrics(steps: Sequence[OptimizerStep]) -> dict[str, float]:
    """Metrics of an iteration's optimizer steps."""
    totals, first = _added([step.sums for step in steps]), steps[0].sums
    tokens = max(totals["tokens"], 1.0)
    metrics = {
        "policy/loss": totals["policy_loss"] / tokens,
        "policy/ratio": totals["ratio"] / tokens,
        "policy/first_ratio": first["ratio"] / first["tokens"] if first["tokens"] else 1.0,
        "policy/clip_fraction": totals["clipped"] / tokens,
        "policy/approx_kl": totals["approx_kl"] / tokens,
        **_role_metrics("policy", [step.actor for step in steps]),
        "ppo/optimizer_steps": float(len(steps)),
        "ppo/skipped": float(sum(bool(step.skipped) for step in steps)),
    }
    if any(step.critic is not None for step in steps):
        metrics |= {"critic/loss": totals["value_loss"] / tokens}
        metrics |= _role_metrics("critic", [step.critic for step in steps])
    if "pretraining_loss" in totals:
        metrics["policy/pretraining_loss"] = totals["pretraining_loss"] / max(totals["pretraining_tokens"], 1.0)
    return metrics


def _role_metrics(role: str, steps: Sequence[engines.StepResult | None]) -> dict[str, float]:
    """Metrics of a role's optimizer steps of one iteration; none if it made no step."""
    made = [step for step in steps if step is not None]
    if not made:
        return {}
    return {
        f"{role}/grad_norm": made[-1].grad_norm,
        f"{role}/learning_rate": made[-1].learning_rate,
        f"{role}/skipped_steps": float(sum(step.failed for step in made)),
    }


def _minibatch_rows(count: int, size: int, epoch: int, generator: torch.Generator) -> list[list[int]]:
    """Row numbers of each micro-batch: in order in the first epoch, shuffled later."""
    order = torch.randperm(count, generator=generator).tolist() if epoch else list(range(count))
    return [order[piece] for piece in row_slices(size, count)]
