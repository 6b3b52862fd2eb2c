"""The actor held against the SFT model while it trains, and the choice of the checkpoint that is kept.

Every ``--eval_every`` iterations the actor answers some of the held-out prompts, always the same ones under the same
sampling noise. The best actor so far is saved each time: the highest mean reward among the evaluations whose KL to
the SFT model is at most `MAX_KL`. Reward alone would choose the actor that exploits the reward model most (Gao et al.
2022, arXiv 2210.10760). The numbers of the summary are then those of the actor that was kept, over all held-out
prompts, or of many over `MOST_PROMPTS` of them.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from training.step3_rlhf_finetuning.arguments import scoring_rows
from training.step3_rlhf_finetuning.comparison import (
    Answer,
    Asking,
    EvalFunction,
    Values,
    checks,
    compare,
    compare_rewards,
    decoding,
    values_of,
    worth_alike,
)
from training.step3_rlhf_finetuning.ppo_trainer import PPOTrainer
from training.step3_rlhf_finetuning.prompts import PromptSet, sample_rows
from training.step3_rlhf_finetuning.roles import Roles
from training.step3_rlhf_finetuning.settings import Opened
from training.utils.checkpoint.resume import BEST
from training.utils.checkpoint.same_run import input_fingerprint
from training.utils.data.batches import spread_rows
from training.utils.engine.engine import dtype_name
from training.utils.errors import UserError
from training.utils.health_rules import MAX_KL
from training.utils.intervals import mean, win_rate
from training.utils.metrics import MetricsLogger
from training.utils.model import loading
from training.utils.model.export import save_model
from training.utils.model.tokenizer import check_vocabulary
from training.utils.run.distributed import gather_objects, say
from training.utils.run.files import read_object

# An evaluation during training answers this many prompts: it then costs about as much as the rollouts of one
# iteration of the demo.
RUNNING_PROMPTS = 32
# The last evaluation, the SFT model and the base model answer all prompts, but of a large set only so many, evenly
# spread: a win rate is then known to 0.03, and the first update comes after minutes, not hours. A multiple of
# `RUNNING_PROMPTS`, so that the running ones are among them. evaluate.py --max_prompts 0 takes all.
MOST_PROMPTS = 1024


@dataclass(frozen=True)
class Kept:
    """The evaluation whose actor is kept.

    Attributes:
        iteration: after which it was taken, from 1.
        reward, kl: means over the evaluation's prompts.
        within_bound: False only if no evaluation had a KL of at most `MAX_KL`; then the lowest KL was chosen.
    """

    iteration: int
    reward: float
    kl: float
    within_bound: bool

    def better_than(self, other: Kept | None) -> bool:
        """Whether this one is to be kept instead."""
        return other is None or self._rank() > other._rank()

    def _rank(self) -> tuple[bool, float]:
        """Larger is better; a number that is not finite loses to every finite one."""
        value = self.reward if self.within_bound else -self.kl
        return self.within_bound and math.isfinite(value), value if math.isfinite(value) else -math.inf


@dataclass(eq=False)
class HeldOutEvaluation:
    """Evaluates the actor on held-out prompts during and after training.

    Args:
        asking: how answers are asked for, as in training.
        roles: the actor, its reference and the rewards.
        logger: gets the metrics ``eval/...``.
        every: iterations between two evaluations, 0 for one at the end only.
        iterations: how many there are.
        functions: independent measures of answers.
        base: the model that step 1 started from, empty if that is not known.
        actor_dir: where the actor goes.
        save: writes the actor there; a collective.

    Attributes:
        prompts: the held-out prompts.
        rows: of the prompts that first and last answers are to: all, or `MOST_PROMPTS` and those that are shown.
        base_answers: of the model that step 1 started from, with functions to all of them, else to those that are
            shown; empty where it can not answer.
        before: answers of the SFT model to them.
        after: of the actor that was kept, to them, or to the running ones where it could not be loaded.
        sft_values: what each function says about the SFT model's answers to the running prompts, asked once.
        values: what the functions say about all of them, since `finish`.
        kept, kept_answers: the evaluation whose actor is in ``actor_dir``, and its answers to the running prompts.
        seconds: spent here so far.
        due: the iteration whose evaluation has begun and not ended, 0 for none.
    """

    asking: Asking
    roles: Roles
    logger: MetricsLogger
    every: int
    iterations: int
    functions: Sequence[EvalFunction]
    base: str
    actor_dir: Path
    save: Callable[[], None]
    base_answers: list[Answer] = field(default_factory=list, init=False)
    before: list[Answer] = field(default_factory=list, init=False)
    after: list[Answer] = field(default_factory=list, init=False)
    sft_values: dict[str, list[float]] = field(default_factory=dict, init=False)
    values: Values = field(default_factory=dict, init=False)
    kept: Kept | None = field(default=None, init=False)
    kept_answers: list[Answer] = field(default_factory=list, init=False)
    seconds: float = field(default=0.0, init=False)
    due: int = field(default=0, init=False)
    _started: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        prompts = self.prompts = self.asking.prompts
        self.running_rows = spread_rows(len(prompts.dataset), RUNNING_PROMPTS)
        self.rows = sorted({*spread_rows(len(prompts.dataset), MOST_PROMPTS), *sample_rows(prompts)})
        self.other_rows = sorted({*self.rows} - {*self.running_rows})
        self._files = {f.name: input_fingerprint(f.spec.rpartition(":")[0]) for f in self.functions}

    def begin(self) -> None:
        """Let the SFT model answer `rows`: before the first update the actor is that model.

        The base model answers here too, and not at the end: what can go wrong with it is seen before training.
        """
        with self._timed():
            shown = self.rows if self.functions else sample_rows(self.prompts)
            self.base_answers = self._answers_of_the_base_model(shown) if self.base else []
            say(f"answering {self._how_many()} held-out prompts with the SFT model ...")
            self.before = self._all_answers(self.roles.actor.generation_mode, measure_kl=False)
            self._log(0, [replace(answer, kl=0.0) for answer in answers_to(self.before, self.running_rows)])

    def after_iteration(self, iteration: int) -> None:
        """Evaluate and save if it is time to and this is not the last iteration, which `finish` evaluates."""
        if self.every and iteration % self.every == 0 and iteration < self.iterations:
            self.due = iteration
            with self._timed():
                self._judge(iteration, self._answers(self.running_rows, self.roles.actor.generation_mode(), True))
            self.due = 0

    def finish(self) -> dict[str, Any]:
        """Evaluate the last actor, then hold the kept one against the SFT model on `rows`.

        Returns:
            What `compare` gives, with ``kept`` (the evaluation that was chosen, the bound and what it was chosen
            by), ``held_out_prompts`` (how many there are, of which ``prompts`` were answered) and
            ``evaluation_seconds``.
        """
        with self._timed():
            say(f"answering {self._how_many()} held-out prompts with the RLHF model ...")
            self.after = self._all_answers(self.roles.actor.generation_mode)
            self._judge(self.iterations, answers_to(self.after, self.running_rows))
            assert self.kept is not None
            if self.kept.iteration != self.iterations:
                self._answer_with_the_kept_actor(self.kept)
        before = answers_to(self.before, [answer.row for answer in self.after])
        answers = {"base": self.base_answers, "sft": before, "rlhf": self.after}
        self.values = values_of(self.prompts, answers, self.functions)
        summary = compare(before, self.after, self.functions, self.values, self.prompts.seed)
        self.logger.log(self.iterations, {f"final/{k}": v for k, v in summary.items() if isinstance(v, float)})
        rule = "the highest held-out reward" if self.kept.within_bound else "the lowest KL, none is within the bound"
        kept = asdict(self.kept) | {"max_kl": MAX_KL, "chosen_by": rule}
        more = {"held_out_prompts": len(self.prompts.dataset), "evaluation_seconds": self.seconds}
        return summary | {"kept": kept} | more

    def _how_many(self) -> str:
        """The number of prompts that are answered, and of how many if they are not all."""
        there = len(self.prompts.dataset)
        return str(there) if len(self.rows) == there else f"{len(self.rows)} (evenly spread) of {there}"

    def _answers_of_the_base_model(self, rows: Sequence[int]) -> list[Answer]:
        """One for each row, under the settings and the noise of the others; none, which is said, without room or model.

        Those of `sample_rows`, which people see, are rewarded: evaluation functions judge the others, no reward does.
        """
        actor = self.roles.actor
        if not actor.another_fits():
            say(f"the base model {self.base} does not answer: there is no room to load it beside the others")
            return []
        model = _load_base(self.base, self.prompts, actor.engine)
        if model is None:
            return []
        say(f"answering {len(rows)} held-out prompts with the base model ...")
        seen = set(sample_rows(self.prompts))
        answers: list[Answer] = []
        for shown, rewards in ((True, self.roles.rewards), (False, None)):
            if asked := [row for row in rows if (row in seen) == shown]:
                answers += self.asking.answers(asked, decoding(model, actor.server), rewards)
        return sorted(answers, key=lambda answer: answer.row)

    def _answer_with_the_kept_actor(self, kept: Kept) -> None:
        """Put its answers into ``after``: to all prompts, or those that it was chosen by where no more fits."""
        if self.roles.actor.another_fits():
            say(f"answering them with the actor of iteration {kept.iteration}, which is kept ...")
            self.after = self._all_answers(self._saved_actor)
            return
        say(
            f"the actor of iteration {kept.iteration} is kept, and there is no room to load it beside the others: the "
            f"numbers are those of its {len(self.kept_answers)} prompts; evaluate.py --max_prompts 0 takes all"
        )
        self.after = self.kept_answers

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON holds it: the first models' answers and which actor is kept."""
        return {
            "base_answers": [asdict(answer) for answer in self.base_answers],
            "before": [asdict(answer) for answer in self.before],
            "sft_values": self.sft_values,
            "function_files": self._files,
            "kept": asdict(self.kept) if self.kept else None,
            "kept_answers": [asdict(answer) for answer in self.kept_answers],
            "seconds": self.seconds,
            **({"due": self.due} if self.due else {}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`, instead of `begin`."""
        self.base_answers = [Answer(**values) for values in state.get("base_answers", [])]
        self.before = [Answer(**values) for values in state["before"]]
        files = state.get("function_files", self._files)
        known = state.get("sft_values", {}).items()  # of a function that has been edited they are another measure
        self.sft_values = {name: values for name, values in known if files.get(name) == self._files.get(name)}
        self.kept = Kept(**state["kept"]) if state["kept"] else None
        self.kept_answers = [Answer(**values) for values in state["kept_answers"]]
        self.seconds = state["seconds"]
        self.due = state.get("due", 0)

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        self._started = time.monotonic()
        yield
        self.seconds += time.monotonic() - self._started

    @contextlib.contextmanager
    def _saved_actor(self) -> Iterator[Any]:
        """The kept actor, from disk: the engine holds the last one."""
        engine = self.roles.actor.engine
        model = loading.load_causal_lm(str(self.actor_dir), dtype=dtype_name(engine)).to(engine.device).eval()
        with decoding(model, self.roles.actor.server):
            yield model

    def _answers(self, rows: Sequence[int], generation: Any, measure_kl: bool) -> list[Answer]:
        actor = self.roles.actor
        reference = actor.reference_mode() if measure_kl else None
        return worth_alike(self.asking.answers(rows, generation, self.roles.rewards, reference), self.before)

    def _all_answers(
        self, generation: Callable[[], contextlib.AbstractContextManager[Any]], measure_kl: bool = True
    ) -> list[Answer]:
        """Answers to `rows` in order; KL, which needs a forward of the reference, for the running ones only."""
        answers = self._answers(self.running_rows, generation(), measure_kl)
        if self.other_rows:
            answers += self._answers(self.other_rows, generation(), False)
        return sorted(answers, key=lambda answer: answer.row)

    def _judge(self, iteration: int, answers: Sequence[Answer]) -> None:
        """Log an evaluation's metrics and save the actor if it is the best so far."""
        metrics = self._log(iteration, answers)
        current = Kept(iteration, metrics["eval/reward"], metrics["eval/kl"], metrics["eval/kl"] <= MAX_KL)
        best = current.better_than(self.kept)
        say(
            f"[{iteration}] held-out reward {current.reward:.3f}, KL {current.kl:.2f}, win rate over SFT "
            f"{metrics['eval/win_rate']:.2f} [{metrics['eval/win_rate_low']:.2f}, {metrics['eval/win_rate_high']:.2f}]"
            f" on {len(answers)} prompts in {metrics['eval/seconds']:.0f} s"
            + ("" if current.within_bound else f"; KL above the bound of {MAX_KL:g}")
            + ("; kept" if best else "")
        )
        if best:
            self.save()
            self.kept, self.kept_answers = current, list(answers)

    def _log(self, iteration: int, answers: Sequence[Answer]) -> dict[str, float]:
        """Metrics of the running prompts' answers, held against the SFT model's; logged and returned."""
        sft = answers_to(self.before, self.running_rows)
        rewards = compare_rewards(answers, sft, self.prompts.seed)
        metrics = {
            "eval/reward": rewards["reward_after"],
            "eval/kl": mean([answer.kl for answer in answers if answer.kl is not None]),
            "eval/length": mean([answer.length for answer in answers]),
            "eval/eos_rate": mean([float(answer.ended) for answer in answers]),
            **{f"eval/{name}": value for name, value in rewards.items() if name.startswith("win_rate")},
        }
        for function in self.functions:
            if function.name not in self.sft_values:
                self.sft_values[function.name] = checks(self.prompts, sft, function)
            sft_values = self.sft_values[function.name]
            values = checks(self.prompts, answers, function) if iteration else sft_values  # 0 is the SFT model
            spread = sum((value - mean(values)) ** 2 for value in values)
            won = win_rate(values, sft_values, seed=self.prompts.seed)
            metrics |= {
                f"eval/{function.name}/mean": mean(values),
                f"eval/{function.name}/error": math.sqrt(spread / max(len(values) - 1, 1) / len(values)),
                f"eval/{function.name}/win_rate": won["win_rate"],
            }
        metrics["eval/seconds"] = time.monotonic() - self._started
        self.logger.log(iteration, metrics)
        return metrics


def answers_to(answers: Sequence[Answer], rows: Sequence[int]) -> list[Answer]:
    """The answers to these rows, in the rows' order."""
    by_row = {answer.row: answer for answer in answers}
    return [by_row[row] for row in rows]


def base_model_of(actor_path: str) -> str:
    """The model that step 1 started from, as its summary says; empty where it does not."""
    return str(read_object(Path(actor_path) / "summary.json").get("base_model") or "")


def _load_base(base: str, prompts: PromptSet, engine: Any) -> Any | None:
    """The base model on all ranks or none: it may be gone, or lack embeddings of tokens that step 1 has added."""
    problem, model = "", None
    try:
        path = loading.resolve_model(base)
        check_vocabulary(path, prompts.tokenizer)
        model = loading.load_causal_lm(path, dtype=dtype_name(engine)).to(engine.device).eval()
    except (OSError, ValueError, RuntimeError, UserError) as error:
        problem = str(error).strip().splitlines()[0]
    if problems := [text for text in gather_objects([problem]) if text]:
        say(f"the base model {base} does not answer: {problems[0]}")
        return None
    return model


def open_evaluation(
    o: Opened, trainer: PPOTrainer, logger: MetricsLogger, functions: Sequence[EvalFunction]
) -> HeldOutEvaluation:
    """Held-out answers: of the SFT model to begin with, or what a checkpoint has of them."""
    rollout, train, roles = o.flags.rollout, o.flags.train, trainer.roles
    best, shards = o.output_dir / BEST, o.flags.reliability.max_shard_size

    def save_actor() -> None:
        """Keep the actor as it is, as the best so far."""
        o.phases.end("evaluate")
        stop_ids = o.training.stop_ids
        save_model(roles.actor.engine, o.models.tokenizer, best, stop_ids=stop_ids, max_shard_size=shards)
        o.phases.end("save")

    sizes = rollout.per_device_generation_batch_size, scoring_rows(rollout, train)
    evaluator = HeldOutEvaluation(
        Asking(o.held_out, trainer.backend, trainer.sampling, *sizes, roles.actor.engine.device),
        roles,
        logger,
        every=o.flags.evaluate.eval_every,
        iterations=len(o.schedule),
        functions=functions,
        base=base_model_of(o.models.actor),
        actor_dir=best,
        save=save_actor,
    )
    if o.run.done is not None:
        evaluator.load_state_dict(o.run.progress)
        if evaluator.due:
            evaluator.after_iteration(evaluator.due)
    else:
        evaluator.begin()
    o.phases.end("evaluate")
    return evaluator
