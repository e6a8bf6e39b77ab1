"""Several examples in one row, each blind to the others.

Padding a batch of unequal examples wastes compute; filling rows up to `max_length`
wastes almost none. Rows are filled best-fit decreasing: examples from long to
short, each into the fullest row it still fits; at most 11/9 of the optimum
(Johnson 1973), in practice within a percent.

Attention must not cross from one example to the next. Positions restart at 0 with
each example and no attention mask is passed: transformers (5.17 to 5.23, eager and
sdpa) then reads the examples off the positions and builds a block-diagonal mask.
It does so **only without a key/value cache**, and `use_cache` is on by default, so
the collator passes `use_cache=False` with the batch; tests/train/data checks
logits and gradients against the unpacked examples, and that a cache breaks them.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

from qlora_kit.train.data.tokenize import IGNORED


@dataclass(frozen=True, slots=True)
class PackedRow:
    """Token lists of several documents, one after the other."""

    input_ids: list[int]
    """Tokens of all documents."""
    labels: list[int]
    """Labels of all documents; each document's first is -100."""
    position_ids: list[int]
    """0, 1, 2, ... restarting with each document."""


def plan_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Decide which examples share a row.

    Args:
        lengths: tokens of each example, 1 to capacity.
        capacity: tokens a row holds.

    Returns:
        Indices of the examples of each row, each index once; ascending within a row,
        and rows by their first index. Depends on the arguments alone.

    Raises:
        ValueError: an example is longer than a row.

    Example:
        >>> plan_rows([6, 3, 5, 4], capacity=10)
        [[0, 3], [1, 2]]
    """
    if lengths and max(lengths) > capacity:
        raise ValueError(f"an example of {max(lengths)} tokens does not fit rows of {capacity}")
    rows: list[list[int]] = []
    spaces: list[int] = []  # distinct free spaces, ascending
    by_space: dict[int, list[int]] = {}  # free space -> rows that have it
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect_left(spaces, lengths[index])
        if at == len(spaces):
            rows.append([])
            row, space = len(rows) - 1, capacity
        else:
            space = spaces[at]
            row = by_space[space].pop()
            if not by_space[space]:
                del by_space[space], spaces[at]
        rows[row].append(index)
        left = space - lengths[index]
        if left:
            if left not in by_space:
                insort(spaces, left)
            by_space.setdefault(left, []).append(row)
    return sorted(sorted(row) for row in rows)


def join(documents: Sequence[tuple[Sequence[int], Sequence[int]]]) -> PackedRow:
    """Put documents one after the other.

    Args:
        documents: (input_ids, labels) of each; the first label is -100.

    Returns:
        One row.

    Example:
        >>> join([([5, 6], [-100, 6]), ([7], [-100])]).position_ids
        [0, 1, 0]
    """
    assert all(not labels or labels[0] == IGNORED for _, labels in documents)
    return PackedRow(
        [token for ids, _ in documents for token in ids],
        [label for _, labels in documents for label in labels],
        [position for ids, _ in documents for position in range(len(ids))],
    )
