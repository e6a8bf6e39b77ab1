"""The arithmetic of a decoder layer, forward and backward, without autograd.

`forward` leaves behind what a policy wants kept, and `backward` computes the rest again:

    kept                        save   recompute_elementwise   recompute_mlp   recompute_all
    x, the layer's input         yes    yes                     yes             yes
    q, k, v; attention's output  yes    yes                     yes             -
    h, after attention           yes    yes                     yes             -
    gate, up                     yes    yes                     -               -
    X·Aᵀ of the groups           yes    yes                     first two       -
    normed x and h, activation   yes    -                       -               -

With normed queries and keys (Qwen 3, Gemma 3) q and k are kept as projected too, and with
norms behind attention and feed-forward (Gemma) those norms' inputs. A frozen A (LoRA-FA)
needs neither normed inputs nor activations in any policy, and no layer's weight needs any.

Buffers are reused as soon as their content is used up: the gradient of gate and up is written
over gate and up, the recomputed activation over its gradient. So a saved set serves one
backward pass.

All matrices are (M, width), M = B·T tokens.
"""

from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from qlora_kit.block.description import Description, Norm
from qlora_kit.block.policy import recomputed
from qlora_kit.block.projection import Group
from qlora_kit.ops.attention.pair import Documents, attention_backward, attention_forward
from qlora_kit.ops.gated_activation.op import gated_activation, gated_activation_backward
from qlora_kit.ops.rms_norm.op import rms_norm, rms_norm_backward
from qlora_kit.ops.rotary.op import rotary_


@dataclass(frozen=True, slots=True)
class Call:
    """What all layers of one forward pass share."""

    batch: int
    """B."""
    length: int
    """T."""
    cos: Tensor
    """(T, R) or (B·T, R), of the rotary positions."""
    sin: Tensor
    """As cos."""
    documents: Documents | None = None
    """Where documents start in packed rows."""


@dataclass(slots=True)
class Kept:
    """What a forward pass leaves for the backward; None where it is not wanted."""

    x: Tensor | None = None
    normed_x: Tensor | None = None
    projected: Tensor | None = None
    qkv: Tensor | None = None
    attended: Tensor | None = None
    lse: Tensor | None = None
    attention_y: Tensor | None = None
    h: Tensor | None = None
    normed_h: Tensor | None = None
    gate_up: Tensor | None = None
    act: Tensor | None = None
    mlp_y: Tensor | None = None
    small_qkv: Tensor | None = None
    small_o: Tensor | None = None
    small_gate_up: Tensor | None = None
    small_down: Tensor | None = None

    def tensors(self) -> list[Tensor | None]:
        """All fields, in order."""
        return [getattr(self, name.name) for name in fields(self)]


@dataclass(slots=True)
class Gradients:
    """Results of a backward pass."""

    dx: Tensor | None = None
    """(M, H), or None if not asked for."""
    parameters: list[Tensor | None] = field(default_factory=list)
    """Of the adapters, in the order of `Description.groups` and `Group.parameters`."""


def forward(d: Description, x: Tensor, call: Call, policy: str) -> tuple[Tensor, Kept]:
    """Run a layer.

    Args:
        d: the layer.
        x: (M, H).
        call: of the forward pass.
        policy: one of `policy.POLICIES`, or `nothing` where no backward follows.

    Returns:
        y: (M, H).
        kept: by the policy.
    """
    kept = Kept()
    h = _attention(d, x, call, kept)
    y = _mlp(d, h, kept)
    kept.x = x
    return y, drop(d, kept, policy)


def drop(d: Description, kept: Kept, policy: str) -> Kept:
    """Give up what a policy does not keep.

    Args:
        d: the layer.
        kept: everything.
        policy: as in `forward`.

    Returns:
        The policy's share. Small products are copied out of wide buffers that go.
    """
    if policy == "nothing":
        return Kept()
    again = recomputed(policy)
    if again == "all":
        return Kept(x=kept.x)
    if again == "mlp":
        kept.normed_h = kept.gate_up = kept.act = kept.mlp_y = None
        kept.small_gate_up = kept.small_down = None
    wide = policy == "save"
    for name, group in (("normed_x", d.qkv), ("normed_h", d.gate_up), ("act", d.down)):
        if not (wide and group.needs_input):
            setattr(kept, name, None)
    for name in ("small_qkv", "small_o", "small_gate_up", "small_down"):
        small = getattr(kept, name)
        if small is not None:
            setattr(kept, name, small.contiguous())
    return kept


