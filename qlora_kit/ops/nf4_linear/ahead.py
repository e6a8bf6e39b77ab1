"""`nf4_linear` on Hopper for many rows: tensor cores on weights decoded ahead of them.

A launch of `kernels/nf4_linear/hopper/ahead/` decodes W to 16 bits, in memory, while it
multiplies: three warps of each block decode strips in the order in which tiles want
them, and a tile begins as soon as its first weights are there. So decoding runs beside
the products; how much of it that hides is in docs/kernels.md. LoRA is a few more steps
of the contraction. Where tiles are many and ranks few, its small product is made in the same
launch: for tiles of the first columns that is one narrow product more, on activations that
are in shared memory anyway, and other tiles of the same rows wait for it at their end. The
decoded weight is a temporary of the caching allocator, as large as one layer.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from qlora_kit.ops.launch import Kernels, tensor_map
from qlora_kit.ops.nf4_linear import hopper
from qlora_kit.quant.weight import NF4Weight

_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}

# As in kernels/nf4_linear/hopper/ahead/parts.cuh.
_TOKENS = 128
_DEPTH = 64
_CELL_DEPTH = 128
_DECODERS = 3
_MULTIPLIERS = 8
_THREADS = 32 * (1 + _DECODERS + _MULTIPLIERS)
_WORDS_BEFORE = 64
_RANKS = 16
_NOTES = 8
_STAGES = {256: 4, 128: 6}
"""Columns of a block to stages in flight."""

_PAIRS_TOGETHER = 8
"""Pairs of blocks along the rows that work on the same columns at once."""

_HELPING_ROWS = 1024
"""Most rows for which warps that multiply decode a strip first: with few, decoding is what tiles
wait for; with more, that only delays the first of them."""

_WIDE_ENOUGH_TO_SHARE = 2048
"""Fewest columns of a result whose last round of tiles is counted as shared: see `columns_of`."""

_KERNELS = {
    (dtype, columns): Kernels(f"nf4_linear/hopper/ahead/{name}_{columns}.cu")
    for dtype, name in _NAMES.items()
    for columns in _STAGES
}

serves = hopper.serves


class _Narrow(NamedTuple):
    """What a launch makes the small product of."""

    factor: Tensor
    """(r, K) or, transposed, (N, r), r at most `_RANKS`."""
    scale: float


class _Workspace(NamedTuple):
    """What a launch works in."""

    decoded: Tensor
    """(N, K)."""
    state: Tensor
    """Zeros: counts of strips and tiles, then a word for each cell and for 128 rows each."""
    columns: int
    """Of a block."""
    out: Tensor
    """(M, N) or, transposed, (M, K)."""


def multiply(
    x: Tensor, weight: NF4Weight, bias: Tensor | None, xa: Tensor | None, lora_b: Tensor | None
) -> Tensor:
    """Compute x·Wᵀ + xa·Bᵀ + bias.

    Args:
        x: (M, K), on a Hopper GPU, aligned to 16 bytes.
        weight: (N, K).
        bias: (N,) in the dtype of x, aligned to 16 bytes, or None.
        xa: (M, r) in the dtype of x, or None.
        lora_b: (N, r) in the dtype of x, or None.

    Returns:
        (M, N) in the dtype of x.
    """
    if xa is not None and lora_b is not None:
        xa, lora_b = hopper.in_eights(xa), hopper.in_eights(lora_b)
    space = _workspace(x, weight, False)
    return _launch("", x, weight, bias, xa, lora_b, space, overlap=xa is None)


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
        dyb, lora_a = hopper.in_eights(dyb), hopper.in_eights(lora_a.T).T.contiguous()
    space = _workspace(dy, weight, True)
    return _launch("_transposed", dy, weight, None, dyb, lora_a, space, overlap=dyb is None)


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
        bias: (N,) in the dtype of x, aligned to 16 bytes, or None.
        lora_a: (r, K) in the dtype of x, r a multiple of 8, contiguous, aligned to 16 bytes.
        lora_b: (N, r) in the dtype of x, likewise.
        scale: factor on the low-rank product.

    Returns:
        (M, N) and xa, (M, r), in the dtype of x.
    """
    return _multiply_low_rank("", x, weight, bias, lora_a, lora_b, scale)


