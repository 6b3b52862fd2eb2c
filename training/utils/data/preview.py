"""See what the model will see: rows with the trained tokens marked, and what became of the others.

    python -m training.utils.data.preview --data_path FILE --step 1
    python -m training.utils.data.preview --data_path FILE --step 2 --html preview.html
    python -m training.utils.data.preview --data_path FILE --step 1 --write prepared.jsonl
    python -m training.utils.data.preview --data_path FILE --step 2 --validate

It runs the same preparation as training, so what it tokenises, training finds in the cache.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.utils import arguments
from training.utils.arguments import DataArguments, flag
from training.utils.errors import UserError, printable, run_program
from training.utils.run.files import check_page


@dataclass
class PreviewArguments:
    """Preview"""

    step: int = flag(1, "the step that the rows are for; pairs, of DPO too, are those of 2", choices=(1, 2, 3))
    model_name_or_path: str = flag("embedded", "the model whose tokenizer is used")
    max_seq_len: int = flag(512, "longest prompt plus response in tokens (steps 1 and 2)", minimum=8)
    max_prompt_seq_len: int = flag(256, "longest prompt in tokens (step 3)", minimum=4)
    sft_only_data_path: list[str] = flag([], "sources used by step 1 alone, whole")
    train_on_prompts: bool = flag(False, "step 1 trains on prompt tokens too")
    per_device_train_batch_size: int = flag(8, "the batch size that the padding is told for", minimum=1)
    seed: int = flag(1234, "decides which rows are held out", minimum=0)
    rows: int = flag(5, "how many rows to show", minimum=0)
    html: str = flag("", "write the same as a page to this file")
    write: str = flag("", "write every prepared row, decoded, to this JSON lines file")
    validate: bool = flag(False, "print problems only, and exit 1 if there are any")

    def __post_init__(self) -> None:
        write, html = Path(self.write).expanduser(), Path(self.html).expanduser()
        if self.write and write.exists():
            raise UserError(f"--write {self.write}: there is such a file; name another one")
        if self.write and self.html and write.absolute() == html.absolute():
            raise UserError(f"--html and --write {self.write}: one file for both; name another one")
        if self.html:
            check_page(html, "--html")


# Flags that rows of some steps alone depend on: flag -> those, and what to do in others
_OF_STEPS = {
    "max_seq_len": ((1, 2), "their limit is --max_prompt_seq_len"),
    "max_prompt_seq_len": ((3,), "their limit is --max_seq_len"),
    "sft_only_data_path": ((1,), "leave it out"),
    "train_on_prompts": ((1,), "leave it out"),
}


def parse_flags(argv: Sequence[str]) -> list[Any]:
    """The flags; without torch, so that ``--help`` and mistakes answer at once.

    Raises:
        UserError: a flag is wrong, or would do nothing.
    """
    prog, description = "python -m training.utils.data.preview", (__doc__ or "").strip()
    groups = arguments.parse([PreviewArguments, DataArguments], argv, prog=prog, description=description)
    preview = groups[0]
    for name, (steps, advice) in _OF_STEPS.items():
        if name in arguments.flags_in(argv) and getattr(preview, name) and preview.step not in steps:
            raise UserError(f"--{name} changes nothing in rows of --step {preview.step}: {advice}")
    files = [f"--{name}" for name in ("html", "write") if getattr(preview, name)]
    if preview.validate and files:
        raise UserError(f"--validate prints problems only, and writes no file: leave out {files[0]}, or --validate")
    return groups


if __name__ == "__main__":
    arguments.answer_early(lambda argv: parse_flags(argv)[:0])  # of paths, ``--validate`` tells

import numpy as np  # noqa: E402  what follows takes seconds

from training.utils.agreement import agreement  # noqa: E402
from training.utils.data.batches import element_lengths, epoch_batches, padding_share, spread_rows  # noqa: E402
from training.utils.data.formats.rankings import places  # noqa: E402
from training.utils.data.kinds import KINDS  # noqa: E402
from training.utils.data.prepare import StepData, prepare_data  # noqa: E402
from training.utils.data.preview_page import Piece, page  # noqa: E402
from training.utils.data.reading.sources import resolve  # noqa: E402
from training.utils.data.report import IGNORED, READ, REFUSED, DataReport  # noqa: E402
from training.utils.data.template import RowError  # noqa: E402
from training.utils.run.watchdog import outlive_readers  # noqa: E402

NOTHING_HELD_OUT = (
    "no row is held out (rows that begin with one question stay together), so training refuses this: "
    "give more prompts, or --eval_data_path"
)
_PERCENTILES = (5, 25, 50, 75, 95, 99, 100)
_COLOURS = {"trained": "\x1b[32m", "untrained": "\x1b[2m", "special": "\x1b[1;35m"}
_OFF = "\x1b[0m"
# What a row of each kind reads and what of it trains: side of a pair -> columns of token ids and of the mask
_READ = {
    "demonstrations": {"": ("input_ids", "response_mask")},
    "pairs": {"chosen": ("chosen_ids", "chosen_mask"), "rejected": ("rejected_ids", "rejected_mask")},
    "prompts": {"": ("prompt_ids", "")},
}


def pieces(tokenizer: Any, ids: Sequence[int], mask: Sequence[int]) -> list[Piece]:
    """A row's tokens as text, put together as long as their kind stays the same."""
    special = set(tokenizer.all_special_ids)
    kinds = [(bool(m), i in special) for i, m in zip(ids, mask, strict=True)]
    found = []
    for (trained, is_special), group in itertools.groupby(zip(kinds, ids, strict=True), key=lambda pair: pair[0]):
        text = tokenizer.decode([i for _, i in group], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        found.append(Piece(text, trained, is_special))
    return found


def shown_rows(data: StepData, tokenizer: Any, count: int) -> Iterator[tuple[str, list[Piece]]]:
    """(title, pieces) of ``count`` rows spread over the training rows; a pair gives two."""
    total = len(data.train)
    for number in spread_rows(total, count):
        row = data.train[number]
        title = f"row {number + 1} of {total}, {row['source']}, {row['length']} tokens"
        if data.report.kind == "pairs" and row["pairs"] > 1:
            title += f", one of {row['pairs']} pairs of its prompt"
        for name, (ids, mask) in _READ[data.report.kind].items():
            trained = row[mask] if mask else [0] * len(row[ids])
            yield ", ".join(filter(None, (title, name))), pieces(tokenizer, row[ids], trained)


def decoded_rows(data: StepData, tokenizer: Any) -> Iterator[dict[str, Any]]:
    """Every prepared row as texts, special tokens included.

    Yields:
        split, source, length (tokens), and once, or for each side of a pair: text, all that the model reads; trained,
        the parts of it that are trained on (of pairs: that make an answer).
    """
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    for split, rows in (("train", data.train), ("held_out", data.held_out)):
        for row in rows:
            found: dict[str, Any] = {"split": split, "source": row["source"], "length": row["length"]}
            for side, (ids, mask) in _READ[data.report.kind].items():
                name = f"{side}_" if side else ""
                found[f"{name}text"] = tokenizer.decode(row[ids], **options)
                if mask:
                    spans = itertools.groupby(zip(row[mask], row[ids], strict=True), key=lambda pair: bool(pair[0]))
                    found[f"{name}trained"] = [
                        tokenizer.decode([token for _, token in span], **options) for trained, span in spans if trained
                    ]
            yield found


def _write(path: str, rows: Iterator[dict[str, Any]]) -> None:
    try:
        with Path(path).expanduser().open("x", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"--write {path}: {error.strerror}") from None


def coloured(parts: Sequence[Piece], colour: bool) -> str:
    """One row for the terminal; without colours the trained tokens stand between [[ and ]]."""
    out = []
    for part in parts:
        text = printable(part.text).replace("\n", "\\n\n") if part.special else printable(part.text)
        if colour:
            kind = _COLOURS["trained" if part.trained else "untrained"]
            out.append(f"{_COLOURS['special'] if part.special else ''}{kind}{text}{_OFF}")
        else:
            out.append(f"[[{text}]]" if part.trained else text)
    return "".join(out).replace("]][[", "")


def counts(data: StepData, batch_size: int, seed: int) -> list[tuple[str, str]]:
    """(what, how many) of everything that the preview tells."""
    report = data.report
    lines: list[tuple[str, str]] = []
    for name, source in report.sources.items():
        lines.append((f"rows read from {name}", str(source.read)))
        lines += [(f"  as {shape}", str(count)) for shape, count in source.formats.items()]
        kinds = (("columns read", READ), ("columns ignored", IGNORED), ("rows refused for", REFUSED))
        lines += [(f"  {what}", told) for what, kind in kinds if (told := source.told_columns(kind))]
        lines += [("  not read", ", ".join(source.unread))] if source.unread else []
        if source.other_steps:
            lines.append(("  for the other steps", str(source.other_steps)))
    lines += [("rows to train on", str(report.train_rows)), ("rows held out", str(report.held_out_rows))]
    if report.has_rankings:
        told = f"{report.train_prompts}, and {report.held_out_prompts} held out"
        lines += [("  pairs of so many prompts, which count once", told)]
        lines += [("  answers to a prompt", f"up to {report.most_answers}")]
        lines += [("  answers left out, too long", str(report.answers_too_long))]
    for reason, entry in report.dropped.items():
        lines.append((f"dropped: {reason}", f"{entry.count} ({entry.where()})"))
    for reason in ("exact duplicate", *(("identical pair",) if report.kind == "pairs" else ())):
        if reason not in report.dropped:
            lines.append((f"dropped: {reason}", "0"))
    rows = report.train_rows + report.held_out_rows
    how = f"{report.turns_dropped} lost their oldest turns, {report.texts_cut} the beginning of a user text"
    lines.append(("truncated", f"{report.truncated} of {rows} ({report.truncated / max(1, rows):.1%}): {how}"))
    if report.open_turns:
        lines.append(("last user turns without an answer, left out", str(report.open_turns)))
    lines.append(("held-out rows whose first question is trained on", str(report.shared_prompts)))
    if report.unequal_pairs:
        share = report.longer_chosen / report.unequal_pairs
        lines.append(("pairs whose longer answer is the chosen one", f"{share:.1%} of {report.unequal_pairs}"))
    if report.tied_pairs:
        lines.append(("pairs of answers that are tied, no pairs to train on", str(report.tied_pairs)))
    lengths = element_lengths(data.train)
    values = np.percentile(lengths, _PERCENTILES)
    told = ", ".join(
        f"p{p} {v:.0f}" if p < 100 else f"longest {v:.0f}" for p, v in zip(_PERCENTILES, values, strict=True)
    )
    lines.append(("length in tokens", told))
    shares = []
    for grouped in (True, False):
        batches = epoch_batches(lengths, batch_size, seed, 0, group_by_length=grouped)
        shares.append(padding_share(lengths, batches, batch_size))
    lines.append(
        (f"padding in batches of {batch_size}", f"{shares[0]:.1%} grouped by length, {shares[1]:.1%} in random order")
    )
    return lines


def judges(data: DataArguments) -> list[tuple[str, str]]:
    """(what, how much) of the judges whose names stand in the rows (key ``judge``), and of how far they agree."""
    said: dict[str, dict[str, dict[str, float]]] = {}  # prompt -> judge -> answer -> its place
    for path in [*data.sources(), *data.eval_data_path]:
        source = resolve(path, "pairs")
        for row in itertools.chain(source.rows(), source.rows(held_out=True)):
            values = row.values
            if isinstance(values, dict) and isinstance(values.get("judge"), str):
                with contextlib.suppress(RowError):  # a row that can not be used has been told of
                    if found := places(values):
                        prompt = json.dumps(values.get("prompt"), sort_keys=True, default=str)
                        said.setdefault(prompt, {})[values["judge"]] = found
    names = Counter(name for by_judge in said.values() for name in by_judge)
    if not names:
        return []
    lines = [("prompts by judge", ", ".join(f"{name} {count}" for name, count in sorted(names.items())))]
    if len(names) > 1:
        rankings = []
        for by_judge in said.values():
            shared = sorted(set.intersection(*map(set, by_judge.values())))
            rankings.append([[order[text] for text in shared] for order in by_judge.values()])
        agreed = agreement(rankings)
        lines.append(("prompts that several judges have ranked", str(agreed.prompts)))
        if agreed.same is not None:
            alpha = "" if agreed.alpha is None else f", Krippendorff's alpha {agreed.alpha:.2f}"
            lines.append(("two judges say the same of two answers", f"{agreed.same:.1%}{alpha}"))
    return lines


def problems(report: DataReport) -> list[str]:
    """What ``--validate`` prints: rows that are left out, and prompts that are trained on and held out."""
    found = []
    for reason, entry in report.dropped.items():
        if reason == "bad row":
            found += entry.places
            if entry.count > len(entry.places):
                found.append(f"and {entry.count - len(entry.places)} more bad rows")
        else:
            found.append(f"{entry.count} x {reason}: {entry.where()}")
    if not report.held_out_rows:
        found.append(NOTHING_HELD_OUT)
    if report.shared_prompts:
        found.append(f"{report.shared_prompts} held-out rows begin with a question that is also trained on")
    return found


def main(argv: Sequence[str]) -> int:
    """Run the program; returns its exit code."""
    preview, data = parse_flags(argv)
    from training.utils.model.loading import resolve_model
    from training.utils.model.tokenizer import load_tokenizer

    if preview.validate:
        data.on_bad_row = "skip"  # to tell of all of them, not of the first alone
    try:
        path = resolve_model(preview.model_name_or_path, weights=False)
        tokenizer = load_tokenizer(path, **data.template)
        prepared = prepare_data(
            KINDS[preview.step - 1],
            data,
            tokenizer,
            max_length=preview.max_seq_len,
            max_prompt_length=preview.max_prompt_seq_len,
            seed=preview.seed,
            sft_only_data_path=preview.sft_only_data_path,
            train_on_prompts=preview.train_on_prompts,
        )
    except UserError as error:
        if not preview.validate:
            raise
        print(printable(" ".join(str(error).split())))
        return 1
    if preview.validate:
        found = problems(prepared.report)
        print(printable("\n".join(found)), end="\n" if found else "")
        return 1 if found else 0
    rows = list(shown_rows(prepared, tokenizer, preview.rows))
    table = counts(prepared, preview.per_device_train_batch_size, preview.seed)
    table += judges(data) if preview.step == 2 else []
    colour = "NO_COLOR" not in os.environ and (sys.stdout.isatty() or "FORCE_COLOR" in os.environ)
    for title, parts in rows:
        print(f"--- {printable(title)}\n{coloured(parts, colour)}\n")
    width = max(len(what) for what, _ in table)
    print(printable("\n".join(f"{what:<{width}}  {how}" for what, how in table)))
    if not prepared.report.held_out_rows:
        print(NOTHING_HELD_OUT)
    if preview.write:
        _write(preview.write, decoded_rows(prepared, tokenizer))
    if preview.html:
        try:
            text = page(preview.step, rows, table, prepared.train["length"][:])
            Path(preview.html).expanduser().write_text(text, "utf-8")
        except OSError as error:
            raise UserError(f"--html {preview.html}: {error.strerror}") from None
    return 0


if __name__ == "__main__":
    outlive_readers()
    sys.exit(run_program(main))
