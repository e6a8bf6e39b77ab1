"""What a record says about the claims, in sentences that follow from its numbers.

    memory   LoRA needs at most a third of full fine-tuning's memory, QLoRA an eighth
    speed    QLoRA is at least 1.2 times as fast as full fine-tuning at the same batch

Full fine-tuning is mixed precision, with the better of two loss heads and with or without
recomputing, whichever is better: leanest against leanest, fastest against fastest. Beside
that, every row is compared with full fine-tuning that recomputes as it does. Where a claim
does not hold, the sentence says which part of the memory, or of the time, is in the way.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from qlora_kit.bench.components import REST
from qlora_kit.bench.methods import FULL, title_of
from qlora_kit.bench.record import Row
from qlora_kit.bench.rows import (
    Shape,
    fastest,
    leanest,
    of_method,
    peak_gib,
    recomputes,
    shape_of,
    shapes_of,
)

MEMORY_TARGETS: dict[str, tuple[tuple[str, ...], float]] = {
    "LoRA": (("lora", "lora_fa"), 3.0),
    "QLoRA": (("qlora", "qlora_fa", "qlora_paged"), 8.0),
}
"""Family to its methods, and how many times smaller than full fine-tuning it should be."""

SPEED_TARGET = 1.2
"""How many times as fast as full fine-tuning QLoRA should be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One claim at one shape."""

    claim: str
    """What was asked for."""
    ratio: float | None
    """What came out; None where a measurement is missing."""
    met: bool | None
    text: str
    """The numbers, and why where it does not hold."""


def reference(rows: Sequence[Row], row: Row, *, speed: bool = False) -> Row | None:
    """Full fine-tuning that a row is compared with: same shape, recomputing as it does.

    Args:
        rows: of the record.
        row: any.
        speed: the fastest of them instead of the leanest.

    Returns:
        The better loss head's row, or None if none ran.

    Example:
        >>> reference([], {"model": "m", "batch": 1, "seq": 8, "policy": "save"}) is None
        True
    """
    same = [
        other
        for other in of_method(rows, FULL)
        if shape_of(other) == shape_of(row) and recomputes(other) == recomputes(row)
    ]
    return fastest(same) if speed else leanest(same)


def memory_ratio(rows: Sequence[Row], row: Row) -> float | None:
    """How many times less memory a row needs than full fine-tuning that recomputes as it does."""
    full, peak = reference(rows, row), peak_gib(row)
    if full is None or not peak:
        return None
    return (peak_gib(full) or 0.0) / peak


def speed_ratio(rows: Sequence[Row], row: Row) -> float | None:
    """How many times as fast a row is as full fine-tuning that recomputes as it does."""
    full = reference(rows, row, speed=True)
    if full is None or "tokens_per_s" not in row:
        return None
    return float(row["tokens_per_s"]) / float(full["tokens_per_s"])


def verdicts(rows: Sequence[Row]) -> dict[Shape, list[Verdict]]:
    """Every claim at every shape that full fine-tuning and ours were measured at.

    Args:
        rows: of the record.

    Returns:
        Shape to verdicts; nothing for a shape without a GPU's measurements.

    Example:
        >>> verdicts([])
        {}
    """
    found: dict[Shape, list[Verdict]] = {}
    for shape in shapes_of(rows):
        same = [row for row in rows if shape_of(row) == shape and peak_gib(row) is not None]
        full = of_method(same, FULL)
        made: list[Verdict] = []
        for family, (names, target) in MEMORY_TARGETS.items():
            if ours := of_method(same, *names):
                made += _memory_verdicts(family, ours, full, target)
        if ours := of_method(same, *MEMORY_TARGETS["QLoRA"][0]):
            made.append(_speed_verdict(ours, full))
        if made:
            found[shape] = made
    return found


def _memory_verdicts(
    family: str, ours: Sequence[Row], full: Sequence[Row], target: float
) -> list[Verdict]:
    """Leanest against leanest; then with and without recomputing, where that falls short."""
    claim = f"{family} needs at most 1/{target:g} of full fine-tuning's memory"
    first = _memory_verdict(claim, leanest(ours), leanest(full), full, target)
    found = [first]
    for again, word in ((True, "recomputing"), (False, "without recomputing")):
        mine = leanest([r for r in ours if recomputes(r) == again])
        other = leanest([r for r in full if recomputes(r) == again])
        if mine is None or other is None or (mine is leanest(ours) and other is leanest(full)):
            continue
        verdict = _memory_verdict(f"{claim}, {word}", mine, other, full, target)
        if verdict.met is False:
            found.append(verdict)
    return found


def _memory_verdict(
    claim: str, ours: Row | None, full: Row | None, tried: Sequence[Row], target: float
) -> Verdict:
    if ours is None:
        return Verdict(claim=claim, ratio=None, met=None, text="not measured.")
    mine = peak_gib(ours) or 0.0
    if full is None:
        why = "full fine-tuning ran out of memory" if _all_oom(tried) else "full was not measured"
        text = f"{mine:.2f} GiB ({_named(ours)}); {why}."
        return Verdict(claim=claim, ratio=None, met=None, text=text)
    theirs = peak_gib(full) or 0.0
    ratio = theirs / mine
    text = f"{theirs:.2f} GiB ({_named(full)}) / {mine:.2f} GiB ({_named(ours)}) = {ratio:.2f}."
    if ratio < target:
        text += " " + _why_memory(ours, full, target)
    return Verdict(claim=claim, ratio=ratio, met=ratio >= target, text=text)


def _all_oom(rows: Sequence[Row]) -> bool:
    return bool(rows) and all(row.get("oom") for row in rows)


def _why_memory(ours: Row, full: Row, target: float) -> str:
    """What stands in the way: the step's own memory, or the frozen weights."""
    mine, theirs = ours.get("components_gib"), full.get("components_gib")
    if not mine or not theirs or REST not in mine or REST not in theirs:
        return ""
    # What a CUDA graph reserves beyond what is allocated belongs to the step as well.
    step = (peak_gib(ours) or 0.0) - sum(v for k, v in mine.items() if k != REST)
    stays, stays_full = (sum(v for k, v in c.items() if k != REST) for c in (mine, theirs))
    allowed = (peak_gib(full) or 0.0) / target
    held = (
        f"What stays from step to step shrinks {stays_full / stays:.1f} times "
        f"({stays_full:.2f} to {stays:.2f} GiB)"
    )
    if stays <= allowed:
        return (
            f"{held}, but activations and workspaces do not: {step:.2f} GiB here, "
            f"{theirs[REST]:.2f} GiB in full fine-tuning. For {target:g} times, {allowed:.2f} GiB "
            f"in all are allowed: {allowed - stays:.2f} GiB for them."
        )
    weights = sum(mine.get(k, 0.0) for k in ("weights", "scales", "embeddings"))
    return (
        f"{held}, of which the frozen weights alone are {weights:.2f} GiB; {target:g} times would "
        f"allow {allowed:.2f} GiB in all."
    )


