"""`rotary_` as one CUDA launch that reads and writes each value once."""

import torch
from torch import Tensor

from qlora_kit.ops.launch import Kernels
from qlora_kit.ops.layout import PIECE_BYTES, in_pieces, spread
from qlora_kit.ops.nf4_dequantize import cuda as nf4_dequantize

_KERNELS = {
    torch.bfloat16: ("rotary_bfloat16", Kernels("rotary/bfloat16.cu")),
    torch.float16: ("rotary_float16", Kernels("rotary/float16.cu")),
    torch.float32: ("rotary_float32", Kernels("rotary/float32.cu")),
}


def serves(tensor: Tensor) -> bool:
    """Tell whether a call on this tensor can run here: three dtypes, any GPU from Ampere on."""
    return tensor.dtype in _KERNELS and nf4_dequantize.serves(tensor)


def rotate_(
    heads: Tensor, cos: Tensor, sin: Tensor, inverse: bool, source: Tensor | None = None
) -> None:
    """Turn pairs of values; see `reference.rotate_`.

    Args:
        heads: (M, G, D), on a CUDA device, modified.
        cos: (rows, R).
        sin: (rows, R).
        inverse: turn the other way.
        source: as heads, read instead; or None.
    """
    half = cos.shape[-1] // 2
    if not heads.numel() or not half:
        return
    if cos.dtype not in (heads.dtype, torch.float32):
        cos, sin = cos.float(), sin.float()
    if half > 1 and (cos.stride(1) != 1 or sin.stride(1) != 1):
        cos, sin = cos.contiguous(), sin.contiguous()
    source = heads if source is None else source
    whole = in_pieces(half, heads, source) and in_pieces(half, cos, sin)
    tokens, count, _ = heads.shape
    steps = half * heads.element_size() // PIECE_BYTES if whole else half
    grid, block, together = spread(tokens, count * steps)
    prefix, kernels = _KERNELS[heads.dtype]
    kernels.launch(
        f"{prefix}_{'pieces' if whole else 'ones'}",
        grid,
        block,
        (
            heads,
            source,
            cos,
            sin,
            cos.dtype == torch.float32,
            inverse,
            tokens,
            count,
            half,
            cos.shape[0],
            together,
            *heads.stride()[:2],
            *source.stride()[:2],
            cos.stride(0),
            sin.stride(0),
        ),
        device=heads.device,
    )
