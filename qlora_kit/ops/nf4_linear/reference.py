"""`nf4_linear` in plain torch: the truth the kernels are held against.

The weight is decoded for each call and dropped, never kept: a cached copy would
be the dense weight this package exists to avoid. Runs on any device. A backend
that only decodes faster passes its own `decode`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from qlora_kit.quant.weight import NF4Weight

Decode = Callable[[NF4Weight, torch.dtype], Tensor]


def forward(
    x: Tensor,
    weight: NF4Weight,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scale: float,
    decode: Decode = NF4Weight.dequantize,
) -> tuple[Tensor, Tensor]:
    """Compute y = x·Wᵀ + scale·(x·Aᵀ)·Bᵀ + bias.

    Args:
        x: (M, K), the compute dtype.
        weight: (N, K).
        bias: (N,) or None.
        lora_a: (r, K) or None.
        lora_b: (N, r) or None.
        scale: factor on the low-rank product.
        decode: how the weight becomes dense, (N, K) of a dtype.

    Returns:
        y: (M, N) in the dtype of x.
        xa: (M, r) = x·Aᵀ in the dtype of x; (M, 0) without LoRA.
    """
    dense = decode(weight, x.dtype)
    if lora_a is None or lora_b is None:
        xa = x.new_empty((x.shape[0], 0))
        y = x @ dense.T
    else:
        xa = x @ lora_a.to(x.dtype).T
        # The low-rank product first, then the base product added to it: one pass less over y.
        y = scaled_product(xa, lora_b.to(x.dtype).T, scale)
        y.addmm_(x, dense.T)
    if bias is not None:
        y += bias.to(x.dtype)
    return y, xa


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: NF4Weight,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    xa: Tensor,
    scale: float,
    need_dx: bool,
    need_da: bool,
    need_db: bool,
    need_dbias: bool,
    decode: Decode = NF4Weight.dequantize,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `forward`; what is not needed comes back empty.

    dX = dY·W + scale·(dY·B)·A, dA = scale·(dY·B)ᵀ·X, dB = scale·dYᵀ·(X·Aᵀ).

    Args:
        dy: (M, N), the compute dtype.
        x: (M, K), needed for dA only; None where A is frozen.
        weight: (N, K).
        lora_a: (r, K) or None.
        lora_b: (N, r) or None.
        xa: (M, r), saved by the forward.
        scale: factor on the low-rank product.
        need_dx: whether dX is wanted.
        need_da: whether dA is wanted.
        need_db: whether dB is wanted.
        need_dbias: whether the bias gradient is wanted.
        decode: how the weight becomes dense, (N, K) of a dtype.

    Returns:
        dx: (M, K) in the dtype of dy.
        da: (r, K) in the dtype of lora_a.
        db: (N, r) in the dtype of lora_b.
        dbias: (N,) float32.
    """
    # An op's results may not share storage, so each absent gradient is a tensor of its own.
    dx, da, db = dy.new_empty(0), dy.new_empty(0), dy.new_empty(0)
    dyb = None
    if lora_a is not None and lora_b is not None and (need_dx or need_da):
        dyb = scaled_product(dy, lora_b.to(dy.dtype), scale)
    if need_dx:
        dense = decode(weight, dy.dtype)
        if dyb is None or lora_a is None:
            dx = dy @ dense
        else:
            dx = dyb @ lora_a.to(dy.dtype)
            dx.addmm_(dy, dense)
    if need_da:
        assert dyb is not None
        assert x is not None
        assert lora_a is not None
        da = (dyb.T @ x).to(lora_a.dtype)
    if need_db:
        assert lora_b is not None
        db = scaled_product(dy.T, xa, scale).to(lora_b.dtype)
    dbias = (
        dy.sum(dim=0, dtype=torch.float32) if need_dbias else dy.new_empty(0, dtype=torch.float32)
    )
    return dx, da, db, dbias


def scaled_product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Multiply two matrices and a factor in one call: the GEMM's own alpha.

    Args:
        a: (M, K).
        b: (K, N).
        scale: the factor.

    Returns:
        (M, N) scale·a·b.

    Example:
        >>> scaled_product(torch.ones(1, 2), torch.ones(2, 1), 0.5).item()
        1.0
    """
    out = a.new_empty((a.shape[0], b.shape[1]))
    return torch.addmm(out, a, b, beta=0, alpha=scale, out=out)  # beta = 0: `out` is not read
