"""Linears that read the same input, as one product: q, k and v; gate and up.

With X (M, K) the shared input, the N rows of all weights one below the other, and the
adapters' A and B of all of them, R ranks together:

    forward    Y  = [X | X·Aᵀ] · [W | B]ᵀ       B block-diagonal, (N, R); A holds the scale
    backward   dX = [dY | dY·B] · [W; A]
               dA = s·(dY·B)ᵀ·X,  dB = dYᵀ·(X·Aᵀ), part by part

LoRA is R more steps of the one product: one pass over Y, one over dX, and one rounding.
Where a method has a factor f on every row (DoRA), f ⊙ [W | B] takes the place of [W | B]: W's
scales are stretched before they decode W's rows, B's rows by `Operands`. Then dB is
f ⊙ dYᵀ·(X·Aᵀ).
For that, inputs and gradients live in buffers with R spare columns at the right, which
their producers (norms, activations) write into directly.

The weights are decoded into memory that the call gives back at its end, so that all layers
share it: [W | B; A | .], (N + R, K + R) in the compute dtype, of which the forward reads the
first N rows and the backward the first K columns. So one decoding can serve both, and all
tiles (`decoded`), and where memory is plenty, all steps (`keep`). Adapters' masters are rounded
to that dtype once per forward pass of the model (`Operands`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.adapters.lora.layer import FusibleLinear
from qlora_kit.block.row_factors import RowFactors
from qlora_kit.block.sums import Sums
from qlora_kit.nn.linear import NF4Linear
from qlora_kit.ops.low_rank_gradients.op import low_rank_gradients
from qlora_kit.ops.nf4_dequantize.op import nf4_dequantize_into
from qlora_kit.ops.nf4_linear.op import nf4_linear
from qlora_kit.ops.nf4_scales.op import stretched_weight

_RANKS = 8
"""Ranks are padded to a multiple of this: 16-byte rows in 16-bit dtypes."""


@dataclass(frozen=True, slots=True)
class Part:
    """One linear of a group, with the adapter on it if there is one."""

    module: nn.Module
    """What stands in the model: the linear itself or its `FusibleLinear`."""
    rows: slice
    """Its rows of the group's weight."""
    ranks: slice
    """Its columns of the group's low-rank factors."""

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return _shape(self.module)

    @property
    def lora(self) -> FusibleLinear | None:
        """The adapter, if there was one with ranks, switched on, when the group was laid out."""
        has_ranks = self.ranks.stop > self.ranks.start
        return self.module if isinstance(self.module, FusibleLinear) and has_ranks else None

    @property
    def base(self) -> nn.Module:
        """The frozen linear."""
        return self.module.base if isinstance(self.module, FusibleLinear) else self.module

    @property
    def lengths(self) -> tuple[Tensor, Tensor] | None:
        """Of its rows: trained ones and the base's squared, (N,) each; see `FusibleLinear`."""
        return None if self.lora is None else self.lora.lengths

    def multiply(self, x: Tensor) -> Tensor:
        """A few rows x (rows, K) times the base's weight, (rows, N) without bias."""
        if isinstance(self.base, NF4Linear):
            return nf4_linear(x, self.base.nf4_weight)
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return nn.functional.linear(x, weight.to(x.dtype))

    def decode_into(
        self, out: Tensor, columns: Tensor | None = None, factors: Tensor | None = None
    ) -> None:
        """Write the weight, and columns to its right, in the dtype of `out`.

        Args:
            out: (n, K + R) contiguous.
            columns: (n, R) or None.
            factors: (n, 1) float32 on the weight's rows, or None.
        """
        if isinstance(self.base, NF4Linear):
            packed = self.base.nf4_weight
            if factors is not None:
                packed = stretched_weight(packed, factors)
            nf4_dequantize_into(packed, out, columns)
            return
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        if factors is None:
            out[:, : weight.shape[1]] = weight
        else:
            torch.mul(weight, factors, out=out[:, : weight.shape[1]])
        if columns is not None:
            out[:, weight.shape[1] :] = columns


def can_group(module: nn.Module) -> bool:
    """Whether a module is a linear, frozen and possibly adapted, that a group can hold.

    Args:
        module: any.

    Returns:
        False for other modules, a trained base, or dropout before A. Of an adapter that is off
        the group holds the base alone.

    Example:
        >>> can_group(nn.Linear(2, 2).requires_grad_(False)), can_group(nn.Linear(2, 2))
        (True, False)
    """
    base = module
    if isinstance(module, FusibleLinear):
        if module.enabled and module.dropout and module.training:
            return False
        base = module.base
    if not isinstance(base, NF4Linear | nn.Linear):
        return False
    return not any(parameter.requires_grad for parameter in base.parameters())


