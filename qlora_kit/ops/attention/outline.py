"""Attention on the meta device: what a kernel would return, and nothing computed.

A step traced on the meta device shows what it allocates; the calls go through the op, so that
what traces can see them and add what a kernel needs besides.
"""

import torch
from torch import Tensor

from qlora_kit.ops.attention.rule import AttentionRule, Call, Documents


def refuses(call: Call) -> str | None:
    """Why it cannot serve a call, or None.

    Args:
        call: what decides.

    Returns:
        A short reason, None if it can.

    Example:
        >>> q = torch.empty(1, 3, 2, 8)
        >>> refuses(Call.of(q, AttentionRule(scale=1.0), documents=False))
        'is for tensors without memory'
    """
    return None if call.device.type == "meta" else "is for tensors without memory"


def forward(
    q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, documents: Documents | None
) -> tuple[Tensor, Tensor]:
    """Outline a forward pass.

    Args:
        q: (B, T, Hq, D) on the meta device.
        k: (B, T, Hk, D).
        v: (B, T, Hk, D).
        rule: what would be computed.
        documents: where they start, or None.

    Returns:
        (B, T, Hq, D) contiguous; (B·T·Hq,) float32 logsumexp.
    """
    out, lse = torch.ops.qlora_kit.attention.default(q, k, v, *_options(rule, documents))
    return out, lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    rule: AttentionRule,
    documents: Documents | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outline a backward pass.

    Args:
        dout: (B, T, Hq, D) contiguous.
        q: as in the forward.
        k: as in the forward.
        v: as in the forward.
        out: its result.
        lse: its logsumexp.
        rule: what would be computed.
        documents: as in the forward.

    Returns:
        Gradients of q, k and v, contiguous.
    """
    inputs = (dout, q, k, v, out, lse)
    dq, dk, dv = torch.ops.qlora_kit.attention_backward.default(*inputs, *_options(rule, documents))
    return dq, dk, dv


_Options = tuple[float, int | None, float | None, bool, Tensor | None, int]


def _options(rule: AttentionRule, documents: Documents | None) -> _Options:
    """The op's arguments behind the tensors."""
    starts, longest = (None, 0) if documents is None else (documents.starts, documents.longest)
    return rule.scale, rule.window, rule.softcap, rule.deterministic, starts, longest
