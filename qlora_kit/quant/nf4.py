"""4-bit NormalFloat: the table, the packing and the codec. The only definition.

NF4's sixteen values are quantiles of a normal distribution, scaled to [-1, 1],
with an exact zero: eight values above it and seven below. A weight is stored as
the index of the nearest value after division by the largest magnitude of its
block. Two weights share a byte, the first in the high nibble.

Every step is spelled so that the bits equal those of bitsandbytes on the same
device: the quotient is a product with a reciprocal, the last partial block is a
true quotient, ties go to the lower code, and decoding multiplies in float32 and
rounds once. The CUDA sources get a header generated from `NF4_VALUES`.

Source: arXiv:2305.14314, section 3 and appendix E; its released code.
"""

from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from qlora_kit.core.errors import ShapeError
from qlora_kit.quant.config import BLOCK_SIZES

_CHUNK = 1 << 20  # weights quantized at a time on a CPU: bounds the temporaries
_DECODE_CHUNK = 1 << 16  # weights decoded at a time on a CPU: stays in its cache
_HALF_BINS = 127  # bins of [-1, 1] on a CPU, each side of zero
_TINY = 1e-38  # smallest divisor: keeps an all-zero block from dividing by zero


NF4_VALUES: tuple[float, ...] = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The code's 16 values, ascending, exactly representable in float32 (appendix E)."""


@lru_cache(maxsize=16)
def nf4_table(device: torch.device) -> Tensor:
    """The 16 values as a tensor.

    Args:
        device: where the table lives; one copy per device is kept.

    Returns:
        (16,) float32, ascending. Shared: do not modify.

    Example:
        >>> nf4_table(torch.device("cpu"))[[0, 7, 15]].tolist()
        [-1.0, 0.0, 1.0]
    """
    return torch.tensor(NF4_VALUES, dtype=torch.float32, device=device)


@lru_cache(maxsize=16)
def _midpoints(device: torch.device) -> Tensor:
    table = nf4_table(device)
    return (table[:-1] + table[1:]) / 2


@lru_cache(maxsize=16)
def _pair_table(device: torch.device) -> Tensor:
    """(256, 2) float32: both values of each byte, so that one look-up decodes two weights."""
    table = nf4_table(device)
    byte = torch.arange(256, device=device)
    return torch.stack((table[byte >> 4], table[byte & 15]), dim=1)


