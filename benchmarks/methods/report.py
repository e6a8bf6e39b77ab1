"""The table and the figure of a record of `benchmarks.methods`, for docs/methods.md.

    python -m benchmarks.methods --report [RECORD]

The same record gives the same bytes. The text between the two marks in the document is
replaced, the rest of it is left alone.
"""

import statistics
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from benchmarks.methods.cases import DEMO_SHAPE, REFERENCE
from benchmarks.ops.plot_nf4_linear import COLOURS
from qlora_kit.analysis.tables import Table

Row = dict[str, Any]
MARKS = "<!-- benchmarks.methods: begin -->", "<!-- benchmarks.methods: end -->"
NONE = "–"
MIB, GIB = 2**20, 2**30
GROUPS = {
    "LoRA and relatives": ("lora", "rslora", "lora_fa", "dora", "adalora", "glora"),
    "adapters in sequence": ("bottleneck",),
    "positions": ("prefix_tuning", "prompt_tuning"),
    "weights of the model": ("bitfit", "top_k", "full"),
}
"""Colour in the figure to methods."""


def find(rows: Sequence[Row], **wanted: object) -> list[Row]:
    """Rows of a record with these values, failed ones left out.

    Args:
        rows: of a record.
        **wanted: field to value.

    Returns:
        Those rows.

    Example:
        >>> find([{"what": "run", "seed": 0}, {"what": "run", "error": "x"}], what="run")
        [{'what': 'run', 'seed': 0}]
    """
    good = (row for row in rows if "error" not in row)
    return [row for row in good if all(row.get(key) == value for key, value in wanted.items())]


def spread(values: Sequence[float]) -> str:
    """Mean, standard deviation and range of scores, in percent.

    Args:
        values: between 0 and 1, one per seed.

    Returns:
        Text; the sample's deviation, so two values at least for one.

    Example:
        >>> spread([0.8, 0.82, 0.84]), spread([0.5]), spread([])
        ('82.0 ± 2.0 (80.0–84.0)', '50.0', '–')
    """
    if not values:
        return NONE
    mean = f"{100 * statistics.mean(values):.1f}"
    if len(values) == 1:
        return mean
    low, high = 100 * min(values), 100 * max(values)
    return f"{mean} ± {100 * statistics.stdev(values):.1f} ({low:.1f}–{high:.1f})"


def scores(rows: Sequence[Row], case: str, task: str) -> list[float]:
    """Held-out scores of a method, seed by seed."""
    return [row["score"] for row in find(rows, what="run", method=case, task=task)]


def budget_of(record: dict[str, Any]) -> Row:
    """The row that says what every training had."""
    (row,) = (row for row in record["rows"] if row["what"] == "budget")
    return row


def table(record: dict[str, Any], leave_out: Collection[str] = ()) -> Table:
    """One line per method, the base first where there are scores.

    Args:
        record: of this benchmark.
        leave_out: methods without a line.

    Returns:
        The table; what was not run is a dash.
    """
    rows, budget = record["rows"], budget_of(record)
    tasks, shapes = budget["tasks"], budget["shapes"]
    heading = ["method", "trained", *(["peak MiB"] if tasks else [])]
    heading += [f"{part} {_shape(s)}" for s in shapes for part in ("tokens/s", "time", "peak GiB")]
    heading += [f"{task['name']}, {task['metric'].replace('_', ' ')} %" for task in tasks]
    lines = []
    if tasks:
        found = [find(rows, what="base", task=task["name"]) for task in tasks]
        scored = [spread([row["score"] for row in base]) for base in found]
        lines.append(("base, NF4", NONE, NONE, *[NONE] * (3 * len(shapes)), *scored))
    for case in budget["cases"]:
        name = case["name"]
        runs = find(rows, what="run", method=name)
        timed = find(rows, what="speed", method=name)
        if name in leave_out or not (runs or timed):
            continue
        line = [case["label"], f"{(runs or timed)[0]['trainable']:,}"]
        if tasks:
            line.append(_peak(runs, MIB, ".0f"))
        for shape in shapes:
            line += _speed(rows, name, shape["name"])
        line += [spread(scores(rows, name, task["name"])) for task in tasks]
        lines.append(tuple(line))
    return Table("methods", tuple(heading), lines)


def _peak(rows: Sequence[Row], unit: int, digits: str) -> str:
    """The highest peak of memory; a dash without a GPU."""
    peaks = [row["peak_bytes"] for row in rows if row.get("peak_bytes")]
    return f"{max(peaks) / unit:,{digits}}" if peaks else NONE


def _shape(shape: Row) -> str:
    name = "" if shape["name"] == DEMO_SHAPE else f"{shape['name']}, "
    return f"({name}{shape['batch']} × {shape['seq']})"


def _speed(rows: Sequence[Row], case: str, shape: str) -> list[str]:
    """Tokens/s, the step's time in units of LoRA's, and its peak."""
    own = find(rows, what="speed", method=case, shape=shape)
    of_lora = find(rows, what="speed", method=REFERENCE, shape=shape)
    if not own:
        return [NONE, NONE, NONE]
    ratio = f"{own[0]['ms'] / of_lora[0]['ms']:.2f}" if of_lora else NONE
    fused = "" if own[0]["fused"] else "*"
    return [f"{own[0]['tokens_per_s']:,.0f}", ratio + fused, _peak(own, GIB, ".1f")]


