"""The second half of a decoder layer, h + mlp(norm(h)), forward and backward, tile by tile.

Every token is alone here, so what is wider than the residual stream exists for one tile at a
time, unless a policy keeps it. The result may be written over h, and the gradient of h over
that of the result: a tile reads its rows before it writes them.
"""

from contextlib import ExitStack

import torch
from torch import Tensor

from qlora_kit.block.description import Description
from qlora_kit.block.kept import MlpKept, Wanted
from qlora_kit.block.parts import around, join, norm, norm_backward, room_beside
from qlora_kit.block.sums import Sums
from qlora_kit.block.tiles import Tiles
from qlora_kit.ops.gated_activation.op import gated_activation, gated_activation_backward

Gradients = list[Tensor | None]


def forward(
    d: Description, h: Tensor, want: Wanted, tiles: Tiles, *, over: bool
) -> tuple[Tensor, list[MlpKept]]:
    """Run it.

    Args:
        d: the layer.
        h: (M, H). Modified if `over`.
        want: what to keep.
        tiles: of the batch.
        over: write the result over h.

    Returns:
        y: (M, H).
        kept: of each tile what is wanted; empty if that is nothing.
    """
    y = h if over else h.new_empty(h.shape)
    found = []
    with _decoded(d, h, tiles.several):
        for part in tiles.parts:
            kept = _tile(d, h[part], y[part])
            if want.mlp:
                kept.reduce(d, want)
                found.append(kept)
    return y, found


def backward(
    d: Description,
    dy: Tensor,
    h: Tensor,
    kept: list[MlpKept],
    tiles: Tiles,
    dh: Tensor,
    *,
    owned: bool,
) -> Gradients:
    """Differentiate it, computing again what was not kept.

    Args:
        d: the layer.
        dy: (M, H).
        h: (M, H).
        kept: what the forward left; used up. Empty: everything is computed again.
        tiles: of the batch.
        dh: (M, H), written with the gradient of h. May be dy itself.
        owned: memory beside dy may be written to.

    Returns:
        Gradients of the adapters of `d.gate_up` and `d.down`.
    """
    sums = Sums(d.gate_up), Sums(d.down)
    left = kept[::-1]
    kept.clear()
    again = not left
    with _decoded(d, h, tiles.several), d.gate_up.decoded(h, again):
        for part in tiles.parts:
            tile = left.pop() if left else _tile(d, h[part], None)
            if again:
                tile.act = None  # it comes once more, over its gradient
            wide = _of_product(d, dy[part], tile, owned)
            _tile_backward(d, wide, dy[part], h[part], tile, dh[part], sums)
            del wide
    return [*sums[0].gradients(), *sums[1].gradients()]


def _decoded(d: Description, like: Tensor, wanted: bool) -> ExitStack:
    """Both groups' weights decoded while the context lasts."""
    stack = ExitStack()
    stack.enter_context(d.gate_up.decoded(like, wanted))
    stack.enter_context(d.down.decoded(like, wanted))
    return stack


def _tile(d: Description, h: Tensor, y: Tensor | None) -> MlpKept:
    """One tile forward; without y, what leads there."""
    rows, kept = h.shape[0], MlpKept()
    wide = d.gate_up.input_buffer(rows, h)
    norm(d.before_mlp, h, out=wide[:, : d.gate_up.k])
    kept.gate_up = d.gate_up.forward(wide, spare=not d.gate_up.needs_output)
    kept.normed_h, kept.small_gate_up = wide[:, : d.gate_up.k], d.gate_up.small(wide)
    wide = d.down.input_buffer(rows, h)
    kept.act = gated_activation(kept.gate_up, d.kind, out=wide[:, : d.down.k])
    kept.small_down = d.down.small(wide)
    if d.after_mlp is not None or d.down.needs_output:
        kept.y = d.down.forward(wide)
        if y is not None:
            join(d.after_mlp, kept.y, h, out=y)
    elif y is not None:
        d.down.forward(wide, residual=h, out=y)
    else:
        d.down.fill_small(wide)
    return kept


def _tile_backward(
    d: Description,
    wide: Tensor,
    dy: Tensor,
    h: Tensor,
    kept: MlpKept,
    dh: Tensor,
    sums: tuple[Sums, Sums],
) -> None:
    """One tile backward, from the gradient of `d.down`; that of h is written to dh."""
    gate_up, normed = kept.gate_up, kept.normed_h
    assert gate_up is not None
    sums[1].add_output(wide, kept.y)
    kept.y = None
    d_act, d_b = d.down.input_gradient(wide, kept.small_down)
    act = kept.act if kept.act is not None or not d.down.needs_input else d_act
    again = d_act if act is d_act else None
    if d.gate_up.needs_output:  # it is read once more: no gradient in its place
        both = d.gate_up.gradient_buffer(h.shape[0], h)
    else:
        both = around(gate_up, d.gate_up)
    of_both = both[:, : d.gate_up.n]
    gated_activation_backward(d_act, gate_up, d.kind, d_gate_up=of_both, act=again)
    sums[1].add(wide, act, kept.small_down, d_b)
    sums[0].add_output(both, gate_up)
    del d_act, act, again, wide, of_both
    kept.act = kept.gate_up = None
    del gate_up
    d_normed, d_b = d.gate_up.input_gradient(both, kept.small_gate_up)
    again = None
    if normed is None and d.gate_up.needs_input:
        normed = again = torch.empty_like(d_normed)
    norm_backward(d.before_mlp, d_normed, h, residual=dy, dx=dh, normalized=again)
    sums[0].add(both, normed, kept.small_gate_up, d_b)


def _of_product(d: Description, dy: Tensor, kept: MlpKept, owned: bool) -> Tensor:
    """The gradient of what `d.down` gave, with room for dY·B beside it."""
    if d.after_mlp is None and owned and room_beside(dy) >= d.down.r:
        return around(dy, d.down)
    wide = d.down.gradient_buffer(dy.shape[0], dy)
    if d.after_mlp is None:
        wide[:, : d.down.n] = dy
    else:
        assert kept.y is not None
        norm_backward(d.after_mlp, dy, kept.y, dx=wide[:, : d.down.n])
    return wide
