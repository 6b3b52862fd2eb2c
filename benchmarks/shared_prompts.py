"""What step 2 and DPO save by forwarding the common beginning of a pair's answers once.

    python benchmarks/shared_prompts.py                                  the demo's pairs
    python benchmarks/shared_prompts.py --data_path demo:400 pairs.jsonl:800 --tokens_only

Prints the tokens that go through the model, padding counted, as a share of what a row for each answer takes; then the
processor time of forward and backward of step 2's loss both ways, in turn, on the same micro-batches.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from training.utils.model.forward import TokenScorer  # noqa: E402
from training.utils.run.runtime import prepare_runtime  # noqa: E402

prepare_runtime()

import torch  # noqa: E402

from training.step2_reward_model_finetuning.pairs import score_pairs  # noqa: E402
from training.step2_reward_model_finetuning.preference import bradley_terry_loss  # noqa: E402
from training.utils.arguments import DataArguments  # noqa: E402
from training.utils.data import (  # noqa: E402
    collate_pairs,
    element_lengths,
    epoch_batches,
    prepare_data,
    rankings_of,
    spread_rows,
)
from training.utils.model import classifiers  # noqa: E402
from training.utils.model.loading import resolve_model  # noqa: E402
from training.utils.model.tokenizer import load_tokenizer  # noqa: E402
from training.utils.sharing.rows import Sharing  # noqa: E402

SIZES = (4, 8, 16)  # pairs in a micro-batch


def micro_batches(rows: Any, size: int) -> list[list[Any]]:
    """The pairs of each micro-batch of an epoch on one rank."""
    rankings = rankings_of(rows)
    return [
        [rows[row] for i in batch for row in rankings[i]] for batch in epoch_batches(element_lengths(rows), size, 1, 0)
    ]


def forwarded(batch: dict[str, torch.Tensor]) -> int:
    """Tokens of a batch that go through the model, padding counted."""
    return batch.get("shared_ids", batch["input_ids"]).numel()


def token_share(rows: Any, size: int, pad_id: int, sharing: Sharing) -> float:
    """Tokens with shared beginnings, as a share of those without, over an epoch."""
    shared = separate = 0
    for pairs in micro_batches(rows, size):
        shared += forwarded(collate_pairs(pairs, pad_id, sharing))
        separate += forwarded(collate_pairs(pairs, pad_id))
    return shared / separate


def seconds(model: Any, batch: dict[str, torch.Tensor]) -> float:
    """Processor time of a forward and backward."""
    start = time.process_time()
    bradley_terry_loss(*score_pairs(model, batch), "log_sig").sum().backward()
    taken = time.process_time() - start
    model.zero_grad()
    return taken


def speed(model: Any, rows: Any, arguments: argparse.Namespace, pad_id: int, sharing: Sharing) -> list[float]:
    """How many times as fast shared rows are, for some micro-batches spread over the lengths."""
    batches = sorted(micro_batches(rows, SIZES[0]), key=lambda pairs: max(len(row["chosen_ids"]) for row in pairs))
    found = []
    for at in spread_rows(len(batches), arguments.batches):
        both = [collate_pairs(batches[at], pad_id, kind) for kind in (None, sharing)]
        taken: list[list[float]] = [[], []]
        for _ in range(arguments.rounds):
            for times, batch in zip(taken, both, strict=True):
                times.append(seconds(model, batch))
        found.append(statistics.median(taken[0]) / statistics.median(taken[1]))
    return found


def main(argv: Sequence[str]) -> None:
    """Parse flags, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default="embedded")
    parser.add_argument("--data_path", nargs="+", default=["demo:400"])
    parser.add_argument("--max_seq_len", type=int, default=512)
    parser.add_argument("--batches", type=int, default=4, help=f"micro-batches of {SIZES[0]} pairs that are timed")
    parser.add_argument("--rounds", type=int, default=3, help="times that each is, both ways in turn")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens_only", action="store_true", help="time nothing")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    path = resolve_model(arguments.model_name_or_path)
    tokenizer = load_tokenizer(path)
    pad_id = tokenizer.pad_token_id
    kind: dict[str, Any] = {"dtype": "fp32", "pad_token_id": pad_id, "fresh_head_seed": 1}
    model: Any = TokenScorer(classifiers.load_classifier(path, **kind)).train()
    sharing = Sharing(8192, model.config.get_text_config().hidden_size)
    sizes = " | ".join(f"{size} in a micro-batch" for size in SIZES)
    print(f"| pairs | {sizes} | times as fast, fp32, {arguments.threads} thread |\n|---|{'---|' * len(SIZES)}---|")
    with tempfile.TemporaryDirectory() as scratch:
        for source in arguments.data_path:
            data = DataArguments(data_path=[source], data_output_path=scratch)
            rows = prepare_data("pairs", data, tokenizer, max_length=arguments.max_seq_len, seed=1).train
            shares = " | ".join(f"{token_share(rows, size, pad_id, sharing):.0%}" for size in SIZES)
            told = ""
            if not arguments.tokens_only:
                times = speed(model, rows, arguments, pad_id, sharing)
                told = f"{statistics.median(times):.2f} ({min(times):.2f} - {max(times):.2f})"
            print(f"| {source} | {shares} | {told} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
