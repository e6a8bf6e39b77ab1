"""`low_rank_gradients`: the two products of LoRA's backward that read the output's gradient.

    dYB = dY·B      (M, R), for the input's gradient and for dA
    dB  = dYᵀ·XA    (N, R) in float32

Each needs few operations per value of dY, so that reading it is what they cost: twice
with two products, once here. Both sums run in float32, and dYB is rounded once.

Linears that read the same input share one dY, their columns side by side: B is then
block-diagonal, and of dB only the blocks are computed. dYB may be written into the
columns beside dY, where the next product wants it.

The op is not differentiable by itself: a hand-written backward calls it.
Source of LoRA: arXiv:2106.09685.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from qlora_kit.core.errors import ShapeError
from qlora_kit.ops import jit
from qlora_kit.ops.backend import Backend, register_backend, resolve
from qlora_kit.ops.layout import arithmetic_dtype, check_like, check_rows, check_unrecorded
from qlora_kit.ops.low_rank_gradients import cuda, reference

OP = "low_rank_gradients"

register_backend(OP, Backend("reference", reference, lambda tensor: True, lambda: True))
register_backend(OP, Backend("cuda", cuda, cuda.serves, jit.is_available))


def low_rank_gradients(
    dy: Tensor,
    b: Tensor,
    xa: Tensor,
    *,
    parts: Sequence[tuple[int, int]] | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Multiply the gradient of linears' outputs with B and, over its rows, with X·Aᵀ.

    Args:
        dy: (M, N), float32, bfloat16 or float16, any distance between rows.
        b: (N, R) in the dtype of dy, contiguous.
        xa: (M, R) in the dtype of dy, any distance between rows.
        parts: per linear where its columns of dy and its ranks end; the last at (N, R). B is
            zero where a row and a rank belong to different parts. None for one part.
        out: (M, R) in the dtype of dy, written, any distance between rows; may lie between
            the rows of dy. A new contiguous tensor if None.

    Returns:
        dyb: `out`, dY·B.
        d_b: (N, r) float32 (float64 for float64), r the most ranks of a part: in a part's rows
            its own ranks, from the first column on; zeros beyond them.

    Raises:
        UserError: autograd records, and an input requires a gradient.
        ShapeError: shapes, dtypes, devices, strides or parts do not fit.
        BackendError: a forced backend cannot serve the call.

    Example:
        >>> dy = torch.tensor([[1.0, 2.0, 3.0]])  # two columns of one linear, one of another
        >>> b = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> xa = torch.tensor([[10.0, 100.0]])
        >>> dyb, d_b = low_rank_gradients(dy, b, xa, parts=[(2, 1), (3, 2)])
        >>> dyb.tolist(), d_b.tolist()
        ([[3.0, 3.0]], [[10.0], [20.0], [300.0]])
    """
    check_unrecorded(OP, dy, b, xa, out)
    check_rows(OP, "dy", dy, (2,))
    (m, n), r = dy.shape, b.shape[-1]
    check_like(OP, "b", b, dy, (n, r))
    if not b.is_contiguous():
        raise ShapeError(f"{OP} needs b contiguous, got strides {b.stride()} for {tuple(b.shape)}.")
    check_like(OP, "xa", xa, dy, (m, r))
    columns, ranks = _ends(parts, n, r)
    if out is None:
        out = dy.new_empty((m, r))
    else:
        check_like(OP, "out", out, dy, (m, r))
    d_b = torch.ops.qlora_kit.low_rank_gradients.default(dy, b, xa, columns, ranks, out)
    return out, d_b


def _ends(parts: Sequence[tuple[int, int]] | None, n: int, r: int) -> tuple[list[int], list[int]]:
    """Where columns and ranks of the parts end."""
    if parts is None:
        return [n], [r]
    columns, ranks = [end for end, _ in parts], [end for _, end in parts]
    rising = all(end > start for start, end in pairwise([0, *columns]))
    steady = all(end >= start for start, end in pairwise([0, *ranks]))
    if not (parts and rising and steady and (columns[-1], ranks[-1]) == (n, r)):
        raise ShapeError(
            f"{OP} needs parts that end one after the other, the last at {(n, r)}: columns rising, "
            f"ranks not falling. Got {list(parts)}."
        )
    return columns, ranks


_LIBRARY = torch.library.Library("qlora_kit", "FRAGMENT")
_LIBRARY.define(
    "low_rank_gradients(Tensor dy, Tensor b, Tensor xa, int[] column_ends, int[] rank_ends, "
    "Tensor(a!) out) -> Tensor"
)


def _gradients(
    dy: Tensor, b: Tensor, xa: Tensor, column_ends: list[int], rank_ends: list[int], out: Tensor
) -> Tensor:
    found: Tensor = resolve(OP, dy).gradients(dy, b, xa, column_ends, rank_ends, out)
    return found


# By hand, as docs/decisions/0005 says.
_LIBRARY.impl("low_rank_gradients", _gradients, "CompositeExplicitAutograd")


@torch.library.register_fake("qlora_kit::low_rank_gradients")
def _(
    dy: Tensor, b: Tensor, xa: Tensor, column_ends: list[int], rank_ends: list[int], out: Tensor
) -> Tensor:
    shape = (dy.shape[1], reference.widest(rank_ends))
    return dy.new_empty(shape, dtype=arithmetic_dtype(dy))
