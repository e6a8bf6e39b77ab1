"""`nf4_scales` as one small launch."""

import torch
from torch import Tensor

from qlora_kit.ops.launch import Kernels
from qlora_kit.ops.nf4_dequantize import cuda as nf4_dequantize
from qlora_kit.ops.nf4_dequantize.cuda import resident_blocks
from qlora_kit.ops.nf4_scales import reference

_KERNELS = Kernels("nf4_scales/nf4_scales.cu")
_THREADS = 256
_MOST_BLOCKS = 2**31

serves = nf4_dequantize.serves


def stretched(  # needs a GPU
    absmax: Tensor, nested: Tensor | None, offset: Tensor | None, factors: Tensor
) -> Tensor:
    """Decode scales and stretch those of each row; see `reference.stretched`.

    Args:
        absmax: (blocks,) uint8 codes, or float32, on a CUDA device.
        nested: (groups,) float32, or None.
        offset: () float32, or None.
        factors: (N,) float32; divides the blocks.

    Returns:
        (blocks,) float32.
    """
    blocks = absmax.numel()
    if not 0 < blocks < _MOST_BLOCKS:
        return reference.stretched(absmax, nested, offset, factors)
    out = torch.empty(blocks, dtype=torch.float32, device=absmax.device)
    _KERNELS.launch(
        "nf4_scales",
        min(-(-blocks // _THREADS), 2 * resident_blocks(absmax.device)),
        _THREADS,
        (
            absmax.contiguous(),
            None if nested is None else nested.contiguous(),
            offset,
            factors.contiguous(),
            out,
            blocks,
            blocks // factors.numel(),
        ),
        device=absmax.device,
    )
    return out
