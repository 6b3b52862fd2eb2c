"""What is healthy in step 3 and in DPO, and what to change when it is not: the rules of the health monitor.

docs/metrics.md shows the same ranges beside what each metric is; a test holds the two together.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass

NOTE, WARNING = "note", "warning"
SHRINK, GROW = 0.5, 2.0  # of the first iterations' value: what length and entropy may do
INF = math.inf
# Nats per response, the bound of the actor that step 3 keeps. docs/experiments.md: beyond it the demo's answers win
# more and more by a check of manner that training never saw, and turn into good wishes about something else.
MAX_KL = 12.0
LEAST_EOS_RATE = 0.8  # share of responses that end by themselves: fewer, and the reward judges half sentences
FAR = 10.0  # standard deviations: in the demo, whose first answers are poor, rewards lie about 4 from the mean


@dataclass(frozen=True)
class Rule:
    """A metric's healthy range.

    Attributes:
        metric: its name in metrics.jsonl.
        low, high: the range, ends included; a NaN is outside.
        patience: iterations in a row outside before a remark.
        text: with ``{value}`` and ``{count}``, the iterations in a row.
        level: ``note`` or ``warning``.
        once: never repeat it.
        unless: other metrics; while one of them is outside its own range, this remark, which calls something normal, is
            not made.
    """

    metric: str
    low: float
    high: float
    patience: int
    text: str
    level: str = WARNING
    once: bool = False
    unless: tuple[str, ...] = ()


RULES = (
    Rule("policy/clip_fraction", 0.0, 0.3, 3,
         "ratio clipped {value:.0%} for {count} iterations: halve --actor_learning_rate or lower --ppo_epochs"),
    Rule("policy/approx_kl", 0.0, 0.1, 3,
         "each iteration moves the policy by {value:.2f} nats per token: halve --actor_learning_rate or, with several "
         "--ppo_epochs, set --target_kl"),
    Rule("policy/first_ratio", 0.99, 1.01, 1,
         "the first minibatch has a ratio of {value:.3f}, not 1: scoring and training disagree; try --dtype fp32"),
    Rule("policy/skipped_steps", 0.0, 0.0, 1,
         "{value:.0f} steps of the actor had gradients that are not finite: halve --actor_learning_rate; with --dtype "
         "fp16 try bf16"),
    Rule("policy/loss", -0.02, INF, 3,
         "the actor's loss is negative ({value:.3f}), which is normal: its sign means nothing, watch reward and KL",
         NOTE, once=True),
    Rule("rollout/eos_rate", LEAST_EOS_RATE, 1.0, 3,
         "{value:.0%} of responses end with EOS for {count} iterations: raise --max_answer_seq_len or "
         "--missing_eos_penalty"),
    Rule("rollout/sampler_difference", 0.0, 0.1, 3,
         "log-probs of sampler and trainer differ by {value:.2f} per token: try --rollout_engine hf, then --dtype "
         "fp32"),
    Rule("kl/per_sequence", -1.0, MAX_KL, 3,
         "KL to the SFT model is {value:.1f} nats per response for {count} iterations, where answers turn into garbage "
         "that the reward model likes: raise --kl_coef or lower --actor_learning_rate"),
    Rule("reward/rms", 0.0, FAR, 1,
         "responses lie {value:.0f} standard deviations of reward_stats.json from its mean: these were too few or too "
         "similar pairs to take a scale from. Hold more out in step 2 (--eval_data_path), or give "
         "--no-normalize_reward"),
    Rule("reward/clipped_share", 0.0, 0.5, 1,
         "{value:.0%} of the rewards lie beyond the clip and look alike, so there is little to learn from them: raise "
         "--clip_reward, or 0 for no clip"),
    Rule("reward/mean", 0.0, INF, 3,
         "the reward is negative ({value:.2f}), which is normal: where 0 lies depends on the rewards (for step 2's "
         "reward model alone, normalised, at its mean preferred answer); what matters is that it rises",
         NOTE, once=True, unless=("reward/rms", "reward/clipped_share")),
    Rule("reward/std", 0.01, INF, 3,
         "all responses get the same reward (standard deviation {value:.4f}, penalties left out): nothing to learn "
         "from; check the reward model, raise --clip_reward or --temperature"),
    Rule("reward/not_finite", 0.0, 0.0, 1,
         "{value:.0f} responses have a reward, log-prob or value that is not finite and are left out: look at them "
         "with --trace"),
    Rule("critic/explained_variance", -0.5, 1.0, 5,
         "the critic predicts worse than a constant (explained variance {value:.2f}): raise --critic_learning_rate, or "
         "set --gae_lambda 1 to depend on it less"),
    Rule("critic/skipped_steps", 0.0, 0.0, 1,
         "{value:.0f} steps of the critic had gradients that are not finite: halve --critic_learning_rate; with "
         "--dtype fp16 try bf16"),
    Rule("eval/kl", -1.0, MAX_KL, 1,
         "held-out KL to the SFT model is {value:.1f} nats per response, above the bound: this actor is not kept; "
         "raise --kl_coef if you want a longer run"),
    Rule("eval/win_rate_high", 0.5, 1.0, 1,
         "the actor loses to the SFT model on held-out prompts (the interval of its win rate ends at {value:.2f}): "
         "halve --actor_learning_rate and check the reward model"),
)  # fmt: skip
# DPO's known failure: it needs the margin alone, so it may lower both answers of a pair, the rejected one more (Pal et
# al. 2024, arXiv 2402.13228; Razin et al. 2024, arXiv 2410.08847). Nats per token.
LEAST_CHOSEN_CHANGE = -0.1
MOST_KL_PER_TOKEN = 0.5  # as MAX_KL, of answers of some 25 tokens
FALLEN = (
    "answers that people preferred have become less likely than before training ({value:+.2f} nats per token): the "
    "margin grows because the rejected ones fall faster. Raise --beta, lower --learning_rate or --num_train_epochs; "
    "--loss ipo bounds the margin, --loss orpo holds the preferred answers up"
)
DPO_RULES = (
    Rule("train/chosen_change", LEAST_CHOSEN_CHANGE, INF, 3, FALLEN),
    Rule("eval/chosen_change", LEAST_CHOSEN_CHANGE, INF, 1, "held out, " + FALLEN),
    Rule("eval/kl", 0.0, MOST_KL_PER_TOKEN, 1,
         "the policy has moved {value:.2f} nats per token from the reference, where answers turn into garbage: raise "
         "--beta, lower --learning_rate or --num_train_epochs"),
    Rule("train/skipped", 0.0, 0.0, 1,
         "a step had gradients that are not finite and changed nothing: halve --learning_rate; with fp16 try bf16"),
)  # fmt: skip
HEALTHY = {rule.metric: (rule.low, rule.high) for rule in RULES}


# (metric, bound as a share of the first three iterations' mean, what is outside, remark)
DRIFTS: tuple[tuple[str, float, Callable[[float, float], bool], str], ...] = (
    ("rollout/length", SHRINK, operator.lt,
     "responses shrank from {start:.0f} to {value:.0f} tokens: the reward may pay for brevity; look at the samples, "
     "lower --missing_eos_penalty or raise --kl_coef"),
    ("rollout/length", GROW, operator.gt,
     "responses grew from {start:.0f} to {value:.0f} tokens: the reward may pay for length; compare step 2's accuracy "
     "with always preferring the longer answer, raise --missing_eos_penalty or --kl_coef"),
    ("policy/entropy", SHRINK, operator.lt,
     "entropy fell from {start:.2f} to {value:.2f}: answers become all the same; set --entropy_coef, raise --kl_coef "
     "or lower --actor_learning_rate"),
    ("policy/entropy", GROW, operator.gt,
     "entropy rose from {start:.2f} to {value:.2f}, the sign of garbage: lower --actor_learning_rate, raise --kl_coef; "
     "--entropy_coef must not be too high"),
)  # fmt: skip
