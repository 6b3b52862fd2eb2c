"""The page as a whole: one HTML text without scripts and without a reference to anything outside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from training.report import cards, curves, evaluations, provenance, resources, sections
from training.report.run import RunRecord, read_run
from training.report.style import CSS
from training.report.text import e
from training.utils.run.files import GENERATOR, write_whole

REPORT = "report.html"  # in a run
# Anchor, heading, and what draws the section; "" from a section leaves it out.
SECTIONS: tuple[tuple[str, str, Callable[[RunRecord], str]], ...] = (
    ("answers", "What the models say", sections.answers),
    ("wins", "Is it better?", sections.wins),
    ("reward-model", "The reward model", sections.reward_model),
    ("curves", "Curves", curves.curves),
    ("time", "Time and memory", resources.time_and_memory),
    ("health", "Health monitor", sections.health),
    ("next", "What to try next", sections.next_steps),
    ("evaluation", "Evaluations", evaluations.evaluations),
    ("ran", "What ran", provenance.what_ran),
)


def render_report(run: RunRecord) -> str:
    """The whole page."""
    name = e(run.path.resolve().name)
    drawn = [(anchor, heading, draw(run)) for anchor, heading, draw in SECTIONS]
    shown = [(anchor, heading, body) for anchor, heading, body in drawn if body]
    links = "".join(f'<a href="#{anchor}">{heading}</a>' for anchor, heading, _ in shown)
    bodies = "".join(f'<section id="{anchor}"><h2>{heading}</h2>{body}</section>' for anchor, heading, body in shown)
    notes = "".join(f'<p class="warn">{e(note)}</p>' for note in run.notes)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">{GENERATOR}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # nothing is loaded and nothing runs, whatever a model has written
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{name}: report of a run</title><style>{CSS}</style></head><body><main>"
        f"<header><h1>{name}</h1>{sections.lead(run)}<nav>{links}</nav></header>"
        f"{cards.failure(run)}{notes}{cards.cards(run)}{bodies}"
        "<footer>Made by <code>python -m training.report</code> from manifest.json, metrics.jsonl, summary.json and "
        "samples.json of this run. Hover over a curve for its values.</footer></main></body></html>\n"
    )


def write_report(run_dir: Path, file: Path | None = None) -> Path:
    """Write a run's page, whole or not at all; returns the file, by default ``report.html`` in the run.

    Raises:
        UserError: no run there, see `read_run`.
        OSError: the file can not be written.
    """
    target = file or run_dir / REPORT
    write_whole(target, render_report(read_run(run_dir)))
    return target
