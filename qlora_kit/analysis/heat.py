"""Heat maps as SVG: φ(i, j), a panel per kind of module, one colour scale for all.

Drawn by hand, as `train/charts.py` does: one file serves the page and the documents and
needs nothing else. Cells of one colour are one path, so that a map of 64 x 64 takes a few
kilobytes; colours are in so many steps, which a reader could not tell apart either.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from qlora_kit.train.charts import label, ticks

COLORS = ("#440154", "#414487", "#2a788e", "#22a884", "#7ad151", "#fde725")
"""Anchors of the scale, low to high: viridis, even in brightness and safe for the colour-blind."""
STEPS = 40
_PANEL, _GAP, _TOP, _LEFT, _BOTTOM, _BAR = 150, 46, 40, 48, 40, 70
_MOST_LABELS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One map.

    Example:
        >>> Panel(title="q_proj", values=[[0.0, 1.0]]).values[0][1]
        1.0
    """

    title: str
    """Above it."""
    values: Sequence[Sequence[float | None]]
    """Rows from the top; None: no value, drawn grey."""
    rows: Sequence[str] = ()
    """Names of rows; none: numbers from 1."""
    columns: Sequence[str] = ()
    """Names of columns; none: numbers from 1."""


def color(share: float) -> str:
    """Colour of a value.

    Args:
        share: of the scale; outside of 0 to 1 the colour of its end.

    Returns:
        `#rrggbb`.

    Example:
        >>> color(0.0), color(1.0), color(2.0)
        ('#440154', '#fde725', '#fde725')
    """
    place = min(max(share, 0.0), 1.0) * (len(COLORS) - 1)
    low = min(int(place), len(COLORS) - 2)
    ends = [[int(COLORS[k][n : n + 2], 16) for n in (1, 3, 5)] for k in (low, low + 1)]
    mixed = (round(a + (b - a) * (place - low)) for a, b in zip(*ends, strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)


def heat_maps(
    panels: Sequence[Panel],
    *,
    title: str,
    x_label: str,
    y_label: str,
    top: float | None = None,
    across: int = 4,
    width: int = _PANEL,
    height: int = _PANEL,
) -> Markup:
    """Draw maps side by side over one colour scale that starts at zero.

    Args:
        panels: in reading order.
        title: above all, and read by screen readers.
        x_label: under the panels.
        y_label: beside them.
        top: end of the scale; None: the largest value.
        across: panels in a row.
        width: of a panel.
        height: of a panel.

    Returns:
        An `<svg>` element that stands alone; empty if there is nothing to draw.

    Example:
        >>> svg = heat_maps([Panel(title="q", values=[[0.0, 0.5], [1.0, None]])], title="phi",
        ...     x_label="j", y_label="i")
        >>> svg.startswith("<svg xmlns"), svg.count("<path")
        (True, 4)
    """
    known = [
        value
        for panel in panels
        for row in panel.values
        for value in row
        if value is not None and math.isfinite(value)
    ]
    if not known:
        return Markup("")
    top = top or max(known) or 1.0
    across = min(across, len(panels))
    left = _LEFT + max((7 * len(name) for p in panels for name in p.rows), default=0)
    step_x, step_y = width + _GAP, height + _GAP
    whole_x = left + across * step_x + _BAR
    whole_y = _TOP + math.ceil(len(panels) / across) * step_y + _BOTTOM - _GAP // 2
    parts = [
        f'<rect width="{whole_x}" height="{whole_y}" fill="#ffffff"/>',
        _text(12, 18, title, size=13, anchor="start"),
    ]
    for n, panel in enumerate(panels):
        x, y = left + n % across * step_x, _TOP + n // across * step_y
        parts += _panel(panel, x, y, width, height, top)
    parts += _scale(whole_x - _BAR, _TOP, height, top)
    middle = left + (across * step_x - _GAP) / 2
    parts.append(_text(middle, whole_y - 12, x_label))
    turn = f'transform="rotate(-90 14 {whole_y / 2:.0f})"'
    parts.append(_text(14, whole_y / 2, y_label, extra=turn))
    return Markup(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {whole_x} {whole_y}" '
        f'font-family="system-ui, sans-serif" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg>"
    )


def _text(
    x: float, y: float, text: str, *, size: int = 11, anchor: str = "middle", extra: str = ""
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" '
        f'fill="#1d1f23" {extra}>{escape(text)}</text>'
    )


def _panel(panel: Panel, x: int, y: int, width: int, height: int, top: float) -> list[str]:
    count = max(len(row) for row in panel.values)
    wide, high = width / count, height / len(panel.values)
    parts = [_text(x + width / 2, y - 6, panel.title)]
    paths: dict[str, list[str]] = {}
    for r, row in enumerate(panel.values):
        start = 0
        shades = [_shade(value, top) for value in row]
        for c in range(1, len(row) + 1):
            if c == len(row) or shades[c] != shades[start]:
                path = f"M{x + start * wide:.1f} {y + r * high:.1f}h{(c - start) * wide:.1f}"
                path += f"v{high:.1f}h{-(c - start) * wide:.1f}z"
                paths.setdefault(shades[start], []).append(path)
                start = c
    # Edges of one colour are drawn too, or the seams between cells would show.
    parts += [
        f'<path fill="{shade}" stroke="{shade}" stroke-width=".4" d="{"".join(d)}"/>'
        for shade, d in paths.items()
    ]
    for c, name in _names(panel.columns, count):
        parts.append(_text(x + (c + 0.5) * wide, y + height + 13, name, size=10))
    for r, name in _names(panel.rows, len(panel.values)):
        parts.append(_text(x - 5, y + (r + 0.5) * high + 4, name, size=10, anchor="end"))
    return parts


def _shade(value: float | None, top: float) -> str:
    if value is None or not math.isfinite(value):
        return "#cccccc"
    return color(round(value / top * STEPS) / STEPS)


def _names(names: Sequence[str], count: int) -> list[tuple[int, str]]:
    """Indices and texts of the labels of an axis: all names, or a few numbers."""
    if names:
        return list(enumerate(names))
    if count <= _MOST_LABELS:
        return [(n, str(n + 1)) for n in range(count)]
    shown = [1, *(int(n) for n in ticks(1, count, 5) if n > 1)]
    return [(n - 1, str(n)) for n in dict.fromkeys(shown)]


def _scale(x: int, y: int, height: int, top: float) -> list[str]:
    high = height / STEPS
    parts = [
        f'<rect x="{x}" y="{y + (STEPS - 1 - n) * high:.1f}" width="12" height="{high + 0.5:.1f}" '
        f'fill="{color(n / (STEPS - 1))}"/>'
        for n in range(STEPS)
    ]
    return parts + [
        _text(x + 17, y + height * (1 - value / top) + 4, label(value), size=10, anchor="start")
        for value in ticks(0.0, top, 5)
    ]
