"""Command-line flags as dataclasses, shared by the three steps.

A group of flags is a dataclass; its fields are made with `flag`, which carries the help text and the
allowed range. `parse` turns any list of groups into one `argparse` parser with grouped ``--help``, checks
every range, and answers an unknown flag with the nearest known one. Names are DeepSpeed-Chat's where it
has one; `ALIASES` and `ACCEPTED` are the only two places where another name is understood.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib.util
import math
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from training.utils.errors import UserError, run_program
from training.utils.run.environment import check_environment
from training.utils.run.inputs import check_inputs
from training.utils.run.runtime import local_ranks

T = TypeVar("T")

# Another name -> ours, in step 3: alpaca-rlhf's, and what train.py and evaluate.py call the reward model.
ALIASES = {
    "--reward_model_name_or_path": "--critic_model_name_or_path",
    "--per_device_train_batch_size": "--per_device_generation_batch_size",
    "--per_device_mini_train_batch_size": "--per_device_training_batch_size",
}

# Of these the name says something else elsewhere, so that step 3 tells what it takes them for.
MISLEADING = {
    "--per_device_train_batch_size": "rollouts that are decoded together (in steps 1 and 2: rows of an optimizer step)",
}

AUTO = "auto"  # of --dtype: see training/utils/engine/precision.py
PRECISIONS = (AUTO, "bf16", "fp16", "fp32")
DTYPE_HELP = "precision of weights and activations (masters stay fp32); auto: bf16 where the hardware computes in it"

MAX_SEED = 2**32 - 1  # what every library that is seeded takes

# transformers' names of learning rate schedules, as DeepSpeed-Chat offers them
SCHEDULES = ("cosine", "linear", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")

# Flags of DeepSpeed-Chat that have nothing left to do here, and why; they are accepted and ignored.
ACCEPTED = {
    "--num_padding_at_beginning": "padding is known from explicit masks",
    "--deepspeed": "DeepSpeed is always used",
    "--local_rank": "launchers say it in the environment too",
    "--enable_hybrid_engine": "step 3 always uses the hybrid engine",
    "--enable_tensorboard": "TensorBoard is on by default, see --report_to",
    "--add_eot_token": "every response ends with the template's own end token",
    "--eot_token": "every response ends with the template's own end token",
    "--compute_fp32_loss": "losses and log-probs are always computed in fp32",
    "--print_loss": "the progress bar and metrics.jsonl show it",
    "--tensorboard_path": "TensorBoard's files lie in the output folder",
}


def flag(
    default: Any,
    help: str,
    *,
    choices: Sequence[Any] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    pattern: str = "",
) -> Any:
    """A dataclass field that is a command-line flag.

    Args:
        default: its value when the flag is absent; a list makes the flag take several values.
        help: one sentence for ``--help``.
        choices: the allowed values.
        minimum, maximum: inclusive bounds of a number.
        above: an exclusive lower bound of a number.
        pattern: a regular expression that a text must match.
    """
    metadata = {"help": help, "choices": choices, "minimum": minimum, "maximum": maximum, "above": above}
    metadata["pattern"] = pattern
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class DataArguments:
    """Data"""

    data_path: list[str] = flag(
        ["demo"],
        "one or more sources: a json, jsonl, csv or parquet file, a folder, a hub name; PATH:N takes N rows",
    )
    data_split: str = flag(
        "", "share of each source for SFT, preferences and prompts, such as 2,4,4 (default: every row in each step)"
    )
    eval_data_path: list[str] = flag(
        [], "held-out sources (default: each source's own eval split, or 10%% of its rows)"
    )
    column_map: list[str] = flag([], "names of columns where they differ: prompt=instruction response=answer")
    on_bad_row: str = flag("error", "what to do with a row that can not be used", choices=("error", "skip"))
    chat_template: str = flag("", "a Jinja file or a name (default: the tokenizer's own)")
    system_message: str = flag("", "a system message put before every conversation that has none")
    data_output_path: str = flag("", "folder for tokenised data (default: the user's cache folder)")


@dataclass
class ModelArguments:
    """Model"""

    model_name_or_path: str = flag(
        "",
        "a hub name, a folder, a .gguf file or 'embedded' (default: step 1 the embedded model, step 2 the last step 1)",
    )
    dtype: str = flag(AUTO, DTYPE_HELP, choices=PRECISIONS)
    attn_implementation: str = flag("sdpa", "attention of transformers", choices=("sdpa", "eager", "flash_attention_2"))
    gradient_checkpointing: bool = flag(False, "trade a second forward for activation memory")
    max_seq_len: int = flag(512, "longest prompt plus response, in tokens", minimum=8)


@dataclass
class LoraArguments:
    """LoRA"""

    lora_dim: int = flag(0, "rank of the adapters; 0 trains without LoRA", minimum=0)
    lora_module_name: str = flag("all-linear", "comma-separated parts of module names, or all-linear")
    only_optimize_lora: bool = flag(False, "freeze everything but the adapters (and the reward head)")

    def __post_init__(self) -> None:
        if self.only_optimize_lora and not self.lora_dim:
            raise UserError("--only_optimize_lora needs adapters: set --lora_dim")


@dataclass
class TrainingArguments:
    """Training"""

    per_device_train_batch_size: int = flag(8, "rows (step 2: pairs) per rank and micro-batch", minimum=1)
    per_device_eval_batch_size: int = flag(16, "rows (step 2: pairs) per rank in evaluation", minimum=1)
    gradient_accumulation_steps: int = flag(1, "micro-batches per optimizer step", minimum=1)
    learning_rate: float = flag(5e-5, "peak learning rate", above=0)
    weight_decay: float = flag(0.0, "AdamW weight decay, not applied to biases and norms", minimum=0)
    num_train_epochs: int = flag(1, "passes over the data", minimum=1)
    lr_scheduler_type: str = flag("cosine", "how the learning rate falls after the warm-up", choices=SCHEDULES)
    num_warmup_steps: int = flag(0, "optimizer steps of linear warm-up", minimum=0)
    eval_interval: int = flag(
        0, "evaluate every this many optimizer steps (0: at the start and after each epoch)", minimum=0
    )
    seed: int = flag(1234, "seed of data order, initialisation and sampling", minimum=0, maximum=MAX_SEED)


@dataclass
class DeepSpeedArguments:
    """DeepSpeed"""

    zero_stage: int = flag(0, "ZeRO stage", choices=(0, 1, 2, 3))
    offload: bool = flag(False, "keep optimizer states (and at stage 3 parameters) in CPU memory")
    deepspeed_config: str = flag("", "a JSON file merged over the configuration that these flags make")


@dataclass
class OutputArguments:
    """Output"""

    output_dir: str = flag("", "where the step writes (default: the latest run, or a new one under output/)")
    report_to: str = flag(
        "tensorboard", "where metrics go beside metrics.jsonl", choices=("tensorboard", "wandb", "none")
    )
    plan: bool = flag(False, "print the memory that this command needs on each rank, and stop (exit code 1: no fit)")

    def __post_init__(self) -> None:
        if self.report_to != "none" and not importlib.util.find_spec(self.report_to):
            raise UserError(
                f"--report_to {self.report_to}: not installed; install it: "
                f"{sys.executable} -m pip install {self.report_to}"
            )


@dataclass
class ReliabilityArguments:
    """Checkpoints"""

    save_every: int = flag(
        100, "write a checkpoint every this many optimizer steps (step 3: iterations), 0 for never", minimum=0
    )
    keep_last: int = flag(2, "how many checkpoints stay", minimum=1)
    resume: str = flag(
        "auto",
        "auto: go on from the output folder's checkpoint if there is one; never: start over; or a checkpoint's path",
    )
    distributed_timeout: int = flag(1800, "seconds that a rank waits for the others in a collective", minimum=1)
    hang_timeout: int = flag(
        3600, "seconds without any progress after which a rank says what it was doing and ends, 0 for never", minimum=0
    )
    max_shard_size: str = flag(
        "5GB",
        "a saved model's largest file, such as 5GB or 500MB; a larger model is saved in several",
        pattern=r"[1-9]\d*(KB|MB|GB)",
    )


# What steps 1 and 2 have in common
FINE_TUNING = (
    DataArguments,
    ModelArguments,
    LoraArguments,
    TrainingArguments,
    DeepSpeedArguments,
    OutputArguments,
    ReliabilityArguments,
)


@dataclass
class SupervisedArguments:
    """Step 1"""

    sft_only_data_path: list[str] = flag([], "sources used by this step alone, whole")
    train_on_prompts: bool = flag(False, "train on prompt tokens too")


@dataclass
class PreferenceArguments:
    """Step 2"""

    loss: str = flag(
        "log_sig",
        "log_sig: -logsigmoid(difference); log_exp: log(1 + exp(-difference))",
        choices=("log_sig", "log_exp"),
    )


# The flags of step 1 and of step 2; those of step 3 are in its folder, rlhf_arguments.py
STEP1 = (*FINE_TUNING, SupervisedArguments)
STEP2 = (*FINE_TUNING, PreferenceArguments)


@dataclass
class EvaluationArguments:
    """Evaluation"""

    path: str = flag("", "the step's output folder (default: the latest run's)")
    max_prompts: int = flag(64, "answer at most this many held-out prompts, 0 for all", minimum=0)
    per_device_eval_batch_size: int = flag(16, "rows that are done together", minimum=1)
    dtype: str = flag(AUTO, "precision of the models; auto: bf16 where the hardware computes in it", choices=PRECISIONS)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are a `UserError`, one line as any other."""

    def error(self, message: str) -> typing.NoReturn:
        """Raise it."""
        raise UserError(message)


