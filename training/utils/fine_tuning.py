"""What every step that fine-tunes one model on rows has in common: open the run, build the engine, count steps, end.

Steps 1 and 2 read top to bottom as what they do themselves; here is what they would else both say. A step is opened
once its flags are checked (`open_run`), its engine is built (`build_engine`), its loop goes over `FineTuning.steps`.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from training.utils.arguments import (
    DataArguments,
    DeepSpeedArguments,
    LoraArguments,
    ModelArguments,
    OutputArguments,
    ReliabilityArguments,
    TrainingArguments,
)
from training.utils.checkpoint.resume import Run, resume_output_dir
from training.utils.data.batches import batches_after, element_lengths
from training.utils.data.kinds import Kind
from training.utils.data.prepare import StepData, prepare_data
from training.utils.data.template import stop_token_ids
from training.utils.engine import engine as engines, four_bit, precision
from training.utils.engine.tensor_parallel import divide_model
from training.utils.engine.zero_config import deepspeed_config, read_user_config
from training.utils.metrics import MetricsLogger, progress_bar, write_summary
from training.utils.model.card import write_model_card
from training.utils.model.export import save_model
from training.utils.model.forward import enable_gradient_checkpointing
from training.utils.model.limits import check_length, divide_rows
from training.utils.model.lora import check_lora, with_adapters
from training.utils.model.tokenizer import check_vocabulary, load_tokenizer
from training.utils.run import watchdog
from training.utils.run.demo import check_training_data
from training.utils.run.distributed import data_size, init_distributed, reduce_sums, say
from training.utils.run.folders import prepare_output_dir, title
from training.utils.run.phases import Phases


@dataclass(frozen=True)
class Flags:
    """The groups of flags that fine-tuning has in every step, and what they name.

    Attributes:
        path: the model's folder.
        attention: of its layers.
        overrides: the user's own configuration of DeepSpeed.
    """

    data: DataArguments
    model: ModelArguments
    lora: LoraArguments
    train: TrainingArguments
    ds: DeepSpeedArguments
    output: OutputArguments
    reliability: ReliabilityArguments
    path: str
    attention: str
    overrides: dict[str, Any]


def find_model(groups: Sequence[Any], resolve: Callable[..., str], default: Callable[[], str]) -> Flags:
    """Find the model and check it against the flags, before anything is loaded.

    Args:
        groups: the flags, the first seven those of `Flags`.
        resolve: `loading.resolve_policy`, or what else finds a model's folder by its name.
        default: names the model where ``--model_name_or_path`` does not.

    Raises:
        UserError: a flag is wrong, or the model can not be trained so.
    """
    data, model, lora, _, ds, output, reliability, *_ = groups
    precision.check_dtype(model.dtype)
    overrides = read_user_config(ds.deepspeed_config, reliability.save_every)
    path = resolve(model.model_name_or_path or default(), weights=not output.plan)
    check_length(path, model.max_seq_len, "--max_seq_len")
    check_lora(path, lora)
    divide_model(ds.tensor_parallel, path)
    check_vocabulary(path, load_tokenizer(path, **data.template))
    attention = divide_rows(path, model, ds.sequence_parallel)
    return Flags(*[*groups[:7], path, attention, overrides])


@dataclass
class FineTuning:
    """An open run of one step.

    Attributes:
        step: its name, one of `STEPS`.
        argv, flags: as it was started.
        output_dir, device: of this run and this rank.
        tokenizer, rows: with the chat template and the data of the flags.
        run: checkpoints, resume and signals.
        batch: rows of an optimizer step, over all ranks.
        phases: time and memory of what the step does.
        settled: the precision, for the summary.
        logger: where the metrics go, from `start_logging` on.
        bar: the progress bar of `steps`.
    """

    step: str
    argv: Sequence[str]
    flags: Flags
    output_dir: Path
    device: torch.device
    tokenizer: Any
    rows: StepData
    run: Run
    batch: int
    phases: Phases
    settled: Mapping[str, Any]
    started: float
    logger: MetricsLogger = field(init=False)
    bar: Any = field(init=False)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the rows."""
        return math.ceil(len(self.lengths) / self.batch)

    @functools.cached_property
    def lengths(self) -> list[int]:
        """Tokens of everything that counts once: of each row, or of each ranking's longest pair."""
        return element_lengths(self.rows.train)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.steps_per_epoch * self.flags.train.num_train_epochs

    def start_logging(self, watch: Callable[[int, Mapping[str, float]], object] | None = None) -> None:
        """Open the file of metrics, continued where a resumed run stood; ``watch`` sees each record."""
        name = f"{self.output_dir.parent.name}/{self.step}"
        report_to, run = self.flags.output.report_to, self.run
        self.logger = MetricsLogger(self.output_dir, report_to, name, watch, done=run.done, seconds=run.seconds)

    def steps(self) -> Iterator[tuple[int, list[int]]]:
        """(number, rows or rankings) of every optimizer step that is left."""
        train = self.flags.train
        self.bar = progress_bar(self.total_steps, title(self.step), self.run.step)
        yield from batches_after(self.run.step, self.lengths, self.batch, train.seed, train.num_train_epochs)
        self.bar.close()

    def update(self, engine: Any, sums: Mapping[str, float], count: int) -> tuple[engines.StepResult, dict[str, float]]:
        """Take an optimizer step; its result, and over ``count`` the means of what was summed on each rank."""
        result = engines.optimizer_step(engine)
        self.phases.end("train")
        return result, {name: total / count for name, total in reduce_sums(sums, self.device).items()}

    def log_step(self, number: int, metrics: Mapping[str, float], **shown: str) -> None:
        """Log an optimizer step; ``shown`` stands beside the progress bar."""
        self.logger.log(number, metrics)
        self.bar.update()
        self.bar.set_postfix(**shown)

    def evaluation_due(self, number: int) -> bool:
        """Whether ``--eval_interval`` asks for an evaluation after this step."""
        interval = self.flags.train.eval_interval
        return bool(interval) and number % interval == 0

    def after_step(self, number: int, result: engines.StepResult, progress: dict[str, Any]) -> None:
        """Count failures, write a checkpoint where one is due, and stop where that is asked for or of use."""
        self.run.guard.count(["gradients that are not finite"] if result.failed else [])
        self.run.after_step(number, progress)
        self.run.stop_if(self.run.guard.reason, "lower --learning_rate; with --dtype fp16 try bf16")

    def save(self, engine: Any, folder: Path) -> None:
        """Write the model, verified, with the tokenizer and the tokens that end a response; a collective."""
        stops, shards = stop_token_ids(self.tokenizer), self.flags.reliability.max_shard_size
        save_model(engine, self.tokenizer, folder, stop_ids=stops, max_shard_size=shards)

    def finish(self, kind: str, base: str, results: Mapping[str, Any]) -> None:
        """Write the model card and the summary, which says that the step is finished.

        Args:
            kind: of the card: ``sft`` or ``reward``.
            base: the model as the user has named it.
        """
        summary = {
            **results,
            "steps": self.total_steps,
            "seconds": time.monotonic() - self.started + self.run.seconds,
            "phases": self.run.earlier_starts() | self.phases.summary(),
            precision.SUMMARY_KEY: self.settled,
            "run_with": {"arguments": list(self.argv), "folder": str(Path.cwd())},
        }
        made: dict[str, Any] = {"argv": self.argv, "data": self.rows.report.lines(), "results": summary}
        write_model_card(self.output_dir, kind, (base, self.flags.path), tokenizer=self.tokenizer, **made)
        write_summary(self.output_dir, summary)
        say(f"{title(self.step)} saved to {self.output_dir}")


