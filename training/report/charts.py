"""Charts as inline SVG: lines, a path through a plane, intervals, bars. Colours are CSS variables, so dark mode works.

Every function returns markup; every text in it is escaped here. By hand: matplotlib, which draws for the benchmarks, is
no requirement of a run, and its SVG has neither tooltips nor the page's colours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from training.report.text import e

WIDTH, HEIGHT = 480, 260
LEFT, RIGHT, TOP, BOTTOM = 54, 52, 24, 40
MOST_POINTS = 240  # of a curve; longer ones become means of neighbours, which a screen can not tell apart
SMOOTH_FROM = 60  # points from which a noisy curve gets a moving mean over it
SMOOTHING = 0.9  # of the moving mean: share of the past

Point = tuple[float, float]
Share = tuple[str, str, float, tuple[float, float] | None]  # label, what stands below it, share, ends of its interval


@dataclass(frozen=True)
class Series:
    """One curve: (x, y) in rising x; ``colour`` 1 to 4 is a CSS variable; ``dots`` marks a few measured points."""

    label: str
    points: Sequence[Point] = ()
    colour: int = 1
    dots: bool = False


def ticks(low: float, high: float) -> list[float]:
    """Round numbers that span ``low`` to ``high``: multiples of 1, 2, 2.5 or 5 times a power of ten."""
    if not high > low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def figure(value: float) -> str:
    """A number for people: 0.0312, 1.25, 26.1, 1,200."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size < 0.001:
        return f"{value:.1e}"
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 0.1 else 3
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text and value == round(value) else text


def line_chart(title: str, x_label: str, y_label: str, series: Sequence[Series], *, zero_one: bool = False) -> str:
    """Curves over a common x axis, with axis labels, a legend, and each curve's last value at its end.

    Args:
        title: above the chart.
        x_label, y_label: with units.
        series: empty ones are left out; "" comes back if none is left.
        zero_one: the values are shares: the y axis runs from 0 to 1.
    """
    shown = [replace(s, points=thinned(s.points)) for s in series if s.points]
    if not shown:
        return ""
    xs = [x for s in shown for x, _ in s.points]
    ys = [y for s in shown for _, y in s.points]
    x_ticks, y_ticks = ticks(min(xs), max(xs)), [0, 0.25, 0.5, 0.75, 1] if zero_one else ticks(min(ys), max(ys))
    plane = _Plane(min(xs), max(xs), y_ticks[0], y_ticks[-1])
    parts = [plane.frame([x for x in x_ticks if min(xs) <= x <= max(xs)], y_ticks, x_label, y_label)]
    ends = _spread([plane.y(s.points[-1][1]) for s in shown])
    for one, end in zip(shown, ends, strict=True):
        parts.append(_curve(one, plane))
        label = figure(one.points[-1][1])
        parts.append(f'<text class="end c{one.colour}" x="{WIDTH - RIGHT + 6}" y="{end + 4:.1f}">{label}</text>')
    keys = "".join(f'<span><i class="c{s.colour}"></i>{e(s.label)}</span>' for s in shown)
    legend = f'<p class="legend">{keys}</p>' if len(shown) > 1 else ""
    return _figure(title, "".join(parts), legend, f"{title}: {y_label} by {x_label}")


def path_chart(title: str, x_label: str, y_label: str, points: Sequence[Point]) -> str:
    """A walk through a plane, a point for each iteration, the later the stronger; the first and the last are named."""
    if not points:
        return ""
    points = thinned(points)
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    plane = _Plane(x_ticks[0], x_ticks[-1], y_ticks[0], y_ticks[-1])
    route = " ".join(f"{plane.x(x):.1f},{plane.y(y):.1f}" for x, y in points)
    parts = [plane.frame(x_ticks, y_ticks, x_label, y_label), f'<polyline class="line faint c1" points="{route}"/>']
    for i, (x, y) in enumerate(points):
        strength = 0.25 + 0.75 * i / max(len(points) - 1, 1)
        tip = e(f"iteration {i + 1}: {x_label} {figure(x)}, {y_label} {figure(y)}")
        parts.append(
            f'<circle class="dot c1" cx="{plane.x(x):.1f}" cy="{plane.y(y):.1f}" r="5" opacity="{strength:.2f}">'
            f"<title>{tip}</title></circle>"
        )
    for i in sorted({0, len(points) - 1}):
        x, y = plane.x(points[i][0]), plane.y(points[i][1])
        text, anchor = ("first", "start") if i == 0 and len(points) > 1 else ("last", "end")
        shift = 9 if anchor == "start" else -9
        parts.append(f'<text class="name" x="{x + shift:.1f}" y="{y - 7:.1f}" text-anchor="{anchor}">{text}</text>')
    return _figure(title, "".join(parts), "", f"{title}: {y_label} against {x_label}")


