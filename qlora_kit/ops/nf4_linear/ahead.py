"""`nf4_linear` on Hopper for many rows: tensor cores on weights decoded ahead of them.

A launch of `kernels/nf4_linear/hopper/ahead/` decodes W to 16 bits, in memory, while it
multiplies: three warps of each block decode strips in the order in which tiles want
them, and a tile begins as soon as its first weights are there. So decoding runs beside
the products; how much of it that hides is in docs/kernels.md. LoRA is a few more steps
of the contraction. The decoded weight is a temporary of the caching allocator, as large
as one layer.
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
_THREADS = 32 * (1 + _DECODERS + 8)
_WORDS_BEFORE = 32
_STAGES = {256: 4, 128: 6}
"""Columns of a block to stages in flight."""

_PAIRS_TOGETHER = 8
"""Pairs of blocks along the rows that work on the same columns at once."""

_KERNELS = {
    (dtype, columns): Kernels(f"nf4_linear/hopper/ahead/{name}_{columns}.cu")
    for dtype, name in _NAMES.items()
    for columns in _STAGES
}

serves = hopper.serves


class _Workspace(NamedTuple):
    """What a launch works in."""

    decoded: Tensor
    """(N, K)."""
    state: Tensor
    """Zeros."""
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
    return _launch("", x, weight, bias, xa, lora_b, _workspace(x, weight, False), False)


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
    return _launch("_transposed", dy, weight, None, dyb, lora_a, space, False)


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
    # The small product's kernel lets the next one begin only when all before itself, the zeros and
    # whatever used this memory, has ended. Of cuBLAS's kernels that is not known.
    space = _workspace(x, weight, bool(kind))
    small = hopper.small_product(kind, x, first, first.shape[1 if kind else 0], scale)
    overlap = hopper.makes_small_product(kind, x, first)
    return _launch(kind, x, weight, bias, small, second, space, overlap), small


def _workspace(x: Tensor, weight: NF4Weight, transposed: bool) -> _Workspace:
    n, k = weight.shape
    contraction, width = (n, k) if transposed else (k, n)
    columns = columns_of(x.shape[0], width, _pairs(x.device))
    cells = -(-width // columns) * -(-contraction // _CELL_DEPTH)
    state = torch.zeros(_WORDS_BEFORE + cells, dtype=torch.int32, device=x.device)
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
    overlap: bool,
) -> Tensor:
    n, k = weight.shape
    m = x.shape[0]
    columns = space.columns
    pairs = _pairs(x.device)
    group = min(_PAIRS_TOGETHER, -(-m // (2 * _TOKENS)))
    left = _TOKENS, _DEPTH
    right = (_DEPTH, _DEPTH) if kind else (columns // 2, _DEPTH)
    x_map = tensor_map(x, left, 128)
    _KERNELS[x.dtype, columns].launch(
        f"nf4_ahead{kind}",
        2 * pairs,
        _THREADS,
        (
            x_map,
            tensor_map(space.decoded, right, 128),
            x_map if small is None else tensor_map(small, left, 128),
            x_map if factor is None else tensor_map(factor, right, 128),
            *(weight.packed, weight.absmax, weight.nested_absmax, weight.offset),
            *(space.decoded, bias, space.out, space.state),
            *(m, n, k, 0 if small is None else small.shape[1], group, -(-pairs // group)),
        ),
        device=x.device,
        shared=_shared_bytes(columns),
        cluster=2,
        overlap=overlap,
    )
    return space.out


def _shared_bytes(columns: int) -> int:
    """Stages, the table of values, what warps decode, the map of 8-bit scales, barriers."""
    stage = (_TOKENS + columns) * _DEPTH * 2
    return _STAGES[columns] * (stage + 16) + 2048 + (2 * 2048 + 256) * _DECODERS + 1024


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
        >>> columns_of(512, 4096, 66), columns_of(1024, 4096, 66)
        (128, 256)
    """
    rows = -(-m // (2 * _TOKENS))
    rounds = {columns: -(-rows * -(-width // columns) // pairs) for columns in (256, 128)}
    return 256 if rounds[256] <= 0.6 * rounds[128] else 128
