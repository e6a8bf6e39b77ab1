"""What both halves of a decoder layer use: norms, heads and buffers.

All matrices are (M, width), M = B·T tokens. A buffer for a group of linears has room for the
group's ranks beside its columns; columns that stand in one are recognised by the distance
between their rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_kit.block.description import Description, Norm
from qlora_kit.block.projection import Group
from qlora_kit.ops.attention.pair import Documents
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


def norm(
    how: Norm, x: Tensor, *, residual: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """`rms_norm` as a layer has it.

    Args:
        how: weight and options.
        x: as of `rms_norm`.
        residual: added to the result.
        out: written.

    Returns:
        The result.
    """
    return rms_norm(x, how.weight, how.eps, unit_offset=how.unit_offset, residual=residual, out=out)


def join(how: Norm | None, y: Tensor, residual: Tensor, *, out: Tensor) -> None:
    """Add what a half of the layer gives to the residual stream.

    Args:
        how: the norm on it, if any.
        y: (M, H).
        residual: (M, H).
        out: (M, H), written; may be the residual itself.
    """
    if how is None:
        torch.add(residual, y, out=out)
    else:
        norm(how, y, residual=residual, out=out)


def norm_backward(
    how: Norm,
    dy: Tensor,
    x: Tensor,
    *,
    dx: Tensor,
    residual: Tensor | None = None,
    normalized: Tensor | None = None,
) -> None:
    """`rms_norm_backward` as a layer has it.

    Args:
        how: weight and options.
        dy: gradient of the result.
        x: as in the forward.
        dx: written.
        residual: added to dx.
        normalized: written with the forward's result.
    """
    rms_norm_backward(
        dy,
        x,
        how.weight,
        how.eps,
        unit_offset=how.unit_offset,
        residual=residual,
        dx=dx,
        normalized=normalized,
    )


def room_beside(columns: Tensor) -> int:
    """Columns of memory between the rows of a matrix.

    Args:
        columns: (M, n), values of a row side by side.

    Returns:
        How many values lie between the end of a row and the next one's begin.

    Example:
        >>> import torch
        >>> room_beside(torch.empty(3, 10)[:, :8])
        2
    """
    return columns.stride(0) - columns.shape[1]


def around(columns: Tensor, group: Group) -> Tensor:
    """The buffer, (M, n + r), whose first columns these are.

    Args:
        columns: (M, n) with `room_beside` for the group's ranks.
        group: whose dY, or gradient, it is.

    Returns:
        A view.
    """
    assert columns.shape[1] == group.n
    assert room_beside(columns) >= group.r, (columns.stride(), group.n, group.r)
    return columns.as_strided((columns.shape[0], group.n + group.r), columns.stride())


def heads_of(d: Description, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values by heads.

    Args:
        d: the layer.
        qkv: (M, n).

    Returns:
        Three views, (M, heads, D).
    """
    heads = (d.heads, d.kv_heads, d.kv_heads)
    q, k, v = qkv[:, : d.qkv.n].unflatten(1, (-1, d.head_dim)).split(heads, dim=1)
    return q, k, v


def place(d: Description, qkv: Tensor, call: Call) -> tuple[Tensor | None, Tensor]:
    """Norm and turn queries and keys.

    Args:
        d: the layer.
        qkv: (M, n) as projected; without biases where the backward needs it. Else turned in
            place, if there are no norms.
        call: of the forward pass.

    Returns:
        What was projected, where the backward of a norm or of lengths of rows needs it; and q, k,
        v ready for attention, in memory of the same layout.
    """
    turned = d.heads + d.kv_heads
    if d.query_norm is None or d.key_norm is None:
        if not d.qkv.needs_output:
            rotary_(_turned(d, qkv), call.cos, call.sin)
            return None, qkv
        placed = qkv.new_empty(qkv.shape[0], qkv.stride(0))[:, : qkv.shape[1]]
        bias = d.qkv.bias(qkv)
        placed.copy_(qkv) if bias is None else torch.add(qkv, bias, out=placed)
        rotary_(_turned(d, placed), call.cos, call.sin)
        return qkv, placed
    placed = qkv.new_empty(qkv.shape[0], qkv.stride(0))[:, : qkv.shape[1]]
    both = zip(heads_of(d, qkv), heads_of(d, placed), strict=True)
    for how, (part, out) in zip((d.query_norm, d.key_norm), both, strict=False):
        norm(how, part, out=out)
    values = turned * d.head_dim
    placed[:, values : d.qkv.n] = qkv[:, values : d.qkv.n]
    rotary_(_turned(d, placed), call.cos, call.sin)
    return qkv, placed


def displace(
    d: Description,
    gradients: tuple[Tensor, Tensor, Tensor],
    projected: Tensor | None,
    call: Call,
    out: Tensor,
    group: int = 0,
    groups: int = 1,
) -> None:
    """Backward of `place`: from gradients of heads to that of the projection.

    Args:
        d: the layer.
        gradients: of q, k and v, (B, T, heads of the group, D).
        projected: what `place` returned first; read where there are norms.
        call: of the forward pass.
        out: (M, n), written where the group's heads are.
        group: which of the groups of heads.
        groups: how many there are.
    """
    parts = in_group(heads_of(d, out), group, groups)
    of_q, of_k, of_v = (g.reshape(part.shape) for g, part in zip(gradients, parts, strict=True))
    rotary_(parts[0], call.cos, call.sin, inverse=True, source=of_q)
    rotary_(parts[1], call.cos, call.sin, inverse=True, source=of_k)
    parts[2].copy_(of_v)
    if projected is None or d.query_norm is None or d.key_norm is None:
        return
    before = in_group(heads_of(d, projected), group, groups)
    for how, part, x in zip((d.query_norm, d.key_norm), parts, before, strict=False):
        norm_backward(how, part, x, dx=part)


def in_group(
    parts: tuple[Tensor, Tensor, Tensor], group: int, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The heads of one group.

    Args:
        parts: q, k and v, (M, heads, D).
        group: which.
        groups: how many there are; divides the heads of each.

    Returns:
        Views, (M, heads / groups, D): queries with the keys and values that they read.

    Example:
        >>> import torch
        >>> q, k = torch.arange(4.0).view(1, 4, 1), torch.arange(2.0).view(1, 2, 1)
        >>> [part.flatten().tolist() for part in in_group((q, k, k), 1, 2)]
        [[2.0, 3.0], [1.0], [1.0]]
    """
    q, k, v = (part.unflatten(1, (groups, -1))[:, group] for part in parts)
    return q, k, v


def _turned(d: Description, qkv: Tensor) -> Tensor:
    """(M, Hq + Hk, D) view of the heads that know their position."""
    width = (d.heads + d.kv_heads) * d.head_dim
    return qkv[:, :width].unflatten(1, (-1, d.head_dim))
