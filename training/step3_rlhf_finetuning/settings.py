"""From step 3's flags to an open run: the models, data and batches that they stand for."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from transformers import set_seed

from training.step3_rlhf_finetuning import prompts
from training.step3_rlhf_finetuning.arguments import (
    EvaluationArguments,
    OptimizationArguments,
    PPOArguments,
    RoleArguments,
    RoleZeroArguments,
    RolloutArguments,
    check_batches,
    scoring_rows,
)
from training.step3_rlhf_finetuning.prompts import PromptSet
from training.step3_rlhf_finetuning.reward_functions import (
    NONE,
    TextFunction,
    check_without_model,
    parse_reward_functions,
    split_weight,
)
from training.step3_rlhf_finetuning.roles import RewardModelSettings, starts_from
from training.utils.arguments import DataArguments, OutputArguments, ReliabilityArguments, default_of
from training.utils.checkpoint.resume import Run, resume_output_dir
from training.utils.data.prepare import StepData, prepare_data, prepare_pretraining
from training.utils.data.template import stop_token_ids
from training.utils.engine import four_bit, precision
from training.utils.engine.tensor_parallel import divide_model
from training.utils.engine.zero_config import read_user_config, states_on_nvme
from training.utils.errors import UserError
from training.utils.generation.decode_loop import ROWS_OF_ACCELERATORS
from training.utils.generation.rollouts import RolloutRequest
from training.utils.generation.vllm import VllmBackend, VllmOptions, check_division
from training.utils.generation.vllm_python import find_vllm
from training.utils.model import classifiers, loading
from training.utils.model.limits import check_length
from training.utils.model.lora import check_lora
from training.utils.model.reward_stats import RewardStats
from training.utils.model.text_reward import load_reward_tokenizer
from training.utils.model.tokenizer import check_vocabulary, load_tokenizer, same_tokenizer
from training.utils.run import watchdog
from training.utils.run.demo import check_training_data
from training.utils.run.distributed import data_size, init_distributed, say
from training.utils.run.folders import latest_output, prepare_output_dir
from training.utils.run.inputs import is_language_model
from training.utils.run.phases import Phases


@dataclass(frozen=True)
class Flags:
    """The groups of `training.step3_rlhf_finetuning.arguments.ARGUMENTS`."""

    roles: RoleArguments
    data: DataArguments
    rollout: RolloutArguments
    ppo: PPOArguments
    train: OptimizationArguments
    zero: RoleZeroArguments
    evaluate: EvaluationArguments
    output: OutputArguments
    reliability: ReliabilityArguments

    @property
    def length(self) -> int:
        """The longest sequence in tokens."""
        return self.rollout.max_prompt_seq_len + self.rollout.max_answer_seq_len


@dataclass(frozen=True)
class Models:
    """What the roles start from and are judged by.

    Attributes:
        actor: folder or hub name of the SFT model.
        critic: what the critic starts from, empty where there is no critic.
        reward: the frozen reward model, None without one.
        functions: further rewards with their weights, by name.
        tokenizer: of actor and critic, with the chat template that is in force.
        overrides: the user's own DeepSpeed configuration.
    """

    actor: str
    critic: str
    reward: RewardModelSettings | None
    functions: dict[str, tuple[TextFunction, float]]
    tokenizer: Any
    overrides: dict[str, Any]

    @property
    def reward_path(self) -> str:
        """Folder or hub name of the reward model, empty without one."""
        return self.reward.path if self.reward else ""


@dataclass(frozen=True)
class Opened:
    """An open run of step 3.

    Attributes:
        argv, flags, models: as it was started; of the flags the batches are this number of ranks'.
        output_dir, device: of this run and this rank.
        rows: the prompts, and the report on them.
        training, held_out: prompts that can be asked.
        mix: rows of the pre-training mix, None without one.
        run: checkpoints, resume and signals.
        schedule: prompt numbers of each iteration.
        phases: time and memory of what the step does.
        settled: the precision, for the summary.
        started: seconds by `time.monotonic`.
    """

    argv: Sequence[str]
    flags: Flags
    models: Models
    output_dir: Path
    device: torch.device
    rows: StepData
    training: PromptSet
    held_out: PromptSet
    mix: Any
    run: Run
    schedule: list[list[int]]
    phases: Phases
    settled: Mapping[str, Any]
    started: float

    def requests(self, number: int) -> list[RolloutRequest]:
        """This rank's generation batches of an iteration, from 0."""
        rollout, chosen = self.flags.rollout, self.schedule[number]
        per_step = prompts_per_step(rollout, self.run.batches, data_size())
        return prompts.dealt_requests(self.training, chosen, rollout, per_step, iteration=number, device=self.device)

    def summary(self) -> dict[str, Any]:
        """What summary.json says of the run itself."""
        reward = self.models.reward_path or NONE
        found = ["--actor_model_name_or_path", self.models.actor, "--critic_model_name_or_path", reward]
        started = [*self.argv, *found, "--output_dir", str(self.output_dir.resolve())]
        return {
            "iterations": len(self.schedule),
            "seconds": time.monotonic() - self.started + self.run.seconds,
            "phases": self.run.earlier_starts() | self.phases.summary(),
            precision.SUMMARY_KEY: self.settled,
            "run_with": {"arguments": started, "folder": str(Path.cwd())},  # for evaluate.py, see `recorded_run`
        }


