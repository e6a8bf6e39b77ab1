"""`nf4_quantize` in plain torch: the codec itself."""

from torch import Tensor

from qlora_kit.quant.double_quant import code_absmax
from qlora_kit.quant.nf4 import quantize_nf4


def quantize(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Quantize a weight; see `qlora_kit.quant.nf4.quantize_nf4`.

    Args:
        weight: any shape, float32, float16 or bfloat16.
        block_size: weights that share one scale.

    Returns:
        packed: (ceil(n/2), 1) uint8.
        absmax: (ceil(n/block_size),) float32.
    """
    return quantize_nf4(weight, block_size=block_size)


def quantize_scales(absmax: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize scales; see `qlora_kit.quant.double_quant.code_absmax`.

    Args:
        absmax: (blocks,) float32.
        offset: () float32, taken off first.

    Returns:
        codes: (blocks,) uint8.
        nested_absmax: (ceil(blocks/256),) float32.
    """
    return code_absmax(absmax, offset)
