"""Double quantization: the scales of NF4 blocks, stored in 8 bits themselves.

Scales are positive and close together, so their mean is taken off first (one
float32 per tensor) and the rest goes to 8 bits in groups of 256, on the signed
*dynamic* map: 127 negative values, zero, 127 positive ones and 1.0, dense near
zero. It is not an fp8 format.

The map is built from float32 `linspace`, as the checkpoints in circulation were.
On a CPU, codes are found as bitsandbytes 0.50 finds them there, through a table
of 65,536 bins, because a value near a midpoint otherwise lands on the other
code; elsewhere the nearest value is searched directly. Either is within half a
step, but only the same choice gives the same bytes. Decoding rounds twice,
product then sum, as everybody's does.

Source: arXiv:2305.14314, section 3; the map: arXiv:2110.02861, section 2.
"""

from functools import lru_cache

import torch
from torch import Tensor

from qlora_kit.core.errors import ShapeError

GROUP_SIZE = 256
"""Scales that share one second-level scale."""

_CHUNK = 1 << 20  # scales coded at a time on a CPU: each costs 40 bytes of temporaries
_EXPONENTS = 7
_BINS = 65536


def _dynamic_map_values() -> tuple[float, ...]:
    """The 256 values of the signed dynamic map, ascending."""
    values = [0.0, 1.0]
    for exponent in range(_EXPONENTS):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = (edges[:-1] + edges[1:]) / 2.0
        # The power times a float32 tensor: the product is rounded to float32 here.
        magnitudes = (10 ** (exponent - _EXPONENTS + 1) * means).tolist()
        values += magnitudes + [-value for value in magnitudes]
    return tuple(sorted(values))


DYNAMIC_MAP_VALUES: tuple[float, ...] = _dynamic_map_values()
"""The 8-bit code's 256 values, ascending, exactly representable in float32."""


@lru_cache(maxsize=16)
def dynamic_map(device: torch.device) -> Tensor:
    """The 8-bit code as a tensor.

    Args:
        device: where it lives; one copy per device is kept.

    Returns:
        (256,) float32, ascending from above -1 to 1. Shared: do not modify.

    Example:
        >>> dynamic_map(torch.device("cpu"))[[127, 255]].tolist()
        [0.0, 1.0]
    """
    return torch.tensor(DYNAMIC_MAP_VALUES, dtype=torch.float32, device=device)


@lru_cache(maxsize=16)
def _midpoints(device: torch.device) -> Tensor:
    values = dynamic_map(device)
    return (values[:-1] + values[1:]) * 0.5


@lru_cache(maxsize=1)
def _bin_codes() -> Tensor:
    """(65536,) uint8: the code of each bin's left value on a CPU."""
    cpu = torch.device("cpu")  # whatever the default device is
    steps = torch.arange(_BINS, dtype=torch.float32, device=cpu) * 2.0
    left = steps / (_BINS - 1) - 1.0
    return torch.bucketize(left, _midpoints(cpu)).to(torch.uint8)


