"""DoRA on one linear layer: the direction of every weight row and its length, trained apart.

    W' = m ⊙ V/‖V‖,  V = Ŵ + s·B·A        ‖·‖ of each row, one row per output; m (N,)
    y  = f ⊙ (x Ŵᵀ + s (x Aᵀ) Bᵀ) + bias,  f = m/‖V‖

m starts at ‖Ŵ‖, so that the adapted model starts as the base. ‖V‖ counts as a constant
in the gradient (section 4.3 of the paper): with u = x Vᵀ, dm = Σ_rows g ⊙ u / ‖V‖, and
A, B and x see the gradient g ⊙ f as in LoRA.

No decoded weight is kept, nor is V ever formed: a row's squared length is

    ‖V‖² = ‖Ŵ‖² + 2 s B·(Ŵ Aᵀ) + s² B (A Aᵀ) Bᵀ

whose first term, N float32 numbers, is computed once when the layer is wrapped (one
linear decoded at a time), whose second is the base applied to r rows, and whose third
is r × r. It is computed in every pass that trains, from A and B in the dtype of x, as
the product uses them; passes without gradients keep it until A or B change.

f lies near one, where neighbours in bfloat16 are 0.8% apart: rounded, it would be off by
as much as 0.4% for a whole row. So u is multiplied as u + u ⊙ (f - 1), one kernel, in
which f - 1 is what is rounded. At the start f - 1 is exactly zero.

Dropout acts on the input of A alone, as in LoRA (PEFT drops inputs of Ŵ in the change of
length as well; without dropout both are the same). m is kept in float32 whatever the
dtype of A and B. rsLoRA's scale and patterns apply. Merging needs the row lengths of the
weight that is merged into: W' = m ⊙ (W + s·B·A)/‖W + s·B·A‖ for either base. PEFT calls m
`lora_magnitude_vector`; adapters go both ways.

A layer that runs as one step multiplies by f ⊙ [Ŵ | B]: rows of the decoded weight and of B are
stretched, and the products are LoRA's. dB is then f ⊙ of what LoRA's would be, and since
y = f ⊙ u, dm = Σ_rows g ⊙ y / m: no u is kept beside y. A row of m = 0 gets no gradient there.

Defaults: LoRA's, rank 16 and alpha 32; m is float32.

Source: arXiv:2402.09353.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from qlora_kit.adapters.lora.config import LoRA
from qlora_kit.adapters.lora.layer import FusibleLinear
from qlora_kit.nn.linear import NF4Linear
from qlora_kit.ops.autocast import autocast_dtype
from qlora_kit.ops.layout import arithmetic_dtype
from qlora_kit.ops.nf4_linear.op import nf4_linear


def dense_weight(base: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """Give a linear's weight, decoded if need be.

    Args:
        base: an NF4Linear, nn.Linear or Conv1D.
        dtype: to decode to; None: the layer's own.

    Returns:
        (N, K); a view of the parameter where it is dense and `dtype` is None.

    Example:
        >>> dense_weight(Conv1D(nf=6, nx=4)).shape
        torch.Size([6, 4])
    """
    if isinstance(base, NF4Linear):
        return base.dequantize(dtype)
    weight = base.weight
    assert isinstance(weight, Tensor)
    matrix = weight.detach().T if isinstance(base, Conv1D) else weight.detach()
    return matrix if dtype is None else matrix.to(dtype)


def row_squares(base: nn.Module) -> Tensor:
    """Sum the squares of every row of a linear's weight, as the layer computes with it.

    Args:
        base: an NF4Linear, nn.Linear or Conv1D.

    Returns:
        (N,) float32 on its device; float64 for a weight in that.

    Example:
        >>> row_squares(nn.Linear(3, 2)).shape
        torch.Size([2])
    """
    weight = dense_weight(base)
    dtype = arithmetic_dtype(weight)
    return torch.linalg.vector_norm(weight, dim=1, dtype=dtype).square()


def row_lengths(squares: Tensor, a: Tensor, b: Tensor, cross: Tensor, s: float = 1.0) -> Tensor:
    """Compute ‖Ŵ + s·B·A‖ of every row; see the module's text.

    Args:
        squares: (..., N) ‖Ŵ‖².
        a: (..., r, K).
        b: (..., N, r).
        cross: (..., N, r) Ŵ·Aᵀ.
        s: the scale.

    Returns:
        (..., N) float32, or float64 where A is, not less than the root of the smallest number.

    Example:
        >>> w, a, b = torch.tensor([[3.0, 3.0]]), torch.tensor([[0.0, 1.0]]), torch.ones(1, 1)
        >>> row_lengths(w.square().sum(1), a, b, w @ a.T)
        tensor([5.])
    """
    dtype = arithmetic_dtype(a)
    a, b = a.to(dtype), b.to(dtype)
    added = b * (2.0 * s * cross.to(dtype) + s * s * (b @ (a @ a.mT)))
    found = squares.to(dtype) + added.sum(-1)
    return found.clamp_(min=torch.finfo(torch.float32).tiny).sqrt_()


class _Stretch(torch.autograd.Function):
    """u + u ⊙ change, rows of u (M, N) with change (N,) float32."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, change: Tensor) -> Tensor:
        rounded = change.to(u.dtype)
        ctx.save_for_backward(u, rounded)
        return torch.addcmul(u, u, rounded)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        u, rounded = ctx.saved_tensors
        return torch.addcmul(g, g, rounded), (g * u).sum(0, dtype=arithmetic_dtype(u))


