"""`nf4_linear` on Hopper: the product straight from the 4-bit weight, in both directions.

`kernels/nf4_linear/hopper/` decodes W in registers while the tensor cores work and
adds the low-rank product as extra steps of the contraction. Where a result has too
few tiles for the chip, blocks of a cluster share the contraction.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from qlora_kit.ops.jit import architecture_of
from qlora_kit.ops.launch import Kernels, tensor_map
from qlora_kit.ops.nf4_linear import low_rank
from qlora_kit.quant.weight import NF4Weight

_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}

_DEPTH = 64
_TABLE_BYTES = 256 * 32 * 8
_LOW_RANK_TILE = 32, 16
"""Tokens and ranks of a cluster of low_rank.cu."""


@dataclass(frozen=True, slots=True)
class _Shape:
    """What a block does, as in kernels/nf4_linear/hopper/shape.cuh."""

    tokens: int
    """Rows of the activations it takes."""
    stages: int
    """In flight."""
    groups: int
    """Warpgroups that decode."""
    tiles: int
    """Of 64 columns of the result, for each of them."""
    step: float
    """Measured time of 64 of the contraction, relative to a block of eight tokens."""

    @property
    def columns(self) -> int:
        """Columns of the result."""
        return 128 * self.tiles

    @property
    def sharing(self) -> int:
        """Blocks that bring in their common activations together."""
        return 2 if self.tiles == 1 else 1

    @property
    def threads(self) -> int:
        """Those that decode, and the warpgroup that brings tiles."""
        return 128 * (self.groups + 1)

    @property
    def shared(self) -> int:
        """Bytes of shared memory: table, stages, the 8-bit scales' map, barriers."""
        stage = self.tokens * _DEPTH * 2 + self.columns * (_DEPTH // 2 + 4)
        stage = -(-stage // 1024) * 1024
        return _TABLE_BYTES + self.stages * stage + 1024 + 16 * self.stages

    def packed_box(self, transposed: bool) -> tuple[tuple[int, int], int]:
        """Rows and bytes of a stage's weights, and how the copy engine permutes them."""
        if transposed:
            return (_DEPTH, self.columns // 2), self.columns // 2
        return (self.columns, _DEPTH // 2), 32

    def tiles_of(self, m: int, columns: int) -> int:
        """Blocks, or pairs of blocks that share, that cover a result."""
        return -(-m // self.tokens) * -(-columns // (self.columns * self.sharing))


_SHAPES = (
    _Shape(8, 12, 4, 2, 1.0),
    _Shape(16, 12, 4, 2, 1.02),
    _Shape(32, 10, 4, 2, 1.02),
    _Shape(64, 8, 2, 2, 1.13),
    _Shape(64, 10, 2, 1, 0.69),
    _Shape(128, 6, 2, 2, 1.39),
    _Shape(128, 7, 2, 1, 0.88),
    _Shape(256, 4, 2, 1, 1.19),
)
_FIXED = 8.8
"""What a block costs before and after its steps, in steps of eight tokens."""
_SPLIT = 0.26
"""What adding up a cluster's sums costs besides."""
_SPLIT_TILE = 1.47
"""And per 16 tokens x 256 columns of a block. All of these are fitted to 942 times of 54 products
on one H100; what they choose is 0.3% slower on average than the best that was measured."""

_LOW_RANK = Kernels("nf4_linear/hopper/low_rank.cu")
_FUSED = {
    (dtype, shape): Kernels(f"nf4_linear/hopper/{name}_{shape.tokens}x{shape.columns}.cu")
    for dtype, name in _NAMES.items()
    for shape in _SHAPES
}


def serves(x: Tensor, weight: NF4Weight) -> bool:
    """Tell whether a call can run here.

    Args:
        x: (M, K) or, for the transposed product, (M, N).
        weight: (N, K).

    Returns:
        True on Hopper for bfloat16 and float16, K a multiple of 256, N of 8, scales per
        64 weights.
    """
    n, k = weight.shape
    return (
        x.dtype in _NAMES
        and x.shape[0] > 0
        and k % 256 == 0
        and n % 8 == 0
        and weight.block_size == 64
        and weight.packed.data_ptr() % 16 == 0
        and weight.absmax.data_ptr() % 16 == 0
        and weight.packed.is_contiguous()
        and architecture_of(x.device) == "sm_90a"
    )


def multiply(
    x: Tensor, weight: NF4Weight, bias: Tensor | None, xa: Tensor | None, lora_b: Tensor | None
) -> Tensor:
    """Compute x·Wᵀ + xa·Bᵀ + bias.

    Args:
        x: (M, K), on a Hopper GPU, aligned to 16 bytes.
        weight: (N, K).
        bias: (N,) in the dtype of x, or None.
        xa: (M, r) in the dtype of x, or None.
        lora_b: (N, r) in the dtype of x, or None.

    Returns:
        (M, N) in the dtype of x.
    """
    if xa is not None and lora_b is not None:
        xa, lora_b = in_eights(xa), in_eights(lora_b)
    return _launch("", x, weight, bias, xa, lora_b, False)


def multiply_transposed(
    dy: Tensor, weight: NF4Weight, dyb: Tensor | None, lora_a: Tensor | None
) -> Tensor:
    """Compute dy·W + dyb·A.

    Args:
        dy: (M, N), on a Hopper GPU, aligned to 16 bytes.
        weight: (N, K).
        dyb: (M, r) in the dtype of dy, or None.
        lora_a: (r, K) in the dtype of dy, or None.

    Returns:
        (M, K) in the dtype of dy.
    """
    if dyb is not None and lora_a is not None:
        dyb, lora_a = in_eights(dyb), in_eights(lora_a.T).T.contiguous()
    return _launch("_transposed", dy, weight, None, dyb, lora_a, False)


def multiply_low_rank(
    x: Tensor,
    weight: NF4Weight,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute xa = scale·x·Aᵀ and x·Wᵀ + xa·Bᵀ + bias, the second beginning during the first.

    Args:
        x: (M, K), on a Hopper GPU, aligned to 16 bytes.
        weight: (N, K).
        bias: (N,) in the dtype of x, or None.
        lora_a: (r, K) in the dtype of x, r a multiple of 8.
        lora_b: (N, r) in the dtype of x.
        scale: factor on the low-rank product.

    Returns:
        (M, N) and xa, (M, r), in the dtype of x.
    """
    xa = small_product("", x, lora_a, lora_a.shape[0], scale)
    return _launch("", x, weight, bias, xa, lora_b, True), xa


def multiply_transposed_low_rank(
    dy: Tensor, weight: NF4Weight, lora_a: Tensor, lora_b: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute dyb = scale·dy·B and dy·W + dyb·A, the second beginning during the first.

    Args:
        dy: (M, N), on a Hopper GPU, aligned to 16 bytes.
        weight: (N, K).
        lora_a: (r, K) in the dtype of dy, r a multiple of 8.
        lora_b: (N, r) in the dtype of dy.
        scale: factor on the low-rank product.

    Returns:
        (M, K) and dyb, (M, r), in the dtype of dy.
    """
    dyb = small_product("_transposed", dy, lora_b, lora_b.shape[1], scale)
    return _launch("_transposed", dy, weight, None, dyb, lora_a, True), dyb


def in_eights(matrix: Tensor) -> Tensor:
    """Make rows whole 16-byte pieces at 16-byte addresses.

    Args:
        matrix: (M, r), 16-bit.

    Returns:
        (M, r'), r' the next multiple of eight, zeros in the columns that were added.

    Example:
        >>> in_eights(torch.ones(2, 12)).shape
        torch.Size([2, 16])
    """
    columns = -matrix.shape[1] % 8
    if columns:
        return torch.nn.functional.pad(matrix, (0, columns))
    return matrix if matrix.data_ptr() % 16 == 0 else matrix.clone()


def small_product(kind: str, x: Tensor, factor: Tensor, rank: int, scale: float) -> Tensor:
    """Compute LoRA's small product by the faster way, so that the next kernel may begin early.

    Args:
        kind: empty, or `_transposed`.
        x: (M, K), on a Hopper GPU, contiguous.
        factor: (r, K), or (K, r) if transposed, contiguous.
        rank: r, a multiple of eight.
        scale: the factor on the result.

    Returns:
        (M, r) in the dtype of x.
    """
    if x.shape[0] >= low_rank.FEWEST_ROWS:
        return low_rank.product(x, factor if kind else factor.T, scale)
    small = x.new_empty((x.shape[0], rank))
    product_of_few_rows(kind, x, factor, scale, small)
    return small


def makes_small_product(kind: str, x: Tensor, factor: Tensor) -> bool:
    """Tell whether `small_product` launches a kernel of ours, and not one of cuBLAS.

    Args:
        kind: as there.
        x: as there.
        factor: as there.

    Returns:
        True below `low_rank.FEWEST_ROWS`; above, where `low_rank` has a kernel that is faster.
    """
    few = x.shape[0] < low_rank.FEWEST_ROWS
    return few or low_rank.is_faster(x, factor if kind else factor.T)


def product_of_few_rows(kind: str, x: Tensor, factor: Tensor, scale: float, small: Tensor) -> None:
    """Compute scale·x·factorᵀ, or scale·x·factor, by a kernel that lets the next one begin.

    Args:
        kind: empty, or `_transposed`.
        x: (M, K), contiguous.
        factor: (r, K), or (K, r) if transposed, contiguous.
        scale: the factor on the result.
        small: (M, r), written; r a multiple of 8.
    """
    (m, contraction), rank = x.shape, small.shape[1]
    tokens, ranks = _LOW_RANK_TILE
    tiles = -(-m // tokens)
    _LOW_RANK.launch(
        f"nf4_low_rank{kind}_{_NAMES[x.dtype]}",
        (tiles, -(-rank // ranks)),
        256,
        (x, factor, small, m, contraction, rank, scale),
        device=x.device,
        cluster=max(1, min(8, 256 // tiles)),
    )


def _launch(
    kind: str,
    x: Tensor,
    weight: NF4Weight,
    bias: Tensor | None,
    small: Tensor | None,
    factor: Tensor | None,
    overlap: bool,
) -> Tensor:
    n, k = weight.shape
    m, contraction = x.shape
    columns = k if kind else n
    shape, split = tiling(m, columns, contraction, _clusters(x.device))
    out = x.new_empty((m, columns))
    packed = weight.packed.view(n, k // 2)
    box = (shape.tokens // shape.sharing, _DEPTH)
    x_map = tensor_map(x, box, 128)
    _FUSED[x.dtype, shape].launch(
        f"nf4_fused{kind}",
        shape.tiles_of(m, columns),
        shape.threads,
        (
            x_map,
            tensor_map(packed, *shape.packed_box(bool(kind))),
            x_map if small is None else tensor_map(small, box, 128),
            weight.packed,
            weight.absmax,
            weight.nested_absmax,
            weight.offset,
            bias,
            factor,
            out,
            m,
            n,
            k,
            0 if small is None else small.shape[1],
        ),
        device=x.device,
        shared=shape.shared,
        cluster=split * shape.sharing,
        overlap=overlap,
    )
    return out


@lru_cache(maxsize=64)
def _clusters(device: torch.device) -> tuple[int, ...]:  # needs a GPU
    """How many clusters of 1, 2, ... 8 blocks the GPU holds at once; no two chips are alike."""
    shape = _SHAPES[1]
    kernels = _FUSED[torch.bfloat16, shape]
    return tuple(
        kernels.most_clusters("nf4_fused", shape.threads, shape.shared, size, device)
        for size in range(1, 9)
    )


@lru_cache(maxsize=4096)
def tiling(m: int, columns: int, contraction: int, clusters: tuple[int, ...]) -> tuple[_Shape, int]:
    """Choose how a product is cut into blocks.

    The least time by a simple model: rounds of clusters, each costing its steps along the
    contraction and what starting, ending and adding up cost.

    Args:
        m: rows of the activations.
        columns: of the result.
        contraction: length of the sums.
        clusters: how many clusters of 1, 2, ... blocks the GPU holds at once.

    Returns:
        The shape of a block, and how many share a contraction.

    Example:
        >>> shape, split = tiling(16, 4096, 4096, (132, 66, 44, 32, 26, 22, 18, 16))
        >>> shape.tokens, split
        (16, 8)
    """
    quads = -(-contraction // (4 * _DEPTH))

    def cost(choice: tuple[_Shape, int]) -> float:
        shape, split = choice
        rounds = -(-shape.tiles_of(m, columns) // max(1, clusters[split * shape.sharing - 1]))
        each = 4 * -(-quads // split) * shape.step + _FIXED
        tile = shape.tokens / 16 * shape.columns / 256
        return rounds * (each + (_SPLIT + _SPLIT_TILE * tile if split > 1 else 0))

    most = next((shape.tokens for shape in _SHAPES if shape.tokens >= m), _SHAPES[-1].tokens)
    choices = [
        (shape, split)
        for shape in _SHAPES
        if shape.tokens == most or most > shape.tokens >= 32
        for split in range(1, min(len(clusters) // shape.sharing, quads) + 1)
    ]
    return min(choices, key=cost)
