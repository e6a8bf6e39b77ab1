"""The order of training rows, as a pure function of the seed and the epoch.

Transformers' samplers draw from the global random state, so the order of epoch 2
depends on everything that happened in epoch 1, dropout included, and a resumed
run sees other batches than an uninterrupted one. Here each epoch has a generator
of its own.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch.utils.data import Sampler

T = TypeVar("T")

_MEGABATCH = 50
"""Batches that are sorted by length together: larger wastes less, mixes less."""


class RowSet(Protocol):
    """Any map-style data set: a list of rows, a `TokenizedSet`, a torch `Dataset` with a length."""

    def __len__(self) -> int:
        """Count rows."""

    def __getitem__(self, index: int, /) -> Any:
        """Give one row, a mapping with `input_ids`."""


def row_lengths(dataset: RowSet) -> list[int]:
    """Tokens of each row, from the data set's `lengths` or by counting.

    Args:
        dataset: map-style; rows are mappings with `input_ids`.

    Returns:
        One length per row.

    Example:
        >>> row_lengths([{"input_ids": [1, 2]}, {"input_ids": [1]}])
        [2, 1]
    """
    known = getattr(dataset, "lengths", None)
    if known is not None:
        return [int(length) for length in known]
    return [len(dataset[row]["input_ids"]) for row in range(len(dataset))]


class EpochSampler(Sampler[int]):
    """Shuffled rows, optionally batched with rows of similar length.

    When grouping, the longest batch comes first, so that a run that does not fit
    fails at its first step; the order of the others is random.

    Example:
        >>> sampler = EpochSampler([5, 1, 4, 2], batch_size=2, group_by_length=True, seed=0)
        >>> order = list(sampler)
        >>> sorted(order), 0 in order[:2]
        ([0, 1, 2, 3], True)
        >>> sampler.set_epoch(1)
        >>> sampler.epoch
        1
    """

    def __init__(
        self, lengths: Sequence[int], *, batch_size: int, group_by_length: bool, seed: int
    ) -> None:
        """Remember what the order depends on.

        Args:
            lengths: tokens per row.
            batch_size: rows per batch, over all devices.
            group_by_length: batch rows of similar length together.
            seed: decides the order, together with the epoch.
        """
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.group_by_length = group_by_length
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration follows."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Count rows."""
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        """Yield every row index once."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        if not self.group_by_length:
            return iter(order)
        return iter(self._group(order, generator))

    def _group(self, order: list[int], generator: torch.Generator) -> list[int]:
        # At least four megabatches, so that small data sets are still mixed.
        batches_each = max(1, min(len(order) // (self.batch_size * 4), _MEGABATCH))
        span = batches_each * self.batch_size
        batches: list[list[int]] = []
        for start in range(0, len(order), span):
            rows = sorted(order[start : start + span], key=lambda row: -self.lengths[row])
            batches += [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        # A short batch must stay last: whoever cuts the sequence cuts it every batch_size rows.
        tail = batches.pop() if len(batches[-1]) < self.batch_size else []
        if not batches:
            return tail
        shuffle = torch.randperm(len(batches), generator=generator).tolist()
        longest = max(shuffle, key=lambda i: self.lengths[batches[i][0]])
        shuffle.remove(longest)
        return [row for i in (longest, *shuffle) for row in batches[i]] + tail


class SortedSampler(Sampler[int]):
    """Rows by length, longest first: the least padding, for evaluation.

    Example:
        >>> list(SortedSampler([5, 1, 4]))
        [0, 2, 1]
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        """Sort once.

        Args:
            lengths: tokens per row.
        """
        self.order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))

    def __len__(self) -> int:
        """Count rows."""
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        """Yield every row index once."""
        return iter(self.order)


def divide(
    items: Sequence[T], length: Callable[[T], int], rows: int, most_tokens: int | None
) -> list[list[T]]:
    """Divide items that come longest first into batches of a bounded number of tokens.

    Args:
        items: longest first.
        length: tokens of one.
        rows: of a batch, at most.
        most_tokens: of a batch, padding included, at most; None for any number. An item that
            is longer is a batch of its own.

    Returns:
        The items, in order.

    Example:
        >>> divide([7, 4, 3, 3, 1], lambda item: item, 4, 8)
        [[7], [4, 3], [3, 1]]
    """
    batches: list[list[T]] = []
    start = 0
    while start < len(items):
        size = rows
        if most_tokens is not None:
            size = min(rows, max(1, most_tokens // max(1, length(items[start]))))
        batches.append(list(items[start : start + size]))
        start += size
    return batches
