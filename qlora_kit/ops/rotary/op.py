"""`rotary_`: rotary position embeddings, in place or from one tensor into another.

Values j and j + R/2 of a head are a point in the plane, which turns by an angle that
depends on the token's position and on j:

    (a, b) -> (a·cos − b·sin, b·cos + a·sin)

Arithmetic is float32, rounded once. The backward turns the other way: `inverse`
applies the transpose, which is the inverse as well unless the model scales cos and
sin (YaRN does). Not differentiable by itself: a hand-written backward calls it.
Source: arXiv:2104.09864.
"""

import torch
from torch import Tensor

from qlora_kit.core.errors import ShapeError
from qlora_kit.ops import jit
from qlora_kit.ops.backend import Backend, register_backend, resolve
from qlora_kit.ops.layout import DTYPES, check_like, check_rows, check_unrecorded
from qlora_kit.ops.rotary import cuda, reference

OP = "rotary"

register_backend(OP, Backend("reference", reference, lambda tensor: True, lambda: True))
register_backend(OP, Backend("cuda", cuda, cuda.serves, jit.is_available))


def rotary_(
    heads: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    inverse: bool = False,
    source: Tensor | None = None,
) -> Tensor:
    """Turn the first R values of every head by its token's angles.

    Args:
        heads: (M, G, D) float32, bfloat16 or float16, any distance between tokens and
            between heads: a part of a projection's result. Modified; its values from R on
            stay.
        cos: (rows, R), any float dtype, R even and at most D, in transformers' layout: both
            halves of a row are equal, and the first is read. `rows` is M, or divides it:
            token m then uses row m % rows.
        sin: (rows, R), of the dtype of `cos`.
        inverse: turn the other way, as the backward does.
        source: as heads, whose values are turned and go to heads, those from R on as well;
            None for heads itself. Must not overlap heads.

    Returns:
        `heads`.

    Raises:
        UserError: autograd records, and an input requires a gradient.
        ShapeError: shapes, dtypes, devices or strides do not fit.
        BackendError: a forced backend cannot serve the call.

    Example:
        >>> angle = torch.tensor([[0.5, 0.5]])
        >>> heads = torch.tensor([[[1.0, 0.0]]])
        >>> rotary_(heads, angle.cos(), angle.sin())
        tensor([[[0.8776, 0.4794]]])
        >>> rotary_(heads, angle.cos(), angle.sin(), inverse=True)
        tensor([[[1., 0.]]])
    """
    check_unrecorded(OP, heads, cos, sin, source)
    check_rows(OP, "heads", heads, (3,))
    check_like(OP, "source", source, heads, heads.shape)
    _check_angles(heads, cos, sin)
    turned = cos.shape[1]
    if source is not None and turned < heads.shape[2]:
        heads[..., turned:].copy_(source[..., turned:])
    torch.ops.qlora_kit.rotary_.default(heads, cos, sin, inverse, source)
    return heads


def _check_angles(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Refuse angles that do not fit the heads."""
    tokens, _, width = heads.shape
    fits = cos.dim() == 2 and cos.shape == sin.shape
    fits = fits and cos.shape[1] % 2 == 0 and cos.shape[1] <= width
    if not fits or (tokens and (cos.shape[0] == 0 or tokens % cos.shape[0])):
        raise ShapeError(
            f"rotary_ needs cos and sin of shape (rows, R), with rows dividing {tokens} and R even "
            f"and at most {width}, for heads of shape {tuple(heads.shape)}; got "
            f"{tuple(cos.shape)} and {tuple(sin.shape)}."
        )
    if cos.dtype not in DTYPES or cos.dtype != sin.dtype:
        raise ShapeError(
            f"rotary_ needs cos and sin in one of {DTYPES}, got {cos.dtype} and {sin.dtype}."
        )
    if cos.device != heads.device or sin.device != heads.device:
        raise ShapeError(
            f"rotary_ needs cos and sin on {heads.device}, got {cos.device} and {sin.device}."
        )


_LIBRARY = torch.library.Library("qlora_kit", "FRAGMENT")
_LIBRARY.define(
    "rotary_(Tensor(a!) heads, Tensor cos, Tensor sin, bool inverse, Tensor? source=None) -> ()"
)


def _rotate(
    heads: Tensor, cos: Tensor, sin: Tensor, inverse: bool, source: Tensor | None = None
) -> None:
    resolve(OP, heads).rotate_(heads, cos, sin, inverse, source)


# By hand, as docs/decisions/0005 says. Nothing is returned, so a fake has nothing to make.
_LIBRARY.impl("rotary_", _rotate, "CompositeExplicitAutograd")


@torch.library.register_fake("qlora_kit::rotary_")
def _(heads: Tensor, cos: Tensor, sin: Tensor, inverse: bool, source: Tensor | None = None) -> None:
    return None
