"""Rows of token lists to batches of tensors.

All four pad on the side that keeps positions right: training batches on the right
(no position ids needed), prompts for generation on the left (every prompt ends in
the last column). What is padding is told by the attention mask and by labels of
-100, never by the padding id, which many models share with the end-of-sequence
token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_kit.train.data.tokenize import IGNORED
from qlora_kit.train.data.tokenized import Row, TokenizedSet

Batch = dict[str, Any]
"""Arguments of a model's forward: tensors by name (and `use_cache` for packed rows)."""
Collator = Callable[[Sequence[Row]], Batch]


def make_collator(
    dataset: TokenizedSet, *, pad_to_multiple_of: int = 1, flatten: bool = False
) -> Collator:
    """Choose the collator that suits a data set.

    Args:
        dataset: as `build_dataset` makes it.
        pad_to_multiple_of: 8 suits tensor cores; 1 pads to the longest row only.
        flatten: packed rows only: put the whole batch into one row. FlashAttention
            reads packed documents off the positions only in batches of one row, so
            it is needed with `attention: flash_attention_2`.

    Returns:
        A callable for `DataLoader(collate_fn=...)` and `Trainer(data_collator=...)`.

    Example:
        >>> from types import SimpleNamespace
        >>> words = SimpleNamespace(task="causal_lm", packed=False, pad_token_id=0)
        >>> make_collator(words, pad_to_multiple_of=8)
        PadCollator(pad_token_id=0, pad_to_multiple_of=8)
    """
    if dataset.task == "sequence_classification":
        return ClassificationCollator(dataset.pad_token_id, pad_to_multiple_of)
    if dataset.packed:
        return PackedCollator(dataset.pad_token_id, pad_to_multiple_of, flatten)
    return PadCollator(dataset.pad_token_id, pad_to_multiple_of)


@dataclass(frozen=True, slots=True)
class PadCollator:
    """Pads rows of token lists on the right.

    Gives input_ids, attention_mask and labels, each (rows, longest) int64.

    Example:
        >>> batch = PadCollator(0)([{"input_ids": [5, 6], "labels": [-100, 6]},
        ...                         {"input_ids": [7], "labels": [-100]}])
        >>> batch["input_ids"].tolist(), batch["attention_mask"].tolist()
        ([[5, 6], [7, 0]], [[1, 1], [1, 0]])
    """

    pad_token_id: int
    """Any valid id; it is masked."""
    pad_to_multiple_of: int = 1
    """The length of a batch is rounded up to a multiple of this."""

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """Pad rows; see the class."""
        ids = [row["input_ids"] for row in rows]
        length = _round_up(max(map(len, ids)), self.pad_to_multiple_of)
        return {
            "input_ids": _right(ids, length, self.pad_token_id),
            "attention_mask": _right([[1] * len(one) for one in ids], length, 0),
            "labels": _right([row["labels"] for row in rows], length, IGNORED),
        }


@dataclass(frozen=True, slots=True)
class PackedCollator:
    """Pads packed rows; keeps documents apart by positions alone.

    Gives input_ids, labels and position_ids, each (rows, longest) int64, or
    (1, total) when flattened, and `use_cache=False`: with a cache, transformers
    would let documents see each other. No attention mask, for the same reason.
    Padding is a document of its own at the end of a row.

    Example:
        >>> row = {"input_ids": [5, 6, 7], "labels": [-100, 6, -100], "position_ids": [0, 1, 0]}
        >>> PackedCollator(0, pad_to_multiple_of=4)([row])["position_ids"].tolist()
        [[0, 1, 0, 0]]
    """

    pad_token_id: int
    """Any valid id; its labels are -100."""
    pad_to_multiple_of: int = 1
    """The length of a batch is rounded up to a multiple of this."""
    flatten: bool = False
    """Put all rows into one, for FlashAttention."""

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """Pad rows; see the class."""
        if self.flatten:
            rows = [{key: [v for row in rows for v in row[key]] for key in rows[0]}]
        longest = max(len(row["input_ids"]) for row in rows)
        length = _round_up(longest, self.pad_to_multiple_of)
        positions = [
            [*row["position_ids"], *range(length - len(row["position_ids"]))] for row in rows
        ]
        return {
            "input_ids": _right([row["input_ids"] for row in rows], length, self.pad_token_id),
            "labels": _right([row["labels"] for row in rows], length, IGNORED),
            "position_ids": torch.tensor(positions),
            "use_cache": False,
        }


@dataclass(frozen=True, slots=True)
class ClassificationCollator:
    """Pads texts on the right; labels are one class each.

    Gives input_ids and attention_mask (rows, longest) and labels (rows,), int64.

    Example:
        >>> batch = ClassificationCollator(0)([{"input_ids": [5, 6], "labels": 1}])
        >>> batch["labels"].tolist()
        [1]
    """

    pad_token_id: int
    """Any valid id; it is masked."""
    pad_to_multiple_of: int = 1
    """The length of a batch is rounded up to a multiple of this."""

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """Pad rows; see the class."""
        ids = [row["input_ids"] for row in rows]
        length = _round_up(max(map(len, ids)), self.pad_to_multiple_of)
        return {
            "input_ids": _right(ids, length, self.pad_token_id),
            "attention_mask": _right([[1] * len(one) for one in ids], length, 0),
            "labels": torch.tensor([row["labels"] for row in rows]),
        }


class MixedCollator:
    """Collates packed training rows and plain held-out rows, each in their own way.

    Example:
        >>> collator = MixedCollator(lambda rows: {"n": 1}, lambda rows: {"n": 2})
        >>> collator([{"input_ids": [1], "position_ids": [0]}]), collator([{"input_ids": [1]}])
        ({'n': 1}, {'n': 2})
    """

    def __init__(self, packed: Collator, plain: Collator) -> None:
        """Take both.

        Args:
            packed: for rows with `position_ids`.
            plain: for the others.
        """
        self.packed = packed
        self.plain = plain

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """Collate a batch; see the class."""
        return (self.packed if "position_ids" in rows[0] else self.plain)(rows)


def collate_prompts(prompts: Sequence[Sequence[int]], pad_token_id: int) -> dict[str, Tensor]:
    """Pad prompts on the left, for `generate` and for reading the next token.

    Args:
        prompts: token lists, none empty.
        pad_token_id: any valid id; it is masked.

    Returns:
        input_ids and attention_mask, (prompts, longest) int64.

    Example:
        >>> collate_prompts([[5, 6], [7]], 0)["input_ids"].tolist()
        [[5, 6], [0, 7]]
    """
    length = max(map(len, prompts))
    ids = [[pad_token_id] * (length - len(one)) + list(one) for one in prompts]
    mask = [[0] * (length - len(one)) + [1] * len(one) for one in prompts]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def padding_share(lengths: Sequence[int], batch_size: int, *, grouped: bool) -> float:
    """Share of padding in batches of these rows.

    Args:
        lengths: tokens per row.
        batch_size: rows per batch.
        grouped: rows of similar length together; otherwise in the order given.

    Returns:
        0 (no padding) up to nearly 1.

    Example:
        >>> lengths = [1, 4, 1, 4]
        >>> padding_share(lengths, 2, grouped=False), padding_share(lengths, 2, grouped=True)
        (0.375, 0.0)
    """
    order = sorted(lengths) if grouped else list(lengths)
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    held = sum(max(batch) * len(batch) for batch in batches)
    return 1 - sum(order) / held if held else 0.0


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _right(rows: Sequence[Sequence[int]], length: int, fill: int) -> Tensor:
    return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows])
