"""`nf4_linear` in plain torch: the truth the kernels are held against.

The weight is decoded for each call and dropped, never kept: a cached copy would
be the dense weight this package exists to avoid. Runs on any device. A backend
that only decodes faster passes its own `decode`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from qlora_kit.ops.low_rank_gradients.reference import token_sum
from qlora_kit.quant.weight import NF4Weight

Decode = Callable[[NF4Weight, torch.dtype], Tensor]

_FEW_RESULTS = 1 << 16
"""Four tiles of 128 x 128: up to here cuBLAS may cut a sum into hundreds of parts and add them
in the result's 16 bits (docs/decisions/0012)."""


def forward(
    x: Tensor,
    weight: NF4Weight,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scale: float,
    decode: Decode = NF4Weight.dequantize,
) -> tuple[Tensor, Tensor]:
    """Compute y = x·Wᵀ + (scale·x·Aᵀ)·Bᵀ + bias.

    The scale goes into the small product, so that the large one needs none and the
    gradient of B is dYᵀ·xa.

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
        xa: (M, r) = scale·x·Aᵀ in the dtype of x; (M, 0) without LoRA.
    """
    dense = decode(weight, x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if lora_a is None or lora_b is None:
        return product(x, dense.T, bias, None, None), x.new_empty((x.shape[0], 0))
    xa = scaled_product(x, lora_a.to(x.dtype).T, scale)
    return product(x, dense.T, bias, xa, lora_b.to(x.dtype).T), xa


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

    With dYB = scale·dY·B: dX = dY·W + dYB·A, dA = dYBᵀ·X, dB = dYᵀ·xa.

    Args:
        dy: (M, N), the compute dtype.
        x: (M, K), needed for dA only; None where A is frozen.
        weight: (N, K).
        lora_a: (r, K) or None.
        lora_b: (N, r) or None.
        xa: (M, r), the forward's second result.
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
    dyb = None
    if lora_a is not None and lora_b is not None and (need_dx or need_da):
        dyb = scaled_product(dy, lora_b.to(dy.dtype), scale)
    dx = dy.new_empty(0)
    if need_dx:
        lora_a_cast = None if lora_a is None else lora_a.to(dy.dtype)
        dx = product(dy, decode(weight, dy.dtype), None, dyb, lora_a_cast)
    return dx, *small_gradients(dy, x, dyb, xa, lora_a, lora_b, need_da, need_db, need_dbias)


def small_gradients(
    dy: Tensor,
    x: Tensor | None,
    dyb: Tensor | None,
    xa: Tensor,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    need_da: bool,
    need_db: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of A, B and the bias; what is not needed comes back empty.

    Args:
        dy: (M, N), the compute dtype.
        x: (M, K), needed for dA only.
        dyb: (M, r) = scale·dY·B, needed for dA only.
        xa: (M, r), the forward's second result.
        lora_a: (r, K) or None.
        lora_b: (N, r) or None.
        need_da: whether dA is wanted.
        need_db: whether dB is wanted.
        need_dbias: whether the bias gradient is wanted.

    Returns:
        da: (r, K) in the dtype of lora_a.
        db: (N, r) in the dtype of lora_b.
        dbias: (N,) float32.
    """
    # An op's results may not share storage, so each absent gradient is a tensor of its own.
    da, db = dy.new_empty(0), dy.new_empty(0)
    if need_da:
        assert dyb is not None
        assert x is not None
        assert lora_a is not None
        da = transposed_product(dyb, x).to(lora_a.dtype)
    if need_db:
        assert lora_b is not None
        db = transposed_product(dy, xa).to(lora_b.dtype)
    if need_dbias:
        return da, db, dy.sum(dim=0, dtype=torch.float32)
    return da, db, dy.new_empty(0, dtype=torch.float32)


def product(
    x: Tensor, w: Tensor, bias: Tensor | None, small: Tensor | None, factor: Tensor | None
) -> Tensor:
    """Multiply, with a low-rank product and a bias added on the way.

    The low-rank product is written first and the large one adds to it: one pass less
    over the result than the other way round. Small 16-bit results on a GPU are summed in
    float32 and rounded once, which is not left to cuBLAS
    (docs/decisions/0012-small-results-in-float32.md).

    Args:
        x: (M, K).
        w: (K, N).
        bias: (N,) in the dtype of x, or None.
        small: (M, r), or None.
        factor: (r, N), or None.

    Returns:
        (M, N) x·w + small·factor + bias.

    Example:
        >>> eye = torch.eye(2)
        >>> product(eye, eye, torch.ones(2), eye, eye).tolist()
        [[3.0, 1.0], [1.0, 3.0]]
    """
    results = x.shape[0] * w.shape[1]
    if x.is_cuda and x.element_size() == 2 and 0 < results <= _FEW_RESULTS:
        return _rounded_once(x, w, bias, small, factor)
    if small is None or factor is None:
        return x @ w if bias is None else torch.addmm(bias, x, w)
    y = small @ factor if bias is None else torch.addmm(bias, small, factor)
    return y.addmm_(x, w)


def _rounded_once(
    x: Tensor, w: Tensor, bias: Tensor | None, small: Tensor | None, factor: Tensor | None
) -> Tensor:
    """`product` of 16-bit CUDA tensors, all of its sums in float32."""
    y = torch.mm(x, w, out_dtype=torch.float32)
    if small is not None and factor is not None:
        y += torch.mm(small, factor, out_dtype=torch.float32)
    if bias is not None:
        y += bias
    return y.to(x.dtype)


def transposed_product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply leftᵀ·right, the sum over a batch's tokens.

    16-bit sums on a GPU are taken in float32 (`token_sum`), which also knows what cuBLAS 13
    does to an odd last row (docs/decisions/0008-the-last-row.md).

    Args:
        left: (M, p).
        right: (M, q), of the same dtype.

    Returns:
        (p, q), of their dtype; float32 of 16-bit ones on a GPU.

    Example:
        >>> transposed_product(torch.ones(3, 1), torch.ones(3, 2)).tolist()
        [[3.0, 3.0]]
    """
    if left.is_cuda and left.element_size() == 2:
        return token_sum(left, right)
    return left.T @ right


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
