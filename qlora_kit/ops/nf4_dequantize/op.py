"""`nf4_dequantize`: an NF4 weight as a float tensor.

The weight is frozen, so the op has no gradient. Every backend gives the same
bits: dtype(float32 value × float32 scale), rounded once.
"""

from collections.abc import Sequence

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


def nf4_dequantize(weight: NF4Weight, dtype: torch.dtype | None = None) -> Tensor:
    """Decode an NF4 weight on the fastest backend its device has.

    Args:
        weight: of any shape.
        dtype: float32, bfloat16 or float16; None for the dtype it was made from.

    Returns:
        The weight, of `weight.shape`, contiguous.

    Raises:
        ShapeError: the dtype is not one of the three.
        BackendError: a forced backend cannot serve the call.

    Example:
        >>> nf4_dequantize(NF4Weight.quantize(torch.randn(4, 64)), torch.bfloat16).dtype
        torch.bfloat16
    """
    dtype = dtype or weight.dtype
    if dtype not in DTYPES:
        raise ShapeError(f"nf4_dequantize needs a dtype in {DTYPES}, got {dtype}.")
    decoded: Tensor = torch.ops.qlora_kit.nf4_dequantize(
        weight.packed,
        weight.absmax,
        weight.nested_absmax,
        weight.offset,
        list(weight.shape),
        weight.block_size,
        dtype,
    )
    return decoded


@torch.library.custom_op("qlora_kit::nf4_dequantize", mutates_args=())
def _dequantize(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    shape: Sequence[int],
    block_size: int,
    dtype: torch.dtype,
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
    decoded: Tensor = resolve(OP, packed).dequantize(weight, dtype)
    return decoded


@_dequantize.register_fake
def _(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    shape: Sequence[int],
    block_size: int,
    dtype: torch.dtype,
) -> Tensor:
    return packed.new_empty(list(shape), dtype=dtype)
