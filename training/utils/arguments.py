"""Command-line flags as dataclasses: what all programs share to read them, and the groups that several steps have.

A group of flags is a dataclass; its fields are made with `flag`, which carries the help text and the
allowed range. `parse` turns any list of groups into one `argparse` parser with grouped ``--help``, checks
every range, and answers unknown flags with the nearest known ones. Names are DeepSpeed-Chat's where it
has one; names of other programs are `OtherFlag`s, which a program hands to `parse` from its table in training/migrate/.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import importlib.util
import math
import os
import re
import shlex
import sys
import types
import typing
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from training.utils.data.kinds import shares_of
from training.utils.errors import UserError, half_character, run_program
from training.utils.run.environment import check_environment
from training.utils.run.folders import with_python
from training.utils.run.inputs import check_inputs
from training.utils.run.runtime import local_ranks

T = TypeVar("T")

AUTO = "auto"  # of --dtype: see training/utils/engine/precision.py
PRECISIONS = (AUTO, "bf16", "fp16", "fp32")
BASE_BITS_HELP = "4: linear layers under adapters stay in 4 bits (QLoRA, needs bitsandbytes); 0: in --dtype"
DTYPE_HELP = "precision of weights and activations (masters stay fp32); auto: bf16 where the hardware computes in it"

TENSOR_PARALLEL_HELP = "ranks that hold each model together, a part of every layer each; 1: whole models"

LAUNCHERS = ("--local_rank", "--deepspeed")  # what launchers, and everybody's habit, add to a command
DEMO = "demo"  # the bundled rows, as a source
CLOSE = 0.8  # likeness of a flag to one that may be meant

MAX_SEED = 2**32 - 1  # what every library that is seeded takes
LONGEST_WAIT = 10**8  # seconds, three years: every library's clock can count to it

ROLLOUT_ENGINES = ("fast", "hf", "vllm")
# transformers' names of learning rate schedules, as DeepSpeed-Chat offers them
SCHEDULES = ("cosine", "linear", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")


@dataclass(frozen=True)
class OtherFlag:
    """A flag of another project's program, and what it is here; the tables of them are in training/migrate/.

    Attributes:
        kind: of its value: bool for a switch, which takes none, int, float or str.
        default: what their program takes where it is not given.
        ours: the flag here that has the same values, with its dashes; empty: there is none.
        said: one line: what it is taken for, why nothing is left to do, or what to give instead.
        many: it takes several values.
        choices: what its value may be there; any where empty.
        minimum, maximum: inclusive bounds of its value there.
        only: values that change nothing here; others are refused with ``said``. None: all values are taken.
        settled: what becomes of it depends on other flags, its `Program.settle` says it; ``said`` is where to look.
    """

    kind: type
    default: Any = None
    ours: str = ""
    said: str = ""
    many: bool = False
    choices: tuple[Any, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    only: tuple[Any, ...] | None = None
    settled: bool = False

    def value(self, text: str) -> Any:
        """Its value from the command line.

        Raises:
            argparse.ArgumentTypeError: their program would not take it, or it can not be had here; says why.
        """
        try:
            found = self.kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no {_KINDS[self.kind]}") from None
        low, high = self.minimum, self.maximum
        if isinstance(found, float) and not math.isfinite(found):
            raise argparse.ArgumentTypeError(f"{text} is not finite")
        if self.choices and found not in self.choices:
            raise argparse.ArgumentTypeError(f"{text} is none of {', '.join(map(str, self.choices))}")
        if (low is not None and found < low) or (high is not None and found > high):
            bounds = [
                f"{word} {bound:.10g}" for word, bound in (("at least", low), ("at most", high)) if bound is not None
            ]
            raise argparse.ArgumentTypeError(f"{text} must be {' and '.join(bounds)}")
        if self.only is not None and found not in self.only:
            raise argparse.ArgumentTypeError(f"{text} can not be had here: {self.said}")
        return found


_KINDS = {int: "whole number", float: "number", str: "text"}


def flag(
    default: Any,
    help: str,
    *,
    choices: Sequence[Any] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    pattern: str = "",
    repeated: bool = False,
) -> Any:
    """A dataclass field that is a command-line flag.

    Args:
        default: its value when the flag is absent; a list makes the flag take several values.
        minimum, maximum: inclusive bounds of a number.
        above: an exclusive lower bound of a number.
        pattern: a regular expression that a text must match.
        repeated: of a list: values of a flag that is given twice are put together.
    """
    metadata = {"help": help, "choices": choices, "minimum": minimum, "maximum": maximum, "above": above}
    metadata |= {"pattern": pattern, "repeated": repeated}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class DataArguments:
    """Data"""

    data_path: list[str] = flag(
        [],
        "sources: a json, jsonl, csv or parquet file, a folder, a hub name; PATH:N takes N rows (default: the bundled "
        "demo, for the embedded model and what has learned from it)",
    )
    data_split: str = flag(
        "", "share of each source for SFT, preferences and prompts, such as 2,4,4 (default: every row in each step)"
    )
    eval_data_path: list[str] = flag(
        [], "held-out sources (default: each source's own eval split, or a tenth of its prompts)"
    )
    column_map: list[str] = flag([], "names of columns where they differ: prompt=instruction response=answer")
    on_bad_row: str = flag("error", "what to do with a row that can not be used", choices=("error", "skip"))
    chat_template: str = flag("", "a name, a Jinja file, or a conversation template in JSON (default: the tokenizer's)")
    system_message: str = flag("", "a system message put before every conversation that has none")
    stop_ids: list[int] = flag([], "ids of further tokens that end a response", minimum=0)
    data_output_path: str = flag("", "folder for tokenised data (default: the user's cache folder)")

    def __post_init__(self) -> None:
        shares_of(self.data_split)
        if self.column_map:
            from training.utils.data.formats.columns import parse_column_map  # jinja2 and the formats take a moment

            parse_column_map(self.column_map)

    @property
    def template(self) -> dict[str, Any]:
        """What `load_tokenizer` takes of these flags."""
        return {"chat_template": self.chat_template, "system_message": self.system_message, "stop_ids": self.stop_ids}

    def sources(self, more: Sequence[str] = ()) -> list[str]:
        """``--data_path``; without it the demo, unless there are ``more`` sources that it need not join."""
        return self.data_path or ([] if more else [DEMO])


@dataclass
class ModelArguments:
    """Model"""

    model_name_or_path: str = flag(
        "",
        "a hub name, a folder, a .gguf file or 'embedded' (default: step 1 the embedded model, else the last step 1)",
    )
    dtype: str = flag(AUTO, DTYPE_HELP, choices=PRECISIONS)
    attn_implementation: str = flag("sdpa", "attention of transformers", choices=("sdpa", "eager", "flash_attention_2"))
    gradient_checkpointing: bool = flag(False, "trade a second forward for activation memory")
    max_seq_len: int = flag(512, "longest prompt plus response, in tokens", minimum=8)


@dataclass
class LoraArguments:
    """LoRA"""

    lora_dim: int = flag(0, "rank of the adapters, whose layers' own weights are frozen; 0 for none", minimum=0)
    lora_module_name: str = flag("all-linear", "comma-separated parts of module names, or all-linear")
    only_optimize_lora: bool = flag(False, "freeze everything but the adapters (and the reward head)")
    lora_alpha: int = flag(0, "adapters count with alpha / rank; 0: alpha is twice the rank", minimum=0)
    lora_learning_rate: float = flag(0.0, "peak learning rate of the adapters; 0: that of the rest", minimum=0)
    lora_dropout: float = flag(0.0, "share of an adapter's inputs that training drops", minimum=0, maximum=0.9)
    base_bits: int = flag(0, BASE_BITS_HELP, choices=(0, 4))

    def __post_init__(self) -> None:
        for name in ("only_optimize_lora", "lora_alpha", "lora_learning_rate", "lora_dropout", "base_bits"):
            if getattr(self, name) and not self.lora_dim:
                raise UserError(f"--{name} needs adapters: set --lora_dim")
        check_base_bits(self.base_bits, self.only_optimize_lora)


def check_base_bits(base_bits: int, only_optimize_lora: bool) -> None:
    """Refuse a base in 4 bits where more than adapters would train.

    Raises:
        UserError: names both flags.
    """
    if base_bits and not only_optimize_lora:
        raise UserError(f"--base_bits {base_bits} leaves only adapters to train: add --only_optimize_lora")


@dataclass
class TrainingArguments:
    """Training"""

    per_device_train_batch_size: int = flag(8, "rows (step 2, DPO: pairs) per rank and micro-batch", minimum=1)
    per_device_eval_batch_size: int = flag(16, "rows (step 2, DPO: pairs) per rank in evaluation", minimum=1)
    gradient_accumulation_steps: int = flag(1, "micro-batches per optimizer step", minimum=1)
    learning_rate: float = flag(5e-5, "peak learning rate", above=0)
    weight_decay: float = flag(0.0, "AdamW weight decay, not applied to biases and norms", minimum=0)
    num_train_epochs: int = flag(1, "passes over the data", minimum=1)
    lr_scheduler_type: str = flag("cosine", "how the learning rate falls after the warm-up", choices=SCHEDULES)
    num_warmup_steps: int = flag(0, "optimizer steps of linear warm-up", minimum=0)
    eval_interval: int = flag(
        0, "evaluate every this many optimizer steps too (0: at start and end, step 1 after each epoch)", minimum=0
    )
    seed: int = flag(1234, "seed of data order, initialisation and sampling", minimum=0, maximum=MAX_SEED)


@dataclass
class DeepSpeedArguments:
    """DeepSpeed"""

    zero_stage: int = flag(0, "ZeRO stage", choices=(0, 1, 2, 3))
    offload: bool = flag(False, "keep optimizer states (and at stage 3 parameters) in CPU memory")
    tensor_parallel: int = flag(1, TENSOR_PARALLEL_HELP, minimum=1)
    sequence_parallel: int = flag(1, "so many ranks take each row together, a piece of it each", minimum=1)
    deepspeed_config: str = flag("", "a JSON file, or JSON, merged over the configuration that these flags make")

    def __post_init__(self) -> None:
        if self.sequence_parallel > 1 and self.tensor_parallel > 1:
            raise UserError("--sequence_parallel and --tensor_parallel do not go together: both divide attention heads")


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
                f"{with_python('-m', 'pip', 'install', self.report_to)}"
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
    distributed_timeout: int = flag(
        1800, "seconds that a rank waits for the others in a collective", minimum=1, maximum=LONGEST_WAIT
    )
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

    sft_only_data_path: list[str] = flag([], "sources used by this step alone, whole; without --data_path only these")
    train_on_prompts: bool = flag(False, "train on prompt tokens too")
    best_by: str = flag(
        "loss",
        "which model is kept: of the lowest held-out loss, or whose answers are nearest to the held-out ones by ROUGE",
        choices=("loss", "rouge"),
    )


@dataclass
class PreferenceArguments:
    """Step 2"""

    loss: str = flag(
        "log_sig",
        "log_sig: -logsigmoid(difference); log_exp: log(1 + exp(-difference))",
        choices=("log_sig", "log_exp"),
    )


WITHOUT_REFERENCE = ("simpo", "orpo")  # losses of DPO that look at the policy alone
SMOOTHED = ("sigmoid", "simpo")  # those in which --label_smoothing has a meaning


@dataclass
class DPOArguments:
    """DPO"""

    loss: str = flag(
        "sigmoid",
        "sigmoid: DPO; ipo, hinge, kto: other losses against the reference; simpo, orpo: without one",
        choices=("sigmoid", "ipo", "hinge", "kto", "simpo", "orpo"),
    )
    beta: float | None = flag(
        None, "how closely the reference is kept to; orpo: weight of the odds (default: 0.1, simpo 2.0)", above=0
    )
    label_smoothing: float = flag(0.0, "share of pairs taken to be labelled wrong", minimum=0, maximum=0.5)
    simpo_gamma: float | None = flag(None, "simpo's margin between the rewards (default: 0.5)", minimum=0)
    offload_reference_model: bool = flag(False, "at stage 3 keep the reference's parameters in CPU memory")

    def __post_init__(self) -> None:
        if self.label_smoothing and self.loss not in SMOOTHED:
            raise UserError(f"--label_smoothing has no meaning in --loss {self.loss}: sigmoid and simpo have it")
        if self.simpo_gamma is not None and self.loss != "simpo":
            raise UserError(f"--simpo_gamma has no meaning in --loss {self.loss}")

    @property
    def strength(self) -> float:
        """beta, by the loss where it is not given."""
        return self.beta if self.beta is not None else 2.0 if self.loss == "simpo" else 0.1

    @property
    def margin(self) -> float:
        """simpo's gamma."""
        return self.simpo_gamma if self.simpo_gamma is not None else 0.5


