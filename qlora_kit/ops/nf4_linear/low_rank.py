"""LoRA's small product s·X·Aᵀ or s·dY·B of many rows, at the rate at which memory gives X.

A block of `kernels/nf4_linear/low_rank` takes 32 rows and up to 16 ranks, and brings X and the
narrow factor to its processor while the tensor cores work on what came before. Where
that makes too few blocks for the chip, a team of up to eight shares the contraction: a
cluster, which adds its sums up in a fixed order; before Hopper, a second kernel adds them
from a float32 workspace. Results are the same bits every time.

The kernel can copy X beside the result as well (`product_beside`), so that a product whose
contraction goes on over the ranks has both in one matrix, and X is read once.

cuBLAS is as fast or faster on more ranks: `is_faster` says where the kernel serves. Both are
faster than `hopper`'s own kernel for few rows from `FEWEST_ROWS` on.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_kit.ops.jit import architecture_of
from qlora_kit.ops.launch import Kernels
from qlora_kit.ops.layout import in_pieces
from qlora_kit.ops.nf4_linear import reference

_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}

# As in product.cuh.
_THREADS = 256
_MOST_MEMBERS = 8
_MOST_ROWS = 2**26
"""The kernels count in 32 bits."""

FEWEST_ROWS = 512
MOST_VALUES = 120 << 20
"""Where the kernel is used: on Hopper, up to 16 ranks, from so many rows on, up to so many values
of X, as far as it was measured: on an H200 it takes 0.72 to 1.01 of cuBLAS's time on 512 to 8,192
rows of 4,096 or 14,336 values. Kernels of 32, 48 and 64 ranks took up to 1.5 of it and are gone.
`product_beside` has no limit of values: product and copy took more at every size up to 8,192 rows
of 28,672 (no record)."""

IN_FLIGHT = 45 << 10
"""Bytes of X that a processor has to have asked for, by the time memory takes to answer."""


class Shape(NamedTuple):
    """How a block is built; each is a kernel of its own."""

    tokens: int
    """Rows of X."""
    columns: int
    """Of X, in a stage."""
    stages: int
    """That shared memory holds."""

    def bytes_of_x(self) -> int:
        """Of X, in a stage."""
        return self.tokens * self.columns * 2

    def bytes_of_factor(self, rank: int, turned: bool) -> int:
        """Of the factor, in a stage.

        Args:
            rank: the kernel's ranks.
            turned: whether it is stored as (K, r), in rows of an odd number of pieces where that
                number is no power of two.

        Returns:
            The bytes.
        """
        pieces = rank // 8
        padded = turned and pieces & (pieces - 1) != 0
        return self.columns * (pieces | 1 if padded else pieces) * 16

    def shared_bytes(self, rank: int, turned: bool) -> int:
        """Shared memory of a block.

        Args:
            rank: the kernel's ranks.
            turned: whether the factor is stored as (K, r).

        Returns:
            Bytes of the stages, whose place the sums take in the end.
        """
        return self.stages * (self.bytes_of_x() + self.bytes_of_factor(rank, turned))


SHAPES: dict[int, tuple[Shape, ...]] = {
    16: (Shape(32, 128, 4),),
}
"""The kernel's ranks to its shapes, the best first."""

_KERNELS = {
    (dtype, rank): Kernels(f"nf4_linear/low_rank/{name}_{rank}.cu")
    for dtype, name in _DTYPES.items()
    for rank in SHAPES
}


class Plan(NamedTuple):
    """How a call is cut into blocks."""

    shape: Shape
    team: int
    """Blocks that share a contraction."""


def product(x: Tensor, factor: Tensor, scale: float, zeros: Tensor | None = None) -> Tensor:
    """Compute scale·x·factor by the faster way.

    Args:
        x: (M, K), on a CUDA device.
        factor: (K, r), one of its dimensions contiguous.
        scale: the factor on the result.
        zeros: int32, set to zero besides, or None.

    Returns:
        (M, r) in the dtype of x.
    """
    if not is_faster(x, factor):
        if zeros is not None:
            zeros.zero_()
        return reference.scaled_product(x, factor, scale)
    out = x.new_empty((x.shape[0], factor.shape[1]))
    run(x, factor, scale, out, zeros=zeros)
    return out