def _speed_verdict(ours: Sequence[Row], full: Sequence[Row]) -> Verdict:
    claim = f"QLoRA trains at least {SPEED_TARGET:g} times as fast as full fine-tuning"
    mine, theirs = fastest(ours), fastest(full)
    if mine is None:
        return Verdict(claim=claim, ratio=None, met=None, text="not measured.")
    speed = float(mine["tokens_per_s"])
    if theirs is None:
        why = "full fine-tuning ran out of memory" if _all_oom(full) else "full was not measured"
        text = f"{speed:,.0f} tokens/s ({_named(mine)}); {why}."
        return Verdict(claim=claim, ratio=None, met=None, text=text)
    ratio = speed / float(theirs["tokens_per_s"])
    text = (
        f"{speed:,.0f} tokens/s ({_named(mine)}) / {theirs['tokens_per_s']:,.0f} "
        f"({_named(theirs)}) = {ratio:.2f}, in {peak_gib(mine):.2f} GiB against "
        f"{peak_gib(theirs):.2f}."
    )
    if ratio < SPEED_TARGET:
        text += _why_speed(mine, theirs)
    return Verdict(claim=claim, ratio=ratio, met=ratio >= SPEED_TARGET, text=text)


def _why_speed(mine: Row, theirs: Row) -> str:
    """How much less there is to compute, and how much of the card's rate each reached."""
    if not mine.get("gflops_per_token") or not theirs.get("gflops_per_token"):
        return ""
    most = theirs["gflops_per_token"] / mine["gflops_per_token"]
    text = f" The gradients need {most:.2f} times fewer FLOPs"
    if mine.get("mfu") and theirs.get("mfu"):
        text += (
            f", and QLoRA reached {mine['mfu']:.0%} of the card's rate, full fine-tuning "
            f"{theirs['mfu']:.0%}"
        )
        if recomputes(mine) and not recomputes(theirs):
            text += ", which recomputed nothing"
    return text + "."


def _named(row: Row) -> str:
    """A row in a few words."""
    head = f", {row['head']} loss" if row["impl"] == "full" else ""
    graph = ", graph" if row.get("graph") else ""
    return f"{title_of(row)}, {row['policy']}{head}{graph}"