def check_tensor_parallel(ranks: int, lora_flags: Mapping[str, int]) -> None:
    """Refuse ``ranks`` of ``--tensor_parallel`` beside a flag of adapters (name -> its value); without torch.

    Raises:
        UserError: names the flags.
    """
    if lora := [name for name, rank in lora_flags.items() if rank and ranks > 1]:
        raise UserError(
            f"--tensor_parallel {ranks} does not go with --{lora[0]}: DeepSpeed's AutoTP trains no adapters; drop one"
        )


def parse_fine_tuning(groups: Sequence[type], argv: Sequence[str], **options: Any) -> list[Any]:
    """`parse` and `check_fine_tuning`."""
    return check_fine_tuning(parse(groups, argv, **options))


def check_fine_tuning(groups: list[Any]) -> list[Any]:
    """Refuse flags of steps 1 and 2 or DPO that contradict each other; gives them back.

    Raises:
        UserError: names them; of DPO also a reference to offload where there is none, or none at ZeRO-3.
    """
    flags = {type(group): group for group in groups}
    ds, lora, step = flags[DeepSpeedArguments], flags[LoraArguments], flags.get(DPOArguments)
    check_tensor_parallel(ds.tensor_parallel, {"lora_dim": lora.lora_dim})
    if step is not None and step.offload_reference_model:
        if ds.zero_stage < 3:
            raise UserError("--offload_reference_model moves the parameters of ZeRO-3: it needs --zero_stage 3")
        if lora.only_optimize_lora or step.loss in WITHOUT_REFERENCE:
            why = "--only_optimize_lora" if lora.only_optimize_lora else f"--loss {step.loss}"
            raise UserError(f"--offload_reference_model has nothing to move: with {why} there is no second model")
    return groups