def find_models(flags: Flags) -> Models:
    """Find what the flags name and check it, before anything is loaded.

    Raises:
        UserError: names the flag: a path holds no model, or the actor's one that writes no answers; there would be no
            reward; a model can not read the actor's tokens or the longest sequence; adapters match nothing.
    """
    args, ppo, zero, plan = flags.roles, flags.ppo, flags.zero, flags.output.plan
    functions, weight = parse_reward_functions(ppo.reward_function, "--reward_function")
    overrides = read_user_config(zero.deepspeed_config, flags.reliability.save_every)
    if flags.train.enable_ema and states_on_nvme(overrides):
        raise UserError("--enable_ema averages weights that --deepspeed_config puts on NVMe: use --offload instead")
    named, reward_path = args.actor_model_name_or_path or str(latest_output("step1")), ""
    actor = loading.resolve_policy(named, "--actor_model_name_or_path", weights=not plan)
    if args.critic_model_name_or_path == NONE:
        check_without_model(ppo.reward_function, "--critic_model_name_or_path")
    else:
        named = args.critic_model_name_or_path or str(latest_output("step2"))
        reward_path = loading.resolve_model(named, "--critic_model_name_or_path", weights=not plan)
    source = loading.resolve_model(args.tokenizer_name_or_path or actor, "--tokenizer_name_or_path", weights=False)
    tokenizer = load_tokenizer(source, **flags.data.template)
    reward = reward_model_settings(reward_path, tokenizer, normalize=ppo.normalize_reward, weight=weight, plan=plan)
    critic = starts_from(actor, reward) if ppo.advantage == "gae" else ""
    for role, path in (("actor", actor), ("critic", critic)):
        if path:
            check_lora(path, zero.lora(role), f"--{role}_lora_module_name")
    scored = reward.path if reward and not reward.reads_text else ""
    readers = list(filter(None, dict.fromkeys([actor, critic, scored])))  # of the actor's tokens
    for path in readers:
        check_length(path, flags.length, "--max_prompt_seq_len + --max_answer_seq_len")
        check_vocabulary(path, tokenizer)
    divide_model(zero.tensor_parallel, *readers)
    check_division(flags.rollout.vllm_tensor_parallel, actor)
    return Models(actor, critic, reward, functions, tokenizer, overrides)


