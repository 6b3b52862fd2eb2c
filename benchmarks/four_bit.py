"""Adapters on a base in --dtype and on one in 4 bits (--base_bits 4), side by side: memory and time of a training step.

    python benchmarks/four_bit.py                                        the embedded model in fp32, twice each, in turn
    python benchmarks/four_bit.py --model_name_or_path FOLDER --dtype bf16

Each is a process of its own: loads, makes the engine that step 1 would, trains on rows of random tokens and decodes
greedily. Weights are the tensors' bytes, the scales of 4-bit codes included; the peak is the process's (on a GPU the
allocator's) beyond what it held before the model. Time is processor time on a CPU, seconds on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from common import flags_of, found_by, head_of, memory_of, row_of

from training.step3_rlhf_finetuning.hybrid_engine import HybridEngine, make_twin
from training.utils.arguments import LoraArguments
from training.utils.engine import engine as engines
from training.utils.engine.zero_config import deepspeed_config
from training.utils.errors import run_program
from training.utils.generation.engines import rollout_backend
from training.utils.generation.rollouts import RolloutRequest
from training.utils.generation.sampling import SamplingConfig
from training.utils.model import loading
from training.utils.model.language_modelling import negative_log_likelihood
from training.utils.model.lora import with_adapters
from training.utils.run.distributed import init_distributed

RANK = 16


def held() -> int:
    """Bytes that the process holds: resident memory, or what a GPU's allocator has given."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return memory_of("VmRSS")


@contextlib.contextmanager
def watched() -> Iterator[dict[str, int]]:
    """Inside, the most that is held at once is looked for, a hundred times a second; it is in ``peak`` afterwards."""
    found, done = {"peak": held()}, threading.Event()

    def watch() -> None:
        """Until the end."""
        while not done.wait(0.01):
            found["peak"] = max(found["peak"], held())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Figures of one base."""
    device = init_distributed()
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    before = held()
    config = deepspeed_config(zero_stage=0, dtype=options.dtype)
    path = loading.resolve_model(options.model_name_or_path)
    with watched() as load:
        base = loading.load_causal_lm(path, dtype=options.dtype, ds_config=config, base_bits=options.bits)
    states = [m.weight.quant_state for m in base.modules() if getattr(m, "quant_state", None) is not None]
    parts = [t for s in states for t in (s.absmax, s.code, s.offset, s.state2.absmax, s.state2.code)]
    weights = sum(tensor.nbytes for tensor in [*base.parameters(), *parts])
    model = with_adapters(base, LoraArguments(RANK, "all-linear", True, base_bits=options.bits))
    twin = make_twin(model)
    engine = engines.initialize_engine(
        model.to(device), config, learning_rate=1e-4, weight_decay=0.0, num_warmup_steps=0, total_steps=9
    )
    actor = HybridEngine(engine, twin, None)
    ids = torch.randint(3, 1000, (options.rows, options.length), device=device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "response_mask": torch.ones_like(ids)}
    seconds = []
    with watched() as train:
        for _ in range(1 + options.steps):
            start = clock()
            engines.backward(engine, negative_log_likelihood(engine, batch), ids.numel())
            engines.optimizer_step(engine)
            seconds.append(clock() - start)
    engine.eval()
    prompts = ids[:, :32]
    request = RolloutRequest(
        prompts, torch.ones_like(prompts), torch.arange(len(ids), device=device), 1, 0, stop_ids=(), pad_id=0
    )
    sampling = SamplingConfig(options.decoded, greedy=True)
    start = clock()
    with actor.generation_mode() as model:
        batch_out: Any = rollout_backend("fast").generate(model, request, sampling)
    decoded = int(batch_out.response_mask.sum())
    return {
        "weights": weights / 2**20,
        "load": (load["peak"] - before) / 2**20,
        "train": (train["peak"] - before) / 2**20,
        "step": 1e3 * statistics.median(seconds[1:]) / ids.numel(),
        "decode": 1e3 * (clock() - start) / decoded,
    }


def main(argv: Sequence[str]) -> int:
    """Measure both in turn and print the table."""
    parser = flags_of(__doc__)
    parser.add_argument("--model_name_or_path", default=loading.EMBEDDED)
    parser.add_argument("--dtype", default="fp32", choices=("bf16", "fp16", "fp32"))
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--decoded", type=int, default=48, help="tokens of an answer to the first 32 of each row")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--bits", type=int, default=-1, help="measure this one here, and print it as JSON")
    options = parser.parse_args(argv)
    if options.bits >= 0:
        print(json.dumps(measure(options)))
        return 0
    found: dict[int, list[dict[str, float]]] = {0: [], 4: []}
    for _ in range(options.repeats):
        for bits, runs in found.items():
            runs.append(found_by([sys.executable, __file__, *argv, "--bits", str(bits)]))
            print(bits, runs[-1], flush=True)
    mean = {bits: {k: statistics.fmean(r[k] for r in runs) for k in runs[0]} for bits, runs in found.items()}
    rows = f"{options.dtype}, {options.rows} rows of {options.length}"
    print("\n" + head_of(rows, "LoRA", "4-bit base", "of LoRA's"))
    for key, name in (
        ("weights", "weights, MiB"),
        ("load", "peak while loading, MiB"),
        ("train", "peak while training, MiB"),
        ("step", "training, ms per token"),
        ("decode", "decoding, ms per token"),
    ):
        print(row_of(name, f"{mean[0][key]:,.1f}", f"{mean[4][key]:,.1f}", f"{mean[4][key] / mean[0][key]:.2f}"))
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
