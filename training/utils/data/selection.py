"""Which rows a step trains on and which it holds out, decided in one pass over all sources.

Only a few bytes of each row are kept, so a million rows fit in memory. Everything follows from the rows, the flags and
a seeded hash of how each prompt begins, so every rank and every machine decides alike without talking.
"""

from __future__ import annotations

import itertools
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from training.utils.arguments import DataArguments
from training.utils.data.division import duplicates, hash_of, hold_out, split_prompts
from training.utils.data.formats.columns import ColumnMap, UnknownFormat, convert
from training.utils.data.formats.conversations import Dropped, Example, beginning, demonstration, without_marks
from training.utils.data.kinds import KINDS, Kind
from training.utils.data.reading.rows import RawRow
from training.utils.data.reading.sources import Source, resolve
from training.utils.data.report import IGNORED, READ, REFUSED, DataReport, SourceReport
from training.utils.data.template import RowError, forbidden_texts
from training.utils.errors import UserError
from training.utils.run.phases import beat

SFT_ONLY = "--sft_only_data_path"
SKIP, TRAIN, HELD_OUT, DUPLICATE = 0, 1, 2, 3


@dataclass
class Stream:
    """One split of one source, and what its rows are for.

    Attributes:
        eval_split: read the source's own eval split.
        use: "train", "held_out", or "both" where a share of the rows is held out.
        divided: ``--data_split`` applies.
        decisions: SKIP, TRAIN, HELD_OUT or DUPLICATE for every example, once `decide` has run.
        prompts: a seeded hash of how every example's prompt begins, as long.
    """

    source: Source
    eval_split: bool
    use: str
    divided: bool = False
    decisions: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))
    prompts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))

    @property
    def name(self) -> str:
        """The source's name for reports."""
        return f"{self.source.name} (eval)" if self.use == "held_out" else self.source.name


@dataclass
class Request:
    """What decides the rows, resolved and checked; ``max_length`` is the step's own (of prompts: of a prompt)."""

    kind: Kind
    streams: list[Stream]
    column_map: ColumnMap
    shares: list[float]
    skip_bad_rows: bool
    seed: int
    max_length: int
    train_on_prompts: bool
    whole_rows: bool


@dataclass(frozen=True)
class Candidate:
    """One example with its place in the stream."""

    row_number: int
    row: RawRow
    example: Example


def streams_of(
    kind: Kind, arguments: DataArguments, sft_only: Sequence[str], hold_out: bool, flag: str
) -> list[Stream]:
    """The sources, resolved; arguments as those of `training.utils.data.prepare.prepare_data`.

    Raises:
        UserError: a source does not exist.
    """
    found = []
    whole = sft_only if kind == "demonstrations" else ()
    paths = [(path, flag) for path in arguments.sources(whole)] + [(path, SFT_ONLY) for path in whole]
    for path, of_flag in paths:
        source, divided = resolve(path, kind, of_flag), of_flag != SFT_ONLY
        if arguments.eval_data_path or not hold_out:
            found.append(Stream(source, False, "train", divided))
        elif source.has_held_out:
            found += [Stream(source, False, "train", divided), Stream(source, True, "held_out")]
        else:
            found.append(Stream(source, False, "both", divided))
    for path in arguments.eval_data_path:
        source = resolve(path, kind, "--eval_data_path")
        found.append(Stream(source, source.has_held_out, "held_out"))
    return found


# --- rows to examples --------------------------------------------------------------------------------------------


