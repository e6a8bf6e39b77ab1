"""`low_rank_gradients` as one pass over dY, and a small one that adds partial sums.

A block of `kernels/low_rank_gradients` walks down a strip of 256 to 1,024 columns and
holds dB of the strip in registers. What it sums leaves it in float32: dY·B of every
strip, (strips, M, rank), and dB of every block. A second kernel adds both up in a fixed
order, so that results are the same bits every time. That workspace is 2·rank / columns
of dY, 3% for ranks of 16, and at most 256 KiB per block.

What the kernel does not take, or is not the faster way for, goes to two products.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from qlora_kit.core.log import log_once
from qlora_kit.ops.launch import Kernels
from qlora_kit.ops.layout import in_pieces
from qlora_kit.ops.low_rank_gradients import reference
from qlora_kit.ops.nf4_dequantize import cuda as nf4_dequantize

_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}

# As in low_rank_gradients.cuh.
_ROWS = 16
_GRAIN = 64
_PARTS = 4
_ADDING_THREADS = 256
_MULTIPLE = 8
"""Columns and ranks of a part: 16 bytes."""

_SHARED_KIB = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}
"""Shared memory that a block may have, by compute capability; `_LEAST_SHARED_KIB` elsewhere."""
_LEAST_SHARED_KIB = 99

_FEWEST_TILES = 2
"""Of a block: with fewer it would write more than it reads."""
_MOST_COST = 2**30
_MOST_ROWS = 2**26
"""The kernels count in 32 bits."""

FEWEST_VALUES = {16: 12 << 20, 32: 32 << 20}
"""Most ranks of a part, rounded up, to the values of dY from which on the kernel is used.

On an H100 it takes 54% of the two products' time for 8,192 x 28,672 and rank 16, 73% for
2,048 x 6,144 and 121% for 2,048 x 4,096; with rank 32 62%, 102% and 202%; with 64 more than
they everywhere (benchmarks/results/low_rank_gradients).
"""


class Shape(NamedTuple):
    """How a block is built; each is a kernel of its own."""

    columns: int
    """Of dY, per warp."""
    warps: int
    stages: int
    """Tiles of 16 rows that shared memory holds."""
    blocks: int
    """At once on a processor, at most."""

    def __str__(self) -> str:
        """Part of the kernel's name."""
        return f"{self.columns}x{self.warps}x{self.stages}"

    def shared_bytes(self, rank: int) -> int:
        """Shared memory of a block.

        Args:
            rank: the kernel's ranks.

        Returns:
            Bytes of tiles of dY and XA, of B, and of sums of dY·B.
        """
        strip = self.columns * self.warps
        tiles = self.stages * _ROWS * (strip + rank) * 2
        return tiles + strip * rank * 2 + 2 * self.warps * _ROWS * rank * 4


SHAPES: dict[int, tuple[Shape, ...]] = {
    16: (Shape(128, 8, 4, 1), Shape(64, 8, 4, 2), Shape(64, 16, 4, 1)),
    32: (Shape(128, 8, 3, 1), Shape(64, 4, 4, 2)),
    64: (Shape(64, 8, 4, 1), Shape(64, 4, 3, 2)),
}
"""The kernel's ranks to its shapes: the first that a GPU has the memory for serves."""


_KERNELS = {
    (dtype, rank): Kernels(f"low_rank_gradients/{name}_{rank}.cu")
    for dtype, name in _DTYPES.items()
    for rank in SHAPES
}


class Plan(NamedTuple):
    """How a call is divided among blocks."""

    strips: int
    """Of up to so many columns as a block is wide."""
    grains: int
    """Groups of 64 columns in them, rounded up."""
    share: int
    """What the tiles that one block starts cost: each its columns / 64 + 2."""
    blocks: int


def serves(tensor: Tensor) -> bool:
    """Tell whether a call on this tensor can run here: 16-bit dtypes, any GPU from Ampere on."""
    return tensor.dtype in _DTYPES and nf4_dequantize.serves(tensor)


def gradients(
    dy: Tensor,
    b: Tensor,
    xa: Tensor,
    column_ends: Sequence[int],
    rank_ends: Sequence[int],
    out: Tensor,
) -> Tensor:
    """Compute dY·B and dYᵀ·XA; see `reference.gradients`.

    Args:
        dy: (M, N), on a CUDA device.
        b: (N, R), contiguous.
        xa: (M, R).
        column_ends: where each part's columns of dy end.
        rank_ends: where each part's ranks end.
        out: (M, R), written with dY·B.

    Returns:
        dB, (N, most ranks of a part) float32.
    """
    rank = kernel_rank(column_ends, rank_ends)
    if dy.numel() >= FEWEST_VALUES.get(rank, dy.numel() + 1) and fits(dy, b, xa, out):
        log_once("low_rank_gradients: one pass")
        return one_pass(dy, b, xa, column_ends, rank_ends, out)
    log_once("low_rank_gradients: two products")
    return reference.gradients(dy, b, xa, column_ends, rank_ends, out)


def kernel_rank(column_ends: Sequence[int], rank_ends: Sequence[int]) -> int:
    """The ranks of the kernel that takes such parts.

    Args:
        column_ends: where each part's columns end.
        rank_ends: where each part's ranks end.

    Returns:
        16, 32 or 64; 0 where none does.

    Example:
        >>> kernel_rank([4096, 5120, 6144], [16, 32, 48]), kernel_rank([4096], [65])
        (16, 0)
    """
    if len(column_ends) > _PARTS or any(end % _MULTIPLE for end in (*column_ends, *rank_ends)):
        return 0
    most = reference.widest(rank_ends)
    return next((rank for rank in SHAPES if 0 < most <= rank), 0)


