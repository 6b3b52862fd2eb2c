"""Processor time and peak memory of an optimizer step on one rank: the plain step against ZeRO's.

    OMP_NUM_THREADS=1 python benchmarks/optimizer_step.py            # the embedded model, in fp32
    OMP_NUM_THREADS=1 python benchmarks/optimizer_step.py --dtype bf16
    OMP_NUM_THREADS=1 python benchmarks/optimizer_step.py --rounds 5 --json step.json

Each of full training and LoRA takes the plain step (`training.utils.engine.engine.plain_adamw`) and ZeRO 1 in
turn, every time in a process of its own that trains a few steps on the same random rows. Seconds are of all threads,
user and system, so other work on the machine hardly counts; those of the first step, which makes the moments, are left
out.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

from common import flags_of, found_by, head_of, row_of, write_figures

from training.utils.run.files import new_file

WAYS, WEIGHTS = ("plain", "ZeRO 1"), ("full", "LoRA")


def child(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train in this process, in one way; returns seconds of each step and the peak in MiB."""
    import torch

    from training.utils.arguments import LoraArguments
    from training.utils.engine import engine as engines
    from training.utils.engine.zero_config import deepspeed_config
    from training.utils.model.forward import response_log_probs
    from training.utils.model.loading import load_causal_lm, resolve_model
    from training.utils.model.lora import with_adapters
    from training.utils.run.distributed import init_distributed
    from training.utils.run.runtime import prepare_runtime

    prepare_runtime()
    device = init_distributed()
    if arguments.way != WAYS[0]:
        engines.is_plain = lambda config, ranks: False
    model: Any = load_causal_lm(resolve_model(arguments.model_name_or_path), dtype=arguments.dtype)
    if arguments.weights == "LoRA":
        model = with_adapters(model, LoraArguments(arguments.lora_dim, only_optimize_lora=True))
    kind: dict[str, Any] = {"learning_rate": 1e-5, "weight_decay": 0.0, "num_warmup_steps": 0, "total_steps": 100}
    config = deepspeed_config(zero_stage=0, dtype=arguments.dtype)
    engine = engines.initialize_engine(model.to(device), config, **kind)
    shape, generator = (arguments.rows, arguments.tokens), torch.Generator().manual_seed(0)
    ids = torch.randint(3, 1000, shape, generator=generator).to(device)
    mask = torch.ones_like(ids)
    passes, steps = [], []
    for _ in range(arguments.steps + 1):
        start = time.process_time()
        engines.backward(engine, -response_log_probs(engine, ids, mask, mask)[0].sum(), ids.numel())
        middle = time.process_time()
        engines.optimizer_step(engine)
        passes.append(middle - start)
        steps.append(time.process_time() - middle)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"pass": statistics.median(passes[1:]), "step": statistics.median(steps[1:]), "peak_mib": peak}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the flags."""
    parser = flags_of(__doc__)
    parser.add_argument("--model_name_or_path", default="embedded")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="fp32")
    parser.add_argument("--rounds", type=int, default=3, help="times that each way is run, in turn")
    parser.add_argument("--steps", type=int, default=4, help="steps of a run that count")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64, help="of each row")
    parser.add_argument("--lora_dim", type=int, default=16)
    parser.add_argument("--json", type=new_file, default="", help="also write the figures to this file")
    parser.add_argument("--weights", choices=WEIGHTS, default=WEIGHTS[0], help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=WAYS, default="", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    """Measure all ways in turn and print the Markdown table."""
    arguments = parse(argv)
    if arguments.way:
        print(json.dumps(child(arguments)))
        return
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(arguments.rounds):
        for weights in WEIGHTS:
            for way in WAYS:
                command = [sys.executable, __file__, *argv, "--weights", weights, "--way", way]
                found.setdefault(f"{weights}, {way}", []).append(found_by(command))
    print(head_of("weights, way", "step, s", "lowest - highest", "forward and backward, s", "peak memory, MiB"))
    for name, runs in found.items():
        steps, passes, peaks = ([run[key] for run in runs] for key in ("step", "pass", "peak_mib"))
        spread = f"{min(steps):.2f} - {max(steps):.2f}"
        middle = [statistics.median(values) for values in (steps, passes, peaks)]
        print(row_of(name, f"{middle[0]:.2f}", spread, f"{middle[1]:.2f}", f"{middle[2]:,.0f}"))
    write_figures(arguments.json, {"arguments": vars(arguments), "runs": found})


if __name__ == "__main__":
    main(sys.argv[1:])