class DoRALinear(FusibleLinear):
    """A linear whose weight rows have a trained direction and a trained length.

    Attributes:
        lora_magnitude: m, (N,) float32.
        base_squares: ‖Ŵ‖², (N,) float32, of the frozen base.

    Example:
        >>> linear = nn.Linear(8, 4)
        >>> adapted = DoRALinear(linear, "proj", LoRA(rank=2), seed=0)
        >>> sorted(adapted.trainable())
        ['lora_A', 'lora_B', 'lora_magnitude']
        >>> adapted(torch.ones(3, 8)).shape
        torch.Size([3, 4])
    """

    base_squares: Tensor

    def __init__(
        self,
        base: nn.Module,
        place: str,
        config: LoRA,
        *,
        seed: int,
        rank: int | None = None,
        scale: float | None = None,
    ) -> None:
        """Wrap one linear.

        Args:
            base: one of `linears.LINEARS`. Not modified; decoded once, for a moment.
            place: its dotted name in the model.
            config: rank, scale, dropout, start and dtype, by the patterns that match `place`.
            seed: the run's.
            rank: instead of the configuration's, for an adapter read from a file.
            scale: likewise.

        Raises:
            AdapterError: base is not a linear we know.
        """
        super().__init__(base, place, config, seed=seed, rank=rank, scale=scale)
        device = self.lora_A.device
        if device.type == "meta":
            squares = torch.empty(self.out_features, dtype=torch.float32, device=device)
        else:
            squares = row_squares(base)
        self.register_buffer("base_squares", squares, persistent=False)
        self.lora_magnitude = nn.Parameter(squares.sqrt())
        self._known: tuple[tuple[object, ...], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer with its rows turned and stretched; the base while switched off.

        Args:
            x: (..., K).

        Returns:
            (..., N) in the dtype the base answers with.
        """
        if not self.enabled:
            return self.base(x)
        if (dtype := autocast_dtype(x.device)) is not None:
            x = x.to(dtype)
        u = self._turned(x)
        lengths = self.row_lengths(x.dtype)
        change = self.lora_magnitude.to(lengths.dtype) / lengths - 1.0
        y: Tensor = _Stretch.apply(u.reshape(-1, self.out_features), change)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.view(u.shape)

    def _turned(self, x: Tensor) -> Tensor:
        """Compute x Vᵀ, without the bias."""
        if self.training and self.dropout > 0.0:
            y, branch = self._base_product(x), F.dropout(x, self.dropout)
        elif isinstance(self.base, NF4Linear):
            pair = self.lora_A, self.lora_B
            weight, s = self.base.nf4_weight, self.scale
            return nf4_linear(x, weight, lora_a=pair[0], lora_b=pair[1], scale=s)
        else:
            y, branch = self._base_product(x), x
        return self.add_product(y, F.linear(branch, self.lora_A.to(x.dtype)), self.lora_B)

    def _base_product(self, x: Tensor) -> Tensor:
        """Compute x Ŵᵀ, without the bias."""
        if isinstance(self.base, NF4Linear):
            return nf4_linear(x, self.base.nf4_weight)
        return F.linear(x, dense_weight(self.base).to(x.dtype))

    def row_lengths(self, dtype: torch.dtype) -> Tensor:
        """Compute ‖V‖ of every row; see the module's text.

        Args:
            dtype: that A, B and the base multiply in.

        Returns:
            (N,) float32, without gradient.
        """
        if self.training or torch.is_grad_enabled():
            # an optimizer may write through another view, and no version tells
            self._known = None
            return self._measure_rows(dtype)
        key = (dtype, *((p._version, p.data_ptr()) for p in (self.lora_A, self.lora_B)))
        if self._known is None or self._known[0] != key:
            self._known = key, self._measure_rows(dtype)
        return self._known[1]

    def _measure_rows(self, dtype: torch.dtype) -> Tensor:
        with torch.no_grad():
            a, b = self.lora_A.to(dtype), self.lora_B.to(dtype)
            cross = self._base_product(a).T
            return row_lengths(self.base_squares, a, b, cross, self.scale)

    @property
    def masters(self) -> list[nn.Parameter]:
        """A, B and m."""
        return [*super().masters, self.lora_magnitude]

    @property
    def lengths(self) -> tuple[Tensor, Tensor]:
        """Trained and squared base row lengths, m and ‖Ŵ‖², (N,) each."""
        return self.lora_magnitude.detach(), self.base_squares

    @property
    def needs_output(self) -> bool:
        """Whether m is trained."""
        return self.lora_magnitude.requires_grad

    def pull_back(
        self, d_a: Tensor | None, d_b: Tensor | None, d_lengths: Tensor | None = None
    ) -> list[Tensor | None]:
        """Turn gradients of s·A, B and m into those of the masters.

        Args:
            d_a: (r, K) float32, or None where it is not needed.
            d_b: (N, r) float32, likewise.
            d_lengths: (N,) float32, likewise.

        Returns:
            As `masters`, in their dtypes; None for what is frozen.
        """
        of_m = None if d_lengths is None else d_lengths.to(self.lora_magnitude.dtype)
        return [*super().pull_back(d_a, d_b), of_m if self.needs_output else None]

    def trainable(self) -> dict[str, nn.Parameter]:
        """A, B and m."""
        return super().trainable() | {"lora_magnitude": self.lora_magnitude}

    def state(self) -> dict[str, Tensor]:
        """A, B and m."""
        return super().state() | {"lora_magnitude": self.lora_magnitude}

    def merge_delta(self) -> Tensor:
        """Compute W' - Ŵ.

        Returns:
            (N, K) float32, on the device of A.
        """
        weight = dense_weight(self.base).float()
        turned = weight + super().merge_delta()
        lengths = torch.linalg.vector_norm(turned, dim=1, keepdim=True)
        lengths = lengths.clamp(min=torch.finfo(torch.float32).tiny ** 0.5)
        return turned.mul_(self.lora_magnitude.detach().float()[:, None] / lengths).sub_(weight)
