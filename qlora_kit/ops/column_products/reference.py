"""`column_products` in plain torch."""

from torch import Tensor

from qlora_kit.ops.layout import arithmetic_dtype

_VALUES = 1 << 24
"""Products that exist at a time: 64 MiB in float32."""


def column_products(a: Tensor, b: Tensor) -> Tensor:
    """Multiply value by value, and add up rows; see `op.column_products`.

    Args:
        a: (M, N).
        b: (M, N).

    Returns:
        (N,) float32; float64 for float64.

    Example:
        >>> import torch
        >>> column_products(torch.ones(3, 2), torch.ones(3, 2)).tolist()
        [3.0, 3.0]
    """
    (rows, n), dtype = a.shape, arithmetic_dtype(a)
    step = max(1, _VALUES // max(1, n))
    total = a.new_zeros(n, dtype=dtype)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        total += (a[part].to(dtype) * b[part].to(dtype)).sum(0)
    return total
