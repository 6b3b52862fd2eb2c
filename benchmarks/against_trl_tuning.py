"""Steps 1 and 2 against TRL's `SFTTrainer` and `RewardTrainer`: ``--step 1`` and ``--step 2`` of against_trl.py.

Each trainer gets the same weights and the same rows as tokens (Tripod's own, with the mask of what trains), makes one
pass over them in optimizer steps of as many rows, and takes the order and the padding that it has: Tripod groups rows
of like length; TRL runs once with ``train_sampling_strategy="group_by_length"`` and, in step 1, once more with
``padding_free=True``. All weights train. The first optimizer step is not counted.

A step is over when its record is in metrics.jsonl; at that moment the process's own processor time is read.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from against_trl import ADAM_BETA2, ALWAYS, MAX_GRAD_NORM, run, versions_of
from common import ROOT, argv_of, head_of, json_lines, row_of, spread, write_figures

LEARNING_RATE, LONGEST, WAIT = 1e-5, 512, 0.02
PROGRAMS = {1: "step1_supervised_finetuning", 2: "step2_reward_model_finetuning"}
ROWS_OF = {1: "sft.jsonl", 2: "preferences.jsonl"}
UNIT = {1: "rows", 2: "pairs"}
TRL_WAYS = {1: ("group_by_length", "padding_free"), 2: ("group_by_length",)}
EQUAL = """
Equal: weights, rows, tokens and the mask of what trains, rows of an optimizer step, AdamW (fused, beta2 {beta2}, no
decay), constant learning rate {rate}, gradient norm {norm}, no gradient checkpointing, precision{centre}. In bf16 TRL
keeps fp32 weights and casts them in each forward (its default), Tripod keeps bf16 weights and fp32 masters. Not equal:
which rows are in a step together, and how they are padded: each trainer's own.
"""


def measured(command: Sequence[str], threads: int, folder: Path) -> dict[str, Any]:
    """Run a program that writes metrics.jsonl into ``folder``; exits with its log's end if it fails.

    Returns:
        ``peak`` resident memory in GiB; ``marks``: (wall, processor) seconds at each optimizer step's record; the
        ``records`` themselves.
    """
    file = folder / "metrics.jsonl"
    marks: list[tuple[float, float]] = []

    def look(pid: int) -> None:
        """Note the time for each optimizer step whose record has come since the last look."""
        done = file.read_text().count('"train/loss"') if file.is_file() else 0
        marks.extend([(time.perf_counter(), processor_seconds(pid))] * (done - len(marks)))

    peak = run(command, threads, folder.with_suffix(".log"), WAIT, look)
    records = [record for record in json_lines(file) if "train/loss" in record]
    return {"peak": peak, "marks": marks, "records": records}


def processor_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def figures(run: dict[str, Any], tokens: Sequence[int], batch: int) -> dict[str, float]:
    """Seconds, tokens and rows of all optimizer steps but the first; tokens without padding."""
    (wall, processor), (ended, spent) = run["marks"][0], run["marks"][-1]
    rows = batch * (len(tokens) - 1)
    return {"wall": ended - wall, "processor": spent - processor, "tokens": sum(tokens[1:]), "rows": rows,
            "peak": run["peak"], "first_loss": run["records"][0]["train/loss"]}  # fmt: skip


def tripod(arguments: argparse.Namespace, model: str, data: str, folder: Path, seed: int) -> dict[str, Any]:
    """One run of the step's program; returns `figures`, and ``dataset``: what it trained on, as tokens."""
    from training.utils.arguments import DataArguments
    from training.utils.data.batches import element_lengths, epoch_batches
    from training.utils.data.prepare import prepare_data
    from training.utils.model.tokenizer import load_tokenizer

    cache = folder.parent.parent / "data"
    flags = {
        "model_name_or_path": model,
        "data_path": data,
        "eval_data_path": "demo:4",  # it always judges some before and after, which is not counted
        "data_output_path": cache,
        "output_dir": folder,
        "max_seq_len": LONGEST,
        "per_device_train_batch_size": arguments.batch,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "dtype": arguments.dtype,
        "seed": seed,
        "report_to": "none",
    }
    program = ROOT / "training" / PROGRAMS[arguments.step] / "main.py"
    command = [sys.executable, str(program), *argv_of(flags)]
    folder.mkdir()
    run = measured(command, arguments.threads, folder)
    asked = DataArguments(data_path=[data], eval_data_path=["demo:4"], data_output_path=str(cache))
    kind: Any = {1: "demonstrations", 2: "pairs"}[arguments.step]
    dataset = prepare_data(kind, asked, load_tokenizer(model), max_length=LONGEST, seed=seed).train
    names = ("input_ids",) if arguments.step == 1 else ("chosen_ids", "rejected_ids")
    tokens = [
        sum(len(dataset[i][name]) for i in step for name in names)
        for step in epoch_batches(element_lengths(dataset), arguments.batch, seed, 0)
    ]
    return figures(run, tokens, arguments.batch) | {"dataset": dataset}


