"""`gated_activation`: act(gate) · up of a gated feed-forward layer, and its gradient.

gate and up lie side by side in one buffer, as one grouped projection writes them.
Arithmetic is float32, rounded once at the end (models round act(gate) as well). The
backward gives both gradients in one pass, over its input if asked to, and the
forward's result again, which the next projection's gradient needs.

The pair is not differentiable by itself: a hand-written backward calls both.
Source: arXiv:2002.05202.
"""

import torch
from torch import Tensor

from qlora_kit.core.errors import ShapeError
from qlora_kit.ops import jit
from qlora_kit.ops.backend import Backend, register_backend, resolve
from qlora_kit.ops.gated_activation import cuda, reference
from qlora_kit.ops.layout import check_like, check_rows, check_unrecorded

OP = "gated_activation"

KINDS = ("silu", "gelu_tanh", "gelu")
"""x·sigmoid(x); x·Φ(x) with Φ approximated by a tanh, as torch's `approximate="tanh"`; x·Φ(x)."""

register_backend(OP, Backend("reference", reference, lambda tensor: True, lambda: True))
register_backend(OP, Backend("cuda", cuda, cuda.serves, jit.is_available))


def gated_activation(gate_up: Tensor, kind: str, *, out: Tensor | None = None) -> Tensor:
    """Multiply one half of a matrix by the activation function of the other.

    Args:
        gate_up: (M, 2F) = [gate | up], float32, bfloat16 or float16, any distance between
            rows.
        kind: a member of `KINDS`.
        out: (M, F), written; a new contiguous tensor if None. May be one half of gate_up
            itself, but not overlap it in another way.

    Returns:
        `out`: act(gate) · up.

    Raises:
        UserError: autograd records, and an input requires a gradient.
        ShapeError: shapes, dtypes, devices or strides do not fit, or no kind has this name.
        BackendError: a forced backend cannot serve the call.

    Example:
        >>> gated_activation(torch.tensor([[1.0, 2.0]]), "silu")
        tensor([[1.4621]])
    """
    check_unrecorded(OP, gate_up, out)
    shape = _check(gate_up, kind)
    if out is None:
        out = gate_up.new_empty(shape)
    else:
        check_like(OP, "out", out, gate_up, shape)
    torch.ops.qlora_kit.gated_activation.default(gate_up, kind, out)
    return out


def gated_activation_backward(
    dact: Tensor,
    gate_up: Tensor,
    kind: str,
    *,
    d_gate_up: Tensor | None = None,
    act: Tensor | None = None,
) -> Tensor:
    """Gradient of `gated_activation`, and on request the forward's result again.

    Args:
        dact: (M, F), gradient of the result.
        gate_up: (M, 2F) = [gate | up], as in the forward.
        kind: a member of `KINDS`.
        d_gate_up: (M, 2F), written; a new contiguous tensor if None. May be gate_up itself.
        act: (M, F), written with act(gate) · up; or None. May be dact itself.

    Returns:
        `d_gate_up`: [dact · up · act'(gate) | dact · act(gate)].

    Raises:
        UserError: autograd records, and an input requires a gradient.
        ShapeError: shapes, dtypes, devices or strides do not fit, or no kind has this name.
        BackendError: a forced backend cannot serve the call.

    Example:
        >>> gated_activation_backward(torch.ones(1, 1), torch.tensor([[1.0, 2.0]]), "silu")
        tensor([[1.8553, 0.7311]])
    """
    check_unrecorded(OP, dact, gate_up, d_gate_up, act)
    shape = _check(gate_up, kind)
    check_like(OP, "dact", dact, gate_up, shape)
    check_like(OP, "act", act, gate_up, shape)
    if d_gate_up is None:
        d_gate_up = gate_up.new_empty(gate_up.shape)
    else:
        check_like(OP, "d_gate_up", d_gate_up, gate_up, gate_up.shape)
    torch.ops.qlora_kit.gated_activation_backward.default(dact, gate_up, kind, d_gate_up, act)
    return d_gate_up


def _check(gate_up: Tensor, kind: str) -> tuple[int, int]:
    """Refuse what the op cannot compute; the shape of its result."""
    if kind not in KINDS:
        raise ShapeError(f"gated_activation needs a kind in {KINDS}, got {kind!r}.")
    check_rows(OP, "gate_up", gate_up, (2,))
    rows, width = gate_up.shape
    if width % 2:
        raise ShapeError(f"gated_activation needs gate_up of shape (M, 2F), got ({rows}, {width}).")
    return rows, width // 2


_LIBRARY = torch.library.Library("qlora_kit", "FRAGMENT")
_LIBRARY.define("gated_activation(Tensor gate_up, str kind, Tensor(a!) out) -> ()")
_LIBRARY.define(
    "gated_activation_backward(Tensor dact, Tensor gate_up, str kind, Tensor(a!) d_gate_up, "
    "Tensor(b!)? act) -> ()"
)


def _forward(gate_up: Tensor, kind: str, out: Tensor) -> None:
    resolve(OP, gate_up).forward(gate_up, kind, out)


def _backward(
    dact: Tensor, gate_up: Tensor, kind: str, d_gate_up: Tensor, act: Tensor | None
) -> None:
    resolve(OP, gate_up).backward(dact, gate_up, kind, d_gate_up, act)


# By hand, as docs/decisions/0005 says. Nothing is returned, so a fake has nothing to make.
_LIBRARY.impl("gated_activation", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("gated_activation_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("qlora_kit::gated_activation")
def _(gate_up: Tensor, kind: str, out: Tensor) -> None:
    return None


@torch.library.register_fake("qlora_kit::gated_activation_backward")
def _(dact: Tensor, gate_up: Tensor, kind: str, d_gate_up: Tensor, act: Tensor | None) -> None:
    return None
