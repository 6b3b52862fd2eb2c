"""Which format a row has: from its columns, renamed by ``--column_map``, or from its source's name."""

from __future__ import annotations

import difflib
import re
from collections import UserDict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from training.utils.data.formats.adapters import ADAPTERS
from training.utils.data.formats.conversations import (
    NO_TEXT,
    Dropped,
    Example,
    Row,
    has_value,
    text_of,
    truth_of,
    with_history,
    with_system,
    with_tools,
)
from training.utils.data.formats.shapes import FORMATS, Format
from training.utils.data.template import RowError
from training.utils.errors import UserError

# Columns of rows that another program has tokenised (ColossalChat's prepare_dataset.py, for one)
_TOKENISED = ("input_ids", "chosen_input_ids", "input_id_decode")
# Keys under which files have all their rows, in one object, and what else such an object has
_AROUND_ROWS = ("data", "rows", "instances", "examples", "train", "validation", "test")
_BESIDE_ROWS = ("type", "version")


def _is_table(row: Row) -> bool:
    """Whether one object is a whole table, as pandas' ``to_json`` writes it by itself: cells by column or by row."""

    def is_numbered(value: Any) -> bool:
        return isinstance(value, Mapping) and bool(value) and all(str(key).isdigit() for key in value)

    values = list(row.values())
    if is_numbered(row) or row.keys() == {"columns", "index", "data"}:
        return True
    if len(values) > 1 and all(isinstance(value, list) for value in values):
        same = len({len(value) for value in values}) == 1 < len(values[0])
        return same and not any(isinstance(cell, Mapping) for value in values for cell in value)
    return bool(values) and all(map(is_numbered, values))


class UnknownFormat(UserError):
    """No format has these columns; ``short`` says it without the ways to go on."""

    def __init__(self, row: Row) -> None:
        tokens, around = (next(filter(row.__contains__, names), "") for names in (_TOKENISED, _AROUND_ROWS))
        if _is_table(row):
            self.short = "one object holds all rows, by columns or by numbers"
            way = ("; write an object for each row, as pandas does with "
                   "df.to_json(FILE, orient='records', lines=True)")  # fmt: skip
        elif tokens:
            self.short = f"the row holds tokens ({tokens}) of a tokenizer and a template that it does not name"
            way = ("; give the conversations that it was prepared from (what ColossalChat's prepare_dataset.py read "
                   "from --data_input_dirs)")  # fmt: skip
        elif around and row.keys() <= {*_AROUND_ROWS, *_BESIDE_ROWS}:
            self.short = f"one object is around all rows, which lie in its {around}"
            way = f": make that list the file: jq .{around} OLD.json > NEW.json"
        else:
            self.short = f"no known format has the columns {', '.join(map(str, row)) or '(none)'}"
            way = ("; three ways to go on: name them with --column_map prompt=COLUMN response=COLUMN (or chosen=, "
                   'rejected=); write the rows as {"messages": [{"role": "user", "content": "..."}, ...]}; or add a '
                   "format to training/utils/data/formats/shapes.py (docs/data.md shows how)")  # fmt: skip
        super().__init__(self.short + way)


class ColumnMap:
    """``--column_map``: names of ours for columns of theirs; a column may be a path like question.full_text.

    A name may be given twice for sources that differ: the first column that a row has counts.
    """

    def __init__(self, pairs: Sequence[tuple[str, str]]) -> None:
        self.pairs = list(pairs)
        self._unseen = {column for _, column in self.pairs}

    def apply(self, row: Row) -> dict[str, tuple[str, Any]]:
        """The mapped columns that the row has: our name -> (their name, value)."""
        found: dict[str, tuple[str, Any]] = {}
        for name, column in self.pairs:
            value: Any = row
            for part in [column] if column in row else column.split("."):
                if not isinstance(value, Mapping) or part not in value:
                    break
                value = value[part]
            else:
                self._unseen.discard(column)
                found.setdefault(name, (column, value))
        return found

    def check_all_found(self) -> None:
        """Raise a `UserError` if a column was in no row."""
        if self._unseen:
            raise UserError(f"--column_map: no row has the column {', '.join(sorted(self._unseen))}")


# Columns that a format reads where they are there, beside those that its name lists
_OPTIONAL = frozenset({"system", "history", "input", "context", "response", "label"})
_MAPPABLE = _OPTIONAL.union(*(format_.columns for format_ in FORMATS))


