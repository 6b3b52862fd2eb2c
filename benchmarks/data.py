"""How fast and how small the data layer is: tokenises a generated file in a process of its own.

    python benchmarks/data.py --rows 1000000

Prints rows per second of the first run (both passes: reading, recognising, tokenising, writing) and of the second (from
the cache), peak resident memory above what the imports alone need and in all, the size of file and cache, and the share
of padding tokens at one batch size, grouped by length and in random order. Exits with 1 if the peak is over 2 GiB.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import flags_of

MOST_MIB = 2048  # what docs/data.md promises for a million rows
_TEXT = (
    "the of a to in is you that it he was for on are as with his they at be this have from or one had by word but not "
    "what all were we when your can said there use an each which she do how their if will up other about out many then "
    "them these so some her would make like him into time has look two more write go see number no way could people"
)


def generate(path: Path, rows: int, seed: int = 0) -> None:
    """Write ``rows`` instruction rows of 8 to 200 words, about as alpaca's lengths are spread."""
    chance, words = random.Random(seed), _TEXT.split()
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            ask = " ".join(chance.choices(words, k=chance.randint(4, 30)))
            answer = " ".join(chance.choices(words, k=min(170, 4 + int(chance.expovariate(1 / 40)))))
            file.write(json.dumps({"instruction": f"{number}: {ask}?", "output": answer}) + "\n")


def peak_mib() -> float:
    """The most resident memory that this process ever had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def prepare_model(model: str) -> None:
    """Unpack the embedded model, which takes more memory than all that is measured, in a process of its own."""
    from training.utils.model.loading import resolve_model

    resolve_model(model)


def measure(path: Path, cache: Path, model: str, batch_size: int, results: Any) -> None:
    """Prepare the file twice and send the figures; runs in its own process, for its own peak memory."""
    from training.utils.arguments import DataArguments
    from training.utils.data.batches import epoch_batches, padding_share
    from training.utils.data.prepare import prepare_data
    from training.utils.model.loading import resolve_model
    from training.utils.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(resolve_model(model))
    figures: dict[str, float] = {"imports_mib": peak_mib()}
    arguments = DataArguments(data_path=[str(path)], data_output_path=str(cache))
    for name in ("first", "cached"):
        start = time.perf_counter()
        data = prepare_data("demonstrations", arguments, tokenizer, max_length=512, seed=1)
        figures[f"{name}_seconds"] = time.perf_counter() - start
        figures[f"{name}_peak_mib"] = peak_mib()
    lengths = data.train["length"][:]
    for name, grouped in (("grouped", True), ("random", False)):
        batches = epoch_batches(lengths, batch_size, 1, 0, group_by_length=grouped)
        figures[f"padding_{name}"] = padding_share(lengths, batches, batch_size)
    figures["tokens"] = data.report.tokens
    results.send(figures)


def main() -> int:
    """Generate, measure, print; 1 if more memory was needed than is promised."""
    parser = flags_of(__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the generated file (default: a million)")
    parser.add_argument("--batch_size", type=int, default=8, help="the batch size that the padding is told for")
    parser.add_argument("--model_name_or_path", default="embedded", help="whose tokenizer is used")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path, cache = Path(folder) / "rows.jsonl", Path(folder) / "cache"
        generate(path, args.rows)
        context = multiprocessing.get_context("spawn")
        ready = context.Process(target=prepare_model, args=(args.model_name_or_path,))
        ready.start()
        ready.join()
        ours, theirs = context.Pipe()
        process = context.Process(target=measure, args=(path, cache, args.model_name_or_path, args.batch_size, theirs))
        process.start()
        theirs.close()
        try:
            figures = ours.recv()
        except EOFError:
            sys.exit("the measured process failed, see above")
        process.join()
        cache_size = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
        sizes = (path.stat().st_size / 2**20, cache_size / 2**20)
    print(f"{args.rows} rows, {figures['tokens']:.0f} tokens, file {sizes[0]:.0f} MiB, cache {sizes[1]:.0f} MiB")
    print(f"first run:  {figures['first_seconds']:.1f} s, {args.rows / figures['first_seconds']:.0f} rows/s")
    print(f"from cache: {figures['cached_seconds']:.2f} s")
    above = figures["first_peak_mib"] - figures["imports_mib"]
    print(f"peak memory: {figures['first_peak_mib']:.0f} MiB, {above:.0f} MiB above the imports and the tokenizer")
    shares = f"{figures['padding_grouped']:.1%} grouped by length, {figures['padding_random']:.1%} in random order"
    print(f"padding in batches of {args.batch_size}: {shares}")
    if figures["first_peak_mib"] > MOST_MIB:
        print(f"the peak is over the {MOST_MIB} MiB that are promised")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