def backward(
    d: Description,
    dy: Tensor,
    kept: Kept,
    call: Call,
    *,
    need_dx: bool,
    recompute: str = "elementwise",
    owned: bool = False,
    spare: int = 0,
) -> Gradients:
    """Differentiate `forward`.

    Args:
        d: the layer.
        dy: (M, H). Not modified.
        kept: what the forward left; its tensors are used up.
        call: of the forward pass.
        need_dx: whether the gradient in x is wanted.
        recompute: what the policy computes again; see `policy.recomputed`.
        owned: dy stands in a buffer of `d.down`, whose spare columns may be written.
        spare: columns of memory to leave beside dx, for the layer before to own.

    Returns:
        The gradients.
    """
    assert kept.x is not None
    if recompute != "elementwise":
        d.gate_up.hold(dy)  # the largest weights: one decoding for both directions
    if recompute == "all":
        x, kept = kept.x, Kept()
        _attention(d, x, call, kept)
        kept.x = x
    if recompute != "elementwise":
        assert kept.h is not None
        _mlp(d, kept.h, kept, result=d.after_mlp is not None)
        kept.act = None  # the activation comes again, over its gradient
    of_mlp, dh = _mlp_backward(d, dy, kept, owned)
    d.gate_up.release()
    dx = dy.new_empty((dy.shape[0], dy.shape[1] + spare))[:, : dy.shape[1]] if need_dx else None
    of_attention = _attention_backward(d, dh, kept, call, dx)
    return Gradients(dx, [*of_attention, *of_mlp])


def _attention(d: Description, x: Tensor, call: Call, kept: Kept) -> Tensor:
    """The first half: x + attention(norm(x)), (M, H)."""
    rows = x.shape[0]
    wide = d.qkv.input_buffer(rows, x)
    _norm(d.before_attention, x, out=wide[:, : d.qkv.k])
    qkv = d.qkv.forward(wide)
    kept.normed_x, kept.small_qkv = wide[:, : d.qkv.k], d.qkv.small(wide)
    kept.projected, kept.qkv = _place(d, qkv, call)
    attended, (kept.lse,) = attention_forward(*_heads(d, kept.qkv, call), d.rule, call.documents)
    kept.attended = attended.view(rows, d.o.k)
    wide = d.o.input_buffer(rows, x)
    wide[:, : d.o.k] = kept.attended
    kept.small_o = d.o.small(wide)
    if d.after_attention is None:
        kept.h = d.o.forward(wide, residual=x)
    else:
        kept.attention_y = d.o.forward(wide)
        kept.h = _norm(d.after_attention, kept.attention_y, residual=x)
    return kept.h


def _mlp(d: Description, h: Tensor, kept: Kept, *, result: bool = True) -> Tensor:
    """The second half: h + mlp(norm(h)), (M, H); without the result, what leads there."""
    rows = h.shape[0]
    wide = d.gate_up.input_buffer(rows, h)
    _norm(d.before_mlp, h, out=wide[:, : d.gate_up.k])
    kept.gate_up = d.gate_up.forward(wide, spare=True)
    kept.normed_h, kept.small_gate_up = wide[:, : d.gate_up.k], d.gate_up.small(wide)
    wide = d.down.input_buffer(rows, h)
    kept.act = gated_activation(kept.gate_up, d.kind, out=wide[:, : d.down.k])
    kept.small_down = d.down.small(wide)
    if not result:
        d.down.fill_small(wide)
        return h
    if d.after_mlp is None:
        return d.down.forward(wide, residual=h)
    kept.mlp_y = d.down.forward(wide)
    return _norm(d.after_mlp, kept.mlp_y, residual=h)


def _mlp_backward(
    d: Description, dy: Tensor, kept: Kept, owned: bool
) -> tuple[list[Tensor | None], Tensor]:
    """Gradients of the adapters in the second half, and of h in a buffer for `d.o`."""
    assert kept.gate_up is not None
    assert kept.h is not None
    rows = dy.shape[0]
    if d.after_mlp is None and owned:
        wide = _around(dy, d.down)
    elif d.after_mlp is None:
        wide = d.down.gradient_buffer(rows, dy)
        wide[:, : d.down.n] = dy
    else:
        assert kept.mlp_y is not None
        wide = d.down.gradient_buffer(rows, dy)
        _norm_backward(d.after_mlp, dy, kept.mlp_y, dx=wide[:, : d.down.n])
    d_act, d_b = d.down.input_gradient(wide, kept.small_down)
    act = kept.act if kept.act is not None or not d.down.needs_input else d_act
    again = d_act if act is d_act else None
    gated_activation_backward(d_act, kept.gate_up, d.kind, d_gate_up=kept.gate_up, act=again)
    both = _around(kept.gate_up, d.gate_up)
    of_down = d.down.gradients(wide, act, kept.small_down, d_b)
    del d_act, act, again, wide
    kept.act = kept.gate_up = None
    d_normed, d_b = d.gate_up.input_gradient(both, kept.small_gate_up)
    normed = kept.normed_h
    if normed is None and d.gate_up.needs_input:
        normed = torch.empty_like(d_normed)
    dh = d.o.gradient_buffer(rows, dy)[:, : d.o.n]
    again = normed if kept.normed_h is None else None
    _norm_backward(d.before_mlp, d_normed, kept.h, residual=dy, dx=dh, normalized=again)
    of_gate_up = d.gate_up.gradients(both, normed, kept.small_gate_up, d_b)
    return [*of_gate_up, *of_down], dh


