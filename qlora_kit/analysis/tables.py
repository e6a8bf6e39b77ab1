"""The tables of an inspection, from its record: per kind of module, averaged over layers.

A mean over layers is what fits on a screen; every module is in the record.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True, slots=True)
class Table:
    """Text cells under a heading.

    Example:
        >>> print(Table("t", ("kind", "r"), [("q_proj", "8")]).markdown())
        | kind | r |
        |---|---|
        | q_proj | 8 |
    """

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def markdown(self) -> str:
        """The table in Markdown, without its title."""
        lines = [self.header, ("---",) * len(self.header), *self.rows]
        rule = f"|{'---|' * len(self.header)}"
        return "\n".join(
            rule if line[0] == "---" else "| " + " | ".join(line) + " |" for line in lines
        )

    def text(self) -> str:
        """The table in columns, for a terminal."""
        rows = [self.header, *self.rows]
        widths = [max(len(row[n]) for row in rows) for n in range(len(self.header))]
        lines = [
            "  ".join(
                cell.ljust(width) if n == 0 else cell.rjust(width)
                for n, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        return "\n".join([self.title, *(f"  {line.rstrip()}" for line in lines)])


def tables_of(record: dict[str, Any]) -> list[Table]:
    """Make all tables of a record.

    Args:
        record: of `inspect_adapters`.

    Returns:
        Spectra and amplification (two tables) of every adapter, similarity of every pair.

    Example:
        >>> tables_of({"adapters": [], "similarity": []})
        []
    """
    tables = []
    for adapter in record["adapters"]:
        tables.append(_spectra(adapter))
        if adapter["amplification"] is not None:
            tables.append(_amplification(adapter))
            tables.append(_factors(adapter))
    return tables + [_similarity(pair) for pair in record["similarity"]]


def by_kind(lines: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Group lines of a record by the kind of their module.

    Args:
        lines: with a field `kind`.

    Returns:
        Kind to its lines, in order of appearance.

    Example:
        >>> list(by_kind([{"kind": "q"}, {"kind": "v"}, {"kind": "q"}]))
        ['q', 'v']
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault(line["kind"], []).append(line)
    return groups


def mean(values: Sequence[float | None]) -> float | None:
    """Average what is known.

    Args:
        values: None for unknown.

    Returns:
        None if nothing is known.

    Example:
        >>> mean([1.0, None, 3.0]), mean([None])
        (2.0, None)
    """
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _spectra(adapter: dict[str, Any]) -> Table:
    rows = []
    for kind, lines in by_kind(adapter["modules"]).items():
        top = [line["values"][0] if line["values"] else 0.0 for line in lines]
        cells = (
            mean([line["norm"] for line in lines]),
            mean(top),
            mean([line["stable_rank"] for line in lines]),
            mean([float(line["rank"]) for line in lines]),
        )
        rows.append((kind, str(len(lines)), *map(_number, cells)))
    header = ("module", "layers", "‖ΔW‖", "σ₁", "stable rank", "rank")
    return Table(f"{adapter['path']}: spectrum of ΔW, means over layers", header, rows)


def _amplification(adapter: dict[str, Any]) -> Table:
    rows = []
    for kind, lines in by_kind(adapter["amplification"]).items():
        changed = [line for line in lines if line["rank"]]
        cells = [
            mean([line[name][-1] for line in changed])
            for name in ("by_delta", "by_weight", "by_random")
        ]
        norms = [mean([line[name] for line in changed]) for name in ("weight_norm", "delta_norm")]
        factor = mean([line["factor"] for line in changed])
        ranks = sorted({line["rank"] for line in lines})
        shown = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
        rows.append((kind, shown, *map(_number, (*cells, *norms, factor))))
    header = ("module", "r", "by ΔW", "by W", "by random", "‖W‖", "‖ΔW‖", "factor")
    title = f"{adapter['path']}: ‖UᵀWV‖ by directions of ΔW, of W, random; means over layers"
    return Table(title, header, rows)


def _factors(adapter: dict[str, Any]) -> Table:
    """The factor of the first few directions; medians, since W may hold next to nothing of one."""
    groups = by_kind(adapter["amplification"])
    counts = sorted({at for line in adapter["amplification"] for at in line["directions"]})
    rows = []
    for kind, lines in groups.items():
        found = [
            [
                factor
                for line in lines
                for at, factor in zip(line["directions"], line["factors"], strict=True)
                if at == count and factor is not None
            ]
            for count in counts
        ]
        rows.append((kind, *(_number(median(some) if some else None) for some in found)))
    title = f"{adapter['path']}: factor of the first directions of ΔW, medians over layers"
    return Table(title, ("module", *map(str, counts)), rows)


def _similarity(pair: dict[str, Any]) -> Table:
    """φ at the corner, at one against all, and at the smaller rank."""
    rows = []
    for entry in pair["means"]:
        phi, control = entry["phi"], entry["random"]
        last = min(len(phi), len(phi[0]))
        cells = []
        for i, j in ((1, 1), (1, len(phi[0])), (last, last)):
            cells += [f"{phi[i - 1][j - 1]:.3f}", f"{control[i - 1][j - 1]:.3f}"]
        shape = f"{len(phi)} × {len(phi[0])}"
        rows.append((entry["kind"], entry["side"], shape, *cells))
    header = ("module", "side", "r₁ × r₂", "φ(1,1)", "random", "φ(1,r₂)", "random", "φ(r,r)")
    title = f"{pair['first']} and {pair['second']}: φ, means over layers; r the smaller rank"
    return Table(title, (*header, "random"), rows)
