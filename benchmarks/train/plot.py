"""Draw train records: tokens/s against peak memory, one panel a case, one point a row.

    python -m benchmarks.train.plot [RECORD] [--out docs/train.svg]

Up is faster, left is smaller. Ours are joined by a line from policy to policy; rows that
ran out of memory, were skipped or disagree in their loss are left out. Without a file, what
all records of this benchmark leave standing (`standing`): each panel names the commits its rows
are of. The same records give the same bytes.
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
from benchmarks.train.table import counted, how, key_of
from qlora_kit.bench.record import Row
from qlora_kit.bench.rows import mark_disagreements, measured, peak_gib, status

STYLES = {
    "qlora_kit": ("qlora_kit", COLOURS[1], "o"),
    "unsloth": ("Unsloth", COLOURS[0], "s"),
    "peft_liger": ("PEFT + Liger", COLOURS[2], "D"),
    "peft": ("PEFT", COLOURS[3], "^"),
}
"""Library to its name, colour and marker."""
_COLUMNS = 3


def all_records() -> list[dict[str, Any]]:
    """The records of training steps that know cases.

    Returns:
        Their contents, oldest first.

    Raises:
        SystemExit: there is none.
    """
    files = sorted((RESULTS / "train").glob("*.json"), key=_age)
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    found = [r for r in found if r["rows"] and all("cases" in row for row in r["rows"])]
    if not found:
        raise SystemExit(f"no record in {RESULTS / 'train'}: run python -m benchmarks.train")
    return found


def standing(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One record of several commits, since a later one may have measured some cases only.

    In each case a library's rows are those of the newest record that measured any there, so what is
    joined by a line is of one commit. A peer's row gives way to a newer one of the same settings
    that was measured for another case.

    Args:
        records: oldest first; those of another card than the newest's are left out.

    Returns:
        A record whose rows have one case and their `commit` each.

    Example:
        >>> rows = [{"impl": "peft", "cases": [name], "tokens_per_s": 1.0} for name in "ab"]
        >>> old, new = {"gpu": "H100", "commit": "1"}, {"gpu": "H100", "commit": "2"}
        >>> one = standing([old | {"rows": rows}, new | {"rows": rows[:1]}])
        >>> [(row["cases"], row["commit"]) for row in one["rows"]]
        [(['a'], '2'), (['b'], '2')]
    """
    gpu = records[-1]["gpu"]
    newest: dict[tuple[Any, ...], Row] = {}
    chosen: dict[tuple[str, str], list[Row]] = {}
    for record in records:
        here: dict[tuple[str, str], list[Row]] = {}
        for row in measured(record["rows"]) if record["gpu"] == gpu else ():
            own = row | {"commit": row.get("commit", record["commit"])}
            newest[key_of(row)] = own
            for case in row["cases"]:
                here.setdefault((case, row["impl"]), []).append(own)
        chosen |= here
    rows = [
        (row if impl == "qlora_kit" else newest[key_of(row)]) | {"cases": [case]}
        for (case, impl), mine in chosen.items()
        for row in mine
    ]
    return {"gpu": gpu, "rows": rows}


def commits_of(record: dict[str, Any], case: str) -> str:
    """Which commits a case's rows are of, by library.

    Args:
        record: of one commit, or of several with the commit in each row.
        case: its name.

    Returns:
        Words for a panel.

    Example:
        >>> row = {"impl": "unsloth", "cases": ["long"], "tokens_per_s": 1.0}
        >>> commits_of({"commit": "abc", "rows": [row]}, "long")
        'Unsloth abc'
    """
    words = []
    for impl, (name, *_) in STYLES.items():
        rows = counted(record["rows"], case, impl)
        found = dict.fromkeys(row.get("commit") or record["commit"] for row in rows)
        words += [f"{name} {', '.join(found)}"] if found else []
    return "; ".join(words)


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


def draw_case(axes: Any, case: Case, record: dict[str, Any]) -> None:
    """One panel."""
    rows = record["rows"]
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
        f"{case.name}: {one['model']}, {one['batch']} × {one['seq']}, r {one['rank']}\n"
        f"{commits_of(record, case.name)}",
        fontsize=7,
    )


def is_shown(case: Case, rows: Sequence[Row]) -> bool:
    """Whether a case has points to compare: with peers, or of all methods that it is about."""
    ours = points(rows, case.name, "qlora_kit")
    some = any(points(rows, case.name, impl) for impl in STYLES)
    return some and (bool(case.peers) or (len(ours) > 1 and _methods(ours) >= {*case.methods}))


def _methods(rows: Sequence[Row]) -> set[str]:
    return {row["method"] for row in rows}


def draw(record: dict[str, Any], out: Path) -> None:
    """Write the figure of one record.

    Args:
        record: as `python -m benchmarks.train` writes it, or what is left standing of several.
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
    shown = [case for case in CASES if is_shown(case, rows)]
    if not shown:
        raise SystemExit("no row of this record has both tokens/s and GPU memory")
    lines = -(-len(shown) // _COLUMNS)
    columns = min(len(shown), _COLUMNS)
    figure, grid = plt.subplots(
        lines, columns, figsize=(3.6 * columns, 2.9 * lines + 0.6), squeeze=False
    )
    for axes, case in zip(grid.flat, shown, strict=False):
        draw_case(axes, case, record)
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
    figure.suptitle(record["gpu"], fontsize=8, x=0.02, ha="left")
    figure.tight_layout(rect=(0, 0, 1, 0.99))
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None})
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Read one record or all, write the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path, nargs="?")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "train.svg")
    arguments = parser.parse_args(argv)
    if arguments.record is not None:
        record = json.loads(arguments.record.read_text(encoding="utf-8"))
    else:
        record = standing(all_records())
    draw(record, arguments.out)
    for case in CASES:
        if is_shown(case, record["rows"]):
            print(f"{case.name}: {commits_of(record, case.name)}")
    print(arguments.out)


if __name__ == "__main__":
    main()
