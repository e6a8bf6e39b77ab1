"""`nf4_linear` for 1 to 16 rows: W is read once, straight into fragments.

`kernels/nf4_linear/gemv/` loads the 4-bit bytes of W from global memory into the
registers that feed `mma.sync`, so that shared memory serves look-ups and nothing else.
A warp beside those makes the low-rank factor's small product in the same launch: blocks
tell each other in a few words of memory (words.py) that it is there. From Hopper on
blocks of a cluster share a contraction where a result has too few tiles for the chip.
It has no transposed product.
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
_KERNELS = {d: Kernels(f"nf4_linear/gemv/{name}.cu") for d, name in _NAMES.items()}

# As in the sources.
_WARPS = {8: 11, 16: 7}
"""That multiply W, by the tokens a block takes."""
_TABLE_BYTES, _MAP_BYTES = 256 * 32 * 8, 256 * 4
_PASS = 2
"""Tiles of 16 rows of W that a block takes at once."""
_MAKERS, _MAKERS_TOKENS = 32, 16
"""Parts that the small product is made in, and their rows."""
_MOST_BLOCKS = 8
"""Of a cluster."""

# In steps of 16 x 128 weights of a block, about 80 cycles each. By counting, not by timing.
_PASS_STEPS = 4
"""What adding up and writing a pass costs."""
_CLUSTER_STEPS = 16
"""What meeting the cluster's other blocks costs."""


def serves(x: Tensor, weight: NF4Weight) -> bool:
    """Tell whether a call can run here.

    Args:
        x: (M, K).
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
    return _product(x, weight, bias, xa, lora_b, None)


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
    return _product(x, weight, bias, xa, lora_b, (lora_a, words, scale)), xa


_Small = tuple[Tensor, Tensor, float]
"""What a launch that makes the small product needs: its factor, words to count in, its scale."""


def _parts(whole: int, part: int) -> int:
    """How many parts cover the whole."""
    return -(-whole // part)


def _tokens(m: int) -> int:
    return 8 if m <= 8 else 16


def _shared(tokens: int) -> int:
    """Bytes of shared memory: table, the warps' sums, the map."""
    return _TABLE_BYTES + _WARPS[tokens] * tokens * (16 * _PASS + 4) * 4 + _MAP_BYTES


def _threads(tokens: int, makes_small: bool) -> int:
    return 32 * (_WARPS[tokens] + makes_small)


def _product(
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
    groups, split = tiling(n, k, tokens, _clusters(x.device, x.dtype, tokens))
    y = x.new_empty((m, n))
    codes = (weight.packed, weight.absmax, weight.nested_absmax, weight.offset)
    rank = 0 if lora_b is None else lora_b.shape[1]
    makers = min(_MAKERS, groups * split)
    operands = (xa, lora_b) if rank else (None, None)
    made: tuple[Tensor | None, ...] = (None, None, None)
    scale = 1.0
    if small is not None:
        lora_a, words, scale = small
        partial = x.new_empty(_MAKERS * _MAKERS_TOKENS * rank, dtype=torch.float32)
        made = (lora_a, partial, words)
    _KERNELS[x.dtype].launch(
        f"nf4_gemv_{tokens}",
        groups,
        _threads(tokens, small is not None),
        (x, *codes, bias, *operands, y, *made, m, n, k, rank, makers, float(scale)),
        device=x.device,
        shared=_shared(tokens),
        cluster=split,
        overlap=_overlaps(x.device),
    )
    return y


@lru_cache(maxsize=64)
def _overlaps(device: torch.device) -> bool:  # needs a GPU
    """Whether kernels may start before those ahead of them have ended, and clusters exist."""
    return int(architecture_of(device).strip("sm_a")) >= 90


@lru_cache(maxsize=64)
def _clusters(  # needs a GPU
    device: torch.device, dtype: torch.dtype, tokens: int
) -> tuple[int, ...]:
    """How many clusters of 1, 2, ... blocks the GPU holds at once; before Hopper, of 1 alone."""
    name, threads, shared = f"nf4_gemv_{tokens}", _threads(tokens, True), _shared(tokens)
    return tuple(
        _KERNELS[dtype].most_clusters(name, threads, shared, size, device)
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
    tiles, chunks, warps = _parts(n, 16), _parts(k, 128), _WARPS[tokens]

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