def _add_flag(group: argparse._ArgumentGroup, field: dataclasses.Field, hint: Any) -> None:
    name, default = f"--{field.name}", _default(field)
    if hint is bool:
        group.add_argument(name, action=argparse.BooleanOptionalAction, default=default, help=field.metadata["help"])
        return
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    kwargs: dict[str, Any] = {"default": default, "help": field.metadata["help"], "choices": field.metadata["choices"]}
    if origin is list:
        kwargs["nargs"] = "+" if default else "*"
        kwargs["type"] = inner[0]
    elif origin in (typing.Union, types.UnionType):
        kwargs["type"] = next(t for t in inner if t is not type(None))
    else:
        kwargs["type"] = hint
    if default not in (None, "", []):
        kwargs["help"] += " (default: %(default)s)"
    kwargs["metavar"] = None if kwargs["choices"] else getattr(kwargs["type"], "__name__", "value").upper()
    group.add_argument(name, **kwargs)


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _check_range(name: str, value: Any, metadata: Mapping[str, Any]) -> None:
    for v in value if isinstance(value, list) else [value]:
        if isinstance(v, str) and metadata["pattern"] and not re.fullmatch(metadata["pattern"], v):
            raise UserError(f"--{name} {v}: {metadata['help']}")
        if not isinstance(v, (int, float)) or isinstance(v, bool):
            continue
        low, high, above = metadata["minimum"], metadata["maximum"], metadata["above"]
        infinite = v in (math.inf, -math.inf)
        wanted = [
            f"at least {low:.10g}" if low is not None else "",
            f"above {above:.10g}" if above is not None else "",
            f"at most {high:.10g}" if high is not None else "",
            "finite" if infinite else "",
        ]
        inside = (low is None or v >= low) and (high is None or v <= high) and (above is None or v > above)
        if not inside or infinite:  # a NaN is inside nothing
            raise UserError(f"--{name} is {v}, it must be {' and '.join(w for w in wanted if w)}")


