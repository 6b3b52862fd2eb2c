"""The tables of docs/migration.md, made from those of the translator: ``python -m tests.migrate.page`` writes them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from training.migrate.predecessors import PREDECESSORS
from training.migrate.program import Predecessor, Program, as_text, shown
from training.utils.arguments import LAUNCHERS, OtherFlag

PAGE = Path(__file__).resolve().parents[2] / "docs" / "migration.md"
_BLOCK = re.compile(r"(<!-- tables of ([\w-]+) -->\n).*?(<!-- end of tables -->)", re.DOTALL)


def here(name: str, other: OtherFlag) -> str:
    """What a flag is here, in words."""
    if other.ours:
        return f"`{other.ours}`" + (f", {other.said}" if other.said else "")
    if other.only is not None:
        allowed = ", ".join(f"`{value}`" for value in other.only if value != "")
        return (f"{allowed} alone: " if allowed else "refused: ") + other.said
    return other.said if other.settled else f"nothing to do: {other.said}"


def default(other: OtherFlag) -> str:
    """Their default, as a command has it."""
    return "" if other.default in (None, "") else f"`{' '.join(as_text(other.default))}`"


def _in(titles: Sequence[str], programs: Sequence[Program]) -> str:
    return "all" if len(titles) == len(programs) else ", ".join(dict.fromkeys(titles))


def _grouped(pairs: Iterable[tuple[tuple[str, ...], str]]) -> Mapping[tuple[str, ...], list[str]]:
    """Cells of a row -> the programs that have it, in order."""
    found: dict[tuple[str, ...], list[str]] = {}
    for cells, title in pairs:
        found.setdefault(cells, []).append(title)
    return found


def _table(head: Sequence[str], rows: Mapping[tuple[str, ...], list[str]], programs: Sequence[Program]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for cells, titles in rows.items():
        cells = tuple(cell.replace("|", "\\|") for cell in (*cells, _in(titles, programs)))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def tables(predecessor: Predecessor) -> str:
    """Flags, constants and differences of one predecessor."""
    programs = predecessor.programs
    flags = _grouped(
        ((f"`{name}`", here(name, other), default(other)), program.title)
        for program in programs
        for name, other in program.flags.items()
        if name not in LAUNCHERS or other.settled
    )
    rows = dict(sorted(flags.items(), key=lambda row: row[0][0].strip("`-")))
    lines = _table(("their flag", "here", "their default", "in"), rows, programs)
    constants = _grouped(
        ((f"`{shown(flag, constant.value)}`", constant.said), program.title)
        for program in programs
        for flag, constant in program.constants.items()
    )
    if constants:
        lines += ["", "What their code has fixed is set here:", ""]
        lines += _table(("here", "there", "in"), constants, programs)
    different = _grouped(((line,), program.title) for program in programs for line in program.different)
    if different:
        lines += ["", "Not the same, and no flag makes it so:", ""]
        lines += _table(("here, and there", "in"), different, programs)
    return "\n".join(lines) + "\n"


def page(text: str) -> str:
    """The page with its tables as they are now."""
    made = {predecessor.name: tables(predecessor) for predecessor in PREDECESSORS}
    return _BLOCK.sub(lambda found: found[1] + made[found[2]] + found[3], text)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