def step_metrics(result: engines.StepResult) -> dict[str, float]:
    """What every optimizer step logs."""
    return {
        "train/grad_norm": result.grad_norm,
        "train/learning_rate": result.learning_rate,
        "train/skipped": float(result.failed),
    }


def open_run(
    step: str,
    kind: Kind,
    argv: Sequence[str],
    groups: Sequence[Any],
    flags: Flags,
    *,
    counted: str,
    **data_options: Any,
) -> FineTuning:
    """Join the ranks, read the data, and open the run or take it up.

    Args:
        argv, groups, flags: as given, as parsed, and from `find_model`.
        counted: what an optimizer step takes, such as ``rows``.
        data_options: further arguments of `prepare_data`.

    Raises:
        UserError: data or flags are wrong, the folder is in use, or its run is another one.
    """
    started, phases = time.monotonic(), Phases()
    if flags.lora.base_bits:
        four_bit.check_installed()
    reliability, train = flags.reliability, flags.train
    check_training_data(groups)
    output_dir = prepare_output_dir(resume_output_dir(reliability.resume, flags.output.output_dir), step)
    device = init_distributed(reliability.distributed_timeout)
    watchdog.watch(output_dir, reliability.hang_timeout)
    settled = precision.settle(flags.model, output_dir, reliability.resume)
    torch.manual_seed(train.seed)
    data = flags.data
    tokenizer = load_tokenizer(flags.path, **data.template)
    options: dict[str, Any] = {"max_length": flags.model.max_seq_len, "seed": train.seed, "run_dir": output_dir}
    rows = prepare_data(kind, data, tokenizer, **options, **data_options)
    rows.announce()
    if not flags.lora.lora_dim and flags.lora.lora_module_name != LoraArguments.lora_module_name:
        say("warning: --lora_module_name has no effect: --lora_dim is not given")
    per_rank = train.per_device_train_batch_size * train.gradient_accumulation_steps
    run = Run.open(
        step,
        output_dir,
        reliability,
        list(groups),
        models={"--model_name_or_path": flags.path},
        data={"training": rows.train, "held-out": rows.held_out},
        batches={f"{counted} per step": per_rank * data_size()},
    )
    batch = run.batches[f"{counted} per step"]
    phases.end("data")
    say("loading the model ...")
    return FineTuning(step, argv, flags, output_dir, device, tokenizer, rows, run, batch, phases, settled, started)


