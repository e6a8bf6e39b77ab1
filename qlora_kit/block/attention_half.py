"""The first half of a decoder layer, x + attention(norm(x)), forward and backward.

Attention's result is kept by groups of heads, (groups, M, width), one group where there are no
tiles. The backward writes the gradients of q, k and v over q, k and v where these have room
for dY·B beside them, one group of heads after the other, and asks for the gradient of
attention's result one group at a time as well: it never exists as a whole.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from qlora_kit.block.description import Description
from qlora_kit.block.kept import AttentionKept, Wanted
from qlora_kit.block.parts import (
    Call,
    around,
    displace,
    heads_of,
    in_group,
    join,
    norm,
    norm_backward,
    place,
    room_beside,
)
from qlora_kit.block.projection import Group
from qlora_kit.block.sums import Sums
from qlora_kit.block.tiles import Tiles
from qlora_kit.ops.attention.pair import attention_backward, attention_forward

Gradients = list[Tensor | None]


class _Inputs:
    """Buffers for a group's input, a tile at a time, and what is kept of them."""

    def __init__(
        self, group: Group, tiles: Tiles, like: Tensor, *, whole: bool, small: bool
    ) -> None:
        """Make room for what is kept.

        Args:
            group: what reads the input.
            tiles: of the batch.
            like: of the dtype and device.
            whole: keep the input itself.
            small: keep X·Aᵀ.
        """
        self.group, self.like = group, like
        self.whole = self.small = None
        if whole or not tiles.several:
            self.whole = group.input_buffer(tiles.rows, like)
            self.small = group.small(self.whole)
        elif small and group.r and group.needs_small:
            self.small = like.new_empty((tiles.rows, group.r))

    def buffer(self, part: slice) -> Tensor:
        """Memory for a tile's input, with room for X·Aᵀ."""
        if self.whole is not None:
            return self.whole[part]
        return self.group.input_buffer(part.stop - part.start, self.like)

    def done(self, part: slice, wide: Tensor) -> None:
        """Take what is kept of a tile whose X·Aᵀ is there."""
        if self.whole is None and self.small is not None:
            self.small[part] = wide[:, self.group.k :]


def forward(
    d: Description,
    x: Tensor,
    call: Call,
    want: Wanted,
    tiles: Tiles,
    *,
    over: bool = False,
    getting_wide: Callable[[], None] | None = None,
) -> tuple[Tensor, AttentionKept]:
    """Run it.

    Args:
        d: the layer.
        x: (M, H).
        call: of the forward pass.
        want: what to keep.
        tiles: of the batch.
        over: x may be written over.
        getting_wide: called before attention.

    Returns:
        h: (M, H), in new memory or in that of x.
        kept: what is wanted.
    """
    kept = AttentionKept()
    whole = want.inputs and d.qkv.needs_input
    inputs = _Inputs(d.qkv, tiles, x, whole=whole, small=want.attention)
    spare = d.qkv.r if tiles.several else 0
    qkv = x.new_empty((tiles.rows, d.qkv.n + spare))[:, : d.qkv.n]
    with d.qkv.decoded(x, tiles.several):
        for part in tiles.parts:
            wide = inputs.buffer(part)
            norm(d.before_attention, x[part], out=wide[:, : d.qkv.k])
            d.qkv.forward(wide, out=qkv[part], biased=not d.qkv.needs_output)
            inputs.done(part, wide)
    kept.small_qkv = inputs.small
    if inputs.whole is not None:
        kept.normed_x = inputs.whole[:, : d.qkv.k]
    del wide, inputs
    kept.projected, kept.qkv = place(d, qkv, call)
    del qkv
    if getting_wide is not None:
        getting_wide()
    _attend(d, call, kept, tiles)
    if not want.attention:
        kept.normed_x = kept.small_qkv = kept.projected = kept.qkv = kept.lse = None
    h = _join(d, x, kept, want, tiles, over=over)
    return h, kept


