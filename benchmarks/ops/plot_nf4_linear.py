"""Draw a record of nf4_linear: time over a dense bf16 linear's, by rows of x.

    python -m benchmarks.ops.plot_nf4_linear [RECORD] [--out docs/nf4_linear.svg]

Without a file, the newest record of the benchmark. One panel per direction, one line
per shape; the targets are steps, and the grey line is bitsandbytes with PEFT's LoRA,
the geometric mean over the shapes. The same record gives the same bytes.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.harness.record import RESULTS, ROOT
from benchmarks.ops.nf4_linear_targets import geometric_mean, ratios, target

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9")
"""Okabe and Ito's, told apart by the colour-blind too."""
MARKERS = "osD^v"
PANELS = {
    "forward": "forward",
    "backward_dx": "backward, dX",
    "backward": "backward, all gradients, over a dense dX",
}


def newest(bench: str) -> Path:
    """The newest record of a benchmark, by the date in its name.

    Args:
        bench: the benchmark's name.

    Returns:
        The file.

    Raises:
        SystemExit: there is none.
    """
    files = (RESULTS / bench).glob("*.json")
    dated = sorted(files, key=lambda file: (file.stem.split("-")[-2], file.stat().st_mtime))
    if not dated:
        raise SystemExit(f"no record in {RESULTS / bench}: run python -m benchmarks.ops.{bench}")
    return dated[-1]


def draw_panel(axes: Any, which: str, table: dict[tuple[Any, ...], dict[str, float]]) -> None:
    """One direction: a line per shape, the targets, bitsandbytes with PEFT."""
    part = {point: found for point, found in table.items() if point[2] == which}
    shapes = sorted({point[:2] for point in part}, key=lambda shape: (shape[0] * shape[1], shape))
    rows = sorted({point[3] for point in part})
    for index, (n, k) in enumerate(shapes):
        line = sorted(
            (m, found["ours"]) for (*shape, _, m), found in part.items() if shape == [n, k]
        )
        axes.plot(
            *zip(*line, strict=True),
            color=COLOURS[index % 5],
            marker=MARKERS[index % 5],
            markersize=4,
            linewidth=1.6,
            label=f"{n} × {k}",
        )
    peers = [
        geometric_mean([found["peft"] for point, found in part.items() if point[3] == m])
        for m in rows
    ]
    axes.plot(
        rows,
        peers,
        color="#888888",
        linewidth=1.6,
        linestyle="--",
        label="bitsandbytes + PEFT, mean",
    )
    powers = [2**i for i in range(14) if rows[0] <= 2**i <= rows[-1]]
    targets = [wanted[0] for wanted in (target(which, m) for m in powers) if wanted]
    if targets:
        axes.step(
            powers,
            targets,
            where="mid",
            color="#333333",
            linewidth=1,
            linestyle=":",
            label="target",
        )
    axes.axhline(1.0, color="#333333", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = [0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_yticks([], minor=True)
    axes.set_xticks(rows, [str(m) for m in rows], rotation=45)
    axes.grid(visible=True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(PANELS[which], fontsize=10)
    axes.set_xlabel("M, rows of x")


def draw(record: dict[str, Any], out: Path) -> None:
    """Write the figure of one record.

    Args:
        record: as the benchmark writes it.
        out: the SVG file.
    """
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "qlora_kit"
    mpl.rcParams["font.size"] = 9
    from matplotlib import pyplot as plt

    table = ratios(record["rows"])
    there = {point[2] for point in table}
    backward = "backward_dx" if "backward_dx" in there else "backward"
    panels = [which for which in ("forward", backward) if which in there]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.8 * len(panels), 4.2), sharey=True, squeeze=False
    )
    for panel, which in zip(axes[0], panels, strict=True):
        draw_panel(panel, which, table)
    axes[0][0].set_ylabel("time over dense bf16 without LoRA")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=4, frameon=False, fontsize=8)
    figure.suptitle(f"NF4 linear with LoRA r 16, {record['gpu']}, {record['commit']}", fontsize=10)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None})
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Read a record, write the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path, nargs="?")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "nf4_linear.svg")
    arguments = parser.parse_args(argv)
    file = arguments.record or newest("nf4_linear")
    draw(json.loads(file.read_text(encoding="utf-8")), arguments.out)
    print(f"{arguments.out} from {file.name}")


if __name__ == "__main__":
    main()
