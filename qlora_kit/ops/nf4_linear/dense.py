"""`nf4_linear` by decoding the whole weight in one launch and multiplying with cuBLAS.

The way for many rows on GPUs before and after Hopper, and for every case no other
strategy serves (float32, odd sizes). The decoded weight is a temporary of the
caching allocator, as large as one layer.

LoRA joins the product as r more steps of its contraction: the small product's kernel copies
the activations beside its result, and B (or A) stands beside the decoded weight. Adding to a
result written before would cost about the same and is less exact: measured on an H100
(torch 2.11, CUDA 13.0), cuBLAS with beta = 1 rounds its product to 16 bits before it adds.
Small results are summed in float32 (`reference.product`).
"""

import torch
from torch import Tensor

from qlora_kit.ops.nf4_dequantize import cuda as nf4_dequantize
from qlora_kit.ops.nf4_linear import low_rank, reference
from qlora_kit.ops.nf4_linear.low_rank import to_eight
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
    if xa is None or lora_b is None:
        decoded = nf4_dequantize.dequantize(weight, x.dtype)
        return reference.product(x, decoded.T, bias, None, None)
    return _wider(torch.cat((x, to_eight(xa)), dim=1), weight, bias, lora_b)


def multiply_low_rank(
    x: Tensor, weight: NF4Weight, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute x·Wᵀ + (scale·x·Aᵀ)·Bᵀ + bias, reading x once for what LoRA needs of it.

    Args:
        x: (M, K), on a CUDA device.
        weight: (N, K).
        bias: (N,) in the dtype of x, or None.
        a: (r, K) in the dtype of x.
        b: (N, r) in the dtype of x.
        scale: factor on the low-rank product.

    Returns:
        y: (M, N) in the dtype of x.
        xa: (M, r) = scale·x·Aᵀ in the dtype of x.
    """
    xa, both = low_rank.product_beside(x, a.T, scale)
    return _wider(both, weight, bias, b), xa


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
    if dyb is None or lora_a is None:
        decoded = nf4_dequantize.dequantize(weight, dy.dtype)
        return reference.product(dy, decoded, None, None, None)
    return _taller(torch.cat((dy, to_eight(dyb)), dim=1), weight, lora_a)


def multiply_transposed_low_rank(
    dy: Tensor, weight: NF4Weight, a: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute dy·W + (scale·dy·B)·A, reading dy once for what LoRA needs of it.

    Args:
        dy: (M, N), on a CUDA device.
        weight: (N, K).
        a: (r, K) in the dtype of dy.
        b: (N, r) in the dtype of dy.
        scale: factor on the low-rank product.

    Returns:
        dx: (M, K) in the dtype of dy.
        dyb: (M, r) = scale·dy·B in the dtype of dy.
    """
    dyb, both = low_rank.product_beside(dy, b, scale)
    return _taller(both, weight, a), dyb


def _wider(both: Tensor, weight: NF4Weight, bias: Tensor | None, lora_b: Tensor) -> Tensor:
    """[x, xa]·[W, B]ᵀ + bias."""
    decoded = nf4_dequantize.dequantize(weight, both.dtype, columns=to_eight(lora_b))
    return reference.product(both, decoded.T, bias, None, None)


def _taller(both: Tensor, weight: NF4Weight, lora_a: Tensor) -> Tensor:
    """[dy, dyb]·[W; A]."""
    n, k = weight.shape
    rows = to_eight(lora_a.T).T
    decoded = both.new_empty((n + rows.shape[0], k))
    nf4_dequantize.dequantize(weight, both.dtype, out=decoded[:n])
    decoded[n:] = rows
    return reference.product(both, decoded, None, None, None)