def parse(
    groups: Sequence[type],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    aliases: Mapping[str, str] | None = None,
) -> list[Any]:
    """Parse ``argv`` into one instance of each dataclass in ``groups``, in order.

    Args:
        groups: dataclasses whose fields were made with `flag`; the docstring's first line titles the group.
        argv: the arguments after the program's name.
        prog: the program's name in ``--help`` and in messages.
        description: what ``--help`` says first.
        aliases: names understood as another flag, for this program.

    Raises:
        UserError: an unknown flag (the nearest known one is named), a value of the wrong type or out of range.
    """
    parser = Parser(
        prog=prog,
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for group in groups:
        section = parser.add_argument_group((group.__doc__ or group.__name__).strip().splitlines()[0])
        hints = typing.get_type_hints(group)
        for field in dataclasses.fields(group):
            _add_flag(section, field, hints[field.name])
    known = {name for action in parser._actions for name in action.option_strings}
    values, unknown = parser.parse_known_args(_translate(argv, aliases or {}, known))
    if unknown:
        _reject_unknown(unknown[0], sorted(known | set(aliases or {})), prog)
    instances = []
    for group in groups:
        fields = dataclasses.fields(group)
        instance = group(**{f.name: getattr(values, f.name) for f in fields})
        for f in fields:
            _check_range(f.name, getattr(instance, f.name), f.metadata)
        instances.append(instance)
    return instances


def answer_early(parse_flags: Callable[[Sequence[str]], Sequence[Any]]) -> None:
    """Answer ``--help`` and bad flags of this process before its program imports torch, which takes seconds.

    A program calls it above those imports, and only when it is run. It returns if there is nothing to say, and
    ends the process with 0 or 2 otherwise. The program's ``main`` then parses the same flags again, from its own
    argv, so that it stays one function which tests call as often as they like.

    Args:
        parse_flags: the program's own: argv -> argument groups. What they name is looked for too, see `check_inputs`.
    """
    check_environment()

    def check(argv: Sequence[str]) -> int:
        groups = parse_flags(argv)
        if int(os.environ.get("WORLD_SIZE", "1")) <= local_ranks():
            check_inputs(groups)  # on several hosts one may lack a file: then the run says on which
        return 0

    if code := run_program(check, sys.argv[1:]):
        raise SystemExit(code)


def tell_aliases(argv: Sequence[str]) -> list[str]:
    """A line for each flag whose other name means something else in another program."""
    given = {token.partition("=")[0] for token in argv}
    return [
        f"note: {name} is {ALIASES[name]} in step 3: {meaning}" for name, meaning in MISLEADING.items() if name in given
    ]


def _translate(argv: Sequence[str], aliases: Mapping[str, str], known: set[str]) -> list[str]:
    """Replace aliases by our names, and drop accepted flags together with their value."""
    result: list[str] = []
    dropping = False
    for token in argv:
        name, _, value = token.partition("=")
        if token.startswith("--"):
            dropping = name in ACCEPTED and name not in known
            if dropping:
                continue
            token = aliases.get(name, name) + ("=" + value if value else "")
        elif dropping:
            dropping = False
            continue
        result.append(token)
    return result


def _reject_unknown(token: str, known: Sequence[str], prog: str) -> typing.NoReturn:
    if not token.startswith("-"):
        raise UserError(f"unexpected argument {token!r}; flags start with --, see {prog} --help")
    name = token.split("=")[0]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    raise UserError(f"unknown flag {name}" + (f"; did you mean {near[0]}?" if near else f"; see {prog} --help"))
