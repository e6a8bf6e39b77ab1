"""`nf4_dequantize` in plain torch."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from qlora_kit.quant.nf4 import dequantize_nf4
from qlora_kit.quant.weight import NF4Weight


def dequantize(
    weight: NF4Weight,
    dtype: torch.dtype,
    *,
    rows: tuple[int, int] | None = None,
    transposed: bool = False,
    columns: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Decode a weight; see `qlora_kit.quant.nf4.dequantize_nf4`.

    Args:
        weight: (N, K) or any other shape.
        dtype: float32, bfloat16 or float16.
        rows: first and one past the last row to decode, or None for the whole weight. A
            stack's (E, N, K) rows are counted through, as E·N.
        transposed: return the transpose.
        columns: (rows, r) of `dtype`, put to the right of the decoded weight, or None.
        out: where to, of the result's shape and dtype; a new tensor if None.

    Returns:
        The decoded weight, contiguous: of `weight.shape`; with any option (rows, K + r)
        or its transpose.

    Example:
        >>> weight = NF4Weight.quantize(torch.randn(6, 64))
        >>> right = torch.ones(3, 2)
        >>> options = {"rows": (1, 4), "transposed": True, "columns": right}
        >>> dequantize(weight, torch.float32, **options).shape
        torch.Size([66, 3])
    """
    if out is not None:
        part = dequantize(weight, dtype, rows=rows, transposed=transposed, columns=columns)
        return out.copy_(part)
    if rows is None and columns is None and not transposed:
        return weight.dequantize(dtype)
    decoded = _rows(weight, dtype, *(rows or (0, prod(weight.shape[:-1]))))
    if columns is not None:
        decoded = torch.cat((decoded, columns), dim=1)
    return decoded.T.contiguous() if transposed else decoded


def part_shape(
    shape: Sequence[int], rows: Sequence[int] | None, transposed: bool, columns: Tensor | None
) -> tuple[int, ...]:
    """Shape of what `dequantize` returns when an option is given.

    Args:
        shape: of the weight.
        rows: as given.
        transposed: as given.
        columns: as given.

    Returns:
        (rows, K + r) or its transpose.

    Example:
        >>> part_shape((4, 3, 64), (2, 7), True, None)
        (64, 5)
    """
    height = prod(shape[:-1]) if rows is None else rows[1] - rows[0]
    width = shape[-1] + (0 if columns is None else columns.shape[1])
    return (width, height) if transposed else (height, width)


def _rows(weight: NF4Weight, dtype: torch.dtype, start: int, stop: int) -> Tensor:
    """Some rows, of whose blocks the first and the last may be cut."""
    k, size = weight.shape[-1], weight.block_size
    if start == stop:
        return torch.empty((0, k), dtype=dtype, device=weight.packed.device)
    first, last = start * k // size, -(-stop * k // size)
    begin, end = first * size, min(last * size, prod(weight.shape))
    decoded = dequantize_nf4(
        weight.packed.reshape(-1)[begin // 2 : (end + 1) // 2],
        weight.scales()[first:last],
        (end - begin,),
        block_size=size,
        dtype=dtype,
    )
    return decoded[start * k - begin : stop * k - begin].clone().view(stop - start, k)
