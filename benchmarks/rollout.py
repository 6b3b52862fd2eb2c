"""Rollout speed: useful tokens per second of `hf`, `fast`, and ``generate`` through a hooked ZeRO-3 engine.

    python benchmarks/rollout.py                      # the embedded model, 32 prompts of the demo data
    python benchmarks/rollout.py --ablation --json rollout.json

The engines take turns on the same prompts in one process; each figure is the median over the rounds. A useful token is
a response token up to and including its stop token; what is decoded for rows that have already ended counts for
nothing. Responses must end at different lengths for that to show: by default one ends with its first sentence (a
token that holds one of `--stop_text`, or the end of turn). The table says how the lengths came out.

Where the time goes is profiled in a round of its own, by kind of operation.

Two lower bounds for a step of decoding are measured in the same run: reading all weights once at the memory's
bandwidth (a large copy), and the products of all rows at the speed of a large matrix product.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from common import ROOT, flags_of, head_of, json_lines, row_of, write_figures

from training.utils.arguments import PRECISIONS
from training.utils.data.chat import render
from training.utils.data.template import stop_token_ids
from training.utils.engine.precision import settle
from training.utils.engine.zero_config import DTYPES, frozen_config
from training.utils.errors import run_program
from training.utils.generation.decode_loop import seconds_since
from training.utils.generation.engines import FastBackend, HfBackend
from training.utils.generation.rollouts import RolloutBatch, RolloutRequest
from training.utils.generation.sampling import SamplingConfig
from training.utils.model.loading import load_causal_lm, resolve_model
from training.utils.model.tokenizer import load_tokenizer
from training.utils.run.distributed import init_distributed
from training.utils.run.files import new_file
from training.utils.run.runtime import prepare_runtime

PROMPTS = ROOT / "training" / "data" / "demo" / "prompts.jsonl"
Engine = Callable[[RolloutRequest, SamplingConfig], RolloutBatch]
# Kinds of operators by parts of their names; the first that fits counts. The empty part fits everything.
KINDS: dict[str, tuple[str, ...]] = {
    "copies and cache": ("copy_", "::cat", "index", "clone", "fill_", "reorder", "gather", "scatter"),
    "matrix products": ("linear", "::mm", "addmm", "gemm"),
    "attention": ("scaled_dot_product", "bmm"),
    "softmax and sampling": ("softmax", "exp", "multinomial", "argmax", "amax", "sort", "log", "topk"),
    "everything else": ("",),
}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the flags."""
    parser = flags_of(__doc__)
    parser.add_argument("--model_name_or_path", default="embedded")
    parser.add_argument("--dtype", choices=PRECISIONS, default="auto")
    parser.add_argument("--rows", type=int, default=32, help="prompts per round")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--stop_text", default=".!?\n", help="characters that end a response; empty: end of turn only")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds per engine, after one that is not timed")
    parser.add_argument("--ablation", action="store_true", help="also fast with one of its parts switched off")
    parser.add_argument("--no_hooked", action="store_true", help="leave out the ZeRO-3 engine")
    parser.add_argument(
        "--cpu_time", action="store_true", help="CPU seconds of this process: for a machine that is busy"
    )
    parser.add_argument("--json", type=new_file, default="", help="also write the figures to this file")
    return parser.parse_args(argv)


def make_request(tokenizer: Any, rows: int, stop_text: str, device: torch.device) -> RolloutRequest:
    """The first prompts of the demo data, left-padded, with the stop tokens of the benchmark."""
    messages = [line["prompt"] for line in json_lines(PROMPTS)[:rows]]
    prompts = [render(tokenizer, turns, add_generation_prompt=True).input_ids for turns in messages]
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    ends = {token for token, text in enumerate(texts) if set(text) & set(stop_text)}
    stop_ids = tuple(sorted(ends | set(stop_token_ids(tokenizer))))
    how = {"seed": 0, "iteration": 0, "stop_ids": stop_ids}
    return RolloutRequest.of(prompts, range(len(prompts)), tokenizer.pad_token_id, device, **how)


def hooked_module(path: str, dtype: str) -> Any:
    """A model in a ZeRO-3 engine whose hooks gather each layer at each token (one rank: no network)."""
    import deepspeed

    config = frozen_config(zero_stage=3, dtype=dtype)
    engine, *_ = deepspeed.initialize(model=load_causal_lm(path, dtype=dtype).eval(), config=config)
    return engine.module


