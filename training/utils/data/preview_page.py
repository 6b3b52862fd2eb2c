"""The preview as one HTML file without scripts: rows with the trained tokens marked, counts, lengths."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from training.utils.run.files import GENERATOR

_BARS = 24
_STYLE = """
:root { color-scheme: light dark; --text: #1d2430; --soft: #5d6675; --line: #d9dde4; --card: #fff; --page: #f4f5f7;
  --trained: #c9ecd0; --special: #8a2bb0; --bar: #4a90d9 }
@media (prefers-color-scheme: dark) { :root { --text: #e3e6eb; --soft: #9aa3b2; --line: #3a414d; --card: #1e232b;
  --page: #14181e; --trained: #1d5132; --special: #d79af0; --bar: #5b9fe6 } }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 0 auto; padding: 1.5rem; color: var(--text);
  background: var(--page) }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.15rem; margin: 2rem 0 .6rem }
.legend { color: var(--soft); margin: .4rem 0 1rem }
.row { background: var(--card); border: 1px solid var(--line); border-radius: 10px; margin: 0 0 1rem; overflow: hidden }
.row > header { padding: .5rem 1rem; border-bottom: 1px solid var(--line); color: var(--soft); font-size: .875rem;
  overflow-wrap: anywhere }
.texts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)) }
.texts > div { border-top: 1px solid var(--line); border-left: 1px solid var(--line); margin: -1px 0 0 -1px }
h3 { font-size: .8rem; margin: .8rem 1rem 0; color: var(--soft); font-weight: 600 }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; padding: .8rem 1rem 1rem; color: var(--soft);
  font: .875rem/1.6 ui-monospace, Menlo, Consolas, monospace }
.trained { background: var(--trained); color: var(--text) }
.special { color: var(--special); border: 1px solid currentcolor; border-radius: 4px; padding: 0 .2em; font-size: .8em;
  opacity: .85 }
table { border-collapse: collapse; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  width: 100% }
td { padding: .35rem 1rem; vertical-align: top; border-top: 1px solid var(--line); overflow-wrap: anywhere }
tr:first-child td { border-top: 0 } td:first-child { color: var(--soft); width: 22rem; max-width: 45vw }
tr.inner td:first-child { padding-left: 2rem } tr.zero { opacity: .55 }
tr.dropped td:last-child { font-weight: 600 }
.bars { display: flex; align-items: flex-end; height: 8rem; gap: 2px; background: var(--card);
  border: 1px solid var(--line); border-radius: 10px; padding: 1rem 1rem 0 }
.bars > i { flex: 1; background: var(--bar); border-radius: 3px 3px 0 0; min-height: 1px }
.scale { display: flex; justify-content: space-between; color: var(--soft); font-size: .8rem; padding: .2rem 1rem 0 }
"""
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">{generator}
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style></head><body>
<h1>{title}</h1>
<p class="legend">{legend}</p>
{rows}
<h2>Counts</h2>
<table>{counts}</table>
{lengths}
</body></html>
"""
_LEGENDS = {
    True: '<span class="trained">Green</span> tokens are trained on, the others are context;'
    ' <span class="special">framed</span> tokens are special.',
    False: 'These are prompts: nothing of them is trained on; <span class="special">framed</span> tokens are special.',
}


@dataclass(frozen=True)
class Piece:
    """Text of neighbouring tokens of one kind: trained, untrained or special (and then trained or not)."""

    text: str
    trained: bool
    special: bool


def _text(parts: Sequence[Piece]) -> str:
    spans = []
    for part in parts:
        kind = " ".join(name for name, on in (("trained", part.trained), ("special", part.special)) if on)
        text = html.escape(part.text)
        spans.append(f'<span class="{kind}">{text}</span>' if kind else text)
    return f"<pre>{''.join(spans)}</pre>"


def _rows(rows: Sequence[tuple[str, list[Piece]]]) -> str:
    """A card for every row; of a pair, whose titles differ in their last word, the answers stand side by side."""
    cards = []
    numbered = iter(rows)
    for title, parts in numbered:
        name, _, answer = title.rpartition(", ")
        body = _text(parts)
        if answer == "chosen":
            rejected = next(numbered)[1]
            same = next((i for i, (a, b) in enumerate(zip(parts, rejected, strict=False)) if a != b), 0)
            title, columns = name, (("chosen", parts[same:]), ("rejected", rejected[same:]))
            body = _text(parts[:same]) if same else ""
            body += "".join(f"<div><h3>{heading}</h3>{_text(rest)}</div>" for heading, rest in columns)
            body = body.replace("<div>", '<div class="texts"><div>', 1) + "</div>"
        cards.append(f'<section class="row"><header>{html.escape(title)}</header>{body}</section>')
    return "\n".join(cards)


def _counts(table: Sequence[tuple[str, str]]) -> str:
    lines = []
    for what, how in table:
        kinds = [
            "inner" if what.startswith(" ") else "",
            "dropped" if what.startswith("dropped") and how != "0" else "",
            "zero" if how == "0" else "",
        ]
        kind = " ".join(filter(None, kinds))
        cells = f"<td>{html.escape(what.strip())}</td><td>{html.escape(how)}</td>"
        lines.append(f'<tr class="{kind}">{cells}</tr>' if kind else f"<tr>{cells}</tr>")
    return "\n".join(lines)


def _lengths(lengths: Sequence[int]) -> str:
    """How long the rows are, as bars of equal width from the shortest to the longest."""
    low, high = min(lengths), max(lengths)
    if high - low < _BARS:
        return ""
    bins = [0] * _BARS
    for length in lengths:
        bins[min(_BARS - 1, (length - low) * _BARS // (high - low))] += 1
    bars = []
    for i, count in enumerate(bins):
        start, end = (low + (high - low) * k // _BARS for k in (i, i + 1))
        told = f"{start} to {end} tokens: {count} rows"
        bars.append(f'<i style="height: {100 * count / max(bins):.1f}%" title="{told}"></i>')
    scale = "".join(f"<span>{low + (high - low) * k // 4}</span>" for k in range(5))
    chart = f'<div class="bars" role="img" aria-label="histogram of lengths">{"".join(bars)}</div>'
    return f'<h2>Lengths in tokens</h2>{chart}<div class="scale">{scale}</div>'


def page(
    step: int, rows: Sequence[tuple[str, list[Piece]]], table: Sequence[tuple[str, str]], lengths: Sequence[int]
) -> str:
    """The whole page of a step, 1 to 3; all text is escaped.

    Args:
        rows: (title, pieces) of the rows to show.
        table: (what, how many).
        lengths: tokens of every training row.
    """
    return _PAGE.format(
        generator=GENERATOR,
        title=f"Step {step}: what the model sees",
        style=_STYLE,
        legend=_LEGENDS[step != 3],
        rows=_rows(rows),
        counts=_counts(table),
        lengths=_lengths(lengths),
    )
