"""What a run says in the terminal: what it starts with, and what came of it."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora_kit import __version__
from qlora_kit.core.units import format_bytes
from qlora_kit.train.evaluate import SetResult

SHOWN_CHARACTERS = 60
"""Longest prompt or answer in the table of samples."""


def count(value: float) -> str:
    """Write a large count with three digits and a letter.

    Args:
        value: a number of parameters or tokens.

    Returns:
        Text such as `134.5 M`.

    Example:
        >>> count(134_515_008), count(960), count(7_240_000_000)
        ('134.5 M', '960', '7.2 G')
    """
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if value >= factor:
            return f"{value / (1e3 if unit == 'k' else factor):,.1f} {unit}"
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    """Write a time span for people.

    Args:
        seconds: the span.

    Returns:
        Text such as `4 min 13 s`.

    Example:
        >>> duration(253), duration(4.21), duration(3720)
        ('4 min 13 s', '4.2 s', '1 h 02 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def shorten(text: str, limit: int = SHOWN_CHARACTERS, *, keep: str = "start") -> str:
    """Put a text on one line and cut what is too long.

    Args:
        text: any text.
        limit: longest result in characters.
        keep: `start`, or `end` for prompts, which often begin alike.

    Returns:
        At most `limit` characters; an ellipsis tells of a cut.

    Example:
        >>> shorten("Is this good?\\n\\na fine film", 12, keep="end")
        '…a fine film'
        >>> shorten("The sentiment is", 10)
        'The senti…'
    """
    line = " ".join(text.split())
    if len(line) <= limit:
        return line
    return "…" + line[-(limit - 1) :] if keep == "end" else line[: limit - 1] + "…"


def print_start(console: Console, lines: Sequence[tuple[str, str]]) -> None:
    """Print what a run starts with.

    Args:
        console: where to.
        lines: label and value.

    Example:
        >>> print_start(Console(quiet=True), [("model", "tiny")])
    """
    console.print(f"[bold]qlora_kit {__version__}[/bold]", highlight=False)
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column(overflow="fold")
    for label, value in lines:
        grid.add_row(label, Text(value))
    console.print(grid)
    console.print()


def metric_rows(result: SetResult) -> list[tuple[str, str]]:
    """Name and formatted value of each measurement of a set.

    Args:
        result: of one set.

    Returns:
        Scores first, then loss and perplexity.

    Example:
        >>> metric_rows(SetResult(name="eval", task="choice", rows=2, tokens=4, loss=0.5,
        ...     perplexity=1.65, scores={"accuracy": 0.5}))
        [('accuracy', '50.0%'), ('loss', '0.5000'), ('perplexity', '1.65')]
    """
    rows = [(name.replace("_", " "), f"{value:.1%}") for name, value in result.scores.items()]
    rows.append(("loss", f"{result.loss:.4f}"))
    if result.perplexity is not None:
        rows.append(("perplexity", f"{result.perplexity:,.2f}"))
    return rows


def print_results(
    console: Console, before: Sequence[SetResult], after: Sequence[SetResult]
) -> None:
    """Print measurements before and after training, side by side, and sample answers.

    Args:
        console: where to.
        before: of the base; may be empty.
        after: of the trained model, the same sets.

    Example:
        >>> print_results(Console(quiet=True), [], [])
    """
    earlier = {result.name: result for result in before}
    if after:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for header in ("held-out set", "measure"):
            table.add_column(header)
        for header in (["before"] if before else []) + ["after"]:
            table.add_column(header, justify="right")
        for result in after:
            old = dict(metric_rows(earlier[result.name])) if result.name in earlier else {}
            for i, (name, value) in enumerate(metric_rows(result)):
                first = f"{result.name} ({result.rows:,} rows)" if i == 0 else ""
                cells = [old.get(name, "–")] if before else []
                table.add_row(first, name, *cells, Text(value, style="bold" if i == 0 else ""))
        console.print(table)
    for result in after:
        if result.answers:
            console.print(_samples(result, earlier.get(result.name)))


def _samples(result: SetResult, before: SetResult | None) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, title=f"samples: {result.name}", title_justify="left"
    )
    table.add_column("prompt", style="dim", ratio=4, overflow="fold")
    table.add_column("expected", ratio=2, overflow="fold")
    if before is not None:
        table.add_column("before", ratio=3, overflow="fold")
    table.add_column("after", ratio=3, overflow="fold")
    for i, answer in enumerate(result.answers):
        color = {True: "green", False: "red", None: ""}[answer.right]
        prompt = shorten(answer.prompt, keep="end")
        cells: list[str | Text] = [prompt, shorten(answer.reference)]
        if before is not None:
            cells.append(shorten(before.answers[i].answer) if i < len(before.answers) else "")
        cells.append(Text(shorten(answer.answer), style=color))
        table.add_row(*[cell if isinstance(cell, Text) else Text(cell) for cell in cells])
    return table


PLAN_TOLERANCE = 0.05
"""Difference of prediction and measurement from which on a run warns."""


def plan_text(found: Mapping[str, Any] | None) -> str | None:
    """Write predicted beside measured memory.

    Args:
        found: what `planning.RunPlan.judge` returned, or None.

    Returns:
        A line, with a warning where the two are more than `PLAN_TOLERANCE` apart.

    Example:
        >>> plan_text({"predicted_gib": 10.0, "measured_gib": 10.1, "difference": -0.0099})
        'training peak: 10.00 GiB predicted, 10.10 GiB measured (-1.0%)'
    """
    if found is None:
        return None
    text = (
        f"training peak: {found['predicted_gib']:.2f} GiB predicted, "
        f"{found['measured_gib']:.2f} GiB measured ({found['difference']:+.1%})"
    )
    if abs(found["difference"]) <= PLAN_TOLERANCE:
        return text
    return (
        f"{text}\nwarning: more than {PLAN_TOLERANCE:.0%} apart. Do not rely on plans for this "
        "model, and please report it with run.json."
    )


def print_end(console: Console, record: Mapping[str, Any]) -> None:
    """Print how the run went and where its results lie; the report's path comes last.

    Args:
        console: where to.
        record: of the run.

    Example:
        >>> print_end(Console(quiet=True), {"training": {"updates": 1, "seconds": 2.0,
        ...     "tokens": 10, "tokens_per_s": 5.0}, "seconds": 3.0, "memory": {},
        ...     "merge": None, "outputs": {"report": "report.html"}})
    """
    training = record["training"]
    text = (
        f"{training['updates']:,} updates in {duration(training['seconds'])}, "
        f"{training['tokens_per_s']:,.0f} tokens/s; {duration(record['seconds'])} in all"
    )
    memory = record["memory"]
    if "gpu_peak_bytes" in memory:
        text += f"; GPU peak {format_bytes(memory['gpu_peak_bytes'])}"
    elif "host_peak_bytes" in memory:
        text += f"; peak memory {format_bytes(memory['host_peak_bytes'])}"
    console.print(text, highlight=False)
    judged = plan_text(record.get("plan"))
    if judged:
        console.print(judged, highlight=False)
    merge = record["merge"]
    if merge and merge["deviation"]:
        console.print(
            f"merged model against the unmerged: {merge['deviation_text']}", highlight=False
        )
    elif merge:
        console.print(f"merged model not checked: {merge['unchecked']}", highlight=False)
    console.print()
    for name, path in record["outputs"].items():
        if path:  # soft_wrap: a path is to be copied, not to be folded
            console.print(f"{name:<9}{path}", highlight=False, soft_wrap=True, markup=False)
