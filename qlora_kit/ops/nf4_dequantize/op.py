"""`nf4_dequantize`: an NF4 weight as a float tensor.

The weight is frozen, so the op has no gradient. Every backend gives the same
bits: dtype(float32 value × float32 scale), rounded once. It decodes a weight, or
some of its rows, or the transpose of either, and puts given columns beside it in
the same pass: [W | s·B] is the weight that a GEMM multiplies with [x | x·Aᵀ].
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from qlora_kit.core.errors import ShapeError
from qlora_kit.ops import jit
from qlora_kit.ops.backend import Backend, register_backend, resolve
from qlora_kit.ops.nf4_dequantize import cuda, reference
from qlora_kit.quant.weight import NF4Weight

OP = "nf4_dequantize"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

register_backend(OP, Backend("reference", reference, lambda tensor: True, lambda: True))
register_backend(OP, Backend("cuda", cuda, cuda.serves, jit.is_available))


def nf4_dequantize(
    weight: NF4Weight,
    dtype: torch.dtype | None = None,
    *,
    rows: tuple[int, int] | None = None,
    transposed: bool = False,
    columns: Tensor | None = None,
) -> Tensor:
    """Decode an NF4 weight on the fastest backend its device has.

    Args:
        weight: (N, K) or any other shape. Not modified.
        dtype: float32, bfloat16 or float16; None for the dtype it was made from.
        rows: first and one past the last row to decode, or None for the whole weight. A
            stack's (E, N, K) rows are counted through, as E·N.
        transposed: return the transpose.
        columns: (rows, r) of the result's dtype, put to the right of the decoded weight,
            or None. Not differentiated.

    Returns:
        The weight, contiguous: of `weight.shape`; with any option a matrix, (rows, K + r)
        or its transpose (K + r, rows).

    Raises:
        ShapeError: the dtype is not one of the three, or rows or columns do not fit.
        BackendError: a forced backend cannot serve the call.

    Example:
        >>> weight = NF4Weight.quantize(torch.randn(4, 64))
        >>> nf4_dequantize(weight, torch.bfloat16).dtype
        torch.bfloat16
        >>> nf4_dequantize(weight, rows=(1, 3), columns=torch.ones(2, 8)).shape
        torch.Size([2, 72])
    """
    dtype = dtype or weight.dtype
    if dtype not in DTYPES:
        raise ShapeError(f"nf4_dequantize needs a dtype in {DTYPES}, got {dtype}.")
    fields = (
        weight.packed,
        weight.absmax,
        weight.nested_absmax,
        weight.offset,
        list(weight.shape),
        weight.block_size,
        dtype,
    )
    if rows is None and columns is None and not transposed:
        decoded: Tensor = torch.ops.qlora_kit.nf4_dequantize(*fields)
        return decoded
    _check(weight, dtype, rows, columns)
    part: Tensor = torch.ops.qlora_kit.nf4_dequantize(*fields, rows, transposed, columns)
    return part


def nf4_dequantize_into(weight: NF4Weight, out: Tensor, columns: Tensor | None = None) -> None:
    """Decode an (N, K) weight into memory that is there already.

    No op of torch's but on the meta device: for the inside of one, and cheap to call.

    Args:
        weight: (N, K). Not modified.
        out: (N, K + r) contiguous; its dtype decides.
        columns: (N, r) in the dtype of `out`, written to the right, or None.

    Raises:
        BackendError: a forced backend cannot serve the call.

    Example:
        >>> scratch = torch.empty(6, 64)
        >>> nf4_dequantize_into(NF4Weight.quantize(torch.ones(4, 64)), scratch[:4])
        >>> scratch[0, 0].item()
        1.0
    """
    if out.is_meta:  # seen by what traces a step on the meta device, and by nothing else
        torch.ops.qlora_kit.nf4_dequantize_into.default(weight.packed, columns, out)
        return
    resolve(OP, weight.packed).dequantize(weight, out.dtype, columns=columns, out=out)


def _check(
    weight: NF4Weight, dtype: torch.dtype, rows: tuple[int, int] | None, columns: Tensor | None
) -> None:
    """Refuse rows outside the weight and columns that do not stand beside them."""
    height = prod(weight.shape[:-1])
    start, stop = rows or (0, height)
    if not 0 <= start <= stop <= height:
        raise ShapeError(
            f"nf4_dequantize needs rows within (0, {height}) for shape {weight.shape}, got "
            f"({start}, {stop})."
        )
    if columns is None:
        return
    device = weight.packed.device
    fits = columns.dim() == 2 and columns.shape[0] == stop - start
    if not fits or columns.dtype != dtype or columns.device != device:
        raise ShapeError(
            f"nf4_dequantize needs columns of shape ({stop - start}, r) in {dtype} on {device}, "
            f"got {tuple(columns.shape)} in {columns.dtype} on {columns.device}."
        )


_LIBRARY = torch.library.Library("qlora_kit", "FRAGMENT")
_LIBRARY.define("nf4_dequantize_into(Tensor packed, Tensor? columns, Tensor(a!) out) -> ()")


@torch.library.register_fake("qlora_kit::nf4_dequantize_into")
def _(packed: Tensor, columns: Tensor | None, out: Tensor) -> None:
    return None


@torch.library.custom_op("qlora_kit::nf4_dequantize", mutates_args=())
def _dequantize(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    shape: Sequence[int],
    block_size: int,
    dtype: torch.dtype,
    rows: Sequence[int] | None = None,
    transposed: bool = False,
    columns: Tensor | None = None,
) -> Tensor:
    weight = NF4Weight(
        packed=packed,
        absmax=absmax,
        nested_absmax=nested_absmax,
        offset=offset,
        shape=tuple(shape),
        block_size=block_size,
        dtype=dtype,
    )
    functions = resolve(OP, packed)
    if rows is None and columns is None and not transposed:
        whole: Tensor = functions.dequantize(weight, dtype)
        return whole
    span = None if rows is None else (rows[0], rows[1])
    part: Tensor = functions.dequantize(
        weight, dtype, rows=span, transposed=transposed, columns=columns
    )
    return part


@_dequantize.register_fake
def _(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    shape: Sequence[int],
    block_size: int,
    dtype: torch.dtype,
    rows: Sequence[int] | None = None,
    transposed: bool = False,
    columns: Tensor | None = None,
) -> Tensor:
    if rows is None and columns is None and not transposed:
        return packed.new_empty(list(shape), dtype=dtype)
    return packed.new_empty(reference.part_shape(shape, rows, transposed, columns), dtype=dtype)