def interval_chart(title: str, rows: Sequence[Share], middle: str) -> str:
    """Shares with their intervals, one row each, and a line at one half, which means ``middle``."""
    if not rows:
        return ""
    left, right, height = 20, WIDTH - 20, 72 * len(rows) + 50
    x = lambda share: left + (right - left) * min(max(share, 0.0), 1.0)  # noqa: E731  a scale, used five times below
    base = height - 34
    parts = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        strong = " half" if share == 0.5 else ""
        parts.append(f'<line class="grid{strong}" x1="{x(share)}" x2="{x(share)}" y1="8" y2="{base}"/>')
        parts.append(f'<text class="tick" x="{x(share)}" y="{base + 16}" text-anchor="middle">{share:.0%}</text>')
    parts.append(f'<text class="axis" x="{x(0.5)}" y="{base + 31}" text-anchor="middle">{e(middle)}</text>')
    for i, (label, beside, share, ends) in enumerate(rows):
        y = 8 + 72 * i + 54
        text = f"{share:.0%}" + (" [{:.0%}, {:.0%}]".format(*ends) if ends else "")
        parts.append(f'<text class="row" x="{left}" y="{y - 32}">{e(label)}</text>')
        parts.append(f'<text class="tick" x="{left}" y="{y - 17}">{e(beside)}</text>')
        parts.append(f'<text class="row value" x="{right}" y="{y - 17}" text-anchor="end">{text}</text>')
        if ends:
            parts.append(f'<line class="whisker c1" x1="{x(ends[0])}" x2="{x(ends[1])}" y1="{y}" y2="{y}"/>')
        parts.append(f'<circle class="dot c1" cx="{x(share):.1f}" cy="{y}" r="6"><title>{text}</title></circle>')
    return _figure(title, "".join(parts), "", f"{title}, {len(rows)} rows", height)


def bar_chart(title: str, rows: Sequence[tuple[str, float, int]], note: str) -> str:
    """Shares between 0 and 1 as horizontal bars: label, share, colour; with a note below."""
    if not rows:
        return ""
    left, right, height = 150, WIDTH - 56, 34 * len(rows) + 30
    parts = []
    for share in (0, 0.5, 1):
        x = left + (right - left) * share
        strong = " half" if share == 0.5 else ""
        parts.append(f'<line class="grid{strong}" x1="{x}" x2="{x}" y1="0" y2="{height - 24}"/>')
        parts.append(f'<text class="tick" x="{x}" y="{height - 8}" text-anchor="middle">{share:.0%}</text>')
    for i, (label, share, colour) in enumerate(rows):
        y, width = 8 + 34 * i, (right - left) * min(max(share, 0.0), 1.0)
        parts.append(f'<text class="row" x="{left - 10}" y="{y + 15}" text-anchor="end">{e(label)}</text>')
        parts.append(f'<rect class="bar c{colour}" x="{left}" y="{y}" width="{width:.1f}" height="20" rx="3"/>')
        parts.append(f'<text class="row value" x="{left + width + 8:.1f}" y="{y + 15}">{share:.1%}</text>')
    return _figure(title, "".join(parts), f'<p class="legend">{e(note)}</p>', title, height)


def histogram(title: str, x_label: str, edges: Sequence[float], counts: Sequence[float]) -> str:
    """Counts between edges (one more edge than counts); what lies below 0 has another colour."""
    if not counts or len(edges) != len(counts) + 1 or not edges[-1] > edges[0]:
        return ""
    y_ticks = ticks(0, max([*counts, 1]))
    plane = _Plane(edges[0], edges[-1], 0, y_ticks[-1])
    inside = [x for x in ticks(edges[0], edges[-1]) if edges[0] <= x <= edges[-1]]
    parts = [plane.frame(inside, y_ticks, x_label, "pairs")]
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        x, y = plane.x(low), plane.y(count)
        colour = 2 if (low + high) / 2 < 0 else 1
        parts.append(
            f'<rect class="bar c{colour}" x="{x + 0.5:.1f}" y="{y:.1f}" width="{max(plane.x(high) - x - 1, 0.5):.1f}" '
            f'height="{HEIGHT - BOTTOM - y:.1f}"><title>{figure(low)} to {figure(high)}: {count:g}</title></rect>'
        )
    return _figure(title, "".join(parts), "", f"{title}: {x_label}")


