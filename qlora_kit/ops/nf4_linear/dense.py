"""`nf4_linear` by decoding the whole weight in one launch and multiplying with cuBLAS.

The way for many rows, where the product hides the decoding, and for every case no
other strategy serves (float32, odd sizes). The low-rank product is written first and
the GEMM adds to it (beta = 1). The decoded weight is a temporary of the caching
allocator, as large as one layer.
"""

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
