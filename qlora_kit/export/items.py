"""The tensors an export writes, each with what is known of it and how its rows are made.

`plan.py` decides these records; `merge.py` and `quantized.py` write them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlora_kit.adapters.lora.low_rank import LowRank
from qlora_kit.checkpoint.source import Source
from qlora_kit.export.rows import InMemory, Merged, Rows, Stored
from qlora_kit.quant.config import QuantConfig


@dataclass(kw_only=True)
class Item:
    """One tensor of the output."""

    name: str
    """Key in the output."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    """Of the source; kept if `cast` is False."""
    param: str | None
    """Parameter of the model."""
    cast: bool = True
    """Whether the tensor is a float parameter, written in the dtype asked for."""
    decoded: bool = False
    """Whether its values are decoded NF4."""
    step: int = 1
    """Chunks start at multiples of so many rows."""
    pair: LowRank | None = None
    """The change to add."""
    change: Callable[[Rows], Rows] | None = None
    """What makes the result of the base's rows, where it is more than adding a pair."""
    transposed: bool = False
    """Whether it is stored as (in, out)."""
    value: Tensor | None = None
    """What the adapter replaced it by."""
    stored: str | None = None
    """Key in the source; None for a new head."""
    part: int = 0
    """Place in a stacked parameter."""
    open_rows: Callable[[], Rows]
    """Opens the base's rows; called once, when the item's turn comes."""
    raw: Callable[[], Tensor]
    """Reads the whole tensor as stored."""

    @property
    def changed(self) -> bool:
        """Whether the adapter has a say in it."""
        return any(given is not None for given in (self.pair, self.value, self.change))

    def rows(self) -> Rows:
        """Rows of the result, float32."""
        if self.value is not None:
            return InMemory(self.value)
        rows = self.open_rows()
        if self.change is not None:
            return self.change(rows)
        if self.pair is None:
            return rows
        return Merged(rows, self.pair, self.transposed)


@dataclass(kw_only=True)
class MergePlan:
    """Every tensor of the output and what is known about the whole."""

    source: Source
    model: PreTrainedModel
    """On the meta device."""
    items: list[Item]
    """In the order of the checkpoint."""
    device: torch.device
    """Where to compute."""
    compute: torch.dtype | None
    """Dtype training computed in; None if unknown."""
    quant: QuantConfig | None
    """How training had quantized the base; None if not."""
    num_labels: int | None = None
    """Classes, for a classifier."""
    notes: list[str] = field(default_factory=list)

    @cached_property
    def params(self) -> set[str]:
        """Names of the model's parameters, shared ones under each name."""
        return {name for name, _ in self.model.named_parameters(remove_duplicate=False)}

    def stored_rows(self, name: str, seen_as: torch.dtype | None = None) -> Rows:
        """Rows of a float tensor of the source; as stored, or rounded to a dtype."""
        return Stored(self.source, name, self.device, seen_as)

    def in_stack_order(self) -> Iterator[Item]:
        """Items with the members of a stacked parameter next to one another."""
        done: set[str] = set()
        members: dict[str | None, list[Item]] = {}
        for item in self.items:
            members.setdefault(item.param, []).append(item)
        for item in self.items:
            if item.param is None:
                yield item
            elif item.param not in done:
                done.add(item.param)
                yield from sorted(members[item.param], key=lambda item: item.part)
