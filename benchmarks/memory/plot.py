"""Draw the claim table: memory by component, one panel a model, the leanest row a method.

    python -m benchmarks.memory.plot [RECORD ...] [--batch 1] [--out docs/memory.svg]

Each method has a bar with recomputing and one without; the mark on it is the prediction, the
words behind it say how many times less that is than full fine-tuning of the same kind, and the
tokens/s. Rows without CUDA graphs, whose memory is the figure. Without a file: the newest record.
The same records give the same bytes.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.record import ROOT
from benchmarks.ops.plot_nf4_linear import newest
from qlora_kit.bench.claims import memory_ratio
from qlora_kit.bench.components import RESIDENT, REST
from qlora_kit.bench.methods import METHODS, title_of
from qlora_kit.bench.record import Row
from qlora_kit.bench.rows import leanest, of_method, recomputes

COLOURS = dict(
    zip(
        (*RESIDENT, REST),
        ("#0072b2", "#56b4e9", "#004c78", "#009e73", "#d55e00", "#e69f00", "#cc79a7"),
        strict=True,
    )
)
"""Component to colour: Okabe and Ito's, and a darker blue."""


def chosen(rows: Sequence[Row]) -> list[Row]:
    """The leanest row of each method with and without recomputing, in the order of methods.

    Args:
        rows: of one model and batch.

    Returns:
        Rows with components, none of a CUDA graph.
    """
    plain = [row for row in rows if not row.get("graph") and row.get("components_gib")]
    found = []
    for name in METHODS:
        for again in (True, False):
            best = leanest([r for r in of_method(plain, name) if recomputes(r) == again])
            found += [best] if best is not None else []
    return found


def draw_model(axes: Any, rows: Sequence[Row]) -> None:
    """One panel."""
    shown = chosen(rows)
    widest = max(sum(row["components_gib"].values()) for row in shown)
    for place, row in enumerate(shown):
        left = 0.0
        for name, colour in COLOURS.items():
            width = row["components_gib"].get(name, 0.0)
            axes.barh(place, width, left=left, color=colour, height=0.72, linewidth=0)
            left += width
        if row.get("predicted_gib"):
            axes.plot([row["predicted_gib"]] * 2, [place - 0.45, place + 0.45], color="black", lw=1)
        ratio = memory_ratio(rows, row)
        less = f", {ratio:.1f}x less" if ratio is not None and row["method"] != "full" else ""
        text = f" {left:.1f}{less}, {row['tokens_per_s'] / 1e3:,.1f}k tok/s"
        axes.text(max(left, row.get("predicted_gib") or 0), place, text, va="center", fontsize=6.5)
    kinds = ["recomputed" if recomputes(row) else "kept" for row in shown]
    axes.set_yticks(
        range(len(shown)), [f"{title_of(r)}, {k}" for r, k in zip(shown, kinds, strict=True)]
    )
    axes.set_xlim(0, 1.45 * widest)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0, labelsize=6.5)
    axes.spines[["top", "right", "left"]].set_visible(False)
    first = shown[0]
    axes.set_title(f"{first['model']}, {first['batch']} × {first['seq']}, GiB", fontsize=8)


def draw(records: Sequence[dict[str, Any]], batch: int, out: Path) -> None:
    """Write the figure.

    Args:
        records: of `memory`, each with its own models.
        batch: rows per step of the bars.
        out: the SVG file.

    Raises:
        SystemExit: no row has components of a GPU's memory.
    """
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "qlora_kit"
    mpl.rcParams["font.size"] = 8
    from matplotlib import pyplot as plt

    by_model: dict[str, list[Row]] = {}
    for record in records:
        for row in record["rows"]:
            if row["batch"] == batch:
                by_model.setdefault(row["model"], []).append(row)
    panels = [rows for rows in by_model.values() if chosen(rows)]
    if not panels:
        raise SystemExit("no row of these records has memory by component; was there a GPU?")
    figure, grid = plt.subplots(len(panels), 1, figsize=(7.2, 2.9 * len(panels)), squeeze=False)
    for axes, rows in zip(grid.flat, panels, strict=True):
        draw_model(axes, rows)
    handles = [plt.Rectangle((0, 0), 1, 1, color=c, label=n) for n, c in COLOURS.items()]
    handles.append(plt.Line2D([], [], color="black", lw=1, label="predicted"))
    figure.legend(handles=handles, loc="lower center", ncol=8, frameon=False, fontsize=6.5)
    cards = ", ".join(dict.fromkeys(f"{r['gpu']} ({r['commit']})" for r in records))
    figure.suptitle(cards, fontsize=7, x=0.01, ha="left")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None})
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Read records, write the figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("records", type=Path, nargs="*")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "memory.svg")
    arguments = parser.parse_args(argv)
    files = arguments.records or [newest("memory")]
    records = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    draw(records, arguments.batch, arguments.out)
    print(f"{arguments.out} from {', '.join(file.name for file in files)}")


if __name__ == "__main__":
    main()
