"""cuDNN's fused attention: the fastest on Hopper, for rows of one document each.

torch reaches it through `aten::_scaled_dot_product_cudnn_attention`. What its source says
(aten/src/ATen/native/cudnn/MHA.cpp and transformers/cuda/sdp_utils.cpp, late 2025 and 2026), and
tests/ops/test_attention_gpu.py holds it to:

- q, k and v are (B, H, T, D) of any strides with a contiguous last dimension; k and v may
  have fewer heads. The output is dense in the order of q's strides, so for a (B, T, H, D)
  view, transposed, it flattens to (B·T, H·D) without a copy; so do the gradients.
- A compiled graph is kept for each shape and layout *of q, k and v*. The layouts of the
  output and of its gradient are not part of the key, though they are compiled in: a second
  layout of dout would be read wrongly. Hence dout is made contiguous here, always.
- The variable-length form compiles its graph anew at every call, so documents go elsewhere.
- There is no deterministic backward; torch itself refuses it under
  `use_deterministic_algorithms`. No window and no softcap either.
- Below 9.15.1, lengths that are no multiple of 128 were wrong on some cards; torch does not
  prefer it there, and we refuse it. Rows of a single token are not for it either.
"""

import torch
from torch import Tensor

from qlora_kit.ops.attention.rule import AttentionRule, Call, Documents

_OLDEST = 91501
_HALVES = (torch.bfloat16, torch.float16)
_lse_rank = 3  # (B, H, T), or (B, H, T, 1) in some versions of torch: learned from the forward


def refuses(call: Call) -> str | None:
    """Why it cannot serve a call, or None.

    Args:
        call: what decides.

    Returns:
        A short reason, None if it can.
    """
    if call.device.type != "cuda" or torch.version.hip is not None:
        return "needs an NVIDIA GPU"
    return _refuses_on_gpu(call)


def _refuses_on_gpu(call: Call) -> str | None:  # needs a GPU
    version = torch.backends.cudnn.version() or 0
    capability = torch.cuda.get_device_capability(call.device)
    widest = 256 if capability == (9, 0) else 128
    if call.dtype not in _HALVES:
        return "needs bfloat16 or float16"
    if version < _OLDEST:
        return f"needs cuDNN {_OLDEST}, found {version}"
    if capability[0] < 8:
        return "needs compute capability 8.0"
    if call.head_dim % 8 or call.head_dim > widest:
        return f"needs a head dimension that is a multiple of 8, at most {widest}"
    if call.window or call.softcap:
        return "has no window and no softcap"
    if call.documents:
        return "is for rows of one document"
    if call.single:
        return "is for rows of more than one token"
    if call.deterministic:
        return "has no deterministic backward"
    return None


def forward(  # needs a GPU
    q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, documents: Documents | None
) -> tuple[Tensor, Tensor]:
    """Attend.

    Args:
        q: (B, T, Hq, D) bfloat16 or float16, last dimension contiguous.
        k: (B, T, Hk, D).
        v: (B, T, Hk, D).
        rule: scale alone.
        documents: None.

    Returns:
        (B, T, Hq, D) contiguous; (B, Hq, T) float32 logsumexp.
    """
    global _lse_rank  # noqa: PLW0603
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention.default(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        None,
        True,
        0.0,
        True,
        False,
        scale=rule.scale,
    )
    _lse_rank = lse.dim()
    b, t, heads, _ = q.shape
    return out.transpose(1, 2), lse.view(b, heads, t)


def backward(  # needs a GPU
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
        documents: None.

    Returns:
        Gradients of q, k and v, contiguous.
    """
    t = q.shape[1]
    unused = q.new_empty((), dtype=torch.int64)  # the dropout's seed
    gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default(
        dout.transpose(1, 2),
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        out.transpose(1, 2),
        lse if _lse_rank == 3 else lse.unsqueeze(-1),
        unused,
        unused,
        None,
        None,
        None,
        t,
        t,
        0.0,
        True,
        scale=rule.scale,
    )
    dq, dk, dv = (gradient.transpose(1, 2) for gradient in gradients)
    return dq, dk, dv
