"""`low_rank_product` at the rate at which memory gives X.

A block of `kernels/low_rank_product` takes 32, 64 or 128 rows, and brings X and the
narrow factor to its processor while the tensor cores work on what came before. Where
that makes too few blocks for the chip, a team of up to eight shares the contraction: a
cluster, which adds its sums up in a fixed order; before Hopper, a second kernel adds them
from a float32 workspace. Results are the same bits every time.

`is_faster` says where it is the faster way. Elsewhere cuBLAS does it.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from qlora_kit.core.log import log_once
from qlora_kit.ops.jit import architecture_of
from qlora_kit.ops.launch import Kernels
from qlora_kit.ops.layout import in_pieces
from qlora_kit.ops.low_rank_product import reference
from qlora_kit.ops.nf4_dequantize import cuda as nf4_dequantize

_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}

# As in low_rank_product.cuh.
_THREADS = 256
_MOST_MEMBERS = 8
_MOST_ROWS = 2**26
"""The kernels count in 32 bits."""

FEWEST_ROWS = 512
FEWEST_VALUES = {16: 1 << 20, 32: 1 << 20, 48: 1 << 20, 64: 1 << 20}
"""Where the kernel is used: on Hopper, from so many rows on, and by ranks, rounded up, from so
many values of X on. Not timed elsewhere."""


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
    16: (Shape(128, 64, 4), Shape(64, 64, 6), Shape(32, 128, 4)),
    32: (Shape(128, 64, 4), Shape(64, 64, 6), Shape(32, 128, 4)),
    48: (Shape(128, 64, 4), Shape(64, 64, 5), Shape(32, 128, 4)),
    64: (Shape(128, 64, 4), Shape(64, 64, 5), Shape(32, 128, 4)),
    96: (Shape(128, 64, 3), Shape(64, 64, 4)),
    128: (Shape(128, 64, 3), Shape(64, 64, 4)),
}
"""The kernel's ranks to its shapes."""

_KERNELS = {
    (dtype, rank): Kernels(f"low_rank_product/{name}_{rank}.cu")
    for dtype, name in _DTYPES.items()
    for rank in SHAPES
}

# What `plan` reckons with, in microseconds and bytes; of an H100, of which only ratios matter.
_BANDWIDTH = 3.0e6
_FACTOR = 0.4
"""What a byte of the factor costs, which the L2 cache has, to one of X."""
_LATENCY = 1.2
"""From asking for a stage to having it."""
_START = 1.0
_MEET = 0.7
"""Adding a cluster's sums up."""
_SECOND_KERNEL = 2.0


class Plan(NamedTuple):
    """How a call is cut into blocks."""

    shape: Shape
    team: int
    """Blocks that share a contraction."""


def serves(tensor: Tensor) -> bool:
    """Tell whether a call on this tensor can run here: 16-bit dtypes, any GPU from Ampere on."""
    return tensor.dtype in _DTYPES and nf4_dequantize.serves(tensor)


def product(x: Tensor, factor: Tensor, scale: float, out: Tensor) -> None:
    """Compute scale·x·factor; see `reference.product`.

    Args:
        x: (M, K), on a CUDA device.
        factor: (K, r), one of its dimensions contiguous.
        scale: the factor on the result.
        out: (M, r), written.
    """
    if is_faster(x, factor, out):
        log_once("low_rank_product: kernel")
        run(x, factor, scale, out)
        return
    log_once("low_rank_product: cuBLAS")
    reference.product(x, factor, scale, out)


def is_faster(x: Tensor, factor: Tensor, out: Tensor) -> bool:
    """Tell whether the kernel is the fastest way.

    Args:
        x: (M, K).
        factor: (K, r).
        out: (M, r).

    Returns:
        What `FEWEST_ROWS` and `FEWEST_VALUES` say, where the kernel fits.
    """
    (m, k), r = x.shape, factor.shape[1]
    return (
        is_large(m, k, r)
        and x.dtype in _DTYPES
        and architecture_of(x.device) == "sm_90a"
        and fits(x, factor, out)
    )


def is_large(m: int, k: int, r: int) -> bool:
    """Tell whether a product is one that the kernel is meant for.

    Args:
        m: rows of x.
        k: columns of x.
        r: columns of the factor.

    Returns:
        Whether `FEWEST_ROWS` and `FEWEST_VALUES` are reached.

    Example:
        >>> is_large(8192, 4096, 16), is_large(64, 4096, 16), is_large(8192, 4096, 12)
        (True, False, False)
    """
    rank = kernel_rank(r)
    return m >= FEWEST_ROWS and m * k >= FEWEST_VALUES.get(rank, m * k + 1)


def kernel_rank(r: int) -> int:
    """The ranks of the kernel that takes so many.

    Args:
        r: columns of the factor.

    Returns:
        A key of `SHAPES`; 0 where none does.

    Example:
        >>> kernel_rank(8), kernel_rank(72), kernel_rank(136), kernel_rank(12)
        (16, 96, 0, 0)
    """
    if r <= 0 or r % 8:
        return 0
    return next((rank for rank in SHAPES if r <= rank), 0)


def fits(x: Tensor, factor: Tensor, out: Tensor) -> bool:
    """Tell whether rows are whole 16-byte pieces at 16-byte addresses, and few enough.

    Args:
        x: (M, K).
        factor: (K, r).
        out: (M, r).

    Returns:
        Whether the kernel takes them.
    """
    (m, k), r = x.shape, factor.shape[1]
    stored = factor if is_turned(factor) else factor.T
    return (
        0 < m < _MOST_ROWS
        and 0 < k < _MOST_ROWS
        and kernel_rank(r) > 0
        and x.stride(1) == stored.stride(1) == out.stride(1) == 1
        and in_pieces(k, x)
        and in_pieces(stored.shape[1], stored)
        and in_pieces(r, out)
    )