def trl(arguments: argparse.Namespace, model: str, way: str, dataset: Any, folder: Path, seed: int) -> dict[str, Any]:
    """One run of TRL on these rows; returns `figures`."""
    folder.mkdir()
    if arguments.step == 1:
        rows = [
            {
                "input_ids": row["input_ids"],
                "labels": [t if m else -100 for t, m in zip(row["input_ids"], row["response_mask"], strict=True)],
            }
            for row in dataset
        ]
    else:
        rows = [
            {"chosen_ids": r["chosen_ids"], "rejected_ids": r["rejected_ids"], "length": r["length"]} for r in dataset
        ]
    settings = {"step": arguments.step, "model": model, "folder": str(folder), "rows": rows, "way": way, "seed": seed,
                "batch": arguments.batch, "bf16": arguments.dtype == "bf16"}  # fmt: skip
    (folder / "settings.json").write_text(json.dumps(settings))
    command = [arguments.trl_python, str(Path(__file__).with_name("against_trl.py")), "--child"]
    run = measured([*command, str(folder / "settings.json")], arguments.threads, folder)
    found = figures(run, [record["tokens"] for record in run["records"]], arguments.batch)
    return found | {"version": (folder / "version").read_text()}


def train_with_trl(settings: dict[str, Any]) -> None:
    """One run of TRL, in its own process and environment; leaves metrics.jsonl in the run's folder."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

    folder, seen = Path(settings["folder"]), {"tokens": 0, "loss": 0.0}
    (folder / "version").write_text(importlib.metadata.version("trl"))

    class Recorder(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            with (folder / "metrics.jsonl").open("a") as file:
                record = {"step": state.global_step, "train/loss": seen["loss"], "tokens": seen["tokens"]}
                file.write(json.dumps(record) + "\n")

    common: dict[str, Any] = {
        **ALWAYS,
        "output_dir": settings["folder"],
        "bf16": settings["bf16"],
        "model_init_kwargs": {"dtype": "float32"},
        "per_device_train_batch_size": settings["batch"],
        "num_train_epochs": 1,
        "learning_rate": LEARNING_RATE,
        "seed": settings["seed"],
        "logging_steps": 10_000,
        "max_length": LONGEST,
    }
    if settings["way"] == "group_by_length":
        common["train_sampling_strategy"] = "group_by_length"
    else:
        common |= {"padding_free": True, "max_length": None}
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    made: dict[str, Any] = {"train_dataset": Dataset.from_list(settings["rows"]), "processing_class": tokenizer}
    made["callbacks"] = [Recorder()]
    if settings["step"] == 1:
        trainer = SFTTrainer(settings["model"], SFTConfig(**common), **made)
    else:
        common |= {"center_rewards_coefficient": 0.01, "remove_unused_columns": False}
        trainer = RewardTrainer(settings["model"], RewardConfig(**common), **made)
    step = trainer.training_step

    def counted(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's own step, and how many tokens and what loss it had."""
        mask = inputs.get("attention_mask")
        seen["tokens"] = inputs["input_ids"].numel() if mask is None else int(mask.sum())
        loss = step(model, inputs, *args, **kwargs)
        seen["loss"] = loss.item()
        return loss

    trainer.training_step = counted
    trainer.train()


