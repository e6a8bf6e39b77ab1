"""`gather_rows` as one launch, also from page-locked host memory, which the GPU reads by itself.

Nothing waits: ids stay where they are, so a lookup can be recorded in a CUDA graph. What is not in
whole 16-byte pieces, and tables that the GPU cannot read, go to plain torch.
"""

from functools import lru_cache

import torch
from torch import Tensor

from qlora_kit.ops.gather_rows import reference
from qlora_kit.ops.launch import Kernels
from qlora_kit.ops.layout import PIECE_BYTES, in_pieces
from qlora_kit.ops.nf4_dequantize import cuda as nf4_dequantize
from qlora_kit.ops.nf4_dequantize.cuda import resident_blocks

_KERNELS = Kernels("gather_rows/gather_rows.cu")
_WARPS = 8
_PART = 256
"""Pieces of a row that a warp copies at a time."""


def serves(tensor: Tensor) -> bool:
    """Tell whether ids on this tensor's device can be served here: Ampere and later."""
    return nf4_dequantize.serves(tensor) and _shares_addresses(tensor.device)


@lru_cache(maxsize=16)
def _shares_addresses(device: torch.device) -> bool:
    """Whether page-locked memory has one address for the host and the GPU, as on Linux."""
    from cuda.core import Device

    index = torch.cuda.current_device() if device.index is None else device.index
    return bool(Device(index).properties.can_use_host_pointer_for_registered_mem)


def is_readable(table: Tensor) -> bool:
    """Tell whether the kernel can read a table.

    Args:
        table: (V, H), on any device.

    Returns:
        Whether it is on a GPU or in page-locked host memory, its rows whole pieces of 16 bytes.
    """
    return in_pieces(table.shape[1], table) and (table.is_cuda or table.is_pinned())


def gather_rows(table: Tensor, ids: Tensor) -> Tensor:  # needs a GPU
    """Copy rows; see `reference.gather_rows`.

    Args:
        table: (V, H), on the device of the ids or on the CPU.
        ids: any shape, int64, on a CUDA device.

    Returns:
        (*ids.shape, H) on that device.
    """
    rows, width = table.shape
    if not ids.numel() or not width or not is_readable(table):
        return reference.gather_rows(table, ids)
    out = torch.empty((*ids.shape, width), dtype=table.dtype, device=ids.device)
    size, flat = table.element_size(), ids.contiguous()
    pieces, stride = (values * size // PIECE_BYTES for values in (width, table.stride(0)))
    warps = flat.numel() * -(-pieces // _PART)
    blocks = min(-(-warps // _WARPS), resident_blocks(ids.device))
    arguments = (table, flat, out, rows, pieces, stride, flat.numel())
    _KERNELS.launch("gather_rows", blocks, _WARPS * 32, arguments, device=ids.device)
    return out
