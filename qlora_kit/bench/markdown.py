"""The Markdown report: what was measured, on what, the tables, and what follows from them."""

from typing import Any

from qlora_kit.bench.claims import Verdict, verdicts
from qlora_kit.bench.tables import NOTES, Table, tables_of


def render_markdown(record: dict[str, Any]) -> str:
    """Make the report.

    Args:
        record: of memory or speed.

    Returns:
        Markdown, complete.

    Example:
        >>> text = render_markdown({"bench": "speed", "gpu": None, "driver": None, "cpu": "x86",
        ...     "commit": None, "dirty": False, "command": "bench speed", "env": {}, "peaks": {},
        ...     "rows": []})
        >>> text.splitlines()[0]
        '# qlora-kit bench speed'
    """
    found = verdicts(record["rows"])
    parts = [f"# qlora-kit bench {record['bench']}", _head(record), NOTES[record["bench"]]]
    if record.get("note"):
        parts.insert(1, f"**{record['note']}**")
    for table in tables_of(record):
        parts += [f"## {table.title}", _table(table)]
        said = [f"- {sentence(verdict)}" for verdict in found.get(table.shape, [])]
        parts += ["\n".join(said)] if said else []
    return "\n\n".join(parts) + "\n"


def sentence(verdict: Verdict) -> str:
    """A verdict as one line.

    Args:
        verdict: of a claim.

    Returns:
        Whether it holds, and the numbers.

    Example:
        >>> sentence(Verdict(claim="It is fast", ratio=2.0, met=True, text="4 / 2 = 2."))
        'It is fast: holds. 4 / 2 = 2.'
    """
    word = {True: "holds", False: "DOES NOT HOLD", None: "open"}[verdict.met]
    return f"{verdict.claim}: {word}. {verdict.text}"


def facts(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Machine, versions and command of a record, for a head or a foot.

    Args:
        record: of any benchmark.

    Returns:
        Pairs of name and text.
    """
    versions = ", ".join(f"{name} {number}" for name, number in record["env"].items())
    commit = record["commit"] or "installed package"
    peaks = ", ".join(f"{name} {value:.3g}" for name, value in record["peaks"].items())
    gpu = f"{record['gpu']}, driver {record['driver']}" if record["gpu"] else "none"
    pairs = [
        ("GPU", gpu),
        ("processor", record["cpu"]),
        ("sustained rates", peaks),
        ("commit", commit),
        ("versions", versions),
        ("command", record["command"]),
    ]
    return [(name, text) for name, text in pairs if text]


def _head(record: dict[str, Any]) -> str:
    return "\n".join(f"- {name}: {text}" for name, text in facts(record))


def _table(table: Table) -> str:
    def line(cells: tuple[str, ...]) -> str:
        return f"| {' | '.join(cells)} |"

    rule = "|" + "|".join("---" if i < 2 else "---:" for i in range(len(table.header))) + "|"
    return "\n".join([line(table.header), rule, *map(line, table.rows)])
