"""Draw a train record: tokens/s against peak memory, one panel a case, one point a row.

    python -m benchmarks.train.plot [RECORD] [--out docs/train.svg]

Up is faster, left is smaller. Ours are joined by a line from policy to policy; rows that
ran out of memory, were skipped or disagree in their loss are left out. Without a file,
the newest record that this benchmark wrote. The same record gives the same bytes.
"""

import argparse
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.record import RESULTS, ROOT
from benchmarks.ops.plot_nf4_linear import COLOURS
from benchmarks.train.cases import CASES, Case
from benchmarks.train.table import counted, how
from qlora_kit.bench.rows import mark_disagreements, peak_gib, status

STYLES = {
    "qlora_kit": ("qlora_kit", COLOURS[1], "o"),
    "unsloth": ("Unsloth", COLOURS[0], "s"),
    "peft_liger": ("PEFT + Liger", COLOURS[2], "D"),
    "peft": ("PEFT", COLOURS[3], "^"),
}
"""Library to its name, colour and marker."""
_COLUMNS = 3


def newest_record() -> Path:
    """The newest record of training steps that knows cases.

    Returns:
        The file.

    Raises:
        SystemExit: there is none.
    """
    files = sorted((RESULTS / "train").glob("*.json"), key=_age)
    for file in reversed(files):
        rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
        if rows and all("cases" in row for row in rows):
            return file
    raise SystemExit(f"no record in {RESULTS / 'train'}: run python -m benchmarks.train")


def points(rows: Sequence[dict[str, Any]], case: str, impl: str) -> list[dict[str, Any]]:
    """Rows of a case and library that have both numbers, the smallest first."""
    found = [r for r in counted(rows, case, impl) if peak_gib(r) is not None]
    return sorted(found, key=lambda row: peak_gib(row) or 0.0)


def _age(file: Path) -> tuple[str, float]:
    """Its day, and the time of its commit: of the file itself where there is no git."""
    *_, day, commit = file.stem.split("-")
    words = ["git", "show", "-s", "--format=%ct", commit]
    try:
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)
    except FileNotFoundError:
        return day, file.stat().st_mtime
    text = done.stdout.strip()
    return day, float(text) if text else file.stat().st_mtime


def name_points(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Policies, left of their points and one below the other, the fastest on top."""
    ordered = sorted(rows, key=lambda row: -row["tokens_per_s"])
    for place, row in enumerate(ordered):
        first = ordered[0]
        axes.annotate(
            how(row).replace("recompute_", "re-"),
            (peak_gib(first), first["tokens_per_s"] / 1e3),
            xytext=(-8, 5 - 8 * place if place == 0 else -6 - 8 * place),
            textcoords="offset points",
            ha="right",
            fontsize=6,
            color="#444444",
        )


def draw_case(axes: Any, case: Case, rows: Sequence[dict[str, Any]]) -> None:
    """One panel."""
    for impl, (_, colour, marker) in STYLES.items():
        for method in ("lora", "lora_fa"):
            mine = [row for row in points(rows, case.name, impl) if row["method"] == method]
            if not mine:
                continue
            axes.plot(
                [peak_gib(row) for row in mine],
                [row["tokens_per_s"] / 1e3 for row in mine],
                color=colour,
                marker=marker,
                markersize=6,
                linewidth=1.2 if impl == "qlora_kit" else 0,
                linestyle="-" if method == "lora" else "--",
                markerfacecolor=colour if method == "lora" else "white",
            )
            if impl == "qlora_kit":
                name_points(axes, mine)
    widest = max(axes.dataLim.x1, case.target.peak_gib or 0.0)
    highest = max(axes.dataLim.y1, (case.target.tokens_per_s or 0.0) / 1e3)
    axes.set_xlim(0, 1.25 * widest)
    axes.set_ylim(0, 1.1 * highest)
    if case.target.tokens_per_s is not None:
        axes.axhline(case.target.tokens_per_s / 1e3, color="#333333", linewidth=0.8, linestyle=":")
    if case.target.peak_gib is not None:
        axes.axvline(case.target.peak_gib, color="#333333", linewidth=0.8, linestyle=":")
    axes.grid(visible=True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    one = next(row for row in rows if case.name in row["cases"])
    axes.set_title(
        f"{case.name}: {one['model']}, {one['batch']} × {one['seq']}, r {one['rank']}", fontsize=8
    )


def draw(record: dict[str, Any], out: Path) -> None:
    """Write the figure of one record.

    Args:
        record: as `python -m benchmarks.train` writes it.
        out: the SVG file.

    Raises:
        SystemExit: no row has both speed and GPU memory.
    """
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "qlora_kit"
    mpl.rcParams["font.size"] = 8
    from matplotlib import pyplot as plt

    rows = record["rows"]
    mark_disagreements(rows)
    shown = [
        case
        for case in CASES
        if any(points(rows, case.name, impl) for impl in STYLES)
        and (case.peers or len(points(rows, case.name, "qlora_kit")) > 1)
    ]
    if not shown:
        raise SystemExit("no row of this record has both tokens/s and GPU memory")
    lines = -(-len(shown) // _COLUMNS)
    columns = min(len(shown), _COLUMNS)
    figure, grid = plt.subplots(
        lines, columns, figsize=(3.6 * columns, 2.9 * lines + 0.6), squeeze=False
    )
    for axes, case in zip(grid.flat, shown, strict=False):
        draw_case(axes, case, rows)
    for axes in grid.flat[len(shown) :]:
        axes.set_visible(False)
    figure.supxlabel("peak memory, GiB (allocated; reserved where a CUDA graph ran)", fontsize=8)
    figure.supylabel("thousand tokens/s", fontsize=8)
    handles = [
        plt.Line2D([], [], color=colour, marker=marker, linewidth=0, label=name)
        for impl, (name, colour, marker) in STYLES.items()
        if any(row["impl"] == impl and not status(row) for row in rows)
    ]
    figure.legend(handles=handles, loc="upper right", ncol=4, frameon=False, fontsize=8)
    figure.suptitle(f"{record['gpu']}, {record['commit']}", fontsize=8, x=0.02, ha="left")
    figure.tight_layout(rect=(0, 0, 1, 0.99))
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None})
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Read a record, write the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path, nargs="?")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "train.svg")
    arguments = parser.parse_args(argv)
    file = arguments.record or newest_record()
    draw(json.loads(file.read_text(encoding="utf-8")), arguments.out)
    print(f"{arguments.out} from {file.name}")


if __name__ == "__main__":
    main()
