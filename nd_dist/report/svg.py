"""Small charts as inline SVG text: heat maps over kappa and eta, training curves. Pure functions, no drawing library.

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


def curve(title: str, steps: Sequence[int], values: Sequence[float]) -> str:
    """Return a line chart of a loss over steps; its axis is logarithmic where the loss spans more than a factor 20.

    Args:
        title: Name for screen readers.
        steps: Ascending steps.
        values: Finite losses.
    """
    width, height, left, right, top, bottom = 460, 220, 56, 14, 12, 34
    xs, ys = _thinned(steps, values)
    is_log = min(ys) > 0 and max(ys) / min(ys) > 20
    scaled = [math.log10(value) for value in ys] if is_log else ys
    ticks = _log_ticks(min(ys), max(ys)) if is_log else _ticks(min(ys), max(ys))
    places = [math.log10(tick) for tick in ticks] if is_log else ticks
    low, high = min([*scaled, *places]), max([*scaled, *places])

    def across(step: float) -> float:
        span = max(xs[-1] - xs[0], 1)
        return left + (width - left - right) * (step - xs[0]) / span

    def up(value: float) -> float:
        return top + (height - top - bottom) * (1 - (value - low) / ((high - low) or 1))

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}" class="curve">']
    for tick, place in zip(ticks, places, strict=True):
        y = f"{up(place):.1f}"
        parts.append(f'<line x1="{left}" x2="{width - right}" y1="{y}" y2="{y}" class="grid"/>')
        parts.append(_text(left - 8, up(place) + 4, f"{tick:g}", "axis", "end"))
    for step in sorted({xs[0], (xs[0] + xs[-1]) // 2, xs[-1]}):
        parts.append(_text(across(step), height - 14, f"{step:,}".replace(",", " "), "axis", "middle"))
    path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in zip(xs, scaled, strict=True))
    parts.append(f'<polyline points="{path}" class="line"/>')
    parts.append(_text(width - right, height - 1, "step", "axis", "end"))
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
