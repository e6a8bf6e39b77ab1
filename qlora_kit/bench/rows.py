"""Reading the rows of a record: what a row is about, what it needed, what went wrong."""

import statistics
from collections.abc import Iterable, Sequence

from qlora_kit.bench.methods import ALL, method_of
from qlora_kit.bench.record import Row

CHECK_TOLERANCE = 0.05
"""Nats between first losses over 64 labels: bf16 noise is a fifth of it, another model 0.2."""

Shape = tuple[str, int, int]
"""Model, rows and tokens per row: what is compared with each other."""


def shape_of(row: Row) -> Shape:
    """Model, batch and sequence of a row."""
    return row["model"], row["batch"], row["seq"]


def shapes_of(rows: Iterable[Row]) -> list[Shape]:
    """The shapes of a record, each once, in its order."""
    return list(dict.fromkeys(shape_of(row) for row in rows))


def identity(row: Row) -> tuple[object, ...]:
    """What a row measured: equal for the same measurement in two records."""
    head = row["head"] if row["impl"] == "full" else ""
    keys = ("rank", "policy", "graphs", "cap_gib", "optimizer")
    return (*shape_of(row), method_of(row), head, *(row.get(key) for key in keys))


def status(row: Row) -> str:
    """Why a row has no speed, or what is wrong with it; empty if nothing is.

    Args:
        row: of a record.

    Returns:
        A few words.

    Example:
        >>> status({"oom": True}), status({"tokens_per_s": 1.0})
        ('out of memory', '')
    """
    if row.get("oom"):
        return "out of memory"
    if row.get("skipped"):
        return f"skipped: {row['skipped']}"
    if row.get("error"):
        return f"failed: {row['error']}"
    return "LOSS DIFFERS" if row.get("loss_agrees") is False else ""


def mark_disagreements(rows: Sequence[Row]) -> None:
    """Set `loss_agrees` in every measured row, by the median of its shape's first losses.

    Args:
        rows: of one record; changed in place. A shape measured once stays unmarked.
    """
    found: dict[Shape, list[Row]] = {}
    for row in rows:
        if "check_loss" in row:
            found.setdefault(shape_of(row), []).append(row)
    for same in found.values():
        # By library: many rows of one that is wrong must not outvote the others.
        by_impl: dict[str, list[float]] = {}
        for row in same:
            by_impl.setdefault(row["impl"], []).append(row["check_loss"])
        middle = statistics.median_low([statistics.median(v) for v in by_impl.values()])
        for row in same:
            off = abs(row["check_loss"] - middle)
            row["loss_agrees"] = off <= CHECK_TOLERANCE if len(same) > 1 else None


def measured(rows: Iterable[Row]) -> list[Row]:
    """The rows that have a speed and no fault."""
    return [row for row in rows if "tokens_per_s" in row and not status(row)]


def peak_gib(row: Row) -> float | None:
    """What a step needs: allocated at most, or reserved where a CUDA graph holds memory.

    Args:
        row: of a record.

    Returns:
        GiB; None without a GPU.

    Example:
        >>> peak_gib({"peak_allocated_gib": 2.0, "peak_reserved_gib": 3.0, "graph": True})
        3.0
    """
    peak = row.get("peak_reserved_gib" if row.get("graph") else "peak_allocated_gib")
    return None if peak is None else float(peak)


def recomputes(row: Row) -> bool:
    """Whether matrix products are computed again in the backward.

    Args:
        row: of a record; a mixture of policies counts if one of them does.

    Returns:
        False for `save` and `recompute_elementwise`.

    Example:
        >>> recomputes({"policy": "save"}), recomputes({"policy": "save:1,offload:1"})
        (False, True)
    """
    policy = str(row["policy"])
    return not all(part.split(":")[0] in _NO_PRODUCTS for part in policy.split(","))


_NO_PRODUCTS = ("save", "recompute_elementwise")


def leanest(rows: Sequence[Row]) -> Row | None:
    """The row that needs least memory, of those that ran on a GPU."""
    known = [row for row in measured(rows) if peak_gib(row) is not None]
    return min(known, key=lambda row: peak_gib(row) or 0.0, default=None)


def fastest(rows: Sequence[Row]) -> Row | None:
    """The row with most tokens per second."""
    return max(measured(rows), key=lambda row: float(row["tokens_per_s"]), default=None)


def in_order(rows: Iterable[Row]) -> list[Row]:
    """Rows by method, in the order of `methods.ALL`; each method's in the order they came in."""
    names = list(ALL)
    return sorted(
        rows, key=lambda row: names.index(m) if (m := method_of(row)) in ALL else len(names)
    )


def of_method(rows: Iterable[Row], *names: str) -> list[Row]:
    """The rows of some methods.

    Args:
        rows: of a record.
        *names: keys of `methods.ALL`.

    Returns:
        Those rows, in their order.
    """
    return [row for row in rows if method_of(row) in names]
