"""Horizontal bars as inline SVG: memory by component, predicted beside measured; tokens/s.

Drawn by hand for the same reason as `train/charts.py`: they take the page's colours, scale
with the screen, and need nothing else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

from qlora_kit.train.charts import label, ticks

WIDTH = 880
_LEFT, _RIGHT, _TOP, _BOTTOM = 330, 64, 6, 30
_BAR, _THIN, _GAP = 16, 6, 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One bar, of one or more parts, and a thin one under it."""

    name: str
    """At its left."""
    parts: Mapping[str, float]
    """Name to length, in the order in which they are drawn."""
    beside: Mapping[str, float] = field(default_factory=dict)
    """What is drawn thin below: the prediction; empty for none."""

    @property
    def total(self) -> float:
        """Length of all parts."""
        return sum(self.parts.values())


def bar_chart(
    bars: Sequence[Bar], colors: Mapping[str, int], *, title: str, unit: str, form: str = ".2f"
) -> Markup:
    """Draw bars over a common axis that starts at zero.

    Args:
        bars: from top to bottom.
        colors: name of a part to the number of the page's colour variable, `--k1` and up; parts
            that are not named take the last colour.
        title: read by screen readers.
        unit: under the axis.
        form: of the figures at the ends of bars.

    Returns:
        An `<svg>` element; empty if there is nothing to draw.

    Example:
        >>> svg = bar_chart([Bar(name="a", parts={"x": 1.0, "y": 2.0})], {"x": 1, "y": 2},
        ...     title="memory", unit="GiB")
        >>> svg.count("<rect"), str(bar_chart([], {}, title="", unit=""))
        (2, '')
    """
    longest = max((max(bar.total, sum(bar.beside.values())) for bar in bars), default=0.0)
    if longest <= 0:
        return Markup("")
    scale = (WIDTH - _LEFT - _RIGHT) / longest
    heights = [_BAR + (_THIN if bar.beside else 0) + _GAP for bar in bars]
    bottom = _TOP + sum(heights)
    parts = _axis(longest, scale, bottom, unit)
    y = float(_TOP)
    for bar, height in zip(bars, heights, strict=True):
        parts += _bar(bar, colors, scale, y, form)
        y += height
    return Markup(
        f'<svg class="chart" viewBox="0 0 {WIDTH} {bottom + _BOTTOM}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )


def _axis(longest: float, scale: float, bottom: int, unit: str) -> list[str]:
    parts = []
    for value in ticks(0, longest, 6):
        x = _LEFT + value * scale
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">{label(value)}</text>'
        )
    middle = _LEFT + longest * scale / 2
    parts.append(
        f'<text class="name" x="{middle:.1f}" y="{bottom + 28}" text-anchor="middle">'
        f"{escape(unit)}</text>"
    )
    return parts


def _bar(bar: Bar, colors: Mapping[str, int], scale: float, y: float, form: str) -> list[str]:
    text = f'x="{_LEFT - 8}" y="{y + _BAR - 4:.1f}" text-anchor="end"'
    drawn = [f"<text {text}>{escape(bar.name)}</text>"]
    drawn += _segments(bar.parts, colors, scale, y, _BAR, "")
    drawn += _segments(bar.beside, colors, scale, y + _BAR + 1, _THIN - 1, "predicted ")
    end = _LEFT + bar.total * scale + 5
    drawn.append(f'<text x="{end:.1f}" y="{y + _BAR - 4:.1f}">{bar.total:{form}}</text>')
    return drawn


def _segments(
    parts: Mapping[str, float],
    colors: Mapping[str, int],
    scale: float,
    y: float,
    height: int,
    word: str,
) -> list[str]:
    x, drawn = float(_LEFT), []
    last = max(colors.values(), default=1)
    for name, length in parts.items():
        width = length * scale
        drawn.append(
            f'<rect class="k{colors.get(name, last)}" x="{x:.1f}" y="{y:.1f}" '
            f'width="{width:.1f}" height="{height}">'
            f"<title>{escape(word + name)}: {length:.2f}</title></rect>"
        )
        x += width
    return drawn
