"""The tables of a report: every measurement by shape, ours beside full fine-tuning."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qlora_kit.bench.claims import memory_ratio, reference, speed_ratio
from qlora_kit.bench.methods import title_of
from qlora_kit.bench.record import Row
from qlora_kit.bench.rows import Shape, in_order, measured, peak_gib, shape_of, shapes_of, status

NOTES = {
    "memory": (
        "Each row ran in a process that built its model anew, or after the caches were emptied "
        "and the counters set to zero (`--share`). Allocated and reserved are torch's peaks from "
        "the first step on, compiling included. Ratios are against full fine-tuning in mixed "
        "precision that recomputes as the row does, with the better of two loss heads; where a "
        "step is a CUDA graph, what it reserves counts."
    ),
    "speed": (
        "Tokens/s is the median of the timed steps, forward, backward, clipping and update, "
        "after warm-up, between events that nobody waits for. Ratios are against the fastest "
        "full fine-tuning in mixed precision that recomputes as the row does. MFU counts what the "
        "gradients need once, never what is computed again, over the rate of bf16 products that "
        "this card sustained in this run."
    ),
}
"""What the figures mean, by benchmark."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """One shape's measurements, as text."""

    shape: Shape
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def title(self) -> str:
        """Model, batch and sequence."""
        model, batch, seq = self.shape
        return f"{model}, {batch} × {seq:,}"


def _cell(value: Any, form: str) -> str:
    return "–" if value is None else format(value, form)


def _policy(row: Row) -> str:
    head = f", {row['head']} loss" if row["impl"] == "full" else ""
    return f"{row['policy']}{head}{', graph' if row.get('graph') else ''}"


def _off(row: Row) -> str:
    """How far the prediction is off, signed."""
    predicted, found = row.get("predicted_gib"), row.get("peak_allocated_gib")
    return "–" if not predicted or not found else f"{predicted / found - 1:+.1%}"


def tables_of(record: dict[str, Any]) -> list[Table]:
    """One table per shape.

    Args:
        record: of memory or speed.

    Returns:
        Rows in the order of the record; columns that nothing fills are left out.

    Example:
        >>> tables_of({"bench": "memory", "rows": []})
        []
    """
    rows: Sequence[Row] = record["rows"]
    found = []
    for shape in shapes_of(rows):
        same = in_order(row for row in rows if shape_of(row) == shape)
        columns = [(name, [fill(rows, row) for row in same]) for name, fill in _COLUMNS]
        kept = [(name, cells) for name, cells in columns if any(c not in ("–", "") for c in cells)]
        found.append(
            Table(
                shape=shape,
                header=tuple(name for name, _ in kept),
                rows=tuple(zip(*(cells for _, cells in kept), strict=True)),
            )
        )
    return found


def _ratio(value: float | None, rows: Sequence[Row], row: Row) -> str:
    """A ratio, if the row has one and is not itself what others are compared with."""
    return "1" if reference(rows, row) is row else _cell(value, ".2f")


def _less(rows: Sequence[Row], row: Row) -> str:
    return _ratio(memory_ratio(rows, row) if measured([row]) else None, rows, row)


def _faster(rows: Sequence[Row], row: Row) -> str:
    value = speed_ratio(rows, row) if measured([row]) else None
    return "1" if reference(rows, row, speed=True) is row else _cell(value, ".2f")


_COLUMNS = (
    ("method", lambda _, row: title_of(row)),
    ("activations", lambda _, row: _policy(row)),
    ("tokens/s", lambda _, row: _cell(row.get("tokens_per_s"), ",.0f")),
    ("× full", _faster),
    ("MFU", lambda _, row: _cell(row.get("mfu"), ".0%")),
    ("allocated GiB", lambda _, row: _cell(row.get("peak_allocated_gib"), ".2f")),
    ("reserved GiB", lambda _, row: _cell(row.get("peak_reserved_gib"), ".2f")),
    ("full /", _less),
    ("predicted GiB", lambda _, row: _cell(row.get("predicted_gib"), ".2f")),
    ("off", lambda _, row: _off(row)),
    ("host GiB", lambda _, row: _cell(row.get("host_gib"), ".2f")),
    ("", lambda _, row: status(row)),
)


def bars_of(rows: Sequence[Row]) -> list[Row]:
    """The rows whose memory is drawn: measured, with components."""
    return [row for row in measured(rows) if row.get("components_gib") and peak_gib(row)]
