"""`low_rank_product`: LoRA's small product, s·X·F with F narrow.

    X·Aᵀ of a forward, F = Aᵀ        dY·B of a backward, F = B

It needs few operations per value of X: reading X is what it costs. The result may be
written into the columns beside X, where the next product wants it.

The op is not differentiable by itself: hand-written forwards and backwards call it.
`nf4_linear`, an op itself, calls its implementations.
Source of LoRA: arXiv:2106.09685.
"""

import torch
from torch import Tensor

from qlora_kit.core.errors import ShapeError
from qlora_kit.ops import jit
from qlora_kit.ops.backend import Backend, register_backend, resolve
from qlora_kit.ops.layout import check_like, check_rows, check_unrecorded
from qlora_kit.ops.low_rank_product import cuda, reference

OP = "low_rank_product"

register_backend(OP, Backend("reference", reference, lambda tensor: True, lambda: True))
register_backend(OP, Backend("cuda", cuda, cuda.serves, jit.is_available))


def low_rank_product(
    x: Tensor, factor: Tensor, *, scale: float = 1.0, out: Tensor | None = None
) -> Tensor:
    """Multiply many rows with a narrow matrix, and with a number.

    Args:
        x: (M, K), float32, float64, bfloat16 or float16, any distance between rows.
        factor: (K, r) in the dtype of x; a transposed view will do.
        scale: factor on the result, before it is rounded.
        out: (M, r) in the dtype of x, written, any distance between rows; may lie between the
            rows of x. A new contiguous tensor if None.

    Returns:
        `out`, scale·x·factor.

    Raises:
        UserError: autograd records, and an input requires a gradient.
        ShapeError: shapes, dtypes, devices or strides do not fit.
        BackendError: a forced backend cannot serve the call.

    Example:
        >>> x = torch.tensor([[1.0, 2.0]])
        >>> low_rank_product(x, torch.tensor([[1.0], [10.0]]), scale=0.5).tolist()
        [[10.5]]
    """
    check_unrecorded(OP, x, factor, out)
    check_rows(OP, "x", x, (2,))
    if factor.dim() != 2 or factor.shape[0] != x.shape[1]:
        raise ShapeError(
            f"{OP} needs a factor of shape ({x.shape[1]}, r) for x of shape {tuple(x.shape)}, got "
            f"{tuple(factor.shape)}."
        )
    stored = factor if factor.stride(1) == 1 else factor.T
    check_like(OP, "the factor or its transpose", stored, x, stored.shape)
    shape = (x.shape[0], factor.shape[1])
    if out is None:
        out = x.new_empty(shape)
    else:
        check_like(OP, "out", out, x, shape)
    torch.ops.qlora_kit.low_rank_product.default(x, factor, scale, out)
    return out


_LIBRARY = torch.library.Library("qlora_kit", "FRAGMENT")
_LIBRARY.define("low_rank_product(Tensor x, Tensor factor, float scale, Tensor(a!) out) -> ()")


def _product(x: Tensor, factor: Tensor, scale: float, out: Tensor) -> None:
    resolve(OP, x).product(x, factor, scale, out)


# By hand, as docs/decisions/0005 says.
_LIBRARY.impl("low_rank_product", _product, "CompositeExplicitAutograd")


@torch.library.register_fake("qlora_kit::low_rank_product")
def _(x: Tensor, factor: Tensor, scale: float, out: Tensor) -> None:
    return None