def table(step: int, rounds: Sequence[dict[str, dict[str, Any]]]) -> str:
    """Medians over the rounds as Markdown, and ratios within rounds: how many times as fast Tripod is."""
    compared = ("Tripod against it, wall", "the same, processor time", "memory")
    figures = ("tokens/s", f"{UNIT[step]}/s", "tokens per processor second", "peak memory, GiB")
    lines = [head_of("trainer", *figures, *compared)]
    for name in rounds[0]:
        runs = [round_[name] for round_ in rounds]
        cells = [name, f"{statistics.median(r['tokens'] / r['wall'] for r in runs):.0f}"]
        cells.append(f"{statistics.median(r['rows'] / r['wall'] for r in runs):.2f}")
        cells.append(f"{statistics.median(r['tokens'] / r['processor'] for r in runs):.0f}")
        cells.append(f"{max(r['peak'] for r in runs):.2f}")
        for clock in ("wall", "processor"):
            ratios = [
                (own["tokens"] / own[clock]) / (other["tokens"] / other[clock])
                for own, other in zip((next(iter(r.values())) for r in rounds), runs, strict=True)
            ]
            cells.append(spread(ratios, unit="x"))
        own_peak = max(next(iter(r.values()))["peak"] for r in rounds)
        cells.append(f"{own_peak / max(r['peak'] for r in runs):.2f}")
        lines.append(row_of(*cells))
    return "\n".join(lines)


def main(arguments: argparse.Namespace) -> int:
    """Run the rounds, print the table, and write the JSON file if asked to."""
    from training.utils.model.loading import EMBEDDED, resolve_model

    model = resolve_model(str(arguments.sft or EMBEDDED))
    data = arguments.data or f"{ROOT / 'training' / 'data' / 'demo' / ROWS_OF[arguments.step]}:{arguments.rows}"
    rounds: list[dict[str, dict[str, Any]]] = []
    with tempfile.TemporaryDirectory() as work:
        for number in range(arguments.rounds):
            folder, seed = Path(work) / f"round-{number + 1}", arguments.seed + number
            folder.mkdir()
            own = tripod(arguments, model, data, folder / "tripod", seed)
            dataset, runs = own.pop("dataset"), {"Tripod": own}
            for way in TRL_WAYS[arguments.step]:
                runs[f"TRL, {way}"] = trl(arguments, model, way, dataset, folder / way, seed)
            rounds.append(runs)
            for name, run in runs.items():
                print(f"{folder.name}: {name}: {json.dumps(run)}", file=sys.stderr, flush=True)
    versions = versions_of(rounds)
    head = (
        f"{', '.join(versions)}; {arguments.threads} threads, {arguments.dtype}. Step {arguments.step}, {data}, "
        f"{arguments.batch} {UNIT[arguments.step]} in an optimizer step, one pass, {arguments.rounds} rounds, trainers "
        "in turn; tokens without padding."
    )
    centre = ", coefficient 0.01 on the rewards' sum" if arguments.step == 2 else ""
    facts = {"beta2": ADAM_BETA2, "rate": LEARNING_RATE, "norm": MAX_GRAD_NORM, "centre": centre}
    print(f"{head}\n\n{table(arguments.step, rounds)}\n\n{EQUAL.format(**facts)}", end="")
    write_figures(arguments.json, {"arguments": vars(arguments), "versions": versions, "rounds": rounds})
    return 0