def make_engines(model: Any, path: str, arguments: argparse.Namespace) -> dict[str, Engine]:
    """Name -> how it continues prompts, in the order of the table."""
    backends: dict[str, Any] = {"hf": HfBackend(), "fast": FastBackend()}
    if arguments.ablation:
        backends["fast, weights not packed"] = FastBackend(pack_weights=False)
        backends["fast, sdpa for single queries"] = FastBackend(decode_attention=False)
        backends["fast, neither"] = FastBackend(pack_weights=False, decode_attention=False)
    engines: dict[str, Engine] = {name: partial(backend.generate, model) for name, backend in backends.items()}
    if not arguments.no_hooked:
        module = hooked_module(path, arguments.dtype)
        engines["generate, hooked ZeRO-3"] = partial(HfBackend(synced_gpus=True).generate, module)
        if arguments.ablation:
            engines["fast, hooked ZeRO-3"] = partial(FastBackend(synced=True).generate, module)
    return engines


def fastest(run: Callable[[], Any], device: torch.device, times: int = 5) -> float:
    """Wall-clock seconds of the fastest of several calls, after one that is not timed."""
    run()
    seconds = []
    for _ in range(times):
        seconds_since(0.0, device)  # waits for what the device was given before
        started = time.perf_counter()
        run()
        seconds.append(seconds_since(started, device))
    return min(seconds)