# The flags of steps 1 and 2 and of DPO; those of step 3 are in its folder, arguments.py
STEP1 = (*FINE_TUNING, SupervisedArguments)
STEP2 = (*FINE_TUNING, PreferenceArguments)
DPO = (*FINE_TUNING, DPOArguments)


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
    name, default = f"--{field.name}", default_of(field)
    if hint is bool:
        group.add_argument(name, action=argparse.BooleanOptionalAction, default=default, help=field.metadata["help"])
        return
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    kwargs: dict[str, Any] = {"default": default, "help": field.metadata["help"], "choices": field.metadata["choices"]}
    if origin is list:
        kwargs["nargs"] = "+"
        kwargs["type"] = inner[0]
        kwargs["action"] = "extend" if field.metadata["repeated"] else "store"
    elif origin in (typing.Union, types.UnionType):
        kwargs["type"] = next(t for t in inner if t is not type(None))
    else:
        kwargs["type"] = hint
    if default not in (None, "", []):
        kwargs["help"] += " (default: %(default)s)"
    one_of = "|".join(filter(None, map(str, kwargs["choices"] or ())))  # a pipeline's name has commas
    kwargs["metavar"] = one_of or getattr(kwargs["type"], "__name__", "value").upper()
    group.add_argument(name, **kwargs)


