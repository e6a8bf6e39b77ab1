"""`nf4_linear` for 1 to 16 rows in both directions: W is read once, straight into fragments.

`kernels/nf4_linear/gemv/` loads the 4-bit bytes of W from global memory into the
registers that feed `mma.sync`, so that shared memory serves look-ups and nothing else.
A warp beside those makes the low-rank factor's small product in the same launch: blocks
tell each other in a few words of memory (words.py) that it is there. From Hopper on
blocks of a cluster share a contraction where a result has too few tiles for the chip.
"""

from functools import lru_cache

import torch
from torch import Tensor

from qlora_kit.ops.jit import architecture_of
from qlora_kit.ops.launch import Kernels
from qlora_kit.ops.nf4_linear import reference
from qlora_kit.ops.nf4_linear.words import WORDS
from qlora_kit.quant.weight import NF4Weight

MOST_ROWS = 16
"""Largest number of rows the kernels take."""

_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
_FORWARD = {d: Kernels(f"nf4_linear/gemv/{name}_forward.cu") for d, name in _NAMES.items()}
_BACKWARD = {d: Kernels(f"nf4_linear/gemv/{name}_backward.cu") for d, name in _NAMES.items()}

# As in the sources.
_WARPS = {False: {8: 11, 16: 7}, True: {8: 10, 16: 8}}
"""That multiply W, by direction and the tokens a block takes."""
_TABLE_BYTES, _MAP_BYTES = 256 * 32 * 8, 256 * 4
_PASS = 2
"""Tiles of 16 rows of W that a block takes at once, forward."""
_MAKERS, _MAKERS_TOKENS = 32, 16
"""Parts that the small product is made in, and their rows."""
_MOST_BLOCKS = 8
"""Of a cluster."""

# In steps of 16 x 128 weights of a block, about 80 cycles each. By counting, not by timing.
_PASS_STEPS = 4
"""What adding up and writing a pass costs."""
_CLUSTER_STEPS = 16
"""What meeting the cluster's other blocks costs."""
_BLOCK_STEPS = 24
"""What a further round of blocks costs besides its steps."""


def serves(x: Tensor, weight: NF4Weight) -> bool:
    """Tell whether a call can run here.

    Args:
        x: (M, K) or, for the transposed product, (M, N).
        weight: (N, K).

    Returns:
        True for up to 16 rows of bfloat16 or float16, K a multiple of 64, N of 8, scales
        per 64 weights.

    Example:
        >>> weight = NF4Weight.quantize(torch.randn(128, 64))
        >>> serves(torch.empty(3, 64, dtype=torch.bfloat16), weight)
        True
        >>> serves(torch.empty(17, 64, dtype=torch.bfloat16), weight)
        False
    """
    n, k = weight.shape
    return (
        0 < x.shape[0] <= MOST_ROWS
        and x.dtype in _NAMES
        and k % 64 == 0
        and n % 8 == 0
        and weight.block_size == 64
        and x.data_ptr() % 16 == 0
        and x.is_contiguous()
        and weight.packed.data_ptr() % 16 == 0
        and all(tensor.is_contiguous() for tensor in weight.tensors().values())
    )


def multiply(
    x: Tensor, weight: NF4Weight, bias: Tensor | None, xa: Tensor | None, lora_b: Tensor | None
) -> Tensor:
    """Compute x·Wᵀ + xa·Bᵀ + bias.

    Args:
        x: (M, K), on a CUDA device, M at most 16.
        weight: (N, K).
        bias: (N,) in the dtype of x, or None.
        xa: (M, r) in the dtype of x, or None.
        lora_b: (N, r) in the dtype of x, or None.

    Returns:
        (M, N) in the dtype of x.
    """
    return _forward(x, weight, bias, xa, lora_b, None)


def multiply_transposed(
    dy: Tensor, weight: NF4Weight, dyb: Tensor | None, lora_a: Tensor | None
) -> Tensor:
    """Compute dy·W + dyb·A.

    Args:
        dy: (M, N), on a CUDA device, M at most 16.
        weight: (N, K).
        dyb: (M, r) in the dtype of dy, or None.
        lora_a: (r, K) in the dtype of dy, or None.

    Returns:
        (M, K) in the dtype of dy.
    """
    if lora_a is not None and lora_a.data_ptr() % 4:
        lora_a = lora_a.clone()
    return _backward(dy, weight, dyb, lora_a, None)


