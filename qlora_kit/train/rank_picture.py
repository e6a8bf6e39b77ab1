"""AdaLoRA's ranks as a picture: every matrix a row, time from left to right.

Darker is a higher share of the start rank; nothing is no rank at all. Neighbouring times
with the same rank are one rectangle, so a run of thousands of updates stays a small picture.
Inline SVG in the page's colours, as `charts.py` draws lines.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from markupsafe import Markup, escape

from qlora_kit.train.charts import WIDTH, label, ticks

_LEFT, _RIGHT, _TOP, _BOTTOM = 128, 34, 6, 34
_TALLEST, _SHORTEST = 14.0, 2.5
_MOST_HEIGHT = 620.0
_READABLE = 9.0  # rows this tall carry their own name


def rank_map(history: Mapping[str, Any], updates: int, *, title: str = "Ranks") -> Markup:
    """Draw the rank of every matrix over time.

    Args:
        history: `modules`, `updates`, `budget` and `ranks` as `RankHistory.to_dict` has them.
        updates: of the whole run; the last ranks last until then.
        title: read by screen readers.

    Returns:
        An `<svg>` element; empty if there are no modules.

    Example:
        >>> history = {"modules": ["layers.0.q"], "updates": [0, 5], "budget": [4, 2],
        ...     "ranks": [[4], [2]]}
        >>> str(rank_map(history, 10)).count("<rect")
        2
    """
    modules, times, ranks = history["modules"], history["updates"], history["ranks"]
    if not modules or not ranks:
        return Markup("")
    highest = max(max(row) for row in ranks) or 1
    end = max(updates, times[-1], 1)
    tall = min(_TALLEST, max(_SHORTEST, _MOST_HEIGHT / len(modules)))
    bottom = _TOP + tall * len(modules)
    wide = WIDTH - _LEFT - _RIGHT

    def x(update: float) -> float:
        return _LEFT + wide * update / end

    cells = []
    for row, module in enumerate(modules):
        series = [step[row] for step in ranks]
        for start, stop, rank in _stretches(series, [*times, end]):
            if rank == 0:
                continue
            cells.append(
                f'<rect class="rank" x="{x(start):.1f}" y="{_TOP + row * tall:.1f}" '
                f'width="{x(stop) - x(start):.1f}" height="{max(1.0, tall - 1):.1f}" '
                f'fill-opacity="{0.12 + 0.88 * rank / highest:.2f}"><title>{escape(module)}: rank '
                f"{rank} from update {start} to {stop}</title></rect>"
            )
    parts = [*cells, *_names(modules, ranks[-1], tall), *_axis(end, bottom, x(end))]
    height = bottom + _BOTTOM
    return Markup(
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )


def short_names(modules: Sequence[str]) -> list[str]:
    """Shorten dotted names to the layer's number and the last part.

    Args:
        modules: dotted names.

    Returns:
        As many short names.

    Example:
        >>> short_names(["model.layers.11.self_attn.q_proj", "pooler.dense"])
        ['11 q_proj', 'dense']
    """
    short = []
    for name in modules:
        number = re.search(r"\.(\d+)\.", name)
        last = name.rpartition(".")[2]
        short.append(f"{number[1]} {last}" if number else last)
    return short


def _stretches(series: Sequence[int], times: Sequence[int]) -> list[tuple[int, int, int]]:
    """(from, to, rank) for neighbouring times of one rank; `times` has one more entry."""
    found, position = [], 0
    for rank, group in groupby(series):
        count = len(list(group))
        found.append((times[position], times[position + count], rank))
        position += count
    return found


def _names(modules: Sequence[str], last: Sequence[int], tall: float) -> list[str]:
    """Names at the left and final ranks at the right: of every row, or of every few."""
    every = 1 if tall >= _READABLE else int(-(-_READABLE // tall))
    size = f"{min(10.5, max(7.0, every * tall - 1)):.1f}"
    parts = []
    for row, name in enumerate(short_names(modules)):
        if row % every:
            continue
        y = _TOP + row * tall + min(tall, _READABLE + 1)
        parts.append(
            f'<text x="{_LEFT - 6}" y="{y:.1f}" text-anchor="end" '
            f'style="font-size:{size}px">{escape(name)}</text>'
        )
        if every == 1:
            parts.append(
                f'<text x="{WIDTH - _RIGHT + 6}" y="{y:.1f}" '
                f'style="font-size:{size}px">{last[row]}</text>'
            )
    return parts


def _axis(end: int, bottom: float, right: float) -> list[str]:
    wide = right - _LEFT
    parts = [f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>']
    for value in ticks(0, end, 6):
        x = _LEFT + wide * value / end
        parts.append(
            f'<text x="{x:.1f}" y="{bottom + 15:.1f}" text-anchor="middle">{label(value)}</text>'
        )
    parts.append(
        f'<text class="name" x="{(_LEFT + right) / 2:.1f}" y="{bottom + 30:.1f}" '
        'text-anchor="middle">update</text>'
    )
    return parts