def fields_of(groups: Iterable[type]) -> dict[str, tuple[Any, dataclasses.Field]]:
    """Flag, without dashes -> its type and its field."""
    return {
        field.name: (typing.get_type_hints(group)[field.name], field)
        for group in groups
        for field in dataclasses.fields(group)
    }


def default_of(field: dataclasses.Field) -> Any:
    """The value of a flag that is not given."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _check_range(name: str, value: Any, metadata: Mapping[str, Any]) -> None:
    for v in value if isinstance(value, list) else [value]:
        if v == "" and isinstance(value, list):
            raise UserError(f"--{name}: an empty value")
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


def _check_text(name: str, value: Any) -> None:
    """Refuse text that is no UTF-8 (half a character), unless it names a file that is there: names are any bytes.

    Raises:
        UserError: names the flag.
    """
    for v in value if isinstance(value, list) else [value]:
        if isinstance(v, str) and (half := half_character(v)) and not os.path.lexists(v):
            raise UserError(f"--{name} holds half a character, {half}, or bytes that are no UTF-8")


def parse(
    groups: Sequence[type],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    others: Mapping[str, OtherFlag] | None = None,
    recorded: bool = False,
) -> list[Any]:
    """Parse ``argv`` into one instance of each dataclass in ``groups``, in order.

    Args:
        groups: dataclasses whose fields were made with `flag`; the docstring's first line titles the group.
        argv: the arguments after the program's name. Of a flag that is given twice, the last one counts, which is said
            of those that take several values.
        others: flags of other programs that are understood, too; `told_others` says what they are taken for.
        recorded: a run was started with these arguments; they are not judged again.

    Raises:
        UserError: unknown flags (all of them, with the nearest known ones), a value of the wrong type or out of range.
    """
    parser = Parser(
        prog=prog, description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for group in groups:
        section = parser.add_argument_group((group.__doc__ or group.__name__).strip().splitlines()[0])
        hints = typing.get_type_hints(group)
        for field in dataclasses.fields(group):
            _add_flag(section, field, hints[field.name])
    own = {name: action for action in parser._actions for name in action.option_strings}
    for name, other in (others or {}).items():
        if name not in own:
            _add_other(parser, name, other, own.get(other.ours))
    known = {name for action in parser._actions for name in action.option_strings}
    tokens = [with_underscores(_with_home(token), known) for token in argv]
    values, unknown = parser.parse_known_args(tokens)
    if unknown:
        _reject_unknown(unknown, sorted(known), prog, bool(others))
    if not recorded:
        _refuse_two_names(tokens, parser)
        _tell_repeated(tokens, parser, values)
    instances = []
    for group in groups:
        fields = dataclasses.fields(group)
        for f in fields:
            _check_text(f.name, getattr(values, f.name))
        instance = group(**{f.name: getattr(values, f.name) for f in fields})
        for f in fields:
            _check_range(f.name, getattr(instance, f.name), f.metadata)
        instances.append(instance)
    return instances


def _add_other(parser: Parser, name: str, other: OtherFlag, ours: argparse.Action | None) -> None:
    """Let ``name`` set our flag, or nothing; ``--help`` keeps silent about it."""
    hidden: dict[str, Any] = {"help": argparse.SUPPRESS, "default": argparse.SUPPRESS}
    if ours is not None:
        hidden["dest"] = ours.dest
        if isinstance(ours, argparse.BooleanOptionalAction):
            parser.add_argument(name, action="store_true", **hidden)
        else:
            parser.add_argument(name, type=ours.type or str, nargs=ours.nargs, choices=ours.choices, **hidden)
        return
    hidden["dest"] = f"other {name}"
    if other.kind is bool:
        parser.add_argument(name, action="store_true", **hidden)
    else:
        parser.add_argument(name, type=other.value, nargs="*" if other.many else None, **hidden)


def with_underscores(token: str, known: Container[str]) -> str:
    """A flag in which dashes stand for underscores, as it is known; any other token as it is."""
    name, equals, value = token.partition("=")
    written = "--" + name[2:].replace("-", "_")
    return written + equals + value if name.startswith("--") and name not in known and written in known else token


def _with_home(token: str) -> str:
    """``--flag=~/x`` with the home folder for the tilde, which the shell fills in at the beginning of a word alone."""
    name, equals, value = token.partition("=")
    return name + equals + os.path.expanduser(value) if name.startswith("--") and value.startswith("~/") else token


def answer_early(
    parse_flags: Callable[[Sequence[str]], Sequence[Any]],
    others: Mapping[str, OtherFlag] | None = None,
    check_more: Callable[[Sequence[Any]], None] = lambda groups: None,
) -> None:
    """Answer ``--help`` and bad flags of this process before its program imports torch, which takes seconds.

    A program calls it above those imports, and only when it is run. It returns if there is nothing to say, and
    ends the process with 0 or 2 otherwise. The program's ``main`` then parses the same flags again, from its own
    argv, so that it stays one function which tests call as often as they like.

    Args:
        parse_flags: the program's own: argv -> argument groups. What they name is looked for too, see `check_inputs`.
        others: those of its flags that are other programs'; rank 0 says what it takes them for.
        check_more: what else can be said of the groups without torch.
    """
    check_environment()

    def check(argv: Sequence[str]) -> int:
        """Parse, look for what is named, and tell what other programs' flags are taken for."""
        groups = parse_flags(argv)
        if int(os.environ.get("WORLD_SIZE", "1")) <= local_ranks():
            check_inputs(groups)  # on several hosts one may lack a file: then the run says on which
            check_more(groups)
        if os.environ.get("RANK", "0") == "0":
            for line in told_others(argv, others or {}):
                print(line, flush=True)
        return 0

    if code := run_program(check, sys.argv[1:]):
        raise SystemExit(code)