def stacked_bars(rows: Sequence[tuple[str, Sequence[tuple[str, float, str]]]], colours: dict[str, int]) -> str:
    """Rows of a common scale, each cut into parts.

    Args:
        rows: label, and parts as (name, value, what a tooltip says).
        colours: part name -> 1 to 8.
    """
    longest = max((sum(v for _, v, _ in parts) for _, parts in rows), default=0.0)
    if longest <= 0:
        return ""
    left, right, width = 62, 10, 1000
    drawn = []
    for i, (label, parts) in enumerate(rows):
        x, y = float(left), 6 + 38 * i
        drawn.append(f'<text class="row" x="0" y="{y + 18}">{e(label)}</text>')
        for name, value, tip in parts:
            length = (width - left - right) * value / longest
            drawn.append(
                f'<rect class="part p{colours[name]}" x="{x:.1f}" y="{y}" width="{max(length - 1.5, 0.5):.1f}" '
                f'height="26" rx="3"><title>{e(f"{name}: {tip}")}</title></rect>'
            )
            if length > 9 * len(name) + 8:
                middle = x + length / 2
                drawn.append(f'<text class="inside" x="{middle:.1f}" y="{y + 18}">{e(name)}</text>')
            x += length
    height = 38 * len(rows) + 6
    keys = "".join(f'<span><i class="p{c}"></i>{e(name)}</span>' for name, c in colours.items())
    return (
        f'<figure class="wide"><svg viewBox="0 0 {width} {height}" role="img" aria-label="time by phase">'
        f'{"".join(drawn)}</svg><p class="legend">{keys}</p></figure>'
    )


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most `MOST_POINTS` points: means of equally many neighbours, the last point kept as it is."""
    if len(points) <= MOST_POINTS:
        return list(points)
    size = math.ceil((len(points) - 1) / (MOST_POINTS - 1))
    body = points[:-1]
    groups = [body[i : i + size] for i in range(0, len(body), size)]
    means = [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]
    return [*means, points[-1]]


@dataclass(frozen=True)
class _Plane:
    """Data coordinates -> drawing coordinates."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        span = self.x_high - self.x_low
        return LEFT + (WIDTH - LEFT - RIGHT) * ((value - self.x_low) / span if span else 0.5)

    def y(self, value: float) -> float:
        span = self.y_high - self.y_low
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * ((value - self.y_low) / span if span else 0.5)

    def frame(self, x_ticks: Sequence[float], y_ticks: Sequence[float], x_label: str, y_label: str) -> str:
        """Grid, ticks and axis labels."""
        parts = []
        for value in y_ticks:
            y = self.y(value)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text class="tick" x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{_tick(value)}</text>')
        for value in x_ticks:
            x = self.x(value)
            parts.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">')
            parts.append(f"{_tick(value)}</text>")
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(f'<text class="axis" x="{middle}" y="{HEIGHT - 5}" text-anchor="middle">')
        parts.append(f'{e(x_label)}</text><text class="axis" x="2" y="11">{e(y_label)}</text>')
        return "".join(parts)


def _tick(value: float) -> str:
    return f"{value:,.6g}" if abs(value) > 1e-12 else "0"


def _curve(series: Series, plane: _Plane) -> str:
    places = [(plane.x(x), plane.y(y)) for x, y in series.points]
    noisy = len(places) >= SMOOTH_FROM and not series.dots
    route = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts = [f'<polyline class="line c{series.colour}{" faint" if noisy else ""}" points="{route}"/>']
    if noisy:
        mean, smooth = places[0][1], []
        for x, y in places:
            mean = SMOOTHING * mean + (1 - SMOOTHING) * y
            smooth.append(f"{x:.1f},{mean:.1f}")
        parts.append(f'<polyline class="line c{series.colour}" points="{" ".join(smooth)}"/>')
    for (x, y), (data_x, data_y) in zip(places, series.points, strict=True):
        kind = "dot" if series.dots or len(places) == 1 else "hit"
        tip = e(f"{series.label}, {figure(data_x)}: {figure(data_y)}")
        parts.append(f'<circle class="{kind} c{series.colour}" cx="{x:.1f}" cy="{y:.1f}" r="4">')
        parts.append(f"<title>{tip}</title></circle>")
    return "".join(parts)


def _spread(places: Sequence[float], gap: float = 14) -> list[float]:
    """The places of labels, moved down where they would lie on each other."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = list(places)
    for before, this in zip(order, order[1:], strict=False):
        moved[this] = max(moved[this], moved[before] + gap)
    return moved


def _figure(title: str, drawing: str, legend: str, described: str, height: int = HEIGHT) -> str:
    return (
        f"<figure><figcaption>{e(title)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{e(described)}">{drawing}</svg>'
        f"{legend}</figure>"
    )
