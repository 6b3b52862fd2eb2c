"""What steps 1 and 2 and DPO save by forwarding once what rows have in common at their beginning.

    python benchmarks/shared_prompts.py                             the demo's demonstrations and pairs
    python benchmarks/shared_prompts.py --demonstrations --pairs demo:400 pairs.jsonl:800 --tokens_only

"Behind their prompt" are the answers of a pair, "across prompts" all rows of a micro-batch behind what they begin with,
such as a system prompt. Prints the tokens that go through the model, padding counted, as a share of what a row for each
answer takes; then how many times as fast a forward and backward is, by processor time, the ways in turn on the same
micro-batches.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from common import flags_of, head_of, row_of, spread

from training.utils.model.forward import TokenScorer
from training.utils.run.runtime import prepare_runtime

prepare_runtime()

import torch  # noqa: E402

from training.step2_reward_model_finetuning.pairs import score_pairs  # noqa: E402
from training.step2_reward_model_finetuning.preference import bradley_terry_loss  # noqa: E402
from training.utils.arguments import DataArguments  # noqa: E402
from training.utils.data.batches import (  # noqa: E402
    collate_answers,
    collate_pairs,
    element_lengths,
    epoch_batches,
    rankings_of,
    spread_rows,
)
from training.utils.data.prepare import prepare_data  # noqa: E402
from training.utils.model import classifiers  # noqa: E402
from training.utils.model.language_modelling import negative_log_likelihood  # noqa: E402
from training.utils.model.loading import load_causal_lm, resolve_model  # noqa: E402
from training.utils.model.tokenizer import load_tokenizer  # noqa: E402
from training.utils.sharing.rows import Sharing  # noqa: E402

SIZES = (4, 8, 16)  # rows or pairs in a micro-batch
WAYS = ("behind their prompt", "across prompts")
DEMO = ("demo:400",)


def micro_batches(rows: Any, kind: str, size: int) -> list[list[Any]]:
    """The rows of each micro-batch of an epoch on one rank."""
    elements = rankings_of(rows) if kind == "pairs" else [[row] for row in range(len(rows))]
    batches = epoch_batches(element_lengths(rows), size, 1, 0)
    return [[rows[row] for i in batch for row in elements[i]] for batch in batches]


def collated(rows: Sequence[Any], kind: str, pad_id: int, sharing: Sharing | None) -> dict[str, torch.Tensor]:
    """A micro-batch, as the steps make it."""
    if kind == "pairs":
        return collate_pairs(rows, pad_id, sharing)
    return collate_answers(rows, [[i] for i in range(len(rows))], pad_id, sharing)


def token_share(batches: Sequence[Sequence[Any]], kind: str, pad_id: int, sharing: Sharing) -> float:
    """Tokens with shared beginnings, as a share of those without, over an epoch; padding counted."""
    shared = separate = 0
    for rows in batches:
        batch = collated(rows, kind, pad_id, sharing)
        shared += batch.get("shared_ids", batch["input_ids"]).numel()
        separate += batch["input_ids"].numel()
    return shared / separate


def seconds(model: Any, kind: str, batch: dict[str, torch.Tensor]) -> float:
    """Processor time of a forward and backward of the step's loss."""
    start = time.process_time()
    if kind == "pairs":
        bradley_terry_loss(*score_pairs(model, batch), "log_sig").sum().backward()
    else:
        negative_log_likelihood(model, batch).backward()
    taken = time.process_time() - start
    model.zero_grad()
    return taken


def speed(
    model: Any, batches: Sequence[Sequence[Any]], kind: str, rounds: int, pad_id: int, ways: Sequence[Sharing]
) -> list[list[float]]:
    """How many times as fast each way is than a row for each answer, for each micro-batch."""
    found: list[list[float]] = [[] for _ in ways]
    for rows in batches:
        made = [collated(rows, kind, pad_id, way) for way in (None, *ways)]
        taken: list[list[float]] = [[] for _ in made]
        for _ in range(rounds):
            for times, batch in zip(taken, made, strict=True):
                times.append(seconds(model, kind, batch))
        alone, *others = map(statistics.median, taken)
        for ratios, other in zip(found, others, strict=True):
            ratios.append(alone / other)
    return found


def main(argv: Sequence[str]) -> None:
    """Parse flags, print the table."""
    parser = flags_of(__doc__)
    parser.add_argument("--model_name_or_path", default="embedded")
    parser.add_argument("--demonstrations", nargs="*", default=DEMO, help="sources of step 1")
    parser.add_argument("--pairs", nargs="*", default=DEMO, help="sources of step 2")
    parser.add_argument("--max_seq_len", type=int, default=512)
    parser.add_argument("--batches", type=int, default=4, help="micro-batches of each size that are timed")
    parser.add_argument("--rounds", type=int, default=3, help="times that each is, all ways in turn")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="fp32")
    parser.add_argument("--tokens_only", action="store_true", help="time nothing")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    path = resolve_model(arguments.model_name_or_path)
    tokenizer = load_tokenizer(path)
    pad_id = tokenizer.pad_token_id
    print(head_of("rows", "in a micro-batch", *(name for way in WAYS for name in (f"tokens {way}", "times as fast"))))
    for kind in ("demonstrations", "pairs"):
        load: dict[str, Any] = {"dtype": arguments.dtype}
        if kind == "demonstrations":
            model: Any = load_causal_lm(path, **load).train()
        else:
            head = {"pad_token_id": pad_id, "fresh_head_seed": 1}
            model = TokenScorer(classifiers.load_classifier(path, **head, **load)).train()
        hidden = model.config.get_text_config().hidden_size
        ways = [Sharing(8192, hidden), Sharing(8192, hidden, across=True)]
        for source in getattr(arguments, kind):
            with tempfile.TemporaryDirectory() as scratch:
                data = DataArguments(data_path=[source], data_output_path=scratch)
                rows = prepare_data(kind, data, tokenizer, max_length=arguments.max_seq_len, seed=1).train
            for size in SIZES:
                batches = micro_batches(rows, kind, size)
                batches.sort(key=lambda rows: max(row["length"] for row in rows))
                timed = [batches[at] for at in spread_rows(len(batches), arguments.batches)]
                times = [[]] if arguments.tokens_only else speed(model, timed, kind, arguments.rounds, pad_id, ways)
                cells = []
                for way, ratios in zip(ways, times * (len(ways) // len(times)), strict=True):
                    told = spread(ratios) if ratios else ""
                    cells += [f"{token_share(batches, kind, pad_id, way):.0%}", told]
                print(row_of(f"{kind}, {source}", size, *cells), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
