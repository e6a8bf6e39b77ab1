"""Draw plan records: predicted against measured, peak memory and tokens/s, one point a run.

    python -m benchmarks.plan.plot [RECORD ...] [--out docs/planner.svg]

The lines are perfect predictions and the targets' bounds. Points of the first record are filled,
those of others are not. Without a file, the newest record of each kind of card.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.record import RESULTS, ROOT
from benchmarks.ops.plot_nf4_linear import COLOURS
from benchmarks.plan.__main__ import MOST, SPEED, errors

MARKERS = "osD^vPX*"


def newest_records() -> list[Path]:
    """The newest record of each kind of card, measured on a GPU; of a day's, the one of most rows.

    Returns:
        The files, by name.

    Raises:
        SystemExit: there is none.
    """
    files = (RESULTS / "plan").glob("*.json")
    found = [(file, json.loads(file.read_text(encoding="utf-8"))) for file in files]
    found.sort(key=lambda pair: (pair[0].stem.split("-")[-2], len(pair[1]["rows"])))
    cards = {record["gpu"]: file for file, record in found}
    cards.pop(None, None)
    if not cards:
        raise SystemExit(f"no record in {RESULTS / 'plan'}: run python -m benchmarks.plan")
    return sorted(cards.values())


_Points = list[tuple[str, bool, float, float]]


def _panel(axes: Any, points: _Points, bound: float, unit: str) -> None:
    """One panel: points of (model, whether filled, measured, predicted)."""
    models = list(dict.fromkeys(model for model, *_ in points))
    for index, model in enumerate(models):
        named = model
        for filled in (True, False):
            mine = [(m, p) for name, first, m, p in points if (name, first) == (model, filled)]
            if not mine:
                continue
            axes.plot(
                *zip(*mine, strict=True),
                marker=MARKERS[index % len(MARKERS)],
                color=COLOURS[index % len(COLOURS)],
                fillstyle="full" if filled else "none",
                linewidth=0,
                markersize=4.5,
                label=named,
            )
            named = "_"  # one name for both
    values = [value for *_, measured, predicted in points for value in (measured, predicted)]
    low, high = min(values) / 1.3, max(values) * 1.3
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


def draw(records: Sequence[dict[str, Any]], out: Path) -> None:
    """Write the figure of some records.

    Args:
        records: as `python -m benchmarks.plan` writes them; points of the first are filled.
        out: the SVG file.

    Raises:
        SystemExit: no row has a measurement and a prediction.
    """
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "qlora_kit"
    mpl.rcParams["font.size"] = 8
    from matplotlib import pyplot as plt

    known = [(one is records[0], row) for one in records for row, _, _ in errors(one["rows"])]
    if not known:
        raise SystemExit("no row of these records has a measurement and a prediction")
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.6, 4.1))
    sizes = [(r["model"], f, r["peak_allocated_gib"], r["predicted_gib"]) for f, r in known]
    _panel(left, sizes, MOST, "GiB of peak memory")
    speeds = [(r["model"], f, r["tokens_per_s"], r["predicted_tokens_per_s"]) for f, r in known]
    _panel(right, speeds, SPEED, "tokens/s")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=4, frameon=False, fontsize=7)
    figure.suptitle(_title(records), fontsize=8, x=0.02, ha="left")
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None})
    plt.close(figure)


def _title(records: Sequence[dict[str, Any]]) -> str:
    """Cards and commits, filled points first."""
    named = [f"{one['gpu']}, {one['commit']}" for one in records]
    return f"filled: {named[0]}; open: {'; '.join(named[1:])}" if len(named) > 1 else named[0]


def main(words: list[str] | None = None) -> None:
    """Read records, write the figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("records", type=Path, nargs="*")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "planner.svg")
    arguments = parser.parse_args(words)
    files = arguments.records or newest_records()
    draw([json.loads(file.read_text(encoding="utf-8")) for file in files], arguments.out)
    print(f"{arguments.out} from {', '.join(file.name for file in files)}")


if __name__ == "__main__":
    main()
