"""PPO from Python: step 3's roles, experience, update and checkpoints, without its program.

    from training import PPO

    ppo = PPO(["prompts.jsonl"], strategy="zero2", actor_model_name_or_path="output/run/step1")
    for number in range(ppo.iterations):
        experience = ppo.make_experience(number)
        print(ppo.update(experience, number)["reward/score"])
    ppo.save_model("actor", "output/mine/actor")

Keywords are the flags of step 3, with their meaning, ranges and defaults (docs/step3.md). The program does more: exact
resume, held-out evaluation, the monitor, the report. docs/library.md says when which is of use.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training.step3_rlhf_finetuning.arguments import ARGUMENTS, EvaluationArguments, check
from training.utils import arguments
from training.utils.errors import UserError
from training.utils.run.recipes import flags_of
from training.utils.run.runtime import prepare_runtime

prepare_runtime()

from safetensors.torch import save_file  # noqa: E402
from transformers import set_seed  # noqa: E402

from training.step3_rlhf_finetuning import prompts, settings  # noqa: E402
from training.step3_rlhf_finetuning.experience import Experience  # noqa: E402
from training.step3_rlhf_finetuning.ppo_trainer import build_trainer  # noqa: E402
from training.utils.checkpoint import engine_state  # noqa: E402
from training.utils.data.prepare import prepare_data  # noqa: E402
from training.utils.data.template import stop_token_ids  # noqa: E402
from training.utils.engine import precision  # noqa: E402
from training.utils.engine.engine import SkipGuard  # noqa: E402
from training.utils.model import classifiers, export, loading  # noqa: E402
from training.utils.model.lora import is_lora  # noqa: E402
from training.utils.run.distributed import (  # noqa: E402
    barrier,
    data_size,
    init_distributed,
    is_main,
    rank,
    world_size,
)

_SHARDED = {"actor_zero_stage": 3, "critic_zero_stage": 3}
_ON_CPU = {"offload": True, "offload_reference_model": True, "offload_reward_model": True}
# The strategies of ColossalAI's library, as flags of step 3
STRATEGIES: Mapping[str, Mapping[str, Any]] = {
    "naive": {"actor_zero_stage": 0, "critic_zero_stage": 0},  # one process
    "ddp": {"actor_zero_stage": 0, "critic_zero_stage": 0},  # each rank holds everything, gradients are averaged
    "zero2": {"actor_zero_stage": 2, "critic_zero_stage": 2},  # optimizer states and gradients are shared out
    "zero2_cpu": {"actor_zero_stage": 2, "critic_zero_stage": 2, "offload": True},  # and lie in CPU memory
    "gemini": _SHARDED,  # parameters are shared out as well
    "gemini_auto": {**_SHARDED, **_ON_CPU},  # and lie in CPU memory
}
# What would have no effect here
_OF_THE_PROGRAM = {
    field.name
    for group in (EvaluationArguments, arguments.OutputArguments, arguments.ReliabilityArguments)
    for field in dataclasses.fields(group)
} | {"unsupervised_data_path", "unsup_coef", "enable_ema"}


class PPO:
    """The roles of step 3 and what trains them; building it is a collective.

    Args:
        data_path: where the prompts are, one place or several.
        strategy: one of `STRATEGIES`; what it sets wins over the flags.
        flags: step 3's, without their dashes; a list where a flag takes several values.

    Attributes:
        roles: actor, critic, rewards.
        trainer: the update, and of the last iteration everything that was scored.
        tokenizer: of actor and critic.
        schedule: the prompts of each iteration.

    Raises:
        UserError: as the program: a flag, a model or the data is wrong.
    """

    def __init__(self, data_path: str | Path | Sequence[str | Path], *, strategy: str = "naive", **flags: Any) -> None:
        if strategy not in STRATEGIES:
            raise UserError(f"strategy {strategy!r}: there are {', '.join(STRATEGIES)}")
        if only := sorted(_OF_THE_PROGRAM & flags.keys()):
            raise UserError(f"{', '.join(only)}: what the program of step 3 does around its loop, not PPO")
        sources = [str(one) for one in ([data_path] if isinstance(data_path, (str, Path)) else data_path)]
        if not sources:
            raise UserError("data_path is an empty list: there is nothing to train on")
        argv = flags_of({**flags, "data_path": sources, **STRATEGIES[strategy], "save_every": 0}, [])
        parsed = settings.Flags(*check(arguments.parse(ARGUMENTS, argv, prog="PPO", description=__doc__)))
        self._device = init_distributed()
        if strategy == "naive" and world_size() > 1:
            raise UserError(f"strategy naive is for one process, not for {world_size()}: ddp is the same on several")
        self._flags, rollout, train = parsed, parsed.rollout, parsed.train
        precision.settle(parsed.roles)
        set_seed(train.seed)
        models = settings.find_models(parsed)
        self.tokenizer = models.tokenizer
        options: dict[str, Any] = {"max_length": parsed.length, "max_prompt_length": rollout.max_prompt_seq_len}
        options |= {"whole_rows": bool(models.functions), "seed": train.seed}
        rows = prepare_data("prompts", parsed.data, self.tokenizer, **options).train
        stop_ids = tuple(stop_token_ids(self.tokenizer))
        self._prompts = prompts.PromptSet(rows, self.tokenizer, stop_ids, train.seed)
        self._batches = settings.batches_of_all_ranks(rollout, train, data_size())
        self.schedule = settings.schedule_of(rows["length"], self._batches, rollout, train)
        self.trainer = build_trainer(parsed, models, self._prompts, self.iterations, self._device)
        self.roles = self.trainer.roles
        self._found: dict[str, float] = {}

    @property
    def iterations(self) -> int:
        """The number of iterations that the flags ask for."""
        return len(self.schedule)

    def make_experience(self, number: int) -> list[Experience]:
        """Answer the prompts of an iteration and score the answers; a collective.

        Args:
            number: of the iteration, from 0.

        Returns:
            This rank's generation batches, advantages included.
        """
        rollout = self._flags.rollout
        per_step = settings.prompts_per_step(rollout, self._batches, data_size())
        requests = prompts.dealt_requests(
            self._prompts, self.schedule[number], rollout, per_step, iteration=number, device=self._device
        )
        self._found = self.trainer.make_experience(requests, number)
        return [batch.experience for batch in self.trainer.scored]

    def update(self, experience: Sequence[Experience], number: int) -> dict[str, float]:
        """PPO epochs over what `make_experience` gave; a collective.

        Returns:
            Metrics of the iteration, the same on all ranks: docs/metrics.md explains them.

        Raises:
            RuntimeError: ten optimizer steps in a row were skipped; the rest of the experience was not learned from.
        """
        metrics = self._found | self.trainer.update(experience, number)
        if reason := self.trainer.guard.reason:
            self.trainer.guard = SkipGuard()  # who goes on, from other weights, counts anew
            raise RuntimeError(f"{reason}; lower the learning rates, or look at the rewards in ppo.trainer.scored")
        return metrics

    def _engine(self, role: str) -> Any:
        trained = self.roles.trained()
        if role not in trained:
            raise UserError(f"no role {role!r} trains here: {', '.join(trained)}")
        return trained[role]

    def save_model(self, role: str, folder: str | Path) -> None:
        """Write ``actor`` or ``critic`` as a Hugging Face folder, whole whatever the strategy; a collective."""
        target = Path(folder)
        if is_main():
            target.parent.mkdir(parents=True, exist_ok=True)
        barrier()
        export.save_model(self._engine(role), self.tokenizer, target, stop_ids=self._prompts.stop_ids)

    def load_model(self, role: str, folder: str | Path) -> None:
        """Go on from the weights of a folder that `save_model` wrote, or any of the same architecture; a collective.

        Raises:
            UserError: the role has adapters, or the folder holds another model.
        """
        engine = self._engine(role)
        if is_lora(export.unwrap(engine)):
            raise UserError(f"load_model({role!r}): with LoRA start from the folder: {role}_model_name_or_path")
        pad = self.tokenizer.pad_token_id
        model: Any
        if role == "actor":
            model = loading.load_causal_lm(str(folder), dtype="fp32")
        else:
            model = classifiers.load_classifier(str(folder), dtype="fp32", pad_token_id=pad)
        saved = dict(model.named_parameters())
        own = {name: getattr(p, "ds_shape", p.shape) for name, p in export.unwrap(engine).named_parameters()}
        if other := sorted(n for n in own.keys() | saved.keys() if n not in saved or own.get(n) != saved[n].shape):
            raise UserError(f"{folder} is of another model: {other[0]} does not fit")
        values = {}
        for part in engine_state.masters(engine):
            name = part.name if role == "actor" else part.name.removeprefix("classifier.")
            values[part.name, part.start] = part.of(saved[name].detach())
        engine_state.replace_masters(engine, values)

    def save_optimizer(self, role: str, folder: str | Path) -> None:
        """Write what a role's next step depends on, fp32 weights included, a file for each rank; a collective.

        `load_optimizer` reads it on any number of ranks and by any strategy.
        """
        engine, target = self._engine(role), Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        scratch = target / f".rank{rank()}.saving"
        save_file(dict(engine_state.engine_tensors(engine)), scratch)
        scratch.chmod(target.stat().st_mode & 0o666)  # safetensors leaves it to its owner, whatever the umask says
        counters = json.dumps({"ranks": world_size(), **engine_state.engine_counters(engine)})
        barrier()
        os.replace(scratch, target / f"rank{rank()}.safetensors")
        if is_main():
            (target / "counters.json").write_text(counters, encoding="utf-8")
        barrier()

    def load_optimizer(self, role: str, folder: str | Path) -> None:
        """Go on from what `save_optimizer` wrote, weights included; a collective.

        Raises:
            UserError: it is not there, not whole, or of another model.
        """
        source = Path(folder)
        try:
            counters = json.loads((source / "counters.json").read_text(encoding="utf-8"))
            files = [source / f"rank{number}.safetensors" for number in range(counters.pop("ranks"))]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{source}: no optimizer that save_optimizer wrote ({error})") from error
        if missing := [file.name for file in files if not file.is_file()]:
            raise UserError(f"{source}: {', '.join(missing)} is missing")
        engine_state.load_engine(self._engine(role), files, counters)
