"""Charts as text: lines in SVG, bars in HTML. Knows numbers, labels and CSS class names; nothing of runs or scores.

Colours are CSS classes `c0` … `c6`, so that the page decides them, in light and in dark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = 7
WIDTH, HEIGHT = 720, 320
LEFT, RIGHT, TOP, BOTTOM = 52, 136, 14, 44


@dataclass(frozen=True)
class Line:
    """A named curve of (x, y) points. faint: drawn behind the others and not named. dots: points marked."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    faint: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Bar:
    """One bar: its share of the track, what it is called, how it is drawn (`c0`… or `blind`, `shuffled`)."""

    value: float
    name: str
    style: str = "c0"
    text: str = ""


def line_chart(
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    y_range: tuple[float, float] | None = None,
    y_text: Callable[[float], str] | None = None,
) -> str:
    """An SVG of curves over a common x, each named at its right end."""
    drawn = [line for line in lines if line.points]
    points = [point for line in drawn for point in line.points]
    if not points:
        return ""
    low_x, high_x = _spread([x for x, _ in points])
    low, high = y_range or _spread([y for _, y in points])
    y_ticks = nice_ticks(low, high)
    if y_range is None:
        low, high = min(low, y_ticks[0]), max(high, y_ticks[-1])

    def x_at(x: float) -> float:
        return LEFT + (x - low_x) / (high_x - low_x) * (WIDTH - LEFT - RIGHT)

    def y_at(y: float) -> float:
        return HEIGHT - BOTTOM - (min(max(y, low), high) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    shown = y_text or plain
    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_label)}">']
    for tick in y_ticks:
        if low <= tick <= high:
            parts.append(
                f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y_at(tick):.1f}" y2="{y_at(tick):.1f}"/>'
            )
            parts.append(
                f'<text class="tick" x="{LEFT - 8}" y="{y_at(tick) + 4:.1f}" text-anchor="end">{shown(tick)}</text>'
            )
    for tick in nice_ticks(low_x, high_x):
        if low_x <= tick <= high_x:
            middle = f'x="{x_at(tick):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle"'
            parts.append(f'<text class="tick" {middle}>{plain(tick)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y_at(low):.1f}" y2="{y_at(low):.1f}"/>')
    label = f'x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle"'
    parts.append(f'<text class="label" {label}>{escape(x_label)}</text>')
    for line in sorted(drawn, key=lambda line: not line.faint):
        parts += _curve(line, [(x_at(x), y_at(y)) for x, y in line.points])
    named = [line for line in drawn if not line.faint]
    heights = _apart([y_at(line.points[-1][1]) for line in named], 16.0, TOP + 4.0, HEIGHT - BOTTOM)
    for line, height in zip(named, heights, strict=True):
        place = f'x="{x_at(line.points[-1][0]) + 9:.1f}" y="{height + 4:.1f}"'
        last = shown(line.points[-1][1])
        parts.append(f'<text class="name t{line.colour % COLOURS}" {place}>{escape(line.name)} {last}</text>')
    return "".join([*parts, "</svg>"])


def bars(rows: Sequence[tuple[str, Sequence[Bar]]]) -> str:
    """HTML rows of a label and its bars, the first thick, the others thin beneath; values are shares of 1."""
    parts = ['<div class="bars">']
    for label, group in rows:
        parts.append(f'<div class="row"><div class="what">{escape(label)}</div><div class="group">')
        for bar in group:
            width = 100 * min(max(bar.value, 0.0), 1.0)
            hint = escape(f"{label}, {bar.name}: {bar.text or percent(bar.value)}")
            parts.append(
                f'<div class="bar {bar.style}" title="{hint}"><div class="track"><i style="width:{width:.2f}%"></i></div>'
                f"<b>{escape(bar.text or percent(bar.value))}</b></div>"
            )
        parts.append("</div></div>")
    return "".join([*parts, "</div>"])


def columns(rows: Sequence[tuple[str, Sequence[float]]], names: Sequence[str]) -> str:
    """An SVG of groups of upright bars between -1 and 1 about a zero line, each group labelled."""
    width, height, bottom = max(240, 40 + 64 * len(rows)), 220, 30
    low = min([0.0, *(value for _, values in rows for value in values)])
    low = -1.0 if low < 0 else 0.0
    scale = (height - bottom - 20) / (1.0 - low)
    zero = height - bottom + low * scale
    parts = [f'<svg class="chart columns" viewBox="0 0 {width} {height}" style="max-width:{1.4 * width}px" role="img">']
    for tick in (-1.0, -0.5, 0.0, 0.5, 1.0):
        if tick >= low:
            y = zero - tick * scale
            parts.append(f'<line class="grid" x1="34" x2="{width}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text class="tick" x="28" y="{y + 4:.1f}" text-anchor="end">{plain(tick)}</text>')
    for place, (label, values) in enumerate(rows):
        left = 48 + 64 * place
        for which, value in enumerate(values):
            top, size = (zero - value * scale, value * scale) if value >= 0 else (zero, -value * scale)
            hint = escape(f"{label}, {names[which]}: {value:.3f}")
            box = f'x="{left + 20 * which}" y="{top:.1f}" width="17" height="{max(size, 1):.1f}" rx="2"'
            parts.append(f'<rect class="f{which}" {box}><title>{hint}</title></rect>')
        parts.append(
            f'<text class="tick" x="{left + 18}" y="{height - 10}" text-anchor="middle">{escape(label)}</text>'
        )
    return "".join([*parts, "</svg>"])


def smooth(points: Sequence[tuple[float, float]], most: int = 240) -> list[tuple[float, float]]:
    """The means of at most `most` consecutive groups of points."""
    size = max(1, math.ceil(len(points) / most))
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def running_mean(points: Sequence[tuple[float, float]], share: float = 0.04) -> list[tuple[float, float]]:
    """Each y as the mean of its neighbourhood, `share` of all points wide, narrower towards the ends."""
    half = max(1, round(len(points) * share / 2))
    averaged = []
    for place, (x, _) in enumerate(points):
        reach = min(half, place, len(points) - 1 - place)
        near = [y for _, y in points[place - reach : place + reach + 1]]
        averaged.append((x, sum(near) / len(near)))
    return averaged


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, about so many."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * place, 12) for place in range(first, last + 1)]


def percent(value: float) -> str:
    """0.913 -> 91.3 %, with a narrow space that does not break."""
    return f"{100 * value:.1f}\u202f%"


def plain(value: float) -> str:
    """A number without needless digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _curve(line: Line, places: Sequence[tuple[float, float]]) -> list[str]:
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    parts = [f'<path class="line s{line.colour % COLOURS}{" faint" if line.faint else ""}" d="{path}"/>']
    if line.dots:
        for (x, y), (_, value) in zip(places, line.points, strict=True):
            hint = escape(f"{line.name}: {value:.4g}")
            parts.append(
                f'<circle class="f{line.colour % COLOURS}" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{hint}</title></circle>'
            )
    return parts


def _spread(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _apart(wanted: Sequence[float], gap: float, top: float, bottom: float) -> list[float]:
    """The same heights in the same order, moved until neighbours are `gap` apart and inside the chart if they fit."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [0.0] * len(wanted)
    above = top - gap
    for i in order:
        placed[i] = above = max(wanted[i], above + gap)
    below = bottom + gap
    for i in reversed(order):
        placed[i] = below = min(placed[i], below - gap)
    return placed