def fits(dy: Tensor, b: Tensor, xa: Tensor, out: Tensor) -> bool:
    """Tell whether rows are whole 16-byte pieces at 16-byte addresses, and few enough.

    Args:
        dy: (M, N).
        b: (N, R).
        xa: (M, R).
        out: (M, R).

    Returns:
        Whether the kernel takes them.
    """
    m, n = dy.shape
    return (
        0 < m < _MOST_ROWS
        and m * n // _ROWS < _MOST_COST
        and in_pieces(n, dy)
        and in_pieces(b.shape[1], b, xa, out)
    )


@lru_cache(maxsize=1024)
def plan(
    m: int, column_ends: tuple[int, ...], rank_ends: tuple[int, ...], widest: int, blocks: int
) -> Plan:
    """Divide a call among blocks.

    Args:
        m: rows of dY; at least 1.
        column_ends: where each part's columns end.
        rank_ends: where each part's ranks end.
        widest: columns of a strip, a multiple of 64.
        blocks: how many run at once.

    Returns:
        The plan.

    Example:
        >>> plan(8192, (14336, 28672), (16, 32), 1024, 132)
        Plan(strips=28, grains=448, share=1955, blocks=132)
    """
    tiles = -(-m // _ROWS)
    strips = grains = total = most = 0
    columns, ranks = (pairwise((0, *ends)) for ends in (column_ends, rank_ends))
    for (column, end), (rank, rank_end) in zip(columns, ranks, strict=True):
        if rank_end == rank:
            continue
        count = -(-(end - column) // widest)
        width = -(-(end - column) // count)
        cost = -(-width // _GRAIN) + 2
        strips += count
        grains += count * -(-width // _GRAIN)
        total += count * tiles * cost
        most = max(most, cost)
    share = max(-(-total // blocks), _FEWEST_TILES * most)
    return Plan(strips, grains, share, -(-total // share))


def one_pass(
    dy: Tensor,
    b: Tensor,
    xa: Tensor,
    column_ends: Sequence[int],
    rank_ends: Sequence[int],
    out: Tensor,
    *,
    shape: Shape | None = None,
    blocks: int | None = None,
    keep: bool = False,
    overlap: bool = True,
) -> Tensor:
    """Run the kernel; arguments as `gradients`, which `kernel_rank` and `fits` approve of.

    Args:
        dy: (M, N).
        b: (N, R).
        xa: (M, R).
        column_ends: where each part's columns of dy end.
        rank_ends: where each part's ranks end.
        out: (M, R), written.
        shape: of a block; by default the first of `SHAPES` that the GPU has the memory for.
        blocks: how many share the work; by default as many as run at once.
        keep: let dY take its place in the L2 cache, instead of the partial sums.
        overlap: start the second kernel while the first one ends, where the GPU can.

    Returns:
        dB, (N, most ranks of a part) float32.
    """
    (m, n), rank = dy.shape, kernel_rank(column_ends, rank_ends)
    processors, capability = _properties(dy.device)
    shared_kib = _SHARED_KIB.get(capability, _LEAST_SHARED_KIB)
    if shape is None:
        shape = next(s for s in SHAPES[rank] if s.shared_bytes(rank) <= shared_kib * 1024)
    shared = shape.shared_bytes(rank)
    if blocks is None:
        blocks = processors * min(shape.blocks, (shared_kib + 1) * 1024 // (shared + 1024))
    columns, ranks = (tuple(ends) for ends in (column_ends, rank_ends))
    wide = shape.columns * shape.warps
    divided = plan(m, columns, ranks, wide, blocks)
    by_row = dy.new_empty((divided.strips, m, rank), dtype=torch.float32)
    places = divided.blocks + divided.strips
    by_column = dy.new_empty((places, wide, rank), dtype=torch.float32)
    most = reference.widest(ranks)
    complete = all(end > start for start, end in pairwise((0, *ranks)))
    make = dy.new_empty if complete else dy.new_zeros
    d_b = make((n, most), dtype=torch.float32)
    fill = _PARTS - len(columns)
    ends = (*columns, *[n] * fill, *ranks, *[ranks[-1]] * fill)
    name, kernels = f"low_rank_gradients_{_DTYPES[dy.dtype]}", _KERNELS[dy.dtype, rank]
    kernels.launch(
        f"{name}_{rank}_{shape}",
        divided.blocks,
        32 * shape.warps,
        (
            *(dy, b, xa, by_row, by_column, m),
            *(dy.stride(0), b.stride(0), xa.stride(0)),
            *(keep, divided.share, *ends),
        ),
        device=dy.device,
        shared=shared,
    )
    row_blocks = -(-m * (ranks[-1] // 4) // _ADDING_THREADS)
    kernels.launch(
        f"{name}_add",
        row_blocks + divided.grains,
        _ADDING_THREADS,
        (
            *(by_row, by_column, out, d_b, row_blocks, most, rank, wide, m),
            *(out.stride(0), divided.share, *ends),
        ),
        device=dy.device,
        overlap=overlap and capability >= (9, 0),
    )
    return d_b


@lru_cache(maxsize=64)
def _properties(device: torch.device) -> tuple[int, tuple[int, int]]:  # needs a GPU
    """A GPU's multiprocessors and compute capability."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, (properties.major, properties.minor)
