"""Causal self-attention as an explicit pair, to be called inside an autograd.Function.

`attention_forward` and `attention_backward` know no autograd: the caller decides what is kept
and what is computed again. Kept are q, k, v, the output and one logsumexp per query, float32
and of one shape whichever backend made it, so that the two halves need not run on the same.

With documents the batch is one row of all its tokens: none of them crosses a row's end, so
this changes nothing but the shape of the logsumexp. If they are all equally long, they *are*
the rows of a batch, and the fixed-length kernels serve them.
"""

from dataclasses import replace

import torch
from torch import Tensor

from qlora_kit.core.errors import ShapeError
from qlora_kit.core.log import log_once
from qlora_kit.ops.attention.choose import BACKENDS, choose
from qlora_kit.ops.attention.rule import AttentionRule, Call, Documents

__all__ = ["AttentionRule", "Documents", "Saved", "attention_backward", "attention_forward"]

_ALIGNMENT_BYTES = 16

Saved = tuple[Tensor]
"""What the backward needs beside q, k, v and out."""


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, documents: Documents | None = None
) -> tuple[Tensor, Saved]:
    """Attend, each token to itself and those before it in its document.

    Args:
        q: (B, T, Hq, D) floating point, last dimension contiguous, other strides free.
        k: (B, T, Hk, D), Hk a divisor of Hq; query head h reads key head h // (Hq / Hk).
        v: (B, T, Hk, D).
        rule: scale, window, softcap, and whether the bits must repeat.
        documents: where they start, on the device of q; None if each row is one.

    Returns:
        out: (B, T, Hq, D) contiguous, in the dtype of q.
        saved: what the backward needs beside q, k, v and out: (B·T·Hq,) one logsumexp per
        query, float32 (float64 for float64), in an order that is ours.

    Raises:
        ShapeError: shapes or dtypes do not fit together.
        BackendError: a forced backend cannot serve the call.

    Example:
        >>> import torch
        >>> q, k, v = torch.randn(1, 5, 4, 8), torch.randn(1, 5, 2, 8), torch.randn(1, 5, 2, 8)
        >>> out, saved = attention_forward(q, k, v, AttentionRule(scale=8**-0.5))
        >>> out.shape, torch.allclose(out[0, 0, 3], v[0, 0, 1])  # the first token sees itself
        (torch.Size([1, 5, 4, 8]), True)
    """
    _check(q, k, v, documents)
    shape = q.shape
    if not q.numel():
        return q.new_empty(shape), (q.new_empty(0, dtype=_wide(q)),)
    documents, (q, k, v) = _as_rows(documents, q, k, v)
    rule = _in_use(rule, q, documents)
    name = choose(Call.of(q, rule, documents=documents is not None))
    q, k, v = _aligned(name, q, k, v)
    out, lse = BACKENDS[name].forward(q, k, v, rule, documents)
    return out.contiguous().view(shape), (lse.reshape(-1),)


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    saved: Saved,
    rule: AttentionRule,
    documents: Documents | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate `attention_forward`.

    Args:
        dout: (B, T, Hq, D) gradient of out; copied if not contiguous.
        q: as in the forward.
        k: as in the forward.
        v: as in the forward.
        out: its result.
        saved: what it returned beside.
        rule: as in the forward.
        documents: as in the forward.

    Returns:
        Gradients of q, k and v, each contiguous, in the dtype of q.

    Raises:
        ShapeError: shapes or dtypes do not fit together.
        BackendError: a forced backend cannot serve the call.

    Example:
        >>> import torch
        >>> q, k, v = torch.randn(1, 5, 4, 8), torch.randn(1, 5, 2, 8), torch.randn(1, 5, 2, 8)
        >>> rule = AttentionRule(scale=8**-0.5)
        >>> out, saved = attention_forward(q, k, v, rule)
        >>> dq, dk, dv = attention_backward(torch.ones_like(out), q, k, v, out, saved, rule)
        >>> bool(dq[0, 0].abs().max() < 1e-5), dv.shape  # it sees itself alone: no choice
        (True, torch.Size([1, 5, 2, 8]))
    """
    _check(q, k, v, documents)
    if dout.shape != q.shape or out.shape != q.shape:
        raise ShapeError(
            f"attention_backward needs dout and out of q's shape {tuple(q.shape)}, got "
            f"{tuple(dout.shape)} and {tuple(out.shape)}."
        )
    if not q.numel():
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    of_q, of_k = q.shape, k.shape
    documents, (dout, q, k, v, out) = _as_rows(documents, dout.contiguous(), q, k, v, out)
    rule = _in_use(rule, q, documents)
    lse = saved[0].view(q.shape[0], q.shape[2], q.shape[1])
    name = choose(Call.of(q, rule, documents=documents is not None))
    dout, q, k, v, out = _aligned(name, dout, q, k, v, out)
    dq, dk, dv = BACKENDS[name].backward(dout, q, k, v, out, lse, rule, documents)
    return dq.contiguous().view(of_q), dk.contiguous().view(of_k), dv.contiguous().view(of_k)


def _as_rows(
    documents: Documents | None, *tensors: Tensor
) -> tuple[Documents | None, list[Tensor]]:
    """One row of all tokens if there are documents, or a row for each if they are as long."""
    if documents is None:
        return None, list(tensors)
    tokens = tensors[0].shape[0] * tensors[0].shape[1]
    if (documents.starts.numel() - 1) * documents.longest == tokens:
        return None, [t.reshape(-1, documents.longest, *t.shape[2:]) for t in tensors]
    return documents, [t.reshape(1, tokens, *t.shape[2:]) for t in tensors]


def _in_use(rule: AttentionRule, q: Tensor, documents: Documents | None) -> AttentionRule:
    """The rule without a window that hides nothing: more kernels serve it."""
    reach = q.shape[1] if documents is None else documents.longest
    if rule.window is None or rule.window < reach:
        return rule
    return replace(rule, window=None)


def _aligned(name: str, *tensors: Tensor) -> list[Tensor]:
    """Copies of those tensors that a kernel of a GPU could not read 16 bytes at a time."""
    if name not in ("cudnn", "flash"):
        return list(tensors)
    return [
        t if _is_aligned(t) else t.clone(memory_format=torch.contiguous_format) for t in tensors
    ]


def _is_aligned(t: Tensor) -> bool:
    size = t.element_size()
    steps = (step * size for step, n in zip(t.stride()[:-1], t.shape, strict=False) if n > 1)
    if t.data_ptr() % _ALIGNMENT_BYTES or any(step % _ALIGNMENT_BYTES for step in steps):
        log_once(
            f"attention: copies tensors whose rows are not {_ALIGNMENT_BYTES} bytes apart: "
            f"strides {t.stride()} of {t.dtype}, from byte {t.data_ptr() % _ALIGNMENT_BYTES}"
        )
        return False
    return True


def _check(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> None:
    """Refuse what no backend can compute."""
    b, t, heads, dim = q.shape if q.dim() == 4 else (0, 0, 0, 0)
    of_k = (b, t, k.shape[2] if k.dim() == 4 else 0, dim)
    if q.dim() != 4 or k.shape != of_k or v.shape != of_k or (of_k[2] and heads % of_k[2]):
        raise ShapeError(
            "attention needs q (B, T, Hq, D) and k, v (B, T, Hk, D) with Hk a divisor of Hq, "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}."
        )
    if not q.dtype == k.dtype == v.dtype or not q.dtype.is_floating_point:
        raise ShapeError(
            f"attention needs q, k and v of one float dtype, got {q.dtype}, {k.dtype}, {v.dtype}."
        )
    if q.stride(-1) != 1 or k.stride(-1) != 1 or v.stride(-1) != 1:
        raise ShapeError("attention needs q, k and v with a contiguous last dimension.")
    if documents is not None:
        _check_documents(q, documents)


def _check_documents(q: Tensor, documents: Documents) -> None:
    starts = documents.starts
    if starts.dtype != torch.int32 or starts.dim() != 1 or starts.device != q.device:
        raise ShapeError(
            f"attention needs the documents' starts as (n + 1,) int32 on {q.device}, got "
            f"{starts.dtype} of shape {tuple(starts.shape)} on {starts.device}."
        )


def _wide(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)
