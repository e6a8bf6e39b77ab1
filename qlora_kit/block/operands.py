"""A and B of every projection group of a model in the compute dtype.

Masters are rounded once per forward pass of the model, all of them in a few launches, into
memory that stays: beside the decoded weight where a group keeps it, else into matrices of
their own. Where memory is short (a tile was given as a number), each layer's are rounded for
its own forward and backward and let go again: 1.1 GiB less for a 70B model with rank 32.

What is rounded is s·A and, where the method has factors of A's rows (AdaLoRA's λ), their product.
Rounding at every pass, and not when a version counter has moved, sees every change: an
optimizer's kernels and edits through `.data` move no counter.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from qlora_kit.block.projection import Group
from qlora_kit.block.row_factors import stretch


class Operands:
    """A and B of every group of a model in the compute dtype, rounded once per forward pass.

    Example:
        >>> from torch import nn
        >>> from qlora_kit.adapters.lora.config import LoRA
        >>> from qlora_kit.adapters.lora.layer import LoRALinear
        >>> group = Group([LoRALinear(nn.Linear(8, 4), "proj", LoRA(rank=2), seed=0)])
        >>> operands = Operands([group])
        >>> operands.refresh(torch.float32)
        >>> group.a.shape, group.b.shape
        (torch.Size([8, 8]), torch.Size([4, 8]))
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        """Collect the groups that have adapters.

        Args:
            groups: of all layers.
        """
        self.groups = [group for group in groups if group.r]
        self._stretched = [group for group in self.groups if group.stretched]
        self._dtype: torch.dtype | None = None
        self._device: torch.device | None = None
        self._masters: list[tuple[Tensor, slice | None]] = []
        self._scales: list[float] = []
        self._row_factors: list[Tensor | None] = []
        self._copies: list[Tensor] = []

    def refresh(self, dtype: torch.dtype) -> None:
        """Round the masters as they are now.

        Args:
            dtype: of the products to come.
        """
        if not self.groups:
            return
        device = self.groups[0].parameters[0].device
        if (dtype, device) != (self._dtype, self._device):
            self._allocate(dtype, device)
        with torch.no_grad():
            torch._foreach_copy_(self._copies, self._scaled())
            stretch(self._stretched)

    def _scaled(self) -> list[Tensor]:
        """The masters, those that have factors in new memory and multiplied."""
        factors = zip(self._scales, self._row_factors, strict=True)
        changed = [i for i, (scale, rows) in enumerate(factors) if scale != 1.0 or rows is not None]
        found = [tensor if rows is None else tensor[rows] for tensor, rows in self._masters]
        if not changed:
            return found
        masters = [found[i] for i in changed]
        products = list(torch._foreach_mul(masters, [self._scales[i] for i in changed]))
        rows = [self._row_factors[i] for i in changed]
        if with_rows := [(p, r) for p, r in zip(products, rows, strict=True) if r is not None]:
            torch._foreach_mul_([p for p, _ in with_rows], [r for _, r in with_rows])
        new = dict(zip(changed, products, strict=True))
        return [new.get(i, master) for i, master in enumerate(found)]

    def forget(self) -> None:
        """Make room anew at the next `refresh`: a group has begun or ceased to be kept."""
        self._dtype, self._masters, self._row_factors, self._copies = None, [], [], []

    def release(self) -> None:
        """Give the memory back, but for what lies beside weights that stay decoded."""
        self.forget()
        for group in self.groups:
            if not group.kept:
                group.a = group.b = torch.empty(0)
                group.rows = None

    @contextmanager
    def lent(self, dtype: torch.dtype) -> Iterator[None]:
        """Round the masters for what runs inside.

        Args:
            dtype: of the products to come.

        Yields:
            Nothing.
        """
        self.refresh(dtype)
        try:
            yield
        finally:
            self.release()

    @property
    def are_there(self) -> bool:
        """Whether `refresh` has made room since `forget` or `release`."""
        return self._dtype is not None or not self.groups

    def _allocate(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._masters, self._scales, self._row_factors, self._copies = [], [], [], []
        for group in self.groups:
            if group.kept and group.held is not None:
                group.a, group.b = (
                    group.held[group.n :, : group.k],
                    group.held[: group.n, group.k :],
                )
            else:
                group.a = torch.zeros((group.r, group.k), dtype=dtype, device=device)
                group.b = torch.zeros((group.n, group.r), dtype=dtype, device=device)
            for part in group.parts:
                if part.lora is None:
                    continue
                first = part.ranks.start
                for term in part.lora.terms:
                    ranks = slice(first, first + term.rank)
                    first = ranks.stop
                    self._masters += [(term.a, term.rows_of_a), (term.b, term.rows_of_b)]
                    self._scales += [term.scale, 1.0]
                    self._row_factors += [term.row_factors, None]
                    b = group.b[part.rows, ranks]
                    b = b if term.outputs is None else b[term.outputs]
                    self._copies += [group.a[ranks], b]