def multiply_low_rank(
    x: Tensor,
    weight: NF4Weight,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute xa = scale·x·Aᵀ and x·Wᵀ + xa·Bᵀ + bias in one launch.

    Args:
        x: (M, K), on a CUDA device, M at most 16, aligned to 16 bytes.
        weight: (N, K).
        bias: (N,) in the dtype of x, or None.
        lora_a: (r, K) in the dtype of x, r a multiple of 8, aligned to 16 bytes.
        lora_b: (N, r) in the dtype of x.
        scale: factor on the low-rank product.

    Returns:
        (M, N) and xa, (M, r), in the dtype of x.
    """
    words = WORDS.take(x.device)
    if words is None:
        xa = reference.scaled_product(x, lora_a.T, scale)
        return multiply(x, weight, bias, xa, lora_b), xa
    xa = x.new_empty((x.shape[0], lora_a.shape[0]))
    return _forward(x, weight, bias, xa, lora_b, (lora_a, words, scale)), xa


def multiply_transposed_low_rank(
    dy: Tensor, weight: NF4Weight, lora_a: Tensor, lora_b: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute dyb = scale·dy·B and dy·W + dyb·A in one launch.

    Args:
        dy: (M, N), on a CUDA device, M at most 16, aligned to 16 bytes.
        weight: (N, K).
        lora_a: (r, K) in the dtype of dy, r a multiple of 8, aligned to 16 bytes.
        lora_b: (N, r) in the dtype of dy.
        scale: factor on the low-rank product.

    Returns:
        (M, K) and dyb, (M, r), in the dtype of dy.
    """
    words = WORDS.take(dy.device)
    if words is None:
        dyb = reference.scaled_product(dy, lora_b, scale)
        return multiply_transposed(dy, weight, dyb, lora_a), dyb
    dyb = dy.new_empty((dy.shape[0], lora_b.shape[1]))
    return _backward(dy, weight, dyb, lora_a, (lora_b, words, scale)), dyb


_Small = tuple[Tensor, Tensor, float]
"""What a launch that makes the small product needs: its factor, words to count in, its scale."""


def _parts(whole: int, part: int) -> int:
    """How many parts cover the whole."""
    return -(-whole // part)


def _tokens(m: int) -> int:
    return 8 if m <= 8 else 16


def _shared(transposed: bool, tokens: int) -> int:
    """Bytes of shared memory: table, the warps' sums (over the table, transposed), the map."""
    warps = _WARPS[transposed][tokens]
    if transposed:
        return max(_TABLE_BYTES, warps * tokens * (128 + 4) * 4) + _MAP_BYTES
    return _TABLE_BYTES + warps * tokens * (16 * _PASS + 4) * 4 + _MAP_BYTES


def _threads(transposed: bool, tokens: int, makes_small: bool) -> int:
    return 32 * (_WARPS[transposed][tokens] + makes_small)


def _low_rank_arguments(
    x: Tensor, low: Tensor | None, factor: Tensor | None, rank: int, small: _Small | None
) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...], float]:
    """The low-rank product's operands; what makes the small one; its scale."""
    operands = (low, factor) if rank else (None, None)
    if small is None:
        return operands, (None, None, None), 1.0
    other, words, scale = small
    partial = x.new_empty(_MAKERS * _MAKERS_TOKENS * rank, dtype=torch.float32)
    return operands, (other, partial, words), float(scale)


def _forward(
    x: Tensor,
    weight: NF4Weight,
    bias: Tensor | None,
    xa: Tensor | None,
    lora_b: Tensor | None,
    small: _Small | None,
) -> Tensor:
    m, k = x.shape
    n = weight.shape[0]
    tokens = _tokens(m)
    groups, split = tiling(n, k, tokens, _clusters(x.device, x.dtype, False, tokens))
    y = x.new_empty((m, n))
    codes = (weight.packed, weight.absmax, weight.nested_absmax, weight.offset)
    rank = 0 if lora_b is None else lora_b.shape[1]
    blocks = groups * split
    (low, factor), made, scale = _low_rank_arguments(x, xa, lora_b, rank, small)
    _FORWARD[x.dtype].launch(
        f"nf4_gemv_{tokens}",
        groups,
        _threads(False, tokens, small is not None),
        (x, *codes, bias, low, factor, y, *made, m, n, k, rank, min(_MAKERS, blocks), scale),
        device=x.device,
        shared=_shared(False, tokens),
        cluster=split,
        overlap=_overlaps(x.device),
    )
    return y


