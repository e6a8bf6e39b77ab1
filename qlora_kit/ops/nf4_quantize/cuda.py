"""`nf4_quantize` on CUDA: one launch for codes and scales, one more for 8-bit scales.

The weight is read once and never copied to float32. The mean of the scales is
torch's own: it depends on the order of summation, and the bits must not.
"""

import torch
from torch import Tensor

from qlora_kit.ops.launch import Kernels
from qlora_kit.ops.nf4_dequantize import cuda as nf4_dequantize
from qlora_kit.quant.double_quant import GROUP_SIZE

_KERNELS = Kernels("nf4_quantize/nf4_quantize.cu")
_THREADS = 256
_TILE = 4096
_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


def serves(tensor: Tensor) -> bool:
    """Tell whether a call on this tensor can run here: three dtypes, any GPU from Ampere on."""
    return tensor.dtype in _NAMES and nf4_dequantize.serves(tensor)


def quantize(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Quantize a weight; see `reference.quantize`.

    Args:
        weight: any shape, float32, float16 or bfloat16, on a CUDA device.
        block_size: weights that share one scale.

    Returns:
        packed: (ceil(n/2), 1) uint8.
        absmax: (ceil(n/block_size),) float32.
    """
    weight = weight.contiguous()
    if weight.data_ptr() % 16:
        weight = weight.clone()  # an unaligned view
    count = weight.numel()
    device = weight.device
    packed = torch.empty(((count + 1) // 2, 1), dtype=torch.uint8, device=device)
    absmax = torch.empty(-(-count // block_size), dtype=torch.float32, device=device)
    _KERNELS.launch(
        f"nf4_quantize_{_NAMES[weight.dtype]}",
        min(-(-count // _TILE), nf4_dequantize.resident_blocks(device)),
        _THREADS,
        (weight, packed, absmax, count, block_size.bit_length() - 1),
        device=device,
    )
    return packed, absmax


def quantize_scales(absmax: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize scales; see `reference.quantize_scales`.

    Args:
        absmax: (blocks,) float32, on a CUDA device.
        offset: () float32, taken off first.

    Returns:
        codes: (blocks,) uint8.
        nested_absmax: (ceil(blocks/256),) float32.
    """
    absmax = absmax.contiguous()
    blocks, device = absmax.numel(), absmax.device
    groups = -(-blocks // GROUP_SIZE)
    codes = torch.empty(blocks, dtype=torch.uint8, device=device)
    nested_absmax = torch.empty(groups, dtype=torch.float32, device=device)
    _KERNELS.launch(
        "nf4_quantize_scales",
        min(groups, 2 * nf4_dequantize.resident_blocks(device)),
        _THREADS,
        (absmax, offset, codes, nested_absmax, blocks),
        device=device,
    )
    return codes, nested_absmax
