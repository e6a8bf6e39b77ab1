"""`nf4_dequantize` as one CUDA launch, nested scales included.

Reads 0.516 bytes and writes 2 (or 4) per weight, once: the time is the card's
bandwidth and nothing else. The bits equal the reference's.

Whole weights, slices that start at a multiple of 32 weights, and given columns
beside them go through the streaming kernel; `layouts.cu` turns, and takes every
odd size and place one weight at a time.
"""

from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from qlora_kit.ops.launch import Kernels
from qlora_kit.ops.nf4_dequantize import reference
from qlora_kit.quant.weight import NF4Weight

_STREAM = Kernels("nf4_dequantize/nf4_dequantize.cu")
_LAYOUTS = Kernels("nf4_dequantize/layouts.cu")
_THREADS = 256
_BLOCKS_PER_PROCESSOR = 4
_NAMES = {
    torch.bfloat16: "nf4_dequantize_bfloat16",
    torch.float16: "nf4_dequantize_float16",
    torch.float32: "nf4_dequantize_float32",
}
_STORE_BYTES = 16


def serves(tensor: Tensor) -> bool:
    """Tell whether a call on this tensor can run here: any CUDA GPU from Ampere on."""
    return tensor.is_cuda and _capable(tensor.device)


@lru_cache(maxsize=16)
def _capable(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


@lru_cache(maxsize=16)
def resident_blocks(device: torch.device) -> int:
    """Blocks of 256 threads that keep a device busy: four per processor.

    Args:
        device: a CUDA device.

    Returns:
        Their number.
    """
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count * _BLOCKS_PER_PROCESSOR


def dequantize(
    weight: NF4Weight,
    dtype: torch.dtype,
    *,
    rows: tuple[int, int] | None = None,
    transposed: bool = False,
    columns: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Decode a weight; see `reference.dequantize`.

    Args:
        weight: of any shape, on a CUDA device.
        dtype: float32, bfloat16 or float16.
        rows: first and one past the last row, or None for the whole weight.
        transposed: return the transpose.
        columns: (rows, r) of `dtype`, put to the right of the decoded weight, or None.
        out: where to, contiguous and of the result's shape and dtype; a new tensor if None.

    Returns:
        The decoded weight, contiguous.
    """
    plain = rows is None and columns is None and not transposed
    if out is None:
        shape = weight.shape
        if not plain:
            shape = reference.part_shape(shape, rows, transposed, columns)
        out = torch.empty(shape, dtype=dtype, device=weight.packed.device)
    assert out.is_contiguous()
    if plain:
        _stream(weight, out, 0, prod(weight.shape))
    elif out.numel():
        _part(weight, out, rows, transposed, columns)
    return out


def _stream(weight: NF4Weight, out: Tensor, first: int, count: int, *columns: object) -> None:
    """Decode `count` weights from `first` on, which is a multiple of 32, into aligned `out`."""
    packed = weight.packed
    if packed.data_ptr() % 4 or not packed.is_contiguous():
        packed = packed.clone(memory_format=torch.contiguous_format)  # an unaligned slice
    tile = _THREADS * 4 * _STORE_BYTES // out.element_size()
    _STREAM.launch(
        _NAMES[out.dtype] + ("_columns" if columns else ""),
        min(-(-count // tile), resident_blocks(out.device)),
        _THREADS,
        (
            packed,
            weight.absmax,
            weight.nested_absmax,
            weight.offset,
            out,
            first,
            count,
            weight.block_size.bit_length() - 1,
            *columns,
        ),
        device=out.device,
    )


def _part(
    weight: NF4Weight,
    out: Tensor,
    rows: tuple[int, int] | None,
    transposed: bool,
    columns: Tensor | None,
) -> None:
    """Decode what is not a whole weight, by the fastest kernel that takes it."""
    k = weight.shape[-1]
    start, stop = rows or (0, prod(weight.shape[:-1]))
    count, rank = stop - start, 0 if columns is None else columns.shape[1]
    columns = columns.contiguous() if columns is not None and rank else None
    first = start * k
    piece = _STORE_BYTES // out.element_size()  # weights per store
    tensors = [out] if columns is None else [out, columns]
    aligned = first % 32 == 0 and all(t.data_ptr() % _STORE_BYTES == 0 for t in tensors)
    if aligned and not transposed and columns is None:
        _stream(weight, out, first, count * k)
        return
    if aligned and not transposed and k % piece == 0 and rank % piece == 0:
        _stream(weight, out, first, count * k, columns, k, rank)
        return
    packed = weight.packed.contiguous()
    fields = (packed, weight.absmax, weight.nested_absmax, weight.offset, columns, out)
    sizes = (first, count, k, rank, weight.block_size.bit_length() - 1)
    name, device = _NAMES[out.dtype], out.device
    if (
        transposed
        and aligned
        and k % 32 == 0
        and count % piece == 0
        and packed.data_ptr() % _STORE_BYTES == 0
    ):
        grid = (-(-count // (8 * piece)), -(-k // _THREADS) + (rank > 0))
        _LAYOUTS.launch(f"{name}_transposed", grid, _THREADS, (*fields, *sizes), device=device)
        return
    blocks = min(-(-out.numel() // _THREADS), 2 * resident_blocks(device))
    arguments = (*fields, *sizes, int(transposed))
    _LAYOUTS.launch(f"{name}_any", blocks, _THREADS, arguments, device=device)
