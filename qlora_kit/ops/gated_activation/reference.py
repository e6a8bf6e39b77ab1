"""`gated_activation` in plain torch."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_kit.ops.layout import arithmetic_dtype


def forward(gate_up: Tensor, kind: str, out: Tensor) -> None:
    """act(gate) · up; see `op.gated_activation`.

    Args:
        gate_up: (M, 2F), gate beside up.
        kind: `silu`, `gelu_tanh` or `gelu`.
        out: (M, F), written. May be the first or the second half of gate_up.

    Example:
        >>> out = torch.empty(1, 1)
        >>> forward(torch.tensor([[0.0, 3.0]]), "silu", out)
        >>> out.item()
        0.0
    """
    gate, up = gate_up.to(arithmetic_dtype(gate_up)).chunk(2, dim=-1)
    out.copy_(_activation(gate, kind) * up)


def backward(
    dact: Tensor, gate_up: Tensor, kind: str, d_gate_up: Tensor, act: Tensor | None
) -> None:
    """Gradient in gate and up; see `op.gated_activation_backward`.

    Args:
        dact: (M, F), gradient of the result.
        gate_up: (M, 2F), gate beside up.
        kind: `silu`, `gelu_tanh` or `gelu`.
        d_gate_up: (M, 2F), written. May be gate_up.
        act: (M, F), written with the forward's result; or None. May be dact.

    Example:
        >>> d_gate_up = torch.empty(1, 2)
        >>> backward(torch.ones(1, 1), torch.tensor([[0.0, 3.0]]), "silu", d_gate_up, None)
        >>> d_gate_up.tolist()
        [[1.5, 0.0]]
    """
    dtype = arithmetic_dtype(gate_up)
    gate, up = gate_up.to(dtype).chunk(2, dim=-1)
    given = dact.to(dtype)
    value = _activation(gate, kind)
    d_gate = given * up * _slope(gate, kind)
    gradients = torch.cat((d_gate, given * value), dim=-1)
    if act is not None:
        act.copy_(value * up)
    d_gate_up.copy_(gradients)


def _activation(gate: Tensor, kind: str) -> Tensor:
    """The activation function."""
    if kind == "silu":
        return F.silu(gate)
    return F.gelu(gate, approximate="tanh" if kind == "gelu_tanh" else "none")


def _slope(gate: Tensor, kind: str) -> Tensor:
    """The activation function's derivative."""
    if kind == "silu":
        share = torch.sigmoid(gate)
        return share * (1 + gate * (1 - share))
    if kind == "gelu_tanh":
        # gate · sigmoid(2z), for (1 + tanh z) / 2 = sigmoid(2z)
        twice = 2 * math.sqrt(2 / math.pi)
        square = gate * gate
        share = torch.sigmoid(twice * gate * (1 + 0.044715 * square))
        return share + gate * share * (1 - share) * twice * (1 + 3 * 0.044715 * square)
    density = torch.exp(-0.5 * gate * gate) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(gate * math.sqrt(0.5))) + gate * density