def multiply_transposed_low_rank(
    dy: Tensor, weight: NF4Weight, lora_a: Tensor, lora_b: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute dyb = scale·dy·B and dy·W + dyb·A, the second beginning during the first.

    Args:
        dy: (M, N), on a Hopper GPU, aligned to 16 bytes.
        weight: (N, K).
        lora_a: (r, K) in the dtype of dy, r a multiple of 8, contiguous, aligned to 16 bytes.
        lora_b: (N, r) in the dtype of dy, likewise.
        scale: factor on the low-rank product.

    Returns:
        (M, K) and dyb, (M, r), in the dtype of dy.
    """
    return _multiply_low_rank("_transposed", dy, weight, None, lora_b, lora_a, scale)


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
    space = _workspace(x, weight, bool(kind))
    rank = first.shape[1 if kind else 0]
    if makes_small_product(x.shape[0], space.out.shape[1], rank, _pairs(x.device)):
        small = x.new_empty((x.shape[0], rank))
        narrow = _Narrow(first, scale)
        return _launch(kind, x, weight, bias, small, second, space, narrow=narrow), small
    # The small product's kernel lets the next one begin only when all before itself, the zeros and
    # whatever used this memory, has ended. Of cuBLAS's kernels that is not known.
    small = hopper.small_product(kind, x, first, rank, scale)
    overlap = hopper.makes_small_product(kind, x, first)
    return _launch(kind, x, weight, bias, small, second, space, overlap=overlap), small


def _workspace(x: Tensor, weight: NF4Weight, transposed: bool) -> _Workspace:
    n, k = weight.shape
    contraction, width = (n, k) if transposed else (k, n)
    columns = columns_of(x.shape[0], width, _pairs(x.device))
    cells = -(-width // columns) * -(-contraction // _CELL_DEPTH)
    rows = 2 * -(-x.shape[0] // (2 * _TOKENS))
    state = torch.empty(_WORDS_BEFORE + cells + rows, dtype=torch.int32, device=x.device)
    hopper.set_to_zero(state)
    out = x.new_empty((x.shape[0], width))
    return _Workspace(x.new_empty((n, k)), state, columns, out)


def _launch(
    kind: str,
    x: Tensor,
    weight: NF4Weight,
    bias: Tensor | None,
    small: Tensor | None,
    factor: Tensor | None,
    space: _Workspace,
    *,
    narrow: _Narrow | None = None,
    overlap: bool = True,
) -> Tensor:
    """`overlap`: the kernel before began when all before that had ended."""
    n, k = weight.shape
    m = x.shape[0]
    columns = space.columns
    pairs = _pairs(x.device)
    group = min(_PAIRS_TOGETHER, -(-m // (2 * _TOKENS)))
    left = _TOKENS, _DEPTH
    right = _DEPTH, _DEPTH
    x_map = tensor_map(x, left, 128)
    narrow_map = x_map
    if narrow is not None:
        box = (_DEPTH, _RANKS) if kind else (_RANKS, _DEPTH)
        narrow_map = tensor_map(narrow.factor, box, 2 * box[1])
    _KERNELS[x.dtype, columns].launch(
        f"nf4_ahead{kind}",
        pairs,
        _THREADS,
        (
            x_map,
            tensor_map(space.decoded, right, 128),
            narrow_map,
            x_map if small is None else tensor_map(small, left, 128),
            x_map if factor is None else tensor_map(factor, right, 128),
            *(weight.packed, weight.absmax, weight.nested_absmax, weight.offset),
            *(space.decoded, bias, space.out),
            *((None, 0.0) if narrow is None else (small, float(narrow.scale))),
            space.state,
            *(m, n, k, 0 if small is None else small.shape[1], group, -(-pairs // group)),
            int(m <= _HELPING_ROWS),
        ),
        device=x.device,
        shared=_shared_bytes(columns),
        cluster=2,
        overlap=overlap,
    )
    return space.out


def _shared_bytes(columns: int) -> int:
    """Stages with two barriers and a tile's number each; the rest as it lies behind them."""
    stage = (_TOKENS + columns + _RANKS) * _DEPTH * 2 + 2 * 8 + 4
    table, desk, scales, note = 2048, 2 * 2048 + 256, 1024, 16
    return _STAGES[columns] * stage + table + desk * _DECODERS + scales + note * _NOTES


@lru_cache(maxsize=64)
def _pairs(device: torch.device) -> int:  # needs a GPU
    """How many pairs of blocks the GPU holds at once."""
    kernels = _KERNELS[torch.bfloat16, 256]
    return kernels.most_clusters("nf4_ahead", _THREADS, _shared_bytes(256), 2, device)


@lru_cache(maxsize=4096)
def columns_of(m: int, width: int, pairs: int) -> int:
    """Choose the columns of a block: wide ones, unless narrow ones fill the chip better.

    Args:
        m: rows of the activations.
        width: columns of the result.
        pairs: of blocks that the GPU holds at once.

    Returns:
        256 or 128.

    Example:
        >>> [columns_of(m, 4096, 66) for m in (512, 1024, 1280)]
        [128, 256, 256]
    """
    # What a round of narrow blocks takes, of one of wide ones; and a last one whose wide tiles are
    # shared by two, as they are where half of the pairs would have none. With few columns sharing
    # loses what narrow blocks gain: tiles enough to make the small product in the same launch.
    narrow, shared = 0.6, 0.61 if width >= _WIDE_ENOUGH_TO_SHARE else 1.0
    whole, left = divmod(_tiles(m, width, 256), pairs)
    rounds = whole + (0 if left == 0 else shared if 2 * left <= pairs else 1)
    return 256 if rounds <= narrow * -(-_tiles(m, width, 128) // pairs) else 128


def makes_small_product(m: int, width: int, rank: int, pairs: int) -> bool:
    """Tell whether a launch makes LoRA's small product itself.

    Tiles that begin together with those that make it wait for them, once. On an H100 that costs
    as much as a kernel before it where blocks have two tiles each, and more where they have one.

    Args:
        m: rows of the activations.
        width: columns of the result.
        rank: of LoRA.
        pairs: of blocks that the GPU holds at once.

    Returns:
        True for at most 16 ranks and more than two tiles each.

    Example:
        >>> [makes_small_product(m, 4096, 16, 66) for m in (2048, 4096)]
        [False, True]
    """
    return rank <= _RANKS and _tiles(m, width, columns_of(m, width, pairs)) > 2 * pairs


def _tiles(m: int, width: int, columns: int) -> int:
    """Of a pair of blocks."""
    return -(-m // (2 * _TOKENS)) * -(-width // columns)