def parse_column_map(items: Sequence[str]) -> ColumnMap:
    """``prompt=instruction`` means: our prompt is in the column instruction.

    Raises:
        UserError: an item without "=", or a name that no format has.
    """
    known = sorted(_MAPPABLE)
    pairs = []
    for item in items:
        name, separator, column = item.partition("=")
        if not separator or not name or not column:
            raise UserError(f"--column_map {item}: write NAME=COLUMN, for example prompt=instruction")
        if name.lower() not in known:
            near = difflib.get_close_matches(name.lower(), known, n=1)
            hint = f"did you mean {near[0]}?" if near else "use prompt, response, chosen, rejected, messages or text"
            raise UserError(f"--column_map {item}: no format has a column {name}; {hint}")
        pairs.append((name.lower(), column))
    return ColumnMap(pairs)


def _adapter(source: str, columns: frozenset[str]) -> Format | None:
    """The named adapter that the last part of a source's name chooses, if the columns are its own."""
    name = source.rstrip("/").split("/")[-1]
    needed, converter = ADAPTERS.get(re.sub(r"\.(jsonl?|csv|parquet)(\.gz)?$", "", name.lower()), (None, None))
    return Format(name, needed, converter) if needed is not None and converter and needed <= columns else None


def _find(columns: frozenset[str], mapped: Mapping[str, str]) -> Format | None:
    """The format of these columns: the first that fits, with ``--column_map`` the fullest that reads what was mapped.

    A mapped column (our name -> their name) may be read under its own name, too: prompt=question leaves question/answer
    what it is.
    """
    fitting = (format_ for format_ in FORMATS if format_.columns <= columns)
    if not mapped:
        return next(fitting, None)

    def reads(format_: Format, name: str) -> bool:
        return name in format_.columns or name in _OPTIONAL

    found = list(fitting)
    using = [
        format_
        for format_ in found
        if all(reads(format_, name) or column.lower() in format_.columns for name, column in mapped.items())
    ]
    # Sources that differ may have columns of several mappings, which no format reads together.
    return max(
        using or found[:1],
        default=None,
        key=lambda format_: (len(format_.columns), sum(reads(format_, name) for name in mapped)),
    )


_SYSTEM = ("system", "system_prompt", "system_message")
_TOOLS = ("tools", "functions")
# Columns without which a row means something else, and which no format reads
_UNREAD = {"tool_calls": "calls of tools"} | NO_TEXT

# What is asked, in the order in which it is written; what it is about, and what there is to choose from
_ASKED = ("instruction", "prompt", "question", "query", "source", "input")
_ABOUT = ("context", "passage", "passages", "paragraphs", "contexts", "documents", "article", "choices", "options")
# What makes a text a part of a conversation
_BESIDE_TEXT = ("parent_id", "role", "instruction", "input", "question", "user", "assistant", "output", "response",
                "answer", "completion", "target", "summary")  # fmt: skip
_ANSWERS = ("response", "completion", "label", "output", "target", "answer")  # that --column_map can name


def _texts(value: Any) -> list[str]:
    """All texts in a cell, those of messages, too."""
    parts = list(value.values()) if isinstance(value, dict) else value
    return [text for part in parts for text in _texts(part)] if isinstance(parts, list) else [str(value).strip()]


def _check_meaning(row: Row, format_: str) -> None:
    """Refuse what a row would lose without a word; other columns that no format reads are metadata.

    The format's name is empty if ``--column_map`` says what is read.

    Raises:
        RowError: a column with images or calls of tools has something in it, or one that makes more of a text than
            its format reads.
        Dropped: LLaMA-Factory's mark of a bad answer.
    """
    for name, kind in _UNREAD.items():
        if has_value(row.get(name)):
            raise RowError(f"column {name!r} holds {kind}, which can not be trained on, and without it the row means "
                           "something else; remove the column, or the row", about=name)  # fmt: skip
    if format_ == "text" and (of := next((name for name in _BESIDE_TEXT if has_value(row.get(name))), "")):
        raise RowError(f"column 'text' stands beside {of!r}, so it may be a part of a conversation, which no format "
                       "reads from these columns; name them (--column_map prompt=COLUMN response=COLUMN), or say that "
                       "it is plain text to learn from: --column_map text=text", about=of)  # fmt: skip
    if truth_of(row.get("kto_tag"), "kto_tag") is False:
        raise Dropped("marked as a bad answer")


