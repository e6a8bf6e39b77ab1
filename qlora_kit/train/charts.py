"""Line charts as inline SVG, drawn for the run report.

Hand-built rather than plotted: the lines take the page's colours, so one chart
serves light and dark, scales with the screen, and costs a few kilobytes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 480, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 12, 34
_MOST_POINTS = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line."""

    name: str
    """Shown in the legend."""
    points: Sequence[tuple[float, float]]
    """(x, y), x ascending."""
    kind: str = "line"
    """`line`, `faint` (behind), or `dots` (line with marks)."""
    color: int = 1
    """Number of the page's colour variable, `--c1` to `--c3`."""


def smooth(points: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """Average each point with its neighbours.

    Args:
        points: (x, y).
        window: points averaged; 1 changes nothing.

    Returns:
        As many points; shorter windows at both ends.

    Example:
        >>> smooth([(0, 0.0), (1, 3.0), (2, 6.0)], 3)
        [(0, 1.5), (1, 3.0), (2, 4.5)]
    """
    half = window // 2
    averaged = []
    for i, (x, _) in enumerate(points):
        near = [y for _, y in points[max(0, i - half) : i + half + 1]]
        averaged.append((x, sum(near) / len(near)))
    return averaged


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Choose round numbers that cover a range.

    Args:
        low: smallest value.
        high: largest value.
        wanted: about how many.

    Returns:
        Ascending multiples of 1, 2 or 5 times a power of ten within the range.

    Example:
        >>> ticks(0, 9.3), ticks(0.00001, 0.0002, 4)
        ([0.0, 2.0, 4.0, 6.0, 8.0], [5e-05, 0.0001, 0.00015, 0.0002])
    """
    if high <= low:
        return [low]
    rough = (high - low) / max(1, wanted - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((m * power for m in (1, 2, 5, 10)), key=lambda s: abs(math.log(s / rough)))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [float(f"{i * step:.10g}") for i in range(first, last + 1)]


def label(value: float) -> str:
    """Write an axis number shortly.

    Args:
        value: at a tick.

    Returns:
        Text of a few characters.

    Example:
        >>> label(0.0002), label(1500.0), label(0.5), label(20000.0), label(0)
        ('2e-4', '1,500', '0.5', '20k', '0')
    """
    size = abs(value)
    if size == 0:
        return "0"
    if size < 1e-3:
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")
    if size >= 1e4:
        return f"{value / 1e3:,.4g}k"
    return f"{value:,.4g}" if size >= 1e3 else f"{value:.4g}"


class _Scale:
    """Maps data to the drawing area."""

    def __init__(self, series: Sequence[Series], *, from_zero: bool) -> None:
        xs = [x for one in series for x, _ in one.points]
        ys = [y for one in series for _, y in one.points]
        self.x0, self.x1 = min(xs), max(xs)
        low, high = min(ys), max(ys)
        low = 0.0 if from_zero and low > 0 else low
        room = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
        self.y0, self.y1 = (low if from_zero else low - room), high + room
        if self.x1 == self.x0:
            self.x1 = self.x0 + 1

    def x(self, value: float) -> float:
        return _LEFT + (value - self.x0) / (self.x1 - self.x0) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return (
            HEIGHT - _BOTTOM - (value - self.y0) / (self.y1 - self.y0) * (HEIGHT - _TOP - _BOTTOM)
        )


def line_chart(
    series: Sequence[Series], *, title: str, x_label: str, from_zero: bool = False
) -> Markup:
    """Draw lines over a common x axis.

    Args:
        series: at least one; those without points are left out.
        title: read by screen readers.
        x_label: under the axis.
        from_zero: the y axis begins at zero.

    Returns:
        An `<svg>` element; empty if there are no points.

    Example:
        >>> svg = line_chart([Series(name="loss", points=[(1, 2.0), (2, 1.0)])],
        ...     title="loss", x_label="update")
        >>> svg.startswith("<svg"), str(line_chart([], title="", x_label=""))
        (True, '')
    """
    kept = [
        Series(name=s.name, points=_thin(s.points), kind=s.kind, color=s.color)
        for s in series
        if any(math.isfinite(y) for _, y in s.points)
    ]
    if not kept:
        return Markup("")
    scale = _Scale(kept, from_zero=from_zero)
    parts = [*_axes(scale, x_label), *(line for one in kept for line in _line(one, scale))]
    body = "".join(parts)
    return Markup(
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">{body}</svg>'
    )


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `_MOST_POINTS` finite points, evenly chosen, the last one among them."""
    finite = [(float(x), float(y)) for x, y in points if math.isfinite(y)]
    if len(finite) <= _MOST_POINTS:
        return finite
    step = (len(finite) - 1) / (_MOST_POINTS - 1)
    return [finite[round(i * step)] for i in range(_MOST_POINTS)]


def _axes(scale: _Scale, x_label: str) -> list[str]:
    parts = []
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    for value in ticks(scale.y0, scale.y1):
        y = scale.y(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{label(value)}</text>'
        )
    for value in ticks(scale.x0, scale.x1, 6):
        x = scale.x(value)
        parts.append(
            f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{label(value)}</text>'
        )
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    middle = (_LEFT + right) / 2
    parts.append(
        f'<text class="name" x="{middle:.1f}" y="{HEIGHT - 3}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
    )
    return parts


def _line(series: Series, scale: _Scale) -> list[str]:
    path = " ".join(f"{scale.x(x):.1f},{scale.y(y):.1f}" for x, y in series.points)
    style = f"line c{series.color} {series.kind}"
    parts = [f'<polyline class="{style}" points="{path}"/>']
    if series.kind == "dots" or len(series.points) == 1:
        parts += [
            f'<circle class="dot c{series.color}" cx="{scale.x(x):.1f}" cy="{scale.y(y):.1f}" '
            f'r="3.2"><title>{escape(series.name)} {label(y)} at {label(x)}</title></circle>'
            for x, y in series.points
        ]
    return parts
