"""A raw row: what every reader gives, and how long it may be."""

from __future__ import annotations

from typing import Any, NamedTuple

from training.utils.data.template import RowError
from training.utils.run.files import json_line

MAX_ROW_CHARACTERS = 4 << 20  # a row over 4 MiB is a mistake, not a conversation


class RawRow(NamedTuple):
    """One row as it was read: its columns, or the error that reading it gave, and where it stands.

    A column that can not be read is a `RowError` among the others; it counts if a format reads that column.
    """

    values: dict[str, Any] | RowError
    place: str  # file:line, or the source and the row's number
    size: int = 0  # about how many characters its columns have

    def original(self) -> str:
        """The row as it stood in its file, as JSON; a column that could not be read is null."""
        return json_line(self.values, lambda value: None if isinstance(value, RowError) else str(value))


def too_big(size: int) -> RowError:
    """The error of a row of ``size`` characters."""
    return RowError(f"the row has {size / 1e6:.1f} MB, the limit is {MAX_ROW_CHARACTERS / 1e6:.1f} MB")
