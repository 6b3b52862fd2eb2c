"""Time and memory of log-probs and their backward, beside what PyTorch's autograd makes of the same formula.

    OMP_NUM_THREADS=1 python benchmarks/logprobs.py

One row, every position a response token, an output layer of width 64 to the embedded model's 49,152 tokens, fp32; ways
and lengths in turn, processor time. Memory is that of the tensors alive at once, as a multiple of the logits.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from common import flags_of, head_of, row_of, spread
from torch import nn

from training.utils.memory.live import LiveMemory
from training.utils.model.forward import response_log_probs

VOCABULARY, WIDTH = 49_152, 64


class OutputLayer(nn.Module):
    """A language model without layers: from tokens to logits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids: Any, attention_mask: Any, use_cache: bool, logits_to_keep: Any) -> SimpleNamespace:
        """Logits ``[1, len(logits_to_keep), V]``."""
        return SimpleNamespace(logits=self.head(self.embedding(input_ids)[:, logits_to_keep]))


def ours(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The log-probs that the steps train on."""
    mask = torch.ones_like(ids)
    return response_log_probs(model, ids, mask, mask)[0].sum()


def autograd(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The same by a log-softmax of all logits."""
    logits = model(ids, None, use_cache=False, logits_to_keep=slice(0, -1)).logits
    return torch.log_softmax(logits.float(), -1).gather(-1, ids[:, 1:, None]).sum()


WAYS: dict[str, Callable[[nn.Module, torch.Tensor], torch.Tensor]] = {"ours": ours, "autograd": autograd}


def measure(model: nn.Module, way: str, length: int) -> tuple[float, float]:
    """Milliseconds a token of a forward and of a backward."""
    ids = torch.arange(length + 1).unsqueeze(0)
    start = time.process_time()
    total = WAYS[way](model, ids)
    middle = time.process_time()
    total.backward()
    end = time.process_time()
    model.zero_grad()
    return 1000 * (middle - start) / length, 1000 * (end - middle) / length


def peak(model: nn.Module, way: str, length: int) -> float:
    """The most bytes of tensors alive at once beside the parameters and their gradients, in logits."""
    ids = torch.arange(length + 1).unsqueeze(0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    known = [tensor for p in model.parameters() for tensor in (p, p.grad) if tensor is not None]
    with LiveMemory(known) as memory:
        WAYS[way](model, ids).backward()
    model.zero_grad()
    return memory.peak / (length * VOCABULARY * torch.float32.itemsize)


def main(argv: Sequence[str]) -> None:
    """Parse flags, print the table."""
    parser = flags_of(__doc__)
    parser.add_argument("--positions", type=int, nargs="+", default=[256, 2048])
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args(argv)
    model = OutputLayer()
    found: dict[tuple[str, int], tuple[list[float], list[float]]] = {}
    for number in range(arguments.rounds + 1):
        for length in arguments.positions:
            for way in WAYS:
                times = measure(model, way, length)
                if number:  # the first of each brings its memory along
                    for kept, taken in zip(found.setdefault((way, length), ([], [])), times, strict=True):
                        kept.append(taken)
    print(head_of("way", "positions", "forward, ms a token", "backward, ms a token", "tensors alive, of the logits"))
    for (way, length), both in found.items():
        print(row_of(way, f"{length:,}", *map(spread, both), f"{peak(model, way, length):.2f}"))


if __name__ == "__main__":
    main(sys.argv[1:])