def open_run(argv: Sequence[str], flags: Flags, models: Models) -> Opened:
    """Join the ranks, read the prompts, and open the run or take it up.

    Raises:
        UserError: data or flags are wrong, the folder is in use, or its run is another one.
    """
    started, phases = time.monotonic(), Phases()
    groups = [getattr(flags, field.name) for field in fields(flags)]
    if flags.zero.base_bits:
        four_bit.check_installed()
    check_training_data(groups)
    args, rollout, train, reliability = flags.roles, flags.rollout, flags.train, flags.reliability
    output_dir = prepare_output_dir(resume_output_dir(reliability.resume, flags.output.output_dir), "step3")
    device = init_distributed(reliability.distributed_timeout)
    watchdog.watch(output_dir, reliability.hang_timeout)
    settled = precision.settle(args, output_dir, reliability.resume)
    set_seed(train.seed)  # a user's function may draw from Python's or numpy's numbers
    options: dict[str, Any] = {"max_length": flags.length, "seed": train.seed}
    of_prompts = options | {"max_prompt_length": rollout.max_prompt_seq_len, "whole_rows": bool(models.functions)}
    rows = prepare_data("prompts", flags.data, models.tokenizer, run_dir=output_dir, **of_prompts)
    rows.announce()
    mix = None
    if train.unsupervised_data_path:
        read = prepare_pretraining(train.unsupervised_data_path, flags.data, models.tokenizer, **options)
        mix = read.train
        say("\n".join(["pre-training mix:", *read.report.lines()]))
    run = Run.open(
        "step3",
        output_dir,
        reliability,
        groups,
        models=origins(models.actor, models.reward_path, flags.ppo.reward_function),
        data={"training": rows.train, "held-out": rows.held_out} | ({"pre-training": mix} if mix else {}),
        batches=batches_of_all_ranks(rollout, train, data_size()),
    )
    rollout, train = divide_batches(rollout, train, run.batches, data_size())
    stop_ids = tuple(stop_token_ids(models.tokenizer))
    training, held_out = (
        prompts.PromptSet(part, models.tokenizer, stop_ids, train.seed) for part in (rows.train, rows.held_out)
    )
    schedule = schedule_of(rows.train["length"], run.batches, rollout, train)
    if (traced := max(flags.evaluate.trace, default=0)) > len(schedule):
        say(f"warning: --trace {traced}: the run ends after iteration {len(schedule)}")
    phases.end("data")
    say("loading the models of all roles ...")
    flags = replace(flags, rollout=rollout, train=train)
    return Opened(
        argv, flags, models, output_dir, device, rows, training, held_out, mix, run, schedule, phases, settled, started
    )


def vllm_server(flags: Flags, models: Models, folder: Path | None = None) -> VllmBackend | None:
    """The vLLM of this rank, which has looked at the model and has no memory yet; None with another engine.

    Args:
        flags, models: of the run.
        folder: where its log goes; a new temporary one without it.

    Raises:
        UserError: this vLLM can not serve the model.
    """
    rollout = flags.rollout
    if rollout.rollout_engine != "vllm":
        return None
    options = VllmOptions(
        python=find_vllm(rollout.vllm_python),
        model=models.actor,
        tokenizer=flags.roles.tokenizer_name_or_path or models.actor,
        dtype=flags.roles.dtype,
        rows=rollout.per_device_generation_batch_size,
        length=flags.length,
        folder=folder,
        ranks=rollout.vllm_tensor_parallel,
    )
    return VllmBackend(options, models.tokenizer)


def batches_of_all_ranks(rollout: RolloutArguments, train: OptimizationArguments, ranks: int) -> dict[str, int]:
    """What an iteration and an optimizer step consist of over all ranks."""
    return {
        "responses per iteration": rollout.per_device_generation_batch_size * rollout.generation_batches * ranks,
        "rows per step": train.per_device_training_batch_size * train.gradient_accumulation_steps * ranks,
    }


