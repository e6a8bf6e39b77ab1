"""The arithmetic of a decoder layer, forward and backward, without autograd.

Two halves, each in a file of its own: `attention_half` and `mlp_half`. `forward` leaves behind
what a policy wants kept (`kept`), and `backward` computes the rest again. Both work on tiles of
the batch's tokens where there are several (`tiles`).

Buffers are reused as soon as their content is used up: the gradient of gate and up is written
over gate and up, the recomputed activation over its gradient, the gradient of x over that of
h, and the result over h where nobody keeps it. So a saved set serves one backward pass.

All matrices are (M, width), M = B·T tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from qlora_kit.block import attention_half, mlp_half
from qlora_kit.block.description import Description
from qlora_kit.block.kept import BACKWARD, AttentionKept, Kept, Wanted, wanted
from qlora_kit.block.parts import Call, room_beside
from qlora_kit.block.tiles import tiles_of

__all__ = ["Call", "Gradients", "Kept", "backward", "forward"]


@dataclass(slots=True)
class Gradients:
    """Results of a backward pass."""

    dx: Tensor | None = None
    """(M, H), or None if not asked for."""
    parameters: list[Tensor | None] = field(default_factory=list)
    """Of the adapters, in the order of `Description.groups` and `Group.parameters`."""


def forward(
    d: Description,
    x: Tensor,
    call: Call,
    policy: str,
    tile: int | None = None,
    getting_wide: Callable[[], None] | None = None,
) -> tuple[Tensor, Kept]:
    """Run a layer.

    Args:
        d: the layer.
        x: (M, H).
        call: of the forward pass.
        policy: one of `policy.POLICIES`, or `nothing` where no backward follows.
        tile: tokens at a time; see `tiles.tiles_of`.
        getting_wide: called before attention, when most memory is about to be taken.

    Returns:
        y: (M, H).
        kept: by the policy.
    """
    tiles, want = tiles_of(d, x.shape[0], tile), wanted(policy)
    h, attention = attention_half.forward(d, x, call, want, tiles, getting_wide=getting_wide)
    attention.reduce(d, want)
    y, mlp = mlp_half.forward(d, h, want, tiles, over=not want.attention)
    if policy == "nothing":
        return y, Kept()
    return y, Kept(x, h if want.attention else None, attention, mlp)


def backward(
    d: Description,
    dy: Tensor,
    kept: Kept,
    call: Call,
    *,
    need_dx: bool,
    tile: int | None = None,
    owned: bool = False,
    spare: int = 0,
    once_more: Callable[[], Callable[[], Tensor]] | None = None,
    no_longer_wide: Callable[[], None] | None = None,
) -> Gradients:
    """Differentiate `forward`.

    Args:
        d: the layer.
        dy: (M, H), values of a row side by side. Not modified, unless it is owned.
        kept: what the forward left; its tensors are used up.
        call: of the forward pass.
        need_dx: whether the gradient in x is wanted.
        tile: as in the forward.
        owned: dy is nobody else's: memory beside it may be written to and, where there are
            several tiles, dx is written over it.
        spare: columns of memory to leave beside dx, for the layers before.
        once_more: lets x come again, and gives what waits for it. So it has not to be kept:
            where the forward is computed again, h is written over it.
        no_longer_wide: called when attention has been differentiated and its memory is free.

    Returns:
        The gradients.
    """
    x, h, attention, mlp = kept.x, kept.h, kept.attention, kept.mlp
    assert x is not None
    tiles = tiles_of(d, x.shape[0], tile)
    kept.x = kept.h = None
    kept.mlp, kept.attention = [], AttentionKept()
    if h is None:
        again = Wanted(attention=True, mlp=False, inputs=False) if tiles.several else BACKWARD
        over = once_more is not None
        h, attention = attention_half.forward(d, x, call, again, tiles, over=over)
    x_for_attention = once_more or partial(_here, x)
    del x
    room = max(spare, d.o.r)
    if owned and tiles.several and room_beside(dy) >= room:
        dh = dy
    else:
        dh = dy.new_empty((dy.shape[0], dy.shape[1] + room))[:, : dy.shape[1]]
    of_mlp = mlp_half.backward(d, dy, h, mlp, tiles, dh, owned=owned)
    del h
    of_attention = attention_half.backward(
        d,
        dh,
        x_for_attention,
        attention,
        call,
        tiles,
        need_dx=need_dx,
        no_longer_wide=no_longer_wide,
    )
    return Gradients(dh if need_dx else None, [*of_attention, *of_mlp])


def _here(x: Tensor) -> Callable[[], Tensor]:
    return lambda: x