def quantize_nf4(weight: Tensor, *, block_size: int = 64) -> tuple[Tensor, Tensor]:
    """Quantize to 4-bit NormalFloat with one float32 scale per block.

    Blocks run along the row-major flattened weight; the last one may be short.
    Storage: 4 + 32/block_size bits per weight.

    Args:
        weight: any shape, float32 / float16 / bfloat16, finite. Not modified.
        block_size: weights that share one scale; a power of two from 32 to 4096.

    Returns:
        packed: (ceil(n/2), 1) uint8 for n weights. Weight 2i is the high nibble
            of byte i, weight 2i+1 the low one.
        absmax: (ceil(n/block_size),) float32, in the units of `weight`.

    Raises:
        ShapeError: the weight is empty, not a float, or block_size is not supported.

    Source: arXiv:2305.14314, section 3.

    Example:
        >>> packed, absmax = quantize_nf4(torch.tensor([[-2.0, 0.0, 2.0, 1.0]]))
        >>> packed.flatten().tolist(), absmax.tolist()
        ([7, 252], [2.0])
    """
    check_quantizable(weight, block_size)
    flat = weight.reshape(-1)
    count = flat.numel()
    packed = torch.empty((count + 1) // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(-(-count // block_size), dtype=torch.float32, device=weight.device)
    step = _CHUNK if weight.device.type == "cpu" else 64 * _CHUNK
    for start in range(0, count, step):
        codes, scales = _quantize_chunk(flat[start : start + step].float(), block_size)
        packed[start // 2 : start // 2 + codes.numel()] = codes
        absmax[start // block_size : start // block_size + scales.numel()] = scales
    return packed.unsqueeze(1), absmax


def check_quantizable(weight: Tensor, block_size: int) -> None:
    """Refuse what NF4 cannot store.

    Args:
        weight: what should be quantized.
        block_size: weights that share one scale.

    Raises:
        ShapeError: the weight is empty, not a float, or block_size is not supported.
    """
    if block_size not in BLOCK_SIZES:
        raise ShapeError(f"quantize_nf4 needs block_size in {BLOCK_SIZES}, got {block_size}.")
    if weight.numel() == 0 or not weight.is_floating_point():
        raise ShapeError(
            f"quantize_nf4 needs a non-empty float weight, got {weight.dtype} of shape "
            f"{tuple(weight.shape)}. Leave this module unquantized with QuantConfig(skip=...)."
        )


def _quantize_chunk(flat: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Quantize some whole blocks, and the last short one if it is among them."""
    full = flat.numel() // block_size * block_size
    blocks = flat[:full].view(-1, block_size)
    absmax = blocks.abs().amax(dim=1)
    inverse = 1.0 / absmax.clamp(min=_TINY)
    unit = (blocks * inverse.unsqueeze(1)).clamp_(-1, 1).view(-1)
    if full != flat.numel():
        rest = flat[full:]
        rest_absmax = rest.abs().amax().clamp(min=_TINY)
        absmax = torch.cat((absmax, rest_absmax.view(1)))
        unit = torch.cat((unit, (rest / rest_absmax).clamp_(-1, 1)))
    if unit.numel() % 2:
        unit = torch.nn.functional.pad(unit, (0, 1))
    codes = _nearest_codes(unit)
    return (codes[::2] << 4) | codes[1::2], absmax


def _nearest_codes(unit: Tensor) -> Tensor:
    """Index of the nearest value, ties to the lower: how many midpoints lie strictly below."""
    if unit.device.type != "cpu":
        return torch.bucketize(unit, _midpoints(unit.device), out_int32=True).to(torch.uint8)
    # A CPU's search is scalar. Bins with at most one midpoint each turn it into two look-ups and
    # one comparison, ten times as fast and exact: what lies below or above a whole bin is counted
    # by the table. A NaN lands in a bin too; the caller refuses it.
    below, midpoint = _bins()
    bins = _bin_of(unit)
    codes = below.index_select(0, bins)
    codes += unit > midpoint.index_select(0, bins)
    return codes


def _bin_of(unit: Tensor) -> Tensor:
    """Bin of each value in [-1, 1]; never decreases with the value. int32."""
    return (unit * _HALF_BINS + _HALF_BINS).int().clamp_(0, 2 * _HALF_BINS)


@lru_cache(maxsize=1)
def _bins() -> tuple[Tensor, Tensor]:
    """Per bin, how many midpoints lie in lower bins (uint8), and the midpoint in it, or inf."""
    cpu = torch.device("cpu")  # whatever the default device is
    midpoints = _midpoints(cpu)
    bins = _bin_of(midpoints)
    every = torch.arange(2 * _HALF_BINS + 1, device=cpu)
    below = (bins < every.unsqueeze(1)).sum(dim=1).to(torch.uint8)
    midpoint = torch.full(every.shape, torch.inf, device=cpu)
    midpoint[bins.long()] = midpoints
    assert bins.unique().numel() == midpoints.numel(), "two midpoints in one bin"
    return below, midpoint


def dequantize_nf4(
    packed: Tensor,
    absmax: Tensor,
    shape: tuple[int, ...],
    *,
    block_size: int = 64,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Decode packed NF4: dtype(float32 value × float32 scale), rounded once.

    Args:
        packed: uint8, ceil(n/2) bytes in any shape, for n = product of `shape`.
        absmax: (ceil(n/block_size),) float32.
        shape: of the result.
        block_size: as it was quantized.
        dtype: of the result.

    Returns:
        The decoded weight, of `shape` and `dtype`, contiguous.

    Raises:
        ShapeError: the number of bytes or scales does not fit the shape.

    Example:
        >>> packed, absmax = quantize_nf4(torch.tensor([[-2.0, 0.0, 2.0, 1.0]]))
        >>> dequantize_nf4(packed, absmax, (1, 4))[0, :3].tolist()
        [-2.0, 0.0, 2.0]
    """
    count = prod(shape)
    blocks = -(-count // block_size)
    if packed.numel() != (count + 1) // 2 or absmax.numel() != blocks:
        raise ShapeError(
            f"dequantize_nf4 needs {(count + 1) // 2} bytes and {blocks} scales for shape {shape} "
            f"in blocks of {block_size}, got {packed.numel()} and {absmax.numel()}."
        )
    flat = packed.reshape(-1)
    out = torch.empty(count, dtype=dtype, device=packed.device)
    step = _DECODE_CHUNK if packed.device.type == "cpu" else count
    for start in range(0, count, step):
        stop = min(start + step, count)
        scales = absmax[start // block_size : -(-stop // block_size)]
        values = _decode(flat[start // 2 : (stop + 1) // 2], scales, stop - start, block_size)
        out[start:stop] = values
    return out.view(shape)


def _decode(packed: Tensor, absmax: Tensor, count: int, block_size: int) -> Tensor:
    """Decode `count` weights that start at a block; float32."""
    table = _pair_table(packed.device)
    values = torch.nn.functional.embedding(packed.int(), table).view(-1)
    if count % block_size == 0:
        values.view(-1, block_size).mul_(absmax.unsqueeze(1))
        return values
    return values[:count] * absmax.repeat_interleave(block_size)[:count]
