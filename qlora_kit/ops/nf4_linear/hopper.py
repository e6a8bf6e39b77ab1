"""`nf4_linear` on Hopper: the product straight from the 4-bit weight, in both directions.

`kernels/nf4_linear/hopper/` decodes W in registers while the tensor cores work and
adds the low-rank product as extra steps of the contraction. Where the result's tiles do not
fill the chip evenly, blocks or clusters share their contractions (`hopper_tiling`).
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from qlora_kit.ops.jit import architecture_of
from qlora_kit.ops.launch import Kernels, tensor_map
from qlora_kit.ops.nf4_linear import low_rank
from qlora_kit.ops.nf4_linear.early import may_be_read_early
from qlora_kit.ops.nf4_linear.hopper_tiling import (
    DEPTH,
    SHAPES,
    SMALL_PARTS,
    SMALL_RANKS,
    Cut,
    sums_bytes,
    tiling,
)
from qlora_kit.ops.nf4_linear.words import WORDS
from qlora_kit.quant.weight import NF4Weight

_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}

_MOST_PRODUCTS = 1 << 47
"""M x N x K: a cut's stretches are counted in 32 bits, and up to here there is one (`tiling`)."""
_LOW_RANK_TILE = 32, 16
"""Tokens and ranks of a cluster of low_rank.cu."""
_SMALL_WORDS = 16
"""Before the counters of tiles: a launch that makes the small product counts in the first six."""


class _Meeting(NamedTuple):
    """Where clusters that make one tile leave their sums."""

    sums: Tensor
    """float32, not initialised."""
    arrived: Tensor
    """int32, zeros when the kernel begins to count, and when it has ended."""


class _Small(NamedTuple):
    """What a launch that makes the small product itself needs."""

    x: Tensor
    factor: Tensor
    out: Tensor
    parts: Tensor
    """float32, sums of blocks that share a tile; not initialised."""
    words: Tensor
    """int32, zeros when the kernel begins, and when it has ended."""


_LOW_RANK = Kernels("nf4_linear/hopper/low_rank.cu")
_FUSED = {
    (dtype, shape): Kernels(f"nf4_linear/hopper/{name}_{shape.tokens}x{shape.columns}.cu")
    for dtype, name in _NAMES.items()
    for shape in SHAPES
}


