"""`nf4_linear` by decoding the whole weight in one launch and multiplying with cuBLAS.

The way for many rows, where the product hides the decoding, and for every case no
other strategy serves (float32, odd sizes). The decoded weight is a temporary of the
caching allocator, as large as one layer.

LoRA joins the product as r more steps of its contraction: the activations are copied
beside the small product, and B (or A) stands beside the decoded weight. Adding to a
result written before would cost about the same and is less exact: measured on an H100
(torch 2.11, CUDA 13.0), cuBLAS with beta = 1 rounds its product to 16 bits before it adds.
Small results are summed in float32 (`reference.product`).
"""

import torch
import torch.nn.functional as F
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
    if xa is None or lora_b is None:
        decoded = nf4_dequantize.dequantize(weight, x.dtype)
        return reference.product(x, decoded.T, bias, None, None)
    columns = _to_eight(lora_b)
    decoded = nf4_dequantize.dequantize(weight, x.dtype, columns=columns)
    both = torch.cat((x, _to_eight(xa)), dim=1)
    return reference.product(both, decoded.T, bias, None, None)


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
    n, k = weight.shape
    rows = _to_eight(lora_a.T).T
    decoded = dy.new_empty((n + rows.shape[0], k))
    nf4_dequantize.dequantize(weight, dy.dtype, out=decoded[:n])
    decoded[n:] = rows
    both = torch.cat((dy, _to_eight(dyb)), dim=1)
    return reference.product(both, decoded, None, None, None)


def _to_eight(columns: Tensor) -> Tensor:
    """The matrix with columns of zeros added up to a multiple of eight: 16-byte rows."""
    return F.pad(columns, (0, -columns.shape[1] % 8))
