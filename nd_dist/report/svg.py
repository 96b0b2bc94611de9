"""Small charts as inline SVG text: heat maps, axes, scatters, scales, curves. Pure functions, no drawing library.

Colours come from the page's CSS variables, so charts follow light and dark. Every value is also in a table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

RAMP = ("#cde2fb", "#9ec5f4", "#6da7ec", "#3987e5", "#256abf", "#184f95", "#0d366b")
INK_ON_LIGHT, INK_ON_DARK = "#0b0b0b", "#ffffff"
MAX_CURVE_POINTS = 240


@dataclass(frozen=True)
class Cell:
    """One cell of a heat map.

    Args:
        value: What decides the colour.
        text: What is written in it.
        is_best: Whether it gets a frame.
    """

    value: float
    text: str
    is_best: bool = False


def heat_map(title: str, rows: Sequence[str], columns: Sequence[str], cells: Mapping[tuple[int, int], Cell]) -> str:
    """Return a heat map; darker is larger (callers negate what is better when low), a missing cell stays empty.

    Args:
        title: Name for screen readers.
        rows, columns: Labels, top to bottom and left to right.
        cells: (row, column) -> cell.
    """
    width, height, left, top = 78, 40, 74, 26
    values = [cell.value for cell in cells.values()]
    low, high = min(values), max(values)
    across, down = left + width * len(columns) + 4, top + height * len(rows) + 8
    parts = [
        f'<svg viewBox="0 0 {across} {down}" style="max-width:{across}px" role="img" '
        f'aria-label="{escape(title)}" class="heat">'
    ]
    for column, label in enumerate(columns):
        parts.append(_text(left + width * (column + 0.5), top - 9, label, "axis", "middle"))
    for row, label in enumerate(rows):
        parts.append(_text(left - 9, top + height * (row + 0.5) + 4, label, "axis", "end"))
    for (row, column), cell in sorted(cells.items()):
        shade = _shade(cell.value, low, high)
        x, y = left + width * column, top + height * row
        parts.append(f'<rect x="{x + 1}" y="{y + 1}" width="{width - 2}" height="{height - 2}" rx="4" ')
        parts.append(f'fill="{RAMP[shade]}"><title>{escape(cell.text)}</title></rect>')
        if cell.is_best:
            frame = f'<rect x="{x + 3.5}" y="{y + 3.5}" width="{width - 7}" height="{height - 7}" rx="3" '
            parts.append(frame + f'fill="none" stroke="{_ink(shade)}" stroke-width="1.5"/>')
        ink = f' style="fill:{_ink(shade)}"'
        parts.append(_text(x + width / 2, y + height / 2 + 4.5, cell.text, "cell", "middle", ink))
    return "".join([*parts, "</svg>"])


def _shade(value: float, low: float, high: float) -> int:
    """Return the position of a value in the colour ramp."""
    share = (value - low) / (high - low) if high > low else 0.5
    return min(len(RAMP) - 1, int(share * len(RAMP)))


def _ink(shade: int) -> str:
    return INK_ON_DARK if shade >= 3 else INK_ON_LIGHT


def _text(x: float, y: float, text: str, name: str, anchor: str, style: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{name}" text-anchor="{anchor}"{style}>{escape(text)}</text>'


WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 220, 56, 14, 12, 34


@dataclass(frozen=True)
class _Frame:
    """Where values lie in a chart."""

    x: tuple[float, float]
    y: tuple[float, float]
    width: int = WIDTH
    height: int = HEIGHT

    def across(self, value: float) -> float:
        span = (self.x[1] - self.x[0]) or 1
        return LEFT + (self.width - LEFT - RIGHT) * (value - self.x[0]) / span

    def up(self, value: float) -> float:
        return TOP + (self.height - TOP - BOTTOM) * (1 - (value - self.y[0]) / ((self.y[1] - self.y[0]) or 1))

    def opened(self, title: str, ticks: Sequence[float], places: Sequence[float]) -> list[str]:
        """Return the beginning of a chart with its horizontal lines."""
        parts = [
            f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(title)}" class="curve">'
        ]
        for tick, place in zip(ticks, places, strict=True):
            y = f"{self.up(place):.1f}"
            parts.append(f'<line x1="{LEFT}" x2="{self.width - RIGHT}" y1="{y}" y2="{y}" class="grid"/>')
            parts.append(_text(LEFT - 8, self.up(place) + 4, f"{tick:g}", "axis", "end"))
        return parts


def curve(title: str, steps: Sequence[int], values: Sequence[float]) -> str:
    """Return a line chart over steps; its axis is logarithmic where positive values span more than a factor 20.

    Args:
        title: Name for screen readers.
        steps: Ascending steps.
        values: Finite numbers.
    """
    xs, ys = _thinned(steps, values)
    is_log = min(ys) > 0 and max(ys) / min(ys) > 20
    scaled = [math.log10(value) for value in ys] if is_log else ys
    ticks = _log_ticks(min(ys), max(ys)) if is_log else _ticks(min(ys), max(ys))
    places = [math.log10(tick) for tick in ticks] if is_log else ticks
    frame = _Frame((xs[0], max(xs[-1], xs[0] + 1)), (min([*scaled, *places]), max([*scaled, *places])))
    parts = frame.opened(title, ticks, places)
    for step in sorted({xs[0], (xs[0] + xs[-1]) // 2, xs[-1]}):
        parts.append(_text(frame.across(step), HEIGHT - 14, f"{step:,}".replace(",", " "), "axis", "middle"))
    path = " ".join(f"{frame.across(x):.1f},{frame.up(y):.1f}" for x, y in zip(xs, scaled, strict=True))
    parts.append(f'<polyline points="{path}" class="line"/>')
    parts.append(_text(WIDTH - RIGHT, HEIGHT - 1, "step", "axis", "end"))
    return "".join([*parts, "</svg>"])


def axis_chart(title: str, labels: Sequence[str], bars: Sequence[tuple[float, float, float]]) -> str:
    """Return values along one axis, equally spaced, with their intervals.

    Args:
        title: Name for screen readers.
        labels: Value of the axis at each place.
        bars: (value, low, high) at each place; low and high equal the value where there is no interval.
    """
    ticks = _ticks(min(bar[1] for bar in bars), max(bar[2] for bar in bars))
    frame = _Frame((-0.5, len(bars) - 0.5), (ticks[0], ticks[-1]))
    parts = frame.opened(title, ticks, ticks)
    path = " ".join(f"{frame.across(place):.1f},{frame.up(bar[0]):.1f}" for place, bar in enumerate(bars))
    parts.append(f'<polyline points="{path}" class="line thin"/>')
    for place, (label, (value, low, high)) in enumerate(zip(labels, bars, strict=True)):
        x = f"{frame.across(place):.1f}"
        parts.append(f'<line x1="{x}" x2="{x}" y1="{frame.up(low):.1f}" y2="{frame.up(high):.1f}" class="line"/>')
        parts.append(f'<circle cx="{x}" cy="{frame.up(value):.1f}" r="3.5" class="dot"/>')
        parts.append(_text(frame.across(place), HEIGHT - 14, label, "axis", "middle"))
    return "".join([*parts, "</svg>"])


def scatter(title: str, pairs: Sequence[tuple[float, float]], names: tuple[str, str]) -> str:
    """Return a square of dots, one a pair, with the diagonal: above it the second of a pair is larger.

    Args:
        title: Name for screen readers.
        pairs: (across, up) of each dot.
        names: What lies across, what up.
    """
    values = [value for pair in pairs for value in pair]
    ticks = _ticks(min(values), max(values))
    frame = _Frame((ticks[0], ticks[-1]), (ticks[0], ticks[-1]), 340, 320)
    parts = frame.opened(title, ticks, ticks)
    low, high = ticks[0], ticks[-1]
    ends = f'x1="{frame.across(low):.1f}" y1="{frame.up(low):.1f}" x2="{frame.across(high):.1f}"'
    parts.append(f'<line {ends} y2="{frame.up(high):.1f}" class="grid strong"/>')
    for across, up in pairs:
        parts.append(f'<circle cx="{frame.across(across):.1f}" cy="{frame.up(up):.1f}" r="3" class="dot faint"/>')
    parts += [_text(frame.across(tick), 304, f"{tick:g}", "axis", "middle") for tick in (low, high)]
    parts.append(_text(frame.across((low + high) / 2), 317, f"across: {names[0]}; up: {names[1]}", "axis", "middle"))
    return "".join([*parts, "</svg>"])


def scale(title: str, places: Sequence[float]) -> str:
    """Return a line from chance (0) to ceiling (1) with a mark at each place; the last one is filled."""
    parts = [f'<svg viewBox="0 0 200 16" role="img" aria-label="{escape(title)}" class="scale">']
    parts.append('<line x1="8" x2="192" y1="8" y2="8" class="grid strong"/>')
    parts += [f'<line x1="{x}" x2="{x}" y1="3" y2="13" class="grid strong"/>' for x in (8, 192)]
    for number, place in enumerate(places, start=1):
        kind = "dot" if number == len(places) else "ring"
        parts.append(f'<circle cx="{8 + 184 * min(1.04, max(-0.04, place)):.1f}" cy="8" r="4.5" class="{kind}"/>')
    return "".join([*parts, "</svg>"])


def _thinned(steps: Sequence[int], values: Sequence[float]) -> tuple[list[int], list[float]]:
    """Return at most ``MAX_CURVE_POINTS`` points, each the mean of its neighbours."""
    size = max(1, math.ceil(len(steps) / MAX_CURVE_POINTS))
    starts = range(0, len(steps), size)
    means = [math.fsum(values[start : start + size]) / len(values[start : start + size]) for start in starts]
    return [steps[start + (len(steps[start : start + size]) - 1) // 2] for start in starts], means


def _ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Return round numbers that cover a range."""
    span = (high - low) or abs(high) or 1.0
    rough = span / wanted
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    first = math.floor(low / step)
    count = math.ceil(high / step) - first
    return [round((first + index) * step, 12) for index in range(count + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten that cover a range of positive numbers."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return [10.0**power for power in range(first, last + 1)]