def build_engine(
    tuning: FineTuning,
    load: Callable[[dict[str, Any]], Any],
    *,
    rows: int = 1,
    wrap: Callable[[Any], Any] = lambda model: model,
) -> Any:
    """The model with its adapters, as a DeepSpeed engine at the run's checkpoint if there is one.

    Args:
        load: makes the model under a DeepSpeed configuration.
        rows: of a micro-batch for each row of the flag (a pair has two).
        wrap: what the engine calls instead of the model.
    """
    model_args, lora, train, ds = tuning.flags.model, tuning.flags.lora, tuning.flags.train, tuning.flags.ds
    config = deepspeed_config(
        zero_stage=ds.zero_stage,
        dtype=model_args.dtype,
        offload=ds.offload,
        micro_batch_size=rows * train.per_device_train_batch_size,
        tensor_parallel=ds.tensor_parallel,
        overrides=tuning.flags.overrides,
    )
    model = with_adapters(load(config), lora)
    if model_args.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    wrapped = wrap(model)
    engine = engines.initialize_engine(
        wrapped if ds.tensor_parallel > 1 else wrapped.to(tuning.device),  # a part fits where the whole may not
        config,
        learning_rate=train.learning_rate,
        lora_learning_rate=lora.lora_learning_rate,
        weight_decay=train.weight_decay,
        num_warmup_steps=train.num_warmup_steps,
        total_steps=tuning.total_steps,
        lr_scheduler_type=train.lr_scheduler_type,
    )
    tuning.phases.end("load")
    tuning.run.load({"model": engine})
    return engine
