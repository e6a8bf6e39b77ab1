"""`nf4_linear` by decoding the whole weight in one launch and multiplying with cuBLAS.

The way for many rows, where the product hides the decoding, and for every case no
other strategy serves (float32, odd sizes). The decoded weight is a temporary of the
caching allocator, as large as one layer.

LoRA joins the product in one of two ways, whichever moves fewer bytes: written into
the result first, which the GEMM adds to (beta = 1), or as r more steps of its
contraction, for which the activations are copied beside the small product.
"""

import torch
from torch import Tensor

from qlora_kit.ops.nf4_dequantize import cuda as nf4_dequantize
from qlora_kit.ops.nf4_linear import reference
from qlora_kit.quant.weight import NF4Weight


def serves(x: Tensor, weight: NF4Weight) -> bool:
    """Tell whether a call can run here: always.

    Args:
        x: (M, K) or, for the transposed product, (M, N).
        weight: (N, K).

    Returns:
        True.
    """
    return True


def multiply(
    x: Tensor, weight: NF4Weight, bias: Tensor | None, xa: Tensor | None, lora_b: Tensor | None
) -> Tensor:
    """Compute x·Wᵀ + xa·Bᵀ + bias.

    Args:
        x: (M, K), on a CUDA device.
        weight: (N, K).
        bias: (N,) in the dtype of x, or None.
        xa: (M, r) in the dtype of x, or None.
        lora_b: (N, r) in the dtype of x, or None.

    Returns:
        (M, N) in the dtype of x.
    """
    decoded = nf4_dequantize.dequantize(weight, x.dtype)
    return reference.product(x, decoded.T, bias, xa, None if lora_b is None else lora_b.T)


def multiply_transposed(
    dy: Tensor, weight: NF4Weight, dyb: Tensor | None, lora_a: Tensor | None
) -> Tensor:
    """Compute dy·W + dyb·A.

    Args:
        dy: (M, N), on a CUDA device.
        weight: (N, K).
        dyb: (M, r) in the dtype of dy, or None.
        lora_a: (r, K) in the dtype of dy, or None.

    Returns:
        (M, K) in the dtype of dy.
    """
    decoded = nf4_dequantize.dequantize(weight, dy.dtype)
    return reference.product(dy, decoded, None, dyb, lora_a)


def multiply_low_rank(
    x: Tensor,
    weight: NF4Weight,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute xa = scale·x·Aᵀ and x·Wᵀ + xa·Bᵀ + bias.

    Args:
        x: (M, K), on a CUDA device.
        weight: (N, K).
        bias: (N,) in the dtype of x, or None.
        lora_a: (r, K) in the dtype of x, r a multiple of 8.
        lora_b: (N, r) in the dtype of x.
        scale: factor on the low-rank product.

    Returns:
        (M, N) and xa, (M, r), in the dtype of x.
    """
    n, k = weight.shape
    if not _is_longer(n, k):
        xa = reference.scaled_product(x, lora_a.T, scale)
        return multiply(x, weight, bias, xa, lora_b), xa
    both, xa = _beside(x, lora_a.T, scale)
    decoded = nf4_dequantize.dequantize(weight, x.dtype, columns=lora_b)
    return reference.product(both, decoded.T, bias, None, None), xa


def multiply_transposed_low_rank(
    dy: Tensor, weight: NF4Weight, lora_a: Tensor, lora_b: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute dyb = scale·dy·B and dy·W + dyb·A.

    Args:
        dy: (M, N), on a CUDA device.
        weight: (N, K).
        lora_a: (r, K) in the dtype of dy, r a multiple of 8.
        lora_b: (N, r) in the dtype of dy.
        scale: factor on the low-rank product.

    Returns:
        (M, K) and dyb, (M, r), in the dtype of dy.
    """
    n, k = weight.shape
    if not _is_longer(k, n):
        dyb = reference.scaled_product(dy, lora_b, scale)
        return multiply_transposed(dy, weight, dyb, lora_a), dyb
    both, dyb = _beside(dy, lora_b, scale)
    decoded = dy.new_empty((n + lora_a.shape[0], k))
    nf4_dequantize.dequantize(weight, dy.dtype, out=decoded[:n])
    decoded[n:] = lora_a
    return both @ decoded, dyb


def _is_longer(result: int, contraction: int) -> bool:
    """Whether a pass over the result costs clearly more than one over the activations."""
    return result >= 2 * contraction


def _beside(x: Tensor, factor: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(M, C + r) with x and scale·x·factor side by side, and the latter alone."""
    small = reference.scaled_product(x, factor, scale)
    return torch.cat([x, small], dim=1), small
