"""`nf4_linear`: a linear layer on an NF4 weight, with the LoRA branch inside.

    y = x·Wᵀ + scale·(x·Aᵀ)·Bᵀ + bias

Two torch custom ops, forward and backward, each with a schema, a fake
implementation and a flop formula, so that torch.compile, selective checkpointing
and memory tracing see through them. The backward is an op too: only then does
the pair pass `torch.library.opcheck`.

What is kept for the backward is what the gradients need and no more: X·Aᵀ for
dB, x for dA alone. With a frozen A (LoRA-FA) or without LoRA, x is not kept; the
frozen weight needs no gradient and so needs nothing.
"""

from collections.abc import Sequence
from contextvars import copy_context
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from qlora_kit.core.errors import ShapeError
from qlora_kit.ops import jit
from qlora_kit.ops.backend import Backend, register_backend, resolve
from qlora_kit.ops.nf4_linear import cuda, reference
from qlora_kit.quant.weight import NF4Weight

OP = "nf4_linear"

register_backend(OP, Backend("reference", reference, lambda x: True, lambda: True))
register_backend(OP, Backend("cuda", cuda, cuda.serves, jit.is_available))

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def nf4_linear(
    x: Tensor,
    weight: NF4Weight,
    bias: Tensor | None = None,
    *,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Multiply by an NF4 weight, and add a low-rank product in the same pass.

    Differentiable in x, bias, lora_a and lora_b; the weight is frozen. Products
    accumulate in float32; A and B are rounded to the dtype of x first.

    Args:
        x: (..., K) float32, bfloat16 or float16.
        weight: (N, K).
        bias: (N,) or None.
        lora_a: (r, K), any float dtype; given together with lora_b.
        lora_b: (N, r), any float dtype.
        scale: factor on the low-rank product.

    Returns:
        (..., N) in the dtype of x.

    Raises:
        ShapeError: shapes or dtypes do not fit together.
        BackendError: a forced backend cannot serve the call.

    Example:
        >>> weight = NF4Weight.quantize(torch.randn(128, 64))
        >>> nf4_linear(torch.randn(2, 3, 64), weight).shape
        torch.Size([2, 3, 128])
    """
    _check(x, weight, bias, lora_a, lora_b)
    y, _ = torch.ops.qlora_kit.nf4_linear.default(
        x.reshape(-1, x.shape[-1]),
        weight.packed,
        weight.absmax,
        weight.nested_absmax,
        weight.offset,
        list(weight.shape),
        weight.block_size,
        bias,
        lora_a,
        lora_b,
        scale,
    )
    return y.view(*x.shape[:-1], weight.shape[0])


def _check(
    x: Tensor,
    weight: NF4Weight,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
) -> None:
    """Refuse what the op cannot compute, in the user's words."""
    if len(weight.shape) != 2:
        raise ShapeError(f"nf4_linear needs an (N, K) weight, got shape {weight.shape}.")
    n, k = weight.shape
    if x.dim() == 0 or x.shape[-1] != k:
        raise ShapeError(
            f"nf4_linear needs x of shape (..., {k}) for a weight of shape {weight.shape}, "
            f"got {tuple(x.shape)}."
        )
    if x.dtype not in _DTYPES:
        raise ShapeError(f"nf4_linear needs x in {_DTYPES}, got {x.dtype}.")
    if bias is not None and bias.shape != (n,):
        raise ShapeError(f"nf4_linear needs a bias of shape ({n},), got {tuple(bias.shape)}.")
    if (lora_a is None) != (lora_b is None):
        raise ShapeError("nf4_linear needs lora_a and lora_b together, got one of them.")
    if lora_a is not None and lora_b is not None:
        rank = lora_a.shape[0]
        if lora_a.shape != (rank, k) or lora_b.shape != (n, rank):
            raise ShapeError(
                f"nf4_linear needs lora_a (r, {k}) and lora_b ({n}, r), got "
                f"{tuple(lora_a.shape)} and {tuple(lora_b.shape)}."
            )


def _weight(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    shape: Sequence[int],
    block_size: int,
    dtype: torch.dtype,
) -> NF4Weight:
    return NF4Weight(
        packed=packed,
        absmax=absmax,
        nested_absmax=nested_absmax,
        offset=offset,
        shape=tuple(shape),
        block_size=block_size,
        dtype=dtype,
    )


_LIBRARY = torch.library.Library("qlora_kit", "FRAGMENT")
_LIBRARY.define(
    "nf4_linear(Tensor x, Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? offset, "
    "int[] shape, int block_size, Tensor? bias, Tensor? lora_a, Tensor? lora_b, float scale) "
    "-> (Tensor y, Tensor xa)"
)
_LIBRARY.define(
    "nf4_linear_backward(Tensor dy, Tensor? x, Tensor packed, Tensor absmax, "
    "Tensor? nested_absmax, Tensor? offset, int[] shape, int block_size, Tensor? lora_a, "
    "Tensor? lora_b, Tensor xa, float scale, bool need_dx, bool need_da, bool need_db, "
    "bool need_dbias) -> (Tensor dx, Tensor da, Tensor db, Tensor dbias)"
)


def _forward(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    shape: Sequence[int],
    block_size: int,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    weight = _weight(packed, absmax, nested_absmax, offset, shape, block_size, x.dtype)
    y, xa = resolve(OP, x).forward(x, weight, bias, lora_a, lora_b, scale)
    return y, xa


@torch.library.register_fake("qlora_kit::nf4_linear")
def _(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    shape: Sequence[int],
    block_size: int,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    rank = 0 if lora_a is None else lora_a.shape[0]
    return x.new_empty((x.shape[0], shape[0])), x.new_empty((x.shape[0], rank))


def _backward(
    dy: Tensor,
    x: Tensor | None,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    shape: Sequence[int],
    block_size: int,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    xa: Tensor,
    scale: float,
    need_dx: bool,
    need_da: bool,
    need_db: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight = _weight(packed, absmax, nested_absmax, offset, shape, block_size, dy.dtype)
    dx, da, db, dbias = resolve(OP, dy).backward(
        dy, x, weight, lora_a, lora_b, xa, scale, need_dx, need_da, need_db, need_dbias
    )
    return dx, da, db, dbias


@torch.library.register_fake("qlora_kit::nf4_linear_backward")
def _(
    dy: Tensor,
    x: Tensor | None,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    shape: Sequence[int],
    block_size: int,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    xa: Tensor,
    scale: float,
    need_dx: bool,
    need_da: bool,
    need_db: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx = dy.new_empty((dy.shape[0], shape[1]) if need_dx else 0)
    da = torch.empty_like(lora_a) if need_da and lora_a is not None else dy.new_empty(0)
    db = torch.empty_like(lora_b) if need_db and lora_b is not None else dy.new_empty(0)
    dbias = dy.new_empty(shape[0] if need_dbias else 0, dtype=torch.float32)
    return dx, da, db, dbias


class _NF4Linear(torch.autograd.Function):
    """The op's gradient. Inputs in the schema's order; needs_input_grad goes by that order."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            y, xa = torch.ops.qlora_kit.nf4_linear.default(*inputs)
        x, packed, absmax, nested, offset, shape, block_size, bias, lora_a, lora_b, scale = inputs
        needs = ctx.needs_input_grad
        ctx.needs = needs[0], needs[8], needs[9], needs[7]
        ctx.choices = copy_context()  # autograd's threads know nothing of a forced backend
        ctx.mark_non_differentiable(xa)
        ctx.set_materialize_grads(False)
        x = x if needs[8] else None
        saved_xa = xa if needs[9] else None
        ctx.save_for_backward(x, packed, absmax, nested, offset, lora_a, lora_b, saved_xa)
        ctx.constants = shape, block_size, scale
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y, xa

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _dxa: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 11
        x, packed, absmax, nested, offset, lora_a, lora_b, xa = ctx.saved_tensors
        shape, block_size, scale = ctx.constants
        need_dx, need_da, need_db, need_dbias = ctx.needs
        xa = dy.new_empty((dy.shape[0], 0)) if xa is None else xa
        weight = (packed, absmax, nested, offset, shape, block_size)
        dx, da, db, dbias = ctx.choices.copy().run(
            torch.ops.qlora_kit.nf4_linear_backward.default,
            *(dy.contiguous(), x, *weight, lora_a, lora_b, xa, scale, *ctx.needs),
        )
        return (
            dx if need_dx else None,
            *(None,) * 6,
            dbias.to(ctx.bias_dtype) if need_dbias else None,
            da if need_da else None,
            db if need_db else None,
            None,
        )


def _autograd(*inputs: Any) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = _NF4Linear.apply(*inputs)
    return result


# Registered by hand: torch.library.custom_op's own machinery costs 80 µs more per call, which a
# step of small batches cannot hide (docs/decisions/0005).
_LIBRARY.impl("nf4_linear", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("nf4_linear", _autograd, "Autograd")
_LIBRARY.impl("nf4_linear_backward", _backward, "CompositeExplicitAutograd")


def _product_flops(m: int, shape: Sequence[int], rank: int) -> int:
    """Multiply-adds, counted twice, of one product with the weight and one with A and B."""
    n, k = shape
    return 2 * m * (n * k + rank * (n + k))


@register_flop_formula(torch.ops.qlora_kit.nf4_linear)
def _forward_flops(
    x: Sequence[int],
    packed: Sequence[int],
    absmax: Sequence[int],
    nested_absmax: Sequence[int] | None,
    offset: Sequence[int] | None,
    shape: Sequence[int],
    block_size: int,
    bias: Sequence[int] | None,
    lora_a: Sequence[int] | None,
    *_: object,
    out_shape: object = None,
) -> int:
    return _product_flops(x[0], shape, 0 if lora_a is None else lora_a[0])


@register_flop_formula(torch.ops.qlora_kit.nf4_linear_backward)
def _backward_flops(
    dy: Sequence[int],
    x: Sequence[int] | None,
    packed: Sequence[int],
    absmax: Sequence[int],
    nested_absmax: Sequence[int] | None,
    offset: Sequence[int] | None,
    shape: Sequence[int],
    block_size: int,
    lora_a: Sequence[int] | None,
    lora_b: Sequence[int] | None,
    xa: Sequence[int],
    scale: float,
    need_dx: bool,
    need_da: bool,
    need_db: bool,
    need_dbias: bool,
    out_shape: object = None,
) -> int:
    m, (n, k) = dy[0], shape
    rank = 0 if lora_a is None else lora_a[0]
    macs = m * n * k * need_dx
    macs += m * n * rank * (need_dx or need_da)  # dY·B
    macs += m * k * rank * (need_dx + need_da)  # (dY·B)·A and (dY·B)ᵀ·X
    macs += m * n * rank * need_db
    return 2 * macs