def _codes(unit: Tensor) -> Tensor:
    """Code of each value in [-1, 1]."""
    if unit.device.type != "cpu":
        return torch.bucketize(unit, _midpoints(unit.device), out_int32=True).to(torch.uint8)
    # (unit + 1)/2 · 65535 + 0.5 in one rounding, as a fused multiply-add computes it:
    # the product of 24 and 16 significant bits is exact in float64. A NaN lands in a bin
    # too: who quantizes refuses it.
    half = ((unit + 1.0) * 0.5).double()
    bins = (half * (_BINS - 1) + 0.5).float().int().clamp_(0, _BINS - 1)
    return _bin_codes()[bins]


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize scales to 8 bits in groups of 256, after taking off their mean.

    The mean depends on the order of summation, so equal bytes need the same
    device (and, on CUDA, the same torch).

    Args:
        absmax: (blocks,) float32, finite.

    Returns:
        codes: (blocks,) uint8, indices into the dynamic map.
        nested_absmax: (ceil(blocks/256),) float32, the groups' scales.
        offset: () float32, the mean that was taken off.

    Raises:
        ShapeError: absmax is not a non-empty float32 vector.

    Source: arXiv:2305.14314, section 3.

    Example:
        >>> codes, nested, offset = quantize_absmax(torch.tensor([1.0, 3.0]))
        >>> offset.item(), nested.item(), codes.tolist()
        (2.0, 1.0, [0, 255])
    """
    check_absmax(absmax)
    offset = absmax.mean()
    return *code_absmax(absmax, offset), offset


def check_absmax(absmax: Tensor) -> None:
    """Refuse what cannot be a weight's scales.

    Args:
        absmax: what should be quantized.

    Raises:
        ShapeError: absmax is not a non-empty float32 vector.
    """
    if absmax.dim() != 1 or absmax.numel() == 0 or absmax.dtype != torch.float32:
        raise ShapeError(
            f"quantize_absmax needs a non-empty float32 vector, got {absmax.dtype} of shape "
            f"{tuple(absmax.shape)}."
        )


def code_absmax(absmax: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Code the distance of scales from their mean, in groups of 256.

    Args:
        absmax: (blocks,) float32, finite.
        offset: () float32, taken off first.

    Returns:
        codes: (blocks,) uint8, indices into the dynamic map.
        nested_absmax: (ceil(blocks/256),) float32, the groups' scales.

    Example:
        >>> codes, nested = code_absmax(torch.tensor([1.0, 3.0]), torch.tensor(2.0))
        >>> nested.item(), codes.tolist()
        (1.0, [0, 255])
    """
    blocks = absmax.numel()
    nested_absmax = absmax.new_empty(-(-blocks // GROUP_SIZE))
    codes = torch.empty(blocks, dtype=torch.uint8, device=absmax.device)
    step = _CHUNK if absmax.device.type == "cpu" else 64 * _CHUNK
    for start in range(0, blocks, step):
        part = absmax[start : start + step] - offset
        found, scales = _quantize_groups(part)
        codes[start : start + step] = found
        first = start // GROUP_SIZE
        nested_absmax[first : first + scales.numel()] = scales
    return codes, nested_absmax


def _quantize_groups(centred: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and group scales of some whole groups, and the last short one if it is among them."""
    blocks = centred.numel()
    groups = -(-blocks // GROUP_SIZE)
    padded = torch.nn.functional.pad(centred, (0, groups * GROUP_SIZE - blocks))
    padded = padded.view(groups, GROUP_SIZE)
    nested_absmax = padded.abs().amax(dim=1)
    inverse = torch.where(nested_absmax == 0, 0.0, 1.0 / nested_absmax)
    codes = _codes((padded * inverse.unsqueeze(1)).clamp_(-1, 1))
    # A group of equal scales carries code 0 in circulation; its decoded value is the mean anyway.
    codes = torch.where((nested_absmax == 0).unsqueeze(1), 0, codes)
    return codes.view(-1)[:blocks], nested_absmax


def dequantize_absmax(codes: Tensor, nested_absmax: Tensor, offset: Tensor) -> Tensor:
    """Decode 8-bit scales: value × group scale, rounded, plus the mean, rounded.

    Args:
        codes: (blocks,) uint8.
        nested_absmax: (ceil(blocks/256),) float32.
        offset: () float32.

    Returns:
        (blocks,) float32 scales.

    Raises:
        ShapeError: the number of groups does not fit the number of codes.

    Example:
        >>> dequantize_absmax(*quantize_absmax(torch.tensor([1.0, 1.0]))).tolist()
        [1.0, 1.0]
    """
    blocks = codes.numel()
    if nested_absmax.numel() != -(-blocks // GROUP_SIZE):
        raise ShapeError(
            f"dequantize_absmax needs {-(-blocks // GROUP_SIZE)} group scales for {blocks} codes, "
            f"got {nested_absmax.numel()}."
        )
    values = torch.nn.functional.embedding(codes.int(), dynamic_map(codes.device).unsqueeze(1))
    groups = nested_absmax.repeat_interleave(GROUP_SIZE)[:blocks]
    return values.view(-1) * groups + offset