def told_others(argv: Sequence[str], others: Mapping[str, OtherFlag]) -> list[str]:
    """A line for each flag of another program, what it is taken for, and one about defaults if there are any."""
    names = [with_underscores(token, others).partition("=")[0] for token in argv if token.startswith("--")]
    given = [name for name in dict.fromkeys(names) if name in others and others[name].ours != name]
    lines = []
    for name in (name for name in given if name not in LAUNCHERS):
        other = others[name]
        what = f"is {other.ours} here" if other.ours else "has nothing to do here"
        lines.append(f"note: {name} {what}" + (f": {other.said}" if other.said else ""))
    if set(given) - {"--local_rank"}:
        lines.append(
            "note: defaults are this program's own; python -m training.migrate makes a command with those of the "
            "program that these flags come from"
        )
    return lines


def flags_in(argv: Sequence[str]) -> dict[str, list[str]]:
    """Flag with underscores alone (and without ``no-``) -> its values, of the last time that it is given."""
    found: dict[str, list[str]] = {}
    values: list[str] = []
    for token in argv:
        if re.match(r"--[a-zA-Z]", token):
            name, equals, value = token[2:].partition("=")
            values = found[name.removeprefix("no-").replace("-", "_")] = [value] if equals else []
        else:
            values.append(token)
    return found