def machine_bounds(dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """Bytes per second of a large copy (read and written), operations per second of a large matrix product."""
    source = torch.ones(1 << 26, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / fastest(lambda: target.copy_(source), device)
    width = 2048 if device.type == "cpu" else 8192
    square = torch.randn(width, width, device=device).to(dtype)
    return bandwidth, 2 * width**3 / fastest(lambda: square @ square.T, device)


def profile_shares(engine: Engine, request: RolloutRequest, sampling: SamplingConfig) -> dict[str, float]:
    """Share of one round's operator time by `KINDS`; what Python itself takes is not in it."""
    kind = torch.profiler.ProfilerActivity
    on_gpu = request.prompt_ids.is_cuda
    with torch.profiler.profile(activities=[kind.CPU, kind.CUDA] if on_gpu else [kind.CPU]) as profiler:
        engine(request, sampling)
    time_of = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    operators = [event for event in profiler.key_averages() if event.device_type == torch.autograd.DeviceType.CPU]
    times = {event.key: getattr(event, time_of) for event in operators}  # kernels count for the operator they serve
    total = sum(times.values())
    shares = dict.fromkeys(KINDS, 0.0)
    for name, time_ in times.items():
        which = next(which for which, parts in KINDS.items() if any(part in name for part in parts))
        shares[which] += time_ / total
    return shares


def profile_table(shares: dict[str, dict[str, float]]) -> str:
    """The shares of each engine as Markdown."""
    lines = [row_of(name, *(f"{row[kind]:.0%}" for kind in KINDS)) for name, row in shares.items()]
    return "\n".join([head_of("operator time", *KINDS), *lines])


def measure(
    engines: dict[str, Engine],
    request: RolloutRequest,
    sampling: SamplingConfig,
    rounds: int,
    clock: Callable[[], float],
) -> dict[str, Any]:
    """Run every engine once per round, the order rotated, and collect seconds and response lengths [rounds][rows]."""
    results: dict[str, Any] = {name: {"seconds": [], "lengths": []} for name in engines}
    names = list(engines)
    for round_ in range(-1, rounds):
        shift = round_ % len(names)
        for name in names[shift:] + names[:shift]:
            asked = RolloutRequest(**{**vars(request), "iteration": round_ + 1})
            started = clock()
            batch = engines[name](asked, sampling)
            seconds = clock() - started
            if round_ >= 0:
                results[name]["seconds"].append(seconds)
                results[name]["lengths"].append(batch.response_mask.sum(1).tolist())
            print(f"round {round_ + 1}: {name} {seconds:.2f} s", file=sys.stderr, flush=True)
    return results


def summarise(
    results: dict[str, Any], request: RolloutRequest, weights: int, parameters: int, bounds: tuple[float, float]
) -> list[dict[str, Any]]:
    """One row per engine: medians over the rounds, and the two lower bounds for the tokens that it produced."""
    bandwidth, operations = bounds
    prompt_tokens = int(request.prompt_mask.sum())
    rows = []
    for name, result in results.items():
        speeds, memory, arithmetic = [], [], []
        for seconds, lengths in zip(result["seconds"], result["lengths"], strict=True):
            speeds.append(sum(lengths) / seconds)
            memory.append(max(lengths) * weights / bandwidth / seconds)
            arithmetic.append(2 * parameters * (sum(lengths) + prompt_tokens) / operations / seconds)
        rows.append(
            {
                "engine": name,
                "tokens_per_second": statistics.median(speeds),
                "lowest": min(speeds),
                "highest": max(speeds),
                "seconds": statistics.median(result["seconds"]),
                "share_of_memory_bound": statistics.median(memory),
                "share_of_arithmetic_bound": statistics.median(arithmetic),
                "lengths": result["lengths"],
            }
        )
    baseline = rows[0]["tokens_per_second"]
    return [row | {"ratio_to_hf": row["tokens_per_second"] / baseline} for row in rows]


def shared_beginning(request: RolloutRequest) -> int:
    """How many tokens all prompts begin with, such as a template's system message; `fast` computes them once."""
    pairs = zip(request.prompt_ids, request.prompt_mask, strict=True)
    prompts = [ids[mask.bool()].tolist() for ids, mask in pairs]
    return next((i for i, column in enumerate(zip(*prompts, strict=False)) if len(set(column)) > 1), len(min(prompts)))


def length_summary(rows: list[dict[str, Any]]) -> str:
    """The distribution of the response lengths over all rounds and engines, in words."""
    lengths = sorted(length for row in rows for drawn in row["lengths"] for length in drawn)
    deciles = statistics.quantiles(lengths, n=10)
    return (
        f"mean {statistics.mean(lengths):.1f}, 10% at most {deciles[0]:.0f}, median {deciles[4]:.0f}, "
        f"90% at most {deciles[8]:.0f}, longest {lengths[-1]}"
    )


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    names = ("engine", "useful tokens/s", "lowest - highest", "against hf", "s per round", "of memory bound",
             "of arithmetic")  # fmt: skip
    lines = [
        row_of(
            row["engine"],
            f"{row['tokens_per_second']:.0f}",
            f"{row['lowest']:.0f} - {row['highest']:.0f}",
            f"{row['ratio_to_hf']:.2f}x",
            f"{row['seconds']:.2f}",
            f"{row['share_of_memory_bound']:.0%}",
            f"{row['share_of_arithmetic_bound']:.0%}",
        )
        for row in rows
    ]
    return "\n".join([head_of(*names), *lines])


def main(argv: Sequence[str]) -> int:
    """Measure, print the Markdown table, and write the JSON file if asked to."""
    arguments = parse(argv)
    prepare_runtime()
    settle(arguments)
    path = resolve_model(arguments.model_name_or_path)
    tokenizer = load_tokenizer(path)
    device = init_distributed()
    model = load_causal_lm(path, dtype=arguments.dtype).eval().to(device)
    request = make_request(tokenizer, arguments.rows, arguments.stop_text, device)
    sampling = SamplingConfig(arguments.max_new_tokens, temperature=arguments.temperature)
    engines = make_engines(model, path, arguments)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    before = machine_bounds(DTYPES[arguments.dtype], device)
    results = measure(engines, request, sampling, arguments.rounds, clock)
    after = machine_bounds(DTYPES[arguments.dtype], device)
    bounds = max(before[0], after[0]), max(before[1], after[1])
    shares = {name: profile_shares(engines[name], request, sampling) for name in ("hf", "fast")}
    weights = sum(parameter.nbytes for parameter in model.parameters())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    rows = summarise(results, request, weights, parameters, bounds)
    prompt_lengths = request.prompt_mask.sum(1)
    print(
        f"{arguments.model_name_or_path}, {parameters / 1e6:.0f}M parameters, {arguments.dtype}, "
        f"{torch.get_num_threads()} threads; {len(prompt_lengths)} prompts of {int(prompt_lengths.min())} to "
        f"{int(prompt_lengths.max())} tokens (the first {shared_beginning(request)} the same in all), at most "
        f"{arguments.max_new_tokens} new; medians of {arguments.rounds} rounds, engines in "
        f"turn, {'CPU' if arguments.cpu_time else 'wall-clock'} seconds.\n\n"
        f"Response lengths: {length_summary(rows)}.\n\n{table(rows)}\n\n"
        f"{profile_table(shares)}\n\n"
        f"Memory: a large copy moves {bounds[0] / 1e9:.1f} GB/s; a step reads {weights / 1e6:.0f} MB of weights, which "
        f"takes at least {weights / bounds[0] * 1e3:.1f} ms whatever the number of rows. Arithmetic: a large matrix "
        f"product runs at {bounds[1] / 1e9:.0f} GFLOP/s, so a step of {len(prompt_lengths)} rows takes at least "
        f"{2 * parameters * len(prompt_lengths) / bounds[1] * 1e3:.1f} ms. A share is the bound's time, for the steps "
        f"(memory) or the prompt and response tokens (arithmetic) of the round, over the measured time."
    )
    figures = {"arguments": vars(arguments), "bandwidth": bounds[0], "operations": bounds[1], "engines": rows}
    write_figures(arguments.json, figures | {"shares": shares})
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
