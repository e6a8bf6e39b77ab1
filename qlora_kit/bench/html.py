"""The HTML report of a benchmark: one file that needs nothing else.

Made from the record alone, like the Markdown one, with what Markdown cannot show: memory by
component as stacked bars with the prediction below, tokens/s as bars, loss curves.
"""

from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined, Template

from qlora_kit.bench.bars import Bar, bar_chart
from qlora_kit.bench.claims import verdicts
from qlora_kit.bench.components import RESIDENT, REST
from qlora_kit.bench.markdown import facts
from qlora_kit.bench.methods import title_of
from qlora_kit.bench.record import Row
from qlora_kit.bench.rows import in_order, measured, peak_gib, shape_of
from qlora_kit.bench.tables import NOTES, Table, bars_of, tables_of
from qlora_kit.train.charts import Series, line_chart

COLORS = {name: i for i, name in enumerate((*RESIDENT, REST, "reserved"), start=1)}
"""Component to the number of its colour; what a CUDA graph reserves besides is the last one."""

LINE_COLORS = 8
"""Of curves in the page; after so many they have dots."""
_SPEED = {"tokens/s": 1}
_FEWEST_LOSSES = 4
"""Of a curve."""


def render_html(record: dict[str, Any]) -> str:
    """Make the page.

    Args:
        record: of memory or speed.

    Returns:
        A complete HTML document without references to anything outside.

    Example:
        >>> page = render_html({"bench": "speed", "gpu": None, "driver": None, "cpu": "x86",
        ...     "commit": None, "dirty": False, "command": "bench speed", "env": {}, "peaks": {},
        ...     "rows": []})
        >>> page.startswith("<!doctype html>"), "http" in page.split("<style>")[0].lower()
        (True, True)
    """
    rows = record["rows"]
    found = verdicts(rows)
    sections = [
        {
            "table": table,
            "verdicts": found.get(table.shape, []),
            "charts": _charts(table, in_order(row for row in rows if shape_of(row) == table.shape)),
        }
        for table in tables_of(record)
    ]
    return _template().render(
        bench=record["bench"],
        note=record.get("note", ""),
        about=NOTES[record["bench"]].replace("`", ""),
        facts=facts(record),
        sections=sections,
    )


@cache
def _template() -> Template:
    text = files("qlora_kit.bench").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(text)


def _charts(table: Table, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Memory, speed and losses of one shape: those there are."""
    memory = [_memory_bar(row) for row in bars_of(rows)]
    names = [name for name in COLORS if any(name in bar.parts for bar in memory)]
    speed = [
        Bar(name=_name(row), parts={"tokens/s": row["tokens_per_s"]}) for row in measured(rows)
    ]
    drawn = bar_chart(speed, _SPEED, title=f"Speed, {table.title}", unit="tokens/s", form=",.0f")
    charts: list[dict[str, Any]] = [
        {
            "title": "Memory at the peak",
            "unit": "GiB; the thin bar is the prediction" if _predicted(memory) else "GiB",
            "svg": bar_chart(memory, COLORS, title=f"Memory, {table.title}", unit="GiB"),
            "legend": [{"name": name, "color": f"k{COLORS[name]}"} for name in names],
        },
        {
            "title": "Speed",
            "unit": "tokens per second",
            "svg": drawn,
            "legend": [],
        },
        _losses(table, rows),
    ]
    return [chart for chart in charts if chart["svg"]]


def _predicted(bars: Sequence[Bar]) -> bool:
    return any(bar.beside for bar in bars)


def _memory_bar(row: Row) -> Bar:
    parts = dict(row["components_gib"])
    more = (peak_gib(row) or 0.0) - sum(parts.values())
    if more > 0.005:  # a CUDA graph's memory is reserved, not allocated
        parts["reserved"] = more
    return Bar(
        name=_name(row),
        parts={name: parts[name] for name in COLORS if name in parts},
        beside=row.get("predicted_components_gib") or {},
    )


def _name(row: Row) -> str:
    head = f", {row['head']}" if row["impl"] == "full" else ""
    return f"{title_of(row)}: {row['policy']}{head}{', graph' if row.get('graph') else ''}"


def _losses(table: Table, rows: Sequence[Row]) -> dict[str, Any]:
    """Losses on the same few random batches, one line per method: the first row of each."""
    first: dict[str, Row] = {}
    for row in measured(rows):
        if len(row.get("losses", ())) >= _FEWEST_LOSSES:
            first.setdefault(title_of(row), row)
    lines = [
        Series(
            name=name,
            points=[(float(i), loss) for i, loss in enumerate(row["losses"], start=1)],
            color=1 + i % LINE_COLORS,
            kind=("line", "dots")[i // LINE_COLORS % 2],
        )
        for i, (name, row) in enumerate(first.items())
    ]
    return {
        "title": "Loss",
        "unit": "nats per token, the same random batches for all; not a measure of quality",
        "svg": line_chart(lines, title=f"Loss, {table.title}", x_label="step"),
        "legend": [{"name": line.name, "color": f"l{line.color} {line.kind}"} for line in lines],
        "small": True,
    }
