"""`attention`: causal self-attention, differentiable, for packed and plain rows.

Two torch custom ops around the explicit pair, each with a schema, a fake implementation and a
flop formula, so that torch.compile, selective checkpointing and memory tracing see through
them. Kept for the backward are q, k, v, the output and one number per query.
"""

from collections.abc import Sequence
from contextvars import copy_context
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from qlora_kit.ops.attention.pair import attention_backward, attention_forward
from qlora_kit.ops.attention.rule import AttentionRule, Documents

OP = "attention"


def attention(
    q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, documents: Documents | None = None
) -> Tensor:
    """Attend, each token to itself and those before it in its document.

    Differentiable in q, k and v.

    Args:
        q: (B, T, Hq, D) floating point; copied if its last dimension is not contiguous.
        k: (B, T, Hk, D), Hk a divisor of Hq.
        v: (B, T, Hk, D).
        rule: scale, window, softcap, and whether the bits must repeat.
        documents: where they start, on the device of q; None if each row is one.

    Returns:
        (B, T, Hq, D) contiguous, in the dtype of q.

    Raises:
        ShapeError: shapes or dtypes do not fit together.
        BackendError: a forced backend cannot serve the call.

    Example:
        >>> q, k, v = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 2, 8), torch.randn(2, 5, 2, 8)
        >>> attention(q, k, v, AttentionRule(scale=8**-0.5)).shape
        torch.Size([2, 5, 4, 8])
    """
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    starts, longest = (None, 0) if documents is None else (documents.starts, documents.longest)
    out: Tensor = torch.ops.qlora_kit.attention.default(
        q, k, v, rule.scale, rule.window, rule.softcap, rule.deterministic, starts, longest
    )[0]
    return out


_LIBRARY = torch.library.Library("qlora_kit", "FRAGMENT")
_RULE = "float scale, int? window, float? softcap, bool deterministic, "
_DOCUMENTS = "Tensor? starts, SymInt longest"
_LIBRARY.define(
    f"attention(Tensor q, Tensor k, Tensor v, {_RULE}{_DOCUMENTS}) -> (Tensor out, Tensor lse)"
)
_LIBRARY.define(
    "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_RULE}{_DOCUMENTS}) -> (Tensor dq, Tensor dk, Tensor dv)"
)


def _documents(starts: Tensor | None, longest: int) -> Documents | None:
    return None if starts is None else Documents(starts, longest)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    deterministic: bool,
    starts: Tensor | None,
    longest: int,
) -> tuple[Tensor, Tensor]:
    rule = AttentionRule(scale, window, softcap, deterministic)
    out, (lse,) = attention_forward(q, k, v, rule, _documents(starts, longest))
    return out, lse


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    deterministic: bool,
    starts: Tensor | None,
    longest: int,
) -> tuple[Tensor, Tensor, Tensor]:
    rule = AttentionRule(scale, window, softcap, deterministic)
    documents = _documents(starts, longest)
    return attention_backward(dout, q, k, v, out, (lse,), rule, documents)


@torch.library.register_fake("qlora_kit::attention")
def _(q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    b, t, heads, _d = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(b * t * heads, dtype=wide)


@torch.library.register_fake("qlora_kit::attention_backward")
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


class _Attention(torch.autograd.Function):
    """The op's gradient. Inputs in the schema's order."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = torch.ops.qlora_kit.attention.default(*inputs)
        q, k, v, *rule, starts, longest = inputs
        ctx.choices = copy_context()  # autograd's threads know nothing of a forced backend
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, out, lse, starts)
        ctx.constants = rule, longest
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, _dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        if dout is None:
            return (None,) * 9
        *tensors, starts = ctx.saved_tensors
        rule, longest = ctx.constants
        gradients = ctx.choices.copy().run(
            torch.ops.qlora_kit.attention_backward.default,
            *(dout.contiguous(), *tensors, *rule, starts, longest),
        )
        return (*gradients, *(None,) * 6)


def _autograd(*inputs: Any) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = _Attention.apply(*inputs)
    return result


# Registered by hand, as nf4_linear is: docs/decisions/0005.
_LIBRARY.impl("attention", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("attention", _autograd, "Autograd")
_LIBRARY.impl("attention_backward", _backward, "CompositeExplicitAutograd")


def _product_flops(
    q: Sequence[int], window: int | None, starts: Sequence[int] | None, longest: int
) -> int:
    """One product of all queries with the keys in reach; causality is not counted, as in torch."""
    b, t, heads, dim = q
    reach = t if window is None else min(t, window)
    reach = reach if starts is None else min(reach, longest)
    return 2 * b * t * heads * reach * dim


@register_flop_formula(torch.ops.qlora_kit.attention)
def _forward_flops(
    q: Sequence[int],
    k: Sequence[int],
    v: Sequence[int],
    scale: float,
    window: int | None,
    softcap: float | None,
    deterministic: bool,
    starts: Sequence[int] | None,
    longest: int,
    *,
    out_shape: object = None,
) -> int:
    return 2 * _product_flops(q, window, starts, longest)


@register_flop_formula(torch.ops.qlora_kit.attention_backward)
def _backward_flops(
    dout: Sequence[int],
    q: Sequence[int],
    k: Sequence[int],
    v: Sequence[int],
    out: Sequence[int],
    lse: Sequence[int],
    scale: float,
    window: int | None,
    softcap: float | None,
    deterministic: bool,
    starts: Sequence[int] | None,
    longest: int,
    *,
    out_shape: object = None,
) -> int:
    return 5 * _product_flops(q, window, starts, longest)  # the scores are computed again
