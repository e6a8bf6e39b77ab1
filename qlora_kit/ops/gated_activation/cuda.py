"""`gated_activation` as one CUDA launch that reads and writes each value once."""

import torch
from torch import Tensor

from qlora_kit.ops.launch import Kernels
from qlora_kit.ops.layout import PIECE_BYTES, in_pieces, spread
from qlora_kit.ops.nf4_dequantize import cuda as nf4_dequantize

_KERNELS = {
    torch.bfloat16: ("gated_activation_bfloat16", Kernels("gated_activation/bfloat16.cu")),
    torch.float16: ("gated_activation_float16", Kernels("gated_activation/float16.cu")),
    torch.float32: ("gated_activation_float32", Kernels("gated_activation/float32.cu")),
}


def serves(tensor: Tensor) -> bool:
    """Tell whether a call on this tensor can run here: three dtypes, any GPU from Ampere on."""
    return tensor.dtype in _KERNELS and nf4_dequantize.serves(tensor)


def forward(gate_up: Tensor, kind: str, out: Tensor) -> None:
    """act(gate) · up; see `reference.forward`.

    Args:
        gate_up: (M, 2F), on a CUDA device.
        kind: `silu`, `gelu_tanh` or `gelu`.
        out: (M, F), written.
    """
    _launch(kind, gate_up, (gate_up, out))


def backward(
    dact: Tensor, gate_up: Tensor, kind: str, d_gate_up: Tensor, act: Tensor | None
) -> None:
    """Gradient in gate and up; see `reference.backward`.

    Args:
        dact: (M, F), on a CUDA device.
        gate_up: (M, 2F).
        kind: `silu`, `gelu_tanh` or `gelu`.
        d_gate_up: (M, 2F), written.
        act: (M, F), written; or None.
    """
    _launch(f"backward_{kind}", gate_up, (dact, gate_up, d_gate_up, act))


def _launch(name: str, gate_up: Tensor, tensors: tuple[Tensor | None, ...]) -> None:
    """Launch one kernel on tensors in the order of its arguments."""
    if not gate_up.numel():
        return
    rows, f = gate_up.shape[0], gate_up.shape[1] // 2
    whole = in_pieces(f, *tensors)
    steps = f * gate_up.element_size() // PIECE_BYTES if whole else f
    grid, block, together = spread(rows, steps)
    prefix, kernels = _KERNELS[gate_up.dtype]
    strides = (0 if tensor is None else tensor.stride(0) for tensor in tensors)
    kernels.launch(
        f"{prefix}_{name}_{'pieces' if whole else 'ones'}",
        grid,
        block,
        (*tensors, rows, f, together, *strides),
        device=gate_up.device,
    )