def _check_asked(row: Row, format_: Format, read: Collection[str], examples: Sequence[Example]) -> None:
    """Refuse a part of what is asked that was not read, unless the prompt holds it, or it is the whole row's text.

    Beside chosen and rejected answers, and whole conversations, other names of a prompt are metadata.

    Raises:
        RowError: names the ``--column_map`` that reads both, if there is one.
    """
    first, *answers = format_.name.lower().split("/")
    talk = first in ("messages", "conversations")
    pair = "chosen" in answers and not (first == "context" and isinstance(row[first], str))
    said = "\n".join(turn["content"] for example in examples for turn in example.prompt)
    names = [name for name in read if name in (*_ASKED, *_ABOUT, *_ANSWERS) and has_value(row[name])]
    parts = [text for name in names for text in _texts(row[name])]
    answered = any(example.response for example in examples)
    for of in (*(() if talk or pair else (name for name in _ASKED if name != "source")), *_ABOUT):
        if of in read or not has_value(row.get(of)):
            continue
        texts = _texts(row[of])
        is_rendered = of in _ASKED and answered and all(part in "\n".join(texts) for part in parts)
        if is_rendered or all(text in said for text in texts):
            continue
        asked, about = sorted((first, of), key=lambda name: _ASKED.index(name) if name in _ASKED else len(_ASKED))
        way = "write both into one column"
        if not talk and (answers == ["chosen", "rejected"] or (len(answers) == 1 and answers[0] in _ANSWERS)):
            way = f"read both with --column_map instruction={asked}"
            way += f" input={about}" if about not in ("input", "context") else ""
            way += f" response={answers[0]}" if len(answers) == 1 else ""
        raise RowError(f"column {first!r} stands beside {of!r}, which {format_.name} does not read, so a part of what "
                       f"is asked may be lost; {way}, or say that it is all: --column_map {first}={first}",
                       about=of)  # fmt: skip


class _Watched(UserDict[str, Any]):
    """A row that keeps the names of the columns that were read."""

    def __init__(self, row: Row, read: set[str]) -> None:
        self.data, self._read = dict(row), read

    def __getitem__(self, name: str) -> Any:
        if name in self.data:
            self._read.add(name)
        return self.data[name]


_READ = _MAPPABLE.union({"kto_tag"}, _SYSTEM, _TOOLS, _UNREAD, *(columns for columns, _ in ADAPTERS.values()))


def _by_lower_case(row: Row, mapped: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    """The columns under names in lower case; of several that differ in capitals alone the one that is not mapped.

    Raises:
        RowError: two columns would be read under one name, and ``--column_map`` does not say which is meant.
    """
    columns = {key.lower(): value for key, value in row.items()}
    if len(columns) == len(row):
        return columns
    taken, names = {column for column, _ in mapped.values()}, dict[str, str]()
    for key in (key for key in row if key not in taken):
        name = key.lower()
        if name in names and name in _READ and name not in mapped:
            way = f", or say which with --column_map {name}=COLUMN" if name in _MAPPABLE else ""
            raise RowError(f"the columns {names[name]!r} and {key!r} differ only in capitals, and either may be meant; "
                           f"rename one{way}")  # fmt: skip
        names[name] = key
    return columns | {name: row[key] for name, key in names.items()}


def convert(
    row: Row, source: str = "", column_map: ColumnMap | None = None, read: set[str] | None = None
) -> tuple[str, list[Example]]:
    """The format's name and the examples of one raw row.

    Args:
        row: the columns as they were read.
        source: the source's name; its last part may choose a named adapter.
        read: the names of the columns that were read, in lower case, are added here.

    Raises:
        RowError: the row breaks the rules of its format.
        Dropped: the row is sound but useless.
        UnknownFormat: no format has these columns.
    """
    mapped = column_map.apply(row) if column_map is not None else {}
    columns = _by_lower_case(row, mapped)
    format_ = None if mapped else _adapter(source, frozenset(columns))
    columns.update({name: value for name, (_, value) in mapped.items()})
    format_ = format_ or _find(frozenset(columns), {name: column for name, (column, _) in mapped.items()})
    prompt = columns.get("prompt")
    is_ids = isinstance(prompt, list) and bool(prompt) and all(isinstance(item, int) for item in prompt)
    if format_ is None or is_ids or _is_table(row):
        raise UnknownFormat(row)
    for name in format_.columns.union(_OPTIONAL, _SYSTEM):
        if isinstance(columns.get(name), RowError):
            raise columns[name]  # of a cell that could not be read: readers leave it there
    _check_meaning(columns, "" if format_.columns & mapped.keys() else format_.name)
    used: set[str] = set()
    watched = _Watched(columns, used)
    system = next((said for name in _SYSTEM if (said := text_of(watched, name)).strip()), "")
    try:
        examples = [with_system(example, system) for example in format_.convert(watched)]
        if "history" not in used and has_value(columns.get("history")):
            examples = [with_history(example, watched["history"]) for example in examples]
        for name in _TOOLS:
            if has_value(columns.get(name)) and (tools := watched[name]):
                examples = [with_tools(example, tools) for example in examples]
        if format_ in FORMATS and not format_.columns & mapped.keys():
            _check_asked(columns, format_, used, examples)
        if read is not None:
            read |= {mapped[name][0].split(".")[0].lower() if name in mapped else name for name in used}
            read |= {"kto_tag"} & columns.keys()
        return format_.name, examples
    except (TypeError, ValueError, AttributeError, LookupError) as error:  # a shape that the format did not think of
        raise RowError(f"the row does not fit the format {format_.name}: {error!r}") from error
