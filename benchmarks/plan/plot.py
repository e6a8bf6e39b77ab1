"""Draw a plan record: predicted against measured, peak memory and tokens/s, one point a run.

    python -m benchmarks.plan.plot [RECORD] [--out docs/planner.svg]

The lines are perfect predictions and the targets' bounds. Without a file, the newest record.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.harness.record import RESULTS, ROOT
from benchmarks.ops.plot_nf4_linear import COLOURS
from benchmarks.plan.__main__ import MOST, SPEED, errors

MARKERS = "osD^vPX*"


def newest_record() -> Path:
    """The newest record.

    Returns:
        The file.

    Raises:
        SystemExit: there is none.
    """
    files = (RESULTS / "plan").glob("*.json")
    ordered = sorted(files, key=lambda file: (file.stem.split("-")[-2], file.stat().st_mtime))
    if not ordered:
        raise SystemExit(f"no record in {RESULTS / 'plan'}: run python -m benchmarks.plan")
    return ordered[-1]


def _panel(axes: Any, points: list[tuple[str, float, float]], bound: float, unit: str) -> None:
    """One panel: points of (model, measured, predicted)."""
    models = list(dict.fromkeys(model for model, _, _ in points))
    for index, model in enumerate(models):
        mine = [(m, p) for name, m, p in points if name == model]
        axes.plot(
            *zip(*mine, strict=True),
            marker=MARKERS[index % len(MARKERS)],
            color=COLOURS[index % len(COLOURS)],
            linewidth=0,
            markersize=4.5,
            label=model,
        )
    low = min(min(m, p) for _, m, p in points) / 1.3
    high = max(max(m, p) for _, m, p in points) * 1.3
    ends = [low, high]
    axes.plot(ends, ends, color="#333333", linewidth=0.8)
    for factor in (1 - bound, 1 + bound):
        axes.plot(ends, [factor * end for end in ends], color="#999999", linewidth=0.7, ls=":")
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    ticks = [d * 10**e for e in range(6) for d in (1, 2, 5) if low < d * 10**e < high]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(ticks, [f"{tick:,}" for tick in ticks])
        axis.set_ticks([], minor=True)
    axes.set_xlabel(f"measured, {unit}")
    axes.set_ylabel(f"predicted, {unit}")
    axes.set_title(f"{len(points)} runs; dotted: ±{bound:.0%}", fontsize=8)
    axes.grid(visible=True, color="#dddddd", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def draw(record: dict[str, Any], out: Path) -> None:
    """Write the figure of one record.

    Args:
        record: as `python -m benchmarks.plan` writes it.
        out: the SVG file.

    Raises:
        SystemExit: no row has a measurement and a prediction.
    """
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "qlora_kit"
    mpl.rcParams["font.size"] = 8
    from matplotlib import pyplot as plt

    known = [row for row, _, _ in errors(record["rows"])]
    if not known:
        raise SystemExit("no row of this record has a measurement and a prediction")
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.6, 4.1))
    sizes = [(r["model"], r["peak_allocated_gib"], r["predicted_gib"]) for r in known]
    _panel(left, sizes, MOST, "GiB of peak memory")
    speeds = [(r["model"], r["tokens_per_s"], r["predicted_tokens_per_s"]) for r in known]
    _panel(right, speeds, SPEED, "tokens/s")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=4, frameon=False, fontsize=7)
    figure.suptitle(f"{record['gpu']}, {record['commit']}", fontsize=8, x=0.02, ha="left")
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None})
    plt.close(figure)


def main(words: list[str] | None = None) -> None:
    """Read a record, write the figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("record", type=Path, nargs="?")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "planner.svg")
    arguments = parser.parse_args(words)
    file = arguments.record or newest_record()
    draw(json.loads(file.read_text(encoding="utf-8")), arguments.out)
    print(f"{arguments.out} from {file.name}")


if __name__ == "__main__":
    main()
