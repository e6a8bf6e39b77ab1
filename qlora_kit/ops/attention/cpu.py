"""torch's blocked attention for CPUs. Keys and values are expanded to the heads of q.

Documents are served one by one: on a CPU their starts are there to be read. Newer torch
takes fewer heads for k and v, older torch reads beyond them; expanding is right in both.
Each (row, head) is one thread's, so the results repeat.
"""

from itertools import pairwise

import torch
from torch import Tensor

from qlora_kit.ops.attention.rule import AttentionRule, Call, Documents


def refuses(call: Call) -> str | None:
    """Why it cannot serve a call, or None.

    Args:
        call: what decides.

    Returns:
        A short reason, None if it can.
    """
    if call.device.type != "cpu":
        return "needs tensors on the CPU"
    if call.window or call.softcap:
        return "has no window and no softcap"
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, documents: Documents | None
) -> tuple[Tensor, Tensor]:
    """Attend.

    Args:
        q: (B, T, Hq, D) floating point; B = 1 with documents.
        k: (B, T, Hk, D).
        v: (B, T, Hk, D).
        rule: scale alone.
        documents: starts on the CPU, or None.

    Returns:
        (B, T, Hq, D) contiguous; (B, Hq, T) logsumexp, float32 (float64 for float64).
    """
    if documents is not None:
        parts = [forward(q[:, s], k[:, s], v[:, s], rule, None) for s in _slices(documents)]
        return torch.cat([out for out, _ in parts], 1), torch.cat([lse for _, lse in parts], 2)
    k, v = _expand(k, q.shape[2]), _expand(v, q.shape[2])
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), 0.0, True, scale=rule.scale
    )
    return out.transpose(1, 2), lse


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
    """Differentiate `forward`.

    Args:
        dout: (B, T, Hq, D) contiguous.
        q: as in the forward.
        k: as in the forward.
        v: as in the forward.
        out: its result.
        lse: its logsumexp.
        rule: scale alone.
        documents: as in the forward.

    Returns:
        Gradients of q, k and v, contiguous.
    """
    if documents is not None:
        parts = [
            backward(dout[:, s], q[:, s], k[:, s], v[:, s], out[:, s], lse[:, :, s], rule, None)
            for s in _slices(documents)
        ]
        dq, dk, dv = (torch.cat(gradients, 1) for gradients in zip(*parts, strict=True))
        return dq, dk, dv
    heads = k.shape[2]
    k, v = _expand(k, q.shape[2]), _expand(v, q.shape[2])
    gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default(
        *(t.transpose(1, 2) for t in (dout, q, k, v, out)), lse, 0.0, True, scale=rule.scale
    )
    dq, dk, dv = (gradient.transpose(1, 2) for gradient in gradients)
    return dq, _reduce(dk, heads), _reduce(dv, heads)


def _slices(documents: Documents) -> list[slice]:
    starts = documents.starts.tolist()
    return [slice(a, b) for a, b in pairwise(starts) if a < b]


def _expand(t: Tensor, heads: int) -> Tensor:
    """(B, T, Hk, D) to (B, T, heads, D): query head h reads key head h // (heads / Hk)."""
    return t if t.shape[2] == heads else t.repeat_interleave(heads // t.shape[2], 2)


def _reduce(gradient: Tensor, heads: int) -> Tensor:
    """The gradient of `_expand`; summed in at least float32."""
    if gradient.shape[2] == heads:
        return gradient
    wide = torch.promote_types(gradient.dtype, torch.float32)
    return gradient.unflatten(2, (heads, -1)).sum(3, dtype=wide).to(gradient.dtype)
