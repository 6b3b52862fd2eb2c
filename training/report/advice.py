"""What to try next, from the numbers of a run. Each line names what was seen and the flag that changes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from training.pipeline.showcase import judges
from training.report.run import RunRecord, StepRecord, number, numbers
from training.report.text import heading
from training.utils.arguments import flags_in
from training.utils.health_rules import HEALTHY, LEAST_CHOSEN_CHANGE, LEAST_EOS_RATE, MAX_KL, MOST_KL_PER_TOKEN

# Where a number stops being comfortable; docs/metrics.md and docs/evaluation.md say why.
FEW_HELD_OUT = 100  # prompts below which an interval is wide
CEILING = 0.98  # of the reward model's accuracy
LENGTH_MARGIN = 0.05  # accuracy above "always the longer" (or shorter) that shows more than a taste for length
LENGTH_RATIO = 1.5
STILL_FALLING = 0.02  # of the held-out loss, from one evaluation to the next
POOR_ACCURACY = 0.6
JUDGES_APART = 0.15  # win rates of the reward model and of an evaluation function
POOR_CRITIC = 0.1  # of the explained variance
BROKEN = ("failed", "stopped", "unfinished")  # states of a step that has ended early, or is at work


def next_steps(run: RunRecord) -> list[str]:
    """Lines of plain text, the most important first; a run that did not finish says how to go on, and no more."""
    steps = run.steps
    if broken := [f"{heading(s.name)} is not finished ({s.state})." for s in steps.values() if s.state in BROKEN]:
        again = (
            "Go on where it ended with the same command and --output_dir set to this run; finished steps are skipped."
        )
        return [*broken, again]
    lines = [*_step1(steps["step1"]), *_step2(steps["step2"]), *_dpo(steps["dpo"]), *_step3(steps["step3"])]
    asked = _asked(run)
    if missing := [name for name, s in steps.items() if s.state == "not run" and name in asked]:
        lines.append(
            f"{heading(missing[0])} has not run yet: the same command with --output_dir set to this run does it."
        )
    if steps["step3"].summary or steps["dpo"].summary:
        lines.append(
            "Talk to the models side by side (make chat) and vote: step 2 and DPO train on your votes with "
            "--data_path output/votes.jsonl, no conversion needed."
        )
        lines.append("One run is one throw of the dice: repeat with another --seed before you believe a difference.")
    return lines


def _asked(run: RunRecord) -> list[str]:
    """The steps that the last command of train.py was to run: those after its ``--step``, all without one."""
    numbers = flags_in(run.last_command).get("step")
    if numbers is None:
        return list(run.pipeline)
    return [name for name in run.pipeline if ("2" if name == "dpo" else name[4:]) in numbers]


def _step1(step: StepRecord) -> Iterator[str]:
    s = step.summary
    best, steps = numbers(s, "best_step", "steps")
    losses = step.curve("eval/loss")
    if best is None or steps is None:
        return
    before, after = numbers(s, "loss_before", "loss_after")
    if before is not None and after is not None and after >= before:
        yield (
            f"Step 1's held-out loss is no lower than before training ({before:.3f} to {after:.3f}): use a lower "
            "--learning_rate, or rows that are more like the held-out ones."
        )
    elif best < steps:
        yield (
            f"Step 1's held-out loss was lowest at step {best:.0f} of {steps:.0f} (that model was kept): more training "
            "of this kind only memorises. Use fewer --num_train_epochs, or more data."
        )
    elif len(losses) >= 3 and losses[-2][1] - losses[-1][1] > STILL_FALLING * losses[-1][1]:
        yield (
            f"Step 1's held-out loss was still falling at its end ({losses[-2][1]:.3f} to {losses[-1][1]:.3f}): more "
            "--num_train_epochs or more data would help."
        )


def _step2(step: StepRecord) -> Iterator[str]:
    accuracy, longer = numbers(step.summary, "accuracy_after", "accuracy_longer")
    if accuracy is None:
        return
    if longer is not None and accuracy - max(longer, 1 - longer) < LENGTH_MARGIN:
        rule = "longer" if longer >= 0.5 else "shorter"
        yield (
            f"The reward model ({accuracy:.1%}) is hardly better than always preferring the {rule} answer "
            f"({max(longer, 1 - longer):.1%}): give step 2 pairs of similar length, or more pairs. What step 3 learns "
            "from it would be length."
        )
    elif accuracy < POOR_ACCURACY:
        yield (
            f"The reward model prefers the right answer in only {accuracy:.1%} of held-out pairs: more or cleaner "
            "pairs, or a smaller --learning_rate; step 3 can not be better than its judge."
        )
    elif accuracy > CEILING:
        yield (
            f"The reward model is at its ceiling ({accuracy:.1%}): these pairs are easy. Harder pairs, such as votes "
            "between this run's own answers, would teach step 3 finer differences."
        )


def _dpo(step: StepRecord) -> Iterator[str]:
    accuracy, change, kl = numbers(step.summary, "accuracy_after", "chosen_change", "kl")
    if change is not None and change < LEAST_CHOSEN_CHANGE:
        yield (
            f"DPO made preferred answers less likely, too ({change:+.2f} nats per token): raise --beta, lower its "
            "--learning_rate, or try --loss orpo."
        )
    if accuracy is not None and accuracy < POOR_ACCURACY:
        yield f"DPO tells only {accuracy:.1%} of held-out pairs apart: more pairs, a higher --learning_rate."
    if kl is not None and kl > MOST_KL_PER_TOKEN:
        yield f"DPO moved {kl:.2f} nats per token from the SFT model, which is far: raise --beta."


def _step3(step: StepRecord) -> Iterator[str]:
    before, after, prompts = numbers(step.summary, "reward_before", "reward_after", "prompts")
    if before is not None and after is not None and after <= before:
        yield (
            f"The held-out reward did not rise ({before:+.2f} to {after:+.2f}): raise --actor_learning_rate or "
            "--num_iterations, or lower --kl_coef."
        )
    yield from _drift(step)
    yield from _responses(step.summary)
    yield from _optimisation(step)
    if prompts is not None and prompts < FEW_HELD_OUT:
        yield f"Only {prompts:.0f} held-out prompts: the intervals are wide, hold more out."


def _drift(step: StepRecord) -> Iterator[str]:
    """Reward hacking: the judge that was trained on likes it, an independent one less."""
    win = number(step.summary.get("win_rate"))
    for check in judges(step.summary):
        other = number(check.get("win_rate"))
        if win is not None and other is not None and win - other > JUDGES_APART:
            yield (
                f"The reward model sees {win:.0%} wins, the independent check {check['name']} {other:.0%}: part of the "
                "gain pleases the reward model alone. Stop earlier (fewer --num_iterations) or hold on tighter (higher "
                "--kl_coef)."
            )
    curve = step.curve("kl/per_sequence")
    if curve and curve[-1][1] > MAX_KL:
        coefficient = step.flag("kl_coef")
        now = f", now {coefficient}" if coefficient else ""
        yield (
            f"KL to the SFT model reached {curve[-1][1]:.1f} nats per response, which is far: manner wins over "
            f"content there. Raise --kl_coef{now}, or use fewer iterations."
        )


def _responses(s: Mapping[str, Any]) -> Iterator[str]:
    ended, before, after = numbers(s, "eos_rate_after", "length_before", "length_after")
    if ended is not None and ended < LEAST_EOS_RATE:
        yield f"Only {ended:.0%} of the answers end by themselves: raise --max_answer_seq_len or --missing_eos_penalty."
    if before and after and not 1 / LENGTH_RATIO < after / before < LENGTH_RATIO:
        yield (
            f"Answers went from {before:.0f} to {after:.0f} tokens: look at the answers above whether the reward is "
            "for length alone, and balance the lengths in step 2's pairs."
        )


def _optimisation(step: StepRecord) -> Iterator[str]:
    clipped = step.curve("policy/clip_fraction")
    if clipped and clipped[-1][1] > HEALTHY["policy/clip_fraction"][1]:
        yield f"{clipped[-1][1]:.0%} of the policy's ratios were clipped: halve --actor_learning_rate."
    explained = step.curve("critic/explained_variance")
    if len(explained) >= 5 and sum(y for _, y in explained[-5:]) / 5 < POOR_CRITIC:
        yield (
            "The critic explains almost none of the returns; that is usual for a short run. For a longer one raise "
            "--critic_learning_rate; until then --gae_lambda 1 keeps it from misleading the policy."
        )
