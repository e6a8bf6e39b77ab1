"""`nf4_dequantize` as one CUDA launch, nested scales included.

Reads 0.516 bytes and writes 2 (or 4) per weight, once: the time is the card's
bandwidth and nothing else. The bits equal the reference's.
"""

from math import prod

import torch
from torch import Tensor

from qlora_kit.ops.jit import Kernels
from qlora_kit.quant.weight import NF4Weight

_KERNELS = Kernels("nf4_dequantize/nf4_dequantize.cu")
_THREADS = 256
_WEIGHTS_PER_BLOCK = _THREADS * 4 * 8
_BLOCKS_PER_PROCESSOR = 8
_NAMES = {
    torch.bfloat16: "nf4_dequantize_bfloat16",
    torch.float16: "nf4_dequantize_float16",
    torch.float32: "nf4_dequantize_float32",
}


def serves(tensor: Tensor) -> bool:
    """Tell whether a call on this tensor can run here: any CUDA GPU from Ampere on."""
    return tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) >= (8, 0)


def dequantize(weight: NF4Weight, dtype: torch.dtype) -> Tensor:
    """Decode a weight.

    Args:
        weight: of any shape, on a CUDA device.
        dtype: float32, bfloat16 or float16.

    Returns:
        The decoded weight, contiguous.
    """
    packed = weight.packed
    out = torch.empty(weight.shape, dtype=dtype, device=packed.device)
    count = prod(weight.shape)
    if packed.data_ptr() % 4 or not packed.is_contiguous():
        packed = packed.clone(memory_format=torch.contiguous_format)  # an unaligned slice
    processors = torch.cuda.get_device_properties(packed.device).multi_processor_count
    blocks = -(-count // _WEIGHTS_PER_BLOCK)
    _KERNELS.launch(
        _NAMES[dtype],
        min(blocks, processors * _BLOCKS_PER_PROCESSOR),
        _THREADS,
        (
            packed,
            weight.absmax,
            weight.nested_absmax,
            weight.offset,
            out,
            count,
            weight.block_size.bit_length() - 1,
        ),
        device=packed.device,
    )
    return out
