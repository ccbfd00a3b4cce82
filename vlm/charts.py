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

Bin = tuple[int, int, int]  # from, below, how many


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


def histogram(bins: Sequence[Bin], label: str, middle: float | None = None, colour: int = 0) -> str:
    """An SVG of how often whole numbers occur: bins of (from, below, count) side by side, `middle` marked as the median.

    All bins are equally wide but the last, which may gather what lies far out; it is drawn faint and says from where on.
    """
    if not bins:
        return ""
    plot = _Histogram(bins)
    marked = [] if middle is None else plot.median(middle)
    box = f'viewBox="0 0 {plot.WIDTH} {plot.HEIGHT}" role="img" aria-label="{escape(label)}"'
    place = f'x="{(plot.LEFT + plot.WIDTH) / 2}" y="{plot.HEIGHT - 5}" text-anchor="middle"'
    named = f'<text class="label" {place}>{escape(label)}</text>'
    return "".join(
        [f'<svg class="chart" {box}>', *plot.counts(), *plot.bars(colour), *plot.numbers(), named, *marked, "</svg>"]
    )


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


def short(value: float) -> str:
    """A number for where there is little room: 1250000 -> 1.25 M, with a narrow space that does not break."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= max(size, 1e4):
            return f"{value / size:.3g}\u202f{unit}"
    return f"{value:,.6g}"


def duration(seconds: float) -> str:
    """77 -> 1 min 17 s."""
    if seconds < 60:
        return f"{plain(round(seconds, 1))} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


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


class _Histogram:
    """Where everything of one histogram stands."""

    WIDTH, HEIGHT, LEFT, TOP, FLOOR = 340, 190, 42, 24, 148
    WIDEST = 36  # of a single bar: a few bars stand together at the left and do not fill the chart

    def __init__(self, bins: Sequence[Bin]) -> None:
        self.bins = bins
        self.start, self.step = bins[0][0], bins[0][1] - bins[0][0]
        self.slot = min(self.WIDEST, (self.WIDTH - self.LEFT - 12) / len(bins))
        self.most = max(count for _, _, count in bins)
        self.tailed = bins[-1][1] - bins[-1][0] > self.step

    def x(self, value: float) -> float:
        """A bin of one number stands for that number, so the number is in its middle."""
        return self.LEFT + ((value - self.start) / self.step + (0.5 if self.step == 1 else 0.0)) * self.slot

    def y(self, count: float) -> float:
        return self.FLOOR - count / self.most * (self.FLOOR - self.TOP)

    def counts(self) -> list[str]:
        parts = []
        for tick in nice_ticks(0, self.most, 3):
            if tick <= self.most and tick == round(tick):
                y, kind = self.y(tick), "grid" if tick else "axis"
                parts.append(f'<line class="{kind}" x1="{self.LEFT}" x2="{self.WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
                at = f'x="{self.LEFT - 7}" y="{y + 4:.1f}" text-anchor="end"'
                parts.append(f'<text class="tick" {at}>{short(tick)}</text>')
        return parts

    def bars(self, colour: int) -> list[str]:
        parts, gap = [], min(2.0, self.slot / 6)
        for place, (low, below, count) in enumerate(self.bins):
            # What is there at all can be seen, however little.
            tall = max(self.FLOOR - self.y(count), 1.5) if count else 0.0
            faint = ' opacity="0.45"' if self.tailed and place == len(self.bins) - 1 else ""
            x = self.LEFT + place * self.slot + gap / 2
            size = f'width="{self.slot - gap:.1f}" height="{tall:.1f}" rx="1.5"'
            hint = f"{low:,}: {count:,}" if below - low == 1 else f"{low:,} to {below - 1:,}: {count:,}"
            box = f'x="{x:.1f}" y="{self.FLOOR - tall:.1f}" {size}{faint}'
            parts.append(f'<rect class="f{colour % COLOURS}" {box}><title>{hint}</title></rect>')
        return parts

    def numbers(self) -> list[str]:
        last = self.bins[-1]
        end = last[0] if self.tailed else last[1] - (self.step == 1)
        ticks = nice_ticks(self.start, end) if end > self.start else [self.start]
        named = [(self.x(tick), short(tick)) for tick in ticks if self.start <= tick <= end and tick == round(tick)]
        if self.tailed:
            far = self.LEFT + (len(self.bins) - 0.5) * self.slot
            named = [one for one in named if one[0] < far - 36] + [(far, f"≥ {short(last[0])}")]
        place = f'y="{self.FLOOR + 17}" text-anchor="middle"'
        return [f'<text class="tick" x="{x:.1f}" {place}>{words}</text>' for x, words in named]

    def median(self, value: float) -> list[str]:
        x = self.x(value)
        left = x < (self.LEFT + self.WIDTH) / 2
        side = f'x="{x + 6:.1f}" text-anchor="start"' if left else f'x="{x - 6:.1f}" text-anchor="end"'
        ends = f'x1="{x:.1f}" x2="{x:.1f}" y1="{self.TOP - 14}" y2="{self.FLOOR}"'
        return [
            f'<line class="axis" stroke-dasharray="3 3" {ends}/>',
            f'<text class="label" {side} y="{self.TOP - 10}">median {short(value)}</text>',
        ]


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
