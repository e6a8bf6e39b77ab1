"""Gradients of a group's adapters, added up over tiles in float32.

With X (M, K) the input of a group of linears, dY its output's gradient and s an adapter's
scale:

    dA = s·(dY·B)ᵀ·X        dB = dYᵀ·(X·Aᵀ)

What they mean to the masters of a method like LoRA, its pieces say (`FusibleLinear.pull_back`).
Both are sums over tokens. Those of T tiles, each taken in float32 and added in float32, differ
from the sum at once by no more than T units of rounding of the sum of magnitudes.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qlora_kit.ops.column_products.op import column_products
from qlora_kit.ops.low_rank_gradients.reference import token_sum

if TYPE_CHECKING:
    from qlora_kit.block.projection import Group


class Sums:
    """Gradients of the adapters of one group.

    Attributes:
        group: whose parts have the adapters.
    """

    def __init__(self, group: "Group") -> None:
        """Start at zero.

        Args:
            group: of linears.
        """
        self.group = group
        self._a: Tensor | None = None
        self._joint: Tensor | None = None
        self._b: list[Tensor | None] = [None] * len(group.parts)
        self._overlap: Tensor | None = None

    def add(self, wide: Tensor, x: Tensor | None, small: Tensor | None, d_b: Tensor | None) -> None:
        """Add a tile.

        Args:
            wide: (m, n + r), dY with dY·B beside it.
            x: (m, k), or None where the group's `needs_input` is False.
            small: (m, r) X·Aᵀ, or None where `needs_small` is False.
            d_b: what the group's `small_products` returned, or None.
        """
        self.add_b(wide, small, d_b)
        if self.group.needs_input:
            assert x is not None
            self.add_a(wide, [x])

    def add_a(self, wide: Tensor, x: list[Tensor]) -> None:
        """Add a tile's share of every dA.

        Args:
            wide: (m, n + r), dY with dY·B beside it.
            x: the input, (m, k), in pieces of its columns.
        """
        dyb = wide[:, self.group.n : self.group.n + self.group.r]
        found = [token_sum(dyb, piece) for piece in x]
        self._a = _plus(self._a, found[0] if len(found) == 1 else torch.cat(found, dim=1))

    def add_b(self, wide: Tensor, small: Tensor | None, d_b: Tensor | None) -> None:
        """Add a tile's share of every dB.

        Args:
            wide: (m, n + r), dY in its first columns.
            small: (m, r) X·Aᵀ, or None where `needs_small` is False.
            d_b: what the group's `small_products` returned, or None.
        """
        if d_b is not None:
            self._joint = _plus(self._joint, d_b)
            return
        for index, part in enumerate(self.group.parts):
            if part.lora is None or not part.lora.needs_gradient_of_b:
                continue
            assert small is not None
            first = part.ranks.start
            found = token_sum(wide[:, part.rows], small[:, first : first + part.lora.columns])
            self._b[index] = _plus(self._b[index], found)

    def add_output(self, wide: Tensor, y: Tensor | None) -> None:
        """Add a tile's share of the sum of dY ⊙ Y, which lengths of rows (DoRA) need.

        Args:
            wide: (m, n + r), dY in its first columns.
            y: (m, n), the group's output, biases aside; None where `needs_output` is False.
        """
        if not self.group.needs_output:
            return
        assert y is not None
        found = column_products(wide[:, : self.group.n], y)
        self._overlap = _plus(self._overlap, found)

    def gradients(self) -> list[Tensor | None]:
        """The sums, as the group's `parameters`.

        Returns:
            As the adapted parts' `masters`, in their dtypes; None for a frozen one.
        """
        found: list[Tensor | None] = []
        rows, of_rows = self.group.rows, self._overlap
        if rows is not None and of_rows is not None:
            of_rows = of_rows * rows.per_length
        for part, own in zip(self.group.parts, self._b, strict=True):
            lora = part.lora
            if lora is None:
                continue
            d_a = d_b = None
            if lora.needs_gradient_of_a:
                assert self._a is not None
                d_a = self._a[part.ranks.start : part.ranks.start + lora.columns]
            if lora.needs_gradient_of_b:
                d_b = own if self._joint is None else self._joint[part.rows, : lora.columns]
                assert d_b is not None
                if rows is not None:
                    d_b = d_b * rows.factor[part.rows]
            d_lengths = None if of_rows is None else of_rows[part.rows]
            found += lora.pull_back(d_a, d_b, d_lengths)
        return found


def _plus(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total.add_(more)
