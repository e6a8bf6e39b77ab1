"""`column_products`: the sum over rows of a ⊙ b, column by column.

What the gradient of a row's trained length needs (DoRA), with a the output's gradient and b the
output: reading both once is what it costs. Products and sums are float32.

The op is not differentiable by itself: a hand-written backward calls it.
"""

import torch
from torch import Tensor

from qlora_kit.ops import jit
from qlora_kit.ops.backend import Backend, register_backend, resolve
from qlora_kit.ops.column_products import cuda, reference
from qlora_kit.ops.layout import arithmetic_dtype, check_like, check_rows, check_unrecorded

OP = "column_products"

register_backend(OP, Backend("reference", reference, lambda tensor: True, lambda: True))
register_backend(OP, Backend("cuda", cuda, cuda.serves, jit.is_available))


def column_products(a: Tensor, b: Tensor) -> Tensor:
    """Multiply two matrices value by value, and add up their rows.

    Args:
        a: (M, N), float32, bfloat16 or float16, any distance between rows.
        b: (M, N) likewise, in the dtype of a.

    Returns:
        (N,) float32 (float64 for float64); the same bits every time.

    Raises:
        UserError: autograd records, and an input requires a gradient.
        ShapeError: shapes, dtypes, devices or strides do not fit.
        BackendError: a forced backend cannot serve the call.

    Example:
        >>> column_products(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.ones(2, 2)).tolist()
        [4.0, 6.0]
    """
    check_unrecorded(OP, a, b)
    check_rows(OP, "a", a, (2,))
    check_like(OP, "b", b, a, a.shape)
    found: Tensor = torch.ops.qlora_kit.column_products.default(a, b)
    return found


_LIBRARY = torch.library.Library("qlora_kit", "FRAGMENT")
_LIBRARY.define("column_products(Tensor a, Tensor b) -> Tensor")


def _products(a: Tensor, b: Tensor) -> Tensor:
    found: Tensor = resolve(OP, a).column_products(a, b)
    return found


# By hand, as docs/decisions/0005 says.
_LIBRARY.impl("column_products", _products, "CompositeExplicitAutograd")


@torch.library.register_fake("qlora_kit::column_products")
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[1], dtype=arithmetic_dtype(a))
