"""FlashAttention as torch ships it: documents, windows, and a deterministic backward.

`aten::_flash_attention_forward` and `_flash_attention_backward` take (B, T, H, D) tensors of
any strides with a contiguous last dimension, fewer heads for k and v, a left window, and
(tokens, H, D) tensors with the documents' starts. The output is dense in the order of q's
strides: contiguous for our views.

torch's own kernels are FlashAttention 2. On Hopper FlashAttention 3 is faster, and torch has a
switch that puts an installed package behind the same ops (`activate_flash_attention_impl`, of
the whole process): if `flash_attn_interface` is there, it is turned at the first call. What a
user has activated (FlashAttention 4, say) stays. The package of FlashAttention 2 holds torch's
kernels over again and is not used.

The backward adds to dq from several thread blocks in any order, unless
`torch.use_deterministic_algorithms` is on when it is called; there is no argument for it. So
the switch is turned for the duration of the call. It is a switch of the whole process, which
at worst makes another thread's op deterministic as well.

The kernels know a softcap, but torch compiles them without; `chunked` serves it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from qlora_kit.core.log import log_once
from qlora_kit.ops.attention.rule import AttentionRule, Call, Documents

_HALVES = (torch.bfloat16, torch.float16)


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
    major, minor = torch.cuda.get_device_capability(call.device)
    small = (major == 8 and minor > 0) or major == 12
    widest = 192 if small else 256  # less shared memory: torch's own limit for the backward
    if call.dtype not in _HALVES:
        return "needs bfloat16 or float16"
    if major < 8:
        return "needs compute capability 8.0"
    if call.head_dim % 8 or call.head_dim > widest:
        return f"needs a head dimension that is a multiple of 8, at most {widest}"
    if call.softcap:
        return "has no softcap"
    return None


@cache
def activate_installed(major: int) -> str | None:
    """Put an installed FlashAttention 3 behind torch's ops, once.

    Args:
        major: of the GPU's compute capability.

    Returns:
        `"FA3"` if it serves from now on; None if it does not, or something else does already.

    Example:
        >>> activate_installed(8) is None  # it is written for Hopper
        True
    """
    if major != 9 or find_spec("flash_attn_interface") is None:
        return None
    known: list[str] = getattr(nn.attention, "list_flash_attention_impls", list)()  # torch 2.11
    current = getattr(nn.attention, "current_flash_attention_impl", lambda: None)()
    if "FA3" not in known or current is not None:
        return None
    try:
        nn.attention.activate_flash_attention_impl("FA3")
    except (ImportError, OSError, RuntimeError) as error:
        log_once(f"attention: the installed FlashAttention 3 does not load: {error}")
        return None
    log_once("attention: FlashAttention 3, an installed package, serves as flash")
    return "FA3"


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """Turn torch's switch on for one call."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    if not wanted or (before and not warn_only):
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def forward(  # needs a GPU
    q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, documents: Documents | None
) -> tuple[Tensor, Tensor]:
    """Attend.

    Args:
        q: (B, T, Hq, D) bfloat16 or float16, last dimension contiguous; B = 1 with documents.
        k: (B, T, Hk, D).
        v: (B, T, Hk, D).
        rule: scale and window.
        documents: starts on the same device, or None.

    Returns:
        (B, T, Hq, D) contiguous; (B, Hq, T) float32 logsumexp.
    """
    activate_installed(torch.cuda.get_device_capability(q.device)[0])
    starts, longest = (None, q.shape[1]) if documents is None else _lengths(documents)
    if starts is not None:
        q, k, v = q[0], k[0], v[0]
    with _deterministic(rule.deterministic):  # FlashAttention 3 splits keys otherwise
        out, lse, *_ = torch.ops.aten._flash_attention_forward.default(
            q,
            k,
            v,
            starts,
            starts,
            longest,
            longest,
            0.0,
            True,
            False,
            scale=rule.scale,
            window_size_left=_left(rule),
            window_size_right=0,
        )
    return (out, lse) if starts is None else (out.unsqueeze(0), lse.unsqueeze(0))


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
        rule: scale, window, and whether two runs must give the same bits.
        documents: as in the forward.

    Returns:
        Gradients of q, k and v, contiguous.
    """
    starts, longest = (None, q.shape[1]) if documents is None else _lengths(documents)
    if starts is not None:
        dout, q, k, v, out, lse = (t[0] for t in (dout, q, k, v, out, lse))
    unused = q.new_empty(2, dtype=torch.uint64)  # the dropout's state
    with _deterministic(rule.deterministic):
        dq, dk, dv = torch.ops.aten._flash_attention_backward.default(
            dout,
            q,
            k,
            v,
            out,
            lse,
            starts,
            starts,
            longest,
            longest,
            0.0,
            True,
            unused,
            unused,
            scale=rule.scale,
            window_size_left=_left(rule),
            window_size_right=0,
        )
    if starts is None:
        return dq, dk, dv
    return dq.unsqueeze(0), dk.unsqueeze(0), dv.unsqueeze(0)


def _lengths(documents: Documents) -> tuple[Tensor, int]:  # needs a GPU
    return documents.starts, documents.longest


def _left(rule: AttentionRule) -> int:
    """How many tokens before itself a query sees; -1 for all."""
    return -1 if rule.window is None else rule.window - 1