def product_beside(x: Tensor, factor: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Compute scale·x·factor, and put x and that side by side.

    Args:
        x: (M, K), on a CUDA device.
        factor: (K, r), one of its dimensions contiguous.
        scale: the factor on the result.

    Returns:
        product: (M, r) in the dtype of x.
        both: (M, K + r'), x and the product; r' is r up to a multiple of eight, with zeros.
    """
    if not _serves(x, factor):
        small = reference.scaled_product(x, factor, scale)
        return small, torch.cat((x, to_eight(small)), dim=1)
    (m, k), r = x.shape, factor.shape[1]
    small, both = x.new_empty((m, r)), x.new_empty((m, k + r))
    run(x, factor, scale, small, both=both)
    return small, both


def to_eight(columns: Tensor) -> Tensor:
    """Add columns of zeros up to a multiple of eight: rows of whole 16-byte pieces.

    Args:
        columns: (M, r).

    Returns:
        (M, r').

    Example:
        >>> to_eight(torch.ones(2, 12)).shape
        torch.Size([2, 16])
    """
    return F.pad(columns, (0, -columns.shape[1] % 8))


def is_faster(x: Tensor, factor: Tensor) -> bool:
    """Tell whether the kernel can take a product, and is faster than cuBLAS.

    Args:
        x: (M, K).
        factor: (K, r).

    Returns:
        What `FEWEST_ROWS` and `MOST_VALUES` say, where it fits.
    """
    return x.numel() <= MOST_VALUES and _serves(x, factor)


def _serves(x: Tensor, factor: Tensor) -> bool:
    return (
        x.shape[0] >= FEWEST_ROWS
        and x.dtype in _DTYPES
        and fits(x, factor)
        and architecture_of(x.device) == "sm_90a"
    )


def kernel_rank(r: int) -> int:
    """The ranks of the kernel that takes so many.

    Args:
        r: columns of the factor.

    Returns:
        A key of `SHAPES`; 0 where none does.

    Example:
        >>> kernel_rank(8), kernel_rank(16), kernel_rank(24), kernel_rank(12)
        (16, 16, 0, 0)
    """
    if r <= 0 or r % 8:
        return 0
    return next((rank for rank in SHAPES if r <= rank), 0)


def fits(x: Tensor, factor: Tensor) -> bool:
    """Tell whether rows are whole 16-byte pieces at 16-byte addresses, and few enough.

    Args:
        x: (M, K).
        factor: (K, r).

    Returns:
        Whether the kernel takes them.
    """
    (m, k), r = x.shape, factor.shape[1]
    stored = factor if is_turned(factor) else factor.T
    return (
        0 < m < _MOST_ROWS
        and 0 < k < _MOST_ROWS
        and kernel_rank(r) > 0
        and x.stride(1) == stored.stride(1) == 1
        and in_pieces(k, x)
        and in_pieces(stored.shape[1], stored)
    )


def is_turned(factor: Tensor) -> bool:
    """Tell whether a factor (K, r) is stored as it is, and not as its transpose."""
    return factor.stride(1) == 1


@lru_cache(maxsize=4096)
def plan(m: int, k: int, rank: int, processors: int) -> Plan:
    """Choose how a call is cut into blocks: as few as ask memory for enough at once.

    Args:
        m: rows of x; at least 1.
        k: columns of x; at least 1.
        rank: a key of `SHAPES`.
        processors: of the GPU.

    Returns:
        The shape of a block, and how many share a contraction.

    Example:
        >>> plan(2048, 4096, 16, 132)
        Plan(shape=Shape(tokens=32, columns=128, stages=4), team=4)
    """
    chosen = None
    for shape in SHAPES[rank]:
        ahead = (shape.stages - 1) * shape.tokens * shape.columns * 2
        tiles, most = -(-m // shape.tokens), min(_MOST_MEMBERS, -(-k // shape.columns))
        team = -(-IN_FLIGHT * processors // (ahead * tiles))
        chosen = Plan(shape, min(team, most))
        if team <= most:
            break
    assert chosen is not None
    return chosen


def run(
    x: Tensor,
    factor: Tensor,
    scale: float,
    out: Tensor,
    *,
    both: Tensor | None = None,
    zeros: Tensor | None = None,
    chosen: Plan | None = None,
    clustered: bool | None = None,
) -> None:
    """Run the kernel on operands that `fits` approves of.

    Args:
        x: (M, K).
        factor: (K, r).
        scale: the factor on the result.
        out: (M, r), written; its rows whole 16-byte pieces at 16-byte addresses, too.
        both: (M, K + r), written: x and the result side by side, as a product wants them whose
            contraction goes on over the ranks; x is read once for both. Rows as those of `out`.
        zeros: int32, set to zero besides, or None.
        chosen: how to cut it into blocks; by default what `plan` says.
        clustered: whether teams are clusters; by default where the GPU has clusters.
    """
    (m, k), r = x.shape, factor.shape[1]
    rank, turned = kernel_rank(r), is_turned(factor)
    stored = factor if turned else factor.T
    able = torch.cuda.get_device_capability(x.device) >= (9, 0)
    clustered = able if clustered is None else clustered
    if chosen is None:
        processors = torch.cuda.get_device_properties(x.device).multi_processor_count
        chosen = plan(m, k, rank, processors)
    shape, team = chosen
    tiles = -(-m // shape.tokens)
    sums = None
    if team > 1 and not clustered:
        sums = x.new_empty((team, m, rank), dtype=torch.float32)
    arguments = (
        *(x, stored, out, both, sums, m, k, r),
        *(x.stride(0), stored.stride(0), out.stride(0), 0 if both is None else both.stride(0)),
        *(team, float(scale), zeros, 0 if zeros is None else zeros.numel()),
    )
    kernels = _KERNELS[x.dtype, rank]
    kernels.launch(
        _name(x.dtype, rank, turned, shape),
        tiles if clustered else tiles * team,
        _THREADS,
        arguments,
        device=x.device,
        shared=shape.shared_bytes(rank, turned),
        cluster=team if clustered else 1,
        overlap=able,
    )
    if sums is not None:
        kernels.launch(
            f"low_rank_product_{_DTYPES[x.dtype]}_{rank}_add",
            -(-m * (r // 4) // _THREADS),
            _THREADS,
            arguments,
            device=x.device,
            overlap=able,
        )


def _name(dtype: torch.dtype, rank: int, turned: bool, shape: Shape) -> str:
    """A kernel's."""
    way = "turned_" if turned else ""
    return f"low_rank_product_{way}{_DTYPES[dtype]}_{rank}_{shape.tokens}"
