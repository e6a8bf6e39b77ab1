"""`cross_entropy` as one CUDA launch: a block per row, the row kept where there is room.

A row of 128k 16-bit values takes 256 KB; Hopper has 227 KB of shared memory to keep it in
between its sum and its gradient, and reads the rest again from its L2 cache. Rows that take
less than half of a processor's shared memory share it two by two, so that one can be read
while another is written.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from qlora_kit.ops.launch import Kernels
from qlora_kit.ops.layout import PIECE_BYTES
from qlora_kit.ops.nf4_dequantize import cuda as nf4_dequantize

_KERNELS = {
    torch.bfloat16: ("cross_entropy_bfloat16", Kernels("cross_entropy/bfloat16.cu")),
    torch.float16: ("cross_entropy_float16", Kernels("cross_entropy/float16.cu")),
    torch.float32: ("cross_entropy_float32", Kernels("cross_entropy/float32.cu")),
}
_OWN_SHARED_BYTES = 1024
"""What the kernel takes beside a row, generously."""
_RESERVED_BYTES = 1024
"""What CUDA takes of a processor's shared memory for each block."""
_MOST_THREADS = 1024
_PIECES_EACH = 8
"""Pieces of a row a thread has at least, where the row is long enough."""
_NO_CLASS = -(2**63)


class Plan(NamedTuple):
    """How a row is worked on."""

    blocks: int
    """That share a processor: 1 or 2."""
    threads: int
    """Of a block, a power of two."""
    shared: int
    """Bytes to keep rows in; the same for all rows of a kernel."""


def serves(tensor: Tensor) -> bool:
    """Tell whether a call on this tensor can run here: three dtypes, any GPU from Ampere on."""
    return tensor.dtype in _KERNELS and nf4_dequantize.serves(tensor)


@lru_cache(maxsize=256)
def plan(row_bytes: int, processor_bytes: int, blocks: int = 0) -> Plan:
    """Choose threads and shared memory for a row.

    Args:
        row_bytes: of one row.
        processor_bytes: shared memory of one processor.
        blocks: that share a processor, 1 or 2; 0 to choose.

    Returns:
        The plan.

    Example:
        >>> plan(2 * 32_000, 233_472), plan(2 * 128_256, 233_472)
        (Plan(blocks=2, threads=512, shared=114688), Plan(blocks=1, threads=1024, shared=231424))
    """
    own = _RESERVED_BYTES + _OWN_SHARED_BYTES
    halves, whole = (
        (processor_bytes // each - own) // PIECE_BYTES * PIECE_BYTES for each in (2, 1)
    )
    blocks = blocks or (2 if row_bytes <= halves else 1)
    wanted = max(1, row_bytes // (PIECE_BYTES * _PIECES_EACH))
    threads = min(_MOST_THREADS // blocks, max(64, 1 << (wanted - 1).bit_length()))
    return Plan(blocks, threads, whole if blocks == 1 else halves)


@lru_cache(maxsize=16)
def _processor_bytes(device: torch.device) -> int:
    """Shared memory of one of a GPU's processors."""
    size: int = torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor
    return size


def run(
    logits: Tensor,
    targets: Tensor,
    scale: float,
    softcap: float | None,
    label_smoothing: float,
    ignore_index: int | None,
    losses: Tensor,
    gradient: bool,
    factor: Tensor | None,
    *,
    blocks: int = 0,
    keep: bool = True,
) -> None:
    """Losses of rows, and their gradient over the logits; see `reference.run`.

    Args:
        logits: (M, V) on a CUDA device, overwritten if `gradient`.
        targets: (M,) int64.
        scale: factor on the logits.
        softcap: of the logits, or None.
        label_smoothing: share of the target spread over all classes.
        ignore_index: target of rows that do not count, or None.
        losses: (M,) float32, written.
        gradient: replace the logits by it.
        factor: () float32 on the gradient, or None.
        blocks: as `plan` takes them, for comparison.
        keep: rows in shared memory; False reads them twice, for comparison.
    """
    rows, v = logits.shape
    if not rows:
        return
    chosen = plan(v * logits.element_size(), _processor_bytes(logits.device), blocks)
    prefix, kernels = _KERNELS[logits.dtype]
    kernels.launch(
        f"{prefix}_{'plain' if softcap is None else 'capped'}_{chosen.blocks}",
        rows,
        chosen.threads,
        (
            logits,
            targets,
            losses,
            factor,
            v,
            logits.stride(0),
            _NO_CLASS if ignore_index is None else ignore_index,
            gradient,
            float(scale),
            float(softcap or 1.0),
            float(label_smoothing),
            chosen.shared // PIECE_BYTES if keep else 0,
        ),
        device=logits.device,
        shared=chosen.shared,
    )