def candidates(stream: Stream, request: Request, report: DataReport | None) -> Iterator[Candidate]:
    """The examples of every row of a stream; what is wrong is raised, or counted in ``report``."""
    counts = SourceReport() if report is None else report.sources.setdefault(stream.name, SourceReport())
    counts.unread = list(stream.source.unread)
    recognised = False
    for number, row in enumerate(stream.source.rows(stream.eval_split)):
        counts.read += 1
        beat()  # before what drops it: rows of other steps, and bad ones, may be all there is for long
        try:
            if isinstance(row.values, RowError):
                raise row.values
            read: set[str] = set()
            name, examples = convert(row.values, stream.source.name, request.column_map, read)
        except Dropped as dropped:
            recognised = True
            if report is not None:
                report.drop(str(dropped), row.place)
            continue
        except UnknownFormat as error:
            if not recognised:  # the whole source, most likely: skipping every row would hide it
                raise UserError(f"{stream.source.flag} {row.place}: {error}") from None
            bad_row(RowError(error.short), row.place, stream, request, report)
            continue
        except RowError as error:
            bad_row(error, row.place, stream, request, report, counts)
            continue
        recognised = True
        counts.formats[name] = counts.formats.get(name, 0) + 1
        for column in row.values:
            counts.count_column(column, READ if column.lower() in read else IGNORED)
        for example in examples:
            yield Candidate(number, row, example)


def bad_row(
    error: RowError,
    place: str,
    stream: Stream,
    request: Request,
    report: DataReport | None,
    counts: SourceReport | None = None,
) -> None:
    """Raise the error with its place, or count it under ``--on_bad_row skip``."""
    if not request.skip_bad_rows:
        raise UserError(f"{stream.source.flag} {place}: {error} (--on_bad_row skip leaves such rows out)")
    if report is not None:
        report.drop("bad row", f"{place}: {error}")
    if counts is not None and error.about:
        counts.count_column(error.about, REFUSED)


def _check_use(example: Example, kind: Kind) -> None:
    """Raise `Dropped` if the example is not of the kind."""
    if kind == "demonstrations" and not (example.text or demonstration(example)[1]):
        raise Dropped("no response to learn from")
    if kind == "pairs" and not example.chosen:
        raise Dropped("no chosen and rejected answer")
    if kind == "pairs" and example.chosen == example.rejected:
        raise Dropped("identical pair")
    if kind == "prompts" and not example.prompt:
        raise Dropped("plain text, no prompt")


def _check_no_special_token(example: Example, forbidden: re.Pattern[str]) -> None:
    """A text must not be able to end its own turn or to write another speaker's."""
    turns = [*example.prompt, *example.response, *itertools.chain(*example.compared())]
    said = (turn.get(name, "") for turn in turns for name in ("content", "reasoning", "tool_calls", "tools"))
    for text in (example.text, *said):
        if found := forbidden.search(text):
            raise RowError(f"the text contains {found[0]!r}, which is a special token or ends a turn of the template")


# --- which rows go where -----------------------------------------------------------------------------------------


def _identity(candidate: Candidate, kind: Kind, whole_rows: bool) -> Any:
    """What makes two examples the same row of a kind; of preferences the prompt alone is asked."""
    example = candidate.example
    if kind == "demonstrations":
        return [example.text, *demonstration(example)]
    prompt = without_marks(example.prompt)
    pair = [prompt, example.chosen, example.rejected, *([example.answers, example.ranks] * bool(example.ranks))]
    if whole_rows and not example.chosen:
        return [prompt, candidate.row.original()]
    return pair if kind == "pairs" else prompt


@dataclass(frozen=True)
class _Scan:
    """What is kept of every example of a stream, as arrays of one length."""

    rows: np.ndarray  # the row's number
    groups: np.ndarray  # a seeded hash of what is asked first: rows that share it stay together
    usable: np.ndarray
    identities: np.ndarray


def _scan(stream: Stream, request: Request, forbidden: re.Pattern[str], report: DataReport) -> _Scan:
    rows, groups, usable, identities = array("Q"), array("Q"), array("B"), array("Q")
    first_of_row = 0
    bar = progress(None, f"reading {stream.name}")
    for candidate in candidates(stream, request, report):
        bar.update()
        example = candidate.example
        if not rows or rows[-1] != candidate.row_number:
            first_of_row = len(rows)
        rows.append(candidate.row_number)
        groups.append(hash_of(example.text or beginning(example.prompt), str(request.seed)))
        identities.append(hash_of(_identity(candidate, request.kind, request.whole_rows)))
        usable.append(0)
        if identities[-1] in identities[first_of_row:-1]:
            continue  # several pairs of one row are one prompt and one demonstration
        try:
            _check_use(example, request.kind)
            _check_no_special_token(example, forbidden)
            usable[-1] = 1
        except Dropped as dropped:
            report.drop(str(dropped), candidate.row.place)
        except RowError as error:
            bad_row(error, candidate.row.place, stream, request, report)
    bar.close()
    return _Scan(
        np.array(rows, np.uint64),
        np.array(groups, np.uint64),
        np.array(usable, np.uint8).astype(bool),
        np.array(identities, np.uint64),
    )


