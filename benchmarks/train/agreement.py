"""Losses of one training beside those of the reference: how far apart, and what that decides.

The reference computes in float32 throughout. In bfloat16 libraries can agree with one another
and still be off together, if they round in the same places, so none of them is a measure for ours.
"""

from collections.abc import Sequence
from typing import Any

TOLERANCE = 0.005
"""Nats, on average over the steps."""
REFERENCE = "float32"
OURS = "qlora_kit"
OTHER_SEED = "another seed"
EDGE = 20
"""Steps at the start and at the end that have figures of their own."""


def mean_difference(one: Sequence[float], other: Sequence[float]) -> float:
    """Mean absolute difference of two loss curves.

    Args:
        one: losses, nats.
        other: as many.

    Returns:
        Nats.

    Example:
        >>> mean_difference([3.0, 2.0], [3.5, 1.5])
        0.5
    """
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)


def add_differences(row: dict[str, Any], reference: Sequence[float] | None) -> dict[str, Any]:
    """Complete one row of the record.

    Args:
        row: a run and what its process wrote: `losses`, `skipped` or `error`. Not modified.
        reference: losses of the reference; None if it has none.

    Returns:
        The row with means and distances; the reference has none from itself.
    """
    losses = row.get("losses")
    if losses is None:
        return row
    last = losses[-EDGE:]
    found = row | {"last_20_mean_loss": sum(last) / len(last)}
    if reference is None or row["name"] == REFERENCE:
        return found
    mean = mean_difference(losses, reference)
    return found | {
        "mean_abs_difference": mean,
        "max_abs_difference": max(abs(a - b) for a, b in zip(losses, reference, strict=True)),
        "first_20_abs_difference": mean_difference(losses[:EDGE], reference[:EDGE]),
        "last_20_abs_difference": mean_difference(last, reference[-EDGE:]),
        "agrees": mean <= TOLERANCE,
    }


def count_other_weights(codes: dict[str, str], reference: dict[str, str]) -> int:
    """How many linears do not have the reference's bytes.

    Args:
        codes: linear to the hash of its 4-bit codes and their scales.
        reference: the same of the reference.

    Returns:
        Linears that differ or that only one of them has.

    Example:
        >>> count_other_weights({"q": "a", "k": "b"}, {"q": "a", "k": "c", "v": "d"})
        2
    """
    return sum(codes.get(name) != reference.get(name) for name in codes.keys() | reference.keys())


def _met(row: dict[str, Any]) -> bool | None:
    """Whether a run is as it has to be; None where that is not asked."""
    if row["name"] == REFERENCE:
        return "losses" in row
    if row["name"] not in {OURS, OTHER_SEED}:
        return None
    if "agrees" not in row:
        return False
    if row["name"] == OTHER_SEED:
        return not row["agrees"]
    return bool(row["agrees"])


def verdict(rows: Sequence[dict[str, Any]]) -> tuple[bool, list[str]]:
    """Whether ours agrees with float32 and another seed does not, and a line for each run.

    Args:
        rows: of the record. Peers and another start are reported and decide nothing.

    Returns:
        Agreement, and what to print.
    """
    good = True
    lines = [f"  {'':14} last 20   from float32, mean: all, first 20, last 20; at most"]
    for row in rows:
        met = _met(row)
        good = good and met is not False
        if "losses" not in row:
            said = f"  {row['name']:14} {row.get('skipped') or row.get('error')}"
        else:
            said = f"  {row['name']:14} {row['last_20_mean_loss']:.4f}"
        if "agrees" in row:
            said += f"    {row['mean_abs_difference']:.5f}, {row['first_20_abs_difference']:.5f}, "
            said += f"{row['last_20_abs_difference']:.5f}; {row['max_abs_difference']:.5f}  "
            said += "the same" if row["agrees"] else "different"
        if row.get("other_nf4"):
            said += f", {row['other_nf4']} of {row['nf4_linears']} linears have other 4-bit weights"
        lines.append(said + ("  MISSED" if met is False else ""))
    return good, lines
