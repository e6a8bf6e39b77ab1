"""`rms_norm` in plain torch."""

import torch
from torch import Tensor

from qlora_kit.ops.layout import arithmetic_dtype


def forward(
    x: Tensor, weight: Tensor, eps: float, unit_offset: bool, residual: Tensor | None, out: Tensor
) -> None:
    """Normalize rows; see `op.rms_norm`.

    Args:
        x: (M, H) or (M, G, H).
        weight: (H,).
        eps: added to the mean square.
        unit_offset: multiply by 1 + weight.
        residual: as x, added to the result; or None.
        out: as x, written. May be x or residual.

    Example:
        >>> out = torch.empty(1, 2)
        >>> forward(torch.tensor([[3.0, 3.0]]), torch.ones(2), 0.0, True, None, out)
        >>> out.tolist()
        [[2.0, 2.0]]
    """
    dtype = arithmetic_dtype(x)
    values = x.to(dtype)
    result = values * _scale(values, eps) * _gain(weight, dtype, unit_offset)
    if residual is not None:
        result = residual.to(dtype) + result
    out.copy_(result)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    unit_offset: bool,
    residual: Tensor | None,
    dx: Tensor,
    normalized: Tensor | None,
) -> None:
    """Gradient in x; see `op.rms_norm_backward`.

    Args:
        dy: as x, gradient of the result.
        x: (M, H) or (M, G, H).
        weight: (H,).
        eps: added to the mean square.
        unit_offset: multiply by 1 + weight.
        residual: as x, added to the gradient; or None.
        dx: as x, written. May be any of the inputs.
        normalized: as x, written with the forward's result without a residual; or None.

    Example:
        >>> dx = torch.empty(1, 2)
        >>> backward(torch.ones(1, 2), torch.ones(1, 2), torch.ones(2), 0.0, False, None, dx, None)
        >>> dx.tolist()  # a row of equal values only changes its scale, which the norm takes away
        [[0.0, 0.0]]
    """
    dtype = arithmetic_dtype(x)
    values = x.to(dtype)
    scale = _scale(values, eps)
    gain = _gain(weight, dtype, unit_offset)
    unit = values * scale
    inner = dy.to(dtype) * gain
    result = scale * (inner - unit * (inner * unit).mean(-1, keepdim=True))
    if residual is not None:
        result = residual.to(dtype) + result
    dx.copy_(result)
    if normalized is not None:
        normalized.copy_(unit * gain)


def _scale(values: Tensor, eps: float) -> Tensor:
    """One over the root of the mean square."""
    return torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)


def _gain(weight: Tensor, dtype: torch.dtype, unit_offset: bool) -> Tensor:
    """What each column is multiplied by."""
    gain = weight.to(dtype)
    return 1 + gain if unit_offset else gain
