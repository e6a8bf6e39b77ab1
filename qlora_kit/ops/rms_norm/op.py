"""`rms_norm`: each row divided by its root mean square and multiplied by a weight.

    out = [residual +] x · rsqrt(mean(x²) + eps) · gain,   gain = weight or 1 + weight

Arithmetic is float32, rounded once at the end (models round the product with the
weight, and the sum with the residual, once more). Results go where the caller says,
into a part of a wider buffer or over an input.

The pair is not differentiable by itself: a hand-written backward calls both. The
weight gets no gradient: norms are frozen in every method this package trains.
Source of the norm: arXiv:1910.07467.
"""

import torch
from torch import Tensor

from qlora_kit.core.errors import ShapeError
from qlora_kit.ops import jit
from qlora_kit.ops.backend import Backend, register_backend, resolve
from qlora_kit.ops.layout import check_like, check_rows, check_unrecorded
from qlora_kit.ops.rms_norm import cuda, reference

OP = "rms_norm"

register_backend(OP, Backend("reference", reference, lambda tensor: True, lambda: True))
register_backend(OP, Backend("cuda", cuda, cuda.serves, jit.is_available))


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    unit_offset: bool = False,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Normalize each row by its root mean square, multiply by a weight, add a residual.

    Args:
        x: (M, H) or, each of G heads normed by itself, (M, G, H); float32, bfloat16 or
            float16 with any distance between rows and between heads.
        weight: (H,), any float dtype.
        eps: added to the mean square.
        unit_offset: multiply by 1 + weight, as Gemma does.
        residual: as x, added to the result; or None.
        out: as x, written; a new contiguous tensor if None. May be x or residual itself,
            but not overlap them in another way.

    Returns:
        `out`.

    Raises:
        UserError: autograd records, and an input requires a gradient.
        ShapeError: shapes, dtypes, devices or strides do not fit.
        BackendError: a forced backend cannot serve the call.

    Example:
        >>> rms_norm(torch.tensor([[1.0, -7.0]]), torch.ones(2), 0.0)
        tensor([[ 0.2000, -1.4000]])
    """
    check_unrecorded(OP, x, weight, residual, out)
    _check(x, weight, residual)
    if out is None:
        out = x.new_empty(x.shape)
    else:
        check_like(OP, "out", out, x, x.shape)
    torch.ops.qlora_kit.rms_norm.default(x, weight, eps, unit_offset, residual, out)
    return out


def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    unit_offset: bool = False,
    residual: Tensor | None = None,
    dx: Tensor | None = None,
    normalized: Tensor | None = None,
) -> Tensor:
    """Gradient of `rms_norm` in x, and on request the forward's result again.

    dx = [residual +] scale · (g − x̂ · mean(g · x̂)) with g = dy · gain, x̂ = x · scale. The
    weight's gradient is not computed: norms are frozen.

    Args:
        dy: as x, gradient of the result.
        x: (M, H) or (M, G, H), as in the forward.
        weight: (H,), any float dtype.
        eps: added to the mean square.
        unit_offset: multiply by 1 + weight.
        residual: as x, added to the gradient (what came around the norm); or None.
        dx: as x, written; a new contiguous tensor if None. May be residual, dy or x itself.
        normalized: as x, written with x̂ · gain; or None. May be dy or x itself, not dx.

    Returns:
        `dx`.

    Raises:
        UserError: autograd records, and an input requires a gradient.
        ShapeError: shapes, dtypes, devices or strides do not fit.
        BackendError: a forced backend cannot serve the call.

    Example:
        >>> x, dy = torch.tensor([[1.0, -7.0]]), torch.tensor([[1.0, 0.0]])
        >>> rms_norm_backward(dy, x, torch.ones(2), 0.0)
        tensor([[0.1960, 0.0280]])
    """
    check_unrecorded(OP, dy, x, weight, residual, dx, normalized)
    _check(x, weight, residual)
    check_like(OP, "dy", dy, x, x.shape)
    check_like(OP, "normalized", normalized, x, x.shape)
    if dx is None:
        dx = x.new_empty(x.shape)
    else:
        check_like(OP, "dx", dx, x, x.shape)
    torch.ops.qlora_kit.rms_norm_backward.default(
        dy, x, weight, eps, unit_offset, residual, dx, normalized
    )
    return dx


def _check(x: Tensor, weight: Tensor, residual: Tensor | None) -> None:
    """Refuse inputs that do not fit together."""
    check_rows(OP, "x", x, (2, 3))
    if weight.shape != x.shape[-1:] or weight.device != x.device or weight.is_complex():
        raise ShapeError(
            f"rms_norm needs a float weight of shape ({x.shape[-1]},) on {x.device}, got "
            f"{tuple(weight.shape)} in {weight.dtype} on {weight.device}."
        )
    check_like(OP, "residual", residual, x, x.shape)


_LIBRARY = torch.library.Library("qlora_kit", "FRAGMENT")
_LIBRARY.define(
    "rms_norm(Tensor x, Tensor weight, float eps, bool unit_offset, Tensor? residual, "
    "Tensor(a!) out) -> ()"
)
_LIBRARY.define(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor weight, float eps, bool unit_offset, "
    "Tensor? residual, Tensor(a!) dx, Tensor(b!)? normalized) -> ()"
)


def _forward(
    x: Tensor, weight: Tensor, eps: float, unit_offset: bool, residual: Tensor | None, out: Tensor
) -> None:
    resolve(OP, x).forward(x, weight, eps, unit_offset, residual, out)


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    unit_offset: bool,
    residual: Tensor | None,
    dx: Tensor,
    normalized: Tensor | None,
) -> None:
    resolve(OP, x).backward(dy, x, weight, eps, unit_offset, residual, dx, normalized)


# By hand, as docs/decisions/0005 says. Nothing is returned, so a fake has nothing to make.
_LIBRARY.impl("rms_norm", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("rms_norm_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("qlora_kit::rms_norm")
def _(
    x: Tensor, weight: Tensor, eps: float, unit_offset: bool, residual: Tensor | None, out: Tensor
) -> None:
    return None


@torch.library.register_fake("qlora_kit::rms_norm_backward")
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    unit_offset: bool,
    residual: Tensor | None,
    dx: Tensor,
    normalized: Tensor | None,
) -> None:
    return None
