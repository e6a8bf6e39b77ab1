"""`rms_norm` as one CUDA launch that reads and writes each value once.

A row stays in registers between its sum and its result. Rows that are not whole
16-byte pieces, or longer than the threads of a block hold, are read twice, value by
value.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from qlora_kit.ops.launch import Kernels
from qlora_kit.ops.layout import PIECE_BYTES, THREADS, in_pieces
from qlora_kit.ops.nf4_dequantize import cuda as nf4_dequantize

_KERNELS = {
    torch.bfloat16: ("rms_norm_bfloat16", Kernels("rms_norm/bfloat16.cu")),
    torch.float16: ("rms_norm_float16", Kernels("rms_norm/float16.cu")),
    torch.float32: ("rms_norm_float32", Kernels("rms_norm/float32.cu")),
}
_MOST_THREADS = 512
_PIECES = (1, 2, 4)
_FOR_A_WARP = 32 * _PIECES[-1]
_SHORT = 512


class Plan(NamedTuple):
    """How rows are divided among threads."""

    kernel: str
    """Ending of the kernel's name: pieces per thread, or `any`."""
    threads: int
    """Per row: a power of two up to 32, or the whole block."""
    block: int
    """Threads per block."""


def serves(tensor: Tensor) -> bool:
    """Tell whether a call on this tensor can run here: three dtypes, any GPU from Ampere on."""
    return tensor.dtype in _KERNELS and nf4_dequantize.serves(tensor)


@lru_cache(maxsize=256)
def plan(h: int, item_bytes: int, whole: bool, threads: int = THREADS) -> Plan:
    """Choose threads for a row of h values.

    Args:
        h: values per row.
        item_bytes: bytes per value.
        whole: rows are whole 16-byte pieces at 16-byte addresses.
        threads: more are given to a row only where it does not fit otherwise.

    Returns:
        The plan.

    Example:
        >>> plan(4096, 2, True), plan(128, 2, True), plan(4095, 2, False)
        (Plan(kernel='2', threads=256, block=256), Plan(kernel='1', threads=16, block=256),
         Plan(kernel='any', threads=256, block=256))
    """
    pieces = h * item_bytes // PIECE_BYTES
    if not whole or pieces > _MOST_THREADS * _PIECES[-1]:
        return Plan("any", 32 if h <= _SHORT else THREADS, THREADS)
    if pieces <= _FOR_A_WARP:
        width = min(32, 1 << (pieces - 1).bit_length())
        each = next(p for p in _PIECES if p * width >= pieces)
        return Plan(str(each), width, THREADS)
    fitting = (p for p in _PIECES if p * threads >= pieces)
    each = next(fitting, _PIECES[-1])
    width = -(-pieces // (each * 32)) * 32
    return Plan(str(each), width, width)


def forward(
    x: Tensor,
    weight: Tensor,
    eps: float,
    unit_offset: bool,
    residual: Tensor | None,
    out: Tensor,
    *,
    threads: int = THREADS,
) -> None:
    """Normalize rows; see `reference.forward`.

    Args:
        x: (M, H) or (M, G, H), on a CUDA device.
        weight: (H,).
        eps: added to the mean square.
        unit_offset: multiply by 1 + weight.
        residual: as x, or None.
        out: as x, written.
        threads: per long row, as `plan` takes them.
    """
    _launch("", (x, residual, out), weight, eps, unit_offset, threads)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    unit_offset: bool,
    residual: Tensor | None,
    dx: Tensor,
    normalized: Tensor | None,
    *,
    threads: int = THREADS,
) -> None:
    """Gradient in x; see `reference.backward`.

    Args:
        dy: as x.
        x: (M, H) or (M, G, H), on a CUDA device.
        weight: (H,).
        eps: added to the mean square.
        unit_offset: multiply by 1 + weight.
        residual: as x, or None.
        dx: as x, written.
        normalized: as x, written; or None.
        threads: per long row, as `plan` takes them.
    """
    _launch("backward_", (dy, x, residual, dx, normalized), weight, eps, unit_offset, threads)


def _launch(
    direction: str,
    tensors: tuple[Tensor | None, ...],
    weight: Tensor,
    eps: float,
    unit_offset: bool,
    threads: int,
) -> None:
    """Launch one kernel on tensors of one shape, in the order of its arguments."""
    like = tensors[1] if direction else tensors[0]
    assert like is not None
    if not like.numel():
        return
    h = like.shape[-1]
    if weight.dtype not in (like.dtype, torch.float32):
        weight = weight.float()
    weight = weight.contiguous()
    whole = in_pieces(h, *tensors) and weight.data_ptr() % PIECE_BYTES == 0
    chosen = plan(h, like.element_size(), whole, threads)
    heads = like.shape[1] if like.dim() == 3 else 1
    rows = like.shape[0] * heads
    prefix, kernels = _KERNELS[like.dtype]
    kernels.launch(
        f"{prefix}_{direction}{chosen.kernel}",
        -(-rows // (chosen.block // chosen.threads)),
        chosen.block,
        (
            *tensors,
            weight,
            weight.dtype == torch.float32,
            unit_offset,
            eps,
            rows,
            heads,
            h,
            chosen.threads,
            *(stride for tensor in tensors for stride in _strides(tensor)),
        ),
        device=like.device,
    )


def _strides(tensor: Tensor | None) -> tuple[int, int]:
    """Values from row to row, and from head to head."""
    if tensor is None:
        return 0, 0
    strides = tensor.stride()
    return strides[0], strides[1] if len(strides) == 3 else 0