def decide(request: Request, tokenizer: Any, report: DataReport) -> dict[str, dict[str, list[int]]]:
    """Fill every stream's ``decisions``, and count in ``report`` what is left out.

    Returns:
        The row numbers (from 0) that ``--data_split`` gives to each kind, by source; empty without it.

    Raises:
        UserError: a row is wrong (with file:line), or a mapped column is nowhere.
    """
    forbidden = re.compile("|".join(map(re.escape, forbidden_texts(tokenizer))))
    recorded: dict[str, dict[str, list[int]]] = {}
    seen = {"train": np.zeros(0, np.uint64), "held_out": np.zeros(0, np.uint64)}
    scans = [_scan(stream, request, forbidden, report) for stream in request.streams]
    for stream, scan, place in zip(request.streams, scans, _places(request, scans), strict=True):
        chosen = scan.usable
        if place is not None:
            rows = recorded.setdefault(stream.name, {kind: [] for kind in KINDS})
            for i, kind in enumerate(KINDS):  # a file that is given twice, with two row limits, has one name
                rows[kind] = np.union1d(rows[kind], scan.rows[place == i]).astype(int).tolist()
            mine = place == KINDS.index(request.kind)
            report.sources[stream.name].other_steps += len(np.unique(scan.rows[~mine]))
            chosen = chosen & mine
        use = "held_out" if stream.use == "held_out" else "train"
        again, seen[use] = duplicates(scan.identities, chosen, seen[use])
        stream.decisions = np.where(chosen, HELD_OUT if use == "held_out" else TRAIN, SKIP).astype(np.uint8)
        stream.decisions[again] = DUPLICATE
        stream.prompts = scan.groups
    hold_out_of([(s, s.decisions == TRAIN) for s in request.streams])
    prompts = {
        part: np.concatenate([stream.prompts[stream.decisions == part] for stream in request.streams])
        for part in (TRAIN, HELD_OUT)
    }
    report.shared_prompts = int(np.isin(prompts[HELD_OUT], prompts[TRAIN]).sum())
    request.column_map.check_all_found()
    return recorded


def _places(request: Request, scans: Sequence[_Scan]) -> list[np.ndarray | None]:
    """The place in `KINDS` of every example of a stream; None for a stream that ``--data_split`` does not divide."""
    divided = [stream.divided and bool(request.shares) for stream in request.streams]
    shared = [scan.groups for scan, whether in zip(scans, divided, strict=True) if whether]
    found = iter(split_prompts(shared, request.shares) if shared else ())
    return [next(found) if whether else None for whether in divided]


def hold_out_of(streams: Sequence[tuple[Stream, np.ndarray]]) -> bool:
    """Hold a share of the prompts out of the streams that have no eval split of their own; whether any was.

    A prompt that is held out is taken out of the training rows of the other streams, too. With each stream comes a mask
    of the examples that may be held out.
    """
    both = [(stream, np.flatnonzero(mask)) for stream, mask in streams if stream.use == "both"]
    held = hold_out([stream.prompts[rows] for stream, rows in both])
    for (stream, rows), of_stream in zip(both, held, strict=True):
        stream.decisions[rows[of_stream]] = HELD_OUT
        asked = stream.prompts[rows[of_stream]]
        for other, mask in streams:
            if other.use == "train":
                other.decisions[mask & np.isin(other.prompts, asked)] = HELD_OUT
    return any(of_stream.any() for of_stream in held)


def progress(total: int | None, what: str) -> tqdm:
    """A bar for what takes longer than three seconds, on rank 0 only."""
    quiet = os.environ.get("RANK", "0") != "0"
    return tqdm(total=total, desc=what, unit=" rows", disable=quiet, delay=3, mininterval=1)