def _refuse_two_names(tokens: Sequence[str], parser: Parser) -> None:
    """Refuse one flag under two names with two values; of a name that is given twice the last one counts."""
    given: dict[str, dict[str, list[str]]] = {}
    for name, values in flags_in(tokens).items():
        if action := parser._option_string_actions.get(f"--{name}"):
            given.setdefault(action.dest, {})[f"--{name}"] = values
    for names in given.values():
        if len(set(map(tuple, names.values()))) > 1:
            each = " and ".join(shlex.join([name, *values]) for name, values in names.items())
            raise UserError(f"{each} are the same flag here, with different values: give one of them")


def _tell_repeated(tokens: Sequence[str], parser: Parser, values: argparse.Namespace) -> None:
    """Say which flag of several values is given twice: argparse takes the last ones, where some mean all of them."""
    lists = {name: a.dest for a in parser._actions if a.nargs == "+" for name in a.option_strings}
    lists = {n: d for n, d in lists.items() if not isinstance(parser._option_string_actions[n], argparse._ExtendAction)}
    given = [name for name in (token.partition("=")[0] for token in tokens) if name in lists]
    for name in dict.fromkeys(given):
        if [lists[other] for other in given].count(lists[name]) > 1:
            counted = shlex.join(map(str, getattr(values, lists[name])))
            _note(f"note: {name} is given more than once, and the last one counts: {name} {counted}")


@functools.cache
def _note(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


def _reject_unknown(tokens: Sequence[str], known: Sequence[str], prog: str, followed: bool) -> typing.NoReturn:
    names = list(dict.fromkeys(token.split("=")[0] for token in tokens if token.startswith("-")))
    if not names:
        raise UserError(f"unexpected argument {tokens[0]!r}; flags start with --, see {prog} --help")
    near = {name: difflib.get_close_matches(name, known, n=1, cutoff=CLOSE) for name in names}
    listed = [name + (f" (did you mean {near[name][0]}?)" if near[name] else "") for name in names]
    if len(names) == 1:
        listed = [names[0] + (f"; did you mean {near[names[0]][0]}?" if near[names[0]] else "")]
    foreign = followed and not all(near.values())
    see = (
        f"; see {prog} --help" * (not all(near.values()))
        + "; other projects' commands: python -m training.migrate" * foreign
    )
    raise UserError(f"unknown flag{'s' if len(names) > 1 else ''} {', '.join(listed)}{see}")
