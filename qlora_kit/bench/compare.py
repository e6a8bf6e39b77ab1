"""What became worse since another record: more memory, fewer tokens per second, out of memory.

Rows are matched by what they measured. A change counts beyond a threshold: memory repeats to
the byte on one version of the libraries, so 2% is a change of ours or of theirs; speed varies
from card to card and with the heat of the day by a few percent, so 5%.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qlora_kit.bench.methods import title_of
from qlora_kit.bench.record import Row
from qlora_kit.bench.rows import identity, measured, shape_of, status

MEMORY_THRESHOLD = 0.02
SPEED_THRESHOLD = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One figure of one measurement, then and now."""

    name: str
    """What was measured."""
    figure: str
    """`allocated GiB`, `tokens/s` or `ran`."""
    before: float
    after: float
    worse: bool
    """Beyond the threshold, in the wrong direction."""

    @property
    def share(self) -> float:
        """Relative change."""
        return self.after / self.before - 1.0 if self.before else 0.0


def compare(
    old: dict[str, Any],
    new: dict[str, Any],
    *,
    memory: float = MEMORY_THRESHOLD,
    speed: float = SPEED_THRESHOLD,
) -> list[Change]:
    """Match two records.

    Args:
        old: a record of memory or speed.
        new: another one.
        memory: share of more memory that counts as worse.
        speed: share of fewer tokens per second that counts as worse.

    Returns:
        Every figure of every measurement that both have; a measurement that ran then and not
        now is worse.

    Example:
        >>> row = {"impl": "qlora_kit", "method": "lora", "bits": 4, "masters": "library",
        ...     "variant": "", "optimizer": "adamw_8bit", "model": "m", "batch": 1, "seq": 2,
        ...     "policy": "save", "head": "", "peak_allocated_gib": 2.0, "tokens_per_s": 100.0}
        >>> slower = row | {"tokens_per_s": 90.0, "peak_allocated_gib": 1.9}
        >>> [c.worse for c in compare({"rows": [row]}, {"rows": [slower]})]
        [False, True]
    """
    now = {identity(row): row for row in new["rows"]}
    found: list[Change] = []
    for row in measured(old["rows"]):
        other = now.get(identity(row))
        if other is None:
            continue
        if not measured([other]):
            name = f"{_name(row)}: {status(other)}"
            found.append(Change(name=name, figure="ran", before=1.0, after=0.0, worse=True))
            continue
        found += _figures(row, other, memory, speed)
    return found


def _figures(row: Row, other: Row, memory: float, speed: float) -> list[Change]:
    made = []
    for key, figure, most in (
        ("peak_allocated_gib", "allocated GiB", memory),
        ("tokens_per_s", "tokens/s", speed),
    ):
        before, after = row.get(key), other.get(key)
        if before and after:
            change = after / before - 1.0
            worse = change > most if key.startswith("peak") else change < -most
            made.append(
                Change(name=_name(row), figure=figure, before=before, after=after, worse=worse)
            )
    return made


def _name(row: Row) -> str:
    model, batch, seq = shape_of(row)
    head = f", {row['head']} loss" if row["impl"] == "full" else ""
    graph = ", graph" if row.get("graph") else ""
    return f"{model} {batch} x {seq}, {title_of(row)}, {row['policy']}{head}{graph}"


def report(
    old: dict[str, Any], new: dict[str, Any], changes: Sequence[Change], *, limits: str
) -> str:
    """The changes as text, the worst ones first.

    Args:
        old: the record compared with.
        new: the record.
        changes: of `compare`.
        limits: the thresholds, in words.

    Returns:
        Lines for a terminal.
    """
    worse = [change for change in changes if change.worse]
    version = old.get("commit") or "an installed package"
    counts = f"{len(changes)} figures, {len(worse)} worse ({limits})"
    then, now = (one.get("gpu") or "a machine without a GPU" for one in (old, new))
    lines = [f"compared with {version} on {then}: {counts}"]
    if then != now:
        lines.append(f"  another card: {then} then, {now} now")
    for change in sorted(changes, key=lambda change: not change.worse):
        word = "WORSE" if change.worse else "     "
        if change.figure == "ran":
            lines.append(f"  {word} {change.name}")
        else:
            lines.append(
                f"  {word} {change.share:+7.1%}  {change.before:,.2f} to {change.after:,.2f} "
                f"{change.figure}  {change.name}"
            )
    return "\n".join(lines)