def _backward(
    dy: Tensor,
    weight: NF4Weight,
    dyb: Tensor | None,
    lora_a: Tensor | None,
    small: _Small | None,
) -> Tensor:
    m = dy.shape[0]
    n, k = weight.shape
    tokens = _tokens(m)
    clusters = _clusters(dy.device, dy.dtype, True, tokens)
    width, split = transposed_tiling(n, k, tokens, clusters)
    groups = _parts(k, 128 * width)
    blocks = min(groups, clusters[split - 1]) * split  # at once
    dx = dy.new_empty((m, k))
    codes = (weight.packed, weight.absmax, weight.nested_absmax, weight.offset)
    rank = 0 if lora_a is None else lora_a.shape[0]
    (low, factor), made, scale = _low_rank_arguments(dy, dyb, lora_a, rank, small)
    _BACKWARD[dy.dtype].launch(
        f"nf4_gemv_transposed_{tokens}",
        groups,
        _threads(True, tokens, small is not None),
        (dy, *codes, low, factor, dx, *made, m, n, k, rank, min(_MAKERS, blocks), scale, width),
        device=dy.device,
        shared=_shared(True, tokens),
        cluster=split,
        overlap=_overlaps(dy.device),
    )
    return dx


@lru_cache(maxsize=64)
def _overlaps(device: torch.device) -> bool:  # needs a GPU
    """Whether kernels may start before those ahead of them have ended, and clusters exist."""
    return int(architecture_of(device).strip("sm_a")) >= 90


@lru_cache(maxsize=64)
def _clusters(  # needs a GPU
    device: torch.device, dtype: torch.dtype, transposed: bool, tokens: int
) -> tuple[int, ...]:
    """How many clusters of 1, 2, ... blocks the GPU holds at once; before Hopper, of 1 alone."""
    kernels = (_BACKWARD if transposed else _FORWARD)[dtype]
    name = f"nf4_gemv_{'transposed_' if transposed else ''}{tokens}"
    threads, shared = _threads(transposed, tokens, True), _shared(transposed, tokens)
    return tuple(
        kernels.most_clusters(name, threads, shared, size, device)
        for size in range(1, _MOST_BLOCKS + 1 if _overlaps(device) else 2)
    )


@lru_cache(maxsize=4096)
def tiling(n: int, k: int, tokens: int, clusters: tuple[int, ...]) -> tuple[int, int]:
    """Choose how a product is cut into blocks.

    Args:
        n: rows of W.
        k: length of the contraction.
        tokens: that a block takes, 8 or 16.
        clusters: how many clusters of 1, 2, ... blocks the GPU holds at once.

    Returns:
        Clusters, which share the rows of W, and blocks of each, which share the contraction.

    Example:
        >>> tiling(28672, 8192, 8, (132, 66, 44, 30))
        (132, 1)
        >>> tiling(64, 14336, 8, (132, 66, 44, 30))
        (4, 4)
    """
    tiles, chunks, warps = _parts(n, 16), _parts(k, 128), _WARPS[False][tokens]

    def cost(choice: tuple[int, int]) -> int:
        groups, split = choice
        most = _parts(tiles, groups)
        steps = most * _parts(_parts(chunks, split), warps) * warps
        return steps + _parts(most, _PASS) * _PASS_STEPS + (split > 1) * _CLUSTER_STEPS

    choices = []
    for split, most in enumerate(clusters, 1):
        groups = min(most, tiles)
        # Blocks of a cluster meet once: more than one pass is for blocks alone.
        if split == 1 or (groups and _parts(tiles, groups) <= _PASS and split <= chunks):
            choices.append((max(1, groups), split))
    return min(choices, key=cost)


@lru_cache(maxsize=4096)
def transposed_tiling(n: int, k: int, tokens: int, clusters: tuple[int, ...]) -> tuple[int, int]:
    """Choose how a transposed product is cut into blocks.

    Args:
        n: length of the contraction.
        k: columns of the result.
        tokens: that a block takes, 8 or 16.
        clusters: how many clusters of 1, 2, ... blocks the GPU holds at once.

    Returns:
        Columns of a block in units of 128: 1, 2 or 4; and blocks that share a contraction.

    Example:
        >>> transposed_tiling(28672, 8192, 8, (132, 66, 44, 30, 25, 21, 16, 15))
        (1, 2)
    """
    lines, warps = _parts(n, 16), _WARPS[True][tokens]

    def cost(choice: tuple[int, int]) -> int:
        width, split = choice
        rounds = _parts(_parts(k, 128 * width), clusters[split - 1])
        steps = _parts(_parts(lines, split), warps // width) * warps
        return rounds * (steps + _BLOCK_STEPS + (split > 1) * _CLUSTER_STEPS)

    choices = [
        (width, split)
        for width in (1, 2, 4)
        for split in range(1, len(clusters) + 1)
        if warps % width == 0 and clusters[split - 1] and (split == 1 or split <= lines)
    ]
    return min(choices, key=cost)
