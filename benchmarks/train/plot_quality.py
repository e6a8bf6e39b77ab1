"""Draw a train_quality record: loss curves over one another, and how far apart they are.

    python -m benchmarks.train.plot_quality [RECORD] [--out docs/train_quality.svg]

Above, the first steps' losses and all steps' running means; below, each run's distance from
float32 on a logarithmic scale, with the tolerance: the first steps one by one, then a running
mean. The same record gives the same bytes.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.record import ROOT
from benchmarks.ops.plot_nf4_linear import COLOURS, newest
from benchmarks.train.agreement import OURS, REFERENCE

NAMES = {
    REFERENCE: ("float32", "#333333"),
    "peft": ("PEFT", "#e69f00"),
    "qlora_kit": ("qlora_kit", COLOURS[1]),
    "peft_liger": ("PEFT + Liger", COLOURS[2]),
    "unsloth": ("Unsloth", COLOURS[0]),
    "another start": ("qlora_kit, another start", COLOURS[3]),
    "another seed": ("qlora_kit, another start and order", COLOURS[4]),
}
"""Run to its name and colour."""
WINDOW = 10
"""Steps of the running mean."""
FIRST = 30
"""Steps drawn one by one."""
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


def distances(losses: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Absolute differences, large enough for a logarithmic scale.

    Args:
        losses: of a run.
        reference: as many.

    Returns:
        One per step, nats.
    """
    return [max(abs(a - b), _SMALLEST) for a, b in zip(losses, reference, strict=True)]


def _draw_rows(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Lines of every run in four fields: losses above, distances below; first steps, all steps."""
    reference = next((row["losses"] for row in rows if row["name"] == REFERENCE), None)
    for row in rows:
        name, colour = NAMES[row["name"]]
        losses = row["losses"]
        steps = range(1, len(losses) + 1)
        look = {
            "color": colour,
            "linewidth": 1.4 if row["name"] in {OURS, REFERENCE} else 0.9,
            "linestyle": "--" if row["name"] == OURS else "-",
            "zorder": 3 if row["name"] == OURS else 2,
        }
        axes[0][0].plot(steps[:FIRST], losses[:FIRST], **look)
        axes[0][1].plot(steps, running_mean(losses, WINDOW), label=name, **look)
        if reference is None or row["name"] == REFERENCE:
            continue
        apart = distances(losses, reference)
        axes[1][0].plot(steps[:FIRST], apart[:FIRST], **look)
        axes[1][1].plot(steps, running_mean(apart, WINDOW), **look)


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
    figure, axes = plt.subplots(2, 2, figsize=(8.5, 5.6), sharex="col", sharey="row")
    _draw_rows(axes, rows)
    for below in axes[1]:
        below.axhline(rows[0]["tolerance"], color="#333333", linewidth=0.8, linestyle=":")
        below.set_yscale("log")
    axes[0][0].set_ylabel("loss, nats per token")
    axes[1][0].set_ylabel("distance from float32, nats")
    axes[1][0].set_xlabel(f"step, the first {FIRST}")
    axes[1][1].set_xlabel(f"step, mean of the last {WINDOW}")
    axes[0][1].legend(frameon=False, fontsize=8)
    for field in axes.flat:
        field.grid(visible=True, color="#dddddd", linewidth=0.6)
        field.set_axisbelow(True)
        field.spines[["top", "right"]].set_visible(False)
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
