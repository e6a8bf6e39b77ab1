"""Draw a train_quality record: loss curves over one another, and how far apart they are.

    python -m benchmarks.train.plot_quality [RECORD] [--out docs/train_quality.svg]

Above, the loss of every step and its running mean; below, each run's distance from PEFT on
a logarithmic scale, with the tolerance. The same record gives the same bytes.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.record import ROOT
from benchmarks.ops.plot_nf4_linear import COLOURS, newest
from benchmarks.train.quality import REFERENCE

NAMES = {
    "peft": ("PEFT", "#333333"),
    "qlora_kit": ("qlora_kit", COLOURS[1]),
    "peft_liger": ("PEFT + Liger", COLOURS[2]),
    "unsloth": ("Unsloth", COLOURS[0]),
    "another start": ("qlora_kit, another start", COLOURS[3]),
    "another seed": ("qlora_kit, another start and order", COLOURS[4]),
}
"""Run to its name and colour."""
WINDOW = 10
"""Steps of the running mean."""
_SMALLEST = 1e-6


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last `window` values, fewer at the start.

    Args:
        values: in order.
        window: at least 1.

    Returns:
        One mean per value.

    Example:
        >>> running_mean([1.0, 3.0, 5.0], 2)
        [1.0, 2.0, 4.0]
    """
    return [
        sum(values[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(values))
    ]


def draw(record: dict[str, Any], out: Path) -> None:
    """Write the figure of one record.

    Args:
        record: as `python -m benchmarks.train.quality` writes it.
        out: the SVG file.

    Raises:
        SystemExit: no run has losses.
    """
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "qlora_kit"
    mpl.rcParams["font.size"] = 9
    from matplotlib import pyplot as plt

    rows = [row for row in record["rows"] if "losses" in row]
    if not rows:
        raise SystemExit("no run of this record has losses")
    reference = next((row["losses"] for row in rows if row["name"] == REFERENCE), None)
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(7, 5.6), sharex=True, gridspec_kw={"height_ratios": [3, 2]}
    )
    for row in rows:
        name, colour = NAMES[row["name"]]
        steps = range(1, len(row["losses"]) + 1)
        dashed = "--" if row["name"] == "qlora_kit" else "-"
        above.plot(steps, row["losses"], color=colour, linewidth=0.4, alpha=0.35)
        above.plot(
            steps,
            running_mean(row["losses"], WINDOW),
            color=colour,
            linewidth=1.4,
            linestyle=dashed,
            zorder=3 if row["name"] == "qlora_kit" else 2,
            label=name,
        )
        if reference is None or row["name"] == REFERENCE:
            continue
        apart = [abs(a - b) for a, b in zip(row["losses"], reference, strict=True)]
        below.plot(steps, [max(value, _SMALLEST) for value in apart], color=colour, linewidth=0.8)
    below.axhline(rows[0]["tolerance"], color="#333333", linewidth=0.8, linestyle=":")
    below.set_yscale("log")
    below.set_ylabel("distance from PEFT, nats")
    below.set_xlabel("step")
    above.set_ylabel("loss, nats per token")
    above.legend(frameon=False, fontsize=8)
    for axes in (above, below):
        axes.grid(visible=True, color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    where = record["gpu"] or "CPU"
    figure.suptitle(
        f"{rows[0]['model']}, {rows[0]['data']}, {rows[0]['dtype']}, {where}, {record['commit']}",
        fontsize=9,
    )
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None})
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Read a record, write the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path, nargs="?")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "train_quality.svg")
    arguments = parser.parse_args(argv)
    file = arguments.record or newest("train_quality")
    draw(json.loads(file.read_text(encoding="utf-8")), arguments.out)
    print(f"{arguments.out} from {file.name}")


if __name__ == "__main__":
    main()