def text(record: dict[str, Any], source: str, leave_out: Collection[str] = ()) -> str:
    """What stands between the marks of the document.

    Args:
        record: of this benchmark.
        source: the record's file, for the reader.
        leave_out: methods without a line, because they were changed since.

    Returns:
        Markdown.
    """
    budget = budget_of(record)
    tasks = budget["tasks"]
    lines = [_measured(record, source)]
    lines += [
        f"`{t['name']}`: {t['updates']} updates of {t['batch']} rows, {t['test_rows']:,} held out; "
        f"learning rate by the loss on {t['validation_rows']} further rows after "
        f"{t['tuning_updates']} updates."
        for t in tasks
    ]
    if budget["not_run"]:
        lines.append(f"Not run: {', '.join(budget['not_run'])}.")
    if leave_out:
        labels = [case["label"] for case in budget["cases"] if case["name"] in leave_out]
        lines.append(f"Left out: {', '.join(labels)}; another implementation was measured.")
    failed = [row for row in record["rows"] if "error" in row]
    lines += [f"Failed: {row['what']} {row['method']}: {row['error']}" for row in failed]
    parts = ["\n".join(lines), table(record, leave_out).markdown()]
    if tasks:
        parts.append(f"Learning rates: {'; '.join(_rates(record, t['name']) for t in tasks)}.")
    return "\n\n".join(parts)


def _measured(record: dict[str, Any], source: str) -> str:
    """What was measured where, and how to read it."""
    budget = budget_of(record)
    where = record["gpu"] or record["cpu"]
    star = ", * by the model's own code instead of fused layers" if record["gpu"] else ""
    shapes = f"Steps at {', '.join(_named(s) for s in budget['shapes'])}, random weights in NF4,"
    seeds = {row["seed"] for row in find(record["rows"], what="run")}
    said = _commits(record)
    if not budget["tasks"]:
        return (
            f"{shapes} on {where}, {said} (`{source}`). Time: of a step, over LoRA's{star}. "
            "Scores are not measured yet."
        )
    return (
        f"`{budget['model']}` on {where}, {said}, {len(seeds)} seeds (`{source}`). Peak MiB: of "
        f"the runs, base included; time: of a step, over LoRA's{star}."
    )


def _commits(record: dict[str, Any]) -> str:
    """Of the record, and of rows that an earlier run in the same folder had made."""
    earlier = {row["what"]: row["commit"] for row in record["rows"] if "commit" in row}
    named = ", ".join(f"{what} {commit}" for what, commit in sorted(earlier.items()))
    return f"commit {record['commit']}" + (f" ({named})" if named else "")


def _named(shape: Row) -> str:
    return f"{shape['name']}'s shape ({shape['batch']} × {shape['seq']} tokens)"


def _rates(record: dict[str, Any], task: str) -> str:
    """The learning rates of one task."""
    found = []
    for case in budget_of(record)["cases"]:
        runs = find(record["rows"], what="run", method=case["name"], task=task)
        if runs:
            found.append(f"{case['name']} {runs[0]['rate']:g}")
    return f"{task}: {', '.join(found) or 'none'}"


def write_into(document: Path, content: str) -> None:
    """Replace what stands between the marks.

    Args:
        document: Markdown.
        content: the new text.

    Raises:
        SystemExit: the marks are not there.
    """
    begin, end = MARKS
    whole = document.read_text(encoding="utf-8")
    if whole.count(begin) != 1 or whole.count(end) != 1:
        raise SystemExit(f"{document} needs the lines {begin} and {end}, once each")
    before, _, rest = whole.partition(begin)
    after = rest.partition(end)[2]
    document.write_text(f"{before}{begin}\n\n{content}\n\n{end}{after}", encoding="utf-8")


def draw(record: dict[str, Any], out: Path) -> None:
    """A line per method, a panel per task: the mean score, its range over seeds as a bar.

    Args:
        record: of this benchmark.
        out: the SVG.
    """
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "qlora_kit"
    mpl.rcParams["font.size"] = 8
    from matplotlib import pyplot as plt

    budget = budget_of(record)
    tasks = budget["tasks"]
    size = (1.8 + 3.6 * len(tasks), 1.2 + 0.19 * len(budget["cases"]))
    figure, panels = plt.subplots(1, len(tasks), figsize=size, squeeze=False, sharey=True)
    for axes, task in zip(panels[0], tasks, strict=True):
        _panel(axes, record, task)
    panels[0][0].invert_yaxis()
    lines, names = panels[0][0].get_legend_handles_labels()
    figure.legend(lines, names, frameon=False, fontsize=7, loc="lower center", ncols=len(GROUPS))
    where = record["gpu"] or "CPU"
    figure.suptitle(f"{budget['model']}, NF4, {where}, {record['commit']}", fontsize=9)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None})
    plt.close(figure)
    if out.suffix == ".svg":
        text = out.read_text(encoding="utf-8").splitlines()
        out.write_text("\n".join(line.rstrip() for line in text) + "\n", encoding="utf-8")


def _panel(axes: Any, record: dict[str, Any], task: Row) -> None:
    """One task."""
    rows, name, cases = record["rows"], task["name"], budget_of(record)["cases"]
    labelled: set[str] = set()
    for place, case in enumerate(cases):
        runs = find(rows, what="run", method=case["name"], task=name)
        if not runs:
            continue
        values = [100 * row["score"] for row in runs]
        mean = statistics.mean(values)
        group = next(g for g, methods in GROUPS.items() if case["method"] in methods)
        axes.errorbar(
            mean,
            place,
            xerr=[[mean - min(values)], [max(values) - mean]],
            fmt="o",
            markersize=4,
            capsize=2,
            linewidth=1,
            color=COLOURS[list(GROUPS).index(group)],
            label=None if group in labelled else group,
        )
        labelled.add(group)
    for row in find(rows, what="base", task=name):
        axes.axvline(100 * row["score"], color="#333333", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(cases)), [case["label"] for case in cases])
    axes.set_xlabel(f"{task['metric'].replace('_', ' ')}, %")
    axes.set_title(f"{name}; dotted: the base", fontsize=8)
    axes.grid(visible=True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
