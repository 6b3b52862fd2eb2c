"""Reads docs/metrics.md: metric -> (what it is, healthy range) for each step; NAME in a metric stands for any name."""

from __future__ import annotations

import re
from pathlib import Path

GLOSSARY = Path(__file__).resolve().parents[1] / "docs" / "metrics.md"


def glossary(step: int | str) -> dict[str, tuple[str, str]]:
    """The rows of every table below headings that start with ``Step N``, or with ``DPO``."""
    found: dict[str, tuple[str, str]] = {}
    for section in GLOSSARY.read_text(encoding="utf-8").split("\n## ")[1:]:
        if not section.startswith(f"Step {step}" if isinstance(step, int) else step.upper()):
            continue
        for line in section.splitlines():
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            for name in re.findall(r"`([a-z_]+(?:/NAME)?/[a-z_]+)`", cells[0]) if line.startswith("| `") else ():
                assert name not in found, f"{name} is explained twice"
                found[name] = (cells[1], cells[2])
    return found


def unexplained(step: int | str, records: list[dict]) -> set[str]:
    """Keys of metrics.jsonl that the glossary lacks."""
    named = [re.compile(name.replace("NAME", r"\w+")) for name in glossary(step)]
    logged = {key for record in records for key in record} - {"step", "time"}
    return {key for key in logged if not any(pattern.fullmatch(key) for pattern in named)}


def never_logged(step: int | str, records: list[dict]) -> set[str]:
    """Glossary entries that no record has, those apart that say with which flag they come."""
    logged = {key for record in records for key in record}
    return {name for name, (meaning, _) in glossary(step).items() if name not in logged and "only with" not in meaning}
