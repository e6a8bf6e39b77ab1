"""`nf4_linear` for 1 to 16 rows on any GPU from Ampere on: W is read once, in 4 bits.

`kernels/nf4_linear/small_m.cu` adds the low-rank product and the bias in its last
step. It has no transposed product.
"""

import torch
from torch import Tensor

from qlora_kit.ops.launch import Kernels
from qlora_kit.quant.weight import NF4Weight

MOST_ROWS = 16
"""Largest number of rows the kernel takes."""

_KERNELS = Kernels("nf4_linear/small_m.cu")
_THREADS = 256
_ROWS = 16
_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


def serves(x: Tensor, weight: NF4Weight) -> bool:
    """Tell whether a call can run here.

    Args:
        x: (M, K).
        weight: (N, K).

    Returns:
        True for up to 16 rows of bfloat16 or float16 and K a multiple of 64.
    """
    return (
        0 < x.shape[0] <= MOST_ROWS
        and x.dtype in _NAMES
        and weight.shape[1] % 64 == 0
        and weight.packed.data_ptr() % 16 == 0
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
    m, k = x.shape
    n = weight.shape[0]
    rank = 0
    if xa is not None and lora_b is not None:
        columns = -lora_b.shape[1] % 16  # the kernel takes ranks in sixteens
        rank = lora_b.shape[1] + columns
        if columns:
            xa = torch.nn.functional.pad(xa, (0, columns))
            lora_b = torch.nn.functional.pad(lora_b, (0, columns))
    y = x.new_empty((m, n))
    tile = 8 if m <= 8 else 16
    _KERNELS.launch(
        f"nf4_small_m_{_NAMES[x.dtype]}_{tile}{'_wide' if k % 128 == 0 else ''}",
        -(-n // _ROWS),
        _THREADS,
        (
            x,
            weight.packed,
            weight.absmax,
            weight.nested_absmax,
            weight.offset,
            bias,
            xa,
            lora_b,
            y,
            m,
            n,
            k,
            weight.block_size.bit_length() - 1,
            rank,
            1.0,
        ),
        device=x.device,
    )
    return y
