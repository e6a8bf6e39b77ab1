"""`nf4_dequantize` in plain torch."""

import torch
from torch import Tensor

from qlora_kit.quant.weight import NF4Weight


def dequantize(weight: NF4Weight, dtype: torch.dtype) -> Tensor:
    """Decode a weight; see `qlora_kit.quant.nf4.dequantize_nf4`.

    Args:
        weight: of any shape.
        dtype: float32, bfloat16 or float16.

    Returns:
        The decoded weight, contiguous.
    """
    return weight.dequantize(dtype)