def divide_batches(
    rollout: RolloutArguments, train: OptimizationArguments, batches: Mapping[str, int], ranks: int
) -> tuple[RolloutArguments, OptimizationArguments]:
    """The flags with each rank's batches, so that they make up ``batches`` on this number of ranks.

    Where a run goes on with another number of ranks, the batch sizes of the flags are kept if they divide a rank's
    share, else the next smaller ones that do.

    Raises:
        UserError: the ranks can not share the rows evenly.
    """
    if batches == batches_of_all_ranks(rollout, train, ranks):
        return rollout, train
    responses, rows = batches["responses per iteration"], batches["rows per step"]
    if responses % (ranks * rollout.samples_per_prompt) or rows % ranks:
        raise UserError(
            f"the run has {responses} responses per iteration and {rows} rows per optimizer step, which {ranks} ranks "
            f"can not share evenly; give it another number of ranks"
        )
    share, samples = responses // ranks, rollout.samples_per_prompt
    generation = max(
        size
        for size in range(1, min(rollout.per_device_generation_batch_size, share) + 1)
        if share % size == 0 and size % samples == 0
    )
    training = max(
        size
        for size in range(1, min(train.per_device_training_batch_size, rows // ranks) + 1)
        if rows // ranks % size == 0 and generation % size == 0
    )
    rollout = replace(rollout, per_device_generation_batch_size=generation, generation_batches=share // generation)
    accumulation = rows // ranks // training
    train = replace(train, per_device_training_batch_size=training, gradient_accumulation_steps=accumulation)
    check_batches(rollout, train)
    return rollout, train


def schedule_of(
    lengths: Sequence[int], batches: Mapping[str, int], rollout: RolloutArguments, train: OptimizationArguments
) -> list[list[int]]:
    """`training.step3_rlhf_finetuning.prompts.prompt_schedule` by the flags and `batches_of_all_ranks`."""
    per_iteration = batches["responses per iteration"] // rollout.samples_per_prompt
    passes = {"epochs": train.num_train_epochs, "iterations": train.num_iterations, "seed": train.seed}
    return prompts.prompt_schedule(lengths, per_iteration, **passes)


def prompts_per_step(rollout: RolloutArguments, batches: Mapping[str, int], ranks: int) -> int:
    """Prompts of an optimizer step over all ranks; 0 if its rows are not the same number of whole prompts on each."""
    per_step, rest = divmod(batches["rows per step"], rollout.samples_per_prompt)
    return 0 if rest or per_step % ranks else per_step


def warn(flags: Flags) -> None:
    """Warn about flags without effect, a role that trains whole, a sampler that is not the policy, a GPU that waits."""
    rollout = flags.rollout
    for name, why in idle_flags(flags).items():
        say(f"warning: --{name} has no effect: {why}")
    if rollout.top_p < 1 or rollout.top_k > 0:
        say("warning: with --top_p below 1 or --top_k above 0 the sampler is not the policy that is trained")
    for role in ["actor"] + ["critic"] * (flags.ppo.advantage == "gae"):
        if flags.zero.only_optimize_lora and not getattr(flags.zero, f"{role}_lora_dim"):
            why = f"the {role} trains whole, as --{role}_lora_dim is not given"
            say(f"warning: --only_optimize_lora is for roles with adapters: {why}")
    if flags.zero.merge_lora_for_generation and rollout.rollout_engine == "vllm":
        say("warning: --merge_lora_for_generation has no effect: vllm always gets adapters merged")
    if get_accelerator().device_name() != "cpu":
        for hint in _hints_of_a_gpu(flags):
            say(f"hint: {hint}")


def _hints_of_a_gpu(flags: Flags) -> Iterator[str]:
    """What would keep a GPU waiting, see docs/results.md."""
    rows, scored = flags.rollout.per_device_generation_batch_size, scoring_rows(flags.rollout, flags.train)
    if rows < ROWS_OF_ACCELERATORS:
        yield (
            f"{rows} responses decoded together leave a GPU waiting; --per_device_generation_batch_size "
            f"{ROWS_OF_ACCELERATORS} or more takes hardly longer, where memory is left"
        )
    enough = min(rows, ROWS_OF_ACCELERATORS)
    if scored < enough and 3 in (flags.zero.actor_zero_stage, flags.zero.critic_zero_stage):
        yield (
            f"at ZeRO-3 each forward that scores gathers all weights, now for {scored} responses at a time; "
            f"--per_device_scoring_batch_size {enough} does it less often, where memory is left"
        )


# What only a critic, and advantages by one, take
OF_THE_CRITIC = (
    *("critic_learning_rate", "critic_weight_decay", "critic_gradient_checkpointing", "critic_lora_dim"),
    *("critic_lora_module_name", "clip_value", "gamma", "gae_lambda", "whiten_advantages"),
)


def idle_flags(flags: Flags) -> dict[str, str]:
    """Flags that are not as they stand by default and have nothing to do, with the reason."""
    found: dict[str, str] = {}
    if flags.ppo.advantage != "gae":
        why = f"with --advantage {flags.ppo.advantage} there is no critic"
        found |= dict.fromkeys(OF_THE_CRITIC, why)
        if flags.roles.critic_model_name_or_path == NONE:
            found["critic_zero_stage"] = f"{why}, and no reward model either"
        elif flags.zero.critic_zero_stage < 3:
            found["critic_zero_stage"] = f"{why}, and the reward model is shared out at stage 3 alone"
    if flags.roles.critic_model_name_or_path == NONE:
        why = f"with --critic_model_name_or_path {NONE} there is no reward model"
        found |= dict.fromkeys(("normalize_reward", "offload_reward_model"), why)
    if flags.zero.actor_lora_dim and flags.zero.only_optimize_lora:
        found["offload_reference_model"] = "with --only_optimize_lora the actor without adapters is the reference"
    if flags.ppo.ppo_epochs == 1:
        found["target_kl"] = "it ends an iteration's epochs, and --ppo_epochs is 1"
    for role in ("actor", "critic"):
        if not getattr(flags.zero, f"{role}_lora_dim"):
            found.setdefault(f"{role}_lora_module_name", f"--{role}_lora_dim is not given")
    if not flags.train.unsupervised_data_path:
        found["unsup_coef"] = "--unsupervised_data_path is not given"
    groups = (flags.ppo, flags.train, flags.zero, flags.roles)
    changed = {f.name for group in groups for f in fields(group) if getattr(group, f.name) != default_of(f)}
    return {name: why for name, why in found.items() if name in changed}


def origins(actor_path: str, reward_path: str, functions: Sequence[str]) -> dict[str, str]:
    """What a run's result depends on beside data and flags, by the flag that names it: models and function files."""
    files = {f"--reward_function {spec}": split_weight(spec)[0].rpartition(":")[0] for spec in functions if ":" in spec}
    reward = {"--critic_model_name_or_path": reward_path} if reward_path else {}
    return {"--actor_model_name_or_path": actor_path} | reward | files


def reward_model_settings(
    path: str, tokenizer: Any, *, normalize: bool, weight: float, plan: bool
) -> RewardModelSettings | None:
    """How the reward model serves: on tokens, or on texts where its tokenizer, template or family is another one.

    Args:
        path: folder or hub name, resolved; empty gives None.
        tokenizer: the actor's, with the chat template that will be in force.
        normalize, weight: the flags'.
        plan: only ``--plan`` is asked for, which needs no statistics.

    Raises:
        UserError: no statistics, no tokenizer, no reward head, or a model that can not be a reward model.
    """
    if not path:
        return None
    if not plan:
        classifiers.check_reward_head(path)
    stats = RewardStats.read(path) if normalize and not plan else None
    if stats is not None and (line := stats.line()):
        say(line)
    # A plan may be made before step 2 has run, with the language model that it makes a reward model of
    stands_in = plan and is_language_model(loading.load_config(path).architectures)
    own = tokenizer if stands_in else load_reward_tokenizer(path)
    reads_text = not classifiers.scores_tokens(path) or not same_tokenizer(tokenizer, own)
    return RewardModelSettings(path, stats, weight, reads_text)


def steps_per_iteration(ppo: PPOArguments, rollout: RolloutArguments, train: OptimizationArguments) -> int:
    """Optimizer steps that an iteration makes unless ``--target_kl`` ends it."""
    rows = rollout.per_device_generation_batch_size * rollout.generation_batches
    return ppo.ppo_epochs * rows // train.per_device_training_batch_size // train.gradient_accumulation_steps