def _attention_backward(
    d: Description, dh: Tensor, kept: Kept, call: Call, dx: Tensor | None
) -> list[Tensor | None]:
    """Gradients of the adapters in the first half; that of x is written to dx, if given."""
    assert kept.x is not None
    assert kept.qkv is not None
    assert kept.attended is not None
    assert kept.lse is not None
    rows = dh.shape[0]
    if d.after_attention is None:
        wide = _around(dh, d.o)
    else:
        assert kept.attention_y is not None
        wide = d.o.gradient_buffer(rows, dh)
        _norm_backward(d.after_attention, dh, kept.attention_y, dx=wide[:, : d.o.n])
    d_attended, d_b = d.o.input_gradient(wide, kept.small_o)
    of_o = d.o.gradients(wide, kept.attended, kept.small_o, d_b)
    q, k, v = _heads(d, kept.qkv, call)
    shape = q.shape
    d_q, d_k, d_v = attention_backward(
        d_attended.view(shape),
        q,
        k,
        v,
        kept.attended.view(shape),
        (kept.lse,),
        d.rule,
        call.documents,
    )
    del d_attended, q, k, v
    kept.qkv = kept.attended = None
    wide = d.qkv.gradient_buffer(rows, dh)
    _displace(d, (d_q, d_k, d_v), kept.projected, call, wide[:, : d.qkv.n])
    del d_q, d_k, d_v
    if dx is None:
        normed = kept.normed_x
        if normed is None and d.qkv.needs_input:
            normed = _norm(d.before_attention, kept.x)
        of_qkv = d.qkv.gradients(wide, normed, kept.small_qkv, filled=False)
        return [*of_qkv, *of_o]
    d_normed, d_b = d.qkv.input_gradient(wide, kept.small_qkv)
    normed = kept.normed_x
    if normed is None and d.qkv.needs_input:
        normed = torch.empty_like(d_normed)
    again = normed if kept.normed_x is None else None
    _norm_backward(d.before_attention, d_normed, kept.x, residual=dh, dx=dx, normalized=again)
    of_qkv = d.qkv.gradients(wide, normed, kept.small_qkv, d_b)
    return [*of_qkv, *of_o]


def _place(d: Description, qkv: Tensor, call: Call) -> tuple[Tensor | None, Tensor]:
    """Norm and turn queries and keys; also what was projected, where a norm's backward needs it."""
    if d.query_norm is None or d.key_norm is None:
        rotary_(_turned(d, qkv), call.cos, call.sin)
        return None, qkv
    placed = torch.empty_like(qkv)
    for norm, (part, out) in zip(
        (d.query_norm, d.key_norm),
        zip(_split(d, qkv), _split(d, placed), strict=True),
        strict=False,
    ):
        _norm(norm, part, out=out)
    _split(d, placed)[2].copy_(_split(d, qkv)[2])
    rotary_(_turned(d, placed), call.cos, call.sin)
    return qkv, placed


def _displace(
    d: Description,
    gradients: tuple[Tensor, Tensor, Tensor],
    projected: Tensor | None,
    call: Call,
    out: Tensor,
) -> None:
    """Backward of `_place`: from gradients of heads to (M, n) that of the projection."""
    parts = _split(d, out)
    of_q, of_k, of_v = (g.view(part.shape) for g, part in zip(gradients, parts, strict=True))
    rotary_(parts[0], call.cos, call.sin, inverse=True, source=of_q)
    rotary_(parts[1], call.cos, call.sin, inverse=True, source=of_k)
    parts[2].copy_(of_v)
    if projected is None or d.query_norm is None or d.key_norm is None:
        return
    before = _split(d, projected)
    for norm, part, x in zip((d.query_norm, d.key_norm), parts, before, strict=False):
        _norm_backward(norm, part, x, dx=part)


def _split(d: Description, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(M, heads, D) views of queries, keys and values."""
    heads = (d.heads, d.kv_heads, d.kv_heads)
    q, k, v = qkv[:, : d.qkv.n].unflatten(1, (-1, d.head_dim)).split(heads, dim=1)
    return q, k, v


def _heads(d: Description, qkv: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, heads, D) views of queries, keys and values."""
    q, k, v = (part.unflatten(0, (call.batch, call.length)) for part in _split(d, qkv))
    return q, k, v


def _turned(d: Description, qkv: Tensor) -> Tensor:
    """(M, Hq + Hk, D) view of the heads that know their position."""
    width = (d.heads + d.kv_heads) * d.head_dim
    return qkv[:, :width].unflatten(1, (-1, d.head_dim))


def _around(columns: Tensor, group: Group) -> Tensor:
    """The buffer whose first columns these are."""
    assert columns.stride(0) == group.n + group.r
    return columns.as_strided((columns.shape[0], group.n + group.r), columns.stride())


def _norm(
    norm: Norm, x: Tensor, *, residual: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    return rms_norm(
        x, norm.weight, norm.eps, unit_offset=norm.unit_offset, residual=residual, out=out
    )


def _norm_backward(
    norm: Norm,
    dy: Tensor,
    x: Tensor,
    *,
    dx: Tensor,
    residual: Tensor | None = None,
    normalized: Tensor | None = None,
) -> None:
    rms_norm_backward(
        dy,
        x,
        norm.weight,
        norm.eps,
        unit_offset=norm.unit_offset,
        residual=residual,
        dx=dx,
        normalized=normalized,
    )
