"""`nf4_linear` on CUDA: which way for which number of rows.

- 1 to 16 rows, forward: `small_m.cu` reads W once in 4 bits and adds LoRA and
  bias in its last step. It wants bfloat16 or float16 and K a multiple of 64.
- everything else: W is decoded in one launch and cuBLAS multiplies. The low-rank
  product is written first and the GEMM adds to it (beta = 1). The decoded weight
  is a temporary of the caching allocator, as large as one layer.
"""

from functools import partial

import torch
from torch import Tensor

from qlora_kit.ops.jit import Kernels
from qlora_kit.ops.nf4_dequantize import cuda as nf4_dequantize
from qlora_kit.ops.nf4_linear import reference
from qlora_kit.quant.weight import NF4Weight

SMALL_M = 16
"""Largest number of rows the small-M kernel takes."""

_KERNELS = Kernels("nf4_linear/small_m.cu")
_THREADS = 256
_ROWS = 16
_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}

serves = nf4_dequantize.serves
backward = partial(reference.backward, decode=nf4_dequantize.dequantize)


def forward(
    x: Tensor,
    weight: NF4Weight,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute y = x·Wᵀ + scale·(x·Aᵀ)·Bᵀ + bias; see `reference.forward`.

    Args:
        x: (M, K), on a CUDA device.
        weight: (N, K).
        bias: (N,) or None.
        lora_a: (r, K) or None.
        lora_b: (N, r) or None.
        scale: factor on the low-rank product.

    Returns:
        y: (M, N) in the dtype of x.
        xa: (M, r) = x·Aᵀ in the dtype of x; (M, 0) without LoRA.
    """
    if _is_small(x, weight):
        return _small_m(x, weight, bias, lora_a, lora_b, scale)
    decode = nf4_dequantize.dequantize
    return reference.forward(x, weight, bias, lora_a, lora_b, scale, decode)


def _is_small(x: Tensor, weight: NF4Weight) -> bool:
    """Whether `small_m.cu` takes the call."""
    return (
        0 < x.shape[0] <= SMALL_M
        and x.dtype in _NAMES
        and x.shape[1] % 64 == 0
        and weight.packed.data_ptr() % 16 == 0
    )


def _small_m(
    x: Tensor,
    weight: NF4Weight,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    m, k = x.shape
    n = weight.shape[0]
    x = x.contiguous()
    if x.data_ptr() % 16:
        x = x.clone()
    rank = 0
    xa = padded = x.new_empty((m, 0))
    if lora_a is not None and lora_b is not None:
        xa = x @ lora_a.to(x.dtype).T
        columns = -lora_a.shape[0] % 16  # the kernel takes ranks in sixteens
        rank = lora_a.shape[0] + columns
        padded = torch.nn.functional.pad(xa, (0, columns)) if columns else xa
        lora_b = torch.nn.functional.pad(lora_b, (0, columns)) if columns else lora_b
        lora_b = lora_b.to(x.dtype).contiguous()
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
            None if bias is None else bias.to(x.dtype).contiguous(),
            padded if rank else None,
            lora_b if rank else None,
            y,
            m,
            n,
            k,
            weight.block_size.bit_length() - 1,
            rank,
            scale,
        ),
        device=x.device,
    )
    return y, xa
