"""From sources to the rows of one step: read, recognise, drop duplicates, split, hold out, tokenise, cache.

Rows are read twice as a stream: the first pass (selection.py) checks every row and decides which rows go where, the
second tokenises. What was made once is found in the cache by every rank, by the next run and after `preview`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from training.utils.arguments import DataArguments
from training.utils.data import cache, tokenise
from training.utils.data.formats.columns import parse_column_map
from training.utils.data.formats.conversations import Example
from training.utils.data.kinds import KINDS, Kind, shares_of
from training.utils.data.reading.sources import DATA_PATH
from training.utils.data.report import DataReport
from training.utils.data.selection import (
    DUPLICATE,
    HELD_OUT,
    SKIP,
    TRAIN,
    Candidate,
    Request,
    Stream,
    bad_row,
    candidates,
    decide,
    hold_out_of,
    progress,
    streams_of,
)
from training.utils.data.template import RowError, configure_chat_template, render_text
from training.utils.errors import UserError, printable
from training.utils.run.distributed import say
from training.utils.run.files import read_object
from training.utils.run.folders import STEPS, cache_dir

_BATCH = 512  # rows that are tokenised at once, and
_MOST_CHARACTERS = 4 << 20  # characters: the tokens of long rows take many times their size
_EARLIER_NAMES = {f"step{n}": kind for n, kind in enumerate(KINDS, 1)}  # in a data_split.json


@dataclass(frozen=True)
class StepData:
    """The rows of one step; the columns are those of `cache.SCHEMAS`, ``eval_paths`` are for a message."""

    train: datasets.Dataset
    held_out: datasets.Dataset
    report: DataReport
    eval_paths: tuple[str, ...] = ()

    def announce(self) -> None:
        """Say what was read, dropped and kept, before a program trains on it.

        Raises:
            UserError: no row is held out, so what is trained could not be judged.
        """
        say("\n".join(self.report.lines()))
        self.to_judge_by()

    def to_judge_by(self) -> datasets.Dataset:
        """The held-out rows.

        Raises:
            UserError: there is none.
        """
        if not len(self.held_out) and self.eval_paths:
            raise UserError(f"--eval_data_path {' '.join(self.eval_paths)}: no row of it is left to judge the model by")
        if not len(self.held_out):
            raise UserError("no row is held out to judge the model by (rows that begin with one question stay together)"
                            ": give more data, or --eval_data_path")  # fmt: skip
        return self.held_out


def prepare_data(
    kind: Kind,
    arguments: DataArguments,
    tokenizer: Any,
    *,
    max_length: int,
    max_prompt_length: int | None = None,
    seed: int,
    sft_only_data_path: Sequence[str] = (),
    train_on_prompts: bool = False,
    whole_rows: bool = False,
    hold_out: bool = True,
    run_dir: Path | None = None,
    flag: str = DATA_PATH,
) -> StepData:
    """The rows of one kind for one step, tokenised once and memory-mapped.

    Args:
        arguments: the data flags. The tokenizer's chat template is set from them, in place.
        max_length: the most tokens of a row.
        max_prompt_length: the most tokens of a row of prompts; default ``max_length``.
        seed: decides ``--data_split`` and which rows are held out.
        sft_only_data_path: further sources of demonstrations only, never divided.
        train_on_prompts: the mask of demonstrations is 1 everywhere.
        whole_rows: something reads the prompts' rows: a prompt that stands in two rows that differ is asked twice.
        hold_out: without ``--eval_data_path`` keep a source's eval split, or a tenth of its prompts, from training.
        run_dir: where ``--data_split`` records its row numbers.
        flag: that names the sources of ``arguments.data_path``, for messages.

    Raises:
        UserError: a source, a row (with file:line) or a flag is wrong, or no row is left.
    """
    configure_chat_template(tokenizer, **arguments.template)
    request = Request(
        kind=kind,
        streams=streams_of(kind, arguments, sft_only_data_path, hold_out, flag),
        column_map=parse_column_map(arguments.column_map),
        shares=shares_of(arguments.data_split),
        skip_bad_rows=arguments.on_bad_row == "skip",
        seed=seed,
        max_length=(max_prompt_length or max_length) if kind == "prompts" else max_length,
        train_on_prompts=train_on_prompts and kind == "demonstrations",
        whole_rows=whole_rows and kind == "prompts",
    )
    fingerprints = [stream.source.fingerprint() for stream in request.streams]
    folder, ready = cache.cached(
        Path(arguments.data_output_path).expanduser() if arguments.data_output_path else cache_dir() / "data",
        _key(request, tokenizer, fingerprints),
        functools.partial(_build_unchanged, request, tokenizer, fingerprints),
    )
    datasets.disable_progress_bars()
    train, held_out, report = _read(folder)
    report.from_cache = ready
    if "bad row" in report.dropped and not request.skip_bad_rows:  # made by a run that was allowed to skip
        raise UserError(f"{report.dropped['bad row'].places[0]} (--on_bad_row skip leaves such rows out)")
    if run_dir is not None and request.shares:
        _record_split(folder / "data_split.json", run_dir)
    return StepData(train, held_out, report, tuple(arguments.eval_data_path))


def _read(folder: Path) -> tuple[datasets.Dataset, datasets.Dataset, DataReport]:
    """What `_build` has written: the rows to train on, those held out, and the report."""
    try:
        train, held_out = (datasets.Dataset.from_file(str(folder / f"{part}.arrow")) for part in ("train", "held_out"))
        return train, held_out, DataReport.from_dict(json.loads((folder / "report.json").read_text(encoding="utf-8")))
    except ValueError as error:  # of JSON and of Arrow
        raise UserError(f"the prepared rows in {folder} are damaged ({error}): delete that folder") from error


def prepare_pretraining(
    paths: Sequence[str], arguments: DataArguments, tokenizer: Any, *, max_length: int, seed: int
) -> StepData:
    """The pre-training mix of step 3: rows as step 1's, trained on every token; long texts are cut in several rows.

    Args:
        paths: sources of plain text or of conversations.
        arguments: the data flags; those that divide or hold out rows do not apply here, nor does ``--column_map``,
            which names the columns of the prompts.

    Returns:
        All rows in ``train``; a source's own eval split is left alone.
    """
    whole = dataclasses.replace(arguments, data_path=list(paths), eval_data_path=[], data_split="", column_map=[])
    return prepare_data(
        "demonstrations",
        whole,
        tokenizer,
        max_length=max_length,
        seed=seed,
        train_on_prompts=True,
        hold_out=False,
        flag="--unsupervised_data_path",
    )


def _key(request: Request, tokenizer: Any, fingerprints: Sequence[str]) -> str:
    """A folder's name for the rows, from everything that they are made from."""
    probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    parts = {
        "code": cache.code_version(),
        "tokenizer": cache.tokenizer_version(tokenizer),
        "rendering": render_text(tokenizer, probe),  # some templates write today's date
        "kind": request.kind,
        "sources": [
            (s.name, fingerprint, s.eval_split, s.use, s.divided)
            for s, fingerprint in zip(request.streams, fingerprints, strict=True)
        ],
        "column_map": request.column_map.pairs,
        "shares": request.shares,
        "seed": request.seed,
        "max_length": request.max_length,
        "train_on_prompts": request.train_on_prompts,
        "whole_rows": request.whole_rows,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _build_unchanged(request: Request, tokenizer: Any, fingerprints: Sequence[str], folder: Path) -> None:
    """`_build`, and a clear error if a file was edited between its fingerprint and the last of the two passes."""
    try:
        _build(request, tokenizer, folder)
    except Exception:
        _check_unchanged(request, fingerprints)
        raise
    _check_unchanged(request, fingerprints)


def _check_unchanged(request: Request, fingerprints: Sequence[str]) -> None:
    for stream, before in zip(request.streams, fingerprints, strict=True):
        if stream.source.fingerprint() != before:
            named = f"{stream.source.flag} {stream.source.name}"
            raise UserError(f"{named}: the file changed while it was read; run again when it is complete")


def _build(request: Request, tokenizer: Any, folder: Path) -> None:
    """Fill a cache folder: train.arrow, held_out.arrow, report.json, and data_split.json where rows are divided."""
    report = DataReport(kind=request.kind)
    recorded = decide(request, tokenizer, report)
    if request.shares:
        record = {"seed": request.seed, "shares": request.shares, "rows": recorded}
        (folder / "data_split.json").write_text(json.dumps(record), encoding="utf-8")
    decided = dataclasses.asdict(report)
    fitting = _write(request, tokenizer, folder, report)
    could_train = [(s, (s.decisions == TRAIN) & fits) for s, fits in zip(request.streams, fitting, strict=True)]
    if not report.held_out_rows and hold_out_of(could_train):
        # Of a few rows those held out may all be too long: hold another prompt out, of those that fit
        report = DataReport.from_dict(decided)
        _write(request, tokenizer, folder, report)
    if not report.train_rows:
        read = sum(source.read for source in report.sources.values())
        why = [f"{drop.count} {reason}" for reason, drop in report.dropped.items()]
        others = sum(source.other_steps for source in report.sources.values())
        why += [f"--data_split leaves {others} to the other steps"] if others else []
        because = f"; {'; '.join(why)}" if why else ""
        raise UserError(f"{_named(request)}: no {request.kind} to train on are left: {read} rows read{because}")
    (folder / "report.json").write_text(json.dumps(dataclasses.asdict(report)), encoding="utf-8")


def _named(request: Request) -> str:
    """The sources that are trained on, each flag before its own."""
    found: dict[str, list[str]] = {}
    for stream in request.streams:
        if stream.use != "held_out":
            found.setdefault(stream.source.flag, []).append(stream.name)
    return ", ".join(f"{flag} {' '.join(names)}" for flag, names in found.items())


def _write(request: Request, tokenizer: Any, folder: Path, report: DataReport) -> list[np.ndarray]:
    """Tokenise all rows into train.arrow and held_out.arrow; for every example of each stream whether it became one."""
    writers = {
        TRAIN: cache.ArrowWriter(folder / "train.arrow", request.kind),
        HELD_OUT: cache.ArrowWriter(folder / "held_out.arrow", request.kind),
    }
    counts, prompts = {TRAIN: 0, HELD_OUT: 0}, {TRAIN: 0, HELD_OUT: 0}
    fitting = [np.zeros(len(stream.decisions), bool) for stream in request.streams]
    bar = progress(sum(len(stream.decisions) for stream in request.streams), "tokenising")
    for stream, fits in zip(request.streams, fitting, strict=True):
        for batch in _batches(stream, request, report):
            for number, rows in _tokenise(batch, stream, request, tokenizer, report):
                decision = stream.decisions[number]
                writers[decision].write(rows)
                counts[decision] += len(rows)
                prompts[decision] += "pairs" in rows[0]
                fits[number] = True
                report.tokens += sum(row["length"] for row in rows)
            bar.update(len(batch))
    bar.close()
    for writer in writers.values():
        writer.close()
    report.train_rows, report.held_out_rows = counts[TRAIN], counts[HELD_OUT]
    report.train_prompts, report.held_out_prompts = prompts[TRAIN], prompts[HELD_OUT]
    return fitting


def _batches(stream: Stream, request: Request, report: DataReport) -> Iterator[list[tuple[int, Candidate]]]:
    """The examples to tokenise, each with its number in the stream."""
    batch: list[tuple[int, Candidate]] = []
    characters = 0
    found = zip(stream.decisions.tolist(), candidates(stream, request, None), strict=True)
    for number, (decision, candidate) in enumerate(found):
        if decision == DUPLICATE:
            report.drop("exact duplicate", candidate.row.place)
        elif decision != SKIP:
            batch.append((number, candidate))
            characters += candidate.row.size
        if len(batch) == _BATCH or characters >= _MOST_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _tokenise(
    batch: list[tuple[int, Candidate]], stream: Stream, request: Request, tokenizer: Any, report: DataReport
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    examples = [candidate.example for _, candidate in batch]
    results = _rows(examples, request, tokenizer, report)
    for (number, candidate), result in zip(batch, results, strict=True):
        if isinstance(result, RowError):
            bad_row(result, candidate.row.place, stream, request, report, report.sources[stream.name])
        elif isinstance(result, str):
            report.drop(result, candidate.row.place)
        else:
            more = {"source": stream.source.name}
            if request.kind == "pairs":
                _compare_lengths(candidate.example, report)
                values = candidate.row.values
                wrong = values.get("rejected_kind") if isinstance(values, dict) else ""
                # What is wrong with the rejected answer, a name for analysis: see `accuracy_by_kind` of step 2
                more["rejected_kind"] = printable(wrong) if isinstance(wrong, str) else ""
            if request.kind == "prompts":
                more["row"] = candidate.row.original()
            yield number, [{**row, **more} for row in result]


def _compare_lengths(example: Example, report: DataReport) -> None:
    lengths = [sum(len(turn["content"]) for turn in turns) for turns in example.compared()]
    report.most_answers = max(report.most_answers, len(lengths))
    report.tied_pairs += math.comb(len(lengths), 2) - len(example.pairs())
    for chosen, rejected in example.pairs():
        report.unequal_pairs += lengths[chosen] != lengths[rejected]
        report.longer_chosen += lengths[chosen] > lengths[rejected]


def _rows(
    examples: Sequence[Example], request: Request, tokenizer: Any, report: DataReport
) -> list[list[dict[str, Any]] | str | RowError]:
    """Tokenise all examples at once; one by one if the template refuses a conversation, to find out which."""
    arguments = (tokenizer, examples, request.max_length, report)
    try:
        if request.kind == "demonstrations":
            return [*tokenise.sft_rows(*arguments, request.train_on_prompts)]
        return [*(tokenise.pair_rows if request.kind == "pairs" else tokenise.prompt_rows)(*arguments)]
    except RowError as error:
        if len(examples) == 1:
            return [error]
        return [result for example in examples for result in _rows([example], request, tokenizer, report)]


def _record_split(made: Path, run_dir: Path) -> None:
    """Keep the row numbers of ``--data_split`` in the step's directory; the steps of one run must agree on them."""
    text = made.read_text(encoding="utf-8")
    steps = [run_dir.parent / step for step in STEPS] if run_dir.name in STEPS else []  # others may be other runs
    for other in [folder / "data_split.json" for folder in (run_dir, *steps)]:
        try:
            agree = not other.is_file() or _agree(json.loads(text), read_object(other))
        except (LookupError, TypeError, AttributeError) as error:
            raise UserError(f"{other} is damaged: it does not say how the data were divided") from error
        if not agree:
            raise UserError(
                f"{other} divides the same data differently, so the steps of this run would share rows; "
                "use the same --data_split, --seed and --column_map in all steps, or another --output_dir"
            )
    run_dir.mkdir(parents=True, exist_ok=True)
    scratch = run_dir / f"data_split.json.{os.getpid()}"
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, run_dir / "data_split.json")


def _agree(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether no row is of one kind by one record and of another kind by the other."""
    return not any(
        set(rows) & set(theirs)
        for source, kinds in one["rows"].items()
        for kind, rows in kinds.items()
        for other_kind, theirs in other["rows"].get(source, {}).items()
        if _EARLIER_NAMES.get(other_kind, other_kind) != kind
    )
