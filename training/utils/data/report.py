"""What became of the rows: counts that the log, `preview` and the tests read."""

from __future__ import annotations

from dataclasses import dataclass, field

from training.utils.data.kinds import Kind

_SHOWN = 5
READ, IGNORED, REFUSED = range(3)


@dataclass
class SourceReport:
    """Counts of one source.

    Attributes:
        read: rows.
        formats: rows by format.
        other_steps: rows that its data split gives to other steps.
        unread: files of the folder, and splits, that are not read.
        columns: by column or key: rows in which it was read, rows in which it was ignored, rows refused for it.
    """

    read: int = 0
    formats: dict[str, int] = field(default_factory=dict)
    other_steps: int = 0
    unread: list[str] = field(default_factory=list)
    columns: dict[str, list[int]] = field(default_factory=dict)

    def count_column(self, name: str, what: int) -> None:
        """Count a row for a column: ``READ``, ``IGNORED`` or ``REFUSED``."""
        self.columns.setdefault(name, [0, 0, 0])[what] += 1

    def told_columns(self, what: int) -> str:
        """The columns of a kind, each with the number of rows: ``prompt 12, response 12``."""
        return ", ".join(f"{name} {counts[what]}" for name, counts in self.columns.items() if counts[what])


@dataclass
class Drop:
    """How many rows were left out for one reason, and where the first of them stand."""

    count: int = 0
    places: list[str] = field(default_factory=list)

    def where(self, most: int = _SHOWN) -> str:
        """The first places in short: ``a.jsonl:3, 7, b.jsonl:2, ...``."""
        told, before = [], ""
        for place in self.places[:most]:
            name, _, line = place.rpartition(":")
            told.append(line if name and name == before and line.isdigit() else place)
            before = name
        return ", ".join([*told, *(["..."] if self.count > len(told) else [])])


@dataclass
class DataReport:
    """Counts of one prepared step.

    Attributes:
        sources: by source name (an eval split of its own counts as "NAME (eval)").
        dropped: by reason.
        truncated: rows that were shortened to fit, in one way or the other.
        turns_dropped: rows that lost whole oldest turns to fit.
        texts_cut: rows whose longest user text lost its beginning to fit.
        open_turns: conversations whose last user turn has no answer, which step 1 leaves out.
        shared_prompts: held-out rows that begin with a question that is also trained on.
        longer_chosen: pairs whose chosen answer has more characters, of ``unequal_pairs``.
        train_prompts, held_out_prompts: of pairs, what counts once: ordinary pairs, and rankings, which have several.
        tied_pairs: of answers to one prompt that have the same rank, where others have not.
        most_answers: to one prompt.
        answers_too_long: of rankings; they are left out, with their pairs.
        from_cache: whether the tokens were found ready.
    """

    kind: Kind
    sources: dict[str, SourceReport] = field(default_factory=dict)
    dropped: dict[str, Drop] = field(default_factory=dict)
    train_rows: int = 0
    held_out_rows: int = 0
    tokens: int = 0
    truncated: int = 0
    turns_dropped: int = 0
    texts_cut: int = 0
    open_turns: int = 0
    shared_prompts: int = 0
    longer_chosen: int = 0
    unequal_pairs: int = 0
    tied_pairs: int = 0
    train_prompts: int = 0
    held_out_prompts: int = 0
    most_answers: int = 0
    answers_too_long: int = 0
    from_cache: bool = False

    def drop(self, reason: str, place: str) -> None:
        """Count one row that is left out."""
        entry = self.dropped.setdefault(reason, Drop())
        entry.count += 1
        if len(entry.places) < _SHOWN:
            entry.places.append(place)

    @property
    def has_rankings(self) -> bool:
        """Whether some prompts have more than two answers, and so more than one pair."""
        return 0 < self.train_prompts + self.held_out_prompts < self.train_rows + self.held_out_rows

    def lines(self) -> list[str]:
        """A few lines of text for the log."""
        lines = []
        for name, source in self.sources.items():
            shapes = ", ".join(f"{count} as {shape}" for shape, count in source.formats.items()) or "none"
            other = f", {source.other_steps} belong to the other steps" if source.other_steps else ""
            lines.append(f"{name}: {source.read} rows read: {shapes}{other}")
            if source.unread:
                more = f", and {len(source.unread) - _SHOWN} more" if len(source.unread) > _SHOWN else ""
                lines.append(f"{name}: not read: {', '.join(source.unread[:_SHOWN])}{more}")
        for reason, entry in self.dropped.items():
            lines.append(f"dropped {entry.count}: {reason} ({entry.where(2)})")
        if self.truncated:
            how = f"{self.turns_dropped} lost their oldest turns, {self.texts_cut} the beginning of a user text"
            lines.append(f"truncated {self.truncated}: {how}")
        if self.open_turns:
            lines.append(f"{self.open_turns} lost their last user turn, which has no answer")
        if self.shared_prompts:
            lines.append(f"{self.shared_prompts} held-out rows begin with a question that is also trained on")
        if self.answers_too_long:
            lines.append(f"{self.answers_too_long} answers of rankings are too long; their pairs are left out")
        train, held_out = f"{self.train_rows} rows", f"{self.held_out_rows}"
        if self.has_rankings:
            lines.append(
                f"rankings: up to {self.most_answers} answers to a prompt, so up to {self.most_answers} sequences for "
                "each of --per_device_train_batch_size; all pairs of a prompt count as one"
            )
            train = f"{self.train_prompts} prompts ({self.train_rows} pairs)"
            held_out = f"{self.held_out_prompts} ({self.held_out_rows} pairs)"
        counts = f"{train} to train on, {held_out} held out, {self.tokens} tokens"
        lines.append(f"{self.kind}: {counts}{' from the cache' if self.from_cache else ''}")
        return lines

    @classmethod
    def from_dict(cls, values: dict) -> DataReport:
        """The opposite of `dataclasses.asdict`."""
        values = dict(values)
        values["sources"] = {name: SourceReport(**source) for name, source in values["sources"].items()}
        values["dropped"] = {reason: Drop(**entry) for reason, entry in values["dropped"].items()}
        return cls(**values)
