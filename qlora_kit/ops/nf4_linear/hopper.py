"""`nf4_linear` on Hopper: the product straight from the 4-bit weight, in both directions.

`kernels/nf4_linear/hopper.cu` decodes W in registers while the tensor cores work and
adds the low-rank product as extra steps of the contraction. Where a result has too
few tiles for the chip, blocks of a cluster share the contraction.
"""

from functools import lru_cache

import torch
from torch import Tensor

from qlora_kit.ops.jit import Kernels, tensor_map
from qlora_kit.quant.weight import NF4Weight

_KERNELS = Kernels("nf4_linear/hopper.cu")
_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}

# As in hopper.cu.
_COLUMNS = 256
_DEPTH = 64
_THREADS = 384
_STAGES = {8: 12, 16: 12, 32: 10, 64: 8, 128: 6}
"""Stages in flight, per number of tokens a block takes."""
_TABLE_BYTES = 256 * 32 * 8
_SMALL = 16
_PACKED_BOX = {"": ((_COLUMNS, _DEPTH // 2), 32), "transposed_": ((_DEPTH, _COLUMNS // 2), 128)}
"""Rows and bytes of a stage's weights, and how the copy engine permutes them."""

_SPLITS = (1, 2, 4, 8)
_FIXED_STEPS = 6
"""What a block costs before and after its steps, in steps."""
_SPLIT_STEPS = 3
"""What adding up a cluster's sums costs, in steps."""


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
    return _launch("transposed_", dy, weight, None, dyb, lora_a, False)


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
    dyb = _small_product("transposed_", dy, lora_b, lora_b.shape[1], scale)
    return _launch("transposed_", dy, weight, None, dyb, lora_a, True), dyb


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
    cluster = next((s for s in reversed(_SPLITS) if s * tiles <= 128), 1)
    _KERNELS.launch(
        f"nf4_hopper_low_rank_{kind}{_NAMES[x.dtype]}",
        (tiles, -(-rank // _SMALL)),
        32 * 8,
        (x, factor, small, m, contraction, rank, scale),
        device=x.device,
        cluster=cluster,
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
    tokens, split = tiling(m, columns, contraction, _processors(x.device))
    out = x.new_empty((m, columns))
    packed = weight.packed.view(n, k // 2)
    box = (tokens, _DEPTH)
    x_map = tensor_map(x, box, 128)
    stages = _STAGES[tokens]
    stage = tokens * _DEPTH * 2 + _COLUMNS * _DEPTH // 2 + _COLUMNS * 4
    _KERNELS.launch(
        f"nf4_hopper_{kind}{_NAMES[x.dtype]}_{tokens}",
        -(-m // tokens) * -(-columns // _COLUMNS),
        _THREADS,
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
        shared=_TABLE_BYTES + stages * stage + 1024 + 16 * stages,
        cluster=split,
        overlap=overlap,
    )
    return out


@lru_cache(maxsize=64)
def _processors(device: torch.device) -> int:  # needs a GPU
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache(maxsize=4096)
def tiling(m: int, columns: int, contraction: int, processors: int) -> tuple[int, int]:
    """Choose how a product is cut into blocks.

    The fewest rounds of blocks, each round costing its steps along the contraction and
    what starting, ending and adding up cost.

    Args:
        m: rows of the activations.
        columns: of the result.
        contraction: length of the sums.
        processors: of the GPU.

    Returns:
        Tokens per block, and blocks per cluster that share a contraction.

    Example:
        >>> tiling(16, 4096, 4096, 132)
        (16, 8)
    """
    tokens = next((size for size in _STAGES if size >= m), max(_STAGES))
    tiles = -(-m // tokens) * -(-columns // _COLUMNS)
    steps = -(-contraction // _DEPTH)

    def cost(split: int) -> float:
        rounds = -(-tiles * split // processors)
        extra = _SPLIT_STEPS if split > 1 else 0
        return rounds * (-(-steps // split) + _FIXED_STEPS + extra)

    return tokens, min((s for s in _SPLITS if 4 * s <= steps or s == 1), key=cost)
