"""Rows of tens of thousands of tokens on two CPU ranks: whole, and divided between them; peak memory, processor time.

    OMP_NUM_THREADS=1 python benchmarks/long_rows.py                   # 32,768 tokens; about 10 minutes of two cores
    OMP_NUM_THREADS=1 python benchmarks/long_rows.py --tokens 8192 --json rows.json

Step 1 trains a small random Llama, with the embedded model's vocabulary, for one optimizer step of two rows: each rank
takes one, or both take both after each other. Memory is the most that a rank held in training, less what it held before
its first row; processor time is of all of the program.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import ROOT, TRIMMING, flags_of, head_of, json_lines, row_of, write_figures

from training.utils.run.files import new_file

STEP1 = ROOT / "training" / "step1_supervised_finetuning" / "main.py"
WAYS = {
    "whole": (),
    "whole, --gradient_checkpointing": ("--gradient_checkpointing",),
    "--sequence_parallel 2": ("--sequence_parallel", "2", "--gradient_accumulation_steps", "2"),
    "--sequence_parallel 2 --gradient_checkpointing": (
        *("--sequence_parallel", "2", "--gradient_accumulation_steps", "2"),
        "--gradient_checkpointing",
    ),
}


def make_inputs(folder: Path, tokens: int) -> None:
    """A random model of two layers, two training rows of ``tokens`` tokens and two held-out ones of a few."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    from training.utils.model.loading import resolve_model

    tokenizer = AutoTokenizer.from_pretrained(resolve_model("embedded"))
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=tokens, num_key_value_heads=4, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, words in (("train", tokens - 64), ("held_out", 8)):
        rows = [{"prompt": f"Count, number {i}.", "response": " one" * words} for i in range(2)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")


def measure(folder: Path, tokens: int, number: int, flags: tuple[str, ...]) -> dict[str, Any]:
    """Run step 1 in one way; returns GiB of a rank, processor seconds and the loss."""
    output = folder / f"run{number}"
    command = [
        *(sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", str(STEP1), "--dtype", "fp32"),
        *("--model_name_or_path", str(folder / "model"), "--output_dir", str(output), "--report_to", "none"),
        *("--data_path", str(folder / "train.jsonl"), "--eval_data_path", str(folder / "held_out.jsonl")),
        *("--max_seq_len", str(tokens), "--per_device_train_batch_size", "1", "--per_device_eval_batch_size", "1"),
        *("--save_every", "0", *flags),
    ]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | TRIMMING
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)}\n{(result.stdout + result.stderr)[-3000:]}")
    phases = json.loads((output / "summary.json").read_text())["phases"]
    step = next(record for record in json_lines(output / "metrics.jsonl") if "train/loss" in record)
    return {
        "GiB": phases["train"]["peak_gib"] - phases["load"]["peak_gib"],
        "seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "loss": step["train/loss"],
        "norm": step["train/grad_norm"],
    }


def main(argv: list[str]) -> int:
    """Print the table."""
    parser = flags_of(__doc__)
    parser.add_argument("--tokens", type=int, default=32_768, help="of a row")
    parser.add_argument("--json", type=new_file, default="", help="write the figures there too")
    arguments = parser.parse_args(argv)
    found = {}
    with tempfile.TemporaryDirectory() as name:
        make_inputs(Path(name), arguments.tokens)
        print(head_of(f"rows of {arguments.tokens:,} tokens", "GiB of a rank", "processor s", "loss", "gradient norm"))
        for number, (way, flags) in enumerate(WAYS.items()):
            found[way] = row = measure(Path(name), arguments.tokens, number, flags)
            figures = f"{row['GiB']:.2f}", f"{row['seconds']:.0f}", f"{row['loss']:.6f}", f"{row['norm']:.6f}"
            print(row_of(way, *figures), flush=True)
    write_figures(arguments.json, found)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
