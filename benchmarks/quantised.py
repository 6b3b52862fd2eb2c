"""What quantisation costs: memory, perplexity and decoding time of a chat model in bf16, int8 and int4, side by side.

    python benchmarks/quantised.py --path output/latest/step3/actor

Loads the model exactly as the chat programs do (``--quantize``). Perplexity is over the response tokens of the demo's
held-out rows, end tokens included. Decoding time is CPU time on a CPU, relative to bf16 in the same run.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence

import torch
from common import ROOT, flags_of, head_of, json_lines, row_of

sys.path.insert(0, str(ROOT / "inference"))

from chat_models import ChatModel, LoadArguments, load_chat_models

from training.utils.data.chat import render
from training.utils.errors import UserError, run_program
from training.utils.run.folders import latest_output

HELD_OUT = ROOT / "training" / "data" / "demo" / "held_out.jsonl"
PRECISIONS = {"bf16": ("bf16", "none"), "int8": ("bf16", "int8"), "int4": ("bf16", "int4")}
DECODED, REPEATS = 32, 3


@torch.inference_mode()
def perplexity(model: ChatModel, rows: list[dict]) -> float:
    """exp of the mean negative log-likelihood of all response tokens, in fp32; one row at a time, so no padding."""
    total, count = 0.0, 0
    for row in rows:
        rendered = render(model.tokenizer, [*row["prompt"], {"role": "assistant", "content": row["response"]}])
        ids = torch.tensor([rendered.input_ids], device=model.device)
        mask = torch.tensor(rendered.response_mask[1:], dtype=torch.bool, device=model.device)
        logits = model.weights.model(input_ids=ids).logits[0, :-1][mask].float()
        total += torch.nn.functional.cross_entropy(logits, ids[0, 1:][mask], reduction="sum").item()
        count += int(mask.sum())
    return math.exp(total / count)


@torch.inference_mode()
def decoding_seconds(model: ChatModel, row: dict) -> float:
    """Seconds per token of greedy decoding with a cache, the best of a few repeats; CPU time unless on a GPU."""
    clock = time.process_time if model.device.type == "cpu" else time.perf_counter
    prompt = torch.tensor([render(model.tokenizer, row["prompt"], add_generation_prompt=True).input_ids])
    best = math.inf
    for _ in range(REPEATS):
        output = model.weights.model(input_ids=prompt.to(model.device), use_cache=True)
        start = clock()
        for _ in range(DECODED):
            token = output.logits[:, -1:].argmax(-1)
            output = model.weights.model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        token.cpu()  # waits for a GPU
        best = min(best, (clock() - start) / DECODED)
    return best


def main(argv: Sequence[str]) -> int:
    """Measure one precision after another and print the table."""
    parser = flags_of(__doc__)
    parser.add_argument("--path", default="", help="the chat model (default: step3/actor of the latest run)")
    parser.add_argument("--rows", type=int, default=0, help="held-out rows to read (default: all)")
    options = parser.parse_args(argv)
    path = options.path or str(latest_output("step3") / "actor")
    rows = json_lines(HELD_OUT)[: options.rows or None]
    if not rows:
        raise UserError("--rows must be above 0")
    lines, first = [], None
    for name, (dtype, quantize) in PRECISIONS.items():
        [model] = load_chat_models({name: path}, LoadArguments(dtype=dtype, quantize=quantize), print)
        size = model.weights.model.get_memory_footprint() / 2**20
        found, seconds = perplexity(model, rows), decoding_seconds(model, rows[0])
        first = first or (size, found, seconds)
        cells = [name, f"{size:,.1f}", f"{size / first[0]:.2f}", f"{found:.3f}", f"{found / first[1] - 1:+.2%}"]
        lines.append(row_of(*cells, f"{seconds / first[2]:.2f}"))
        print(lines[-1], flush=True)
        del model
    names = ("precision", "weights, MiB", "of bf16", "perplexity", "against bf16", "decoding time of bf16's")
    print("\n".join(["", head_of(*names), *lines]))
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
