"""Text that every part of the page uses."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.utils.run.folders import repository_root, title

TITLES = {
    "step1": "Supervised fine-tuning",
    "step2": "Reward model",
    "dpo": "Direct preference optimisation",
    "step3": "RLHF with PPO",
}
LONGEST_TEXT = 4000  # characters of one answer


def heading(step: str) -> str:
    """``step1`` -> ``Step 1``, at the beginning of a line."""
    return title(step).replace("step", "Step")


def shortened(text: str) -> str:
    """A text without this machine's folders: paths from the repository's, ``~`` for the home.

    Whole names only: a short folder such as /w is part of many other paths.
    """
    for folder, inside, itself in ((repository_root(), "", "."), (Path.home(), "~/", "~")):
        if folder != folder.parent:  # a home of / would be in every path
            name = rf"(?<![\w.~+-]){re.escape(str(folder))}"
            text = re.sub(f"{name}/", inside, text)
            text = re.sub(rf"{name}(?![\w-]|\.\w)", itself, text)
    return text


def e(value: Any) -> str:
    """Text, safe inside markup, with this machine's folders shortened: a report is made to be passed on."""
    return html.escape(shortened(str(value)))


def duration(seconds: float | None) -> str:
    """Seconds for people: 3.2 s, 2 min 10 s, 1 h 05 min."""
    if seconds is None:
        return ""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes_left:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def plural(count: int, noun: str) -> str:
    """``1 tie``, ``2 ties``."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def cut(text: str, longest: int = LONGEST_TEXT) -> str:
    """A text, or its beginning if it is longer than a page should hold; folders first, or half of one would stay."""
    text = shortened(text)
    return text if len(text) <= longest else text[:longest] + " … (cut)"


def words(name: str) -> str:
    """``mean_length`` -> ``mean length``."""
    return shortened(name).replace("_", " ")


def hardware(machine: Mapping[str, Any]) -> str:
    """The manifest's machine in a few words."""
    if not machine:
        return ""
    found = machine.get("gpus")
    gpus = [str(g) for g in found] if isinstance(found, list) else []
    names = dict.fromkeys(gpus)
    devices = [f"{gpus.count(name)} × {name}" for name in names] or [f"{machine.get('cores', '?')} CPU cores, no GPU"]
    memory = f"{machine['memory_gib']} GiB memory" if machine.get("memory_gib") else ""
    return ", ".join(part for part in (*devices, memory) if part)