def is_turned(factor: Tensor) -> bool:
    """Tell whether a factor (K, r) is stored as it is, and not as its transpose."""
    return factor.stride(1) == 1


def scaled_product(x: Tensor, factor: Tensor, scale: float) -> Tensor:
    """Compute scale·x·factor as `product` does, into a new tensor.

    Args:
        x: (M, K), on a CUDA device.
        factor: (K, r), one of its dimensions contiguous.
        scale: the factor on the result.

    Returns:
        (M, r).
    """
    out = x.new_empty((x.shape[0], factor.shape[1]))
    product(x, factor, scale, out)
    return out


@lru_cache(maxsize=4096)
def plan(
    m: int,
    k: int,
    rank: int,
    turned: bool,
    clusters: tuple[tuple[int, ...], ...],
    processors: int,
    clustered: bool,
) -> Plan:
    """Choose how a call is cut into blocks: the least time by a simple model.

    Rounds of blocks, each taking what its bytes take at the memory's rate, or what one block
    takes that waits for its own stages.

    Args:
        m: rows of x.
        k: columns of x.
        rank: a key of `SHAPES`.
        turned: whether the factor is stored as (K, r).
        clusters: per shape, how many clusters of 1, 2, ... blocks the GPU holds at once.
        processors: of the GPU.
        clustered: whether teams are clusters.

    Returns:
        The shape of a block, and how many share a contraction.

    Example:
        >>> held = ((264, 132, 88, 66, 52, 44, 36, 32),) * 3
        >>> plan(8192, 4096, 16, False, held, 132, True)
        Plan(shape=Shape(tokens=128, columns=64, stages=4), team=4)
    """

    def cost(choice: tuple[int, int]) -> float:
        index, team = choice
        shape = SHAPES[rank][index]
        tiles, stages = -(-m // shape.tokens), -(-k // (shape.columns * team))
        x_bytes, f_bytes = shape.bytes_of_x(), shape.bytes_of_factor(rank, turned)
        own = stages * (x_bytes + _FACTOR * f_bytes) / _BANDWIDTH
        alone = max(1.0, stages / (shape.stages - 1)) * _LATENCY

        def round_of(teams: int) -> float:
            blocks = teams * team
            return max(max(blocks, processors) * own, alone) + _START

        at_once = max(1, clusters[index][team - 1])
        whole, rest = divmod(tiles, at_once)
        time = whole * round_of(at_once) + (round_of(rest) if rest else 0.0)
        if team > 1:
            sums = 2 * 4 * team * m * rank / _BANDWIDTH
            time += _MEET if clustered else _SECOND_KERNEL + sums
        return time

    choices = [
        (index, team)
        for index, shape in enumerate(SHAPES[rank])
        for team in range(1, min(_MOST_MEMBERS, -(-k // shape.columns)) + 1)
    ]
    index, team = min(choices, key=cost)
    return Plan(SHAPES[rank][index], team)


def run(
    x: Tensor,
    factor: Tensor,
    scale: float,
    out: Tensor,
    *,
    chosen: Plan | None = None,
    clustered: bool | None = None,
) -> None:
    """Run the kernel; arguments as `product`, which `fits` approves of.

    Args:
        x: (M, K).
        factor: (K, r).
        scale: the factor on the result.
        out: (M, r), written.
        chosen: how to cut it into blocks; by default what `plan` says.
        clustered: whether teams are clusters; by default where the GPU has clusters.
    """
    (m, k), r = x.shape, factor.shape[1]
    rank, turned = kernel_rank(r), is_turned(factor)
    stored = factor if turned else factor.T
    able = torch.cuda.get_device_capability(x.device) >= (9, 0)
    clustered = able if clustered is None else clustered
    if chosen is None:
        clusters, processors = held(x.device, x.dtype, rank, turned, clustered)
        chosen = plan(m, k, rank, turned, clusters, processors, clustered)
    shape, team = chosen
    tiles = -(-m // shape.tokens)
    sums = None
    if team > 1 and not clustered:
        sums = x.new_empty((team, m, rank), dtype=torch.float32)
    arguments = (
        *(x, stored, out, sums, m, k, r),
        *(x.stride(0), stored.stride(0), out.stride(0), team, float(scale)),
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


@lru_cache(maxsize=64)
def held(  # needs a GPU
    device: torch.device, dtype: torch.dtype, rank: int, turned: bool, clustered: bool
) -> tuple[tuple[tuple[int, ...], ...], int]:
    """Ask a GPU what `plan` wants to know of it.

    Args:
        device: a CUDA device.
        dtype: of x.
        rank: a key of `SHAPES`.
        turned: whether the factor is stored as (K, r).
        clustered: whether teams are clusters.

    Returns:
        Per shape, how many teams of 1, 2, ... blocks it holds at once; its processors.
    """
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    found = []
    for shape in SHAPES[rank]:
        name, shared = _name(dtype, rank, turned, shape), shape.shared_bytes(rank, turned)

        def most(size: int, name: str = name, shared: int = shared) -> int:
            if clustered:
                return _KERNELS[dtype, rank].most_clusters(name, _THREADS, shared, size, device)
            return _KERNELS[dtype, rank].most_clusters(name, _THREADS, shared, 1, device) // size

        found.append(tuple(most(size) for size in range(1, _MOST_MEMBERS + 1)))
    return tuple(found), processors
