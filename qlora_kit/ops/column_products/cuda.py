"""`column_products` as one launch that reads each value once, and a small sum.

A block takes 512 bytes of columns and a strip of rows; strips are added up by torch, in a fixed
order, so that results are the same bits every time. What is not in whole 16-byte pieces goes to
plain torch.
"""

import torch
from torch import Tensor

from qlora_kit.ops.column_products import reference
from qlora_kit.ops.launch import Kernels
from qlora_kit.ops.layout import PIECE_BYTES, in_pieces
from qlora_kit.ops.nf4_dequantize import cuda as nf4_dequantize
from qlora_kit.ops.nf4_dequantize.cuda import resident_blocks

_KERNELS = {
    torch.bfloat16: ("column_products_bfloat16", Kernels("column_products/bfloat16.cu")),
    torch.float16: ("column_products_float16", Kernels("column_products/float16.cu")),
    torch.float32: ("column_products_float32", Kernels("column_products/float32.cu")),
}
_THREADS = 256
_PIECES = 32
"""Of a row, per block."""
_LEAST_ROWS = 64
"""Of a strip."""


def serves(tensor: Tensor) -> bool:
    """Tell whether a call on this tensor can run here: three dtypes, any GPU from Ampere on."""
    return tensor.dtype in _KERNELS and nf4_dequantize.serves(tensor)


def column_products(a: Tensor, b: Tensor) -> Tensor:  # needs a GPU
    """Multiply value by value, and add up rows; see `reference.column_products`.

    Args:
        a: (M, N), on a CUDA device.
        b: (M, N).

    Returns:
        (N,) float32.
    """
    rows, n = a.shape
    if not a.numel() or not in_pieces(n, a, b):
        return reference.column_products(a, b)
    columns, strips = divide(rows, n, a.element_size(), resident_blocks(a.device))
    out = a.new_empty((strips, n), dtype=torch.float32)
    name, kernels = _KERNELS[a.dtype]
    strip = -(-rows // strips)
    arguments = (a, b, out, rows, n, a.stride(0), b.stride(0), strip)
    kernels.launch(name, (columns, strips), _THREADS, arguments, device=a.device)
    return out.sum(0) if strips > 1 else out[0]


def divide(rows: int, n: int, size: int, resident: int) -> tuple[int, int]:
    """Divide a matrix among blocks.

    Args:
        rows: of it, at least 1.
        n: columns.
        size: bytes of a value.
        resident: blocks that keep the GPU busy.

    Returns:
        columns: blocks along a row.
        strips: blocks along a column, none without rows.

    Example:
        >>> divide(8192, 28672, 2, 528), divide(8192, 4096, 2, 528), divide(65, 8, 2, 528)
        ((112, 10), (16, 66), (1, 2))
    """
    columns = -(-n * size // (_PIECES * PIECE_BYTES))
    wanted = min(-(-2 * resident // columns), -(-rows // _LEAST_ROWS))
    strip = -(-rows // max(1, wanted))
    return columns, -(-rows // strip)