def serves(x: Tensor, weight: NF4Weight) -> bool:
    """Tell whether a call can run here.

    Args:
        x: (M, K) or, for the transposed product, (M, N).
        weight: (N, K).

    Returns:
        True on Hopper for bfloat16 and float16, K a multiple of 256, N of 8, scales per
        64 weights; products of up to 2⁴⁷ terms.
    """
    n, k = weight.shape
    return (
        x.dtype in _NAMES
        and 0 < x.shape[0] * n * k < _MOST_PRODUCTS
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
    return _multiply("", x, weight, bias, xa, lora_b)


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
    return _multiply("_transposed", dy, weight, None, dyb, lora_a)


def multiply_low_rank(
    x: Tensor,
    weight: NF4Weight,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute xa = scale·x·Aᵀ and x·Wᵀ + xa·Bᵀ + bias, at once or the second beginning early.

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
    return _multiply_low_rank("", x, weight, bias, lora_a, lora_b, scale)


def multiply_transposed_low_rank(
    dy: Tensor, weight: NF4Weight, lora_a: Tensor, lora_b: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute dyb = scale·dy·B and dy·W + dyb·A, at once or the second beginning early.

    Args:
        dy: (M, N), on a Hopper GPU, aligned to 16 bytes.
        weight: (N, K).
        lora_a: (r, K) in the dtype of dy, r a multiple of 8.
        lora_b: (N, r) in the dtype of dy.
        scale: factor on the low-rank product.

    Returns:
        (M, K) and dyb, (M, r), in the dtype of dy.
    """
    return _multiply_low_rank("_transposed", dy, weight, None, lora_b, lora_a, scale)


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


def small_product(
    kind: str, x: Tensor, factor: Tensor, rank: int, scale: float, zeros: Tensor | None = None
) -> Tensor:
    """Compute LoRA's small product by the faster way, so that the next kernel may begin early.

    Args:
        kind: empty, or `_transposed`.
        x: (M, K), on a Hopper GPU, contiguous.
        factor: (r, K), or (K, r) if transposed, contiguous.
        rank: r, a multiple of eight.
        scale: the factor on the result.
        zeros: int32, counters of the next kernel, set to zero besides; or None.

    Returns:
        (M, r) in the dtype of x.
    """
    if x.shape[0] >= low_rank.FEWEST_ROWS:
        return low_rank.product(x, factor if kind else factor.T, scale, zeros)
    small = x.new_empty((x.shape[0], rank))
    product_of_few_rows(kind, x, factor, scale, small, zeros)
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


def product_of_few_rows(
    kind: str,
    x: Tensor,
    factor: Tensor,
    scale: float,
    small: Tensor,
    zeros: Tensor | None = None,
) -> None:
    """Compute scale·x·factorᵀ, or scale·x·factor, by a kernel that lets the next one begin.

    Args:
        kind: empty, or `_transposed`.
        x: (M, K), contiguous.
        factor: (r, K), or (K, r) if transposed, contiguous.
        scale: the factor on the result.
        small: (M, r), written; r a multiple of 8.
        zeros: as `small_product` has it.
    """
    (m, contraction), rank = x.shape, small.shape[1]
    tokens, ranks = _LOW_RANK_TILE
    tiles, words = -(-m // tokens), 0 if zeros is None else zeros.numel()
    _LOW_RANK.launch(
        f"nf4_low_rank{kind}_{_NAMES[x.dtype]}",
        (tiles, -(-rank // ranks)),
        256,
        (x, factor, small, zeros, words, m, contraction, rank, scale),
        device=x.device,
        cluster=max(1, min(8, 256 // tiles)),
        overlap=True,
    )


def _multiply_low_rank(
    kind: str,
    x: Tensor,
    weight: NF4Weight,
    bias: Tensor | None,
    first: Tensor,
    second: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The factor that meets x comes first."""
    rank = first.shape[1 if kind else 0]
    plan = _plan(kind, x, weight, rank)
    if plan.makers and plan.words is not None:
        small = x.new_empty((x.shape[0], rank))
        size = SMALL_PARTS * plan.cut.shape.small_tokens * SMALL_RANKS
        parts = x.new_empty(size, dtype=torch.float32)
        made = _Small(x, first, small, parts, plan.words)
        return _launch(kind, x, weight, bias, small, second, plan, made, scale), small
    small = small_product(kind, x, first, rank, scale, plan.to_be_zeroed)
    settled = makes_small_product(kind, x, first)
    return _launch(kind, x, weight, bias, small, second, plan, settled=settled), small


def _multiply(
    kind: str,
    x: Tensor,
    weight: NF4Weight,
    bias: Tensor | None,
    small: Tensor | None,
    factor: Tensor | None,
) -> Tensor:
    """With a small product that has been made, or without."""
    plan = _plan(kind, x, weight, 0)
    if plan.to_be_zeroed is not None:
        set_to_zero(plan.to_be_zeroed)
    return _launch(kind, x, weight, bias, small, factor, plan)


def set_to_zero(words: Tensor) -> None:
    """Set counters to zero by a kernel that lets the next one, which counts, begin.

    Args:
        words: int32, written.
    """
    arguments = words, words.numel()
    _LOW_RANK.launch("nf4_zeros", 1, 256, arguments, device=words.device, overlap=True)


class _Plan(NamedTuple):
    """How a launch is cut, and what its blocks meet in."""

    cut: Cut
    makers: int
    """Clusters beside those of the cut, which make the small product."""
    words: Tensor | None
    """int32, that a launch which makes the small product counts in."""
    meeting: _Meeting | None
    to_be_zeroed: Tensor | None
    """Words of the meeting that are not zero yet."""
    out: Tensor
    """The result; not initialised. Made before the small product is launched, whose kernel waits
    for whoever used this memory last."""


def _plan(kind: str, x: Tensor, weight: NF4Weight, rank: int) -> _Plan:
    """With a rank, for a launch that may make the small product itself."""
    columns = weight.shape[1] if kind else weight.shape[0]
    m, contraction = x.shape
    cut, makers = tiling(m, columns, contraction, _clusters(x.device), rank)
    tiles = cut.shape.tiles_of(m, columns)
    size = sums_bytes(cut, tiles)
    count = tiles * cut.shape.sharing if size else 0
    words = WORDS.take(x.device, _SMALL_WORDS + count) if rank or count else None
    out = x.new_empty((m, columns))
    if not size:
        return _Plan(cut, makers, words, None, None, out)
    sums = x.new_empty(size // 4, dtype=torch.float32)
    if words is None:
        arrived = x.new_empty(count, dtype=torch.int32)
        return _Plan(cut, makers, None, _Meeting(sums, arrived), arrived, out)
    return _Plan(cut, makers, words, _Meeting(sums, words[_SMALL_WORDS:]), None, out)


def _launch(
    kind: str,
    x: Tensor,
    weight: NF4Weight,
    bias: Tensor | None,
    small: Tensor | None,
    factor: Tensor | None,
    plan: _Plan,
    made: _Small | None = None,
    scale: float = 1.0,
    *,
    settled: bool = False,
) -> Tensor:
    """`settled`: the kernel before began when all before that had ended."""
    n, k = weight.shape
    m = x.shape[0]
    shape, split, clusters = plan.cut
    makers = 0 if made is None else plan.makers
    packed = weight.packed.view(n, k // 2)
    box = (shape.tokens // shape.sharing, DEPTH)
    x_map = tensor_map(x, box, 128)
    _FUSED[x.dtype, shape].launch(
        f"nf4_fused{kind}",
        clusters + makers,
        shape.threads,
        (
            x_map,
            tensor_map(packed, *shape.packed_box(bool(kind))),
            x_map if small is None else tensor_map(small, box, 128),
            *(weight.packed, weight.absmax, weight.nested_absmax, weight.offset),
            *(bias, factor, plan.out, *(plan.meeting or (None, None))),
            *(made or (None, None, None, None, None)),
            *(m, n, k, 0 if small is None else small.shape[1], makers, int(settled), scale),
        ),
        device=x.device,
        shared=shape.shared,
        cluster=split * shape.sharing,
        overlap=may_be_read_early(weight) or settled or plan.to_be_zeroed is not None,
    )
    return plan.out


@lru_cache(maxsize=64)
def _clusters(device: torch.device) -> tuple[int, ...]:  # needs a GPU
    """How many clusters of 1, 2, ... 8 blocks the GPU holds at once; no two chips are alike."""
    shape = SHAPES[1]
    kernels = _FUSED[torch.bfloat16, shape]
    return tuple(
        kernels.most_clusters("nf4_fused", shape.threads, shape.shared, size, device)
        for size in range(1, 9)
    )