class Group:
    """Linears that share their input; see the module's text.

    Attributes:
        n: output features together.
        k: input features.
        r: low-rank columns together, a multiple of 8; 0 without adapters.
        a: (r, k), the parts' scaled A; set by `Operands`.
        b: (n, r), the parts' B, block-diagonal; set by `Operands`.
        rows: factors f of the rows, set by `Operands`; None where every f is 1.
        held: (n + r, k + r) decoded already, or None.
        kept: whether `held` stays from step to step.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        """Lay out the group.

        Args:
            modules: linears, in the order of their outputs; each as `can_group` wants it.
        """
        self.parts: list[Part] = []
        n = r = 0
        for module in modules:
            height, self.k = _shape(module)
            rank = module.columns if isinstance(module, FusibleLinear) and module.enabled else 0
            wide = -(-rank // _RANKS) * _RANKS
            self.parts.append(Part(module, slice(n, n + height), slice(r, r + wide)))
            n, r = n + height, r + wide
        self.n, self.r = n, r
        self.a = self.b = torch.empty(0)
        self.rows: RowFactors | None = None
        self.held: Tensor | None = None
        self.kept = False

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Masters of every adapted part, in order: what `gradients` answers for."""
        return [p for part in self.parts if part.lora for p in part.lora.masters]

    @property
    def needs_input(self) -> bool:
        """Whether the gradients need X: not without adapters, nor with every A frozen."""
        return any(part.lora.needs_gradient_of_a for part in self.parts if part.lora)

    @property
    def needs_small(self) -> bool:
        """Whether the gradients need X·Aᵀ."""
        return any(part.lora.needs_gradient_of_b for part in self.parts if part.lora)

    @property
    def stretched(self) -> bool:
        """Whether rows have a factor."""
        return any(part.lengths is not None for part in self.parts)

    @property
    def needs_output(self) -> bool:
        """Whether the gradients need Y, its bias aside."""
        return any(part.lora.needs_output for part in self.parts if part.lora)

    def input_buffer(self, rows: int, like: Tensor) -> Tensor:
        """Memory for X with room for X·Aᵀ: (rows, k + r), not initialised."""
        return like.new_empty((rows, self.k + self.r))

    def gradient_buffer(self, rows: int, like: Tensor) -> Tensor:
        """Memory for dY with room for dY·B: (rows, n + r), not initialised."""
        return like.new_empty((rows, self.n + self.r))

    def forward(
        self,
        wide: Tensor,
        residual: Tensor | None = None,
        *,
        spare: bool = False,
        out: Tensor | None = None,
        biased: bool = True,
    ) -> Tensor:
        """Multiply.

        Args:
            wide: (M, k + r) with X in its first k columns; X·Aᵀ is written to the others.
            residual: (M, n) added to the result, or None.
            spare: leave room for dY·B beside the result, so that dY can be written over it.
            out: (M, n) with any distance between rows, written; may be the residual itself.
                New memory if None.
            biased: False leaves the biases out.

        Returns:
            (M, n) in the dtype of X.
        """
        self.fill_small(wide)
        held = self._decode(wide, self.n) if self.held is None else self.held
        weight = held[: self.n]
        if out is None:
            out = wide.new_empty((wide.shape[0], self.n + (self.r if spare else 0)))[:, : self.n]
        bias = self.bias(wide) if biased else None
        if residual is not None:
            torch.addmm(residual, wide, weight.T, out=out)
            return out if bias is None else out.add_(bias)
        if bias is not None:
            return torch.addmm(bias, wide, weight.T, out=out)
        return torch.mm(wide, weight.T, out=out)

    def fill_small(self, wide: Tensor) -> None:
        """Write X·Aᵀ beside X.

        Args:
            wide: (M, k + r) with X in its first k columns.
        """
        if self.r:
            torch.mm(wide[:, : self.k], self.a.T, out=wide[:, self.k :])

    def small(self, wide: Tensor) -> Tensor | None:
        """X·Aᵀ, (M, r), of a buffer that `forward` has seen; None where no gradient needs it."""
        return wide[:, self.k :] if self.r and self.needs_small else None

    def input_gradient(
        self, wide: Tensor, small: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Gradient in X, and in every B on the way.

        Args:
            wide: (M, n + r) with dY in its first n columns; dY·B is written to the others.
            small: (M, r) X·Aᵀ, or None where `needs_small` is False.

        Returns:
            dx: (M, k).
            d_b: what `small_products` returned.
        """
        d_b = self.small_products(wide, small)
        return self.input_columns(wide, slice(0, self.k)), d_b

    def input_columns(self, wide: Tensor, columns: slice) -> Tensor:
        """Some columns of the gradient in X.

        Args:
            wide: (M, n + r), dY with dY·B beside it.
            columns: of X.

        Returns:
            (M, columns) contiguous.
        """
        held = self._decode(wide, self.n + self.r) if self.held is None else self.held
        return wide @ held[:, : self.k][:, columns]

    @contextmanager
    def decoded(self, like: Tensor, wanted: bool = True) -> Iterator[None]:
        """Decode once for the products of a block, forward and backward.

        Args:
            like: of the dtype to decode to.
            wanted: False changes nothing, for a block of one product.

        Yields:
            Nothing.
        """
        mine = wanted and self.held is None
        if mine:
            self.held = self._decode(like, self.n + self.r)
        try:
            yield
        finally:
            if mine:
                self.held = None

    def keep(self, like: Tensor) -> None:
        """Decode once and for all; `Operands` puts A and B beside the weight from then on.

        Rows that have a factor, another one in every step, are not kept.

        Args:
            like: of the dtype to decode to.
        """
        if self.stretched:
            return
        self.held, self.kept = like.new_zeros((self.n + self.r, self.k + self.r)), True
        for part in self.parts:
            columns = self.held.new_zeros((part.shape[0], self.r)) if self.r else None
            part.decode_into(self.held[part.rows], columns)

    def forget(self) -> None:
        """Undo `keep`, and let go of the memory that A and B shared with the weight."""
        self.held, self.kept, self.rows = None, False, None
        self.a = self.b = torch.empty(0)

    def _decode(self, like: Tensor, rows: int) -> Tensor:
        """The first rows, n or all n + r, of [W | B; A | .]."""
        whole = like.new_empty((rows, self.k + self.r))
        for part in self.parts:
            columns = self.b[part.rows] if self.r else None
            factors = None if self.rows is None else self.rows.factor[part.rows]
            part.decode_into(whole[part.rows], columns, factors)
        if rows > self.n:
            whole[self.n :, : self.k] = self.a
        return whole

    def small_products(self, wide: Tensor, small: Tensor | None) -> Tensor | None:
        """Write dY·B beside dY; and the gradient of every B, where one pass over dY has both.

        Args:
            wide: (M, n + r) with dY in its first n columns; dY·B is written to the others.
            small: (M, r) X·Aᵀ, or None where `needs_small` is False.

        Returns:
            (n, most ranks of a part) float32 for `Sums`; None where there is no B to train, or
            it is cheaper there.
        """
        if not self.r:
            return None
        dy, out = wide[:, : self.n], wide[:, self.n :]
        if small is None or not self.b.is_contiguous():
            torch.mm(dy, self.b, out=out)
            return None
        return low_rank_gradients(dy, self.b, small, parts=self._ends, out=out)[1]

    def gradients(
        self,
        wide: Tensor,
        x: Tensor | None,
        small: Tensor | None,
        d_b: Tensor | None = None,
        *,
        filled: bool = True,
    ) -> list[Tensor | None]:
        """Gradients of the adapters.

        Args:
            wide: (M, n + r), dY.
            x: (M, k), or None where `needs_input` is False.
            small: (M, r) X·Aᵀ, or None where `needs_small` is False.
            d_b: what `small_products` returned, or None.
            filled: whether `small_products` or `input_gradient` has written dY·B already.

        Returns:
            As `parameters`, in the masters' dtypes; None for a frozen one.
        """
        if not filled:
            d_b = self.small_products(wide, small)
        sums = Sums(self)
        sums.add(wide, x, small, d_b)
        return sums.gradients()

    @property
    def _ends(self) -> list[tuple[int, int]]:
        """Where each part's outputs and ranks end."""
        return [(part.rows.stop, part.ranks.stop) for part in self.parts]

    def bias(self, like: Tensor) -> Tensor | None:
        """The parts' biases one after the other, (n,), or None if none has one."""
        biases: list[Any] = [part.base.bias for part in self.parts]
        if all(bias is None for bias in biases):
            return None
        sizes = [part.rows.stop - part.rows.start for part in self.parts]
        whole = [
            like.new_zeros(size) if bias is None else bias.to(like.dtype)
            for bias, size in zip(biases, sizes, strict=True)
        ]
        return whole[0] if len(whole) == 1 else torch.cat(whole)


def _shape(module: nn.Module) -> tuple[int, int]:
    """(N, K) of a linear or of an adapted one."""
    assert isinstance(module, FusibleLinear | NF4Linear | nn.Linear)
    return module.out_features, module.in_features