def _attend(d: Description, call: Call, kept: AttentionKept, tiles: Tiles) -> None:
    """Fill in attention's result, group by group."""
    assert kept.qkv is not None
    groups = tiles.head_groups(d.heads, d.kv_heads)
    parts = heads_of(d, kept.qkv)
    shape = (groups, tiles.rows, d.o.k // groups)
    if groups > 1:
        kept.attended = kept.qkv.new_empty(shape)
    sums = []
    for group in range(groups):
        q, k, v = _rows(in_group(parts, group, groups), call)
        out, (lse,) = attention_forward(q, k, v, d.rule, call.documents)
        sums.append(lse)
        if kept.attended is None:
            kept.attended = out.view(shape)
        else:
            kept.attended[group] = out.view(shape[1:])
        del out
    kept.lse = torch.stack(sums) if groups > 1 else sums[0].view(1, -1)


def _join(
    d: Description, x: Tensor, kept: AttentionKept, want: Wanted, tiles: Tiles, *, over: bool
) -> Tensor:
    """The output projection, and the sum with the residual stream."""
    assert kept.attended is not None
    inputs = _Inputs(d.o, tiles, x, whole=False, small=want.attention)
    apart = d.after_attention is not None or d.o.needs_output
    h = x if over and not apart else x.new_empty((tiles.rows, d.o.n))
    if apart and want.attention:
        kept.y = torch.empty_like(h)
    with d.o.decoded(x, tiles.several):
        for part in tiles.parts:
            wide = inputs.buffer(part)
            attended = kept.attended[:, part]
            wide[:, : d.o.k].unflatten(1, (attended.shape[0], -1)).copy_(attended.transpose(0, 1))
            if not apart:
                d.o.forward(wide, residual=x[part], out=h[part])
            else:
                y = d.o.forward(wide, out=None if kept.y is None else kept.y[part])
                join(d.after_attention, y, x[part], out=h[part])
            inputs.done(part, wide)
    kept.small_o = inputs.small
    return h


def backward(
    d: Description,
    dh: Tensor,
    once_more: Callable[[], Callable[[], Tensor]],
    kept: AttentionKept,
    call: Call,
    tiles: Tiles,
    *,
    need_dx: bool,
    no_longer_wide: Callable[[], None] | None = None,
) -> Gradients:
    """Differentiate it; the gradient of x takes the place of that of h.

    Args:
        d: the layer.
        dh: (M, H) with room for the ranks of `d.o` beside it. Modified.
        once_more: called when attention has nearly been differentiated; what it gives is asked
            for x, (M, H), afterwards.
        kept: what the forward left; used up.
        call: of the forward pass.
        tiles: of the batch.
        need_dx: whether the gradient in x is wanted; it is put into dh.
        no_longer_wide: called when attention's memory is free.

    Returns:
        Gradients of the adapters of `d.qkv` and `d.o`.
    """
    projected = kept.projected if d.qkv.needs_output else None
    wide, of_o, coming = _through_attention(d, dh, kept, call, tiles, once_more)
    x = coming()
    if no_longer_wide is not None:
        no_longer_wide()
    sums = Sums(d.qkv)
    with d.qkv.decoded(dh, tiles.several and need_dx):
        for part in tiles.parts:
            dy = wide[part]
            small = None if kept.small_qkv is None else kept.small_qkv[part]
            normed = None if kept.normed_x is None else kept.normed_x[part]
            d_normed = None
            d_b = d.qkv.small_products(dy, small)
            if need_dx:
                d_normed = d.qkv.input_columns(dy, slice(0, d.qkv.k))
            again = None
            if normed is None and d.qkv.needs_input:
                if d_normed is None:
                    normed = norm(d.before_attention, x[part])
                else:
                    normed = again = torch.empty_like(d_normed)
            if d_normed is not None:
                into = dh[part]
                norm_backward(
                    d.before_attention, d_normed, x[part], residual=into, dx=into, normalized=again
                )
            sums.add(dy, normed, small, d_b)
            sums.add_output(dy, None if projected is None else projected[part])
    return [*sums.gradients(), *of_o]


def _through_attention(
    d: Description,
    dh: Tensor,
    kept: AttentionKept,
    call: Call,
    tiles: Tiles,
    nearly: Callable[[], Callable[[], Tensor]],
) -> tuple[Tensor, Gradients, Callable[[], Tensor]]:
    """From h back to q, k and v: their gradient as projected, (M, n + r), and those of `d.o`.

    Third, what `nearly` gave, which is called before the last group of heads.
    """
    qkv, attended, lse = kept.qkv, kept.attended, kept.lse
    assert qkv is not None
    assert attended is not None
    assert lse is not None
    dy = _of_output(d, dh, kept, tiles)
    sums = Sums(d.o)
    for part in tiles.parts:
        small = None if kept.small_o is None else kept.small_o[part]
        sums.add_b(dy[part], small, d.o.small_products(dy[part], small))
        sums.add_output(dy[part], None if kept.y is None else kept.y[part])
    kept.y = None
    groups, _, width = attended.shape
    if d.o.needs_input:
        sums.add_a(dy, list(attended))
    in_place = room_beside(qkv) >= d.qkv.r
    wide = around(qkv, d.qkv) if in_place else None
    with d.o.decoded(dh, groups > 1):
        for group in range(groups):
            if group == groups - 1:
                coming = nearly()
            q, k, v = _rows(in_group(heads_of(d, qkv), group, groups), call)
            d_out = d.o.input_columns(dy, slice(group * width, (group + 1) * width))
            found = attention_backward(
                d_out.view(q.shape),
                q,
                k,
                v,
                attended[group].view(q.shape),
                (lse[group],),
                d.rule,
                call.documents,
            )
            del d_out, q, k, v
            if wide is None:  # one group: nothing reads q, k and v any more
                kept.qkv = kept.attended = None
                del qkv, attended
                wide = d.qkv.gradient_buffer(tiles.rows, dh)
            displace(d, found, kept.projected, call, wide[:, : d.qkv.n], group, groups)
            del found
    assert wide is not None
    kept.qkv = kept.attended = kept.projected = None
    return wide, sums.gradients(), coming


def _of_output(d: Description, dh: Tensor, kept: AttentionKept, tiles: Tiles) -> Tensor:
    """The gradient of what `d.o` gave, (M, n + r) with room for dY·B."""
    if d.after_attention is None:
        return around(dh, d.o)
    assert kept.y is not None
    dy = d.o.gradient_buffer(tiles.rows, dh)
    norm_backward(d.after_attention, dh, kept.y, dx=dy[:, : d.o.n])
    if not d.o.needs_output:
        kept.y = None
    return dy


def _rows(parts: tuple[Tensor, Tensor, Tensor], call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, heads, D) views."""
    q, k, v = (part.unflatten(0, (call.batch, call.length)) for part in parts)
    return q, k, v
