"""`nf4_linear` on Hopper: the product straight from the 4-bit weight, in both directions.

`kernels/nf4_linear/hopper/` decodes W in registers while the tensor cores work and
adds the low-rank product as extra steps of the contraction. Where a result has too
few tiles for the chip, blocks of a cluster share the contraction.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from qlora_kit.ops.jit import Kernels, tensor_map
from qlora_kit.quant.weight import NF4Weight

_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}

# As in kernels/nf4_linear/hopper/.
_COLUMNS = 256
_DEPTH = 64
_TABLE_BYTES = 256 * 32 * 8
_SMALL = 16
_PACKED_BOX = {"": ((_COLUMNS, _DEPTH // 2), 32), "_transposed": ((_DEPTH, _COLUMNS // 2), 128)}
"""Rows and bytes of a stage's weights, and how the copy engine permutes them."""


@dataclass(frozen=True, slots=True)
class _Variant:
    """What a block does for a number of tokens."""

    stages: int
    """In flight."""
    groups: int
    """Warpgroups that decode."""
    step: float
    """Time of a step of 64, relative to one for eight tokens."""

    def threads(self) -> int:
        """Threads of a block: the decoding warpgroups and the one that brings tiles."""
        return 128 * (self.groups + 1)

    def shared(self, tokens: int) -> int:
        """Bytes of shared memory: table, stages, the 8-bit scales' map, barriers."""
        stage = tokens * _DEPTH * 2 + _COLUMNS * _DEPTH // 2 + _COLUMNS * 4
        return _TABLE_BYTES + self.stages * stage + 1024 + 16 * self.stages


_VARIANTS = {
    8: _Variant(12, 4, 1.0),
    16: _Variant(12, 4, 1.0),
    32: _Variant(10, 4, 1.1),
    64: _Variant(8, 2, 1.3),
    128: _Variant(6, 2, 1.8),
}
"""By tokens per block."""
_FIXED = 6.0
"""What a block costs before and after its steps, in steps of eight tokens."""
_SPLIT = 2.0
"""What adding up a cluster's sums costs besides, and per 16 tokens of a block again."""

_LOW_RANK = Kernels("nf4_linear/hopper/low_rank.cu")
_FUSED = {
    (dtype, tokens): Kernels(f"nf4_linear/hopper/{name}_{tokens}.cu")
    for dtype, name in _NAMES.items()
    for tokens in _VARIANTS
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
        and k % _COLUMNS == 0
        and n % 8 == 0
        and weight.block_size == 64
        and weight.packed.data_ptr() % 16 == 0
        and weight.absmax.data_ptr() % 16 == 0
        and weight.packed.is_contiguous()
        and torch.cuda.get_device_capability(x.device) == (9, 0)
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
        xa, lora_b = _in_eights(xa), _in_eights(lora_b)
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
        dyb, lora_a = _in_eights(dyb), _in_eights(lora_a.T).T.contiguous()
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
    xa = _small_product("", x, lora_a, lora_a.shape[0], scale)
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
    dyb = _small_product("_transposed", dy, lora_b, lora_b.shape[1], scale)
    return _launch("_transposed", dy, weight, None, dyb, lora_a, True), dyb


def _in_eights(matrix: Tensor) -> Tensor:
    """The matrix with zero columns up to a multiple of eight, aligned to 16 bytes."""
    columns = -matrix.shape[1] % 8
    if columns:
        return torch.nn.functional.pad(matrix, (0, columns))
    return matrix if matrix.data_ptr() % 16 == 0 else matrix.clone()


def _small_product(kind: str, x: Tensor, factor: Tensor, rank: int, scale: float) -> Tensor:
    m, contraction = x.shape
    small = x.new_empty((m, rank))
    tiles = -(-m // _SMALL)
    _LOW_RANK.launch(
        f"nf4_low_rank{kind}_{_NAMES[x.dtype]}",
        (tiles, -(-rank // _SMALL)),
        256,
        (x, factor, small, m, contraction, rank, scale),
        device=x.device,
        cluster=max(1, min(8, 128 // tiles)),
    )
    return small


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
    tokens, split = tiling(m, columns, contraction, _clusters(x.device))
    variant = _VARIANTS[tokens]
    out = x.new_empty((m, columns))
    packed = weight.packed.view(n, k // 2)
    box = (tokens, _DEPTH)
    x_map = tensor_map(x, box, 128)
    _FUSED[x.dtype, tokens].launch(
        f"nf4_fused{kind}",
        -(-m // tokens) * -(-columns // _COLUMNS),
        variant.threads(),
        (
            x_map,
            tensor_map(packed, *_PACKED_BOX[kind]),
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
        shared=variant.shared(tokens),
        cluster=split,
        overlap=overlap,
    )
    return out


@lru_cache(maxsize=64)
def _clusters(device: torch.device) -> tuple[int, ...]:  # needs a GPU
    """How many clusters of 1, 2, ... 8 blocks the GPU holds at once; no two chips are alike."""
    tokens = 16
    kernels, variant = _FUSED[torch.bfloat16, tokens], _VARIANTS[tokens]
    return tuple(
        kernels.most_clusters("nf4_fused", variant.threads(), variant.shared(tokens), size, device)
        for size in range(1, 9)
    )


@lru_cache(maxsize=4096)
def tiling(m: int, columns: int, contraction: int, clusters: tuple[int, ...]) -> tuple[int, int]:
    """Choose how a product is cut into blocks.

    The least time by a simple model: rounds of clusters, each costing its steps along the
    contraction and what starting, ending and adding up cost.

    Args:
        m: rows of the activations.
        columns: of the result.
        contraction: length of the sums.
        clusters: how many clusters of 1, 2, ... blocks the GPU holds at once.

    Returns:
        Tokens per block, and blocks per cluster that share a contraction.

    Example:
        >>> tiling(16, 4096, 4096, (132, 66, 44, 32, 26, 22, 18, 16))
        (16, 8)
    """
    quads = -(-contraction // (4 * _DEPTH))

    def cost(choice: tuple[int, int]) -> float:
        tokens, split = choice
        tiles = -(-m // tokens) * -(-columns // _COLUMNS)
        rounds = -(-tiles // max(1, clusters[split - 1]))
        each = 4 * -(-quads // split) * _VARIANTS[tokens].step + _FIXED
        return rounds * (each + (_SPLIT * (1 + tokens / 16) if split > 1 else 0))

    most = next((tokens for tokens in _VARIANTS if tokens >= m), max(_VARIANTS))
    choices = [
        (tokens, split)
        for tokens in _VARIANTS
        if tokens == most or most > tokens >= 32
        for split in range(1, min(len(clusters), quads) + 1)
    ]
    return min(choices, key=cost)
