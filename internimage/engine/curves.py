# SPDX-License-Identifier: MIT
"""Line plots for the report, as SVG that scales to the available width and takes its colors from the page's style."""

import html
import math

Points = list[tuple[float, float]]

_WIDTH, _HEIGHT = 460, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 72, 14, 10, 42  # margins for the tick labels and the axis labels
_MOST_POINTS = 1000  # per line; more would not be visible
_LARGEST, _SMALLEST = 1e100, 1e-300  # limits of values and of their differences, within which nothing overflows


def curve(title: str, x_name: str, y_name: str, series: list[tuple[str, str, Points]], most: float = math.inf) -> str:
    """An HTML figure with one or several lines, or "" if there is no point to draw.

    Points that are not finite, larger than 1e100 in magnitude or above `most` are not drawn.

    Args:
        title: Above the plot.
        x_name, y_name: Labels of the axes, with units.
        series: Of each line, its name (empty for none in the legend), color (main, faint or other, classes of the
            page's style) and points.
        most: Upper limit of the y axis.
    """
    series = [
        (
            name,
            color,
            [(x, y) for x, y in points if max(abs(x), abs(y)) <= _LARGEST and y <= most and x == x and y == y],
        )
        for name, color, points in series
    ]
    series = [(name, color, p[:: math.ceil(len(p) / _MOST_POINTS)]) for name, color, p in series if p]
    if not series:
        return ""
    every = [point for _, _, points in series for point in points]
    x0, x1 = _span([x for x, _ in every])
    y_ticks = _ticks(*_span([y for _, y in every]), 5, outward=True)
    y_ticks = [tick for tick in y_ticks if tick <= most * (1 + 1e-9)]
    y0, y1 = y_ticks[0], max(y_ticks[-1], min(most, max(y for _, y in every)))
    if y1 <= y0:
        y0 = y1 - 1
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT

    def across(x: float) -> float:
        return _LEFT + (x - x0) / (x1 - x0) * (right - _LEFT)

    def up(y: float) -> float:
        return bottom - (y - y0) / (y1 - y0) * (bottom - _TOP)

    parts = []
    for tick, label in zip(y_ticks, _labels(y_ticks)):
        parts.append(f'<path class="grid" d="M{_LEFT} {up(tick):.1f}H{right}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{up(tick) + 4:.1f}" text-anchor="end">{label}</text>')
    x_ticks = [tick for tick in _ticks(x0, x1, 6, whole=True) if x0 <= tick <= x1]
    for tick, label in zip(x_ticks, _labels(x_ticks)):
        parts.append(f'<path class="grid" d="M{across(tick):.1f} {bottom}v4"/>')
        parts.append(f'<text x="{across(tick):.1f}" y="{bottom + 18}" text-anchor="middle">{label}</text>')
    middle = (_TOP + bottom) / 2
    parts.append(f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{html.escape(x_name)}</text>')
    turned = f'text-anchor="middle" transform="rotate(-90 14 {middle})"'
    parts.append(f'<text x="14" y="{middle}" {turned}>{html.escape(y_name)}</text>')
    parts.append(f'<rect class="frame" x="{_LEFT}" y="{_TOP}" width="{right - _LEFT}" height="{bottom - _TOP}"/>')
    for _, color, points in series:
        places = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in points)
        parts.append(f'<polyline class="line s-{color}" points="{places}"/>')
        if len(points) == 1:  # a line of one point would be invisible
            x, y = places.split(",")
            parts.append(f'<circle class="dot f-{color}" cx="{x}" cy="{y}" r="4"/>')
    keys = "".join(f'<span class="key k-{color}">{html.escape(name)}</span>' for name, color, _ in series if name)
    return (
        f"<figure><figcaption>{html.escape(title)}{keys}</figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(title)}">{"".join(parts)}</svg>'
        f"</figure>"
    )


def _span(values: list[float]) -> tuple[float, float]:
    """Minimum and maximum, widened if they are equal."""
    low, high = min(values), max(values)
    if high - low > max(1e-9 * max(abs(low), abs(high)), _SMALLEST):
        return low, high
    half = abs(low) / 10 if abs(low) > _SMALLEST else 0.5
    return low - half, high + half


def _ticks(low: float, high: float, most: int, outward: bool = False, whole: bool = False) -> list[float]:
    """About `most` multiples of 1, 2 or 5 times a power of ten; with `outward` they enclose low and high."""
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= most)
    step = max(step, 1.0) if whole else step
    first = math.floor(low / step + 1e-9) if outward else math.ceil(low / step - 1e-9)
    last = math.ceil(high / step - 1e-9) if outward else math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _labels(ticks: list[float]) -> list[str]:
    """The ticks as text, all with the same number of decimals, or with exponents if they are very small or large."""
    largest = max((abs(tick) for tick in ticks), default=0.0)
    if largest and not 1e-3 <= largest < 1e6:
        return [f"{tick:.3g}" for tick in ticks]
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{tick:.{decimals}f}" for tick in ticks]
