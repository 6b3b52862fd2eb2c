"""What step 3 saves by forwarding once what answers have in common, and no column that is padding in every row.

    python benchmarks/shared_answers.py                     the embedded model, the demo's prompts and sampling settings
    python benchmarks/shared_answers.py --samples_per_prompt 1 --threads 1

Answers prompts by ``fast``, divides each generation batch into micro-batches as the update does, and prints the tokens
that go through the model, padding counted, and the processor time of a forward and backward of the answers' log-probs,
the ways in turn on the same micro-batches.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from common import flags_of, head_of, row_of, spread

from training.utils.run.runtime import prepare_runtime

prepare_runtime()

import torch  # noqa: E402

from training.step3_rlhf_finetuning import prompts  # noqa: E402
from training.utils.arguments import DataArguments  # noqa: E402
from training.utils.data.batches import spread_rows  # noqa: E402
from training.utils.data.prepare import prepare_data  # noqa: E402
from training.utils.data.template import stop_token_ids  # noqa: E402
from training.utils.generation import rollouts  # noqa: E402
from training.utils.generation.engines import rollout_backend  # noqa: E402
from training.utils.generation.sampling import SamplingConfig  # noqa: E402
from training.utils.model.forward import response_log_probs  # noqa: E402
from training.utils.model.loading import load_causal_lm, resolve_model  # noqa: E402
from training.utils.model.tokenizer import load_tokenizer  # noqa: E402
from training.utils.sharing.rows import Sharing  # noqa: E402

Piece = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # ids and attention mask [B, T], response mask [B, R]
WAYS = ("all columns", "columns with a token", "answers behind their prompt", "all behind what they begin with")


def answered(model: Any, path: str, arguments: argparse.Namespace) -> list[rollouts.RolloutBatch]:
    """Answers to prompts of the demo, spread over the file."""
    tokenizer, samples = load_tokenizer(path), arguments.samples_per_prompt
    with tempfile.TemporaryDirectory() as scratch:
        data = DataArguments(data_path=["demo"], data_output_path=scratch)
        rows = prepare_data("prompts", data, tokenizer, max_length=304, max_prompt_length=256, seed=1).train
    prompt_set = prompts.PromptSet(rows, tokenizer, tuple(stop_token_ids(tokenizer)), 1)
    chosen = spread_rows(len(rows), arguments.batches * arguments.rows // samples)
    per_batch, found = arguments.rows // samples, []
    for number in range(arguments.batches):
        mine = [row for row in chosen[number * per_batch : (number + 1) * per_batch] for _ in range(samples)]
        request = prompt_set.request(mine, torch.device("cpu"), iteration=number, row_ids=list(range(len(mine))))
        found.append(rollout_backend("fast").generate(model, request, SamplingConfig(48, temperature=0.7)))
    return found


def ways(model: Any, sharing: Sharing) -> dict[str, tuple[Callable[[Piece], torch.Tensor], Callable[[Piece], int]]]:
    """By name: the log-probs of a micro-batch, and the tokens that go through the model for them."""

    def whole(piece: Piece) -> torch.Tensor:
        """As the rollout has them."""
        ids, attention_mask, mask = piece
        return response_log_probs(model, ids, attention_mask, rollouts.full_response_mask(mask, ids.shape[1]))[0]

    def tokens(piece: Piece, kind: Sharing | None) -> int:
        """Of rows as `rollouts.seen` gives them."""
        rows = rollouts.seen(*piece, kind)
        return (rows.ids if rows.shared is None else rows.shared["shared_ids"]).numel()

    def trimmed(kind: Sharing | None) -> tuple[Callable[[Piece], torch.Tensor], Callable[[Piece], int]]:
        """As step 3 forwards rows."""

        def log_probs(piece: Piece) -> torch.Tensor:
            """Of the micro-batch's answers."""
            ids, attention_mask, mask = piece
            return rollouts.rollout_log_probs(model, ids, attention_mask, mask, 1.0, sharing=kind)[0]

        return log_probs, lambda piece: tokens(piece, kind)

    by_seen = [trimmed(None), trimmed(sharing), trimmed(replace(sharing, across=True))]
    return dict(zip(WAYS, [(whole, lambda piece: piece[0].numel()), *by_seen], strict=True))


def seconds(model: Any, log_probs: Callable[[Piece], torch.Tensor], piece: Piece) -> float:
    """Processor time of a forward and backward."""
    start = time.process_time()
    log_probs(piece).sum().backward()
    taken = time.process_time() - start
    model.zero_grad()
    return taken


def main(argv: Sequence[str]) -> None:
    """Parse flags, print the table."""
    parser = flags_of(__doc__)
    parser.add_argument("--model_name_or_path", default="embedded")
    parser.add_argument("--samples_per_prompt", type=int, default=4)
    parser.add_argument("--rows", type=int, default=24, help="of a generation batch")
    parser.add_argument("--micro_batch", type=int, default=12)
    parser.add_argument("--batches", type=int, default=2, help="generation batches")
    parser.add_argument("--rounds", type=int, default=3, help="times that each is done, all ways in turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="fp32")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    path = resolve_model(arguments.model_name_or_path)
    model = load_causal_lm(path, dtype=arguments.dtype).eval()
    batches = answered(model, path, arguments)
    sharing = Sharing(8192, model.config.get_text_config().hidden_size)
    pieces = [
        (batch.input_ids[piece], batch.attention_mask[piece], batch.response_mask[piece])
        for batch in batches
        for piece in rollouts.row_slices(arguments.micro_batch, len(batch.input_ids))
    ]
    real = sum(int(piece[1].sum()) for piece in pieces)
    all_ways = ways(model, sharing)
    times: dict[str, list[float]] = {name: [] for name in all_ways}
    for _ in range(arguments.rounds):
        for name, (log_probs, _) in all_ways.items():
            times[name].append(sum(seconds(model, log_probs, piece) for piece in pieces))
    first = times[WAYS[0]]
    print(f"tokens that are no padding, a row for each answer: {real}\n")
    print(head_of("forwarded", "tokens", "processor s", "times as fast"))
    for name, (_, tokens) in all_ways.items():
        ratios = [a / b for a, b in zip(first, times[name], strict=True)]
        print(row_of(name, sum(map(tokens, pieces)), f"{statistics.median(times[name]):.1f}", spread(ratios)))


if __name__ == "__main__":
    main(sys.argv[1:])
